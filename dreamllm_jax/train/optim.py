"""The optimizer of a stage: clipping, AdamW, warm-up and cosine, by optax."""

from __future__ import annotations

import optax

from dreamllm_jax.config.train import OptimConfig


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup_ratio` of the steps, then a cosine to zero (or a constant)."""
    warmup = max(1, round(config.warmup_ratio * steps))
    ramp = optax.linear_schedule(config.learning_rate / warmup, config.learning_rate, max(1, warmup - 1))
    if config.schedule == "constant":
        after = optax.constant_schedule(config.learning_rate)
    else:
        after = optax.cosine_decay_schedule(config.learning_rate, max(1, steps - warmup))
    return optax.join_schedules([ramp, after], [warmup])


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW; weight decay spares vectors (norms and biases)."""
    parts = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    parts.append(
        optax.adamw(
            learning_rate(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=lambda params: {k: not k.endswith(("/scale", "/bias", "logit_scale")) for k in params},
        )
    )
    return optax.chain(*parts)
