"""JSON files: those of others, with one sentence for everything that can be wrong with them, and our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdft.errors import UserError


def read_json(file: Path, where: str = "") -> dict[str, Any]:
    """The object in a JSON file.

    where: how messages name the file, by default its path.
    Raises UserError if it cannot be read, is not JSON, or holds something else than an object.
    """
    where = where or str(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise UserError(f"{where}: is not valid JSON ({reason}); get it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{where}: must hold a JSON object, and holds a {type(content).__name__}")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as JSON, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def json_if_readable(file: Path) -> Any:
    """The content of a JSON file; None if it is not there or cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
