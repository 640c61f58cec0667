"""Checkpoints to MLX folders, quantized or not, and back to the transformers layout.

`python -m mlx_lfm2vl.convert`, the top-level `convert.py`, and `convert(...)` in Python. Weights
are read, changed and written one after the other; a folder appears only when it is complete.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..checkpoints.hub import REPOSITORY_ID, resolve_model
from ..checkpoints.loading import DTYPES
from ..checkpoints.names import hf_name
from ..checkpoints.settings import load_generation_config
from ..checkpoints.weights import (
    check_names_and_shapes,
    hf_vision_prefix,
    quantize_modules,
    read_weights,
    without_copies,
)
from ..checkpoints.writing import (
    COPIED_FILES,
    MAX_SHARD_BYTES,
    NOT_COPIED,
    _name_shards,
    _write_json,
    complete_folder,
)
from ..errors import ConfigError, ConvertError
from ..files import read_json
from ..models.config import Lfm2Config, Lfm2VlConfig, load_config
from ..models.lfm2_vl import Lfm2VlForConditionalGeneration
from ..options import FAMILY_SAMPLING
from .recipes import Quantization, decide, quantization_entry, quantized_modules


def convert(
    hf_path: str | Path,
    mlx_path: str | Path = "mlx_model",
    quantization: Quantization | None = None,
    *,
    dtype: str | None = None,
    dequantize: bool = False,
    to_hf: bool = False,
    revision: str | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Converts a checkpoint.

    Args:
        hf_path: a folder, or a repository of the Hugging Face Hub; any layout.
        mlx_path: the folder to write.
        quantization: what becomes integers; None for nothing.
        dtype: type of what stays floating point; by default what the checkpoint has.
        dequantize: integers become floating point again.
        to_hf: write the layout of transformers instead of MLX's.
        revision: branch, tag or commit of a repository.
        force: replace a folder that is there.
        progress: called with tensors written so far, and all.

    Returns:
        the folder.

    Raises:
        ConvertError: the output is there, is too large for the disk, or the source cannot be
            converted like this.
    """
    target = free_target(mlx_path, force)
    plan = make_plan(
        resolve_model(hf_path, revision),
        quantization,
        dtype=dtype,
        dequantize=dequantize,
        to_hf=to_hf,
        origin=str(hf_path),
    )
    write_plan(plan, target, progress)
    return target


def free_target(mlx_path: str | Path, force: bool) -> Path:
    """The folder to write; a ConvertError where it is there and may not be replaced."""
    target = Path(mlx_path).expanduser()
    if target.exists() and not force:
        raise ConvertError(f"{target} is there already; state another folder, or --force")
    return target


def write_plan(
    plan: Plan, target: Path, progress: Callable[[int, int], None] | None = None
) -> None:
    """Does what was planned; the target is there afterwards, complete, or not at all."""
    with complete_folder(target, plan.nbytes) as folder:
        card = _model_card(plan, target.name)
        write_weights(folder, plan, progress)
        write_files(folder, plan)
        (folder / "README.md").write_text(card, encoding="utf-8")
        verify(folder)


