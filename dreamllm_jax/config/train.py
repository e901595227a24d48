"""The recipe's config: mesh, losses, optimizer and the stages a model is trained through."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from dreamllm_jax.config.base import build
from dreamllm_jax.config.data import DataConfig
from dreamllm_jax.config.hooks import HooksConfig
from dreamllm_jax.config.model import DreamLLMConfig, GenerationConfig
from dreamllm_jax.config.registry import check_name


def _require(holds: bool, config: Any, path: str, what: str) -> None:
    if not holds:
        raise ValueError(f"{path} is {getattr(config, path.rsplit('.', 1)[-1])}; it must {what}.")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The number of devices along each mesh axis; one of them may be -1, for all remaining devices.

    `replicated` names frozen parts of the model ("unet", "vae", "vision", "llama") that are not sharded along
    fsdp: they take more memory and are never gathered.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    context: int = 1
    replicated: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights and options of the joint loss; the published models used the defaults.

    `scale` divides the weighted sum by the l1 or l2 norm of the two weights. `timestep_sampling` "cubic"
    prefers noisy steps, where the condition decides the image's content (arXiv 2302.08453, section 3.3).
    """

    weight_lm: float = 1.0
    weight_vm: float = 10.0
    scale: Literal["none", "l1", "l2"] = "none"
    snr_gamma: float | None = None
    noise_offset: float = 0.0
    input_perturbation: float = 0.0
    condition_dropout: float = 0.0
    timestep_sampling: Literal["uniform", "cubic"] = "uniform"
    kl_weight: float = 1e-6
    logits_chunk: int = 512

    def __post_init__(self):
        _require(0 <= self.condition_dropout < 1, self, "loss.condition_dropout", "lie in [0, 1)")
        _require(self.logits_chunk >= 1, self, "loss.logits_chunk", "be at least 1")
        for name in ("weight_lm", "weight_vm", "kl_weight", "noise_offset", "input_perturbation"):
            _require(getattr(self, name) >= 0, self, f"loss.{name}", "not be negative")
        _require(self.snr_gamma is None or self.snr_gamma > 0, self, "loss.snr_gamma", "be positive, or None")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rates; `grad_accum_steps` micro-batches make one step.

    `optimizer` names a function of `train.optimizers`, or one of your own as `package.module:function` (see
    `config.registry`). Adam holds 8 bytes per weight. "adafactor" (arXiv 1804.04235) saves 4 of them, and
    `mu_dtype="bfloat16"`, for the first moment of either, saves 2. Adafactor has its own decay of the second
    moment and its own clipping of updates; it does not use `b2` and `eps`.

    `schedule` follows a linear warm-up over `warmup_ratio` of the steps.

    `gather` says when parameters that are sharded along fsdp are gathered: layer by layer in every
    micro-batch ("layer", least memory), or once a step, before the micro-batches ("step": each device holds
    all weights in the model's dtype, and only gradients are communicated in between).
    """

    optimizer: str = "adamw"
    learning_rate: float = 2e-5
    warmup_ratio: float = 0.003
    schedule: Literal["cosine", "constant"] = "cosine"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    mu_dtype: Literal["float32", "bfloat16"] = "float32"
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    grad_accum_steps: int = 1
    gather: Literal["layer", "step"] = "layer"
    ema_decay: float = 0.0

    def __post_init__(self):
        check_name("optimizer", self.optimizer)
        for name in ("learning_rate", "eps"):
            _require(getattr(self, name) > 0, self, f"optim.{name}", "be positive")
        for name in ("b1", "b2", "ema_decay"):
            _require(0 <= getattr(self, name) < 1, self, f"optim.{name}", "lie in [0, 1)")
        _require(0 <= self.warmup_ratio <= 1, self, "optim.warmup_ratio", "lie in [0, 1]")
        _require(self.weight_decay >= 0, self, "optim.weight_decay", "not be negative")
        _require(
            self.clip_norm is None or self.clip_norm > 0, self, "optim.clip_norm", "be positive, or None"
        )
        _require(self.grad_accum_steps >= 1, self, "optim.grad_accum_steps", "be at least 1")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of training: its parameters, data, objective and number of steps.

    `trainable` lists regular expressions. A parameter is trained if one of them matches the beginning of its
    path (`llama`, `vision_projector`, ...); all others are frozen.
    """

    name: str
    trainable: tuple[str, ...]
    steps: int
    data: DataConfig
    objective: Literal["joint", "vae", "contrastive", "diffusion"] = "joint"
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)

    def __post_init__(self):
        _require(self.steps >= 1, self, "steps", "be at least 1")

    def compile_key(self) -> StageConfig:
        """Returns the stage as the key of its compiled step: without its name, steps, data and rates."""
        optim = OptimConfig()
        rates = dict(
            learning_rate=optim.learning_rate, warmup_ratio=optim.warmup_ratio, schedule=optim.schedule
        )
        return dataclasses.replace(
            self, name="", steps=1, data=DataConfig(), optim=dataclasses.replace(self.optim, **rates)
        )


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Where the tokenizer comes from: it is loaded from a folder, or trained on the texts of a corpus.

    `corpus` names a function without arguments that returns the texts, as `package.module:function`.
    """

    path: str | None = None
    corpus: str | None = None
    vocab_size: int = 32000

    def __post_init__(self):
        if self.corpus is not None:
            check_name("corpus", self.corpus)
        if self.path is not None and self.corpus is not None:
            raise ValueError(
                "tokenizer: give path (a folder to load) or corpus (text to train on), not both."
            )


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A model and the stages that make it, from random weights or from the folder `init_from`."""

    name: str
    model: DreamLLMConfig
    stages: tuple[StageConfig, ...]
    generation: GenerationConfig = dataclasses.field(default_factory=GenerationConfig)
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    init_from: str | None = None
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    seed: int = 0
    frozen_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    log_every: int = 10
    hooks: HooksConfig = dataclasses.field(default_factory=HooksConfig)

    def __post_init__(self):
        for name in ("checkpoint_every", "keep_checkpoints", "log_every"):
            _require(getattr(self, name) >= 1, self, name, "be at least 1")
        _require(0 <= self.seed < 1 << 32, self, "seed", f"lie between 0 and {(1 << 32) - 1}")
        if not self.stages:
            raise ValueError(f"recipe {self.name!r} has no stages; give it one at least.")
        names = [s.name for s in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"recipe {self.name!r}: two stages share a name in {names}; rename one.")

    def stage(self, name: str) -> StageConfig:
        """Returns the stage of this name.

        Raises:
          ValueError: the recipe has no such stage.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ValueError(
            f"recipe {self.name!r} has no stage {name!r}; its stages: "
            f"{', '.join(s.name for s in self.stages)}."
        )


def build_recipe(mapping: Any, saved: bool = False) -> Recipe:
    """Builds a recipe from what `get_config` returns, or from a `saved` recipe.json, strictly.

    Raises:
      ValueError: an unknown key, a wrong type or an impossible value; its full path is named.
    """
    return build(Recipe, mapping, "", saved)
