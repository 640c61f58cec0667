"""Opens images: paths, URLs, data URLs, bytes, Pillow images and arrays, upright in RGB."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Union

from ..errors import ImageError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


RawImage = Union[str, Path, bytes, BinaryIO, "Image.Image", "np.ndarray[Any, Any]"]

# what Pillow and its plugins let through where a file is damaged
DAMAGE = (OSError, SyntaxError, ValueError, TypeError, EOFError, RuntimeError, struct.error)
URL_TIMEOUT = 30.0  # seconds
ORIENTATION = 0x0112  # EXIF tag


def load_image(image: RawImage) -> Image.Image:
    """Opens an image and returns it upright in RGB.

    Takes a path, an http(s) or data URL, encoded bytes, a binary file object, a Pillow image or
    an array of (height, width), (height, width, 3) or (height, width, 4) uint8. The first frame
    of an animation counts; transparency is dropped and 16-bit grey loses its low byte, as in the
    official loader.

    Raises:
        ImageError: missing, unreachable, damaged, too large, empty, or no image at all.
    """
    from PIL import Image

    if isinstance(image, Image.Image):
        return _upright_rgb(image, "image")
    if hasattr(image, "shape"):
        return _upright_rgb(_from_array(image), "array")
    name, picture = _open(image)
    with picture:
        return _upright_rgb(picture, name)


def image_size(image: RawImage) -> tuple[int, int]:
    """(width, height) in pixels of an upright image; of a file, only the header is read.

    Raises:
        ImageError: as `load_image`, as far as a header shows it.
    """
    from PIL import Image

    if isinstance(image, Image.Image):
        return _upright_size(image, "image")
    if hasattr(image, "shape"):
        return _upright_size(_from_array(image), "array")
    name, picture = _open(image)
    with picture:
        return _upright_size(picture, name)


def _upright_size(picture: Image.Image, name: str) -> tuple[int, int]:
    try:
        turned = picture.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    except DAMAGE as error:
        raise ImageError(f"{name} is damaged: {error}") from None
    return (picture.height, picture.width) if turned else (picture.width, picture.height)


def _upright_rgb(picture: Image.Image, name: str) -> Image.Image:
    from PIL import ImageOps

    if picture.width < 1 or picture.height < 1:
        raise ImageError(f"{name} has {picture.width}x{picture.height} pixels; it is empty")
    try:
        if picture.getexif().get(ORIENTATION, 1) != 1:  # the function copies in any case
            picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I;16"):
            picture = picture.point(lambda value: value / 256).convert("L")
        picture.load()
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    except DAMAGE as error:
        raise ImageError(f"{name} is damaged: {error}") from None


def _open(image: str | Path | bytes | BinaryIO) -> tuple[str, Image.Image]:
    """Opens an encoded image, without decoding it; returns its name for messages, too."""
    from PIL import Image, UnidentifiedImageError

    name, source = _source(image)
    try:
        return name, _identify(source)
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not an image that Pillow can read") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is too large to open: {error}") from None
    except DAMAGE as error:
        raise ImageError(f"{name} cannot be read: {error}") from None


def _identify(source: Any) -> Image.Image:
    """Opens what Pillow knows, and HEIC where pillow-heif is installed."""
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(source)
    except UnidentifiedImageError:
        if not _is_heif(source):
            raise
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise ValueError('HEIC needs pillow-heif: pip install "mlx-lfm2vl[heic]"') from None
    register_heif_opener()
    return Image.open(source)


def _is_heif(source: Any) -> bool:
    """Looks at the brand in the first bytes; a file object is rewound."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            start = file.read(12)
    else:
        source.seek(0)
        start = source.read(12)
        source.seek(0)
    return start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"heim", b"mif1", b"hevc")


def _source(image: str | Path | bytes | BinaryIO) -> tuple[str, Any]:
    import io

    if isinstance(image, (bytes, bytearray)):
        if len(image) == 0:
            raise ImageError("image has 0 bytes; it is empty")
        return "image", io.BytesIO(image)
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        return image, io.BytesIO(_download(image))
    if isinstance(image, str) and image.startswith("data:"):
        return "data URL", io.BytesIO(_decode_data_url(image))
    if isinstance(image, (str, Path)):
        path = Path(image).expanduser()
        if path.is_file() and path.stat().st_size == 0:
            raise ImageError(f"{path} has 0 bytes; it is empty")
        return str(path), path
    if hasattr(image, "read"):
        return getattr(image, "name", "image"), image
    raise ImageError(
        f"image of type {type(image).__name__} cannot be read; "
        "pass a path, URL, bytes, Pillow image or array"
    )


def _download(url: str) -> bytes:
    import urllib.error
    import urllib.request

    request = urllib.request.Request(url, headers={"User-Agent": "mlx-lfm2vl"})
    try:
        with urllib.request.urlopen(request, timeout=URL_TIMEOUT) as response:
            return bytes(response.read())
    except (OSError, ValueError) as error:  # URLError, HTTPError and timeouts are OSErrors
        raise ImageError(f"{url} cannot be fetched: {error}") from None


def _decode_data_url(url: str) -> bytes:
    import base64
    import binascii

    header, comma, data = url.partition(",")
    if not comma or not header.endswith(";base64"):
        raise ImageError("data URL must look like data:image/png;base64,…")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise ImageError(f"data URL is not valid base64: {error}") from None


def _from_array(array: Any) -> Image.Image:
    import numpy as np
    from PIL import Image

    values = np.asarray(array)
    channels_last = values.ndim == 3 and values.shape[2] in (1, 3, 4)
    if values.dtype != np.uint8 or not (values.ndim == 2 or channels_last):
        raise ImageError(
            f"array of shape {values.shape} and type {values.dtype} is no image; "
            "it must be uint8 of (height, width), (height, width, 3) or (height, width, 4)"
        )
    if values.size == 0:
        raise ImageError(f"array of shape {values.shape} is empty")
    return Image.fromarray(values[..., 0] if values.shape[2:] == (1,) else values)
