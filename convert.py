"""Converts LFM2-VL checkpoints to MLX folders; `python convert.py --help` tells how."""

from mlx_lfm2vl.cli.convert import main

if __name__ == "__main__":
    main()
