"""PyTorch's side: the same work with transformers and diffusers, with PyTorch's fastest settings.

Attention is `scaled_dot_product_attention` with its causal flag, images are channels last, AdamW is fused,
and generation runs in inference mode. If `compiled`, the towers use `torch.compile`, and text is decoded on a
static cache with a CUDA graph ("reduce-overhead"). Otherwise the cache is dynamic, which is faster without
compilation. In bfloat16, the weights, the gradients and the optimizer's moments are all bfloat16.
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
class TorchSettings:
    """PyTorch's device, and whether it uses `torch.compile`."""

    device: str
    compiled: bool


class Towers(nn.Module):
    """The towers and connectors of a DreamLLM in PyTorch, with the weights of `inputs`."""

    def __init__(self, inputs: Inputs, torch_settings: TorchSettings):
        super().__init__()
        model, dtype = inputs.size.model, getattr(torch, inputs.size.model.dtype)
        assert model.llama and model.vision and model.unet and model.vae
        self.torch_settings, self.dtype = torch_settings, dtype
        with torch.device(torch_settings.device):
            self.llama = LlamaForCausalLM(TorchLlamaConfig(**_settings(config_files.llama_json, model.llama)))
            clip = CLIPVisionConfig(**_settings(config_files.clip_vision_json, model.vision))
            self.vision = CLIPVisionModel(clip)
            self.unet: Any = UNet2DConditionModel.from_config(config_files.unet_json(model.unet))
            self.vae: Any = AutoencoderKL.from_config(config_files.vae_json(model.vae))
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
            module = getattr(module, "vision_model", module)  # transformers 5.0 has one more level
            module.load_state_dict({_local(name, n): t for n, t in read.items()})
        for parameter in self.parameters():  # not the buffers: the rotary frequencies stay in float32
            parameter.data = parameter.data.to(dtype)
        self.unet.to(memory_format=torch.channels_last)
        self.vae.to(memory_format=torch.channels_last)
        assert model.vision_select_layer < -1
        # Only the hidden states of an earlier layer are used: the layers after it are removed.
        del getattr(self.vision, "vision_model", self.vision).encoder.layers[model.vision_select_layer + 1 :]
        self.eval()

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


def _settings(function: Any, config: Any) -> dict[str, Any]:
    settings = function(config, "float32")
    return {k: v for k, v in settings.items() if k not in ("architectures", "model_type", "torch_dtype")}


def _local(part: str, name: str) -> str:
    """Returns the name of a tensor in its module; a connector is a single linear layer here."""
    return name.split(".")[-1] if part.endswith("_projector") else name


class Step:
    """A train step: forward and backward passes of all towers, gradient clipping and AdamW."""

    def __init__(self, inputs: Inputs, training: Training, torch_settings: TorchSettings):
        self.size, self.towers = inputs.size, Towers(inputs, torch_settings)
        self.stage = inputs.size.stage(training)
        trainable = {path.split("/")[0] for path in self.stage.trainable}
        for name, parameter in self.towers.named_parameters():
            parameter.requires_grad_(name.split(".")[0] in trainable)
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
        assert batch.images is not None and batch.dream_images is not None
        self.images = torch.tensor(batch.images[:, 0], device=torch_settings.device)
        self.dream_images = torch.tensor(batch.dream_images[:, 0], device=torch_settings.device)
        self.tokens = torch.tensor(batch.tokens, device=torch_settings.device)
        targets = np.where(batch.loss_weights > 0, batch.targets, -100)
        self.targets = torch.tensor(targets, device=torch_settings.device, dtype=torch.long)
        self.supervised = float(batch.loss_weights.sum())
        self.image_start, self.dream_start = (
            int(np.argmax(slots[0] >= 0)) for slots in (batch.image_slots, batch.dream_slots)
        )
        self.noise: dict[str, Tensor] = {}
        if torch_settings.compiled:
            self.towers.compile_towers()

    def set_noise(self, step_noise: Any) -> None:
        """Sets the noise and the timesteps, those of the same step on our side."""
        device = self.towers.torch_settings.device
        for name in ("latent_noise", "noise"):
            noise = torch.tensor(np.asarray(getattr(step_noise, name))[:, 0], device=device)
            self.noise[name] = noise.permute(0, 3, 1, 2)
        self.timesteps = torch.tensor(np.asarray(step_noise.timesteps)[:, 0], device=device, dtype=torch.long)

    def loss(self) -> Tensor:
        """Returns the joint loss: weight_lm * cross-entropy + weight_vm * denoising error."""
        towers, model = self.towers, self.size.model
        queries, patches = model.num_dream_queries, model.num_patches
        embeds = towers.llama.get_input_embeddings()(self.tokens)
        dream_embeds = towers.dream_queries.expand(len(embeds), -1, -1)
        i, d = self.image_start, self.dream_start
        parts = [embeds[:, :i], towers.embed_images(self.images), embeds[:, i + patches : d], dream_embeds]
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
        """Runs one step and returns its loss."""
        loss = self.loss()
        loss.backward()
        if self.stage.optim.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.trained, self.stage.optim.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())  # waits for the device


@dataclasses.dataclass
class DecodeState:
    """The cache of the tokens read so far, and the logits of the next token."""

    cache: Any
    logits: Tensor


