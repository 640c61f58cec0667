"""The weights of the small checkpoints, made from their names rather than stored.

A tensor's values depend on the seed of its checkpoint, its official name and its shape, and on
nothing else: they come from the frozen stream of numpy's `RandomState` by exact operations alone,
so every machine makes the same bits. `tensors.json` holds the names and shapes, written by
`make_checkpoints.py`, which gives the official model these same values.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent
TENSORS = HERE / "tensors.json"
MLX_VLM = HERE / "mlx_vlm"
DIGESTS = MLX_VLM / "digests.json"  # of the tensors that mlx-vlm wrote
Weights = dict[str, np.ndarray]


def random_values(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32. One-dimensional weights and the position table are random, too.

    A skipped norm or a wrong resize shows only so.
    """
    random = np.random.RandomState(zlib.crc32(f"{seed} {name}".encode()))
    unit = (2 * random.random_sample(shape) - 1) * math.sqrt(3)
    if len(shape) == 1:
        values = float(name.endswith("weight")) + 0.3 * unit
    elif "position_embedding" in name or "conv.conv" in name:
        values = 0.5 * unit
    else:
        values = unit / math.sqrt(shape[1])
    return values.astype(np.float32)


def first_layout(weights: Weights) -> Weights:
    return {
        name.replace("model.vision_tower.", "model.vision_tower.vision_model."): value
        for name, value in weights.items()
    }


def mlx_layout(weights: Weights) -> Weights:
    """MLX names, convolutions as (hidden, kernel, 1), and a stray layer norm."""
    renamed = {}
    for name, value in weights.items():
        name = name.removeprefix("model.")
        name = name.replace("language_model.", "language_model.model.")
        if name.endswith("conv.conv.weight"):
            value = value.swapaxes(1, 2).copy()
        renamed[name] = value
    width = weights["model.multi_modal_projector.linear_1.weight"].shape[1]
    for kind in ("weight", "bias"):
        renamed[f"multi_modal_projector.layer_norm.{kind}"] = np.ones(width, np.float32)
    return renamed


def noprefix_layout(weights: Weights) -> Weights:
    return {name.removeprefix("model."): value for name, value in weights.items()}


LAYOUTS = {"first": first_layout, "mlx": mlx_layout, "noprefix": noprefix_layout}
IN_TWO_FILES = ("noprefix",)


def files_of(name: str) -> dict[str, Weights]:
    """The weight files of a checkpoint: file name to tensors in the checkpoint's layout."""
    entry = json.loads(TENSORS.read_text())[name]
    official = {
        key: random_values(entry["seed"], key, tuple(shape))
        for key, shape in entry["shapes"].items()
    }
    weights = LAYOUTS[name](official) if name in LAYOUTS else official
    if name not in IN_TWO_FILES:
        return {"model.safetensors": weights}
    names = sorted(weights)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    return {
        f"model-{number:05}-of-00002.safetensors": {key: weights[key] for key in half}
        for number, half in enumerate(halves, 1)
    }


def raw_tensors(path: Path) -> dict[str, tuple[str, list[int], str]]:
    """Of each tensor in a file: its dtype as safetensors spells it, its shape, a digest."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        digest = hashlib.sha256(data[start + begin : start + end]).hexdigest()[:16]
        found[name] = (entry["dtype"], entry["shape"], digest)
    return found


def write_mlx_vlm(name: str) -> None:
    """Puts together what mlx-vlm made of `wide`: its files, and weights that its digests prove.

    Its own conversions are MLX's, so they are made of the same calls.
    """
    import mlx.core as mx

    weights = {
        key: mx.array(value)
        for key, value in mlx_layout(files_of("wide")["model.safetensors"]).items()
    }
    dtypes = {"F32": mx.float32, "BF16": mx.bfloat16}
    tensors, folder = json.loads(DIGESTS.read_text())[name], MLX_VLM / name
    made = {}
    for key, (dtype, shape, _) in tensors.items():
        base, _, kind = key.rpartition(".")
        if dtype == "U32":
            value = weights[key]
            bits = 32 * shape[-1] // value.shape[-1]
            parts = mx.quantize(value, group_size=64, bits=bits)
            for part, array in zip(("weight", "scales", "biases"), parts, strict=True):
                made[f"{base}.{part}"] = array
        elif kind not in ("scales", "biases"):
            made[key] = weights[key].astype(dtypes[dtype])
    weight_map = dict.fromkeys(sorted(made), "model.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in MLX_VLM.glob("*_config.json"):
        shutil.copy(file, folder)
    for file in ("chat_template.jinja", "tokenizer.json"):
        shutil.copy(HERE / "wide" / file, folder)
    part = folder / f"part-{os.getpid()}.safetensors"
    mx.save_safetensors(str(part), made, {"format": "mlx"})
    os.replace(part, folder / "model.safetensors")
    assert raw_tensors(folder / "model.safetensors") == {
        key: tuple(entry) for key, entry in tensors.items()
    }, f"{name}: these are not the weights that mlx-vlm wrote"


def up_to_date(path: Path) -> bool:
    """Whether a file is there and younger than what it is made of."""
    made_of = max(source.stat().st_mtime for source in (TENSORS, DIGESTS, Path(__file__)))
    return path.exists() and path.stat().st_mtime > made_of


def write_weights(name: str) -> None:
    """Writes a checkpoint's weight files; each appears whole."""
    for file, weights in files_of(name).items():
        part = HERE / name / f".{file}.{os.getpid()}"
        save_file(weights, part, {"format": "pt"})
        os.replace(part, HERE / name / file)


def write_missing() -> None:
    """Writes the weights of each checkpoint that lacks them; git does not keep them."""
    for name in json.loads(TENSORS.read_text()):
        files = list((HERE / name).glob("model*.safetensors"))
        if not files or not all(up_to_date(file) for file in files):
            write_weights(name)
    for name in json.loads(DIGESTS.read_text()):
        if not up_to_date(MLX_VLM / name / "model.safetensors"):
            write_mlx_vlm(name)
