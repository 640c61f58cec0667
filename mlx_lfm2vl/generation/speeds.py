"""How long work takes on this machine, learnt from what runs took and remembered in a file."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..checkpoints.writing import write_json
from ..errors import ConfigError, ModelNotFoundError, OutputError
from ..files import read_json
from .engine import AnswerRow
from .usage import Usage

VERSION = 1
DECAY = 0.9  # a run counts so much of the next one
NOTEWORTHY = 0.003  # squared relative errors, summed, that another kind of cost must take away
RATELESS = 0.05  # the same for costs without the first kind: sizes that are alike cannot tell
MOST_MODELS = 200  # in the file
PATIENCE = 5.0  # seconds to wait for another process that writes
MEASURED = 16  # of so many answers, one is learnt from; of the first ones, each of half as many
# stages and their work: patches and 1; positions and 1; tokens, tokens times positions, and 1.
# Ones are what costs once. Answers that grow together are a stage of their own
STAGES = {"vision": 2, "prefill": 2, "decode": 3, "decode together": 3}
FIRST = (
    "first "  # before the stages of a process's first question, which reads weights and compiles
)
Work = Sequence[float]


class Fit:
    """Seconds as a sum of kinds of work, each at a cost of its own, learnt from runs.

    The costs are those with the least squares of relative errors, none of them negative, and no
    more of them than the runs tell apart.
    """

    def __init__(self, size: int) -> None:
        self.runs = 0.0
        self.moment = [0.0] * size
        self.gram = [[0.0] * size for _ in range(size)]
        self.costs: list[float] | None = None  # of each kind, once they were asked for

    def add(self, work: Work, seconds: float) -> None:
        """Learns from a run."""
        self.costs = None
        shares = [amount / seconds for amount in work]
        self.runs = DECAY * self.runs + 1
        self.moment = [DECAY * old + new for old, new in zip(self.moment, shares, strict=True)]
        self.gram = [
            [DECAY * old + one * other for old, other in zip(row, shares, strict=True)]
            for row, one in zip(self.gram, shares, strict=True)
        ]

    def seconds(self, work: Work) -> float:
        """What so much work takes."""
        if self.costs is None:
            self.costs = self._solve()
        return sum(amount * cost for amount, cost in zip(work, self.costs, strict=True))

    def _solve(self) -> list[float]:
        """Seconds for one of each kind."""
        import numpy as np

        gram, moment = np.array(self.gram), np.array(self.moment)
        size, least = len(moment), math.inf
        best = [0.0] * size
        kinds = [list(c) for n in range(1, size + 1) for c in combinations(range(size), n)]
        for chosen in kinds:
            scale = np.sqrt(np.diag(gram)[chosen])
            if not (scale > 0).all():
                continue
            part = gram[np.ix_(chosen, chosen)] / np.outer(scale, scale)
            found = np.linalg.lstsq(part, moment[chosen] / scale, rcond=1e-9)[0] / scale
            error = self.runs - float(moment[chosen] @ found) + NOTEWORTHY * len(chosen)
            error += 0.0 if 0 in chosen else RATELESS
            if (found >= 0).all() and error < least - 1e-9:
                least, best = error, [0.0] * size
                for kind, cost in zip(chosen, found, strict=True):
                    best[kind] = float(cost)
        return best

    def to_list(self) -> list[float]:
        """All numbers, for a file."""
        return [self.runs, *self.moment, *(number for row in self.gram for number in row)]

    @classmethod
    def of(cls, numbers: Any, size: int) -> Fit:
        """Reads `to_list`; a ValueError if these are no such numbers."""
        good = isinstance(numbers, list) and len(numbers) == 1 + size + size * size
        if not good or not all(type(n) in (int, float) and 0 <= n < 1e300 for n in numbers):
            raise ValueError(f"{numbers!s:.100} are not the numbers of a stage")
        fit = cls(size)
        fit.runs, fit.moment = numbers[0], numbers[1 : 1 + size]
        rows = range(1 + size, len(numbers), size)
        fit.gram = [numbers[start : start + size] for start in rows]
        return fit


@dataclass
class Speeds:
    """How fast a model is on this machine.

    Attributes:
        fits: by name of the stage; the first question of a process has its own.
        problem: why the file could not be read, if it is broken.
    """

    fits: dict[str, Fit] = field(default_factory=dict)
    problem: str | None = None

    def seconds(self, stage: str, work: Work, first: bool = False) -> float | None:
        """What a stage takes; None if no run has shown it.

        Args:
            first: whether the process has not answered anything before. What is known of the one
                stands for the other as long as that is unknown.
        """
        if work[0] == 0:
            return 0.0
        names = (FIRST + stage, stage) if first else (stage, FIRST + stage)
        found = next((self.fits[name] for name in names if name in self.fits), None)
        return None if found is None else found.seconds(work)

    def add(self, stage: str, work: Work, seconds: float | None, first: bool = False) -> None:
        """Learns what a stage took."""
        if seconds is None or seconds <= 0 or work[0] <= 0:
            return
        name = FIRST + stage if first else stage
        self.fits.setdefault(name, Fit(STAGES[stage])).add(work, seconds)

    def learn(self, usage: Usage, first: Collection[str] = ()) -> None:
        """Learns from what an answer cost; `first`: stages that the process had not been in."""
        vision = usage.vision_time
        if vision is not None or usage.encoded_patches == 0:
            vision = vision if vision is not None else 0.0
            self.add("vision", vision_work(usage.encoded_patches), vision, "vision" in first)
            prefill = usage.prompt_time - vision
            work = prefill_work(usage.processed_tokens)
            self.add("prefill", work, prefill, "prefill" in first)
        if not usage.constrained:
            stage = "decode" if usage.rows == 1 else "decode together"
            work = decode_work(usage.generation_tokens, usage.prompt_tokens)
            self.add(stage, work, usage.answer_time, stage in first)


def vision_work(patches: int) -> Work:
    return patches, 1


def prefill_work(positions: int) -> Work:
    return positions, 1


def decode_work(tokens: int, prompt_tokens: int) -> Work:
    """Of an answer of so many tokens, the first of which comes with the prompt."""
    steps = max(0, tokens - 1)
    return steps, steps * (prompt_tokens + tokens / 2), 1


def speeds_path() -> Path:
    """Where speeds are remembered, by the convention for caches."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(base)) / "mlx-lfm2vl" / "speed.json"


