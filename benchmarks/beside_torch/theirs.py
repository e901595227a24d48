"""PyTorch's side: the same work with transformers and diffusers, with PyTorch's fastest settings.

Attention is `scaled_dot_product_attention` with its causal flag, images are channels last, AdamW is fused,
and generation runs in inference mode. If `compiled`, the towers use `torch.compile`, and text is decoded on a
static cache with a CUDA graph ("reduce-overhead"). Otherwise the cache is dynamic, which is faster without
compilation. In bfloat16, the optimizer updates float32 weights, as ours does (see `torch_optim`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache

from benchmarks.beside_torch.inputs import SPECIAL, Inputs
from benchmarks.beside_torch.sizes import Training
from benchmarks.beside_torch.torch_optim import Optimizer
from benchmarks.beside_torch.towers import TorchSettings, Towers
from dreamllm_jax.convert import config_files
from dreamllm_jax.data.images import to_vision

Tensor = torch.Tensor


class Step:
    """A train step: forward and backward passes of all towers, gradient clipping and the optimizer."""

    def __init__(self, inputs: Inputs, training: Training, torch_settings: TorchSettings):
        self.size = inputs.size
        self.stage = inputs.size.stage(training)
        trainable = tuple({path.split("/")[0] for path in self.stage.trainable})
        self.towers = Towers(inputs, torch_settings, trainable)
        for name, parameter in self.towers.named_parameters():
            parameter.requires_grad_(name.split(".")[0] in trainable)
        trained = {n: p for n, p in self.towers.named_parameters() if p.requires_grad}
        masters = [self.towers.masters[name] for name in trained] if self.towers.masters else None
        compiled = torch_settings.compiled
        self.optimizer = Optimizer(list(trained.values()), masters, self.stage.optim, compiled)
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
        self.micro_batches = self.stage.optim.grad_accum_steps
        if torch_settings.compiled:
            self.towers.compile_towers()

    def set_noise(self, step_noise: Any) -> None:
        """Sets the noise and the timesteps, those of the same step on our side."""
        device = self.towers.torch_settings.device
        for name in ("latent_noise", "noise"):
            noise = torch.tensor(np.asarray(getattr(step_noise, name))[:, 0], device=device)
            self.noise[name] = noise.permute(0, 3, 1, 2)
        self.timesteps = torch.tensor(np.asarray(step_noise.timesteps)[:, 0], device=device, dtype=torch.long)

    def loss(self, rows: slice) -> Tensor:
        """Returns the rows' part of the loss: weight_lm * cross-entropy + weight_vm * denoising error."""
        towers, model = self.towers, self.size.model
        queries, patches = model.num_dream_queries, model.num_patches
        embeds = towers.llama.get_input_embeddings()(self.tokens[rows])
        dream_embeds = towers.dream_queries.expand(len(embeds), -1, -1)
        i, d = self.image_start, self.dream_start
        images = towers.embed_images(self.images[rows])
        parts = [embeds[:, :i], images, embeds[:, i + patches : d], dream_embeds]
        embeds = torch.cat([*parts, embeds[:, d + queries :]], dim=1)
        hidden = towers.llama.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        logits = towers.llama.lm_head(hidden).float().flatten(0, 1)
        targets = self.targets[rows].flatten()
        nll = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / self.supervised
        context = towers.condition_projector(hidden[:, d : d + queries])
        error = self._denoising_error(context, rows) * (len(embeds) / len(self.tokens))
        return self.stage.loss.weight_lm * nll + self.stage.loss.weight_vm * error

    def _denoising_error(self, context: Tensor, rows: slice) -> Tensor:
        towers, schedule = self.towers, self.size.model.schedule
        noise, timesteps = self.noise["noise"][rows], self.timesteps[rows]
        with torch.no_grad():
            pixels = (self.dream_images[rows].permute(0, 3, 1, 2) / 127.5 - 1).to(towers.dtype)
            posterior = towers.vae.encode(pixels).latent_dist
            latents = posterior.mean.float() + posterior.std.float() * self.noise["latent_noise"][rows]
            latents = latents * towers.vae.config.scaling_factor
            betas = torch.linspace(
                schedule.beta_start**0.5, schedule.beta_end**0.5, schedule.num_train_timesteps
            )
            levels = torch.cumprod(1 - betas**2, 0).to(latents.device)[timesteps].view(-1, 1, 1, 1)
            noisy = levels.sqrt() * latents + (1 - levels).sqrt() * noise
        predicted = towers.unet(noisy.to(towers.dtype), timesteps, context).sample
        return F.mse_loss(predicted.float(), noise)

    def __call__(self) -> float:
        """Runs one step and returns its loss. If memory is too small, micro-batches become smaller."""
        while True:
            try:
                loss = self._gradients()
                break
            except torch.OutOfMemoryError:
                if self.micro_batches >= len(self.tokens):
                    raise
            self.micro_batches *= 2
            self.towers.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        self.optimizer.step()
        return float(loss)  # waits for the device

    def _gradients(self) -> Tensor:
        """Adds up the gradients of all micro-batches, and returns the loss."""
        count = -(-len(self.tokens) // self.micro_batches)
        total = torch.zeros((), device=self.tokens.device)
        for start in range(0, len(self.tokens), count):
            loss = self.loss(slice(start, start + count))
            loss.backward()
            total += loss.detach()
        return total


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
        self.caches: dict[tuple[int, int], Any] = {}
        self.one_token: Any = self.towers.llama.forward
        self.prompt: Any = self.towers.llama.forward
        if torch_settings.compiled:
            self.one_token = torch.compile(self.towers.llama.forward, mode="reduce-overhead")
            self.prompt = torch.compile(self.towers.llama.forward, dynamic=False)
            self.towers.unet.compile()
            self.towers.vae.decoder.compile()

    @torch.inference_mode()
    def cache(self, rows: int, tokens_after: int) -> Any:
        """Returns an empty cache for prompts with `tokens_after` more tokens.

        A static one is made once, because a CUDA graph belongs to its place in memory.
        """
        config, capacity = self.towers.llama.config, self.size.prompt + tokens_after
        if not self.torch_settings.compiled:
            return DynamicCache(config=config)
        if (rows, capacity) not in self.caches:
            self.caches[rows, capacity] = StaticCache(config=config, max_cache_len=capacity)
        self.caches[rows, capacity].reset()
        return self.caches[rows, capacity]

    @torch.inference_mode()
    def read(self, rows: int, tokens_after: int) -> DecodeState:
        """Reads `rows` prompts into a cache that has capacity for `tokens_after` more tokens."""
        return self._read(self.towers.llama, rows, self.cache(rows, tokens_after))

    @torch.inference_mode()
    def read_compiled(self, rows: int, cache: Any) -> DecodeState:
        """Reads `rows` prompts into an empty cache, compiled if all is; its first use must be by `read`."""
        return self._read(self.prompt, rows, cache)

    def _read(self, call: Any, rows: int, cache: Any) -> DecodeState:
        tokens = torch.tensor(self.inputs.prompts(rows).tokens, device=self.torch_settings.device)
        out: Any = call(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
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
