"""Conversations that remember: see an image once, ask many questions about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from ..errors import PromptError
from ..generation.answer import GenerationResponse
from ..generation.asking import scores, value_of
from ..generation.engine import Engine
from ..generation.estimate import Estimate, estimate
from ..generation.generate import run
from ..generation.speeds import Speeds
from ..generation.usage import Usage
from ..models.lfm2_vl import Lfm2VlForConditionalGeneration
from ..options import CacheOptions, ImageOptions
from ..prompts.image_processor import NO_OPTIONS, ImageInput
from ..prompts.image_source import RawImage
from ..prompts.messages import Message, frame_items
from ..prompts.processor import Lfm2VlProcessor
from ..prompts.question import NO_CACHE_OPTIONS, AnswerSettings, Question, Tools
from .prefixes import MAX_PREFIX_BYTES, PrefixStore
from .session_file import read_session, write_session

Item = Mapping[str, Any]  # of a message's content


class Talk:
    """What a conversation consists of, and the questions that it makes; nothing is computed here.

    Attributes:
        messages: the conversation so far, in the `transformers` form.
        pending: what was seen and waits for the next message, as items of its content.
        tools, image_options, cache_options: of all its questions.
    """

    def __init__(
        self,
        system: str | None = None,
        *,
        tools: Tools | None = None,
        image_options: ImageOptions = NO_OPTIONS,
        cache_options: CacheOptions = NO_CACHE_OPTIONS,
    ) -> None:
        self.tools = tools
        self.image_options = image_options
        self.cache_options = cache_options
        self.messages: list[Message] = []
        self.pending: list[Item] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})

    def question(self, text: str, **settings: Unpack[AnswerSettings]) -> Question:
        """The conversation and one more message, as a question."""
        if not isinstance(text, str):
            raise PromptError(f"prompt is {text!r:.200}; a session takes a text")
        if not text.strip():
            raise PromptError("the prompt is empty; ask something")
        return Question(
            [*self.messages, user_message(self.pending, text)],
            tools=self.tools,
            image_options=self.image_options,
            cache_options=self.cache_options,
            **settings,
        )

    def take(self, question: Question, answer: str) -> None:
        """Makes a question and its answer part of the conversation."""
        assert isinstance(question.prompt, list)
        self.messages = [*question.prompt, {"role": "assistant", "content": answer}]
        asked = _seen_in(question.prompt[-1])
        self.pending = [item for item in self.pending if not any(item is a for a in asked)]

    def undo(self) -> None:
        """Takes back the last turn; its images wait for the next message again.

        Raises:
            PromptError: there is no turn.
        """
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise PromptError("there is no turn to undo")
        self.pending = [*_seen_in(self.messages[-2]), *self.pending]
        self.messages = self.messages[:-2]

    def reset(self) -> None:
        """Forgets conversation and images; the system message stays."""
        self.messages = [m for m in self.messages if m["role"] == "system"]
        self.pending = []


class Session(Talk):
    """One conversation with one model, to be used from one thread at a time.

    `see` encodes an image and reads it once. `ask` answers about all that was seen and said,
    without becoming part of it; `send` is a turn of the conversation. Whatever a prompt has in
    common with earlier ones (system message, images, turns) is not processed again.

    Attributes:
        usage: what the last call cost.
        prefixes: what can be reused.
    """

    def __init__(
        self,
        model: Lfm2VlForConditionalGeneration,
        processor: Lfm2VlProcessor,
        system: str | None = None,
        *,
        tools: Tools | None = None,
        image_options: ImageOptions = NO_OPTIONS,
        cache_options: CacheOptions = NO_CACHE_OPTIONS,
        max_prefix_bytes: int = MAX_PREFIX_BYTES,
    ) -> None:
        """Begins a conversation.

        Args:
            system: the system message.
            tools: JSON schemas of functions the model may call.
            image_options: changes of the checkpoint's image settings.
            cache_options: bounds or quantizes what attention layers remember.
            max_prefix_bytes: what may be kept for reuse; the least recently used part goes first.
        """
        super().__init__(
            system, tools=tools, image_options=image_options, cache_options=cache_options
        )
        # raises what would otherwise end the first question
        model.make_cache(self.question("?").cache_options)
        self.model = model
        self.processor = processor
        self.usage = Usage()
        self.prefixes = PrefixStore(max_prefix_bytes)

    def see(self, image: ImageInput, image_options: ImageOptions | None = None) -> None:
        """Encodes and reads an image now; the next questions are about it.

        Several images stand in the order in which they were seen.

        Raises:
            ImageError: the image cannot be read; the session stays as it was.
            PromptError: it does not fit beside the others; likewise.
        """
        options = image_options if image_options is not None else self.image_options
        self._read([image_item(self.processor.image_processor(image, options))])

    def see_video(
        self,
        video: RawImage,
        frames: int | None = None,
        image_options: ImageOptions | None = None,
    ) -> None:
        """As `see` for a film: evenly chosen frames, each after its time; see `sample_video`."""
        options = image_options if image_options is not None else self.image_options
        self._read(film_items(self.processor, video, frames, options))

    def _read(self, items: list[Item]) -> None:
        """Reads items with images up to the last of them."""
        pending = [*self.pending, *items]
        prompt = Question(
            [*self.messages, user_message(pending, "?")],
            tools=self.tools,
            cache_options=self.cache_options,
        )
        engine = self._engine()
        stop = prompt.prepare(self.processor).images[-1].stop
        row = engine.add(prompt, read_only=stop)
        list(run(engine, row))
        self.usage = Usage.of(row)
        self.pending = pending

    def ask(self, question: str, **settings: Unpack[AnswerSettings]) -> str:
        """Answers a question that does not become part of the conversation.

        Args:
            settings: see `AnswerSettings`.
        """
        return "".join(response.text for response in self.stream_ask(question, **settings))

    def stream_ask(
        self, question: str, **settings: Unpack[AnswerSettings]
    ) -> Iterator[GenerationResponse]:
        """`ask`, piece by piece."""
        return self._stream(self.question(question, **settings), keep=False)

    def ask_json(self, question: str, **settings: Unpack[AnswerSettings]) -> Any:
        """`ask` for JSON, as a value; see `generation.asking.ask_json`."""
        settings.setdefault("schema", True)
        return value_of(self.stream_ask(question, **settings))

    def choose(self, question: str, options: Sequence[str]) -> dict[str, float]:
        """How probable each of some answers is; see `generation.asking.choose`."""
        return scores(self._engine(), self.question(question), options)

    def estimate(
        self, question: str, *, speeds: Speeds | None = None, **settings: Unpack[AnswerSettings]
    ) -> Estimate:
        """What `ask` or `send` will cost; see `generation.estimate.estimate`."""
        return estimate(
            self.model,
            self.processor,
            self.question(question, **settings),
            speeds=speeds,
            prefixes=self.prefixes,
        )

    def send(self, message: str, **settings: Unpack[AnswerSettings]) -> str:
        """A turn of the conversation: message and answer become part of it.

        Images seen since the last turn belong to this message.
        """
        return "".join(response.text for response in self.stream_send(message, **settings))

    def stream_send(
        self, message: str, **settings: Unpack[AnswerSettings]
    ) -> Iterator[GenerationResponse]:
        """`send`, piece by piece. A stream that is left early leaves the conversation as it was."""
        return self._stream(self.question(message, **settings), keep=True)

    def fork(self) -> Session:
        """A second conversation that begins as this one; both share what can be reused."""
        twin = Session(
            self.model,
            self.processor,
            tools=self.tools,
            image_options=self.image_options,
            cache_options=self.cache_options,
        )
        twin.messages, twin.pending = list(self.messages), list(self.pending)
        twin.prefixes = self.prefixes
        return twin

    def save(self, path: str | Path) -> None:
        """Writes conversation, images and what can be reused of it into one safetensors file."""
        prompt = None
        if self.messages or self.pending:
            last = user_message(self.pending, "?")
            prompt = self.processor([*self.messages, last], tools=self.tools)
        keys = [] if prompt is None else list(self.prefixes.keys(prompt, self.cache_options))
        entries = {key: self.prefixes.entries[key] for key in keys}
        write_session(Path(path), self.model, self.messages, self.pending, entries)

    def load(self, path: str | Path) -> None:
        """Takes over the conversation of a file that `save` wrote with the same model.

        Raises:
            SnapshotError: a damaged file, or one of another model or version; the session stays
                as it was.
        """
        self.messages, self.pending, entries = read_session(Path(path), self.model)
        for key, entry in entries.items():
            self.prefixes.add(key, entry)

    def _engine(self) -> Engine:
        return Engine(self.model, self.processor, prefixes=self.prefixes)

    def _stream(self, question: Question, keep: bool) -> Iterator[GenerationResponse]:
        pieces: list[str] = []
        engine = self._engine()
        row = engine.add(question, keep_answer=keep)
        for response in run(engine, row):
            pieces.append(response.text)
            yield response
        self.usage = Usage.of(row)
        if keep:
            self.take(question, "".join(pieces))


def image_item(image: Any) -> Item:
    """An image as an item of a message's content."""
    return {"type": "image", "image": image}


def film_items(
    processor: Lfm2VlProcessor, video: RawImage, frames: int | None, options: ImageOptions
) -> list[Item]:
    """A film as items of a message's content, its frames ready for the model."""
    see = partial(processor.image_processor, options=options)
    return list(frame_items(video, frames, see))


def user_message(items: Sequence[Item], text: str) -> dict[str, Any]:
    """What a user says about what was seen, which comes first."""
    return {"role": "user", "content": [*items, {"type": "text", "text": text}]}


def _seen_in(message: Message) -> list[Item]:
    """What a message is about: all of it but its last text."""
    content = message["content"]
    items = list(content) if isinstance(content, list) else []
    texts = [place for place, item in enumerate(items) if item["type"] == "text"]
    return items[: texts[-1]] + items[texts[-1] + 1 :] if texts else items
