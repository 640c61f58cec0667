"""Files and folders that are complete or not there at all.

What is written comes to be in a workspace, a hidden folder beside its place, and is renamed at the
end. A workspace is locked by its process for as long as that lives; what a killed one left behind
is put right by the next that writes beside it.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import ConvertError, Lfm2VlError, OutputError
from ..files import read_json
from ..models.config import MODEL_TYPES
from .weights import INDEX, SINGLE

MAX_SHARD_BYTES = 5 << 30
WORKSPACE = ".mlx-lfm2vl-"  # in the name of every workspace, after that of the target
REPLACED = f"{WORKSPACE}replaced"  # a folder in it, if no swap is possible
TRAINING_STATE = "training_state.json"  # beside the weights of a checkpoint that `train` wrote
COPIED_FILES = ("*.json", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model", "LICENSE*", "NOTICE*")  # fmt: skip # noqa: E501
NOT_COPIED = ("config.json", "generation_config.json", INDEX, TRAINING_STATE)
# what a model folder may hold if --force is to replace it
MODEL_FOLDER = (*COPIED_FILES, "*.safetensors", "README.md", ".gitattributes", ".DS_Store")


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes a JSON file that is complete or not there; an OutputError if it cannot be."""
    with complete_file(path) as new:
        new.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_arrays(path: Path, arrays: dict[str, mx.array], metadata: dict[str, str]) -> None:
    """Writes a safetensors file; a full disk is an OSError, as for every other file."""
    try:
        mx.save_safetensors(str(path), arrays, metadata)
    except RuntimeError as error:
        raise OSError(str(error)) from None


@contextmanager
def complete_file(target: Path, error: type[Lfm2VlError] = OutputError) -> Iterator[Path]:
    """A path of the same name to write to; it becomes the target at the end, or vanishes.

    Raises:
        OutputError, or the given kind: the system refuses to write there.
    """
    with _told(target, error), _workspace(target) as folder:
        yield folder / target.name
        os.replace(folder / target.name, target)


@contextmanager
def complete_folder(target: Path, nbytes: int) -> Iterator[Path]:
    """A folder that becomes the target if everything goes well, or vanishes.

    A target that is there is replaced in one step, and stays if anything goes wrong.

    Raises:
        ConvertError: fewer than `nbytes` are free, or the system refuses to write there.
    """
    with _told(target, ConvertError), _workspace(target) as workspace:
        free = shutil.disk_usage(target.parent).free
        if nbytes > free:
            raise ConvertError(
                f"{target} needs {nbytes / 1e6:.1f} MB, but only {free / 1e6:.1f} MB are free"
            )
        new = workspace / target.name
        new.mkdir()
        yield new
        if target.exists() and not _exchange(new, target):
            (workspace / REPLACED).mkdir()
            target.rename(workspace / REPLACED / target.name)
        if new.exists() and not target.exists():
            new.rename(target)


@contextmanager
def _told(target: Path, kind: type[Lfm2VlError]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, Lfm2VlError):
            raise
        raise kind(f"{target} could not be written to: {error}") from None


@contextmanager
def _workspace(target: Path) -> Iterator[Path]:
    parent = target.parent
    parent.mkdir(parents=True, exist_ok=True)
    with _tidied(parent):
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name[:40]}{WORKSPACE}", dir=parent))
        lock = _lock(folder, wait=True)
    try:
        yield folder
    finally:
        _clear(folder)
        _unlock(lock)


def remove_leftovers(parent: Path) -> None:
    """Removes what killed processes left in a folder; a target caught between is put back."""
    with _tidied(parent):
        pass


@contextmanager
def _tidied(parent: Path) -> Iterator[None]:
    door = _lock(parent, wait=True)  # nobody may take a workspace for dead before it is locked
    try:
        for folder in parent.glob(f".*{WORKSPACE}*"):
            lock = _lock(folder, wait=False)
            if lock is not None:
                _clear(folder)
                _unlock(lock)
        yield
    finally:
        _unlock(door)


def _clear(workspace: Path) -> None:
    for replaced in (workspace / REPLACED).glob("*"):
        target = workspace.parent / replaced.name
        if not os.path.lexists(target):
            replaced.rename(target)
    shutil.rmtree(workspace, ignore_errors=True)


def _lock(folder: Path, wait: bool) -> int | None:
    """Holds a folder until its process ends; None if another has it, or if nobody can."""
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # some network disks know no locks; there, leftovers stay
        _unlock(descriptor)
        return None
    return descriptor


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two paths in one step; False if system or disk cannot."""
    system = ctypes.CDLL(None)
    paths = os.fsencode(one), os.fsencode(other)
    swap = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
    if sys.platform == "darwin":
        return bool(system.renamex_np(*paths, swap) == 0)
    here = -100  # AT_FDCWD
    rename = getattr(system, "renameat2", None)
    return rename is not None and bool(rename(here, paths[0], here, paths[1], swap) == 0)


def free_target(path: str | Path, force: bool) -> Path:
    """The folder to write; with `force`, a model folder that is there may be replaced.

    Raises:
        ConvertError: it is there and may not be replaced, or is no possible path.
    """
    try:
        target = Path(path).expanduser().resolve()
        if target.parent.is_dir():
            remove_leftovers(target.parent)
        if not target.exists():
            return target
    except (OSError, RuntimeError, ValueError) as error:
        raise ConvertError(f"{str(path)!r} is no folder to be written: {error}") from None
    if not target.is_dir():
        raise ConvertError(f"{target} is a file; give another folder")
    if not force:
        raise ConvertError(f"{target} is there already; give another folder, or --force")
    _check_model_folder(target)
    return target


def spare(target: Path, *sources: Path) -> None:
    """Raises a ConvertError if replacing a folder would remove something that is read."""
    if not target.exists():
        return
    for source in sources:
        for read in (source, *source.iterdir()):
            if read.resolve().is_relative_to(target):
                raise ConvertError(f"{target} holds {read}, which is read; give another folder")


def _check_model_folder(target: Path) -> None:
    """Raises a ConvertError unless everything inside belongs to a model of this family."""
    found = sorted(target.iterdir())
    why = "has no config.json"
    for path in found:
        if path.is_dir() or not any(fnmatchcase(path.name, known) for known in MODEL_FOLDER):
            why = f"holds {path.name}"
            break
    else:
        if not found:
            return
        if (target / "config.json").exists():
            why = f"holds a model of type {read_json(target / 'config.json').get('model_type')}"
            if any(kind in why for kind in MODEL_TYPES):
                return
    raise ConvertError(f"{target} {why}; --force replaces only folders of LFM2-VL models")


def name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    """Gives `shard-0.safetensors` and so on their final names, and writes the index.

    Args:
        shards: names of the tensors in each.
        total: bytes of all tensors.
    """
    files = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [SINGLE]
    for number, file in enumerate(files):
        (folder / f"shard-{number}.safetensors").rename(folder / file)
    if len(shards) > 1:
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        write_json(folder / INDEX, index)
