"""How the tests compile programs, and how a test compiles as users do.

The tests compile much and compute little. Without LLVM's optimizations, and with the older of the CPU
backend's two code generators, they take half the time. XLA's own passes, which come before, are the same:
results differ by rounding.
"""

import contextlib
from collections.abc import Iterator

import pytest

QUICK_COMPILE = ("--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false")
AS_USERS_COMPILE = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}


@contextlib.contextmanager
def compiled_as_users_do() -> Iterator[None]:
    """Programs that are compiled here are optimized, as without `QUICK_COMPILE`."""
    import jax
    from jax._src import compiler  # JAX has no public default for a jit's `compiler_options`

    given = compiler.get_compile_options

    def options(*args, env_options_overrides=None, **others):
        overrides = AS_USERS_COMPILE | (env_options_overrides or {})
        return given(*args, env_options_overrides=overrides, **others)

    jax.clear_caches()  # of programs that were compiled quickly
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", options)
        yield
