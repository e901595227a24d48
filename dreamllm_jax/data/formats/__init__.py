"""Formats of files, one file each.

In: the paths and options of a source in a recipe. Out: its documents, by number, as pieces.
Never: tokens, order or shares of a mixture, decoded images.
"""
