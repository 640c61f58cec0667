"""What a user can paste into an issue: machine, packages, models, comparisons, times."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import mlx.core as mx

from ..checkpoints.hub import DEMO_FOLDER
from ..errors import Lfm2VlError
from ..files import read_json
from ..models.config import MODEL_TYPES
from .health import NOTE, OK, WRONG, Finding, examine
from .machine import Chip, Machine, this_chip, this_machine
from .stages import BenchmarkResult, benchmark

PACKAGES = ("mlx", "mlx-lm", "numpy", "pillow", "tokenizers", "safetensors", "huggingface-hub")
OPTIONAL = {"pillow-heif": "HEIC pictures", "matplotlib": "plots of conversions"}
FLOOR = (0, 32, 1)  # of MLX; the reasons are in pyproject.toml
SPACE = 1.25  # memory that a model takes, per byte of its weights
PROBED = (20, None, 300)  # operations per command buffer; None is MLX's own number
PROBE_PATIENCE = 300  # seconds for each


@dataclass(frozen=True)
class CachedModel:
    """An LFM2-VL model in the download cache."""

    name: str
    folder: str
    nbytes: int


@dataclass(frozen=True)
class Diagnosis:
    """All that was found.

    Attributes:
        packages: versions; None of what is not installed.
        models: of the download cache.
        findings: in their order.
        stages: times of each stage; None if the model is not here.
        probe: tokens per second by operations per command buffer, if that was asked for.
    """

    machine: Machine
    chip: Chip
    packages: dict[str, str | None]
    models: list[CachedModel]
    findings: list[Finding]
    stages: BenchmarkResult | None
    probe: dict[str, float] | None

    @property
    def is_well(self) -> bool:
        return all(finding.state != WRONG for finding in self.findings)


def diagnose(
    model: str | None, *, probe: bool = False, progress: Callable[[str], None]
) -> Diagnosis:
    """Looks at everything.

    Args:
        model: a folder, or a repository of which a copy is here; its memory is judged and its
            stages are timed. None is the demo model.
        probe: decode in child processes with other sizes of command buffers, too.
        progress: called with the name of what comes next.

    Raises:
        OSError, RuntimeError: a child process failed.
    """
    machine, chip = this_machine(), this_chip()
    models = list(cached_models())
    folder = DEMO_FOLDER if model is None else find(model, models)
    findings = [
        *advise(chip, machine.device, platform.system()),
        check_floor(version("mlx")),
        *check_memory(model, folder, models, memory_for_models(machine)),
        *examine(chip, progress),
    ]
    stages = None
    if folder is not None and all(f.state != WRONG or f.name != "memory" for f in findings):
        progress("times of the stages")
        try:
            stages = benchmark(folder, rounds=1, max_tokens=32, rows=4)
            stages = replace(stages, model="demo" if model is None else model)
        except (Lfm2VlError, RuntimeError) as error:
            findings.append(Finding(WRONG, "stages", str(error)))
    packages = {name: installed(name) for name in (*PACKAGES, *OPTIONAL)}
    speeds = None
    if probe and folder is not None:
        speeds = probe_buffers(folder, progress)
    return Diagnosis(machine, chip, packages, models, findings, stages, speeds)


def advise(chip: Chip, device: str, system: str) -> list[Finding]:
    """What this kind of machine does in its own way."""
    found = []
    if system == "Darwin" and device == "cpu":
        cure = "use a native (arm64) Python, and leave the default device as it is"
        found.append(Finding(WRONG, "device", "MLX computes on the CPU of a Mac", cure))
    else:
        found.append(Finding(OK, "device", f"{chip.name}, {device}"))
    if chip.generation in (13, 14):
        text = "M1 and M2 have no bfloat16 units; float16 reads prompts about a third faster"
        found.append(Finding(NOTE, "type", text, "--dtype float16, if answers stay the same"))
    if chip.uses_tf32:
        text = "products of float32 keep 11 bits of each number (TF32)"
        found.append(Finding(NOTE, "float32", text, "MLX_ENABLE_TF32=0 if you need them all"))
    return found


def check_floor(mlx: str) -> Finding:
    """Whether MLX is new enough."""
    numbers = tuple(int(part) for part in mlx.split(".")[:3] if part.isdigit())
    if numbers < FLOOR:
        least = ".".join(map(str, FLOOR))
        return Finding(WRONG, "mlx", f"{mlx} is older than {least}", "pip install -U mlx")
    return Finding(OK, "mlx", mlx)


def check_memory(
    asked: str | None, folder: Path | None, models: list[CachedModel], memory: int
) -> list[Finding]:
    """Whether the model that was asked for fits; of others that are here, which do not."""
    found = []
    if asked is not None and folder is None:
        cure = f"python -m mlx_lfm2vl.generate --model {asked} downloads it"
        found.append(Finding(NOTE, "model", f"{asked} is not here, so nothing is timed", cure))
    elif asked is not None and folder is not None:
        found.append(_fits(WRONG, asked, weight_bytes(folder), memory))
    others = [_fits(NOTE, m.name, m.nbytes, memory) for m in models if m.name != asked]
    return found + [finding for finding in others if finding.state != OK]


def _fits(otherwise: str, name: str, nbytes: int, memory: int) -> Finding:
    text = f"{name}: {nbytes / 1e9:.1f} GB of weights, {memory / 1e9:.1f} GB for models"
    if nbytes * SPACE <= memory:
        return Finding(OK, "memory", text)
    cure = f"python -m mlx_lfm2vl.convert --hf-path {name} -q makes it a quarter of that"
    return Finding(otherwise, "memory", text, cure)


def memory_for_models(machine: Machine) -> int:
    """Bytes that models may take: on Metal what the system advises, elsewhere all memory."""
    info = mx.device_info(mx.default_device())
    return int(info.get("max_recommended_working_set_size", machine.memory_bytes))


def cached_models() -> Iterator[CachedModel]:
    """LFM2-VL models of the download cache, complete or not."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return
    for repository in sorted(repositories, key=lambda repository: repository.repo_id):
        for revision in repository.revisions:
            folder = Path(revision.snapshot_path)
            if is_model(folder):
                yield CachedModel(repository.repo_id, str(folder), weight_bytes(folder))


