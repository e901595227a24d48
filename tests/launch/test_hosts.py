"""tpu_vm_run.sh from end to end: gcloud is a stand-in that takes folders of this machine for the hosts."""

import os
import shutil
import signal
import subprocess
import time

import pytest

from tests.launch.conftest import ROOT, Cluster

# scp puts the archive into the home of each host; ssh runs the line there, as the shell of a login would.
GCLOUD = """
import pathlib, shutil, subprocess
hosts = pathlib.Path({hosts!r})
verb = sys.argv[4]
given = dict(word.split("=", 1) for word in sys.argv[5:] if word.startswith("--"))
slice_name, to = (sys.argv[6].split(":") if verb == "scp" else (sys.argv[5], ""))
workers = sorted(hosts.glob(slice_name + ".*")) if given["--worker"] == "all" else [
    hosts / (slice_name + "." + given["--worker"])]
codes = []
for home in workers:
    if verb == "scp":
        shutil.copy(sys.argv[5], home / to)
    else:
        environment = {{"PATH": os.environ["PATH"], "HOME": str(home)}}
        codes.append(subprocess.run(["bash", "-c", given["--command"]], env=environment, cwd=home).returncode)
sys.exit(max(codes, default=0))
"""
INSTALL = """#!/usr/bin/env bash
echo "installs $* with $PYTHON"
cd "${0%/*}/.." && mkdir -p .venv/bin && ln -sf "$(command -v "$PYTHON")" .venv/bin/python
"""
ZONE = ("--zone", "z")


@pytest.fixture
def pod(cluster: Cluster, tmp_path) -> Cluster:
    """Two slices of two hosts, and a clone of the repository with launch/ and a stand-in for pip."""
    if shutil.which("setsid") is None or shutil.which("git") is None:
        pytest.skip("the hosts of TPUs run Linux, and the repository is packed by git")
    for name in ("dream.0", "dream.1", "pair-0.0", "pair-1.0"):
        (tmp_path / "hosts" / name).mkdir(parents=True)
    cluster.root = tmp_path / "clone"
    shutil.copytree(ROOT / "launch", cluster.root / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    (cluster.root / "launch" / "install.sh").write_text(INSTALL)
    (cluster.root / "launch" / "gone").write_text("git knows it, the folder has it no longer")
    (cluster.root / ".gitignore").write_text("/.venv\n/secret\n")
    (cluster.root / "secret").write_text("stays at home")
    for line in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *line], cwd=cluster.root, check=True, timeout=30)
    (cluster.root / "launch" / "gone").unlink()
    (cluster.root / "new file.py").write_text("import sys, os; print('ran', sys.argv[1:], os.getcwd())\n")
    cluster.add("gcloud", GCLOUD.format(hosts=str(tmp_path / "hosts")))
    cluster.add("python3.11", "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])")
    return cluster


def test_run_brings_the_repository_and_gives_the_exit_code(pod, tmp_path):
    """What is not committed travels too, what git ignores does not; words stay as they are."""
    code = "import sys, os; print(os.environ['XLA_FLAGS'], sys.argv[1:]); sys.exit(7)"
    (pod.home / "two.env").write_text("# Why\nXLA_FLAGS=--a=1\n\nXLA_FLAGS=--b=2\n")
    words = ("python", "-c", code, "two words", "$HOME")
    result = pod.launch("tpu_vm_run.sh", "run", "dream", *ZONE, "--env", "two.env", "--", *words)
    assert result.returncode == 7, result
    assert "--a=1 --b=2 ['two words', '$HOME']" in result.stdout
    assert "Set by --env two.env:\n  XLA_FLAGS=--a=1 --b=2\n" in result.stderr
    for name in ("dream.0", "dream.1"):
        home = tmp_path / "hosts" / name
        assert (home / "dreamllm_jax" / "new file.py").exists()
        assert not (home / "dreamllm_jax" / "secret").exists()
        assert not (home / "dreamllm_jax" / "launch" / "gone").exists()
        assert (home / ".dreamllm_jax" / "train" / "exit").read_text() == "7\n"
    assert result.stdout.count("installs tpu with python3.1") == 2
    status = pod.launch("tpu_vm_run.sh", "status", "dream", *ZONE)
    assert status.returncode == 0 and status.stdout.count("train ended with exit code 7.") == 2


