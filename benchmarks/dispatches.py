"""How many kernels a GPU is handed for each decoded token: counted here, on any machine.

    python benchmarks/dispatches.py
    OTHER_ENV/bin/python benchmarks/dispatches.py --rival mlx-vlm

The graph of one greedy decode step is exported and its nodes are counted, as Metal would run them:
views cost nothing, a join costs one copy for each part. A CPU takes `mx.fast` functions apart, so
each of them is drawn as one node here. The model has random weights of 4 bits, the layers of
LFM2-VL-450M, and is narrow: widths do not change the count. mlx-lm takes the same weights.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

OURS, MLX_LM, MLX_VLM = "mlx_lfm2vl", "mlx-lm", "mlx-vlm"
PROMPT = [5, 6, 7, 8]
# what only looks at memory in another way, or was there before
VIEWS = {
    "AsStrided", "Broadcast", "BroadcastAxes", "Contiguous", "Copy", "ExpandDims", "Flatten",
    "Reshape", "Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
}  # fmt: skip
# a dynamic slice computes its place first
MORE = {"DynamicSlice": 2, "DynamicSliceUpdate": 2}
FAST = "Depends"  # drawn for any function of `mx.fast`
FAST_FUNCTIONS = ("rms_norm", "layer_norm", "rope", "scaled_dot_product_attention")
ATTENTION_LAYERS = (2, 5, 8, 10, 12, 14)
LAYERS, FEED_FORWARD = 16, 512
CONFIG: dict[str, Any] = {  # as mlx-lm, mlx-vlm and this package spell it
    "vocab_size": 512,
    "hidden_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "norm_eps": 1e-5,
    "conv_bias": False,
    "conv_L_cache": 3,
}
THEIR_CONFIG: dict[str, Any] = {
    "model_type": "lfm2",
    "max_position_embeddings": 4096,
    "block_dim": 256,
    "block_ff_dim": FEED_FORWARD,
    "block_multiple_of": 1,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    "full_attn_idxs": list(ATTENTION_LAYERS),
}


def dispatches(step: Callable[[], Any]) -> Counter[str]:
    """Kernels of the graph that a function builds, by primitive."""
    with kept_whole():
        outputs = step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.dot"
        mx.export_to_dot(str(path), outputs)
        graph = path.read_text()
    found: Counter[str] = Counter()
    for node, name in re.findall(r'(\d+) \[label ="(\w+)", shape=rectangle\]', graph):
        if name == "Concatenate":
            found[name] += len(re.findall(rf"-> {node}\n", graph))
        elif name not in VIEWS:
            found["mx.fast" if name == FAST else name] += MORE.get(name, 1)
    return found


@contextmanager
def kept_whole() -> Iterator[None]:
    """Functions of `mx.fast` and `mx.dequantize` make one node each."""
    fast = dict.fromkeys(FAST_FUNCTIONS, one_node)
    with patch.multiple(mx.fast, **fast), patch.object(mx, "dequantize", dequantized_node):
        yield


@contextmanager
def as_on(backend: str) -> Iterator[None]:
    """This package chooses as for "metal" or "cuda"."""
    device, is_metal = mx.Device(mx.gpu), backend == "metal"
    with (
        patch.object(mx, "default_device", lambda: device),
        patch.object(mx.metal, "is_available", lambda: is_metal),
    ):
        yield


def one_node(x: mx.array, *others: Any, **settings: Any) -> mx.array:
    """One node of the graph that needs all arrays among the arguments; as `x` in shape."""
    arrays = [a for a in (*others, *settings.values()) if isinstance(a, mx.array)]
    return mx.depends([x], arrays)[0]


def dequantized_node(w: mx.array, scales: mx.array, *others: Any, **settings: Any) -> mx.array:
    """As `one_node`, with the shape of weights of 4 bits."""
    zero = mx.array(0, scales.dtype)
    values = mx.broadcast_to(zero, (*w.shape[:-1], 8 * w.shape[-1]))
    return one_node(values, w, scales, *others, **settings)


def our_model(layers: int = LAYERS, attention_layers: Sequence[int] = ATTENTION_LAYERS) -> Any:
    """The language model, with random weights of 4 bits."""
    from mlx_lfm2vl.models.config import Lfm2Config
    from mlx_lfm2vl.models.lfm2 import Lfm2ForCausalLM

    types = tuple("full_attention" if i in attention_layers else "conv" for i in range(layers))
    config = Lfm2Config(feed_forward_size=FEED_FORWARD, layer_types=types, **CONFIG)
    return quantized(Lfm2ForCausalLM(config))


def quantized(model: nn.Module) -> Any:
    """The model in bfloat16 and 4 bits."""
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, 64, 4)
    model.eval()
    mx.eval(model.parameters())
    return model


def our_step(model: Any, sets: int = 1) -> Any:
    """The next token and the new state, not yet computed; long answers have two sets of buffers."""
    from mlx_lfm2vl.generation.decoding import decode_step

    cache = model.make_cache()
    mx.eval(model(mx.array([PROMPT]), cache), [entry.arrays for entry in cache])
    step, weights = decode_step(model)
    states = [entry.padded(entry.state, 256) for entry in cache]
    place = len(PROMPT)
    table = [[place], [place], [place]]
    if sets == 2:
        table.append([place - 1])
        states = [
            [*arrays, *(array[:, :, place - 1 : place] for array in arrays if entry.has_slots)]
            for entry, arrays in zip(cache, states, strict=True)
        ]
    mx.eval(states)
    logits, states = step(weights, mx.array([9]), table, cache, states, None)
    return mx.argmax(logits, axis=-1), states


def their_step(model: Any) -> Any:
    """The next token and its log-probabilities, which mlx-lm and mlx-vlm compute in each step."""
    cache = model.make_cache()

    def logits(ids: list[int]) -> mx.array:
        out = model(mx.array([ids]), cache=cache)
        return getattr(out, "logits", out)[:, -1, :]

    mx.eval(logits(PROMPT), [entry.state for entry in cache])
    last = logits([9])
    logprobs = last - mx.logsumexp(last, axis=-1, keepdims=True)
    states = [array for _, array in tree_flatten([entry.state for entry in cache])]
    states = [array for array in states if isinstance(array, mx.array)]
    return mx.argmax(logprobs, axis=-1), logprobs, states


def mlx_lm_model() -> Any:
    from mlx_lm.models.lfm2 import Model, ModelArgs

    model = quantized(Model(ModelArgs(**CONFIG, **THEIR_CONFIG)))
    model.load_weights(tree_flatten(our_model().parameters()))
    return model


def mlx_vlm_model() -> Any:
    from mlx_vlm.models.lfm2.config import ModelConfig
    from mlx_vlm.models.lfm2.language import LanguageModel

    return quantized(LanguageModel(ModelConfig.from_dict({**CONFIG, **THEIR_CONFIG})))


def count(rival: str, sets: int = 1) -> Counter[str]:
    """Kernels of one decode step of a program, ours with one or two sets of buffers."""
    if rival == OURS:
        model = our_model()
        with as_on("metal"):
            return dispatches(lambda: our_step(model, sets))
    model = mlx_lm_model() if rival == MLX_LM else mlx_vlm_model()
    return dispatches(lambda: their_step(model))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rival", choices=(OURS, MLX_LM, MLX_VLM), action="append")
    for rival in parser.parse_args().rival or (OURS, MLX_LM):
        found = count(rival)
        parts = ", ".join(f"{name} {number}" for name, number in found.most_common())
        print(f"{rival}: {found.total()} ({parts})")
        if rival == OURS:
            print(f"{rival}, two sets of buffers: {count(rival, sets=2).total()}")


if __name__ == "__main__":
    main()
