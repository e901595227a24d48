"""Times several implementations of the small U-Net's convolutions, to justify `ops.cpu.convolution`.

    python -m benchmarks.conv

For each shape and implementation, prints the milliseconds of the forward pass, of the forward and backward
passes, and of one step of both in a `lax.scan` of 4 steps. The implementations:

    xla       XLA's convolution with the gradients that autodiff derives
    conv      what the models use: on CPUs, gradients in the layout of the forward pass
    joined    nine shifted slices, concatenated, in one matrix product
    summed    the sum of nine matrix products
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp

from dreamllm_jax.ops.conv import convolve, xla_convolution

# (batch size, height, width, input channels), output channels: the layers of the quickstart's U-Net.
SHAPES = [((64, 8, 8, 32), 32), ((64, 8, 8, 64), 64), ((64, 16, 16, 16), 16), ((64, 4, 4, 128), 64)]


def slices(x: jax.Array) -> list[jax.Array]:
    """Returns x shifted to each of the nine positions of a 3x3 kernel."""
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return [x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]


FORMS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "xla": lambda x, k: xla_convolution(x, k, 1, (1, 1)),
    "conv": lambda x, k: convolve(x, k, 1, (1, 1)),
    "joined": lambda x, k: jnp.concatenate(slices(x), -1) @ k.reshape(-1, k.shape[-1]),
    "summed": lambda x, k: cast(jax.Array, sum(s @ k[i // 3, i % 3] for i, s in enumerate(slices(x)))),
}


def looped(form: Callable, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Applies a form in a scan of 4 steps, all on the same x."""
    return jax.lax.map(lambda part: form(part, kernel), jnp.stack([x] * 4))


def milliseconds(run: Callable, *args: jax.Array) -> float:
    """Returns the best time of 10 calls; compilation is not timed."""
    jax.block_until_ready(run(*args))
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        best = min(best, time.perf_counter() - start)
    return 1e3 * best


def backward(form: Callable) -> Callable:
    """Returns the jitted gradients of a form's squared sum with respect to input and kernel."""
    return jax.jit(jax.grad(lambda x, k: (form(x, k) ** 2).sum(), (0, 1)))


def main() -> None:
    """Prints the table."""
    print(f"JAX {jax.__version__}, {jax.default_backend()}; milliseconds: forward, + backward, in a scan")
    for shape, features in SHAPES:
        x = jax.random.normal(jax.random.key(0), shape)
        kernel = jax.random.normal(jax.random.key(1), (3, 3, shape[-1], features)) / 10
        print(f"{shape} -> {features}")
        for name, form in FORMS.items():
            forward = milliseconds(jax.jit(form), x, kernel)
            both = milliseconds(backward(form), x, kernel)
            scan = milliseconds(backward(lambda x, k, form=form: looped(form, x, k)), x, kernel) / 4
            print(f"  {name:8}{forward:8.2f}{both:8.2f}{scan:8.2f}", flush=True)


if __name__ == "__main__":
    main()
