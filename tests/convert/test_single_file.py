"""Stable Diffusion in one file: the same names and configs as diffusers' own reader."""

import functools

import numpy as np
import pytest
from safetensors.numpy import save_file

from dreamllm_jax.checkpoint.tensors import ArrayTensor
from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.config.towers import UNetConfig, VaeConfig
from dreamllm_jax.convert.adapters import single_file
from dreamllm_jax.convert.mapping import to_torch
from dreamllm_jax.convert.recognize import open_checkpoint
from dreamllm_jax.models.parameters import parameter_shapes

WIDTHS = (64, 128, 128, 128)
FAMILIES = {
    "1": dict(cross_attention_dim=48),
    "2": dict(cross_attention_dim=80, use_linear_projection=True, attention_head_dim=(1, 2, 2, 2)),
    "xl": dict(
        block_out_channels=WIDTHS[:3],
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        attention_head_dim=(1, 2, 2),
        cross_attention_dim=96,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=1600,
        sample_size=128,
    ),
}


def model_of(family: str) -> DreamLLMConfig:
    unet = UNetConfig(**{"block_out_channels": WIDTHS, **FAMILIES[family]})
    vae = VaeConfig(
        block_out_channels=(32, 32, 64),
        sample_size=1024 if family == "xl" else 512,
        scaling_factor=0.13025 if family == "xl" else 0.18215,
    )
    return DreamLLMConfig(unet=unet, vae=vae, image_size=unet.sample_size * vae.downscale)


@functools.cache
def their_tensors(model: DreamLLMConfig) -> dict[str, dict[str, np.ndarray]]:
    """Returns random weights under diffusers' names."""
    rng = np.random.default_rng(0)
    params = {
        path: ArrayTensor(path, rng.normal(size=shape).astype(np.float32))
        for path, shape in parameter_shapes(model).items()
    }
    parts, _ = to_torch(params)
    return {part: {name: t.read() for name, t in tensors.items()} for part, tensors in parts.items()}


def published_names(unet: UNetConfig) -> list[str]:
    """Returns the names of a U-Net's tensors in one file, from the structure of its authors' code."""
    resnet = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3")
    attention = ("norm", "proj_in", "proj_out")
    inner = [f"attn{i}.{m}" for i in (1, 2) for m in ("to_q", "to_k", "to_v", "to_out.0")]
    inner += ["ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"]
    no_bias = ("to_q", "to_k", "to_v")
    names: list[str] = []

    def add(prefix, modules):
        for module in modules:
            names.append(f"{prefix}.{module}.weight")
            if not module.endswith(no_bias):
                names.append(f"{prefix}.{module}.bias")

    def add_attention(prefix, depth):
        add(prefix, attention)
        for i in range(depth):
            add(f"{prefix}.transformer_blocks.{i}", inner)

    def add_resnet(prefix, changes):
        add(prefix, (*resnet, *(["skip_connection"] if changes else [])))

    widths, depths = unet.block_out_channels, unet.per_block("transformer_layers_per_block")
    crosses = [kind.startswith("Cross") for kind in unet.down_block_types]
    add("time_embed", ("0", "2"))
    if unet.addition_embed_type:
        add("label_emb.0", ("0", "2"))
    add("input_blocks.0", ("0",))
    block, inside, skips = 1, widths[0], [widths[0]]
    for level, width in enumerate(widths):
        for _ in range(unet.layers_per_block):
            add_resnet(f"input_blocks.{block}.0", inside != width)
            if crosses[level]:
                add_attention(f"input_blocks.{block}.1", depths[level])
            inside, block = width, block + 1
            skips.append(width)
        if level < len(widths) - 1:
            add(f"input_blocks.{block}.0", ("op",))
            block += 1
            skips.append(width)
    add_resnet("middle_block.0", False)
    add_attention("middle_block.1", depths[-1])
    add_resnet("middle_block.2", False)
    block = 0
    for level in reversed(range(len(widths))):
        for i in range(unet.layers_per_block + 1):
            skips.pop()  # the skip channels are concatenated, so every residual block changes its width
            add_resnet(f"output_blocks.{block}.0", True)
            if crosses[level]:
                add_attention(f"output_blocks.{block}.1", depths[level])
            if level and i == unet.layers_per_block:
                add(f"output_blocks.{block}.{2 if crosses[level] else 1}", ("conv",))
            block += 1
    add("out", ("0", "2"))
    return names


@pytest.mark.parametrize("family", FAMILIES)
def test_every_published_name_has_its_place(family):
    """The names map one to one to those of diffusers' model with the same config."""
    model = model_of(family)
    wanted = their_tensors(model)["unet"]
    layers = model.unet.layers_per_block
    found = [single_file.unet_name(name, layers) for name in published_names(model.unet)]
    assert len(set(found)) == len(found) and set(found) == wanted.keys()
    for name in ("input_blocks", "middle_block.3.norm.weight"):
        assert single_file.unet_name(name, layers) is None


