"""The vocabulary of a model, extended by the control tokens that its tokenizer lacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dreamllm_jax.checkpoint.tensors import Shape, Tensor
from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.data.tokenizer import Tokenizer

# More rows than a tokenizer has tokens are usual (a round number, added tokens), within reason.
_PADDING = 1024
# Vocabularies: path and axis.
_VOCABULARIES = {"llama/embed_tokens/embedding": 0, "llama/lm_head/kernel": 1}


def with_control_tokens(
    model: DreamLLMConfig, params: dict[str, Tensor], folder: Path
) -> tuple[DreamLLMConfig, dict[str, Tensor], Tokenizer]:
    """(config, parameters, tokenizer) of a model whose tokenizer is in `folder`.

    A tokenizer without DreamLLM's control tokens gets them, and every vocabulary the rows for them: each is
    the mean of the rows that are there.

    Raises:
      ValueError: no tokenizer there, a damaged one, or that of another model.
    """
    tokenizer = Tokenizer.load(folder, extend=True)
    check_tokenizer_fits(tokenizer, model, folder)
    if model.llama is not None and tokenizer.vocab_size > model.llama.vocab_size:
        params = extend_vocabulary(params, tokenizer.vocab_size)
        llama = dataclasses.replace(model.llama, vocab_size=tokenizer.vocab_size)
        model = dataclasses.replace(model, llama=llama)
    return model, params, tokenizer


def check_tokenizer_fits(tokenizer: Tokenizer, model: DreamLLMConfig, folder: Path) -> None:
    """Raises ValueError where the tokenizer in `folder` cannot be that of the weights."""
    if model.llama is None:
        return
    rows, tokens = model.llama.vocab_size, tokenizer.own_size
    if tokens > rows or rows - tokens > _PADDING:
        raise ValueError(
            f"{folder}: its tokenizer has {tokens} tokens and its weights embed {rows}; they do not belong "
            "together. Put the files of the weights' own tokenizer there."
        )


def extend_vocabulary(params: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    """The parameters with `size` rows in every vocabulary."""
    return {
        path: Extended(tensor, size, _VOCABULARIES[path]) if path in _VOCABULARIES else tensor
        for path, tensor in params.items()
    }


@dataclasses.dataclass(frozen=True)
class Extended:
    """A tensor with `size` entries along `axis`; those it lacks are the mean of those it has."""

    base: Tensor
    size: int
    axis: int
    row_readable = False

    @property
    def origin(self) -> str:
        return self.base.origin

    @property
    def shape(self) -> Shape:
        shape = list(self.base.shape)
        shape[self.axis] = self.size
        return tuple(shape)

    @property
    def dtype(self) -> np.dtype:
        return self.base.dtype

    def read(self, start: int | None = None, stop: int | None = None) -> np.ndarray:
        values = self.base.read()
        mean = values.mean(self.axis, keepdims=True, dtype=np.float32).astype(values.dtype)
        more = np.repeat(mean, self.size - self.base.shape[self.axis], self.axis)
        return np.concatenate([values, more], self.axis)[start:stop]
