"""The names that a recipe may use for code: a short name, or `package.module:attribute`.

A recipe says `sampler="euler"` for a sampler of this package, and `sampler="my_project.samplers:heun"` for
another. An installed package may give its own code a short name, by an entry point in its `pyproject.toml`:

    [project.entry-points."dreamllm_jax.samplers"]
    heun = "my_project.samplers:heun"
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import importlib.util
import operator
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """One kind of code: its entry point group, and the package's own short names.

    `built_in` maps a name to `module:attribute`. Every public function of `module` is built in under its own
    name. Both are strings, so that a name is checked without an import.
    """

    group: str
    built_in: Mapping[str, str] = {}
    module: str | None = None


KINDS: Mapping[str, Kind] = {
    "source": Kind("dreamllm_jax.sources"),
    "format": Kind(
        "dreamllm_jax.formats",
        {
            "pairs": "dreamllm_jax.data.formats.webdataset:Pairs",
            "interleaved": "dreamllm_jax.data.formats.mmc4:Interleaved",
            "conversations": "dreamllm_jax.data.formats.llava:Conversations",
            "instructions": "dreamllm_jax.data.formats.instruct_mmc4:Instructions",
        },
    ),
    "corpus": Kind("dreamllm_jax.corpora"),
    "sampler": Kind("dreamllm_jax.samplers", module="dreamllm_jax.diffusion.samplers"),
    "optimizer": Kind("dreamllm_jax.optimizers", module="dreamllm_jax.train.optimizers"),
    "hook": Kind("dreamllm_jax.hooks"),
}


def resolve(kind: str, name: str) -> Any:
    """Imports and returns what `name` stands for; `kind` is a key of `KINDS`.

    A built-in short name takes precedence: entry points with the same name are ignored.

    Example:
      >>> resolve("corpus", "string:Formatter").__name__
      'Formatter'

    Raises:
      ValueError: an unknown name (with the nearest known ones), a name that two installed packages claim,
        or a module or attribute that cannot be imported (with the reason).
    """
    place = _place(kind, name)
    module, _, attribute = place.partition(":")
    shown = f"{kind} {name!r}" if place == name else f"{kind} {name!r} ({place})"
    try:
        found = importlib.import_module(module)
    except Exception as error:  # an imported module may raise anything
        raise ValueError(
            f"{shown} cannot be imported ({type(error).__name__}: {error}); correct the name, or run where "
            f"Python finds {module!r}: from its project's folder, or with the project installed."
        ) from error
    try:
        return operator.attrgetter(attribute)(found)
    except AttributeError:
        raise ValueError(f"{shown}: the module {module!r} has no {attribute!r}; correct the name.") from None


def check_name(kind: str, name: str) -> None:
    """Raises ValueError for a name that `resolve` cannot know, importing nothing."""
    _place(kind, name)


def known_names(kind: str) -> list[str]:
    """Returns the short names of this kind, built in and from installed packages, sorted."""
    return sorted({*_built_in(kind), *(point.name for point in _entry_points(kind))})


def _place(kind: str, name: str) -> str:
    """Returns the `module:attribute` of a name."""
    built_in = _built_in(kind)
    if name in built_in:
        return built_in[name]
    module, colon, attribute = name.partition(":")
    if colon:
        if not all(part.isidentifier() for part in (*module.split("."), *attribute.split("."))):
            raise ValueError(
                f"{kind} {name!r} is not an importable name; write package.module:attribute, for example "
                f"my_project.code:my_{kind}."
            )
        return name
    places = sorted({point.value for point in _entry_points(kind) if point.name == name})
    if len(places) > 1:
        raise ValueError(
            f"{kind} {name!r} is a name of several installed packages; write one of {', '.join(places)}."
        )
    if places:
        return places[0].partition("[")[0].strip()
    known = known_names(kind)
    near = difflib.get_close_matches(name, known, n=3) or known
    hint = f"known: {', '.join(near)}; for one of your own" if near else "none is built in"
    raise ValueError(f"Unknown {kind} {name!r}; {hint}, write package.module:attribute.")


def _built_in(kind: str) -> dict[str, str]:
    """Returns the package's own names, each with its `module:attribute`."""
    module = KINDS[kind].module
    functions = () if module is None else _public_functions(module)
    return {**KINDS[kind].built_in, **{name: f"{module}:{name}" for name in functions}}


@functools.cache
def _public_functions(module: str) -> tuple[str, ...]:
    """Returns the public functions that a module defines, read from its source without running it."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    return tuple(name for name in names if not name.startswith("_"))


def _entry_points(kind: str) -> list[EntryPoint]:
    return list(entry_points(group=KINDS[kind].group))
