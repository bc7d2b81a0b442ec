"""JSON files of a model folder, read with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from posttrain.errors import ChatError


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        ChatError: the file is missing or damaged, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ChatError(str(path), "is missing", "save the model folder again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ChatError(str(path), f"damaged ({error})", "save or download the folder again") from None
    if not isinstance(value, dict):
        raise ChatError(str(path), f"holds a {type(value).__name__}, not an object", "save the folder again")
    return value
