"""The small layers that every tower shares: linear maps, embeddings, norms, activations, remat.

The modules are Flax's own; what stands here are the project's defaults (float32 compute, exact
variances), the names by which configs choose, and the one way layers are scanned.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dreamllm_jax.sharding import platform

M = TypeVar("M", bound=type[nn.Module])
Activation = Callable[[jax.Array], jax.Array]


def Dense(features: int, use_bias: bool = True, dtype: Any = jnp.float32, **options: Any) -> nn.Dense:
    """`x @ kernel + bias` over the last axis; kernel [in, out], computed in `dtype`."""
    return nn.Dense(features, use_bias, dtype, **{"dot_general": _dot_general, **options})


def _dot_general(x: jax.Array, kernel: jax.Array, dimensions: Any, precision: Any = None) -> jax.Array:
    assert dimensions == (((x.ndim - 1,), (0,)), ((), ())) and precision is None
    return linear(x, kernel)


def linear(
    x: Float[Array, "*rows c"], kernel: Float[Array, "c c2"], preferred_element_type: Any = None
) -> Float[Array, "*rows c2"]:
    """`x @ kernel`, in the form that suits the backend; the type of the result is x's unless given."""
    same = preferred_element_type in (None, x.dtype)
    if same and x.dtype == kernel.dtype and platform() == "cpu":
        one_row = x.size == x.shape[-1] and x.size % 2 == 0 and x.dtype == jnp.float32
        return _row_product(x, kernel) if one_row else product(x, kernel)
    dimensions = (((x.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, kernel, dimensions, preferred_element_type=preferred_element_type)


@jax.custom_vjp
def product(x: Float[Array, "*rows c"], kernel: Float[Array, "c c2"]) -> Float[Array, "*rows c2"]:
    """`x @ kernel`; reverse-mode differentiation only.

    The kernel's gradient is written as the product that gives it as it lies. Autodiff turns another around,
    for which XLA's CPU backend, within a scan over layers, copies an operand and takes half as long again:
    a train step of `benchmarks.beside_torch` was a tenth slower.
    """
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _product_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(x, kernel), (x, kernel)


def _product_backward(saved: tuple[jax.Array, jax.Array], d_out: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    first, last = tuple(range(x.ndim - 1)), tuple(range(1, x.ndim))
    d_x = jax.lax.dot_general(d_out, kernel, (((x.ndim - 1,), (1,)), ((), ())))
    # The smaller one is turned, and apart: left to itself XLA merges what follows into slower forms.
    small, large = (x, d_out) if x.shape[-1] <= d_out.shape[-1] else (d_out, x)
    turned = jax.lax.optimization_barrier(jnp.moveaxis(small, -1, 0))
    d_kernel = jax.lax.dot_general(turned, large, ((last, first), ((), ())))
    return d_x, d_kernel if small is x else jax.lax.optimization_barrier(d_kernel).T


product.defvjp(_product_forward, _product_backward)


def _row_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x @ kernel` of one float32 row, as the sum of two halves: XLA's CPU backend gives each half a thread.

    A row by itself has one, and `python -m benchmarks.beside_torch decode` of one row takes a quarter longer.
    """
    halves = jax.lax.dot_general(
        x.reshape(2, 1, -1), kernel.reshape(2, -1, kernel.shape[-1]), (((2,), (1,)), ((0,), (0,)))
    )
    return halves.sum(0).reshape(*x.shape[:-1], -1)


def Embed(number: int, features: int, dtype: Any = jnp.float32, **options: Any) -> nn.Embed:
    """Rows of `embedding` [number, features] by integer id; drawn from N(0, 0.02^2)."""
    options = {"embedding_init": nn.initializers.normal(0.02), **options}
    return nn.Embed(number, features, dtype, **options)


def LayerNorm(epsilon: float = 1e-5, dtype: Any = jnp.float32, **options: Any) -> nn.LayerNorm:
    """Layer normalization over the last axis, statistics in float32 (arXiv 1607.06450)."""
    return nn.LayerNorm(epsilon, dtype, use_fast_variance=False, **options)


def RMSNorm(epsilon: float = 1e-6, dtype: Any = jnp.float32, **options: Any) -> nn.RMSNorm:
    """`scale * x / sqrt(mean(x^2) + epsilon)` over the last axis, in float32 (arXiv 1910.07467)."""
    return nn.RMSNorm(epsilon, dtype, **options)


def _rounded_once(function: Activation) -> Activation:
    """An activation computed in float32 and rounded at its end; for the gradient x alone is kept."""

    @functools.wraps(function)
    def activation(x: Float[Array, "..."]) -> Float[Array, "..."]:
        if x.dtype == jnp.float32:
            return function(x)
        return jax.checkpoint(lambda y: function(y.astype(jnp.float32)).astype(y.dtype))(x)

    return activation


@_rounded_once
def silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x * sigmoid(x)` (arXiv 1702.03118)."""
    return x * jax.nn.sigmoid(x)


@_rounded_once
def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x * sigmoid(1.702 x)`, the activation of OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


@_rounded_once
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Exact GELU, by the error function (arXiv 1606.08415)."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Activation] = {
    "silu": silu,
    "quick_gelu": quick_gelu,
    "gelu": gelu,
}


def _weighted(primitive: Any, *inputs: Any, **parameters: Any) -> Any:
    """A policy that saves the results of matrix products with weights and of convolutions."""
    if primitive is jax.lax.conv_general_dilated_p:
        return True
    if primitive.name == "custom_vjp_call":  # `product` and `conv.canonical` hold one of the two
        inside = parameters["call_jaxpr"].eqns
        return len(inside) == 1 and _weighted(inside[0].primitive, **inside[0].params)
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *inputs, **parameters)


POLICIES = {
    "dots": _weighted,
    "minimal": jax.checkpoint_policies.save_only_these_names("attended"),
    "full": None,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def remat(module: M, policy: str, scanned: bool = True) -> M:
    """Wraps a layer's class so that its backward pass computes again what `policy` does not save.

        none     everything is saved, nothing computed again
        dots     the layer's input, results of matrix products with weights, results of convolutions
        minimal  the input and what attention returns: attention is not computed again
        full     the input alone
        offload  the input alone, and it waits in the host's memory

    The layer names its parts by `jax.ad_checkpoint.checkpoint_name`: "layer_input", "attended". `scanned`
    says that it is the body of a scan, where XLA cannot merge the second computation with the first and
    needs no barrier against it.

    Raises:
      ValueError: an unknown policy.
    """
    if policy == "none":
        return module
    if policy not in POLICIES:
        raise ValueError(f"remat policy {policy!r} is unknown; choose none, {', '.join(POLICIES)}.")
    return nn.remat(module, prevent_cse=not scanned, policy=POLICIES[policy])


def scan_layers(module: M, length: int, policy: str, inputs: int) -> M:
    """The class of `length` equal layers, scanned: one compiled body, parameters stacked on axis 0.

    The layer's call is `(carry, *inputs) -> (carry, output | None)`; its `inputs` further arguments
    are the same for every layer. Each layer is rematerialized under `policy` (see `remat`).
    """
    return nn.scan(
        remat(module, policy),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast,) * inputs,
        length=length,
    )
