"""`python -m mlx_lfm2vl.train`."""

from .cli.train import main

if __name__ == "__main__":
    main()
