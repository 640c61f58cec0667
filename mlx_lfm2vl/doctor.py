"""`python -m mlx_lfm2vl.doctor`."""

from .cli.doctor import main

if __name__ == "__main__":
    main()
