"""ray_tpu.py with a stand-in for ray: tasks are processes of this machine, and resources are counted."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# One slice of three hosts. What is asked for is written down; cancel interrupts a task, as Ray's does.
RAY = """
import json, multiprocessing, os, signal, sys, time
from multiprocessing.connection import wait as first

CHIPS, SLICE, HOSTS = 4, "tpu-slice-a", 3
context = multiprocessing.get_context("fork")

class exceptions:
    class RayError(Exception): pass

def note(*what):
    with open(os.environ["RECORD"], "a") as file:
        file.write(json.dumps(what) + "\\n")

def init(address):
    if address != "auto": raise ConnectionError("nobody answers")
    note("init", address)

def cluster_resources():
    return {"CPU": 8, "TPU": 12, "TPU-v5p-24-head": 1, SLICE: HOSTS}

class Task:
    def __init__(self, function, *args):
        self.reader, writer = context.Pipe(duplex=False)
        self.process = context.Process(target=self.run, args=(writer, function, *args))
        self.process.start()
        writer.close()
    @staticmethod
    def run(writer, function, *args):
        # As in Ray's workers; under a shell's background job SIGINT would be ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            writer.send(function(*args))
        except KeyboardInterrupt:
            note("interrupted")

class Never:
    def __init__(self): self.reader, self.writer = context.Pipe(duplex=False)

class Actor:
    def __init__(self, kind, there): self.object, self.there = kind(), there
    @property
    def describe(self): return self
    def remote(self): return Task(self.object.describe) if self.there else Never()

class Remote:
    def __init__(self, what): self.what = what
    def options(self, **options):
        note("options", options)
        self.asked = options["resources"]
        return self
    def remote(self, *args):
        if isinstance(self.what, type):
            return Actor(self.what, set(self.asked) <= set(cluster_resources()))
        note("task", *args)
        return Task(self.what, *args)

remote = Remote

def wait(tasks, num_returns=1, timeout=None):
    if num_returns > 1:
        [task.process.join(timeout) for task in tasks]
        return tasks, []
    ready = first([task.reader for task in tasks], timeout)
    done = [task for task in tasks if task.reader in ready][:1]
    return done, [task for task in tasks if task not in done]

def get(task):
    try:
        return task.reader.recv()
    except EOFError:
        raise exceptions.RayError("the node died")

def cancel(task): os.kill(task.process.pid, signal.SIGINT)
def kill(actor): note("kill")
"""
TPU = """
import ray
def get_current_pod_name(): return ray.SLICE
def get_current_pod_worker_count(): return ray.HOSTS
def get_num_tpu_chips_on_node(): return ray.CHIPS
"""


class Ray:
    """A folder with the stand-in, in which ray_tpu.py is run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.record = folder, folder / "record.jsonl"
        package = folder / "site" / "ray"
        (package / "util" / "accelerators").mkdir(parents=True)
        (package / "__init__.py").write_text(RAY)
        (package / "util" / "accelerators" / "tpu.py").write_text(TPU)

    def launch(self, *args: str, site: str = "site", **variables: str) -> subprocess.CompletedProcess:
        environment = {"PATH": os.environ["PATH"], "RECORD": str(self.record)}
        environment |= {"PYTHONPATH": str(self.folder / site), **variables}
        command = [sys.executable, str(ROOT / "launch" / "ray_tpu.py"), *args]
        return subprocess.run(
            command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=60
        )

    def asked(self) -> list[list]:
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        return [json.loads(line) for line in lines]

    def refused(self, *args: str, **options: str) -> str:
        result = self.launch(*args, **options)
        lines = result.stderr.strip().splitlines()
        assert result.returncode == 1 and len(lines) == 1 and lines[0].endswith("."), result
        return lines[0]


@pytest.fixture
def ray(tmp_path) -> Ray:
    return Ray(tmp_path)


def test_every_host_runs_the_command(ray):
    (ray.folder / "tpu.env").write_text("# Why\nLIBTPU_INIT_ARGS=--a=1\nLIBTPU_INIT_ARGS=--b=2\n")
    words = ("bash", "-c", 'echo "$LIBTPU_INIT_ARGS in $PWD"')
    result = ray.launch("--type", "v5p-24", "--env", "tpu.env", "--", *words)
    assert result.returncode == 0, result
    assert result.stdout.count(f"--a=1 --b=2 in {ray.folder}\n") == 3
    assert result.stdout.startswith("Set by --env tpu.env:\n  LIBTPU_INIT_ARGS=--a=1 --b=2\n")
    asked = ray.asked()
    options = [what[1] for what in asked if what[0] == "options"]
    assert options == [
        {"num_cpus": 0, "resources": {"TPU-v5p-24-head": 1}},
        {"num_cpus": 0, "max_retries": 0, "resources": {"TPU": 4, "tpu-slice-a": 1}},
    ]
    assert [what[0] for what in asked].count("task") == 3 and asked[-1] == ["kill"]


