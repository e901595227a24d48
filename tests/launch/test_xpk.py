"""xpk.sh: what xpk is asked to do, as its parsers take it (src/xpk/parser of its repository)."""

import shlex

import pytest

SCRIPT = "xpk.sh"
WHERE = "--cluster c --zone z"
ASKED = "--cluster=c --zone=z"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (
            f"create-cluster {WHERE} --project p --type v5p-128 --slices 2 --spot",
            f"cluster create {ASKED} --project=p --tpu-type=v5p-128 --num-slices=2 --spot",
        ),
        (
            f"create-cluster {WHERE} --type v5p-128 --reservation r",
            f"cluster create {ASKED} --tpu-type=v5p-128 --num-slices=1 --reservation=r",
        ),
        (f"list {WHERE}", f"workload list {ASKED}"),
        (f"wait a {WHERE} --timeout 9", f"workload list {ASKED} --wait-for-job-completion=a --timeout=9"),
        (f"delete a {WHERE} --yes", f"workload delete {ASKED} --workload=a --force"),
        (f"delete-cluster {WHERE}", f"cluster delete {ASKED}"),
    ],
)
def test_asks_xpk(cluster, args, expected):
    """The dry run prints exactly what a real run does, and needs no xpk."""
    dry = cluster.launch(SCRIPT, *args.split(), "--dry-run")
    assert dry.returncode == 0 and cluster.asked() == []
    cluster.add("xpk", "sys.exit(125)")
    assert cluster.launch(SCRIPT, *args.split()).returncode == 125  # the exit code is xpk's
    (asked,) = cluster.asked()
    assert asked == ["xpk", *expected.split()] == shlex.split(dry.stdout)


def test_run(cluster):
    """The command reaches a shell on the hosts; words and settings arrive as they were."""
    (cluster.home / "tpu.env").write_text("LIBTPU_INIT_ARGS=--a=1\nLIBTPU_INIT_ARGS=--b=2\nX=3\n")
    cluster.add("xpk")
    options = (*WHERE.split(), "--type", "v5p-128", "--image", "r/i:1", "--env", "tpu.env")
    words = ("python", "-m", "m", "--replicated=('unet',)", "$HOME", "--flag")
    result = cluster.launch(SCRIPT, "run", "dream", *options, "--", *words)
    assert result.returncode == 0 and "LIBTPU_INIT_ARGS=--a=1 --b=2" in result.stderr
    (asked,) = cluster.asked()
    assert asked[1:3] == ["workload", "create"]
    assert asked[3:-1] == [
        *(ASKED.split()),
        *("--tpu-type=v5p-128", "--num-slices=1", "--workload=dream", "--docker-image=r/i:1"),
        *("--max-restarts=50", "--restart-on-user-code-failure"),
        "--termination-grace-period-seconds=300",
        *("--env=LIBTPU_INIT_ARGS=--a=1 --b=2", "--env=X=3"),
    ]
    folder, command = asked[-1].removeprefix("--command=").split(" && ")
    assert folder == "cd /opt/dreamllm_jax" and shlex.split(command) == list(words)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ("start", "'start' is not an action"),
        ("list --zone z", "--cluster is missing"),
        (f"list a {WHERE}", "list does not take the name of a run"),
        (f"run Dream {WHERE}", "'Dream' is not a valid name of a run"),
        (f"run a- {WHERE}", "'a-' is not a valid name of a run"),
        (f"run {'a' * 41} {WHERE}", "give up to 40"),
        (f"run a {WHERE} --type v5p-8 -- python", "--image is missing"),
        (f"run a {WHERE} --type v5p-8 --image i", "The command is missing"),
        (f"run a {WHERE} --image i -- python", "--type is missing"),
        (f"run a {WHERE} --image i --spot --type v5p-8 -- python", "--spot is for create-cluster"),
        (f"run a {WHERE} --type v5p-8 --image i --restarts no -- python", "--restarts is 'no'"),
        (f"run a {WHERE} --image i --type v5p-8 -- python --workdir=gs://b", "mount the bucket"),
        (f"wait a {WHERE} -- python", "wait does not take a command"),
        (f"wait a {WHERE} --env x.env", "--env is only for run"),
        (f"create-cluster {WHERE} --type v5p-8", "Give one of --spot"),
        (f"create-cluster {WHERE} --type v5p-8 --spot --on-demand", "Give one of --spot"),
    ],
)
def test_declines_with_a_sentence(cluster, args, sentence):
    cluster.add("xpk")
    assert sentence in cluster.refused(SCRIPT, *args.split())
