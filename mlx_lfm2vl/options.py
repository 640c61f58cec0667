"""What a question may ask for: images, sampling, memory; and what checkpoints recommend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from .errors import ConfigError, Lfm2VlError

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
    max_tiles: int = 10  # of grids with at most 10 rows and 10 columns
    do_image_splitting: bool = True
    use_thumbnail: bool = True
    max_pixels_tolerance: float = 2.0
    use_image_special_tokens: bool = True
    resample: int = 2  # Pillow's number: 2 bilinear, 3 bicubic
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        check_fields(self, IMAGE_BOUNDS, none=False)
        self._check_triples()
        factor = self.encoder_patch_size * self.downsample_factor
        checks = (
            (self.tile_size % factor == 0, "tile_size", self.tile_size, f"a multiple of {factor}"),
            (self.max_image_tokens >= self.min_image_tokens, "max_image_tokens",
             self.max_image_tokens, f"min_image_tokens ({self.min_image_tokens}) or more"),
            (self.max_tiles >= self.min_tiles, "max_tiles", self.max_tiles,
             f"min_tiles ({self.min_tiles}) or more"),
            (any(self.min_tiles <= rows * cols <= self.max_tiles
                 for rows in range(1, MAX_GRID_SIDE + 1) for cols in range(1, MAX_GRID_SIDE + 1)),
             "max_tiles", self.max_tiles,
             f"such that a grid of at most {MAX_GRID_SIDE} rows and columns has from min_tiles "
             f"({self.min_tiles}) to max_tiles tiles"),
        )  # fmt: skip
        for good, key, value, right in checks:
            if not good:
                raise ConfigError(f"{key} is {value}; it must be {right}")

    def _check_triples(self) -> None:
        for name, bound in (
            ("image_mean", Bound(float, -1e6, 1e6)),
            ("image_std", Bound(float, 1e-6, 1e6)),
        ):
            values = getattr(self, name)
            several = isinstance(values, (tuple, list)) and len(values) == 3
            if not several or not all(map(bound.fits, values)):
                raise ConfigError(f"{name} is {values!r}; it must be three numbers, each {bound}")


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

    def __post_init__(self) -> None:
        check_fields(self, IMAGE_BOUNDS)

    def apply(self, config: ImageProcessorConfig) -> ImageProcessorConfig:
        """The settings with these changes; a ConfigError names what does not fit."""
        return replace(config, **_given(self))


class Bound(NamedTuple):
    """What a number may be: of a kind, between two others; or 0, if that turns it off.

    Of the kind bool, only true and false fit.
    """

    kind: type
    least: float
    most: float
    zero: bool = False

    def fits(self, value: Any) -> bool:
        kinds: Any = (int, float) if self.kind is float else self.kind
        if not isinstance(value, kinds) or isinstance(value, bool) != (self.kind is bool):
            return False
        return bool(self.least <= value <= self.most or (self.zero and value == 0))

    def check(self, name: str, value: Any, error: type[Lfm2VlError] = ConfigError) -> None:
        """Raises an error that names the value; None is always right."""
        if value is not None and not self.fits(value):
            raise error(f"{name} is {value!r}; it must be {self}")

    def __str__(self) -> str:
        if self.kind is bool:
            return "true or false"
        what = "a whole number" if self.kind is int else "a number"
        off = "0, or " if self.zero else ""
        return f"{off}{what} from {self.least} to {self.most}"


def check_fields(options: Any, bounds: Mapping[str, Bound], none: bool = True) -> None:
    """Checks the fields of a dataclass that have bounds; a ConfigError names the first bad one.

    Bounds without a field are left out. `none` says whether None is right.
    """
    for name, bound in bounds.items():
        value = getattr(options, name, None)
        bound.check(name, value)
        if value is None and not none:
            raise ConfigError(f"{name} is None; it must be {bound}")


def check_bias(bias: Mapping[int, float] | None) -> None:
    """Checks a logit bias; a ConfigError names what is wrong."""
    if bias is None:
        return
    if not isinstance(bias, Mapping):
        raise ConfigError(f"logit_bias is {bias!r:.200}; it must be a dict of token ids to numbers")
    for token, value in bias.items():
        Bound(int, 0, MOST).check("a token id of logit_bias", token)
        LOGIT_BIAS.check(f"logit_bias of token {token}", value)


MOST = 2**31 - 1  # of whole numbers that reach the device
SEED = Bound(int, 0, 2**64 - 1)
MAX_TOKENS = Bound(int, 1, MOST)
MAX_GRID_SIDE = 10  # of tiles: the vocabularies hold marks of 10 rows and 10 columns
FLAG = Bound(bool, 0, 1)
IMAGE_BOUNDS = {
    "tile_size": Bound(int, 1, 2048),
    "encoder_patch_size": Bound(int, 1, 256),
    "downsample_factor": Bound(int, 1, 16),
    "min_image_tokens": Bound(int, 1, 2**14),
    "max_image_tokens": Bound(int, 1, 2**14),
    "min_tiles": Bound(int, 1, MAX_GRID_SIDE**2),
    "max_tiles": Bound(int, 1, MAX_GRID_SIDE**2),
    "do_image_splitting": FLAG,
    "use_thumbnail": FLAG,
    "max_pixels_tolerance": Bound(float, 1e-6, 1e9),
    "use_image_special_tokens": FLAG,
    "resample": Bound(int, 0, 5),
    "rescale_factor": Bound(float, 1e-9, 1e3),
}
# float32 can tell these from 0; beyond them a quotient overflows
SAMPLING_BOUNDS = {
    "temperature": Bound(float, 1e-3, 1e3, zero=True),
    "top_p": Bound(float, 1e-6, 1, zero=True),
    "top_k": Bound(int, 0, MOST),
    "min_p": Bound(float, 1e-6, 1, zero=True),
    "repetition_penalty": Bound(float, 1e-2, 1e2),
    "repetition_context_size": Bound(int, 1, MOST),
    "presence_penalty": Bound(float, -100, 100),
    "frequency_penalty": Bound(float, -100, 100),
    "xtc_probability": Bound(float, 0, 1),
    "xtc_threshold": Bound(float, 0, 0.5),
}
LOGIT_BIAS = Bound(float, -1000, 1000)


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen.

    Attributes:
        temperature: 0 is greedy decoding.
        top_p, top_k, min_p: filters of unlikely tokens; 0 turns them off.
        repetition_penalty: divides the scores of recent tokens; 1 is none.
        presence_penalty, frequency_penalty: subtracted from the scores of recent tokens, once or
            for each time they came.
        repetition_context_size: how many tokens are recent, prompt included, for all penalties.
        xtc_probability: how often the most likely tokens above `xtc_threshold` are left out, all
            but the least likely of them.
        logit_bias: added to the scores of tokens, by id.
    """

    temperature: float = 0.0
    top_p: float = 0.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_context_size: int = 20
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    logit_bias: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        check_fields(self, SAMPLING_BOUNDS)
        check_bias(self.logit_bias)


