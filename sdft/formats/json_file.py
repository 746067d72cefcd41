"""JSON files of others: one sentence for everything that can be wrong with them."""

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
