"""Plain text to ids and back, by the library that reads a tokenizer's file.

`tokenizer.model` goes through `sentencepiece`, `tokenizer.json` through `tokenizers`. transformers reads
both, but its release 5 tokenizes the text after a control token differently from the reference.

In:    text without control tokens.
Out:   ids, and which characters each of them covers.
Never: decides what is a control token; `tokenizer.Tokenizer` does.
"""

from __future__ import annotations

import abc
import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

Spans = list[tuple[int, int]]
_SPACE = "▁"


class Backend(abc.ABC):
    """What `Tokenizer` asks of a library.

    Attributes:
      legacy: whether LLaMA's marker of a space goes before every text, and not only where a string begins. A
        tokenizer that is not legacy also keeps the spaces that a text begins with.
    """

    legacy: bool

    @property
    @abc.abstractmethod
    def added(self) -> dict[int, tokenizers.AddedToken]:
        """The tokens that are matched as a whole, by id."""

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """The largest id + 1."""

    @abc.abstractmethod
    def add(self, names: Sequence[str]) -> None:
        """Turns these names into control tokens; new ones are appended to the vocabulary."""

    @abc.abstractmethod
    def token_id(self, name: str) -> int | None:
        """Returns the id of a token, or None if no token has that name."""

    @abc.abstractmethod
    def encode(self, text: str, prefix: bool) -> list[int]:
        """Ids of a text; `prefix` asks for the marker of a space before it, if the file has one."""

    @abc.abstractmethod
    def encode_with_offsets(self, text: str, prefix: bool) -> tuple[list[int], Spans]:
        """Returns ids, and the characters [start, end) of each; a byte inside a character covers none."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """Returns text of ids that exist, without the marker before it."""

    @abc.abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the tokenizer's file."""


def control_token(name: str) -> tokenizers.AddedToken:
    """Returns a token that stands for itself and strips nothing around it."""
    return tokenizers.AddedToken(name, special=True, normalized=False)


