"""The flag sets of launch/env: every setting is explained, and the compilers know every flag."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "launch" / "env").glob("*.env"))
TOPOLOGIES = {"tpu_v5p": "v5p:2x2x1", "tpu_v5e": "v5e:2x2"}


def settings(path: Path) -> list[tuple[str, str, str]]:
    """(comment, variable, value) of each setting; a comment belongs to the one line below it."""
    found, comment = [], ""
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            comment += line[1:]
            continue
        if line:
            assert re.fullmatch(r"[A-Z][A-Z0-9_]*=\S+", line), f"{path.name}: {line}"
            found.append((comment, *line.split("=", 1)))
        comment = ""
    return found


def joined(name: str, variable: str) -> list[str]:
    return [value for _, key, value in settings(ROOT / "launch" / "env" / f"{name}.env") if key == variable]


def test_the_sets_are_there():
    assert [path.stem for path in FILES] == ["cpu", "gpu_h100", "tpu_v5e", "tpu_v5p"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_setting_says_what_why_and_whence(path):
    found = settings(path)
    assert found
    for comment, variable, value in found:
        for word in ("What: ", "Why: ", "Source: "):
            assert comment.count(word) == 1, f"{path.name}: {variable}={value} lacks '{word}'"
    once = [value.split("=")[0] if value.startswith("--") else variable for _, variable, value in found]
    assert len(once) == len(set(once))


def start_jax(flags: list[str]) -> subprocess.CompletedProcess:
    """A process of its own that computes on the CPU with these XLA_FLAGS, which are read once."""
    environment = {**os.environ, "XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    code = "import jax.numpy as jnp; print((jnp.ones((4, 4)) @ jnp.ones((4, 4))).sum())"
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )


def test_xla_knows_the_flags_of_cpu_and_gpu():
    """One jaxlib parses both, and ends over a flag that it does not know."""
    result = start_jax(joined("cpu", "XLA_FLAGS") + joined("gpu_h100", "XLA_FLAGS"))
    assert result.returncode == 0 and result.stdout.strip() == "64.0", result.stderr[-500:]
    assert start_jax(["--xla_cpu_no_such_flag=true"]).returncode != 0


@pytest.mark.parametrize(("name", "topology"), TOPOLOGIES.items())
def test_the_tpu_compiler_knows_the_flags(name, topology):
    pytest.importorskip("libtpu")
    from dreamllm_jax.aot.topology import topology_devices

    device = topology_devices(topology)[0]
    shape = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
    lowered = jax.jit(lambda x: x + 1).trace(shape).lower(lowering_platforms=("tpu",))
    flags = dict(flag.removeprefix("--").split("=") for flag in joined(name, "LIBTPU_INIT_ARGS"))
    lowered.compile(compiler_options=flags)
    with pytest.raises(Exception, match="No such compile option"):
        lowered.compile(compiler_options={**flags, "xla_tpu_no_such_flag": "true"})
