"""The document loop on a scripted model: each token is followed by one chosen beforehand."""

import numpy as np
import pytest

from dreamllm_jax.config.model import GenerationConfig

# Next tokens in order of preference. After a drawing, the last token that the model has read is `<im_end>`.
SCRIPT = {
    "six": ["three"],
    "three": ["<dream_start>", "</s>"],
    "<im_end>": ["four"],
    "four": ["<dream_start>", "plus"],
    "plus": ["equals"],
    "equals": ["</s>"],
}


@pytest.fixture(scope="module")
def scripted(variant, tokenizer, model, flatten_params):
    """Returns a model whose layers pass the last embedding through and whose head follows the script."""
    params = flatten_params(model.params)

    def token(name):
        special = {"</s>": "eos", "<im_end>": "im_end", "<dream_start>": "dream_start"}
        if name in special:
            return getattr(tokenizer.special, special[name])
        (only,) = tokenizer.encode(name)
        return only

    embedding = np.zeros_like(params["llama/embed_tokens/embedding"])
    head = np.zeros_like(params["llama/lm_head/kernel"])
    for axis, (name, following) in enumerate(SCRIPT.items()):
        embedding[token(name), axis] = 1.0
        for rank, wanted in enumerate(following):
            head[axis, token(wanted)] = 10.0 - rank
    changes = {
        "llama/embed_tokens/embedding": embedding,
        "llama/lm_head/kernel": head,
        "llama/norm/scale": np.ones_like(params["llama/norm/scale"]),
    }
    for path in ("self_attn/o_proj", "mlp/down_proj"):
        name = f"llama/layers/{path}/kernel"
        changes[name] = np.zeros_like(params[name])
    generation = GenerationConfig(
        max_new_tokens=8, max_images=2, num_inference_steps=2, guidance_scale=2.0, sampler="ddim"
    )
    return variant(params=changes, generation=generation)


def shape(document):
    return [part if isinstance(part, str) else "PICTURE" for part in document]


def test_text_and_pictures_follow_the_model(scripted):
    """The model draws twice. A third drawing would exceed max_images, so the next best token is decoded."""
    document = scripted.generate_document("six")
    assert shape(document) == ["three", "PICTURE", "four", "PICTURE", "four plus equals"]
    assert document.finish_reason == "stop"
    assert document.text == "three four four plus equals"
    assert [p.size for p in document.images] == [(8, 8)] * 2
    assert np.abs(np.asarray(document.images[0], int) - np.asarray(document.images[1], int)).max() > 0


def test_limits_on_pictures_and_text(scripted):
    assert shape(scripted.generate_document("six", max_images=0)) == ["three"]
    one = scripted.generate_document("six", max_images=1)
    assert shape(one) == ["three", "PICTURE", "four plus equals"] and one.finish_reason == "stop"
    short = scripted.generate_document("six", max_new_tokens=3)
    assert shape(short) == ["three", "PICTURE", "four", "PICTURE", "four"]
    assert short.finish_reason == "length"
    # The budget limits text only: an image may still follow when it is used up.
    assert shape(scripted.generate_document("six", max_new_tokens=1))[:2] == ["three", "PICTURE"]


def test_no_picture_is_begun_that_does_not_fit(scripted):
    """70 of 96 tokens are used. Two drawings take 11 tokens each; a third does not fit."""
    prompt = "one " * 68 + "six"
    assert 1 + len(scripted.tokenizer.encode(prompt)) == 70
    document = scripted.generate_document(prompt, max_images=5)
    assert shape(document) == ["three", "PICTURE", "four", "PICTURE", "four plus"]
    assert document.finish_reason == "length"


def test_rows_of_a_batch_end_by_themselves(scripted):
    documents = scripted.generate_document(["six", "equals", "four"], max_images=1)
    assert [shape(d) for d in documents] == [
        ["three", "PICTURE", "four plus equals"],
        [],
        ["PICTURE", "four plus equals"],
    ]
    assert {d.finish_reason for d in documents} == {"stop"}


def test_text_alone_never_draws(scripted):
    assert scripted.generate_text("six") == "three"
    assert scripted.generate_text(["equals", "four"]) == ["", "plus equals"]


def test_a_document_ends_at_what_closes_an_answer(scripted, tokenizer, monkeypatch):
    """The closing token may be any control token of the model's template."""
    (plus,) = tokenizer.encode("plus")
    for room in ("documents", "api"):
        monkeypatch.setattr(
            f"dreamllm_jax.generate.{room}.end_tokens", lambda known, _: [known.special.eos, plus]
        )
    document = scripted.generate_document("six", max_images=1)
    assert shape(document) == ["three", "PICTURE", "four"] and document.finish_reason == "stop"
    assert scripted.generate_text("four") == ""
