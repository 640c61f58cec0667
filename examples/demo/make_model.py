"""Makes the demo model's folder before training: small configs, a tokenizer, random weights.

    python examples/demo/make_model.py --output untrained

Files and layout are those of the published checkpoints, only smaller: tiles of 128 pixels instead
of 512, and about two million weights.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from world import COLORS, NEW_SHAPE, NO_TEXT, PHOTOGRAPH, PHRASES, SHAPES, TOOLS, make_example

from mlx_lfm2vl.models.config import Lfm2VlConfig
from mlx_lfm2vl.models.lfm2_vl import Lfm2VlForConditionalGeneration

SPECIAL = [
    "<|pad|>",
    "<|startoftext|>",
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|tool_list_start|>",
    "<|tool_list_end|>",
    "<|tool_call_start|>",
    "<|tool_call_end|>",
    "<|tool_response_start|>",
    "<|tool_response_end|>",
    "<image>",
    "<|image_start|>",
    "<|image_end|>",
    "<|img_thumbnail|>",
    *(f"<|img_row_{row}_col_{col}|>" for row in range(1, 11) for col in range(1, 11)),
]
TOKENS = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|pad|>",
    "image_token": "<image>",
    "image_start_token": "<|image_start|>",
    "image_end_token": "<|image_end|>",
    "image_thumbnail": "<|img_thumbnail|>",
}
TEMPLATE = """{{- bos_token -}}
{%- if tools and messages[0].role != "system" -%}
    {{- "<|im_start|>system\\nList of tools: " + (tools | tojson) + "<|im_end|>\\n" -}}
{%- endif -%}
{%- for message in messages -%}
    {{- "<|im_start|>" + message.role + "\\n" -}}
    {%- set parts = namespace(text="") -%}
    {%- if message.content is string -%}
        {%- set parts.text = message.content -%}
    {%- else -%}
        {%- for item in message.content -%}
            {%- set parts.text = parts.text + ("<image>" if item.type == "image" else item.text) -%}
        {%- endfor -%}
    {%- endif -%}
    {%- if tools and loop.first and message.role == "system" -%}
        {%- set parts.text = parts.text + "\\nList of tools: " + (tools | tojson) -%}
    {%- endif -%}
    {%- if message.role == "assistant" -%}
        {%- generation -%}
            {{- parts.text + "<|im_end|>" -}}
        {%- endgeneration -%}
        {{- "\\n" -}}
    {%- else -%}
        {{- parts.text + "<|im_end|>\\n" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\\n" -}}
{%- endif -%}
"""
IMAGES = {
    "image_processor_type": "Lfm2VlImageProcessorFast",
    "do_image_splitting": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "do_pad": True,
    "downsample_factor": 2,
    "encoder_patch_size": 16,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "max_image_tokens": 16,
    "min_image_tokens": 4,
    "max_num_patches": 64,
    "max_pixels_tolerance": 2.0,
    "max_tiles": 4,
    "min_tiles": 2,
    "resample": 2,
    "rescale_factor": 1 / 255,
    "return_row_col_info": True,
    "tile_size": 128,
    "use_thumbnail": True,
}


def make_tokenizer() -> Tokenizer:
    """Bytes and merges for the world's words; a coordinate is one token, a digit another."""
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r" ?0\.\d\d(?!\d)| ?\d|\p{Lu}| ?[\p{L}']+| ?[^\s\p{L}\d]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1100,
        min_frequency=20,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    bos = TOKENS["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


def corpus() -> list[str]:
    """Questions and answers of the training split, and every name that they may hold."""
    texts = ["user\n", "assistant\n", "system\n", "tool\n"] * 20
    texts += ["List of tools: " + json.dumps(TOOLS), NO_TEXT, PHOTOGRAPH] * 20
    texts += [f"[0.{place:02}, 0.{place:02}" for place in range(100)] * 30
    for number in range(1500):
        for question, answer in make_example("train", number, turns=4).turns:
            texts += [question, answer if isinstance(answer, str) else json.dumps(answer)]
    for kind in (*SHAPES, NEW_SHAPE):
        for color in COLORS:
            texts += [phrase.format(f"{color} {kind}") for phrase in PHRASES["where"]] * 3
    return texts


def make_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """`config.json`."""
    ids = {name: tokenizer.token_to_id(token) for name, token in TOKENS.items()}
    return {
        "architectures": ["Lfm2VlForConditionalGeneration"],
        "model_type": "lfm2_vl",
        "dtype": "bfloat16",
        "image_token_id": ids["image_token"],
        "downsample_factor": 2,
        "projector_bias": True,
        "projector_hidden_act": "gelu",
        "projector_hidden_size": 256,
        "projector_use_layernorm": False,
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "lfm2",
            "dtype": "bfloat16",
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": 192,
            "intermediate_size": 256,
            "block_auto_adjust_ff_dim": False,
            "num_hidden_layers": 6,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "layer_types": ["conv", "full_attention"] * 3,
            "conv_L_cache": 3,
            "conv_bias": False,
            "norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"},
            "tie_word_embeddings": True,
            "bos_token_id": ids["bos_token"],
            "eos_token_id": ids["eos_token"],
            "pad_token_id": ids["pad_token"],
        },
        "vision_config": {
            "model_type": "siglip2_vision_model",
            "dtype": "bfloat16",
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_channels": 3,
            "num_patches": 64,
            "patch_size": 16,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
            "vision_use_head": False,
        },
    }


def waves(length: int, count: int) -> mx.array:
    """The first cosine waves over a length, (count, length); wave 0 is constant."""
    places = (mx.arange(length) + 0.5) * (math.pi / length)
    return mx.cos(mx.arange(count)[:, None] * places)


def position_table(places: int, hidden: int) -> mx.array:
    """Random sums of waves over rows or columns, (places, hidden), as strong as the picture.

    Positions that start as noise are drowned by the mean colour, which is easier to learn: the
    encoder then spreads that over all patches and never finds out where anything is.
    """
    side = round(places**0.5)
    axis = mx.random.normal((side, side - 1)) @ waves(side, side)[1:]
    axis = mx.random.normal((hidden // 2, side)) @ axis / (side * 2**-0.5)  # (hidden / 2, side)
    rows, columns = mx.repeat(axis.T, side, axis=0), mx.tile(axis[::-1].T, (side, 1))
    return mx.concatenate([rows, columns], axis=1)


def patch_filters(hidden: int, side: int) -> mx.array:
    """Random sums of slow waves over a patch and its colours, (hidden, side·side·3).

    They answer to edges and colours; white noise hardly answers to anything.
    """
    count = 5
    basis = (waves(side, count)[:, None, :, None] * waves(side, count)[None, :, None, :]).reshape(
        count * count, side * side
    )
    basis = basis / mx.linalg.norm(basis, axis=1, keepdims=True)
    strength = mx.concatenate([mx.array([0.15]), mx.ones(count * count - 1)])  # little brightness
    mixed = mx.random.normal((hidden * 3, count * count)) * strength @ basis
    filters = mixed.reshape(hidden, 3, side * side).transpose(0, 2, 1)
    return filters.reshape(hidden, side * side * 3) * FILTER


def random_weights(config: dict[str, Any], seed: int) -> dict[str, mx.array]:
    """Norms at one, biases at zero, maps normal, positions and patch filters as waves."""
    mx.random.seed(seed)
    model = Lfm2VlForConditionalGeneration(Lfm2VlConfig.from_dict(config))

    def fill(name: str, weight: mx.array) -> mx.array:
        if weight.ndim == 1:
            return mx.zeros_like(weight) if name.endswith("bias") else mx.ones_like(weight)
        if name.endswith("position_embedding.weight"):
            return position_table(*weight.shape)
        if name.endswith("patch_embedding.weight"):
            return patch_filters(weight.shape[0], 16)
        # so wide that a map keeps the size of what it maps: from small weights, a model learns
        # one thing after the other, with long waits between
        inputs = 3 if ".conv.conv." in name else weight.shape[1]
        return mx.random.normal(weight.shape) * inputs**-0.5

    return dict(tree_flatten(tree_map_with_path(fill, model.parameters())))


def carried_over(
    weights: dict[str, mx.array], tokenizer: Tokenizer, folder: Path
) -> dict[str, mx.array]:
    """The weights of an earlier demo model under the new vocabulary.

    Tokens keep their rows. A new one begins as the mean of the pieces that it was written with
    before, a coordinate as a sum of waves, so that near ones are alike.
    """
    name = "language_model.model.embed_tokens.weight"
    old = {
        key: value.astype(mx.float32)
        for key, value in mx.load(str(folder / "model.safetensors")).items()
    }
    before = Tokenizer.from_file(str(folder / "tokenizer.json"))
    table, fresh = old[name], weights[name]
    scale = mx.linalg.norm(table, axis=1).mean().item()
    places = waves(100, 12).T @ mx.random.normal((12, fresh.shape[1]))
    places = 0.5 * scale * places / mx.linalg.norm(places, axis=1, keepdims=True)
    rows = [fresh[0]] * fresh.shape[0]
    for token, place in tokenizer.get_vocab().items():
        text = tokenizer.decoder.decode([token])
        pieces = before.encode(text, add_special_tokens=False).ids
        known = before.token_to_id(token)
        rows[place] = table[known] if known is not None else table[mx.array(pieces)].mean(axis=0)
        if known is None and COORDINATE.fullmatch(text):
            first = table[before.encode(text[:-2], add_special_tokens=False).ids[0]]
            rows[place] = 0.5 * first + places[int(text[-2:])]
    return {**old, name: mx.stack(rows)}


COORDINATE = re.compile(r" ?0\.\d\d")
FILTER = 0.3  # makes a picture's edges as strong as its positions


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def write_model(folder: Path, seed: int = 0, weights_from: Path | None = None) -> None:
    """Writes a folder to train from.

    Args:
        seed: of the weights.
        weights_from: an earlier demo model whose weights are taken over.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    config = make_config(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    write_json(folder / "config.json", config)
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4096, **TOKENS}
    write_json(folder / "tokenizer_config.json", names)
    processor = {"processor_class": "Lfm2VlProcessor", "image_processor": IMAGES}
    write_json(folder / "processor_config.json", processor)
    text = config["text_config"]
    ids = {name: text[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", {**ids, "do_sample": False})
    weights = random_weights(config, seed)
    if weights_from is not None:
        weights = carried_over(weights, tokenizer, weights_from)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    total = sum(weight.size for weight in weights.values())
    print(f"{folder}: {total / 1e6:.2f} million weights, {tokenizer.get_vocab_size()} tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the demo model before training.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--weights-from", type=Path, help="folder of an earlier demo model")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: 0)")
    args = parser.parse_args()
    write_model(args.output, args.seed, args.weights_from)


if __name__ == "__main__":
    main()
