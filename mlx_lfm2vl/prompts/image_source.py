"""Opens images: paths, URLs, data URLs, bytes, Pillow images and arrays, upright in RGB."""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Union

from ..errors import ImageError, one_line, reason

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


RawImage = Union[str, Path, bytes, BinaryIO, "Image.Image", "np.ndarray[Any, Any]"]

# JPEG includes MPO; HEIF comes with pillow-heif, AVIF with some builds of Pillow. Others stay
# closed: Pillow hands EPS to Ghostscript, and rare readers are the least tested
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "AVIF", "HEIF")
HEIF_BRANDS = [b"ftyp" + brand for brand in (b"heic", b"heix", b"heim", b"mif1", b"hevc")]
MAX_FILE_BYTES = 256 * 2**20  # of an encoded picture
MAX_SIDE = 2**24  # pixels; Pillow bounds the area, but each row costs memory, too
# what Pillow and its plugins let through if a file is damaged
DAMAGE = (
    *(OSError, SyntaxError, ValueError, TypeError, EOFError, RuntimeError, struct.error),
    *(LookupError, ArithmeticError, AttributeError, AssertionError, MemoryError, zlib.error),
)
ORIENTATION = 0x0112  # EXIF tag
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # orientation -> Pillow's `Transpose`


def load_image(image: RawImage) -> Image.Image:
    """Opens an image and returns it upright in RGB.

    Takes a path, an http(s) or data URL, encoded bytes, a binary file object, a Pillow image or
    an array of (height, width), (height, width, 3) or (height, width, 4) uint8. The first frame
    of an animation counts; transparency is dropped and 16-bit grey loses its low byte, as in the
    official loader. Paths must lead to regular files of a known format. Pillow's own warnings are
    turned off.

    Raises:
        ImageError: missing, unreachable, damaged, too large, empty, or no image at all.
    """
    with _opened(image) as (name, picture):
        return _upright_rgb(picture, name)


def image_size(image: RawImage) -> tuple[int, int]:
    """(width, height) in pixels of an upright image; of a file, only the header is read.

    Raises:
        ImageError: as `load_image`, as far as a header shows it.
    """
    with _opened(image) as (name, picture), told(name, "is damaged"):
        orientation = _orientation(picture)
        if orientation > 1 and picture.format == "TIFF":
            picture.load()  # turns it, and forgets the orientation
            orientation = _orientation(picture)
        size = picture.width, picture.height
        return size[::-1] if orientation >= 5 else size


def read_image_file(path: str | Path) -> bytes:
    """The bytes of a picture's file, not yet decoded.

    Raises:
        ImageError: there is none, it is empty or too large, or no regular file.
    """
    with told(one_line(str(path)), "cannot be read"), _open_file(path) as file:
        return file.read()


@contextmanager
def told(name: str, what: str) -> Iterator[None]:
    """Turns whatever a reader of files lets through into one line that begins with a name."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist") from None
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise ImageError(f"{name} is not an image of a known format ({known})") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is too large to open: {reason(error)}") from None
    except DAMAGE as error:
        raise ImageError(f"{name} {what}: {reason(error)}") from None


@contextmanager
def _opened(image: RawImage) -> Iterator[tuple[str, Image.Image]]:
    """A picture, not yet decoded, and its name for messages."""
    from PIL import Image

    _silence()
    if isinstance(image, Image.Image):
        yield "image", image
    elif hasattr(image, "shape"):
        yield "array", _from_array(image)
    else:
        name = source_name(image)
        with told(name, "cannot be read"), open_source(image) as file, _identify(file) as picture:
            if max(picture.size) > MAX_SIDE:
                raise ValueError(f"a side has {max(picture.size)} pixels; at most {MAX_SIDE}")
            yield name, picture


def _silence() -> None:
    """Turns Pillow's warnings off: a picture is good, or it is an error."""
    # not for a while by `catch_warnings`, which several threads must not do at once
    module = r"(PIL|pillow_heif)\b"
    if not any(getattr(entry[3], "pattern", None) == module for entry in warnings.filters):
        warnings.filterwarnings("ignore", module=module)


