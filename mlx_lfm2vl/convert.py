"""`python -m mlx_lfm2vl.convert`."""

from .cli.convert import main

if __name__ == "__main__":
    main()
