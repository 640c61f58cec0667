"""Folder mode: one prompt for many images, one JSON line per answer, resumable.

A run may be killed at any moment: lines are written whole, and the next start cuts off what is
not. Images are read and cut into patches by threads; only the main thread touches MLX.

Under `mlx.launch` each process takes every n-th image and writes `OUTPUT.partN`. The first one
moves these lines to OUTPUT, at the start and at the end, so that the next run may have another
number of processes.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import signal
import sys
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, cast

from ..errors import ImageError, OutputError
from ..options import ImageOptions

if TYPE_CHECKING:
    import mlx.core as mx

    from ..models.lfm2_vl import Lfm2VlForConditionalGeneration
    from ..prompts.processor import Lfm2VlProcessor, Prompt


SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic")
THREADS = 4
LOOK_AHEAD = 8  # images

# what a disk says that has no locks; there the user alone keeps two runs apart
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
LINE_START = b'{"image": '
Key = tuple[str, str | None]  # path and digest


@dataclass(frozen=True)
class Task:
    """What is asked about each image; a difference in any field makes other answers."""

    model: str
    revision: str | None
    dtype: str | None
    prompt: str
    system: str | None
    max_tokens: int
    seed: int | None
    sampling: dict[str, Any]  # as stated; None takes the checkpoint's
    image_options: ImageOptions

    @property
    def settings(self) -> str:
        """A short hash of all fields."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation, with a place for the image."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        content = [{"type": "image"}, {"type": "text", "text": self.prompt}]
        return [*system, {"role": "user", "content": content}]


def find_images(given: Sequence[str]) -> list[str]:
    """Paths of all images, sorted, each once.

    Args:
        given: files, which are taken whatever their name; folders and patterns, of which only
            known suffixes are taken.

    Raises:
        ImageError: one of them does not exist or holds no image.
    """
    found: set[str] = set()
    for item in given:
        path = os.path.expanduser(item)
        if os.path.isfile(path):
            found.add(str(Path(path)))
            continue
        if os.path.isdir(path):
            matches = _walk(path)
        elif glob.has_magic(path):
            matches = _matches(path)
        elif os.path.exists(path):
            raise ImageError(f"{item} is neither a file nor a folder")
        else:
            raise ImageError(f"{item} does not exist")
        if not matches:
            raise ImageError(f"{item} holds no image; looked for {' '.join(SUFFIXES)}")
        found |= matches
    return sorted(found)


def _matches(pattern: str) -> set[str]:
    found: set[str] = set()
    for path in glob.iglob(pattern, recursive=True):
        if os.path.isdir(path):
            found |= _walk(path)
        elif path.lower().endswith(SUFFIXES):
            found.add(str(Path(path)))
    return found


def _walk(folder: str) -> set[str]:
    def refuse(error: OSError) -> NoReturn:
        raise ImageError(f"{error.filename} cannot be searched: {error.strerror}")

    found = set()
    for parent, folders, files in os.walk(folder, onerror=refuse):
        # macOS writes ._photo.jpg beside photo.jpg, which is no image
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = [name for name in files if not name.startswith(".")]
        paths = [Path(parent, name) for name in names if name.lower().endswith(SUFFIXES)]
        found |= {str(path) for path in paths if path.is_file()}
    return found


