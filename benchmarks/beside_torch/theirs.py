"""PyTorch's side: the same work with transformers and diffusers, in what serves PyTorch best.

Attention is `scaled_dot_product_attention` with its causal flag, pictures lie channels last, AdamW is
fused, generation runs in inference mode. Where `compiled`, the towers go through `torch.compile`, and text is
decoded on a static cache by a CUDA graph ("reduce-overhead"); else the cache grows, which is faster then. In
bfloat16 everything is: weights, gradients and the optimizer's moments.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, DynamicCache, LlamaForCausalLM, StaticCache
from transformers import LlamaConfig as TorchLlamaConfig

from benchmarks.beside_torch.inputs import SPECIAL, Inputs
from benchmarks.beside_torch.sizes import Training
from dreamllm_jax.checkpoint.parameter_files import as_tensors
from dreamllm_jax.convert import config_files
from dreamllm_jax.convert.mapping import to_torch
from dreamllm_jax.data.images import to_vision
from dreamllm_jax.models.clip import CLIP_MEAN, CLIP_STD

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Place:
    """Where PyTorch computes, and whether it compiles."""

    device: str
    compiled: bool


class Towers(nn.Module):
    """The towers and connectors of a DreamLLM, with our weights."""

    def __init__(self, inputs: Inputs, place: Place):
        super().__init__()
        model, dtype = inputs.size.model, getattr(torch, inputs.size.model.dtype)
        assert model.llama and model.vision and model.unet and model.vae
        self.place, self.dtype = place, dtype
        with torch.device(place.device):
            self.llama = LlamaForCausalLM(TorchLlamaConfig(**_settings(config_files.llama_json, model.llama)))
            clip = CLIPVisionConfig(**_settings(config_files.clip_vision_json, model.vision))
            self.vision = CLIPVisionModel(clip)
            self.unet = UNet2DConditionModel.from_config(config_files.unet_json(model.unet))
            self.vae = AutoencoderKL.from_config(config_files.vae_json(model.vae))
            width = model.llama.hidden_size
            self.vision_projector = nn.Linear(model.vision.hidden_size, width)
            self.condition_projector = nn.Linear(width, model.unet.cross_attention_dim, bias=False)
            self.dream_queries = nn.Parameter(torch.empty(model.num_dream_queries, width))
        parts, report = to_torch(as_tensors(inputs.params))
        report.raise_if_faulty("the benchmark's model")
        for name, tensors in parts.items():
            read = {n: torch.from_numpy(np.ascontiguousarray(t.read())) for n, t in tensors.items()}
            if name == "dream_queries":
                self.dream_queries.data.copy_(next(iter(read.values())).view_as(self.dream_queries))
                continue
            module = getattr(self, name)
            module = getattr(module, "vision_model", module)  # transformers 5.0 has one level more
            module.load_state_dict({_local(name, n): t for n, t in read.items()})
        for parameter in self.parameters():  # not the buffers: rotary frequencies stay in float32
            parameter.data = parameter.data.to(dtype)
        self.unet.to(memory_format=torch.channels_last)
        self.vae.to(memory_format=torch.channels_last)
        assert model.vision_select_layer < -1
        # States of the last layer but one are read: the last would be computed in vain.
        del getattr(self.vision, "vision_model", self.vision).encoder.layers[model.vision_select_layer + 1 :]
        self.eval()

    def compile_towers(self) -> None:
        """Each tower by itself, its shapes static."""
        self.llama.model.compile()
        self.vision.compile()
        self.unet.compile()
        self.vae.encoder.compile()
        self.vae.decoder.compile()

    def see(self, images: Tensor) -> Tensor:
        """Bytes [M, h, w, 3] as the language model sees them, [M, P, D]."""
        mean, std = (images.new_tensor(x, dtype=torch.float32) for x in (CLIP_MEAN, CLIP_STD))
        pixels = ((images / 255 - mean) / std).permute(0, 3, 1, 2)
        return self.vision_projector(self.vision(pixels.to(self.dtype)).last_hidden_state[:, 1:])


def _settings(function: Any, config: Any) -> dict[str, Any]:
    settings = function(config, "float32")
    return {k: v for k, v in settings.items() if k not in ("architectures", "model_type", "torch_dtype")}


def _local(part: str, name: str) -> str:
    """A connector's tensor under the name of a single linear map."""
    return name.split(".")[-1] if part.endswith("_projector") else name