@dataclass(frozen=True)
class Sampling:
    """A question's changes of a checkpoint's recommended sampling; None keeps.

    The fields mean what they mean in `SamplingConfig`. Temperature 0 alone is plain greedy
    decoding: no recommended filter or penalty survives it, only those that are given, too.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    repetition_context_size: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    logit_bias: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        check_fields(self, SAMPLING_BOUNDS)
        check_bias(self.logit_bias)

    def apply(self, config: SamplingConfig) -> SamplingConfig:
        """The settings with these changes."""
        base = SamplingConfig() if self.temperature == 0 else config
        return replace(base, **_given(self))

    def override(self, other: Sampling) -> Sampling:
        """These changes with another's on top."""
        return replace(self, **_given(other))


def _given(options: Any) -> dict[str, Any]:
    values = {f.name: getattr(options, f.name) for f in fields(options)}
    return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class CacheOptions:
    """How attention layers remember; convolutions keep their few inputs in any case.

    Attributes:
        max_kv_size: positions that an attention layer keeps at most; None keeps all.
        keep: how many first positions of these never leave. None takes the first turn: all up to
            where the first answer begins, so system message, first question and its images.
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
        check_fields(
            self,
            {
                "max_kv_size": Bound(int, 2, MOST),
                "keep": Bound(int, 0, MOST),
                "quantized_kv_start": Bound(int, 0, MOST),
            },
        )
        size, keep = self.max_kv_size, self.keep
        checks = (
            (keep is None or size is not None, "keep", keep, "left out without max_kv_size"),
            (keep is None or size is None or keep < size, "keep", keep,
             f"below max_kv_size ({size})"),
            (self.kv_bits in (None, 4, 8), "kv_bits", self.kv_bits, "4 or 8"),
            (self.kv_bits is None or size is None, "kv_bits", self.kv_bits,
             "left out with max_kv_size: a rotating cache is not quantized"),
            (self.kv_group_size in (32, 64, 128), "kv_group_size", self.kv_group_size,
             "32, 64 or 128"),
        )  # fmt: skip
        for good, key, value, right in checks:
            if not good:
                raise ConfigError(f"{key} is {value!r}; it must be {right}")


# What the model cards recommend; most generation_config.json files hold only token ids
FAMILY_SAMPLING = SamplingConfig(temperature=0.1, min_p=0.15, repetition_penalty=1.05)


@dataclass(frozen=True)
class GenerationConfig:
    """Recommended sampling of a checkpoint, and the tokens that end an answer."""

    sampling: SamplingConfig = FAMILY_SAMPLING
    sampling_source: str = "model card"
    eos_token_ids: tuple[int, ...] = ()
