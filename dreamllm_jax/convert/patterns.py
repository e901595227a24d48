"""The pattern language of the conversion tables: one pattern serves both directions of a name.

PyTorch names are dotted (`down_blocks.0.resnets.1.conv1.weight`). Ours are paths of Flax modules, in which an
entry of a list carries its number (`down_blocks_0/resnets_1/conv1/kernel`). In the two patterns of a rule

    {x}          any path of one component or more
    {x:a|b.0}    one of these paths
    {x:**a|b.0}  any path, possibly empty, that ends in one of these
    {layer}      a number, in the source only: the index into the target's stacked first axis

stand for parts that both names share, each in its own spelling. For example `{m:mlp.up_proj}` matches
`mlp.up_proj` in PyTorch's name and `mlp/up_proj` in ours.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Container

import numpy as np

# Lists of modules, whose entries are numbered. Other names that end in a number are plain names.
LISTS = "down_blocks|up_blocks|resnets|attentions|downsamplers|upsamplers|net|to_out"

_FIELD = re.compile(r"\{(\w+)(?::([^}]*))?\}")
_THEIR_INDEX = re.compile(r"\.(\d+)(?=\.|$)")
_OUR_INDEX = re.compile(rf"(^|/)({LISTS})_(\d+)(?=/|$)")


def to_ours(path: str) -> str:
    """Returns our form of a module path: `resnets.1.conv1` -> `resnets_1/conv1`."""
    return _THEIR_INDEX.sub(r"_\1", path).replace(".", "/")


def to_theirs(path: str) -> str:
    """Returns PyTorch's form of a module path: `resnets_1/conv1` -> `resnets.1.conv1`."""
    return _OUR_INDEX.sub(r"\1\2.\3", path).replace("/", ".")


@dataclasses.dataclass(frozen=True)
class Transform:
    """Converts the layout of a PyTorch tensor to ours, and back; `rank` is our number of axes, if it is
    fixed.
    """

    forward: Callable[[np.ndarray], np.ndarray]
    backward: Callable[[np.ndarray], np.ndarray]
    rank: int | None = None


TRANSFORMS: dict[str, Transform] = {
    "same": Transform(lambda x: x, lambda x: x),
    # Linear: [out, in] <-> [in, out]
    "linear": Transform(lambda x: x.T, lambda x: x.T, 2),
    # Conv2d: OIHW <-> HWIO
    "conv": Transform(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1), 4),
    # a 1x1 Conv2d that is a linear map here: [out, in, 1, 1] <-> [in, out]
    "conv_as_linear": Transform(lambda x: x.squeeze((2, 3)).T, lambda x: x.T[:, :, None, None], 2),
    # [1, ...] <-> [...]
    "unbatch": Transform(lambda x: x.squeeze(0), lambda x: x[None]),
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """One family of parameters: PyTorch's name, ours, and the transform between them.

    `rank` restricts the rule to PyTorch tensors with that many axes, `given` to models that have this
    parameter. Tensors of a `harmless` rule may be present although the model lacks the parameter (a tied
    output layer); they are then listed as ignored.
    """

    source: str
    target: str
    transform: str = "same"
    rank: int | None = None
    given: str | None = None
    harmless: bool = False

    def __post_init__(self):
        assert self.transform in TRANSFORMS, self.transform

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.source

    def to_target(self, name: str, rank: int, known: Container[str]) -> tuple[str, int | None] | None:
        """Returns our path and the layer of a PyTorch tensor, or None if the rule does not apply."""
        found = _compile(self.source, theirs=True).fullmatch(name)
        if not found or not self._applies(rank, known):
            return None
        fields = {key: to_ours(value) for key, value in found.groupdict().items()}
        layer = int(fields.pop("layer")) if self.stacked else None
        return _fill(self.target, fields), layer

    def to_source(self, path: str, rank: int, known: Container[str]) -> Callable[[int | None], str] | None:
        """Returns the PyTorch name of a parameter, as a function of the layer; None if the rule does not
        apply.
        """
        found = _compile(self.target, theirs=False).fullmatch(path)
        transform, ours = TRANSFORMS[self.transform], rank - self.stacked
        if not found or transform.rank not in (None, ours):
            return None
        if not self._applies(transform.backward(np.empty((1,) * ours)).ndim, known):
            return None
        fields = {key: to_theirs(value) for key, value in found.groupdict().items()}
        return lambda layer: _fill(self.source, {**fields, "layer": str(layer)})

    def _applies(self, rank: int, known: Container[str]) -> bool:
        return self.rank in (None, rank) and (self.given is None or self.given in known)


@functools.cache
def _compile(pattern: str, theirs: bool) -> re.Pattern:
    out, end = [], 0
    for field in _FIELD.finditer(pattern):
        out.append(re.escape(pattern[end : field.start()]))
        out.append(_field_pattern(field[1], field[2], theirs))
        end = field.end()
    out.append(re.escape(pattern[end:]))
    return re.compile("".join(out))


def _field_pattern(name: str, choices: str | None, theirs: bool) -> str:
    if name == "layer":
        assert theirs
        return r"(?P<layer>\d+)"
    if choices is None:
        return f"(?P<{name}>.+?)"
    any_path = choices.startswith("**")
    spelled = [c if theirs else to_ours(c) for c in choices.removeprefix("**").split("|")]
    separator = r"\." if theirs else "/"
    return f"(?P<{name}>{f'(?:.+{separator})?' if any_path else ''}(?:{'|'.join(map(re.escape, spelled))}))"


def _fill(pattern: str, fields: dict[str, str]) -> str:
    return _FIELD.sub(lambda field: fields[field[1]], pattern)
