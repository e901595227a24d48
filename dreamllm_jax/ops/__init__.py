"""Operations that all towers share: linear maps, convolution, normalization, attention, scanned layers.

In: arrays with the project's axis letters, and the parameters of Flax modules that hold a single operation.
Out: arrays that are equal, to rounding, on every platform and mesh. `cpu` holds the forms for CPUs.
Never: knows a tower, reads files, or lets the caller choose a platform; `sharding.platform` decides.
"""
