"""Configuration of the LFM2-VL family: every spelling and every merge of files is settled here.

Names and defaults follow `transformers` (`Lfm2VlConfig`, `Lfm2Config`, `Siglip2VisionConfig`,
`Lfm2VlImageProcessor`). `Lfm2VlConfig()` resembles LFM2-VL-1.6B.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from .errors import ConfigError, ModelNotFoundError

Json = Mapping[str, Any]
T = TypeVar("T")

DEFAULT_MAX_TOKENS = 256

REQUIRED: Any = object()  # default of a value that a file must state

MODEL_TYPES = ("lfm2_vl", "lfm2-vl")
VISION_MODEL_TYPES = ("siglip2_vision_model", "lfm2_vl")
TEXT_MODEL_TYPES = ("lfm2",)
QUANTIZATION_MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")


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
        top = _Reader(data, file)
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
                "projector_hidden_size", int, default=default.projector_hidden_size
            ),
            projector_bias=top.get("projector_bias", bool, default=default.projector_bias),
            projector_use_layernorm=top.get(
                "projector_use_layernorm", bool, default=default.projector_use_layernorm
            ),
            downsample_factor=top.get("downsample_factor", int, default=default.downsample_factor),
            dtype=top.get("dtype", str, "torch_dtype", default="")
            or text_reader.get("dtype", str, "torch_dtype", default=default.dtype),
            eos_token_ids=_token_ids(text_reader) or _token_ids(top),
            quantization=_quantization(top),
        )
        return config


def load_config(folder: Path) -> Lfm2VlConfig:
    """Reads `config.json` of a model folder."""
    return Lfm2VlConfig.from_dict(read_json(folder / "config.json"))


def _text_config(reader: _Reader, top: _Reader) -> Lfm2Config:
    default = Lfm2Config()
    hidden_size = reader.get("hidden_size", int, "block_dim", default=REQUIRED)
    heads = reader.get("num_attention_heads", int, "num_heads", default=REQUIRED)
    kv_heads = reader.get("num_key_value_heads", int, default=heads)
    layers = reader.get("num_hidden_layers", int, default=REQUIRED)
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
        vocab_size=reader.get("vocab_size", int, default=REQUIRED),
        hidden_size=hidden_size,
        feed_forward_size=_feed_forward_size(reader),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        layer_types=_layer_types(reader, layers),
        norm_eps=reader.get("norm_eps", float, "block_norm_eps", default=default.norm_eps),
        rope_theta=_rope_theta(reader),
        conv_L_cache=reader.get("conv_L_cache", int, default=default.conv_L_cache),
        conv_bias=reader.get("conv_bias", bool, default=default.conv_bias),
        tie_word_embeddings=tied,
        max_position_embeddings=reader.get(
            "max_position_embeddings", int, default=default.max_position_embeddings
        ),
    )


def _feed_forward_size(reader: _Reader) -> int:
    # block_ff_dim wins over intermediate_size where both stand, as in transformers
    size = reader.get("block_ff_dim", int, default=None)
    if size is None:
        size = reader.get("intermediate_size", int, default=REQUIRED)
    if reader.get("block_auto_adjust_ff_dim", bool, default=True):
        multiplier = reader.get("block_ffn_dim_multiplier", float, default=1.0)
        multiple = reader.get("block_multiple_of", int, default=256)
        size = int(multiplier * int(2 * size / 3))
        size = -(-size // multiple) * multiple
    return size


def _layer_types(reader: _Reader, layers: int) -> tuple[str, ...]:
    types = reader.get("layer_types", list, default=None)
    indices = reader.get("full_attn_idxs", list, default=None)
    if types is None and indices is None:
        raise reader.error("layer_types", None, f"a list of {layers} layer types")
    if types is None:
        reader.check(
            all(isinstance(i, int) and 0 <= i < layers for i in indices),
            "full_attn_idxs",
            indices,
            f"layer numbers below {layers}",
        )
        return tuple("full_attention" if i in indices else "conv" for i in range(layers))
    known = set(types) <= {"full_attention", "conv"} and len(types) == layers
    reader.check(known, "layer_types", types, f"{layers} times full_attention or conv")
    found = [i for i, kind in enumerate(types) if kind == "full_attention"]
    reader.check(len(found) > 0, "layer_types", types, "with one full_attention or more")
    if indices is not None and sorted(indices) != found:
        raise ConfigError(
            f"{reader.file}: layer_types has attention at {found}, full_attn_idxs says {indices}"
        )
    return tuple(types)


def _rope_theta(reader: _Reader) -> float:
    rope = reader.get("rope_parameters", dict, default=None) or {}
    kind = rope.get("rope_type", "default")
    reader.check(kind == "default", "rope_parameters.rope_type", kind, "default")
    values = {
        "rope_theta": reader.get("rope_theta", float, default=None),
        "rope_parameters.rope_theta": rope.get("rope_theta"),
    }
    return reader.agree(values, default=Lfm2Config.rope_theta)


def _vision_config(reader: _Reader, vision_feature_layer: int) -> Siglip2VisionConfig:
    default = Siglip2VisionConfig()
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    values = {
        f.name: reader.get(
            f.name, type(f.default), default=REQUIRED if f.name in sizes else f.default
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


def _quantization(top: _Reader) -> Mapping[str, Any] | None:
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
    if settings is not None:
        mode = settings.get("mode", "affine")
        top.check(mode in QUANTIZATION_MODES, "quantization.mode", mode, QUANTIZATION_MODES)
    return settings


@dataclass(frozen=True)
class ImageProcessorConfig:
    """How an image becomes views and tokens, with the defaults of `Lfm2VlImageProcessor`."""

    tile_size: int = 512  # pixels
    encoder_patch_size: int = 16  # pixels
    downsample_factor: int = 2
    min_image_tokens: int = 64  # for a view that is no tile
    max_image_tokens: int = 256
    min_tiles: int = 2
    max_tiles: int = 10
    do_image_splitting: bool = True
    use_thumbnail: bool = True
    max_pixels_tolerance: float = 2.0
    use_image_special_tokens: bool = True
    resample: int = 2  # Pillow's number: 2 bilinear, 3 bicubic
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        factor = self.encoder_patch_size * self.downsample_factor
        checks = (
            (factor >= 1, "encoder_patch_size", self.encoder_patch_size, "1 or more"),
            (self.tile_size >= factor and self.tile_size % factor == 0, "tile_size", self.tile_size,
             f"a multiple of {factor}"),
            (self.min_image_tokens >= 1, "min_image_tokens", self.min_image_tokens, "1 or more"),
            (self.max_image_tokens >= self.min_image_tokens, "max_image_tokens",
             self.max_image_tokens, f"min_image_tokens ({self.min_image_tokens}) or more"),
            (self.min_tiles >= 1, "min_tiles", self.min_tiles, "1 or more"),
            (self.max_tiles >= self.min_tiles, "max_tiles", self.max_tiles,
             f"min_tiles ({self.min_tiles}) or more"),
            (self.max_pixels_tolerance > 0, "max_pixels_tolerance", self.max_pixels_tolerance,
             "more than 0"),
            (0 <= self.resample <= 5, "resample", self.resample, "0 to 5"),
            (len(self.image_mean) == 3 and len(self.image_std) == 3, "image_mean and image_std",
             (self.image_mean, self.image_std), "three numbers each"),
        )  # fmt: skip
        for good, key, value, right in checks:
            if not good:
                raise ConfigError(f"image processor: {key} is {value}; it must be {right}")


@dataclass(frozen=True)
class ImageOptions:
    """Per-call changes of the image settings; None keeps the checkpoint's value.

    The fields mean what they mean in `ImageProcessorConfig`.
    """

    min_image_tokens: int | None = None
    max_image_tokens: int | None = None
    do_image_splitting: bool | None = None
    min_tiles: int | None = None
    max_tiles: int | None = None
    use_thumbnail: bool | None = None
    tile_size: int | None = None
    max_pixels_tolerance: float | None = None
    use_image_special_tokens: bool | None = None

    def apply(self, config: ImageProcessorConfig) -> ImageProcessorConfig:
        """The settings with these changes; a ConfigError names what does not fit."""
        changes = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(config, **{k: v for k, v in changes.items() if v is not None})


def load_image_processor_config(folder: Path, model: Lfm2VlConfig) -> ImageProcessorConfig:
    """Merges `processor_config.json` (flat or nested) and `preprocessor_config.json`.

    Values that stand in neither are looked up at the top of `config.json`, where the first
    checkpoints repeat them, and then fall back to the official defaults.

    Raises:
        ConfigError: two files contradict each other, or the model's own config.
    """
    found: dict[str, tuple[Any, str]] = {}
    for data, file in _image_settings(folder):
        for key, value in data.items():
            if key in found and found[key][0] != value:
                raise ConfigError(
                    f"{key} is {found[key][0]} in {found[key][1]} and {value} in {file}; "
                    "make them equal"
                )
            found[key] = (value, file)
    for key, value in _known_image_settings(read_json(folder / "config.json")).items():
        found.setdefault(key, (value, "config.json"))
    config = ImageProcessorConfig(**{key: value for key, (value, _) in found.items()})
    for key, ours, theirs in (
        ("encoder_patch_size", config.encoder_patch_size, model.vision_config.patch_size),
        ("downsample_factor", config.downsample_factor, model.downsample_factor),
    ):
        if ours != theirs:
            file = found[key][1] if key in found else "the image processor's default"
            raise ConfigError(f"{key} is {ours} in {file} but {theirs} in config.json")
    return config


def _image_settings(folder: Path) -> Iterable[tuple[Json, str]]:
    for file in ("processor_config.json", "preprocessor_config.json"):
        if not (folder / file).exists():
            continue
        data = read_json(folder / file)
        nested = data.get("image_processor")
        settings = _known_image_settings({**data, **nested} if nested is not None else data)
        if settings.pop("do_image_splitting", True) is False:
            # a leftover of some conversions, always together with use_thumbnail=false; it cost
            # grounding accuracy, so tiling stays on until a caller turns it off
            settings.pop("use_thumbnail", None)
        yield settings, file


def _known_image_settings(data: Json) -> dict[str, Any]:
    settings = {}
    for f in fields(ImageProcessorConfig):
        value = data.get(f.name)
        if value is not None:
            settings[f.name] = tuple(value) if isinstance(value, list) else value
    if "encoder_patch_size" not in settings and data.get("patch_size") is not None:
        settings["encoder_patch_size"] = data["patch_size"]
    return settings


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy; 0 (1.0 for the penalty) turns off."""

    temperature: float = 0.0
    top_p: float = 0.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_context_size: int = 20  # tokens

    def __post_init__(self) -> None:
        checks = (
            (self.temperature >= 0, "temperature", self.temperature, "0 or more"),
            (0 <= self.top_p <= 1, "top_p", self.top_p, "between 0 and 1"),
            (self.top_k >= 0, "top_k", self.top_k, "0 or more"),
            (0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1"),
            (self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty,
             "more than 0"),
            (self.repetition_context_size >= 1, "repetition_context_size",
             self.repetition_context_size, "1 or more"),
        )  # fmt: skip
        for good, key, value, right in checks:
            if not good:
                raise ConfigError(f"sampling: {key} is {value}; it must be {right}")

    def override(
        self,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        repetition_context_size: int | None = None,
    ) -> Sampling:
        """These settings with a caller's own on top; None keeps.

        A caller who asks for temperature 0 wants plain greedy decoding, so no recommended filter
        or penalty survives that, only those the caller states, too.
        """
        stated: dict[str, Any] = {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "repetition_context_size": repetition_context_size,
        }
        base = Sampling() if temperature == 0 else self
        return replace(base, **{key: value for key, value in stated.items() if value is not None})


@dataclass(frozen=True)
class CacheOptions:
    """How attention layers remember; convolutions keep their few inputs in any case.

    Attributes:
        max_kv_size: positions that an attention layer keeps at most; None keeps all.
        keep: how many first positions of these never leave; None takes the whole prompt.
        kv_bits: 4 or 8 stores keys and values as integers.
        kv_group_size: values that share a scale, along the head dimension.
        quantized_kv_start: position from which on they are integers, as in mlx-lm.
    """

    max_kv_size: int | None = None
    keep: int | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 5000

    def __post_init__(self) -> None:
        size, keep = self.max_kv_size, self.keep
        checks = (
            (size is None or size >= 2, "max_kv_size", size, "2 or more"),
            (keep is None or size is not None, "keep", keep, "left out without max_kv_size"),
            (keep is None or size is None or 0 <= keep < size, "keep", keep,
             f"0 or more, and below max_kv_size ({size})"),
            (self.kv_bits in (None, 4, 8), "kv_bits", self.kv_bits, "4 or 8"),
            (self.kv_bits is None or size is None, "kv_bits", self.kv_bits,
             "left out with max_kv_size: a rotating cache is not quantized"),
            (self.kv_group_size in (32, 64, 128), "kv_group_size", self.kv_group_size,
             "32, 64 or 128"),
            (self.quantized_kv_start >= 0, "quantized_kv_start", self.quantized_kv_start,
             "0 or more"),
        )  # fmt: skip
        for good, key, value, right in checks:
            if not good:
                raise ConfigError(f"cache: {key} is {value}; it must be {right}")


# What the model cards recommend; most generation_config.json files hold only token ids
FAMILY_SAMPLING = Sampling(temperature=0.1, min_p=0.15, repetition_penalty=1.05)


@dataclass(frozen=True)
class GenerationConfig:
    """Recommended sampling of a checkpoint, and the tokens that end an answer."""

    sampling: Sampling = FAMILY_SAMPLING
    sampling_source: str = "model card"
    eos_token_ids: tuple[int, ...] = ()


def load_generation_config(folder: Path, model: Lfm2VlConfig) -> GenerationConfig:
    """Reads `generation_config.json`; the model cards' sampling where the file states none."""
    file = "generation_config.json"
    if not (folder / file).exists():
        return GenerationConfig(eos_token_ids=model.eos_token_ids)
    reader = _Reader(read_json(folder / file), file)
    eos = _token_ids(reader) or model.eos_token_ids
    stated = {
        key: reader.get(key, kind, default=None)
        for key, kind in (
            ("temperature", float),
            ("top_p", float),
            ("top_k", int),
            ("min_p", float),
            ("repetition_penalty", float),
        )
    }
    stated = {key: value for key, value in stated.items() if value is not None}
    do_sample = reader.get("do_sample", bool, default=None)
    if not stated and do_sample is None:
        return GenerationConfig(eos_token_ids=eos)
    if do_sample is False:
        stated["temperature"] = 0.0
    else:
        stated.setdefault("temperature", 1.0)
    return GenerationConfig(Sampling(**stated), file, eos)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object, with an error that names the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelNotFoundError(
            f"{path} does not exist; a model folder needs {path.name}"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a JSON {type(data).__name__}; it must be an object")
    return data


def _token_ids(reader: _Reader) -> tuple[int, ...]:
    value = reader.data.get("eos_token_id")
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    reader.check(all(type(i) is int for i in ids), "eos_token_id", value, "token ids")
    return tuple(ids)


class _Reader:
    """Takes typed values out of one JSON object, with errors that name file, key and value."""

    def __init__(self, data: Json, file: str, prefix: str = "") -> None:
        self.data, self.file, self.prefix = data, file, prefix

    def section(self, key: str, model_types: tuple[str, ...]) -> _Reader:
        reader = _Reader(self.get(key, dict, default=REQUIRED), self.file, f"{key}.")
        reader.require("model_type", model_types, default=model_types[0])
        return reader

    def require(self, key: str, allowed: tuple[str, ...], default: str) -> None:
        value = self.get(key, str, default=default)
        self.check(value in allowed, key, value, " or ".join(allowed))

    def get(self, key: str, kind: type, *spellings: str, default: Any) -> Any:
        values = {name: self.data.get(name) for name in (key, *spellings)}
        for name, value in values.items():
            fits = isinstance(value, (int, float) if kind is float else kind)
            if kind is not bool and isinstance(value, bool):
                fits = False
            if value is not None and not fits:
                raise self.error(name, value, f"of type {kind.__name__}")
        if default is REQUIRED and all(value is None for value in values.values()):
            raise ConfigError(f"{self.file}: {self.prefix}{key} is missing")
        return self.agree(values, default)

    def agree(self, values: Mapping[str, Any], default: T) -> T:
        """The one value that several spellings state."""
        stated = {name: value for name, value in values.items() if value is not None}
        for name, value in stated.items():
            first = next(iter(stated))
            if value != stated[first]:
                raise ConfigError(
                    f"{self.file}: {self.prefix}{first} is {stated[first]} but "
                    f"{self.prefix}{name} is {value}; remove one or make them equal"
                )
        return next(iter(stated.values())) if stated else default

    def check(self, good: bool, key: str, value: Any, right: Any) -> None:
        if not good:
            raise self.error(key, value, right)

    def error(self, key: str, value: Any, right: Any) -> ConfigError:
        return ConfigError(f"{self.file}: {self.prefix}{key} is {value!r}; it must be {right}")