class Lines:
    """A file of JSON lines, open for appending, that no other process may open so.

    Raises:
        OutputError: the file cannot be made or written, or another run has it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = path.open("ab", buffering=0)
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise OutputError(f"{path} is being written by another run; wait for it") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                self.file.close()
                raise OutputError(f"{path} cannot be locked: {error.strerror}") from None

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.file.close()

    def add(self, entry: dict[str, Any]) -> None:
        """Writes one entry in one piece; it is on the disk when this returns."""
        line = json.dumps(entry, ensure_ascii=False) + "\n"
        try:
            data = line.encode()
        except UnicodeEncodeError:  # the name of a file is no UTF-8
            data = json.dumps(entry).encode() + b"\n"
        self.write(data)

    def write(self, data: bytes) -> None:
        """Writes whole lines."""
        try:
            written = self.file.write(data)
            os.fsync(self.file.fileno())
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error.strerror}") from None
        if written != len(data):
            raise OutputError(f"{self.path} cannot be written: the disk is full")

    def cut(self, end: int) -> None:
        """Removes what stands behind the last whole line."""
        self.file.truncate(end)
        os.fsync(self.file.fileno())


def read_keys(path: Path, settings: str) -> tuple[set[Key], int]:
    """What a file of answers holds: the keys of its entries, and where the last whole line ends.

    Raises:
        OutputError: it holds something else, or answers of other settings.
    """
    keys: set[Key] = set()
    end = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n") and _is_torn(line):
                    break
                keys.add(_key(line, f"{path}, line {number}", settings))
                end += len(line)
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}") from None
    return keys, end


def _is_torn(line: bytes) -> bool:
    """Whether this is the beginning of an entry, and nothing that a user has written."""
    start = LINE_START[: len(line)]
    return line.startswith(start) or not line.strip(b"\0")  # a power cut may leave zeros


def _key(line: bytes, place: str, settings: str) -> Key:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict) or not {"image", "digest", "settings"} <= entry.keys():
        raise OutputError(f"{place} is no entry of this program; pass another --output")
    if entry["settings"] != settings:
        raise OutputError(
            f"{place} was made with another model, prompt or setting; pass another --output, "
            "or the same arguments as before"
        )
    return entry["image"], entry["digest"]


def _part(output: Path, rank: int) -> Path:
    return output.with_name(f"{output.name}.part{rank}")


def gather_parts(lines: Lines, settings: str) -> None:
    """Cuts off a torn last line, then moves the lines of all part files here.

    May be killed at any moment: a line that is here already is not taken twice.
    """
    keys, end = read_keys(lines.path, settings)
    lines.cut(end)
    name = glob.escape(lines.path.name)
    for path in sorted(lines.path.parent.glob(f"{name}.part[0-9]*")):
        with Lines(path) as part:  # nobody is writing it any more
            _, end = read_keys(path, settings)
            part.cut(end)
            with path.open("rb") as file:
                for line in file:
                    key = _key(line, str(path), settings)
                    if key not in keys:
                        lines.write(line)
                        keys.add(key)
            path.unlink()


def _together(group: mx.distributed.Group, *counts: int) -> list[int]:
    """Waits until all processes are here; returns the sums of their counts."""
    import mlx.core as mx

    # no stream is stated: each backend takes the one that it needs
    sums = mx.distributed.all_sum(mx.array([1, *counts]), group=group)
    try:
        return cast("list[int]", sums.tolist())[1:]
    except RuntimeError as error:
        raise OutputError(f"another process of this run has ended: {error}; start again") from None


def _answer_share(
    group: mx.distributed.Group, task: Task, images: list[str], output: Path, lines: Lines
) -> tuple[int, int, int]:
    """Answers this process's images; returns how many were answered, unreadable, known."""
    if group.size() == 1:
        return answer_all(task, images, read_keys(output, task.settings)[0], lines)
    _check_agreement(group, images, output)
    done = read_keys(output, task.settings)[0]
    share = images[group.rank() :: group.size()]
    if group.rank() > 0:
        return answer_all(task, share, done, lines)
    with Lines(_part(output, 0)) as part:
        return answer_all(task, share, done, part)


def _check_agreement(group: mx.distributed.Group, images: list[str], output: Path) -> None:
    """Raises an OutputError where machines see different images or another output."""
    import mlx.core as mx

    seen = zlib.crc32("\0".join(images).encode("utf-8", "surrogatepass"))
    if output.exists():
        seen = zlib.crc32(output.read_bytes(), seen + 1)
    value = mx.array(seen & 0x7FFFFFFF)
    least = mx.distributed.all_min(value, group=group).item()
    if least != mx.distributed.all_max(value, group=group).item():
        raise OutputError(
            f"the machines do not see the same images, or not the same {output}; both belong "
            "on a disk that they share"
        )


