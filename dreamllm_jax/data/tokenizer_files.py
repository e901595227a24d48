"""A tokenizer's files: the backend of a folder, the names of its tokens, its conversation template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from dreamllm_jax.data.tokenizer_backends import Backend, SentencePieceBackend, TokenizersBackend

_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def has_tokenizer(folder: Path) -> bool:
    """Returns whether `read_backend` finds a tokenizer there."""
    return any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))


def read_backend(folder: Path, legacy: bool | None = None) -> Backend:
    """Returns the tokenizer of a folder with `tokenizer.model` or `tokenizer.json`; the former is preferred.

    `legacy` is that of `tokenizer_config.json` where it is None.

    Raises:
      ValueError: neither file, an unreadable one, or added tokens whose ids have gaps.
    """
    config = _read_json(folder / "tokenizer_config.json")
    stated = config["legacy"] if legacy is None and "legacy" in config else legacy
    legacy = stated is not False  # transformers' default
    path = folder / "tokenizer.model"
    if path.is_file():
        try:
            backend = SentencePieceBackend(path.read_bytes(), legacy)
        except ValueError as error:
            raise ValueError(f"{path} is {error}.") from error
        _add_tokens(backend, _added_tokens(folder, config), folder)
        return backend
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} has neither tokenizer.model nor tokenizer.json; give a folder with a tokenizer."
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises bare Exception
        raise ValueError(f"{path} is not a readable tokenizer.json: {error}") from error
    backend = TokenizersBackend(tokenizer, legacy)
    backend.legacy = legacy and not backend.prefixes_first_only
    return backend


def read_names(folder: Path, backend: Backend) -> dict[str, str]:
    """Returns the names of the begin, end and unknown tokens, keyed as transformers keys them.

    Where the files are silent (or name a token that does not exist), they are LLaMA's:
    {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}. A token that does not exist under that
    name either is left out.
    """
    names: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        content = _read_json(folder / file)
        for key in _NAMES:
            value = content[key] if key in content else None
            name = value["content"] if isinstance(value, dict) else value
            if isinstance(name, str) and backend.token_id(name) is not None:
                names[key] = name
    return {k: name for k, name in (_NAMES | names).items() if backend.token_id(name) is not None}


def read_chat_template(folder: Path) -> str | None:
    """Returns the Jinja template that writes conversations, from new files or old ones, or None."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        content = _read_json(folder / name)
        found = content["chat_template"] if "chat_template" in content else None
        if isinstance(found, list):
            named = {entry["name"]: entry["template"] for entry in found}
            found = named["default"] if "default" in named else None
        if isinstance(found, str):
            return found
    return None


def _added_tokens(folder: Path, config: dict[str, Any]) -> dict[int, tokenizers.AddedToken]:
    """Returns the tokens that are added to `tokenizer.model`, by id, from old files and new ones."""
    old = _read_json(folder / "added_tokens.json")
    added = {int(i): tokenizers.AddedToken(name, special=True, normalized=False) for name, i in old.items()}
    if "added_tokens_decoder" in config:
        for i, token in config["added_tokens_decoder"].items():
            strips = {side: side in token and token[side] for side in ("lstrip", "rstrip")}
            added[int(i)] = tokenizers.AddedToken(token["content"], special=True, normalized=False, **strips)
    return added


def _add_tokens(backend: SentencePieceBackend, added: dict[int, tokenizers.AddedToken], folder: Path) -> None:
    for index in sorted(added):
        name = added[index].content
        found = backend.token_id(name)
        found = backend.size if found is None else found
        if found != index:
            raise ValueError(
                f"{folder}: the added token {name!r} has id {index} there, but follows the vocabulary as "
                f"{found}; its files are damaged, or not of one model."
            )
        backend.added[index] = added[index]


def _read_json(path: Path) -> dict[str, Any]:
    """Returns a file's content, or an empty one if the file does not exist."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error}); the folder is damaged.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; a JSON object is expected.")
    return content
