"""The loss functions: next token, denoising error, contrastive loss, and KL divergence.

The joint loss of DreamLLM (arXiv 2309.11499, equations 4 to 6) is made of the first two:

    L = w_lm * CE(next token) + w_vm * E || eps_UNet(z_t, t, P h_query) - target ||^2

Every function returns sums over its input, or one value per image. The caller divides them by counts of the
*global* batch, so that a loss does not depend on the mesh, the number of hosts, or gradient accumulation.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from dreamllm_jax.config.train import LossConfig
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

    The logits x (float32) exist for `chunk` positions of every row at a time, in the forward and the backward
    pass: [B, L, V] is never in memory. On a mesh every device computes its own rows, positions and part of
    the vocabulary (Megatron-LM, arXiv 1909.08053, section 3). Devices exchange three numbers per position and
    the `head`, which is gathered along fsdp once, and its gradient scattered once. `gathered` says that the
    head is replicated along fsdp already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _cross_entropy(head, hidden, targets, weights, chunk)
    rows = activation_spec(("batch", "length", None), hidden.shape, mesh)
    columns = activation_spec((None, "vocab"), head.shape, mesh)
    batch_axes = tuple(name for entry in rows for name in mesh_axes(entry))
    sliced = not gathered and "fsdp" in batch_axes and head.shape[0] % mesh.shape["fsdp"] == 0
    parts = math.prod(mesh.shape[name] for name in mesh_axes(rows[1]))

    def local(head: Array, hidden: Array, targets: Array, weights: Array) -> tuple[Array, Array]:
        if sliced:
            head = jax.lax.all_gather(head, "fsdp", axis=0, tiled=True)
        # Marked as varying here, the head's gradient is summed over devices once, not after each chunk.
        head = _pcast_varying(head, tuple(name for name in batch_axes if name != "fsdp" or not sliced))
        vocab_axis = "tensor" if columns[1] else None
        sums = _cross_entropy(head, hidden, targets, weights, -(-chunk // parts), vocab_axis, batch_axes)
        return jax.lax.psum(sums, batch_axes) if batch_axes else sums

    in_specs = (PartitionSpec("fsdp" if sliced else None, columns[1]), rows, *[PartitionSpec(*rows[:2])] * 2)
    return jax.shard_map(local, in_specs=in_specs, out_specs=PartitionSpec())(head, hidden, targets, weights)


def _cross_entropy(
    head: Array,
    hidden: Array,
    targets: Array,
    weights: Array,
    chunk: int,
    vocab_axis: str | None = None,
    batch_axes: tuple[str, ...] = (),
) -> tuple[Array, Array]:
    """Returns the sums of one device; the mesh axes are those of the vocabulary, rows and positions."""
    dtype, length = head.dtype, hidden.shape[1]
    # On a mesh the gradients are summed over its devices, which `linear` does not support.
    matmul = jnp.matmul if batch_axes or vocab_axis else linear
    head = head.astype(jnp.float32)  # so that its gradient is summed over chunks in float32
    chunk = min(chunk, length)
    pad = -length % chunk
    if pad:
        hidden, targets, weights = (
            jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2)) for x in (hidden, targets, weights)
        )

    def chunk_sums(hidden_c: Array, targets_c: Array, weights_c: Array) -> tuple[Array, Array]:
        if dtype == jnp.float32:
            logits = matmul(hidden_c.astype(dtype), head)
        else:
            hidden_c = _pcast_varying(hidden_c.astype(dtype), (vocab_axis,) if vocab_axis else ())
            logits = _low_precision_logits(hidden_c, head)
        losses, right = _token_losses(logits, targets_c, vocab_axis)
        return jnp.sum(losses * weights_c), jnp.sum(right * weights_c)

    if hidden.shape[1] == chunk:  # a single chunk is in memory in any case: nothing is recomputed
        return chunk_sums(hidden, targets, weights)

    def body(sums, x):
        return jax.tree.map(jnp.add, sums, jax.checkpoint(chunk_sums)(*x)), None

    def chunks(x):
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    zero = jnp.zeros((), jnp.float32)
    sums, _ = jax.lax.scan(
        body, (_pcast_varying(zero, batch_axes),) * 2, (chunks(hidden), chunks(targets), chunks(weights))
    )
    return sums


@jax.custom_vjp
def _low_precision_logits(hidden: Float[Array, "B l D"], head: Float[Array, "D v"]) -> Float[Array, "B l v"]:
    """Returns float32 logits by a product in the dtype of `hidden`, in which its gradients are computed too.

    Autodiff would multiply the logits' float32 gradient in float32. Mixed precision in PyTorch rounds it, as
    here.
    """
    return jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _low_precision_logits_forward(hidden: Array, head: Array) -> tuple[Array, tuple[Array, Array]]:
    return _low_precision_logits(hidden, head), (hidden, head)


def _low_precision_logits_backward(saved: tuple[Array, Array], d_logits: Array) -> tuple[Array, Array]:
    hidden, head = saved
    d_logits = d_logits.astype(hidden.dtype)
    d_hidden = jnp.matmul(d_logits, head.astype(hidden.dtype).T)
    d_head = jnp.einsum("bld,blv->dv", hidden, d_logits, preferred_element_type=jnp.float32)
    return d_hidden, d_head


_low_precision_logits.defvjp(_low_precision_logits_forward, _low_precision_logits_backward)


def _pcast_varying(x: Array, axes: tuple[str, ...]) -> Array:
    """Marks x, which is equal on all devices of `axes`, as varying. Its gradient is summed over them here."""
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def _token_losses(
    logits: Float[Array, "B l v"], targets: Int[Array, "B l"], vocab_axis: str | None
) -> tuple[Float[Array, "B l"], Bool[Array, "B l"]]:
    """Returns the cross-entropy, and whether the target is the likeliest token.

    `logits` are of this device's part of the vocabulary.
    """
    size = logits.shape[-1]
    first = 0 if vocab_axis is None else size * jax.lax.axis_index(vocab_axis)

    def over_vocabulary(collective: Callable[..., Array], x: Array) -> Array:
        return x if vocab_axis is None else collective(x, vocab_axis)

    largest = over_vocabulary(jax.lax.pmax, jax.lax.stop_gradient(logits).max(-1))
    total = over_vocabulary(jax.lax.psum, jnp.exp(logits - largest[..., None]).sum(-1))
    is_target = jnp.arange(size) == (targets - first)[..., None]  # gathers and scatters are slow on TPUs
    target_logit = over_vocabulary(jax.lax.psum, jnp.where(is_target, logits, 0.0).sum(-1))
    return jnp.log(total) + largest - target_logit, target_logit == largest


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
