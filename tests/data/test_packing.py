"""Rows: nothing lost, nothing crossed, budgets kept, slots and targets right."""

import numpy as np
import pytest

from dreamllm_jax.data.packing import RowLayout, RowStream, first_fit, pack_rows
from dreamllm_jax.data.pieces import interleaved
from dreamllm_jax.data.sequences import encode_pieces
from tests.data.fakes import SPECIAL, WordTokenizer

P, Q = 4, 3


def picture(value):
    return np.full((8, 8, 3), value, np.uint8)


def layout(**changes):
    base = {"num_patches": P, "num_queries": Q, "max_images": 4, "max_dreams": 3}
    return RowLayout(**{"length": 48, **base, "image_size": 8, "dream_size": 8, **changes})


def documents(n, seed=0, row=None):
    rng, tokenizer = np.random.default_rng(seed), WordTokenizer()
    row = row or layout()
    made = []
    for i in range(n):
        parts = []
        for _ in range(rng.integers(1, 4)):
            parts.append(" ".join(f"w{i}-{k}" for k in range(rng.integers(1, 5))))
            if rng.random() < 0.5:
                parts.append(picture(int(rng.integers(1, 255))))
        mode = ("comprehension", "creation", "joint")[rng.integers(3)]
        made.append(
            encode_pieces(
                interleaved(parts, mode),
                tokenizer,
                P,
                Q,
                row.room,
                max_images=row.max_images,
                max_dreams=row.dream_room,
            )
        )
    return made


def test_one_row_by_hand():
    row = layout(length=30, max_images=2, max_dreams=2, null_dream=True)
    tokenizer = WordTokenizer()
    a = encode_pieces(interleaved(["one", picture(7)], "comprehension"), tokenizer, P, Q, row.room)
    b = encode_pieces(interleaved(["two", picture(9)], "creation"), tokenizer, P, Q, row.room)
    batch = pack_rows([a, b], row, SPECIAL)
    patch, pad = SPECIAL.im_patch, SPECIAL.pad
    first = [1, 100, SPECIAL.im_start, *[patch] * P, SPECIAL.im_end, 2]
    second = [1, 101, SPECIAL.dream_start, *[patch] * Q, SPECIAL.dream_end, 2]
    null = [1, SPECIAL.dream_start, *[patch] * Q, SPECIAL.dream_end]
    assert batch.tokens.tolist() == [first + second + null + [pad] * 7]
    assert batch.segment_ids.tolist() == [[1] * 9 + [2] * 8 + [3] * 6 + [0] * 7]
    assert batch.segment_lengths.tolist() == [[9, 8, 6] + [0] * 14]  # 16 documents and the empty prompt
    assert batch.positions.tolist() == [[*range(9), *range(8), *range(6), *[0] * 7]]
    assert batch.targets[0, :9].tolist() == [*first[1:], pad]
    assert batch.loss_weights[0, :9].tolist() == [1, 0, 0, 0, 0, 0, 0, 1, 0]
    assert batch.loss_weights[0, 9:].tolist() == [1, 1, 0, 0, 0, 0, 1, 0] + [0] * 13
    assert batch.image_slots[0].tolist() == [-1] * 3 + [0, 1, 2, 3] + [-1] * 23
    assert batch.dream_slots[0].tolist() == [-1] * 12 + [0, 1, 2] + [-1] * 4 + [3, 4, 5] + [-1] * 8
    assert batch.image_mask.tolist() == [[True, False]] and batch.dream_mask.tolist() == [[True, False]]
    assert batch.null_dream.tolist() == [1]
    assert (batch.images[0, 0] == 7).all() and (batch.images[0, 1] == 0).all()
    assert (batch.dream_images[0, 0] == 9).all() and batch.dream_sizes is None


