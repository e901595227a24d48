"""The memory that a compiled program needs on a chip, by kind, and whether it fits."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax

from dreamllm_jax.config.chips import GIB, Chip

# A program fits if this share of the memory stays free for the runtime, prefetched batches and fragmentation.
FREE_SHARE = 0.1


class DoesNotFit(ValueError):
    """A program needs more memory than a chip has; TPUs' compiler then gives none."""


class NoText(ValueError):
    """A program was compiled, but the compiler cannot write it out. `known` says what is known of it."""

    def __init__(self, message: str, known: str):
        super().__init__(message)
        self.known = known


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one chip by kind, out of `hbm` that the chip has, and bytes on its `host`."""

    kinds: dict[str, float]
    hbm: float
    host: float = 0.0

    @property
    def used(self) -> float:
        return math.fsum(self.kinds.values())

    @property
    def free(self) -> float:
        """The share that stays free; negative if the memory does not suffice."""
        return 1 - self.used / self.hbm

    @property
    def fits(self) -> bool:
        return self.used <= (1 - FREE_SHARE) * self.hbm


def measure(arguments: dict[str, Any], compiled: jax.stages.Compiled, kept: float, chip: Chip) -> Memory:
    """Returns the memory of a program whose inputs, by kind, are `arguments`.

    Parts of the state that the program does not use count too, since they occupy the chip all the same.
    "padding" is what the tiles of the inputs take beyond their contents. "activations" are the bytes kept for
    the backward pass (`kept`, see `activations`), and "temporaries" all other allocations of the program:
    gradients, gathered weights, short-lived buffers.
    """
    stats = compiled.memory_analysis()
    assert stats is not None
    kinds = {kind: bytes_held(tree) for kind, tree in arguments.items()}
    kinds["padding"] = max(0.0, stats.argument_size_in_bytes - sum(kinds.values()))
    kinds["results"] = float(stats.output_size_in_bytes - stats.alias_size_in_bytes)
    kinds["activations"] = min(kept, float(stats.temp_size_in_bytes))
    kinds["temporaries"] = stats.temp_size_in_bytes - kinds["activations"]
    kinds["code"] = float(stats.generated_code_size_in_bytes)
    host = stats.host_argument_size_in_bytes + stats.host_output_size_in_bytes + stats.host_temp_size_in_bytes
    return Memory(kinds, chip.hbm, float(host - stats.host_alias_size_in_bytes))


def bytes_held(tree: Any) -> float:
    """Returns the bytes of arrays on the device that holds most; arrays without a sharding count in full."""

    def one(x: Any) -> float:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return float(math.prod(shape) * x.dtype.itemsize)

    return math.fsum(one(x) for x in jax.tree.leaves(tree))


def too_large(error: Exception) -> str | None:
    """Returns a clause about a program that does not fit, from the compiler's error; None for any other
    error.
    """
    message = str(error)
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    for pattern in (r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", r"Used ([\d.]+)G of ([\d.]+)G hbm"):
        if found := re.search(pattern, message):
            needs, has = (float(n) for n in found.groups())
            return f"it needs {needs:.1f} GiB of the chip's {has:.1f} GiB of memory"
    return "it needs more than the chip's memory: " + message.splitlines()[0]


def does_not_fit(topology: str, memory: Memory) -> str:
    """Returns the predicate of a sentence about a program that was compiled and does not fit."""
    if memory.used > memory.hbm:
        reason = f"it needs {gib(memory.used)} of a chip's {gib(memory.hbm)} of memory"
    else:
        reason = f"{memory.free:.1%} of a chip's {gib(memory.hbm)} stays free, and {FREE_SHARE:.0%} must"
    return (
        f"does not fit on {topology}: {reason}; use more chips, raise optim.grad_accum_steps, or find "
        "settings that fit with --search."
    )


def gib(n: float) -> str:
    """Formats bytes as `12.34 GiB`, or in MiB or KiB if there are few."""
    for unit, size in (("GiB", GIB), ("MiB", GIB / 1024)):
        if n >= size / 10:
            return f"{n / size:.2f} {unit}"
    return f"{n * 1024**2 / GIB:.2f} KiB"
