"""The optimizer of a stage: clipping, AdamW, warm-up and cosine, by optax.

The learning rate is an argument of the train step, not a constant in it: stages that differ in
their rates and lengths alone share one compiled program.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dreamllm_jax.config.train import OptimConfig

UPDATE_CLIP = 1.0  # root mean square of a factored update at most: arXiv 1804.04235, section 6


def learning_rates(config: OptimConfig, steps: int) -> np.ndarray:
    """float32 [steps]: linear warm-up over `warmup_ratio` of them, then a cosine to zero (or a constant)."""
    warmup = max(1, round(config.warmup_ratio * steps))
    ramp = optax.linear_schedule(config.learning_rate / warmup, config.learning_rate, max(1, warmup - 1))
    if config.schedule == "constant":
        after = optax.constant_schedule(config.learning_rate)
    else:
        after = optax.cosine_decay_schedule(config.learning_rate, max(1, steps - warmup))
    schedule = optax.join_schedules([ramp, after], [warmup])
    return np.asarray(jax.vmap(schedule)(jnp.arange(steps)), np.float32)


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW at rate 1 (uphill); weight decay spares vectors (norms and biases).

    With a factored second moment it is Adafactor with momentum and without its scaling by parameters.
    """
    parts = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    mu_dtype = jnp.dtype(config.mu_dtype)
    if config.second_moment == "factored":
        momentum = optax.ema(config.b1, debias=False, accumulator_dtype=mu_dtype)
        parts += [optax.scale_by_factored_rms(), optax.clip_by_block_rms(UPDATE_CLIP), momentum]
    else:
        parts.append(optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=mu_dtype))
    parts += [
        optax.add_decayed_weights(
            config.weight_decay,
            mask=lambda params: {k: not k.endswith(("/scale", "/bias", "logit_scale")) for k in params},
        ),
    ]
    return optax.chain(*parts)
