"""What an answer cost: tokens, images, seconds."""

from __future__ import annotations

from dataclasses import dataclass, field

from .engine import AnswerRow


@dataclass(frozen=True)
class Usage:
    """What the last question or image cost.

    Attributes:
        prompt_tokens: positions of the whole prompt.
        reused_tokens: how many of them were there from before.
        processed_tokens: how many went through the model now.
        encoded_images: images that went through the vision tower now.
        generation_tokens: tokens of the answer.
        encoded_patches: of these images, all views.
        vision_time: seconds in the vision tower, if they were measured.
        prompt_time: seconds until the first token, those of the vision tower among them.
        answer_time: seconds after that; of steps with several answers, an equal share.
        rows: how many answers grew together, at most.
        constrained: whether the answer had a form, tokens of which come faster.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    processed_tokens: int = 0
    encoded_images: int = 0
    generation_tokens: int = 0
    encoded_patches: int = 0
    vision_time: float | None = field(default=None, compare=False)
    prompt_time: float = field(default=0.0, compare=False)
    answer_time: float = field(default=0.0, compare=False)
    rows: int = field(default=1, compare=False)
    constrained: bool = field(default=False, compare=False)

    @classmethod
    def of(cls, row: AnswerRow) -> Usage:
        """What a row has cost so far."""
        length, reused = len(row.token_ids), row.reused
        return cls(
            prompt_tokens=length,
            reused_tokens=reused,
            processed_tokens=length - reused,
            encoded_images=row.encoded_images,
            generation_tokens=len(row.tokens),
            encoded_patches=row.encoded_patches,
            vision_time=row.clock.vision_time,
            prompt_time=row.prompt_time,
            answer_time=row.answer_time,
            rows=row.most_rows,
            constrained=row.guide is not None,
        )
