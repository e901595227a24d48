"""What programs for GPUs do with weights, float32 and attention's bias: the counts that guards stand on."""

import json

import jax
import jax.numpy as jnp
import pytest

from dreamllm_jax.aot.hlo import Program, parse
from dreamllm_jax.aot.products import attention_calls, float32_products, products
from dreamllm_jax.aot.weights import weight_copies, weight_traffic
from dreamllm_jax.commands.main import main
from tests.aot.test_compile import file  # noqa: F401 (a fixture)
from tests.aot.test_gpu import compiled, compiler  # noqa: F401 (a fixture)

pytestmark = [
    pytest.mark.usefixtures("compiler"),
    pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache"),
]

LAYERS, ROWS, WIDTH = 3, 64, 256
WEIGHTS = LAYERS * WIDTH * WIDTH * 2  # bytes in bfloat16


def layers(params: jax.Array, x: jax.Array) -> jax.Array:
    """One product per layer: a scan, whose weights lie in one array."""
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params)[0]


def apart(params: list[jax.Array], x: jax.Array) -> jax.Array:
    """The same with weights that lie layer by layer."""
    for w in params:
        x = jnp.tanh(x @ w)
    return x


def program(function, *shapes, dtype=jnp.bfloat16) -> Program:
    return parse(compiled(function, *shapes, dtype=dtype))


def test_copies_of_a_layers_weights_are_found():
    """Weights in one array are cut out of it, layer by layer; weights that lie apart are read in place."""
    stacked = program(layers, (LAYERS, WIDTH, WIDTH), (ROWS, WIDTH))
    (copy,) = weight_copies(stacked)
    assert (copy.weight, copy.times, copy.cast) == ("params", LAYERS, False)
    traffic = weight_traffic(stacked)
    assert traffic.copied == copy.bytes == pytest.approx(2 * WEIGHTS, rel=1e-4)  # and the layer's number
    assert (traffic.read, traffic.cast) == (WEIGHTS, 0)

    traffic = weight_traffic(program(apart, [(WIDTH, WIDTH)] * LAYERS, (ROWS, WIDTH)))
    assert (traffic.read, traffic.copied, traffic.cast) == (WEIGHTS, 0, 0)


def test_only_weights_count_and_casts_count_apart():
    """A cast array is read as often as it is used, and an array of another name is not a weight."""

    def twice(params, other):
        w = params.astype(jnp.bfloat16)
        x = jax.lax.fori_loop(0, 4, lambda i, x: jnp.tanh(x @ w), other.astype(jnp.bfloat16))
        return x, other.T + 0

    found = program(twice, (WIDTH, WIDTH), (ROWS, WIDTH), dtype=jnp.float32)
    (copy,) = weight_copies(found)
    size = WIDTH * WIDTH
    assert copy.cast and copy.bytes == (4 + 2) * size
    traffic = weight_traffic(found)
    assert (traffic.read, traffic.copied, traffic.cast) == (4 * 2 * size, 0, (4 + 2) * size)
    assert {c.weight for c in weight_copies(found, weights="other")} == {"other"}


def test_products_name_their_dtypes():
    def mixed(params, x):
        with jax.named_scope("tower"):
            wide = x.astype(jnp.float32) @ params.astype(jnp.float32)
        with jax.named_scope("head"):
            return wide, x @ params

    found = program(mixed, (WIDTH, WIDTH), (ROWS, WIDTH))
    both, (wide,) = products(found), float32_products(found)
    assert len(both) == 2 and {p.flops for p in both} == {2 * ROWS * WIDTH * WIDTH}
    assert "tower" in wide.source and {s.dtype for s in wide.operands} == {"f32"}


@pytest.mark.parametrize("biased", [False, True])
def test_attention_with_a_dense_bias_is_found(biased):
    """Forward and backward; causality needs no bias."""

    def loss(q, k, v, bias):
        bias = bias if biased else None
        out = jax.nn.dot_product_attention(q, k, v, bias=bias, is_causal=True, implementation="cudnn")
        return (out.astype(jnp.float32) ** 2).sum()

    shape, dense = (2, 128, 4, 64), (1, 4, 128, 128)
    calls = attention_calls(program(jax.grad(loss, (0, 1, 2)), shape, shape, shape, dense))
    assert [call.kernel.backward for call in calls] == [False, True]
    for call in calls:
        assert (call.kernel.scores, call.kernel.head_dim) == ((2, 4, 128, 128), 64)
        assert (call.kernel.bias.dims if biased else call.kernel.bias) == (dense if biased else None)
        assert call.kernel.mask == "CAUSAL" and "dot_product_attention" in call.source or biased


def test_a_decoding_program_is_reported(file, tmp_path, capsys):  # noqa: F811
    """The loop over tokens depends on data; a token's launches and its weights' traffic are said."""
    command = ["compile", file, "--topology=h100:1", "--program=decode", "--batch-size=1"]
    assert main([*command, f"--out={tmp_path}"]) == 0
    told = capsys.readouterr().out
    assert (
        "a loop whose length depends on data, each" in told
        and "CUDA graphs" in told
        and "moved to copy" in told
    )
    found = json.loads((tmp_path / "compile.json").read_text())["gpu"]
    (token,) = (loop for loop in found["loops"] if loop["turns"] is None)
    assert found["launches"]["kernels"] >= token["turn"]["kernels"] > 20 and token["turn"]["waits"] == 1
    assert found["weights"]["read"] > 2 * 64 * 408  # the head's matrix at least
