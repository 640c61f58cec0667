"""Makes the small checkpoints of this folder and what the official implementation does with them.

Needs Python with transformers 5.23, PyTorch and torchvision, besides numpy and safetensors:

    python tests/checkpoints/make_checkpoints.py

Every layout and spelling that published LFM2-VL checkpoints use occurs once, with random weights,
tiny widths and small image settings. The weights are not stored: `weights.py` makes them from
`tensors.json` when tests run.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pictures import CASES, SOME_CASES, messages
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    Lfm2VlImageProcessor,
    Lfm2VlProcessor,
    PreTrainedTokenizerFast,
)
from weights import TENSORS, files_of, random_values, write_weights

HERE = Path(__file__).parent
BITS = 20  # of what is kept; a tenth of what the comparisons allow
ALL_LOGITS = ("small", "interleaved", "text")  # cases whose every stage is kept
SPECIAL = [
    "<|pad|>",
    "<|startoftext|>",
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|tool_call_start|>",
    "<|tool_call_end|>",
    "<image>",
    *(f"<|img_row_{row}_col_{col}|>" for row in range(1, 11) for col in range(1, 11)),
    "<|img_thumbnail|>",
    "<|image_start|>",
    "<|image_end|>",
]
NAMED = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|pad|>",
    "image_token": "<image>",
    "image_start_token": "<|image_start|>",
    "image_end_token": "<|image_end|>",
    "image_thumbnail": "<|img_thumbnail|>",
}
SENTENCES = """
What is in this image? Describe the picture. There are two red squares and one blue circle.
The cat sits on the table, and the dog sleeps under it. How many of them are there?
user assistant system You are a helpful assistant. Count from one to ten, slowly.
Where is the green triangle? It is to the left of the large yellow star.
""".strip().splitlines()
TEMPLATE = """{{- bos_token -}}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for item in message.content -%}
{{- '<image>' if item.type == 'image' else item.text -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
IMAGE = {
    "tile_size": 64,
    "encoder_patch_size": 16,
    "downsample_factor": 2,
    "min_image_tokens": 2,
    "max_image_tokens": 4,
    "min_tiles": 2,
    "max_tiles": 10,
    "do_image_splitting": True,
    "use_thumbnail": True,
    "max_pixels_tolerance": 2.0,
}
NORMALIZE = {
    "do_normalize": True,
    "do_rescale": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "rescale_factor": 1 / 255,
    "resample": 2,
}


def make_tokenizer(special_last: bool) -> Tokenizer:
    """Bytes and a few merges; special tokens before the text entries or after them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420 if special_last else len(SPECIAL) + 320,
        special_tokens=[] if special_last else SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    bos = NAMED["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


def text_config(tokenizer: Tokenizer, **changes: Any) -> dict[str, Any]:
    """What `Lfm2Config` is called with."""
    return {
        "model_type": "lfm2",
        "vocab_size": tokenizer.get_vocab_size() + 4,  # rows of padding, as in the real ones
        "hidden_size": 32,
        "intermediate_size": 48,
        "block_auto_adjust_ff_dim": True,
        "block_multiple_of": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        "rope_parameters": {"rope_theta": 50_000.0, "rope_type": "default"},
        "bos_token_id": tokenizer.token_to_id(NAMED["bos_token"]),
        "eos_token_id": tokenizer.token_to_id(NAMED["eos_token"]),
        "pad_token_id": tokenizer.token_to_id(NAMED["pad_token"]),
        **changes,
    }


def vision_config(**changes: Any) -> dict[str, Any]:
    """What `Siglip2VisionConfig` is called with."""
    return {
        "model_type": "siglip2_vision_model",
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_patches": 256,
        "patch_size": 16,
        "vision_use_head": False,
        **changes,
    }


def make_model(
    tokenizer: Tokenizer, seed: int, text: dict, vision: dict, **changes: Any
) -> Lfm2VlForConditionalGeneration:
    """The official model with random weights."""
    config = Lfm2VlConfig(
        text_config=text_config(tokenizer, **text),
        vision_config=vision_config(**vision),
        image_token_id=tokenizer.token_to_id("<image>"),
        **{"projector_hidden_size": 40, **changes},
    )
    config._attn_implementation = "eager"
    model = Lfm2VlForConditionalGeneration(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.tensor(random_values(seed, name, tuple(weight.shape))))
    return model


def shapes_of(model: Lfm2VlForConditionalGeneration) -> dict[str, list[int]]:
    """What transformers 5 saves, by name; a tied head is left out."""
    tied = model.config.tie_word_embeddings
    return {
        name: list(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n")


def write_tokenizer(folder: Path, tokenizer: Tokenizer, first: bool) -> None:
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings: dict[str, Any] = {**NAMED, "model_max_length": 1000}
    if first:
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        settings["bos_token"] = {"__type": "AddedToken", "content": NAMED["bos_token"]}
        settings["added_tokens_decoder"] = {
            str(tokenizer.token_to_id(token)): {"content": token, "special": True}
            for token in SPECIAL[:8]
        }
    else:
        settings["tokenizer_class"] = "TokenizersBackend"
    write_json(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def write_processor(folder: Path, image: dict[str, Any], first: bool) -> None:
    nested = {**image, **NORMALIZE, "do_resize": True, "max_num_patches": 1024}
    nested["resample"] = image.get("resample", NORMALIZE["resample"])
    if not first:
        write_json(folder / "processor_config.json", {"image_processor": nested})
        return
    flat = {**image, "max_num_patches": 1024, "use_image_special_tokens": True}
    write_json(folder / "processor_config.json", flat)
    old = {**NORMALIZE, "do_resize": False, "input_data_format": "channels_last"}
    old |= {"max_num_patches": 256, "patch_size": 16, "return_tensors": "pt"}
    write_json(folder / "preprocessor_config.json", old)


def first_config(model: Lfm2VlForConditionalGeneration) -> dict[str, Any]:
    """The first generation's spelling of a config."""
    text = model.config.text_config.to_dict()
    vision = model.config.vision_config.to_dict()
    theta = text.pop("rope_parameters")["rope_theta"]
    hidden = text["hidden_size"]
    old_text = {"rope_theta": theta, "block_ff_dim": text["intermediate_size"], "block_dim": hidden}
    old_text |= {"conv_dim": hidden, "num_heads": text["num_attention_heads"], "use_pos_enc": True}
    old_text |= {"block_use_swiglu": True, "torch_dtype": "float32", "block_norm_eps": 1e-5}
    return {
        "model_type": "lfm2-vl",
        "architectures": ["Lfm2VlForConditionalGeneration"],
        "image_token_index": model.config.image_token_id,
        "torch_dtype": "float32",
        "downsample_factor": 2,
        "projector_bias": True,
        "projector_hidden_act": "gelu",
        "projector_hidden_size": 40,
        "vision_feature_layer": -1,
        "tile_size": 512,  # not read where the processor's own files state it
        "text_config": {**text, **old_text},
        "vision_config": vision,
    }


class Checkpoint:
    """One folder: a model, its processor and its files."""

    def __init__(
        self,
        name: str,
        seed: int,
        *,
        special_last: bool = False,
        first: bool = False,
        text: dict[str, Any] | None = None,
        vision: dict[str, Any] | None = None,
        image: dict[str, Any] | None = None,
        **config: Any,
    ) -> None:
        self.folder = HERE / name
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.seed, self.first = seed, first
        self.tokenizer = make_tokenizer(special_last)
        self.image = {**IMAGE, **(image or {})}
        self.model = make_model(self.tokenizer, seed, text or {}, vision or {}, **config)
        fast = PreTrainedTokenizerFast(tokenizer_object=self.tokenizer, **NAMED)
        self.processor = Lfm2VlProcessor(
            Lfm2VlImageProcessor(**self.image), fast, chat_template=TEMPLATE
        )
        self.config = {**self.model.config.to_dict(), "dtype": "float32"}

    def write(self, **config: Any) -> None:
        """Writes everything; `config` changes entries of config.json, None removes them."""
        data = {k: v for k, v in {**self.config, **config}.items() if v is not None}
        write_json(self.folder / "config.json", data)
        write_tokenizer(self.folder, self.tokenizer, self.first)
        write_processor(self.folder, self.image, self.first)
        eos = self.model.config.text_config.eos_token_id
        write_json(
            self.folder / "generation_config.json",
            {"eos_token_id": [eos] if self.folder.name == "text396" else eos},
        )
        kept = json.loads(TENSORS.read_text()) if TENSORS.exists() else {}
        kept[self.folder.name] = {"seed": self.seed, "shapes": shapes_of(self.model)}
        lines = (f"{json.dumps(name)}: {json.dumps(kept[name])}" for name in sorted(kept))
        TENSORS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        write_weights(self.folder.name)

    def write_cases(self, names: tuple[str, ...]) -> None:
        (self.folder / "cases").mkdir()
        for name in names:
            arrays = packed(run_case(self.model, self.processor, name))
            np.savez_compressed(self.folder / "cases" / f"{name}.npz", **arrays)


def packable(values: torch.Tensor) -> np.ndarray:
    """float32, rounded to 2^-BITS of the largest value: what is left packs better."""
    found = values.numpy()
    step = np.float32(2.0 ** (np.ceil(np.log2(np.abs(found).max())) - BITS))
    return np.round(found / step) * step


def packed(arrays: dict[str, Any]) -> dict[str, np.ndarray]:
    """Arrays as they are kept: results rounded, everything else whole."""
    return {
        name: packable(torch.as_tensor(value))
        if torch.as_tensor(value).is_floating_point()
        else np.asarray(value)
        for name, value in arrays.items()
    }


def as_pictures(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for message in conversation:
        for item in message["content"]:
            if item["type"] == "image":
                item["image"] = Image.fromarray(item["image"])
    return conversation


def run_case(model: Any, processor: Any, name: str) -> dict[str, np.ndarray]:
    """Every stage of the official implementation for one conversation."""
    inputs = processor.apply_chat_template(
        as_pictures(messages(name)),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids = inputs["input_ids"]
    labels = ids.clone()
    labels[:, ::3] = -100
    whole = name in ALL_LOGITS
    with torch.no_grad():
        arrays = {"input_ids": ids[0].numpy()}
        out = model(**inputs, labels=labels, output_hidden_states=True, output_attentions=True)
        arrays["loss"] = out.loss.numpy()
        arrays["logits"] = out.logits[0].numpy() if whole else out.logits[0, -2:].numpy()
        if whole:
            for i, hidden in enumerate(out.hidden_states):
                arrays[f"hidden_{i}"] = hidden[0].numpy()
            for i, weights in enumerate(out.attentions):
                arrays[f"attention_{i}"] = weights[0].numpy()
        if "pixel_values" in inputs:
            arrays |= run_vision(model.model.vision_tower, inputs, whole)
            arrays["features"] = out.image_hidden_states.numpy()
        arrays["greedy"] = greedy_tokens(model, inputs, 12)
    return arrays


def greedy_tokens(model: Any, inputs: Any, count: int) -> np.ndarray:
    """The most likely tokens; each must win clearly, so that rounding cannot change it."""
    model.generation_config.eos_token_id = None
    out = model.generate(
        **inputs,
        max_new_tokens=count,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :].numpy()
    best = torch.cat(out.logits).topk(2).values
    assert len(tokens) == count, "the answer ended early, take another seed"
    assert (best[:, 0] - best[:, 1]).min() > 1e-3, "two tokens are too close, take another seed"
    return tokens


def run_vision(tower: Any, inputs: Any, whole: bool) -> dict[str, np.ndarray]:
    real = inputs["pixel_attention_mask"].bool()
    pixels = inputs["pixel_values"][real]
    arrays = {
        "pixel_values": torch.round((pixels * 0.5 + 0.5) * 255).to(torch.uint8).numpy(),
        "spatial_shapes": inputs["spatial_shapes"].numpy(),
    }
    names = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
    out = tower(**{name: inputs[name] for name in names}, output_hidden_states=True)
    arrays["vision_last"] = out.last_hidden_state[real].numpy()
    if whole:
        for i, hidden in enumerate(out.hidden_states):
            arrays[f"vision_{i}"] = hidden[real].numpy()
    return arrays


def write_text_cases(checkpoint: Checkpoint) -> None:
    """Padding on either side, own positions, embeddings instead of ids, few logits."""
    model, random_ids = checkpoint.model, np.random.default_rng(5).integers(110, 400, (2, 12))
    ids = torch.tensor(random_ids)
    arrays: dict[str, np.ndarray] = {"input_ids": random_ids}
    pad = model.config.text_config.pad_token_id
    with torch.no_grad():
        for side in ("left", "right"):
            mask = torch.ones_like(ids)
            mask[1, slice(0, 5) if side == "left" else slice(7, None)] = 0
            padded = torch.where(mask.bool(), ids, pad)
            arrays[f"{side}_mask"] = mask.numpy()
            arrays[f"{side}_ids"] = padded.numpy()
            labels = torch.where(mask.bool(), ids, -100)
            out = model(input_ids=padded, attention_mask=mask, labels=labels)
            arrays[f"{side}_logits"] = out.logits.numpy()
            arrays[f"{side}_loss"] = out.loss.numpy()
        positions = torch.arange(12)[None] * 3 + torch.tensor([[2], [40]])
        arrays["position_ids"] = positions.numpy()
        arrays["position_logits"] = model(input_ids=ids, position_ids=positions).logits.numpy()
        arrays["logits"] = model(input_ids=ids).logits.numpy()
        embeddings = torch.tensor(packable(model.get_input_embeddings()(ids) * 1.5))
        arrays["inputs_embeds"] = embeddings.numpy()
        arrays["embeds_logits"] = model(inputs_embeds=embeddings).logits.numpy()
        arrays["last_3_logits"] = model(input_ids=ids, logits_to_keep=3).logits.numpy()
    np.savez_compressed(checkpoint.folder / "cases" / "text_model.npz", **packed(arrays))


def make_checkpoints() -> None:
    every = tuple(CASES)
    rope = {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
    first = Checkpoint("first", 3, first=True, text=rope, image={"use_thumbnail": False})
    first.config = first_config(first.model)
    first.write()
    first.write_cases(every)

    v5 = Checkpoint("v5", 2, projector_use_layernorm=False)
    v5.write()
    v5.write_cases(every)
    write_text_cases(v5)

    mlx = Checkpoint("mlx", 2, projector_use_layernorm=False)
    vision = {**mlx.config["vision_config"], "model_type": "lfm2_vl"}
    mlx.write(vision_config=vision)  # the weights of v5, and so its cases

    noprefix = Checkpoint(
        "noprefix", 1, text={"block_auto_adjust_ff_dim": False, "intermediate_size": 40}
    )
    text = {**noprefix.config["text_config"], "layer_types": None, "full_attn_idxs": [1, 3]}
    noprefix.write(text_config=text)
    files = files_of("noprefix")
    weight_map = {key: file for file, weights in files.items() for key in weights}
    index = noprefix.folder / "model.safetensors.index.json"
    write_json(index, {"metadata": {}, "weight_map": weight_map})
    noprefix.write_cases(SOME_CASES)

    head72 = Checkpoint("head72", 1, vision={"hidden_size": 144, "num_attention_heads": 2})
    vision = {**head72.config["vision_config"], "num_hidden_layers": 3}
    head72.write(vision_config=vision, vision_feature_layer=-2)
    head72.write_cases(SOME_CASES)

    untied = Checkpoint("untied", 1, tie_word_embeddings=False)
    untied.write()
    untied.write_cases(SOME_CASES)

    text396 = Checkpoint(
        "text396",
        1,
        special_last=True,
        image={"min_tiles": 1, "resample": 3},
        projector_use_layernorm=False,
    )
    text396.write()
    text396.write_cases(every)


def make_wide() -> None:
    """A checkpoint whose widths divide by 64, for converters; `compare_mlx_vlm.py` goes on."""
    wide = Checkpoint(
        "wide",
        1,
        text={"hidden_size": 64, "vocab_size": 448, "block_multiple_of": 64, **WIDE_SPELLING},
        vision={"hidden_size": 64, "num_attention_heads": 4},
        projector_hidden_size=64,
        projector_use_layernorm=False,
    )
    wide.write(text_config={**wide.config["text_config"], **WIDE_SPELLING})
    wide.write_cases(("small",))


# mlx-vlm goes by these, and they change nothing elsewhere
WIDE_SPELLING = {"block_dim": 64, "conv_dim": 64, "conv_dim_out": 64, "num_heads": 4}


def write_geometry() -> None:
    """What the official code decides for many sizes, with the settings of real checkpoints."""
    numbers = random.Random(11)
    sizes = [(1, 1), (12000, 40), (40, 12000), (724, 724), (725, 721), (512, 512), (1024, 512)]
    sizes += [
        (int(4000 ** numbers.random()) + 1, int(4000 ** numbers.random()) + 1) for _ in range(500)
    ]
    settings = [
        {"min_tiles": 2, "max_pixels_tolerance": 2.0, "use_thumbnail": True},
        {"min_tiles": 2, "max_pixels_tolerance": 1.5, "use_thumbnail": False},
        {"min_tiles": 1, "max_pixels_tolerance": 2.0, "use_thumbnail": True},
    ]
    rows = [[official_geometry(*size, **setting) for size in sizes] for setting in settings]
    data = {"settings": settings, "sizes": sizes, "expected": rows}
    (HERE / "geometry.json").write_text(json.dumps(data, separators=(",", ":")) + "\n")


def official_geometry(width: int, height: int, **setting: Any) -> list[int]:
    """[new width, new height, tile columns, tile rows, tokens]; no tiles are 0 columns and rows."""
    processor = Lfm2VlImageProcessor(**setting)
    area = {"max_image_tokens": 256, "encoder_patch_size": 16, "downsample_factor": 2}
    new_width, new_height = processor.smart_resize(height, width, min_image_tokens=64, **area)
    tolerance = setting["max_pixels_tolerance"]
    if not processor._is_image_too_large(height, width, max_pixels_tolerance=tolerance, **area):
        cols = rows = 0
    else:
        cols, rows, *_ = processor._get_grid_layout(height, width, setting["min_tiles"], 10, 512)
    joined = Lfm2VlProcessor.__new__(Lfm2VlProcessor)
    tile = joined._compute_tokens_per_tile(512, 16, 2)
    whole = joined._compute_tokens_for_image([new_height, new_width], 16, 2)
    text = Lfm2VlProcessor._build_image_tokens(
        _TokenNames(), max(rows, 1), max(cols, 1), tile, whole, setting["use_thumbnail"], True
    )
    return [new_width, new_height, cols, rows, text.count("|") // 2 + text.count("#")]


class _TokenNames:
    image_token = "#"
    image_start_token = "|start|"
    image_end_token = "|end|"
    image_thumbnail_token = "|thumbnail|"


if __name__ == "__main__":
    make_checkpoints()
    make_wide()
    write_geometry()
