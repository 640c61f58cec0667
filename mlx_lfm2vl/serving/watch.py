"""`watch`: asks about a source whenever its picture has changed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast

from ..errors import OutputError, PromptError, SourceError
from ..files import parse_json
from ..generation.estimate import Estimate, estimate_all
from ..generation.grounding import (
    THOUSANDTHS_VOCAB_SIZE,
    Box,
    Reading,
    detect_questions,
    join_boxes,
)
from ..models.config import Lfm2VlConfig
from ..models.lfm2_vl import Lfm2VlForConditionalGeneration
from ..options import MOST, Bound
from ..prompts.processor import Lfm2VlProcessor
from ..prompts.question import Question, QuestionSettings
from .folder import is_torn
from .frames import POLL, STALL, Frame, Frames, Source, Tell, frames
from .gate import CHANGED, SETTLE, Gate
from .pending import PendingAnswer
from .thread import Parts
from .worker import Worker

if TYPE_CHECKING:
    from PIL import Image

PICTURE = 3.0  # seconds for the first picture in a folder
PATIENCE = 5.0  # seconds for a model that is being loaded when one stops
PREFIX_BYTES = 64 << 20  # pictures do not come again; a system message does
MAX_SIDE = Bound(int, 16, MOST)
LINE_START = b'{"time": '
NOTHING = "nothing found"


@dataclass(frozen=True)
class Sighting:
    """An answer about a frame.

    Attributes:
        time: when it was asked.
        seconds, frame, path: of the frame, see `Frame`.
        changed: the share of the picture that differs from the one asked about before.
        answer: the text; of `detect`, the boxes as text.
        latency: seconds from question to answer.
        dropped: frames that were dropped so far.
        image: what was asked about, in its full size.
        boxes: of `detect`.
        more: what belongs to a form of the answer: `closed`, `value`, `tool_calls`.
    """

    time: datetime
    seconds: float
    frame: int
    changed: float
    answer: str
    latency: float
    dropped: int
    image: Image.Image = field(repr=False)
    path: str | None = None
    boxes: Sequence[Box] | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON, without the picture."""
        boxes = None if self.boxes is None else [box.to_dict() for box in self.boxes]
        return {
            "time": self.time.isoformat(timespec="milliseconds"),
            "frame": self.frame,
            "seconds": round(self.seconds, 3),
            **({} if self.path is None else {"file": self.path}),
            "changed": round(self.changed, 4),
            "answer": self.answer,
            **({} if boxes is None else {"boxes": boxes}),
            **self.more,
            "latency": round(self.latency, 3),
            "dropped": self.dropped,
        }


@dataclass(frozen=True)
class Recorded:
    """What a file of answers holds of a film or folder.

    Attributes:
        end: where the last whole line ends, in bytes.
        frame: number of the last frame that was asked about; -1 if there is none.
        files: names of all that were.
        gist: of the last answer; see the function.
    """

    end: int = 0
    frame: int = -1
    files: frozenset[str] = frozenset()
    gist: str | None = None

    @classmethod
    def read(cls, path: Path, settings: str) -> Recorded:
        """Reads the entries with these settings; others are passed over.

        Raises:
            OutputError: the file cannot be read, or holds something else.
        """
        end, frame, last, files = 0, -1, None, set[str]()
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if not line.endswith(b"\n") and is_torn(line, LINE_START):
                        break
                    entry = _entry(line, f"{path}, line {number}")
                    end += len(line)
                    if entry["settings"] == settings:
                        frame, last = entry["frame"], gist(entry)
                        files.add(os.path.basename(entry.get("file", "")))
        except OSError as error:
            raise OutputError(f"{path} cannot be read: {error.strerror}") from None
        return cls(end, frame, frozenset(files - {""}), last)


def _entry(line: bytes, place: str) -> dict[str, Any]:
    try:
        entry = parse_json(line.decode())
        kinds = {"time": str, "frame": int, "answer": str, "settings": str}
        good = all(isinstance(entry[name], kind) for name, kind in kinds.items())
        good = good and bool(gist(entry)) and isinstance(entry.get("file", ""), str)
    except (ValueError, LookupError, TypeError, AttributeError):
        good = False
    if not good:
        raise OutputError(f"{place} is no entry of this program; pass another file")
    return dict(entry)


def gist(entry: Mapping[str, Any]) -> str:
    """What makes an answer another one: its text; of boxes what they show, wherever it is."""
    if "boxes" in entry:
        return json.dumps(sorted(box["label"] for box in entry["boxes"]))
    return json.dumps(entry["answer"])


