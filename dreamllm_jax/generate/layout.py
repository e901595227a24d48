"""The layout of parameters in generation: the language model layer by layer, with joined projections.

Checkpoints and training stack the layers on axis 0, so that one compiled body is scanned over them. A loop
over tokens would copy a layer's weights out of that stack for every token, and reading the weights is nearly
all that a token costs. Here a layer's weights lie in memory as the products read them, and two products
replace five:

    checkpoint                              generation
    llama/layers/self_attn/q_proj/kernel    llama/layers_0/self_attn/qkv_proj/kernel   [D, K (N / K + 2) H]
                   [layers, D, N H]         ...
    .../k_proj/kernel, .../v_proj/kernel
                   [layers, D, K H]
    llama/layers/mlp/gate_proj/kernel,      llama/layers_0/mlp/gate_up_proj/kernel     [D, 2, F]
    .../up_proj/kernel [layers, D, F]       ...
    llama/layers/X [layers, ...]            llama/layers_0/X [...]

A column group of `qkv_proj` has the N / K query heads that share a key, the key and the value, so that a mesh
that divides the key heads divides the groups. All functions take and return flat parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from dreamllm_jax.checkpoint.tensors import Joined, Mapped, Row, Stacked, Tensor
from dreamllm_jax.config.towers import LlamaConfig

STACK = "llama/layers/"
JOINED: Mapping[str, tuple[str, ...]] = {
    "self_attn/qkv_proj": ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj"),
    "mlp/gate_up_proj": ("mlp/gate_proj", "mlp/up_proj"),
}


def generation_layout(params: Mapping[str, Any], config: LlamaConfig) -> dict[str, Any]:
    """Returns a checkpoint's parameters in the layout of generation.

    Tensors that are not read yet stay so; arrays are taken apart where they are.
    """
    result = {path: value for path, value in params.items() if not path.startswith(STACK)}
    stacked = {path.removeprefix(STACK): v for path, v in params.items() if path.startswith(STACK)}
    joined = {part: whole for whole, parts in JOINED.items() for part in parts}
    for path in stacked:
        module, leaf = path.rsplit("/", 1)
        if module in joined and module != JOINED[joined[module]][0]:
            continue  # comes with its first part
        for index in range(config.num_hidden_layers):
            name = f"llama/layers_{index}/"
            if module not in joined:
                result[name + path] = _row(stacked[path], index)
                continue
            whole = joined[module]
            parts = [_row(stacked[f"{part}/{leaf}"], index) for part in JOINED[whole]]
            join = functools.partial(_join, whole, config)
            lazy = isinstance(parts[0], Tensor)
            result[f"{name}{whole}/{leaf}"] = Joined(tuple(parts), join) if lazy else join(*parts)
    return result


def checkpoint_layout(params: Mapping[str, Any], config: LlamaConfig) -> dict[str, Any]:
    """Returns parameters in the layout of generation as those of a checkpoint: the inverse.

    Of tensors it returns tensors, which copy nothing. Of arrays it returns arrays on the same devices, whose
    stacked layers are a second copy of the language model.
    """
    first = "llama/layers_0/"
    result = {path: value for path, value in params.items() if not path.startswith("llama/layers_")}
    for path in (path.removeprefix(first) for path in params if path.startswith(first)):
        layers = [params[f"llama/layers_{i}/{path}"] for i in range(config.num_hidden_layers)]
        module, leaf = path.rsplit("/", 1)
        if module not in JOINED:
            result[STACK + path] = _stack(layers)
            continue
        for number, part in enumerate(JOINED[module]):
            split = functools.partial(_part, module, config, number)
            parts = [Mapped(x, split) if isinstance(x, Tensor) else split(x) for x in layers]
            result[f"{STACK}{part}/{leaf}"] = _stack(parts)
    return result


def _row(value: Any, index: int) -> Any:
    return Row(value, index) if isinstance(value, Tensor) else value[index]


def _stack(layers: Sequence[Any]) -> Any:
    return Stacked(tuple(layers)) if isinstance(layers[0], Tensor) else jnp.stack(layers)


def _join(whole: str, config: LlamaConfig, *parts: Any) -> Any:
    """Returns the joined kernel [D, ...] or bias [...] of separate ones, all numpy or all jax arrays."""
    numpy = np if isinstance(parts[0], np.ndarray) else jnp
    leading = parts[0].shape[:-1]
    if whole == "mlp/gate_up_proj":
        return numpy.stack(parts, axis=-2)
    shape = (*leading, config.num_key_value_heads, -1, config.head_dim)
    return numpy.concatenate([part.reshape(shape) for part in parts], axis=-2).reshape(*leading, -1)


def _part(whole: str, config: LlamaConfig, number: int, joined: Any) -> Any:
    """Returns part `number` of a joined kernel or bias: the inverse of `_join`."""
    if whole == "mlp/gate_up_proj":
        return joined[..., number, :]
    groups = config.num_key_value_heads
    assert groups is not None
    shared = config.num_attention_heads // groups
    leading = joined.shape[:-1]
    heads = joined.reshape(*leading, groups, shared + 2, config.head_dim)
    cuts: Sequence[slice] = (slice(shared), slice(shared, shared + 1), slice(shared + 1, None))
    return heads[..., cuts[number], :].reshape(*leading, -1)
