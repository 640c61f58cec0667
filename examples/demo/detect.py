"""Draws what a model finds; as `python -m mlx_lfm2vl.detect`, with the demo model by default."""

import sys

from mlx_lfm2vl.cli.detect import main

main(["--model", "demo", *("--draw" if a == "--output" else a for a in sys.argv[1:])])
