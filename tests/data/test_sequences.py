"""Documents to tokens: expectations by hand, and the reference's own sequences."""

import numpy as np
import pytest
from PIL import Image

from dreamllm_jax.data.chat import conversation, get_template
from dreamllm_jax.data.pieces import (
    End,
    Picture,
    Text,
    TokenPicture,
    UnslottedImage,
    captioned,
    interleaved,
    pair,
)
from dreamllm_jax.data.sequences import encode_pieces, encode_prompt
from dreamllm_jax.document import Document
from tests.data.fakes import SPECIAL, WordTokenizer

P, Q = 4, 3
RED = Image.new("RGB", (8, 8), "red")
BLUE = Image.new("RGB", (8, 8), "blue")
S = SPECIAL
SEEN = [S.im_start, *[S.im_patch] * P, S.im_end]
DREAM = [S.dream_start, *[S.im_patch] * Q, S.dream_end]


def encode(pieces, length=100, tokenizer=None, **options):
    return encode_pieces(pieces, tokenizer or WordTokenizer(), P, Q, length, **options)


def learned(sequence):
    return [int(t) for t, s in zip(sequence.tokens, sequence.supervised, strict=True) if s]


def test_pair_comprehension():
    s = encode(pair(RED, "a seven", "comprehension"))
    assert s.tokens.tolist() == [1, *SEEN, 100, 101, 2]
    assert learned(s) == [100, 101, 2]
    assert s.image_slots.tolist() == [-1, -1, 0, 1, 2, 3, -1, -1, -1, -1]
    assert s.images == (RED,) and s.dreams == () and s.dropped == 0 and s.has_targets


def test_pair_creation_learns_no_token():
    s = encode(pair(RED, "a seven", "creation"))
    assert s.tokens.tolist() == [1, 100, 101, *DREAM, 2]
    assert learned(s) == []
    assert s.dream_slots.tolist() == [-1, -1, -1, -1, 0, 1, 2, -1, -1]
    assert s.dreams == (RED,) and s.images == () and s.has_targets


class Marked(TokenPicture):
    """Token 50 in the first query slot, and in every patch slot."""

    def __init__(self, seen, dreamed, supervised=True):
        self.seen, self.dreamed, self.supervised = seen, dreamed, supervised

    def query_tokens(self, tokenizer, num_queries):
        return [50] + [S.im_patch] * (num_queries - 1), [self.supervised] + [False] * (num_queries - 1)

    def patch_tokens(self, tokenizer, num_patches):
        return [50] * num_patches


def test_a_token_picture_has_the_layout_of_a_picture():
    picture = encode(interleaved(["one", RED, "two"], "joint"))
    tokens = encode(interleaved(["one", Marked(True, True), "two"], "joint"))
    query = [50] + [S.im_patch] * (Q - 1)
    expected = [1, 100, S.dream_start, *query, S.dream_end, S.im_start, *[50] * P, S.im_end]
    assert tokens.tokens[: len(expected)].tolist() == expected and len(tokens) == len(picture)
    assert learned(tokens) == [100, S.dream_start, 50, tokens.tokens[-2], 2]
    assert learned(picture) == [100, S.dream_start, picture.tokens[-2], 2]
    assert (tokens.image_slots < 0).all() and (tokens.dream_slots < 0).all() and not tokens.images
    assert learned(encode([Marked(False, True, supervised=False), End(supervised=False)])) == []
    assert encode([Marked(True, False)]).tokens.tolist() == [1, S.im_start, *[50] * P, S.im_end, 2]


def test_a_token_picture_without_room_ends_the_document():
    cut = encode([Text("one"), Marked(True, False), Text("two")], length=6)
    assert cut.tokens.tolist() == [1, 100, 2] and learned(cut) == [100]
    assert (cut.dropped_images, cut.dropped_tokens) == (1, 1)


def test_pair_creation_shortens_its_caption_for_the_image():
    s = encode(pair(RED, "one two three four five", "creation"), length=9)
    assert s.tokens.tolist() == [1, 100, 101, *DREAM, 2]
    assert (s.dropped_tokens, s.dropped_images) == (3, 0)


