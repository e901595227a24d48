"""The compilers of TPUs and GPUs: whether they are installed, and in the version that JAX needs."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from packaging.requirements import Requirement

INSTALL = "pip install 'dreamllm-jax[aot]' (in a clone: pip install -e '.[aot]')"
# JAX's plugin for CUDA holds the compiler of GPUs. Which of them is installed does not matter here.
CUDA_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")


def check_tpu_compiler() -> None:
    """Checks that libtpu is installed, in a version that the installed JAX asks for.

    JAX names that version in its own extra `tpu`. With others, libtpu may compile for minutes and then fail.

    Raises:
      ValueError: libtpu is missing, or has another version.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "libtpu, which holds the TPU's compiler, is not installed (it runs on Linux on x86, and needs no "
            f"TPU): {INSTALL}."
        )
    installed = version_of("libtpu")
    for needed in _needed_by_jax("libtpu", "tpu"):
        if installed is not None and not needed.specifier.contains(installed, prereleases=True):
            raise ValueError(
                f"libtpu {installed} is installed, but JAX {version_of('jax')} needs "
                f"libtpu{needed.specifier}: {INSTALL}."
            )


def check_gpu_compiler() -> str:
    """Returns the name of the CUDA plugin, having checked that its version is that of jaxlib.

    Raises:
      ValueError: no plugin or more than one is installed, or it has another version.
    """
    found = [name for name in CUDA_PLUGINS if version_of(name) is not None]
    if len(found) > 1:
        raise ValueError(
            f"{' and '.join(found)} are both installed, and JAX loads one only: uninstall the one without "
            "CUDA's libraries (after [aot]: pip uninstall jax-cuda13-plugin jax-cuda13-pjrt)."
        )
    for name in found:
        for part in (name, name.replace("plugin", "pjrt")):
            if version_of(part) != version_of("jaxlib"):
                raise ValueError(
                    f"{part} {version_of(part)} is installed, but it must have the version of jaxlib, "
                    f"{version_of('jaxlib')}: {INSTALL}."
                )
        return name
    raise ValueError(
        "JAX's CUDA plugin, which holds the GPU's compiler, is not installed (it runs on Linux, and needs "
        f"neither a GPU nor CUDA): {INSTALL}."
    )


def compiler_versions(kind: str) -> dict[str, str | None]:
    """Returns the versions of JAX and of the compiler for devices of this kind (`device.device_kind`)."""
    compiler = "libtpu" if kind.startswith("TPU") else check_gpu_compiler()
    return {name: version_of(name) for name in ("jax", compiler)}


def version_of(package: str) -> str | None:
    """Returns the version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _needed_by_jax(package: str, extra: str) -> list[Requirement]:
    """Returns what an extra of the installed JAX says about a package; nothing if JAX does not say."""
    requirements = [Requirement(text) for text in importlib.metadata.requires("jax") or ()]
    return [
        one
        for one in requirements
        if one.name == package and one.marker is not None and one.marker.evaluate({"extra": extra})
    ]
