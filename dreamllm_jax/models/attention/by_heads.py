"""The reference's arithmetic in the order that suits XLA's CPU backend, with its own derivative.

Every head's numbers are brought together first, so that no product turns its operands around. What is as
large as the scores is touched as seldom as can be: sums of weights divide the results, not the weights, and
the backward pass keeps of it the weights alone. Under a causal rule the keys that no query of a block may
see are left out.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

# Queries of a block: the scores of a head stay in a core's cache. More blocks than these are not made, for
# each is compiled by itself.
BLOCK = 64
BLOCKS = 8


def by_heads(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    seen: Bool[Array, "#B 1 L S"] | None = None,
    causal: bool = False,
    named: bool = True,
) -> Float[Array, "B L N H"]:
    """`softmax(q k^T / sqrt(H)) v`; a query that sees nothing gets anything.

    `causal` promises that `seen` hides from query i what follows key i (and L = S). What the backward pass
    needs of the result is `named` "attended" for rematerialization. Reverse-mode differentiation only.
    """
    rows, length, heads, width = q.shape
    grouped = q.reshape(rows, length, k.shape[2], -1, width).transpose(0, 2, 3, 1, 4)
    mask = None if seen is None else seen[:, :, None]
    step = min(length, max(BLOCK, -(-length // BLOCKS))) if causal else length
    out = _attend(grouped, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), mask, step, named)
    return out.transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q: Array, k: Array, v: Array, mask: Array | None, step: int, named: bool) -> Array:
    """[B, K, G, L, H] of queries [B, K, G, L, H], keys and values [B, K, S, H], mask [#B, 1, 1, L, S].

    `step` queries at a time, the block from i on with the keys before i + step: all where step is L.
    """
    return _forward(q, k, v, mask, step, named)[0]


def _blocks(length: int, keys: int, step: int) -> list[tuple[slice, slice]]:
    """Queries and their keys."""
    if step == length:
        return [(slice(0, length), slice(0, keys))]
    ends = [(first, min(first + step, length)) for first in range(0, length, step)]
    return [(slice(first, end), slice(0, end)) for first, end in ends]


def _forward(
    q: Array, k: Array, v: Array, mask: Array | None, step: int, named: bool
) -> tuple[Array, tuple[Array | None | list[Array], ...]]:
    scaled = q * q.shape[-1] ** -0.5
    outs, kept, totals = [], [], []
    for some, keys in _blocks(q.shape[-2], k.shape[-2], step):
        scores = _scores(scaled[..., some, :], k[..., keys, :])
        if mask is not None:
            scores = jnp.where(mask[..., some, keys], scores, jnp.finfo(scores.dtype).min)
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        kept.append(weights)
        totals.append(weights.sum(-1, keepdims=True))
        outs.append(jnp.einsum("bkgls,bksh->bkglh", weights, v[..., keys, :]))
    total = jnp.concatenate(totals, -2)
    out = jnp.concatenate(outs, -2) / total
    out = checkpoint_name(out, "attended") if named else out
    return out, (q, k, v, kept, total, out)


def _scores(q: Array, k: Array) -> Array:
    """`q k^T`, [B, K, G, L, S]. Those of one query are `k q`: else XLA turns all keys around to find them."""
    if q.shape[3] > 1:
        return jnp.einsum("bkglh,bksh->bkgls", q, k)
    found = jax.lax.dot_general(k, q[:, :, :, 0], (((3,), (3,)), ((0, 1), (0, 1))))
    return jnp.moveaxis(found, -1, -2)[:, :, :, None]


def _backward(
    step: int, named: bool, saved: tuple[Any, ...], d_out: Array
) -> tuple[Array, Array, Array, None]:
    q, k, v, kept, total, out = saved
    scale = q.shape[-1] ** -0.5
    d_sum, scaled = d_out / total, q * scale
    # The sum over the keys of probabilities times their gradients is that of results times theirs.
    both = (d_sum * out).sum(-1, keepdims=True)
    d_q, d_k, d_v = [], [], []
    for weights, (some, keys) in zip(kept, _blocks(q.shape[-2], k.shape[-2], step), strict=True):
        d = d_sum[..., some, :]
        d_v.append(jnp.einsum("bkgls,bkglh->bksh", weights, d))
        d_weights = jnp.einsum("bkglh,bksh->bkgls", d, v[..., keys, :])
        d_scores = weights * (d_weights - both[..., some, :])
        d_q.append(jnp.einsum("bkgls,bksh->bkglh", d_scores, k[..., keys, :]))
        d_k.append(jnp.einsum("bkgls,bkglh->bksh", d_scores, scaled[..., some, :]))
    return jnp.concatenate(d_q, -2) * scale, _sum(d_k, k.shape), _sum(d_v, v.shape), None


def _sum(parts: list[Array], shape: tuple[int, ...]) -> Array:
    """Of gradients of the first keys, more and more of them, those of all."""
    keys = [(0, 0)] * (len(shape) - 2)
    return sum(jnp.pad(x, [*keys, (0, shape[-2] - x.shape[-2]), (0, 0)]) for x in parts)


_attend.defvjp(_forward, _backward)
