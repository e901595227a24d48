"""Hooks: what runs beside the steps of a stage.

In: the stage's context, and the state and metrics after a step.
Out: logs, validation losses, sample documents and profiles in the stage's folder.
Never: a change of the state, the data or the number of steps.

`protocol.Hook` says what a hook may do, `make.make_hooks` builds those of a recipe. A recipe adds hooks of
its own project by name: `hooks.custom = ("my_project.hooks:Patience",)`.
"""
