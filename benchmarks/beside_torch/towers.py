"""The towers in PyTorch: the models of transformers and diffusers with the weights of the benchmark."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaForCausalLM
from transformers import LlamaConfig as TorchLlamaConfig

from benchmarks.beside_torch.inputs import Inputs
from dreamllm_jax.checkpoint.parameter_files import as_tensors
from dreamllm_jax.checkpoint.tensors import Mapped, Row
from dreamllm_jax.convert import config_files
from dreamllm_jax.convert.mapping import to_torch
from dreamllm_jax.models.clip import CLIP_MEAN, CLIP_STD
from dreamllm_jax.models.parameters import abstract_params

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class TorchSettings:
    """PyTorch's device, and whether it uses `torch.compile`."""

    device: str
    compiled: bool


class Towers(nn.Module):
    """The towers and connectors of a DreamLLM in PyTorch, with the weights of `inputs`.

    `trained` names the parts whose float32 weights are kept in `masters`, by name, beside the weights in the
    model's dtype; none is kept if that is float32 too.
    """

    def __init__(self, inputs: Inputs, torch_settings: TorchSettings, trained: tuple[str, ...] = ()):
        super().__init__()
        model, dtype = inputs.size.model, getattr(torch, inputs.size.model.dtype)
        assert model.llama and model.vision and model.unet and model.vae
        self.torch_settings, self.dtype = torch_settings, dtype
        with _default_dtype(dtype), torch.device(torch_settings.device):
            self.llama = LlamaForCausalLM(TorchLlamaConfig(**_settings(config_files.llama_json, model.llama)))
            clip = CLIPVisionConfig(**_settings(config_files.clip_vision_json, model.vision))
            self.vision = CLIPVisionModel(clip)
            self.unet: Any = UNet2DConditionModel.from_config(config_files.unet_json(model.unet))
            self.vae: Any = AutoencoderKL.from_config(config_files.vae_json(model.vae))
            width = model.llama.hidden_size
            self.vision_projector = nn.Linear(model.vision.hidden_size, width)
            self.condition_projector = nn.Linear(width, model.unet.cross_attention_dim, bias=False)
            self.dream_queries = nn.Parameter(torch.empty(model.num_dream_queries, width))
        self.unet.to(memory_format=torch.channels_last)
        self.vae.to(memory_format=torch.channels_last)
        self.masters: dict[str, Tensor] = {}
        self._load(inputs, trained if dtype != torch.float32 else ())
        assert model.vision_select_layer < -1
        # Only the hidden states of an earlier layer are used: the layers after it are removed.
        del getattr(self.vision, "vision_model", self.vision).encoder.layers[model.vision_select_layer + 1 :]
        self.eval()

    @torch.no_grad()
    def _load(self, inputs: Inputs, trained: tuple[str, ...]) -> None:
        """Copies the weights into the parameters, one array of ours at a time."""
        parameters = dict(self.named_parameters())
        loaded = set()
        plan = _plan(inputs)
        for path, array in inputs.leaves(plan):
            leaf = _on_device(array, self.torch_settings.device)
            for part, name, view in plan[path]:
                full_name = self._full_name(part, name)
                weights = view(leaf)[0] if part == "dream_queries" else view(leaf)
                parameters[full_name].copy_(weights)
                loaded.add(full_name)
                if part in trained:
                    self.masters[full_name] = weights.clone(memory_format=torch.contiguous_format)
        assert loaded == parameters.keys(), loaded ^ parameters.keys()

    def _full_name(self, part: str, name: str) -> str:
        """Returns the name of a parameter; a connector is a single linear layer here."""
        if part == "dream_queries":
            return part
        if part.endswith("_projector"):
            return f"{part}.{name.split('.')[-1]}"
        inner = "vision_model." if hasattr(getattr(self, part), "vision_model") else ""  # transformers 5.0
        return f"{part}.{inner}{name}"

    def compile_towers(self) -> None:
        """Compiles each tower separately, with static shapes."""
        self.llama.model.compile()
        self.vision.compile()
        self.unet.compile()
        self.vae.encoder.compile()
        self.vae.decoder.compile()

    def embed_images(self, images: Tensor) -> Tensor:
        """Returns the language model's embeddings [M, P, D] of images, uint8 [M, h, w, 3]."""
        mean, std = (images.new_tensor(x, dtype=torch.float32) for x in (CLIP_MEAN, CLIP_STD))
        pixels = ((images / 255 - mean) / std).permute(0, 3, 1, 2)
        return self.vision_projector(self.vision(pixels.to(self.dtype)).last_hidden_state[:, 1:])


def _plan(inputs: Inputs) -> dict[str, list[tuple[str, str, Callable[[Tensor], Tensor]]]]:
    """Returns, for each of our paths, PyTorch's tensors as (part, name, view of our array)."""
    parts, report = to_torch(as_tensors(abstract_params(inputs.size.model)))
    report.raise_if_faulty("the benchmark's model")
    plan: dict[str, list[tuple[str, str, Callable[[Tensor], Tensor]]]] = {}
    for part, tensors in parts.items():
        for name, tensor in tensors.items():
            assert isinstance(tensor, Mapped)
            layer = tensor.base.index if isinstance(tensor.base, Row) else None
            path = tensor.base.base.origin if isinstance(tensor.base, Row) else tensor.base.origin

            def view(leaf: Tensor, layer: int | None = layer, function: Any = tensor.function) -> Tensor:
                return _rearranged(leaf if layer is None else leaf[layer], function)

            plan.setdefault(path, []).append((part, name, view))
    return plan


def _rearranged(x: Tensor, function: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """Returns what `function`, which only rearranges axes of numpy arrays, makes of a tensor: a view."""
    if x.ndim == 0:
        return x
    # Nothing is read from this array. Its elements have one byte, so that numpy counts strides as torch does.
    layout = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), x.shape, x.stride())
    layout = function(layout)
    return x.as_strided(layout.shape, layout.strides, x.storage_offset())


def _on_device(leaf: Any, device: str) -> Tensor:
    """Returns an array of numpy or JAX as a tensor; one of JAX on the same device is shared, not copied."""
    if isinstance(leaf, jax.Array):
        return torch.from_dlpack(jax.block_until_ready(leaf)).to(device)
    return torch.from_numpy(np.ascontiguousarray(leaf)).to(device)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _settings(function: Any, config: Any) -> dict[str, Any]:
    settings = function(config, "float32")
    return {k: v for k, v in settings.items() if k not in ("architectures", "model_type", "torch_dtype")}
