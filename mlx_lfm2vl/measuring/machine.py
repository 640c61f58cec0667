"""The machine and its memory bandwidth."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from statistics import median
from typing import Any

import mlx.core as mx

from .._version import __version__

BANDWIDTH_BYTES = 512 << 20  # of the matrix: far more than any cache of a processor holds
BANDWIDTH_PRODUCTS = 8  # per evaluation, so that starting one costs nothing


@dataclass(frozen=True)
class Machine:
    """Where it was measured.

    Attributes:
        system: operating system and architecture.
        device: `cpu` or `gpu`, what MLX computes on.
        device_name: the chip's name.
        cores: of the processor, as far as this process may use them.
        memory_bytes: of the machine, 0 if the system does not tell.
        python, mlx, mlx_lfm2vl: versions.
    """

    system: str
    device: str
    device_name: str
    cores: int
    memory_bytes: int
    python: str
    mlx: str
    mlx_lfm2vl: str


@dataclass(frozen=True)
class Chip:
    """What computes, as MLX names it.

    Attributes:
        name: such as "Apple M3 Max".
        architecture: such as "applegpu_g15s"; empty on a CPU.
        tf32: whether its environment lets MLX use TF32.
    """

    name: str
    architecture: str = ""
    tf32: bool = True

    @property
    def generation(self) -> int:
        """Of Apple's GPUs: 13 in an M1, 14 in an M2, 17 in an M5; 0 elsewhere."""
        found = re.fullmatch(r"applegpu_g(\d+)\w*", self.architecture)
        return 0 if found is None else int(found[1])

    @property
    def uses_tf32(self) -> bool:
        """Whether products of float32 keep 11 bits of each number."""
        return self.generation >= 17 and self.tf32


def this_chip() -> Chip:
    """What the default device is."""
    info = mx.device_info(mx.default_device())
    architecture = str(info.get("architecture", "")) if mx.metal.is_available() else ""
    name = str(info.get("device_name", platform.processor()))
    return Chip(name, architecture, os.environ.get("MLX_ENABLE_TF32", "1") != "0")


def repeat(rounds: int, measure: Callable[[], float]) -> list[float]:
    """Several measurements, after one that does not count."""
    measure()
    return [measure() for _ in range(rounds)]


def seconds(action: Callable[[], Any]) -> float:
    """How long it takes, until the arrays that it returns are computed."""
    start = time.perf_counter()
    mx.eval(action())
    return time.perf_counter() - start


def measure_bandwidth(dtype: mx.Dtype, rounds: int, nbytes: int = BANDWIDTH_BYTES) -> float:
    """Bytes per second at which a matrix-vector product reads its matrix.

    That bounds decoding, where each token reads every weight once.

    Args:
        dtype: floating-point type of the matrix.
        rounds: measurements; the median counts.
        nbytes: about the size of the matrix.
    """
    side = max(1, int((nbytes / dtype.size) ** 0.5) // 256) * 256
    matrix = mx.full((side, side), 1 / side, dtype)
    vector = mx.ones((1, side), dtype)
    mx.eval(matrix, vector)

    def products() -> mx.array:
        out = vector
        for _ in range(BANDWIDTH_PRODUCTS):
            out = out @ matrix.T
        return out

    times = repeat(rounds, lambda: seconds(products))
    return BANDWIDTH_PRODUCTS * matrix.nbytes / median(times)


def this_machine() -> Machine:
    """What this process runs on."""
    device = mx.default_device()
    info = mx.device_info(device)
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    memory = 0
    if "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(
        platform.platform(),
        "cpu" if device == mx.Device(mx.cpu) else "gpu",
        str(info.get("device_name", platform.processor())),
        cores,
        memory,
        platform.python_version(),
        version("mlx"),
        __version__,
    )
