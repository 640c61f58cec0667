"""Folders that mlx-vlm 0.7.10 converted load here, and ours are the same to it.

`checkpoints/mlx_vlm` holds its conversions of the checkpoint `wide`, digests in place of tensors,
and its own logits of them; see `checkpoints/compare_mlx_vlm.py`.
"""

import json

import mlx.core as mx
import numpy as np
import pytest

import mlx_lfm2vl
from mlx_lfm2vl import Quantization, convert

from .checkpoints.weights import DIGESTS, MLX_VLM, raw_tensors
from .helpers import FIXTURES, TOLERANCE, shapes, stored

CONVERSIONS = {
    "plain": None,
    "bf16": None,
    # it leaves the projector alone
    "8bit": Quantization(bits=8, projector=False),
    "4bit": Quantization(bits=4, projector=False),
    "mixed_4_8": Quantization(recipe="mixed_4_8", projector=False),
}


def convert_as(name: str, folder) -> None:
    dtype = "bfloat16" if name == "bf16" else None
    convert(FIXTURES / "wide", folder / name, CONVERSIONS[name], dtype=dtype)


def kept(name: str) -> dict[str, np.ndarray]:
    with np.load(MLX_VLM / f"{name}.npz") as arrays:
        return dict(arrays)


def close(ours: mx.array, theirs: np.ndarray) -> None:
    assert np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max() < TOLERANCE


@pytest.mark.parametrize("name", CONVERSIONS)
def test_its_folders_load_here_with_its_logits(name):
    model, _ = mlx_lfm2vl.load(MLX_VLM / name, dtype="float32")
    close(model(mx.arange(120, 150)[None]).logits[0], kept(name)["text"])
    case = stored("wide", "small")
    ids = mx.array(case["input_ids"])[None]
    logits = model(ids, case["pixel_values"], shapes(case)).logits[0]
    close(logits, kept(name)["image"])
    if name == "plain":
        close(logits, case["logits"][-len(logits) :])


@pytest.mark.parametrize("name", CONVERSIONS)
def test_our_conversion_is_its_own_bit_by_bit(name, tmp_path):
    convert_as(name, tmp_path)
    theirs = json.loads(DIGESTS.read_text())[name]
    ours = raw_tensors(tmp_path / name / "model.safetensors")
    assert ours == {key: tuple(tensor) for key, tensor in theirs.items()}


def test_our_conversions_in_mlx_vlm(tmp_path):
    pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed; its logits are kept instead")
    from .checkpoints.compare_mlx_vlm import logits

    for name in CONVERSIONS:
        convert_as(name, tmp_path)
        for kind, values in logits(tmp_path / name).items():
            close(mx.array(values), kept(name)[kind])
