"""What a restart needs beside the train state: the position in the data, and the resources used so far."""

from __future__ import annotations

from typing import Any

from dreamllm_jax import distributed
from dreamllm_jax.checkpoint.train_states import StageCheckpoints
from dreamllm_jax.data.pipeline import BatchStream, merge_iterator_states, statistics
from dreamllm_jax.train.resources import ResourceMeter
from dreamllm_jax.train.stage_context import StageContext
from dreamllm_jax.train.state import TrainState


class StageProgress:
    """The data, the resource meter and the checkpoints of one stage. All processes make every call."""

    def __init__(self, context: StageContext, data: BatchStream, resources: ResourceMeter):
        recipe = context.recipe
        self._context, self.data, self._resources = context, data, resources
        self._checkpoints = StageCheckpoints(
            context.folder.states, recipe.checkpoint_every, recipe.keep_checkpoints
        )

    def restore(self, state: TrainState) -> TrainState:
        """Returns the newest saved state, laid out as `state`, and moves the data to its position.

        Returns `state` itself if nothing is saved.
        """
        found = self._checkpoints.restore(state)
        if found is None:
            return state
        state, position = found
        self.data.load_state(position["data"])
        self._resources.resume(position["meter"])
        stage = self._context.stage
        distributed.print_on_main(f"{stage.name}: resumes after step {int(state.step)} of {stage.steps}")
        return state

    def is_due(self, step: int) -> bool:
        """Returns whether the state after `step` is to be saved."""
        return self._checkpoints.due(step)

    def save(self, step: int, state: TrainState) -> None:
        """Saves the state after `step`; the files are written in the background."""
        self._checkpoints.save(step, state, self._position())

    def summary(self) -> dict[str, Any]:
        """Returns seconds, peak memory, steps and data statistics of the stage, over all processes."""
        position = self._position()
        counts = statistics(position["data"], self._context.stage.data.length)
        return position["meter"] | {"steps": self._context.stage.steps, "data": counts}

    def close(self) -> None:
        """Waits until everything is written."""
        self._checkpoints.close()

    def _position(self) -> dict[str, Any]:
        """Returns the position of all processes in the data, their longest time and largest memory."""
        found = distributed.all_gather({"data": self.data.state_dict(), "meter": self._resources.read()})
        meters = [position["meter"] for position in found]
        largest = {name: max(meter[name] for meter in meters) for name in meters[0]}
        return {"data": merge_iterator_states([position["data"] for position in found]), "meter": largest}
