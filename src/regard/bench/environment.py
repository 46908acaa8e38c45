"""The machine and the software a row was measured with."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import regard
from regard.config import architecture

_NVIDIA_FIELDS = {
    "driver_version": "driver",
    "power.limit": "power_limit_w",
    "clocks.max.sm": "max_sm_clock_mhz",
    "clocks.max.mem": "max_memory_clock_mhz",
    "clocks.applications.graphics": "application_clock_mhz",
}
_SIDE = 8192  # of the matrices that keep the GPU busy
_TIMEOUT = 10  # seconds for nvidia-smi or git


def describe(device: torch.device) -> dict[str, Any]:
    """Device, driver, clocks and power limit, versions and commit: what a figure depends on."""
    facts: dict[str, Any] = {
        "device": device.type,
        "arch": architecture(device),
        "machine": processor() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "regard": regard.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "triton": _version("triton", "pytorch-triton", "pytorch-triton-rocm"),
        "python": platform.python_version(),
    }
    if device.type == "cpu":
        facts |= {"threads": torch.get_num_threads(), "cores": os.cpu_count()}
        if hasattr(os, "getloadavg"):
            facts["load"] = round(os.getloadavg()[0], 1)
        return {**facts, "capability": torch.backends.cpu.get_cpu_capability()}
    facts["multiprocessors"] = torch.cuda.get_device_properties(device).multi_processor_count
    if torch.version.hip is not None:
        return {**facts, "hip": torch.version.hip}
    return {**facts, "cuda": torch.version.cuda, **_nvidia_smi(device.index or 0)}


def clock_under_load(device: torch.device, flops: float) -> float | None:
    """The multiprocessors' clock in MHz amid half a second of matrix products, or None where nothing tells.

    Args:
        device: the GPU.
        flops: operations a second it does such products at.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    matrix = torch.randn(_SIDE, _SIDE, device=device, dtype=torch.bfloat16)
    for _ in range(max(1, int(0.5 * flops / (2 * _SIDE**3)))):
        torch.mm(matrix, matrix)
    with contextlib.suppress(Exception):
        return float(_output("nvidia-smi", f"--id={device.index or 0}", "--query-gpu=clocks.sm",
                             "--format=csv,noheader,nounits"))  # fmt: skip
    return None


def processor() -> str:
    """The CPU's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.cache
def commit() -> str | None:
    """The commit of the checkout regard is imported from, with ``+`` where files differ from it; None outside one."""
    folder = str(Path(regard.__file__).parent)
    with contextlib.suppress(Exception):
        # an installed copy may lie inside somebody else's repository
        tracked = _output("git", "-C", folder, "ls-files", "--error-unmatch", "__init__.py")
        changed = _output("git", "-C", folder, "status", "--porcelain", "--untracked-files=no", "--", folder)
        return _output("git", "-C", folder, "rev-parse", "--short=12", "HEAD") + ("+" if changed and tracked else "")
    return None


@functools.cache
def _nvidia_smi(index: int) -> dict[str, Any]:
    with contextlib.suppress(Exception):
        line = _output("nvidia-smi", f"--id={index}", f"--query-gpu={','.join(_NVIDIA_FIELDS)}",
                       "--format=csv,noheader,nounits")  # fmt: skip
        values = (value.strip() for value in line.split(","))
        return {
            name: value if name == "driver" else _number(value)
            for name, value in zip(_NVIDIA_FIELDS.values(), values, strict=True)
        }
    return {}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]"
        return None


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TIMEOUT).stdout.strip()  # noqa: S603


def _version(*distributions: str) -> str | None:
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None
