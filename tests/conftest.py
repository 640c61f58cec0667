"""What the tests share: folders of small checkpoints made by the official implementation."""

import shutil
from pathlib import Path

import pytest

FIXTURES = Path(__file__).parent / "checkpoints"
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The folder of all small checkpoints."""
    return FIXTURES


@pytest.fixture
def copied(tmp_path):
    """Copies a small checkpoint, so that a test may spoil it."""

    def copy(name: str = "v5") -> Path:
        target = tmp_path / name
        shutil.copytree(FIXTURES / name, target, ignore=shutil.ignore_patterns("cases*"))
        return target

    return copy


@pytest.fixture(scope="session")
def loaded():
    """Loads a small checkpoint in float32, once for all tests that only read it."""
    from mlx_lfm2vl import load

    cache = {}

    def get(name: str = "v5"):
        if name not in cache:
            cache[name] = load(FIXTURES / name, dtype="float32")
        return cache[name]

    return get
