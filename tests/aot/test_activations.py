"""The activations that are kept for the backward pass, in programs compiled for CPUs."""

import functools

import jax
import jax.numpy as jnp
import pytest

from dreamllm_jax.aot.activations import activations
from dreamllm_jax.aot.hlo import parse

LAYERS, ROWS, WIDTH = 5, 24, 16
ONE = ROWS * WIDTH * 4  # bytes of a layer's output


def layer(x, kernel):
    return jnp.sin(x @ kernel), None


def loss(kernels, x, body):
    return jax.lax.scan(body, x, kernels)[0].sum()


def waiting(function, *inputs):
    return activations(parse(jax.jit(function).lower(*inputs).compile().as_text()))


@pytest.fixture
def inputs():
    return jnp.ones((LAYERS, WIDTH, WIDTH)), jnp.ones((ROWS, WIDTH))


def test_a_scan_keeps_its_states(inputs):
    """Each layer keeps its input and the derivative of the sine, but no weights and no backward results."""
    assert waiting(jax.grad(functools.partial(loss, body=layer)), *inputs) == 2 * LAYERS * ONE


def test_rematerialization_keeps_the_inputs_of_layers(inputs):
    body = jax.checkpoint(layer, prevent_cse=False)
    assert waiting(jax.grad(functools.partial(loss, body=body)), *inputs) == LAYERS * ONE


def test_the_micro_batches_of_a_loop_wait_one_by_one(inputs):
    kernels, x = inputs

    def accumulated(kernels, parts):
        def add(total, part):
            return total + jax.grad(functools.partial(loss, body=layer))(kernels, part), None

        return jax.lax.scan(add, jnp.zeros_like(kernels), parts)[0]

    assert waiting(accumulated, kernels, x.reshape(4, ROWS // 4, WIDTH)) == 2 * LAYERS * ONE / 4


def test_nothing_waits_where_nothing_is_differentiated(inputs):
    assert waiting(functools.partial(loss, body=layer), *inputs) == 0
