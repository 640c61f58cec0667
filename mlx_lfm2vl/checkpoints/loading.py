"""`load` joins the parts: folder, configuration, weights, tokenizer and processor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from ..errors import ConfigError
from ..models.config import Lfm2VlConfig, load_config
from ..models.lfm2_vl import Lfm2VlForConditionalGeneration
from ..prompts.image_processor import Lfm2VlImageProcessor
from ..prompts.processor import Lfm2VlProcessor
from ..prompts.tokenizer import Lfm2Tokenizer
from .adapters import apply_adapters, base_model
from .hub import resolve_model
from .settings import load_generation_config, load_image_processor_config
from .weights import open_checkpoint

DTYPES: Mapping[str, mx.Dtype] = {
    "float32": mx.float32,
    "float16": mx.float16,
    "bfloat16": mx.bfloat16,
}


def load(
    model: str | Path | None,
    dtype: str | None = None,
    revision: str | None = None,
    lazy: bool = True,
    adapter_path: str | Path | None = None,
) -> tuple[Lfm2VlForConditionalGeneration, Lfm2VlProcessor]:
    """Loads a model and its processor.

    Args:
        model: a folder, a repository of the Hugging Face Hub such as
            `LiquidAI/LFM2.5-VL-450M`, or `demo`, a tiny model inside this package that knows
            drawn shapes and printed words; None for the model that the adapters name.
        dtype: `float32`, `float16` or `bfloat16`; by default the checkpoint's own on a GPU, and
            float32 on a CPU, where MLX has no fast product of smaller types.
        revision: branch, tag or commit of a repository.
        lazy: read each weight when it is first used, so that this returns at once and a text-only
            question never reads the vision tower; False reads everything now.
        adapter_path: a folder of adapters, from `python -m mlx_lfm2vl.train` or mlx-lm.

    Returns:
        (model, processor)

    Raises:
        ModelNotFoundError: the folder, the repository or one of its files is not there.
        ConfigError: the configuration is unknown or contradicts itself or the tokenizer.
        WeightsError: weights are missing, unknown, misshapen or damaged.
        TrainError: the adapters do not fit the model.
    """
    folder = resolve_model(base_model(adapter_path) if model is None else model, revision)
    config = load_config(folder)
    image_config = load_image_processor_config(folder, config)
    generation_config = load_generation_config(folder, config)
    tokenizer = Lfm2Tokenizer.from_folder(folder)
    check_token_ids(folder, config, tokenizer)
    compute_type = choose_dtype(dtype, config.dtype)
    network, weights = open_checkpoint(folder, config, image_config)
    network.load_weights(list(cast_weights(weights, compute_type).items()), strict=True)
    if adapter_path is not None:
        apply_adapters(network, adapter_path)
    network.eval()
    if not lazy:
        mx.eval([array for _, array in tree_flatten(network.parameters())])
    processor = Lfm2VlProcessor(Lfm2VlImageProcessor(image_config), tokenizer, generation_config)
    return network, processor


def choose_dtype(requested: str | None, stored: str) -> mx.Dtype:
    """The type to compute in."""
    name = requested
    if name is None:
        name = "float32" if mx.default_device() == mx.Device(mx.cpu) else stored
    if name not in DTYPES:
        raise ConfigError(f"dtype is {name!r}; it must be one of {', '.join(DTYPES)}")
    return DTYPES[name]


def cast_weights(weights: Mapping[str, mx.array], dtype: mx.Dtype) -> dict[str, mx.array]:
    """Floating-point weights in one type, lazily; packed integers and their byte scales stay."""
    # on the kind of stream that loaded them, or another thread could not evaluate the cast
    with mx.stream(mx.new_thread_unsafe_stream(mx.cpu)):
        return {
            name: tensor.astype(dtype) if mx.issubdtype(tensor.dtype, mx.floating) else tensor
            for name, tensor in weights.items()
        }


def check_token_ids(folder: Path, config: Lfm2VlConfig, tokenizer: Lfm2Tokenizer) -> None:
    """Raises a ConfigError if config and tokenizer disagree about tokens."""
    if tokenizer.image_token_id != config.image_token_id:
        raise ConfigError(
            f"{folder}: config.json says image_token_id {config.image_token_id}, the tokenizer has "
            f"{tokenizer.image_token} at {tokenizer.image_token_id}"
        )
    rows = config.text_config.vocab_size
    last = max(tokenizer.tokenizer.get_vocab_size() - 1, *tokenizer.special_tokens.values())
    if last >= rows:
        raise ConfigError(
            f"{folder}: tokenizer.json has ids up to {last}, but config.json a vocab_size of {rows}"
        )
