"""Configs from mappings: strict about keys and types, by full path."""

import dataclasses
from typing import Literal

import numpy as np
import pytest
from ml_collections import ConfigDict

from dreamllm_jax.config.base import build, to_dict


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int
    kind: Literal["a", "b"] = "a"

    def __post_init__(self):
        if self.size < 0:
            raise ValueError(f"size is {self.size}; it must not be negative.")


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    rate: float = 1.0
    names: tuple[str, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    maybe: int | None = None
    flag: bool = False


def test_there_and_back():
    outer = Outer(Inner(3, "b"), 0.5, ("x", "y"), (4, 5.0), 7, True)
    assert build(Outer, to_dict(outer)) == outer
    assert build(Outer, ConfigDict(to_dict(outer))) == outer
    assert build(Outer, outer) is outer
    assert build(Outer, {"inner": {"size": 1}}) == Outer(Inner(1))


def test_numbers_of_numpy_and_whole_floats():
    built = build(Outer, {"inner": {"size": np.int64(2)}, "rate": np.float32(0.5), "flag": np.bool_(True)})
    assert built == Outer(Inner(2), 0.5, flag=True) and type(built.inner.size) is int
    assert type(build(Outer, {"inner": {"size": 1}, "rate": 2}).rate) is float


@dataclasses.dataclass(frozen=True)
class Near:
    size: int = 1
    kind: Literal["near"] = "near"


@dataclasses.dataclass(frozen=True)
class Far:
    size: int = 2
    kind: Literal["far", "farther"] = "far"


@dataclasses.dataclass(frozen=True)
class Holder:
    place: Near | Far | None = None


def test_a_field_of_several_classes_is_read_by_its_kind():
    """Each of these mappings would also build the first class but for its `kind`."""
    for holder in (Holder(Near(3)), Holder(Far(3)), Holder(Far(3, "farther")), Holder()):
        assert build(Holder, to_dict(holder)) == holder
        assert build(Holder, ConfigDict(to_dict(holder))) == holder
    assert build(Holder, {"place": {"size": 3}}, saved=True) == Holder(Near(3))  # of before there were two
    far = Far(5)
    assert build(Holder, {"place": far}).place is far
    with pytest.raises(ValueError, match="place.kind: got 'nowhere'; expected one of 'near', 'far'"):
        build(Holder, {"place": {"kind": "nowhere"}})
    with pytest.raises(ValueError, match="place.kind: got None; expected one of"):
        build(Holder, {"place": {"size": 3}})
    with pytest.raises(ValueError, match="place.kind: got None; expected one of"):
        build(Holder, {"place": 3})


def test_classes_that_nothing_tells_apart_may_not_share_a_field():
    @dataclasses.dataclass(frozen=True)
    class Untagged:
        size: int = 1

    holder = dataclasses.make_dataclass("Either", [("place", Near | Untagged)], frozen=True)
    with pytest.raises(TypeError, match="Near and Untagged, but Untagged has no field that tells them apart"):
        build(holder, {"place": {"size": 1}})


@pytest.mark.parametrize(
    ("mapping", "sentence"),
    [
        ({}, "key 'inner' is missing"),
        ({"inner": {"size": 1}, "nams": ()}, "unknown key 'nams'. Did you mean 'names'"),
        ({"inner": {"size": 1, "zzz": 1}}, "inner: unknown key 'zzz'. Known keys: kind, size"),
        ({"inner": {"size": True}}, r"inner.size: got True \(bool\); expected int"),
        ({"inner": {"size": 1.5}}, "inner.size: got 1.5 .float.; expected int"),
        ({"inner": {"size": "1"}}, "inner.size: got '1' .str.; expected int"),
        ({"inner": {"size": -1}}, "inner: size is -1; it must not be negative"),
        ({"inner": {"size": 1, "kind": "c"}}, "inner.kind: got 'c'; expected one of 'a', 'b'"),
        ({"inner": 3}, "inner: got 3; expected a mapping"),
        ({"inner": {"size": 1}, "names": "x"}, "names: got 'x'; expected a list"),
        ({"inner": {"size": 1}, "names": ["x", 2]}, r"names\[1\]: got 2"),
        ({"inner": {"size": 1}, "pair": [1]}, "pair: got 1 values; expected 2"),
        ({"inner": {"size": 1}, "maybe": "no"}, "maybe: got 'no'"),
    ],
)
def test_what_is_wrong_is_named(mapping, sentence):
    with pytest.raises(ValueError, match=sentence):
        build(Outer, mapping)
