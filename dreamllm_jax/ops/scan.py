"""Layers that repeat: rematerialization by named policies, and the scan over stacked parameters."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import flax.linen as nn
import jax

from dreamllm_jax.sharding import platform

M = TypeVar("M", bound=type[nn.Module])


def _save_weight_products(primitive: Any, *inputs: Any, **parameters: Any) -> Any:
    """Saves the results of products with weights and of convolutions: a checkpoint policy."""
    if primitive is jax.lax.conv_general_dilated_p:
        return True
    if primitive.name == "custom_vjp_call":  # `cpu.matmul` and `cpu.convolution` contain one such operation
        inside = parameters["call_jaxpr"].eqns
        return len(inside) == 1 and _save_weight_products(inside[0].primitive, **inside[0].params)
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *inputs, **parameters)


def _save_fused_attention(primitive: Any, *_: Any, **__: Any) -> bool:
    """Saves the results of cuDNN's attention, with the statistics that its backward pass reads."""
    return primitive.name == "dot_product_attention_fwd_wrapper"


_either = jax.checkpoint_policies.save_from_both_policies
POLICIES = {
    "dots": _either(_save_weight_products, _save_fused_attention),
    "minimal": _either(
        jax.checkpoint_policies.save_only_these_names("attention_output"), _save_fused_attention
    ),
    "full": None,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def remat(module: M, policy: str, prevent_cse: bool | tuple[bool, ...] = True) -> M:
    """Returns the layer's class with a backward pass that recomputes what `policy` does not save.

        none     saves everything and recomputes nothing
        dots     saves the layer's input, the products with weights, the convolutions, and what cuDNN's
                 attention returns
        minimal  saves the input and the result of attention, which is not recomputed
        full     saves the input
        offload  saves the input, in the host's memory

    The layer marks values by `jax.ad_checkpoint.checkpoint_name`: "layer_input" and "attention_output".
    `prevent_cse` is that of `jax.checkpoint`: which inputs get a barrier, so that XLA does not merge the
    recomputation with the forward pass. In a loop none needs one.

    Raises:
      ValueError: the policy is unknown.
    """
    if policy == "none":
        return module
    if policy not in POLICIES:
        raise ValueError(f"remat policy {policy!r} is unknown; choose none, {', '.join(POLICIES)}.")
    return nn.remat(module, prevent_cse=cast(Any, prevent_cse), policy=POLICIES[policy])  # declared as bool


def scan_layers(module: M, length: int, policy: str, inputs: int, loop: bool | None = None) -> M:
    """Returns the class of `length` equal layers as a scan, with parameters stacked on axis 0.

    A layer is called as `(carry, *inputs) -> (carry, output | None)`, where the `inputs` further arguments
    are the same for every layer. Each layer is rematerialized under `policy` (see `remat`). With `loop` the
    layer is compiled once, as the body of a loop; without, once for every layer (None: see `prefers_loop`).
    """
    loop = prefers_loop(policy) if loop is None else loop
    # Parameters (and random keys) need no barrier, which would copy them.
    prevent_cse = False if loop else (False, False, True, *[False] * inputs)
    return nn.scan(
        remat(module, policy, prevent_cse),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=cast(Any, (nn.broadcast,) * inputs),  # declared as int
        length=length,
        unroll=1 if loop else length,
    )


def prefers_loop(policy: str) -> bool:
    """Returns whether layers with this remat policy become a loop if no setting says so.

    XLA for GPUs copies the weights of a layer out of their stack, and what the backward pass needs into and
    out of another one, each time around. A step of stage I with Vicuna-7B on one H200 (4 rows of 2,048
    tokens) moves 495 GB in a loop and 351 GB without, and compiles in twice the time. Where weights are
    sharded along fsdp they are gathered anyway, and the loop bounds how many layers are gathered at once.
    Policies that trade time for memory keep the loop, which needs less of it: stage I (comprehension) on one
    H100, with remat "full", takes 22.4 GiB in a loop and 34.1 GiB without, for 4 % fewer bytes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return platform() != "gpu" or mesh.shape.get("fsdp", 1) > 1 or policy in ("full", "offload")
