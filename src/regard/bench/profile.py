"""What a workload's kernels ask of a GPU, from their compiled code, and what bounds their time, from one run.

The compiled part needs no GPU: the `flash` backend is called on tensors without storage, its launches are written down
instead of made, and each is compiled for the architecture asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from regard.backends import flash
from regard.backends.flash import FlashBackend, Launch
from regard.bench.cases import Workload
from regard.bench.rows import Row
from regard.config import AttentionConfig, AttentionInputs
from regard.errors import ConfigError, UnsupportedError
from regard.kernels import tuning

KIB = 1024


class Multiprocessor(NamedTuple):
    """What one multiprocessor (NVIDIA) or compute unit (AMD) can hold at a time.

    warps: resident ones, of ``warp`` threads each. blocks: resident workgroups. shared: bytes of shared memory (LDS).
    reserved: bytes of it that the system keeps for each block. lanes: registers of each thread position, over all warps
    that share it, handed out in multiples of granule. partitions: schedulers (SIMDs) that the warps are spread over.
    """

    warps: int
    warp: int
    blocks: int
    shared: int
    reserved: int
    lanes: int
    granule: int
    partitions: int


# CUDA C++ Programming Guide, table of technical specifications per compute capability.
_NVIDIA = {"sm80": (64, 32, 164), "sm89": (48, 24, 100), "sm90": (64, 32, 228), "sm100": (64, 32, 228),
           "sm120": (48, 24, 100)}  # fmt: skip
# AMD's CDNA and RDNA instruction-set guides; LLVM's AMDGPU usage guide for the register granules.
_AMD = {
    "gfx90a": (32, 64, 64, 512, 8, 4), "gfx942": (32, 64, 64, 512, 8, 4), "gfx950": (32, 64, 160, 512, 8, 4),
    "gfx1100": (32, 32, 64, 1536, 24, 2), "gfx1201": (32, 32, 64, 1536, 24, 2),
}  # fmt: skip
MULTIPROCESSORS: Mapping[str, Multiprocessor] = {
    **{
        arch: Multiprocessor(warps, 32, blocks, shared * KIB, KIB, 512, 8, 4)
        for arch, (warps, blocks, shared) in _NVIDIA.items()
    },
    **{
        arch: Multiprocessor(warps, warp, warps, shared * KIB, 0, lanes, granule, partitions)
        for arch, (warps, warp, shared, lanes, granule, partitions) in _AMD.items()
    },
}


@dataclass(frozen=True)
class KernelProfile:
    """One kernel of a call, compiled.

    Attributes:
        kernel: its name.
        tile: BLOCK_M x BLOCK_N, or "" where it has none.
        warps, stages: of a program.
        programs: how many the call launches.
        registers: of a thread. spills: bytes of a thread. shared: bytes of a program.
        matrix: kinds of matrix instruction, or "".
        resident: programs one multiprocessor holds at a time; limited_by: what keeps it from holding more.
        occupancy: resident warps of all it could hold.
    """

    kernel: str
    tile: str
    warps: int
    stages: int
    programs: int
    registers: int
    spills: int
    shared: int
    matrix: str
    resident: int
    limited_by: str
    occupancy: float


def profile_kernels(workload: Workload, arch: str) -> list[KernelProfile]:
    """Compile every kernel that the `flash` backend launches for a workload.

    Raises:
        ConfigError: no tile table for the architecture, or Triton runs as an interpreter.
        UnsupportedError: the backend cannot serve the workload there.
    """
    entry = tuning.table_architecture(arch)
    if entry is None:
        raise ConfigError("arch", repr(arch), f"one of {', '.join(tuning.ARCHITECTURES)}")
    config = workload.config("cuda", arch)
    reasons = FlashBackend().unsupported_reasons(config)
    if reasons:
        raise UnsupportedError(f"flash cannot serve {workload.name} on {arch}", {"flash": reasons})
    if flash._interpreting():
        raise ConfigError("TRITON_INTERPRET", "1", "an environment without it: the interpreter compiles nothing")
    from regard.bench.cross_compile import compile_launch, footprint, meta_inputs

    profiles = []
    for launch in launches(config, meta_inputs(config), workload.mode):
        compiled = compile_launch(launch.kernel, launch.arguments, launch.options, entry)
        cost = footprint(compiled, entry)
        warps = int(launch.options["num_warps"])
        resident, limited_by = residency(MULTIPROCESSORS[entry], warps, cost.registers, cost.shared)
        blocks = [launch.arguments.get(name) for name in ("BLOCK_M", "BLOCK_N")]
        profiles.append(
            KernelProfile(
                kernel=launch.kernel.__name__, tile="x".join(str(size) for size in blocks if size), warps=warps,
                stages=int(launch.options["num_stages"]), programs=launch.programs, registers=cost.registers,
                spills=cost.spills, shared=cost.shared, matrix=cost.matrix, resident=resident, limited_by=limited_by,
                occupancy=resident * warps / MULTIPROCESSORS[entry].warps,
            )
        )  # fmt: skip
    return profiles


def launches(config: AttentionConfig, inputs: AttentionInputs, mode: str) -> list[Launch]:
    """The kernel launches of a call in a mode, written down instead of made."""
    made: list[Launch] = []
    backend = FlashBackend()
    with _written_down(made):
        out, lse = backend.forward(config, inputs)
        if mode != "fwd":
            if mode == "bwd":
                made.clear()
            backend.backward(config, inputs, out, lse, torch.empty_like(out), None)
    return made


@contextmanager
def _written_down(made: list[Launch]) -> Iterator[None]:
    def write_down(self: Launch, device: torch.device) -> None:
        assert device.type == "meta"
        made.append(self)

    run = Launch.run
    Launch.run = write_down  # type: ignore[method-assign]
    try:
        yield
    finally:
        Launch.run = run  # type: ignore[method-assign]


def residency(unit: Multiprocessor, warps: int, registers: int, shared: int) -> tuple[int, str]:
    """Programs of so many warps that a multiprocessor holds at a time, and which resource allows no more.

    Args:
        unit: the multiprocessor.
        warps: of a program.
        registers: of a thread.
        shared: bytes of a program.
    """
    held = -(-max(registers, 1) // unit.granule) * unit.granule
    warps_by_registers = unit.lanes // held * unit.partitions
    limits = {
        "registers": warps_by_registers // warps,
        "shared memory": unit.shared // (shared + unit.reserved) if shared + unit.reserved else unit.blocks,
        "warps": unit.warps // warps,
        "blocks": unit.blocks,
    }
    least = min(limits.values())
    return least, next(name for name, limit in limits.items() if limit == least)


def bound(row: Row, kernels: list[KernelProfile]) -> list[str]:
    """What a measured row says about its limits, a sentence each.

    Args:
        row: an ``ok`` row of the workload.
        kernels: of the same workload, or an empty list where they are not known.
    """
    shares = {
        "the matrix units": row["matmul_share"],
        "device memory": row["copy_share"],
    }
    found = [
        f"{row['implementation']} takes {row['ms']:.4g} ms: {row['tflops']:.4g} TFLOP/s are {row['matmul_share']:.0%} "
        f"of a large matrix product, {row['gbs']:.4g} GB/s are {row['copy_share']:.0%} of a large copy"
    ]
    name, share = max(shares.items(), key=lambda item: item[1])
    multiprocessors = row["environment"].get("multiprocessors")
    main = max(kernels, key=lambda kernel: kernel.programs, default=None)
    if share >= 0.6:
        found.append(f"bound by {name}")
    elif main is not None and multiprocessors and main.programs < multiprocessors * main.resident:
        found.append(
            f"bound by parallelism: {main.programs} programs, where {multiprocessors} multiprocessors hold "
            f"{multiprocessors * main.resident} at a time"
        )
    elif row.get("host_us") and row["timer"] != "graph" and row["host_us"] > 900 * row["ms"]:
        found.append(f"bound by the host, which needs {row['host_us']:.0f} µs a call")
    else:
        found.append(
            f"bound by none of the two alone ({name} at {share:.0%}): latencies and the softmax between the products, "
            "which few resident warps cannot hide"
        )
    if main is not None and multiprocessors and main.resident:
        waves = main.programs / (multiprocessors * main.resident)
        if 1 < waves < 4 and waves % 1 and waves / -(-waves // 1) < 0.85:
            found.append(f"{waves:.2f} waves of programs: the last one leaves multiprocessors idle")
    return found


def facts(workload: Workload, arch: str, kernels: list[KernelProfile]) -> dict[str, Any]:
    """Everything known without a run, as plain data."""
    return {
        "case": workload.name,
        "arch": arch,
        "flops": workload.flops(),
        "bytes": workload.bytes(),
        "intensity": workload.flops() / workload.bytes(),
        "kernels": [asdict(kernel) for kernel in kernels],
    }
