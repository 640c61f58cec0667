"""Model folders that are complete or not there at all."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ConvertError
from .weights import (
    INDEX,
)

MAX_SHARD_BYTES = 5 << 30
COPIED_FILES = ("*.json", "*.jinja", "*.txt", "tokenizer.model")
TRAINING_STATE = "training_state.json"  # beside the weights of a checkpoint that `train` wrote
NOT_COPIED = ("config.json", "generation_config.json", INDEX, TRAINING_STATE)


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    if len(shards) == 1:
        (folder / "shard-0.safetensors").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"shard-{number}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def complete_folder(target: Path, nbytes: int) -> Iterator[Path]:
    """A folder beside the target that becomes it when everything went well, or vanishes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if nbytes > free:
        raise ConvertError(
            f"{target} needs {nbytes / 1e6:.1f} MB, but only {free / 1e6:.1f} MB are free"
        )
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder
        folder.chmod(0o755)
        if target.exists():
            old = folder.with_name(folder.name + ".old")
            target.rename(old)
            folder.rename(target)
            shutil.rmtree(old)
        else:
            folder.rename(target)
    except OSError as error:
        raise ConvertError(f"{target} could not be written: {error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
