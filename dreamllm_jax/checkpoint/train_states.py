"""Checkpoints within a stage, by orbax: the train state, and the position in the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

State = TypeVar("State")


class StageCheckpoints:
    """The newest states of one stage in `folder`. An incomplete state is never restored.

    Every process writes and reads what its own devices hold. All processes must make every call.
    """

    def __init__(self, folder: Path, every: int, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._every = every
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def due(self, step: int) -> bool:
        """Returns whether the state after `step` is to be saved: after each multiple of `every`."""
        return step % self._every == 0

    def save(self, step: int, state: Any, data: dict[str, Any]) -> None:
        """Saves the state after `step`. Returns when the state is copied; the files are written in the
        background.

        `data` (JSON) must be equal on all processes. Process 0 writes it.
        """
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data)),
            force=True,  # whether a step is saved is decided here
        )

    def restore(self, like: State) -> tuple[State, dict[str, Any]] | None:
        """Returns the newest state, sharded as `like`, and its `data`; None if nothing is saved."""
        step = self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()),
        )
        return found["state"], found["data"]

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()
