"""The optimizers. Every public function in this file is an optimizer; recipes select it by its name.

To add an optimizer, write one function, here or in a package of your own (`optimizer="my_project.code:lion"`,
or a short name by an entry point; see `config.registry`):

    def lion(config: OptimConfig) -> optax.GradientTransformation:
        return optax.scale_by_lion(config.b1, config.b2)

It turns gradients into a direction: what the train step multiplies by the learning rate and subtracts. In
optax these are the functions `scale_by_...`; a complete `optax.lion(rate)` also negates and scales. Clipping
comes before it and weight decay after it, both from `optim.make_optimizer`.

Parameters are a flat dict of path and array. The layers of a tower are stacked along the first axis of its
arrays: a method that works on whole matrices (Muon, LAMB) must map over that axis.

State is sharded as the parameters are, if it has their shapes; see `state.optimizer_shardings`.
"""

from __future__ import annotations

import jax.numpy as jnp
import optax

from dreamllm_jax.config.train import OptimConfig

_UPDATE_CLIP = 1.0  # the largest root mean square of an update: arXiv 1804.04235, section 6


def adamw(config: OptimConfig) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101), whose first moment is held in `mu_dtype`."""
    return optax.scale_by_adam(
        b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=jnp.dtype(config.mu_dtype)
    )


def adafactor(config: OptimConfig) -> optax.GradientTransformation:
    """Adafactor (arXiv 1804.04235) with momentum, without its scaling by the parameters.

    The second moment is held as means over rows and columns, 4 bytes a weight less than Adam's. Its decay and
    its clipping of updates are Adafactor's own: `b2` and `eps` are not used.
    """
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(_UPDATE_CLIP),
        optax.ema(config.b1, debias=False, accumulator_dtype=jnp.dtype(config.mu_dtype)),
    )
