"""Applies the conversion tables in both directions, lazily, and reports all faults together.

PyTorch's side is a mapping of part ("llama", "unet", ...) to {name: tensor}; our side is a mapping of path to
tensor. Values are read only when they are written or put on a device. For example

    to_jax({"llama": {"model.norm.weight": t}}, {"llama/norm/scale": (4096,)})  ->  {"llama/norm/scale": t}
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Container, Mapping

from dreamllm_jax.checkpoint.tensors import Mapped, Row, Shape, Stacked, Tensor
from dreamllm_jax.convert.patterns import TRANSFORMS, Rule
from dreamllm_jax.convert.rules import IGNORED_TENSORS, RULES

Parts = Mapping[str, Mapping[str, Tensor]]

_IGNORED = re.compile("|".join(f"(?:{pattern})" for pattern in IGNORED_TENSORS))


@dataclasses.dataclass
class Report:
    """Lines about tensors that did not fit, each with the tensor's name and shape.

    `ignored` tensors are harmless. `differing` has statements of config.json that the tokenizer contradicts.
    `made` has what no checkpoint provides and was created.
    """

    missing: list[str] = dataclasses.field(default_factory=list)
    unexpected: list[str] = dataclasses.field(default_factory=list)
    duplicate: list[str] = dataclasses.field(default_factory=list)
    misshapen: list[str] = dataclasses.field(default_factory=list)
    ignored: list[str] = dataclasses.field(default_factory=list)
    differing: list[str] = dataclasses.field(default_factory=list)
    made: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: Report) -> None:
        """Appends the lines of another report."""
        for field in dataclasses.fields(self):
            getattr(self, field.name).extend(getattr(other, field.name))

    @property
    def faulty(self) -> bool:
        return bool(self.missing or self.unexpected or self.duplicate or self.misshapen)

    def raise_if_faulty(self, what: str) -> None:
        """Raises ValueError with all faults, if there are any."""
        if self.faulty:
            raise ValueError(f"{what} does not fit the model.\n{self}")

    def __str__(self) -> str:
        sections = []
        for field in dataclasses.fields(self):
            lines = getattr(self, field.name)
            if lines:
                sections.append("\n  ".join([f"{field.name} ({len(lines)}):", *lines]))
        return "\n".join(sections) or "every tensor fits"


def to_jax(
    parts: Parts, expected: Mapping[str, Shape], rules: Mapping[str, tuple[Rule, ...]] = RULES
) -> tuple[dict[str, Tensor], Report]:
    """Maps PyTorch's tensors to our parameters.

    Args:
      parts: part -> {PyTorch name inside the part: tensor}. Parts of which `expected` has no parameter are
        ignored, and listed in the report.
      expected: the model's parameters, path -> shape (see `models.parameters`).

    Returns:
      path -> tensor, in the order of `expected`, and the report. The mapping is incomplete if the report is
      faulty.
    """
    report = Report()
    found: dict[str, dict[int | None, Tensor]] = defaultdict(dict)
    unfit: set[str] = set()
    towers = {path.split("/")[0] for path in expected}
    for part, tensors in parts.items():
        for name, tensor in tensors.items():
            target = _target(rules[part], name, tensor, expected)
            if _IGNORED.fullmatch(name):
                report.ignored.append(_line(tensor))
            elif part not in towers:
                report.ignored.append(f"{_line(tensor)} (the model has no {part})")
            elif target is None:
                report.unexpected.append(_line(tensor))
            else:
                rule, path, layer = target
                if path not in expected:
                    (report.ignored if rule.harmless else report.unexpected).append(_line(tensor))
                elif layer in found[path]:
                    report.duplicate.append(
                        f"{_line(tensor)} and {_line(found[path][layer])} are both {path}"
                    )
                elif (mapped := _mapped(tensor, rule)) is None:
                    report.misshapen.append(f"{_line(tensor)} cannot become {path} {tuple(expected[path])}")
                    unfit.add(path)
                else:
                    found[path][layer] = mapped
    params = {}
    for path, shape in expected.items():
        if path in unfit:
            continue
        if not found[path]:
            report.missing.append(f"{path} {tuple(shape)}")
            continue
        params[path] = _join(path, tuple(shape), found[path], report)
    return params, report


def to_torch(
    params: Mapping[str, Tensor], rules: Mapping[str, tuple[Rule, ...]] = RULES
) -> tuple[dict[str, dict[str, Tensor]], Report]:
    """Maps our parameters (path -> tensor) to PyTorch's tensors: part -> {name: tensor}, and the report."""
    report = Report()
    parts: dict[str, dict[str, Tensor]] = {}
    for path, tensor in params.items():
        part = path.split("/")[0]
        found = _source(rules[part], path, tensor, params) if part in rules else None
        if found is None:
            report.unexpected.append(f"{path} {tensor.shape}")
            continue
        rule, name = found
        names = parts.setdefault(part, {})
        for layer in range(tensor.shape[0]) if rule.stacked else (None,):
            entry = tensor if layer is None else Row(tensor, layer)
            if name(layer) in names:
                report.duplicate.append(f"{path} and {names[name(layer)].origin} are both {name(layer)}")
            names[name(layer)] = Mapped(entry, TRANSFORMS[rule.transform].backward)
    return parts, report


def _target(
    rules: tuple[Rule, ...], name: str, tensor: Tensor, known: Container[str]
) -> tuple[Rule, str, int | None] | None:
    for rule in rules:
        target = rule.to_target(name, len(tensor.shape), known)
        if target is not None:
            return rule, *target
    return None


def _source(
    rules: tuple[Rule, ...], path: str, tensor: Tensor, known: Container[str]
) -> tuple[Rule, Callable[[int | None], str]] | None:
    for rule in rules:
        name = rule.to_source(path, len(tensor.shape), known)
        if name is not None:
            return rule, name
    return None


def _mapped(tensor: Tensor, rule: Rule) -> Tensor | None:
    """Returns the tensor in our layout; None if it has other axes than its family."""
    mapped = Mapped(tensor, TRANSFORMS[rule.transform].forward)
    try:
        mapped.shape  # noqa: B018
    except ValueError:
        return None
    return mapped


def _join(path: str, shape: Shape, layers: dict[int | None, Tensor], report: Report) -> Tensor:
    """Returns the tensor, or the stack of its layers; reports layers that are missing or do not fit."""
    faults = len(report.missing) + len(report.misshapen)
    wanted = shape if None in layers else shape[1:]
    numbers = [None] if None in layers else range(shape[0])
    report.missing.extend(f"{path}, layer {i} {wanted}" for i in numbers if i not in layers)
    for i, tensor in layers.items():
        if i not in numbers:
            report.unexpected.append(f"{_line(tensor)} (the model has {len(numbers)} layers)")
        elif tensor.shape != wanted:
            report.misshapen.append(f"{_line(tensor)} becomes {tensor.shape}; {path} needs {wanted}")
        elif tensor.dtype != next(iter(layers.values())).dtype:
            report.misshapen.append(f"{_line(tensor)} is {tensor.dtype}, other layers are not")
    if None in layers or len(report.missing) + len(report.misshapen) > faults:
        return next(iter(layers.values()))
    return Stacked(tuple(layers[i] for i in numbers))


def _line(tensor: Tensor) -> str:
    base = tensor.base if isinstance(tensor, Mapped) else tensor
    return f"{base.origin} {base.shape}"
