"""Training data: JSON lines of conversations to batches that waste little on padding.

One line is one sample, `{"messages": […], "images": […], "tools": […]}` with messages in the
`transformers` form; image paths are relative to the file. `images` and `tools` may be absent.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

from ..errors import DataError, Lfm2VlError
from ..options import ImageOptions
from ..prompts.image_processor import NO_OPTIONS, ImageInput, Lfm2VlImageProcessor
from ..prompts.messages import image_of, is_image, is_video, video_of
from ..prompts.processor import Lfm2VlProcessor

if TYPE_CHECKING:
    import numpy as np


# Gives the items on: (items, what one is called, how many are done, how many there are)
Progress = Callable[[Iterable[Any], str, int, int], Iterable[Any]]

# Names of the splits inside a dataset folder: mlx-lm's, then those of the Hugging Face Hub
SPLIT_FILES = {
    "train": ("train.jsonl", "data.jsonl", "metadata.jsonl"),
    "validation": ("valid.jsonl", "validation.jsonl"),
}
PAD_MULTIPLE = 8  # rows of a batch end at a multiple, so that few shapes occur
# what a line or a picture may raise: bad names and endless nesting are found at various depths
UNUSABLE = (Lfm2VlError, OSError, ValueError, RecursionError)
NEIGHBOURS = 32  # batches among which samples are sorted by length


@dataclass(frozen=True)
class Sample:
    """One conversation, checked and tokenized; images are read when they are needed.

    Attributes:
        line: where it stands in the file, from 1.
        token_ids, assistant_mask: (tokens,) int32 and bool.
        images: paths, URLs or data URLs, in order.
        patches: of all views, the measure of what the vision tower has to do.
    """

    line: int
    token_ids: np.ndarray[Any, Any]
    assistant_mask: np.ndarray[Any, Any]
    images: tuple[ImageInput, ...]
    patches: int

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Dataset:
    """The samples of a file, and what was left out of it: (line, reason)."""

    path: Path
    samples: tuple[Sample, ...]
    skipped: tuple[tuple[int, str], ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def digest(self) -> int:
        """A fingerprint of the tokens of all samples."""
        digest = 0
        for sample in self.samples:
            digest = crc32(sample.token_ids.tobytes(), digest)
            digest = crc32(sample.assistant_mask.tobytes(), digest)
        return digest


@dataclass(frozen=True)
class Batch:
    """Samples side by side, padded at the end, where a causal model cannot see it.

    Attributes:
        token_ids: (rows, length) int32.
        positions: (targets,) int32, places in rows·length whose next token counts.
        targets: (targets,) int32, those next tokens.
        pixel_values: (patches of all views, 3·16²) uint8, or None.
        spatial_shapes: (rows, columns) in patches, one per view.
        tokens: how many are no padding.
        skipped: (line, reason) of samples whose images could not be read.
    """

    token_ids: np.ndarray[Any, Any]
    positions: np.ndarray[Any, Any]
    targets: np.ndarray[Any, Any]
    pixel_values: np.ndarray[Any, Any] | None
    spatial_shapes: tuple[tuple[int, int], ...]
    tokens: int
    skipped: tuple[tuple[int, str], ...] = ()


def user_path(path: str | Path) -> Path:
    """A path as a user writes it; `~` is the home folder, or part of a name."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # there is no such user
        return Path(path)


def find_split(data: str | Path, split: str) -> Path | None:
    """The file of a split: `data` itself for training, or the file inside a dataset folder."""
    path = user_path(data)
    if os.path.isdir(path):
        names = SPLIT_FILES[split]
        found = [path / name for name in names if (path / name).exists()]
        if not found and split == "train":
            raise DataError(f"{path} has none of {', '.join(names)}")
        return found[0] if found else None
    if not os.path.exists(path):
        raise DataError(f"{path} does not exist; pass a file of JSON lines or its folder")
    return path if split == "train" else None


def read_dataset(
    path: str | Path,
    processor: Lfm2VlProcessor,
    *,
    max_length: int,
    skip_bad: bool = False,
    image_options: ImageOptions = NO_OPTIONS,
    progress: Progress | None = None,
) -> Dataset:
    """Reads and checks every line; pixels stay on the disk.

    Args:
        max_length: most tokens of a sample, image tokens included.
        skip_bad: leave bad lines out instead of refusing the file.
        progress: given the lines, their unit, 0 and their number; returns the lines.

    Raises:
        DataError: the first bad line and its reason, or nothing usable at all.
    """
    path = user_path(path)
    samples: list[Sample] = []
    skipped: list[tuple[int, str]] = []
    found = read_lines(path)
    lines = found if progress is None else progress(found, "line", 0, len(found))
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            samples.append(read_sample(line, number, path.parent, processor, image_options))
            if len(samples[-1]) > max_length:
                raise DataError(f"{len(samples.pop())} tokens; --max-length is {max_length}")
        except UNUSABLE as error:
            skipped.append((number, str(error)))
    if skipped and not skip_bad:
        number, reason = skipped[0]
        more = f", and {len(skipped) - 1} more bad lines" if len(skipped) > 1 else ""
        raise DataError(f"{path} line {number}: {reason}{more}; --skip-bad leaves them out")
    if not samples:
        raise DataError(f"{path} has no usable line")
    return Dataset(path, tuple(samples), tuple(skipped))


