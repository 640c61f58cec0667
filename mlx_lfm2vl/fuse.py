"""`python -m mlx_lfm2vl.fuse`."""

from .cli.fuse import main

if __name__ == "__main__":
    main()
