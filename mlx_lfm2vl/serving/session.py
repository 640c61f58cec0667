"""Conversations that remember: see an image once, ask many questions about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import PromptError
from ..generation.answer import AnswerOptions, Clock, GenerationResponse
from ..generation.generate import NO_CACHE_OPTIONS, read_embeddings, stream_answer, wired_limit
from ..models.cache import Cache
from ..models.lfm2_vl import Lfm2VlForConditionalGeneration
from ..options import DEFAULT_MAX_TOKENS, CacheOptions, ImageOptions, Sampling
from ..prompts.image_processor import NO_OPTIONS, ImageInput, ImageLayout, ProcessedImage
from ..prompts.messages import Message
from ..prompts.processor import Lfm2VlProcessor, Prompt
from .prefixes import (
    PrefixKey,
    SnapshotStore,
    describe,
    model_fingerprint,
    read_file,
    rebuild,
    write_file,
)

MAX_SNAPSHOT_BYTES = 1 << 30


@dataclass(frozen=True)
class Usage:
    """What the last question or image cost.

    Attributes:
        prompt_tokens: positions of the whole prompt.
        reused_tokens: how many of them were there from before.
        processed_tokens: how many went through the model now.
        encoded_images: images that went through the vision tower now.
        generation_tokens: tokens of the answer.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    processed_tokens: int = 0
    encoded_images: int = 0
    generation_tokens: int = 0


