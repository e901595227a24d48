"""A folder of the reference's numbers, opened; and how its arrays are laid out here."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dreamllm_jax.checkpoint.json_files import read_json
from dreamllm_jax.checkpoint.safetensors_files import read_safetensors
from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.config.train import LossConfig
from dreamllm_jax.convert.sources import open_checkpoint
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.models.dreamllm import DreamLLMModule
from dreamllm_jax.models.parameters import nested

IGNORED = -100  # the label of a token that is not learned


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A folder of reference numbers, opened."""

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
    def variables(self) -> dict[str, Any]:
        return {"params": nested({path: jnp.asarray(value) for path, value in self.params.items()})}

    def apply(self, *args: Any, **options: Any) -> Any:
        return self.module.apply(self.variables, *args, **options)


def open_case(folder: str | Path) -> Case:
    """Reads such a folder.

    Raises:
      ValueError: it lacks one of its files, or holds a checkpoint that does not fit its config.
    """
    folder = Path(folder)
    for name in ("checkpoint", "reference.safetensors", "reference.json"):
        if not (folder / name).exists():
            raise ValueError(f"{folder} has no {name}; give a folder laid out as tests/golden/dreamllm-a.")
    source = open_checkpoint(folder / "checkpoint")
    if source.loss is None:
        raise ValueError(f"{folder}/checkpoint is a {source.kind}; a DreamLLM is to be compared here.")
    if source.model.unet is not None and source.model.unet.pooled_text_dim is not None:
        raise ValueError(f"{folder} is of the SDXL variant, whose reference cannot run: nothing to compare.")
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
    """-1, or k * number + i at the i-th place after the row's k-th token `start`."""
    found = np.full_like(tokens, -1)
    for row, line in zip(found, tokens, strict=True):
        for k, at in enumerate(np.flatnonzero(line == start)):
            row[at + 1 : at + 1 + number] = k * number + np.arange(number)
    return found


def spread(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Things in reading order [M, ...] at the places of `mask` [B, J]; zeros elsewhere."""
    out = np.zeros((*mask.shape, *values.shape[1:]), values.dtype)
    out[mask] = values
    return out


def channels_last(images: np.ndarray) -> np.ndarray:
    """[..., c, h, w] -> [..., h, w, c]."""
    return np.moveaxis(images, -3, -1)