def test_a_failure_ends_the_others(ray, tmp_path):
    """Two hosts wait and are interrupted: what runs there is asked to end.

    The first host fails when both others are there: an interrupt before that would find nothing to end.
    """
    script = f"""
    cd {tmp_path}
    if mkdir first 2>/dev/null; then until [ -e 1 -a -e 2 ]; do sleep 0.1; done; exit 5; fi
    trap 'touch ended.$$; exit' TERM
    if mkdir 1 2>/dev/null; then :; else mkdir 2; fi
    while :; do sleep 0.1; done
    """
    result = ray.launch("--type", "v5p-24", "--", "bash", "-c", script)
    assert result.returncode == 5, result
    assert len(list(tmp_path.glob("ended.*"))) == 2
    assert ray.asked().count(["interrupted"]) == 2


INTERRUPTED_EARLY = """
import os, signal, subprocess, sys, threading, time
sys.path.insert(0, sys.argv[1])
import ray_tpu

class SlowPopen(subprocess.Popen):
    def __init__(self, *args, **options):
        time.sleep(1)
        super().__init__(*args, **options)
        print(self.pid, flush=True)

subprocess.Popen = SlowPopen
signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    ray_tpu.run_on_host(["sleep", "600"], {}, ".")
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interrupt_while_the_command_starts_ends_it_too(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_EARLY, str(ROOT / "launch")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    pid, said = done.stdout.split()
    assert said == "interrupted" and not done.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_a_lost_host_and_restarts(ray, tmp_path):
    """The first time a host is lost (its task gives no answer), the second time all is well."""
    line = f"if mkdir {tmp_path}/lost 2>/dev/null; then kill -9 $PPID; sleep 0.5; fi"
    result = ray.launch("--type", "v5p-24", "--restarts", "1", "--", "bash", "-c", line)
    assert result.returncode == 0
    assert "A host was lost (the node died); restarts left: 1.\n" in result.stderr
    (tmp_path / "lost").rmdir()
    saved = f"if mkdir {tmp_path}/lost 2>/dev/null; then exit 143; else sleep 0.3; fi"
    result = ray.launch("--type", "v5p-24", "--restarts", "1", "--", "bash", "-c", saved)
    assert result.returncode == 0 and "(the command got a SIGTERM); restarts left: 1." in result.stderr
    (tmp_path / "lost").rmdir()
    result = ray.launch("--type", "v5p-24", "--", "bash", "-c", line)
    assert result.returncode == 1 and "and training resumes from its workdir" in result.stderr


def test_no_such_command(ray):
    result = ray.launch("--type", "v5p-24", "--", "no-such-command")
    assert result.returncode == 127 and "no-such-command cannot be started in" in result.stdout


def test_no_such_slice(ray):
    said = ray.refused("--type", "v5p-128", "--wait", "1", "--", "true")
    assert "No slice with TPU-v5p-128-head was free within 1 s; the cluster has TPU-v5p-24-head" in said


def test_dry_run_needs_no_ray(ray):
    words = ("python", "-m", "a module")
    result = ray.launch("--type", "v5p-128", "--dry-run", "--", *words, site="nowhere")
    assert result.returncode == 0 and shlex.split(result.stdout.splitlines()[-1]) == list(words)
    assert ray.asked() == []


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ("", "The following arguments are required: --type"),
        ("--type v5p-24", "The command is missing"),
        ("--type 4x4x4 -- true", "--type is '4x4x4'"),
        ("--type v5p-24 --wait 0 -- true", "--wait must be 1 or more"),
        ("--type v5p-24 --wait long -- true", "invalid int value: 'long'"),
        ("--type v5p-24 python x.py", "Unrecognized arguments: python x.py"),
        ("--type v5p-24 --env no.env -- true", "--env no.env cannot be read"),
        ("--type v5p-24 -- true --workdir=gs://b", "mount the bucket on every host"),
        ("--type v5p-24 --address far -- true", "no Ray cluster at --address far (nobody answers)"),
    ],
)
def test_declines_with_a_sentence(ray, args, sentence):
    assert sentence in ray.refused(*args.split()) and ray.asked() == []


def test_ray_is_missing(ray):
    (ray.folder / "nowhere" / "ray.py").parent.mkdir()
    (ray.folder / "nowhere" / "ray.py").write_text("raise ImportError('as if it were not there')")
    assert "ray is not installed; pip install" in ray.refused(
        "--type", "v5p-24", "--", "true", site="nowhere"
    )
