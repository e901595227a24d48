"""How the tests compile programs, and how a test compiles as users do.

The tests compile much and compute little. They take half the time without LLVM's optimizations and with the
older of the CPU backend's two code generators. XLA's own passes, which come before, are the same, so that
results differ by rounding.
"""

import contextlib
from collections.abc import Iterator
from importlib import metadata

import pytest

# Options of XLA: the value of the tests and XLA's own.
OPTIONS = {"xla_backend_optimization_level": (0, 3)}
if metadata.version("jaxlib").startswith("0.10."):  # later ones have the newer code generator alone
    OPTIONS["xla_cpu_use_fusion_emitters"] = (False, True)
QUICK_COMPILE = tuple(f"--{name}={quick}".lower() for name, (quick, _) in OPTIONS.items())


@contextlib.contextmanager
def compiled_as_users_do() -> Iterator[None]:
    """Programs that are compiled here are optimized, as without `QUICK_COMPILE`."""
    import jax
    from jax._src import compiler  # JAX has no public default for a jit's `compiler_options`

    given = compiler.get_compile_options
    defaults = {name: default for name, (_, default) in OPTIONS.items()}

    def options(*args, env_options_overrides=None, **others):
        overrides = defaults | (env_options_overrides or {})
        return given(*args, env_options_overrides=overrides, **others)

    jax.clear_caches()  # of programs that were compiled quickly
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", options)
        yield
