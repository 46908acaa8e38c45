"""Rows: what one implementation did on one workload, as JSON lines that later runs read, resume or compare with."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from regard.bench.cases import Workload
from regard.errors import ConfigError

SCHEMA = 1

Row = dict[str, Any]
"""The fields, in this order:

schema, suite, case, implementation, mode, device: which measurement; ``case`` is the workload's name.
status: ``"ok"``, ``"refused"`` (reason: why it cannot), ``"wrong"`` (it breaks the tolerance rule), ``"failed"`` (it
    raised). Only ``ok`` rows have times.
ms: median of the rounds, each a median of its samples; ms_interval: its 95 % confidence interval.
ms_low, ms_high: 20 % and 80 % quantiles of all samples.
repetitions, timer: how many times it was timed, and by what.
tflops, gbs: achieved, from the workload's least operations and bytes.
matmul_tflops, copy_gbs: ceilings measured in the same run; matmul_share, copy_share: of them.
reference, speedup, speedup_low, speedup_high: against the reference implementation, taken in turns with it.
host_us: what the host spends on a call. first_call_ms: the first one, compilation included.
peak_bytes: allocated during a call, its result included. input_bytes, result_bytes: of its tensors.
error_ratio: largest error in units of what the tolerance rule allows.
chosen: the backend automatic selection takes for the workload.
workload, environment, date, command: everything needed to repeat it.
"""

_TEXTS = ("case", "implementation", "device", "status", "suite")  # of every row
_TEXTS_IF_ANY = ("mode", "date", "command", "reason", "timer", "reference", "chosen")
_POSITIVE_IF_ANY = (
    "ms", "ms_low", "ms_high", "tflops", "gbs", "matmul_tflops", "copy_gbs", "matmul_share", "copy_share", "flops",
    "bytes", "input_bytes", "result_bytes", "speedup",
)  # fmt: skip
_NOT_NEGATIVE_IF_ANY = ("host_us", "first_call_ms", "peak_bytes", "error_ratio")
_OF_A_TIMED_WORKLOAD = ("mode", "command", "timer", *_POSITIVE_IF_ANY[:-1])

Key = tuple[str, str, str]


def key(row: Mapping[str, Any]) -> Key:
    """What makes two rows measurements of the same thing: case, implementation, device type."""
    return str(row["case"]), str(row["implementation"]), str(row["device"])


def write(path: Path, rows: Iterable[Row]) -> None:
    """Append rows to a file, each flushed. A line that an earlier run left unfinished is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" if torn else "")
        for row in rows:
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()


def read(path: Path) -> tuple[list[Row], int]:
    """The rows of a file, of several measurements of the same thing the last, and how many lines are no rows.

    Raises:
        ConfigError: there is no such file.
    """
    if not path.is_file():
        raise ConfigError("rows", str(path), "a file of JSON lines that regard bench wrote")
    found: dict[Key, Row] = {}
    corrupt = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        row = _parsed(line)
        if row is None:
            corrupt += 1
        else:
            found.pop(key(row), None)
            found[key(row)] = row
    return list(found.values()), corrupt


def read_all(paths: Sequence[Path]) -> tuple[list[Row], int]:
    """The rows of several files; of several measurements of the same thing on the same machine the last."""
    found: dict[Any, Row] = {}
    corrupt = 0
    for path in paths:
        rows, skipped = read(path)
        corrupt += skipped
        found |= {(key(row), row["environment"].get("machine")): row for row in rows}
    return list(found.values()), corrupt


def _parsed(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or row.get("schema") != SCHEMA:
        return None
    return row if _is_whole(row) else None


def _is_whole(row: Row) -> bool:
    """Whether what reads rows finds in this one what it needs, in the types it has when a run writes it."""
    given = {name for name, value in row.items() if value is not None}
    if not all(isinstance(row.get(name), str) for name in (*_TEXTS, *given.intersection(_TEXTS_IF_ANY))):
        return False
    if not all(_is_number(row[name]) and row[name] > 0 for name in given.intersection(_POSITIVE_IF_ANY)):
        return False
    if not all(_is_number(row[name]) and row[name] >= 0 for name in given.intersection(_NOT_NEGATIVE_IF_ANY)):
        return False
    if not isinstance(row.get("environment"), dict) or ("speedup" in given and "reference" not in given):
        return False
    if row["status"] != "ok":
        return "reason" in given
    if "workload" not in row:
        return "ms" in given
    complete = given.issuperset(_OF_A_TIMED_WORKLOAD) and "host_us" in row and "machine" in row["environment"]
    return complete and _is_workload(row["workload"])


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_workload(described: object) -> bool:
    if not isinstance(described, dict) or set(described) != {field.name for field in fields(Workload)}:
        return False
    try:
        workload_of({"workload": described})
    except (TypeError, ValueError):  # what is no size, or no call that can be (`ConfigError`)
        return False
    return True


def workload_of(row: Mapping[str, Any]) -> Workload:
    """The workload of a row, whose window is a list after JSON."""
    described: dict[str, Any] = row["workload"]
    window = described["window"]
    return Workload(**{**described, "window": None if window is None else tuple(window)})


def geometric_mean(values: Sequence[float]) -> float:
    """The mean of ratios."""
    return math.exp(sum(map(math.log, values)) / len(values))
