"""One self-contained HTML page of benchmark rows: no network, readable without scripts, on a phone and in print."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regard.bench import summary
from regard.bench.rows import Row, geometric_mean

_ENVIRONMENT = {
    "machine": "machine", "arch": "architecture", "cores": "cores", "threads": "threads", "load": "load before the run",
    "driver": "driver",
    "power_limit_w": "power limit, W", "sm_clock_mhz": "clock under load, MHz", "max_sm_clock_mhz": "top clock, MHz",
    "torch": "torch", "triton": "Triton", "cuda": "CUDA", "hip": "HIP", "python": "Python", "regard": "regard",
    "commit": "commit",
}  # fmt: skip
"""Fields of a row's environment that the page shows, and how it calls them."""

_DIFFERS_BETWEEN_RUNS = ("load", "sm_clock_mhz", "commit")


def missing_packages() -> list[str]:
    """Packages the report needs that are not installed."""
    return [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]


def write_report(rows: Sequence[Row], out: Path, plots: Path | None = None, title: str = "regard benchmarks") -> None:
    """Write the page, and each plot as an SVG file where a folder is given for them.

    Args:
        rows: as `regard.bench.rows.read` gives them.
        out: the HTML file.
        plots: folder for the SVG files.
        title: heading of the page.
    """
    import jinja2

    from regard.bench.plots import all_plots, standalone

    drawn = all_plots(rows)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("regard.bench", "."), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("report.html.j2").render(
        title=title,
        headline=headline(rows),
        sentences=summary.sentences(rows),
        environments=_environments(rows),
        dates=sorted(row["date"][:10] for row in rows if row.get("date")),
        plots=[{"name": name, "caption": caption, "svg": svg} for name, (caption, svg) in drawn.items()],
        timed=[_shown(row) for row in rows if row["status"] == "ok" and row["mode"] != "model"],
        models=[row for row in rows if row["status"] == "ok" and row["mode"] == "model"],
        untimed=[row for row in rows if row["status"] != "ok"],
        implementations=list(dict.fromkeys(row["implementation"] for row in rows if row["status"] == "ok")),
        suites=list(dict.fromkeys(row["suite"] for row in rows)),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    if plots is not None:
        plots.mkdir(parents=True, exist_ok=True)
        for name, (_, svg) in drawn.items():
            (plots / f"{name}.svg").write_text(standalone(svg), encoding="utf-8")


def headline(rows: Sequence[Row]) -> str:
    """What a reader wants to know first: how fast the automatic choice is, over everything measured."""
    parts = []
    automatic = [
        row
        for row in rows
        if row["status"] == "ok" and row.get("speedup") and row["implementation"] == row.get("chosen")
    ]
    for reference, machine in dict.fromkeys((row["reference"], row["environment"]["machine"]) for row in automatic):
        ratios = {
            row["case"]: row["speedup"]
            for row in automatic
            if (row["reference"], row["environment"]["machine"]) == (reference, machine)
        }
        slowest = min(ratios, key=lambda case: ratios[case])
        parts.append(
            f"On {machine}, the backend chosen automatically runs at {geometric_mean(list(ratios.values())):.2f}x the "
            f"speed of {reference} (geometric mean of {len(ratios)} cases); the slowest case is {slowest} at "
            f"{ratios[slowest]:.2f}x."
        )
    return " ".join(parts) or "Nothing here was measured beside a reference implementation."


def _environments(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Machines and versions, each once, under readable names, with all that was seen of what differs between runs."""
    found: dict[tuple[Any, ...], dict[str, list[Any]]] = {}
    for row in rows:
        facts = {name: row["environment"][name] for name in _ENVIRONMENT if row["environment"].get(name) is not None}
        seen = found.setdefault(tuple(item for item in facts.items() if item[0] not in _DIFFERS_BETWEEN_RUNS), {})
        for name, value in facts.items():
            seen.setdefault(name, []).append(value)
    return [
        {label: _spread_of(seen[name]) for name, label in _ENVIRONMENT.items() if name in seen}
        for seen in found.values()
    ]


def _spread_of(values: Sequence[Any]) -> str:
    """Numbers from the least to the greatest, texts one after the other."""
    different = list(dict.fromkeys(values))
    if len(different) > 1 and all(isinstance(value, (int, float)) for value in different):
        return f"{min(different):g} to {max(different):g}"
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in different)


def _shown(row: Row) -> dict[str, Any]:
    """A row for the table: numbers to sort by and the texts to show."""
    error = row.get("error_ratio")
    peak = row.get("peak_bytes")
    return {
        **row,
        "slower": bool(row.get("speedup") and row["speedup"] < 0.97),
        "faster": bool(row.get("speedup") and row["speedup"] > 1.03),
        "peak_mib": None if peak is None else peak / 2**20,
        "error": "" if error is None else f"{error:.2f}",
        "spread": 50 * (row["ms_high"] - row["ms_low"]) / row["ms"],
    }
