"""What a GPU computes in one kernel, run here: as the CPU's way, and as the definition."""

import re

import mlx.core as mx
import numpy as np
import pytest

from mlx_lfm2vl.models import layers

GPU = ("metal", "cuda")
VALUES = np.concatenate([np.linspace(-30, 30, 5001), [-1e4, -200, -90, 90, 200, 1e4, 0, 1e-4]])


def gelu(x, on):
    return layers.gelu_tanh_kernel(x, on)


def silu(x, on):
    return layers.swiglu_kernel(x, mx.ones_like(x), on)


@pytest.mark.parametrize("on", GPU)
@pytest.mark.parametrize("function", [gelu, silu])
def test_a_gpu_computes_the_same(function, on):
    x = mx.array(VALUES, mx.float32)
    one, other = np.asarray(function(x, "cpu")), np.asarray(function(x, on))
    assert np.all(np.abs(one - other) <= 1e-6 * np.maximum(1, np.abs(one)))
    small = x.astype(mx.bfloat16)
    # bits as numbers: neighbours differ by one
    bits = [np.asarray(function(small, way).view(mx.int16)).astype(np.int32) for way in ("cpu", on)]
    same_sign = (bits[0] < 0) == (bits[1] < 0)
    tiny = np.abs(np.asarray(function(small, on).astype(mx.float32))) < 1e-27
    assert np.all((np.abs(bits[0] - bits[1]) <= 1) & same_sign | tiny)


@pytest.mark.parametrize("on", GPU)
@pytest.mark.parametrize("function", [gelu, silu])
def test_a_gpu_has_the_same_gradients(function, on):
    x = mx.array(VALUES, mx.float32)
    one, other = (
        np.asarray(mx.grad(lambda values, way=way: function(values, way).sum())(x))
        for way in ("cpu", on)
    )
    assert np.isfinite(other).all()
    assert np.allclose(one, other, rtol=1e-5, atol=1e-6)


def kernels(output, tmp_path):
    path = tmp_path / "graph.dot"
    mx.export_to_dot(str(path), output)
    names = re.findall(r'label ="(\w+)", shape=rectangle', path.read_text())
    return [name for name in names if name not in ("Slice", "Transpose", "Split", "Broadcast")]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_one_kernel_each(dtype, tmp_path):
    x = mx.random.normal((1, 4, 6)).astype(dtype)
    mx.eval(x)
    assert len(kernels(layers.gelu_tanh_kernel(x, "metal"), tmp_path)) == 1
    assert len(kernels(layers.swiglu_kernel(x, x, "metal"), tmp_path)) == 1
    inputs, weights = [x[:, i : i + 2] for i in range(3)], mx.split(x[:, :3], 3, axis=1)
    mx.eval(inputs, weights)
    for bias in (None, mx.array([1.0] * 6, dtype)):
        assert len(kernels(layers.gated_sum(x[:, :2], inputs, weights, bias), tmp_path)) == 1


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_compiled_convolution_is_the_plain_one_to_the_bit(size, dtype):
    x = mx.random.normal((2, 9, 40)).astype(dtype)
    gate, bias = (mx.random.normal(shape).astype(dtype) for shape in ((2, 5, 40), (40,)))
    weights = mx.split(mx.random.normal((1, size, 40)).astype(dtype), size, axis=1)
    inputs = [x[:, i : i + 5] for i in range(size)]
    expected = inputs[0] * weights[0]
    for one, weight in zip(inputs[1:], weights[1:], strict=True):
        expected = expected + one * weight
    assert mx.array_equal(layers.gated_sum(gate, inputs, weights, None), gate * expected)
    assert mx.array_equal(layers.gated_sum(gate, inputs, weights, bias), gate * (expected + bias))


def test_the_backend_is_asked_when_a_function_is_called(monkeypatch):
    """Not when a trace was made for another one."""
    x = mx.array([1.5, -2.0])
    assert layers.backend() == "cpu"
    layers.swiglu(x, x)
    asked = []
    monkeypatch.setattr(layers, "backend", lambda: "metal")
    monkeypatch.setattr(layers, "swiglu_kernel", lambda gate, up, on: asked.append(on))
    layers.swiglu(x, x)
    assert asked == ["metal"]
