"""The `dreamllm` command: one file per subcommand, and what they share.

In:     the words of a command line.
Out:    results on standard output and in files; progress and errors on standard error; an exit code.
Never:  work of its own. A command only calls the other rooms, and imports them when it runs: `--help` and
        `--version` never import JAX.
"""
