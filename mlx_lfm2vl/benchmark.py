"""`python -m mlx_lfm2vl.benchmark`."""

from .cli.benchmark import main

if __name__ == "__main__":
    main()
