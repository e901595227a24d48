"""Compares our numbers with those that the reference computed: `python -m dreamllm_jax.parity FOLDER`.

In: a folder with a checkpoint and the reference's numbers, laid out as `tests/golden/dreamllm-a`.
Out: the error of every quantity.
Never: computes anything with PyTorch, or changes a checkpoint.
"""
