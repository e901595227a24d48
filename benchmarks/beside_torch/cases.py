"""The pairs that are timed: each is first seen to compute the same on both sides.

A pair's function returns its measurements by name; what it compares first is said beside `BOUNDS`.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.beside_torch import bounds, ours
from benchmarks.beside_torch.inputs import Inputs
from benchmarks.beside_torch.sizes import Size
from benchmarks.beside_torch.timing import Disagreement, Timing, Work, alternate, one_after_the_other

# Largest errors allowed before anything is timed. loss: relative, of two steps. logits: norm of the
# difference by the norm. tokens: share that differs. picture: mean absolute difference of bytes. In bfloat16
# both sides round, and a token that falls otherwise takes all that follow it along: none are compared then.
BOUNDS = {
    "float32": {"loss": 1e-4, "logits": 1e-4, "tokens": 0.0, "picture": 0.1},
    "bfloat16": {"loss": 2e-2, "logits": 5e-2, "tokens": 1.0, "picture": 16.0},
}
STEPS_COMPARED = 2


@dataclasses.dataclass(frozen=True)
class Session:
    """One run of the benchmark: the inputs, where PyTorch computes, how many pairs are timed."""

    inputs: Inputs
    place: Any
    pairs: int

    @property
    def size(self) -> Size:
        return self.inputs.size

    def result(self, timing: Timing, errors: dict[str, float], **more: float) -> dict[str, Any]:
        """A measurement: seconds, ratio, the errors that were found before, and `more`."""
        return timing.summary() | {"errors": errors} | more

    def agree(self, what: str, errors: dict[str, float]) -> dict[str, float]:
        """The errors, where they lie within their bounds.

        Raises:
          Disagreement: one does not.
        """
        allowed = BOUNDS[self.size.model.dtype]
        if wrong := {k: e for k, e in errors.items() if not e <= allowed[k]}:
            raise Disagreement(f"{what}: the two sides differ: {wrong}; allowed are {allowed}.")
        return errors


def joint(session: Session) -> dict[str, dict[str, Any]]:
    """The train step of every stage that the size names."""
    from benchmarks.beside_torch import theirs

    found = {}
    for training in session.size.training:

        def make_ours(training=training) -> ours.Step:
            return ours.Step(session.inputs, training)

        def make_theirs(training=training) -> theirs.Step:
            return theirs.Step(session.inputs, training, session.place)

        name = f"joint, {training}"
        found[name] = _joint(session, name, make_ours, make_theirs, training in session.size.apart)
        flops = bounds.joint_flops(session.size, training)
        tokens = session.size.rows * session.size.length
        seconds = found[name]["ours_s"]
        found[name] |= bounds.flop_rate(flops, seconds) | {"tokens_per_second": tokens / seconds}
    return found


def _joint(
    session: Session, name: str, make_ours: Callable, make_theirs: Callable, apart: bool
) -> dict[str, Any]:
    step = make_ours()
    step_noise, mine = [], []
    for _ in range(STEPS_COMPARED):
        step_noise.append(step.draws())
        mine.append(step())
    if apart:
        del step
        free()
    other = make_theirs()
    for drawn, loss in zip(step_noise, mine, strict=True):
        other.set_noise(drawn)
        error = abs(other() - loss) / abs(loss)
        errors = session.agree(name, {"loss": error})
    if not apart:
        timing = alternate(Work(step), Work(other), session.pairs)
    else:
        del other

        def warm(make: Callable) -> Work:
            free()
            made = make()
            if hasattr(made, "set_noise"):
                made.set_noise(step_noise[0])
            for _ in range(2):
                made()
            return Work(made)

        timing = one_after_the_other(lambda: warm(make_ours), lambda: warm(make_theirs), session.pairs)
    return session.result(timing, errors, loss=mine[-1])


def free() -> None:
    """Gives the device's memory back to whoever comes next."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _generators(session: Session) -> tuple[Any, Any]:
    from benchmarks.beside_torch import theirs

    return ours.Generator(session.inputs), theirs.Generator(session.inputs, session.place)


