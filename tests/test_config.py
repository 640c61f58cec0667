"""Every spelling and merge of configuration files, settled in one place."""

import copy
import json

import pytest

from mlx_lfm2vl import ConfigError, ImageOptions, ImageProcessorConfig, Lfm2VlConfig
from mlx_lfm2vl.checkpoints.settings import load_generation_config, load_image_processor_config
from mlx_lfm2vl.options import FAMILY_SAMPLING, SamplingConfig

BASE = {
    "model_type": "lfm2_vl",
    "image_token_id": 7,
    "text_config": {
        "model_type": "lfm2",
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "vision_config": {
        "model_type": "siglip2_vision_model",
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 27,
        "num_attention_heads": 3,
    },
}


def config(text=None, vision=None, **top) -> Lfm2VlConfig:
    """The base with changes; None removes an entry."""
    data = copy.deepcopy(BASE)
    for part, changes in (
        (data["text_config"], text),
        (data["vision_config"], vision),
        (data, top),
    ):
        part.update(changes or {})
        for key in [key for key, value in part.items() if value is None]:
            del part[key]
    return Lfm2VlConfig.from_dict(data)


def test_no_arguments_resemble_the_1_6b():
    default = Lfm2VlConfig()
    assert default.text_config.hidden_size == 2048
    assert default.text_config.feed_forward_size == 8192
    assert default.vision_config.hidden_size == 1152
    assert default.projector_hidden_size == 2560
    assert default.image_token_id == 396
    assert default.projector_use_layernorm


@pytest.mark.parametrize("model_type", ["lfm2-vl", "lfm2_vl"])
@pytest.mark.parametrize("vision", ["siglip2_vision_model", "lfm2_vl"])
def test_model_types(model_type, vision):
    assert config(model_type=model_type, vision={"model_type": vision}) == config()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ({"intermediate_size": 12288}, 8192),
        ({"intermediate_size": 6656}, 4608),
        ({"intermediate_size": 6656, "block_ff_dim": 12288}, 8192),
        ({"intermediate_size": None, "block_ff_dim": 12288}, 8192),
        ({"intermediate_size": 10752, "block_auto_adjust_ff_dim": False}, 10752),
        ({"intermediate_size": 96, "block_multiple_of": 10}, 70),
        ({"intermediate_size": 96, "block_multiple_of": 10, "block_ffn_dim_multiplier": 1.5}, 100),
    ],
)
def test_feed_forward_width(text, size):
    assert config(text).text_config.feed_forward_size == size


def test_spellings_of_text():
    base = config().text_config
    assert base.rope_theta == 1e6
    assert config({"rope_theta": 5e5}).text_config.rope_theta == 5e5
    nested = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    assert config(nested).text_config.rope_theta == 5e5
    assert config({**nested, "rope_theta": 5e5}).text_config.rope_theta == 5e5
    indices = {"layer_types": None, "full_attn_idxs": [1]}
    assert config(indices).text_config == base
    assert config({"num_heads": 4, "block_dim": 32}).text_config == base
    assert config({"tie_embedding": False}).text_config.tie_word_embeddings is False
    assert config(tie_embedding=False).text_config.tie_word_embeddings is False
    # transformers writes both; the head belongs to the whole model
    both = config({"tie_word_embeddings": True}, tie_word_embeddings=False)
    assert both.text_config.tie_word_embeddings is False


def test_spellings_at_the_top():
    assert config(image_token_id=None, image_token_index=7) == config()
    assert config(image_token_index=7) == config()
    assert config(torch_dtype="float16").dtype == config(dtype="float16").dtype == "float16"
    assert config({"torch_dtype": "float16"}).dtype == "float16"
    assert config().dtype == "bfloat16"
    assert config(eos_token_id=[5, 6]).eos_token_ids == (5, 6)
    assert config({"eos_token_id": 7}, eos_token_id=[5, 6]).eos_token_ids == (7,)
    settings = {"group_size": 64, "bits": 4}
    assert config(quantization=settings).quantization == settings
    assert config(quantization_config=settings).quantization == settings
    assert config(quantization_config=settings, quantization=settings).quantization == settings


