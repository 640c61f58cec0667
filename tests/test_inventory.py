"""The published checkpoints hold exactly the tensors that the model asks for."""

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_lfm2vl.checkpoints.names import is_mlx_layout, mlx_name
from mlx_lfm2vl.models.config import Lfm2Config, Lfm2VlConfig, Siglip2VisionConfig, load_config
from mlx_lfm2vl.models.lfm2_vl import Lfm2VlForConditionalGeneration

CHECKPOINTS = Path(__file__).parents[2] / "shared" / "checkpoints"
pytestmark = pytest.mark.skipif(not CHECKPOINTS.exists(), reason="needs ../shared/checkpoints")

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
NAMES = [
    "LFM2-VL-450M",
    "LFM2-VL-1.6B",
    "LFM2-VL-3B",
    "LFM2.5-VL-450M",
    "LFM2.5-VL-1.6B",
    "LFM2.5-VL-3B",
]


def inventory(name: str) -> list[list[str]]:
    lines = (CHECKPOINTS / name / "tensor_inventory.tsv").read_text().splitlines()
    return [line.split("\t") for line in lines[1:]]


def shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(","))


def test_models_have_exactly_the_published_tensors():
    for name in NAMES:
        has_exactly_the_published_tensors(name)


def has_exactly_the_published_tensors(name):
    config = CONFIGS.get(name) or load_config(CHECKPOINTS / name)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = Lfm2VlForConditionalGeneration(config)
    ours = {key: array.shape for key, array in tree_flatten(model.parameters())}
    published = {row[3]: shape(row[4]) for row in inventory(name)}
    assert ours == published
    assert mx.get_peak_memory() - before < 1_000_000, "building the model allocated weights"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("leading", ["model.", ""])
def test_names_are_translated_from_every_layout(name, leading):
    rows = inventory(name)
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
        config = CONFIGS.get(name) or load_config(CHECKPOINTS / name)
        model = Lfm2VlForConditionalGeneration(config)
        assert sum(array.size for _, array in tree_flatten(model.parameters())) == count
