"""The random weights of both sides, from fixed seeds: drawn on the host by numpy, or on the device by JAX.

A `full` model has 8 billion weights. The host would draw them in minutes and hold 33 GB; the device draws one
array after the other in seconds, and each side keeps only what it needs, in the dtype that it needs.
"""

from __future__ import annotations

import functools
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.models.parameters import abstract_params

DRAWN_AHEAD = 4  # arrays that threads draw, and compile the drawing of, before they are asked for


def mean_and_deviation(path: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Returns the distribution of a parameter's weights: layers preserve the variance of their input."""
    if path.endswith("/kernel"):
        stacked = "/layers/" in path or "transformer_blocks" in path
        return 0.0, float(np.prod(shape[1:-1] if stacked else shape[:-1])) ** -0.5
    return (1.0, 0.1) if path.endswith("/scale") else (0.0, 0.1)


def random_params(config: DreamLLMConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns random float32 weights by path, drawn on the host."""
    rng = np.random.default_rng(seed)

    def leaf(path: str, shape: tuple[int, ...]) -> np.ndarray:
        mean, deviation = mean_and_deviation(path, shape)
        return (mean + deviation * rng.standard_normal(shape, np.float32)).astype(np.float32)

    return {path: leaf(path, x.shape) for path, x in abstract_params(config).items()}


def drawn_leaf(path: str, shape: tuple[int, ...], dtype: str = "float32") -> jax.Array:
    """Returns the weights of one parameter, drawn on the device; path and shape determine them."""
    mean, deviation = mean_and_deviation(path, shape)
    seed = np.uint32(zlib.crc32(path.encode()))
    return _draw(seed, np.float32(mean), np.float32(deviation), shape=shape, dtype=dtype)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _draw(seed, mean, deviation, *, shape, dtype):
    # XLA's own generator: it compiles faster than Threefry, and needs no memory beside its result.
    key = jax.random.key(seed, impl="rbg")
    return (mean + deviation * jax.random.normal(key, shape)).astype(jnp.dtype(dtype))


def drawn_ahead(
    paths: Iterable[str], leaf: Callable[[str], jax.Array], ahead: int = DRAWN_AHEAD
) -> Iterator[tuple[str, jax.Array]]:
    """Yields each path and `leaf(path)`, of which some are computed ahead, in threads."""
    with ThreadPoolExecutor(ahead) as pool:
        waiting: deque = deque()
        for path in paths:
            waiting.append((path, pool.submit(leaf, path)))
            if len(waiting) > ahead:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