def read_lines(path: Path) -> list[bytes]:
    """The lines of a file; only a line feed ends one, texts may hold other separators."""
    try:
        return path.read_bytes().rstrip(b"\n").split(b"\n")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def read_sample(
    line: bytes, number: int, folder: Path, processor: Lfm2VlProcessor, image_options: ImageOptions
) -> Sample:
    """One line to a sample; a Lfm2VlError gives the reason if it cannot be used."""
    import numpy as np

    messages, tools = read_conversation(line, folder)
    transcript = processor.transcribe(messages, tools=tools, image_options=image_options)
    mask = np.array(transcript.assistant_mask, dtype=np.bool_)
    if not mask[1:].any():
        raise DataError("no assistant turn, so there is nothing to learn")
    patches = sum(rows * cols for rows, cols in transcript.spatial_shapes)
    ids = np.array(transcript.token_ids, dtype=np.int32)
    return Sample(number, ids, mask, transcript.images, patches)


def read_conversation(line: bytes, folder: Path) -> tuple[list[Any], Any]:
    """Messages, their image paths seen from the data file, and tools of a line."""
    try:
        entry = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"cannot be read: {error}") from None
    except ValueError as error:  # numbers of thousands of digits, too
        raise DataError(f"no JSON: {error}") from None
    if not isinstance(entry, Mapping) or not isinstance(entry.get("messages"), list):
        raise DataError('a sample is an object with "messages", a list')
    images, tools = entry.get("images") or [], entry.get("tools") or []
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise DataError('"images" must be a list of paths')
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError('"tools" must be a list of JSON schemas')
    waiting = iter(images)
    messages = [_with_paths(message, folder, waiting) for message in entry["messages"]]
    unused = sum(1 for _ in waiting)
    if unused:
        raise DataError(f'"images" has {unused} more than the messages have places')
    return messages, tools or None


def _with_paths(message: Any, folder: Path, waiting: Iterator[str]) -> Any:
    """The message with its paths of images and films seen from the data file."""
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), list):
        return message
    items = []
    for item in message["content"]:
        if is_image(item):
            image = image_of(item)
            image = image if image is not None else next(waiting, None)
            if image is None:
                raise DataError("the messages have more image places than images")
            item = {"type": "image", "image": _located(str(image), folder)}
        elif is_video(item) and (video := video_of(item)) is not None:
            item = {**item, "type": "video", "video": _located(str(video), folder)}
        items.append(item)
    return {**message, "content": items}


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a message, whatever the form of its content."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    items = content if isinstance(content, list) else []
    return "".join(item.get("text", "") for item in items if isinstance(item, Mapping))


def _located(image: str, folder: Path) -> str:
    if image.startswith(("http://", "https://", "data:")):
        return image
    return str(folder / user_path(image))


def batch_order(
    samples: Sequence[Sample], batch_size: int, seed: int, epoch: int
) -> list[list[int]]:
    """Which samples come together in an epoch, in random order, of about one length each.

    Follows from the arguments alone, so that a resumed run continues with the same batches. What
    does not fill a batch waits for another epoch, unless it is all there is.
    """
    rng = random.Random(f"{seed} {epoch}")
    order = list(range(len(samples)))
    rng.shuffle(order)
    # chance decides what waits, not length
    order = order[: len(order) // batch_size * batch_size] or order
    batches = []
    for start in range(0, len(order), batch_size * NEIGHBOURS):
        # sorted among neighbours only: what comes together stays a matter of chance
        near = sorted(order[start : start + batch_size * NEIGHBOURS], key=lambda i: len(samples[i]))
        batches += [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
    rng.shuffle(batches)
    return batches


def collate(
    samples: Sequence[Sample],
    image_processor: Lfm2VlImageProcessor,
    image_options: ImageOptions = NO_OPTIONS,
    skip_bad: bool = False,
) -> Batch:
    """Reads the images of samples and lays the samples side by side.

    If no sample is left, the batch is a row of padding that adds nothing to a step.

    Raises:
        DataError: an image cannot be read, with the line of its sample, and none may be skipped.
    """
    import numpy as np

    rows, skipped = [], []
    for sample in samples:
        try:
            rows.append((sample, [image_processor(i, image_options) for i in sample.images]))
        except UNUSABLE as error:
            skipped.append((sample.line, str(error)))
    if skipped and not skip_bad:
        raise DataError(f"line {skipped[0][0]}: {skipped[0][1]}")
    # rows with views of one shape beside each other: the vision tower takes them together
    rows.sort(key=lambda row: [image.spatial_shapes for image in row[1]])
    length = max((len(sample) for sample, _ in rows), default=1)
    length = -(-length // PAD_MULTIPLE) * PAD_MULTIPLE
    token_ids = np.zeros((max(1, len(rows)), length), dtype=np.int32)
    counts = np.zeros(token_ids.shape, dtype=np.bool_)  # whether the next token does
    for row, (sample, _) in enumerate(rows):
        token_ids[row, : len(sample)] = sample.token_ids
        counts[row, : len(sample) - 1] = sample.assistant_mask[1:]
    positions = np.flatnonzero(counts).astype(np.int32)
    images = [image for _, images in rows for image in images]
    return Batch(
        token_ids,
        positions,
        token_ids.reshape(-1)[positions + 1],
        np.concatenate([image.pixel_values for image in images]) if images else None,
        tuple(shape for image in images for shape in image.spatial_shapes),
        sum(len(sample) for sample, _ in rows),
        tuple(skipped),
    )


def prefetch(jobs: Iterator[Callable[[], Batch]], depth: int = 2) -> Iterator[Batch]:
    """Runs jobs in a thread, a few ahead of the one whose result is wanted, in order."""
    from collections import deque
    from concurrent.futures import Future, ThreadPoolExecutor

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="lfm2vl-data") as pool:
        waiting: deque[Future[Batch]] = deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(job))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
