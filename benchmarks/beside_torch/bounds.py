"""Compares the FLOPs and memory traffic of our side with the peaks of the device."""

from __future__ import annotations

import dataclasses
import functools

import jax
from flax.traverse_util import unflatten_dict

from benchmarks.beside_torch.sizes import Size, Training
from dreamllm_jax.config.chips import find_device
from dreamllm_jax.config.model import AttentionConfig
from dreamllm_jax.models.dreamllm import DreamLLMModule
from dreamllm_jax.models.parameters import abstract_params
from dreamllm_jax.train.flops import flops, forward_flops, step_flops


def token_bytes(size: Size, rows: int) -> float:
    """Returns the bytes that must be read to decode one token in each of `rows` rows.

    These are the weights, once, and the cached keys and values of each row. The cache is counted at its mean
    length while `size.new_tokens` are decoded.
    """
    c = size.model.llama
    assert c is not None and c.head_dim is not None and c.num_key_value_heads is not None
    width, heads, groups = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads
    attention = 2 * width * (heads + groups * c.head_dim)
    weights = c.num_hidden_layers * (attention + 3 * width * c.intermediate_size) + width * c.vocab_size
    length = size.prompt + (size.new_tokens + 1) / 2
    cache = 2 * c.num_hidden_layers * rows * length * groups * c.head_dim
    return (weights + cache) * (4 if size.model.dtype == "float32" else 2)


def bandwidth_share(size: Size, rows: int, seconds: float) -> dict[str, float]:
    """Returns the bytes/s of decoding `size.new_tokens` in `seconds`, and the share of the peak if known."""
    rate = token_bytes(size, rows) * size.new_tokens / seconds
    device = find_device(jax.devices()[0].device_kind)
    found = {"bytes_per_token": token_bytes(size, rows), "bytes_per_second": rate}
    return found | ({} if device is None else {"bandwidth_share": rate / device.hbm_bandwidth})


def joint_flops(size: Size, training: Training) -> float:
    """Returns the model FLOPs of a train step."""
    return sum(step_flops(size.model, size.stage(training)).values())


def prefill_flops(size: Size, rows: int) -> float:
    """Returns the model FLOPs of prefilling prompts.

    A slight overestimate: it counts the logits of every position, not only of the last.
    """
    return forward_flops(size.model, rows, size.prompt, 0, 0)["llama"]


def image_flops(size: Size) -> float:
    """Returns the model FLOPs of images: the U-Net's steps with guidance, then the VAE's decoder."""
    unet = forward_flops(size.model, 1, 1, 0, size.num_images)["unet"]
    return 2 * size.steps * unet + decoder_flops(size)


def decoder_flops(size: Size) -> float:
    """Returns the model FLOPs of the VAE's decoder on the latents of `size.num_images` images."""
    xla = AttentionConfig(llama="xla", vision="xla", unet="xla", vae="xla")
    config = dataclasses.replace(size.model, attention=xla)
    assert config.unet is not None
    shape = (size.num_images, config.latent_size, config.latent_size, config.unet.in_channels)
    variables = {"params": unflatten_dict(abstract_params(config), sep="/")}
    decode = functools.partial(DreamLLMModule(config).apply, method=DreamLLMModule.decode_image)
    return flops(decode, variables, jax.ShapeDtypeStruct(shape, config.dtype))


def flop_rate(flops: float, seconds: float) -> dict[str, float]:
    """Returns the FLOP/s, and the MFU (their share of the bfloat16 peak) if the device's peak is known."""
    device = find_device(jax.devices()[0].device_kind)
    found = {"flops": flops, "flops_per_second": flops / seconds}
    return found | ({} if device is None else {"mfu": flops / seconds / device.peak})
