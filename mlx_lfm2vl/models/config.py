"""Configuration of the LFM2-VL family: every spelling and every merge of files is settled here.

Names and defaults follow `transformers` (`Lfm2VlConfig`, `Lfm2Config`, `Siglip2VisionConfig`,
`Lfm2VlImageProcessor`). `Lfm2VlConfig()` resembles LFM2-VL-1.6B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import REQUIRED, Json, Reader, read_json
from ..options import Bound

WIDTH = Bound(int, 1, 1 << 18)  # far beyond any published model; more is a mistake, not a size
COUNT = Bound(int, 1, 1000)  # layers and heads
VOCABULARY = Bound(int, 1, 1 << 24)
TOKEN_ID = Bound(int, 0, (1 << 24) - 1)
SMALL = Bound(float, 1e-30, 1)  # what is added before a division
MODEL_TYPES = ("lfm2_vl", "lfm2-vl")
VISION_MODEL_TYPES = ("siglip2_vision_model", "lfm2_vl")
TEXT_MODEL_TYPES = ("lfm2",)
QUANTIZATION_MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")


VISION_BOUNDS = {
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": COUNT,
    "num_attention_heads": COUNT,
    "num_channels": Bound(int, 3, 3),
    "patch_size": Bound(int, 1, 256),
    "num_patches": Bound(int, 1, 1 << 20),
    "layer_norm_eps": SMALL,
}


@dataclass(frozen=True)
class Siglip2VisionConfig:
    """The vision encoder, SigLIP2 NaFlex."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 26
    num_attention_heads: int = 16
    num_channels: int = 3
    patch_size: int = 16
    num_patches: int = 256  # entries of the learned position table, a square
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6


@dataclass(frozen=True)
class Lfm2Config:
    """The language model, LFM2: short convolutions and grouped-query attention."""

    vocab_size: int = 65536
    hidden_size: int = 2048
    feed_forward_size: int = 8192  # the real width, after every adjustment of the config file
    num_hidden_layers: int = 16
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    layer_types: tuple[str, ...] = tuple(
        "full_attention" if i in (2, 5, 8, 10, 12, 14) else "conv" for i in range(16)
    )
    norm_eps: float = 1e-5
    rope_theta: float = 1_000_000.0
    conv_L_cache: int = 3
    conv_bias: bool = False
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 128_000

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class Lfm2VlConfig:
    """A whole model. `num_hidden_layers` of the vision part counts the layers that are used."""

    text_config: Lfm2Config = field(default_factory=Lfm2Config)
    vision_config: Siglip2VisionConfig = field(default_factory=Siglip2VisionConfig)
    image_token_id: int = 396
    projector_hidden_act: str = "gelu"
    projector_hidden_size: int = 2560
    projector_bias: bool = True
    projector_use_layernorm: bool = True
    downsample_factor: int = 2
    dtype: str = "bfloat16"
    eos_token_ids: tuple[int, ...] = ()
    quantization: Mapping[str, Any] | None = None

    @classmethod
    def from_dict(cls, data: Json, file: str = "config.json") -> Lfm2VlConfig:
        """Reads a `config.json` in any of its published spellings.

        Raises:
            ConfigError: unknown `model_type`, contradicting values or impossible sizes.
        """
        top = Reader(data, file)
        top.require("model_type", MODEL_TYPES, default="lfm2_vl")
        text_reader = top.section("text_config", TEXT_MODEL_TYPES)
        default = cls()
        config = cls(
            text_config=_text_config(text_reader, top),
            vision_config=_vision_config(
                top.section("vision_config", VISION_MODEL_TYPES),
                top.get("vision_feature_layer", int, default=-1),
            ),
            image_token_id=top.get(
                "image_token_id", int, "image_token_index", default=default.image_token_id
            ),
            projector_hidden_act=top.get(
                "projector_hidden_act", str, default=default.projector_hidden_act
            ),
            projector_hidden_size=top.get(
                "projector_hidden_size",
                int,
                default=default.projector_hidden_size,
                bound=WIDTH,
            ),
            projector_bias=top.get("projector_bias", bool, default=default.projector_bias),
            projector_use_layernorm=top.get(
                "projector_use_layernorm", bool, default=default.projector_use_layernorm
            ),
            downsample_factor=top.get(
                "downsample_factor",
                int,
                default=default.downsample_factor,
                bound=Bound(int, 1, 16),
            ),
            dtype=top.get("dtype", str, "torch_dtype", default="")
            or text_reader.get("dtype", str, "torch_dtype", default=default.dtype),
            eos_token_ids=_token_ids(text_reader) or _token_ids(top),
            quantization=_quantization(top),
        )
        return config


