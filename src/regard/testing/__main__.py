"""``python -m regard.testing --backend flash --device cuda --json report.json``: exit status 1 if a case fails."""

import argparse
import json
import sys
from pathlib import Path

import torch

from regard.registry import registry
from regard.testing.cases import CASES
from regard.testing.report import CHECKS, run_conformance


def main() -> int:
    """Run the conformance cases on one backend and report; 1 where a case failed."""
    parser = argparse.ArgumentParser(prog="python -m regard.testing", description="Run the conformance cases.")
    parser.add_argument("--backend", required=True, choices=registry.list_backends())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", action="append", choices=("float16", "bfloat16", "float32", "float64"))
    parser.add_argument("--check", action="append", choices=tuple(CHECKS))
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES], metavar="NAME")
    parser.add_argument("--json", type=Path, help="write every result to this file")
    arguments = parser.parse_args()
    try:
        torch.empty(0, device=arguments.device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # by what it lacks, torch raises one of these
        parser.error(f"argument --device: {str(error).splitlines()[0]}")
    report = run_conformance(
        arguments.backend,
        arguments.device,
        [getattr(torch, name) for name in arguments.dtype] if arguments.dtype else None,
        [case for case in CASES if arguments.case is None or case.name in arguments.case],
        arguments.check or tuple(CHECKS),
    )
    print(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report.to_json(), indent=1) + "\n")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
