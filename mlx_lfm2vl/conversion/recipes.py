"""How each module is quantized: common settings, named recipes, patterns."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..checkpoints.adapters import linear_inputs
from ..checkpoints.weights import MODES
from ..errors import ConfigError, ConvertError
from ..files import read_json

Decision = dict[str, Any] | None  # {"group_size", "bits", "mode"}, or None to leave a module alone
Recipe = Callable[[str], Decision]  # module path -> decision
# its type is what mlx-vlm computes in
KEPT_IN_FLOATS = "vision_tower.embeddings.patch_embedding"


@dataclass(frozen=True)
class Quantization:
    """What becomes integers, and of how many bits.

    Attributes:
        bits, group_size, mode: of everything that nothing else is said about; None takes the
            mode's own.
        vision_bits: quantizes the vision tower, too, but for its patch embedding.
        projector: False leaves the projector alone.
        embeddings_bits: other bits for the token embeddings, which are the head as well.
        recipe: a name of `RECIPES`, which sets the bits, or a JSON file of patterns.
    """

    bits: int | None = None
    group_size: int | None = None
    mode: str = "affine"
    vision_bits: int | None = None
    projector: bool = True
    embeddings_bits: int | None = None
    recipe: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"q-mode is {self.mode}; it must be one of {', '.join(MODES)}")
        all_bits, sizes = MODES[self.mode]
        for flag, value, allowed in (
            ("q-bits", self.bits, all_bits),
            ("q-vision", self.vision_bits, all_bits),
            ("q-embeddings", self.embeddings_bits, all_bits),
            ("q-group-size", self.group_size, sizes),
        ):
            if value is not None and value not in allowed:
                right = ", ".join(map(str, sorted(allowed)))
                raise ConfigError(f"{flag} is {value}; with {self.mode} it must be one of {right}")
        if self.recipe is not None and self.mode != "affine":
            raise ConfigError(f"a recipe needs q-mode affine, not {self.mode}")
        if self.recipe in RECIPES and self.bits is not None:
            raise ConfigError(f"the recipe {self.recipe} sets the bits; leave q-bits out")

    def decision(self, bits: int | None = None) -> dict[str, Any]:
        """The entry of config.json for some bits, or for the bits of everything."""
        default_bits, sizes = MODES[self.mode]
        return {
            "group_size": self.group_size if self.group_size is not None else sizes[0],
            "bits": bits or self.bits or default_bits[0],
            "mode": self.mode,
        }


def matrices(model: nn.Module) -> dict[str, int]:
    """How many inputs each module has that can be quantized, or is."""
    kinds = (nn.Linear, nn.Embedding, nn.QuantizedLinear, nn.QuantizedEmbedding)
    return {
        path: linear_inputs(module)
        for path, module in model.named_modules()
        # a table of positions is not a matrix that anything is multiplied with
        if isinstance(module, kinds) and not path.endswith("position_embedding")
    }


def decide(
    inputs: Mapping[str, int], quantization: Quantization
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """How each module is to be quantized, and which are left in floating point against the wish.

    Args:
        inputs: of the modules, by path; see `matrices`.

    Returns:
        settings by path, and reasons by path.

    Raises:
        ConvertError: a pattern matches nothing, or nothing can be quantized like this.
    """
    recipe = make_recipe(quantization, list(inputs))
    decisions, left = {}, {}
    for path, width in inputs.items():
        decision = recipe(path)
        if decision is None:
            continue
        if path == KEPT_IN_FLOATS:
            left[path] = "mlx-vlm takes its compute type from it"
        elif width % decision["group_size"]:
            left[path] = f"{width} inputs do not divide by the group size {decision['group_size']}"
        else:
            decisions[path] = decision
    if not decisions:
        raise ConvertError("nothing can be quantized like this: " + "; ".join(grouped(left)))
    return decisions, left


def grouped(left: Mapping[str, str]) -> list[str]:
    """`path: reason` for each kind of module, layers taken together."""
    return sorted({f"{re.sub(r'[.][0-9]+[.]', '.*.', path)}: {left[path]}" for path in left})


def make_recipe(quantization: Quantization, paths: list[str]) -> Recipe:
    """The rule that decides about each module: patterns, then flags, then the common settings.

    Raises:
        ConvertError: a pattern or a flag that decides nothing.
    """
    name = quantization.recipe
    low, high, wants_more = RECIPES.get(name or "", (None, None, _never))
    patterns: Mapping[str, Any] = {}
    if name is not None and name not in RECIPES:
        patterns = read_patterns(Path(name), paths)
    layers = 1 + max((layer for path in paths if (layer := _layer(path)) is not None), default=0)

    def matching(path: str) -> str | None:
        return next((pattern for pattern in patterns if fnmatchcase(path, pattern)), None)

    def recipe(path: str) -> Decision:
        pattern, (flag, flagged) = matching(path), _by_flag(path, quantization)
        bits = high if wants_more(path, layers) else low
        if pattern is not None:
            return None if patterns[pattern] is False else quantization.decision(patterns[pattern])
        if flag is not None or path.startswith("vision_tower."):
            return None if flagged is None else quantization.decision(flagged)
        return quantization.decision(bits)

    spoken = {_by_flag(path, quantization)[0] for path in paths}
    deciding = {_by_flag(path, quantization)[0] for path in paths if matching(path) is None}
    if spoken - deciding - {None}:
        idle = ", ".join(sorted(str(flag) for flag in spoken - deciding - {None}))
        raise ConvertError(f"{idle} decides nothing beside {name}, whose patterns match it all")
    return recipe


def _by_flag(path: str, quantization: Quantization) -> tuple[str | None, int | None]:
    """The flag that speaks of a module, and the bits that it asks for."""
    if path.startswith("vision_tower.") and quantization.vision_bits is not None:
        return "--q-vision", quantization.vision_bits
    if path.startswith("multi_modal_projector.") and not quantization.projector:
        return "--no-q-projector", None
    if path.endswith("embed_tokens") and quantization.embeddings_bits is not None:
        return "--q-embeddings", quantization.embeddings_bits
    return None, None


def read_patterns(path: Path, paths: list[str]) -> dict[str, int | bool]:
    """A user's JSON: patterns of module paths -> bits, or false to leave modules alone.

    The first pattern that matches counts; what no pattern matches takes the usual bits, the
    vision tower none.

    Raises:
        ConvertError: no such file, other bits than MLX has, or a pattern that decides nothing.
    """
    if not path.is_file():
        names = ", ".join(RECIPES)
        raise ConvertError(f"{path} is no recipe ({names}) and no file of patterns")
    patterns = read_json(path)
    deciding = {next((p for p in patterns if fnmatchcase(name, p)), None) for name in paths}
    allowed = MODES["affine"][0]
    for pattern, bits in patterns.items():
        if not any(fnmatchcase(name, pattern) for name in paths):
            raise ConvertError(f"{path}: the pattern {pattern!r} matches no module")
        if pattern not in deciding:
            raise ConvertError(f"{path}: earlier patterns match all that {pattern!r} does")
        if bits is not False and (type(bits) is not int or bits not in allowed):
            raise ConvertError(f"{path}: {pattern!r} asks for {bits!r}; it must be one of "
                               f"{sorted(allowed)}, or false")  # fmt: skip
    return patterns


def as_patterns(
    paths: Iterable[str], decisions: Mapping[str, dict[str, Any]]
) -> dict[str, int | bool]:
    """What `read_patterns` reads: each module by its name, with its bits or false."""
    return {path: decisions[path]["bits"] if path in decisions else False for path in paths}


def _layer(path: str) -> int | None:
    parts = path.split(".")
    return int(parts[3]) if path.startswith("language_model.model.layers.") else None


def _never(path: str, layers: int) -> bool:
    return False


def _as_mlx_lm(path: str, layers: int) -> bool:
    """The layers that mlx-lm's mixed recipes give more bits; `w2` is LFM2's down projection."""
    layer = _layer(path)
    if layer is None:
        return "lm_head" in path or path.endswith("embed_tokens")
    eighth = layers // 8
    chosen = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    return chosen and path.endswith(("v_proj", "w2"))


def _as_lfm2(path: str, layers: int) -> bool:
    """What this family feels first: the tied table, the ends of the stack, what writes into it."""
    layer = _layer(path)
    if layer is None:
        return path.endswith(("embed_tokens", "lm_head"))
    return layer in (0, layers - 1) or path.endswith(("out_proj", "w2"))


# name -> (bits, more bits, which modules get more)
RECIPES: Mapping[str, tuple[int, int, Callable[[str, int], bool]]] = {
    "mixed_2_6": (2, 6, _as_mlx_lm),
    "mixed_3_4": (3, 4, _as_mlx_lm),
    "mixed_3_6": (3, 6, _as_mlx_lm),
    "mixed_4_6": (4, 6, _as_mlx_lm),
    "mixed_4_8": (4, 8, _as_mlx_lm),
    "lfm2_4bit": (4, 6, _as_lfm2),
    "lfm2_6bit": (6, 8, _as_lfm2),
}


def quantization_entry(
    quantization: Quantization, decisions: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """The entry of config.json: the common settings, and each module that differs from them."""
    common = quantization.decision()
    entry: dict[str, Any] = dict(common)
    entry |= {path: decision for path, decision in decisions.items() if decision != common}
    return entry
