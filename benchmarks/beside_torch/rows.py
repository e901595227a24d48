"""The rows that a worker measures: each is warmed up, and has the result on which both sides must agree."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import kernels
from benchmarks.beside_torch import bounds, jobs, ours
from benchmarks.beside_torch.inputs import Inputs
from benchmarks.beside_torch.report import PACKAGES, device_name
from benchmarks.beside_torch.sizes import Size, Training, make_size
from benchmarks.beside_torch.timing import Work
from dreamllm_jax.config.chips import find_device
from dreamllm_jax.ops.attention import masks

STEPS_COMPARED = 2
UNSUPPORTED = kernels.UNSUPPORTED


@dataclasses.dataclass(frozen=True)
class Side:
    """The side of this process, and what it measures on."""

    name: str
    size_name: str
    device: str
    dtype: Any
    rows: int | None = None
    micro_batches: int = 1

    @functools.cached_property
    def size(self) -> Size:
        size = make_size(self.size_name, self.dtype)
        optim = dataclasses.replace(size.optim, grad_accum_steps=self.micro_batches)
        return dataclasses.replace(size, optim=optim, rows=self.rows or size.rows)

    @functools.cached_property
    def inputs(self) -> Inputs:
        return Inputs(self.size, on_device=self.device == "gpu")

    @property
    def is_ours(self) -> bool:
        return self.name == "ours"

    @property
    def torch_settings(self) -> Any:
        from benchmarks.beside_torch.towers import TorchSettings

        return TorchSettings("cuda" if self.device == "gpu" else "cpu", self.name == "compiled")

    def generator(self) -> Any:
        """Returns this side's generator of text and images."""
        if self.is_ours:
            return ours.Generator(self.inputs)
        from benchmarks.beside_torch import theirs

        return theirs.Generator(self.inputs, self.torch_settings)

    def tensor(self, x: np.ndarray) -> Any:
        """Returns an array as a tensor on PyTorch's device."""
        import torch

        return torch.tensor(x, device=self.torch_settings.device)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row that is ready to be measured, or the error that made it impossible.

    `bound` returns what a repetition costs at least, in FLOPs or bytes; only our side computes it. `figures`
    returns more about the measurement. Both are called afterwards.
    """

    name: str
    column: str
    work: Work = Work(lambda: None)
    result: dict[str, Any] = dataclasses.field(default_factory=dict)
    bound: Callable[[], dict[str, float]] = dict
    figures: Callable[[], dict[str, Any]] = dict
    error: str | None = None


def joint(side: Side, training: Training) -> Iterator[Row]:
    """Yields the train step of a stage."""
    (name,) = jobs.row_names(training, side.size)
    if side.is_ours:
        bound = in_background(lambda: {"flops": bounds.joint_flops(side.size, training)})
        step: Any = ours.Step(side.inputs, training)
        result = {"loss": np.array([step() for _ in range(STEPS_COMPARED)])}
        yield Row(name, side.name, Work(step), result, bound, lambda: micro(side.micro_batches))
        return
    from benchmarks.beside_torch import theirs

    losses: list[float] = []
    step = theirs.Step(side.inputs, training, side.torch_settings)
    for number in range(STEPS_COMPARED):
        step.set_noise(ours.step_noise(step.stage, side.size.model, number))
        losses.append(step())
    result = {"loss": np.array(losses)}
    yield Row(name, side.name, Work(step), result, figures=lambda: micro(step.micro_batches))


def in_background(function: Callable[[], Any]) -> Callable[[], Any]:
    """Returns a function that returns `function()`, which a thread computes while programs are compiled."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(function)
    pool.shutdown(wait=False)
    return future.result


def micro(count: int) -> dict[str, int]:
    """Returns the number of micro-batches, if there are several, as a figure of a cell."""
    return {"micro_batches": count} if count > 1 else {}


def text(side: Side) -> Iterator[Row]:
    """Yields decoding and reading prompts, with one row and with a batch."""
    size, generator = side.size, side.generator()
    names = iter(jobs.row_names("text", size))
    for rows in (1, size.batch):
        yield decode(side, generator, next(names), rows)
    for rows in (1, size.batch):
        yield prefill(side, generator, next(names), rows)


def decode(side: Side, generator: Any, name: str, rows: int) -> Row:
    """Returns decoding after a prompt; reading the prompt is not timed."""
    size, state = side.size, {}

    def prepare() -> None:
        state["read"] = generator.read(rows, size.new_tokens)

    if side.is_ours:
        work = Work(lambda: generator.write(state["read"], rows)[1], prepare)
    else:
        forbidden = side.tensor(ours.forbidden(size))
        work = Work(lambda: generator.write(state["read"], forbidden), prepare)
    work.seconds()
    work.prepare()
    tokens = work.run()
    bytes_read = bounds.token_bytes(size, rows) * size.new_tokens
    bound = (lambda: {"bytes": bytes_read}) if side.is_ours else dict
    return Row(name, side.name, work, {"tokens": tokens}, bound)


