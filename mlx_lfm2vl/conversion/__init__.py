"""Checkpoints to other layouts and fewer bits, and what that lost."""
