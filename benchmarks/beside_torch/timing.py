"""Two sides timed in turns: A B B A A B B A ..., and what came of it."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator


class Disagreement(Exception):
    """The two sides do not compute the same: there is nothing to time."""


@dataclasses.dataclass(frozen=True)
class Work:
    """One side's work: `run` is timed and returns when all is done; `prepare`, before it, is not."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None

    def seconds(self) -> float:
        """Wall-clock seconds of one repetition."""
        self.prepare()
        start = time.perf_counter()
        self.run()
        return time.perf_counter() - start


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of the repetitions of both sides: entries of one index stood next to each other."""

    ours: tuple[float, ...]
    theirs: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """Theirs by ours, pair by pair: above 1 where ours is faster."""
        return [t / o for o, t in zip(self.ours, self.theirs, strict=True)]

    def summary(self) -> dict[str, float | int]:
        """Medians, and the ratio with the quartiles of its pairs."""
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
    """Who goes first: ours and theirs, then the other way round, so that drifts cancel."""
    for i in range(pairs):
        yield ("ours", "theirs") if i % 2 == 0 else ("theirs", "ours")


def alternate(ours: Work, theirs: Work, pairs: int, rest: float = 0.01) -> Timing:
    """Times both in turns, `pairs` times; both have been warmed up before.

    `rest` seconds lie between repetitions: threads of the one side that spin for more work (for some
    milliseconds) shall not be paid for by the other. Nor shall it be longer: after 0.05 s without work the
    cores of a virtual machine took half as long again for a short prompt, on either side.
    """
    sides = {"ours": ours, "theirs": theirs}
    found: dict[str, list[float]] = {"ours": [], "theirs": []}
    for names in order(pairs):
        for name in names:
            time.sleep(rest)
            found[name].append(sides[name].seconds())
    return Timing(tuple(found["ours"]), tuple(found["theirs"]))


def one_after_the_other(make_ours: Callable[[], Work], make_theirs: Callable[[], Work], pairs: int) -> Timing:
    """The same in blocks, A B B A, for two sides that do not fit the device together.

    A side is made anew for its block (its maker warms it up and frees what was there before).
    """
    half = -(-pairs // 2)
    found: dict[str, list[float]] = {"ours": [], "theirs": []}
    makers = {"ours": make_ours, "theirs": make_theirs}
    for name in ("ours", "theirs", "theirs", "ours"):
        work = makers[name]()
        found[name] += [work.seconds() for _ in range(half)]
        del work
    return Timing(tuple(found["ours"]), tuple(found["theirs"]))
