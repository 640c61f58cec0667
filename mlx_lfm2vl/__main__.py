"""`python -m mlx_lfm2vl`."""

from .cli.commands import main

if __name__ == "__main__":
    main()
