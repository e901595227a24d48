"""Runs a command once on every host of a TPU slice of a Ray cluster:

python launch/ray_tpu.py --type v5p-128 [options] -- python -m dreamllm_jax.train --config=... --workdir=...

Ray gives the first host of a slice the resource TPU-v5p-128-head, and each of its hosts a resource with the
slice's name (ray._private.accelerators.tpu). An actor on the first host reserves the slice and reports its
name and its number of hosts. Each host then gets one task, which asks for the name and for all chips. If a
command fails, the others are ended and its exit code is this script's. For several slices as one program use
tpu_vm_run.sh, xpk.sh or GKE.

Every host needs the repository in the same folder, and a `python` with its packages (the image of
launch/Dockerfile.tpu, with ray). This project does not depend on ray: pip install ray, or run on a Ray node.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

JOINED = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # may have several lines in a file of launch/env
SECONDS_TO_END = 300  # a checkpoint may be written
PREEMPTED = 128 + signal.SIGTERM  # a training run that saved its state after a SIGTERM


class SliceHead:
    """The actor that holds a slice's head; methods run on its first host."""

    def describe(self) -> tuple[str | None, int | None, int]:
        """Returns the slice's name, the number of its hosts, and the chips on each."""
        from ray.util.accelerators import tpu  # pyright: ignore[reportMissingImports]

        chips = tpu.get_num_tpu_chips_on_node()
        return tpu.get_current_pod_name(), tpu.get_current_pod_worker_count(), chips


def run_on_host(command: list[str], settings: dict[str, str], folder: str) -> int:
    """Runs the command on this host, passes its output on, and returns its exit code.

    Ray cancels a task by a KeyboardInterrupt: the command and its children get SIGTERM, and later SIGKILL.
    """
    with ThreadPoolExecutor(max_workers=1) as starter:
        # An interrupt within Popen would lose the process that Popen has started; another thread gets none.
        starting = starter.submit(
            subprocess.Popen,
            command,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **settings},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            if isinstance(error := starting.exception(), OSError):  # no such command or folder on this host
                print(f"{command[0]} cannot be started in {folder}: {error.strerror}.", flush=True)
                return 127
            process = starting.result()
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
            code = process.wait()
        except KeyboardInterrupt:
            _end(starting.result())
            raise
    return code if code >= 0 else 128 - code


def _end(process: subprocess.Popen) -> None:
    """Ends a command and its children, by SIGKILL if they do not end after a SIGTERM."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def read_settings(path: str) -> dict[str, str]:
    """Returns the settings of a file of launch/env, and prints them.

    Raises:
      ValueError: the file cannot be read, a line is not NAME=VALUE, or a setting is repeated.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise ValueError(f"--env {path} cannot be read ({error.strerror}); see launch/env.") from error
    settings: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line or line.startswith("#"):
            continue
        found = re.fullmatch(r"([A-Z][A-Z0-9_]*)=(.+)", line)
        if found is None:
            raise ValueError(f"{path}, line {number}, is not NAME=VALUE: {line}.")
        name, value = found.groups()
        if name in settings and name not in JOINED:
            raise ValueError(
                f"{path}, line {number}, sets {name} again; only {' and '.join(JOINED)} may be repeated."
            )
        settings[name] = f"{settings[name]} {value}" if name in settings else value
    print(f"Set by --env {path}:", *(f"  {name}={value}" for name, value in settings.items()), sep="\n")
    return settings


def parse(words: list[str]) -> argparse.Namespace:
    """Returns the options, with `command` as a list of words.

    Raises:
      ValueError: the command is missing, the type is unknown, or the workdir is a bucket's address.
    """
    own, command = (words, []) if "--" not in words else split_at(words, words.index("--"))
    parser = argparse.ArgumentParser(
        prog="launch/ray_tpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--type", required=True, help="v5p-128 is v5p:4x4x4; as Ray names it: TPU-v5p-128-head"
    )
    parser.add_argument("--address", default="auto", help="the Ray cluster (default: the one of this host)")
    parser.add_argument(
        "--env", help="settings for the command, such as launch/env/tpu_v5p.env; printed first"
    )
    parser.add_argument(
        "--folder", default=os.getcwd(), help="the repository on the hosts (default: as here)"
    )
    parser.add_argument(
        "--wait", type=int, default=600, help="seconds to wait for a free slice (default 600)"
    )
    parser.add_argument(
        "--restarts", type=int, default=0, help="restarts after the loss of a host (default 0)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be asked of Ray")
    parser.error = complain  # type: ignore[method-assign]
    options = parser.parse_args(own)
    if not command:
        raise ValueError("The command is missing; give it after --, see launch/ray_tpu.py --help.")
    if not re.fullmatch(r"v\d+[a-z]*-\d+", options.type):
        raise ValueError(f"--type is '{options.type}'; give one such as v5p-128, v5litepod-256 or v6e-256.")
    if options.wait < 1 or options.restarts < 0:
        raise ValueError("--wait must be 1 or more and --restarts 0 or more.")
    for before, word in zip(["", *command], command, strict=False):
        if word.startswith("--workdir=") or before == "--workdir":
            if "://" in word:
                raise ValueError(
                    f"{word} is a bucket's address; mount the bucket on every host, and give its folder."
                )
    options.command = command
    return options