@dataclass
class Plan:
    """What will be written, before anything is read.

    Attributes:
        source: the folder that is read.
        origin: what the user called it, a repository or a folder.
        config: the source's config.json, as it will be written.
        weights: tensors by the names of the source's modules, lazily.
        decisions: how each module is quantized; absent ones are not.
        dtype: type of the floating-point tensors, None for what each has.
        dequantized: modules whose integers become floats.
        hf_names: None for MLX's layout, or the prefix of the vision tower in transformers'.
        parameters: how many numbers the model has, whatever they are stored in.
    """

    source: Path
    origin: str
    config: dict[str, Any]
    model_config: Lfm2VlConfig
    weights: dict[str, mx.array]
    decisions: dict[str, dict[str, Any]]
    dtype: mx.Dtype | None
    dequantized: dict[str, dict[str, Any]]
    hf_names: str | None
    parameters: int

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that will be written."""
        return sum(self.tensor_nbytes(name) for name in self.weights)

    def summary(self, every_module: bool = False) -> str:
        """What will be written, in a few lines or module by module."""
        counts: dict[str, int] = {}
        lines = []
        for name in self.weights:
            path = name.removesuffix(".weight")
            decision = self.decisions.get(path) if name.endswith(".weight") else None
            kind = "kept as it is"
            if decision is not None:
                kind = f"{decision['bits']} bits, groups of {decision['group_size']}"
                lines.append(f"  {path}: {kind}, {decision['mode']}")
            elif path in self.dequantized:
                kind = "dequantized"
            counts[kind] = counts.get(kind, 0) + 1
        kinds = "; ".join(f"{count} tensors {kind}" for kind, count in sorted(counts.items()))
        size = (
            f"{self.nbytes / 1e6:.1f} MB, {8 * self.nbytes / self.parameters:.2f} bits per weight"
        )
        return "\n".join([*(lines if every_module else []), f"{kinds}; {size}"])

    def tensor_nbytes(self, name: str) -> int:
        """Bytes of one source tensor after conversion."""
        tensor, path = self.weights[name], name.removesuffix(".weight")
        floats = (self.dtype or tensor.dtype).size
        if path in self.decisions and name.endswith(".weight"):
            decision = self.decisions[path]
            groups = tensor.size // decision["group_size"]
            # scale and bias of each group, or one byte in the small floating-point modes
            scales = 2 * floats if decision["mode"] == "affine" else 1
            return tensor.size * decision["bits"] // 8 + groups * scales
        owner = name.rpartition(".")[0]
        if owner in self.dequantized:
            if not name.endswith(".weight"):
                return 0
            return tensor.size * 32 // self.dequantized[owner]["bits"] * floats
        return tensor.size * (
            floats if mx.issubdtype(tensor.dtype, mx.floating) else tensor.itemsize
        )


def make_plan(
    source: Path,
    quantization: Quantization | None,
    *,
    dtype: str | None = None,
    dequantize: bool = False,
    to_hf: bool = False,
    origin: str | None = None,
) -> Plan:
    """Decides about every tensor; reads nothing but headers and configuration.

    Raises:
        ConvertError, ConfigError, WeightsError, ModelNotFoundError: before any work is done.
    """
    model_config = load_config(source)
    config = read_json(source / "config.json")
    weights = without_copies(read_weights(source), model_config)
    vision_prefix = hf_vision_prefix(source)
    model = Lfm2VlForConditionalGeneration(model_config)
    parameters = sum(array.size for _, array in tree_flatten(model.parameters()))
    quantize_modules(model, model_config.quantization, weights)
    check_names_and_shapes(model, weights)
    old = quantized_modules(model)
    if old and quantization is not None and not dequantize:
        raise ConvertError(f"{source} is quantized already; start from the original, or use -d")
    if old and to_hf and not dequantize:
        raise ConvertError(f"{source} is quantized, which transformers cannot read; add -d")
    if dequantize and not old:
        raise ConvertError(f"{source} is not quantized; there is nothing to dequantize")
    if to_hf and quantization is not None:
        raise ConvertError("--to-hf and --quantize exclude each other")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    decisions = decide(model, quantization) if quantization is not None else {}
    if dequantize or quantization is not None:
        config.pop("quantization", None)
        config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization"] = quantization_entry(quantization, decisions)
        config["quantization_config"] = config["quantization"]
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    if to_hf:
        config = hf_config(config, model_config)
    else:
        config["text_config"] = spell_out(config["text_config"], model_config.text_config)
    return Plan(
        source,
        origin if origin is not None else source.name,
        config,
        model_config,
        weights,
        decisions,
        DTYPES[dtype] if dtype is not None else None,
        old if dequantize else {},
        vision_prefix if to_hf else None,
        parameters,
    )


def spell_out(text_config: Mapping[str, Any], text: Lfm2Config) -> dict[str, Any]:
    """Adds the spellings of the first checkpoints, which other MLX loaders still go by."""
    first = {
        "block_dim": text.hidden_size,
        "block_ff_dim": text_config.get("intermediate_size"),
        "conv_dim": text.hidden_size,
        "conv_dim_out": text.hidden_size,
        "num_heads": text.num_attention_heads,
        "rope_theta": text.rope_theta,
        "layer_types": list(text.layer_types),
    }
    stated = {key: value for key, value in text_config.items() if value is not None}
    return {**first, **stated}


def hf_config(config: Mapping[str, Any], model: Lfm2VlConfig) -> dict[str, Any]:
    """The spelling that transformers 5 reads; values that it does not know are settled."""
    text, vision = dict(config["text_config"]), dict(config["vision_config"])
    text.pop("rope_theta", None)
    text |= {
        "model_type": "lfm2",
        "layer_types": list(model.text_config.layer_types),
        "rope_parameters": {"rope_theta": model.text_config.rope_theta, "rope_type": "default"},
    }
    vision |= {
        "model_type": "siglip2_vision_model",
        "vision_use_head": False,
        # transformers keeps every layer that is counted here
        "num_hidden_layers": model.vision_config.num_hidden_layers,
    }
    old = ("auto_map", "image_token_index", "vision_feature_layer", "tie_embedding")
    return {
        **{key: value for key, value in config.items() if key not in old},
        "model_type": "lfm2_vl",
        "image_token_id": model.image_token_id,
        "projector_use_layernorm": model.projector_use_layernorm,
        "tie_word_embeddings": model.text_config.tie_word_embeddings,
        "text_config": text,
        "vision_config": vision,
    }


def converted(plan: Plan) -> Iterator[tuple[str, mx.array]]:
    """Each tensor to be written, one after the other; the plan lets go of what was read."""
    names = [name for name in plan.weights if not _goes_with_its_weight(plan, name)]
    for name in names:
        for made, tensor in _convert_tensor(plan, name):
            mx.eval(tensor)
            yield (made if plan.hf_names is None else hf_name(made, plan.hf_names)), tensor


def _goes_with_its_weight(plan: Plan, name: str) -> bool:
    path, _, kind = name.rpartition(".")
    return path in plan.dequantized and kind in ("scales", "biases")


def _convert_tensor(plan: Plan, name: str) -> Iterator[tuple[str, mx.array]]:
    path, _, kind = name.rpartition(".")
    tensor = plan.weights.pop(name)
    if path in plan.dequantized and kind == "weight":
        settings = plan.dequantized[path]
        tensor = mx.dequantize(
            tensor,
            plan.weights.pop(f"{path}.scales"),
            plan.weights.pop(f"{path}.biases", None),
            settings["group_size"],
            settings["bits"],
            mode=settings["mode"],
        )
    if plan.dtype is not None and mx.issubdtype(tensor.dtype, mx.floating):
        tensor = tensor.astype(plan.dtype)
    if path in plan.decisions and kind == "weight":
        decision = plan.decisions[path]
        parts = mx.quantize(tensor, decision["group_size"], decision["bits"], mode=decision["mode"])
        names = (f"{path}.weight", f"{path}.scales", f"{path}.biases")
        yield from zip(names, parts, strict=False)  # small floating-point modes have no biases
        return
    if plan.hf_names is not None and name.endswith("conv.conv.weight"):
        tensor = tensor.swapaxes(1, 2)  # (hidden, kernel, 1) -> (hidden, 1, kernel)
    yield name, mx.contiguous(tensor)


def write_weights(
    folder: Path, plan: Plan, progress: Callable[[int, int], None] | None = None
) -> None:
    """Writes shards of at most 5 GB, with an index where there is more than one."""
    count = len(plan.weights)
    metadata = {"format": "pt"}
    if plan.hf_names is None:
        metadata = {"format": "mlx", "hf_vision_prefix": hf_vision_prefix(plan.source)}
    shards: list[list[str]] = []
    held: dict[str, mx.array] = {}

    def flush() -> None:
        path = folder / f"shard-{len(shards)}.safetensors"
        try:
            mx.save_safetensors(str(path), held, metadata)
        except RuntimeError as error:  # a full disk, in MLX's words
            raise ConvertError(f"{folder.parent} could not be written to: {error}") from None
        shards.append(list(held))
        held.clear()

    total = 0
    for done, (name, tensor) in enumerate(converted(plan), 1):
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > MAX_SHARD_BYTES:
            flush()
        held[name] = tensor
        total += tensor.nbytes
        if progress is not None:
            progress(min(done, count), count)
    flush()
    _name_shards(folder, shards, total)


def write_files(folder: Path, plan: Plan) -> None:
    """Configuration, tokenizer, processor and template, and a model card."""
    for pattern in COPIED_FILES:
        for path in plan.source.glob(pattern):
            if path.name not in NOT_COPIED:
                shutil.copyfile(path, folder / path.name)
    _write_json(folder / "config.json", plan.config)
    _write_json(folder / "generation_config.json", _generation_config(plan))


def _model_card(plan: Plan, name: str) -> str:
    """A README with what was done and how to run it."""
    is_repository = REPOSITORY_ID.fullmatch(plan.origin) is not None
    base_model = f"base_model: {plan.origin}\n" if is_repository else ""
    return f"""---
