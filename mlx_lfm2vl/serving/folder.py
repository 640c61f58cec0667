"""Folder mode: one prompt for many images or films, one JSON line per answer, resumable.

A run may be killed at any moment: lines are written whole, and the next start cuts off what is
not. Images are read and cut into patches by threads, ahead of the model; only the main thread
touches MLX.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import ImageError, OutputError, PromptError
from ..options import ImageOptions, Sampling

if TYPE_CHECKING:
    from ..generation.batch import BatchResult
    from ..generation.estimate import Estimate
    from ..models.lfm2_vl import Lfm2VlForConditionalGeneration
    from ..prompts.constraint import Constraint
    from ..prompts.messages import Conversation
    from ..prompts.processor import Lfm2VlProcessor, Prompt
    from ..prompts.question import Question, Tools

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic")
FILMS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi")
THREADS = 4
LOOK_AHEAD = 8  # images
LINE_START = b'{"image": '

Key = tuple[str, str | None]  # path and digest


@dataclass(frozen=True)
class Task:
    """What is asked about each image; a difference in any field makes other answers."""

    model: str
    revision: str | None
    dtype: str | None
    adapter_path: str | None
    prompt: str
    system: str | None
    max_tokens: int
    seed: int | None
    stop: tuple[str, ...]
    sampling: Sampling
    image_options: ImageOptions
    constraint: Constraint | None = None
    tools: Tools | None = None
    frames: int | None = None  # of each film; without, films are no images

    @property
    def settings(self) -> str:
        """A short hash of all fields."""
        fields = asdict(self)
        for name in ("constraint", "tools", "frames"):
            if fields[name] is None:
                del fields[name]  # as files know it that are older than the field
        text = json.dumps(fields, sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]

    def sees_film(self, path: str) -> bool:
        """Whether a file is to be seen as a film."""
        return self.frames is not None and path.lower().endswith(FILMS)

    def messages(self, path: str, content: Any) -> list[dict[str, Any]]:
        """The conversation about a file, with what is in it."""
        item = {"type": "image", "image": content}
        if self.sees_film(path):
            item = {"type": "video", "video": content, "frames": self.frames}
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        items = [item, {"type": "text", "text": self.prompt}]
        return [*system, {"role": "user", "content": items}]

    def question(self, prompt: Conversation | Prompt, **settings: Any) -> Question:
        """A prompt with all that the task says of the answer."""
        from ..prompts.question import Question

        return Question(
            prompt,
            max_tokens=self.max_tokens,
            seed=self.seed,
            stop=self.stop,
            sampling=self.sampling,
            constraint=self.constraint,
            **settings,
        )


@dataclass
class Counts:
    """How many images were answered, could not be read, were done before."""

    answered: int = 0
    unreadable: int = 0
    known: int = 0


def find_images(given: Sequence[str], suffixes: tuple[str, ...] = SUFFIXES) -> list[str]:
    """Paths of all images, sorted, each once.

    Args:
        given: files, which are taken whatever their name; folders and patterns, of which only
            known suffixes are taken.
        suffixes: these.

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
            matches = _walk(path, suffixes)
        elif glob.has_magic(path):
            matches = _matches(path, suffixes)
        elif os.path.exists(path):
            raise ImageError(f"{item} is neither a file nor a folder")
        else:
            raise ImageError(f"{item} does not exist")
        if not matches:
            raise ImageError(f"{item} holds no image; looked for {' '.join(suffixes)}")
        found |= matches
    return sorted(found)


def _matches(pattern: str, suffixes: tuple[str, ...]) -> set[str]:
    found: set[str] = set()
    for path in glob.iglob(pattern, recursive=True):
        if os.path.isdir(path):
            found |= _walk(path, suffixes)
        elif path.lower().endswith(suffixes):
            found.add(str(Path(path)))
    return found


