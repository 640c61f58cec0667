"""What is imported on the way from process start to first token."""

import ast
from pathlib import Path

import pytest
from PIL import Image

from mlx_lfm2vl.cli.commands import COMMANDS

from .helpers import HEAVY, modules_after, run_module


@pytest.mark.parametrize(
    "code", ["import mlx_lfm2vl", "import mlx_lfm2vl as m; assert m.load and m.generate"]
)
def test_import_loads_nothing_heavy(code):
    assert modules_after(code).isdisjoint(HEAVY)


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_no_command_loads_anything_heavy_to_tell_about_itself(flag):
    """One after the other in one process, from the cheapest to import to the last."""
    code = f"""
import runpy
for command in {list(COMMANDS)}:
    try:
        runpy.run_module("mlx_lfm2vl." + command, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code, command
    else:
        raise AssertionError(command)
"""
    assert modules_after(code, flag).isdisjoint({*HEAVY, "yaml", "tqdm"})


@pytest.mark.parametrize("command", ["generate", "batch"])
def test_answering_from_a_folder_loads_no_other_framework(command, fixtures, tmp_path):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    more = {
        "generate": ("--image",),
        "batch": ("--output", str(tmp_path / "out.jsonl"), "--images"),
    }
    modules = modules_after(
        run_module(f"mlx_lfm2vl.{command}"),
        *("--model", str(fixtures / "v5"), "--prompt", "What is it?", "--max-tokens", "2"),
        *(*more[command], str(tmp_path / "red.png")),
    )
    assert modules.isdisjoint({"transformers", "torch", "mlx_lm", "huggingface_hub", "llguidance"})
    assert {"PIL", "mlx"} <= modules, "the check sees nothing"


def test_the_package_exports_the_functions_not_the_doors_of_their_names():
    import mlx_lfm2vl
    import mlx_lfm2vl.generate
    from mlx_lfm2vl.generation.generate import generate

    assert mlx_lfm2vl.generate is generate
    assert set(mlx_lfm2vl.__all__) == {*mlx_lfm2vl._EXPORTS, "__version__"}


ROOMS = (
    *("_version", "errors", "files", "options", "prompts", "models", "checkpoints", "generation"),
    *("serving", "conversion", "training", "measuring", "cli"),
)
DOORS = (
    *("__main__", "batch", "benchmark", "convert", "detect", "doctor", "fuse", "generate"),
    *("serve", "train", "watch"),
)
Module = tuple[str, ...]


def test_every_command_has_a_door():
    assert {*COMMANDS, "__main__"} == set(DOORS)


def imports(folder: Path) -> dict[Module, set[Module]]:
    """Which modules each module imports: lazily, for types, or as a program, too."""
    modules = {
        path.relative_to(folder).with_suffix("").parts: ast.parse(path.read_text())
        for path in folder.rglob("*.py")
    }
    found: dict[Module, set[Module]] = {}
    for name, tree in modules.items():
        targets = found.setdefault(name, set())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not any(a.name.split(".")[0] == "mlx_lfm2vl" for a in node.names), name
            if isinstance(node, ast.ImportFrom) and node.level:
                base = (*name[: -node.level], *(node.module or "").split("."))
                base = tuple(part for part in base if part)
                inside = [(*base, alias.name) for alias in node.names]
                targets |= {m for m in inside if m in modules} or {base}
    return found


def test_imports_go_one_way():
    """A room imports only rooms before it, and no module reaches itself."""
    import mlx_lfm2vl

    graph = imports(Path(mlx_lfm2vl.__file__).parent)
    assert {name[0] for name in graph} == {*ROOMS, *DOORS, "__init__"}
    for name, targets in graph.items():
        for target in targets:
            if name[0] in DOORS:
                assert target[0] == "cli", f"{name} imports {target}"
            elif name != ("__init__",):
                assert ROOMS.index(target[0]) <= ROOMS.index(name[0]), f"{name} imports {target}"

    def walk(name: Module, path: tuple[Module, ...]) -> None:
        assert name not in path, " imports ".join(map(".".join, (*path, name)))
        if name in left:
            for target in graph.get(name, ()):
                walk(target, (*path, name))
            left.discard(name)

    left = set(graph)
    for name in graph:
        walk(name, ())