library_name: mlx
pipeline_tag: image-text-to-text
tags: [mlx, lfm2_vl]
{base_model}---

# {name}

Converted from `{plan.origin}` by mlx_lfm2vl: {plan.summary()}.

```sh
python -m mlx_lfm2vl.generate --model {name} --image photo.jpg --prompt "What is in this image?"
```
"""


def add_report(folder: Path, table: str) -> None:
    """Adds a fidelity table to the model card."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8")
    card.write_text(f"{text}\n## Fidelity\n\n{table}\n", encoding="utf-8")


def _generation_config(plan: Plan) -> dict[str, Any]:
    """The source's entries; the family's recommended sampling where it states none."""
    path = plan.source / "generation_config.json"
    stated = read_json(path) if path.exists() else {}
    if load_generation_config(plan.source, plan.model_config).sampling_source != "model card":
        return stated
    return {
        **stated,
        "do_sample": True,
        "temperature": FAMILY_SAMPLING.temperature,
        "min_p": FAMILY_SAMPLING.min_p,
        "repetition_penalty": FAMILY_SAMPLING.repetition_penalty,
    }


def verify(folder: Path) -> None:
    """Reads the headers of what was written and compares names and shapes with the model."""
    config = load_config(folder)
    model = Lfm2VlForConditionalGeneration(config)
    weights = read_weights(folder)
    quantize_modules(model, config.quantization, weights)
    check_names_and_shapes(model, weights)
