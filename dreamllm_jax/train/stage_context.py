"""What is fixed during a stage: its recipe, model, mesh and folder. Shared by the loop and its hooks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from jax.sharding import Mesh

from dreamllm_jax.config.model import DreamLLMConfig, GenerationConfig
from dreamllm_jax.config.train import Recipe, StageConfig
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.document import Document
from dreamllm_jax.models.dreamllm import DreamLLMModule
from dreamllm_jax.models.parameters import Flat
from dreamllm_jax.train.run_folder import StageFolder


class Writer(Protocol):
    """A model that writes documents, such as `DreamLLM`."""

    def generate_document(self, prompt: Sequence[str], *, seed: int) -> list[Document]: ...


# Makes a writer of a model; `DreamLLM` is an example. `train` must not import `generate`, so the train
# command passes it in.
MakeWriter = Callable[[DreamLLMConfig, Flat, Tokenizer, GenerationConfig, Mesh, Sequence[str]], Writer]


@dataclasses.dataclass(frozen=True)
class StageContext:
    """One stage of a run. `config` is the model's as the stage begins; `index` has the indexes of tars."""

    recipe: Recipe
    stage: StageConfig
    config: DreamLLMConfig
    tokenizer: Tokenizer
    mesh: Mesh
    folder: StageFolder
    index: Path
    make_writer: MakeWriter | None = None

    @property
    def model(self) -> DreamLLMModule:
        """The Flax module of the stage's model."""
        return DreamLLMModule(self.config)
