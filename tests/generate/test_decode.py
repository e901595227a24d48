"""Prefill and decoding on the cache equal a full forward pass over the same tokens, images and dreams."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.batch import Batch
from dreamllm_jax.data.images import to_vision
from dreamllm_jax.data.pieces import Picture, Text
from dreamllm_jax.data.sequences import encode_pieces
from dreamllm_jax.document import Document
from dreamllm_jax.generate.decode import append_image, decode_text, dream, in_nucleus, sample_tokens
from dreamllm_jax.generate.engine import prompt_keys
from dreamllm_jax.generate.prompts import prompt_batch
from dreamllm_jax.models.dreamllm import DreamLLMModule, query_states

CAPACITY = 64


def as_batch(sequences, config, images):
    """Returns rows of complete sequences, with one document in each."""
    length = max(len(s) for s in sequences)

    def rows(name, fill):
        values = [getattr(s, name) for s in sequences]
        return np.stack([np.pad(v, (0, length - len(v)), constant_values=fill) for v in values])

    lengths = np.array([len(s) for s in sequences])
    segments = (np.arange(length) < lengths[:, None]).astype(np.int32)
    return Batch(
        tokens=rows("tokens", 0),
        targets=np.full_like(segments, -1),
        segment_ids=segments,
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), segments.shape),
        loss_weights=np.zeros(segments.shape, np.float32),
        image_slots=rows("image_slots", -1),
        dream_slots=rows("dream_slots", -1),
        image_mask=np.ones((len(sequences), 1), bool),
        dream_mask=np.ones((len(sequences), 1), bool),
        null_dream=np.full(len(sequences), -1, np.int32),
        images=images,
    )


def test_what_is_read_step_by_step_is_what_one_forward_reads(model, picture):
    """Prompts, dreams and appended drawings in rows of different lengths, and the U-Net's conditions."""
    engine, config, special = model._engine, model.config, model.tokenizer.special
    texts, drawn = ["one", "Count from three to six."], [picture(1), picture(2)]
    sequences = [
        encode_pieces([Text(t), Picture(p, True, True)], model.tokenizer, 4, 3, 96, eos=False)
        for t, p in zip(texts, drawn, strict=True)
    ]
    seen = np.stack([to_vision(p, 16) for p in drawn])
    batch = as_batch(sequences, config, seen[:, None])

    @jax.jit
    def whole(params, batch):
        hidden = engine.module.apply({"params": params}, batch, method=DreamLLMModule.read)
        states = query_states(hidden, batch.dream_slots, 1, 3)[:, 0]
        return hidden, *engine.module.apply({"params": params}, states, method=DreamLLMModule.conditions)

    hidden, context, _ = whole(engine.params, batch)
    state = engine.read(prompt_batch(texts, model.tokenizer, config, None), CAPACITY)
    active = jnp.ones(2, bool)
    start = jnp.int32(special.dream_start)
    state, drawn_context, _ = dream(engine.params, state, active, start, model=engine.module)
    np.testing.assert_allclose(drawn_context, context, atol=1e-5)
    before, after = jnp.array([special.dream_end, special.im_start]), jnp.array([special.im_end])
    state = append_image(engine.params, state, active, jnp.asarray(seen), before, after, model=engine.module)
    last = [len(s) - 1 for s in sequences]
    np.testing.assert_allclose(state.last, hidden[np.arange(2), last], atol=1e-5)
    np.testing.assert_array_equal(state.cache.lengths, [len(s) for s in sequences])


def test_a_drawing_changes_what_follows_it_and_waiting_rows_stay(model, picture):
    engine, special = model._engine, model.tokenizer.special
    prompts = ["one", "Count from three to six."]
    before, after = jnp.array([special.dream_end, special.im_start]), jnp.array([special.im_end])

    def seen(*pictures):
        state = engine.read(prompt_batch(prompts, model.tokenizer, model.config, None), CAPACITY)
        old = np.asarray(state.last)
        images = jnp.asarray(np.stack([to_vision(p, 16) for p in pictures]))
        active = jnp.array([True, False])
        state = append_image(engine.params, state, active, images, before, after, model=engine.module)
        return old, np.asarray(state.last), np.asarray(state.cache.lengths)

    old, a, lengths = seen(picture(1), picture(2))
    _, b, _ = seen(picture(3), picture(2))
    assert np.abs(a[0] - b[0]).max() > 1e-3
    np.testing.assert_array_equal(a[1], old[1])
    prompt_length = 1 + len(model.tokenizer.encode(prompts[1]))
    assert lengths[1] == prompt_length


