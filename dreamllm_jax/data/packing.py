"""Encoded documents to rows: several documents share a row of fixed length and fixed image budgets.

Each row of the batch has a stream of documents of its own, packed by first fit. A document that does not fit
waits for the stream's next row. At most `lookahead` documents wait, and the one that has waited longest is
tried first. No document is split or lost, and what a row holds depends on its own stream alone.

Example: "a b" and "c" in a row of 8 tokens. `targets` has the token that follows; it counts where
`loss_weights` is 1, never across documents (`-` is padding):

    tokens        <s>  a   b   </s>  <s>  c   </s>  -
    targets       a    b  </s>  -     c  </s>  -    -
    loss_weights  1    1   1    0     1   1    0    0
    segment_ids   1    1   1    1     2   2    2    0
    positions     0    1   2    3     0   1    2    0

Its `segment_lengths` are 4, 3, 0, ..., 0.

Slots are renumbered by row. If the first document has two images, the first image of the second one is
the row's third, k = 2; with P patches its slots are 2 P, 2 P + 1, ...
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from dreamllm_jax.batch import Batch
from dreamllm_jax.data.images import ImageLike, to_diffusion, to_vision
from dreamllm_jax.data.sequences import EncodedDocument
from dreamllm_jax.data.tokenizer import SpecialTokens

# What a stream counts. `empty_documents` had nothing left to learn, and `broken_documents` could not be read;
# neither are in any row.
COUNTS = (
    "tokens",
    "documents",
    "empty_documents",
    "broken_documents",
    "dropped_images",
    "dropped_tokens",
    "broken_images",
)


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """The static shape of a row and of its images.

    `image_size` and `dream_size` are in pixels; None means that the model has no such tower. With
    `null_dream` the row ends with a segment `<s><dream_start> Q <dream_end>`, which takes the last dream.
    `dream_sizes` adds SDXL's size conditions. No document is longer than `max_document`, the number of
    positions that the language model has (None: no longer than the row). A row has at most `documents`
    documents: `max_documents`, or one for every 64 tokens and at least 16.
    """

    length: int
    num_patches: int
    num_queries: int
    max_images: int = 0
    max_dreams: int = 0
    image_size: int | None = None
    dream_size: int | None = None
    null_dream: bool = False
    dream_sizes: bool = False
    max_document: int | None = None
    max_documents: int | None = None

    def __post_init__(self):
        if self.null_dream and (self.max_dreams < 1 or self.room < 2):
            raise ValueError(
                f"A row of {self.length} tokens and {self.max_dreams} dreams has no room for the empty "
                f"prompt's dream ({self.num_queries + 3} tokens, one dream) besides documents; "
                "increase data.length or data.max_dreams."
            )

    @property
    def room(self) -> int:
        """The number of tokens that documents may take."""
        return self.length - (self.num_queries + 3) * self.null_dream

    @property
    def documents(self) -> int:
        """The number of documents that a row may have."""
        return max(16, self.length // 64) if self.max_documents is None else self.max_documents

    @property
    def longest(self) -> int:
        """The number of tokens that one document may have."""
        return self.room if self.max_document is None else min(self.room, self.max_document)

    @property
    def dream_room(self) -> int:
        """The number of dreams that documents may take."""
        return self.max_dreams - self.null_dream

    def check(self, sequence: EncodedDocument) -> None:
        """Raises ValueError for a document that does not fit an empty row."""
        if not self.fits(sequence, self.longest, self.max_images, self.dream_room):
            raise ValueError(
                f"A document of {len(sequence)} tokens, {len(sequence.images)} images and "
                f"{len(sequence.dreams)} dreams cannot fit a row of {self.longest}, {self.max_images} and "
                f"{self.dream_room}; encode it with these limits."
            )

    @staticmethod
    def fits(sequence: EncodedDocument, tokens: int, images: int, dreams: int) -> bool:
        """Returns whether a document fits the tokens, images and dreams that are left of a row."""
        return len(sequence) <= tokens and len(sequence.images) <= images and len(sequence.dreams) <= dreams


Numbered = tuple[int, EncodedDocument]


def first_fit(
    layout: RowLayout, lookahead: int, following: Callable[[], Numbered | None]
) -> tuple[list[Numbered], list[Numbered]]:
    """Takes documents for one row until it is full, `lookahead` documents do not fit, or none is left.

    A row is full if it has one token left, or as many documents as the layout allows.

    Example: of documents of 6, 7, 3 and 2 tokens, a row of 10 takes those of 6 and 3, and passes 7 over. One
    token is then left, too few for any document, so the last one is not read.

    Returns:
      The documents of the row, and those passed over, each in order.
    """
    tokens, images, dreams = layout.room, layout.max_images, layout.dream_room
    chosen: list[Numbered] = []
    passed: list[Numbered] = []
    while tokens > 1 and len(chosen) < layout.documents and len(passed) < lookahead:
        if (candidate := following()) is None:
            break
        sequence = candidate[1]
        if not layout.fits(sequence, tokens, images, dreams):
            passed.append(candidate)
            continue
        chosen.append(candidate)
        tokens -= len(sequence)
        images -= len(sequence.images)
        dreams -= len(sequence.dreams)
    return chosen, passed


class RowStream:
    """Packs one stream of documents, read by number, into rows one after another."""

    def __init__(self, read: Callable[[int], EncodedDocument], layout: RowLayout, lookahead: int):
        """`read(n)` returns document n of the stream, the same one every time."""
        self.read, self.layout, self.lookahead = read, layout, lookahead
        self.next = 0
        self.waiting: collections.deque[Numbered] = collections.deque()
        self.counts = dict.fromkeys(COUNTS, 0)

    def row(self) -> list[EncodedDocument]:
        """Returns the documents of the next row."""
        chosen, passed = first_fit(self.layout, self.lookahead, self._following)
        self.waiting.extendleft(reversed(passed))
        sequences = [sequence for _, sequence in chosen]
        self.counts["documents"] += len(sequences)
        self.counts["tokens"] += sum(map(len, sequences))
        for sequence in sequences:
            self._count_dropped(sequence)
        return sequences

    def _following(self) -> Numbered:
        return self.waiting.popleft() if self.waiting else self._read_next()

    def _read_next(self, patience: int = 1000) -> Numbered:
        """Returns the next document that has training targets; counts those that have none."""
        for _ in range(patience):
            number, self.next = self.next, self.next + 1
            sequence = self.read(number)
            if sequence.has_targets:
                self.layout.check(sequence)
                return number, sequence
            self.counts["empty_documents"] += not sequence.broken_documents
            self._count_dropped(sequence)
        raise ValueError(
            f"{patience} consecutive documents left nothing to learn within {self.layout.longest} tokens, "
            f"{self.layout.max_images} images and {self.layout.dream_room} dreams per row; raise these "
            "limits, or choose documents and a mode that the model's towers can use."
        )

    def _count_dropped(self, sequence: EncodedDocument) -> None:
        for name in ("broken_documents", "dropped_images", "dropped_tokens", "broken_images"):
            self.counts[name] += getattr(sequence, name)

    def state(self) -> dict:
        """Returns the stream's position: the next document's number, those that wait, and the counts."""
        waiting = [number for number, _ in self.waiting]
        return {"next": self.next, "waiting": waiting, "counts": dict(self.counts)}

    def restore(self, state: dict) -> None:
        """Returns to the position of `state`, by reading the waiting documents again."""
        self.next, self.counts = int(state["next"]), {**self.counts, **state["counts"]}
        self.waiting = collections.deque((number, self.read(number)) for number in state["waiting"])


def pack_rows(
    sequences: Iterable[EncodedDocument], layout: RowLayout, special: SpecialTokens, lookahead: int = 8
) -> Batch:
    """Packs a finite list of documents into as many rows as they need, as one Batch of numpy arrays.

    Raises:
      ValueError: a document does not fit an empty row, or there are no documents.
    """
    left = collections.deque(enumerate(sequences))
    if not left:
        raise ValueError("pack_rows got no sequences; give at least one.")
    for _, sequence in left:
        layout.check(sequence)
    rows = []
    while left:
        chosen, passed = first_fit(layout, lookahead, lambda: left.popleft() if left else None)
        left.extendleft(reversed(passed))
        rows.append([sequence for _, sequence in chosen])
    return assemble_batch(rows, layout, special)


def assemble_batch(
    rows: Sequence[Sequence[EncodedDocument]], layout: RowLayout, special: SpecialTokens
) -> Batch:
    """Writes rows of documents into the arrays of a Batch, with images at the towers' sizes."""
    batch = empty_batch(len(rows), layout, special.pad)
    null = _null_sequence(layout.num_queries, special)
    for b, row in enumerate(rows):
        at = images = dreams = 0
        for segment, sequence in enumerate(row, start=1):
            _write_document(
                batch, b, at, segment, sequence, images * layout.num_patches, dreams * layout.num_queries
            )
            for image in sequence.images:
                if batch.images is not None:
                    assert layout.image_size is not None
                    batch.images[b, images] = to_vision(image, layout.image_size)
                images += 1
            for dream in sequence.dreams:
                _write_dream(batch, b, dreams, dream, layout)
                dreams += 1
            at += len(sequence)
        assert at <= layout.room and images <= layout.max_images and dreams <= layout.dream_room
        batch.image_mask[b, :images] = True
        batch.dream_mask[b, :dreams] = True
        if layout.null_dream:
            slot = (layout.max_dreams - 1) * layout.num_queries
            _write_document(batch, b, at, len(row) + 1, null, 0, slot)
    return batch


