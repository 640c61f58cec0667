"""How each module is quantized: common settings, named recipes, patterns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..errors import ConfigError, ConvertError
from ..files import read_json

# mode -> (group size, bits) where the user states none, and what else the mode can do
MODE_DEFAULTS = {"affine": (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}
AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUP_SIZES = (32, 64, 128)
Decision = dict[str, Any] | None  # {"group_size", "bits", "mode"}, or None to leave a module alone
Recipe = Callable[[str], Decision]  # module path -> decision


@dataclass(frozen=True)
class Quantization:
    """What becomes integers, and of how many bits.

    Attributes:
        bits, group_size, mode: of everything that nothing else is said about; None takes the
            mode's own.
        vision_bits: quantizes the vision tower, too.
        projector: False leaves the projector alone.
        embeddings_bits: other bits for the token embeddings, which are the head as well.
        recipe: a name of `RECIPES`, or a JSON file of patterns.
    """

    bits: int | None = None
    group_size: int | None = None
    mode: str = "affine"
    vision_bits: int | None = None
    projector: bool = True
    embeddings_bits: int | None = None
    recipe: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODE_DEFAULTS:
            raise ConfigError(
                f"q-mode is {self.mode}; it must be one of {', '.join(MODE_DEFAULTS)}"
            )
        default = MODE_DEFAULTS[self.mode]
        for bits in (self.bits, self.vision_bits, self.embeddings_bits):
            allowed = AFFINE_BITS if self.mode == "affine" else (default[1],)
            if bits is not None and bits not in allowed:
                raise ConfigError(f"q-bits is {bits}; with {self.mode} it must be one of {allowed}")
        sizes = AFFINE_GROUP_SIZES if self.mode == "affine" else (default[0],)
        if self.group_size is not None and self.group_size not in sizes:
            raise ConfigError(
                f"q-group-size is {self.group_size}; with {self.mode} it must be one of {sizes}"
            )
        if self.recipe is not None and self.mode != "affine":
            raise ConfigError(f"a recipe needs q-mode affine, not {self.mode}")

    def decision(self, bits: int | None = None) -> dict[str, Any]:
        """The entry of config.json for some bits, or for the bits of everything."""
        size, default_bits = MODE_DEFAULTS[self.mode]
        return {
            "group_size": self.group_size if self.group_size is not None else size,
            "bits": bits or self.bits or default_bits,
            "mode": self.mode,
        }


def quantized_modules(model: nn.Module) -> dict[str, dict[str, Any]]:
    """How each quantized module of a model is quantized."""
    return {
        path: {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
        for path, module in model.named_modules()
        if "scales" in module
    }


def decide(model: nn.Module, quantization: Quantization) -> dict[str, dict[str, Any]]:
    """How each module is to be quantized.

    Raises:
        ConvertError: a pattern matches nothing, or a width does not divide by the group size.
    """
    paths = {
        path: module.weight.shape
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding))
        # a table of positions is not a matrix that anything is multiplied with
        and not path.endswith("position_embedding")
    }
    recipe = make_recipe(quantization, list(paths))
    decisions = {}
    for path, shape in paths.items():
        decision = recipe(path)
        if decision is None:
            continue
        if shape[-1] % decision["group_size"]:
            raise ConvertError(
                f"{path} has {shape[-1]} inputs, which do not divide by the group size "
                f"{decision['group_size']}; choose another, or leave it out by a recipe"
            )
        decisions[path] = decision
    return decisions


def make_recipe(quantization: Quantization, paths: list[str]) -> Recipe:
    """The rule that decides about each module."""
    named = _named_recipe(quantization, paths)

    def recipe(path: str) -> Decision:
        if path.startswith("vision_tower."):
            bits = quantization.vision_bits
            return None if bits is None else quantization.decision(bits)
        if path.startswith("multi_modal_projector.") and not quantization.projector:
            return None
        if path.endswith("embed_tokens") and quantization.embeddings_bits is not None:
            return quantization.decision(quantization.embeddings_bits)
        return named(path)

    return recipe


def _named_recipe(quantization: Quantization, paths: list[str]) -> Recipe:
    name = quantization.recipe
    if name is None:
        return lambda path: quantization.decision()
    if name not in RECIPES:
        return recipe_of_file(Path(name), quantization, paths)
    low, high, wants_more = RECIPES[name]
    layers = 1 + max(layer for path in paths if (layer := _layer(path)) is not None)
    return lambda path: quantization.decision(high if wants_more(path, layers) else low)


def recipe_of_file(path: Path, quantization: Quantization, paths: list[str]) -> Recipe:
    """A user's JSON: patterns of module paths -> bits, or false to leave modules alone.

    The first pattern that matches counts; what no pattern matches takes the usual bits.
    """
    if not path.exists():
        names = ", ".join(RECIPES)
        raise ConvertError(f"{path} is no recipe ({names}) and no file of patterns")
    patterns = read_json(path)
    for pattern, bits in patterns.items():
        if not any(fnmatchcase(name, pattern) for name in paths):
            raise ConvertError(f"{path}: the pattern {pattern!r} matches no module")
        if bits is not False and bits not in AFFINE_BITS:
            raise ConvertError(f"{path}: {pattern!r} asks for {bits!r}; it must be one of "
                               f"{AFFINE_BITS}, or false")  # fmt: skip

    def recipe(name: str) -> Decision:
        bits = next((bits for p, bits in patterns.items() if fnmatchcase(name, p)), None)
        return None if bits is False else quantization.decision(bits)

    return recipe


def _layer(path: str) -> int | None:
    parts = path.split(".")
    return int(parts[3]) if path.startswith("language_model.model.layers.") else None


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