def test_stop_ends_what_runs_on_every_host_of_every_slice(pod, tmp_path):
    pair = ("pair", *ZONE, "--slices", "2", "--name", "nap")
    assert pod.launch("tpu_vm_run.sh", "setup", *pair).returncode == 0
    start = pod.launch("tpu_vm_run.sh", "start", *pair, "--", "bash", "-c", "echo awake; sleep 300 & wait")
    assert start.returncode == 0 and start.stdout.count("started nap") == 2, start
    again = pod.launch("tpu_vm_run.sh", "start", *pair, "--", "true")
    assert again.returncode == 1 and "The job nap is already running" in again.stderr
    assert pod.launch("tpu_vm_run.sh", "status", *pair).stdout.count("nap is running (process") == 2
    stop = pod.launch("tpu_vm_run.sh", "stop", *pair)
    assert stop.returncode == 0 and stop.stdout.count("nap ended with exit code 143.") == 2, stop
    logs = pod.launch("tpu_vm_run.sh", "logs", *pair)
    assert logs.returncode == 143 and "awake" in logs.stdout
    # A host that was restarted knows the process's number no longer.
    folder = tmp_path / "hosts" / "pair-0.0" / ".dreamllm_jax" / "nap"
    (folder / "exit").unlink()
    (folder / "boot").write_text("another\n")
    assert "nap is lost" in pod.launch("tpu_vm_run.sh", "status", *pair).stdout
    lost = pod.launch("tpu_vm_run.sh", "logs", *pair)
    assert lost.returncode == 1 and "is lost: the host was restarted" in lost.stderr


def test_a_host_that_fails_is_reported(pod, tmp_path):
    """No python and no apt-get on one host: the installation fails, and nothing is started."""
    (tmp_path / "hosts" / "dream.1" / "dreamllm_jax").write_text("a file where the folder should be")
    result = pod.launch("tpu_vm_run.sh", "run", "dream", *ZONE, "--", "true")
    assert result.returncode == 1 and "dream: it failed on some hosts" in result.stderr
    assert not (tmp_path / "hosts" / "dream.0" / ".dreamllm_jax").exists()


def test_dry_run_touches_nothing(pod, tmp_path):
    result = pod.launch(
        "tpu_vm_run.sh", "run", "pair", *ZONE, "--slices", "2", "--dry-run", "--", "python", "x.py"
    )
    assert result.returncode == 0 and pod.asked() == [] and not result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("gcloud ")]
    assert [line.split()[4] for line in lines] == ["scp", "scp", "ssh", "ssh", "ssh", "ssh", "ssh"]
    assert lines[-1].split()[5] == "pair-0" and "--worker=0" in lines[-1]
    assert not any((tmp_path / "hosts" / "pair-0.0").iterdir())


def test_a_job_that_saves_when_asked_to_end(cluster):
    """Until it has saved it runs, and no second one may begin; then its own exit code is told."""
    if shutil.which("setsid") is None:
        pytest.skip("hosts of TPUs run Linux")
    saves = "trap 'sleep 2; echo saved; exit 9' TERM; while :; do sleep 0.1; done"
    assert cluster.launch("job.sh", "start", "nap", "--", "bash", "-c", saves).returncode == 0
    pid = int((cluster.home / ".dreamllm_jax" / "nap" / "pid").read_text())
    os.killpg(pid, signal.SIGTERM)
    time.sleep(0.5)
    assert "nap is running" in cluster.launch("job.sh", "status", "nap").stdout
    assert "is already running" in cluster.launch("job.sh", "start", "nap", "--", "true").stderr
    assert "nap ended with exit code 9" in cluster.launch("job.sh", "stop", "nap").stdout
    assert "saved" in (cluster.home / ".dreamllm_jax" / "nap" / "log").read_text()


def test_job_dry_run(cluster):
    """A dry run prints the shell line that would be started, and starts nothing."""
    (cluster.home / "a.env").write_text("X=two words\n")
    words = ("start", "nap", "--env", "a.env", "--dry-run", "--", "echo", "it's")
    result = cluster.launch("job.sh", *words)
    assert result.returncode == 0 and not (cluster.home / ".dreamllm_jax").exists()
    assert result.stdout.endswith(
        """&& env 'X=two words' echo 'it'\\''s' >>%s 2>&1 &\n"""
        % (cluster.home / ".dreamllm_jax" / "nap" / "log")
    )


def test_install_dry_run(cluster):
    """The pins are those of the Python that would be used."""
    cluster.add("python3", "if 'version_info' in sys.argv[-1]: print('312')")
    result = cluster.launch("install.sh", "cuda", "--dry-run")
    assert result.returncode == 0
    assert "install --constraint launch/constraints/py312.txt --editable '.[cuda]'" in result.stdout
    assert "give --dry-run or nothing after tpu" in cluster.refused("install.sh", "tpu", "--now")
    assert "give runtime, tpu or cuda" in cluster.refused("install.sh", "gpu")
