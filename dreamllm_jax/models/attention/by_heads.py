"""The reference's arithmetic in the order that suits XLA's CPU backend, with its own derivative.

Every head's numbers are brought together first, so that no product turns its operands around, and the
backward pass keeps the probabilities alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def by_heads(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    seen: Bool[Array, "#B 1 L S"] | None = None,
) -> Float[Array, "B L N H"]:
    """`softmax(q k^T / sqrt(H)) v`; a query that sees nothing gets anything.

    Reverse-mode differentiation only.
    """
    rows, length, heads, width = q.shape
    grouped = q.reshape(rows, length, k.shape[2], -1, width).transpose(0, 2, 3, 1, 4)
    mask = None if seen is None else seen[:, :, None]
    out = _attend(grouped, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), mask)
    return out.transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, width)


def _probabilities(q: Array, k: Array, mask: Array | None) -> Array:
    """float32 [B, K, G, L, S] of queries [B, K, G, L, H]."""
    scores = jnp.einsum("bkglh,bksh->bkgls", q * q.shape[-1] ** -0.5, k)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@jax.custom_vjp
def _attend(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    return _forward(q, k, v, mask)[0]


def _forward(q: Array, k: Array, v: Array, mask: Array | None) -> tuple[Array, tuple[Array, ...]]:
    p = _probabilities(q, k, mask)
    return jnp.einsum("bkgls,bksh->bkglh", p, v), (q, k, v, p)


def _backward(saved: tuple[Array, ...], d_out: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, p = saved
    d_v = jnp.einsum("bkgls,bkglh->bksh", p, d_out)
    d_p = jnp.einsum("bkglh,bksh->bkgls", d_out, v)
    d_scores = p * (d_p - (p * d_p).sum(-1, keepdims=True)) * q.shape[-1] ** -0.5
    d_q = jnp.einsum("bkgls,bksh->bkglh", d_scores, k)
    return d_q, jnp.einsum("bkgls,bkglh->bksh", d_scores, q), d_v, None


_attend.defvjp(_forward, _backward)