def _orientation(picture: Image.Image) -> int:
    try:
        orientation = picture.getexif().get(ORIENTATION, 1)
        return orientation if orientation in TURNS else 1
    except DAMAGE:  # junk beside a good picture
        return 1


def _upright_rgb(picture: Image.Image, name: str) -> Image.Image:
    import numpy as np
    from PIL import Image

    if picture.width < 1 or picture.height < 1:
        raise ImageError(f"{name} has {picture.width}x{picture.height} pixels; it is empty")
    with told(name, "is damaged"):
        picture.load()
        orientation = _orientation(picture)
        if orientation > 1:
            picture = picture.transpose(Image.Transpose(TURNS[orientation]))
            picture.info.clear()  # the orientation with it
        if picture.mode.startswith("I;16"):
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        return picture if picture.mode == "RGB" else picture.convert("RGB")


def _identify(source: BinaryIO) -> Image.Image:
    """Opens the known formats, and HEIC if pillow-heif is installed."""
    from PIL import Image, UnidentifiedImageError

    def read() -> Image.Image:
        return Image.open(source, formats=[name for name in FORMATS if name in Image.OPEN])

    Image.preinit()
    try:
        return read()
    except UnidentifiedImageError:
        Image.init()  # imports the rarer formats
    source.seek(0)
    if source.read(12)[4:] in HEIF_BRANDS:
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            raise ValueError('HEIC needs pillow-heif: pip install "mlx-lfm2vl[heic]"') from None
        register_heif_opener()
    return read()


def source_name(image: Any) -> str:
    """What messages call an encoded picture or film."""
    if isinstance(image, (str, Path)):
        text = str(image)
        return "data URL" if text[:5].lower() == "data:" else one_line(text)
    return one_line(str(getattr(image, "name", "image")))


def open_source(image: Any, max_bytes: int | None = None) -> BinaryIO:
    """An encoded picture or film as a file; what lies in memory is bounded like a picture's file.

    Args:
        max_bytes: of a file on disk, if it may be larger than that of a picture.

    Raises:
        ImageError, OSError, ValueError: it cannot be had.
    """
    if isinstance(image, (bytes, bytearray, memoryview)):
        data = image
    elif isinstance(image, str) and image.lower().startswith(("http://", "https://")):
        from .url_reader import read_url

        data = read_url(image)
    elif isinstance(image, str) and image[:5].lower() == "data:":
        data = decode_data_url(image)
    elif isinstance(image, (str, Path)):
        return _open_file(image, max_bytes)
    elif hasattr(image, "read"):
        if hasattr(image, "seekable") and image.seekable():
            image.seek(0)
        data = image.read(MAX_FILE_BYTES + 1)
    else:
        raise ImageError(
            f"image of type {type(image).__name__} cannot be read; "
            "pass a path, URL, bytes, Pillow image or array"
        )
    _check_length(len(data))
    return io.BytesIO(data)


def _open_file(path: str | Path, max_bytes: int | None = None) -> BinaryIO:
    # not `Path.expanduser`, which fails if ~ begins a name that is no user's
    place = os.path.expanduser(path)
    status = os.stat(place)  # before opening: a pipe would block, a device may never end
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise ValueError(f"it is {kind}; it must be a regular file")
    _check_length(status.st_size, max_bytes)
    return open(place, "rb")


def _check_length(length: int, most: int | None = None) -> None:
    most = MAX_FILE_BYTES if most is None else most
    if length == 0:
        raise ValueError("it is empty: it has 0 bytes")
    if length > most:
        raise ValueError(f"it has more than {most} bytes")


def decode_data_url(url: str) -> bytes:
    """The bytes of a base64 `data:` URL; padding may be missing, the alphabet that of URLs."""
    import base64
    from urllib.parse import unquote

    header, comma, data = url.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise ImageError("data URL must look like data:image/png;base64,…")
    text = unquote(data) if "%" in data else data
    text = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError as error:
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
