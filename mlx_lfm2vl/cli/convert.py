"""The command line `python -m mlx_lfm2vl.convert`, also the top-level `convert.py`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ..errors import ConvertError
from .terminal import Parser, make_parser, run_command

if TYPE_CHECKING:
    from ..conversion.recipes import Quantization

EPILOG = """\
examples:
  %(prog)s --hf-path LiquidAI/LFM2.5-VL-450M --mlx-path lfm2-4bit -q
  %(prog)s --hf-path my-finetune --mlx-path my-finetune-mlx -q --quant-predicate lfm2_4bit --report
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
    return parser


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
    from ..checkpoints.writing import free_target, spare
    from ..conversion.plan import make_plan, write_plan

    quantization = _quantization(args)
    if args.dry_run and (args.report or args.upload_repo is not None):
        raise ConvertError("--dry-run writes nothing to compare or upload")
    target = Path(args.mlx_path) if args.dry_run else free_target(args.mlx_path, args.force)
    source = resolve_model(args.hf_path, args.revision)
    if not args.dry_run:
        spare(target, source)
    plan = make_plan(
        source,
        quantization,
        dtype=args.dtype,
        dequantize=args.dequantize,
        to_hf=args.to_hf,
        origin=args.hf_path,
    )
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
    if not args.quantize:
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
