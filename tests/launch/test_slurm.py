"""slurm.sbatch, with stand-ins for srun, scancel and scontrol; a copy of the file is run, as SLURM does."""

import re
import shutil
import signal
import subprocess
import time

import pytest

from tests.launch.conftest import ROOT, Cluster

# srun runs the command once, as the tasks would; scancel asks it to end, and being queued again ends it.
SRUN = """
import subprocess, pathlib
words = sys.argv[1:]
while words[0].startswith("--"):
    del words[0]
child = subprocess.Popen(words)
pathlib.Path({pid!r}).write_text(str(child.pid))
sys.exit(child.wait() % 256)
"""
KILL = """
import contextlib, signal
with contextlib.suppress(ProcessLookupError):
    os.kill(int(open({pid!r}).read()), signal.{name})
"""


@pytest.fixture
def slurm(cluster: Cluster, tmp_path) -> Cluster:
    """The script in SLURM's folder (launch.root / launch), and the clone from which it was submitted."""
    shutil.copytree(
        ROOT / "launch", tmp_path / "clone" / "launch", ignore=shutil.ignore_patterns("__pycache__")
    )
    (tmp_path / "spool" / "launch").mkdir(parents=True)
    cluster.root = tmp_path / "spool"
    shutil.copy(ROOT / "launch" / "slurm.sbatch", cluster.root / "launch")
    pid = str(tmp_path / "pid")
    cluster.add("srun", SRUN.format(pid=pid))
    cluster.add("scancel", KILL.format(pid=pid, name="SIGTERM"))
    cluster.add("scontrol", KILL.format(pid=pid, name="SIGKILL"))
    return cluster


@pytest.fixture
def job(tmp_path) -> dict[str, str]:
    return {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path / "clone")}


def test_runs_the_command_on_all_tasks(slurm, job, tmp_path):
    (slurm.home / "gpu.env").write_text("XLA_FLAGS=--a=1\nXLA_FLAGS=--b=2\n")
    line = 'echo "$XLA_FLAGS in $PWD"; exit 9'
    result = slurm.launch("slurm.sbatch", "--env", "gpu.env", "--", "bash", "-c", line, **job)
    assert result.returncode == 9 and result.stdout == f"--a=1 --b=2 in {tmp_path / 'clone'}\n"
    assert "Set by --env gpu.env:\n  XLA_FLAGS=--a=1 --b=2\n" in result.stderr
    (asked,) = slurm.asked()
    assert asked[:4] == ["srun", "--kill-on-bad-exit=1", "--gpu-bind=none", "--cpu-bind=none"]
    assert asked[4:] == ["env", "XLA_FLAGS=--a=1 --b=2", "bash", "-c", line]


@pytest.mark.parametrize(("ends", "again"), [("exit 143", True), ("exit 0", False), ("", True)])
def test_queued_again_when_its_time_is_over(slurm, job, ends, again, tmp_path):
    """Requeues unless the training ended normally; a training that ignores SIGTERM is killed."""
    line = f"trap '{ends}' TERM; echo begun; while :; do sleep 0.1; done"
    script = [str(slurm.root / "launch" / "slurm.sbatch"), "--grace", "2", "--", "bash", "-c", line]
    path = {"PATH": f"{slurm.bin}:/usr/bin:/bin", "HOME": str(slurm.home)}
    with subprocess.Popen(
        ["bash", *script], env={**path, **job}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGUSR1)
        said = process.communicate(timeout=30)[1]
    assert process.returncode == 0, said
    asked = [words for words in slurm.asked() if words[0] != "srun"]
    assert asked == [["scancel", "--signal=TERM", "7"]] + again * [["scontrol", "requeue", "7"]]


def test_dry_run_needs_no_slurm(slurm, tmp_path):
    variables = {"SLURM_SUBMIT_DIR": str(tmp_path / "clone"), "PATH": "/usr/bin:/bin"}
    result = slurm.launch("slurm.sbatch", "--dry-run", "--", "python", "-m", "a module", **variables)
    python = tmp_path / "clone" / ".venv" / "bin" / "python"
    assert result.returncode == 0
    assert (
        result.stdout == f"srun --kill-on-bad-exit=1 --gpu-bind=none --cpu-bind=none {python} -m 'a module'\n"
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "The command is missing"),
        ("python x.py", "'python' is unknown"),
        ("--grace long -- true", "--grace is 'long'"),
        ("--env no.env -- python", "--env no.env cannot be read"),
        ("-- python", ".venv/bin/python; launch/install.sh cuda creates it"),
        ("-- true --workdir=gs://b/run", "mount the bucket"),
    ],
)
def test_declines_with_a_sentence(slurm, job, words, sentence):
    assert sentence in slurm.refused("slurm.sbatch", *words.split(), **job)


def test_declines_outside_of_slurm(slurm, job, tmp_path):
    del job["SLURM_JOB_ID"]
    assert "This is not a job of SLURM" in slurm.refused("slurm.sbatch", "--", "true", **job)
    elsewhere = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7"}
    said = slurm.refused("slurm.sbatch", "--", "true", **elsewhere)
    assert f"There is no {tmp_path}/launch/cluster.sh; submit it from" in said


def test_what_sbatch_is_told():
    """sbatch stops reading at the first line of commands; nothing there belongs to one cluster."""
    text = (ROOT / "launch" / "slurm.sbatch").read_text()
    head = re.split(r"^[^#\n]", text, maxsplit=1, flags=re.M)[0]
    found = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", head, re.M))
    assert len(found) == text.count("#SBATCH --") >= 9
    assert not {"account", "partition", "qos", "time", "nodelist", "mail-user"} & set(found)
    assert found["gpus-per-node"] == found["ntasks-per-node"] and found["signal"] == "B:USR1@300"
    assert "requeue" in found and found["open-mode"] == "append"