def empty_batch(rows: int, layout: RowLayout, pad: int) -> Batch:
    """Returns a Batch (numpy) of rows that are all padding."""
    shape = (rows, layout.length)
    i, j, h, h2 = layout.max_images, layout.max_dreams, layout.image_size, layout.dream_size
    return Batch(
        tokens=np.full(shape, pad, np.int32),
        targets=np.full(shape, pad, np.int32),
        segment_ids=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
        loss_weights=np.zeros(shape, np.float32),
        image_slots=np.full(shape, -1, np.int32),
        dream_slots=np.full(shape, -1, np.int32),
        image_mask=np.zeros((rows, i), bool),
        dream_mask=np.zeros((rows, j), bool),
        null_dream=np.full(rows, j - 1 if layout.null_dream else -1, np.int32),
        images=None if h is None else np.zeros((rows, i, h, h, 3), np.uint8),
        dream_images=None if h2 is None else np.zeros((rows, j, h2, h2, 3), np.uint8),
        dream_sizes=np.zeros((rows, j, 6), np.int32) if layout.dream_sizes else None,
        segment_lengths=np.zeros((rows, layout.documents + layout.null_dream), np.int32),
    )


def _write_document(
    batch: Batch, b: int, at: int, segment: int, sequence: EncodedDocument, image_slot: int, dream_slot: int
) -> None:
    end = at + len(sequence)
    assert batch.segment_lengths is not None
    batch.tokens[b, at:end] = sequence.tokens
    batch.targets[b, at : end - 1] = sequence.tokens[1:]
    batch.loss_weights[b, at : end - 1] = sequence.supervised[1:]
    batch.segment_ids[b, at:end] = segment
    batch.segment_lengths[b, segment - 1] = len(sequence)
    batch.positions[b, at:end] = np.arange(end - at)
    if sequence.images:
        slots = sequence.image_slots
        batch.image_slots[b, at:end] = np.where(slots >= 0, slots + image_slot, -1)
    if sequence.dreams:
        slots = sequence.dream_slots
        batch.dream_slots[b, at:end] = np.where(slots >= 0, slots + dream_slot, -1)


def _write_dream(batch: Batch, b: int, index: int, image: ImageLike, layout: RowLayout) -> None:
    if batch.dream_images is None:
        return
    assert layout.dream_size is not None
    batch.dream_images[b, index], sizes = to_diffusion(image, layout.dream_size)
    if batch.dream_sizes is not None:
        batch.dream_sizes[b, index] = sizes


def _null_sequence(num_queries: int, special: SpecialTokens) -> EncodedDocument:
    tokens = [special.bos, special.dream_start, *[special.im_patch] * num_queries, special.dream_end]
    n = len(tokens)
    dream_slots = np.full(n, -1, np.int32)
    dream_slots[2 : 2 + num_queries] = np.arange(num_queries)
    blank = np.full(n, -1, np.int32)
    # Its dream has no image to learn: its condition only replaces the dropped conditions of other dreams.
    return EncodedDocument(np.array(tokens, np.int32), np.zeros(n, bool), blank, dream_slots, dreams=(b"",))
