"""The `dreamllm` command: one file per subcommand, and what they share.

In:     the words of a command line.
Out:    results on standard output and in files; progress and errors on standard error; an exit code.
Never:  computes anything. A command calls other packages, imported only when it runs: `--help` and
        `--version` never import JAX.
"""
