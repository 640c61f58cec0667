"""How fast a model is on a machine."""

DEFAULT_ROUNDS = 3
DEFAULT_TOKENS = 64
DEFAULT_ROWS = 8
