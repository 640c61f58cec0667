"""Images to views of packed patches, as `transformers`' `Lfm2VlImageProcessor` makes them.

A view is one picture for the vision encoder: a whole small image, a tile of a large one, or the
thumbnail that comes after the tiles. A patch is 16x16 pixels in (row, column, channel) order.
Pixels stay uint8 here; they are normalised on the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Union

from ..errors import ImageError
from ..options import MAX_GRID_SIDE, ImageOptions, ImageProcessorConfig

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
from .image_source import RawImage, load_image

ImageInput = Union[RawImage, "ProcessedImage"]
NO_OPTIONS = ImageOptions()
# bounds of memory on the way to a view, far above those of pictures that are not thin lines
LONG_SIDE = 2**20  # pixels; the weights of Pillow's filters take 16 bytes and more for each
MOST_PIXELS = 2**24


@dataclass(frozen=True)
class ImageLayout:
    """How one image is cut: a grid of tiles and, apart from it, one resized whole view.

    Attributes:
        rows, cols: the grid; 0 and 0 if the image is not tiled.
        whole: (height, width) in pixels of the resized whole image: the only view of a small
            image, the thumbnail of a tiled one, None if a tiled image has no thumbnail.
    """

    rows: int
    cols: int
    whole: tuple[int, int] | None


@dataclass(frozen=True)
class ImagePlan:
    """What follows from an image's size alone.

    Attributes:
        spatial_shapes: (rows, columns) in patches, one per view.
        layout: where the views come from.
        view_tokens: image tokens of each view.
        use_image_special_tokens: whether marks stand around and between the views.
    """

    spatial_shapes: tuple[tuple[int, int], ...]
    layout: ImageLayout
    view_tokens: tuple[int, ...]
    use_image_special_tokens: bool

    @property
    def patches(self) -> int:
        """Of all views."""
        return sum(rows * cols for rows, cols in self.spatial_shapes)


@dataclass(frozen=True)
class ProcessedImage(ImagePlan):
    """One image as the encoder wants it.

    Attributes:
        pixel_values: (patches of all views, 3·16²) uint8.
    """

    pixel_values: np.ndarray[Any, Any]

    @cached_property
    def digest(self) -> str:
        """A fingerprint of everything that the model sees of this image."""
        import hashlib

        content = hashlib.blake2b(self.pixel_values.tobytes(), digest_size=16)
        content.update(repr((self.spatial_shapes, self.use_image_special_tokens)).encode())
        return content.hexdigest()


class Lfm2VlImageProcessor:
    """Cuts and resizes images by the settings of a checkpoint.

    The geometry is that of `transformers`' `Lfm2VlImageProcessor`; resizing is Pillow's, at most
    one grey level away from torchvision's if bilinear, and two if bicubic.
    """

    def __init__(self, config: ImageProcessorConfig) -> None:
        self.config = config

    def __call__(self, image: ImageInput, options: ImageOptions = NO_OPTIONS) -> ProcessedImage:
        """Loads, turns upright, resizes and cuts one image; one that was cut before stays as it is.

        Raises:
            ImageError: the image cannot be read.
            ConfigError: the options do not fit together.
        """
        import numpy as np

        if isinstance(image, ProcessedImage):
            return image
        config = options.apply(self.config)
        picture = load_image(image)
        plan = self.plan(picture.width, picture.height, options)
        layout, parts = plan.layout, []
        if layout.rows > 0:
            size = config.tile_size
            parts.append(self.crop_image_to_patches(picture, layout.rows, layout.cols, size))
        if layout.whole is not None:
            pixels = self._resize(picture, *layout.whole)
            parts.append(_patches(pixels, 1, 1, config.encoder_patch_size))
        return ProcessedImage(
            plan.spatial_shapes,
            layout,
            plan.view_tokens,
            plan.use_image_special_tokens,
            np.concatenate(parts),
        )

    def plan(self, width: int, height: int, options: ImageOptions = NO_OPTIONS) -> ImagePlan:
        """Views and tokens of an image of this size (pixels, upright), without its pixels."""
        config = options.apply(self.config)
        layout = self.layout(height, width, options)
        side = config.tile_size // config.encoder_patch_size
        shapes = [(side, side)] * (layout.rows * layout.cols)
        if layout.whole is not None:
            patch = config.encoder_patch_size
            shapes.append((layout.whole[0] // patch, layout.whole[1] // patch))
        return ImagePlan(
            tuple(shapes),
            layout,
            tuple(self.view_tokens(layout, options)),
            config.use_image_special_tokens,
        )

    def smart_resize(
        self, height: int, width: int, options: ImageOptions = NO_OPTIONS
    ) -> tuple[int, int]:
        """Size of a whole view: sides divisible by 32, area within the token limits.

        The aspect ratio is kept as closely as that allows. Of an image thinner than
        `max_image_tokens` to 1, the official size has more tokens than that (1x100,000: 7,619);
        here it is a strip of one row or column with `max_image_tokens`. Growing to
        `min_image_tokens` rounds up, as there, and so may pass a maximum that is close to it.
        Returns (width, height) in pixels, in the order of the official method.
        """
        config = options.apply(self.config)
        factor = config.encoder_patch_size * config.downsample_factor
        min_pixels = config.min_image_tokens * factor**2
        max_pixels = config.max_image_tokens * factor**2
        new_height = max(factor, round(height / factor) * factor)
        new_width = max(factor, round(width / factor) * factor)
        if new_height * new_width > max_pixels:
            shrink = math.sqrt(height * width / max_pixels)
            new_height = max(factor, math.floor(height / shrink / factor) * factor)
            new_width = max(factor, math.floor(width / shrink / factor) * factor)
        elif new_height * new_width < min_pixels:
            grow = math.sqrt(min_pixels / (height * width))
            new_height = math.ceil(height * grow / factor) * factor
            new_width = math.ceil(width * grow / factor) * factor
        if min(new_height, new_width) == factor:
            longest = config.max_image_tokens * factor
            new_height, new_width = min(new_height, longest), min(new_width, longest)
        return new_width, new_height

    def layout(self, height: int, width: int, options: ImageOptions = NO_OPTIONS) -> ImageLayout:
        """Decides between one view and tiles, from the size alone.

        An image is tiled if its rounded area (each side to a multiple of 32) exceeds the
        largest view times `max_pixels_tolerance`.
        """
        config = options.apply(self.config)
        new_width, new_height = self.smart_resize(height, width, options)
        splitting = config.do_image_splitting and config.max_tiles > 1
        if not splitting or not _is_large(height, width, config):
            return ImageLayout(0, 0, (new_height, new_width))
        cols, rows = _grid(height, width, config.min_tiles, config.max_tiles, config.tile_size)
        thumbnail = config.use_thumbnail and rows * cols > 1
        return ImageLayout(rows, cols, (new_height, new_width) if thumbnail else None)

    def crop_image_to_patches(
        self, image: Image.Image, rows: int, cols: int, tile_size: int
    ) -> np.ndarray[Any, Any]:
        """Resizes to the grid and cuts tiles row by row, each into its patches.

        Returns (rows·cols·patches per tile, 3·16²) uint8.
        """
        pixels = self._resize(image, rows * tile_size, cols * tile_size)
        return _patches(pixels, rows, cols, self.config.encoder_patch_size)

    def view_tokens(self, layout: ImageLayout, options: ImageOptions = NO_OPTIONS) -> list[int]:
        """Image tokens of each view, tiles row by row, then the whole view."""
        config = options.apply(self.config)
        factor = config.encoder_patch_size * config.downsample_factor
        tokens = [(config.tile_size // factor) ** 2] * (layout.rows * layout.cols)
        if layout.whole is not None:
            tokens.append((layout.whole[0] // factor) * (layout.whole[1] // factor))
        return tokens

    def count_image_tokens(
        self, width: int, height: int, options: ImageOptions = NO_OPTIONS
    ) -> int:
        """Positions that an image of this size (pixels, upright) takes in a prompt.

        Counts `<image>` tokens and the marks around and between views. No pixel is touched.
        """
        if width < 1 or height < 1:
            raise ImageError(f"image of {width}x{height} pixels: both sides must be 1 or more")
        plan = self.plan(width, height, options)
        marks = 2 + marks_of(plan.layout) if plan.use_image_special_tokens else 0
        return sum(plan.view_tokens) + marks

    def _resize(self, image: Image.Image, height: int, width: int) -> np.ndarray[Any, Any]:
        """Resizes the width, then the height, as torchvision does.

        Pillow by itself begins with the height of tall images, and the rounding in between then
        moves up to six grey levels. Thin tall images whose widened form would need more than
        `MOST_PIXELS` are shortened first, and sides over `LONG_SIDE` are averaged down to it
        before: within one grey level of the other way, on noise by bicubic within ten.
        """
        import numpy as np
        from PIL import Image

        resample = Image.Resampling(self.config.resample)
        if max(image.size) > LONG_SIDE:
            image = image.reduce((-(-image.width // LONG_SIDE), -(-image.height // LONG_SIDE)))
        if width * image.height > max(MOST_PIXELS, image.width * image.height, width * height):
            image = image.resize((image.width, height), resample)
        image = image.resize((width, image.height), resample)
        return np.asarray(image.resize((width, height), resample))


def marks_of(layout: ImageLayout) -> int:
    """How many views carry a mark of their own: those of a grid of more than one tile."""
    tiles = layout.rows * layout.cols
    return tiles + (layout.whole is not None) if tiles > 1 else 0


def _is_large(height: int, width: int, config: ImageProcessorConfig) -> bool:
    patch = config.encoder_patch_size
    factor = patch * config.downsample_factor
    rounded_height = max(patch, round(height / factor) * factor)
    rounded_width = max(patch, round(width / factor) * factor)
    limit = config.max_image_tokens * factor**2 * config.max_pixels_tolerance
    return rounded_height * rounded_width > limit


@lru_cache(maxsize=64)
def _grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    # from a set, then sorted by area only: ties keep the set's order, which decides between
    # equally good grids in the official code, so the same grids enter it in the same order
    grids: set[tuple[int, int]] = set()
    for n in range(min_tiles, max_tiles + 1):
        for cols in range(1, n + 1):
            # the others entered in an earlier round
            new = range(1, n + 1) if n in (cols, min_tiles) else (n,)
            grids.update((cols, rows) for rows in new if min_tiles <= cols * rows <= max_tiles)
    fitting = (grid for grid in grids if max(grid) <= MAX_GRID_SIDE)
    return tuple(sorted(fitting, key=lambda grid: grid[0] * grid[1]))


def _grid(height: int, width: int, min_tiles: int, max_tiles: int, tile: int) -> tuple[int, int]:
    """The (cols, rows) nearest in aspect ratio; of equally near ones, the later if it fits."""
    best, best_distance = (1, 1), math.inf
    for cols, rows in _grids(min_tiles, max_tiles):
        distance = abs(width / height - cols / rows)
        fits = width * height > 0.5 * tile * tile * cols * rows
        if distance < best_distance or (distance == best_distance and fits):
            best, best_distance = (cols, rows), distance
    return best


def _patches(
    pixels: np.ndarray[Any, Any], rows: int, cols: int, patch: int
) -> np.ndarray[Any, Any]:
    """(rows·h·patch, cols·w·patch, 3) -> (rows·cols·h·w, patch·patch·3), tile after tile."""
    height, width = pixels.shape[0] // (rows * patch), pixels.shape[1] // (cols * patch)
    tiles = pixels.reshape(rows, height, patch, cols, width, patch, 3)
    return tiles.transpose(0, 3, 1, 4, 2, 5, 6).reshape(-1, patch * patch * 3)
