"""`python -m mlx_lfm2vl.watch`."""

from .cli.watch import main

if __name__ == "__main__":
    main()
