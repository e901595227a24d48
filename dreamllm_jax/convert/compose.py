"""Towers of several sources as one model, and a vocabulary with room for the control tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.convert.engine import Report
from dreamllm_jax.convert.shapes import modules
from dreamllm_jax.convert.source import Source
from dreamllm_jax.convert.tensors import ArrayTensor, Shape, Tensor
from dreamllm_jax.data.tokenizer import Tokenizer

CONNECTORS = ("vision_projector", "dream_queries", "condition_projector", "global_projector")
# More rows than a tokenizer has tokens are usual (a round number, added tokens), within reason.
_PADDING = 1024
# Vocabularies: path and axis.
_VOCABULARIES = {"llama/embed_tokens/embedding": 0, "llama/lm_head/kernel": 1}


def compose(llm: Source, vision: Source | None = None, diffusion: Source | None = None) -> Source:
    """The language model of one source with the vision tower and the image decoder of others.

    Connectors are those of `llm` where its own towers stay; all others are to be drawn.

    Raises:
      ValueError: a source without the tower it is to give.
    """
    given = {"llama": llm, "vision": vision, "unet": diffusion}
    for tower, source in given.items():
        if source is not None and getattr(source.model, tower) is None:
            raise ValueError(f"{source.path} ({source.kind}) has no {tower}; give a source that has one.")
        if source is not None and tower not in source.parts:
            raise ValueError(f"{source.path} ({source.kind}) only names its {tower}; give its own folder.")
    model, parts, report = llm.model, dict(llm.parts), Report()
    for source in given.values():
        if source is not None:
            report.add(source.report)
    for source, towers, settings, connectors in (
        (vision, ("vision",), ("vision", "vision_select_layer"), CONNECTORS[:1]),
        (diffusion, ("unet", "vae"), ("unet", "vae", "schedule", "image_size"), CONNECTORS[1:]),
    ):
        if source is None:
            continue
        model = dataclasses.replace(model, **{name: getattr(source.model, name) for name in settings})
        parts = {name: tensors for name, tensors in parts.items() if name not in connectors}
        parts |= {name: source.parts[name] for name in towers}
        left = sorted(source.parts.keys() - set(towers))
        report.ignored += [f"{source.path}: {name}, {len(source.parts[name])} tensors" for name in left]
    kind = " + ".join(source.kind for source in given.values() if source is not None)
    fresh = tuple(name for name in CONNECTORS if name not in parts)
    return dataclasses.replace(llm, kind=kind, model=model, parts=parts, report=report, fresh=fresh)


def draw(model: DreamLLMConfig, connectors: Collection[str], seed: int = 0) -> dict[str, Tensor]:
    """Fresh parameters of these connectors, as training draws them."""
    fresh: dict[str, Tensor] = {}
    for i, (name, (module, arguments)) in enumerate(modules(model).items()):
        if name in connectors:
            tree = module.init(jax.random.fold_in(jax.random.key(seed), i), *arguments)["params"]
            leaves = {f"{name}/{path}": np.asarray(x) for path, x in flatten_dict(tree, sep="/").items()}
            fresh |= {path: ArrayTensor(path, leaf) for path, leaf in leaves.items()}
    return fresh


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
    check_belongs(tokenizer, model, folder)
    if model.llama is not None and tokenizer.vocab_size > model.llama.vocab_size:
        params = extend_vocabulary(params, tokenizer.vocab_size)
        llama = dataclasses.replace(model.llama, vocab_size=tokenizer.vocab_size)
        model = dataclasses.replace(model, llama=llama)
    return model, params, tokenizer


def check_belongs(tokenizer: Tokenizer, model: DreamLLMConfig, folder: Path) -> None:
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
    by_rows = False

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
