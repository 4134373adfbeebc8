"""The JSON file that a benchmark writes its figures to, if one is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def known(path: Path | None) -> dict[str, Any]:
    """What an earlier run, or one of other parts, has kept there; nothing if it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}


def keep(figures: dict[str, Any], path: Path | None) -> None:
    """Write all figures; without a path, nothing."""
    if path:
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
