"""Compile a kernel launch for a GPU that is not there and read what it costs: registers, shared memory, spills.

Works from the launcher's own arguments on meta tensors, specialised as Triton's JIT would (None, 1 and constexprs
compiled in, divisibility by 16 noted, TMA descriptors by their block and layout), so that what is checked is what
ships. What differs between Triton versions or vendors is dealt with here and nowhere else.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from regard.config import AttentionConfig, AttentionInputs

TYPE_NAMES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
    torch.uint8: "u8",
}  # fmt: skip

_SHARED_ADDRESS = re.compile(r"(?:mov\.[bu]32|add\.s32)\s+(%r\d+), (global_smem|%r\d+)(?:, (\d+))?;")
_BARRIER = re.compile(r"mbarrier\.init\.shared(?:::cta)?\.b64 \[([^\]]*)\]")
_MATRIX_INSTRUCTION = re.compile(r"\b(?:v_(wmma|mfma)|(wgmma)\.mma_async|(tcgen05)\.mma|(mma)\.sync)")


@dataclass(frozen=True)
class Unknown:
    """An argument of a type, in Triton's words, of which nothing is compiled in but that it is a multiple of 16, or
    that it is the address of less than 2 GiB.
    """

    type: str
    divisible: bool = False
    within_2gib: bool = False


class Footprint(NamedTuple):
    """What one compiled kernel asks of the hardware.

    registers: a thread (VGPRs on AMD, accumulation VGPRs included). shared: bytes of LDS or shared memory a workgroup.
    spills: bytes of memory a thread (scratch on AMD, local memory on NVIDIA). matrix: the kinds of matrix instruction
    found, or "".
    """

    registers: int
    shared: int
    spills: int
    matrix: str


def target_of(arch: str) -> GPUTarget:
    """What Triton compiles for."""
    if arch.startswith("sm"):
        return GPUTarget("cuda", int(arch[2:]), 32)
    return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)


def compile_launch(kernel: Any, arguments: Mapping[str, Any], options: Mapping[str, int], arch: str) -> Any:
    """Compile a launch (arguments by name, as the launcher passes them) for ``arch``."""
    return triton.compile(source_of(kernel, arguments, arch), target=target_of(arch), options=dict(options))


def source_of(kernel: Any, arguments: Mapping[str, Any], arch: str) -> ASTSource:
    """A kernel with all that Triton's JIT would compile in of these arguments: equal ones are compiled once."""
    signature: dict[str, Any] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def describe(path: tuple[int, ...], value: Any, parameter: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(describe((*path, i), item, parameter) for i, item in enumerate(value))
        if isinstance(value, Unknown):
            divisible, within = [["tt.divisibility", 16]], [["tt.pointer_range", 32]]
            attributes[path] = divisible * value.divisible + within * value.within_2gib
            return value.type
        looked_at = isinstance(value, int) and not isinstance(value, bool) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (looked_at and value == 1):
            constexprs[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            if arch.startswith("gfx"):  # as the JIT does for tensors below 2 GiB: selects buffer loads
                attributes[path].append(["tt.pointer_range", 32])
            return "*" + TYPE_NAMES[value.dtype]
        if hasattr(value, "block_shape"):  # a TMA descriptor, of Gluon launches with a layout
            layout = f",{value.layout!r}" if kernel.is_gluon() else ""
            return f"tensordesc<{TYPE_NAMES[value.base.dtype]}{list(value.block_shape)}{layout}>"
        if isinstance(value, float):
            return "fp32"
        if looked_at and value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    for index, parameter in enumerate(kernel.params):
        signature[parameter.name] = describe((index,), arguments[parameter.name], parameter)
    if not kernel.is_gluon():
        return ASTSource(kernel, signature, constexprs, attributes)
    from triton.experimental.gluon._runtime import GluonASTSource  # exported one level up by newer versions

    return GluonASTSource(kernel, signature, constexprs, attributes)


def tile_of(arguments: Mapping[str, Any], options: Mapping[str, int]) -> tuple[str, int]:
    """A launch's tile, BLOCK_M x BLOCK_N or "" where it has none, and its pipeline's depth: 1 where it has none."""
    sizes = [arguments.get(name) for name in ("BLOCK_M", "BLOCK_N")]
    stages = [options.get("num_stages"), arguments.get("KEY_STAGES"), arguments.get("STAGES")]
    if "k_desc" in arguments:  # the Hopper backward has these as constants, and two stages where it names none
        sizes = [size or arguments[name].block_shape[2] for size, name in zip(sizes, ("q_desc", "k_desc"), strict=True)]
        stages.append(2)
    return "x".join(str(size) for size in sizes if size), next((stage for stage in stages if stage is not None), 1)


def footprint(compiled: Any, arch: str) -> Footprint:
    """Read a compiled kernel's resource use and its matrix instructions from the artefacts."""
    # AMD's .group_segment_fixed_size reads 0 for Triton kernels; the metadata holds the LDS on both vendors.
    shared = compiled.metadata.shared
    if arch.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s+(\d+)", text)
        spills = _number(r"\.private_segment_fixed_size:\s+(\d+)", text)
    else:
        text = compiled.asm["ptx"]
        usage = _cubin_usage(compiled.asm["cubin"])
        registers = _number(r"REG:(\d+)", usage)
        spills = _number(r"LOCAL:(\d+)", usage) + _number(r"STACK:(\d+)", usage)
    kinds = {kind for found in _MATRIX_INSTRUCTION.findall(text) for kind in found if kind}
    return Footprint(registers, shared, spills, "+".join(sorted(kinds)))


def has_tma(compiled: Any) -> bool:
    """Whether an NVIDIA kernel copies tiles with TMA."""
    return "cp.async.bulk.tensor" in compiled.asm["ptx"]


def barrier_offsets(compiled: Any) -> list[int]:
    """Where in its shared memory an NVIDIA kernel has its mbarriers: the byte of each, in ascending order.

    Raises:
        ValueError: the PTX initializes no barrier, or one at an address that this function cannot follow.
    """
    known = {"global_smem": 0}
    found = []
    for line in compiled.asm["ptx"].splitlines():
        if address := _SHARED_ADDRESS.search(line):
            register, base, offset = address.groups()
            if base in known:
                known[register] = known[base] + int(offset or 0)
        elif barrier := _BARRIER.search(line):
            if barrier[1] not in known:
                raise ValueError(f"the PTX has a barrier at {barrier[1]}, which is no constant place in shared memory")
            found.append(known[barrier[1]])
    if not found:
        raise ValueError(f"the PTX has no {_BARRIER.pattern}")
    return sorted(found)


def wgmma_serializations(compiled: Any, arch: str) -> list[str]:
    """What ptxas says of wgmma instructions that it serialized or waits for on its own (C7510, C7517 and their like):
    each means that products no longer overlap with anything.
    """
    from triton.backends.nvidia.compiler import get_ptxas  # which one it is depends on Triton's version

    capability = target_of(arch).arch
    ptxas = get_ptxas(capability).path
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(compiled.asm["ptx"])
        # wgmma belongs to the features of one architecture alone, which is what the "a" asks for.
        said = _output_of(ptxas, "-v", f"--gpu-name=sm_{capability}a", str(ptx), "-o", str(cubin))
    return sorted(set(re.findall(r"\bC75\d\d\b[^\n]*", said)))


def _cubin_usage(cubin: bytes) -> str:
    """`cuobjdump -res-usage` of a cubin, with the tool that Triton's wheel brings."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _output_of(str(tool), "-res-usage", file.name)


def _output_of(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    return done.stdout + done.stderr


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's output has no {pattern}")
    return int(found.group(1))


def meta_inputs(config: AttentionConfig) -> AttentionInputs:
    """Tensors without storage for a call that a config describes."""

    def tensor(*shape: int | None, dtype: torch.dtype = config.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")  # type: ignore[arg-type]

    batch, heads_q, heads_kv = config.batch, config.heads_q, config.heads_kv
    rows_q: tuple[int | None, ...] = (batch, config.seqlen_q)
    rows_k: tuple[int | None, ...] = (batch, config.seqlen_k)
    if config.varlen:
        rows_q, rows_k = (config.total_q,), (config.total_k,)
    block_table = None
    if config.page_size is not None:
        pages = config.seqlen_k // config.page_size
        rows_k = (batch * pages, config.page_size)
        block_table = tensor(batch, pages, dtype=torch.int32)
    offsets = tensor(batch + 1, dtype=torch.int32) if config.varlen else None
    return AttentionInputs(
        q=tensor(*rows_q, heads_q, config.head_dim),
        k=tensor(*rows_k, heads_kv, config.head_dim),
        v=tensor(*rows_k, heads_kv, config.head_dim_v),
        mask=None if config.mask_shape is None else tensor(*config.mask_shape, dtype=torch.bool),
        bias=None if config.bias_shape is None else tensor(*config.bias_shape, dtype=config.bias_dtype or config.dtype),
        alibi_slopes=tensor(heads_q, dtype=torch.float32) if config.alibi else None,
        sinks=tensor(heads_q, dtype=torch.float32) if config.sinks else None,
        cu_seqlens_q=offsets,
        cu_seqlens_k=offsets,
        kv_lens=tensor(batch, dtype=torch.int32) if config.kv_lens else None,
        block_table=block_table,
        dropout_seed=tensor(1, dtype=torch.int64) if config.dropout_p > 0 else None,
    )
