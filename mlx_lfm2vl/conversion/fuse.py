"""Works adapters into the weights of their model: `python -m mlx_lfm2vl.fuse`."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ..checkpoints.adapters import check_fit, float_weight, merged_weight, read_adapters
from ..checkpoints.hub import resolve_model
from ..checkpoints.weights import load_weights
from ..errors import TrainError
from ..models.lfm2_vl import Lfm2VlForConditionalGeneration
from .plan import Plan, free_target, make_plan, write_plan


def fuse(
    model: str | Path,
    adapter_path: str | Path,
    save_path: str | Path,
    *,
    dtype: str | None = None,
    dequantize: bool = False,
    to_hf: bool = False,
    revision: str | None = None,
    force: bool = False,
) -> Path:
    """Writes a model folder in which the adapters are part of the weights.

    A quantized base stays quantized, its updated maps rounded again, unless `dequantize`.

    Args:
        model: folder or repository of the base.
        adapter_path: folder of the adapters.
        save_path: the folder to write.
        dtype: type of what stays floating point; by default what the base has.
        to_hf: in the layout of transformers.

    Raises:
        TrainError: the adapters do not fit the model.
        ConvertError: as `convert`.
    """
    target = free_target(save_path, force)
    source = resolve_model(model, revision)
    plan = make_plan(
        source, None, dtype=dtype, dequantize=dequantize, to_hf=to_hf, origin=str(model)
    )
    fuse_plan(plan, adapter_path)
    write_plan(plan, target)
    return target


def fuse_plan(plan: Plan, adapter_path: str | Path) -> None:
    """Replaces tensors of a plan by updated ones, lazily."""
    adapters = read_adapters(adapter_path)
    network = Lfm2VlForConditionalGeneration(plan.model_config)
    load_weights(network, plan.model_config, plan.weights)
    modules = dict(network.named_modules())
    for name, tensor in adapters.weights.items():
        if name not in plan.weights or plan.weights[name].shape != tensor.shape:
            raise TrainError(f"{adapter_path}: {name} of shape {tensor.shape} fits no weight")
        plan.weights[name] = tensor.astype(plan.weights[name].dtype)
    for name, update in adapters.updates.items():
        linear = modules.get(name)
        check_fit(linear, name, update, adapter_path)
        assert linear is not None
        merged = merged_weight(float_weight(linear), update, adapters.scale)
        if isinstance(linear, nn.QuantizedLinear):
            _put_quantized(plan, name, linear, merged)
        else:
            plan.weights[f"{name}.weight"] = merged.astype(linear.weight.dtype)


def _put_quantized(plan: Plan, name: str, linear: nn.QuantizedLinear, merged: mx.array) -> None:
    merged = merged.astype(linear.scales.dtype if linear.mode == "affine" else mx.bfloat16)
    if plan.dequantized.pop(name, None) is not None:
        plan.weights[f"{name}.weight"] = merged
        for kind in ("scales", "biases"):
            plan.weights.pop(f"{name}.{kind}", None)
        return
    parts = mx.quantize(merged, linear.group_size, linear.bits, mode=linear.mode)
    for kind, tensor in zip(("weight", "scales", "biases"), parts, strict=False):
        plan.weights[f"{name}.{kind}"] = tensor
