"""Composes one model from the towers of several sources."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import jax

from dreamllm_jax.checkpoint.tensors import ArrayTensor, Tensor
from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.convert.foreign import ForeignCheckpoint
from dreamllm_jax.convert.mapping import Report
from dreamllm_jax.models.parameters import abstract_params, init_on_host

CONNECTORS = ("vision_projector", "dream_queries", "condition_projector", "global_projector")


def compose(
    llm: ForeignCheckpoint,
    vision: ForeignCheckpoint | None = None,
    diffusion: ForeignCheckpoint | None = None,
) -> ForeignCheckpoint:
    """Combines the language model of one checkpoint with the vision tower and the image decoder of others.

    The connectors of `llm` are kept where its own towers are kept; the others are listed in `fresh`.

    Raises:
      ValueError: a checkpoint lacks the tower that it should provide.
    """
    given = {"llama": llm, "vision": vision, "unet": diffusion}
    for tower, source in given.items():
        if source is not None and getattr(source.model, tower) is None:
            raise ValueError(f"{source.path} ({source.kind}) has no {tower}; give a checkpoint that has one.")
        if source is not None and tower not in source.parts:
            raise ValueError(
                f"{source.path} ({source.kind}) only names its {tower}; give the tower's own folder."
            )
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


def init_connectors(model: DreamLLMConfig, connectors: Collection[str], seed: int = 0) -> dict[str, Tensor]:
    """Returns fresh parameters of these connectors, initialized as training initializes them."""
    names = {path for path in abstract_params(model) if path.split("/")[0] in connectors}
    fresh = init_on_host(model, jax.random.key(seed), names)
    return {path: ArrayTensor(path, value) for path, value in fresh.items()}
