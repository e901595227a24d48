"""Text to token ids and back, with DreamLLM's control tokens.

A text is encoded as one chunk. LLaMA's marker of a space goes before it, so that the chunks "a" and "b" read
together as "a b". (transformers calls this `legacy`. A tokenizer that is not legacy puts no marker before a
chunk that goes on after a control token.) Control tokens never come out of text: a user who writes `</s>` or
`<dream_start>` gets these characters. Ids of control tokens are read from the tokenizer, never assumed: the
published code and the published checkpoints disagree about them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from dreamllm_jax.data.tokenizer_backends import Backend, Spans, TokenizersBackend, control_token
from dreamllm_jax.data.tokenizer_files import read_backend, read_chat_template, read_names

# In the order of the published checkpoints, where [PAD] is 32000.
ADDED_TOKENS = (
    "[PAD]",
    "<im_start>",
    "<dream_end>",
    "<dream_start>",
    "<im_patch>",
    "<im_end>",
    "<image>",
    "<dream>",
)
_BASE_TOKENS = ("<unk>", "<s>", "</s>")
_BASE_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_BYTES = tuple(f"<0x{i:02X}>" for i in range(256))


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Ids of the control tokens.

    A tokenizer without `<s>` (Qwen's) begins documents with its end token. In one without `<unk>` (it can
    encode any text), `unk` is the padding token.
    """

    bos: int
    eos: int
    unk: int
    pad: int
    image: int
    im_patch: int
    im_start: int
    im_end: int
    dream: int
    dream_start: int
    dream_end: int


_DREAMLLM_NAMES = {"pad": "[PAD]", "image": "<image>", "im_patch": "<im_patch>"} | {
    field: f"<{field}>" for field in ("im_start", "im_end", "dream", "dream_start", "dream_end")
}


