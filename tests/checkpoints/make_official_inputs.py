"""Makes official_inputs.npz: what the official processor and model make of 20 conversations.

Needs what make_checkpoints.py needs:

    python tests/checkpoints/make_official_inputs.py

The inputs are kept as the official processor gave them, its normalised pixels as the bytes that
they came from. Of hidden states and logits a few positions are kept, rounded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_checkpoints import NAMED, packable
from PIL import Image
from transformers import (
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    Lfm2VlImageProcessor,
    Lfm2VlProcessor,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).parent
POSITIONS = 4  # of each conversation: spread evenly, the last one included
VISION_STEP = 7  # of the vision tower's features, those of every seventh patch

Part = str | tuple[int, int]
Conversation = list[tuple[str, list[Part]]]
# name -> checkpoint, side of the padding, and conversations that form one batch
BATCHES: dict[str, tuple[str, str, list[Conversation]]] = {
    "text": ("v5", "right", [[("user", ["How many cats are there?"])]]),
    "system": (
        "v5",
        "right",
        [[("system", ["You are helpful."]), ("user", ["Count from one to ten, slowly."])]],
    ),
    "small": ("v5", "right", [[("user", [(40, 50), "What is in this image?"])]]),
    "tiled": ("v5", "right", [[("user", [(200, 130), "Describe the picture."])]]),
    "column": ("v5", "right", [[("user", [(70, 200), "What is this?"])]]),
    "several": (
        "v5",
        "right",
        [[("user", ["Compare", (40, 50), "with", (90, 60), "and", (64, 64), "now."])]],
    ),
    "mixed": ("v5", "right", [[("user", [(150, 150), (32, 90), (40, 50), (50, 40), "Which?"])]]),
    "turns": (
        "v5",
        "right",
        [
            [
                ("system", ["You are helpful."]),
                ("user", [(64, 40), "What is it?"]),
                ("assistant", ["A red cat."]),
                ("user", ["And here?", (130, 40)]),
                ("assistant", ["A dog."]),
                ("user", ["Where is the cat?"]),
            ]
        ],
    ),
    "padded left": (
        "v5",
        "left",
        [
            [("user", [(40, 50), "What?"])],
            [("user", ["Compare", (90, 60), "with", (40, 50), "and tell me what changed."])],
            [("system", ["Be brief."]), ("user", ["How many are there?"])],
        ],
    ),
    "padded right": (
        "v5",
        "right",
        [
            [("user", ["What is a cat?"])],
            [("user", [(140, 100), "Describe the picture."])],
            [("user", [(30, 60), "What?"]), ("assistant", ["A dog."]), ("user", ["Why?"])],
        ],
    ),
    "head72": ("head72", "right", [[("user", [(200, 60), "Describe the picture."])]]),
    "head72 two": ("head72", "right", [[("user", [(40, 50), (60, 40), "Compare them."])]]),
    "untied": ("untied", "right", [[("user", [(90, 60), "What is in this image?"])]]),
    "untied batch": (
        "untied",
        "left",
        [[("user", [(40, 50), "What?"])], [("user", ["Count the cats, slowly."])]],
    ),
    "text396": ("text396", "right", [[("user", [(64, 96), "And this?", (40, 50)])]]),
}


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Boxes of one colour each: they pack well, and every patch differs from its neighbours."""
    random = np.random.default_rng([seed, width, height])
    pixels = np.zeros((height, width, 3), np.uint8)
    for top in range(0, height, 11):
        for left in range(0, width, 13):
            pixels[top : top + 11, left : left + 13] = random.integers(0, 256, 3)
    return Image.fromarray(pixels)


def messages(conversation: Conversation) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for turn, (role, parts) in enumerate(conversation):
        content = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image", "image": picture(*part, seed=10 * turn + place)}
            for place, part in enumerate(parts)
        ]
        found.append({"role": role, "content": content})
    return found


def official(checkpoint: str) -> tuple[Any, Any]:
    folder = HERE / checkpoint
    config = Lfm2VlConfig.from_pretrained(folder)
    if checkpoint == "head72":  # its weights end at the layer whose features are used
        config.vision_config.num_hidden_layers = 2
    model, told = Lfm2VlForConditionalGeneration.from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **NAMED)
    template = (folder / "chat_template.jinja").read_text()
    settings = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    image_processor = Lfm2VlImageProcessor(**settings)
    return model.eval(), Lfm2VlProcessor(image_processor, tokenizer, chat_template=template)


def as_bytes(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The uint8 pixels that these normalised ones came from, 0 on padding."""
    found = np.round((pixels * 0.5 + 0.5) * 255).astype(np.uint8)
    again = (found - np.float32(127.5)) / np.float32(127.5)
    assert np.array_equal(again[mask == 1], pixels[mask == 1]), "the bytes do not give them back"
    assert not pixels[mask == 0].any(), "padding is not 0"
    return found * mask[..., None].astype(np.uint8)


def places(mask: np.ndarray) -> np.ndarray:
    """(rows, POSITIONS): some real positions of each row, the last one included."""
    found = []
    for row in mask:
        real = np.flatnonzero(row)
        found.append(real[np.linspace(len(real) / 4, len(real) - 1, POSITIONS).astype(int)])
    return np.stack(found)


def run(name: str) -> dict[str, np.ndarray]:
    checkpoint, side, conversations = BATCHES[name]
    model, processor = official(checkpoint)
    inputs = processor.apply_chat_template(
        [messages(conversation) for conversation in conversations],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": side},
    )
    arrays = {key: value.numpy() for key, value in inputs.items()}
    if "pixel_values" in arrays:
        arrays["pixel_values"] = as_bytes(arrays["pixel_values"], arrays["pixel_attention_mask"])
    arrays["places"] = places(arrays["attention_mask"])
    rows = torch.arange(len(conversations))[:, None]
    kept = torch.tensor(arrays["places"])
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
        base = model.model(**inputs)
        assert torch.equal(base.last_hidden_state, out.hidden_states[-1])
    arrays["hidden_states"] = np.stack(
        [packable(hidden[rows, kept]) for hidden in out.hidden_states]
    )
    arrays["logits"] = packable(out.logits[rows[:, 0], kept[:, -1]])
    if out.image_hidden_states is not None:
        arrays["image_hidden_states"] = packable(out.image_hidden_states)
        names = ("pixel_values", "spatial_shapes", "pixel_attention_mask")
        with torch.no_grad():
            features = model.get_image_features(**{name: inputs[name] for name in names})
            assert torch.equal(torch.cat(features.pooler_output), out.image_hidden_states)
            # the tower's own features of a few patches
            real = inputs["pixel_attention_mask"].bool()
            arrays["vision_hidden_state"] = packable(
                features.last_hidden_state[real][::VISION_STEP]
            )
    return {
        key: value.astype(np.int32) if value.dtype == np.int64 else value
        for key, value in arrays.items()
    }


def main() -> None:
    assert sum(len(conversations) for _, _, conversations in BATCHES.values()) == 20
    found = {f"{name}/{key}": value for name in BATCHES for key, value in run(name).items()}
    np.savez_compressed(HERE / "official_inputs.npz", **found)


if __name__ == "__main__":
    main()