def prefill(side: Side, generator: Any, name: str, rows: int) -> Row:
    """Returns reading prompts, up to the logits of the next token."""
    size, state = side.size, {}
    if side.is_ours:
        work = Work(lambda: generator.logits(generator.read(rows, size.new_tokens)))
        logits = work.run()
    else:

        def prepare() -> None:
            state["cache"] = generator.cache(rows, size.new_tokens)

        generator.read(rows, size.new_tokens)  # makes the cache
        work = Work(lambda: generator.read_compiled(rows, state["cache"]), prepare)
        work.prepare()
        logits = work.run().logits.cpu().numpy()
    work.seconds()
    bound = (lambda: {"flops": bounds.prefill_flops(size, rows)}) if side.is_ours else dict
    return Row(name, side.name, work, {"logits": logits}, bound)


def text_to_image(side: Side) -> Iterator[Row]:
    """Yields generating images from conditions: U-Net steps with guidance, then the VAE's decoder."""
    size = side.size
    bound = in_background(lambda: {"flops": bounds.image_flops(size)}) if side.is_ours else dict
    generator = side.generator()
    (name,) = jobs.row_names("text_to_image", size)
    if side.is_ours:
        work = Work(lambda: generator.draw(size.num_images))
    else:
        contexts, null = generator.condition(size.num_images)
        noise = side.tensor(ours.first_noise(size, size.num_images))
        work = Work(lambda: generator.draw(contexts, null, noise))
    pictures = work.run()
    work.seconds()
    yield Row(name, side.name, work, {"image": pictures}, bound)


def attention(side: Side) -> Iterator[Row]:
    """Yields the forward and backward passes of attention in each implementation."""
    size_name = "full" if side.size_name == "full" else "tiny"
    for case_name, name in zip(
        jobs.KERNELS[side.size_name], jobs.row_names("kernels", side.size), strict=True
    ):
        case = kernels.CASES[size_name][case_name]
        arrays = kernels.inputs(case, jnp.dtype(side.dtype))
        if not side.is_ours:
            from benchmarks.beside_torch import torch_attention

            yield torch_attention.row(side, name, case, arrays)
            continue
        for column in jobs.IMPLEMENTATIONS[side.device]:
            function = kernels.IMPLEMENTATIONS[side.device][column]
            try:
                run = kernels.compile_passes(function, case, arrays)[1]
                passes = [np.asarray(x, np.float32) for x in jax.block_until_ready(run(*arrays))]
            except UNSUPPORTED as error:
                yield Row(name, column, error=str(error).splitlines()[0])
                continue
            work = Work(lambda run=run, arrays=arrays: jax.block_until_ready(run(*arrays)))
            yield Row(name, column, work, {"attention": valid(case, arrays, passes[0])})


def valid(case: kernels.Case, arrays: kernels.Arrays, out: np.ndarray) -> np.ndarray:
    """Returns attention's output [B, L, N, H] without padding, of the first row only."""
    return out[:1] if not case.packed else out[:1, np.asarray(arrays[4][0]) > 0]


def visible(case: kernels.Case, ids: jax.Array) -> np.ndarray | None:
    """Returns what queries attend to in packed rows, bool [B, 1, L, L]."""
    if not case.packed:
        return None
    return np.asarray(masks.boolean_mask(masks.packed(ids), case.queries, case.keys))


JOBS: dict[str, Callable[[Side], Iterator[Row]]] = {
    "stage1": lambda side: joint(side, "stage1"),
    "text": text,
    "text_to_image": text_to_image,
    "stage2": lambda side: joint(side, "stage2"),
    "kernels": attention,
}


def environment(side: Side) -> dict[str, Any]:
    """Returns the device, its peaks where they are known, and the versions of packages."""
    found: dict[str, Any] = {"device": device_name(), "dtype": side.dtype, "size": side.size_name}
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    known = find_device(jax.devices()[0].device_kind)
    if known is not None:
        found |= {"peak_flops": known.peak, "peak_bandwidth": known.hbm_bandwidth}
    return found | {"versions": versions}


def peak_memory(side: Side) -> dict[str, float]:
    """Returns the most device memory that this process has used, in GiB, if its library counts it."""
    if side.device == "cpu":
        return {}
    if not side.is_ours:
        import torch

        return {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    stats = jax.devices()[0].memory_stats()
    return {} if not stats else {"peak_gib": stats["peak_bytes_in_use"] / 2**30}