def answer_all(task: Task, images: list[str], done: set[Key], lines: Lines) -> tuple[int, int, int]:
    """Answers images that are not done; returns how many were answered, unreadable, known."""
    from ..checkpoints.loading import load

    model, processor = load(task.model, dtype=task.dtype, revision=task.revision)
    task.image_options.apply(processor.image_processor.config)  # wrong ones are told at once
    answers = errors = known = 0
    with _Progress(len(images)) as progress, _ctrl_c() as check_ctrl_c:
        for image in look_ahead(task, processor, images, done):
            check_ctrl_c()
            entry: dict[str, Any] = {"image": image.path, "digest": image.digest}
            if image.prompt is not None:
                entry |= answer(model, processor, image.prompt, task)
                answers += 1
            elif image.error is not None:
                entry["error"] = image.error
                errors += 1
            else:
                known += 1
                progress.skip()
                continue
            lines.add({**entry, "settings": task.settings})
            progress.step()
    return answers, errors, known


@dataclass(frozen=True)
class Prepared:
    """One image, ready for the model; neither prompt nor error where it is done already."""

    path: str
    digest: str | None
    prompt: Prompt | None = None
    error: str | None = None


def look_ahead(
    task: Task, processor: Lfm2VlProcessor, images: list[str], done: set[Key]
) -> Iterator[Prepared]:
    """Yields images in order, while threads prepare the next ones."""
    from PIL import Image

    # here and not in the threads: who looks for a format meanwhile would not find it
    Image.init()
    waiting: deque[Future[Prepared]] = deque()
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="prepare")
    try:
        for path in images:
            waiting.append(pool.submit(prepare, path, task, processor, done))
            if len(waiting) > LOOK_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def prepare(path: str, task: Task, processor: Lfm2VlProcessor, done: set[Key]) -> Prepared:
    """Reads an image and makes its prompt, without MLX."""
    from ..prompts.image_source import load_image

    try:
        data = Path(path).read_bytes()
    except OSError as error:
        message = f"{path} cannot be read: {error.strerror}"
        return Prepared(path, None, error=None if (path, None) in done else message)
    digest = hashlib.sha256(data).hexdigest()
    if (path, digest) in done:
        return Prepared(path, digest)
    try:
        picture = load_image(data)
    except ImageError as error:
        return Prepared(path, digest, error=" ".join(str(error).split()))
    return Prepared(
        path, digest, processor(task.messages, [picture], image_options=task.image_options)
    )


def answer(
    model: Lfm2VlForConditionalGeneration, processor: Lfm2VlProcessor, prompt: Prompt, task: Task
) -> dict[str, Any]:
    """The answer's part of an entry."""
    import mlx.core as mx

    from ..generation.generate import stream_generate

    text = ""
    for response in stream_generate(
        model, processor, prompt, max_tokens=task.max_tokens, seed=task.seed, **task.sampling
    ):
        text += response.text
    mx.clear_cache()  # the next image has other shapes, so kept buffers would only pile up
    return {
        "text": text,
        "finish_reason": response.finish_reason,
        "prompt_tokens": response.prompt_tokens,
        "image_tokens": sum(response.image_tokens),
        "generation_tokens": response.generation_tokens,
    }


@contextmanager
def _ctrl_c() -> Iterator[Callable[[], None]]:
    """Makes sure that Ctrl-C ends the work.

    Its exception is lost where it comes while Python runs a finalizer, so it is kept and raised
    again when the function that this yields is called.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    came = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: object) -> None:
        came.set()
        raise KeyboardInterrupt

    def check() -> None:
        if came.is_set():
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


class _Progress:
    """A bar on stderr where that is a terminal; nothing elsewhere."""

    def __init__(self, total: int) -> None:
        self.bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, unit="image", dynamic_ncols=True, file=sys.stderr)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.close()

    def step(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def skip(self) -> None:
        """Counts an image that is done, without counting it as speed."""
        if self.bar is not None:
            self.bar.initial += 1
            self.bar.update()
