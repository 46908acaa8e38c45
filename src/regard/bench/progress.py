"""What a run says while it goes: a bar with the time left on a terminal, a line for each workload elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from regard.bench.rows import Row
from regard.bench.run import Listener


def line(name: str, done: int, total: int, made: Sequence[Row]) -> None:
    """Print a line for a finished workload to standard error."""
    if made:
        print(f"[{done}/{total}] {name}: {describe(made)}", file=sys.stderr, flush=True)


def describe(made: Sequence[Row]) -> str:
    """The results of one workload in a few words."""
    parts = []
    for row in made:
        if row["status"] == "ok":
            ratio = (
                f" ({row['speedup']:.2f}x)" if row.get("speedup") and row["implementation"] != row["reference"] else ""
            )
            parts.append(f"{row['implementation']} {row['ms']:.4g} ms{ratio}")
        elif row["status"] != "refused":
            parts.append(f"{row['implementation']} {row['status']}: {row['reason']}")
    return ", ".join(parts) or "nothing to time"


@contextmanager
def shown() -> Iterator[Listener]:
    """A listener: a bar where standard error is a terminal and rich is installed, lines elsewhere."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield line
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield line
        return
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, speed_estimate_period=600) as bars:
        task = bars.add_task("", total=None)

        def show(name: str, done: int, total: int, made: Sequence[Row]) -> None:
            bars.update(task, description=name, completed=done, total=total)
            if made:
                bars.console.print(f"{name}: {describe(made)}", markup=False, highlight=False)

        yield show
