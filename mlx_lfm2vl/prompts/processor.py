"""Messages and images to one prompt: token ids, packed views, and where each image stands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from ..errors import PromptError
from ..options import GenerationConfig, ImageOptions
from .image_processor import (
    NO_OPTIONS,
    ImageInput,
    ImagePlan,
    Lfm2VlImageProcessor,
    ProcessedImage,
    marks_of,
)
from .image_source import image_size
from .messages import Message
from .tokenizer import Lfm2Tokenizer

if TYPE_CHECKING:
    from datetime import datetime

    import numpy as np
from .messages import Conversation, See, _image_list, _with_frames, _without_images
from .tool_calls import CallStyle, call_style, carry_calls
from .tool_grammar import plain_tool


@dataclass(frozen=True)
class PromptImage:
    """An image, and where it stands in a prompt.

    Attributes:
        image: its pixels and views.
        start, stop: positions of all its tokens, the marks around it included.
    """

    image: ProcessedImage
    start: int
    stop: int

    @property
    def image_tokens(self) -> int:
        """How many of the positions are image tokens, one per row of `encode_images`."""
        return sum(self.image.view_tokens)

    @property
    def views(self) -> int:
        """How many pictures the vision encoder sees of it."""
        return len(self.image.spatial_shapes)

    @property
    def digest(self) -> str:
        """A fingerprint of everything that the model sees of it."""
        return self.image.digest


@dataclass(frozen=True)
class PromptPlan:
    """What is known of a prompt without its pixels.

    Attributes:
        token_ids: the whole prompt; images stand in it as runs of image tokens.
        images: in order.
    """

    token_ids: list[int]
    images: tuple[ImagePlan, ...]

    @property
    def image_tokens(self) -> tuple[int, ...]:
        """Image tokens of each image."""
        return tuple(sum(image.view_tokens) for image in self.images)

    def check_length(self, most: int) -> None:
        """Raises a PromptError if images make the prompt longer than a model can read."""
        length = len(self.token_ids)
        if self.images and length > most:
            raise PromptError(
                f"the prompt has {length} tokens, {sum(self.image_tokens)} of them of "
                f"{len(self.images)} images or frames; the model reads {most}: take fewer, or "
                "smaller ones by max_image_tokens"
            )


@dataclass(frozen=True)
class Prompt:
    """What the model reads.

    Attributes:
        token_ids: the whole prompt; images stand in it as runs of image tokens.
        images: in order.
        first_turn: positions up to where the first answer begins: the system message, the first
            user message and the opening of the assistant's turn. None means all.
        system_length: positions of the system message, with the tools in it; 0 without one.
    """

    token_ids: list[int]
    images: tuple[PromptImage, ...] = ()
    first_turn: int | None = None
    system_length: int = 0

    @property
    def first_turn_length(self) -> int:
        """`first_turn`, or the whole length if nobody knows better."""
        return len(self.token_ids) if self.first_turn is None else self.first_turn

    @property
    def plan(self) -> PromptPlan:
        """The same without pixels."""
        return PromptPlan(self.token_ids, tuple(placed.image for placed in self.images))

    @cached_property
    def pixel_values(self) -> np.ndarray[Any, Any] | None:
        """(patches of all views, 3·16²) uint8, packed, not padded; None without images."""
        return pack_pixels(self.images) if self.images else None

    @property
    def spatial_shapes(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) in patches, one per view."""
        return tuple(shape for placed in self.images for shape in placed.image.spatial_shapes)


def pack_pixels(images: Sequence[PromptImage]) -> np.ndarray[Any, Any]:
    """(patches of all views, 3·16²) uint8 of one image or several; of one, without a copy."""
    if len(images) == 1:
        return images[0].image.pixel_values
    import numpy as np

    return np.concatenate([placed.image.pixel_values for placed in images])


@dataclass(frozen=True)
class Transcript:
    """A whole conversation as a model is trained on it; images are not yet read.

    Attributes:
        token_ids: images stand in it as runs of image tokens.
        assistant_mask: True where the assistant wrote.
        images: in order.
        spatial_shapes: (rows, columns) in patches, one per view of all images.
    """

    token_ids: list[int]
    assistant_mask: list[bool]
    images: tuple[ImageInput, ...]
    spatial_shapes: tuple[tuple[int, int], ...]


