"""Keys and values that version 0.1 wrote into `config.json` and `recipe.json`, and what replaces them.

Only saved files are translated. In a recipe an old key is an error that names the new one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class New(NamedTuple):
    """The replacement of an old key: the new `key`, or `mapping.key` for one inside a free mapping.

    `only` = (another old key, some of its values) says that the old key counted only together with one of
    these values; otherwise it is dropped.
    """

    key: str
    only: tuple[str, tuple[str, ...]] | None = None


_DEMONSTRATION = ("source", ("handwriting",))
_WITH_IMAGES = ("kind", ("interleaved", "conversations", "instructions"))
_MMC4 = ("kind", ("interleaved", "instructions"))
_TALKING = ("kind", ("conversations", "instructions"))

# Config class -> old key -> what replaces it.
RENAMED: Mapping[str, Mapping[str, New]] = {
    "DataConfig": {
        "rows": New("batch_size"),
        "kinds": New("source_options.kinds", _DEMONSTRATION),
        "augment": New("source_options.augment", _DEMONSTRATION),
        "caption_dropout": New("source_options.caption_dropout", _DEMONSTRATION),
    },
    "SourceConfig": {
        "kind": New("format"),
        "images": New("options.images", _WITH_IMAGES),
        "caption_key": New("options.caption_key", ("kind", ("pairs",))),
        "min_similarity": New("options.min_similarity", _MMC4),
        "template": New("options.template", _TALKING),
    },
    "MeshConfig": {"whole": New("replicated")},
    "OptimConfig": {"accumulation": New("grad_accum_steps"), "second_moment": New("optimizer")},
}

# Config class -> key as it was saved -> old value -> new value.
VALUES: Mapping[str, Mapping[str, Mapping[Any, Any]]] = {
    "DataConfig": {"source": {"handwriting": "examples.handwriting.source:Handwriting"}},
    "OptimConfig": {"second_moment": {"full": "adamw", "factored": "adafactor"}},
    "TokenizerConfig": {"corpus": {"handwriting": "examples.handwriting.words:corpus_text"}},
}


def renamed(cls: str) -> Mapping[str, New]:
    """Returns the old keys of a config class, each with what replaces it."""
    return RENAMED[cls] if cls in RENAMED else {}


def translate(cls: str, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a saved mapping of a config class with today's keys and values.

    Example:
      >>> translate("SourceConfig", {"kind": "pairs", "caption_key": "text", "template": "plain"})
      {'format': 'pairs', 'options': {'caption_key': 'text'}}
      >>> translate("OptimConfig", {"accumulation": 4, "second_moment": "factored"})
      {'grad_accum_steps': 4, 'optimizer': 'adafactor'}
    """
    old, values, new = renamed(cls), VALUES[cls] if cls in VALUES else {}, {}
    for key, value in saved.items():
        if key in values and value in values[key]:
            value = values[key][value]
        if key not in old:
            new[key] = value
            continue
        replacement = old[key]
        if replacement.only is not None and saved.get(replacement.only[0]) not in replacement.only[1]:
            continue
        parent, dot, last = replacement.key.rpartition(".")
        (new.setdefault(parent, {}) if dot else new)[last] = value
    return new
