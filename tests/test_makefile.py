"""make looks at Python first, and at the environment that an earlier Python left."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")

# answers what the Makefile asks, and makes environments whose programs do nothing
PYTHON = """#!/bin/sh
case "$2" in
  *yes*) echo {good} ;;
  *version_info*) echo {version} ;;
  venv) mkdir -p "$3/bin"; for name in pip python; do
    printf '#!/bin/sh\\n' > "$3/bin/$name"; chmod +x "$3/bin/$name"; done ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    """Runs make in a folder of its own, with a Python of some version."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)

    def call(version, target="demo"):
        python = tmp_path / f"python{version}"
        good = "yes" if int(version.split(".")[1]) >= 11 else ""
        python.write_text(PYTHON.format(version=version, good=good))
        python.chmod(0o755)
        return subprocess.run(
            ["make", "-s", target, f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True
        )

    return call


def test_an_old_python_is_told_in_one_line(make, tmp_path):
    run = make("3.10.13")
    assert run.returncode == 2
    assert (run.stdout, len(run.stderr.splitlines())) == ("", 1)
    for told in ("Python 3.11 or newer", "is Python 3.10.13", "make PYTHON=python3.13"):
        assert told in run.stderr
    assert not (tmp_path / ".venv").exists()


def test_no_python(tmp_path):
    run = subprocess.run(
        ["make", "-f", ROOT / "Makefile", "demo", "PYTHON=nosuchpython"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert "nosuchpython is no Python that runs" in run.stderr


@pytest.mark.parametrize("target", ["demo", "install"])
def test_a_good_python_after_another(make, tmp_path, target):
    stamp = {"demo": "demo", "install": "installed"}[target]
    old = tmp_path / ".venv" / "lib" / "old"
    old.mkdir(parents=True)
    (tmp_path / ".venv" / stamp).touch()
    run = make("3.13.0", target)
    assert (run.returncode, run.stderr) == (0, "")
    assert "Installing" in run.stdout
    assert not old.exists()
    assert "Installing" not in make("3.13.0", target).stdout
    assert "Installing" in make("3.12.1", target).stdout


def test_what_the_makefile_asks_a_real_python(make, tmp_path):
    make("3.12.99")
    command = ["make", "-n", "demo", f"PYTHON={sys.executable}"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert f"touch .venv/python-{platform.python_version()}\n" in run.stdout
