"""How a program for a GPU is launched: kernels one by one, or many at once as CUDA graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from dreamllm_jax.aot.hlo import Program, Thunk, trip_count

_COPIES = ("Copy", "Memset32BitValue", "Memzero", "HostToDeviceCopy", "DeviceToHostCopy")
_COLLECTIVES = frozenset(
    "AllGather AllReduce ReduceScatter AllToAll RaggedAllToAll CollectivePermute CollectiveBroadcast Send "
    "Recv".split()
)
# Thunks that launch nothing: marks on a stream, and constants of a device.
_NOTHING = ("WaitForStreams", "PartitionId", "ReplicaId", "Sequential")


@dataclasses.dataclass(frozen=True)
class Launches:
    """What a program launches each time it runs, loops multiplied out.

    `kernels` counts those of libraries too, `copies` also memsets. `in_graphs` of these and of the
    collectives are in CUDA graphs, of which `graphs` are launched. The host waits for the GPU `waits` times,
    to learn whether a loop goes on or which branch to take.
    """

    kernels: int = 0
    copies: int = 0
    collectives: int = 0
    in_graphs: int = 0
    graphs: int = 0
    waits: int = 0

    @property
    def total(self) -> int:
        return self.kernels + self.copies + self.collectives

    @property
    def outside(self) -> int:
        """Kernels, copies and collectives that the host launches one by one."""
        return self.total - self.in_graphs

    def __add__(self, other: Launches) -> Launches:
        return Launches(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))

    def times(self, n: int) -> Launches:
        """Returns the launches of n runs."""
        return Launches(*(n * value for value in _values(self)))


def _values(launches: Launches) -> list[int]:
    return [getattr(launches, field.name) for field in dataclasses.fields(launches)]


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop: its trip count (None if it depends on data), whether a CUDA graph holds it, and one turn."""

    name: str
    turns: int | None
    in_graph: bool
    turn: Launches


def count_launches(thunks: Iterable[Thunk], program: Program) -> Launches:
    """Returns what the thunks of a program launch. Of a branch, the one that launches most is counted.

    A loop whose trip count depends on data counts once, as in a census.
    """
    return _of(thunks, trip_counts(program), in_graph=False)


def loops(thunks: Iterable[Thunk], program: Program) -> list[Loop]:
    """Returns all loops, the outer ones first."""
    turns, found = trip_counts(program), []

    def visit(thunk: Thunk, in_graph: bool) -> None:
        if thunk.kind == "While":
            turn = _turn(thunk, turns, in_graph)
            found.append(Loop(thunk.name, turns[thunk.name] if thunk.name in turns else None, in_graph, turn))
        for part in thunk.parts.values():
            for inner in part:
                visit(inner, in_graph or thunk.kind == "CommandBuffer")

    for thunk in thunks:
        visit(thunk, False)
    return found


def trip_counts(program: Program) -> dict[str, int]:
    """Returns the trip counts that are known, by the names of the loops."""
    found = {}
    for computation in program.computations.values():
        for instruction in computation.instructions.values():
            if instruction.opcode == "while":
                times = trip_count(program, instruction, computation)
                if times is not None:
                    found[instruction.name] = times
    return found


def _of(thunks: Iterable[Thunk], turns: dict[str, int], in_graph: bool) -> Launches:
    return sum((_one(thunk, turns, in_graph) for thunk in thunks), Launches())


def _one(thunk: Thunk, turns: dict[str, int], in_graph: bool) -> Launches:
    if thunk.kind == "While":
        times = turns[thunk.name] if thunk.name in turns else 1
        return _turn(thunk, turns, in_graph).times(times)
    if thunk.kind == "Conditional":
        branches = [_of(part, turns, in_graph) for part in thunk.parts.values()]
        asked = Launches(waits=int(not in_graph))
        return max(branches, key=lambda found: found.total, default=Launches()) + asked
    if thunk.parts:
        inside = _of(
            (t for part in thunk.parts.values() for t in part),
            turns,
            True if thunk.kind == "CommandBuffer" else in_graph,
        )
        return inside + Launches(graphs=int(thunk.kind == "CommandBuffer"))
    if thunk.kind.endswith("Done") or thunk.kind in _NOTHING:
        return Launches()
    launched = "kernels"
    if thunk.kind in _COPIES:
        launched = "copies"
    elif thunk.kind.removesuffix("Start") in _COLLECTIVES:
        launched = "collectives"
    return Launches(**{launched: 1, "in_graphs": int(in_graph)})


def _turn(loop: Thunk, turns: dict[str, int], in_graph: bool) -> Launches:
    """Returns the launches of one turn. Only a loop whose trip count is not known evaluates its condition."""
    body = _of(loop.parts["body"], turns, in_graph)
    if loop.name in turns:
        return body
    return body + _of(loop.parts["condition"], turns, in_graph) + Launches(waits=int(not in_graph))
