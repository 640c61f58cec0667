"""How many kernels a GPU is handed for a token: counted from the graph, as the benchmark does."""

import importlib.util
from pathlib import Path

import mlx.core as mx
import pytest

PER_TOKEN = 9  # embedding 4, mask 2, norm, vocabulary, choice
PER_ATTENTION = 16
PER_CONVOLUTION = 10


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[1] / "benchmarks" / "dispatches.py"
    spec = importlib.util.spec_from_file_location("dispatches", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("layers", "attention"), [(1, (0,)), (4, (1, 3)), (5, (2,))])
def test_kernels_of_a_decode_step(script, layers, attention):
    model = script.our_model(layers, attention)
    with script.as_on("metal"):
        found = script.dispatches(lambda: script.our_step(model))
    convolutions = layers - len(attention)
    expected = PER_TOKEN + PER_ATTENTION * len(attention) + PER_CONVOLUTION * convolutions
    assert found.total() == expected, found


def test_fewer_kernels_than_mlx_lm(script):
    """Each with the layers of LFM2-VL-450M."""
    ours, theirs = script.count(script.OURS), script.count(script.MLX_LM)
    assert theirs.total() == 273
    assert ours.total() == 205
    # keys and values of the token before are written, too
    assert script.count(script.OURS, sets=2) - ours == {"ScatterAxis": 12}


def test_what_is_counted(script):
    x, weight = mx.ones((2, 8)), mx.ones(8)
    mx.eval(x, weight)

    def views():
        return x.reshape(4, 4).T[1:].reshape(1, 3, 4).squeeze()

    assert script.dispatches(views).total() == 0
    assert script.dispatches(lambda: mx.concatenate([x, x + 1, x])).total() == 4
    assert script.dispatches(lambda: mx.fast.rms_norm(x, weight, 1e-5) @ x.T).total() == 2
    assert script.dispatches(lambda: mx.compile(lambda a: a * a + a)(x)).total() == 1
