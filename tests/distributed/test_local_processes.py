"""launch/local_processes.sh: N processes with their variables and output; if one fails, all end."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "launch" / "local_processes.sh")


def launched(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    return subprocess.run(
        [SCRIPT, *arguments],
        cwd=ROOT,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_variables_and_lines():
    told = 'echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES: $JAX_PLATFORMS, $XLA_FLAGS"; printf "no end"'
    result = launched("2", "--devices", "3", "--", "bash", "-c", told, XLA_FLAGS="--xla_a=1")
    assert result.returncode == 0, result.stderr
    flags = "--xla_a=1 --xla_force_host_platform_device_count=3"
    expected = [line for i in range(2) for line in (f"[{i}] {i} of 2: cpu, {flags}", f"[{i}] no end")]
    assert sorted(result.stdout.splitlines()) == sorted(expected)


def test_one_that_fails_ends_the_others(tmp_path):
    """This includes a process that ignores SIGTERM, and its children."""
    code = (
        f"child={tmp_path}/child; if [ $JAX_PROCESS_ID = 0 ]; then until [ -s $child ]; do sleep 0.1; done; "
        'exit 7; fi; trap "" TERM; sleep 600 & echo $! >$child; wait'
    )
    begin = time.monotonic()
    result = launched("2", "--", "bash", "-c", code)
    assert result.returncode == 7 and time.monotonic() - begin < 60
    assert "process 0 of 2 ended with exit code 7; the others were ended." in result.stderr
    child = (tmp_path / "child").read_text().strip()
    found = subprocess.run(["ps", "-o", "stat=", "-p", child], capture_output=True, text=True).stdout
    assert found.strip()[:1] in ("", "Z"), found  # gone, or dead and not yet counted by who adopted it


def test_a_term_is_handed_on_and_waited_for(tmp_path):
    """The wait is as long as saving takes: here longer than the 3 s that follow a failure."""
    code = (
        f"cd {tmp_path}; trap 'sleep 5; touch saved.$JAX_PROCESS_ID; exit 143' TERM; touch $JAX_PROCESS_ID; "
    )
    process = subprocess.Popen(
        [SCRIPT, "2", "--", "bash", "-c", code + "while :; do sleep 0.1; done"], cwd=ROOT
    )
    while not ((tmp_path / "0").exists() and (tmp_path / "1").exists()):
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) == 143
    assert (tmp_path / "saved.0").exists() and (tmp_path / "saved.1").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "N, the number of processes, is ''; give 1 or more"),
        (("0", "--", "true"), "N, the number of processes, is '0'"),
        (("2", "--devices", "--", "true"), "--devices is '--'; give 1 or more"),
        (("2", "true"), "-- is missing before the command"),
        (("2", "--"), "The command is missing after --"),
    ],
)
def test_what_is_wrong_is_said(arguments, sentence):
    result = launched(*arguments)
    assert result.returncode == 1 and sentence in result.stderr and not result.stdout
    assert len(result.stderr.strip().splitlines()) == 1


def test_two_agree_and_an_error_of_one_ends_both(tmp_path):
    """The assertions are in agree.py. At its end one process fails while the other waits for it."""
    begin = time.monotonic()
    result = launched("2", "--", sys.executable, "-m", "tests.distributed.agree", str(tmp_path))
    measured = [line[:3] for line in result.stdout.splitlines() if line.endswith("] measured")]
    assert measured == ["[0]"]
    assert "[0] agreed" in result.stdout.splitlines(), result.stdout
    assert "[1] OSError: the disk is full" in result.stdout.splitlines()
    assert result.returncode == 1 and time.monotonic() - begin < 120
