"""Searches for the mesh, gradient accumulation and remat with which a stage fits and runs fastest.

Every candidate is estimated; the most promising ones are compiled, and what the compiler says corrects the
estimates of the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from dreamllm_jax.aot.candidates import Candidate, grad_accum_options, meshes, remats
from dreamllm_jax.aot.estimate import Estimate, estimate, mesh_costs, stage_work
from dreamllm_jax.aot.memory import FREE_SHARE, DoesNotFit, gib
from dreamllm_jax.aot.report import CompileReport
from dreamllm_jax.config.chips import Chip
from dreamllm_jax.config.model import RematConfig
from dreamllm_jax.config.train import Recipe, StageConfig
from dreamllm_jax.models.parameters import abstract_params

# The search ends when no candidate can be faster by more than this share, which the estimate cannot resolve.
TOLERANCE = 0.03
# The share of the time that could overlap but is assumed not to, when candidates are ordered.
EXPOSED_SHARE = 0.1
# Remat policies -> the factors by which the compiler's memory (the uncertain part) and bound exceed the
# estimate.
Scales = dict[RematConfig, tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Trial:
    """A candidate that was compiled. Without a report, `failure` says in one sentence why."""

    candidate: Candidate
    estimate: Estimate
    report: CompileReport | None
    failure: str = ""

    def describe(self) -> str:
        """Returns the outcome as text."""
        if self.report is None:
            return self.failure
        needs, bound = gib(self.report.memory.used), self.report.roofline.bound
        return f"{'fits' if self.fits else 'does not fit'}: {needs}, at least {bound:.4g} s per step"

    @property
    def fits(self) -> bool:
        return self.report is not None and self.report.memory.fits


@dataclasses.dataclass(frozen=True)
class Search:
    """The trials, the number of `candidates`, and how many of these fit by the estimate (`likely`)."""

    trials: list[Trial]
    candidates: int
    likely: int

    @property
    def best(self) -> Trial | None:
        """The trial that fits and has the lowest bound."""
        bounds = {t.report.roofline.bound: t for t in self.trials if t.report is not None and t.fits}
        return bounds[min(bounds)] if bounds else None


def estimate_candidates(
    recipe: Recipe, stage: StageConfig, devices: list[Any], chip: Chip
) -> list[tuple[Candidate, Estimate]]:
    """Returns all candidates that can fit: those whose certain bytes leave memory free.

    Raises:
      ValueError: the FLOPs of the stage's objective are not known, no mesh fits it, or no candidate can fit.
    """
    if stage.objective != "joint":
        raise ValueError(
            f"--search supports the joint objective only; stage {stage.name!r} has {stage.objective!r}."
        )
    params, work = abstract_params(recipe.model), stage_work(recipe, stage)
    policies, found = remats(recipe, work), []
    for config, mesh in meshes(recipe, stage, params, devices):
        costs = mesh_costs(dataclasses.replace(recipe, mesh=config), stage, work, params, mesh)
        for steps in grad_accum_options(stage, mesh):
            for remat in policies:
                candidate = Candidate(config, steps, remat)
                guess = estimate(*candidate.applied(recipe, stage), work, costs, mesh, chip)
                if guess.certain <= (1 - FREE_SHARE) * chip.hbm:
                    found.append((candidate, guess))
    if not found:
        raise ValueError(
            f"stage {stage.name!r} does not fit on {len(devices)} x {chip.kind}: parameters, optimizer and "
            f"gradients alone leave less than {FREE_SHARE:.0%} of {gib(chip.hbm)} free on every mesh."
        )
    return found


def search(
    recipe: Recipe,
    stage: StageConfig,
    devices: list[Any],
    chip: Chip,
    number: int,
    compiled: Callable[[Recipe, StageConfig], CompileReport],
    log: Callable[[str], None],
) -> Search:
    """Compiles up to `number` candidates, the fastest by the estimate first.

    Each compilation corrects the estimates of the candidates with the same remat policies: their time, and
    their uncertain memory (doubled where the compiler gives no program). The search ends early if a candidate
    fits and no other that may fit is faster by the estimate.

    Args:
      compiled: compiles a candidate; raises DoesNotFit, or another error of the compiler, if there is no
        program.
      log: receives lines of progress.
    """
    pending = estimate_candidates(recipe, stage, devices, chip)
    trials: list[Trial] = []
    scales: Scales = {}
    total, likely = len(pending), sum(guess.fits(chip) for _, guess in pending)
    log(f"{total} candidates leave memory free after their state; {likely} are estimated to fit")
    while len(trials) < number and pending:
        pick = _next(pending, scales, chip)
        if pick is None or _is_settled(trials, *pick, scales):
            break
        pending.remove(pick)
        candidate, guess = pick
        log(f"compiling {len(trials) + 1} of at most {number}: {'; '.join(candidate.title())}")
        report, failure = None, ""
        try:
            report = compiled(*candidate.applied(recipe, stage))
        except DoesNotFit as error:
            failure, scales[candidate.remat] = str(error), (2.0, 1.0)
        except (ValueError, jax.errors.JaxRuntimeError) as error:  # also internal errors of the compiler
            failure = str(error).splitlines()[0]
        if report is not None:
            scales[candidate.remat] = _scale(guess, report)
        trials.append(Trial(candidate, guess, report, failure))
        log(f"  {trials[-1].describe()}")
    return Search(trials, total, likely)


def _scale(guess: Estimate, report: CompileReport) -> tuple[float, float]:
    uncertain = max(0.0, report.memory.used - guess.certain)
    return uncertain / max(1.0, guess.uncertain), report.roofline.bound / guess.seconds


def _scaled(candidate: Candidate, scales: Scales) -> tuple[float, float]:
    return scales[candidate.remat] if candidate.remat in scales else (1.0, 1.0)


def _next(
    pending: list[tuple[Candidate, Estimate]], scales: Scales, chip: Chip
) -> tuple[Candidate, Estimate] | None:
    """Returns the fastest candidate that may fit; if none does by the estimate, the one that needs least
    memory.
    """
    fitting = [(c, e) for c, e in pending if e.fits(chip, _scaled(c, scales)[0])]
    if fitting:
        return min(fitting, key=lambda pair: _order(*pair, scales))
    return min(pending, key=lambda pair: pair[1].memory(_scaled(pair[0], scales)[0]), default=None)


def _order(candidate: Candidate, guess: Estimate, scales: Scales) -> tuple[float, float]:
    exposed = EXPOSED_SHARE * (guess.serial - guess.seconds)
    return _scaled(candidate, scales)[1] * guess.seconds + exposed, guess.memory()


def _is_settled(trials: list[Trial], candidate: Candidate, guess: Estimate, scales: Scales) -> bool:
    """Returns whether a trial that fits is already as fast as the next candidate can be."""
    bounds = [t.report.roofline.bound for t in trials if t.fits and t.report is not None]
    return bool(bounds) and min(bounds) <= (1 + TOLERANCE) * _scaled(candidate, scales)[1] * guess.seconds
