"""The model FLOPs of a train step: its matrix products and convolutions, tower by tower.

They are counted in the traced program, on shapes alone. A multiply-add is 2 FLOPs, the body of a loop counts
once per iteration, and attention counts the full L x L matrix, masked entries included. Rematerialization
does not count, because model FLOPs exclude it (arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from dreamllm_jax.config.model import AttentionConfig, DreamLLMConfig
from dreamllm_jax.config.train import StageConfig
from dreamllm_jax.models.dreamllm import DreamLLMModule
from dreamllm_jax.models.parameters import abstract_params
from dreamllm_jax.train.state import partition


def flops(function: Callable, *arguments: Any) -> float:
    """Returns the FLOPs of `function` on arguments of these shapes (arrays or ShapeDtypeStructs).

    `flops(jnp.matmul, a, b)` with a [2, 3] and b [3, 5] is 2 * 2 * 3 * 5 = 60.
    """
    return count_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def count_flops(jaxpr: Any) -> float:
    """Returns the FLOPs of a traced program."""
    return sum((_of_equation(equation) for equation in jaxpr.eqns), 0.0)


def _of_equation(equation: Any) -> float:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        sizes = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(sizes[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel, numbers = equation.invars[1].aval.shape, parameters["dimension_numbers"]
        per_output = math.prod(kernel) / kernel[numbers.rhs_spec[0]]
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * per_output
    inner = sum((count_flops(getattr(body, "jaxpr", body)) for body in _bodies(parameters)), 0.0)
    return inner * (parameters["length"] if name == "scan" else 1)


def _bodies(parameters: dict[str, Any]) -> list[Any]:
    """Returns the programs within an equation; of the branches of a condition, only the costliest."""
    if "branches" in parameters:
        return [max(parameters["branches"], key=lambda branch: count_flops(branch.jaxpr))]
    if "call_jaxpr" in parameters:  # a function with its own derivative
        return [parameters["call_jaxpr"]]
    return [value for value in parameters.values() if hasattr(getattr(value, "jaxpr", value), "eqns")]


@functools.lru_cache(maxsize=8)
def forward_flops(
    config: DreamLLMConfig, rows: int, length: int, images: int, dreams: int
) -> dict[str, float]:
    """Returns the FLOPs of each tower's forward pass on `rows` of `length` tokens.

    `images` and `dreams` are the numbers of seen and generated images in all rows together.
    """
    # Attention as it is defined: the kernels of a backend may skip masked blocks.
    xla = AttentionConfig(llama="xla", vision="xla", unet="xla", vae="xla")
    config = dataclasses.replace(config, dtype="bfloat16", attention=xla)
    module = DreamLLMModule(config)
    variables = {"params": unflatten_dict(abstract_params(config), sep="/")}
    found: dict[str, float] = {}

    def add(tower: str, method: Any, *shapes: Any) -> None:
        run = functools.partial(module.apply, method=method)
        found[tower] = flops(run, variables, *shapes)

    def floats(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(config.dtype))

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    if config.llama is not None:
        states = floats(rows, length, config.llama.hidden_size)
        add("llama", lambda m, x, p, s: m.llama.logits(m.llama(x, p, s)), states, *[ints(rows, length)] * 2)
    if config.sees and images:
        assert config.vision is not None
        side = config.vision.image_size
        add("vision", DreamLLMModule.see, floats(images, side, side, 3))
    if config.draws and dreams:
        assert config.unet is not None and config.vae is not None
        size, side = config.latent_size, config.image_size
        latents = floats(dreams, size, size, config.unet.in_channels)
        context = floats(dreams, config.num_dream_queries, config.unet.cross_attention_dim)
        added = None
        if config.unet.pooled_text_dim is not None:
            added = {"text_embeds": floats(dreams, config.unet.pooled_text_dim), "time_ids": ints(dreams, 6)}
        add("unet", DreamLLMModule.denoise, latents, ints(dreams), context, added)
        pixels = jax.ShapeDtypeStruct((dreams, side, side, 3), jnp.uint8)
        add("vae", DreamLLMModule.encode_image, pixels)
    return found


def passes(config: DreamLLMConfig, stage: StageConfig) -> dict[str, int]:
    """Returns, by tower, how many times the forward pass's FLOPs a step takes.

    The gradient of a tower's weights costs one more forward pass, and so does the gradient of its inputs, if
    it is needed: for example for dream queries and projectors, behind a frozen language model or U-Net. Hence
    a tower that is trained counts 3, a frozen one that conducts gradients 2, and any other 1.
    """
    trained = {path.split("/")[0] for path in partition(abstract_params(config), stage.trainable)[0]}
    before = {"vision": set(), "vae": set(), "llama": {"vision", "vision_projector", "dream_queries"}}
    before["unet"] = before["llama"] | {"llama", "condition_projector", "global_projector"}
    return {tower: 3 if tower in trained else 2 if trained & names else 1 for tower, names in before.items()}


def step_flops(config: DreamLLMConfig, stage: StageConfig) -> dict[str, float]:
    """Returns the model FLOPs of one step of a joint stage, by tower; {} for the other objectives.

    Empty slots of tokens and images are computed like full ones, and count.
    """
    if stage.objective != "joint":
        return {}
    data = stage.data
    dreams = data.batch_size * data.max_dreams if stage.loss.weight_vm else 0
    forward = forward_flops(config, data.batch_size, data.length, data.batch_size * data.max_images, dreams)
    times = passes(config, stage)
    return {tower: times[tower] * n for tower, n in forward.items()}
