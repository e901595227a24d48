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
    whole: bool = False,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sum of the next-token cross-entropy (nats), and of its correct predictions.

    The logits `hidden @ head` (float32) exist only for `chunk` positions of every row at a time, in the
    forward pass and in the backward pass: [B, L, V] is never held. On a mesh every device works on its own
    rows and positions, and on its own part of the vocabulary (Megatron-LM, arXiv 1909.08053, section 3): what
    travels is one number per position, and `head` itself, gathered along fsdp once (unless it comes
    `whole`), its gradient scattered once.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _cross_entropy(head, hidden, targets, weights, chunk)
    rows = activation_spec(("batch", "length", None), hidden.shape, mesh)
    columns = activation_spec((None, "vocab"), head.shape, mesh)
    own = tuple(name for entry in rows for name in mesh_axes(entry))
    sliced = not whole and "fsdp" in own and head.shape[0] % mesh.shape["fsdp"] == 0
    parts = math.prod(mesh.shape[name] for name in mesh_axes(rows[1]))

    def local(head: Array, *inputs: Array) -> tuple[Array, Array]:
        if sliced:
            head = jax.lax.all_gather(head, "fsdp", axis=0, tiled=True)
        # Cast here, the gradient is summed over devices after the last chunk, not after each.
        head = _apart(head, tuple(name for name in own if name != "fsdp" or not sliced))
        sums = _cross_entropy(head, *inputs, -(-chunk // parts), "tensor" if columns[1] else None, own)
        return jax.lax.psum(sums, own) if own else sums

    places = (PartitionSpec("fsdp" if sliced else None, columns[1]), rows, *[PartitionSpec(*rows[:2])] * 2)
    return jax.shard_map(local, in_specs=places, out_specs=PartitionSpec())(head, hidden, targets, weights)


def _cross_entropy(
    head: Array,
    hidden: Array,
    targets: Array,
    weights: Array,
    chunk: int,
    split: str | None = None,
    own: tuple[str, ...] = (),
) -> tuple[Array, Array]:
    """The sums of one device; `split` is the mesh axis of the vocabulary, `own` are those of the rows."""
    dtype, length = head.dtype, hidden.shape[1]
    times = jnp.matmul if own or split else linear  # on a mesh, gradients are summed over its devices
    head = head.astype(jnp.float32)  # so that its gradient is summed over chunks in float32
    chunk = min(chunk, length)
    pad = -length % chunk
    if pad:
        hidden, targets, weights = (
            jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2)) for x in (hidden, targets, weights)
        )

    def one(hidden_c: Array, targets_c: Array, weights_c: Array) -> tuple[Array, Array]:
        logits = times(hidden_c.astype(dtype), head.astype(dtype), preferred_element_type=jnp.float32)
        losses, right = _token_losses(logits, targets_c, split)
        return jnp.sum(losses * weights_c), jnp.sum(right * weights_c)

    if hidden.shape[1] == chunk:  # they are in memory at once in any case: not computed again
        return one(hidden, targets, weights)

    def body(sums, x):
        return jax.tree.map(jnp.add, sums, jax.checkpoint(one)(*x)), None

    def chunks(x):
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    zero = jnp.zeros((), jnp.float32)
    sums, _ = jax.lax.scan(
        body, (_apart(zero, own), _apart(zero, own)), (chunks(hidden), chunks(targets), chunks(weights))
    )
    return sums


def _apart(x: Array, axes: tuple[str, ...]) -> Array:
    """x, equal on all devices of `axes`, as a thing of each: here its gradient is summed over them."""
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def _token_losses(
    logits: Float[Array, "B l v"], targets: Int[Array, "B l"], split: str | None
) -> tuple[Float[Array, "B l"], Bool[Array, "B l"]]:
    """Cross-entropy, and whether no other token is likelier; `logits` are of this device's vocabulary."""
    size = logits.shape[-1]
    first = 0 if split is None else size * jax.lax.axis_index(split)

    def over(combine: Callable[..., Array], x: Array) -> Array:
        return x if split is None else combine(x, split)

    most = over(jax.lax.pmax, jax.lax.stop_gradient(logits).max(-1))
    total = over(jax.lax.psum, jnp.exp(logits - most[..., None]).sum(-1))
    target = jnp.arange(size) == (targets - first)[..., None]  # a mask: gathers and scatters are slow on TPUs
    chosen = over(jax.lax.psum, jnp.where(target, logits, 0.0).sum(-1))
    return jnp.log(total) + most - chosen, chosen == most


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
