"""Opens a folder of the reference's numbers, and converts its arrays to our layouts."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from dreamllm_jax.checkpoint.json_files import read_json
from dreamllm_jax.checkpoint.safetensors_files import read_safetensors
from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.config.train import LossConfig
from dreamllm_jax.convert.recognize import open_checkpoint
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.generate.engine import Engine
from dreamllm_jax.generate.layout import generation_layout
from dreamllm_jax.models.dreamllm import DreamLLMModule

IGNORED_LABEL = -100  # the reference's label of a token that is not learned


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """An open folder: the model, its parameters, and the reference's arrays and settings."""

    config: DreamLLMConfig
    loss: LossConfig
    tokenizer: Tokenizer
    params: dict[str, np.ndarray]
    reference: dict[str, np.ndarray]
    settings: dict[str, Any]

    @functools.cached_property
    def module(self) -> DreamLLMModule:
        return DreamLLMModule(self.config)

    @functools.cached_property
    def engine(self) -> Engine:
        """The same model, ready to generate."""
        assert self.config.llama is not None
        params = {path: jnp.asarray(value) for path, value in self.params.items()}
        params = unflatten_dict(generation_layout(params, self.config.llama), sep="/")
        return Engine(self.config, params, self.tokenizer)

    @functools.cached_property
    def variables(self) -> dict[str, Any]:
        params = {path: jnp.asarray(value) for path, value in self.params.items()}
        return {"params": unflatten_dict(params, sep="/")}

    def apply(self, *args: Any, **options: Any) -> Any:
        return self.module.apply(self.variables, *args, **options)


def open_case(folder: str | Path) -> Case:
    """Reads a folder laid out as `tests/golden/dreamllm-a`.

    Raises:
      ValueError: a file is missing, or the checkpoint does not fit its config.
    """
    folder = Path(folder)
    for name in ("checkpoint", "reference.safetensors", "reference.json"):
        if not (folder / name).exists():
            raise ValueError(f"{folder} has no {name}; give a folder laid out as tests/golden/dreamllm-a.")
    source = open_checkpoint(folder / "checkpoint")
    if source.loss is None:
        raise ValueError(f"{folder}/checkpoint is a {source.kind}; only a DreamLLM can be compared.")
    if source.model.unet is not None and source.model.unet.pooled_text_dim is not None:
        raise ValueError(
            f"{folder} holds the SDXL variant, whose reference cannot run; there is nothing to compare."
        )
    tensors, report = source.params()
    report.raise_if_faulty(str(folder))
    reference = read_safetensors(folder / "reference.safetensors")
    return Case(
        source.model,
        source.loss,
        Tokenizer.load(folder / "checkpoint"),
        {path: tensor.read() for path, tensor in tensors.items()},
        {name: tensor.read() for name, tensor in reference.items()},
        read_json(folder / "reference.json"),
    )


def slots(tokens: np.ndarray, start: int, number: int) -> np.ndarray:
    """Returns slots [B, L]: k * number + i at the i-th position after a row's k-th `start` token, else -1.

    For example number = 2 and a row `a <start> x x b <start> x x` give `-1 -1 0 1 -1 -1 2 3`.
    """
    out = np.full_like(tokens, -1)
    for row, ids in zip(out, tokens, strict=True):
        for k, i in enumerate(np.flatnonzero(ids == start)):
            row[i + 1 : i + 1 + number] = k * number + np.arange(number)
    return out


def spread(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Scatters values in reading order [M, ...] to the true entries of `mask` [B, J]; zeros elsewhere."""
    out = np.zeros((*mask.shape, *values.shape[1:]), values.dtype)
    out[mask] = values
    return out


def channels_last(images: np.ndarray) -> np.ndarray:
    """Moves channels last: [..., c, h, w] -> [..., h, w, c]."""
    return np.moveaxis(images, -3, -1)
