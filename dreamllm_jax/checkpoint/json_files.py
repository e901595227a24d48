"""JSON files: read strictly, written atomically."""

from __future__ import annotations

import json
from pathlib import Path

from dreamllm_jax.atomic import write_text


def read_json(file: str | Path) -> dict:
    """Returns the JSON object in a file.

    Raises:
      ValueError: the file is missing, or does not hold a JSON object.
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
    """Writes JSON atomically: the file is complete, or as it was before."""
    write_text(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
