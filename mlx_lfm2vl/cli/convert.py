"""The command line `python -m mlx_lfm2vl.convert`, also the top-level `convert.py`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from ..errors import ConvertError
from .terminal import Parser, make_parser, run_command

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
    parser.add_argument("--force", action="store_true", help="replace a folder that is there")
    parser.add_argument("--dry-run", action="store_true", help="only tell what would be written")
    parser.add_argument("--report", action="store_true", help="compare the result with the source")
    parser.add_argument("--upload-repo", help="Hugging Face repository to upload the result to")
    parser.add_argument(
        "-d", "--dequantize", action="store_true", help="make floating point of integers"
    )
    group = parser.add_argument_group("quantization")
    group.add_argument("-q", "--quantize", action="store_true", help="quantize")
    group.add_argument("--q-bits", type=int, help="2, 3, 4, 5, 6 or 8 (default: 4)")
    group.add_argument("--q-group-size", type=int, help="32, 64 or 128 (default: 64)")
    group.add_argument(
        "--q-mode", default="affine", help="affine, mxfp4, mxfp8 or nvfp4 (default: %(default)s)"
    )
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
    return parser


def build_report_parser() -> Parser:
    """The arguments of `report`."""
    parser = make_parser(
        "mlx-lfm2vl-convert report", "Tell what conversions lost against a reference."
    )
    parser.add_argument("reference", help="folder or repository that counts as right")
    parser.add_argument("others", nargs="+", help="conversions of it")
    parser.add_argument("--samples", help="folder with more .txt files and images")
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
    from ..conversion.plan import free_target, make_plan, write_plan
    from ..conversion.recipes import Quantization

    quantization = None
    if args.quantize:
        quantization = Quantization(
            bits=args.q_bits,
            group_size=args.q_group_size,
            mode=args.q_mode,
            vision_bits=args.q_vision,
            projector=not args.no_q_projector,
            embeddings_bits=args.q_embeddings,
            recipe=args.quant_predicate,
        )
    elif args.q_bits is not None or args.quant_predicate is not None or args.q_vision is not None:
        raise ConvertError("quantization settings need -q")
    target = Path(args.mlx_path) if args.dry_run else free_target(args.mlx_path, args.force)
    source = resolve_model(args.hf_path, args.revision)
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
    with _Bar() as progress:
        write_plan(plan, target, progress)
    sys.stdout.write(f"wrote {target}\n")
    if args.report:
        from ..conversion.plan import add_report
        from ..conversion.report import as_table, report

        table = as_table(report(source, [target]))
        add_report(target, table)
        sys.stdout.write(table + "\n")
    if args.upload_repo is not None:
        from mlx_lm.utils import upload_to_hub

        upload_to_hub(str(target), args.upload_repo)


def _report(args: argparse.Namespace) -> None:
    from ..conversion.report import as_json, as_table, plot, report

    results = report(args.reference, args.others, args.samples)
    if args.plot is not None:
        plot(results, args.plot)
    sys.stdout.write((as_json(results) if args.json else as_table(results)) + "\n")


class _Bar:
    """A progress bar on a terminal, nothing elsewhere."""

    def __enter__(self) -> Callable[[int, int], None] | None:
        if not sys.stderr.isatty():
            return None
        from tqdm import tqdm

        self.bar = tqdm(unit="tensor", leave=False)

        def update(done: int, count: int) -> None:
            self.bar.total = count
            self.bar.update(done - self.bar.n)

        return update

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "bar"):
            self.bar.close()