@functools.cache
def one_file(model: DreamLLMConfig) -> dict[str, np.ndarray]:
    """Builds a one-file checkpoint from diffusers' tensors, plus a text encoder and buffers."""
    theirs = their_tensors(model)
    layers = model.unet.layers_per_block
    back = {single_file.unet_name(name, layers): name for name in published_names(model.unet)}
    tensors = {f"{single_file.UNET}{back[name]}": value for name, value in theirs["unet"].items()}
    levels = len(model.vae.block_out_channels)
    for name, value in theirs["vae"].items():
        old = name.replace("mid_block.attentions.0.", "mid.attn_1.").replace("group_norm", "norm")
        for new, short in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
            if f"attn_1.{new}" in old:
                old = old.replace(new, short)
                value = value[:, :, None, None] if value.ndim == 2 else value  # 1x1 convolutions in old files
        old = old.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        old = old.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        for i in range(levels):
            old = old.replace(f"down_blocks.{i}.", f"down.{i}.").replace(
                f"up_blocks.{i}.", f"up.{levels - 1 - i}."
            )
        old = old.replace("downsamplers.0.", "downsample.").replace("upsamplers.0.", "upsample.")
        tensors[f"{single_file.VAE}{old.replace('.resnets.', '.block.')}"] = value
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = np.zeros((1, 77), np.int64)
    tensors["alphas_cumprod"] = np.zeros(1000, np.float32)
    return {name: np.ascontiguousarray(value) for name, value in tensors.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_is_opened_as_its_folder_would_be(family, tmp_path):
    model = model_of(family)
    save_file(one_file(model), tmp_path / "sd.safetensors")
    source = open_checkpoint(
        tmp_path / "sd.safetensors", prediction_type="epsilon" if family == "2" else None
    )
    ours = source.model
    for name in ("block_out_channels", "down_block_types", "up_block_types", "cross_attention_dim"):
        assert getattr(ours.unet, name) == getattr(model.unet, name), name
    for name in ("num_heads", "transformer_layers_per_block"):
        assert ours.unet.per_block(name) == model.unet.per_block(name), name
    assert (ours.unet.pooled_text_dim, ours.vae, ours.image_size) == (
        model.unet.pooled_text_dim,
        model.vae,
        model.image_size,
    )
    params, report = source.params()
    assert not report.faulty and len(report.ignored) == 2
    theirs = their_tensors(model)
    parts, _ = to_torch(params)
    for part in ("unet", "vae"):
        assert parts[part].keys() == theirs[part].keys()
        for name, value in theirs[part].items():
            np.testing.assert_array_equal(parts[part][name].read(), value, err_msg=name)


@pytest.mark.parity
@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_reads_the_same(family):
    torch = pytest.importorskip("torch")
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    model = model_of(family)
    checkpoint = {name: torch.from_numpy(value) for name, value in one_file(model).items()}
    unet, blocks = model.unet, model.vae.block_out_channels
    config = {
        "layers_per_block": unet.layers_per_block,
        "down_block_types": unet.down_block_types,
        "up_block_types": unet.up_block_types,
        "class_embed_type": None,
        "addition_embed_type": unet.addition_embed_type,
    }
    vae = {"down_block_types": blocks, "up_block_types": blocks}
    tensors = {name: ArrayTensor(name, value.numpy()) for name, value in checkpoint.items()}
    parts, _ = single_file.split(tensors)
    theirs = {
        "unet": utils.convert_ldm_unet_checkpoint(dict(checkpoint), config),
        "vae": utils.convert_ldm_vae_checkpoint(dict(checkpoint), vae),
    }
    for part, tensors in theirs.items():
        assert parts[part].keys() == tensors.keys()
        for name, value in tensors.items():
            ours = parts[part][name].read()
            np.testing.assert_array_equal(ours.reshape(value.shape), value.numpy(), err_msg=name)


def test_what_a_file_does_not_say(tmp_path):
    save_file(one_file(model_of("2")), tmp_path / "sd2.safetensors")
    with pytest.raises(ValueError, match="this is a Stable Diffusion 2.*--prediction-type"):
        open_checkpoint(tmp_path / "sd2.safetensors")
    velocity = open_checkpoint(tmp_path / "sd2.safetensors", prediction_type="v_prediction").model
    assert velocity.schedule.prediction_type == "v_prediction" and velocity.unet.sample_size == 96
    rest = {n: t for n, t in one_file(model_of("1")).items() if "middle_block.1.proj_in.weight" not in n}
    save_file(rest, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match="less.safetensors lacks the tensor 'mid_block.*proj_in.weight'"):
        open_checkpoint(tmp_path / "less.safetensors")
    save_file({"a.weight": np.zeros((2, 2), np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors: the file is not a Stable Diffusion"):
        open_checkpoint(tmp_path / "other.safetensors")
