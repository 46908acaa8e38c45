"""Baselines: the rows of an earlier run under a name, and the verdict on what changed since."""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from regard.bench import rows
from regard.bench.rows import Row
from regard.bench.run import FOLDER
from regard.errors import ConfigError

BASELINES = FOLDER / "baselines"


@dataclass(frozen=True)
class Change:
    """One measurement held against its baseline.

    Attributes:
        case, implementation: which one.
        before, after: medians, ms.
        percent: change of the median; below 0 is faster.
        verdict: ``"improved"`` or ``"regressed"`` where the ranges between the 20 % and 80 % quantiles lie apart, and
            the medians by more than the threshold; else ``"within noise"``.
    """

    case: str
    implementation: str
    before: float
    after: float
    percent: float
    verdict: str


def check_name(name: str) -> None:
    """Raises:
    ConfigError: the name cannot be a file's.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError("save", repr(name), "letters, digits, '.', '_' and '-'")


def save(name: str, measured: Sequence[Row]) -> Path:
    """Keep rows as a baseline; what the baseline holds of other measurements stays. Returns the file."""
    check_name(name)
    path = BASELINES / f"{name}.jsonl"
    kept = {rows.key(row): row for row in (rows.read(path)[0] if path.exists() else [])}
    kept |= {rows.key(row): row for row in measured}
    BASELINES.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=BASELINES, suffix=".part")
    os.close(descriptor)
    rows.write(Path(temporary), kept.values())
    os.replace(temporary, path)  # an interrupted save leaves the old baseline whole
    return path


def load(name: str) -> list[Row]:
    """The rows of a baseline.

    Raises:
        ConfigError: there is none of that name.
    """
    path = BASELINES / f"{name}.jsonl"
    if not path.is_file():
        have = sorted(each.stem for each in BASELINES.glob("*.jsonl")) if BASELINES.is_dir() else []
        raise ConfigError(
            "compare", repr(name), f"one of the baselines {', '.join(have) or '(none saved yet: --save)'}"
        )
    return rows.read(path)[0]


def compare(before: Sequence[Row], after: Sequence[Row], threshold: float) -> list[Change]:
    """The change of every measurement that both runs timed.

    Args:
        before, after: rows.
        threshold: percent; smaller changes are noise whatever the quantiles say.
    """
    known = {rows.key(row): row for row in before if row["status"] == "ok"}
    changes = []
    for row in after:
        old = known.get(rows.key(row))
        if row["status"] != "ok" or old is None:
            continue
        percent = 100 * (row["ms"] / old["ms"] - 1)
        verdict = "within noise"
        if percent > threshold and row["ms_low"] > old["ms_high"]:
            verdict = "regressed"
        elif percent < -threshold and row["ms_high"] < old["ms_low"]:
            verdict = "improved"
        changes.append(Change(row["case"], row["implementation"], old["ms"], row["ms"], percent, verdict))
    return changes


_MATTERS = ("machine", "threads", "power_limit_w", "torch", "triton")


def differences(before: Sequence[Row], after: Sequence[Row]) -> list[str]:
    """What besides the code differs between two runs, a sentence each."""
    found = []
    for name in _MATTERS:
        old, new = ({str(row["environment"].get(name)) for row in rows_of} for rows_of in (before, after))
        if old and new and old != new:
            found.append(f"{name}: the baseline has {', '.join(sorted(old))}, this run {', '.join(sorted(new))}")
    return found


def describe(changes: Sequence[Change]) -> str:
    """Counts of each verdict, then every change beyond noise, the worst first."""
    if not changes:
        return "the baseline has none of these measurements"
    counts = Counter(change.verdict for change in changes)
    verdicts = ("improved", "regressed", "within noise")
    lines = ["against the baseline: " + ", ".join(f"{counts[verdict]} {verdict}" for verdict in verdicts)]
    for each in sorted(changes, key=lambda change: -change.percent):
        if each.verdict != "within noise":
            change = f"{each.verdict} {each.percent:+.1f} %, {each.before:.4g} to {each.after:.4g} ms"
            lines.append(f"  {change}: {each.implementation} {each.case}")
    return "\n".join(lines)
