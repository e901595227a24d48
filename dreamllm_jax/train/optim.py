"""A stage's learning rates and its optimizer, with clipping before it and weight decay after it, by optax.

The learning rate is an argument of the train step, not a constant in it: stages that differ in
their rates and lengths alone share one compiled program.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dreamllm_jax.config.registry import resolve
from dreamllm_jax.config.train import OptimConfig


def learning_rates(config: OptimConfig, steps: int) -> np.ndarray:
    """Returns float32 [steps]: linear warm-up over `warmup_ratio` of them, then a cosine (or a constant)."""
    warmup = max(1, round(config.warmup_ratio * steps))
    ramp = optax.linear_schedule(config.learning_rate / warmup, config.learning_rate, max(1, warmup - 1))
    if config.schedule == "constant":
        after = optax.constant_schedule(config.learning_rate)
    else:
        after = optax.cosine_decay_schedule(config.learning_rate, max(1, steps - warmup))
    schedule = optax.join_schedules([ramp, after], [warmup])
    return np.asarray(jax.vmap(schedule)(jnp.arange(steps)), np.float32)


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Returns clipping by global norm, the recipe's optimizer, then decoupled weight decay, all at rate 1.

    Its updates have the sign of the gradients: the train step subtracts `rate * update`. Vectors (norms and
    biases) do not decay.

    Raises:
      ValueError: the optimizer is unknown, or is not a function that returns a GradientTransformation.
    """
    direction = resolve("optimizer", config.optimizer)(config)
    if not isinstance(direction, optax.GradientTransformation):
        raise ValueError(
            f"optim.optimizer={config.optimizer!r} returned {type(direction).__name__}; it must return an "
            "optax.GradientTransformation."
        )
    clip = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    decay = optax.add_decayed_weights(
        config.weight_decay,
        mask=_decayed,
    )
    return optax.chain(*clip, direction, decay)


def check_optimizer(config: OptimConfig) -> None:
    """Tries the optimizer on one small matrix.

    Raises:
      ValueError: the optimizer is unknown, or fails, or its update points against the gradient, as that of a
        complete `optax.adamw(rate)` does: the loss would increase.
    """
    ones = {"probe/kernel": jnp.ones((2, 2))}
    tx = make_optimizer(dataclasses.replace(config, weight_decay=0.0))
    try:
        updates, _ = tx.update(ones, tx.init(ones), ones)
        sign = sum(float(jnp.sum(leaf)) for leaf in jax.tree.leaves(updates))
    except Exception as error:  # the code of others may raise anything
        raise ValueError(
            f"optim.optimizer={config.optimizer!r} fails on a 2 x 2 matrix ({type(error).__name__}: {error})."
        ) from error
    if not sign > 0:
        raise ValueError(
            f"optim.optimizer={config.optimizer!r} points against the gradient; return the direction alone, "
            "such as optax.scale_by_adam(), without the negative learning rate of optax.adam(rate)."
        )


def _decayed(params: Any) -> dict[str, bool]:
    """Returns whether each parameter decays: all but scales and biases."""
    return {k: not k.endswith(("/scale", "/bias", "logit_scale")) for k in params}