def load_config(folder: Path) -> Lfm2VlConfig:
    """Reads `config.json` of a model folder."""
    return Lfm2VlConfig.from_dict(read_json(folder / "config.json"))


def _text_config(reader: Reader, top: Reader) -> Lfm2Config:
    default = Lfm2Config()
    hidden_size = reader.get("hidden_size", int, "block_dim", default=REQUIRED, bound=WIDTH)
    heads = reader.get("num_attention_heads", int, "num_heads", default=REQUIRED, bound=COUNT)
    kv_heads = reader.get("num_key_value_heads", int, default=heads, bound=COUNT)
    layers = reader.get("num_hidden_layers", int, default=REQUIRED, bound=COUNT)
    reader.check(
        hidden_size % heads == 0, "hidden_size", hidden_size, f"a multiple of {heads} heads"
    )
    reader.check(heads % kv_heads == 0, "num_key_value_heads", kv_heads, f"a divisor of {heads}")
    # both places are written, but the head belongs to the whole model: the top decides
    tied = top.get("tie_word_embeddings", bool, "tie_embedding", default=None)
    if tied is None:
        tied = reader.get(
            "tie_word_embeddings", bool, "tie_embedding", default=default.tie_word_embeddings
        )
    return Lfm2Config(
        vocab_size=reader.get("vocab_size", int, default=REQUIRED, bound=VOCABULARY),
        hidden_size=hidden_size,
        feed_forward_size=_feed_forward_size(reader),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        layer_types=_layer_types(reader, layers),
        norm_eps=reader.get(
            "norm_eps", float, "block_norm_eps", default=default.norm_eps, bound=SMALL
        ),
        rope_theta=_rope_theta(reader),
        conv_L_cache=reader.get(
            "conv_L_cache", int, default=default.conv_L_cache, bound=Bound(int, 2, 64)
        ),
        conv_bias=reader.get("conv_bias", bool, default=default.conv_bias),
        tie_word_embeddings=tied,
        max_position_embeddings=reader.get(
            "max_position_embeddings", int, default=default.max_position_embeddings
        ),
    )


