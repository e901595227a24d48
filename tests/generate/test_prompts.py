"""Prompts as rows of a batch."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.document import Document
from dreamllm_jax.generate.prompts import (
    as_list,
    bucket_length,
    cache_capacity,
    end_tokens,
    longest_prompt,
    prompt_batch,
)
from tests.data.chat_examples import CHATML, LLAMA2, THINKING, load, write_tokenizer


def test_buckets_stay_within_the_context():
    assert [bucket_length(n, 4096) for n in (1, 16, 17, 200, 257, 600)] == [16, 16, 32, 256, 512, 768]
    assert bucket_length(90, 96) == 96


def test_a_cache_has_room_for_one_entry_more():
    assert [cache_capacity(n, 4096) for n in (16, 31, 32, 600, 4000)] == [31, 31, 63, 767, 4095]
    assert cache_capacity(96, 96) == 96


def test_one_prompt_or_a_list_of_them():
    document = Document(["one"])
    assert as_list("one") == (["one"], False) and as_list(document) == ([document], False)
    assert as_list(["one", document]) == (["one", document], True)
    assert as_list(("one",)) == (["one"], True)
    with pytest.raises(ValueError, match="The list of prompts is empty"):
        as_list([])


def test_rows_are_left_aligned_and_hold_their_pictures(model):
    tokenizer, config = model.tokenizer, model.config
    gray = Image.new("RGB", (16, 16), (128, 128, 128))
    batch = prompt_batch(["one", Document([gray, "two", gray])], tokenizer, config, None)
    special, patches = tokenizer.special, [tokenizer.special.im_patch] * config.num_patches
    seen = [special.im_start, *patches, special.im_end]
    rows = [[special.bos, *tokenizer.encode("one")], [special.bos, *seen, *tokenizer.encode("two"), *seen]]
    assert longest_prompt(batch) == len(rows[1])
    assert batch.tokens.shape == (2, 16) and batch.images.shape == (2, 2, 16, 16, 3)
    for tokens, segments, row in zip(batch.tokens, batch.segment_ids, rows, strict=True):
        assert tokens[: len(row)].tolist() == row and (tokens[len(row) :] == special.pad).all()
        assert segments.tolist() == [1] * len(row) + [0] * (16 - len(row))
    assert (batch.images[0] == 0).all() and (batch.images[1] == 128).all()
    np.testing.assert_array_equal(batch.image_slots[1][batch.image_slots[1] >= 0], range(8))
    assert (batch.image_slots[0] == -1).all()


def test_a_template_makes_the_prompt_a_turn(model):
    llama = dataclasses.replace(model.config.llama, max_position_embeddings=512)
    roomy = dataclasses.replace(model.config, llama=llama)
    plain = prompt_batch(["one"], model.tokenizer, model.config, None)
    turn = prompt_batch(["one"], model.tokenizer, roomy, "vicuna_v1.1")
    text = model.tokenizer.decode(turn.tokens[0][turn.segment_ids[0] > 0].tolist())
    assert longest_prompt(turn) > longest_prompt(plain) and text.rstrip().endswith("USER: one ASSISTANT:")
    with pytest.raises(ValueError, match="at most 95 fit. Shorten it"):
        prompt_batch(["one"], model.tokenizer, model.config, "vicuna_v1.1")


def test_what_ends_an_answer(model, tmp_path):
    """Generation stops at the tokenizer's end token and at the template's token that closes an answer."""
    eos = model.tokenizer.special.eos
    assert end_tokens(model.tokenizer, None) == end_tokens(model.tokenizer, "vicuna_v1.1") == [eos]
    for name, kind, template in (("llama2", "llama", LLAMA2), ("qwen", "qwen", CHATML)):
        tokenizer = load(kind, tmp_path / name, template)
        assert end_tokens(tokenizer, "tokenizer") == [tokenizer.special.eos]
    for name, template in (("chatml", CHATML), ("thinking", THINKING)):
        write_tokenizer("qwen", tmp_path / name, template)
        config = tmp_path / name / "tokenizer_config.json"
        config.write_text(json.dumps({"eos_token": "<|endoftext|>"}))  # as in base models
        tokenizer = Tokenizer.load(tmp_path / name, extend=True)
        ends = [tokenizer.token_id(name) for name in ("<|endoftext|>", "<|im_end|>")]
        assert end_tokens(tokenizer, "tokenizer") == ends
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"  # never closes an answer
    assert end_tokens(tokenizer, "tokenizer") == [tokenizer.special.eos]
