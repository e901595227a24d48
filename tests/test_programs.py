"""Programs of tests compile quickly, and inside `compiled_as_users_do` as XLA's defaults say."""

import os

import jax
import jax.numpy as jnp
from jax._src import compiler

from tests.programs import OPTIONS, QUICK_COMPILE, compiled_as_users_do


def test_a_test_can_compile_as_users_do(monkeypatch):
    flags, compiled = os.environ["XLA_FLAGS"].split(), []
    given = compiler.get_compile_options

    def options(*args, **others):
        compiled.append(given(*args, **others))
        return compiled[-1]

    monkeypatch.setattr(compiler, "get_compile_options", options)
    add = jax.jit(lambda x: x + 1)
    x = jnp.ones(3)
    for _ in range(2):
        add(x)
    assert {flag.split("=")[0] for flag in QUICK_COMPILE} <= {flag.split("=")[0] for flag in flags}
    quickly = compiled[-1]
    number = len(compiled)
    with compiled_as_users_do():
        add(x)
    assert len(compiled) == number + 1  # compiled again, although its program was there
    for name, (quick, default) in OPTIONS.items():
        (setting,) = (value for key, value in compiled[-1].env_option_overrides if key == name)
        assert setting == default != quick
    assert not {key for key, _ in quickly.env_option_overrides} & OPTIONS.keys()
