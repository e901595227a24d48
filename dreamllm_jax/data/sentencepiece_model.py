"""LLaMA's `tokenizer.model`, read without sentencepiece: no installed release can change an id.

The file is a protocol buffer (sentencepiece_model.proto): pieces with scores, and how text is normalized.
Its BPE joins the neighbours whose union has the best score; as a list of merges in the order of scores
that is the BPE of the `tokenizers` library.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import decoders, models, normalizers

SPACE = "▁"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_BPE = 2


class Piece(NamedTuple):
    """One entry of the vocabulary."""

    text: str
    score: float
    kind: int


class SentencePieceModel(NamedTuple):
    """What ids depend on; `charsmap` is the compiled character normalization ("" keeps all characters)."""

    pieces: tuple[Piece, ...]
    charsmap: bytes
    dummy_prefix: bool
    trims: bool

    def control_names(self) -> list[str]:
        """The pieces that no text can produce, `<unk>` among them."""
        return [piece.text for piece in self.pieces if piece.kind in (_CONTROL, _UNKNOWN)]


def read_model(path: str | Path) -> SentencePieceModel:
    """Reads a `tokenizer.model`.

    Raises:
      ValueError: a damaged file, one that is no such model, or one of another algorithm than BPE.
    """
    try:
        model = _parse(Path(path).read_bytes())
    except (ValueError, TypeError, AttributeError, IndexError, OverflowError, struct.error) as error:
        raise ValueError(f"{path} is no SentencePiece model, or is damaged ({error}).") from error
    return model


def backend_of(model: SentencePieceModel, legacy: bool) -> tokenizers.Tokenizer:
    """The same tokenizer in the `tokenizers` library, for chunks of plain text.

    A `legacy` LLaMA tokenizer puts a space before every chunk; any other puts the marker of a space before
    the first one, which keeps the spaces it begins with.
    """
    ids = {piece.text: i for i, piece in enumerate(model.pieces)}
    unknown = next((piece.text for piece in model.pieces if piece.kind == _UNKNOWN), "<unk>")
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=ids, merges=_merges(model), unk_token=unknown, byte_fallback=True, fuse_unk=True)
    )
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if not legacy:
        steps.append(normalizers.Replace(SPACE, " "))
    if model.trims:
        ends = r"\A +| +\z" if legacy else r" +\z"
        steps += [
            normalizers.Replace(tokenizers.Regex(ends), ""),
            normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
        ]
    if model.dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    if model.trims:
        steps.append(normalizers.Replace(tokenizers.Regex(rf"{SPACE}+\z"), ""))
    backend.normalizer = normalizers.Sequence(steps)
    leading = decoders.Strip(" ", 1 << 16 if model.trims else 1, 0)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), leading]
    )
    special = [tokenizers.AddedToken(n, special=True, normalized=False) for n in model.control_names()]
    backend.add_special_tokens(special)
    plain = [piece.text for piece in model.pieces if piece.kind == _USER_DEFINED]
    backend.add_tokens([tokenizers.AddedToken(name, special=False, normalized=False) for name in plain])
    return backend


def _merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """All pairs of pieces whose union is a piece, the best union first, then the leftmost pieces."""
    ids = {piece.text: i for i, piece in enumerate(model.pieces) if piece.kind == _NORMAL}
    found = []
    for text, index in ids.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                found.append((-model.pieces[index].score, index, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _parse(data: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    algorithm, charsmap, dummy_prefix, trims = 1, b"", True, True  # the defaults of the format
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(value))
        elif number == 2:
            algorithm = next((v for n, v in _fields(value) if n == 3), algorithm)
        elif number == 3:
            for n, v in _fields(value):
                if n == 2:
                    charsmap = v
                elif n == 3:
                    dummy_prefix = bool(v)
                elif n == 4:
                    trims = bool(v)
    if not pieces:
        raise ValueError("it has no pieces")
    if algorithm != _BPE:
        raise ValueError("its algorithm is not BPE, which LLaMA's is")
    return SentencePieceModel(tuple(pieces), charsmap, dummy_prefix, trims)


def _piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, _NORMAL
    for number, value in _fields(data):
        if number == 1:
            text = value.decode("utf-8")
        elif number == 2:
            (score,) = struct.unpack("<f", value)
        elif number == 3:
            kind = value
    return Piece(text, score, kind)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of every field of a protocol buffer message: int where it is a varint, else bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"a field is of the unknown kind {kind}")
        size, at = _varint(data, at) if kind == 2 else (8 if kind == 1 else 4, at)
        if at + size > len(data):
            raise ValueError("a field reaches beyond the end of the file")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at
