"""The next-token loss, computed for some positions at a time, with its gradients in the same pass.

The gradient of the summed loss is known as soon as the logits are: the probabilities, minus one at the
target. So each chunk of logits is computed once, used for the loss and for the gradients of the hidden states
and the head, and forgotten. Autodiff would compute it a second time in the backward pass.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from dreamllm_jax.ops.linear import linear
from dreamllm_jax.sharding import activation_spec, mesh_axes


def chunked_cross_entropy(
    head: Float[Array, "D V"],
    hidden: Float[Array, "B L D"],
    targets: Int[Array, "B L"],
    weights: Float[Array, "B L"],
    chunk: int,
    gathered: bool = False,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the weighted sums of the next-token cross-entropy (nats) and of the correct predictions.

        sum_bl w[b, l] * (logsumexp_v(x[b, l]) - x[b, l, target[b, l]]),   x = hidden @ head

    With two positions of weights 1 and 0, logits log([1, 3]) and log([1, 1]), and targets 1 and 0, the result
    is (log(4/3), 1): the second position does not count.

    The logits x (float32) exist for `chunk` positions of every row at a time, and once: [B, L, V] is never in
    memory. In bfloat16 their gradient is rounded before it is multiplied by, as in PyTorch's mixed precision.
    The weights get no gradient.

    On a mesh every device computes its own rows, positions and part of the vocabulary (Megatron-LM, arXiv
    1909.08053, section 3). Devices exchange three numbers per position, the gradient of the hidden states if
    the vocabulary is divided, and the `head`, which is gathered along fsdp once, and its gradient scattered
    once. `gathered` says that the head is replicated along fsdp already.
    """
    sums: Any = _cross_entropy(head, hidden, targets, weights, chunk, gathered)
    return sums


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(
    head: Array, hidden: Array, targets: Array, weights: Array, chunk: int, gathered: bool
) -> tuple[Array, Array]:
    return _on_mesh(head, hidden, targets, weights, chunk, gathered, (False, False))[:2]


def _forward(head: Any, hidden: Any, targets: Any, weights: Any, chunk: int, gathered: bool) -> tuple:
    wanted = head.perturbed, hidden.perturbed
    values = head.value, hidden.value, targets.value, weights.value
    loss, right, *gradients = _on_mesh(*values, chunk, gathered, wanted)
    return (loss, right), (gradients, head.value, hidden.value)


def _backward(chunk: int, gathered: bool, saved: tuple, cotangents: tuple) -> tuple:
    gradients, *values = saved
    if isinstance(cotangents[0], SymbolicZero):
        return None, None, None, None
    scaled = [
        None if gradient is None else (gradient.astype(jnp.float32) * cotangents[0]).astype(value.dtype)
        for gradient, value in zip(gradients, values, strict=True)
    ]
    return *scaled, None, None


