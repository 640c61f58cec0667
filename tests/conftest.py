"""What the tests share: folders of small checkpoints that the official implementation ran."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from .checkpoints.weights import write_missing
from .helpers import FIXTURES, random_language_model


def pytest_configure(config):
    # what commands remember of speeds is the user's own
    cache = tempfile.TemporaryDirectory()
    os.environ["XDG_CACHE_HOME"] = cache.name
    config.add_cleanup(cache.cleanup)
    # a suite started in the background ignores Ctrl-C, and so would the programs that it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(config, "workerinput"):  # before any worker starts
        write_missing()


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


@pytest.fixture
def display(monkeypatch):
    """A screen for windows: a virtual one, or the machine's own where there is no Xvfb."""
    pytest.importorskip("tkinter", reason="this Python has no tkinter")
    if shutil.which("Xvfb") is None:
        if sys.platform != "darwin" and "DISPLAY" not in os.environ:
            pytest.skip("needs a display, or Xvfb (Debian: xvfb)")
        yield
        return
    reader, writer = os.pipe()
    # Xvfb chooses a free number and writes it once it is ready
    command = ["Xvfb", "-displayfd", str(writer), "-screen", "0", "1100x700x24"]
    server = subprocess.Popen(command, pass_fds=[writer], stderr=subprocess.DEVNULL)
    os.close(writer)
    try:
        with open(reader) as number:
            monkeypatch.setenv("DISPLAY", ":" + number.readline().strip())
        yield
    finally:
        server.terminate()
        server.wait()


@dataclass
class Work:
    """What went through a model.

    Attributes:
        views: of each call of the vision encoder.
        passes: positions of each pass through the language model.
        projected: positions of each projection to the vocabulary.
        steps: rows of each decode step.
        traces: how often a decode step was traced, which computes nothing.
    """

    views: list[int] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    projected: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    traces: int = 0
    in_step: bool = False

    @property
    def positions(self) -> int:
        return sum(self.passes)

    def clear(self) -> None:
        self.__init__()


@pytest.fixture
def work(monkeypatch) -> Work:
    """Counts what all models do meanwhile."""
    from mlx_lfm2vl.generation.decoding import DecodeStep
    from mlx_lfm2vl.models.lfm2 import Lfm2ForCausalLM, Lfm2Model
    from mlx_lfm2vl.models.siglip2 import Siglip2VisionModel

    work = Work()
    see, forward = Siglip2VisionModel.__call__, Lfm2Model.__call__
    project, step = Lfm2ForCausalLM.logits, DecodeStep.__call__

    def counting_see(self, pixel_values, spatial_shapes, *args):
        work.views.append(len(spatial_shapes))
        return see(self, pixel_values, spatial_shapes, *args)

    def counting_forward(self, embeddings, *args, **kwargs):
        if work.in_step:
            work.traces += 1
        else:
            work.passes.append(embeddings.shape[0] * embeddings.shape[1])
        return forward(self, embeddings, *args, **kwargs)

    def counting_project(self, hidden):
        if not work.in_step:
            work.projected.append(hidden.size // hidden.shape[-1])
        return project(self, hidden)

    def counting_step(self, weights, token_ids, *args):
        # a replayed graph calls nothing in Python
        rows = token_ids.shape[0]
        work.passes.append(rows)
        work.projected.append(rows)
        work.steps.append(rows)
        work.in_step = True
        try:
            return step(self, weights, token_ids, *args)
        finally:
            work.in_step = False

    monkeypatch.setattr(Siglip2VisionModel, "__call__", counting_see)
    monkeypatch.setattr(Lfm2Model, "__call__", counting_forward)
    monkeypatch.setattr(Lfm2ForCausalLM, "logits", counting_project)
    monkeypatch.setattr(DecodeStep, "__call__", counting_step)
    return work


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


@pytest.fixture(scope="session")
def wide():
    return random_language_model("conv", "full_attention", "full_attention")


@pytest.fixture(scope="module")
def small_matrix():
    """The machine's bandwidth is not what is tested."""
    from mlx_lfm2vl.measuring.machine import measure_bandwidth

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "mlx_lfm2vl.measuring.stages.measure_bandwidth",
            lambda dtype, rounds: measure_bandwidth(dtype, rounds, 1 << 18),
        )
        yield
