"""`python -m dreamllm_jax`: the `dreamllm` command, where it is not on the PATH."""

from dreamllm_jax.commands.main import dreamllm

if __name__ == "__main__":
    dreamllm()