_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _on_mesh(
    head: Array,
    hidden: Array,
    targets: Array,
    weights: Array,
    chunk: int,
    gathered: bool,
    wanted: tuple[bool, bool],
) -> tuple[Array, Array, Array | None, Array | None]:
    """Returns the two sums and the gradients of head and hidden states, where they are wanted."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _sums(head, hidden, targets, weights, chunk, wanted)
    rows = activation_spec(("batch", "length", None), hidden.shape, mesh)
    columns = activation_spec((None, "vocab"), head.shape, mesh)
    batch_axes = tuple(name for entry in rows for name in mesh_axes(entry))
    sliced = not gathered and "fsdp" in batch_axes and head.shape[0] % mesh.shape["fsdp"] == 0
    parts = math.prod(mesh.shape[name] for name in mesh_axes(rows[1]))
    vocab_axis = "tensor" if columns[1] else None
    replicated = tuple(name for name in batch_axes if name != "fsdp" or not sliced)  # axes of the whole head

    def local(head: Array, hidden: Array, targets: Array, weights: Array) -> tuple:
        if sliced:
            head = jax.lax.all_gather(head, "fsdp", axis=0, tiled=True)
        head = _varying(head, replicated)
        loss, right, d_head, d_hidden = _sums(
            head, hidden, targets, weights, -(-chunk // parts), wanted, vocab_axis, batch_axes
        )
        if d_head is not None and sliced:
            d_head = jax.lax.psum_scatter(d_head, "fsdp", scatter_dimension=0, tiled=True)
        if d_head is not None and replicated:
            d_head = jax.lax.psum(d_head, replicated)
        sums = jax.lax.psum((loss, right), batch_axes) if batch_axes else (loss, right)
        return *sums, d_head, d_hidden

    head_spec = PartitionSpec("fsdp" if sliced else None, columns[1])
    return jax.shard_map(
        local,
        in_specs=(head_spec, rows, *[PartitionSpec(*rows[:2])] * 2),
        out_specs=(
            PartitionSpec(),
            PartitionSpec(),
            head_spec if wanted[0] else None,
            rows if wanted[1] else None,
        ),
    )(head, hidden, targets, weights)


def _sums(
    head: Array,
    hidden: Array,
    targets: Array,
    weights: Array,
    chunk: int,
    wanted: tuple[bool, bool],
    vocab_axis: str | None = None,
    batch_axes: tuple[str, ...] = (),
) -> tuple[Array, Array, Array | None, Array | None]:
    """Returns the results of one device; the mesh axes are those of the vocabulary, rows and positions.

    The gradient of the head is summed over chunks in float32, and not over devices.
    """
    length, vocab_axes = hidden.shape[1], (vocab_axis,) if vocab_axis else ()
    # `linear` does not support the types of a mesh.
    matmul = jnp.matmul if batch_axes or vocab_axes else linear
    chunk = min(chunk, length)
    pad = -length % chunk

    def chunks(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    def body(sums: tuple, x: tuple[Array, Array, Array]) -> tuple[tuple, Array | None]:
        hidden_c, targets_c, weights_c = x
        logits, gradients = _logits(_varying(hidden_c.astype(head.dtype), vocab_axes), head, matmul)
        losses, right, d_logits = _token_losses(logits, targets_c, vocab_axis)
        d_head = d_hidden = None
        if any(wanted):
            d_hidden, d_head = gradients(d_logits * weights_c[..., None])
            d_hidden = jax.lax.psum(d_hidden, vocab_axis) if vocab_axis else d_hidden
            d_head = d_head if wanted[0] else None
            d_hidden = d_hidden.astype(hidden.dtype) if wanted[1] else None
        found = jnp.sum(losses * weights_c), jnp.sum(right * weights_c), d_head
        return jax.tree.map(jnp.add, sums, found), d_hidden

    zero, d_head = _varying(jnp.zeros((), jnp.float32), batch_axes), None
    if wanted[0]:
        d_head = _varying(jnp.zeros(head.shape, jnp.float32), (*batch_axes, *vocab_axes))
    parts = chunks(hidden), chunks(targets), chunks(weights)
    (loss, right, d_head), d_hidden = jax.lax.scan(body, (zero, zero, d_head), parts)
    if d_hidden is not None:
        d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(len(hidden), -1, hidden.shape[-1])[:, :length]
    return loss, right, None if d_head is None else d_head.astype(head.dtype), d_hidden


def _varying(x: Array, axes: tuple[str, ...]) -> Array:
    """Marks x, which is equal on all devices of `axes`, as varying over them."""
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def _logits(
    hidden: Float[Array, "B l D"], head: Float[Array, "D v"], matmul: Callable[..., Array]
) -> tuple[Float[Array, "B l v"], Callable[[Array], tuple[Array, Array]]]:
    """Returns float32 logits, and the map from their gradient to those of hidden states and head (float32).

    Products are in the dtype of the operands.
    """
    if hidden.dtype == jnp.float32:
        return jax.vjp(matmul, hidden, head)

    def gradients(d_logits: Array) -> tuple[Array, Array]:
        d_logits = d_logits.astype(hidden.dtype)
        d_head = jnp.einsum("bld,blv->dv", hidden, d_logits, preferred_element_type=jnp.float32)
        return jnp.matmul(d_logits, head.T), d_head

    return jnp.matmul(hidden, head, preferred_element_type=jnp.float32), gradients


def _token_losses(
    logits: Float[Array, "B l v"], targets: Int[Array, "B l"], vocab_axis: str | None
) -> tuple[Float[Array, "B l"], Bool[Array, "B l"], Float[Array, "B l v"]]:
    """Returns the cross-entropy, whether the target is the likeliest token, and the loss's gradient.

    `logits` and their gradient are of this device's part of the vocabulary.
    """
    size = logits.shape[-1]
    first = 0 if vocab_axis is None else size * jax.lax.axis_index(vocab_axis)

    def over_vocabulary(collective: Callable[..., Array], x: Array) -> Array:
        return x if vocab_axis is None else collective(x, vocab_axis)

    largest = over_vocabulary(jax.lax.pmax, logits.max(-1))
    powers = jnp.exp(logits - largest[..., None])
    total = over_vocabulary(jax.lax.psum, powers.sum(-1))
    is_target = jnp.arange(size) == (targets - first)[..., None]  # gathers and scatters are slow on TPUs
    target_logit = over_vocabulary(jax.lax.psum, jnp.where(is_target, logits, 0.0).sum(-1))
    losses = jnp.log(total) + largest - target_logit
    return losses, target_logit == largest, powers / total[..., None] - is_target
