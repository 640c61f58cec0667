"""What a question may ask for: images, sampling, memory; and what checkpoints recommend."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from .errors import ConfigError

DEFAULT_MAX_TOKENS = 256


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