class Generator:
    """Generates text, images and documents from the prompts and conditions of `inputs`."""

    def __init__(self, inputs: Inputs, torch_settings: TorchSettings):
        self.size, self.inputs, self.torch_settings = inputs.size, inputs, torch_settings
        self.towers = Towers(inputs, torch_settings)
        self.towers.requires_grad_(False)
        self.one_token: Any = self.towers.llama.forward
        if torch_settings.compiled:
            self.one_token = torch.compile(self.towers.llama.forward, mode="reduce-overhead")
            self.towers.unet.compile()
            self.towers.vae.decoder.compile()

    def _cache(self, capacity: int) -> Any:
        config = self.towers.llama.config
        return (
            StaticCache(config=config, max_cache_len=capacity)
            if self.torch_settings.compiled
            else DynamicCache(config=config)
        )

    @torch.inference_mode()
    def read(self, rows: int, tokens_after: int) -> DecodeState:
        """Reads `rows` prompts into a cache that has capacity for `tokens_after` more tokens."""
        tokens = torch.tensor(self.inputs.prompts(rows).tokens, device=self.torch_settings.device)
        cache = self._cache(self.size.prompt + tokens_after)
        out: Any = self.towers.llama(
            input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        self.synchronize()
        return DecodeState(cache, out.logits[:, -1].float())

    @torch.inference_mode()
    def write(self, state: DecodeState, forbidden: Tensor) -> np.ndarray:
        """Decodes `size.new_tokens` tokens in each row, greedily; `forbidden` [V] masks tokens out."""
        tokens = []
        for _ in range(self.size.new_tokens):
            token = state.logits.masked_fill(forbidden, -torch.inf).argmax(-1, keepdim=True)
            tokens.append(token)
            out = self.one_token(
                input_ids=token, past_key_values=state.cache, use_cache=True, logits_to_keep=1
            )
            state.logits = out.logits[:, -1].float().clone()  # a CUDA graph's output is overwritten
        return torch.cat(tokens, dim=1).cpu().numpy()

    @torch.inference_mode()
    def draw(self, contexts: Tensor, null: Tensor, noise: Tensor) -> np.ndarray:
        """Generates images from contexts [M, Q, X] and initial latents [M, h, w, c].

        Runs DDIM with classifier-free guidance, then the VAE's decoder.
        """
        settings, towers = self.size.generation, self.towers
        scheduler: Any = DDIMScheduler.from_config(config_files.scheduler_json(self.size.model.schedule))
        scheduler.set_timesteps(settings.num_inference_steps, device=self.torch_settings.device)
        null_and_contexts = torch.cat([null.expand_as(contexts), contexts])
        latents = noise.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        for t in scheduler.timesteps:
            doubled = torch.cat([latents] * 2).to(towers.dtype)
            predicted = towers.unet(doubled, t, null_and_contexts).sample.float()
            unconditional, conditional = predicted.chunk(2)
            guided = unconditional + settings.guidance_scale * (conditional - unconditional)
            latents = scheduler.step(guided, t, latents, eta=0.0).prev_sample
        latents = (latents / towers.vae.config.scaling_factor).to(towers.dtype)
        pixels = towers.vae.decode(latents).sample.float().permute(0, 2, 3, 1)
        return (pixels * 127.5 + 127.5).clamp(0, 255).round().byte().cpu().numpy()

    @torch.inference_mode()
    def document(self, forbidden: Tensor, noise: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Continues one prompt with text, an image and more text, which can attend to the image."""
        model, towers, device = self.size.model, self.towers, self.torch_settings.device
        assert model.vision is not None
        tokens_after = 2 * self.size.new_tokens + model.num_dream_queries + 2 + model.num_patches + 2
        state = self.read(1, tokens_after)
        first = self.write(state, forbidden)
        embed = towers.llama.get_input_embeddings()

        def tokens(*ids: int) -> Tensor:
            return embed(torch.tensor([ids], device=device))

        dream_embeds = torch.cat([tokens(SPECIAL.dream_start), towers.dream_queries[None]], dim=1)
        hidden = self._extend(state, dream_embeds)
        context = towers.condition_projector(hidden[:, 1:])
        picture = self.draw(context, self.condition(1)[1], noise)[0]
        image = torch.tensor(to_vision(picture, model.vision.image_size)[None], device=device)
        before, after = tokens(SPECIAL.dream_end, SPECIAL.im_start), tokens(SPECIAL.im_end)
        hidden = self._extend(state, torch.cat([before, towers.embed_images(image), after], dim=1))
        state.logits = towers.llama.lm_head(hidden[:, -1]).float()
        return first, picture, self.write(state, forbidden)

    def _extend(self, state: DecodeState, embeds: Tensor) -> Tensor:
        model = self.towers.llama.model
        return model(inputs_embeds=embeds, past_key_values=state.cache, use_cache=True).last_hidden_state

    def condition(self, num_images: int) -> tuple[Tensor, Tensor]:
        """Returns the contexts of `num_images` images, and that of the empty prompt."""
        device, dtype = self.torch_settings.device, self.towers.dtype
        contexts, null = (torch.tensor(x, device=device) for x in self.inputs.conditions(num_images))
        return contexts.to(dtype), null.to(dtype)

    def synchronize(self) -> None:
        """Waits until the device has finished."""
        if self.torch_settings.device != "cpu":
            torch.cuda.synchronize()
