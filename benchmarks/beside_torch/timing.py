"""Times two sides alternately, in the order A B B A A B B A ..., and summarizes the results."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any


class Disagreement(Exception):
    """The two sides do not compute the same result, so a comparison of their times has no meaning."""


@dataclasses.dataclass(frozen=True)
class Work:
    """One side's work. `prepare` runs first and is not timed; `run` is timed and waits for its result."""

    run: Callable[[], Any]
    prepare: Callable[[], object] = lambda: None

    def seconds(self) -> float:
        """Returns the wall-clock seconds of one repetition."""
        self.prepare()
        start = time.perf_counter()
        self.run()
        return time.perf_counter() - start


@dataclasses.dataclass(frozen=True)
class Timing:
    """The seconds of each repetition; entries with the same index were measured one right after the other."""

    ours: tuple[float, ...]
    theirs: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """Returns their seconds divided by ours for each pair (above 1: ours is faster)."""
        return [t / o for o, t in zip(self.ours, self.theirs, strict=True)]

    def summary(self) -> dict[str, float | int]:
        """Returns the median seconds of both sides, and the median ratio of the pairs with its quartiles."""
        ratios = self.ratios
        low, _, high = (
            statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else (ratios[0],) * 3
        )
        return {
            "ours_s": statistics.median(self.ours),
            "theirs_s": statistics.median(self.theirs),
            "ratio": statistics.median(ratios),
            "ratio_low": low,
            "ratio_high": high,
            "pairs": len(ratios),
        }


def order(pairs: int) -> Iterator[tuple[str, str]]:
    """Yields the order of each pair; it is reversed every time, so that drifts cancel."""
    for i in range(pairs):
        yield ("ours", "theirs") if i % 2 == 0 else ("theirs", "ours")


def alternate(ours: Work, theirs: Work, pairs: int, pause: float = 0.01) -> Timing:
    """Times `pairs` repetitions of both sides alternately. The caller has warmed both up.

    There are `pause` seconds before each repetition. Worker threads spin for some milliseconds after their
    last task; without a pause, those of one side would slow down the other. The pause must not be long
    either: after 0.05 s without work, the cores of a virtual machine took 50% longer for a short prompt, on
    both sides.
    """
    sides = {"ours": ours, "theirs": theirs}
    found: dict[str, list[float]] = {"ours": [], "theirs": []}
    for names in order(pairs):
        for name in names:
            time.sleep(pause)
            found[name].append(sides[name].seconds())
    return Timing(tuple(found["ours"]), tuple(found["theirs"]))


def time_in_blocks(make_ours: Callable[[], Work], make_theirs: Callable[[], Work], pairs: int) -> Timing:
    """Times two sides that do not fit on the device together, in blocks A B B A of `pairs / 2` repetitions.

    Each block creates its side anew: `make_ours` and `make_theirs` free the previous one and warm theirs up.
    """
    half = -(-pairs // 2)
    found: dict[str, list[float]] = {"ours": [], "theirs": []}
    makers = {"ours": make_ours, "theirs": make_theirs}
    for name in ("ours", "theirs", "theirs", "ours"):
        work = makers[name]()
        found[name] += [work.seconds() for _ in range(half)]
        del work
    return Timing(tuple(found["ours"]), tuple(found["theirs"]))