def test_pair_joint_is_one_of_the_two():
    rng = np.random.default_rng(0)
    seen = [len(encode(pair(RED, "x", "joint", rng)).images) for _ in range(100)]
    assert 30 < sum(seen) < 70
    with pytest.raises(ValueError, match="needs rng"):
        pair(RED, "x", "joint")
    with pytest.raises(ValueError, match="Unknown mode 'jiont'; known: comprehension, creation, joint"):
        pair(RED, "x", "jiont")


def test_interleaved_joint():
    s = encode(interleaved(["one", RED, " two ", "", BLUE], "joint"))
    assert s.tokens.tolist() == [1, 100, *DREAM, *SEEN, 101, *DREAM, *SEEN, 2]
    assert learned(s) == [100, S.dream_start, 101, S.dream_start, 2]
    assert s.image_slots[s.image_slots >= 0].tolist() == list(range(2 * P))
    assert s.dream_slots[s.dream_slots >= 0].tolist() == list(range(2 * Q))
    assert (s.tokens[(s.image_slots >= 0) | (s.dream_slots >= 0)] == S.im_patch).all()
    assert s.images == s.dreams == (RED, BLUE)


def test_interleaved_takes_pieces_as_they_are():
    given = Picture(RED, seen=True, dreamed=False)
    s = encode(interleaved([given, Text("hidden", supervised=False), "shown", BLUE], "creation"))
    assert s.tokens.tolist() == [1, *SEEN, 100, 101, *DREAM, 2]
    assert learned(s) == [101, S.dream_start, 2]


def test_image_that_does_not_fit_ends_the_document():
    parts = ["one two", RED, "three", BLUE, "four five"]
    whole = encode(interleaved(parts, "joint"))
    for length in range(2, len(whole) + 1):
        s = encode(interleaved(parts, "joint"), length)
        n = len(s)
        assert n <= length
        assert s.tokens[: n - 1].tolist() == whole.tokens[: n - 1].tolist()
        assert s.supervised[: n - 1].tolist() == whole.supervised[: n - 1].tolist()
        assert s.tokens[-1] == 2
        assert s.supervised[-1] == (n == len(whole))  # a document that was cut does not teach to stop
        assert len(s.images) == len(s.dreams) == (s.image_slots.max() + 1) // P
        assert (s.tokens == S.im_start).sum() == (s.tokens == S.im_end).sum() == len(s.images)
        assert len(s.images) + s.dropped_images == 2
        assert (s.tokens >= 100).sum() + s.dropped_tokens == 5


def test_image_budgets_end_the_document():
    s = encode(interleaved(["one", RED, "two", BLUE, "three"], "joint"), max_images=1)
    assert s.tokens.tolist() == [1, 100, *DREAM, *SEEN, 101, 2]
    assert (s.dropped_images, s.dropped_tokens) == (1, 1)
    s = encode(interleaved([RED, "one"], "creation"), max_dreams=0)
    assert (
        s.tokens.tolist() == [1, 2] and not s.has_targets and (s.dropped_images, s.dropped_tokens) == (1, 1)
    )


def test_eos_option_and_length():
    assert encode([Text("one")]).tokens.tolist() == [1, 100, 2]
    assert encode([Text("one")], eos=False).tokens.tolist() == [1, 100]
    assert learned(encode([Text("one", supervised=False)])) == []
    assert encode([Text("one"), End()]).tokens.tolist() == [1, 100, 2]
    with pytest.raises(ValueError, match="leaves no room"):
        encode([Text("one")], length=1)


def test_a_caption_and_its_unslotted_image():
    s = encode(captioned(RED, "a seven"))
    assert s.tokens.tolist() == [1, 100, 101, 2] and s.images == s.dreams == (RED,) and s.has_targets
    assert (s.image_slots < 0).all() and (s.dream_slots < 0).all()
    s = encode([UnslottedImage(RED)], max_images=0, max_dreams=1)
    assert s.images == () and s.dreams == (RED,)
    assert encode(captioned(RED, "x"), max_images=0, max_dreams=0).dropped_images == 1


