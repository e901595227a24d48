"""Extends the vocabulary of a model by the control tokens that its tokenizer lacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dreamllm_jax.checkpoint.tensors import Shape, Tensor
from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.data.tokenizer import Tokenizer

# An embedding may have up to this many more rows than the tokenizer has tokens: padding, added tokens.
_PADDING = 1024
# The parameters with a vocabulary axis, and that axis.
_VOCABULARIES = {"llama/embed_tokens/embedding": 0, "llama/lm_head/kernel": 1}


def with_control_tokens(
    model: DreamLLMConfig, params: dict[str, Tensor], folder: Path
) -> tuple[DreamLLMConfig, dict[str, Tensor], Tokenizer]:
    """Returns (config, parameters, tokenizer) of a model whose tokenizer is in `folder`.

    DreamLLM's control tokens are added to a tokenizer that lacks them. The embedding and the output head get
    a row for each, the mean of the existing rows.

    Raises:
      ValueError: the tokenizer is missing, damaged, or that of another model.
    """
    tokenizer = Tokenizer.load(folder, extend=True)
    check_tokenizer_fits(tokenizer, model, folder)
    if model.llama is not None and tokenizer.vocab_size > model.llama.vocab_size:
        params = extend_vocabulary(params, tokenizer.vocab_size)
        llama = dataclasses.replace(model.llama, vocab_size=tokenizer.vocab_size)
        model = dataclasses.replace(model, llama=llama)
    return model, params, tokenizer


def check_tokenizer_fits(tokenizer: Tokenizer, model: DreamLLMConfig, folder: Path) -> None:
    """Raises ValueError if the tokenizer in `folder` does not fit the size of the model's embedding."""
    if model.llama is None:
        return
    rows, tokens = model.llama.vocab_size, tokenizer.own_size
    if tokens > rows or rows - tokens > _PADDING:
        raise ValueError(
            f"{folder}: its tokenizer has {tokens} tokens, and its weights embed {rows}; they do not "
            "belong together. Put the files of the weights' own tokenizer there."
        )


def extend_vocabulary(params: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    """Returns the parameters with `size` rows in every vocabulary."""
    return {
        path: Extended(tensor, size, _VOCABULARIES[path]) if path in _VOCABULARIES else tensor
        for path, tensor in params.items()
    }


@dataclasses.dataclass(frozen=True)
class Extended:
    """A tensor extended to `size` entries along `axis`; the new ones are the mean of the existing ones."""

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
