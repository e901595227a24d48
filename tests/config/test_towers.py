"""Hugging Face configs: what is taken, and which options are refused by name."""

import pytest

from dreamllm_jax.config.towers import (
    ClipTextConfig,
    ClipVisionConfig,
    LlamaConfig,
    ProjectorConfig,
    RopeScaling,
    ScheduleConfig,
    UNetConfig,
    VaeConfig,
)

# The numbers of SDXL's base and refiner that concern the added conditions.
SDXL = dict(
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
    cross_attention_dim=2048,
)


def test_llama():
    config = LlamaConfig.from_hf(
        {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "model_type": "llama"}
    )
    assert (config.head_dim, config.num_key_value_heads, config.rope_scaling) == (8, 2, None)
    four = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 5e5}
    five = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5e5}}
    for mapping in (four, five):
        config = LlamaConfig.from_hf(mapping)
        assert config.rope_scaling == RopeScaling("dynamic", 2.0) and config.rope_theta == 5e5
    with pytest.raises(ValueError, match="rope scaling 'yarn' is not supported"):
        LlamaConfig.from_hf({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}})
    with pytest.raises(ValueError, match="hidden_act='gelu' is not supported"):
        LlamaConfig.from_hf({"hidden_act": "gelu"})


def test_clip_whole_or_one_tower():
    whole = {"vision_config": {"hidden_size": 64, "num_attention_heads": 4}, "text_config": {"vocab_size": 9}}
    assert ClipVisionConfig.from_hf(whole).hidden_size == 64
    assert ClipVisionConfig.from_hf(whole["vision_config"]) == ClipVisionConfig.from_hf(whole)
    assert ClipTextConfig.from_hf(whole).vocab_size == 9


def test_unet_of_sdxl_and_its_refiner():
    assert UNetConfig.from_hf(SDXL).pooled_text_dim == 1280
    assert UNetConfig().pooled_text_dim is None
    with pytest.raises(ValueError, match="refiner of SDXL"):
        UNetConfig.from_hf(
            SDXL | {"projection_class_embeddings_input_dim": 2560, "cross_attention_dim": 1280}
        )
    with pytest.raises(ValueError, match="class_embed_type='timestep' is not supported"):
        UNetConfig.from_hf({"class_embed_type": "timestep"})
    with pytest.raises(ValueError, match="down block 'AttnDownBlock2D' is not supported"):
        UNetConfig(down_block_types=("AttnDownBlock2D",) * 4)


def test_vae_of_another_family():
    assert VaeConfig.from_hf({"scaling_factor": 0.13025}).scaling_factor == 0.13025
    with pytest.raises(ValueError, match="shift_factor=0.1 is not supported"):
        VaeConfig.from_hf({"shift_factor": 0.1})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("clip_sample", True),
        ("variance_type", "learned_range"),
        ("use_karras_sigmas", True),
        ("thresholding", True),
        ("trained_betas", [0.1]),
    ],
)
def test_schedules_that_would_give_other_pictures(option, value):
    with pytest.raises(ValueError, match=f"scheduler config: option {option}=.* is not supported"):
        ScheduleConfig.from_hf({option: value})


def test_schedule_of_stable_diffusion():
    published = {
        "_class_name": "DDIMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "prediction_type": "v_prediction",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    }
    config = ScheduleConfig.from_hf(published)
    assert config.prediction_type == "v_prediction" and not config.set_alpha_to_one
    with pytest.raises(ValueError, match="rescale_betas_zero_snr leaves no signal"):
        ScheduleConfig.from_hf({"rescale_betas_zero_snr": True})


def test_projectors():
    assert ProjectorConfig("sam", 2).num_outputs(256) == 16 and ProjectorConfig("mlp", 2).num_outputs(7) == 7
    with pytest.raises(ValueError, match="kind 'mlp' has depth=1; it needs at least 2"):
        ProjectorConfig("mlp", 1)
    with pytest.raises(ValueError, match="got 8 patches; it needs a square number"):
        ProjectorConfig("conv", 1).num_outputs(8)
