"""The tokenizer of a folder, from whichever files it is in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from dreamllm_jax.data.sentencepiece_model import backend_of, read_model


def has_tokenizer(folder: Path) -> bool:
    """Whether `read_backend` finds a tokenizer there."""
    return any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))


def read_backend(folder: Path, legacy: bool | None = None) -> tuple[tokenizers.Tokenizer, bool]:
    """(tokenizer, whether it is `legacy`) of a folder with `tokenizer.model` or `tokenizer.json`.

    `legacy` is that of `tokenizer_config.json` where it is None.

    Raises:
      ValueError: neither file, an unreadable one, added tokens whose ids have gaps.
    """
    config = _read_json(folder / "tokenizer_config.json")
    stated = config["legacy"] if legacy is None and "legacy" in config else legacy
    if (folder / "tokenizer.model").is_file():
        legacy = stated is not False  # transformers' default
        backend = backend_of(read_model(folder / "tokenizer.model"), legacy)
        _add_tokens(backend, _added_tokens(folder, config), folder)
        return backend, legacy
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} has neither tokenizer.model nor tokenizer.json; give a folder with a tokenizer."
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises bare Exception
        raise ValueError(f"{path} is not a readable tokenizer.json: {error}") from error
    marks = json.loads(backend.to_str())["pre_tokenizer"] or {}
    first_only = "prepend_scheme" in marks and marks["prepend_scheme"] == "first"
    return backend, stated is not False and not first_only


def read_chat_template(folder: Path) -> str | None:
    """The Jinja program that writes conversations, from new files or old ones; None where there is none."""
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


def without_prefix(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy that puts no marker of a space before the text."""
    content = json.loads(backend.to_str())
    steps = content["normalizer"]
    if steps is not None and steps["type"] == "Sequence":
        steps["normalizers"] = [step for step in steps["normalizers"] if step["type"] != "Prepend"]
    if content["pre_tokenizer"] is not None and content["pre_tokenizer"]["type"] == "Metaspace":
        content["pre_tokenizer"]["prepend_scheme"] = "never"
    copy = tokenizers.Tokenizer.from_str(json.dumps(content))
    copy.encode_special_tokens = backend.encode_special_tokens
    return copy


def _added_tokens(folder: Path, config: dict[str, Any]) -> dict[int, str]:
    """Id -> name of the tokens that are added to `tokenizer.model`, from old files and new ones."""
    added = {int(i): name for name, i in _read_json(folder / "added_tokens.json").items()}
    if "added_tokens_decoder" in config:
        added |= {int(i): token["content"] for i, token in config["added_tokens_decoder"].items()}
    return added


def _add_tokens(backend: tokenizers.Tokenizer, added: dict[int, str], folder: Path) -> None:
    for index in sorted(added):
        name = added[index]
        backend.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False)])
        if backend.token_to_id(name) != index:
            raise ValueError(
                f"{folder}: the added token {name!r} has id {index} there, but follows the vocabulary as "
                f"{backend.token_to_id(name)}; its files are damaged, or not of one model."
            )


def _read_json(path: Path) -> dict[str, Any]:
    """A file's content; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error}); the folder is damaged.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; a JSON object is expected.")
    return content
