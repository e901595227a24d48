"""The losses against their plainest implementations."""

import functools
import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from dreamllm_jax.config.train import LossConfig, MeshConfig
from dreamllm_jax.sharding import activation_spec, make_mesh, parameter_spec
from dreamllm_jax.train.cross_entropy import chunked_cross_entropy
from dreamllm_jax.train.losses import (
    contrastive_loss,
    distillation_errors,
    kl_to_unit_gaussian,
    loss_scale,
)

B, L, D, V = 3, 10, 6, 7


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    hidden, kernel = rng.normal(size=(B, L, D)), rng.normal(size=(D, V))
    targets = rng.integers(0, V, (B, L)).astype(np.int32)
    weights = (rng.random((B, L)) < 0.6) * rng.choice([0.5, 1.0], (B, L))
    return hidden.astype(np.float32), kernel.astype(np.float32), targets, weights.astype(np.float32)


def chunked(hidden, kernel, targets, weights, chunk):
    return chunked_cross_entropy(kernel, hidden, targets, weights, chunk)


@pytest.fixture(scope="module")
def plain(inputs):
    """Returns the loss and the correct predictions in numpy, float64."""
    hidden, kernel, targets, weights = (np.asarray(x, np.float64) for x in inputs)
    logits = hidden @ kernel
    chosen = np.take_along_axis(logits, targets.astype(int)[..., None], -1)[..., 0]
    losses = np.log(np.exp(logits).sum(-1)) - chosen
    return (losses * weights).sum(), ((logits.argmax(-1) == targets) * weights).sum()


@pytest.mark.parametrize("chunk", [1, 3, 4, 5, 9, 10, 11, 512])
def test_chunks_change_neither_loss_nor_gradients(inputs, plain, chunk):
    @functools.partial(jax.jit, static_argnums=4)
    def run(*args):
        return jax.value_and_grad(chunked, (0, 1), has_aux=True)(*args)

    (loss, right), grads = run(*inputs, chunk)
    np.testing.assert_allclose(loss, plain[0], rtol=1e-6)
    np.testing.assert_allclose(right, plain[1], rtol=1e-6)
    hidden, kernel, targets, weights = inputs
    shares = np.exp(hidden @ kernel)
    shares = (shares / shares.sum(-1, keepdims=True) - np.eye(V)[targets]) * weights[..., None]
    np.testing.assert_allclose(grads[0], shares @ kernel.T, atol=2e-6)
    np.testing.assert_allclose(grads[1], np.einsum("bld,blv->dv", hidden, shares), atol=1e-5)


@pytest.mark.parametrize("chunk", [2, 3])
def test_logits_of_a_whole_row_are_never_held(inputs, chunk):
    """No intermediate value of the forward or backward program has that size."""
    run = jax.grad(lambda *args: chunked(*args, chunk)[0], (0, 1))
    sizes = set()

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            sizes.update(getattr(v.aval, "shape", ()) for v in equation.outvars)
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                visit(inner)

    visit(jax.make_jaxpr(run)(*inputs).jaxpr)
    with_vocabulary = {shape for shape in sizes if shape and shape[-1] == V and len(shape) > 2}
    assert (B, chunk, V) in with_vocabulary
    assert max(np.prod(shape) for shape in with_vocabulary) == B * chunk * V


def test_low_precision_matrices_give_float32_losses(inputs):
    hidden, kernel, targets, weights = inputs
    half = jnp.asarray(kernel, jnp.bfloat16)
    loss, _ = chunked_cross_entropy(half, *map(jnp.asarray, (hidden, targets, weights)), 4)
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in (hidden, kernel)]
    logits = rounded[0] @ rounded[1]
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, (losses * weights).sum(), rtol=1e-5)


@pytest.mark.parametrize("chunk", [4, 16])
def test_low_precision_gradients_are_those_of_rounded_logit_gradients(inputs, chunk):
    hidden, kernel, targets, weights = inputs
    half_hidden, half_kernel = (jnp.asarray(x, jnp.bfloat16) for x in (hidden, kernel))
    run = jax.jit(jax.grad(lambda *args: chunked(*args, chunk)[0], (0, 1)))
    d_hidden, d_kernel = run(half_hidden, half_kernel, targets, weights)
    assert d_hidden.dtype == d_kernel.dtype == jnp.bfloat16
    hidden, kernel = (np.asarray(x, np.float32) for x in (half_hidden, half_kernel))
    shares = np.exp(hidden @ kernel)
    shares = (shares / shares.sum(-1, keepdims=True) - np.eye(V)[targets]) * weights[..., None]
    shares = np.asarray(jnp.asarray(shares, jnp.bfloat16), np.float32)
    np.testing.assert_allclose(np.asarray(d_hidden, np.float32), shares @ kernel.T, rtol=1e-2, atol=2e-3)
    wanted = np.einsum("bld,blv->dv", hidden, shares)
    np.testing.assert_allclose(np.asarray(d_kernel, np.float32), wanted, rtol=1e-2, atol=5e-3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("argnums", "products"), [((0, 1), 3), ((0,), 2), ((), 1)])
