"""Works adapters into the weights of their model: `python -m mlx_lfm2vl.fuse`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import mlx.core as mx
import mlx.nn as nn

from .adapters import check_fit, float_weight, merged_weight, read_adapters
from .cli import add_model, run_command
from .convert import Plan, free_target, make_plan, write_plan
from .errors import TrainError
from .hub import resolve_model
from .model import Lfm2VlForConditionalGeneration
from .weights import load_weights


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


def build_parser() -> argparse.ArgumentParser:
    """The arguments, named as in mlx-lm's `fuse`."""
    parser = argparse.ArgumentParser(
        prog="mlx-lfm2vl-fuse", description="Work adapters into the weights of their model."
    )
    add_model(parser)
    parser.add_argument("--adapter-path", default="adapters", help="default: %(default)s")
    parser.add_argument(
        "--save-path", default="fused_model", help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--dequantize", action="store_true", help="make floating point of integers")
    parser.add_argument("--to-hf", action="store_true", help="write the layout of transformers")
    parser.add_argument("--force", action="store_true", help="replace a folder that is there")
    return parser


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 done, 2 bad input, 130 interrupted."""
    parser = build_parser()
    args = parser.parse_args(argv)
    run_command(parser.prog, lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    target = fuse(
        args.model,
        args.adapter_path,
        args.save_path,
        dtype=args.dtype,
        dequantize=args.dequantize,
        to_hf=args.to_hf,
        revision=args.revision,
        force=args.force,
    )
    sys.stdout.write(f"wrote {target}\n")


if __name__ == "__main__":
    main()
