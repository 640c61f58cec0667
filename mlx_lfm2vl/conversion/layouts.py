"""What stands beside the weights, as MLX loaders or transformers read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..checkpoints.settings import load_generation_config, load_image_processor_config
from ..files import read_json
from ..models.config import Lfm2Config, Lfm2VlConfig
from ..options import FAMILY_SAMPLING


def mlx_config(config: Mapping[str, Any], model: Lfm2VlConfig) -> dict[str, Any]:
    """The config with the spellings of the first checkpoints, which other MLX loaders go by."""
    return {**config, "text_config": _spelled_out(config["text_config"], model.text_config)}


def _spelled_out(text_config: Mapping[str, Any], text: Lfm2Config) -> dict[str, Any]:
    first = {
        "block_dim": text.hidden_size,
        "block_ff_dim": text_config.get("intermediate_size"),
        "conv_dim": text.hidden_size,
        "conv_dim_out": text.hidden_size,
        "num_heads": text.num_attention_heads,
        "rope_theta": text.rope_theta,
        "layer_types": list(text.layer_types),
    }
    given = {key: value for key, value in text_config.items() if value is not None}
    return {**first, **given}


def hf_config(config: Mapping[str, Any], model: Lfm2VlConfig) -> dict[str, Any]:
    """The spelling that transformers 5 reads; values that it does not know are settled."""
    text, vision = dict(config["text_config"]), dict(config["vision_config"])
    text.pop("rope_theta", None)
    text |= {
        "model_type": "lfm2",
        "layer_types": list(model.text_config.layer_types),
        "rope_parameters": {"rope_theta": model.text_config.rope_theta, "rope_type": "default"},
    }
    vision |= {
        "model_type": "siglip2_vision_model",
        "vision_use_head": False,
        # transformers keeps every layer that is counted here
        "num_hidden_layers": model.vision_config.num_hidden_layers,
    }
    old = ("auto_map", "image_token_index", "vision_feature_layer", "tie_embedding")
    return {
        **{key: value for key, value in config.items() if key not in old},
        "model_type": "lfm2_vl",
        "image_token_id": model.image_token_id,
        "projector_use_layernorm": model.projector_use_layernorm,
        "tie_word_embeddings": model.text_config.tie_word_embeddings,
        "text_config": text,
        "vision_config": vision,
    }


def hf_files(source: Path, model: Lfm2VlConfig) -> dict[str, dict[str, Any]]:
    """Processor and tokenizer files as transformers 5.23 writes them, by name."""
    settings = asdict(load_image_processor_config(source, model))
    processor: dict[str, Any] = {"processor_class": "Lfm2VlProcessor"}
    if not settings.pop("use_image_special_tokens"):
        processor["use_image_special_tokens"] = False
    fixed = {
        "image_processor_type": "Lfm2VlImageProcessor",
        "data_format": "channels_first",
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "return_row_col_info": True,
        "max_num_patches": (settings["tile_size"] // settings["encoder_patch_size"]) ** 2,
        "size": {"height": settings["tile_size"], "width": settings["tile_size"]},
    }
    found = {"processor_config.json": {"image_processor": {**settings, **fixed}, **processor}}
    tokenizer = source / "tokenizer_config.json"
    if tokenizer.is_file():
        kept = {key: value for key, value in read_json(tokenizer).items() if key != "auto_map"}
        found[tokenizer.name] = kept
    return found


def generation_config(source: Path, model: Lfm2VlConfig) -> dict[str, Any]:
    """The source's entries; the family's recommended sampling if it gives none."""
    path = source / "generation_config.json"
    given = read_json(path) if path.exists() else {}
    if load_generation_config(source, model).sampling_source != "model card":
        return given
    return {
        **given,
        "do_sample": True,
        "temperature": FAMILY_SAMPLING.temperature,
        "min_p": FAMILY_SAMPLING.min_p,
        "repetition_penalty": FAMILY_SAMPLING.repetition_penalty,
    }
