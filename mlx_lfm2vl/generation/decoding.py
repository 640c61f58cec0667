"""One token of each row through the language model: traced once, then replayed.

To build the graph of a step in Python can take longer than a GPU takes to compute it. Here
`mx.compile` keeps the graph. What changes from token to token goes in as arrays of fixed shape:
keys and values as whole buffers, with a mask over the slots that are still empty. A step is traced
again only for another number of rows or when a buffer grows, by a block. Weights are inputs, too,
so that nothing can go stale.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..models.cache import Cache, Step
from ..models.layers import JointProjections, backend
from ..models.lfm2 import Lfm2ForCausalLM

CONSTANTS = (bool, int, float, str)
Modules = Sequence[tuple[str, nn.Module]]  # as `named_modules` gives them
Place = tuple[nn.Module, str]  # of an array: the module that has it, and its name there
States = list[list[mx.array]]  # arrays of each layer's cache, with one row per answer


class Traces(threading.local):
    """Compiled functions, each for the thread that made it.

    MLX (0.32.4) keeps traces in each thread that calls a function, and forgets those of a single
    one when the function is gone; another would take them for those of a later function that
    happens to lie at the same address.
    """

    def __init__(self) -> None:
        self.compiled: dict[Any, Callable[..., tuple[mx.array, States]]] = {}


class DecodeStep:
    """The traced step of one model, kept as long as its structure stays."""

    def __init__(self, language_model: Lfm2ForCausalLM, structure: list[Any]) -> None:
        self.language_model = weakref.ref(language_model)  # which keeps this step
        self.structure = structure
        self.traces = Traces()

    def __call__(
        self,
        weights: list[mx.array],
        token_ids: mx.array,
        table: list[list[int]],
        cache: Sequence[Cache],
        states: States,
        kind: Any,
    ) -> tuple[mx.array, States]:
        """Tokens (rows,) -> logits (rows, vocab) of the next ones, and the new states.

        Args:
            weights: of the model as it is now.
            table: (3 or 4, rows), see `Step`.
            cache: of any of the rows; says of which kinds the states are.
            kind: the same for caches whose kinds are the same.
        """
        key, compiled = (kind, backend()), self.traces.compiled
        if key not in compiled:
            empty = [entry.restore(entry.meta, ()) for entry in cache]
            compiled[key] = mx.compile(partial(self._forward, [e.traced for e in empty]))
        return compiled[key](weights, token_ids, mx.array(table), states)

    def _forward(
        self,
        kinds: Sequence[Callable[..., Any]],
        weights: list[mx.array],
        token_ids: mx.array,
        table: mx.array,
        states: States,
    ) -> tuple[mx.array, States]:
        model, step = self.language_model(), Step(*table)
        assert model is not None
        places = weight_places(model.named_modules())
        own = [module[name] for module, name in places]
        set_weights(places, weights)
        try:
            cache = [kind(arrays, step) for kind, arrays in zip(kinds, states, strict=True)]
            return self.untraced(token_ids, cache), [entry.state for entry in cache]
        finally:
            set_weights(places, own)

    def untraced(self, token_ids: mx.array, cache: Sequence[Any]) -> mx.array:
        """Tokens (rows,) -> logits (rows, vocab); takes the caches along."""
        model = self.language_model()
        assert model is not None
        hidden = model.model(model.embed(token_ids[:, None]), cache).last_hidden_state
        return model.logits(hidden[:, -1])


def decode_step(language_model: Lfm2ForCausalLM) -> tuple[DecodeStep, list[mx.array]]:
    """The step of a model, traced before or not yet, and the model's present weights."""
    modules = language_model.named_modules()
    for _, module in modules:
        # a CPU gains nothing by fewer products; OpenBLAS takes 5 to 10 % longer for a wide one
        if isinstance(module, JointProjections) and backend() != "cpu":
            module.join()
    places = weight_places(modules)
    now, kept = structure(modules, places), language_model.decode_step
    if kept is None or kept.structure != now:
        language_model.decode_step = kept = DecodeStep(language_model, now)
    return kept, [module[name] for module, name in places]


def structure(modules: Modules, places: Sequence[Place]) -> list[Any]:
    """All that a trace takes for constant: modules, their kinds, their numbers, what is joint."""
    return [
        (path, type(module), [(k, v) for k, v in vars(module).items() if isinstance(v, CONSTANTS)])
        for path, module in modules
    ] + [name for _, name in places]


def weight_places(modules: Modules) -> list[Place]:
    """Where the weights that a step reads stand; joint ones in place of their parts."""
    joint, parts = list[nn.Module](), set[int]()
    for _, module in modules:
        if isinstance(module, JointProjections) and module.joint is not None:
            joint.append(module.joint.linear)
            parts |= {id(module[name]) for name in module.TOGETHER}
    return [
        (module, name)
        for module in [*(module for _, module in modules), *joint]
        if id(module) not in parts
        for name, value in module.items()
        if isinstance(value, mx.array)
    ]


def set_weights(places: Sequence[Place], weights: Sequence[mx.array]) -> None:
    """Puts weights where they stand."""
    for (module, name), array in zip(places, weights, strict=True):
        module[name] = array
