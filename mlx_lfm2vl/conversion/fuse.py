"""Works adapters into the weights of their model: `python -m mlx_lfm2vl.fuse`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import mlx.core as mx

from ..checkpoints.adapters import base_model, check_adapters, read_adapters
from ..checkpoints.hub import resolve_model
from ..checkpoints.weights import PACKED, dequantized, open_checkpoint
from ..checkpoints.writing import free_target, spare
from .plan import Plan, Progress, make_plan, write_plan


def fuse(
    model: str | Path | None,
    adapter_path: str | Path,
    save_path: str | Path,
    *,
    dtype: str | None = None,
    dequantize: bool | None = None,
    to_hf: bool = False,
    revision: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    tell: Callable[[str], object] | None = None,
) -> Path:
    """Writes a model folder in which the adapters are part of the weights.

    Args:
        model: folder or repository of the base; None for the one that the adapters name.
        adapter_path: folder of the adapters.
        save_path: the folder to write.
        dtype: type of what stays floating point; by default what the base has.
        dequantize: False keeps a quantized base quantized; the sum is rounded again then, and
            with few bits loses much of the adapters, see `rounding_loss`.
        to_hf: in the layout of transformers.
        revision, force, progress: as in `convert`.
        tell: called with what quantization means for the result, if the base is quantized.

    Raises:
        TrainError: the adapters do not fit the model, or name none.
        ConvertError: as `convert`.
    """
    origin = base_model(adapter_path) if model is None else str(model)
    target = free_target(save_path, force)
    source = resolve_model(origin, revision)
    spare(target, source, Path(adapter_path).expanduser())
    network, weights = open_checkpoint(source)
    if dequantize is None:
        dequantize = any(name.endswith(".scales") for name in weights)
    plan = make_plan(source, None, dtype=dtype, dequantize=dequantize, to_hf=to_hf, origin=origin)
    adapters = read_adapters(adapter_path)
    check_adapters(adapters, network, adapter_path)
    plan = replace(plan, adapters=adapters, adapter_path=adapter_path)
    told = told_loss(plan)
    if tell is not None and told:
        tell(told)
    write_plan(plan, target, progress, told)
    return target


def rounding_loss(plan: Plan) -> float:
    """How large the rounding error of updated maps is against their updates, 0 without rounding.

    Of all values together, in the Frobenius norm. Above 1, rounding changes the weights by more
    than the adapters do.
    """
    weights = plan.read()
    lost = changed = 0.0
    for path in plan.adapters.updates.keys() & plan.after.keys():
        parts = {k: weights.pop(f"{path}.{k}") for k in PACKED if f"{path}.{k}" in weights}
        merged, after = plan.merged(path, parts), plan.after[path]
        packed = mx.quantize(merged, after["group_size"], after["bits"], mode=after["mode"])
        rounded = dequantized(dict(zip(PACKED, packed, strict=False)), after)
        base = dequantized(parts, plan.before[path])
        lost += cast(float, mx.square(rounded - merged).sum().item())
        changed += cast(float, mx.square(merged - base).sum().item())
    return float((lost / changed) ** 0.5) if changed else 0.0


def told_loss(plan: Plan) -> str:
    """A sentence about what rounding or its absence means here; empty for a base of floats."""
    if not plan.before:
        return ""
    if not plan.after:
        return (
            "the base was quantized, the fused model is not: rounding again would blur the adapters"
        )
    loss = rounding_loss(plan)
    return (
        f"rounding the updated maps again is an error of {100 * loss:.0f} % of what the adapters "
        "change"
    )