class Step:
    """Forward pass of all towers, gradients into language model and queries, clipping, AdamW."""

    def __init__(self, inputs: Inputs, training: Training, place: Place):
        self.size, self.towers = inputs.size, Towers(inputs, place)
        self.stage = inputs.size.stage(training)
        tops = {path.split("/")[0] for path in self.stage.trainable}
        for name, parameter in self.towers.named_parameters():
            parameter.requires_grad_(name.split(".")[0] in tops)
        self.trained = [p for p in self.towers.parameters() if p.requires_grad]
        optim = self.stage.optim
        self.optimizer = torch.optim.AdamW(
            self.trained,
            lr=optim.learning_rate,
            betas=(optim.b1, optim.b2),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )
        batch = inputs.training_batch
        self.images = torch.tensor(batch.images[:, 0], device=place.device)
        self.dream_images = torch.tensor(batch.dream_images[:, 0], device=place.device)
        self.tokens = torch.tensor(batch.tokens, device=place.device)
        targets = np.where(batch.loss_weights > 0, batch.targets, -100)
        self.targets = torch.tensor(targets, device=place.device, dtype=torch.long)
        self.supervised = float(batch.loss_weights.sum())
        self.image_at, self.dream_at = (
            int(np.argmax(slots[0] >= 0)) for slots in (batch.image_slots, batch.dream_slots)
        )
        self.noise: dict[str, Tensor] = {}
        if place.compiled:
            self.towers.compile_towers()

    def set_noise(self, step_noise: Any) -> None:
        """Takes the noise and time steps of our side's next step."""
        place = self.towers.place.device
        for name in ("latent_noise", "noise"):
            noise = torch.tensor(np.asarray(getattr(step_noise, name))[:, 0], device=place)
            self.noise[name] = noise.permute(0, 3, 1, 2)
        self.timesteps = torch.tensor(np.asarray(step_noise.timesteps)[:, 0], device=place, dtype=torch.long)

    def loss(self) -> Tensor:
        """L = w_lm * CE + w_vm * score distillation."""
        towers, model = self.towers, self.size.model
        queries, patches = model.num_dream_queries, model.num_patches
        embeds = towers.llama.get_input_embeddings()(self.tokens)
        drawn = towers.dream_queries.expand(len(embeds), -1, -1)
        i, d = self.image_at, self.dream_at
        parts = [embeds[:, :i], towers.see(self.images), embeds[:, i + patches : d], drawn]
        embeds = torch.cat([*parts, embeds[:, d + queries :]], dim=1)
        hidden = towers.llama.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        logits = towers.llama.lm_head(hidden).float().flatten(0, 1)
        nll = F.cross_entropy(logits, self.targets.flatten(), ignore_index=-100, reduction="sum")
        context = towers.condition_projector(hidden[:, d : d + queries])
        weights = self.stage.loss
        return weights.weight_lm * nll / self.supervised + weights.weight_vm * self._denoising_error(context)

    def _denoising_error(self, context: Tensor) -> Tensor:
        towers, schedule = self.towers, self.size.model.schedule
        with torch.no_grad():
            pixels = (self.dream_images.permute(0, 3, 1, 2) / 127.5 - 1).to(towers.dtype)
            posterior = towers.vae.encode(pixels).latent_dist
            latents = posterior.mean.float() + posterior.std.float() * self.noise["latent_noise"]
            latents = latents * towers.vae.config.scaling_factor
            betas = torch.linspace(
                schedule.beta_start**0.5, schedule.beta_end**0.5, schedule.num_train_timesteps
            )
            levels = torch.cumprod(1 - betas**2, 0).to(latents.device)[self.timesteps].view(-1, 1, 1, 1)
            noisy = levels.sqrt() * latents + (1 - levels).sqrt() * self.noise["noise"]
        predicted = towers.unet(noisy.to(towers.dtype), self.timesteps, context).sample
        return F.mse_loss(predicted.float(), self.noise["noise"])

    def __call__(self) -> float:
        """One step; its loss."""
        loss = self.loss()
        loss.backward()
        if self.stage.optim.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.trained, self.stage.optim.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())  # waits for the device


@dataclasses.dataclass
class DecodeState:
    """What has been read: the cache, and the scores of the next token."""

    cache: Any
    logits: Tensor


