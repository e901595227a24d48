"""Changes to a recipe from the command line: `--config.seed=1`, `--config.stages.stage2.steps=100`."""

from __future__ import annotations

import ast
from collections.abc import Iterable, MutableMapping
from typing import Any

PREFIX = "--config."


def apply_overrides(recipe: Any, arguments: Iterable[str]) -> Any:
    """Sets each `--config.PATH=VALUE` in a recipe (ConfigDict or dict), in place, and returns it.

    Each part of PATH is a key, or the number or name of an entry of a list (such as a stage). VALUE is a
    Python literal, or else a string. Whether a key exists is decided when the recipe is built, which
    refuses unknown ones.

    Raises:
      ValueError: the argument has another form, or its path leads through an entry that does not exist.
    """
    for argument in arguments:
        path, equals, text = argument.removeprefix(PREFIX).partition("=")
        if not argument.startswith(PREFIX) or not equals or not path:
            raise ValueError(
                f"{argument!r} is not an override of the recipe; write {PREFIX}KEY=VALUE, "
                f"for example {PREFIX}seed=1."
            )
        *parents, last = path.split(".")
        node = recipe
        for part in parents:
            node = _step(node, part, argument)
        _check_mapping(node, last, argument)
        node[last] = _value(text)
    return recipe


def _step(node: Any, part: str, argument: str) -> Any:
    if isinstance(node, list | tuple):
        for i, entry in enumerate(node):
            if part in (str(i), _name(entry)):
                return entry
        names = ", ".join(_name(entry) or str(i) for i, entry in enumerate(node))
        raise ValueError(f"{argument}: there is no {part!r} in that list; its entries are {names}.")
    _check_mapping(node, part, argument)
    if part not in node or node[part] is None:  # a tower that the recipe lacks
        node[part] = {}
    return node[part]


def _name(entry: Any) -> str | None:
    return str(entry["name"]) if hasattr(entry, "keys") and "name" in entry else None


def _check_mapping(node: Any, part: str, argument: str) -> None:
    if not isinstance(node, MutableMapping) and not hasattr(node, "keys"):
        raise ValueError(
            f"{argument}: {part!r} is below the value {node!r}, which has no keys; shorten the path."
        )


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
