"""Builds frozen dataclasses from plain mappings, strictly: an unknown key is an error."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

import numpy as np

from dreamllm_jax.config.renames import renamed, translate

C = TypeVar("C")


def build(cls: type[C], mapping: Mapping[str, Any] | C, where: str = "", saved: bool = False) -> C:
    """Builds the frozen dataclass `cls` from a mapping (dict or ConfigDict), recursively.

    Set `saved` for a mapping from a file that this project wrote: keys of earlier versions are then
    translated (see `renames`).

    Raises:
      ValueError: a key is unknown or missing, or a value has the wrong type. The message has the key's full
        path, what was given and what is expected.
    """
    if isinstance(mapping, cls):
        return mapping
    name = where or cls.__name__
    if not isinstance(mapping, Mapping) and not hasattr(mapping, "items"):
        raise ValueError(f"{name}: got {mapping!r}; expected a mapping with the keys of {cls.__name__}.")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    given, old = dict(cast(Mapping[str, Any], mapping).items()), renamed(cls.__name__)
    if saved:
        given = translate(cls.__name__, given)
    for key in given:
        if key in old:
            raise ValueError(f"{name}: key {key!r} is now called {old[key].key!r}; rename it.")
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Known keys: {', '.join(sorted(fields))}."
            raise ValueError(f"{name}: unknown key {key!r}.{hint}")
    values = {}
    for key, field in fields.items():
        path = f"{where}.{key}" if where else key
        if key in given:
            values[key] = _convert(hints[key], given[key], path, saved)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{name}: key {key!r} is missing; it has no default, set it.")
    try:
        return cls(**values)
    except ValueError as error:  # an impossible value: say where it was given
        short = str(error).removeprefix(f"{where.rpartition('.')[2]}.")
        between = "." if short != str(error) else ": " if where else ""
        raise ValueError(f"{where}{between}{short}") from None


def _convert(hint: Any, value: Any, where: str, saved: bool) -> Any:
    if isinstance(value, np.generic):  # numpy's numbers are numbers
        value = value.item()
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(args, value, where, saved)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where, saved)
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(f"{where}: got {value!r}; expected one of {', '.join(map(repr, args))}.")
        return value
    if origin is dict:
        if not isinstance(value, Mapping) and not hasattr(value, "items"):
            raise ValueError(f"{where}: got {value!r}; expected a mapping.")
        return {k: _plain(v) for k, v in value.items()}
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}: got {value!r}; expected a list.")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(args[0], v, f"{where}[{i}]", saved) for i, v in enumerate(value))
        if len(value) != len(args):
            raise ValueError(f"{where}: got {len(value)} values; expected {len(args)}.")
        return tuple(
            _convert(a, v, f"{where}[{i}]", saved) for i, (a, v) in enumerate(zip(args, value, strict=True))
        )
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Any or (isinstance(value, hint) and not (hint is int and isinstance(value, bool))):
        return value
    raise ValueError(f"{where}: got {value!r} ({type(value).__name__}); expected {hint.__name__}.")


def _plain(value: Any) -> Any:
    """Returns a ConfigDict inside a free mapping as a dict, and other values unchanged."""
    return {k: _plain(v) for k, v in value.items()} if hasattr(value, "items") else value


def _convert_union(args: tuple, value: Any, where: str, saved: bool) -> Any:
    if value is None and type(None) in args:
        return None
    classes = [arg for arg in args if dataclasses.is_dataclass(arg)]
    if len(classes) > 1 and not isinstance(value, tuple(typing.cast(list[type], classes))):
        return build(_class_of_kind(classes, value, where, saved), value, where, saved)
    errors = []
    for arg in args:
        if arg is type(None):
            continue
        try:
            return _convert(arg, value, where, saved)
        except ValueError as error:
            errors.append(str(error))
    raise ValueError(errors[0] if len(errors) == 1 else " Or: ".join(errors))


def _class_of_kind(classes: list[Any], value: Any, where: str, saved: bool) -> Any:
    """Returns the class that `value["kind"]` names, of a field that may hold several dataclasses.

    Fields alone do not tell: a mapping that one class was written to may also build another. Each of the
    classes therefore has a field such as `kind: Literal["siglip"] = "siglip"`. A saved mapping without it is
    of the first class: it was written when that was the only one.
    """
    kinds = {}
    for cls in classes:
        hint = typing.get_type_hints(cls).get("kind")
        if typing.get_origin(hint) is not typing.Literal:
            names = " and ".join(c.__name__ for c in classes)
            raise TypeError(
                f"{where} may hold {names}, but {cls.__name__} has no field that tells them apart; give each "
                f'class one such as kind: Literal["name"] = "name".'
            )
        kinds |= dict.fromkeys(typing.get_args(hint), cls)
    kind = value["kind"] if hasattr(value, "items") and "kind" in value else None
    if kind is None and saved:
        return classes[0]
    if kind not in kinds:
        raise ValueError(f"{where}.kind: got {kind!r}; expected one of {', '.join(map(repr, kinds))}.")
    return kinds[kind]


def check_sizes(config: Any, where: str, names: Iterable[str]) -> None:
    """Raises ValueError if one of these sizes (ints, or tuples of ints) is below 1."""
    for name in names:
        value = getattr(config, name)
        if value is not None and min(value if isinstance(value, tuple) else (value,), default=0) < 1:
            raise ValueError(f"{where}: {name} is {value}; it must be at least 1.")


def to_dict(config: Any) -> dict[str, Any]:
    """Returns the inverse of `build`: nested plain values, ready for JSON."""
    return dataclasses.asdict(config)


def to_editable_dict(config: Any) -> dict[str, Any]:
    """Returns plain values as `to_dict` does, but None for what the config derived from its other values.

    An override may then change what a value is derived from. A LLaMA with `hidden_size=4096` and 32 heads
    derives `head_dim=128`; if that stood in the dict, `hidden_size=2048` would come with the wrong head size.
    """
    return {
        field.name: None if _is_derived(config, field) else _editable(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if field.init
    }


def _is_derived(config: Any, field: dataclasses.Field) -> bool:
    """Returns whether the config would fill in the same value by itself."""
    if field.default is not None or getattr(config, field.name) is None:
        return False
    try:
        return dataclasses.replace(config, **{field.name: None}) == config
    except ValueError:  # the config needs the value
        return False


def _editable(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_editable_dict(value)
    return tuple(map(_editable, value)) if isinstance(value, tuple) else value
