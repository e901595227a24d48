"""All settings as frozen dataclasses, and the presets, names and tables that they are made from.

In: a recipe file with its overrides, a saved `config.json`, or a file from the hub.
Out: a `Recipe` or one of its parts, complete and checked; an unknown key is an error.
Never: runs the model, or reads weights or data. Defaults stand here and nowhere else.
"""
