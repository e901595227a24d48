"""Replica groups of collectives, in each of the forms in which XLA writes them."""

from __future__ import annotations

import functools
import math
import re

import numpy as np

_LISTED = re.compile(r"replica_groups=(\{(?:\{[\d,]*\},?)*\})")
_IOTA = re.compile(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)")
_MESH = re.compile(r"replica_groups=(mesh\[[^\]]*\](?:, device_ids=\([^{]*\))? \{[^}]*\})")
_PAIRS = re.compile(r"source_target_pairs=(\{(?:\{\d+,\d+\},?)*\})")


def replica_groups(attributes: str, devices: int) -> np.ndarray:
    """Returns the devices of each group, as indices into the flattened mesh: int [groups, devices of a
    group].

    The forms are `{{0,1},{2,3}}` (if empty, all devices are one group), `[2,4]<=[4,2]T(1,0)`, and
    `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}`. For a permutation the groups are the pairs of source
    and target.

    Raises:
      ValueError: the attributes have none of these forms.
    """
    for pattern in (_LISTED, _IOTA, _MESH, _PAIRS):
        if found := pattern.search(attributes):
            return _parse(found.group(1), devices)
    raise ValueError(f"the collective's replica groups are written in an unknown form: {attributes[:200]}")


@functools.lru_cache(maxsize=4096)
def _parse(text: str, devices: int) -> np.ndarray:
    if text.startswith("mesh"):
        return _of_mesh(text, devices)
    if text.startswith("["):
        shape, order = text.split("<=")
        return _iota(order).reshape(_numbers(shape))
    groups = [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", text)]
    return np.array(groups) if groups else np.arange(devices)[None]


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _iota(text: str) -> np.ndarray:
    """Expands `[4,16]T(1,0)`: counts from 0 in that shape, transposes, flattens."""
    shape, _, order = text.partition("T")
    sizes = _numbers(shape)
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return (numbers.transpose(_numbers(order)) if order else numbers).reshape(-1)


def _of_mesh(text: str, devices: int) -> np.ndarray:
    """Expands groups along named axes. `'a':(2)4` names a part of axis a: split in 2, the 4 within each
    half.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", text)}
    ids = re.search(r"device_ids=\(([^{]*)\) \{", text)
    numbers = _iota(ids.group(1)) if ids else np.arange(devices)
    # An axis of which only a part is named is split into the parts before, within and after it.
    cut: list[tuple[str, int]] = []
    inner: set[int] = set()
    parts = {
        name: (int(before or 1), int(size) if size else sizes[name])
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", text[text.rindex("{") :])
    }
    for name, size in sizes.items():
        if name in parts:
            before, within = parts[name]
            inner.add(len(cut) + 1)
            cut += [(name, before), (name, within), (name, size // before // within)]
        else:
            cut.append((name, size))
    last = [i for i in range(len(cut)) if i in inner]
    first = [i for i in range(len(cut)) if i not in inner]
    grid = numbers.reshape([size for _, size in cut]).transpose(first + last)
    return grid.reshape(-1, math.prod(cut[i][1] for i in last))
