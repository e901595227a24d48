"""Records how the 7B recipe's parameters and activations are sharded: `python -m tests.aot.goldens`.

Run it after an intended change of `sharding.py` or of a model's `constrain` calls, and review the difference.
"""

import json
from pathlib import Path
from unittest import mock

import jax
from jax.sharding import AbstractMesh, AxisType

from dreamllm_jax import sharding
from dreamllm_jax.config.recipe_files import load_recipe
from dreamllm_jax.data.packing import empty_batch
from dreamllm_jax.data.pipeline import row_layout
from dreamllm_jax.models.dreamllm import DreamLLMModule
from dreamllm_jax.models.parameters import abstract_params
from dreamllm_jax.train.objectives import loss_counts
from dreamllm_jax.train.step import loss_and_metrics

ROOT = Path(__file__).resolve().parents[2]
FILE = Path(__file__).with_name("shardings.json")
SIZES = {"data": 2, "fsdp": 4, "tensor": 2, "context": 2}
ROWS = 16


def shardings() -> dict[str, dict[str, str]]:
    """Returns the specs of all parameters by path, and of all constrained activations by axes and sizes."""
    recipe = load_recipe(str(ROOT / "configs" / "stage2.py"))
    types = (AxisType.Auto,) * len(SIZES)
    mesh = AbstractMesh(tuple(SIZES.values()), tuple(SIZES), axis_types=types)
    params = abstract_params(recipe.model)
    parameters = {
        path: _written(sharding.parameter_spec(path, x.shape, mesh)) for path, x in sorted(params.items())
    }
    pinned: dict[str, str] = {}
    spec_of = sharding.activation_spec

    def record(axes, shape, mesh):
        spec = spec_of(axes, shape, mesh)
        sizes = " ".join(f"{axis or '-'}:{size}" for axis, size in zip(axes, shape, strict=True))
        pinned[sizes] = _written(spec)
        return spec

    stage = recipe.stages[0]
    batch = empty_batch(ROWS, row_layout(stage.data, recipe.model, null_dream=False), pad=0)

    def loss(params, batch):
        keys = jax.random.split(jax.random.key(0), ROWS)
        model = DreamLLMModule(recipe.model)
        return loss_and_metrics(params, {}, batch, keys, loss_counts(batch), model, stage)

    with mock.patch.object(sharding, "activation_spec", record), jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(loss, params, batch)
    return {"parameters": parameters, "activations": dict(sorted(pinned.items()))}


def _written(spec: jax.sharding.PartitionSpec) -> str:
    return ", ".join("+".join(sharding.mesh_axes(entry)) or "-" for entry in spec) or "replicated"


if __name__ == "__main__":
    FILE.write_text(json.dumps(shardings(), indent=1) + "\n", encoding="utf-8")