def prefill(session: Session) -> dict[str, dict[str, Any]]:
    """DecodeState a prompt, alone and in a batch, up to the scores of its next token."""
    mine, other = _generators(session)
    found, size = {}, session.size
    for rows in (1, size.batch):
        name = f"prefill, {rows} x {size.prompt}"
        scores = mine.logits(mine.read(rows, size.new_tokens))
        wanted = other.read(rows, size.new_tokens).logits.cpu().numpy()
        errors = session.agree(name, {"logits": _distance(scores, wanted)})
        works = (
            Work(lambda r=rows: mine.logits(mine.read(r, size.new_tokens))),
            Work(lambda r=rows: other.read(r, size.new_tokens)),
        )
        timing = alternate(*works, session.pairs)
        seconds = timing.summary()["ours_s"]
        found[name] = session.result(timing, errors, tokens_per_second=rows * size.prompt / seconds)
        found[name] |= bounds.flop_rate(bounds.prefill_flops(size, rows), seconds)
    return found


def decode(session: Session) -> dict[str, dict[str, Any]]:
    """Writing text after a prompt that has been read, alone and in a batch."""
    import torch

    mine, other = _generators(session)
    never = torch.tensor(ours.forbidden(session.size), device=session.place.device)
    found, size = {}, session.size

    def once(rows: int) -> tuple[Work, Work]:
        state: dict[str, Any] = {}

        def prepare(side: str, read: Callable) -> None:
            state[side] = read(rows, size.new_tokens)

        return (
            Work(lambda: mine.write(state["ours"], rows)[1], lambda: prepare("ours", mine.read)),
            Work(lambda: other.write(state["theirs"], never), lambda: prepare("theirs", other.read)),
        )

    for rows in (1, size.batch):
        name = f"decode, {rows} x {size.new_tokens}"
        works = once(rows)
        texts = []
        for work in works:
            work.seconds()
            work.prepare()
            texts.append(work.run())
        errors = session.agree(name, {"tokens": float((texts[0] != texts[1]).mean())})
        timing = alternate(*works, session.pairs)
        seconds = timing.summary()["ours_s"]
        found[name] = session.result(timing, errors, tokens_per_second=rows * size.new_tokens / seconds)
        found[name] |= bounds.bandwidth_share(size, rows, seconds)
    return found


def text_to_image(session: Session) -> dict[str, dict[str, Any]]:
    """Conditions to pictures: guided steps, then the VAE's decoder."""
    import torch

    mine, other = _generators(session)
    size = session.size
    contexts, null = other.condition(size.pictures)
    noise = torch.tensor(ours.first_noise(size, size.pictures), device=session.place.device)
    works = (
        Work(lambda: mine.draw(size.pictures)),
        Work(lambda: other.draw(contexts, null, noise)),
    )
    pictures = [work.run() for work in works]
    name = f"text to image, {size.pictures} x {size.model.image_size} px, {size.steps} steps"
    errors = session.agree(name, {"picture": _bytes_apart(*pictures)})
    for work in works:
        work.seconds()
    timing = alternate(*works, session.pairs)
    seconds = timing.summary()["ours_s"]
    result = session.result(timing, errors, pictures_per_second=size.pictures / seconds)
    return {name: result | bounds.flop_rate(bounds.drawing_flops(size), seconds)}


def documents(session: Session) -> dict[str, dict[str, Any]]:
    """Text, a picture drawn and seen, text again."""
    import torch

    mine, other = _generators(session)
    size, device = session.size, session.place.device
    never = torch.tensor(ours.forbidden(size), device=device)
    noise = torch.tensor(ours.first_noise(size, 1, size.prompt + size.new_tokens), device=device)
    works = (Work(mine.document), Work(lambda: other.document(never, noise)))
    (text, picture, after), (their_text, their_picture, their_after) = (work.run() for work in works)
    different = float(np.mean(np.concatenate([text != their_text, after != their_after])))
    name = f"document: {size.new_tokens} tokens, a picture, {size.new_tokens} tokens"
    errors = {"tokens": different, "picture": _bytes_apart(picture, their_picture)}
    errors = session.agree(name, errors)
    for work in works:
        work.seconds()
    return {name: session.result(alternate(*works, session.pairs), errors)}


CASES: dict[str, Callable[[Session], dict[str, dict[str, Any]]]] = {
    "joint": joint,
    "prefill": prefill,
    "decode": decode,
    "text_to_image": text_to_image,
    "documents": documents,
}


def _distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def _bytes_apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours.astype(np.float64) - theirs).mean())
