"""The hooks of a recipe."""

from __future__ import annotations

from dreamllm_jax.config.registry import resolve
from dreamllm_jax.train.hooks.loggers import JsonLinesLogger, TensorBoardLogger
from dreamllm_jax.train.hooks.profiler import Profiler
from dreamllm_jax.train.hooks.protocol import Hook, HookList
from dreamllm_jax.train.hooks.samples import SampleDocuments
from dreamllm_jax.train.hooks.validation import ValidationLoss
from dreamllm_jax.train.stage_context import StageContext


def make_hooks(context: StageContext) -> HookList:
    """Returns the hooks of a stage: the loggers, those that the recipe switches on, and its own.

    Raises:
      ValueError: a custom hook cannot be imported, or is not a `Hook`.
    """
    config = context.recipe.hooks
    hooks: list[Hook] = [JsonLinesLogger(), TensorBoardLogger()]
    if config.profile_steps is not None:
        hooks.append(Profiler(*config.profile_steps))
    if config.eval_every is not None:
        hooks.append(ValidationLoss(config))
    if config.sample_every is not None and context.stage.objective == "joint":
        assert context.make_writer is not None, "check_hooks comes first"
        hooks.append(SampleDocuments(config, context.make_writer))
    return HookList([*hooks, *(custom_hook(name) for name in config.custom)])


def custom_hook(name: str) -> Hook:
    """Returns a hook of `module:attribute`: what the class or function of that name returns.

    Raises:
      ValueError: it cannot be imported, or does not return a `Hook`.
    """
    hook = resolve("hook", name)()
    if not isinstance(hook, Hook):
        raise ValueError(
            f"hooks.custom: {name} returned a {type(hook).__name__}; return a subclass of "
            "dreamllm_jax.train.hooks.protocol.Hook."
        )
    return hook
