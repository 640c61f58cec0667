"""Captions every image of a folder.

    python examples/caption_folder.py examples/photos

For thousands of images, see `python -m mlx_lfm2vl.batch --help`: it can be stopped and goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mlx_lfm2vl import ImageError, generate, load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="LiquidAI/LFM2.5-VL-450M")
    parser.add_argument("--prompt", default="Describe this image in one sentence.")
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    model, processor = load(args.model)
    for path in sorted(args.folder.iterdir()):
        try:
            text = generate(model, processor, args.prompt, path, max_tokens=args.max_tokens)
        except ImageError as error:
            text = f"({error})"
        print(f"{path.name}: {text}")


if __name__ == "__main__":
    main()
