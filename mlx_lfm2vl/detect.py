"""`python -m mlx_lfm2vl.detect`."""

from .cli.detect import main

if __name__ == "__main__":
    main()
