"""Forms of operations that exist only for XLA's CPU backend, and the rule for their use.

Each form computes what its definition elsewhere in `ops` computes. It differs in the order of the arithmetic,
in layout, or in which values are stored, because the CPU backend compiles that into faster code. Programs for
other platforms use the definitions as they are. The figures compare a program with and without the form, on
two cores:

    matmul                the weight gradient as one product without a transposed result
                          (one train step of `benchmarks.beside_torch` takes 10% longer without it)
    row_matmul            the product of a single row, split over two threads
                          (`benchmarks.beside_torch decode` of one row takes 25% longer without it)
    convolution           gradients in the layout of the forward pass
                          (inside `lax.scan`, autodiff's gradients take 50 times as long: `benchmarks.conv`)
    head_major_attention  no transposed operands, fewer passes over the scores, hidden blocks left out
                          (with `matmul`, a small joint train step takes 0.7 of the time it takes without)

`matmul`, `convolution` and `head_major_attention` are differentiable in reverse mode only.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from dreamllm_jax.sharding import platform


def is_target() -> bool:
    """Returns whether the program that is being traced is for CPUs."""
    return platform() == "cpu"


def linear(x: Float[Array, "*rows c"], kernel: Float[Array, "c c2"]) -> Float[Array, "*rows c2"]:
    """Returns `x @ kernel` for operands of one dtype: by `row_matmul` for one row that allows it."""
    one_row = x.size == x.shape[-1] and x.size % 2 == 0 and x.dtype == jnp.float32
    return row_matmul(x, kernel) if one_row else matmul(x, kernel)


def row_matmul(x: Float[Array, "*ones c"], kernel: Float[Array, "c c2"]) -> Float[Array, "*ones c2"]:
    """Returns `x @ kernel` of one row of even width, as the sum of two half products.

    The backend uses one thread for the product of a single row. The two halves are a batch, and each gets a
    thread.
    """
    halves = jax.lax.dot_general(
        x.reshape(2, 1, -1), kernel.reshape(2, -1, kernel.shape[-1]), (((2,), (1,)), ((0,), (0,)))
    )
    return halves.sum(0).reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def matmul(x: Float[Array, "*rows c"], kernel: Float[Array, "c c2"]) -> Float[Array, "*rows c2"]:
    """Returns `x @ kernel`, with a weight gradient that is computed in the layout in which it is stored.

    Autodiff computes the transposed weight gradient and transposes the result. For that product, inside a
    scan over layers, the CPU backend copies an operand and takes half as long again.
    """
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _matmul_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return matmul(x, kernel), (x, kernel)


def _matmul_backward(saved: tuple[Array, Array], d_out: Array) -> tuple[Array, Array]:
    x, kernel = saved
    first, last = tuple(range(x.ndim - 1)), tuple(range(1, x.ndim))
    d_x = jax.lax.dot_general(d_out, kernel, (((x.ndim - 1,), (1,)), ((), ())))
    # Transpose the smaller operand, behind a barrier: without one, XLA fuses this into slower forms.
    small, large = (x, d_out) if x.shape[-1] <= d_out.shape[-1] else (d_out, x)
    transposed = jax.lax.optimization_barrier(jnp.moveaxis(small, -1, 0))
    d_kernel = jax.lax.dot_general(transposed, large, ((last, first), ((), ())))
    return d_x, d_kernel if small is x else jax.lax.optimization_barrier(d_kernel).T


matmul.defvjp(_matmul_forward, _matmul_backward)


_convolution = functools.partial(
    jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC")
)  # the layout that the backend runs fast


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolution(x: Array, kernel: Array, stride: int, padding: tuple[int, int]) -> Array:
    """Returns what `conv.xla_convolution` returns, with gradients in the layout of the forward pass.

    The backend runs a convolution fast in the layout rows, height, width, channels only. Outside of loops it
    converts other layouts to it, inside of loops (gradient accumulation) it does not. The gradients that
    autodiff derives have other layouts. These have the same values to the last bit.
    """
    return _convolution(x, kernel, (stride,) * 2, (padding,) * 2)


def _convolution_forward(
    x: Array, kernel: Array, stride: int, padding: tuple[int, int]
) -> tuple[Array, tuple[Array, Array]]:
    return convolution(x, kernel, stride, padding), (x, kernel)


def _convolution_backward(
    stride: int, padding: tuple[int, int], saved: tuple[Array, Array], d_out: Array
) -> tuple[Array, Array]:
    """Returns the gradients of x and of the kernel.

    The gradient of x is `d_out` convolved with the flipped kernel; that of the kernel is x convolved with
    `d_out`. Both are padded such that the result has the size of the array that it is the gradient of.
    """
    x, kernel = saved
    before = padding[0]
    sides = list(zip(x.shape[1:3], kernel.shape[:2], d_out.shape[1:3], strict=True))
    after = [size - 1 + before - (outputs - 1) * stride for size, _, outputs in sides]
    d_x = _convolution(
        d_out,
        jnp.flip(kernel, (0, 1)).swapaxes(2, 3),
        (1, 1),
        [(k - 1 - before, a) for (_, k, _), a in zip(sides, after, strict=True)],
        lhs_dilation=(stride,) * 2,
    )
    d_kernel = _convolution(
        x.transpose(3, 1, 2, 0),
        d_out.transpose(1, 2, 0, 3),
        (1, 1),
        [(before, k - 1 - a) for (_, k, _), a in zip(sides, after, strict=True)],
        rhs_dilation=(stride,) * 2,
    )
    return d_x, d_kernel.transpose(1, 2, 0, 3)


convolution.defvjp(_convolution_forward, _convolution_backward)


# The scores of one head for this many queries fit into a core's cache.
QUERY_BLOCK = 64
# Every block is compiled separately, so that more would mean long compilation.
MAX_QUERY_BLOCKS = 8


def head_major_attention(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "#B 1 L S"] | None = None,
    causal: bool = False,
    name_output: bool = True,
) -> Float[Array, "B L N H"]:
    """Returns `softmax(q k^T / sqrt(H)) v`. A query whose keys are all masked gets an arbitrary result.

    Heads are moved before the length first, so that no product transposes its operands. Arrays of the size of
    the scores are read and written as seldom as possible: the sum of the weights divides the result instead
    of the weights, and of these arrays the backward pass keeps only the weights.

    `causal` promises that `mask` hides key j from query i < j, and that L = S. Queries are then processed in
    at most 8 blocks, each with only the keys up to its end. 150 causal queries, for example, are three
    blocks: queries 0 to 63 with 64 keys, queries 64 to 127 with 128, queries 128 to 149 with 150.

    With `name_output` the result is named "attention_output" for rematerialization (see `ops.scan`).
    """
    rows, length, heads, width = q.shape
    grouped = q.reshape(rows, length, k.shape[2], -1, width).transpose(0, 2, 3, 1, 4)
    grouped_mask = None if mask is None else mask[:, :, None]
    step = min(length, max(QUERY_BLOCK, -(-length // MAX_QUERY_BLOCKS))) if causal else length
    keys, values = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    out = cast(Array, _attend(grouped, keys, values, grouped_mask, step, name_output))
    return out.transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q: Array, k: Array, v: Array, mask: Array | None, step: int, name_output: bool) -> Array:
    """Returns [B, K, G, L, H] for queries of that shape, keys and values [B, K, S, H], mask [#B, 1, 1, L, S].

    Blocks have `step` queries. If that is fewer than L, the block that starts at i has the keys before i +
    step.
    """
    return _attend_forward(q, k, v, mask, step, name_output)[0]


def _blocks(length: int, keys: int, step: int) -> list[tuple[slice, slice]]:
    """Returns the blocks, each as the slice of its queries and the slice of their keys."""
    if step == length:
        return [(slice(0, length), slice(0, keys))]
    ends = [(first, min(first + step, length)) for first in range(0, length, step)]
    return [(slice(first, end), slice(0, end)) for first, end in ends]


def _attend_forward(
    q: Array, k: Array, v: Array, mask: Array | None, step: int, name_output: bool
) -> tuple[Array, tuple[Array | None | list[Array], ...]]:
    scaled = q * q.shape[-1] ** -0.5
    outs, kept, totals = [], [], []
    for queries, keys in _blocks(q.shape[-2], k.shape[-2], step):
        scores = _scores(scaled[..., queries, :], k[..., keys, :])
        if mask is not None:
            scores = jnp.where(mask[..., queries, keys], scores, jnp.finfo(scores.dtype).min)
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        kept.append(weights)
        totals.append(weights.sum(-1, keepdims=True))
        outs.append(jnp.einsum("bkgls,bksh->bkglh", weights, v[..., keys, :]))
    total = jnp.concatenate(totals, -2)
    out = jnp.concatenate(outs, -2) / total
    out = checkpoint_name(out, "attention_output") if name_output else out
    return out, (q, k, v, kept, total, out)


def _scores(q: Array, k: Array) -> Array:
    """Returns `q k^T` [B, K, G, L, S]; for one query it is computed as `k q`.

    In the other order XLA would transpose all keys for the sake of one query.
    """
    if q.shape[3] > 1:
        return jnp.einsum("bkglh,bksh->bkgls", q, k)
    scores = jax.lax.dot_general(k, q[:, :, :, 0], (((3,), (3,)), ((0, 1), (0, 1))))
    return jnp.moveaxis(scores, -1, -2)[:, :, :, None]


def _attend_backward(
    step: int, name_output: bool, saved: tuple[Any, ...], d_out: Array
) -> tuple[Array, Array, Array, None]:
    q, k, v, kept, total, out = saved
    scale = q.shape[-1] ** -0.5
    d_sum, scaled = d_out / total, q * scale
    # Summed over keys, probability times its gradient equals, summed over H, the output times its gradient.
    row_sums = (d_sum * out).sum(-1, keepdims=True)
    d_q, d_k, d_v = [], [], []
    for weights, (queries, keys) in zip(kept, _blocks(q.shape[-2], k.shape[-2], step), strict=True):
        d = d_sum[..., queries, :]
        d_v.append(jnp.einsum("bkgls,bkglh->bksh", weights, d))
        d_weights = jnp.einsum("bkglh,bksh->bkgls", d, v[..., keys, :])
        d_scores = weights * (d_weights - row_sums[..., queries, :])
        d_q.append(jnp.einsum("bkgls,bksh->bkglh", d_scores, k[..., keys, :]))
        d_k.append(jnp.einsum("bkgls,bkglh->bksh", d_scores, scaled[..., queries, :]))
    return jnp.concatenate(d_q, -2) * scale, _padded_sum(d_k, k.shape), _padded_sum(d_v, v.shape), None


def _padded_sum(parts: list[Array], shape: tuple[int, ...]) -> Array:
    """Returns the sum of gradients of the first keys, each padded with zeros to all keys of `shape`."""
    no_padding = [(0, 0)] * (len(shape) - 2)
    return cast(Array, sum(jnp.pad(x, [*no_padding, (0, shape[-2] - x.shape[-2]), (0, 0)]) for x in parts))


_attend.defvjp(_attend_forward, _attend_backward)
