"""The published checkpoints have the tensors and the settings that the package reads."""

from dataclasses import replace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_lfm2vl import ImageProcessorConfig
from mlx_lfm2vl.checkpoints.names import is_mlx_layout, mlx_name
from mlx_lfm2vl.checkpoints.settings import load_generation_config, load_image_processor_config
from mlx_lfm2vl.models.config import Lfm2Config, Lfm2VlConfig, Siglip2VisionConfig, load_config
from mlx_lfm2vl.models.lfm2_vl import Lfm2VlForConditionalGeneration
from mlx_lfm2vl.options import FAMILY_SAMPLING, SamplingConfig

from .helpers import NAMES, PUBLISHED, inventory, shape

if not PUBLISHED.exists():
    pytest.skip("needs ../shared/checkpoints", allow_module_level=True)

VISION_27 = Siglip2VisionConfig(num_hidden_layers=27)
TEXT_3B = Lfm2Config(
    feed_forward_size=10752,
    num_hidden_layers=30,
    layer_types=tuple(
        "full_attention" if i in (2, 5, 9, 13, 17, 21, 24, 27) else "conv" for i in range(30)
    ),
)
NO_NORM = {"projector_hidden_size": 2048, "projector_use_layernorm": False}
# checkpoints whose config.json is not at hand, from the table of their sizes
CONFIGS = {
    "LFM2-VL-1.6B": Lfm2VlConfig(),
    "LFM2-VL-3B": Lfm2VlConfig(TEXT_3B, VISION_27),
    "LFM2.5-VL-3B": Lfm2VlConfig(replace(TEXT_3B, vocab_size=128_000), VISION_27, **NO_NORM),
}


def test_models_have_exactly_the_published_tensors():
    for name in NAMES:
        has_exactly_the_published_tensors(name)


def has_exactly_the_published_tensors(name):
    config = CONFIGS.get(name) or load_config(PUBLISHED / name)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = Lfm2VlForConditionalGeneration(config)
    ours = {key: array.shape for key, array in tree_flatten(model.parameters())}
    published = {row[3]: shape(row[4]) for row in inventory(name)}
    assert ours == published
    assert mx.get_peak_memory() - before < 1_000_000, "building the model allocated weights"


def test_names_are_translated_from_every_layout():
    for name in NAMES:
        for leading in ("model.", ""):
            are_translated(inventory(name), leading)


def are_translated(rows, leading):
    for row in rows:
        hf_name = leading + row[0].removeprefix("model.")
        assert mlx_name(hf_name) == row[3]
        assert mlx_name(hf_name.replace(".vision_model.", ".")) == row[3]
        assert mlx_name(row[3]) == row[3]
    assert is_mlx_layout(row[3] for row in rows)
    assert not is_mlx_layout(row[0] for row in rows)


def test_parameter_count_of_the_table():
    counts = {
        "LFM2-VL-450M": 450_822_656,
        "LFM2-VL-1.6B": 1_584_804_000,
        "LFM2-VL-3B": 2_998_975_216,
        "LFM2.5-VL-450M": 448_718_848,
    }
    for name, count in counts.items():
        config = CONFIGS.get(name) or load_config(PUBLISHED / name)
        model = Lfm2VlForConditionalGeneration(config)
        assert sum(array.size for _, array in tree_flatten(model.parameters())) == count


def test_image_settings_of_the_published_files(tmp_path):
    for name, min_tiles, thumbnail, tolerance, resample in [
        ("LFM2-VL-450M", 2, False, 2.0, 2),
        ("LFM2.5-VL-450M", 2, True, 2.0, 2),
        ("LFM2.5-VL-1.6B", 2, True, 2.0, 2),
        ("LFM2-VL-1.6B", 2, True, 1.5, 2),
        ("LFM2.5-VL-3B", 1, True, 2.0, 3),
    ]:
        folder = tmp_path / name
        folder.mkdir()
        for path in (PUBLISHED / name).glob("*processor_config.json"):
            (folder / path.name).write_text(path.read_text())
        (folder / "config.json").write_text("{}")
        settings = load_image_processor_config(folder, Lfm2VlConfig())
        assert settings == ImageProcessorConfig(
            min_tiles=min_tiles,
            use_thumbnail=thumbnail,
            max_pixels_tolerance=tolerance,
            resample=resample,
        ), name


def test_published_generation_configs():
    small = load_generation_config(PUBLISHED / "LFM2.5-VL-450M", Lfm2VlConfig())
    assert (small.sampling, small.eos_token_ids) == (FAMILY_SAMPLING, (7,))
    large = load_generation_config(PUBLISHED / "LFM2.5-VL-3B", Lfm2VlConfig())
    assert large.sampling == SamplingConfig(temperature=0.2, top_k=50)
    assert large.eos_token_ids == (124900,)
    for name in ("LFM2-VL-450M", "LFM2.5-VL-450M", "LFM2.5-VL-1.6B"):
        made = load_config(PUBLISHED / name)
        assert made.image_token_id == 396
        assert made.dtype == "bfloat16"
