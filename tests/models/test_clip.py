"""CLIP's towers against transformers: last and earlier hidden states, masks, the contrastive head."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.config.towers import ClipTextConfig, ClipVisionConfig
from dreamllm_jax.models.clip import ClipText, ClipVision, ContrastiveHead, normalize_pixels

VISION = ClipVisionConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=12,
    patch_size=4,
    projection_dim=20,
)
TEXT = ClipTextConfig(
    vocab_size=60,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=2,
    max_position_embeddings=9,
    projection_dim=20,
    eos_token_id=50,
)
PIXELS = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 12, 3)), jnp.float32)
# Row 0 ends, then is padded with the end token; row 1 has ids above the end token before it.
TOKENS = jnp.array([[1, 7, 3, 50, 50, 50, 50], [2, 59, 4, 58, 6, 50, 0]])


@pytest.fixture(scope="module")
def vision():
    return ClipVision(VISION), jax.jit(ClipVision(VISION).init)(jax.random.key(0), PIXELS)


@pytest.fixture(scope="module")
def text():
    return ClipText(TEXT), jax.jit(ClipText(TEXT).init)(jax.random.key(1), TOKENS)


def params_from(state):
    """Returns a transformers CLIP state dict as Flax parameters with stacked layers."""
    flat, layers = {}, {}
    for name, tensor in state.items():
        *path, last = name.split(".")
        if path[:1] in (["text_model"], ["vision_model"]):
            path = path[1:]
        leaf = tensor.detach().numpy()
        if last == "weight":
            last = "embedding" if path[-1] in ("token_embedding", "position_embedding") else "kernel"
            last = "scale" if "norm" in path[-1] else last
            if last == "kernel":
                leaf = leaf.transpose(2, 3, 1, 0) if leaf.ndim == 4 else leaf.T
        if "layers" in path:
            at = path.index("layers")
            key = (*path[: at + 1], *path[at + 2 :], last)
            layers.setdefault(key, {})[int(path[at + 1])] = leaf
        elif last != "position_ids":
            flat[(*path, last)] = leaf
    flat |= {key: np.stack([rows[i] for i in range(len(rows))]) for key, rows in layers.items()}
    tree = {}
    for path, leaf in flat.items():
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = jnp.asarray(leaf)
    return {"params": tree}


def randomize(module):
    """Returns weights so large that every bias, norm and position matters."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            p.copy_(center + 0.2 * torch.randn(p.shape, generator=generator))
    return module.eval()


def torch_vision(config):
    transformers = pytest.importorskip("transformers")
    kwargs = dataclasses.asdict(config) | {"attn_implementation": "eager"}
    return randomize(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**kwargs)))


def torch_text(config):
    transformers = pytest.importorskip("transformers")
    kwargs = dataclasses.asdict(config) | {
        "attn_implementation": "eager",
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    return randomize(transformers.CLIPTextModel(transformers.CLIPTextConfig(**kwargs)))


def run(model, params, inputs, **kwargs):
    return jax.jit(lambda p, x: model.apply(p, x, **kwargs))(params, inputs)


def assert_close(ours, theirs, tolerance=1e-5):
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=tolerance, atol=tolerance)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("activation", "layers"), [("quick_gelu", (-4, -2, -1, 1)), ("gelu", (-2,)), ("silu", (-2,))]
)
def test_vision_matches_transformers(activation, layers):
    torch = pytest.importorskip("torch")
    config = dataclasses.replace(VISION, hidden_act=activation)
    reference = torch_vision(config)
    pixels = torch.tensor(np.array(PIXELS)).permute(0, 3, 1, 2)
    expected = reference(pixels, output_hidden_states=True)
    model, params = ClipVision(config), params_from(reference.state_dict())
    for layer in layers:
        assert_close(run(model, params, PIXELS, select_layer=layer), expected.hidden_states[layer])
    assert_close(run(model, params, PIXELS, method=ClipVision.pooled), expected.pooler_output)