class Watch:
    """Asks about a source whenever its picture has changed; gives a `Sighting` each time, once.

        for sighting in watch("LiquidAI/LFM2.5-VL-450M", "camera", "What is on the table?"):
            print(sighting.time, sighting.answer)

    One question is on its way at a time, about the newest frame, and memory does not grow. A film
    ends with a question about its last frame, if that differs from the one asked about.

    Args:
        model: a `Worker`; what `load` takes, with `dtype`, `revision` and `adapter_path`; or what
            makes (model, processor), called in the worker's thread.
        source, realtime, tell: as for `frames`.
        ask: the question about each picture; or
        detect: what to find, as for the function `detect`.
        system: a system message.
        changed, settle, every: as for `Gate`. None is its default, and in a folder 0: there each
            picture is asked about.
        max_side: pixels to which width and height are reduced before the model sees a picture.
            Boxes are those of the full size in any case.
        until: text at which it ends: when an answer contains it, in capitals or not.
        after: what an earlier run has recorded of this film or folder, to continue from.
        look: called with every frame, also those that nobody asks about.
        stopped: called a few times a second; it ends when this says so.
        settings: as for `stream_generate`; of `detect`, only `image_options`.

    Attributes:
        frames: how many were looked at.
        asked: how many of them were asked about.
        dropped: how many nobody had time for.

    Raises:
        PromptError, ConfigError: something makes no sense.
        SourceError: there is no such source; while iterating: it cannot be read.
    """

    def __init__(
        self,
        model: Worker | str | Path | Callable[[], Parts],
        source: str | Path | Source,
        ask: str | None = None,
        *,
        detect: str | Sequence[str] | None = None,
        system: str | None = None,
        changed: float | None = None,
        settle: float | None = None,
        every: float = 0.0,
        max_side: int | None = None,
        until: str | None = None,
        realtime: bool = False,
        after: Recorded | None = None,
        look: Callable[[Frame], None] | None = None,
        tell: Tell | None = None,
        stopped: Callable[[], bool] | None = None,
        dtype: str | None = None,
        revision: str | None = None,
        adapter_path: str | Path | None = None,
        **settings: Unpack[QuestionSettings],
    ) -> None:
        self.frames = self.asked = self.dropped = 0
        self._model, self._parts = model, (dtype, revision, adapter_path)
        self._source = source if isinstance(source, Source) else Source.of(source)
        self._realtime, self._after = realtime, after if after is not None else Recorded()
        is_folder = self._source.kind == "folder"
        self._gate = Gate(
            changed if changed is not None else (0.0 if is_folder else CHANGED),
            settle if settle is not None else (0.0 if is_folder else SETTLE),
            every=every,
        )
        self._ask_about, self._labels, self._system = ask, detect, system
        self._max_side, self._until, self._look = max_side, until, look
        self._tell = tell if tell is not None else lambda line: None
        self._stopped = stopped if stopped is not None else lambda: False
        self._check(ask, detect, settings)

    def _check(
        self, ask: str | None, detect: str | Sequence[str] | None, settings: QuestionSettings
    ) -> None:
        """Tells whatever is wrong before anything is opened or loaded."""
        MAX_SIDE.check("max_side", self._max_side, PromptError)
        if (ask is None) == (detect is None):
            raise PromptError("watch takes either a question or what to detect")
        if ask is not None and not ask.strip():
            raise PromptError("the question is empty; ask something")
        if self._until is not None and not self._until.strip():
            raise PromptError("until is empty, which every answer contains; say at what to end")
        if detect is not None and (others := {*settings} - {"image_options"}):
            raise PromptError(f"{min(others)} cannot be used with detect, which decides it itself")
        self._question = Question(ask or "?", **settings)

    def __iter__(self) -> Iterator[Sighting]:
        with ExitStack() as stack:
            source = stack.enter_context(self._open())
            worker: Worker | None = None
            for frame in self._worth_asking(source):
                if worker is None:  # not before there is a picture
                    worker = self._worker(stack)
                sighting = self._ask(worker, frame)
                if sighting is None:
                    return
                self.asked += 1
                yield sighting
                if self._until is not None and self._until.lower() in sighting.answer.lower():
                    return

    def estimate(
        self, model: Lfm2VlForConditionalGeneration, processor: Lfm2VlProcessor
    ) -> Estimate:
        """What a picture will cost, by the first one of the source, which is then closed.

        Raises:
            SourceError: it gives no picture; live ones have 10 seconds.
            PromptError, ImageError, ConfigError: as the function `estimate`.
        """
        with self._open() as source:
            frame, name = None, source.source.name
            end = time.monotonic() + (STALL if source.source.is_live else PICTURE)
            while frame is None:
                frame = source.poll()
                if frame is None and (source.ended or time.monotonic() > end):
                    raise SourceError(f"{name} gives no picture by which to tell the cost")
        questions = self._questions(processor, model.config, self._small(frame))
        return estimate_all(model, processor, questions)

    def _open(self) -> Frames:
        """The source, from where an earlier run has come to."""
        start = self._after.frame + (self._source.kind == "folder")
        return frames(
            self._source,
            realtime=self._realtime,
            start=0 if self._source.is_live else max(0, start),
            known=self._after.files,
            tell=self._tell,
        )

    def _worker(self, stack: ExitStack) -> Worker:
        """The one that was given, or one that ends with the watch."""
        if isinstance(self._model, Worker):
            return self._model
        dtype, revision, adapter_path = self._parts
        if callable(self._model):
            made = Worker(load=self._model, max_prefix_bytes=PREFIX_BYTES)
        else:
            made = Worker(
                self._model, dtype, revision, adapter_path=adapter_path,
                max_prefix_bytes=PREFIX_BYTES,
            )  # fmt: skip
        stack.callback(made.close, PATIENCE)
        return made

    def _worth_asking(self, source: Frames) -> Iterator[Frame]:
        """The frames that the gate lets pass, and the last one if it could not settle."""
        # an earlier run asked about this frame
        known = self._after.frame if self._source.kind in ("film", "lavfi") else -1
        last: Frame | None = None
        while not (source.ended or self._stopped()):
            frame = source.poll()
            self.dropped = source.dropped
            if frame is None:
                continue
            self._note(frame, last)
            last = frame
            if frame.number == known:
                self._gate.take(frame.image, frame.seconds)
            elif self._gate(frame.image, frame.seconds):
                yield frame
        if source.ended:
            self._tell(f"{source.source.name} has ended")
            if last is not None and self._gate.end():
                yield last

    def _note(self, frame: Frame, last: Frame | None) -> None:
        self.frames += 1
        if last is not None and last.image.size != frame.image.size and frame.path is None:
            before, now = ("x".join(map(str, f.image.size)) for f in (last, frame))
            self._tell(f"{self._source.name}: the picture has {now} pixels now, not {before}")
        if self._look is not None:
            self._look(frame)

    def _ask(self, worker: Worker, frame: Frame) -> Sighting | None:
        """The answer about a frame; None if one stopped meanwhile."""
        while not worker._thread.loaded.wait(POLL):
            if self._stopped():
                return None
        worker.wait_until_ready()  # or raises what went wrong
        now, begun = datetime.now().astimezone(), time.perf_counter()
        thread = worker._thread
        processor, config = cast(Lfm2VlProcessor, thread.processor), cast(Any, thread.config)
        questions = self._questions(processor, config, self._small(frame))
        if self._labels is None:
            found = self._answer(worker, questions[0])
        else:
            found = self._detect(worker, questions, frame.image.size)
        if found is None:
            return None
        return Sighting(
            time=now,
            seconds=frame.seconds,
            frame=frame.number,
            changed=self._gate.share,
            latency=time.perf_counter() - begun,
            dropped=self.dropped,
            image=frame.image,
            path=frame.path,
            **found,
        )

    def _small(self, frame: Frame) -> Image.Image:
        """What the model sees of a frame."""
        if self._max_side is None:
            return frame.image
        small = frame.image.copy()
        small.thumbnail((self._max_side, self._max_side))
        return small

    def _questions(
        self, processor: Lfm2VlProcessor, config: Lfm2VlConfig, image: Image.Image
    ) -> list[Question]:
        """What is asked about a picture: one question, or one for each thing to detect."""
        if self._labels is not None:
            thousandths = config.text_config.vocab_size >= THOUSANDTHS_VOCAB_SIZE
            processed = processor.image_processor(image, self._question.image_options)
            return detect_questions(processor, thousandths, processed, self._labels)
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        content = [{"type": "image", "image": image}, {"type": "text", "text": self._ask_about}]
        messages: Any = [*system, {"role": "user", "content": content}]
        return [replace(self._question, prompt=messages)]

    def _answer(self, worker: Worker, question: Question) -> dict[str, Any] | None:
        """What the model says of a picture; None if one stopped meanwhile."""
        pending = worker.submit(question)
        if not self._wait([pending]):
            return None
        responses, form = pending.responses, self._question.constraint
        more = {} if form is None else form.result(pending.text, responses[-1].closed)
        if self._question.tools is not None:
            calls = [call for response in responses for call in response.tool_calls]
            more["tool_calls"] = [call.to_dict() for call in calls]
        return {"answer": pending.text, "more": more}

    def _detect(
        self, worker: Worker, questions: Sequence[Question], size: tuple[int, int]
    ) -> dict[str, Any] | None:
        """What is found in a picture, in pixels of `size`; None if one stopped meanwhile."""
        readings = [Reading() for _ in questions]
        asked = zip(questions, readings, strict=True)
        if not self._wait([worker.submit(one, look=reading.add) for one, reading in asked]):
            return None
        boxes = join_boxes(readings, cast("str | Sequence[str]", self._labels), size)
        return {"answer": "; ".join(map(str, boxes)) or NOTHING, "boxes": boxes}

    def _wait(self, answers: Sequence[PendingAnswer]) -> bool:
        """Waits for answers; False if one stopped meanwhile."""
        try:
            for answer in answers:
                while not answer.done:
                    if self._stopped():
                        return False
                    with suppress(TimeoutError):
                        answer.result(POLL)
                answer.result()  # or raises what went wrong
            return True
        finally:
            for answer in answers:
                answer.cancel()


watch = Watch  # what a loop reads as
