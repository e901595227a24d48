"""What runs beside the steps of a stage: validation, sample documents, profiling, and hooks of your own."""

from __future__ import annotations

import dataclasses

from dreamllm_jax.config.data import DataConfig
from dreamllm_jax.config.registry import check_name


@dataclasses.dataclass(frozen=True)
class HooksConfig:
    """Hooks of every stage. All are off by default, and none changes what is trained.

    Validation: every `eval_every` steps, and after the last one, the stage's loss on `eval_batches` held-out
    batches. They come from the `validation` data. If it is None, they come from the stage's own data with
    another seed and `grad_accum_steps` times fewer rows; that is held out only if its source is endless, so
    files need `validation`.

    Samples: every `sample_every` steps, and after the last one, the document that the model writes for each
    of `sample_prompts`, as HTML in the stage's folder. Stages with another objective than "joint" write none.
    It takes the memory of another copy of the parameters.

    Profiling: a trace of the steps from `profile_steps[0]` to `profile_steps[1]` (counted from 1), for
    TensorBoard or Perfetto.

    `custom` names more hooks as `package.module:attribute`: a class or function without arguments that
    returns a `train.hooks.protocol.Hook`.
    """

    eval_every: int | None = None
    eval_batches: int = 8
    validation: DataConfig | None = None
    sample_every: int | None = None
    sample_prompts: tuple[str, ...] = ()
    profile_steps: tuple[int, int] | None = None
    custom: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("eval_every", "eval_batches", "sample_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"hooks.{name} is {value}; it must be at least 1.")
        if self.sample_every is not None and not self.sample_prompts:
            raise ValueError("hooks.sample_prompts is empty; give the prompts that sample_every continues.")
        if self.profile_steps is not None:
            first, last = self.profile_steps
            if not 1 <= first <= last:
                raise ValueError(
                    f"hooks.profile_steps is {self.profile_steps}; give the first and the last step to "
                    "profile, for example (20, 22)."
                )
        for name in self.custom:
            check_name("hook", name)
