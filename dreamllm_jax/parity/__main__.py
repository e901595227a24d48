"""`python -m dreamllm_jax.parity`: the command `dreamllm parity`."""

from dreamllm_jax.commands.command import end, make_parser, run_command
from dreamllm_jax.commands.parity import COMMAND

if __name__ == "__main__":
    end(run_command(make_parser(COMMAND, "python -m dreamllm_jax.parity")))
