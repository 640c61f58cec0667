"""What MLX holds on to while models generate: one pair of limits for the whole process.

Whoever generates first sets them, and the last one restores them. Answers that interleave, in one
thread or in several, so never restore what another one has set.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..models.layers import backend

# bytes that wait to be used again: more than the passes of a large image leave, so that the next
# answer need not ask the system for memory, and small enough to be kept by a worker that is idle
CACHE_LIMIT = 256 << 20


class MemoryLimits:
    """Who generates, and the limits as they were before.

    Attributes:
        users: how many answers each model is giving, by its id.
        nbytes: of each of these models, on Metal.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()  # the garbage collector may end an answer at any place
        self.users: Counter[int] = Counter()
        self.nbytes: dict[int, int] = {}
        self.cache_before: int | None = None
        self.wired_before: int | None = None

    def begin(self, model: nn.Module) -> None:
        """Counts an answer, and sets the limits if it is its model's only one."""
        with self.lock:
            self.users[id(model)] += 1
            if self.users[id(model)] > 1:
                return
            try:
                self._limit_cache()
                if backend() == "metal":
                    self._wire(model)
            except BaseException:
                self.end(model)
                raise

    def end(self, model: nn.Module) -> None:
        """Counts down; the last answer of all restores the limits."""
        with self.lock:
            self.users[id(model)] -= 1
            if self.users[id(model)] == 0:
                self.nbytes.pop(id(model), None)
            if self.users.total() > 0:
                return
            try:
                mx.synchronize()  # what is being computed with stays wired until then
            finally:
                self._restore()

    def _limit_cache(self) -> None:
        if self.cache_before is None:
            self.cache_before = mx.set_cache_limit(CACHE_LIMIT)
            if self.cache_before < CACHE_LIMIT:
                mx.set_cache_limit(self.cache_before)

    def _wire(self, model: nn.Module) -> None:
        """A limit for all models: their size and a quarter, at most what the machine advises."""
        arrays = tree_flatten(model.parameters())
        self.nbytes[id(model)] = sum(array.nbytes for _, array in arrays)
        nbytes = sum(self.nbytes.values())
        most = int(mx.device_info()["max_recommended_working_set_size"])
        before = mx.set_wired_limit(min(most, nbytes + nbytes // 4))
        if self.wired_before is None:
            self.wired_before = before

    def _restore(self) -> None:
        self.users.clear()
        wired, self.wired_before = self.wired_before, None
        cache, self.cache_before = self.cache_before, None
        if cache is not None:
            mx.set_cache_limit(cache)
        if wired is not None:
            mx.set_wired_limit(wired)


LIMITS = MemoryLimits()


@contextmanager
def memory_limits(model: nn.Module) -> Iterator[None]:
    """Keeps a model's memory wired on Metal, and little beside it, while it generates."""
    LIMITS.begin(model)
    try:
        yield
    finally:
        LIMITS.end(model)
