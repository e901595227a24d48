"""`python -m dreamllm_jax.compile`: compiles a recipe's programs for chips that are not there (see `aot`)."""

from dreamllm_jax.aot.__main__ import run

if __name__ == "__main__":
    run()
