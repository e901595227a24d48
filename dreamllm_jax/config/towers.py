"""The towers' configs, each field under the name it has in the Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from dreamllm_jax.config.base import check_sizes
from dreamllm_jax.config.hugging_face import (
    LLAMA_ONLY,
    SCHEDULER_ONLY,
    UNET_ONLY,
    field_names,
    from_options,
    transformers_options,
)

ActivationName = Literal["silu", "quick_gelu", "gelu"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Context extension: positions are divided by `factor`, or the base grows with the length (NTK-aware)."""

    type: Literal["linear", "dynamic"]
    factor: float

    def __post_init__(self):
        if self.factor < 1:
            raise ValueError(f"rope_scaling.factor is {self.factor}; it must be at least 1.")


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """`transformers.LlamaConfig`."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False

    def __post_init__(self):
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        more = ("num_key_value_heads", "head_dim", "max_position_embeddings")
        check_sizes(self, "LLaMA config", (*names, *more))
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            _divides("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        _divides(
            "num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.num_key_value_heads
        )

    @property
    def context_length(self) -> int:
        """The longest document, in tokens; rotary scaling is included."""
        scaling = self.rope_scaling
        return int(self.max_position_embeddings * (scaling.factor if scaling else 1))

    @classmethod
    def from_hf(cls, mapping: Mapping[str, Any]) -> LlamaConfig:
        """Reads the `config.json` of a LLaMA, Vicuna or DreamLLM folder as `transformers.LlamaConfig` does.

        Raises:
          ValueError: a value that transformers refuses or that is not implemented; the option is named.
        """
        for key in ("rope_scaling", "rope_parameters"):
            if key in mapping and not isinstance(mapping[key], Mapping | None):
                raise ValueError(f"LLaMA config: {key} is {mapping[key]!r}; expected an object, or null.")
        keys = (*field_names(cls), *LLAMA_ONLY, "rope_parameters")
        options = transformers_options("LlamaConfig", mapping, keys, "LLaMA config")
        rope = options["rope_parameters"]
        kind = rope["rope_type"]
        if kind not in ("default", "linear", "dynamic"):
            raise ValueError(
                f"LLaMA config: rope scaling {kind!r} is not supported; supported: linear, dynamic."
            )
        options["rope_theta"] = rope["rope_theta"]
        options["rope_scaling"] = None if kind == "default" else {"type": kind, "factor": rope["factor"]}
        return from_options(cls, options, LLAMA_ONLY, "LLaMA config")


_CLIP_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "projection_dim",
)


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig:
    """`transformers.CLIPVisionConfig`; defaults are CLIP L/14's."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 14
    hidden_act: ActivationName = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 768

    def __post_init__(self):
        check_sizes(self, "CLIP vision config", (*_CLIP_SIZES, "num_channels", "image_size", "patch_size"))
        _divides("image_size", self.image_size, "patch_size", self.patch_size)
        _divides("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_hf(cls, mapping: Mapping[str, Any]) -> ClipVisionConfig:
        """Reads the `config.json` of a whole CLIP or of its vision tower as transformers does."""
        options = _clip_tower(mapping, "vision_config", "CLIPVisionConfig", field_names(cls))
        return from_options(cls, options, {}, "CLIP vision config")


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
    """`transformers.CLIPTextConfig`; defaults are CLIP L/14's."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: ActivationName = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 768
    eos_token_id: int = 49407

    def __post_init__(self):
        check_sizes(self, "CLIP text config", (*_CLIP_SIZES, "vocab_size", "max_position_embeddings"))
        _divides("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)

    @classmethod
    def from_hf(cls, mapping: Mapping[str, Any]) -> ClipTextConfig:
        """Reads the `config.json` of a whole CLIP or of its text tower as transformers does."""
        options = _clip_tower(mapping, "text_config", "CLIPTextConfig", field_names(cls))
        return from_options(cls, options, {}, "CLIP text config")


def _clip_tower(
    mapping: Mapping[str, Any], name: str, class_name: str, keys: tuple[str, ...]
) -> dict[str, Any]:
    """Returns the options of one tower, whose file may be that of the whole CLIP.

    A whole CLIP projects both towers to its own `projection_dim`.
    """
    if name in mapping or f"{name}_dict" in mapping:
        both = ("vision_config", "text_config", "vision_config_dict", "text_config_dict", "projection_dim")
        whole = transformers_options("CLIPConfig", mapping, both, "CLIP config")
        mapping = whole[name] | {"projection_dim": whole["projection_dim"]}
    return transformers_options(class_name, mapping, keys, "CLIP config")


_BIG_G = 1280  # width of SDXL's pooled text embedding


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """`diffusers.UNet2DConditionModel`; defaults are Stable Diffusion 1.5's.

    As in the published files, `attention_head_dim` is the *number* of heads of each block
    (a historical misnomer of diffusers) unless `num_attention_heads` is set.
    """

    sample_size: int = 64
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 768
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | tuple[int, ...] | None = None
    use_linear_projection: bool = False
    upcast_attention: bool | None = False
    addition_embed_type: Literal["text_time"] | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    def __post_init__(self):
        names = ("sample_size", "in_channels", "out_channels", "block_out_channels", "layers_per_block")
        heads = ("attention_head_dim", "num_attention_heads", "transformer_layers_per_block")
        check_sizes(self, "UNet config", (*names, *heads, "norm_num_groups", "cross_attention_dim"))
        blocks = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types"):
            if len(getattr(self, name)) != blocks:
                raise ValueError(
                    f"UNet config: {name} has {len(getattr(self, name))} entries; "
                    f"block_out_channels has {blocks}; they must match."
                )
        for kind in self.down_block_types:
            if kind not in ("CrossAttnDownBlock2D", "DownBlock2D"):
                raise ValueError(f"UNet config: down block {kind!r} is not supported.")
        for kind in self.up_block_types:
            if kind not in ("CrossAttnUpBlock2D", "UpBlock2D"):
                raise ValueError(f"UNet config: up block {kind!r} is not supported.")
        if self.mid_block_type not in ("UNetMidBlock2DCrossAttn", None):
            raise ValueError(f"UNet config: mid block {self.mid_block_type!r} is not supported.")
        if self.addition_embed_type and not (
            self.addition_time_embed_dim and self.projection_class_embeddings_input_dim
        ):
            raise ValueError(
                "UNet config: addition_embed_type 'text_time' needs addition_time_embed_dim and "
                "projection_class_embeddings_input_dim."
            )
        if self.addition_embed_type and self.pooled_text_dim == _BIG_G - self.addition_time_embed_dim:  # type: ignore[operator]
            raise ValueError(
                "UNet config: this is the refiner of SDXL, which takes an aesthetic score among five numbers "
                "in place of six sizes; it is not supported; use the base model."
            )

    def per_block(self, name: str) -> tuple[int, ...]:
        """Returns `transformer_layers_per_block` or `num_heads` of every resolution, as a tuple."""
        value = (
            (self.num_attention_heads or self.attention_head_dim)
            if name == "num_heads"
            else getattr(self, name)
        )
        return (value,) * len(self.block_out_channels) if isinstance(value, int) else tuple(value)

    @property
    def pooled_text_dim(self) -> int | None:
        """Width of the pooled text embedding (SDXL); None without added conditions."""
        if self.addition_embed_type is None:
            return None
        return self.projection_class_embeddings_input_dim - 6 * self.addition_time_embed_dim  # type: ignore[operator]

    @classmethod
    def from_hf(cls, mapping: Mapping[str, Any]) -> UNetConfig:
        """Reads the `unet/config.json` of a diffusers folder (SD 1.x, 2.x, SDXL).

        diffusers' own reader is part of a PyTorch module.

        Raises:
          ValueError: a value that is not implemented; the option is named.
        """
        return from_options(cls, mapping, UNET_ONLY, "UNet config")


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """`diffusers.AutoencoderKL`; defaults are Stable Diffusion's."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    sample_size: int = 512
    scaling_factor: float = 0.18215

    def __post_init__(self):
        names = ("in_channels", "out_channels", "latent_channels", "block_out_channels", "layers_per_block")
        check_sizes(self, "VAE config", (*names, "norm_num_groups", "sample_size"))

    @property
    def downscale(self) -> int:
        """Pixels per latent along one side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_hf(cls, mapping: Mapping[str, Any]) -> VaeConfig:
        """Reads the `vae/config.json` of a diffusers folder, which diffusers reads with PyTorch only.

        Raises:
          ValueError: a value that is not implemented; the option is named.
        """
        n = len(mapping["block_out_channels"]) if "block_out_channels" in mapping else 4
        only = {
            "act_fn": ("silu",),
            "down_block_types": (("DownEncoderBlock2D",) * n,),
            "up_block_types": (("UpDecoderBlock2D",) * n,),
            "use_quant_conv": (True,),
            "use_post_quant_conv": (True,),
            "shift_factor": (None,),
            "mid_block_add_attention": (True,),
            "latents_mean": (None,),
            "latents_std": (None,),
        }
        return from_options(cls, mapping, only, "VAE config")


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """The noise schedule: the fields of diffusers' `scheduler_config.json` that define it."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    rescale_betas_zero_snr: bool = False
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading"
    steps_offset: int = 1
    set_alpha_to_one: bool = True  # False: DDIM ends at the first training step's noise level

    def __post_init__(self):
        check_sizes(self, "schedule", ("num_train_timesteps",))
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "schedule: rescale_betas_zero_snr leaves no signal at the last step, where epsilon cannot be "
                "turned into an image; use prediction_type='v_prediction' or 'sample'."
            )

    @classmethod
    def from_hf(cls, mapping: Mapping[str, Any]) -> ScheduleConfig:
        """Reads the `scheduler/scheduler_config.json` of a diffusers folder, whatever its sampler.

        diffusers' own readers are part of its samplers, which need PyTorch.

        Raises:
          ValueError: a value that is not implemented; the option is named.
        """
        return from_options(cls, mapping, SCHEDULER_ONLY, "scheduler config")


