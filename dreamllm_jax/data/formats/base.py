"""What a data format is: a class that reads records from files and gives documents by number.

A format of your own is one class in a module of yours, which a recipe names as `package.module:Class`:

    import dataclasses

    from dreamllm_jax.data.formats.base import Format
    from dreamllm_jax.data.pieces import interleaved

    @dataclasses.dataclass(frozen=True)
    class LinesOptions:
        prefix: str = ""

    class Lines(Format):
        Options = LinesOptions

        def __init__(self, paths, options, context):
            self.lines = [line for path in paths for line in path.read_text().splitlines()]
            self.options, self.mode = options, context.mode

        def __len__(self):
            return len(self.lines)

        def document(self, number, rng):
            return interleaved([self.options.prefix + self.lines[number]], self.mode)

    sources=[dict(format="my_project.lines:Lines", path="data/*.txt", options=dict(prefix="> "))]

An installed package may register it under a short name, with the entry point group `dreamllm_jax.formats`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dreamllm_jax.data.chat import ChatTemplate, conversation, template_of
from dreamllm_jax.data.pieces import Piece, check_mode
from dreamllm_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """For formats without options."""


@dataclasses.dataclass(frozen=True)
class FormatContext:
    """What a stage tells the formats of its sources.

    `mode` says whether images are seen, dreamed or both. `index` is a file that `Format.update_index` has
    written for these paths and options, or None.
    """

    mode: str
    tokenizer: Tokenizer
    index: Path | None = None

    def __post_init__(self):
        check_mode(self.mode)


class Format(abc.ABC):
    """The documents of some files, by number from 0.

    `Options` is a frozen dataclass; a source's options are built into it, and unknown keys are refused.
    """

    Options: ClassVar[type] = NoOptions

    @abc.abstractmethod
    def __init__(self, paths: Sequence[Path], options: Any, context: FormatContext):
        """Opens the files.

        Raises:
          ValueError: files or options that cannot be used.
        """

    @abc.abstractmethod
    def __len__(self) -> int:
        """Returns the number of documents; broken ones count too."""

    @abc.abstractmethod
    def document(self, number: int, rng: np.random.Generator) -> list[Piece]:
        """Returns document `number`, the same in every epoch but for what it takes from `rng`.

        Images may be given as bytes or paths: the pipeline decodes them.

        Raises:
          BrokenRecord: the record cannot be used; it is counted, and reading goes on. Any other exception
            ends the run.
        """

    @classmethod
    def check(cls, options: Any, tokenizer: Tokenizer) -> None:
        """Raises ValueError for options that cannot work; looks for files, but reads none."""
        return None

    @classmethod
    def index_key(cls, options: Any) -> str | None:
        """Returns a key of the options that the format's index depends on, or None if it keeps no index."""
        return None

    @classmethod
    def update_index(cls, paths: Sequence[Path], options: Any, file: Path) -> None:
        """Writes or updates the index of these paths in `file`. Needed only if `index_key` returns a key.

        Raises:
          ValueError: a path cannot be read.
          OSError: `file` cannot be written.
        """
        raise NotImplementedError(f"{cls.__name__} has index_key but not update_index; define both.")


def conversation_template(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    """Returns the template of that name, tried on a conversation.

    Raises:
      ValueError: the template is unknown, or it cannot write conversations to learn from.
    """
    try:
        template = template_of(name, tokenizer)
        conversation(["question", "answer"] * 2, template=template)
    except ValueError as error:
        raise ValueError(f"template: {error}") from error
    return template