def test_logits_are_computed_once_and_gradients_only_where_wanted(argnums, products, dtype):
    """Of the products with the vocabulary; a frozen head, for example, has no gradient."""
    rng = np.random.default_rng(3)
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in ((2, 64, 96), (96, 128))]
    loss = functools.partial(chunked, chunk=64)
    run = jax.grad(lambda *args: loss(*args)[0], argnums) if argnums else loss
    compiled = jax.jit(run).lower(*arrays, jnp.zeros((2, 64), jnp.int32), jnp.ones((2, 64))).compile()
    assert compiled.cost_analysis()["flops"] / (2 * 2 * 64 * 96 * 128) == pytest.approx(products, rel=0.1)


def test_correct_predictions_have_no_gradient(inputs):
    gradients = jax.grad(lambda *args: chunked(*args, 4)[1], (0, 1))(*map(jnp.asarray, inputs))
    assert all((g == 0).all() for g in gradients)


MESHES = {
    "8 fsdp": MeshConfig(1, 8),
    "8 tensor": MeshConfig(1, 1, 8),
    "2 data, 2 fsdp, 2 tensor": MeshConfig(2, 2, 2),
    "2 fsdp, 2 tensor, 2 context": MeshConfig(1, 2, 2, 2),
    "8 context": MeshConfig(1, 1, 1, 8),
}


def on_mesh(mesh, rows=8, length=16, width=24, vocabulary=112, dtype=jnp.float32):
    """Returns the jitted value and gradients, and their sharded arguments."""
    rng = np.random.default_rng(1)
    hidden, kernel = rng.normal(size=(rows, length, width)), rng.normal(size=(width, vocabulary))
    targets = rng.integers(0, vocabulary, (rows, length)).astype(np.int32)
    targets[:, ::2] = (hidden @ kernel).argmax(-1)[:, ::2]  # half of them predicted
    weights = rng.choice([0.0, 0.5, 1.0], (rows, length)).astype(np.float32)
    arguments = kernel.astype(dtype), hidden.astype(dtype), targets, weights
    if mesh is not None:
        specs = [parameter_spec("llama/lm_head/kernel", kernel.shape, mesh)]
        specs += [activation_spec(("batch", "length", None)[: x.ndim], x.shape, mesh) for x in arguments[1:]]
        arguments = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arguments, specs, strict=True)]
    run = jax.value_and_grad(lambda *x: chunked_cross_entropy(*x, 4), (0, 1), has_aux=True)
    return jax.jit(run), arguments


@pytest.mark.parametrize("rows", [8, 3])
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_meshes_change_neither_loss_nor_gradients(mesh, rows, devices):
    run, arguments = on_mesh(None, rows)
    (loss, right), grads = run(*arguments)
    mesh = make_mesh(mesh, devices)
    with jax.set_mesh(mesh):
        run, arguments = on_mesh(mesh, rows)
        (loss2, right2), grads2 = run(*arguments)
    np.testing.assert_allclose(loss, loss2, rtol=1e-6)
    assert 0 < right == right2
    for one, other in zip(grads, grads2, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("mesh", ["8 tensor", "2 fsdp, 2 tensor, 2 context"])
def test_meshes_change_low_precision_gradients_by_rounding_only(mesh, devices):
    run, arguments = on_mesh(None, dtype=jnp.bfloat16)
    (loss, _), grads = run(*arguments)
    mesh = make_mesh(MESHES[mesh], devices)
    with jax.set_mesh(mesh):
        run, arguments = on_mesh(mesh, dtype=jnp.bfloat16)
        (loss2, _), grads2 = run(*arguments)
    np.testing.assert_allclose(loss, loss2, rtol=1e-5)
    for one, other in zip(grads, grads2, strict=True):
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        np.testing.assert_allclose(one, other, rtol=2e-2, atol=0.01 * np.abs(one).max())


@pytest.mark.parametrize("mesh", ["8 fsdp", "2 data, 2 fsdp, 2 tensor", "2 fsdp, 2 tensor, 2 context"])
def test_nothing_of_the_vocabulary_travels_but_its_matrix_once(mesh, devices):
    """No collective in a loop involves the head. Outside, it is gathered, and its gradient summed, once."""
    mesh = make_mesh(MESHES[mesh], devices)
    with jax.set_mesh(mesh):
        run, arguments = on_mesh(mesh)
        text = run.lower(*arguments).compile().as_text()
    part = 112 // mesh.shape["tensor"]
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf"= \(?\w+\[([\d,]*)\].* ({kinds})(?:-start)?\(.*op_name=\"([^\"]*)", text)
    assert found
    wide = [(kind, name) for shape, kind, name in found if str(part) in shape.split(",")]
    assert wide and not [name for _, name in wide if "while" in name]
    assert sum(kind == "all-gather" for kind, _ in wide) <= 1
    assert sum(kind in ("all-reduce", "reduce-scatter") for kind, _ in wide) <= 2