def split_at(words: list[str], index: int) -> tuple[list[str], list[str]]:
    return words[:index], words[index + 1 :]


def complain(message: str) -> None:
    """Reports argparse's errors as the script's own."""
    raise ValueError(f"{message[0].upper()}{message[1:]}; see launch/ray_tpu.py --help.")


def take_slice(ray: Any, options: argparse.Namespace) -> tuple[Any, str, int, int]:
    """Returns the actor that holds a slice, the slice's name, its number of hosts, and the chips on each.

    Raises:
      ValueError: no slice of the type becomes free in time, or Ray cannot describe it.
    """
    resource = f"TPU-{options.type}-head"
    head = ray.remote(SliceHead).options(num_cpus=0, resources={resource: 1}).remote()
    description = head.describe.remote()
    ready, _ = ray.wait([description], timeout=options.wait)
    if not ready:
        ray.kill(head)
        known = sorted(name for name in ray.cluster_resources() if re.fullmatch("TPU-.*-head", name))
        raise ValueError(
            f"No slice with {resource} was free within {options.wait} s; the cluster has "
            f"{', '.join(known) or 'no slices'}; wait longer with --wait, or add one."
        )
    name, hosts, chips = ray.get(description)
    if not name or not hosts or not chips:
        ray.kill(head)
        raise ValueError(
            f"Ray cannot describe the slice of {resource} (name {name}, {hosts} hosts, {chips} chips)."
        )
    return head, name, hosts, chips


def run_once(ray: Any, options: argparse.Namespace, settings: dict[str, str]) -> int:
    """Runs the command on all hosts of a free slice; returns the first exit code that is not 0, or 0.

    Raises:
      ray.exceptions.RayError: a host was lost.
    """
    head, name, hosts, chips = take_slice(ray, options)
    print(f"{name}: {hosts} hosts of {chips} chips run {shlex.join(options.command)}", flush=True)
    try:
        # Each host has one unit of the slice's name, so no host gets two tasks.
        on_host = ray.remote(run_on_host).options(
            num_cpus=0, max_retries=0, resources={"TPU": chips, name: 1}
        )
        running = [on_host.remote(options.command, settings, options.folder) for _ in range(hosts)]
        code = 0
        try:
            while running and code == 0:
                (done,), running = ray.wait(running, num_returns=1)
                code = ray.get(done)
        finally:  # a command failed, a host was lost, or Ctrl-C
            for task in running:
                ray.cancel(task)
            if running:
                ray.wait(running, num_returns=len(running), timeout=SECONDS_TO_END + 10)
        return code
    finally:
        ray.kill(head)


def main() -> int:
    try:
        options = parse(sys.argv[1:])
        settings = {} if options.env is None else read_settings(options.env)
        if options.dry_run:
            print(f"An actor with TPU-{options.type}-head: 1, then on each host, in {options.folder}:")
            print(shlex.join([*(f"{name}={value}" for name, value in settings.items()), *options.command]))
            return 0
        try:
            import ray  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ValueError(
                "ray is not installed; pip install 'ray[default]', or run this on a Ray node."
            ) from None
        try:
            ray.init(address=options.address)
        except ConnectionError as error:
            raise ValueError(f"There is no Ray cluster at --address {options.address} ({error}).") from error
        for left in range(options.restarts, -1, -1):
            try:
                code, why = run_once(ray, options, settings), "the command got a SIGTERM"
                if code != PREEMPTED:
                    return code
            except ray.exceptions.RayError as error:
                why = str(error).splitlines()[0]
            print(f"A host was lost ({why}); restarts left: {left}.", file=sys.stderr)
        raise ValueError(
            "A host was lost; run the same command again, and training resumes from its workdir."
        )
    except ValueError as error:
        print(f"ray_tpu.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
