"""Candidates, the estimate, and the order of compilation. The compiler itself runs only to check memory."""

import dataclasses
import math

import jax
import pytest

from dreamllm_jax.aot import search as searching
from dreamllm_jax.aot.candidates import Candidate, grad_accum_options, meshes, remats
from dreamllm_jax.aot.estimate import Estimate, StageWork, estimate, mesh_costs, stage_work
from dreamllm_jax.aot.memory import DoesNotFit, Memory
from dreamllm_jax.aot.report import CompileReport
from dreamllm_jax.aot.roofline import Roofline
from dreamllm_jax.config.chips import CHIPS
from dreamllm_jax.config.model import RematConfig
from dreamllm_jax.config.overrides import apply_overrides
from dreamllm_jax.config.train import MeshConfig, build_recipe
from dreamllm_jax.models.parameters import abstract_params
from dreamllm_jax.sharding import make_mesh
from dreamllm_jax.train.flops import passes
from tests.aot.test_compile import LENGTH, ROWS, compiled_step, devices, recipe  # noqa: F401 (a fixture)

CHIP = CHIPS["v5e"]
LLAMA = recipe(MeshConfig(), ("llama",), trainable=("llama",))
JOINT = recipe(MeshConfig(), ("llama", "vision", "unet", "vae"), trainable=("llama", "dream_queries"))


