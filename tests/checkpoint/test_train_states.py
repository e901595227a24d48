"""States within a stage: saved, restored on another mesh, and only the newest kept."""

import jax
import jax.numpy as jnp
import numpy as np

from dreamllm_jax.checkpoint.train_states import StageCheckpoints
from dreamllm_jax.config.train import MeshConfig, OptimConfig
from dreamllm_jax.sharding import make_mesh, parameter_shardings, replicated
from dreamllm_jax.train.optim import make_optimizer
from dreamllm_jax.train.state import TrainState, optimizer_shardings

PATH = "llama/lm_head/kernel"


def state_at(step: int, mesh) -> TrainState:
    """Returns a state of one matrix, whose values depend on the step."""
    tx = make_optimizer(OptimConfig())
    shardings = parameter_shardings({PATH: jnp.zeros((16, 8))}, mesh)
    params = {PATH: jax.device_put(np.arange(128.0, dtype=np.float32).reshape(16, 8) + step, shardings[PATH])}
    opt_state = jax.jit(tx.init, out_shardings=optimizer_shardings(tx, params, mesh))(params)
    return TrainState(
        step=jax.device_put(jnp.int32(step), replicated(mesh)),
        key=jax.device_put(jax.random.key_data(jax.random.key(step)), replicated(mesh)),
        trainable=params,
        frozen={},
        opt_state=opt_state,
        ema={},
    )


def test_there_and_back_on_another_mesh(tmp_path, devices):
    saving, loading = (make_mesh(MeshConfig(data=1, fsdp=n), devices[:n]) for n in (8, 2))
    checkpoints = StageCheckpoints(tmp_path / "states", every=2, keep=2)
    assert checkpoints.restore(state_at(0, saving)) is None
    assert [step for step in range(1, 7) if checkpoints.due(step)] == [2, 4, 6]
    for step in (2, 4, 6):
        checkpoints.save(step, state_at(step, saving), {"data": {"step": step}, "meter": {"seconds": 1.5}})
    checkpoints.close()
    assert sorted(int(p.name) for p in (tmp_path / "states").iterdir()) == [4, 6]

    again = StageCheckpoints(tmp_path / "states", every=2, keep=2)
    state, place = again.restore(state_at(0, loading))
    again.close()
    assert place == {"data": {"step": 6}, "meter": {"seconds": 1.5}} and int(state.step) == 6
    np.testing.assert_array_equal(state.trainable[PATH], np.arange(128.0).reshape(16, 8) + 6)
    np.testing.assert_array_equal(state.key, jax.random.key_data(jax.random.key(6)))
    assert state.trainable[PATH].sharding == state_at(0, loading).trainable[PATH].sharding


def test_what_is_half_written_is_not_restored(tmp_path, devices):
    mesh = make_mesh(MeshConfig(data=1, fsdp=8), devices)
    checkpoints = StageCheckpoints(tmp_path / "states", every=1, keep=3)
    checkpoints.save(1, state_at(1, mesh), {})
    checkpoints.close()
    # orbax writes beside and renames; what a crash leaves is the name beside.
    (tmp_path / "states" / "2.orbax-checkpoint-tmp-0").mkdir()
    again = StageCheckpoints(tmp_path / "states", every=1, keep=3)
    state, _ = again.restore(state_at(0, mesh))
    again.close()
    assert int(state.step) == 1
