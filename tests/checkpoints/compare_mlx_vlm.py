"""Converts the checkpoint `wide` with mlx-vlm, and keeps what mlx-vlm computes with it.

Needs Python with mlx-vlm 0.7.10:

    python tests/checkpoints/compare_mlx_vlm.py

With folders as arguments it compares instead: mlx-vlm's logits of each with those kept under the
same name, which is how conversions made here are shown to mlx-vlm.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_vlm.convert import convert
from mlx_vlm.utils import load_model

if __name__ == "__main__":
    from weights import DIGESTS, MLX_VLM, raw_tensors
else:
    from .weights import DIGESTS, MLX_VLM, raw_tensors

HERE = Path(__file__).parent
CONVERSIONS = {
    "plain": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
    "8bit": {"quantize": True, "q_bits": 8, "q_group_size": 64},
    "4bit": {"quantize": True, "q_bits": 4, "q_group_size": 64},
    "mixed_4_8": {"quantize": True, "q_group_size": 64, "quant_predicate": "mixed_4_8"},
}


def logits(folder: Path) -> dict[str, np.ndarray]:
    """Logits (tokens, vocab) of a text and of a question about an image."""
    model = load_model(folder)
    # stored values are what counts, so rounding in between is kept out
    model.set_dtype(mx.float32)
    with np.load(HERE / "wide" / "cases" / "small.npz") as case:
        ids = mx.array(case["input_ids"])[None]
        pixels = mx.array((case["pixel_values"].astype(np.float32) / 255 - 0.5) / 0.5)
        shapes = mx.array(case["spatial_shapes"])
    embeddings = model.get_input_embeddings(
        ids,
        pixels[None],
        spatial_shapes=shapes,
        pixel_attention_mask=mx.ones((1, len(pixels)), mx.int32),
    )
    text = mx.arange(120, 150)[None]
    return {
        "text": np.array(model.language_model(text).logits[0].astype(mx.float32)),
        "image": np.array(
            model.language_model(ids, inputs_embeds=embeddings.inputs_embeds)
            .logits[0]
            .astype(mx.float32)
        ),
    }


def make() -> None:
    """Keeps the small files, and digests of the weights: `weights.py` makes these again."""
    shutil.rmtree(MLX_VLM, ignore_errors=True)
    MLX_VLM.mkdir()
    digests = {}
    for name, settings in CONVERSIONS.items():
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / name
            convert(str(HERE / "wide"), str(made), **settings)
            np.savez_compressed(MLX_VLM / f"{name}.npz", **logits(made))
            digests[name] = raw_tensors(made / "model.safetensors")
            (MLX_VLM / name).mkdir()
            shutil.copy(made / "config.json", MLX_VLM / name)
            for file in made.glob("*_config.json"):  # the same of every conversion
                shutil.copy(file, MLX_VLM)
            theirs, ours = (
                json.loads((where / "tokenizer.json").read_text())
                for where in (made, HERE / "wide")
            )
            assert theirs == ours, "the tokenizer changed, so it must be kept, too"
    lines = (f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in digests.items())
    DIGESTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def compare(folders: list[Path]) -> None:
    for folder in folders:
        ours = logits(folder)
        with np.load(MLX_VLM / f"{folder.name}.npz") as kept:
            for name in ("text", "image"):
                error = np.abs(ours[name] - kept[name]).max() / np.abs(kept[name]).max()
                print(f"{folder.name} {name}: relative difference {error:.1e}")
                assert error < 1e-5, folder


if __name__ == "__main__":
    compare([Path(folder) for folder in sys.argv[1:]]) if sys.argv[1:] else make()