class Generator:
    """Text, pictures and documents out of `inputs`."""

    def __init__(self, inputs: Inputs, place: Place):
        self.size, self.inputs, self.place = inputs.size, inputs, place
        self.towers = Towers(inputs, place)
        self.towers.requires_grad_(False)
        self.one_token = self.towers.llama.forward
        if place.compiled:
            self.one_token = torch.compile(self.towers.llama.forward, mode="reduce-overhead")
            self.towers.unet.compile()
            self.towers.vae.decoder.compile()

    def _cache(self, capacity: int) -> Any:
        config = self.towers.llama.config
        return (
            StaticCache(config=config, max_cache_len=capacity)
            if self.place.compiled
            else DynamicCache(config=config)
        )

    @torch.inference_mode()
    def read(self, rows: int, tokens_after: int) -> DecodeState:
        """Reads the prompts, with room for so many tokens more."""
        tokens = torch.tensor(self.inputs.prompts(rows).tokens, device=self.place.device)
        cache = self._cache(self.size.prompt + tokens_after)
        out = self.towers.llama(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.wait()
        return DecodeState(cache, out.logits[:, -1].float())

    @torch.inference_mode()
    def write(self, state: DecodeState, never: Tensor) -> np.ndarray:
        """`size.new_tokens` tokens a row, greedily, without those that `never` are written."""
        tokens = []
        for _ in range(self.size.new_tokens):
            token = state.logits.masked_fill(never, -torch.inf).argmax(-1, keepdim=True)
            tokens.append(token)
            out = self.one_token(
                input_ids=token, past_key_values=state.cache, use_cache=True, logits_to_keep=1
            )
            state.logits = out.logits[:, -1].float().clone()  # a CUDA graph's output is overwritten
        return torch.cat(tokens, dim=1).cpu().numpy()

    @torch.inference_mode()
    def draw(self, contexts: Tensor, null: Tensor, noise: Tensor) -> np.ndarray:
        """Pictures of contexts [M, Q, X] from latents [M, h, w, c]: guided DDIM, then the VAE's decoder."""
        settings, towers = self.size.generation, self.towers
        scheduler = DDIMScheduler.from_config(config_files.scheduler_json(self.size.model.schedule))
        scheduler.set_timesteps(settings.num_inference_steps, device=self.place.device)
        both = torch.cat([null.expand_as(contexts), contexts])
        latents = noise.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        for t in scheduler.timesteps:
            predicted = towers.unet(torch.cat([latents] * 2).to(towers.dtype), t, both).sample.float()
            free, guided = predicted.chunk(2)
            mixed = free + settings.guidance_scale * (guided - free)
            latents = scheduler.step(mixed, t, latents, eta=0.0).prev_sample
        latents = (latents / towers.vae.config.scaling_factor).to(towers.dtype)
        pixels = towers.vae.decode(latents).sample.float().permute(0, 2, 3, 1)
        return (pixels * 127.5 + 127.5).clamp(0, 255).round().byte().cpu().numpy()

    @torch.inference_mode()
    def document(self, never: Tensor, noise: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(text, picture, text) after one prompt; the picture is seen before the second text."""
        model, towers, device = self.size.model, self.towers, self.place.device
        assert model.vision is not None
        room = 2 * self.size.new_tokens + model.num_dream_queries + 2 + model.num_patches + 2
        state = self.read(1, room)
        first = self.write(state, never)
        embed = towers.llama.get_input_embeddings()

        def tokens(*ids: int) -> Tensor:
            return embed(torch.tensor([ids], device=device))

        asked = torch.cat([tokens(SPECIAL.dream_start), towers.dream_queries[None]], dim=1)
        hidden = self._extend(state, asked)
        context = towers.condition_projector(hidden[:, 1:])
        picture = self.draw(context, self.condition(1)[1], noise)[0]
        seen = torch.tensor(to_vision(picture, model.vision.image_size)[None], device=device)
        before, after = tokens(SPECIAL.dream_end, SPECIAL.im_start), tokens(SPECIAL.im_end)
        hidden = self._extend(state, torch.cat([before, towers.see(seen), after], dim=1))
        state.logits = towers.llama.lm_head(hidden[:, -1]).float()
        return first, picture, self.write(state, never)

    def _extend(self, state: DecodeState, embeds: Tensor) -> Tensor:
        model = self.towers.llama.model
        return model(inputs_embeds=embeds, past_key_values=state.cache, use_cache=True).last_hidden_state

    def condition(self, pictures: int) -> tuple[Tensor, Tensor]:
        """The contexts of so many pictures and that of the empty prompt."""
        device, dtype = self.place.device, self.towers.dtype
        contexts, null = (torch.tensor(x, device=device) for x in self.inputs.conditions(pictures))
        return contexts.to(dtype), null.to(dtype)

    def wait(self) -> None:
        """Until the device has done what it was asked for."""
        if self.place.device != "cpu":
            torch.cuda.synchronize()
