"""The cases: each checks that both sides compute the same result, then times them.

A case is a function that returns its measurements by name. `agreement` says what is compared, and the bounds.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.beside_torch import bounds, ours
from benchmarks.beside_torch.agreement import BOUNDS, byte_difference, exceeding, relative_norm
from benchmarks.beside_torch.inputs import Inputs
from benchmarks.beside_torch.sizes import Size, Training
from benchmarks.beside_torch.timing import Disagreement, Timing, Work, alternate, time_in_blocks

STEPS_COMPARED = 2


@dataclasses.dataclass(frozen=True)
class Session:
    """One run of the benchmark: the inputs, PyTorch's settings and the number of timed pairs."""

    inputs: Inputs
    torch_settings: Any
    pairs: int

    @property
    def size(self) -> Size:
        return self.inputs.size

    def result(self, timing: Timing, errors: dict[str, float], **more: float) -> dict[str, Any]:
        """Returns a measurement: seconds and ratio, the errors between the two sides, and `more`."""
        return timing.summary() | {"errors": errors} | more

    def check_agreement(self, name: str, errors: dict[str, float]) -> dict[str, float]:
        """Returns the errors of a case if they are within their bounds.

        Raises:
          Disagreement: an error exceeds its bound.
        """
        if wrong := exceeding(errors, self.size.model.dtype):
            allowed = BOUNDS[self.size.model.dtype]
            raise Disagreement(f"{name}: the two sides differ by {wrong}; the bounds are {allowed}.")
        return errors


def joint(session: Session) -> dict[str, dict[str, Any]]:
    """Times a train step of each stage in `size.training`."""
    from benchmarks.beside_torch import theirs

    found = {}
    for training in session.size.training:

        def make_ours(training: Training = training) -> ours.Step:
            return ours.Step(session.inputs, training)

        def make_theirs(training: Training = training) -> theirs.Step:
            return theirs.Step(session.inputs, training, session.torch_settings)

        name = f"joint, {training}"
        found[name] = _joint(session, name, make_ours, make_theirs, training in session.size.exclusive)
        flops = bounds.joint_flops(session.size, training)
        tokens = session.size.rows * session.size.length
        seconds = found[name]["ours_s"]
        found[name] |= bounds.flop_rate(flops, seconds) | {"tokens_per_second": tokens / seconds}
    return found


def _joint(
    session: Session, name: str, make_ours: Callable, make_theirs: Callable, exclusive: bool
) -> dict[str, Any]:
    """Compares two steps of both sides, then times them.

    If `exclusive`, only one side is in memory at a time.
    """
    our_step = make_ours()
    step_noise, our_losses = [], []
    for _ in range(STEPS_COMPARED):
        step_noise.append(our_step.next_noise())
        our_losses.append(our_step())
    if exclusive:
        del our_step
        free_memory()
    their_step = make_theirs()
    for noise, loss in zip(step_noise, our_losses, strict=True):
        their_step.set_noise(noise)
        error = abs(their_step() - loss) / abs(loss)
        errors = session.check_agreement(name, {"loss": error})
    if not exclusive:
        timing = alternate(Work(our_step), Work(their_step), session.pairs)
    else:
        del their_step

        def make_warm(make: Callable) -> Work:
            free_memory()
            step = make()
            if hasattr(step, "set_noise"):
                step.set_noise(step_noise[0])
            for _ in range(2):
                step()
            return Work(step)

        timing = time_in_blocks(lambda: make_warm(make_ours), lambda: make_warm(make_theirs), session.pairs)
    return session.result(timing, errors, loss=our_losses[-1])


