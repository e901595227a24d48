"""Puts a measured table into a document, between the two marks of its name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path


def write_table(document: Path, name: str, lines: Sequence[str]) -> None:
    """Replaces what stands between `<!-- name -->` and `<!-- /name -->` by these lines.

    Raises:
      ValueError: the document lacks the marks.
    """
    text = document.read_text(encoding="utf-8")
    marked = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
    if not marked.search(text):
        raise ValueError(f"{document} has no <!-- {name} --> and <!-- /{name} --> to write between.")
    table = "\n".join(lines)
    document.write_text(marked.sub(lambda m: f"{m[1]}{table}\n{m[2]}", text), encoding="utf-8")
