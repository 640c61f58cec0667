"""`python -m mlx_lfm2vl.generate`."""

from .cli.generate import main

if __name__ == "__main__":
    main()
