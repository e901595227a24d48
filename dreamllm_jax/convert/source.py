"""A recognized checkpoint: its model, its tensors by part, and what is to be said of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from dreamllm_jax.checkpoint.tensors import FileTensor, Tensor
from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.config.train import LossConfig
from dreamllm_jax.convert.mapping import Report, to_jax
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
    """A recognized checkpoint: `parts` are its tensors, unread, under the names that the tables know.

    `template` is the conversation template it was trained with, None for plain continuation. The connectors
    `fresh` are not among the parts: they are to be drawn. `stated` are the ids of control tokens that
    config.json repeats; the tokenizer's are right.
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
        """The files that hold its tensors."""
        tensors = (tensor for part in self.parts.values() for tensor in part.values())
        return sorted({tensor.storage.file for tensor in tensors if isinstance(tensor, FileTensor)})

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.path if self.path.is_dir() else self.path.parent

    def params(self) -> tuple[dict[str, Tensor], Report]:
        """Our parameters but the fresh ones, unread, and the report of what did not fit or was ignored."""
        shapes = parameter_shapes(self.model)
        expected = {path: shape for path, shape in shapes.items() if path.split("/")[0] not in self.fresh}
        params, report = to_jax(self.parts, expected)
        report.add(self.report)
        if self.stated and has_tokenizer(self.folder):
            ids = control_ids(Tokenizer.load(self.folder, extend=True))
            report.differing += [
                f"config.json says that {name} is {said}; it is {ids[name]}, as the tokenizer says"
                for name, said in self.stated.items()
                if name in ids and ids[name] != said
            ]
        return params, report


class PrefixRule(NamedTuple):
    """Names beginning with `prefix` belong to `part`, where they begin with `inner` instead."""

    prefix: str
    part: str
    inner: str = ""


def split_by_prefix(
    tensors: Mapping[str, Tensor], prefixes: tuple[PrefixRule, ...], report: Report
) -> dict[str, dict[str, Tensor]]:
    """Sorts tensors into parts by the first mount whose prefix fits; the rest is unexpected."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = next((m for m in prefixes if name.startswith(m.prefix)), None)
        if found is None:
            report.unexpected.append(f"{tensor.origin} {tensor.shape}")
        else:
            parts.setdefault(found.part, {})[found.inner + name.removeprefix(found.prefix)] = tensor
    return parts


def control_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Name -> id of every control token."""
    names = tokenizer.special_names()
    return {names[field]: i for field, i in dataclasses.asdict(tokenizer.special).items()}
