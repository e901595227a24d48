"""The jobs of `--budget`: what one process measures, on one side, and the rows of the table that it fills.

A job is measured three times, by as many processes: ours, PyTorch as it is ("eager"), and PyTorch with
`torch.compile` ("compiled"). The attention kernels have a column for each of our implementations instead.
"""

from __future__ import annotations

import dataclasses
import itertools

from benchmarks.beside_torch.sizes import Size

SIDES = ("ours", "eager", "compiled")
# The most important first.
NAMES = ("stage1", "text", "text_to_image", "stage2", "kernels")
# Attention's cases of `benchmarks.kernels`, and our implementations by backend.
KERNELS = {
    "full": ("llama", "unet, 64 x 64", "unet, 32 x 32"),
    "tiny": ("llama", "unet, 32 x 32"),
    "smallest": ("unet, dream queries",),
}
IMPLEMENTATIONS = {"cpu": ("xla", "chunked"), "gpu": ("xla", "chunked", "cudnn")}
# GiB of device memory of a `full` job, with room to spare, by ours and PyTorch's: several processes prepare
# at the same time only if they fit together. A job that needs more than the device has runs alone.
MEMORY = {
    "stage1": (56, 90),
    "text": (44, 36),
    "text_to_image": (44, 40),
    "stage2": (100, 138),
    "kernels": (16, 16),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One process: a job on a side, its cells (row, column) in the order of measuring, and its memory."""

    name: str
    side: str
    cells: tuple[tuple[str, str], ...]
    gib: float

    @property
    def title(self) -> str:
        return f"{self.name}, {self.side}"


def row_names(name: str, size: Size) -> tuple[str, ...]:
    """Returns the names of a job's rows, in the order of measuring."""
    if name in ("stage1", "stage2"):
        return (f"joint, {name}: {size.rows} x {size.length} tokens",)
    if name == "text":
        decode = [f"decode, {rows} x {size.new_tokens} tokens" for rows in (1, size.batch)]
        return (*decode, *(f"prefill, {rows} x {size.prompt} tokens" for rows in (1, size.batch)))
    if name == "text_to_image":
        return (f"text to image, {size.num_images} x {size.model.image_size} px, {size.steps} steps",)
    return tuple(f"attention, {case}" for case in KERNELS[size.name])


def plan(
    names: tuple[str, ...], sides: tuple[str, ...], size: Size, device: str, stage2_rows: int | None = None
) -> list[Job]:
    """Returns the jobs, the most important first, and of each our side first.

    `stage2_rows` are the rows of a train step of stage II, if they are not those of the size.
    """
    found = []
    for name, side in itertools.product([n for n in NAMES if n in names], sides):
        columns = IMPLEMENTATIONS[device] if name == "kernels" and side == "ours" else (side,)
        rows = stage2_rows if name == "stage2" and stage2_rows is not None else size.rows
        cells = tuple(itertools.product(row_names(name, dataclasses.replace(size, rows=rows)), columns))
        gib = MEMORY[name][side != "ours"] if size.name == "full" else 4
        found.append(Job(name, side, cells, gib))
    return found
