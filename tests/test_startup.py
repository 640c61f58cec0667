"""What is imported on the way from process start to first token."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

HEAVY = ("transformers", "torch", "mlx_lm", "numpy", "PIL", "jinja2", "huggingface_hub")
# printed after everything else, so that the last line of stdout is the list
PROGRAMS = {
    ("generate", "cli"),
    ("batch", "folder"),
    ("convert", "convert_cli"),
    ("train", "train_cli"),
}
REPORT = """
import atexit, json, sys
atexit.register(lambda: print(json.dumps(sorted(m for m in sys.modules if "." not in m))))
"""


def modules_after(code: str, *arguments: str) -> set[str]:
    run = subprocess.run(
        [sys.executable, "-c", REPORT + code, *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(run.stdout.splitlines()[-1]))


def run_module(module: str) -> str:
    return f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"


@pytest.mark.parametrize(
    "code", ["import mlx_lfm2vl", "import mlx_lfm2vl as m; assert m.load and m.generate"]
)
def test_import_loads_nothing_heavy(code):
    assert modules_after(code).isdisjoint(HEAVY)


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_loads_nothing_heavy(flag):
    modules = modules_after(run_module("mlx_lfm2vl.generate"), flag)
    assert modules.isdisjoint(HEAVY)


def test_generating_from_a_folder_loads_no_other_framework(fixtures, tmp_path):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    modules = modules_after(
        run_module("mlx_lfm2vl.generate"),
        *("--model", str(fixtures / "v5"), "--image", str(tmp_path / "red.png")),
        *("--prompt", "What is it?", "--max-tokens", "2"),
    )
    assert modules.isdisjoint({"transformers", "torch", "mlx_lm", "huggingface_hub"})
    assert {"PIL", "mlx"} <= modules, "the check sees nothing"


def test_the_package_exports_the_functions_not_the_modules_of_their_names():
    import mlx_lfm2vl
    from mlx_lfm2vl.generate import generate as from_module

    assert mlx_lfm2vl.generate is from_module
    assert callable(mlx_lfm2vl.generate)
    assert set(mlx_lfm2vl.__all__) == {*mlx_lfm2vl._EXPORTS, "__version__"}


def test_imports_go_one_way():
    """A module imports only modules above it in the table of the design."""
    import ast

    import mlx_lfm2vl

    order = [
        "_version", "errors", "config", "hub", "image_processor", "tokenizer", "processor",
        "cache", "vision", "projector", "language", "decoding", "model", "weights", "adapters",
        "loading", "sampling", "generate", "snapshots", "session", "batch", "worker", "chat", "cli",
        "folder", "report", "convert", "convert_cli", "data", "train", "train_cli", "fuse",
        "benchmark",
    ]  # fmt: skip
    folder = Path(mlx_lfm2vl.__file__).parent
    assert {path.stem for path in folder.glob("*.py")} == {*order, "__init__"}
    for place, name in enumerate(order):
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                # the last lines of a module run it as a program
                if (name, node.module) in PROGRAMS:
                    continue
                assert order.index(node.module) < place, f"{name} imports {node.module}"
