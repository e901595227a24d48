"""The model's config: which towers DreamLLM is composed of, and how they are joined."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from dreamllm_jax.config.base import build, check_sizes
from dreamllm_jax.config.towers import (
    ClipTextConfig,
    ClipVisionConfig,
    LlamaConfig,
    ProjectorConfig,
    ScheduleConfig,
    UNetConfig,
    VaeConfig,
)

Remat = Literal["none", "dots", "minimal", "full", "offload"]
AttentionKernel = Literal["auto", "xla", "chunked", "splash", "cudnn", "lean"]


@dataclasses.dataclass(frozen=True)
class RematConfig:
    """The remat policy of each tower: what its backward pass recomputes (see `ops.scan.remat`)."""

    llama: Remat = "none"
    vision: Remat = "none"
    unet: Remat = "none"


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """The implementation of long attention in each tower (see `ops.attention.selection`)."""

    llama: AttentionKernel = "auto"
    vision: AttentionKernel = "auto"
    unet: AttentionKernel = "auto"
    vae: AttentionKernel = "auto"


# The towers, by their fields in DreamLLMConfig. These are also the first parts of the paths of parameters.
TOWERS = ("llama", "vision", "unet", "vae", "text")


@dataclasses.dataclass(frozen=True)
class DreamLLMConfig:
    """Which towers a DreamLLM has, and how they are connected.

    A tower that is None is absent, and so are its connector and its losses. `vision_select_layer` counts like
    transformers' `hidden_states`: -2 is the second to last. `text` is the text tower with which the U-Net was
    pretrained; the objectives "contrastive" and "diffusion" use it, DreamLLM itself does not.

    With `scan_layers` the equal layers of a tower are one compiled body in a loop; without it each layer is
    compiled by itself, which takes longer and runs faster on GPUs that hold whole weights. None chooses by
    the platform, the mesh and the remat policy (see `ops.scan.prefers_loop`).
    """

    llama: LlamaConfig | None = None
    vision: ClipVisionConfig | None = None
    vision_projector: ProjectorConfig = dataclasses.field(default_factory=ProjectorConfig)
    vision_select_layer: int = -2
    num_dream_queries: int = 64
    condition_projector: ProjectorConfig = dataclasses.field(
        default_factory=lambda: ProjectorConfig(bias=False)
    )
    unet: UNetConfig | None = None
    vae: VaeConfig | None = None
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    text: ClipTextConfig | None = None
    contrastive: bool = False
    image_size: int = 512
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: RematConfig = dataclasses.field(default_factory=RematConfig)
    attention: AttentionConfig = dataclasses.field(default_factory=AttentionConfig)
    scan_layers: bool | None = None

    def __post_init__(self):
        check_sizes(self, "model", ("num_dream_queries", "image_size"))
        layers = 0 if self.vision is None else self.vision.num_hidden_layers
        if self.vision is not None and not -layers - 1 <= self.vision_select_layer <= layers:
            raise ValueError(
                f"model.vision_select_layer is {self.vision_select_layer}; the vision tower has {layers} "
                f"layers, hence states {-layers - 1} to {layers}."
            )
        if (self.unet is None) != (self.vae is None):
            raise ValueError("model: unet and vae come together; give both or neither.")
        if self.vae is not None and self.image_size % self.vae.downscale:
            raise ValueError(
                f"model.image_size={self.image_size} is not divisible by the VAE's downscale "
                f"{self.vae.downscale}; choose a multiple."
            )
        if self.unet is not None and self.vae is not None:
            channels = (self.unet.in_channels, self.unet.out_channels, self.vae.latent_channels)
            if len(set(channels)) > 1:
                raise ValueError(
                    f"model: the U-Net takes {channels[0]} channels and gives {channels[1]}, and the VAE's "
                    f"latents have {channels[2]}; they must be the same (U-Nets for inpainting or depth take "
                    "more, and are not supported)."
                )
        if self.contrastive and not (self.vision and self.text):
            raise ValueError("model.contrastive needs both the vision and the text tower.")
        if (
            self.unet is not None
            and self.text is not None
            and self.text.hidden_size != self.unet.cross_attention_dim
        ):
            raise ValueError(
                f"model: text.hidden_size={self.text.hidden_size} must equal unet.cross_attention_dim="
                f"{self.unet.cross_attention_dim}."
            )

    @property
    def sees(self) -> bool:
        """Whether images can be read."""
        return self.llama is not None and self.vision is not None

    @property
    def draws(self) -> bool:
        """Whether images can be written."""
        return self.llama is not None and self.unet is not None

    @property
    def num_patches(self) -> int:
        """P: the slots that one image takes in a row; 0 without a vision tower."""
        if self.vision is None:
            return 0
        return self.vision_projector.num_outputs(self.vision.num_patches)

    @property
    def context_length(self) -> int:
        """The longest sequence, in tokens, that the language model takes; rotary scaling is included."""
        assert self.llama is not None
        return self.llama.context_length

    @property
    def latent_size(self) -> int:
        """Height and width of the latents of one image."""
        assert self.vae is not None
        return self.image_size // self.vae.downscale


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """The defaults of generation, which a call may override; saved with the model.

    `sampler` names a function of `diffusion.samplers`, or one of your own as `package.module:function` (see
    `config.registry`). The name is looked up when the sampler is used or trained with: a saved model also
    loads where its sampler is not installed. `guidance_scale=1` turns guidance off, which halves the work.
    `template` is the conversation template that prompts are put into (None: prompts are continued as they
    are).
    """

    max_new_tokens: int = 256
    max_images: int = 8
    temperature: float = 0.0
    top_p: float = 1.0
    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    guidance_rescale: float = 0.0
    sampler: str = "dpmpp_2m"
    eta: float = 0.0
    template: str | None = None

    def __post_init__(self):
        for name, least in (("max_new_tokens", 1), ("max_images", 0), ("num_inference_steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        for name in ("temperature", "top_p", "guidance_scale", "guidance_rescale", "eta"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be finite.")
        if self.guidance_scale < 1:
            raise ValueError(
                f"guidance_scale is {self.guidance_scale}; it must be at least 1 (1: no guidance)."
            )
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature is {self.temperature} and top_p {self.top_p}; they must be >= 0 and in (0, 1]."
            )
        for name in ("guidance_rescale", "eta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 1].")


def model_config(mapping: Any, saved: bool = False) -> DreamLLMConfig:
    """Builds the model's config from the `model` section of a recipe, or of a `saved` file, strictly."""
    return build(DreamLLMConfig, mapping, "model", saved)