class Tokenizer:
    """A tokenizer whose control tokens are known by name and unreachable from text.

    Attributes:
      special: the ids of the control tokens.
      names: the names of the tokens that begin and end a text and stand for the unknown, as transformers keys
        them: {"bos_token": "<s>", ...}. A token that the tokenizer does not have is left out.
      chat_template: the tokenizer's own conversation template in Jinja, or None.
      origin: what error messages call the tokenizer.
      own_size: the rows that its own vocabulary needs, without the tokens that `load` adds.
    """

    def __init__(
        self,
        backend: Backend,
        names: Mapping[str, str] = _BASE_NAMES,
        chat_template: str | None = None,
        origin: str = "the tokenizer",
    ):
        """Wraps `backend` (and owns it from here on).

        Raises:
          ValueError: control tokens that the tokenizer does not know, by name.
        """
        self.backend, self.names, self.origin = backend, dict(names), origin
        self.chat_template = chat_template
        end = self.names["eos_token"] if "eos_token" in self.names else "</s>"
        required = [end, *_DREAMLLM_NAMES.values()]
        missing = [name for name in required if backend.token_id(name) is None]
        if missing:
            raise ValueError(
                f"The tokenizer has no {', '.join(missing)}; DreamLLM needs them. Load it with extend=True "
                "to add them after its vocabulary (and give the model as many rows)."
            )
        known = {token.content for token in backend.added.values() if token.special}
        # A control token that is not marked as one could be typed by a user.
        backend.add([name for name in (*ADDED_TOKENS, *self.names.values()) if name not in known])
        self.own_size = self.vocab_size
        self.legacy = backend.legacy
        self.special = SpecialTokens(**self._special_ids())
        self._control_ids = frozenset(self.token_id(name) for name in self.control)
        if isinstance(backend, TokenizersBackend):
            self._begin_elsewhere(backend.tokenizer)
        self._encode = functools.lru_cache(maxsize=1 << 16)(self._encode_uncached)

    @classmethod
    def load(cls, folder: str | Path, extend: bool = False, legacy: bool | None = None) -> Tokenizer:
        """Reads the tokenizer of a folder; `extend` adds control tokens that are missing.

        `tokenizer.model` is read where there is one, as the reference does, with the tokens that the folder's
        other files add to it; else `tokenizer.json`. `tokenizer_config.json` says whether it is `legacy`,
        unless the caller does.

        Raises:
          ValueError: no such folder or file, an unreadable one, missing control tokens, added tokens that do
            not follow the vocabulary.
        """
        folder = Path(folder)
        backend = read_backend(folder, legacy)
        own_size = backend.size
        if extend:
            backend.add([name for name in ADDED_TOKENS if backend.token_id(name) is None])
        origin = f"the tokenizer in {folder}"
        tokenizer = cls(backend, read_names(folder, backend), read_chat_template(folder), origin)
        tokenizer.own_size = own_size
        return tokenizer

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's file and a `tokenizer_config.json`, which transformers loads too.

        A `tokenizer.model` stays byte for byte what it was, with `added_tokens.json` beside it, as the
        reference expects; any other tokenizer becomes a `tokenizer.json`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(folder)
        named = {*self.names.values(), "[PAD]"}
        config = {
            "tokenizer_class": (
                "PreTrainedTokenizerFast" if isinstance(self.backend, TokenizersBackend) else "LlamaTokenizer"
            ),
            **self.names,
            "pad_token": "[PAD]",
            "add_bos_token": "bos_token" in self.names,
            "add_eos_token": False,
            "added_tokens_decoder": {str(i): _as_json(t) for i, t in sorted(self.backend.added.items())},
            "additional_special_tokens": [
                t.content for t in self.backend.added.values() if t.special and t.content not in named
            ],
            "clean_up_tokenization_spaces": False,
            "legacy": self.legacy,
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Ids of one chunk of plain text: no `<s>`, no control tokens; none at all for "".

        `continues` says that the text goes on after a control token within one string, which matters to a
        tokenizer that is not `legacy`.
        """
        return list(self._encode(text, continues))

    def encode_with_offsets(self, text: str, continues: bool = False) -> tuple[list[int], Spans]:
        """Returns the ids that `encode` gives, and the characters [start, end) that each of them covers.

        If one character becomes several byte tokens, only the last of them may cover it.
        """
        ids: list[int] = []
        spans: Spans = []
        at = 0
        for part, found, where in self._plain(text, continues, offsets=True):
            ids += found
            spans += [(at + start, at + end) for start, end in where]
            at += len(part)
        return ids, spans

    def _encode_uncached(self, text: str, continues: bool) -> tuple[int, ...]:
        return tuple(i for _, ids, _ in self._plain(text, continues, offsets=False) for i in ids)

    def _plain(self, text: str, continues: bool, offsets: bool) -> list[tuple[str, list[int], Spans]]:
        """Returns [(part of the text, its ids, which characters they cover), ...], without control tokens.

        A library may find a control token in plain text: by a merge that leads to its name, or because it is
        an added token that is not marked as special. Then the text is cut inside of these names, or, where
        that is not enough, after every character.
        """
        if not text:
            return []
        prefix = self.legacy or not continues
        encode = self.backend.encode_with_offsets if offsets else self._without_offsets
        found: list[tuple[str, list[int], Spans]] = []
        for parts in ([text], self._cut(text), list(text)):
            found = [(part, *encode(part, prefix and k == 0)) for k, part in enumerate(parts)]
            if all(self._control_ids.isdisjoint(ids) for _, ids, _ in found):
                break
        return found

    def _without_offsets(self, text: str, prefix: bool) -> tuple[list[int], Spans]:
        return self.backend.encode(text, prefix), []

    def _cut(self, text: str) -> list[str]:
        """Returns the text in parts, with a cut after the first character of every control token's name."""
        cuts = [0, *(match.start() + 1 for match in self._names.finditer(text)), len(text)]
        return [text[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]

    def encode_marked(self, text: str) -> list[int]:
        """Ids of a string in which the names of control tokens stand for themselves; no `<s>` is added."""
        ids: list[int] = []
        for i, chunk in enumerate(self._names.split(text)):
            ids += [self.token_id(chunk)] if i % 2 else self.encode(chunk, continues=i > 0)
        return ids

    @functools.cached_property
    def control(self) -> dict[str, tokenizers.AddedToken]:
        """Returns the names of the control tokens, which text can never produce.

        They are the special tokens, and the added ones that the conversation template names (where it names
        more than the spaces and letters of ordinary text).
        """
        template = self.chat_template or ""
        return {
            token.content: token
            for token in self.backend.added.values()
            if token.special or (len(token.content.strip()) > 1 and token.content in template)
        }

    @functools.cached_property
    def _names(self) -> re.Pattern[str]:
        """Any control token, as a group: longer names first."""
        names = sorted(self.control, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names))})")

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Returns text of `ids`, without the first chunk's leading space.

        Raises:
          ValueError: an id that the tokenizer does not have.
        """
        ids = [int(i) for i in ids]
        wrong = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if wrong is not None:
            raise ValueError(f"{wrong} is not an id of {self.origin}; its ids are below {self.vocab_size}.")
        return self.backend.decode(ids, skip_special)

    def token_id(self, name: str) -> int:
        """Returns the id of a token.

        Raises:
          ValueError: a name that the tokenizer does not know.
        """
        index = self.backend.token_id(name)
        if index is None:
            raise ValueError(f"{self.origin} has no token {name!r}.")
        return index

    @functools.cached_property
    def vocab_size(self) -> int:
        """Rows that the embedding needs: the largest id + 1, control tokens included."""
        return self.backend.size

    def special_names(self) -> dict[str, str]:
        """Returns {field of `special`: the token's name}."""
        by_id = {index: token.content for index, token in self.backend.added.items()}
        return {field: by_id[index] for field, index in dataclasses.asdict(self.special).items()}

    def _special_ids(self) -> dict[str, int]:
        ids = {field: self.token_id(name) for field, name in _DREAMLLM_NAMES.items()}
        ids["eos"] = self.token_id(self.names["eos_token"])
        for field, other in (("bos", "eos"), ("unk", "pad")):
            key = f"{field}_token"
            ids[field] = self.token_id(self.names[key]) if key in self.names else ids[other]
        return ids

    def _begin_elsewhere(self, tokenizer: tokenizers.Tokenizer) -> None:
        """Makes other programs put `<s>` before a text, if the tokenizer has no post-processor."""
        if tokenizer.post_processor is None and "bos_token" in self.names:
            bos = self.names["bos_token"]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, self.special.bos)]
            )