def test_distillation_errors():
    rng = np.random.default_rng(1)
    prediction, target = rng.normal(size=(2, 3, 4, 4, 2)).astype(np.float32)
    weights = np.array([1.0, 0.0, 0.25], np.float32)
    errors = distillation_errors(
        jnp.asarray(prediction, jnp.bfloat16), jnp.asarray(target), jnp.asarray(weights)
    )
    rounded = np.asarray(jnp.asarray(prediction, jnp.bfloat16), np.float32)
    np.testing.assert_allclose(errors, ((rounded - target) ** 2).reshape(3, -1).mean(1) * weights, rtol=1e-5)
    assert errors.dtype == jnp.float32 and errors[1] == 0


@pytest.mark.parametrize(("scale", "expected"), [("none", 1.0), ("l1", 7.0), ("l2", 5.0)])
def test_loss_scale(scale, expected):
    assert loss_scale(LossConfig(weight_lm=3.0, weight_vm=4.0, scale=scale)) == expected


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def test_contrastive_loss_with_all_texts_different():
    rng = np.random.default_rng(2)
    image, text = unit(rng.normal(size=(4, 5))), unit(rng.normal(size=(4, 5)))
    logits = 3.0 * image @ text.T
    both = [np.log(np.exp(m).sum(1)) - np.diag(m) for m in (logits, logits.T)]
    loss, right = contrastive_loss(
        *map(jnp.asarray, (image, text, np.float32(3.0), np.eye(4, dtype=np.float32)))
    )
    np.testing.assert_allclose(loss, sum(both).sum() / 2, rtol=1e-5)
    assert right == (logits.argmax(1) == np.arange(4)).sum()


def test_equal_texts_are_all_right():
    """Images of the same text share its probability, and any of them counts as a match."""
    text = unit(np.eye(4)[[0, 1, 1, 2]])
    same = (text @ text.T).astype(np.float32)
    loss, right = contrastive_loss(*map(jnp.asarray, (text, text, np.float32(50.0), same)))
    np.testing.assert_allclose(loss, 2 * np.log(2), rtol=1e-4)  # two rows choose among two equals
    assert right == 4
    swapped, wrong = contrastive_loss(*map(jnp.asarray, (text, text[::-1].copy(), np.float32(50.0), same)))
    assert swapped > 50 and wrong == 2


def test_kl_to_unit_gaussian():
    mean, logvar = np.zeros((2, 2, 2, 3), np.float32), np.zeros((2, 2, 2, 3), np.float32)
    mean[1, 0, 0, 0], logvar[1, 1, 1, 2] = 2.0, 1.0
    kl = kl_to_unit_gaussian(jnp.asarray(mean), jnp.asarray(logvar))
    np.testing.assert_allclose(kl, [0.0, 0.5 * 4 + 0.5 * (np.e - 2)], rtol=1e-6)


def test_examples_of_docstrings():
    """Two positions, of which the second has no weight."""
    logits, weights = jnp.log(jnp.array([[[1.0, 3.0], [1.0, 1.0]]])), jnp.array([[1.0, 0.0]])
    loss, correct = chunked(logits, jnp.eye(2), jnp.array([[1, 0]]), weights, 2)
    np.testing.assert_allclose([loss, correct], [np.log(4 / 3), 1], rtol=1e-6)
    assert loss_scale(LossConfig(weight_lm=3.0, weight_vm=4.0, scale="l1")) == 7
    assert loss_scale(LossConfig(weight_lm=3.0, weight_vm=4.0, scale="l2")) == 5
