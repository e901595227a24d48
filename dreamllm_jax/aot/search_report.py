"""What a search found, as numbers (`search.json`) and as a table."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from dreamllm_jax.aot.chips import Chip
from dreamllm_jax.aot.memory import FREE, gib
from dreamllm_jax.aot.report import numbers
from dreamllm_jax.aot.search import Search, Tried
from dreamllm_jax.config.train import StageConfig


def searched(search: Search, stage: StageConfig) -> dict[str, Any]:
    """The search as plain JSON; `best` are overrides, None where nothing fits."""
    best = search.best
    return {
        "stage": stage.name,
        "candidates": search.candidates,
        "fit_by_estimate": search.likely,
        "tried": [
            {
                **dataclasses.asdict(tried.candidate),
                "estimate": {
                    "memory": tried.estimate.memory(),
                    "bound": tried.estimate.seconds,
                    "serial": tried.estimate.serial,
                },
                "fits": tried.fits,
                "failure": tried.failure or None,
                "compiled": None if tried.finding is None else numbers(tried.finding),
            }
            for tried in search.tried
        ],
        "best": None if best is None else best.candidate.overrides(stage),
    }


def summary(search: Search, stage: StageConfig, chip: Chip) -> str:
    """What is printed: a table of what was compiled, and the best as overrides."""
    lines = [
        "",
        f"memory of a chip ({gib(chip.hbm)}; {FREE:.0%} must stay free) and the least time of a step:",
        f"{'estimated':>24}{'compiled':>24}{'MFU':>7}  fits",
        *[_row(tried) for tried in search.tried],
    ]
    if (best := search.best) is not None:
        options = " \\\n    ".join(shlex.quote(o) for o in best.candidate.overrides(stage))
        lines += ["", "the best:", f"    {options}"]
    return "\n".join(lines)


def _row(tried: Tried) -> str:
    """One candidate; below it what the compiler says where it made no program."""
    row = f"{gib(tried.estimate.memory()):>12}{tried.estimate.seconds:>10.4g} s"
    if (found := tried.finding) is not None:
        roof = found.roofline
        row += f"{gib(found.memory.used):>12}{roof.bound:>10.4g} s{roof.mfu(roof.bound):>7.0%}"
    else:
        row += f"{'-':>31}"
    row += f"  {'yes' if tried.fits else 'no':<4}  {'; '.join(tried.candidate.title())}"
    return row + (f"\n      {tried.failure}" if tried.failure else "")
