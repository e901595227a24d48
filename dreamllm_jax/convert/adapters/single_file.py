"""Stable Diffusion in one file, as its authors publish it (SD 1.x, 2.x and SDXL; code base of arXiv
2112.10752).

Such a file has no config. Its blocks are numbered consecutively, so the number of residual blocks between two
changes of resolution determines the names in diffusers, and the shapes determine the sizes. Text encoders,
which DreamLLM does not use, are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from dreamllm_jax.checkpoint.tensors import Tensor
from dreamllm_jax.config.base import build
from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.config.towers import ScheduleConfig, UNetConfig, VaeConfig
from dreamllm_jax.convert.foreign import ForeignCheckpoint
from dreamllm_jax.convert.mapping import Report
from dreamllm_jax.convert.weights import read_file

UNET, VAE = "model.diffusion_model.", "first_stage_model."

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_MIDDLE = {"0": "mid_block.resnets.0", "1": "mid_block.attentions.0", "2": "mid_block.resnets.1"}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def unet_name(name: str, layers: int) -> str | None:
    """Returns diffusers' name of a U-Net's tensor, with `layers` residual blocks per level; None if it is
    unknown.
    """
    for theirs, ours in _ENDS.items():
        if name.startswith(f"{theirs}."):
            return ours + name[len(theirs) :]
    found = re.fullmatch(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.(.+)", name)
    if found is None:
        return None
    side, number, rest = found[1], int(found[2]), found[3]
    if side == "middle_block":
        return _renamed(_MIDDLE[found[2]], rest) if found[2] in _MIDDLE else None
    # The first input block is conv_in. Each level then has one more block, which changes the resolution.
    level, index = divmod(number - (side == "input_blocks"), layers + 1)
    block = f"{'down' if side == 'input_blocks' else 'up'}_blocks.{level}"
    part, _, tail = rest.partition(".")
    if tail.startswith("op."):
        return f"{block}.downsamplers.0.conv{tail[2:]}"
    if tail.startswith("conv."):
        return f"{block}.upsamplers.0.{tail}"
    kind = "resnets" if part == "0" else "attentions"
    return _renamed(f"{block}.{kind}.{index}", tail)


def _renamed(block: str, tail: str) -> str:
    """Returns the name inside a residual block, or inside a transformer, whose names are those of
    diffusers.
    """
    for theirs, ours in _RESNET.items():
        if tail.startswith(f"{theirs}."):
            return f"{block}.{ours}{tail[len(theirs) :]}"
    return f"{block}.{tail}"


def vae_name(name: str, levels: int) -> str:
    """Returns diffusers' name of a VAE's tensor."""
    name = re.sub(
        r"^(en|de)coder\.mid\.attn_1\.(\w+)", lambda m: f"{m[1]}coder.mid.attn_1.{_ATTENTION[m[2]]}", name
    )
    name = re.sub(r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets.", name)
    name = re.sub(r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0.", name)
    name = re.sub(r"\.up\.(\d+)\.", lambda m: f".up_blocks.{levels - 1 - int(m[1])}.", name)
    name = name.replace(".block.", ".resnets.").replace(".upsample.", ".upsamplers.0.")
    name = name.replace(".mid.attn_1.", ".mid_block.attentions.0.")
    name = re.sub(r"\.mid\.block_(\d)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", name)
    return name.replace(".nin_shortcut.", ".conv_shortcut.").replace(".norm_out.", ".conv_norm_out.")


def split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Returns {"unet": ..., "vae": ...} under diffusers' names, and the names of other tensors.

    Raises:
      ValueError: the file has no U-Net or no VAE.
    """
    unet = {name.removeprefix(UNET): t for name, t in tensors.items() if name.startswith(UNET)}
    vae = {name.removeprefix(VAE): t for name, t in tensors.items() if name.startswith(VAE)}
    if "input_blocks.0.0.weight" not in unet or "decoder.conv_in.weight" not in vae:
        raise ValueError(
            "the file is not a Stable Diffusion (no U-Net under model.diffusion_model, or no VAE under "
            "first_stage_model); give a complete checkpoint, or a folder."
        )
    downs = [name for name in unet if re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", name)]
    if downs:  # residual blocks until the resolution first changes
        layers = min(int(name.split(".")[1]) for name in downs) - 1
    else:
        layers = _count(unet, r"input_blocks\.(\d+)\.") - 1
    levels = _count(vae, r"encoder\.down\.(\d+)\.")
    parts: dict[str, dict[str, Tensor]] = {
        "unet": {unet_name(name, layers) or name: tensor for name, tensor in unet.items()},
        "vae": {vae_name(name, levels): tensor for name, tensor in vae.items()},
    }
    left = [name for name in tensors if not name.startswith((UNET, VAE))]
    return parts, left


def configs(
    parts: Mapping[str, Mapping[str, Tensor]], prediction_type: str | None = None
) -> tuple[UNetConfig, VaeConfig, ScheduleConfig]:
    """Returns the configs of the networks of `split`, from their shapes.

    Raises:
      ValueError: `prediction_type` is not given for a Stable Diffusion 2, whose two kinds differ only in it.
    """
    unet, vae = parts["unet"], parts["vae"]
    levels = _count(unet, r"down_blocks\.(\d+)\.")
    widths = tuple(unet[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels))
    layers = _count(unet, r"down_blocks\.0\.resnets\.(\d+)\.")
    attention = r"down_blocks\.{}\.attentions\.0\.transformer_blocks\.(\d+)\."
    depths = tuple(_count(unet, attention.format(i)) for i in range(levels))
    context = unet["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1]
    linear = len(unet["mid_block.attentions.0.proj_in.weight"].shape) == 2
    added = (
        unet["add_embedding.linear_1.weight"].shape[1] if "add_embedding.linear_1.weight" in unet else None
    )
    if linear and added is None and prediction_type is None:
        raise ValueError(
            "this is a Stable Diffusion 2, whose two kinds differ only in what they predict; choose with "
            "--prediction-type: epsilon (the 512-pixel base) or v_prediction (768 pixels)."
        )
    sides = [("CrossAttnDownBlock2D" if depth else "DownBlock2D") for depth in depths]
    unet_config = UNetConfig(
        sample_size=128 if added else 96 if prediction_type == "v_prediction" else 64,
        in_channels=unet["conv_in.weight"].shape[1],
        out_channels=unet["conv_out.weight"].shape[0],
        down_block_types=tuple(sides),
        up_block_types=tuple(side.replace("Down", "Up") for side in reversed(sides)),
        block_out_channels=widths,
        layers_per_block=layers,
        cross_attention_dim=context,
        # SD 1 has 8 heads at every width, later versions heads of 64 channels.
        attention_head_dim=tuple(width // 64 for width in widths) if linear else 8,
        use_linear_projection=linear,
        transformer_layers_per_block=tuple(depth or 1 for depth in depths),
        addition_embed_type="text_time" if added else None,
        addition_time_embed_dim=256 if added else None,
        projection_class_embeddings_input_dim=added,
    )
    vae_levels = _count(vae, r"encoder\.down_blocks\.(\d+)\.")
    vae_config = VaeConfig(
        latent_channels=vae["decoder.conv_in.weight"].shape[1],
        block_out_channels=tuple(
            vae[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(vae_levels)
        ),
        layers_per_block=_count(vae, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        sample_size=1024 if added else 512,
        scaling_factor=0.13025 if added else 0.18215,
    )
    schedule = build(
        ScheduleConfig, {"prediction_type": prediction_type or "epsilon", "set_alpha_to_one": False}
    )
    return unet_config, vae_config, schedule


def _count(names: Iterable[str], pattern: str) -> int:
    """Returns one more than the largest number that the pattern finds at the start of a name; 0 without a
    match.
    """
    return 1 + max((int(found[1]) for name in names if (found := re.match(pattern, name))), default=-1)


def open_single_file(file: Path, prediction_type: str | None) -> ForeignCheckpoint:
    """Opens a Stable Diffusion in one `.safetensors` file.

    Raises:
      ValueError: the file holds something else, is incomplete, or needs a `prediction_type`.
    """
    tensors = read_file(file)
    try:
        parts, left = split(tensors)
        unet, vae, schedule = configs(parts, prediction_type)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    except KeyError as error:
        raise ValueError(
            f"{file} lacks the tensor {error} of a Stable Diffusion; it is incomplete."
        ) from error
    size = unet.sample_size * vae.downscale
    model = DreamLLMConfig(unet=unet, vae=vae, schedule=schedule, image_size=size)
    report = Report(ignored=[f"{name} {tensors[name].shape} (not of the U-Net or the VAE)" for name in left])
    return ForeignCheckpoint("Stable Diffusion (one file)", file, model, parts, report)
