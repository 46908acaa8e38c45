"""Rows: what one implementation did on one workload, as JSON lines that later runs read, resume or compare with."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from regard.errors import ConfigError

SCHEMA = 1

Row = dict[str, Any]
"""The fields, in this order:

schema, suite, case, implementation, mode, device: which measurement; ``case`` is the workload's name.
status: ``"ok"``, ``"refused"`` (reason: why it cannot), ``"wrong"`` (it breaks the tolerance rule), ``"failed"`` (it
    raised). Only ``ok`` rows have times.
ms, ms_low, ms_high: median and 20 % and 80 % quantiles; ms_interval: 95 % confidence interval of the median.
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
    text = ("case", "implementation", "device", "status", "suite")
    if not all(isinstance(row.get(name), str) for name in text) or not isinstance(row.get("environment"), dict):
        return None
    if row["status"] == "ok" and not (isinstance(row.get("ms"), (int, float)) and 0 < row["ms"] < math.inf):
        return None
    return row


def geometric_mean(values: Sequence[float]) -> float:
    """The mean of ratios."""
    return math.exp(sum(map(math.log, values)) / len(values))
