"""What a compiled program needs of a chip's memory, by kind, and whether that fits."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax

from dreamllm_jax.aot.chips import GIB, Chip

# A program fits where this share of the memory stays free: for the runtime, prefetched batches, fragments.
FREE = 0.1


class DoesNotFit(ValueError):
    """The compiler makes no program: it would need more memory than a chip has."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one chip: `kinds` by what they hold, of `hbm` that the chip has; `host` on its host."""

    kinds: dict[str, float]
    hbm: float
    host: float = 0.0

    @property
    def used(self) -> float:
        return math.fsum(self.kinds.values())

    @property
    def free(self) -> float:
        """The share that stays free; negative where there is too little."""
        return 1 - self.used / self.hbm

    @property
    def fits(self) -> bool:
        return self.used <= (1 - FREE) * self.hbm


def measure(arguments: dict[str, Any], compiled: jax.stages.Compiled, waiting: float, chip: Chip) -> Memory:
    """The memory of a program whose inputs, by kind, are `arguments`.

    Parts of the state that the program does not touch count: they lie on the chip all the same. "padding" is
    what the tiles of the inputs take beside their contents; "activations" are the bytes that are `waiting`
    for the backward pass (see `activations`), "temporaries" the rest of what the program makes for itself:
    gradients, gathered weights, what lives for some operations.
    """
    said = compiled.memory_analysis()
    kinds = {kind: bytes_held(tree) for kind, tree in arguments.items()}
    kinds["padding"] = max(0.0, said.argument_size_in_bytes - sum(kinds.values()))
    kinds["results"] = float(said.output_size_in_bytes - said.alias_size_in_bytes)
    kinds["activations"] = min(waiting, float(said.temp_size_in_bytes))
    kinds["temporaries"] = said.temp_size_in_bytes - kinds["activations"]
    kinds["code"] = float(said.generated_code_size_in_bytes)
    host = said.host_argument_size_in_bytes + said.host_output_size_in_bytes + said.host_temp_size_in_bytes
    return Memory(kinds, chip.hbm, float(host - said.host_alias_size_in_bytes))


def bytes_held(tree: Any) -> float:
    """Bytes of arrays on the device that holds most; where their place is left open, they are whole."""

    def one(x: Any) -> float:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return float(math.prod(shape) * x.dtype.itemsize)

    return math.fsum(one(x) for x in jax.tree.leaves(tree))


def too_large(error: Exception) -> str | None:
    """What the compiler says of a program that does not fit, in a sentence; None for any other error."""
    said = str(error)
    if "RESOURCE_EXHAUSTED" not in said and "Ran out of memory" not in said:
        return None
    for pattern in (r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", r"Used ([\d.]+)G of ([\d.]+)G hbm"):
        if found := re.search(pattern, said):
            needs, has = (float(n) for n in found.groups())
            return f"it needs {needs:.1f} GiB of the chip's {has:.1f} GiB of memory"
    return "it needs more than the chip's memory: " + said.splitlines()[0]


def gib(n: float) -> str:
    """`12.34 GiB`; smaller amounts in MiB or KiB."""
    for unit, size in (("GiB", GIB), ("MiB", GIB / 1024)):
        if n >= size / 10:
            return f"{n / size:.2f} {unit}"
    return f"{n * 1024**2 / GIB:.2f} KiB"
