"""`python -m mlx_lfm2vl.batch`."""

from .cli.batch import main

if __name__ == "__main__":
    main()
