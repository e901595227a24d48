"""The two losses of DreamLLM: next token, and score distillation through the frozen U-Net.

    L = w_lm * CE(next token) + w_vm * E || eps_UNet(z_t, t, P h_query) - target ||^2

Every function returns sums, or one value per image to be summed, which are divided by counts of the *global*
batch: a loss does not depend on the mesh, on the number of hosts or on gradient accumulation.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dreamllm_jax.config.train import LossConfig


def chunked_cross_entropy(
    logits_fn: Callable[[Array], Array],
    hidden: Float[Array, "B L D"],
    targets: Int[Array, "B L"],
    weights: Float[Array, "B L"],
    chunk: int,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sum of the next-token cross-entropy (nats), and of its correct predictions.

    The logits exist only for `chunk` positions of every row at a time, in the forward pass and in
    the backward pass: [B, L, V] is never held. `logits_fn` maps [B, l, D] to [B, l, V].
    """
    length = hidden.shape[1]
    chunk = min(chunk, length)
    pad = -length % chunk
    if pad:
        hidden, targets, weights = (
            jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2)) for x in (hidden, targets, weights)
        )

    @jax.checkpoint
    def one(hidden_c: Array, targets_c: Array, weights_c: Array) -> tuple[Array, Array]:
        logits = logits_fn(hidden_c).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets_c)
        right = logits.argmax(-1) == targets_c
        return jnp.sum(losses * weights_c), jnp.sum(right * weights_c)

    if hidden.shape[1] == chunk:
        return one(hidden, targets, weights)

    def body(sums, x):
        loss, right = one(*x)
        return (sums[0] + loss, sums[1] + right), None

    def split(x):
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    zero = jnp.zeros((), jnp.float32)
    (loss, right), _ = jax.lax.scan(body, (zero, zero), (split(hidden), split(targets), split(weights)))
    return loss, right


def distillation_errors(
    prediction: Float[Array, "M h w c"], target: Float[Array, "M h w c"], weights: Float[Array, "M"]
) -> Float[Array, "M"]:
    """Each image's mean squared error of the denoiser, times its (min-SNR) weight."""
    error = jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32))
    return error.mean(axis=(1, 2, 3)) * weights


def loss_scale(config: LossConfig) -> float:
    """What the weighted sum of the losses is divided by."""
    if config.scale == "l1":
        return abs(config.weight_lm) + abs(config.weight_vm)
    if config.scale == "l2":
        return math.hypot(config.weight_lm, config.weight_vm)
    return 1.0


def contrastive_loss(
    image: Float[Array, "B E"], text: Float[Array, "B E"], scale: Float[Array, ""], same: Array
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """CLIP's symmetric loss (arXiv 2103.00020), summed over rows, and the rows matched rightly.

    `same[i, j]` says that texts i and j are equal: all images of one text are its positives, where
    a corpus repeats its captions. Embeddings are normalized.
    """
    logits = scale * image @ text.T
    wanted = same / same.sum(-1, keepdims=True)
    rows = optax.softmax_cross_entropy(logits, wanted) + optax.softmax_cross_entropy(logits.T, wanted)
    right = jnp.take_along_axis(same, logits.argmax(-1)[:, None], axis=-1)
    return 0.5 * rows.sum(), right.sum().astype(jnp.float32)


def kl_to_unit_gaussian(mean: Float[Array, "M h w c"], logvar: Float[Array, "M h w c"]) -> Float[Array, "M"]:
    """KL divergence of each latent's Gaussian to N(0, 1), summed over its elements (nats)."""
    return 0.5 * jnp.sum(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar, axis=(1, 2, 3))
