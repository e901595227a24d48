"""JSON files: read strictly, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

from dreamllm_jax.atomic import write_text


def read_json(file: str | Path) -> dict:
    """A JSON object from a file.

    Raises:
      ValueError: it is missing or is not one.
    """
    file = Path(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file} is missing; the folder is incomplete or of another kind.") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} is not readable JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}; expected a JSON object.")
    return content


def write_json(file: Path, content: object) -> None:
    """Writes JSON so that the file is there whole or not at all."""
    write_text(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