def _as_json(token: tokenizers.AddedToken) -> dict[str, str | bool]:
    """Returns an added token as transformers writes it."""
    fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {field: getattr(token, field) for field in fields}


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Trains a LLaMA-style tokenizer: `<unk> <s> </s>`, 256 bytes, BPE pieces, control tokens.

    Merges never cross a space, unknown characters fall back to their bytes. The vocabulary is
    `vocab_size` at most: a small corpus may run out of merges before.

    Raises:
      ValueError: `vocab_size` has no room for the bytes, the characters of the texts and the
        control tokens.
    """
    texts = list(texts)
    fixed = len(_BASE_TOKENS) + len(_BYTES) + len(ADDED_TOKENS)
    characters = len(set("".join(texts)) | {"▁"})
    if vocab_size < fixed + characters:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: {fixed} bytes and control tokens and {characters} "
            f"characters need {fixed + characters}."
        )
    scratch = _backend(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - fixed, show_progress=False)
    scratch.train_from_iterator(texts, trainer=trainer)
    learned = json.loads(scratch.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    vocab = {piece: i for i, piece in enumerate((*_BASE_TOKENS, *_BYTES, *pieces))}
    pairs = (m.split(" ") if isinstance(m, str) else m for m in learned["merges"])
    merges = [(left, right) for left, right in pairs]
    backend = _backend(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    for names in (_BASE_TOKENS, ADDED_TOKENS):
        backend.add_special_tokens([control_token(name) for name in names])
    return Tokenizer(TokenizersBackend(backend, legacy=True))


def _backend(model: models.Model) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=True)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend
