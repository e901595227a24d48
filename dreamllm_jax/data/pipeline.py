"""Endless batches: every row of the global batch reads its own stream of documents.

Document n of row r is a function of (seed, r, n) alone. A row is therefore the same on one host or on many,
and the state of a stream is a few numbers: resuming reads the few waiting documents again, and continues
exactly.

Example: with `batch_size` 4, row 1 reads the documents of index 1, 5, 9, ... If 1 and 9 fill its first row
and 5 does not fit, the state of row 1 is {"next": 3, "waiting": [1], ...}. Its document number 3 (index 13)
is read next, and number 1 (index 5) waits.

No grain loader runs here. Its packing has no image budgets, its state belongs to a worker, and its worker
processes would have to send images to one another. One thread ahead of the device is enough for work of a
few milliseconds. Sources over files (`mixture`) take their order from grain's random-access datasets.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from dreamllm_jax.batch import Batch
from dreamllm_jax.config.data import DataConfig
from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.data.files import BrokenRecord
from dreamllm_jax.data.images import to_rgb
from dreamllm_jax.data.packing import COUNTS, RowLayout, RowStream, assemble_batch
from dreamllm_jax.data.pieces import End, Picture, Piece, UnslottedImage
from dreamllm_jax.data.sequences import EncodedDocument, encode_pieces
from dreamllm_jax.data.sources import DocumentSource, open_documents
from dreamllm_jax.data.tokenizer import Tokenizer


def row_layout(config: DataConfig, model: DreamLLMConfig, null_dream: bool) -> RowLayout:
    """Returns the layout of rows for a stage's data config and a model's towers."""
    has_vae = model.vae is not None
    return RowLayout(
        length=config.length,
        num_patches=model.num_patches,
        num_queries=model.num_dream_queries,
        max_images=config.max_images if model.vision is not None else 0,
        max_dreams=config.max_dreams if has_vae else 0,
        image_size=model.vision.image_size if model.vision is not None else None,
        dream_size=model.image_size if has_vae else None,
        null_dream=null_dream,
        dream_sizes=model.unet is not None and model.unet.addition_embed_type is not None,
        max_document=None if model.llama is None else model.llama.context_length,
        max_documents=config.max_documents,
    )


def batches(
    config: DataConfig,
    model: DreamLLMConfig,
    tokenizer: Tokenizer,
    seed: int,
    null_dream: bool = False,
    start_step: int = 0,
    row_indices: Sequence[int] | None = None,
    index_folder: Path | None = None,
) -> BatchStream:
    """Returns a stage's batches (numpy) from `start_step` on, with the rows of `row_indices` (None: all).

    `index_folder` is that of `sources.open_documents`.

    Raises:
      ValueError: the source cannot be opened, or a row has no room for documents.
    """
    layout = row_layout(config, model, null_dream)
    size = max(layout.image_size or 0, layout.dream_size or 0) or 16
    source = open_documents(config, size, tokenizer, seed, index_folder)
    return BatchStream(
        source,
        tokenizer,
        layout,
        batch_size=config.batch_size,
        seed=seed,
        lookahead=config.lookahead,
        prefetch=config.prefetch,
        start_step=start_step,
        row_indices=row_indices,
    )


class BatchStream(Iterator[Batch]):
    """An endless iterator of batches whose state can be saved, and restored exactly."""

    def __init__(
        self,
        source: DocumentSource,
        tokenizer: Tokenizer,
        layout: RowLayout,
        batch_size: int,
        seed: int,
        lookahead: int = 8,
        prefetch: int = 2,
        start_step: int = 0,
        row_indices: Sequence[int] | None = None,
    ):
        """`row_indices` are the rows of the global batch to make, in this order (None: all of them)."""
        self._source, self._tokenizer, self._layout = source, tokenizer, layout
        self._batch_size, self._lookahead, self._prefetch = batch_size, lookahead, prefetch
        self._row_indices = range(batch_size) if row_indices is None else list(row_indices)
        assert self._row_indices and all(0 <= row < batch_size for row in self._row_indices), row_indices
        self._generators = _DocumentGenerator(seed)
        self._worker: _Worker | None = None
        self.load_state({"step": start_step, "rows": {}})

    def __next__(self) -> Batch:
        if self._ahead and self._worker is None:  # a closed thread had read ahead
            self.load_state(self._delivered)
        if self._prefetch and self._worker is None:
            self._worker, self._ahead = _Worker(self._make, self._prefetch), True
        batch, self._delivered = self._worker.get() if self._worker else self._make()
        return batch

    def state_dict(self) -> dict:
        """Returns the state after the last batch delivered, ready for JSON."""
        return self._delivered

    def load_state(self, state: dict) -> None:
        """Restores a `state_dict()`: the next batch is the one that followed it.

        Rows that the state lacks are packed again from their beginning, without decoding images.
        """
        self.close()
        self._ahead = False
        self._step = int(state["step"])
        self._streams = {}
        for row in self._row_indices:
            stream = RowStream(partial(self._read, row), self._layout, self._lookahead)
            self._streams[row] = stream
            if str(row) in state["rows"]:
                stream.restore(state["rows"][str(row)])
                continue
            for _ in range(self._step):
                stream.row()
        self._delivered = self._state()

    def stats(self) -> dict[str, int | float]:
        """Returns the `statistics` of this stream's rows since their beginning."""
        return statistics(self._delivered, self._layout.length)

    def close(self) -> None:
        """Ends the thread. The next batch is still the one that follows the last one delivered."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _make(self) -> tuple[Batch, dict]:
        rows = [stream.row() for stream in self._streams.values()]
        self._step += 1
        return assemble_batch(rows, self._layout, self._tokenizer.special), self._state()

    def _state(self) -> dict:
        return {"step": self._step, "rows": {str(r): s.state() for r, s in self._streams.items()}}

    def _read(self, row: int, number: int) -> EncodedDocument:
        """Returns document `number` of a row, always the same, without images that cannot be read."""
        rng, broken_documents = self._generators.at(row, number), 0
        try:
            document = self._source.document(rng, number * self._batch_size + row)
        except BrokenRecord:
            document, broken_documents = [End(supervised=False)], 1
        pieces, broken = _readable(document)
        layout = self._layout
        sequence = encode_pieces(
            pieces,
            self._tokenizer,
            layout.num_patches,
            layout.num_queries,
            layout.longest,
            max_images=layout.max_images,
            max_dreams=layout.dream_room,
        )
        if broken or broken_documents:
            sequence = dataclasses.replace(sequence, broken_images=broken, broken_documents=broken_documents)
        return sequence


def merge_iterator_states(states: Sequence[dict]) -> dict:
    """Joins the `state_dict()`s of streams that each have some of the rows, taken at the same step."""
    assert len({state["step"] for state in states}) == 1, [state["step"] for state in states]
    rows = {number: row for state in states for number, row in state["rows"].items()}
    return {"step": states[0]["step"], "rows": {number: rows[number] for number in sorted(rows, key=int)}}


def statistics(state: dict, length: int) -> dict[str, int | float]:
    """Returns the counts (`packing.COUNTS`) of all rows of a `state_dict()`, since their beginning.

    `length` is that of a row, in tokens. `pad_share` is the share of positions that are padding.
    """
    counts = {name: 0 for name in COUNTS}
    for row in state["rows"].values():
        for name, value in row["counts"].items():
            counts[name] += value
    positions = state["step"] * len(state["rows"]) * length
    return {**counts, "pad_share": 1 - counts["tokens"] / positions if positions else 0.0}


class _DocumentGenerator:
    """A reusable generator: resetting its counter takes a tenth of the time of creating a new one."""

    def __init__(self, seed: int):
        self._bits = np.random.Philox(key=seed)
        self._generator = np.random.Generator(self._bits)
        self._state = self._bits.state

    def at(self, row: int, number: int) -> np.random.Generator:
        self._state["state"]["counter"][:] = (0, 0, number, row)
        self._bits.state = self._state
        return self._generator


def _readable(pieces: Sequence[Piece]) -> tuple[list[Piece], int]:
    """Returns the pieces with opened images, and the number of broken ones, which are left out."""
    readable: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, Picture | UnslottedImage) and not isinstance(piece.image, np.ndarray):
            try:
                piece = dataclasses.replace(piece, image=to_rgb(piece.image))
            except ValueError:
                continue
        readable.append(piece)
    return readable, len(pieces) - len(readable)


class _Worker:
    """A thread that stays a few results ahead; its error is raised by `get`."""

    def __init__(self, make: Callable[[], tuple[Batch, dict]], ahead: int):
        self._make, self._results = make, queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                result = self._make()
            except BaseException as error:
                result = error
            self._put(result)
            if isinstance(result, BaseException):
                return

    def _put(self, result: object) -> None:
        while not self._stop.is_set():
            try:
                return self._results.put(result, timeout=0.1)
            except queue.Full:
                continue

    def get(self) -> tuple[Batch, dict]:
        result = self._results.get()
        if isinstance(result, BaseException):
            self._results.put(result)  # the next call fails again
            raise result
        return result

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
