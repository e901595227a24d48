"""The convolution for CPUs: gradients against autodiff, on one device and a mesh; values against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dreamllm_jax.ops import cpu
from dreamllm_jax.ops.conv import Conv, xla_convolution

# (height, width), kernel size, stride, padding
SHAPES = [
    ((8, 8), 3, 1, (1, 1)),
    ((5, 7), 3, 1, (1, 1)),
    ((8, 8), 3, 2, (1, 1)),
    ((7, 5), 3, 2, (1, 1)),
    ((8, 6), 3, 2, (0, 1)),
    ((4, 4), 1, 1, (0, 0)),
    ((8, 8), 4, 4, (0, 0)),
    ((1, 1), 3, 2, (1, 1)),
]


def example(sides, size, stride, padding, rows=4):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(rows, *sides, 6)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(size, size, 6, 5)), jnp.float32)
    out = jax.eval_shape(lambda x, k: xla_convolution(x, k, stride, padding), x, kernel)
    return x, kernel, jnp.asarray(rng.normal(size=out.shape), jnp.float32)


def gradients(form, stride, padding):
    def backward(x, kernel, d_out):
        out, pull = jax.vjp(lambda x, k: form(x, k, stride, padding), x, kernel)
        return out, *pull(d_out)

    return jax.jit(backward)


def assert_close(actual, expected):
    """Asserts equality up to float32 rounding of the largest values."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-6 * np.abs(e).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_autodiff(shape):
    arrays = example(*shape)
    assert_close(
        gradients(cpu.convolution, *shape[2:])(*arrays), gradients(xla_convolution, *shape[2:])(*arrays)
    )


def test_gradients_in_a_scan_equal_those_outside():
    x, kernel, d_out = example(*SHAPES[2])

    def loss(kernel):
        outs = jax.lax.map(lambda row: cpu.convolution(row[None], kernel, 2, (1, 1))[0], x)
        return (outs * d_out).sum()

    assert_close(jax.jit(jax.grad(loss))(kernel), gradients(xla_convolution, 2, (1, 1))(x, kernel, d_out)[2])


def test_rows_split_over_devices_change_nothing(devices):
    arrays = example(*SHAPES[0], rows=8)
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    rows, replicated = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    split = jax.device_put(arrays, (rows, replicated, rows))
    assert_close(
        gradients(cpu.convolution, 1, (1, 1))(*split), gradients(xla_convolution, 1, (1, 1))(*arrays)
    )


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
    x = jnp.ones((1, 4, 4, 3))
    module = Conv(2, dtype=jnp.bfloat16)
    params = module.init(jax.random.key(0), x)
    grads = jax.grad(lambda p: module.apply(p, x).astype(jnp.float32).sum())(params)
    assert module.apply(params, x).dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((params, grads))} == {jnp.dtype("float32")}


@pytest.mark.parity
@pytest.mark.parametrize("stride", [1, 2])
def test_parity_with_torch(stride):
    torch = pytest.importorskip("torch")
    x, kernel, _ = example((7, 8), 3, stride, (1, 1))
    expected = torch.nn.functional.conv2d(
        torch.tensor(np.asarray(x)).permute(0, 3, 1, 2),
        torch.tensor(np.asarray(kernel)).permute(3, 2, 0, 1),
        stride=stride,
        padding=1,
    )
    assert_close(cpu.convolution(x, kernel, stride, (1, 1)), expected.permute(0, 2, 3, 1).numpy())
