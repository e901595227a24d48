"""Adapters: one file per family of foreign checkpoints.

In: a folder (or a file) in the family's format.
Out: a `ForeignCheckpoint`: the model's config, and its tensors by part, not read yet.
Never: imports what a config names, runs a pickle, or guesses an option that it does not implement.

To add a family, write one file here and add it to the table in `convert/recognize.py`.
"""
