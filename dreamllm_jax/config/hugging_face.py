"""Reads the `config.json` files of transformers and diffusers.

Configs of transformers are read by its own classes: they know the defaults of options that a file leaves out
and the names of older releases, and they need no PyTorch. Configs of diffusers are read here, because
diffusers cannot read them without PyTorch. Either way, a value that is not implemented is refused.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import os
import types
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from dreamllm_jax.config.base import build

C = TypeVar("C")

# Options that change the network or its samples, with the values that are implemented. The default is first.
LLAMA_ONLY: Mapping[str, tuple] = {"hidden_act": ("silu",), "mlp_bias": (False,), "pretraining_tp": (1, None)}
UNET_ONLY: Mapping[str, tuple] = {
    "act_fn": ("silu",),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dropout": (0.0, 0),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1, 1.0),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1.0, 1),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
SCHEDULER_ONLY: Mapping[str, tuple] = {
    "trained_betas": (None,),
    "thresholding": (False,),
    "clip_sample": (False,),
    "variance_type": ("fixed_small", None),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_flow_sigmas": (False, None),
}


def from_options(cls: type[C], options: Mapping[str, Any], only: Mapping[str, tuple], where: str) -> C:
    """Returns the tower's config that these options of a `config.json` describe.

    Options that are fields of `cls` are taken. Those of `only` must have one of the values that are
    implemented; if absent, they have the first of them. All others describe the file, not the network, and
    are ignored.

    Raises:
      ValueError: a value that is not implemented; the option is named.
    """
    for key, allowed in only.items():
        value = options[key] if key in options else allowed[0]
        value = tuple(value) if isinstance(value, list) else value
        if value not in allowed:
            raise ValueError(
                f"{where}: option {key}={value!r} is not supported; supported: "
                f"{', '.join(map(repr, allowed))}."
            )
    names = field_names(cls)
    return build(cls, {key: value for key, value in options.items() if key in names}, where)


def field_names(cls: type) -> tuple[str, ...]:
    """Returns the names of a dataclass's fields."""
    return tuple(field.name for field in dataclasses.fields(cls))


def import_transformers() -> types.ModuleType:
    """Imports transformers when it is first needed, and returns it.

    The import takes seconds where PyTorch is installed. Where it is not, transformers would advise to install
    it, which configs and tokenizers do not need.
    """
    advice = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(advice)
    os.environ[advice] = "1"
    try:
        return importlib.import_module("transformers")
    finally:
        if before is None:
            del os.environ[advice]
        else:
            os.environ[advice] = before


def transformers_options(
    class_name: str, mapping: Mapping[str, Any], keys: Iterable[str], where: str
) -> dict[str, Any]:
    """Returns a `config.json` as transformers' class of this name reads it, defaults filled in.

    Only `keys` of the file are given to the class; what else is in the file does not matter. `mapping` is not
    changed.

    Example: `transformers_options("LlamaConfig", {"rope_theta": 5e5}, ("rope_theta",), "LLaMA config")` has
    `{"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}` among its options.

    Raises:
      ValueError: transformers refuses a value; the message is its own.
    """
    from huggingface_hub.errors import StrictDataclassError

    transformers = import_transformers()
    given = {key: copy.deepcopy(mapping[key]) for key in keys if key in mapping}
    try:
        return getattr(transformers, class_name).from_dict(given).to_dict()
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = error.__cause__ or error
        said = reason.args[0] if reason.args else reason
        raise ValueError(f"{where}: transformers.{class_name} refuses it: {said}") from error
