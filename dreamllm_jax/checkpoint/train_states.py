"""Checkpoints within a stage: the whole train state and the data's place, by orbax."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

State = TypeVar("State")


class StageCheckpoints:
    """The latest states of one stage under `folder`; what is half written is never restored.

    Of several processes each writes and reads what its own devices hold, and all make every call.
    """

    def __init__(self, folder: Path, every: int, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._every = every
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def due(self, step: int) -> bool:
        """Whether the state after `step` is to be saved: every so many steps, not after the first one."""
        return step % self._every == 0

    def save(self, step: int, state: Any, data: dict[str, Any]) -> None:
        """Saves; returns when the state is copied, and writes in the background.

        `data`, which is the same on all processes, is written by process 0.
        """
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data)),
            force=True,  # whether a step is saved is decided here
        )

    def restore(self, like: State) -> tuple[State, dict[str, Any]] | None:
        """The newest state, laid out as `like`, with the data's place; None where there is none."""
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
        """Waits for what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()
