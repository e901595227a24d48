"""The stage for every test: eight emulated CPU devices, checked shapes, quick and kept compilations.

Everything here must happen before JAX is first imported, hence at import and through the environment.
What the caller has set (`JAX_PLATFORMS=tpu`, another number of devices) is respected.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

from tests.programs import QUICK_COMPILE, compiled_as_users_do

ROOT = Path(__file__).resolve().parent.parent

XLA_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    # Eight devices on two busy cores wait long for each other; by default XLA gives up after 40 s.
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
)
flags = os.environ.get("XLA_FLAGS", "").split()
for flag in (*XLA_FLAGS, *QUICK_COMPILE):
    if not any(given.startswith(flag.split("=")[0]) for given in flags):
        flags.append(flag)
os.environ["XLA_FLAGS"] = " ".join(flags)
# XLA:CPU's pool has a thread per core, and a collective holds one until every device has come to it: with
# eight devices on a few cores all threads can wait, and none is left for the device they wait for. NPROC sets
# the pool's size; 8 hung within a hundred steps, 32 not within 1,500.
os.environ.setdefault("NPROC", "64")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# No test reaches for a network: what a library would download is an error instead.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

install_import_hook(["dreamllm_jax", "examples"], "beartype.beartype")
from jax._src import compilation_cache  # noqa: E402  (JAX has no public name for it)


def _loaded_for_one_device(read):
    """Reading of JAX's compilation cache without the programs of several CPU devices.

    `distributed.initialize` does it for a whole process, tests need it for some programs. XLA's CPU backend
    lets devices run the collectives of a loaded program in any order, and then they may wait for each other
    for ever (JAX 0.10.2 and 0.12.0.1).
    """

    def one(key, options, backend, devices, *rest):
        several_cpus = backend.platform == "cpu" and len(devices) > 1
        return (None, None) if several_cpus else read(key, options, backend, devices, *rest)

    return one


compilation_cache.get_executable_and_time = _loaded_for_one_device(compilation_cache.get_executable_and_time)

# They begin first: of two processes that share the files none is left with one of these at the end.
LONGEST = (
    "tests/distributed/test_together.py",
    "tests/train/test_step.py",
    "tests/train/test_loop.py",
    "tests/docs/test_notebooks.py",
    "tests/parity/test_parity.py",
    "tests/test_end_to_end.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, the others in their order."""
    items.sort(key=lambda item: item.nodeid.split("::")[0] not in LONGEST)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The reference's numbers: `dreamllm-a`, `dreamllm-b`, `sequences.json` (see the README there)."""
    folder = ROOT / "tests" / "golden"
    if not folder.is_dir():
        pytest.fail(f"The golden data is missing: {folder} is part of the repository; clone it again.")
    return folder


@pytest.fixture(scope="module")
def optimized() -> Iterator[None]:
    """Programs are compiled as users compile them, to the end of the module: for published bounds."""
    with compiled_as_users_do():
        yield


@pytest.fixture(scope="session")
def devices() -> list:
    """The eight emulated devices; a test that asks for them is skipped where there are fewer."""
    import jax

    if len(jax.devices()) < 8:
        pytest.skip(f"This test needs 8 devices; JAX sees {len(jax.devices())}.")
    return jax.devices()[:8]