def free_memory() -> None:
    """Frees device memory that is no longer in use, for the next case."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _generators(session: Session) -> tuple[Any, Any]:
    from benchmarks.beside_torch import theirs

    return ours.Generator(session.inputs), theirs.Generator(session.inputs, session.torch_settings)


def prefill(session: Session) -> dict[str, dict[str, Any]]:
    """Times reading a prompt, up to the logits of its next token: one row, and a batch."""
    our_side, their_side = _generators(session)
    found, size = {}, session.size
    for rows in (1, size.batch):
        name = f"prefill, {rows} x {size.prompt}"
        our_logits = our_side.logits(our_side.read(rows, size.new_tokens))
        their_logits = their_side.read(rows, size.new_tokens).logits.cpu().numpy()
        errors = session.check_agreement(name, {"logits": relative_norm(our_logits, their_logits)})
        state: dict[str, Any] = {}

        def prepare(rows: int = rows, state: dict[str, Any] = state) -> None:
            state["cache"] = their_side.cache(rows, size.new_tokens)

        works = (
            Work(lambda r=rows: our_side.logits(our_side.read(r, size.new_tokens))),
            Work(lambda r=rows, s=state: their_side.read_compiled(r, s["cache"]), prepare),
        )
        works[1].seconds()  # compiles
        timing = alternate(*works, session.pairs)
        seconds = timing.summary()["ours_s"]
        found[name] = session.result(timing, errors, tokens_per_second=rows * size.prompt / seconds)
        found[name] |= bounds.flop_rate(bounds.prefill_flops(size, rows), seconds)
    return found


def decode(session: Session) -> dict[str, dict[str, Any]]:
    """Times decoding text after a prefilled prompt: one row, and a batch."""
    import torch

    our_side, their_side = _generators(session)
    forbidden = torch.tensor(ours.forbidden(session.size), device=session.torch_settings.device)
    found, size = {}, session.size

    def make_works(rows: int) -> tuple[Work, Work]:
        state: dict[str, Any] = {}

        def prepare_ours() -> None:
            state["ours"] = our_side.read(rows, size.new_tokens)

        def prepare_theirs() -> None:
            state["theirs"] = their_side.read(rows, size.new_tokens)

        return (
            Work(lambda: our_side.write(state["ours"], rows)[1], prepare_ours),
            Work(lambda: their_side.write(state["theirs"], forbidden), prepare_theirs),
        )

    for rows in (1, size.batch):
        name = f"decode, {rows} x {size.new_tokens}"
        works = make_works(rows)
        texts = []
        for work in works:
            work.seconds()
            work.prepare()
            texts.append(work.run())
        errors = session.check_agreement(name, {"tokens": float((texts[0] != texts[1]).mean())})
        timing = alternate(*works, session.pairs)
        seconds = timing.summary()["ours_s"]
        found[name] = session.result(timing, errors, tokens_per_second=rows * size.new_tokens / seconds)
        found[name] |= bounds.bandwidth_share(size, rows, seconds)
    return found


def text_to_image(session: Session) -> dict[str, dict[str, Any]]:
    """Times generating images from conditions: U-Net steps with guidance, then the VAE's decoder."""
    import torch

    our_side, their_side = _generators(session)
    size = session.size
    contexts, null = their_side.condition(size.num_images)
    noise = torch.tensor(ours.first_noise(size, size.num_images), device=session.torch_settings.device)
    works = (
        Work(lambda: our_side.draw(size.num_images)),
        Work(lambda: their_side.draw(contexts, null, noise)),
    )
    pictures: list[Any] = [work.run() for work in works]
    name = f"text to image, {size.num_images} x {size.model.image_size} px, {size.steps} steps"
    errors = session.check_agreement(name, {"image": byte_difference(*pictures)})
    for work in works:
        work.seconds()
    timing = alternate(*works, session.pairs)
    seconds = timing.summary()["ours_s"]
    result = session.result(timing, errors, images_per_second=size.num_images / seconds)
    return {name: result | bounds.flop_rate(bounds.image_flops(size), seconds)}


def documents(session: Session) -> dict[str, dict[str, Any]]:
    """Times a document: text, an image that is generated and read back, and more text."""
    import torch

    our_side, their_side = _generators(session)
    size, device = session.size, session.torch_settings.device
    forbidden = torch.tensor(ours.forbidden(size), device=device)
    noise = torch.tensor(ours.first_noise(size, 1, size.prompt + size.new_tokens), device=device)
    works = (Work(our_side.document), Work(lambda: their_side.document(forbidden, noise)))
    our_document, their_document = (work.run() for work in works)
    (first, picture, second), (their_first, their_picture, their_second) = our_document, their_document
    different = float(np.mean(np.concatenate([first != their_first, second != their_second])))
    name = f"document: {size.new_tokens} tokens, an image, {size.new_tokens} tokens"
    errors = {"tokens": different, "image": byte_difference(picture, their_picture)}
    errors = session.check_agreement(name, errors)
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