class SentencePieceBackend(Backend):
    """A `tokenizer.model`, with the ids of the reference (transformers 4.35's slow `LlamaTokenizer`)."""

    def __init__(self, model: bytes, legacy: bool):
        """Reads a model; `model` stays as it is, for `save`.

        Raises:
          ValueError: bytes that are not a SentencePiece model.
        """
        from google.protobuf.message import DecodeError
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

        messages: Any = sentencepiece_model_pb2  # protobuf makes its classes at run time

        try:
            content = messages.ModelProto.FromString(model)
            if not content.pieces:
                raise ValueError("it has no pieces")
            self._prefixing = SentencePieceProcessor(model_proto=model)
            self._starts = _SPACE if content.normalizer_spec.add_dummy_prefix else ""
            content.normalizer_spec.add_dummy_prefix = False
            self._bare = SentencePieceProcessor(model_proto=content.SerializeToString())
        except (DecodeError, RuntimeError, ValueError) as error:
            raise ValueError(f"not a SentencePiece model, or a damaged one: {error}") from error
        kind = messages.ModelProto.SentencePiece
        self.model, self.legacy, self._own = model, legacy, len(content.pieces)
        self._added: dict[int, tokenizers.AddedToken] = {}
        for index, piece in enumerate(content.pieces):
            if piece.type in (kind.CONTROL, kind.UNKNOWN):
                self._added[index] = control_token(piece.piece)
            elif piece.type == kind.USER_DEFINED:
                self._added[index] = tokenizers.AddedToken(piece.piece, special=False, normalized=False)
        # sentencepiece drops the spaces that a text begins with; behind these characters it keeps them.
        self._guard = content.trainer_spec.unk_piece
        self._guard_ids = len(self._bare.encode(self._guard))

    @property
    def added(self) -> dict[int, tokenizers.AddedToken]:
        return self._added

    @property
    def size(self) -> int:
        return max(self._own, *(index + 1 for index in self._added))

    def add(self, names: Sequence[str]) -> None:
        for name in names:
            index = self.token_id(name)
            self.added[self.size if index is None else index] = control_token(name)

    def token_id(self, name: str) -> int | None:
        index = next((i for i, token in self.added.items() if token.content == name), None)
        if index is None:
            index = self._bare.piece_to_id(name)
            return index if self._bare.id_to_piece(index) == name else None
        return index

    def encode(self, text: str, prefix: bool) -> list[int]:
        if self.legacy and prefix:
            return self._prefixing.encode(text)
        guarded, string, _ = self._string(text, prefix)
        return self._bare.encode(string)[self._guard_ids if guarded else 0 :]

    def encode_with_offsets(self, text: str, prefix: bool) -> tuple[list[int], Spans]:
        if self.legacy and prefix:
            found, first, shift = self._prefixing.encode(text, return_type="offset_mapping"), 0, 0
        else:
            guarded, string, shift = self._string(text, prefix)
            found = self._bare.encode(string, return_type="offset_mapping")
            first = self._guard_ids if guarded else 0
        spans = [(max(0, start - shift), max(0, end - shift)) for start, end in found["offsets"]]
        return found["ids"][first:], spans[first:]

    def _string(self, text: str, prefix: bool) -> tuple[bool, str, int]:
        """Returns (whether the guard was prepended, the text for sentencepiece, the length of its prefix)."""
        if not self.legacy:
            text = text.replace(_SPACE, " ")
        start = self._starts if prefix else ""
        guarded = (start + text).startswith((_SPACE, " "))
        start = self._guard + start if guarded else start
        return guarded, start + text, len(start)

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        text, run, processor = "", [], self._prefixing
        for index in ids:
            token = self.added[index] if index in self.added else None
            if token is None or (index < self._own and not token.special):
                run.append(index)
            elif not (token.special and skip_special):
                text += processor.decode(run) + token.content
                run, processor = [], self._prefixing if self.legacy else self._bare
        return text + processor.decode(run)

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.model` byte for byte, and the added tokens as in the reference's checkpoints."""
        (folder / "tokenizer.model").write_bytes(self.model)
        added = {self.added[i].content: i for i in sorted(self.added) if i >= self._own}
        (folder / "added_tokens.json").write_text(json.dumps(added, indent=2) + "\n", encoding="utf-8")


class TokenizersBackend(Backend):
    """A `tokenizer.json`."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, legacy: bool):
        """Owns `tokenizer` from here on."""
        self.tokenizer, self.legacy = tokenizer, legacy
        tokenizer.encode_special_tokens = True  # control tokens' names in text are text
        tokenizer.no_truncation()
        tokenizer.no_padding()

    @property
    def added(self) -> dict[int, tokenizers.AddedToken]:
        return self.tokenizer.get_added_tokens_decoder()

    @property
    def size(self) -> int:
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def add(self, names: Sequence[str]) -> None:
        self.tokenizer.add_special_tokens([control_token(name) for name in names])

    def token_id(self, name: str) -> int | None:
        return self.tokenizer.token_to_id(name)

    def encode(self, text: str, prefix: bool) -> list[int]:
        return (self.tokenizer if prefix else self._bare).encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text: str, prefix: bool) -> tuple[list[int], Spans]:
        found = (self.tokenizer if prefix else self._bare).encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special)

    def save(self, folder: Path) -> None:
        self.tokenizer.save(str(folder / "tokenizer.json"))

    @functools.cached_property
    def _bare(self) -> tokenizers.Tokenizer:
        """A copy that puts no marker of a space before the text. The library has no such option per call."""
        content = json.loads(self.tokenizer.to_str())
        steps, splitter = content["normalizer"], content["pre_tokenizer"]
        if steps is not None and steps["type"] == "Sequence":
            steps["normalizers"] = [step for step in steps["normalizers"] if step["type"] != "Prepend"]
        elif steps is not None and steps["type"] == "Prepend":
            content["normalizer"] = None
        for step in _steps(splitter):
            if step["type"] == "Metaspace":
                step["prepend_scheme"] = "never"
            elif step["type"] == "ByteLevel":
                step["add_prefix_space"] = False
        copy = tokenizers.Tokenizer.from_str(json.dumps(content))
        copy.encode_special_tokens = True
        return copy

    @property
    def prefixes_first_only(self) -> bool:
        """Whether the file itself says that the marker stands where a string begins, and nowhere else."""
        splitter = json.loads(self.tokenizer.to_str())["pre_tokenizer"]
        return any("prepend_scheme" in s and s["prepend_scheme"] == "first" for s in _steps(splitter))


def _steps(part: dict | None) -> Iterable[dict]:
    """Returns the steps of a pre-tokenizer, alone or in a sequence."""
    if part is None:
        return []
    return part["pretokenizers"] if part["type"] == "Sequence" else [part]
