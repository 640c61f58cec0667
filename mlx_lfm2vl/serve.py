"""`python -m mlx_lfm2vl.serve`."""

from .cli.serve import main

if __name__ == "__main__":
    main()
