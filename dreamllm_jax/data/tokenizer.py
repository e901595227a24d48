"""Text to token ids and back: LLaMA-style BPE with DreamLLM's control tokens.

Every text is one chunk: LLaMA's marker for a leading space goes before it, so that the chunks
"a" and "b" read together as "a b". (Transformers calls this `legacy`; a tokenizer that is not adds no marker
to a chunk that goes on after a control token.) Control tokens never come out of text: a user who writes
`</s>` or `<dream_start>` gets those characters. Ids of control tokens are read from the tokenizer,
never assumed: the published code and the published checkpoints disagree about them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from dreamllm_jax.data.tokenizer_files import read_backend, read_chat_template, without_prefix

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
_BYTES = tuple(f"<0x{i:02X}>" for i in range(256))


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Ids of the control tokens."""

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


CONTROL_NAMES = {
    "bos": "<s>",
    "eos": "</s>",
    "unk": "<unk>",
    "pad": "[PAD]",
    **{name: f"<{name}>" for name in ("image", "im_patch", "im_start", "im_end")},
    **{name: f"<{name}>" for name in ("dream", "dream_start", "dream_end")},
}


class Tokenizer:
    """A fast tokenizer whose control tokens are known by name and unreachable from text."""

    def __init__(self, backend: tokenizers.Tokenizer, legacy: bool = True):
        """Wraps `backend` (and owns it from here on).

        Raises:
          ValueError: control tokens that the tokenizer does not know, by name.
        """
        ids = {field: backend.token_to_id(name) for field, name in CONTROL_NAMES.items()}
        missing = [CONTROL_NAMES[field] for field, value in ids.items() if value is None]
        if missing:
            raise ValueError(
                f"The tokenizer has no {', '.join(missing)}; DreamLLM needs them. Load it with extend=True "
                "to add them after its vocabulary (and give the model as many rows)."
            )
        added = backend.get_added_tokens_decoder()
        plain = [n for n in CONTROL_NAMES.values() if not _is_special(added, backend.token_to_id(n))]
        if plain:  # a control token that is not marked as one could be typed by a user
            backend.add_special_tokens(
                [tokenizers.AddedToken(n, special=True, normalized=False) for n in plain]
            )
        if backend.post_processor is None:  # for other programs: here chunks are encoded without it
            backend.post_processor = processors.TemplateProcessing(
                single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", ids["bos"])]
            )
        backend.encode_special_tokens = True  # their names inside text are text
        backend.no_truncation()
        backend.no_padding()
        self.backend, self.legacy = backend, legacy
        self.sentencepiece: bytes | None = None  # the tokenizer.model it was read from
        self.chat_template: str | None = None  # a Jinja program (see `chat_templates`)
        self.own_size = self.vocab_size  # rows that its own vocabulary needs, without what `load` adds
        self._continuing = backend if legacy else without_prefix(backend)
        self.special = SpecialTokens(**ids)
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
        backend, legacy = read_backend(Path(folder), legacy)
        own_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        if extend:
            missing = [name for name in ADDED_TOKENS if backend.token_to_id(name) is None]
            backend.add_special_tokens(
                [tokenizers.AddedToken(n, special=True, normalized=False) for n in missing]
            )
        tokenizer, file = cls(backend, legacy), Path(folder) / "tokenizer.model"
        tokenizer.sentencepiece = file.read_bytes() if file.is_file() else None
        tokenizer.chat_template = read_chat_template(Path(folder))
        tokenizer.own_size = own_size
        return tokenizer

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.json` and a `tokenizer_config.json` that transformers loads too.

        One that was read from a `tokenizer.model` keeps it, with `added_tokens.json`, for the reference.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        if self.sentencepiece is not None:
            (folder / "tokenizer.model").write_bytes(self.sentencepiece)
            own = self.backend.get_vocab_size(with_added_tokens=False)
            decoder = self.backend.get_added_tokens_decoder()
            added = {decoder[i].content: i for i in sorted(decoder) if i >= own}
            (folder / "added_tokens.json").write_text(json.dumps(added, indent=2) + "\n", encoding="utf-8")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast" if self.sentencepiece is None else "LlamaTokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "[PAD]",
            "add_bos_token": True,
            "add_eos_token": False,
            "additional_special_tokens": [n for n in self.added_names if n not in (*_BASE_TOKENS, "[PAD]")],
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

    def _encode_uncached(self, text: str, continues: bool) -> tuple[int, ...]:
        backend = self._continuing if continues else self.backend
        return tuple(backend.encode(text, add_special_tokens=False).ids) if text else ()

    def encode_glued(self, text: str) -> list[int]:
        """Ids of text that goes on within a line: nothing is put before it."""
        return self._bare.encode(text, add_special_tokens=False).ids if text else []

    @functools.cached_property
    def _bare(self) -> tokenizers.Tokenizer:
        return without_prefix(self.backend)

    def encode_marked(self, text: str) -> list[int]:
        """Ids of a string in which the names of control tokens stand for themselves; no `<s>` is added."""
        ids: list[int] = []
        for i, chunk in enumerate(self._names.split(text)):
            if i % 2:
                ids.append(self.backend.token_to_id(chunk))
            else:
                ids += self.encode(chunk, continues=i > 0)
        return ids

    @functools.cached_property
    def _names(self) -> re.Pattern[str]:
        """Any control token, as a group: longer names first."""
        names = sorted(self.added_names, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names))})")

    @property
    def added_names(self) -> list[str]:
        """Every control token's name."""
        added = self.backend.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`, without the first chunk's leading space."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    @property
    def vocab_size(self) -> int:
        """Rows that the embedding needs: the largest id + 1, control tokens included."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1


def _is_special(added: dict[int, tokenizers.AddedToken], index: int) -> bool:
    """Whether token `index` is marked as a control token."""
    return index in added and added[index].special


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
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in learned["merges"]]
    backend = _backend(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    for names in (_BASE_TOKENS, ADDED_TOKENS):
        backend.add_special_tokens([tokenizers.AddedToken(n, special=True, normalized=False) for n in names])
    return Tokenizer(backend)


def _backend(model: models.Model) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=True)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend
