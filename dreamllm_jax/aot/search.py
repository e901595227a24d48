"""The mesh, accumulation and remat with which a stage fits and is fastest: estimated, then compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from dreamllm_jax.aot.candidates import Candidate, accumulations, meshes, remats
from dreamllm_jax.aot.chips import Chip
from dreamllm_jax.aot.estimate import Estimate, estimate, held, load_of
from dreamllm_jax.aot.memory import FREE, DoesNotFit, gib
from dreamllm_jax.aot.report import Finding
from dreamllm_jax.config.model import RematConfig
from dreamllm_jax.config.train import Recipe, StageConfig
from dreamllm_jax.models.parameters import abstract_params

# What the estimate cannot tell apart: the search ends where nothing can be faster by more than this part.
BLUR = 0.03
# How much of the time that could overlap is taken not to, where candidates are ordered.
EXPOSED = 0.1
# By remat: by what the compiler's memory (the loose part) and bound exceed the estimate.
Scales = dict[RematConfig, tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Tried:
    """A candidate that was compiled; without a finding `failure` says in a sentence why."""

    candidate: Candidate
    estimate: Estimate
    finding: Finding | None
    failure: str = ""

    def said(self) -> str:
        """In words."""
        if self.finding is None:
            return self.failure
        needs, bound = gib(self.finding.memory.used), self.finding.roofline.bound
        return f"{'fits' if self.fits else 'does not fit'}: {needs}, at least {bound:.4g} s a step"

    @property
    def fits(self) -> bool:
        return self.finding is not None and self.finding.memory.fits


@dataclasses.dataclass(frozen=True)
class Search:
    """What was tried, of how many candidates, of which so many can fit by the estimate."""

    tried: list[Tried]
    candidates: int
    likely: int

    @property
    def best(self) -> Tried | None:
        """Of what fits, that with the least bound."""
        fitting = [t for t in self.tried if t.fits]
        return min(fitting, key=lambda t: t.finding.roofline.bound, default=None)


def estimated(
    recipe: Recipe, stage: StageConfig, devices: list[Any], chip: Chip
) -> list[tuple[Candidate, Estimate]]:
    """All candidates that can fit: what they cannot do without leaves memory free.

    Raises:
      ValueError: the stage's objective has no count of FLOPs, or no mesh suits it, or none leaves memory.
    """
    if stage.objective != "joint":
        raise ValueError(
            f"--search knows the joint objective only; stage {stage.name!r} has {stage.objective!r}."
        )
    params, load = abstract_params(recipe.model), load_of(recipe, stage)
    policies, found = remats(recipe, load), []
    for config, mesh in meshes(recipe, stage, params, devices):
        lies = held(dataclasses.replace(recipe, mesh=config), stage, load, params, mesh)
        for parts in accumulations(stage, mesh):
            for remat in policies:
                candidate = Candidate(config, parts, remat)
                guess = estimate(*candidate.applied(recipe, stage), load, lies, mesh, chip)
                if guess.sure <= (1 - FREE) * chip.hbm:
                    found.append((candidate, guess))
    if not found:
        raise ValueError(
            f"stage {stage.name!r} does not fit on {len(devices)} x {chip.kind}: parameters, "
            f"optimizer and gradients alone leave less than {FREE:.0%} of {gib(chip.hbm)} free on every mesh."
        )
    return found


def search(
    recipe: Recipe,
    stage: StageConfig,
    devices: list[Any],
    chip: Chip,
    number: int,
    compiled: Callable[[Recipe, StageConfig], Finding],
    say: Callable[[str], None],
) -> Search:
    """Compiles up to `number` candidates, the fastest by the estimate first.

    Each compilation corrects the estimates of those with the same remat: time, and memory (twice as much of
    what is loose, where it does not fit at all). It ends early where one fits and by the estimate none that
    may fit is faster. `compiled` raises DoesNotFit, or another error of the compiler, where there is no
    program.
    """
    pending = estimated(recipe, stage, devices, chip)
    tried: list[Tried] = []
    scales: Scales = {}
    total, likely = len(pending), sum(guess.fits(chip) for _, guess in pending)
    say(f"{total} candidates leave memory beside their state; by estimate {likely} fit")
    while len(tried) < number and pending:
        pick = _next(pending, scales, chip)
        if pick is None or _enough(tried, *pick, scales):
            break
        pending.remove(pick)
        candidate, guess = pick
        say(f"compiling {len(tried) + 1} of at most {number}: {'; '.join(candidate.title())}")
        finding, failure = None, ""
        try:
            finding = compiled(*candidate.applied(recipe, stage))
        except DoesNotFit as error:
            failure, scales[candidate.remat] = str(error), (2.0, 1.0)
        except (ValueError, jax.errors.JaxRuntimeError) as error:  # the compiler's own faults too
            failure = str(error).splitlines()[0]
        if finding is not None:
            scales[candidate.remat] = _scale(guess, finding)
        tried.append(Tried(candidate, guess, finding, failure))
        say(f"  {tried[-1].said()}")
    return Search(tried, total, likely)


def _scale(guess: Estimate, finding: Finding) -> tuple[float, float]:
    loose = max(0.0, finding.memory.used - guess.sure)
    return loose / max(1.0, guess.loose), finding.roofline.bound / guess.seconds


def _scaled(candidate: Candidate, scales: Scales) -> tuple[float, float]:
    return scales[candidate.remat] if candidate.remat in scales else (1.0, 1.0)


def _next(
    pending: list[tuple[Candidate, Estimate]], scales: Scales, chip: Chip
) -> tuple[Candidate, Estimate] | None:
    """The fastest that may fit; where by estimate none does, that which needs least."""
    fitting = [(c, e) for c, e in pending if e.fits(chip, _scaled(c, scales)[0])]
    if fitting:
        return min(fitting, key=lambda pair: _order(*pair, scales))
    return min(pending, key=lambda pair: pair[1].memory(_scaled(pair[0], scales)[0]), default=None)


def _order(candidate: Candidate, guess: Estimate, scales: Scales) -> tuple[float, float]:
    exposed = EXPOSED * (guess.serial - guess.seconds)
    return _scaled(candidate, scales)[1] * guess.seconds + exposed, guess.memory()


def _enough(tried: list[Tried], candidate: Candidate, guess: Estimate, scales: Scales) -> bool:
    """Whether what fits already is as fast as the next candidate can be."""
    bounds = [t.finding.roofline.bound for t in tried if t.fits and t.finding is not None]
    return bool(bounds) and min(bounds) <= (1 + BLUR) * _scaled(candidate, scales)[1] * guess.seconds