class Lfm2VlProcessor:
    """Joins image processor and tokenizer, as `transformers`' `Lfm2VlProcessor`.

    Attributes:
        image_processor, tokenizer: the parts.
        generation_config: recommended sampling and the tokens that end an answer.
    """

    def __init__(
        self,
        image_processor: Lfm2VlImageProcessor,
        tokenizer: Lfm2Tokenizer,
        generation_config: GenerationConfig,
    ) -> None:
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.generation_config = generation_config

    def __call__(
        self,
        messages: Conversation,
        images: ImageInput | Sequence[ImageInput] | None = None,
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        image_options: ImageOptions = NO_OPTIONS,
        template_variables: Mapping[str, Any] | None = None,
        now: datetime | None = None,
    ) -> Prompt:
        """Makes a prompt.

        Args:
            messages: a text, which becomes one user's message with the images before it; or a
                conversation in the `transformers` form, whose image items are
                `{"type": "image", "image": X}`, X a path, URL, data URL, bytes, Pillow image or
                uint8 array. Items without an `image` take the next one of `images`.
                `{"type": "video", "video": X, "frames": 16}` is a film, X a path, URL, data URL or
                bytes: evenly chosen frames, each an image after its time, such as "2.5 s:".
            images: one image or several.
            tools: JSON schemas of functions the model may call, or Python functions.
            add_generation_prompt: end with the opening of the assistant's turn.
            continue_final_message: leave the last message open, to be continued.
            image_options: changes of the checkpoint's image settings.
            template_variables: more names for the chat template.
            now: the time for templates that print the date.

        Raises:
            PromptError: empty or malformed messages, or more or fewer images than places.
            ImageError: an image cannot be read.
        """
        from datetime import datetime

        see = partial(self.image_processor, options=image_options)
        conversation, pictures = self._gather(messages, images, see)
        tools = None if tools is None else [plain_tool(tool) for tool in tools]
        now = now if now is not None else datetime.now()  # one moment for all that is rendered
        token_ids = self.tokenizer.apply_chat_template(
            conversation,
            tools,
            add_generation_prompt,
            continue_final_message,
            template_variables,
            now,
        )
        self._check_places(token_ids, pictures)
        roles = [message["role"] for message in conversation]

        def length(count: int, add_generation_prompt: bool) -> int:
            """Ids of the first messages, 0 if the prompt does not begin with them."""
            try:
                ids = self.tokenizer.apply_chat_template(
                    conversation[:count], tools, add_generation_prompt, False,
                    template_variables, now,
                )  # fmt: skip
            except PromptError:  # the template wants more than this beginning
                return 0
            return len(ids) if token_ids[: len(ids)] == ids else 0

        first_turn = length(roles.index("assistant"), True) if "assistant" in roles else 0
        system_length = length(1, False) if roles[0] == "system" else 0
        processed = [self.image_processor(picture, image_options) for picture in pictures]
        ids, places = self._expand(token_ids, processed)
        before = token_ids[:first_turn].count(self.tokenizer.image_token_id)
        first_turn += sum(stop - start - 1 for start, stop in places[:before])
        placed = zip(processed, places, strict=True)
        prompt_images = tuple(PromptImage(image, *place) for image, place in placed)
        return Prompt(ids, prompt_images, first_turn or len(ids), system_length)

    def plan(
        self,
        messages: Conversation,
        images: ImageInput | Sequence[ImageInput] | None = None,
        *,
        tools: Sequence[Any] | None = None,
        image_options: ImageOptions = NO_OPTIONS,
    ) -> PromptPlan:
        """The tokens and views of a prompt, without its pixels.

        Of image files only the headers are read; films are decoded. Arguments and errors as in
        calling.
        """
        conversation, pictures = self._gather(
            messages, images, lambda picture: self._plan(picture, image_options)
        )
        tools = None if tools is None else [plain_tool(tool) for tool in tools]
        token_ids = self.tokenizer.apply_chat_template(conversation, tools)
        self._check_places(token_ids, pictures)
        plans = tuple(self._plan(picture, image_options) for picture in pictures)
        return PromptPlan(self._expand(token_ids, plans)[0], plans)

    def transcribe(
        self,
        messages: Conversation,
        images: ImageInput | Sequence[ImageInput] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        image_options: ImageOptions = NO_OPTIONS,
    ) -> Transcript:
        """A conversation to its last token, and which tokens the assistant wrote.

        Of image files only the headers are read. Arguments and errors as in calling.
        """
        see = partial(self.image_processor, options=image_options)
        conversation, pictures = self._gather(messages, images, see)
        ids, mask = self.tokenizer.apply_chat_template_with_mask(conversation, tools)
        self._check_places(ids, pictures)
        plans = [self._plan(picture, image_options) for picture in pictures]
        token_ids: list[int] = []
        assistant_mask: list[bool] = []
        waiting = iter(plans)
        for token, written in zip(ids, mask, strict=True):
            is_image = token == self.tokenizer.image_token_id
            expanded = self.image_token_ids(next(waiting)) if is_image else [token]
            token_ids += expanded
            assistant_mask += [written and not is_image] * len(expanded)
        shapes = tuple(shape for plan in plans for shape in plan.spatial_shapes)
        return Transcript(token_ids, assistant_mask, tuple(pictures), shapes)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Ids to text."""
        return self.tokenizer.decode(token_ids, skip_special_tokens)

    def batch_decode(
        self, sequences: Iterable[Sequence[int]], skip_special_tokens: bool = False
    ) -> list[str]:
        """`decode` for each sequence."""
        return self.tokenizer.batch_decode(sequences, skip_special_tokens)

    def image_token_ids(self, image: ImagePlan) -> list[int]:
        """The tokens of one image: marks, and a run of image tokens for each view.

        Tiles come row by row, each after `<|img_row_R_col_C|>`; the thumbnail comes last.
        """
        tokenizer, layout = self.tokenizer, image.layout
        if not image.use_image_special_tokens:
            return [tokenizer.image_token_id] * sum(image.view_tokens)
        marks: list[list[int]] = [[] for _ in image.view_tokens]
        if marks_of(layout):
            marks = [
                [tokenizer.tile_token_id(row, col)]
                for row in range(1, layout.rows + 1)
                for col in range(1, layout.cols + 1)
            ]
            if layout.whole is not None:
                marks.append([tokenizer.token_id(tokenizer.image_thumbnail_token)])
        ids = [tokenizer.token_id(tokenizer.image_start_token)]
        for mark, count in zip(marks, image.view_tokens, strict=True):
            ids += [*mark, *[tokenizer.image_token_id] * count]
        return [*ids, tokenizer.token_id(tokenizer.image_end_token)]

    def _check_places(self, token_ids: list[int], pictures: list[ImageInput]) -> None:
        places = token_ids.count(self.tokenizer.image_token_id)
        if places != len(pictures):
            raise PromptError(
                f"the chat template shows {places} images of {len(pictures)}; images belong into "
                "messages whose content it prints"
            )

    def _expand(
        self, token_ids: list[int], plans: Sequence[ImagePlan]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Puts each image's tokens in the place of its single `<image>`; ids and their places."""
        ids: list[int] = []
        places: list[tuple[int, int]] = []
        waiting = iter(plans)
        for token in token_ids:
            start = len(ids)
            if token == self.tokenizer.image_token_id:
                ids += self.image_token_ids(next(waiting))
                places.append((start, len(ids)))
            else:
                ids.append(token)
        return ids, places

    def _plan(self, picture: Any, options: ImageOptions) -> ImagePlan:
        """An image's views and tokens; of a file only the header is read."""
        if isinstance(picture, ImagePlan):
            return picture
        return self.image_processor.plan(*image_size(picture), options)

    def _gather(
        self,
        messages: Conversation,
        images: ImageInput | Sequence[ImageInput] | None,
        see: See,
    ) -> tuple[list[Message], list[Any]]:
        """Takes the images out of the messages; templates see only that they are there.

        Args:
            see: what takes the place of each frame of a film.
        """
        given = _image_list(images)
        if isinstance(messages, str):
            if not messages.strip():
                raise PromptError("the prompt is empty; ask something")
            items: list[Message] = [{"type": "image"} for _ in given]
            text: Message = {"type": "text", "text": messages}
            # plain content without images, as most templates and all text models know it
            content = [*items, text] if given else messages
            return [{"role": "user", "content": content}], given
        if not messages:
            raise PromptError("the conversation is empty; it needs one message or more")
        later = iter(given)
        found: list[Any] = []
        conversation = [
            _without_images(_with_frames(message, see), later, found) for message in messages
        ]
        unused = sum(1 for _ in later)
        if unused:
            raise PromptError(
                f"{len(given)} images were given, but the messages have places for only "
                f"{len(given) - unused}; add an item {{'type': 'image'}} for each"
            )
        return carry_calls(conversation, lambda: self._call_style), found

    @cached_property
    def _call_style(self) -> CallStyle:
        return call_style(self.tokenizer.render)