def is_model(folder: Path) -> bool:
    """Whether a folder says that it holds an LFM2-VL model."""
    try:
        return read_json(folder / "config.json").get("model_type") in MODEL_TYPES
    except Lfm2VlError:
        return False


def weight_bytes(folder: Path) -> int:
    """Size of a folder's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.is_file())


def find(model: str, models: list[CachedModel]) -> Path | None:
    """The folder of a model, if it is here."""
    folder = Path(os.path.expanduser(model))
    if folder.is_dir():
        return folder
    if model == "demo":
        return DEMO_FOLDER
    return next((Path(m.folder) for m in models if m.name == model), None)


def installed(package: str) -> str | None:
    """The version of a package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def probe_buffers(folder: Path, progress: Callable[[str], None]) -> dict[str, float]:
    """Tokens per second behind a large image, by operations per command buffer.

    MLX reads `MLX_MAX_OPS_PER_BUFFER` when a process starts, so each number has its own.

    Raises:
        RuntimeError: a process failed.
    """
    found = {}
    command = [sys.executable, "-m", "mlx_lfm2vl.benchmark", "--model", str(folder)]
    command += ["--size", "2000x1500", "--rounds", "1", "--batch-size", "1", "--json"]
    for operations in PROBED:
        name = "default" if operations is None else str(operations)
        progress(f"command buffers of {name}")
        given = {} if operations is None else {"MLX_MAX_OPS_PER_BUFFER": str(operations)}
        environment = {k: v for k, v in os.environ.items() if k != "MLX_MAX_OPS_PER_BUFFER"} | given
        run = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=PROBE_PATIENCE
        )
        if run.returncode != 0:
            raise RuntimeError(f"the probe failed: {run.stderr.strip()[-300:]}")
        found[name] = float(json.loads(run.stdout)["images"][0]["decode_tps"])
    return found
