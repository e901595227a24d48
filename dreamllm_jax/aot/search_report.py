"""The report of a search, as JSON (`search.json`) and as text."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from dreamllm_jax.aot.memory import FREE_SHARE, gib
from dreamllm_jax.aot.report import to_json
from dreamllm_jax.aot.search import Search, Trial
from dreamllm_jax.config.chips import Chip
from dreamllm_jax.config.train import StageConfig


def search_to_json(search: Search, stage: StageConfig) -> dict[str, Any]:
    """Returns the search as plain JSON values. `best` is a list of overrides, or None if nothing fits."""
    best = search.best
    return {
        "stage": stage.name,
        "candidates": search.candidates,
        "fit_by_estimate": search.likely,
        "trials": [
            {
                **dataclasses.asdict(trial.candidate),
                "estimate": {
                    "memory": trial.estimate.memory(),
                    "bound": trial.estimate.seconds,
                    "serial": trial.estimate.serial,
                },
                "fits": trial.fits,
                "failure": trial.failure or None,
                "compiled": None if trial.report is None else to_json(trial.report),
            }
            for trial in search.trials
        ],
        "best": None if best is None else best.candidate.overrides(stage),
    }


def search_summary(search: Search, stage: StageConfig, chip: Chip) -> str:
    """Returns a table of the trials and the best one as overrides, as text."""
    lines = [
        "",
        f"memory of a chip ({gib(chip.hbm)}; {FREE_SHARE:.0%} must stay free) and the lower bound of a step:",
        f"{'estimated':>24}{'compiled':>24}{'MFU':>7}  fits",
        *[_row(trial) for trial in search.trials],
    ]
    if (best := search.best) is not None:
        options = " \\\n    ".join(shlex.quote(o) for o in best.candidate.overrides(stage))
        lines += ["", "the best:", f"    {options}"]
    return "\n".join(lines)


def _row(trial: Trial) -> str:
    """Formats one trial; a second line has the compiler's error if compilation failed."""
    row = f"{gib(trial.estimate.memory()):>12}{trial.estimate.seconds:>10.4g} s"
    if (found := trial.report) is not None:
        roof = found.roofline
        row += f"{gib(found.memory.used):>12}{roof.bound:>10.4g} s{roof.mfu(roof.bound):>7.0%}"
    else:
        row += f"{'-':>31}"
    row += f"  {'yes' if trial.fits else 'no':<4}  {'; '.join(trial.candidate.title())}"
    return row + (f"\n      {trial.failure}" if trial.failure else "")
