"""gke_jobset.yaml: its form is that of a JobSet, the numbers fit the slice, the training can be started."""

import copy
import math
from pathlib import Path

import jsonschema
import pytest
import yaml

from dreamllm_jax.config.recipe_files import load_recipe
from tests.launch.jobset_schema import JOBSET

ROOT = Path(__file__).resolve().parents[2]
CHIPS_PER_HOST = 4  # v5p, cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus: ct5p-hightpu-4t


@pytest.fixture(scope="module")
def jobset() -> dict:
    return yaml.safe_load((ROOT / "launch" / "gke_jobset.yaml").read_text())


def slice_of(jobset: dict) -> tuple[dict, dict, dict, dict]:
    """Its replicated job, the Job, the Pod and the container."""
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    return replicated, job, pod, container


def test_form(jobset):
    jsonschema.Draft202012Validator.check_schema(JOBSET)
    jsonschema.validate(jobset, JOBSET)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "replicas"), 1),
        (("spec", "replicatedJobs", 0, "template", "spec", "completion"), 16),
        (("spec", "replicatedJobs", 0, "template", "spec", "completions"), "16"),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "restartPolicy"), "Always"),
        (("spec", "failurePolicy", "maxRestarts"), -1),
        (("spec", "failurePolicy", "rules", 0, "action"), "Fail"),
        (("apiVersion",), "jobset.x-k8s.io/v1alpha1"),
    ],
)
def test_the_schema_refuses(jobset, path, value):
    wrong = copy.deepcopy(jobset)
    place = wrong
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, JOBSET)


def test_the_pods_fill_the_slices(jobset):
    replicated, job, pod, container = slice_of(jobset)
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert container["resources"]["limits"]["google.com/tpu"] == CHIPS_PER_HOST
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelism"]
    assert job["completions"] * CHIPS_PER_HOST == chips == 64
    words = dict(word.split("=", 1) for word in container["args"])
    recipe = load_recipe(str(ROOT / words["--config"]), [])
    split = recipe.mesh.fsdp * recipe.mesh.tensor * recipe.mesh.context
    assert recipe.mesh.data == -1 and replicated["replicas"] * chips % split == 0
    (stage,) = recipe.stages
    assert stage.data.batch_size % (replicated["replicas"] * chips * stage.optim.grad_accum_steps) == 0


def test_restarts(jobset):
    """All hosts start again or none: neither a Pod nor its Job does so alone."""
    _, job, pod, _ = slice_of(jobset)
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 50


def test_what_was_asked_for_wrongly_is_not_started_again(jobset):
    """Exit code 2 means an invalid recipe: the Pod fails its Job, and the JobSet is not restarted."""
    _, job, _, container = slice_of(jobset)
    (rule,) = job["podFailurePolicy"]["rules"]
    codes = {"containerName": container["name"], "operator": "In", "values": [2]}
    assert rule == {"action": "FailJob", "onExitCodes": codes}
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}


def test_references(jobset):
    """What is mounted is declared, ports differ, and workdir, recipe and cache lie in the shared volume."""
    _, _, pod, container = slice_of(jobset)
    assert {mount["name"] for mount in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}
    ports = [port["containerPort"] for port in container["ports"]]
    assert len(set(ports)) == len(ports) and {8471, 8482} <= set(ports)
    (mount,) = container["volumeMounts"]
    environment = {one["name"]: one["value"] for one in container["env"]}
    assert environment["JAX_COMPILATION_CACHE_DIR"].startswith(mount["mountPath"] + "/")
    assert any(word.startswith(f"--workdir={mount['mountPath']}/") for word in container["args"])


def test_the_training_takes_its_arguments(jobset):
    *_, container = slice_of(jobset)
    assert container["command"] == ["python", "-m", "dreamllm_jax.train"]
    arguments = dict(word[2:].split("=", 1) for word in container["args"])
    assert set(arguments) - {"config", "workdir"} == {key for key in arguments if key.startswith("config.")}
    overrides = [word for word in container["args"] if word.startswith("--config.")]
    recipe = load_recipe(str(ROOT / arguments["config"]), overrides)
    assert (
        recipe.mesh.replicated == ("unet", "vae", "vision") and recipe.stages[0].optim.grad_accum_steps == 4
    )
    assert recipe.init_from is not None and recipe.init_from.startswith("/runs/models/")
