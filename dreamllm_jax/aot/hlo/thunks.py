"""The work that a compiled program gives to a GPU, piece by piece, in order: XLA's thunks.

XLA does not return them. With the compiler option `xla_dump_to` it writes a file that lists them and one
that names the instruction behind each. A CUDA graph is the thunk `CommandBuffer`; what it holds is launched
at once.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

_LINE = re.compile(r"( *)(\d+): k(\w+)")
_EMPTY = "No thunks."  # stands for a part without any; the next label follows on the same line
_LABEL = re.compile(r"( *)(\w+): *$")
_NAMED = re.compile(r'profile_annotation: "([^"]*)"\s*thunk_id: (\d+)')
_SEQUENCE = "*.thunk_sequence_after_thunk_passes.txt"
_NAMES = ".thunk_metadata.txt"


@dataclasses.dataclass
class Thunk:
    """One piece of work. `name` is that of its instruction, if XLA says so.

    `parts` has what it runs: `condition` and `body` of a `While`, the branches of a `Conditional`, and under
    "" what any other thunk holds.
    """

    kind: str
    name: str = ""
    parts: dict[str, list[Thunk]] = dataclasses.field(default_factory=dict)

    def walk(self) -> Iterator[Thunk]:
        """Yields the thunk and all that it holds."""
        yield self
        for part in self.parts.values():
            for thunk in part:
                yield from thunk.walk()


def read_thunks(folder: Path) -> list[Thunk]:
    """Returns the thunks of the program that XLA dumped into a folder.

    Raises:
      ValueError: the folder has no list of thunks.
    """
    listed = sorted(folder.glob(_SEQUENCE))
    if not listed:
        raise ValueError(f"XLA wrote no list of thunks ({_SEQUENCE}) into {folder}; compile for a GPU.")
    names = Path(str(listed[-1]).split(".thunk_sequence")[0] + _NAMES)
    return parse_thunks(listed[-1].read_text(), names.read_text() if names.exists() else "")


def parse_thunks(text: str, names: str = "") -> list[Thunk]:
    """Parses XLA's list of thunks, and the file with the names of their instructions.

    Raises:
      ValueError: a line is neither a thunk nor a label.
    """
    named = {int(number): name for name, number in _NAMED.findall(names)}
    top = Thunk("Sequential")
    # What is open, from the outside in: the column of a part's thunks, and the thunks of that part.
    open_parts: list[tuple[int, list[Thunk]]] = [(0, top.parts.setdefault("", []))]
    last: dict[int, Thunk] = {}  # the last thunk at each column
    column = 0
    for line in filter(str.strip, text.replace(_EMPTY, "\n").splitlines()):
        if label := _LABEL.fullmatch(line):
            if label.group(2) != "condition":  # which stands at column 0, but follows its loop at once
                column = len(label.group(1)) - 2
            _close(open_parts, column)
            open_parts.append((column + 4, last[column].parts.setdefault(label.group(2), [])))
            continue
        found = _LINE.match(line)
        if not found:
            raise ValueError(f"the list of thunks has a line that cannot be parsed: {line[:200]}")
        column, number, kind = len(found.group(1)), int(found.group(2)), found.group(3)
        _close(open_parts, column)
        if open_parts[-1][0] < column:
            open_parts.append((column, open_parts[-1][1][-1].parts.setdefault("", [])))
        # Every graph has the number 0, which would name it after another thunk.
        thunk = Thunk(kind, named[number] if number in named and kind != "CommandBuffer" else "")
        open_parts[-1][1].append(thunk)
        last[column] = thunk
    return top.parts[""]


def _close(open_parts: list[tuple[int, list[Thunk]]], column: int) -> None:
    """Closes the parts whose thunks stand further to the right."""
    while open_parts[-1][0] > column:
        open_parts.pop()
