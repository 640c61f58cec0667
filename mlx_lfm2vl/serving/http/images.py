"""Images and films of requests: `data:` and http(s) URLs, files under a folder.

Everything is bounded, and made ready once.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast
from urllib.parse import unquote, urlsplit

from ...errors import ImageError, one_line
from ...options import ImageOptions
from ...prompts.image_processor import ImagePlan, ProcessedImage
from ...prompts.image_source import decode_data_url, image_size, read_image_file
from ...prompts.messages import frame_items
from ...prompts.processor import Lfm2VlProcessor
from ...prompts.url_reader import read_url
from .errors import HttpError
from .options import ServerOptions

URL_SECONDS = 10.0
URL_BYTES = 20_000_000
MAX_KEPT_BYTES = 256 << 20  # of prepared pixels
DETAILS = ("auto", "low", "high", "original")
MAX_VIEW_TOKENS = 1024  # the vision tower's attention grows with their square
LOW = 64  # image tokens of an image whose details do not matter


@dataclass(frozen=True)
class ImagePart:
    """An image or a film as a request names it.

    Attributes:
        url: where it is, or what it is.
        options: how it is to be seen.
        detail: "low", or anything else for the checkpoint's own settings.
        param: its place in the request.
        frames: how many of a film are seen; 0 for an image.
    """

    url: str
    options: ImageOptions
    detail: str
    param: str
    frames: int = 0


class ReadImage(NamedTuple):
    """What was read, ready for the model.

    Attributes:
        items: of a message's content: an image, or a film's frames, each after its time.
        size: (width, height) as a file.
    """

    items: list[dict[str, Any]]
    size: tuple[int, int]

    @property
    def image(self) -> ProcessedImage:
        """The only image."""
        return cast(ProcessedImage, self.items[0]["image"])

    @property
    def nbytes(self) -> int:
        """Of all pixels."""
        return sum(i["image"].pixel_values.nbytes for i in self.items if i["type"] == "image")


class Images:
    """Makes images ready for the model, each content once while it is remembered."""

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self.kept: OrderedDict[Any, asyncio.Task[ReadImage]] = OrderedDict()
        self.nbytes = 0
        self.pool = ThreadPoolExecutor(4, thread_name_prefix="images")  # decoding
        self.fetchers = ThreadPoolExecutor(16, thread_name_prefix="fetch")  # mostly waiting

    def close(self) -> None:
        """Lets the threads go."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.fetchers.shutdown(wait=False, cancel_futures=True)

    async def read(self, part: ImagePart, processor: Lfm2VlProcessor) -> ReadImage:
        """The image, ready for the model.

        Raises:
            HttpError: 400 or 413, naming its place in the request.
        """
        loop = asyncio.get_running_loop()
        try:
            data = await loop.run_in_executor(self.fetchers, self._bytes, part)
            options = _as_seen(part, processor)
            digest = await loop.run_in_executor(self.pool, _digest, data)
            key = digest, options, part.frames
            if key not in self.kept:
                work = loop.run_in_executor(
                    self.pool, self._process, data, part.frames, processor, options
                )
                self.kept[key] = asyncio.ensure_future(self._keep(key, work))
            self.kept.move_to_end(key)
            return await asyncio.shield(self.kept[key])
        except ImageError as error:
            raise HttpError(400, str(error), part.param, "invalid_image") from None
        except HttpError as error:
            error.param = part.param
            raise

    async def _keep(self, key: Any, work: asyncio.Future[ReadImage]) -> ReadImage:
        try:
            read = await work
        except BaseException:
            del self.kept[key]
            raise
        self.nbytes += read.nbytes
        while self.nbytes > MAX_KEPT_BYTES:
            oldest = next((k for k, task in self.kept.items() if task.done()), None)
            if oldest is None:
                break
            self.nbytes -= self.kept.pop(oldest).result().nbytes
        return read

    def _process(
        self, data: bytes, frames: int, processor: Lfm2VlProcessor, options: ImageOptions
    ) -> ReadImage:
        sizes: list[tuple[int, int]] = []

        def see(picture: Any) -> ProcessedImage:
            width, height = picture.size if frames else image_size(picture)
            sizes.append((width, height))
            if width * height > self.options.max_pixels:
                most = self.options.max_pixels
                raise HttpError(413, f"the image has {width}x{height} pixels; {most} are allowed")
            self._check_plan(processor.image_processor.plan(width, height, options), processor)
            image = processor.image_processor(picture, options)
            assert image.digest  # computed here, not in the worker's thread
            return image

        if frames:
            items = list(frame_items(data, frames, see, self.options.max_pixels))
        else:
            items = [{"type": "image", "image": see(data)}]
        return ReadImage(items, sizes[0])

    def _check_plan(self, plan: ImagePlan, processor: Lfm2VlProcessor) -> None:
        """Refuses what would take too much memory, before any is taken."""
        usual = processor.image_processor.config.max_image_tokens
        for what, tokens, most in (
            ("image", sum(plan.view_tokens), self.options.context - 1),
            ("view of the image", max(plan.view_tokens), max(usual, MAX_VIEW_TOKENS)),
        ):
            if tokens > most:
                message = f"by these image_options a {what} has {tokens} tokens; {most} are allowed"
                raise HttpError(400, message, code="context_length_exceeded")

    def _bytes(self, part: ImagePart) -> bytes:
        url = part.url
        scheme = url[:8].partition(":")[0].lower()
        if scheme == "data":
            return decode_data_url(url)
        if scheme in ("http", "https"):
            if self.options.image_urls == "off":
                raise ImageError("this server fetches no URLs; send the image as a data: URL")
            return read_url(
                url,
                max_bytes=min(URL_BYTES, self.options.max_body),
                seconds=URL_SECONDS,
                addresses=self.options.image_urls,
            )
        if scheme == "file" and self.options.media_root is not None:
            return read_image_file(inside(self.options.media_root, unquote(urlsplit(url).path)))
        raise ImageError(
            f"{one_line(url[:100])} is no image for this server; send a data: URL or an http(s) URL"
        )


def inside(root: Path, path: str) -> Path:
    """A file's true path, if that is under a folder."""
    if "\0" in path:
        raise ImageError("the path holds a NUL character")
    folder, place = os.path.realpath(root), os.path.realpath(os.path.join(root, path))
    if os.path.commonpath([folder, place]) != folder:
        raise ImageError("the file is not under this server's media folder")
    return Path(place)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _as_seen(part: ImagePart, processor: Lfm2VlProcessor) -> ImageOptions:
    if part.detail != "low":
        return part.options
    config = processor.image_processor.config
    most = max(config.min_image_tokens, min(LOW, config.max_image_tokens))
    return replace(part.options, max_image_tokens=most, do_image_splitting=False)