@pytest.mark.parity
@pytest.mark.parametrize("eos", [50, 2])
def test_text_matches_transformers(eos):
    torch = pytest.importorskip("torch")
    config = dataclasses.replace(TEXT, eos_token_id=eos, hidden_act="gelu" if eos == 2 else "quick_gelu")
    reference = torch_text(config)
    expected = reference(torch.tensor(np.array(TOKENS)).long(), output_hidden_states=True)
    model, params = ClipText(config), params_from(reference.state_dict())
    states, pooled = run(model, params, TOKENS)
    assert_close(states, expected.last_hidden_state)
    assert_close(pooled, expected.pooler_output)
    for layer in (-4, -2):
        states, pooled = run(model, params, TOKENS, select_layer=layer)
        assert_close(states, expected.hidden_states[layer])
        assert_close(pooled, expected.pooler_output)


@pytest.mark.parity
def test_both_towers_and_the_head_match_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    text_config = dataclasses.asdict(TEXT) | {"bos_token_id": 1, "pad_token_id": 0}
    config = transformers.CLIPConfig(
        text_config=text_config, vision_config=dataclasses.asdict(VISION), projection_dim=20
    )
    reference = randomize(transformers.CLIPModel(config))
    expected = reference(
        torch.tensor(np.array(TOKENS)).long(), torch.tensor(np.array(PIXELS)).permute(0, 3, 1, 2)
    )

    state = reference.state_dict()
    towers = {
        t: params_from({k: v for k, v in state.items() if k.startswith(t)})
        for t in ("text_model", "vision_model")
    }
    head = params_from({k: v for k, v in state.items() if "_model." not in k})
    images, texts, scale = ContrastiveHead(20).apply(
        head,
        run(ClipVision(VISION), towers["vision_model"], PIXELS, method=ClipVision.pooled),
        run(ClipText(TEXT), towers["text_model"], TOKENS)[1],
    )
    assert_close(images, expected.image_embeds)
    assert_close(texts, expected.text_embeds)
    assert_close(scale * images @ texts.T, expected.logits_per_image)


@pytest.mark.parity
@pytest.mark.parametrize("remat", ["none", "full"])
def test_vision_gradients_match_transformers(remat):
    torch = pytest.importorskip("torch")
    reference = torch_vision(VISION)
    pixels = torch.tensor(np.array(PIXELS)).permute(0, 3, 1, 2)
    reference(pixels, output_hidden_states=True).hidden_states[-2].square().mean().backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in reference.named_parameters()
    }
    model = ClipVision(VISION, remat=remat)
    gradient = jax.jit(jax.grad(lambda p: jnp.square(model.apply(p, PIXELS, select_layer=-2)).mean()))
    ours = gradient(params_from(reference.state_dict()))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, params_from(gradients)
    )


@pytest.mark.parity
@pytest.mark.parametrize("name", ["dreamllm-a", "dreamllm-b"])
def test_vision_features_of_the_reference(golden, name):
    """The reference's CLIP tower and projector: from its checkpoint to its projected features."""
    torch = pytest.importorskip("torch")
    import json

    from safetensors.numpy import load_file

    from dreamllm_jax.config.towers import ProjectorConfig
    from dreamllm_jax.models.connectors import Projector

    folder = golden / name
    arrays = load_file(folder / "reference.safetensors")
    state = torch.load(folder / "checkpoint" / "clip_vision_embedding.bin", weights_only=True)
    prefix = "clip_vision_model."
    config = ClipVisionConfig.from_hf(json.loads(next(folder.glob("parts/*clip*/config.json")).read_text()))
    tower = params_from({k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)})
    pixels = jnp.asarray(arrays["in.images"].transpose(0, 2, 3, 1))
    states = run(ClipVision(config), tower, pixels, select_layer=-2)[:, 1:]

    weights = [v.numpy() for k, v in state.items() if k.startswith("projector.") and k.endswith("weight")]
    biases = [v.numpy() for k, v in state.items() if k.startswith("projector.") and k.endswith("bias")]
    linears = {
        f"linear_{i}": {"kernel": w.T, "bias": b}
        for i, (w, b) in enumerate(zip(weights, biases, strict=True))
    }
    kind = "linear" if len(linears) == 1 else "mlp"
    projector = Projector(ProjectorConfig(kind, len(linears)), weights[-1].shape[0])
    features = projector.apply({"params": linears}, states)
    expected = arrays["out.image_features"]
    np.testing.assert_allclose(features.reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)