def test_conversation_learns_exactly_the_answers():
    tokenizer = WordTokenizer()
    pieces = conversation(["<image>\nWhat is this?", "A seven.", "Draw it.", "<dream> Done."], [RED, BLUE])
    s = encode(pieces, tokenizer=tokenizer)
    words = {i: w for w, i in tokenizer.words.items()}
    assert [words.get(t, t) for t in learned(s)] == ["A", "seven.", 2, S.dream_start, "Done.", 2]
    assert s.images == (RED, BLUE) and s.dreams == (BLUE,)
    texts = [p.text for p in pieces if isinstance(p, Text)]
    assert texts[0].startswith("A chat between") and texts[0].endswith("questions. USER: ")
    assert texts[1:] == ["\nWhat is this? ASSISTANT:", "A seven.", "USER: Draw it. ASSISTANT:", " Done."]


def test_conversation_plain_meets_its_prompt():
    tokenizer = WordTokenizer()
    s = encode(conversation([(RED, "Which one?"), "seven"], template="plain"), tokenizer=tokenizer)
    assert s.tokens.tolist() == [1, *SEEN, 100, 101, 102, 2] and learned(s) == [102, 2]
    prompt = encode_prompt(Document([RED, "Which one?"]), tokenizer, P, 50)
    assert prompt.tokens.tolist() == s.tokens[:-2].tolist() and prompt.images == (RED,)


def test_conversation_with_template_meets_its_prompt():
    tokenizer = WordTokenizer()
    s = encode(conversation([(RED, "Which one?"), "seven"]), 200, tokenizer)
    prompt = encode_prompt(Document([RED, "Which one?"]), tokenizer, P, 200, template="vicuna_v1.1")
    assert prompt.tokens.tolist() == s.tokens[:-2].tolist()
    assert not prompt.supervised.any() and not prompt.dreams


def test_llama2_begins_every_question_anew():
    s = encode(conversation(["one?", "two", [RED, "three?"], "four"], template="llama2"), 200)
    tokenizer = WordTokenizer()
    words = tokenizer.encode("[INST] one? [/INST] two three? four")
    inst, one, close, two, three, four = words
    first, second = [1, inst, one, close, two, 2], [1, inst, *SEEN, three, close, four, 2]
    assert s.tokens.tolist() == [*first, *second] and learned(s) == [two, 2, four, 2]
    prompt = encode_prompt("one?", tokenizer, P, 50, template="llama2")
    assert prompt.tokens.tolist() == first[:4]


def test_conversation_mistakes():
    with pytest.raises(ValueError, match="3 turns"):
        conversation(["a", "b", "c"])
    with pytest.raises(ValueError, match="more <image> and <dream> markers than images"):
        conversation(["<image> a", "b"])
    with pytest.raises(ValueError, match="1 more images than"):
        conversation(["a", "b"], [RED])
    with pytest.raises(
        ValueError,
        match="template 'llama'; known: llama2, plain, tokenizer, vicuna_v1.1",
    ):
        get_template("llama")


def test_prompt():
    tokenizer = WordTokenizer()
    assert encode_prompt("", tokenizer, P, 10).tokens.tolist() == [1]
    s = encode_prompt(Document(["one", RED, "two", BLUE]), tokenizer, P, 50)
    assert s.tokens.tolist() == [1, 100, *SEEN, 101, *SEEN]
    with pytest.raises(ValueError, match="The prompt has 4 tokens .* at most 3 fit"):
        encode_prompt("a b c", tokenizer, P, 3)
    with pytest.raises(ValueError, match="2 images; at most 1"):
        encode_prompt(Document([RED, BLUE]), tokenizer, P, 50, max_images=1)


def test_the_example_of_the_docstring():
    """ "one", an image that is dreamed and seen, and "two", with two patches and two queries."""
    s = encode_pieces(interleaved(["one", RED, "two"], "joint"), WordTokenizer(), 2, 2, 100)
    seen, dreamed = [S.im_start, S.im_patch, S.im_patch, S.im_end], [S.im_patch, S.im_patch, S.dream_end]
    assert s.tokens.tolist() == [1, 100, S.dream_start, *dreamed, *seen, 101, 2]
    assert np.flatnonzero(s.supervised).tolist() == [1, 2, 10, 11]
    assert s.dream_slots.tolist() == [-1, -1, -1, 0, 1, *[-1] * 7]
    assert s.image_slots.tolist() == [*[-1] * 7, 0, 1, -1, -1, -1]
