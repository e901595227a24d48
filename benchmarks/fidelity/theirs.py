"""`python -m benchmarks.fidelity.theirs CASE FOLDER`: writes a PyTorch model and records what it computes.

Writes FOLDER/source, the model in the format in which it would be published, and FOLDER/reference.npz: inputs
`in.*`, float32 outputs `output.*`, gradients `gradient.*`, and bfloat16 outputs and gradients `bfloat16.*`.
Images and latents are [B, C, h, w].
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.fidelity.cases import CASES, Case, random_normal, settings
from dreamllm_jax.config.presets import CLIP_L14, CLIP_L14_336, CLIP_L14_TEXT, SD_15

Arrays = dict[str, np.ndarray]
Run = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def input_tensor(array: np.ndarray) -> torch.Tensor:
    """Returns an array as a tensor; a float tensor requires a gradient."""
    tensor = torch.tensor(array)
    return tensor.requires_grad_() if tensor.is_floating_point() else tensor


def observe(
    module: torch.nn.Module, run: Run, inputs: Arrays, output: str, bfloat16: tuple[str, ...]
) -> Arrays:
    """Runs a model in float32 and bfloat16 and returns the arrays of reference.npz.

    Args:
      module: The model. It is converted to bfloat16 in place.
      run: Computes the outputs from the inputs.
      inputs: The inputs by name; float inputs get gradients.
      output: The output whose weighted sum, with fixed random weights, is differentiated.
      bfloat16: The outputs to record in bfloat16.
    """
    module.requires_grad_(False).eval()
    leaves = {name: input_tensor(value) for name, value in inputs.items()}
    outputs = run(leaves)
    weights = torch.tensor(random_normal(*outputs[output].shape, seed=99))
    (outputs[output] * weights).sum().backward()
    found = {f"in.{name}": value for name, value in inputs.items()}
    found |= {f"output.{name}": value.detach().numpy() for name, value in outputs.items()}
    grads = {name: value.grad for name, value in leaves.items() if value.is_floating_point()}
    found |= {f"gradient.{name}": grad.numpy() for name, grad in grads.items() if grad is not None}
    module.to(torch.bfloat16)
    leaves_bfloat16 = {
        n: v.detach().bfloat16().requires_grad_() if v.is_floating_point() else v for n, v in leaves.items()
    }
    outputs_bfloat16 = run(leaves_bfloat16)
    (outputs_bfloat16[output] * weights).sum().backward()
    found |= {f"bfloat16.{name}": outputs_bfloat16[name].detach().float().numpy() for name in bfloat16}
    return found | {
        f"bfloat16.gradient of {name}": value.grad.float().numpy()
        for name, value in leaves_bfloat16.items()
        if value.is_floating_point() and value.grad is not None
    }


def llama(case: Case, source: Path) -> Arrays:
    """Records the logits of 500 tokens, and the gradient with respect to their embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**{**case.settings, "attn_implementation": "eager"}))
    model.save_pretrained(source)
    ids = torch.tensor(np.random.default_rng(1).integers(3, 32000, (1, 500)))
    embeds = model.model.embed_tokens(ids).detach().numpy()

    def run(x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"logits": model(inputs_embeds=x["embeds"], use_cache=False).logits}

    return observe(model, run, {"embeds": embeds}, "logits", ("logits",))


def clip(case: Case, source: Path) -> Arrays:
    """Records states and embeddings of both towers, and the gradient with respect to the pixels."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        text_config=settings(CLIP_L14_TEXT),
        vision_config=settings(CLIP_L14),
        projection_dim=CLIP_L14.projection_dim,
    )
    model = CLIPModel(config)
    model.save_pretrained(source)
    tokens = np.random.default_rng(1).integers(0, 49406, (2, 77))
    tokens[:, 60] = 49407  # the end-of-text token

    def run(x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        vision = model.vision_model(x["pixels"], output_hidden_states=True)
        text = model.text_model(x["tokens"])
        return {
            "features": vision.hidden_states[-2],
            "vision": model.visual_projection(vision.pooler_output),
            "states": text.last_hidden_state,
            "text": model.text_projection(text.pooler_output),
        }

    inputs = {"pixels": random_normal(1, 3, 224, 224, seed=2), "tokens": tokens}
    return observe(model, run, inputs, "features", ("features", "states"))


def llava(case: Case, source: Path) -> Arrays:
    """Records the logits of a prompt with an image, and the gradient with respect to the pixels."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**settings(CLIP_L14_336)),
        text_config=LlamaConfig(**case.settings),
        image_token_index=31999,
        vision_feature_layer=-2,
    )
    model = LlavaForConditionalGeneration(config)
    model.save_pretrained(source)
    tokens = np.random.default_rng(1).integers(3, 31999, (1, 640))
    tokens[:, 20 : 20 + 576] = 31999

    def run(x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"logits": model(input_ids=x["tokens"], pixel_values=x["pixels"], use_cache=False).logits}

    inputs = {"pixels": random_normal(1, 3, 336, 336, seed=2), "tokens": tokens}
    return observe(model, run, inputs, "logits", ("logits",))


def unet(case: Case, source: Path) -> Arrays:
    """Records the U-Net's prediction and its gradients, and the outputs of the VAE's encoder and decoder."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

    model = UNet2DConditionModel(**case.settings)
    blocks: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    vae: Any = AutoencoderKL(**settings(SD_15.vae), **blocks)
    model.save_pretrained(source / "unet")
    vae.save_pretrained(source / "vae")
    schedule = DDPMScheduler(
        beta_start=SD_15.schedule.beta_start,
        beta_end=SD_15.schedule.beta_end,
        beta_schedule=SD_15.schedule.beta_schedule,
        clip_sample=False,
    )
    schedule.save_pretrained(source / "scheduler")
    inputs = {
        "latents": random_normal(1, 4, 16, 16, seed=2),
        "context": random_normal(1, 64, case.settings["cross_attention_dim"], seed=3),
        "pixels": random_normal(1, 3, 64, 64, seed=4),
    }
    if case.name == "sdxl":
        inputs |= {
            "text_embeds": random_normal(1, 1280, seed=5),
            "time_ids": np.array([[512, 768, 0, 128, 512, 512]]),
        }

    def run(x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        added = {name: x[name] for name in ("text_embeds", "time_ids") if name in x}
        steps = torch.tensor([500])
        predicted = model(x["latents"], steps, x["context"], added_cond_kwargs=added or None).sample
        moments = vae.encode(x["pixels"]).latent_dist.parameters
        return {"unet": predicted, "moments": moments, "decoded": vae.decode(x["latents"]).sample}

    both = torch.nn.ModuleList([model, vae])
    return observe(both, run, inputs, "unet", ("unet", "moments", "decoded"))


KINDS = {"llama": llama, "clip": clip, "llava": llava, "unet": unet}


def main() -> None:
    """Creates the model of the case that the command line names, and writes its folder."""
    case, folder = CASES[sys.argv[1]], Path(sys.argv[2])
    torch.manual_seed(0)
    found: dict[str, Any] = KINDS[case.kind](case, folder / "source")
    np.savez(folder / "reference.npz", **found)


if __name__ == "__main__":
    main()