def test_every_parameter_exists_whatever_is_selected(vision, text):
    for model, params, inputs in ((*vision, PIXELS), (*text, TOKENS)):
        full = jax.tree.map(jnp.shape, params)
        for layer in (0, -2):
            partial = jax.eval_shape(
                lambda m=model, i=inputs, n=layer: m.init(jax.random.key(0), i, select_layer=n)
            )
            assert jax.tree.map(jnp.shape, partial) == full


def test_vision_parameter_names(vision):
    _, params = vision
    assert set(params["params"]) == {"embeddings", "pre_layrnorm", "encoder", "post_layernorm"}
    assert params["params"]["embeddings"]["patch_embedding"]["kernel"].shape == (4, 4, 3, 32)
    assert params["params"]["encoder"]["layers"]["self_attn"]["q_proj"]["kernel"].shape == (3, 32, 32)


def test_unselected_layers_are_not_computed(vision):
    """NaN weights in the last layer reach neither the state before it nor the gradient."""
    model, params = vision
    broken = jax.tree.map(lambda w: w, params)
    broken["params"]["encoder"] = jax.tree.map(lambda w: w.at[-1].set(jnp.nan), params["params"]["encoder"])

    def loss(p):
        return jnp.square(model.apply(p, PIXELS, select_layer=-2)).mean()

    value, gradients = jax.jit(jax.value_and_grad(loss))(broken)
    np.testing.assert_allclose(value, jax.jit(loss)(params), rtol=1e-6)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradients))


def test_what_follows_the_end_token_is_harmless(text):
    model, params = text
    other = TOKENS.at[0, 4:].set(jnp.array([8, 50, 9]))
    states, pooled = run(model, params, TOKENS)
    states2, pooled2 = run(model, params, other)
    np.testing.assert_allclose(pooled, pooled2, atol=1e-6)
    np.testing.assert_allclose(states[0, :4], states2[0, :4], atol=1e-6)
    assert not np.allclose(states[0, 4:], states2[0, 4:], atol=1e-3)


def test_bfloat16_compute_keeps_float32_parameters():
    model = ClipVision(VISION, dtype=jnp.bfloat16, remat="dots")
    params = jax.jit(model.init)(jax.random.key(0), PIXELS)
    assert {w.dtype for w in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    states = run(model, params, PIXELS)
    assert states.dtype == jnp.bfloat16
    exact = run(ClipVision(VISION), params, PIXELS)
    np.testing.assert_allclose(states.astype(jnp.float32), exact, atol=0.1)


def test_the_head_bounds_its_temperature():
    head = ContrastiveHead(4)
    a, b = jnp.ones((2, 3)), jnp.ones((5, 6))
    params = head.init(jax.random.key(0), a, b)
    images, texts, scale = head.apply(params, a, b)
    assert images.shape == (2, 4) and texts.shape == (5, 4)
    np.testing.assert_allclose(scale, 1 / 0.07, rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(images, axis=-1), 1, rtol=1e-5)
    params["params"]["logit_scale"] = jnp.asarray(9.0)
    np.testing.assert_allclose(head.apply(params, a, b)[2], 100, rtol=1e-5)


def test_pixels_are_normalized_as_transformers_does():
    processor = pytest.importorskip("transformers").CLIPImageProcessor
    image = np.random.default_rng(1).integers(0, 256, (12, 12, 3), np.uint8)
    ours = normalize_pixels(jnp.asarray(image))
    theirs = processor(do_resize=False, do_center_crop=False)(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(ours, np.asarray(theirs).transpose(1, 2, 0), atol=1e-6)


def test_mistakes_are_sentences(vision, text):
    model, params = vision
    with pytest.raises(ValueError, match="select_layer=-5; a tower of 3 layers"):
        model.apply(params, PIXELS, select_layer=-5)
    with pytest.raises(ValueError, match=r"images are \(8, 8, 3\); this tower takes \(12, 12, 3\)"):
        model.apply(params, PIXELS[:, :8, :8])
    model, params = text
    with pytest.raises(ValueError, match="10 tokens; this tower takes at most 9"):
        model.apply(params, jnp.zeros((1, 10), jnp.int32))
