"""What a workload's kernels ask of a GPU, from their compiled code, and what bounds their time, from one run.

The compiled part needs no GPU: our Triton backends are called on tensors without storage, their launches are written
down instead of made, and each is compiled for the architecture asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from regard.backends import hopper
from regard.backends.launch import Launch
from regard.bench.cases import Workload
from regard.bench.rows import Row
from regard.config import AttentionConfig, AttentionInputs
from regard.errors import ConfigError, UnsupportedError
from regard.export import require_compiler
from regard.kernels import hopper_tuning, tuning
from regard.registry import registry

BACKENDS = ("hopper", "flash")
"""Those whose launches can be written down, in the order automatic selection tries them."""

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
        backend: whose.
        kernel: its name.
        tile: BLOCK_M x BLOCK_N, or "" where it has none.
        warps: of a program, those that only load included.
        stages: depth of its pipeline.
        programs: how many the call launches.
        registers: of a thread. spills: bytes of a thread. shared: bytes of a program.
        matrix: kinds of matrix instruction, or "".
        resident: programs one multiprocessor holds at a time; limited_by: what keeps it from holding more.
        occupancy: resident warps of all it could hold.
    """

    backend: str
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
    """Compile every kernel that each of `BACKENDS` launches for a workload it can serve.

    Raises:
        ConfigError: no tile table for the architecture, no Triton, or one that runs as an interpreter.
        UnsupportedError: no backend can serve the workload there.
    """
    entry = tuning.table_architecture(arch)
    if entry is None:
        raise ConfigError("arch", repr(arch), f"one of {', '.join(tuning.ARCHITECTURES)}")
    config = workload.config("cuda", arch)
    reasons = {name: registry.reasons(name, config) for name in BACKENDS}
    if all(reasons.values()):
        raise UnsupportedError(f"no Triton kernel can serve {workload.name} on {arch}", reasons)
    require_compiler()
    from regard.export.cross_compile import meta_inputs

    return [
        _profile(name, launch, entry)
        for name, against in reasons.items()
        if not against
        for launch in launches(name, config, meta_inputs(config), workload.mode)
    ]


def _profile(backend: str, launch: Launch, arch: str) -> KernelProfile:
    from regard.export.cross_compile import compile_launch, footprint, tile_of

    compiled = compile_launch(launch.kernel, launch.arguments, launch.options, arch)
    cost = footprint(compiled, arch)
    warps = int(compiled.metadata.num_warps)
    resident, limited_by = residency(MULTIPROCESSORS[arch], warps, cost.registers, cost.shared)
    tile, stages = tile_of(launch.arguments, launch.options)
    return KernelProfile(
        backend=backend, kernel=launch.kernel.__name__, tile=tile, warps=warps, stages=stages,
        programs=launch.programs, registers=cost.registers, spills=cost.spills, shared=cost.shared,
        matrix=cost.matrix, resident=resident, limited_by=limited_by,
        occupancy=resident * warps / MULTIPROCESSORS[arch].warps,
    )  # fmt: skip


def launches(backend: str, config: AttentionConfig, inputs: AttentionInputs, mode: str) -> list[Launch]:
    """The kernel launches of a backend for a call in a mode, written down instead of made."""
    made: list[Launch] = []
    with _written_down(made):
        q = inputs.q
        out = q.new_empty(inputs.out_shape)
        lse = q.new_empty(inputs.lse_shape, dtype=torch.float32)
        if mode != "bwd":
            registry.get(backend).forward(config, inputs)
        if mode != "fwd":
            registry.get(backend).backward(config, inputs, out, lse, torch.empty_like(out), None)
    return made


@contextmanager
def _written_down(made: list[Launch]) -> Iterator[None]:
    """Launches are noted, and what `hopper` asks of a GPU is answered for one that is not there."""

    def write_down(self: Launch, device: torch.device) -> None:
        assert device.type == "meta"
        made.append(self)

    with (
        patch.object(Launch, "run", write_down),
        patch.object(hopper, "tile_counter", lambda device: torch.empty(2, dtype=torch.int32, device=device)),
        patch.object(hopper, "multiprocessors", lambda _device: hopper_tuning.MULTIPROCESSORS),
    ):
        yield


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
        kernels: of the same workload; those of other implementations do not count.
    """
    kernels = [kernel for kernel in kernels if kernel.backend == row["implementation"]]
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
