"""The command line `python -m mlx_lfm2vl.doctor`, also installed as `mlx-lfm2vl-doctor`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn

from .options import path
from .terminal import Parser, make_parser, run_command, tell, write

if TYPE_CHECKING:
    from ..measuring.diagnosis import Diagnosis

SOMETHING_WRONG = 1  # exit code
EPILOG = """\
examples:
  %(prog)s
  %(prog)s --model LiquidAI/LFM2.5-VL-450M --json > doctor.json
"""


def build_parser() -> Parser:
    """The arguments."""
    parser = make_parser(
        "mlx-lfm2vl-doctor",
        "Check that this machine computes what it should, and how fast; for issues, too.",
        EPILOG,
    )
    parser.add_argument(
        "--model",
        type=path,
        metavar="NAME",
        help="folder or downloaded repository to time, and to compare with the memory there is "
        "(default: demo); nothing is downloaded",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--probe",
        action="store_true",
        help="also decode with smaller and larger command buffers, which takes minutes",
    )
    return parser


def as_text(diagnosis: Diagnosis) -> str:
    """All lines."""
    return "\n".join([*_head(diagnosis), "", *_findings(diagnosis), "", *_times(diagnosis)])


def _head(diagnosis: Diagnosis) -> Iterator[str]:
    from ..measuring.diagnosis import OPTIONAL

    machine, packages = diagnosis.machine, diagnosis.packages
    yield f"mlx_lfm2vl {machine.mlx_lfm2vl}, Python {machine.python}, {machine.system}"
    yield (
        f"{machine.device_name}, {machine.cores} cores, {machine.memory_bytes / 2**30:.0f} GiB; "
        f"computing on {machine.device}"
    )
    yield ", ".join(f"{name} {found}" for name, found in packages.items() if found is not None)
    for name, found in packages.items():
        if found is None:
            yield f"without {name}" + (f": no {OPTIONAL[name]}" if name in OPTIONAL else "")
    models = [f"{model.name} ({model.nbytes / 1e9:.2f} GB)" for model in diagnosis.models]
    yield "downloaded models: " + (", ".join(models) if models else "none")


def _findings(diagnosis: Diagnosis) -> Iterator[str]:
    width = max(len(finding.name) for finding in diagnosis.findings)
    for finding in diagnosis.findings:
        cure = f"; {finding.cure}" if finding.cure else ""
        yield f"{finding.state:<6}{finding.name:<{width}}  {finding.text}{cure}"


def _times(diagnosis: Diagnosis) -> Iterator[str]:
    from ..measuring.health import WRONG
    from .benchmark import IMAGE_ROWS

    if diagnosis.stages is not None:
        (costs,) = diagnosis.stages.images
        yield f"{diagnosis.stages.model}, {diagnosis.stages.dtype}, a picture of {costs.name}:"
        yield from (f"      {title:<30}{show(costs)}" for title, show in IMAGE_ROWS)
    for operations, speed in (diagnosis.probe or {}).items():
        yield f"      MLX_MAX_OPS_PER_BUFFER {operations:<8}{speed:.1f} tok/s"
    wrong = sum(finding.state == WRONG for finding in diagnosis.findings)
    yield "all is well" if wrong == 0 else f"wrong: {wrong}"


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 well, 1 something is wrong, 2 bad input."""
    parser = build_parser()
    run_command(parser.prog, lambda: run(parser.parse_args(argv)))


def run(args: argparse.Namespace) -> None:
    """Does what the arguments ask for; errors are exceptions."""
    import json
    from dataclasses import asdict

    from ..measuring.diagnosis import diagnose

    diagnosis = diagnose(args.model, probe=args.probe, progress=_tell)
    if args.json:
        write(json.dumps(asdict(diagnosis), indent=2, ensure_ascii=False) + "\n")
    else:
        write(as_text(diagnosis) + "\n")
    if not diagnosis.is_well:
        sys.exit(SOMETHING_WRONG)


def _tell(stage: str) -> None:
    if sys.stderr.isatty():
        tell(f"checking {stage}")