@pytest.mark.parametrize(
    ("layers", "layer", "kept"), [(27, -1, 27), (27, -2, 26), (26, -1, 26), (27, 25, 26)]
)
def test_26_of_27_vision_layers(layers, layer, kept):
    made = config(vision={"num_hidden_layers": layers}, vision_feature_layer=layer)
    assert made.vision_config.num_hidden_layers == kept


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llava"}, "model_type is 'llava'; it must be lfm2_vl or lfm2-vl"),
        ({"text": {"model_type": "llama"}}, "text_config.model_type is 'llama'"),
        ({"vision": {"model_type": "clip"}}, "vision_config.model_type is 'clip'"),
        ({"image_token_index": 8}, "image_token_id is 7 but image_token_index is 8"),
        (
            {"text": {"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}}},
            "rope_theta is 1.0",
        ),
        ({"text": {"rope_parameters": {"rope_type": "yarn"}}}, "rope_type is 'yarn'"),
        ({"text": {"full_attn_idxs": [0]}}, r"attention at \[1\], full_attn_idxs says \[0\]"),
        ({"text": {"full_attn_idxs": [9], "layer_types": None}}, r"full_attn_idxs is \[9\]"),
        ({"text": {"layer_types": None}}, "layer_types is None"),
        ({"text": {"layer_types": ["conv"]}}, "3 times full_attention or conv"),
        ({"text": {"num_key_value_heads": 3}}, "num_key_value_heads is 3"),
        ({"text": {"hidden_size": 33}}, "hidden_size is 33"),
        ({"text": {"vocab_size": None}}, "text_config.vocab_size is missing"),
        ({"vision": {"hidden_size": None}}, "vision_config.hidden_size is missing"),
        ({"vision": {"num_patches": 200}}, "num_patches is 200; it must be a square"),
        ({"vision_feature_layer": 27}, "vision_feature_layer is 27"),
        ({"dtype": "float16", "torch_dtype": "float32"}, "dtype is float16 but"),
        ({"projector_bias": "yes"}, "projector_bias is 'yes'; it must be of type bool"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
        (
            {"eos_token_id": [7, -1]},
            r"eos_token_id is \[7, -1\]; it must be token ids, each a whole",
        ),
        ({"eos_token_id": 10**12}, "eos_token_id is 1000000000000; it must be token ids"),
        ({"quantization": {"bits": 4, "mode": "fp1"}}, "quantization.mode is 'fp1'"),
    ],
)
def test_what_cannot_be_names_file_key_and_values(changes, message):
    with pytest.raises(ConfigError, match=rf"^config\.json: .*{message}"):
        config(**changes)


def merged(folder, config_json=None, **files) -> ImageProcessorConfig:
    (folder / "config.json").write_text(json.dumps(config_json or {}))
    for name, data in files.items():
        (folder / f"{name}.json").write_text(json.dumps(data))
    return load_image_processor_config(folder, Lfm2VlConfig())


def test_neither_file_is_a_superset(tmp_path):
    settings = merged(
        tmp_path,
        {"max_tiles": 8, "min_tiles": 5},
        processor_config={"max_pixels_tolerance": 1.5, "min_tiles": 3},
        preprocessor_config={"resample": 3, "image_mean": [0.1, 0.2, 0.3], "patch_size": 16},
    )
    assert settings == ImageProcessorConfig(
        max_pixels_tolerance=1.5,
        min_tiles=3,
        max_tiles=8,
        resample=3,
        image_mean=(0.1, 0.2, 0.3),
    )


def test_entries_without_effect(tmp_path):
    settings = merged(
        tmp_path,
        processor_config={"image_processor": {"max_num_patches": 1024, "do_resize": True}},
        preprocessor_config={
            **{"do_resize": False, "input_data_format": "channels_last"},
            **{"return_tensors": "pt", "max_num_patches": 256},
        },
    )
    assert settings == ImageProcessorConfig()


@pytest.mark.parametrize("nested", [True, False])
def test_tiling_is_on_until_the_user_turns_it_off(nested, tmp_path):
    leftover = {"do_image_splitting": False, "use_thumbnail": False, "min_tiles": 3}
    settings = merged(
        tmp_path, processor_config={"image_processor": leftover} if nested else leftover
    )
    assert settings == ImageProcessorConfig(min_tiles=3)
    off = ImageOptions(do_image_splitting=False).apply(settings)
    assert off.do_image_splitting is False


def test_files_that_contradict_each_other(tmp_path):
    with pytest.raises(ConfigError, match=r"tile_size is 512 in processor_config\.json and 256 in"):
        merged(
            tmp_path, processor_config={"tile_size": 512}, preprocessor_config={"tile_size": 256}
        )
    with pytest.raises(ConfigError, match="encoder_patch_size is 8 in"):
        merged(tmp_path, processor_config={"encoder_patch_size": 8}, preprocessor_config={})


def generation(folder, **data):
    (folder / "generation_config.json").write_text(json.dumps(data))
    return load_generation_config(folder, config({"eos_token_id": 9}))


def test_recommended_sampling(tmp_path):
    assert load_generation_config(tmp_path, config({"eos_token_id": 9})).eos_token_ids == (9,)
    only_ids = generation(tmp_path, eos_token_id=[3, 4], pad_token_id=0)
    assert only_ids.eos_token_ids == (3, 4)
    assert only_ids.sampling == FAMILY_SAMPLING
    assert only_ids.sampling_source == "model card"
    stated = generation(tmp_path, do_sample=True, temperature=0.2, top_k=50, repetition_penalty=1.0)
    assert stated.sampling == SamplingConfig(temperature=0.2, top_k=50)
    assert stated.sampling_source == "generation_config.json"
    assert stated.eos_token_ids == (9,)
    assert generation(tmp_path, do_sample=False, temperature=0.7).sampling.temperature == 0
    assert generation(tmp_path, top_p=0.9).sampling == SamplingConfig(temperature=1.0, top_p=0.9)
    with pytest.raises(ConfigError, match="temperature is 'hot'"):
        generation(tmp_path, temperature="hot")
