"""One self-contained HTML page of benchmark rows."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from regard.bench.rows import Row


def missing_packages() -> list[str]:
    """Packages the report needs that are not installed."""
    return [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]


def write_report(rows: Sequence[Row], out: Path, plots: Path | None = None, title: str = "") -> None:
    """Write the page."""
    raise NotImplementedError
