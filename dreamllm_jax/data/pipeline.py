"""Batches without end: every row of the global batch reads its own stream of documents.

Document n of row r is a function of (seed, r, n) alone, so a row is the same on one host or many,
and the place of a stream is a handful of numbers: resuming reads the few waiting documents again
and goes on exactly. That, and packing under image budgets, is why no grain loader runs here: its
packing knows no budgets, its state is a worker's, and its processes would need the pictures sent
between them. One thread ahead of the device is enough for work of a few milliseconds. Sources over
files (`records`) take their order from grain's random-access datasets: `index` below counts as those do.
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
    """Rows as `config` wants them, with the pictures and slots of `model`'s towers."""
    draws = model.vae is not None
    return RowLayout(
        length=config.length,
        num_patches=model.num_patches,
        num_queries=model.num_dream_queries,
        max_images=config.max_images if model.vision is not None else 0,
        max_dreams=config.max_dreams if draws else 0,
        image_size=model.vision.image_size if model.vision is not None else None,
        dream_size=model.image_size if draws else None,
        null_dream=null_dream,
        dream_sizes=model.unet is not None and model.unet.addition_embed_type is not None,
        max_document=None if model.llama is None else model.llama.context_length,
    )


def batches(
    config: DataConfig,
    model: DreamLLMConfig,
    tokenizer: Tokenizer,
    seed: int,
    null_dream: bool = False,
    start_step: int = 0,
    numbers: Sequence[int] | None = None,
    index_folder: Path | None = None,
) -> BatchStream:
    """The batches of one stage, as numpy arrays, from `start_step` on: the rows of these numbers, or all.

    `index_folder` is as for `open_documents`.

    Raises:
      ValueError: no source, no room for any document.
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
        numbers=numbers,
    )


class BatchStream(Iterator[Batch]):
    """An endless iterator of batches whose place can be written down and returned to, exactly."""

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
        numbers: Sequence[int] | None = None,
    ):
        """Of the global batch's `rows`, those of these `numbers`, in this order (None: all)."""
        self._source, self._tokenizer, self._layout = source, tokenizer, layout
        self._batch_size, self._lookahead, self._prefetch = batch_size, lookahead, prefetch
        self._numbers = range(batch_size) if numbers is None else list(numbers)
        assert self._numbers and all(0 <= row < batch_size for row in self._numbers), numbers
        self._generators = _DocumentGenerator(seed)
        self._worker: _Worker | None = None
        self.load_state({"step": start_step, "rows": {}})

    def __next__(self) -> Batch:
        if self._ahead and self._worker is None:  # a closed thread had read further than was delivered
            self.load_state(self._delivered)
        if self._prefetch and self._worker is None:
            self._worker, self._ahead = _Worker(self._make, self._prefetch), True
        batch, self._delivered = self._worker.get() if self._worker else self._make()
        return batch

    def state_dict(self) -> dict:
        """The place after the last batch delivered, ready for JSON."""
        return self._delivered

    def load_state(self, state: dict) -> None:
        """Goes to the place of a `state_dict()`: the next batch is the one that followed it.

        Rows that the state does not hold are packed from their beginning again,
        without their pictures.
        """
        self.close()
        self._ahead = False
        self._step = int(state["step"])
        self._streams = {}
        for row in self._numbers:
            stream = RowStream(partial(self._read, row), self._layout, self._lookahead)
            self._streams[row] = stream
            if str(row) in state["rows"]:
                stream.restore(state["rows"][str(row)])
                continue
            for _ in range(self._step):
                stream.row()
        self._delivered = self._state()

    def stats(self) -> dict[str, int | float]:
        """The `statistics` of this stream's rows so far."""
        return statistics(self._delivered, self._layout.length)

    def close(self) -> None:
        """Ends the thread. The next batch after it is still the one that follows the last delivered."""
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
        """Document `number` of a row, always the same; pictures that cannot be read are left out of it."""
        rng, faulty = self._generators.at(row, number), 0
        try:
            document = self._source.document(rng, number * self._batch_size + row)
        except BrokenRecord:
            document, faulty = [End(supervised=False)], 1
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
        if broken or faulty:
            sequence = dataclasses.replace(sequence, broken_images=broken, broken_documents=faulty)
        return sequence


def merge_iterator_states(places: Sequence[dict]) -> dict:
    """One place of all rows from the `state_dict()`s of streams that have each some of them, at one step."""
    assert len({place["step"] for place in places}) == 1, [place["step"] for place in places]
    rows = {row: state for place in places for row, state in place["rows"].items()}
    return {"step": places[0]["step"], "rows": {row: rows[row] for row in sorted(rows, key=int)}}


def statistics(place: dict, length: int) -> dict[str, int | float]:
    """Counts over the rows (of `length` slots) of a `state_dict()` since their beginning.

    `pad_share` is the share of slots without a document.
    """
    counts = {name: 0 for name in COUNTS}
    for state in place["rows"].values():
        for name, value in state["counts"].items():
            counts[name] += value
    slots = place["step"] * len(place["rows"]) * length
    return {**counts, "pad_share": 1 - counts["tokens"] / slots if slots else 0.0}


class _DocumentGenerator:
    """One generator that can stand anywhere: moving a counter takes a tenth of making a generator."""

    def __init__(self, seed: int):
        self._bits = np.random.Philox(key=seed)
        self._generator = np.random.Generator(self._bits)
        self._state = self._bits.state

    def at(self, row: int, number: int) -> np.random.Generator:
        self._state["state"]["counter"][:] = (0, 0, number, row)
        self._bits.state = self._state
        return self._generator


def _readable(pieces: list[Piece]) -> tuple[list[Piece], int]:
    """Opens pictures given as files or bytes; leaves out broken ones, markers and all, and counts them."""
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
    """One thread that stays a few results ahead; its error is raised where the result was wanted."""

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
            self._results.put(result)  # asked again, it fails again
            raise result
        return result

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
