"""Models and train states on disk.

In: parameters (arrays, or lazy tensors of other files), configs and tokenizers, train states.
Out: folders that all processes write together, and lazy tensors that are read on demand.
Never: another project's formats or parameter names (see `convert`), or a change of values.
"""
