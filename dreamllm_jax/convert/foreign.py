"""`ForeignCheckpoint`: a recognized checkpoint in a foreign format, and helpers of the adapters that open
one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dreamllm_jax.checkpoint.tensors import FileTensor, Tensor
from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.config.train import LossConfig
from dreamllm_jax.convert.mapping import Report, to_jax
from dreamllm_jax.convert.weights import read_weights
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.data.tokenizer_files import has_tokenizer
from dreamllm_jax.models.parameters import parameter_shapes

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclasses.dataclass
class ForeignCheckpoint:
    """A recognized checkpoint, opened without reading its tensors.

    Attributes:
      kind: what it is, in words.
      path: the folder or the file.
      model: the model's config.
      parts: part -> {name: tensor}, under the names that `rules` knows.
      report: what is worth reporting about it.
      loss: the loss it was trained with, where config.json says so.
      template: the conversation template it was trained with; None continues prompts as they are.
      fresh: connectors that are not among the parts and must be initialized.
      stated: ids of control tokens that config.json repeats. The tokenizer's ids are right where they differ.
    """

    kind: str
    path: Path
    model: DreamLLMConfig
    parts: dict[str, dict[str, Tensor]]
    report: Report = dataclasses.field(default_factory=Report)
    loss: LossConfig | None = None
    template: str | None = None
    fresh: tuple[str, ...] = ()
    stated: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def tokenizer_files(self) -> list[Path]:
        return [self.folder / name for name in TOKENIZER_FILES if (self.folder / name).is_file()]

    @property
    def files(self) -> list[Path]:
        """The files that contain its tensors."""
        tensors = (tensor for part in self.parts.values() for tensor in part.values())
        return sorted({tensor.storage.file for tensor in tensors if isinstance(tensor, FileTensor)})

    @property
    def folder(self) -> Path:
        """The folder of its files."""
        return self.path if self.path.is_dir() else self.path.parent

    def params(self) -> tuple[dict[str, Tensor], Report]:
        """Returns our parameters, without the fresh ones and not read yet, and a report of tensors that did
        not fit or were ignored.
        """
        shapes = parameter_shapes(self.model)
        expected = {path: shape for path, shape in shapes.items() if path.split("/")[0] not in self.fresh}
        params, report = to_jax(self.parts, expected)
        report.add(self.report)
        if self.stated and has_tokenizer(self.folder):
            ids = control_ids(Tokenizer.load(self.folder, extend=True))
            report.differing += [
                f"config.json says that {name} is {stated}; the tokenizer says {ids[name]}, which is used"
                for name, stated in self.stated.items()
                if name in ids and ids[name] != stated
            ]
        return params, report


class PrefixRule(NamedTuple):
    """Names that begin with `prefix` belong to `part`, where `inner` replaces the prefix."""

    prefix: str
    part: str
    inner: str = ""


def split_by_prefix(
    tensors: Mapping[str, Tensor], prefixes: tuple[PrefixRule, ...], report: Report
) -> dict[str, dict[str, Tensor]]:
    """Sorts tensors into parts by the first rule whose prefix matches; the others are reported as
    unexpected.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        rule = next((r for r in prefixes if name.startswith(r.prefix)), None)
        if rule is None:
            report.unexpected.append(f"{tensor.origin} {tensor.shape}")
        else:
            parts.setdefault(rule.part, {})[rule.inner + name.removeprefix(rule.prefix)] = tensor
    return parts


def control_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Returns name -> id of every control token."""
    names = tokenizer.special_names()
    return {names[field]: i for field, i in dataclasses.asdict(tokenizer.special).items()}


def open_folder(
    kind: str, folder: Path, model: DreamLLMConfig, prefixes: tuple[PrefixRule, ...]
) -> ForeignCheckpoint:
    """Opens the weights of one folder, sorted into parts by their prefixes."""
    report = Report()
    return ForeignCheckpoint(
        kind, folder, model, split_by_prefix(read_weights(folder), prefixes, report), report
    )


def stated_ids(raw: Mapping[str, Any], *more: str) -> dict[str, int]:
    """Returns the ids that a LLaMA's config.json repeats, by the tokens' names; `more` are further keys."""
    names = {"bos_token_id": "<s>", "eos_token_id": "</s>", "pad_token_id": "[PAD]"}
    keys = ("bos_token_id", "eos_token_id", *more)
    return {names[key]: raw[key] for key in keys if key in raw and isinstance(raw[key], int)}


def check_options(folder: Path, raw: Mapping[str, Any], only: Mapping[str, tuple]) -> None:
    """Checks the options of a config.json.

    Raises:
      ValueError: an option has a value that is not implemented; it is named.
    """
    for key, supported in only.items():
        if key in raw and raw[key] not in supported:
            raise ValueError(
                f"{folder}/config.json: {key}={raw[key]!r} is not supported; supported: "
                f"{', '.join(map(repr, supported))}."
            )