def read_speeds(model: nn.Module, path: Path | None = None) -> Speeds:
    """What is remembered of a model on this machine, by this version of MLX; never raises.

    Args:
        path: the file, by default `speeds_path()`.
    """
    try:
        return _read(path if path is not None else speeds_path()).get(_key(model), Speeds())
    except ConfigError as error:
        return Speeds(problem=str(error))


def remember(
    model: nn.Module, usages: Sequence[Usage], *, first: bool = False, path: Path | None = None
) -> str | None:
    """Learns from answers of a model and writes it down; returns what was wrong with the file.

    Args:
        usages: in their order.
        first: whether the process had answered nothing before them.
        path: the file, by default `speeds_path()`; a broken one is begun anew.

    Raises:
        OutputError: it cannot be written.
    """
    costs = [(usage, STAGES if first and n == 0 else ()) for n, usage in enumerate(usages)]
    return _remember(path if path is not None else speeds_path(), _key(model), costs)


Costs = Sequence[tuple[Usage, Collection[str]]]  # and the stages that came first in the process


class Learner:
    """Remembers what a model's answers cost, as they end; as `model.learner`, engines tell it.

    Of the first answers it learns from each, then from some: to measure costs a little speed.
    Without a place to remember it learns nothing.

    Args:
        tell: called with a line if the file of speeds is broken.
        path: the file, by default `speeds_path()`.
    """

    def __init__(
        self, model: nn.Module, tell: Callable[[str], None], path: Path | None = None
    ) -> None:
        self.key, self.path = _key(model), path if path is not None else speeds_path()
        self.tell = tell
        self.asked = 0
        self.new = set(STAGES)  # that the process has not been in
        self.first: WeakKeyDictionary[AnswerRow, set[str]] = WeakKeyDictionary()  # of these rows

    def begin(self, row: AnswerRow) -> None:
        """Notes a row, and has its vision tower measured if it is one to learn from."""
        stages = {"prefill"}
        if row.prompt is not None and row.prompt.images:
            stages.add("vision")
        if row.max_tokens > 0:
            stages |= {"decode", "decode together"}
        if self.asked < MEASURED // 2 or self.asked % MEASURED == 0:
            self.first[row], row.measure_vision = stages & self.new, True
        self.new -= stages
        self.asked += 1

    def end(self, row: AnswerRow) -> None:
        """Learns from a row that has been answered."""
        if (first := self.first.pop(row, None)) is not None:
            self.learn([(Usage.of(row), first)])

    def learn(self, costs: Costs) -> None:
        """Learns from what was measured."""
        try:
            problem = _remember(self.path, self.key, costs)
        except OutputError:
            return
        if problem is not None:
            self.tell(problem)


def _remember(path: Path, key: str, costs: Costs) -> str | None:
    from filelock import FileLock, Timeout

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(path.name + ".lock"), timeout=PATIENCE):
            return _update(path, key, costs)
    except NotImplementedError:  # a disk without locks: of two that write at once, one counts
        return _update(path, key, costs)
    except (OSError, Timeout) as error:
        raise OutputError(f"{path} cannot be written: {error}") from None


def _update(path: Path, key: str, costs: Costs) -> str | None:
    problem, known = None, dict[str, Speeds]()
    try:
        known = _read(path)
    except ConfigError as error:
        problem = f"{error}; it is begun anew"
    speeds = known.pop(key, Speeds())
    for usage, first in costs:
        speeds.learn(usage, first)
    known[key] = speeds  # as the last one; the first has not been used for the longest time
    kept = list(known.items())[-MOST_MODELS:]
    fits = {key: {name: fit.to_list() for name, fit in s.fits.items()} for key, s in kept}
    write_json(path, {"version": VERSION, "speeds": fits})
    return problem


def _read(path: Path) -> dict[str, Speeds]:
    """All that a file holds, nothing if there is none; a ConfigError if it is broken."""
    try:
        data = read_json(path)
    except ModelNotFoundError:
        return {}
    try:
        if data["version"] != VERSION:
            raise ValueError(f"its version is {data['version']!s:.20}, not {VERSION}")
        return {str(key): Speeds(_fits(fits)) for key, fits in data["speeds"].items()}
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is no file of speeds: {error}") from None


def _fits(found: Mapping[str, Any]) -> dict[str, Fit]:
    return {
        name: Fit.of(numbers, STAGES[name.removeprefix(FIRST)]) for name, numbers in found.items()
    }


def _key(model: nn.Module) -> str:
    """The model's shapes and types, what computes, and MLX; not the values of the weights."""
    content = hashlib.blake2b(digest_size=8)
    for name, array in tree_flatten(model.parameters()):
        content.update(f"{name} {array.shape} {array.dtype};".encode())
    device = mx.default_device()
    kind = "cpu" if device == mx.Device(mx.cpu) else "gpu"
    name = mx.device_info(device).get("device_name", "")
    return f"{content.hexdigest()} on {name or os.uname().machine} ({kind}), mlx {version('mlx')}"