@dataclasses.dataclass(frozen=True)
class ProjectorConfig:
    """A connector from one width to another (the reference's `projector_type`, `projector_depth`).

    linear: one linear map; mlp: `depth` linear maps with exact GELU between them; conv: one 3x3
    convolution over the square grid of patches; sam: two 3x3 convolutions of stride 2, then a linear map.
    """

    kind: Literal["linear", "mlp", "conv", "sam"] = "linear"
    depth: int = 1
    bias: bool = True

    def __post_init__(self):
        lowest = {"linear": 1, "mlp": 2, "conv": 1, "sam": 2}[self.kind]
        if self.depth < lowest or (self.kind != "mlp" and self.depth > lowest):
            least = "at least " if self.kind == "mlp" else ""
            raise ValueError(
                f"projector: kind {self.kind!r} has depth={self.depth}; it needs {least}{lowest}."
            )

    def num_outputs(self, num_patches: int) -> int:
        """Returns the number of output vectors for `num_patches` input vectors.

        Example: a grid of 16 x 16 patches stays 256 vectors, except for sam, which quarters each side: 16.

        Raises:
          ValueError: the patches do not form a square grid, which conv and sam need.
        """
        if self.kind in ("linear", "mlp"):
            return num_patches
        side = math.isqrt(num_patches)
        if side**2 != num_patches:
            raise ValueError(
                f"projector: kind {self.kind!r} got {num_patches} patches; it needs a square number of them "
                "(drop the class token)."
            )
        # A convolution of stride 2 and padding 1 halves, rounding up.
        return (-(-side // 4)) ** 2 if self.kind == "sam" else num_patches


def _divides(name: str, value: int, by_name: str, by: int | None) -> None:
    if not by or value % by:
        raise ValueError(f"{name}={value} is not divisible by {by_name}={by}; choose a multiple.")