class Session:
    """One conversation with one model, to be used from one thread at a time.

    `see` encodes an image and reads it once. `ask` answers about all that was seen and said,
    without becoming part of it; `send` is a turn of the conversation. Whatever a prompt has in
    common with earlier ones (system message, images, turns) is not processed again.

    Attributes:
        messages: the conversation so far, in the `transformers` form.
        usage: what the last call cost.
        snapshots: what can be reused.
    """

    def __init__(
        self,
        model: Lfm2VlForConditionalGeneration,
        processor: Lfm2VlProcessor,
        system: str | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        image_options: ImageOptions = NO_OPTIONS,
        cache_options: CacheOptions = NO_CACHE_OPTIONS,
        max_snapshot_bytes: int = MAX_SNAPSHOT_BYTES,
    ) -> None:
        """Begins a conversation.

        Args:
            system: the system message.
            tools: JSON schemas of functions the model may call.
            image_options: changes of the checkpoint's image settings.
            cache_options: bounds or quantizes what attention layers remember.
            max_snapshot_bytes: what may be kept for reuse; the least recently used part leaves.
        """
        self.model = model
        self.processor = processor
        self.tools = tools
        self.image_options = image_options
        self.cache_options = cache_options
        self.messages: list[Message] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self.usage = Usage()
        self.snapshots = SnapshotStore(max_snapshot_bytes)
        self._pending: list[ProcessedImage] = []

    def see(self, image: ImageInput, image_options: ImageOptions | None = None) -> None:
        """Encodes and reads an image now; the next questions are about it.

        Several images stand in the order in which they were seen.

        Raises:
            ImageError: the image cannot be read; the session stays as it was.
        """
        options = image_options if image_options is not None else self.image_options
        processed = self.processor.image_processor(image, options)
        pending = [*self._pending, processed]
        prompt, images = self._prompt(_user_message(pending, "?"))
        stop = prompt.images[-1].stop
        with wired_limit(self.model):
            self._read(prompt, images, stop)
        self._pending = pending

    def ask(
        self,
        question: str,
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        sampling: Sampling | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> str:
        """Answers a question that does not become part of the conversation."""
        options = self._options(max_tokens, sampling, seed, stop)
        return "".join(response.text for response in self._stream(question, options, keep=False))

    def stream_ask(
        self,
        question: str,
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        sampling: Sampling | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[GenerationResponse]:
        """`ask`, piece by piece."""
        options = self._options(max_tokens, sampling, seed, stop)
        return self._stream(question, options, keep=False)

    def send(
        self,
        message: str,
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        sampling: Sampling | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> str:
        """A turn of the conversation: message and answer become part of it.

        Images seen since the last turn belong to this message.
        """
        options = self._options(max_tokens, sampling, seed, stop)
        return "".join(response.text for response in self._stream(message, options, keep=True))

    def stream_send(
        self,
        message: str,
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        sampling: Sampling | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[GenerationResponse]:
        """`send`, piece by piece. A stream that is left early leaves the conversation as it was."""
        options = self._options(max_tokens, sampling, seed, stop)
        return self._stream(message, options, keep=True)

    def undo(self) -> None:
        """Takes back the last turn; its images wait for the next message again.

        Raises:
            PromptError: there is no turn.
        """
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise PromptError("there is no turn to undo")
        user = self.messages[-2]
        self.messages = self.messages[:-2]
        self._pending = [item["image"] for item in user["content"] if item["type"] == "image"]

    def reset(self) -> None:
        """Forgets conversation and images; the system message stays."""
        self.messages = [m for m in self.messages if m["role"] == "system"]
        self._pending = []

    def fork(self) -> Session:
        """A second conversation that begins as this one; both share what can be reused."""
        twin = Session(
            self.model,
            self.processor,
            tools=self.tools,
            image_options=self.image_options,
            cache_options=self.cache_options,
        )
        twin.messages = list(self.messages)
        twin.snapshots = self.snapshots
        twin._pending = list(self._pending)
        return twin

    def _options(
        self, max_tokens: int, sampling: Sampling | None, seed: int | None, stop: Sequence[str]
    ) -> AnswerOptions:
        chosen = sampling if sampling is not None else self.processor.generation_config.sampling
        return AnswerOptions(max_tokens, chosen, seed, tuple(stop))

    def _prompt(self, last: Message) -> tuple[Prompt, list[ProcessedImage]]:
        """The prompt of the conversation and one more message, and its images in order."""
        messages = [*self.messages, last]
        images = [
            item["image"]
            for message in messages
            if isinstance(message["content"], list)
            for item in message["content"]
            if item["type"] == "image"
        ]
        return self.processor(messages, tools=self.tools), images

    def _stream(
        self, text: str, options: AnswerOptions, keep: bool
    ) -> Iterator[GenerationResponse]:
        if not text.strip():
            raise PromptError("the message is empty; ask something")
        message = _user_message(self._pending, text)
        prompt, images = self._prompt(message)
        clock = Clock(prompt)
        tokens: list[int] = []
        pieces: list[str] = []
        with wired_limit(self.model):
            start, cache = self._read(prompt, images, len(prompt.token_ids) - 1)
            embeddings = self.model.embed_prompt(prompt, start)
            for response in stream_answer(
                self.model,
                self.processor,
                prompt,
                options,
                cache,
                embeddings,
                clock,
                self.cache_options,
            ):
                tokens.append(response.token)
                pieces.append(response.text)
                yield response
        self.usage = replace(self.usage, generation_tokens=len(tokens))
        if keep:
            answer = {"role": "assistant", "content": "".join(pieces)}
            self.messages = [*self.messages, message, answer]
            self._pending = []
            # the last token may not have been read, so the cache knows how far it came
            read = (prompt.token_ids + tokens)[: cache[0].offset]
            self._keep(read, prompt, images, cache)

    def _read(
        self, prompt: Prompt, images: list[ProcessedImage], stop: int
    ) -> tuple[int, list[Cache]]:
        """Reads the prompt up to the last place worth keeping at or before `stop`.

        Goes on from the longest known beginning, and keeps the cache after the system message and
        after each image. Returns the length of what the cache holds, and the cache.
        """
        length = len(prompt.token_ids)
        # a rotating cache pins what is read first: the images of `see`, or a whole first prompt
        total = stop if stop < length - 1 else length
        digests = [image.digest for image in images]
        known = self.snapshots.longest(prompt.token_ids, digests)
        start, cache = known if known is not None else (0, None)
        if cache is None:
            cache = self.model.make_cache(self.cache_options, total)
        self.usage = Usage(
            prompt_tokens=total,
            reused_tokens=start,
            processed_tokens=total - start,
            encoded_images=sum(start <= image.start < total for image in prompt.images),
        )
        for place in sorted(
            {self._system_length(prompt), *(image.stop for image in prompt.images)}
        ):
            if start < place <= stop:
                embeddings = self.model.embed_prompt(prompt, start, place)
                read_embeddings(self.model.language_model, embeddings, cache, self.cache_options)
                self._keep(prompt.token_ids[:place], prompt, images, cache)
                start = place
        return start, cache

    def _keep(
        self,
        token_ids: list[int],
        prompt: Prompt,
        images: list[ProcessedImage],
        cache: list[Cache],
    ) -> None:
        inside = sum(image.stop <= len(token_ids) for image in prompt.images)
        digests = tuple(image.digest for image in images[:inside])
        self.snapshots.put(PrefixKey(tuple(token_ids), digests), cache)

    def _system_length(self, prompt: Prompt) -> int:
        """Positions of the system message, 0 where the prompt does not begin with it."""
        system = [message for message in self.messages[:1] if message["role"] == "system"]
        if not system:
            return 0
        ids = self.processor.tokenizer.apply_chat_template(
            system, self.tools, add_generation_prompt=False
        )
        return len(ids) if prompt.token_ids[: len(ids)] == ids else 0

    def save(self, path: str | Path) -> None:
        """Writes conversation, images and snapshots into one safetensors file."""
        images = _Images()
        data: dict[str, Any] = {
            "messages": [images.take_out(message) for message in self.messages],
            "pending": [images.number(image) for image in self._pending],
            "snapshots": [],
        }
        arrays: dict[str, mx.array] = {}
        for n, (key, cache) in enumerate(self.snapshots.entries.items()):
            data["snapshots"].append(
                {
                    "token_ids": key.token_ids,
                    "image_digests": key.image_digests,
                    "cache": describe(cache),
                    "arrays": [len(entry.state) for entry in cache],
                }
            )
            for layer, entry in enumerate(cache):
                for k, array in enumerate(entry.state):
                    arrays[f"snapshot.{n}.{layer}.{k}"] = array
        data["images"] = images.describe()
        arrays |= {
            f"image.{n}": mx.array(image.pixel_values) for n, image in enumerate(images.found)
        }
        write_file(Path(path), model_fingerprint(self.model), data, arrays)

    def load(self, path: str | Path) -> None:
        """Takes over the conversation of a file that `save` wrote with the same model.

        Raises:
            SnapshotError: a damaged file, or one of another model or version; the session stays
                as it was.
        """
        data, arrays = read_file(Path(path), model_fingerprint(self.model))
        images = _Images.read(data["images"], arrays)
        entries = {}
        for n, about in enumerate(data["snapshots"]):
            layers = [
                [arrays[f"snapshot.{n}.{layer}.{k}"] for k in range(count)]
                for layer, count in enumerate(about["arrays"])
            ]
            key = PrefixKey(tuple(about["token_ids"]), tuple(about["image_digests"]))
            entries[key] = rebuild(about["cache"], layers)
        self.messages = [images.put_in(message) for message in data["messages"]]
        self._pending = [images.found[number] for number in data["pending"]]
        self.snapshots.clear()
        for key, cache in entries.items():
            self.snapshots.put(key, cache)


class _Images:
    """Numbers the images of a conversation, to write each once beside the messages."""

    def __init__(self, found: list[ProcessedImage] | None = None) -> None:
        self.found = found if found is not None else []

    def number(self, image: ProcessedImage) -> int:
        for n, known in enumerate(self.found):
            if known.digest == image.digest:
                return n
        self.found.append(image)
        return len(self.found) - 1

    def take_out(self, message: Message) -> Message:
        return _map_images(message, self.number)

    def put_in(self, message: Message) -> Message:
        return _map_images(message, lambda number: self.found[number])

    def describe(self) -> list[dict[str, Any]]:
        return [
            {
                "spatial_shapes": image.spatial_shapes,
                "rows": image.layout.rows,
                "cols": image.layout.cols,
                "whole": image.layout.whole,
                "view_tokens": image.view_tokens,
                "use_image_special_tokens": image.use_image_special_tokens,
            }
            for image in self.found
        ]

    @classmethod
    def read(cls, described: list[dict[str, Any]], arrays: Mapping[str, mx.array]) -> _Images:
        import numpy as np

        found = []
        for n, about in enumerate(described):
            whole = None if about["whole"] is None else tuple(about["whole"])
            found.append(
                ProcessedImage(
                    tuple((rows, cols) for rows, cols in about["spatial_shapes"]),
                    ImageLayout(about["rows"], about["cols"], whole),
                    tuple(about["view_tokens"]),
                    about["use_image_special_tokens"],
                    np.array(arrays[f"image.{n}"]),
                )
            )
        return cls(found)


def _map_images(message: Message, change: Callable[[Any], Any]) -> Message:
    content = message["content"]
    if not isinstance(content, list):
        return message
    items = [
        {**item, "image": change(item["image"])} if item["type"] == "image" else item
        for item in content
    ]
    return {**message, "content": items}


def _user_message(images: list[ProcessedImage], text: str) -> dict[str, Any]:
    items = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*items, {"type": "text", "text": text}]}
