"""Names of tensors in the layouts of MLX and transformers."""

from __future__ import annotations

from collections.abc import Iterable

# Left in some MLX repositories although their projector has no norm
STRAY_PROJECTOR_NORM = (
    "multi_modal_projector.layer_norm.weight",
    "multi_modal_projector.layer_norm.bias",
)


def mlx_name(name: str) -> str:
    """A tensor's name in the MLX layout, from any layout.

    >>> mlx_name("model.vision_tower.vision_model.post_layernorm.bias")
    'vision_tower.post_layernorm.bias'
    """
    name = name.removeprefix("model.")
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    if name.startswith("vision_tower."):
        return name.replace("vision_tower.vision_model.", "vision_tower.", 1)
    part = name.removeprefix("language_model.")
    if part != name and not part.startswith(("model.", "lm_head.")):
        return f"language_model.model.{part}"
    return name


def is_mlx_layout(names: Iterable[str]) -> bool:
    """Tells the layouts apart by names, never by shapes."""
    return any(name.startswith("language_model.model.") for name in names)


def hf_name(name: str, vision_prefix: str) -> str:
    """A tensor's name in the transformers layout."""
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    if name.startswith("vision_tower."):
        return vision_prefix + name.removeprefix("vision_tower.")
    if name.startswith("language_model.model."):
        return "model.language_model." + name.removeprefix("language_model.model.")
    return f"model.{name}"