def _feed_forward_size(reader: Reader) -> int:
    # block_ff_dim wins over intermediate_size if both stand, as in transformers
    size = reader.get("block_ff_dim", int, default=None, bound=WIDTH)
    if size is None:
        size = reader.get("intermediate_size", int, default=REQUIRED, bound=WIDTH)
    if reader.get("block_auto_adjust_ff_dim", bool, default=True):
        multiplier = reader.get(
            "block_ffn_dim_multiplier", float, default=1.0, bound=Bound(float, 1e-3, 1e3)
        )
        multiple = reader.get("block_multiple_of", int, default=256, bound=WIDTH)
        size = int(multiplier * int(2 * size / 3))
        size = -(-size // multiple) * multiple
    return size


def _layer_types(reader: Reader, layers: int) -> tuple[str, ...]:
    types = reader.get("layer_types", list, default=None)
    indices = reader.get("full_attn_idxs", list, default=None)
    if types is None and indices is None:
        raise reader.error("layer_types", None, f"a list of {layers} layer types")
    if indices is not None:
        reader.check(
            len(indices) > 0 and all(type(i) is int and 0 <= i < layers for i in indices),
            "full_attn_idxs",
            indices,
            f"layer numbers below {layers}",
        )
    if types is None:
        return tuple("full_attention" if i in indices else "conv" for i in range(layers))
    known = all(kind in ("full_attention", "conv") for kind in types) and len(types) == layers
    reader.check(known, "layer_types", types, f"{layers} times full_attention or conv")
    found = [i for i, kind in enumerate(types) if kind == "full_attention"]
    reader.check(len(found) > 0, "layer_types", types, "with one full_attention or more")
    if indices is not None and sorted(indices) != found:
        raise ConfigError(
            f"{reader.file}: layer_types has attention at {found}, full_attn_idxs says {indices}"
        )
    return tuple(types)


def _rope_theta(reader: Reader) -> float:
    rope = Reader(
        reader.get("rope_parameters", dict, default=None) or {},
        reader.file,
        f"{reader.prefix}rope_parameters.",
    )
    kind = rope.get("rope_type", str, default="default")
    rope.check(kind == "default", "rope_type", kind, "default")
    bound = Bound(float, 1e-3, 1e15)
    values = {
        "rope_theta": reader.get("rope_theta", float, default=None, bound=bound),
        "rope_parameters.rope_theta": rope.get("rope_theta", float, default=None, bound=bound),
    }
    return reader.agree(values, default=Lfm2Config.rope_theta)


def _vision_config(reader: Reader, vision_feature_layer: int) -> Siglip2VisionConfig:
    default = Siglip2VisionConfig()
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    values = {
        f.name: reader.get(
            f.name,
            type(f.default),
            default=REQUIRED if f.name in sizes else f.default,
            bound=VISION_BOUNDS.get(f.name),
        )
        for f in fields(default)
    }
    config = Siglip2VisionConfig(**values)
    layers = config.num_hidden_layers
    # features are read after the layer of this index (-1: the last), so later layers fall away
    kept = vision_feature_layer + 1 + (layers if vision_feature_layer < 0 else 0)
    reader.check(
        1 <= kept <= layers, "vision_feature_layer", vision_feature_layer, f"within {layers} layers"
    )
    reader.check(
        config.hidden_size % config.num_attention_heads == 0,
        "vision_config.hidden_size",
        config.hidden_size,
        f"a multiple of {config.num_attention_heads} heads",
    )
    side = round(config.num_patches**0.5)
    reader.check(side * side == config.num_patches, "num_patches", config.num_patches, "a square")
    return replace(config, num_hidden_layers=kept)


def _check_quantization(entry: Reader) -> None:
    for key in ("group_size", "bits"):
        entry.get(key, int, default=None, bound=Bound(int, 1, 1024))
    mode = entry.get("mode", str, default="affine")
    entry.check(mode in QUANTIZATION_MODES, "mode", mode, " or ".join(QUANTIZATION_MODES))


def _quantization(top: Reader) -> Mapping[str, Any] | None:
    settings = top.get("quantization", dict, default=None)
    copy = top.get("quantization_config", dict, default=None)
    if copy is not None and "quant_method" in copy:
        raise top.error(
            "quantization_config.quant_method",
            copy["quant_method"],
            "none: only MLX quantization can be read, convert from the unquantized checkpoint",
        )
    if settings is not None and copy is not None and settings != copy:
        raise ConfigError(
            f"{top.file}: quantization {dict(settings)} and its copy quantization_config "
            f"{dict(copy)} differ; make them equal"
        )
    settings = settings if settings is not None else copy
    for path, entry in {"quantization": settings, **(settings or {})}.items():
        if isinstance(entry, Mapping):  # the common settings, or those of one module
            _check_quantization(Reader(entry, top.file, f"{path}."))
        elif not isinstance(entry, (int, str, bool, type(None))):
            raise top.error(f"quantization.{path}", entry, "settings of a module")
    return settings


def _token_ids(reader: Reader) -> tuple[int, ...]:
    """The tokens that end an answer; with one that no embedding has, none does."""
    value = reader.data.get("eos_token_id")
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    good = all(map(TOKEN_ID.fits, ids))
    reader.check(good, "eos_token_id", value, f"token ids, each {TOKEN_ID}")
    return tuple(ids)