def _walk(folder: str, suffixes: tuple[str, ...]) -> set[str]:
    def refuse(error: OSError) -> NoReturn:
        raise ImageError(f"{error.filename} cannot be searched: {error.strerror}")

    found = set()
    for parent, folders, files in os.walk(folder, onerror=refuse):
        # macOS writes ._photo.jpg beside photo.jpg, which is no image
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = [name for name in files if not name.startswith(".")]
        paths = [Path(parent, name) for name in names if name.lower().endswith(suffixes)]
        found |= {str(path) for path in paths if path.is_file()}
    return found


class Lines:
    """A file of JSON lines, open for appending, that no other run may open so.

    Raises:
        OutputError: the file cannot be made or written, or another run has it.
    """

    def __init__(self, path: Path) -> None:
        from filelock import FileLock, Timeout

        self.path = path
        self.lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            self.file = path.open("ab", buffering=0)
            self.lock.acquire(blocking=False)
        except Timeout:
            self.file.close()
            raise OutputError(f"{path} is being written by another run; wait for it") from None
        except NotImplementedError:
            pass  # a disk without locks; there the user alone keeps two runs apart
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror}") from None

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.file.close()
        Path(self.lock.lock_file).unlink(missing_ok=True)
        self.lock.release()

    def add(self, entry: dict[str, Any]) -> None:
        """Writes one entry in one piece; it is on the disk when this returns."""
        line = json.dumps(entry, ensure_ascii=False) + "\n"
        try:
            data = line.encode()
        except UnicodeEncodeError:  # the name of a file is no UTF-8
            data = json.dumps(entry).encode() + b"\n"
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
                if not line.endswith(b"\n") and is_torn(line, LINE_START):
                    break
                keys.add(_key(line, f"{path}, line {number}", settings))
                end += len(line)
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}") from None
    return keys, end


def is_torn(line: bytes, start: bytes) -> bool:
    """Whether this is the beginning of an entry, and nothing that a user has written."""
    # a power cut may leave zeros
    return line.startswith(start[: len(line)]) or not line.strip(b"\0")


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


def answer_all(
    task: Task,
    images: Sequence[str],
    lines: Lines,
    *,
    batch_size: int | None,
    progress: Callable[[bool], None],
    check: Callable[[], None],
    loaded: Callable[[Lfm2VlForConditionalGeneration], None],
) -> Counts:
    """Answers the images that a file of answers does not hold yet.

    Args:
        batch_size: how many answers grow at once; None chooses by memory.
        progress: called for each image with whether it was done before.
        check: called between images; may raise to stop.
        loaded: called with the model before anything is asked.
    """
    from ..generation.batch import stream_batch

    done, end = read_keys(lines.path, task.settings)
    lines.cut(end)
    model, processor, batch_size = _load(task, batch_size)
    loaded(model)
    counts, asked = Counts(), list[Prepared]()

    def write(image: Prepared, answer: dict[str, Any]) -> None:
        about = {"image": image.path, "digest": image.digest}
        lines.add({**about, **answer, "settings": task.settings})
        progress(False)

    def prompts() -> Iterator[Prompt]:
        for image in look_ahead(task, processor, images, done, max(LOOK_AHEAD, batch_size)):
            check()
            if image.prompt is not None:
                asked.append(image)
                yield image.prompt
            elif image.error is not None:
                counts.unreadable += 1
                write(image, {"error": image.error})
            else:
                counts.known += 1
                progress(True)

    questions = map(task.question, prompts())
    for result in stream_batch(model, processor, questions, batch_size=batch_size):
        counts.answered += 1
        image, asked[result.index] = asked[result.index], Prepared("", None)
        write(image, _entry(result, task))
        check()
    return counts


def _load(
    task: Task, batch_size: int | None
) -> tuple[Lfm2VlForConditionalGeneration, Lfm2VlProcessor, int]:
    """Model, processor, and how many answers grow at once."""
    from ..checkpoints.loading import load
    from ..generation.batch import BATCH_SIZE, suggested_batch_size

    model, processor = load(
        task.model, dtype=task.dtype, revision=task.revision, adapter_path=task.adapter_path
    )
    task.image_options.apply(processor.image_processor.config)  # wrong ones are told at once
    BATCH_SIZE.check("batch_size", batch_size, PromptError)
    return model, processor, batch_size or suggested_batch_size(model)


