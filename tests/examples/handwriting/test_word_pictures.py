"""Pictures written in words: which token is in which slot, and which of them are learned."""

import pytest

from dreamllm_jax.data.pieces import Text, interleaved
from dreamllm_jax.data.sequences import encode_pieces
from examples.handwriting.word_pictures import WordPicture
from tests.data.fakes import SPECIAL, WordTokenizer

P, Q = 4, 3
S = SPECIAL
DREAM = [S.dream_start, *[S.im_patch] * Q, S.dream_end]


def encode(pieces, length=100):
    return encode_pieces(pieces, WordTokenizer(), P, Q, length)


def learned(sequence):
    return [int(t) for t, s in zip(sequence.tokens, sequence.supervised, strict=True) if s]


def test_the_word_is_in_the_last_query_slot_and_in_the_patch_slots():
    words = encode(interleaved(["one", WordPicture("seven", True, True, patches=("seven",)), "two"], "joint"))
    seven = words.tokens[2 + Q]
    query, patches = [S.im_patch] * (Q - 1) + [seven], [seven] * P
    expected = [1, 100, S.dream_start, *query, S.dream_end, S.im_start, *patches, S.im_end]
    assert words.tokens[: len(expected)].tolist() == expected
    assert learned(words) == [100, S.dream_start, seven, words.tokens[-2], 2]


def test_without_a_word_or_without_room_for_it():
    bare = encode([WordPicture("seven", seen=False, dreamed=True, position=None)])
    assert bare.tokens.tolist() == [1, *DREAM, 2] and learned(bare) == [S.dream_start, 2]
    with pytest.raises(ValueError, match="'one two three four' takes 4 tokens; its slots have room for 1 to"):
        encode([WordPicture("one two three four", seen=True, dreamed=True)])
    with pytest.raises(ValueError, match="'a b c d e' takes 5 tokens; its slots have room for 1 to 4"):
        encode([WordPicture("seven", seen=True, dreamed=False, patches=("seven", "a b c d e"))])
    cut = encode([Text("one"), WordPicture("seven", seen=True, dreamed=False), Text("two")], length=6)
    assert cut.tokens.tolist() == [1, 100, 2] and learned(cut) == [100]
    assert (cut.dropped_images, cut.dropped_tokens) == (1, 1)


def test_patches_may_differ():
    """Their words are repeated in turn; without any, the slots are those of a picture."""
    s = encode([WordPicture("seven", seen=True, dreamed=False, patches=("seven", "two", "seven"))])
    seven, two = s.tokens[2], s.tokens[3]
    assert s.tokens.tolist() == [1, S.im_start, seven, two, seven, seven, S.im_end, 2] and seven != two
    bare = encode([WordPicture("seven", seen=True, dreamed=False)])
    assert bare.tokens.tolist() == [1, S.im_start, *[S.im_patch] * P, S.im_end, 2]


@pytest.mark.parametrize(("position", "slot"), [(0.0, 0), (0.2, 0), (0.5, 1), (0.8, 2), (1.0, 2)])
def test_the_word_is_at_its_position(position, slot):
    """Wherever it is, the dream takes the same number of tokens, and the word is learned."""
    s = encode([WordPicture("seven", seen=False, dreamed=True, position=position)])
    slots = s.tokens[2 : 2 + Q].tolist()
    assert s.tokens[[0, 1, -2, -1]].tolist() == [1, S.dream_start, S.dream_end, 2] and len(s) == Q + 4
    assert slots[:slot] + slots[slot + 1 :] == [S.im_patch] * (Q - 1) and slots[slot] != S.im_patch
    assert learned(s) == [S.dream_start, slots[slot], 2]