def test_meshes_are_those_that_the_rows_and_the_parameters_allow():
    stage = LLAMA.stages[0]
    found = meshes(LLAMA, stage, abstract_params(LLAMA.model), jax.devices())
    sizes = {(c.data, c.fsdp, c.tensor, c.context) for c, _ in found}
    assert sizes == {(d, f, 8 // d // f, 1) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) if d * f <= 8}
    assert grad_accum_options(stage, make_mesh(MeshConfig(2, 1, 4))) == [1, 2, 4]
    replicated = {
        c.replicated for c, _ in meshes(JOINT, JOINT.stages[0], abstract_params(JOINT.model), jax.devices())
    }
    assert replicated == {(), ("vision", "unet", "vae")}  # frozen


def test_remat_varies_where_gradients_flow():
    """Gradients pass through the language model and the U-Net, not through the frozen tower before them."""
    towers = dict.fromkeys(("llama", "vision", "unet", "vae"), 1.0)
    found = remats(JOINT, StageWork(towers, passes(JOINT.model, JOINT.stages[0])))
    assert len(set(found)) == 25 and {r.vision for r in found} == {JOINT.model.remat.vision}


def test_overrides_say_what_the_candidate_is():
    stage = JOINT.stages[0]
    wanted = Candidate(
        MeshConfig(2, 4, replicated=("unet", "vae")), 2, RematConfig("dots", "none", "offload")
    )
    plain = apply_overrides(dataclasses.asdict(JOINT), wanted.overrides(stage))
    assert build_recipe(plain) == wanted.applied(JOINT, stage)[0] != JOINT


def test_the_state_is_exact():
    """Counts parameters, float32 moments and the batch: matrices and rows are sharded, vectors replicated."""
    stage, mesh = LLAMA.stages[0], make_mesh(MeshConfig(1, 4, 2))
    params = abstract_params(LLAMA.model)
    matrices, vectors = (
        math.fsum(math.prod(x.shape) for path, x in params.items() if path.endswith("scale") == is_vector)
        for is_vector in (False, True)
    )
    found = mesh_costs(LLAMA, stage, stage_work(LLAMA, stage), params, mesh)
    learning = 4 * (matrices / 8 + vectors)
    assert found.gradients == learning
    columns = 5 * 4 + 2 * 4  # the largest size of a token: integers, weights, slots
    assert 0 < found.state - 3 * learning < ROWS // 4 * (LENGTH * columns + 100)


def test_the_estimate_orders_memory_as_the_compiler_does(devices):  # noqa: F811
    """Estimates by remat policy and micro-batch are within a factor of two of the compiler."""
    base = recipe(MeshConfig(1, 4), ("llama",), trainable=("llama",))
    stage = dataclasses.replace(base.stages[0], data=dataclasses.replace(base.stages[0].data, batch_size=128))
    stage = dataclasses.replace(stage, data=dataclasses.replace(stage.data, length=128))
    base = dataclasses.replace(base, stages=(stage,))
    work_of_stage, params, mesh = (
        stage_work(base, stage),
        abstract_params(base.model),
        make_mesh(base.mesh, devices),
    )
    costs = mesh_costs(base, stage, work_of_stage, params, mesh)
    guessed, measured = [], []
    for policy, parts in (("none", 1), ("full", 1), ("none", 8)):
        changed = Candidate(base.mesh, parts, RematConfig(llama=policy)).applied(base, stage)
        guessed.append(estimate(*changed, work_of_stage, costs, mesh, CHIP))
        found, _ = compiled_step(changed[0], devices)
        measured.append(found)
    used = [f.memory.used for f in measured]
    assert sorted(used, reverse=True) == used
    memory = [e.memory() for e in guessed]
    assert sorted(memory, reverse=True) == memory
    assert all(0.5 < a / b < 2 for a, b in zip(memory, used, strict=True)), (memory, used)
    pairs = zip(guessed, measured, strict=True)
    assert all(0 < guess.seconds <= 1.1 * found.roofline.bound for guess, found in pairs)


@pytest.fixture
def four(monkeypatch):
    """Returns candidates with the given estimates; they differ in the number of micro-batches."""
    gib = 2.0**30
    first, second = RematConfig("none"), RematConfig("full")
    table = [(first, 1, 12, 1.0), (first, 2, 9, 1.1), (first, 4, 5, 1.2), (second, 1, 6, 1.5)]
    made = [
        (Candidate(MeshConfig(1, 4), parts, remat), Estimate(1 * gib, uncertain * gib, seconds, seconds))
        for remat, parts, uncertain, seconds in table
    ]
    monkeypatch.setattr(searching, "estimate_candidates", lambda *_: list(made))
    return [candidate for candidate, _ in made]


def run_search(results, number=10):
    """Runs a search in which the compiler returns `results`: (GiB, seconds) or an error."""

    def compiled(recipe, stage):
        result = results[recipe.model.remat.llama, stage.optim.grad_accum_steps]
        if isinstance(result, Exception):
            raise result
        memory = Memory({"temporaries": float(result[0]) * 2.0**30}, CHIP.hbm)
        found = object.__new__(CompileReport)  # with only the fields that a search reads
        object.__setattr__(found, "memory", memory)
        object.__setattr__(found, "roofline", Roofline({"compute": result[1]}, 1.0, 1.0))
        return found

    return searching.search(LLAMA, LLAMA.stages[0], [], CHIP, number, compiled, lambda line: None)


def test_the_search_learns_from_what_does_not_fit(four):
    """The first does not fit. The second is not tried: by the same factor it would not fit either."""
    found = run_search({("none", 1): DoesNotFit("no"), ("none", 4): (9, 1.25), ("full", 1): (5, 1.6)})
    assert [t.candidate for t in found.trials] == [four[0], four[2]]
    assert found.best.candidate == four[2] and not found.trials[0].fits
    assert found.trials[0].failure == "no" and found.candidates == 4


def test_the_search_goes_on_where_another_may_be_faster(four):
    """A candidate fits but takes more than estimated: the next with its remat policy will too, others not.

    An internal error of the compiler does not end the search.
    """
    fault = jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure\nmore")
    results = {("none", 1): fault, ("none", 2): (8, 2.0), ("full", 1): (6, 1.5)}
    found = run_search(results)
    assert [t.candidate for t in found.trials] == [four[0], four[1], four[3]]
    assert found.best.candidate == four[3]
    assert found.trials[0].failure == "INTERNAL: RET_CHECK failure"
    assert len(run_search(results, number=1).trials) == 1 and run_search(results, number=1).best is None
