"""The results of a run in plain text: a table of times, then what they come to, sentence by sentence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from regard.bench.rows import Row, geometric_mean


def text(rows: Sequence[Row]) -> str:
    """A table with a line for each case and a column for each implementation, and the sentences of `sentences`."""
    timed = [row for row in rows if row["status"] == "ok"]
    names = list(dict.fromkeys(row["implementation"] for row in timed))
    cases = list(dict.fromkeys(row["case"] for row in rows))
    cell = {(row["case"], row["implementation"]): row for row in rows}
    lines = [["milliseconds", *names]]
    lines += [[case, *(_milliseconds(cell.get((case, name))) for name in names)] for case in cases]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    table = [
        "  ".join(
            entry.rjust(width) if column else entry.ljust(width)
            for column, (entry, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([*table, "", *sentences(rows)])


def sentences(rows: Sequence[Row]) -> list[str]:
    """Mean and worst speed-up of each implementation, and what was refused, wrong or failed."""
    found = []
    for name, reference, ratios in speedups(rows):
        worst_case, worst = min(ratios.items(), key=lambda item: item[1])
        best_case, best = max(ratios.items(), key=lambda item: item[1])
        mean = f"{name}: {geometric_mean(list(ratios.values())):.2f}x the speed of {reference}"
        if len(ratios) == 1:
            found.append(f"{mean} ({worst_case})")
            continue
        found.append(
            f"{mean} over {len(ratios)} cases (geometric mean), from {worst:.2f}x ({worst_case}) to {best:.2f}x "
            f"({best_case})"
        )
    if len(found) == 0 and any(row["status"] == "ok" for row in rows):
        found.append("no speed-ups: the reference implementation was not among those measured")
    for status, phrase in (
        ("wrong", "wrong, so not timed"), ("failed", "failed"), ("refused", "refused"),
    ):  # fmt: skip
        reasons = Counter((row["implementation"], row.get("reason", "")) for row in rows if row["status"] == status)
        found += [f"{phrase}: {name}: {reason} ({_cases(count)})" for (name, reason), count in reasons.items()]
    return found


def speedups(rows: Iterable[Row]) -> list[tuple[str, str, dict[str, float]]]:
    """(implementation, reference, ratio by case), the reference itself left out."""
    grouped: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row["status"] == "ok" and row.get("speedup") and row["implementation"] != row["reference"]:
            grouped.setdefault((row["implementation"], row["reference"]), {})[row["case"]] = row["speedup"]
    return [(name, reference, ratios) for (name, reference), ratios in grouped.items()]


def _milliseconds(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{row['ms']:.4g}" if row["status"] == "ok" else row["status"]


def _cases(count: int) -> str:
    return "1 case" if count == 1 else f"{count} cases"
