"""Cloud TPU: what gcloud is asked to do, and what becomes of it on the hosts (folders of this machine)."""

import shlex

import pytest

QUEUED = "tpu_queued_resource.sh"
RUN = "tpu_vm_run.sh"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (
            "create dream --zone z --type v5p-128 --spot",
            "create dream --zone=z --accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5 "
            "--node-id=dream --spot",
        ),
        (
            "create dream --zone z --project p --type v5litepod-256 --slices 2 --reserved --within 6h",
            "create dream --zone=z --project=p --accelerator-type=v5litepod-256 "
            "--runtime-version=v2-alpha-tpuv5-lite --node-count=2 --node-prefix=dream --reserved "
            "--valid-until-duration=6h",
        ),
        ("describe dream --zone z", "describe dream --zone=z"),
        ("delete dream --zone z", "delete dream --zone=z --force"),
        ("delete dream --zone z --yes", "delete dream --zone=z --force --quiet"),
    ],
)
def test_queued_resource_asks_gcloud(cluster, args, expected):
    """The dry run prints exactly what a real run does, needs no gcloud, and does nothing."""
    dry = cluster.launch(QUEUED, *args.split(), "--dry-run", PATH="/bin:/usr/bin")
    assert dry.returncode == 0 and cluster.asked() == []
    cluster.add("gcloud")
    assert cluster.launch(QUEUED, *args.split()).returncode == 0
    (asked,) = cluster.asked()
    assert asked == ["gcloud", "compute", "tpus", "queued-resources", *expected.split()]
    assert shlex.split(dry.stdout) == asked


def states(cluster, *given: str) -> None:
    """A gcloud whose request is in these states, one at each look."""
    cluster.add("gcloud", f"print({given!r}[sum(1 for _ in open({str(cluster.record)!r})) - 1])")


def test_waits_until_active(cluster):
    states(cluster, "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "never asked for")
    result = cluster.launch(QUEUED, "wait", "dream", "--zone", "z", "--poll", "1")
    assert result.returncode == 0 and len(cluster.asked()) == 3
    assert result.stdout.split() == "dream: WAITING_FOR_RESOURCES dream: PROVISIONING dream: ACTIVE".split()


def test_waiting_ends_where_nothing_will_come(cluster):
    states(cluster, "PROVISIONING", "SUSPENDED")
    result = cluster.launch(QUEUED, "wait", "dream", "--zone", "z", "--poll", "1")
    assert result.returncode == 1 and "dream is SUSPENDED" in result.stderr and "workdir" in result.stderr
    states(cluster, *["PROVISIONING"] * 9)
    result = cluster.launch(QUEUED, "wait", "dream", "--zone", "z", "--poll", "1", "--timeout", "1")
    assert result.returncode == 1 and "is still PROVISIONING" in result.stderr
    cluster.add("gcloud", "sys.exit('no permission')")
    result = cluster.launch(QUEUED, "wait", "dream", "--zone", "z")
    assert result.returncode == 1 and "no permission" in result.stderr and "cannot describe" in result.stderr


@pytest.mark.parametrize(
    ("script", "args", "sentence"),
    [
        (QUEUED, "", "'' is not an action"),
        (QUEUED, "create --zone z --type v5p-8", "the NAME of the request is missing"),
        (QUEUED, "create a --type v5p-8", "--zone is missing"),
        (QUEUED, "create a --zone --type v5p-8", "--zone has no value"),
        (QUEUED, "create a --zone z", "--type is missing"),
        (QUEUED, "create a --zone z --type v9-8", "name it with --runtime"),
        (QUEUED, "create a --zone z --type v5p-8 --spot --reserved", "exclude each other"),
        (QUEUED, "create a --zone z --type v5p-8 --slices 0", "--slices is '0'"),
        (QUEUED, "create a b --zone z", "'b' comes after the name a"),
        (QUEUED, "create a --zone z --spoot", "--spoot is unknown"),
        (RUN, "fly a --zone z", "'fly' is not an action"),
        (RUN, "run a --zone z", "The command is missing"),
        (RUN, "run a --zone z python x.py", "comes after --"),
        (RUN, "stop a --zone z -- python", "stop does not take a command"),
        (RUN, "run a --zone z --env nowhere.env -- python", "--env nowhere.env cannot be read"),
        (RUN, "run a --zone z -- python --workdir=gs://b/run", "mount the bucket"),
        (RUN, "run a --zone z -- python --workdir gs://b/run", "mount the bucket"),
    ],
)
def test_declines_with_a_sentence(cluster, script, args, sentence):
    cluster.add("gcloud")
    assert sentence in cluster.refused(script, *args.split())


def test_gcloud_is_missing(cluster):
    """On a PATH with nothing but what the shell needs."""
    for tool in ("env", "bash"):
        (cluster.bin / tool).symlink_to(f"/usr/bin/{tool}")
    sentence = cluster.refused(QUEUED, "describe", "a", "--zone", "z", PATH=str(cluster.bin))
    assert "gcloud is not installed" in sentence and "--dry-run" in sentence


@pytest.mark.parametrize(
    "script", [QUEUED, RUN, "job.sh", "install.sh", "preflight.sh", "xpk.sh", "slurm.sbatch"]
)
def test_help(cluster, script):
    result = cluster.launch(script, "--help")
    assert result.returncode == 0 and f"launch/{script}" in result.stdout and not result.stderr


def test_preflight_on_every_host(cluster):
    cluster.add("gcloud")
    words = ("--", "--workdir", "/mnt/my runs")
    assert cluster.launch(RUN, "preflight", "dream", "--zone", "z", *words).returncode == 0
    (asked,) = cluster.asked()
    line = "cd dreamllm_jax && launch/preflight.sh --platform tpu --workdir '/mnt/my runs'"
    assert asked[5:] == ["dream", "--zone=z", "--worker=all", f"--command={line}"]
