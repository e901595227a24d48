"""PyTorch's optimizers, with the arithmetic of ours: gradients are clipped, weights are float32.

In bfloat16, PyTorch's model computes with bfloat16 copies of float32 weights, as ours does. A step at a
learning rate of 2e-5 changes a weight by less than half of the distance to its neighbour in bfloat16: if the
weights themselves were bfloat16, most updates would round away. For the size `tiny`, the losses then differed
by 7.6 % after the first step; with float32 weights by 0.015 %, and by 0.00004 % where all is float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from dreamllm_jax.config.train import OptimConfig

Tensor = torch.Tensor
SMALLEST_FACTORED = 128  # these are the constants of optax.scale_by_factored_rms
DECAY, EPSILON = 0.8, 1e-30
UPDATE_CLIP = 1.0


class Optimizer:
    """Updates the parameters of a model from their gradients, which it then frees.

    `masters` are the float32 weights, one for each parameter; None if the parameters are float32.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        masters: Sequence[Tensor] | None,
        config: OptimConfig,
        compiled: bool = False,
    ):
        self.parameters, self.clip_norm = list(parameters), config.clip_norm
        self.weights = self.parameters if masters is None else [m.requires_grad_() for m in masters]
        self.optimizer = _make(self.weights, config, compiled)

    @torch.no_grad()
    def step(self) -> None:
        """Clips the gradients by their global norm, and makes one step."""
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        if isinstance(self.optimizer, Adafactor):
            self.optimizer.step(self._gradients())
        else:
            for weight, gradient in zip(self.weights, self._gradients(), strict=True):
                weight.grad = gradient
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        if self.weights is not self.parameters:
            torch._foreach_copy_(self.parameters, self.weights)

    def _gradients(self) -> Iterator[Tensor]:
        """Yields the gradients in float32. Each leaves its parameter first: both kinds together are large."""
        for parameter in self.parameters:
            assert parameter.grad is not None
            gradient, parameter.grad = parameter.grad.float(), None
            yield gradient


def _make(weights: list[Tensor], config: OptimConfig, compiled: bool) -> Any:
    if config.optimizer == "adafactor":
        return Adafactor(weights, config, compiled)
    if config.optimizer != "adamw":
        raise ValueError(f"PyTorch's side has adamw and adafactor, not {config.optimizer!r}: add it here.")
    return torch.optim.AdamW(
        weights,
        lr=config.learning_rate,
        betas=(config.b1, config.b2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


class Adafactor:
    """Our Adafactor (arXiv 1804.04235, with momentum, without scaling by the parameters).

    torch.optim.Adafactor scales by the parameters and has no momentum.
    """

    def __init__(self, weights: list[Tensor], config: OptimConfig, compiled: bool):
        if config.weight_decay:
            raise ValueError("PyTorch's Adafactor has no weight decay here; set optim.weight_decay=0.")
        self.weights, self.rate, self.b1, self.count = weights, config.learning_rate, config.b1, 0
        dtype = getattr(torch, config.mu_dtype)
        self.moments = [torch.zeros_like(w, dtype=dtype) for w in weights]
        self.scales: list[tuple[Tensor, ...]] = [_first_scales(w) for w in weights]
        self.update: Any = torch.compile(_update, dynamic=False) if compiled else _update

    @torch.no_grad()
    def step(self, gradients: Iterable[Tensor]) -> None:
        """Makes one step, weight by weight."""
        self.count += 1
        decay = self.weights[0].new_tensor(1 - self.count**-DECAY)
        each = zip(self.weights, gradients, self.moments, self.scales, strict=True)
        for weight, gradient, moment, scales in each:
            self.update(weight, gradient, moment, scales, decay, self.b1, self.rate)


def _first_scales(weight: Tensor) -> tuple[Tensor, ...]:
    """Returns the second moment's means over rows and over columns, or the whole of it, all zero."""
    if weight.ndim == 2 and min(weight.shape) >= SMALLEST_FACTORED:
        return weight.new_zeros(weight.shape[0]), weight.new_zeros(weight.shape[1])
    return (torch.zeros_like(weight),)


def _update(
    weight: Tensor,
    gradient: Tensor,
    moment: Tensor,
    scales: tuple[Tensor, ...],
    decay: Tensor,
    b1: float,
    rate: float,
) -> None:
    squares = gradient.square() + EPSILON
    if len(scales) == 2:
        rows, columns = scales
        rows.copy_(decay * rows + (1 - decay) * squares.mean(1))
        columns.copy_(decay * columns + (1 - decay) * squares.mean(0))
        update = gradient * (rows / rows.mean()).rsqrt()[:, None] * columns.rsqrt()[None]
    else:
        scales[0].copy_(decay * scales[0] + (1 - decay) * squares)
        update = gradient * scales[0].rsqrt()
    update = update / (update.square().mean().sqrt() / UPDATE_CLIP).clamp(min=1.0)
    averaged = b1 * moment.float() + (1 - b1) * update
    moment.copy_(averaged)
    weight.sub_(rate * averaged)
