"""The loss functions: denoising error, contrastive loss, and KL divergence.

The joint loss of DreamLLM (arXiv 2309.11499, equations 4 to 6) is made of the next-token loss (see
`cross_entropy`) and the first of them:

    L = w_lm * CE(next token) + w_vm * E || eps_UNet(z_t, t, P h_query) - target ||^2

Every function returns sums over its input, or one value per image. The caller divides them by counts of the
*global* batch, so that a loss does not depend on the mesh, the number of hosts, or gradient accumulation.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dreamllm_jax.config.train import LossConfig


def distillation_errors(
    prediction: Float[Array, "M h w c"], target: Float[Array, "M h w c"], weights: Float[Array, "M"]
) -> Float[Array, "M"]:
    """Returns each image's denoising error, times its weight (for example min-SNR, arXiv 2303.09556).

    weights[m] * mean_hwc (prediction[m] - target[m])^2
    """
    error = jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32))
    return error.mean(axis=(1, 2, 3)) * weights


def loss_scale(config: LossConfig) -> float:
    """Returns the divisor of the weighted sum of the two losses: 1, or the norm of the weights.

    For weights 3 and 4 it is 7 with `scale="l1"`, and 5 with `scale="l2"`.
    """
    if config.scale == "l1":
        return abs(config.weight_lm) + abs(config.weight_vm)
    if config.scale == "l2":
        return math.hypot(config.weight_lm, config.weight_vm)
    return 1.0


def contrastive_loss(
    image: Float[Array, "B E"], text: Float[Array, "B E"], scale: Float[Array, ""], same: Array
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns CLIP's symmetric loss (arXiv 2103.00020), summed over rows, and the number of correct matches.

        1/2 sum_i [ CE(p_i, softmax_j(s u_i.v_j)) + CE(p_i, softmax_j(s u_j.v_i)) ],   p_ij = same_ij / sum_k
        same_ik

    Image embeddings u and text embeddings v are normalized. `same[i, j]` is 1 if texts i and j are equal,
    else 0: if a corpus repeats its captions, all images of a caption are positives of it.
    """
    logits = scale * image @ text.T
    labels = same / same.sum(-1, keepdims=True)
    rows = optax.softmax_cross_entropy(logits, labels) + optax.softmax_cross_entropy(logits.T, labels)
    right = jnp.take_along_axis(same, logits.argmax(-1)[:, None], axis=-1)
    return 0.5 * rows.sum(), right.sum().astype(jnp.float32)


def kl_to_unit_gaussian(mean: Float[Array, "M h w c"], logvar: Float[Array, "M h w c"]) -> Float[Array, "M"]:
    """Returns KL(N(mean, exp(logvar)) || N(0, 1)) of each image, summed over its latents (nats)."""
    return 0.5 * jnp.sum(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar, axis=(1, 2, 3))
