"""Documents of text and images, to tokens, to packed rows, to batches.

In: a stage's `DataConfig`, and the files or the class that it names. Out: batches of numpy arrays, and counts
of everything left out. Never: models, devices, or arrays in the memory of an accelerator.
"""