def test_greedy_decoding_is_the_argmax_of_full_forwards(model, picture):
    """Decodes rows of different lengths, one with an image; only text and `</s>` are allowed."""
    engine, config, tokenizer = model._engine, model.config, model.tokenizer
    prompts = ["Write two plus five.", Document([picture(4), "What comes next?"])]
    batch = prompt_batch(prompts, tokenizer, config, None)
    settings = model._settings(max_new_tokens=6)
    control = engine.control([tokenizer.special.eos], np.zeros(2, bool), 0, settings)
    state, tokens, stop = decode_text(
        engine.params,
        engine.read(batch, CAPACITY),
        jnp.ones(2, bool),
        jnp.array([6, 3]),
        prompt_keys(0, 2),
        control,
        model=engine.module,
        max_new_tokens=6,
    )
    tokens, stop = np.asarray(tokens), np.asarray(stop)
    assert (tokens[1, 3:] == -1).all()  # its budget
    forward = jax.jit(
        lambda params, batch: engine.module.apply(
            {"params": params},
            engine.module.apply({"params": params}, batch, method=DreamLLMModule.read),
            method=DreamLLMModule.logits,
        )
    )
    length = 48
    for row, prompt in enumerate(prompts):
        written = [int(t) for t in tokens[row] if t >= 0]
        sequence = prompt_batch([prompt], tokenizer, config, None)
        first = int((sequence.segment_ids > 0).sum())

        def padded(x, fill):
            return np.pad(x, ((0, 0), (0, length)), constant_values=fill)[:, :length]

        ids = padded(sequence.tokens, 0)
        ids[0, first : first + len(written)] = written
        segments = (np.arange(length) < first + len(written)).astype(np.int32)[None]
        images = sequence.images
        if images is None:
            images = np.zeros((1, 1, 16, 16, 3), np.uint8)
        full = sequence.replace(
            tokens=ids,
            targets=ids,
            segment_ids=segments,
            positions=np.arange(length, dtype=np.int32)[None],
            loss_weights=np.zeros((1, length), np.float32),
            image_slots=padded(sequence.image_slots, -1),
            dream_slots=np.full((1, length), -1, np.int32),
            images=images,
        )
        logits = np.where(control.forbidden, -np.inf, forward(engine.params, full)[0])
        logits[:, tokenizer.special.dream_start] = -np.inf
        greedy = logits.argmax(-1)[first - 1 :][: len(written)]
        np.testing.assert_array_equal(written, greedy)
        if stop[row] >= 0:
            assert logits[first - 1 + len(written)].argmax() == stop[row] == tokenizer.special.eos
    np.testing.assert_array_equal(state.cache.lengths - (batch.segment_ids > 0).sum(1), (tokens >= 0).sum(1))


def test_decoding_copies_no_weights_for_every_token(model):
    """XLA's CPU backend copies what it slices out of a stack of layers: these lie one by one."""
    engine = model._engine
    control = engine.control([], np.zeros(1, bool), 0, model._settings(max_new_tokens=6))
    state = engine.read(prompt_batch(["one"], model.tokenizer, model.config, None), 130)
    parts, whole = jax.tree.flatten((state, jnp.ones(1, bool), jnp.array([6]), prompt_keys(0, 1), control))

    def write(params, parts):
        rest = jax.tree.unflatten(whole, parts)
        return decode_text(params, *rest, model=engine.module, max_new_tokens=6)

    compiled = jax.jit(write).lower(engine.params, parts).compile()
    layer = engine.params["llama"]["layers_0"]
    sizes = {x.size for x in jax.tree.leaves(layer) if x.ndim > 1}
    copies = re.findall(r" = f32\[([\d,]+)\]\S* (?:dynamic-slice|slice|copy|transpose)\(", compiled.as_text())
    assert copies  # slices of the cache, whose 192 entries make other sizes
    assert not sizes & {math.prod(map(int, dims.split(","))) for dims in copies}


def test_a_full_cache_ends_a_row(model):
    engine = model._engine
    settings = model._settings(max_new_tokens=6)
    batch = prompt_batch(["one"], model.tokenizer, model.config, None)
    capacity = int((batch.segment_ids > 0).sum()) + 2
    control = engine.control([], np.zeros(1, bool), 0, settings)
    state, tokens, stop = decode_text(
        engine.params,
        engine.read(batch, capacity),
        jnp.ones(1, bool),
        jnp.array([6]),
        prompt_keys(0, 1),
        control,
        model=engine.module,
        max_new_tokens=6,
    )
    assert (np.asarray(tokens) >= 0).sum() == 2
    assert int(stop[0]) == -1
    assert int(state.cache.lengths[0]) == capacity


@pytest.mark.parametrize("top_p, possible", [(1.0, {0, 1, 2}), (0.6, {1, 2}), (0.3, {2})])
def test_sampling_draws_from_the_nucleus(top_p, possible):
    logits = jnp.tile(jnp.log(jnp.array([0.1, 0.4, 0.5])), (2000, 1))
    keys = jax.random.split(jax.random.key(0), 2000)
    drawn = np.asarray(jax.jit(sample_tokens)(logits, keys, jnp.float32(1), jnp.float32(top_p)))
    assert set(drawn.tolist()) == possible
    kept = np.array([p if i in possible else 0 for i, p in enumerate((0.1, 0.4, 0.5))])
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 2000, kept / kept.sum(), atol=0.05)


@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("vocabulary", [3, 50, 32000])
def test_the_nucleus_is_what_a_sorted_vocabulary_gives(vocabulary, top_p):
    logits = np.random.default_rng(vocabulary).normal(size=(4, vocabulary)) * 3
    probabilities = np.asarray(jax.nn.softmax(jnp.asarray(logits, jnp.float32)))
    found = np.asarray(jax.jit(in_nucleus)(probabilities, jnp.float32(top_p)))
    for row, inside in zip(probabilities.astype(np.float64), found, strict=True):
        order = np.argsort(-row)
        before = np.cumsum(row[order]) - row[order]
        wanted = np.zeros(vocabulary, bool)
        wanted[order[(before < top_p) | (top_p == 1)]] = True
        wanted[order[0]] = True
        np.testing.assert_array_equal(inside, wanted)


def test_equally_likely_tokens_at_the_border_are_all_in_the_nucleus():
    probabilities = jnp.array([[0.4, 0.2, 0.2, 0.2, 0.0]])
    assert in_nucleus(probabilities, jnp.float32(0.5)).tolist() == [[True, True, True, True, False]]


def test_temperature_zero_takes_the_likeliest(model):
    logits = jnp.array([[0.0, 3.0, -jnp.inf, 2.9], [5.0, 3.0, -jnp.inf, 2.9]])
    for seed in range(3):
        keys = jax.random.split(jax.random.key(seed), 2)
        assert sample_tokens(logits, keys, jnp.float32(0), jnp.float32(1)).tolist() == [1, 0]