@dataclass
class FolderEstimate:
    """What the images that are left will cost; see `Estimate`.

    Attributes:
        images: how many are left.
        known: how many were done before.
        unreadable: how many cannot be read.
        stages: seconds of each, None if no run has shown them.
    """

    images: int = 0
    known: int = 0
    unreadable: int = 0
    prompt_tokens: int = 0
    image_tokens: int = 0
    patches: int = 0
    stages: dict[str, float | None] = field(
        default_factory=lambda: {"vision": 0.0, "prefill": 0.0, "decode": 0.0}
    )

    def add(self, found: Estimate) -> None:
        """Adds an image."""
        self.images += 1
        self.prompt_tokens += found.prompt_tokens
        self.image_tokens += sum(found.image_tokens)
        self.patches += found.patches
        for stage, before in self.stages.items():
            seconds = getattr(found, f"seconds_{stage}")
            known = before is not None and seconds is not None
            self.stages[stage] = before + seconds if known else None


def estimate_all(
    task: Task,
    images: Sequence[str],
    output: Path,
    *,
    batch_size: int | None,
    progress: Callable[[bool], None],
) -> FolderEstimate:
    """What `answer_all` will cost: of images only the headers are read. Arguments are the same."""
    from ..generation.estimate import estimate
    from ..generation.speeds import read_speeds

    done = read_keys(output, task.settings)[0] if output.exists() else set()
    model, processor, batch_size = _load(task, batch_size)
    speeds, total = read_speeds(model), FolderEstimate()
    for path in images:
        if _is_done(path, done):
            total.known += 1
            progress(True)
            continue
        question = task.question(
            task.messages(path, path), tools=task.tools, image_options=task.image_options
        )
        together = min(batch_size, len(images)) > 1
        try:
            total.add(
                estimate(
                    model, processor, question, speeds=speeds, together=together,
                    first=total.images == 0,
                )
            )  # fmt: skip
        except ImageError:
            total.unreadable += 1
        progress(False)
    return total


def _is_done(path: str, done: set[Key]) -> bool:
    from ..prompts.image_source import read_image_file

    if not done:
        return False
    try:
        return (path, hashlib.sha256(read_image_file(path)).hexdigest()) in done
    except ImageError:
        return (path, None) in done


def _entry(result: BatchResult, task: Task) -> dict[str, Any]:
    form, calls = task.constraint, [call.to_dict() for call in result.tool_calls]
    return {
        "text": result.text,
        "finish_reason": result.finish_reason,
        **({} if form is None else form.result(result.text, result.closed)),
        **({} if task.tools is None else {"tool_calls": calls}),
        "prompt_tokens": result.prompt_tokens,
        "image_tokens": sum(result.image_tokens),
        "generation_tokens": len(result.tokens),
    }


@dataclass(frozen=True)
class Prepared:
    """One image, ready for the model; neither prompt nor error if it is done already."""

    path: str
    digest: str | None
    prompt: Prompt | None = None
    error: str | None = None


def look_ahead(
    task: Task, processor: Lfm2VlProcessor, images: Sequence[str], done: set[Key], ahead: int
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
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def prepare(path: str, task: Task, processor: Lfm2VlProcessor, done: set[Key]) -> Prepared:
    """Reads an image and makes its prompt, without MLX."""
    from ..prompts.image_source import load_image, read_image_file

    try:
        data = read_image_file(path)
    except ImageError as error:
        return Prepared(path, None, error=None if (path, None) in done else str(error))
    digest = hashlib.sha256(data).hexdigest()
    if (path, digest) in done:
        return Prepared(path, digest)
    try:
        content = data if task.sees_film(path) else load_image(data)
        messages = task.messages(path, content)
        prompt = processor(messages, None, tools=task.tools, image_options=task.image_options)
    except ImageError as error:
        return Prepared(path, digest, error=" ".join(str(error).split()))
    return Prepared(path, digest, prompt)
