"""LLaMA against transformers; packed rows against separate documents; the cache against full forwards."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from dreamllm_jax.config.towers import LlamaConfig, RopeScaling
from dreamllm_jax.generate.layout import generation_layout
from dreamllm_jax.models.kv_cache import init_cache
from dreamllm_jax.models.llama import Llama
from tests.programs import compiled_as_users_do

MHA = LlamaConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=16,
    initializer_range=0.3,
)
GQA = dataclasses.replace(MHA, num_key_value_heads=2)
VARIANTS = {
    "mha": MHA,
    "gqa": GQA,
    "wide heads": dataclasses.replace(GQA, head_dim=12),
    "linear": dataclasses.replace(GQA, rope_scaling=RopeScaling("linear", 4.0)),
    "dynamic": dataclasses.replace(MHA, rope_scaling=RopeScaling("dynamic", 2.0)),
    "tied, biased": dataclasses.replace(GQA, tie_word_embeddings=True, attention_bias=True),
}


def tokens_of(config, *shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, config.vocab_size, shape), jnp.int32)


@cache
def make(config, **fields):
    model = Llama(config, **fields)
    arguments = (
        jnp.zeros((1, 4, config.hidden_size)),
        jnp.zeros((1, 4), jnp.int32),
        jnp.ones((1, 4), jnp.int32),
    )
    return model, jax.jit(model.init)(jax.random.key(0), *arguments)["params"]


def run(model, params, tokens, positions=None, segment_ids=None):
    """Returns the logits of full rows, by default with one document in each."""
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    if segment_ids is None:
        segment_ids = jnp.ones_like(tokens)
    return _run(model, params, tokens, positions, segment_ids)


@partial(jax.jit, static_argnums=0)
def _run(model, params, tokens, positions, segment_ids):
    def forward(m):
        return m.logits(m(m.embed(tokens), positions, segment_ids))

    return model.apply({"params": params}, method=forward)


@partial(jax.jit, static_argnums=0)
def extend(model, params, tokens, valid, cache):
    """Appends tokens to a cache; `params` are stacked, as checkpoints have them."""

    def forward(m):
        hidden, new = m.extend(m.embed(tokens), valid, cache)
        return m.logits(hidden), new

    return generating(model).apply({"params": layered(model, params)}, method=forward)


@partial(jax.jit, static_argnums=0)
def prefill(model, params, tokens, lengths, cache):
    def forward(m):
        hidden, new = m.prefill(m.embed(tokens), lengths, cache)
        return m.logits(hidden), new

    return generating(model).apply({"params": layered(model, params)}, method=forward)


def generating(model):
    return model.clone(layered=True)


def layered(model, params):
    """Returns stacked parameters in the layout of generation."""
    flat = {f"llama/{path}": x for path, x in flatten_dict(params, sep="/").items()}
    flat = generation_layout(flat, model.config)
    return unflatten_dict({path.removeprefix("llama/"): x for path, x in flat.items()}, sep="/")


def from_torch(config, state):
    """Returns a transformers state dict as our parameters."""

    def array(name):
        return np.asarray(state[name].detach().numpy())

    def stack(name):
        values = [array(f"model.layers.{i}.{name}") for i in range(config.num_hidden_layers)]
        return np.stack([v.T for v in values])

    def linear(name):
        leaves = {"kernel": stack(f"{name}.weight")}
        if config.attention_bias and "self_attn" in name:
            leaves["bias"] = stack(f"{name}.bias")
        return leaves

    params = {
        "embed_tokens": {"embedding": array("model.embed_tokens.weight")},
        "layers": {
            "input_layernorm": {"scale": stack("input_layernorm.weight")},
            "self_attn": {f"{p}_proj": linear(f"self_attn.{p}_proj") for p in "qkvo"},
            "post_attention_layernorm": {"scale": stack("post_attention_layernorm.weight")},
            "mlp": {f"{p}_proj": linear(f"mlp.{p}_proj") for p in ("gate", "up", "down")},
        },
        "norm": {"scale": array("model.norm.weight")},
    }
    if not config.tie_word_embeddings:
        params["lm_head"] = {"kernel": array("lm_head.weight").T}
    return params


def torch_model(config, seed=0):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    settings = dataclasses.asdict(config)
    scaling = settings.pop("rope_scaling")
    rope = {"rope_type": "default", "rope_theta": settings.pop("rope_theta")}
    if scaling:
        rope |= {"rope_type": scaling["type"], "factor": scaling["factor"]}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings, rope_parameters=rope))
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    return torch, model.eval()


@pytest.mark.parity
@pytest.mark.parametrize("length", [9, 24, 500])
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers(name, length):
    config = VARIANTS[name]
    torch, reference = torch_model(config)
    tokens = tokens_of(config, 2, length)
    expected = reference(torch.tensor(np.asarray(tokens))).logits.detach().numpy()
    with compiled_as_users_do():
        actual = run(Llama(config), from_torch(config, reference.state_dict()), tokens)
    np.testing.assert_allclose(actual, expected, atol=(1e-4 if length == 500 else 1e-5) * expected.std())


@pytest.mark.parity
@pytest.mark.parametrize(
    "name, remat",
    [
        ("gqa", "full"),
        ("gqa", "minimal"),
        ("gqa", "offload"),
        ("dynamic", "none"),
        ("tied, biased", "dots"),
    ],
)
def test_gradients_equal_transformers(name, remat):
    config = VARIANTS[name]
    torch, reference = torch_model(config)
    tokens, weights = tokens_of(config, 2, 20), np.random.default_rng(1).normal(size=(2, 20, 50))
    weights = weights.astype(np.float32)
    (reference(torch.tensor(np.asarray(tokens))).logits * torch.tensor(weights)).sum().backward()
    gradients = {n: p.grad for n, p in reference.named_parameters()}
    model, params = Llama(config, remat=remat), from_torch(config, reference.state_dict())
    actual = jax.jit(jax.grad(lambda p: (run(model, p, tokens) * weights).sum()))(params)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, atol=2e-5 * np.abs(e).max()),
        actual,
        from_torch(config, gradients),
    )


@pytest.mark.parity
def test_padded_batch_equals_transformers():
    torch, reference = torch_model(GQA)
    tokens, lengths = tokens_of(GQA, 3, 12), np.array([12, 7, 3])
    real = np.arange(12) < lengths[:, None]
    expected = reference(torch.tensor(np.asarray(tokens)), attention_mask=torch.tensor(real.astype(int)))
    actual = run(
        Llama(GQA), from_torch(GQA, reference.state_dict()), tokens, segment_ids=jnp.asarray(real, jnp.int32)
    )
    np.testing.assert_allclose(actual[real], expected.logits.detach().numpy()[real], atol=5e-5)


@pytest.mark.parametrize("name", ["gqa", "linear", "dynamic"])
def test_packed_row_equals_its_documents(name):
    config = VARIANTS[name]
    model, params = make(config)
    lengths = [5, 20, 5]  # the second exceeds max_position_embeddings
    tokens = tokens_of(config, 1, 32)
    segments = jnp.asarray([np.repeat([1, 2, 3, 0], [*lengths, 2])])
    positions = jnp.asarray([np.concatenate([np.arange(n) for n in (*lengths, 2)])])
    packed = run(model, params, tokens, positions, segments)
    start = 0
    for n in lengths:
        alone = run(model, params, tokens[:, start : start + n])
        np.testing.assert_allclose(packed[:, start : start + n], alone, atol=2e-5)
        start += n


@pytest.mark.parametrize("name", ["gqa", "dynamic"])
def test_padding_and_other_rows_change_nothing(name):
    model, params = make(VARIANTS[name])
    tokens, other = tokens_of(GQA, 2, 10), tokens_of(GQA, 2, 10, seed=1)
    segments = jnp.asarray(np.arange(10) < np.array([[6], [10]]), jnp.int32)
    replaced = other.at[0, :6].set(tokens[0, :6])
    positions = jnp.broadcast_to(jnp.arange(10), (2, 10))
    first = run(model, params, tokens, positions, segments)
    second = run(model, params, replaced, positions.at[0, 6:].set(90), segments)
    np.testing.assert_array_equal(first[0, :6], second[0, :6])
    assert np.isfinite(first).all() and np.isfinite(second).all()


@pytest.mark.parametrize("chunks", [[14], [1] * 14, [6, 1, 1, 6]])
@pytest.mark.parametrize("prompt", [0, 5])
@pytest.mark.parametrize("name", ["gqa", "linear", "dynamic", "tied, biased"])
def test_cached_equals_full_forward(name, prompt, chunks):
    """Tokens are appended to an empty cache, or to one that `prefill` filled with a prompt."""
    config = VARIANTS[name]
    model, params = make(config)
    tokens = tokens_of(config, 2, 14)
    full = run(model, params, tokens)
    store, start = init_cache(config, 2, 15), 0
    if prompt:
        logits, store = prefill(model, params, tokens[:, :prompt], jnp.full(2, prompt), store)
        np.testing.assert_allclose(logits, full[:, :prompt], atol=2e-5)
        chunks, start = [14 - prompt] if len(chunks) == 1 else [1] * (14 - prompt), prompt
    for n in chunks:
        part = tokens[:, start : start + n]
        logits, store = extend(model, params, part, jnp.ones_like(part, bool), store)
        np.testing.assert_allclose(logits, full[:, start : start + n], atol=2e-5)
        start += n
    np.testing.assert_array_equal(store.lengths, [14, 14])


def test_ragged_rows_equal_each_alone():
    model, params = make(GQA)
    tokens = tokens_of(GQA, 3, 12)
    counts = np.array([[4, 1, 0, 3], [0, 1, 1, 5], [2, 0, 4, 1]])  # tokens of row, of chunk
    full, store, done = run(model, params, tokens), init_cache(GQA, 3, 12), np.zeros(3, int)
    for chunk in counts.T:
        valid = np.arange(6) < chunk[:, None]
        index = np.minimum(done[:, None] + np.arange(6), 11)
        # The embeddings of invalid tokens are arbitrary and must not matter.
        logits, store = extend(model, params, tokens[np.arange(3)[:, None], index], jnp.asarray(valid), store)
        for b, n in enumerate(chunk):
            np.testing.assert_allclose(logits[b, :n], full[b, done[b] : done[b] + n], atol=2e-5)
        assert np.isfinite(logits).all()
        done += chunk
        np.testing.assert_array_equal(store.lengths, done)


def test_dynamic_cache_uses_the_present_length():
    """Beyond max_position_embeddings, the unrotated keys of a layer are rotated with the growing base."""
    config = dataclasses.replace(VARIANTS["dynamic"], num_hidden_layers=1)
    model, params = make(config)
    tokens, store = tokens_of(config, 2, 30), init_cache(config, 2, 32)
    for i in range(30):
        logits, store = extend(model, params, tokens[:, i : i + 1], jnp.ones((2, 1), bool), store)
        if i in (10, 20, 29):
            np.testing.assert_allclose(logits[:, 0], run(model, params, tokens[:, : i + 1])[:, -1], atol=2e-5)


def test_overflow_never_touches_what_is_there():
    model, params = make(GQA)
    tokens, ones = tokens_of(GQA, 2, 6), jnp.ones((2, 6), bool)
    _, full = extend(model, params, tokens, ones, init_cache(GQA, 2, 8))
    _, after = extend(model, params, tokens, ones, full)
    np.testing.assert_array_equal(after.k[:, :, :, :6], full.k[:, :, :, :6])
    np.testing.assert_array_equal(after.v[:, :, :, :6], full.v[:, :, :, :6])
    assert (after.lengths == 12).all() and after.capacity == 8


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("capacity", [4, 63, 64])
def test_single_tokens_beyond_the_capacity_are_dropped(rows, capacity):
    """Also one that is not valid on a full cache, and one that is."""
    model, params = make(GQA)
    tokens = tokens_of(GQA, rows, 1)
    full = dataclasses.replace(init_cache(GQA, rows, capacity), lengths=jnp.full(rows, capacity - 1))
    for valid, length in ((False, capacity - 1), (True, capacity), (False, capacity), (True, capacity + 1)):
        before = full
        _, full = extend(model, params, tokens, jnp.full((rows, 1), valid), full)
        changed = (full.k != before.k).any(axis=(0, 1, 2, 4))
        assert not changed[: min(length, capacity) - (valid and length == capacity)].any()
        assert changed[capacity - 1] == (valid and length == capacity)
        assert (full.lengths == length).all()


def test_bfloat16_computes_near_float32():
    _, params = make(GQA)
    tokens = tokens_of(GQA, 2, 10)
    exact, rounded = (run(Llama(GQA, dtype=d), params, tokens) for d in (jnp.float32, jnp.bfloat16))
    assert rounded.dtype == jnp.float32
    assert float(jnp.abs(exact - rounded).max() / jnp.abs(exact).max()) < 0.1
    store = init_cache(GQA, 2, 10, jnp.bfloat16)
    cached, store = extend(Llama(GQA, dtype=jnp.bfloat16), params, tokens, jnp.ones_like(tokens, bool), store)
    assert store.k.dtype == jnp.bfloat16
    np.testing.assert_allclose(cached, rounded, atol=0.02 * float(jnp.abs(exact).max()))


def test_parameters_are_stacked_and_named_as_hugging_face():
    _, params = make(GQA)
    shapes = {jax.tree_util.keystr(p, simple=True, separator="/"): x.shape for p, x in _leaves(params)}
    assert shapes == {
        "embed_tokens/embedding": (50, 32),
        "layers/input_layernorm/scale": (2, 32),
        "layers/self_attn/q_proj/kernel": (2, 32, 32),
        "layers/self_attn/k_proj/kernel": (2, 32, 16),
        "layers/self_attn/v_proj/kernel": (2, 32, 16),
        "layers/self_attn/o_proj/kernel": (2, 32, 32),
        "layers/post_attention_layernorm/scale": (2, 32),
        "layers/mlp/gate_proj/kernel": (2, 32, 48),
        "layers/mlp/up_proj/kernel": (2, 32, 48),
        "layers/mlp/down_proj/kernel": (2, 48, 32),
        "norm/scale": (32,),
        "lm_head/kernel": (32, 50),
    }
    q = params["layers"]["self_attn"]["q_proj"]["kernel"]
    assert not jnp.allclose(q[0], q[1])  # every layer has its own random values


def test_unknown_remat_policy_is_refused():
    with pytest.raises(ValueError, match="choose none, dots, minimal, full, offload"):
        make(GQA, remat="some")


def _leaves(tree):
    return jax.tree_util.tree_flatten_with_path(tree)[0]
