"""Our numbers beside those that the reference computed: `python -m dreamllm_jax.parity FOLDER`."""