def unpack(batch):
    """Documents back out of rows: tokens, learned tokens, images by content."""
    found = []
    for b in range(len(batch.tokens)):
        lengths = batch.segment_lengths[b]
        packed = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        np.testing.assert_array_equal(np.trim_zeros(batch.segment_ids[b]), packed)
        for segment in range(1, batch.segment_ids[b].max() + 1):
            at = np.flatnonzero(batch.segment_ids[b] == segment)
            assert (np.diff(at) == 1).all() and batch.positions[b, at].tolist() == list(range(len(at)))
            assert batch.loss_weights[b, at[-1]] == 0  # nothing is predicted across documents
            np.testing.assert_array_equal(batch.targets[b, at[:-1]], batch.tokens[b, at[1:]])
            images = sorted({s // P for s in batch.image_slots[b, at] if s >= 0})
            dreams = sorted({s // Q for s in batch.dream_slots[b, at] if s >= 0})
            assert batch.image_mask[b, images].all() and batch.dream_mask[b, dreams].all()
            found.append(
                (
                    tuple(batch.tokens[b, at]),
                    (False, *(batch.loss_weights[b, at[:-1]] > 0)),
                    tuple(int(batch.images[b, i, 0, 0, 0]) for i in images),
                    tuple(int(batch.dream_images[b, j, 0, 0, 0]) for j in dreams),
                )
            )
        for slots, size in ((batch.image_slots[b], P), (batch.dream_slots[b], Q)):
            used = slots[slots >= 0]
            assert len(set(used.tolist())) == len(used) and len(used) % size == 0
    return found


def key(s):
    images, dreams = (tuple(int(i[0, 0, 0]) for i in pictures) for pictures in (s.images, s.dreams))
    return tuple(s.tokens), tuple(s.supervised), images, dreams


@pytest.mark.parametrize(("length", "expected"), [(256, 16), (2048, 32), (4096, 64)])
def test_the_number_of_documents_follows_the_length(length, expected):
    assert layout(length=length).documents == expected
    assert layout(length=length, max_documents=3).documents == 3


def test_a_row_has_at_most_max_documents():
    made = documents(60)
    batch = pack_rows(made, layout(length=400, max_images=99, max_dreams=99, max_documents=2), SPECIAL)
    assert batch.segment_ids.max() == 2 and batch.segment_lengths.shape == (30, 2)
    assert sorted(unpack(batch)) == sorted(map(key, made))


def test_nothing_is_lost_and_nothing_crosses():
    made = documents(200)
    batch = pack_rows(made, layout(), SPECIAL)
    assert sorted(unpack(batch)) == sorted(map(key, made))
    assert (batch.null_dream == -1).all()
    assert len(batch.tokens) < 120  # several share a row


def test_a_stream_loses_nothing_and_keeps_the_oldest_first():
    made = documents(300)
    stream = RowStream(lambda n: made[n % 300], layout(), lookahead=4)
    seen, oldest = [], []
    while len(seen) < 250:
        oldest.append(stream.waiting[0][1] if stream.waiting else None)
        row = stream.row()
        assert oldest[-1] is None or row[0] is oldest[-1]
        seen += row
        assert len(stream.waiting) <= 4
    waiting = [s for _, s in stream.waiting]
    assert sorted(map(key, seen + waiting)) == sorted(key(made[n % 300]) for n in range(stream.next))
    assert stream.counts["documents"] == len(seen)
    assert stream.counts["tokens"] == sum(map(len, seen))


def test_size_conditions():
    s = encode_pieces(
        interleaved(["one", np.zeros((8, 20, 3), np.uint8)], "creation"), WordTokenizer(), P, Q, 48
    )
    batch = pack_rows([s], layout(dream_sizes=True), SPECIAL)
    assert batch.dream_sizes[0, 0].tolist() == [8, 20, 0, 6, 8, 8]


def test_what_cannot_fit():
    long = encode_pieces(interleaved(["a b c d e f g h"], "joint"), WordTokenizer(), P, Q, 100)
    with pytest.raises(ValueError, match="10 tokens, 0 images and 0 dreams cannot fit a row of 9"):
        pack_rows([long], layout(length=9), SPECIAL)
    short = layout(length=48, max_document=9)  # the row has room, the language model no positions
    assert (short.room, short.longest) == (48, 9)
    with pytest.raises(ValueError, match="10 tokens, 0 images and 0 dreams cannot fit a row of 9"):
        pack_rows([long], short, SPECIAL)
    with pytest.raises(ValueError, match="no sequences"):
        pack_rows([], layout(), SPECIAL)
    with pytest.raises(ValueError, match="no room for the empty prompt's dream"):
        layout(length=7, null_dream=True)
    with pytest.raises(ValueError, match="no room for the empty prompt's dream"):
        layout(max_dreams=0, null_dream=True)
    barren = encode_pieces(interleaved([picture(1)], "creation"), WordTokenizer(), P, Q, 4)
    with pytest.raises(ValueError, match="left nothing to learn"):
        RowStream(lambda n: barren, layout(), 4).row()


def test_the_example_of_the_docstring():
    """ "a b" and "c" in a row of 8 tokens."""
    tokenizer, row = WordTokenizer(), layout(length=8)
    made = [encode_pieces(interleaved([text], "joint"), tokenizer, P, Q, 8) for text in ("a b", "c")]
    batch, pad = pack_rows(made, row, SPECIAL), SPECIAL.pad
    a, b, c = (tokenizer.words[word] for word in "abc")
    assert batch.tokens.tolist() == [[1, a, b, 2, 1, c, 2, pad]]
    assert batch.targets.tolist() == [[a, b, 2, pad, c, 2, pad, pad]]
    assert batch.loss_weights.tolist() == [[1, 1, 1, 0, 1, 1, 0, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 2, 2, 2, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]


def test_the_example_of_first_fit():
    """Given documents of 6, 7, 3 and 2 tokens, a row of 10 takes those of 6 and 3."""
    tokenizer, row, read = WordTokenizer(), layout(length=10), []
    texts = ("a b c d", "a b c d e", "a", "")
    left = [encode_pieces(interleaved([text], "joint"), tokenizer, P, Q, 10) for text in texts]

    def following():
        read.append(len(left[len(read)]))
        return len(read), left[len(read) - 1]

    chosen, passed = first_fit(row, 8, following)
    assert [len(sequence) for _, sequence in chosen] == [6, 3]
    assert [len(sequence) for _, sequence in passed] == [7] and read == [6, 7, 3]
