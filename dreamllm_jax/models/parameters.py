"""The parameters that a model's config implies: their paths, shapes and initial values.

Parameters are flat wherever they are stored or trained, `{"llama/norm/scale": array}`, and nested only
inside `Module.apply`. `DreamLLMModule` alone decides which parameters exist; all other code asks here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from dreamllm_jax.batch import Batch
from dreamllm_jax.config.model import AttentionConfig, DreamLLMConfig, RematConfig
from dreamllm_jax.models.dreamllm import DreamLLMModule

Flat = dict[str, Any]


def example_batch(model: DreamLLMConfig, rows: int = 1, length: int | None = None) -> Batch:
    """Returns a batch of zeros with one image and one dream in each row, for tracing and measuring."""
    queries = model.num_dream_queries if model.draws else 0
    length = length or model.num_patches + queries + 2
    ints = jnp.zeros((rows, length), jnp.int32)
    images = dream_images = sizes = None
    if model.vision is not None:
        images = jnp.zeros((rows, 1, model.vision.image_size, model.vision.image_size, 3), jnp.uint8)
    if model.vae is not None:
        dream_images = jnp.zeros((rows, 1, model.image_size, model.image_size, 3), jnp.uint8)
        sizes = jnp.zeros((rows, 1, 6), jnp.int32)
    return Batch(
        tokens=ints,
        targets=ints,
        segment_ids=ints + 1,
        positions=ints + jnp.arange(length, dtype=jnp.int32),
        loss_weights=jnp.ones((rows, length), jnp.float32),
        image_slots=ints - 1,
        dream_slots=ints - 1,
        image_mask=jnp.ones((rows, 1), bool),
        dream_mask=jnp.ones((rows, 1), bool),
        null_dream=jnp.full((rows,), -1, jnp.int32),
        images=images,
        dream_images=dream_images,
        dream_sizes=sizes,
    )


def init_params(config: DreamLLMConfig, key: jax.Array) -> Flat:
    """Returns freshly initialized float32 parameters of every tower, flat.

    The function can be traced: `jax.eval_shape` works at any size.
    """
    # The layers run once, so that a loop, which compiles faster, is best.
    model = DreamLLMModule(dataclasses.replace(config, scan_layers=True))
    caption = jnp.zeros((1, 2), jnp.int32)
    variables = model.init(key, example_batch(config), caption, method=DreamLLMModule.call_every_tower)
    return flatten_dict(variables["params"], sep="/")


def init_on_host(config: DreamLLMConfig, key: jax.Array, names: Set[str]) -> dict[str, np.ndarray]:
    """Returns those parameters of `init_params` whose paths are in `names`, as numpy arrays."""
    if not names:
        return {}

    def init() -> Flat:
        return {path: x for path, x in init_params(config, key).items() if path in names}

    # The program runs once, so fast compilation matters more than fast code.
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.device_get(jax.jit(init, compiler_options=options)())


def abstract_params(config: DreamLLMConfig) -> Flat:
    """Returns the shape and dtype of every parameter without allocating any."""
    # The parameters do not depend on how the model computes.
    plain = dataclasses.replace(
        config, dtype="float32", remat=RematConfig(), attention=AttentionConfig(), scan_layers=None
    )
    return dict(_abstract_params(plain))


@functools.lru_cache(maxsize=16)
def _abstract_params(config: DreamLLMConfig) -> Flat:
    """Traces a whole model, which takes seconds."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def parameter_shapes(config: DreamLLMConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter by its path."""
    return {path: tuple(leaf.shape) for path, leaf in abstract_params(config).items()}
