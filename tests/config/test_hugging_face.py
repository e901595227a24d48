"""Reading of `config.json`: what transformers fills in, what is refused, and that its import waits."""

import copy
import dataclasses
import subprocess
import sys

import pytest
import transformers

from dreamllm_jax.config.hugging_face import from_options, transformers_options
from dreamllm_jax.config.towers import ClipTextConfig, ClipVisionConfig, LlamaConfig


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int
    scale: float = 1.0


def test_options():
    only = {"act": ("silu", "gelu"), "blocks": (("A", "B"),)}
    given = {"size": 2, "act": "gelu", "blocks": ["A", "B"], "other": 1}
    assert from_options(Inner, given, only, "it") == Inner(2)
    with pytest.raises(ValueError, match="it: option act='relu' is not supported; supported: 'silu', 'gelu'"):
        from_options(Inner, {"size": 2, "act": "relu"}, only, "it")


@pytest.mark.parametrize(
    ("ours", "theirs", "changes"),
    [
        (LlamaConfig, transformers.LlamaConfig, {"num_key_value_heads": 8, "rms_norm_eps": 1e-5}),
        (ClipVisionConfig, transformers.CLIPVisionConfig, {"patch_size": 16, "hidden_act": "gelu"}),
        (ClipTextConfig, transformers.CLIPTextConfig, {"num_hidden_layers": 3, "eos_token_id": 2}),
    ],
)
def test_options_that_a_file_leaves_out_are_those_of_transformers(ours, theirs, changes):
    """Files of transformers 4 leave out what is the default of the class, such as the width of CLIP B/32."""
    for given in ({}, changes):
        config, expected = ours.from_hf(given), theirs(**given)
        for field in dataclasses.fields(ours):
            if not field.name.startswith("rope"):
                assert getattr(config, field.name) == getattr(expected, field.name), field.name


def test_a_whole_clip():
    file = {
        "model_type": "clip",
        "vision_config": {"hidden_size": 96},
        "text_config": {},
        "projection_dim": 48,
    }
    vision, text = ClipVisionConfig.from_hf(file), ClipTextConfig.from_hf(file)
    assert (vision.hidden_size, vision.patch_size, text.hidden_size, text.num_attention_heads) == (
        96,
        32,
        512,
        8,
    )
    assert vision.projection_dim == text.projection_dim == 48  # CLIPModel projects both towers to this width
    old = {"vision_config": {"hidden_size": 768}, "vision_config_dict": {"hidden_size": 96, "patch_size": 16}}
    vision = ClipVisionConfig.from_hf(old)
    assert (vision.hidden_size, vision.patch_size) == (96, 16)


def test_the_rotary_settings_of_several_releases():
    for given, theta, factor in (
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, 1e4, 4.0),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 5e5}, 5e5, 4.0),
        ({"rope_scaling": None, "rope_theta": 5e5}, 5e5, None),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}}, 5e5, 4.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
    ):
        before = copy.deepcopy(given)
        config = LlamaConfig.from_hf(given)
        assert config.rope_theta == theta
        assert (config.rope_scaling and config.rope_scaling.factor) == factor
        assert given == before  # transformers changes what it is given


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_attention_heads": "many"}, "LLaMA config: .*'num_attention_heads' expected int, got str"),
        ({"num_attention_heads": 33}, r"\(4096\) is not a multiple of the number of attention heads \(33\)"),
        ({"rope_scaling": {"type": "linear"}}, "Missing required keys .*'linear': {'factor'}"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; expected an object, or null"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor is 0.5; it must be at least 1"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_theta": None}, "rope_theta: got None"),
        ({"mlp_bias": True}, "option mlp_bias=True is not supported"),
        ({"pretraining_tp": 2}, "option pretraining_tp=2 is not supported"),
    ],
)
def test_what_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        LlamaConfig.from_hf(given)


def test_only_the_options_asked_for_are_looked_at():
    given = {"rope_theta": 2.0, "pad_token_id": -1, "use_return_dict": True, "vocab_size": "many"}
    options = transformers_options("LlamaConfig", given, ("rope_theta",), "it")
    assert options["rope_parameters"] == {"rope_theta": 2.0, "rope_type": "default"}
    assert options["vocab_size"] == 32000 and options["pad_token_id"] is None


def test_a_missing_pytorch_is_not_mentioned():
    code = (
        "import os, sys; sys.modules['torch'] = None; before = dict(os.environ)\n"
        "from dreamllm_jax.config.towers import LlamaConfig; print(LlamaConfig.from_hf({}).hidden_size)\n"
        "assert os.environ == before"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "4096\n", "")


@pytest.mark.parametrize(
    "module",
    [
        "dreamllm_jax",
        "dreamllm_jax.commands.main",
        "dreamllm_jax.train.__main__",
        "dreamllm_jax.convert.recognize",
    ],
)
def test_importing_the_package_does_not_import_transformers(module):
    code = f"import sys, {module}; sys.exit('transformers' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
