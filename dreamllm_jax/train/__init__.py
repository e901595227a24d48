"""Training: a recipe's stages, from initial parameters to saved models.

In: a recipe, a work folder, and a function that opens the model to start from.
Out: a model's folder, logs and resumable states for every stage.
Never: another project's formats, or generation (a command passes in what needs them).
"""
