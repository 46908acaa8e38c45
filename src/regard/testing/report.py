"""A whole conformance run, as an object that prints as a table and is written as JSON."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from regard.config import architecture
from regard.testing.cases import CASES, REPEATED_CASES, Case
from regard.testing.checks import Result, check_backward, check_forward, check_repeatable

CHECKS = {"forward": check_forward, "backward": check_backward, "repeatable": check_repeatable}


@dataclass(frozen=True)
class Report:
    """Every result of one backend on one device.

    Attributes:
        backend: its name.
        environment: device, architecture and versions.
        results: one for each case, dtype and check.
    """

    backend: str
    environment: dict[str, str]
    results: tuple[Result, ...]

    @property
    def failed(self) -> tuple[Result, ...]:
        """The results that break the rule, or crashed."""
        return tuple(result for result in self.results if result.status == "failed")

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dump``."""
        results = [{**asdict(result), "ratio": round(result.ratio, 4)} for result in self.results]
        return {"backend": self.backend, "environment": self.environment, "summary": self.summary(), "results": results}

    def summary(self) -> list[dict[str, Any]]:
        """Counts and the worst ratio of each check and dtype."""
        rows = []
        for check, dtype in dict.fromkeys((result.check, result.dtype) for result in self.results):
            results = [result for result in self.results if (result.check, result.dtype) == (check, dtype)]
            worst = max(results, key=lambda result: result.ratio)
            counts = Counter(result.status for result in results)
            rows.append(
                {
                    "check": check,
                    "dtype": dtype,
                    **{status: counts[status] for status in ("passed", "refused", "failed")},
                    "worst_ratio": round(worst.ratio, 3),
                    "worst_case": worst.case,
                }
            )
        return rows

    def __str__(self) -> str:
        rows = [{**row, "worst_ratio": f"{row['worst_ratio']:.2f}"} for row in self.summary()]
        header = dict(zip(rows[0], rows[0], strict=True)) if rows else {}
        widths = {column: max(len(str(row[column])) for row in [header, *rows]) for column in header}
        table = [
            "  ".join(f"{row[column]!s:<{widths[column]}}" for column in header).rstrip() for row in [header, *rows]
        ]
        title = f"{self.backend} on {', '.join(f'{name} {value}' for name, value in self.environment.items())}"
        refusals = {str(reason): result.case for result in reversed(self.results) for reason in result.reasons}
        lines = [f"refused: {reason} ({case})" for reason, case in refusals.items()]
        return "\n".join([title, *table, *lines, *map(str, self.failed)])


def run_conformance(
    backend: str,
    device: str = "cpu",
    dtypes: Sequence[torch.dtype] | None = None,
    cases: Iterable[Case] = CASES,
    checks: Sequence[str] = tuple(CHECKS),
) -> Report:
    """Run every case on a backend; nothing is raised, failures stand in the report.

    Args:
        backend: a name from `regard.list_backends`.
        device: where the tensors are.
        dtypes: of q, k and v; default those of each case.
        cases: a selection of `CASES`, or your own.
        checks: of ``"forward"``, ``"backward"`` (cases with gradients), ``"repeatable"`` (`REPEATED_CASES`).
    """
    results = []
    for case in cases:
        for dtype in case.dtypes if dtypes is None else dtypes:
            for check in checks:
                if (check == "backward" and not case.gradients) or (
                    check == "repeatable" and case not in REPEATED_CASES
                ):
                    continue
                try:
                    results.append(CHECKS[check](backend, case, device, dtype))
                except Exception as error:  # a crash is a finding too, and the other cases still run
                    message = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
                    name = str(dtype).removeprefix("torch.")
                    results.append(Result(backend, case.name, name, check, "failed", message=message))
    return Report(backend, _environment(torch.device(device)), tuple(results))


def _environment(device: torch.device) -> dict[str, str]:
    named = {"device": str(device), "arch": architecture(device), "torch": torch.__version__}
    if device.type == "cuda":
        named["gpu"] = torch.cuda.get_device_name(device)
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        named["triton"] = importlib.metadata.version("triton")
    return {**named, "python": platform.python_version()}
