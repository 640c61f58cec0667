"""The command line `python -m mlx_lfm2vl.convert`, also the top-level `convert.py`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import ConvertError
from .terminal import Parser, make_parser, run_command, tell

if TYPE_CHECKING:
    from ..conversion.calibrated import Calibration
    from ..conversion.plan import Plan
    from ..conversion.recipes import Quantization

BUILT_IN = ""  # --calibrate without a path
EPILOG = """\
examples:
  %(prog)s --hf-path LiquidAI/LFM2.5-VL-450M --mlx-path lfm2-4bit -q
  %(prog)s --hf-path my-finetune --mlx-path my-finetune-mlx -q --quant-predicate lfm2_4bit --report
  %(prog)s --hf-path my-finetune --mlx-path my-4bit --calibrate photos --target-bits 4.5 --report
  %(prog)s --hf-path lfm2-4bit --mlx-path back -d --to-hf
  %(prog)s report LiquidAI/LFM2.5-VL-450M lfm2-4bit lfm2-8bit --plot fidelity.png
"""


def build_parser() -> Parser:
    """The arguments, named as in mlx-lm's converter."""
    parser = make_parser(
        "mlx-lfm2vl-convert", "Convert an LFM2-VL checkpoint to an MLX folder, or back.", EPILOG
    )
    parser.add_argument(
        "--hf-path", "--model", required=True, help="folder or Hugging Face repository to convert"
    )
    parser.add_argument(
        "--mlx-path", default="mlx_model", help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument("--dtype", help="float16, bfloat16 or float32 (default: as it is)")
    parser.add_argument("--to-hf", action="store_true", help="write the layout of transformers")
    parser.add_argument("--force", action="store_true", help="replace a model folder that is there")
    parser.add_argument("--dry-run", action="store_true", help="only tell what would be written")
    parser.add_argument("--report", action="store_true", help="compare the result with the source")
    parser.add_argument("--upload-repo", help="Hugging Face repository to upload the result to")
    parser.add_argument(
        "-d", "--dequantize", action="store_true", help="make floating point of integers"
    )
    _add_quantization(parser.add_argument_group("quantization"))
    _add_calibration(parser.add_argument_group("calibrated quantization"))
    return parser


def _add_calibration(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--calibrate",
        nargs="?",
        const=BUILT_IN,
        metavar="PATH",
        help="quantize so that answers change least: a folder of images, .txt and .jsonl files, or "
        ".jsonl conversations; alone, a few pictures made in code",
    )
    group.add_argument(
        "--target-bits",
        type=float,
        metavar="BITS",
        help="bits per weight of the whole model, spent where they matter (default: 4.5, unless "
        "--q-bits or --quant-predicate sets bits)",
    )
    group.add_argument(
        "--refine",
        nargs="+",
        metavar="METHOD",
        help="how values are improved: awq, gptq, clip, distill, or none (default: gptq distill)",
    )
    group.add_argument("--epochs", type=int, help="passes of the distillation (default: 4)")
    group.add_argument("--save-plan", metavar="JSON", help="write the bits of each module; "
                       "--quant-predicate reads it")  # fmt: skip
    group.add_argument(
        "--calibration-folder",
        metavar="DIR",
        help="keeps answers and progress, so that a run can be continued and the next one is quick "
        "(default: beside the output)",
    )


def _add_quantization(group: argparse._ArgumentGroup) -> None:
    group.add_argument("-q", "--quantize", action="store_true", help="quantize")
    group.add_argument("--q-bits", type=int, help="2, 3, 4, 5, 6 or 8 (default: 4)")
    group.add_argument("--q-group-size", type=int, help="32, 64 or 128 (default: 64)")
    group.add_argument("--q-mode", help="affine, mxfp4, mxfp8 or nvfp4 (default: affine)")
    group.add_argument(
        "--quant-predicate",
        help="mixed_2_6, mixed_3_4, mixed_3_6, mixed_4_6, mixed_4_8, lfm2_4bit, lfm2_6bit, or a "
        "JSON file of patterns -> bits (false leaves modules alone)",
    )
    group.add_argument(
        "--q-vision", type=int, metavar="BITS", help="quantize the vision tower, too"
    )
    group.add_argument("--no-q-projector", action="store_true", help="leave the projector alone")
    group.add_argument("--q-embeddings", type=int, metavar="BITS", help="bits of the embeddings")


def build_report_parser() -> Parser:
    """The arguments of `report`."""
    parser = make_parser(
        "mlx-lfm2vl-convert report", "Tell what conversions lost against a reference."
    )
    parser.add_argument("reference", help="folder or repository that counts as right")
    parser.add_argument("others", nargs="+", help="conversions of it")
    parser.add_argument(
        "--samples",
        help="more samples: a folder of images, .txt and .jsonl files, or .jsonl conversations",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--plot", metavar="PNG", help="draw divergence against size")
    return parser


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 done, 2 bad input, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["report"]:
        parser = build_report_parser()
        run_command(parser.prog, lambda: _report(parser.parse_args(arguments[1:])))
    parser = build_parser()
    run_command(parser.prog, lambda: _convert(parser.parse_args(arguments)))


def _convert(args: argparse.Namespace) -> None:
    from ..checkpoints.hub import resolve_model
    from ..checkpoints.weights import open_checkpoint
    from ..checkpoints.writing import free_target, spare, write_json
    from ..conversion.plan import write_plan
    from ..conversion.recipes import as_patterns, matrices

    quantization, calibration = _quantization(args), _calibration(args)
    if args.dry_run and (args.report or args.upload_repo is not None):
        raise ConvertError("--dry-run writes nothing to compare or upload")
    target = Path(args.mlx_path) if args.dry_run else free_target(args.mlx_path, args.force)
    source = resolve_model(args.hf_path, args.revision)
    if not args.dry_run:
        spare(target, source)
    plan = _plan(args, source, quantization, calibration)
    if args.save_plan is not None:
        paths = matrices(open_checkpoint(source)[0])
        write_json(Path(args.save_plan), as_patterns(paths, plan.after))
    sys.stdout.write(plan.summary(every_module=args.dry_run) + "\n")
    if args.dry_run:
        return
    with progress_bar() as progress:
        write_plan(plan, target, progress)
    sys.stdout.write(f"wrote {target}\n")
    if args.report:
        from ..conversion.card import add_report
        from ..conversion.report import as_table, report

        with progress_bar("sample") as progress:
            table = as_table(report(source, [target], progress=progress))
        add_report(target, table)
        sys.stdout.write(table + "\n")
    if args.upload_repo is not None:
        from ..conversion.card import upload

        sys.stdout.write(f"uploaded to {upload(target, args.upload_repo)}\n")


def _plan(
    args: argparse.Namespace,
    source: Path,
    quantization: Quantization | None,
    calibration: Calibration | None,
) -> Plan:
    from ..conversion.plan import make_plan

    if calibration is None:
        return make_plan(
            source,
            quantization,
            dtype=args.dtype,
            dequantize=args.dequantize,
            to_hf=args.to_hf,
            origin=args.hf_path,
        )
    from ..conversion.calibrated import calibrated_plan

    if args.dequantize or args.to_hf:
        raise ConvertError("--calibrate quantizes, which -d and --to-hf exclude")
    if calibration.samples is None:
        tell("calibrating on a few pictures made in code; your own, --calibrate PATH, do better")
    with stage_bars() as progress:
        return calibrated_plan(
            source,
            quantization,
            calibration,
            dtype=args.dtype,
            origin=args.hf_path,
            tell=progress,
            refine=not args.dry_run,
        )


def _calibration(args: argparse.Namespace) -> Calibration | None:
    """The settings of the flags; a ConvertError for some that would have no effect."""
    flags = {
        "--target-bits": args.target_bits,
        "--refine": args.refine,
        "--epochs": args.epochs,
        "--calibration-folder": args.calibration_folder,
    }
    given = [flag for flag, value in flags.items() if value is not None]
    if args.calibrate is None:
        if given:
            raise ConvertError(f"{', '.join(given)}: these settings need --calibrate")
        return None
    from ..conversion.calibrated import TARGET_BITS, Calibration

    bits = {
        "--q-bits": args.q_bits,
        "--quant-predicate": args.quant_predicate,
        "--q-vision": args.q_vision,
        "--q-embeddings": args.q_embeddings,
        "--no-q-projector": args.no_q_projector or None,
    }
    deciding = [flag for flag, value in bits.items() if value is not None]
    target = args.target_bits
    if target is not None and deciding:
        flags_told = ", ".join(deciding)
        raise ConvertError(f"--target-bits decides about all modules; leave {flags_told} out")
    if target is None and not deciding:
        target = TARGET_BITS
    folder = args.calibration_folder
    settings: dict[str, Any] = {}
    if args.refine is not None:
        settings["methods"] = () if args.refine == ["none"] else tuple(args.refine)
    if args.epochs is not None:
        settings["epochs"] = args.epochs
    return Calibration(
        args.calibrate if args.calibrate != BUILT_IN else None,
        target,
        folder=Path(folder if folder is not None else f"{args.mlx_path}.calibration"),
        **settings,
    )


def _quantization(args: argparse.Namespace) -> Quantization | None:
    """The settings of the flags; a ConvertError if there are some without -q."""
    from ..conversion.recipes import Quantization

    flags = {
        "--q-bits": args.q_bits,
        "--q-group-size": args.q_group_size,
        "--q-mode": args.q_mode,
        "--quant-predicate": args.quant_predicate,
        "--q-vision": args.q_vision,
        "--no-q-projector": args.no_q_projector or None,
        "--q-embeddings": args.q_embeddings,
    }
    given = [flag for flag, value in flags.items() if value is not None]
    if not args.quantize and args.calibrate is None:
        if given:
            raise ConvertError(f"{', '.join(given)}: quantization settings need -q")
        return None
    return Quantization(
        bits=args.q_bits,
        group_size=args.q_group_size,
        mode=args.q_mode if args.q_mode is not None else Quantization.mode,
        vision_bits=args.q_vision,
        projector=not args.no_q_projector,
        embeddings_bits=args.q_embeddings,
        recipe=args.quant_predicate,
    )


def _report(args: argparse.Namespace) -> None:
    from ..conversion.report import as_json, as_table, check_plot, plot, report

    if args.plot is not None:
        check_plot(args.plot)
    with progress_bar("sample") as progress:
        results = report(args.reference, args.others, args.samples, progress)
    if args.plot is not None:
        plot(results, args.plot)
    sys.stdout.write((as_json(results) if args.json else as_table(results)) + "\n")


@contextmanager
def progress_bar(unit: str = "tensor") -> Iterator[Callable[[int, int], None] | None]:
    """A bar with the time left on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(unit=unit, leave=False) as bar:

        def update(done: int, count: int) -> None:
            bar.total = count
            bar.update(done - bar.n)

        yield update


@contextmanager
def stage_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stage of a long work, on a terminal; lines elsewhere."""
    if not sys.stderr.isatty():
        stages: list[str] = []

        def line(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages.append(stage)
                tell(f"{stage}: {total} step{'' if total == 1 else 's'}")

        yield line
        return
    from tqdm import tqdm

    bars: dict[str, Any] = {}

    def update(stage: str, done: int, total: int) -> None:
        if stage not in bars:
            bars[stage] = tqdm(desc=stage, total=total)
        bars[stage].update(done - bars[stage].n)

    try:
        yield update
    finally:
        for bar in bars.values():
            bar.close()
