"""Compile a kernel launch for a GPU that is not there and read what it costs: registers, shared memory, spills.

Works from the launcher's own arguments on meta tensors, specialised as Triton's JIT would (None, 1 and constexprs
compiled in, divisibility by 16 noted), so that what is checked is what ships.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPE_NAMES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
    torch.uint8: "u8",
}  # fmt: skip


class Footprint(NamedTuple):
    """What one compiled kernel asks of the hardware.

    registers: per thread (VGPRs on AMD). shared: bytes of LDS or shared memory. spills: bytes of local memory a thread
    on NVIDIA, spilled VGPRs on AMD. matrix: the matrix instruction found, or "".
    """

    registers: int
    shared: int
    spills: int
    matrix: str


def target_of(arch: str) -> GPUTarget:
    if arch.startswith("sm"):
        return GPUTarget("cuda", int(arch[2:]), 32)
    return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)


def compile_launch(kernel: Any, arguments: Mapping[str, Any], options: Mapping[str, int], arch: str) -> Any:
    """Compile a launch (arguments by name, as the launcher passes them) for ``arch``."""
    signature: dict[str, Any] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    declared = {parameter.name: parameter.is_constexpr for parameter in kernel.params}

    def describe(path: tuple[int, ...], value: Any, constant: bool) -> Any:
        if isinstance(value, tuple):
            return tuple(describe((*path, i), item, constant) for i, item in enumerate(value))
        if constant or value is None or (isinstance(value, int) and not isinstance(value, bool) and value == 1):
            constexprs[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            if arch.startswith("gfx"):
                attributes[path].append(["tt.pointer_range", 32])
            return "*" + TYPE_NAMES[value.dtype]
        if isinstance(value, float):
            return "fp32"
        if value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    for index, name in enumerate(kernel.arg_names):
        signature[name] = describe((index,), arguments[name], declared[name])
    source = ASTSource(kernel, signature, constexprs, attributes)
    return triton.compile(source, target=target_of(arch), options=dict(options))


def footprint(compiled: Any, arch: str) -> Footprint:
    """Read a compiled kernel's resource use and its matrix instruction from the artefacts."""
    shared = compiled.metadata.shared
    if arch.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text).group(1))
        spills = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text).group(1))
        matrix = re.search(r"\bv_(wmma|mfma)\w*", text)
        return Footprint(registers, shared, spills, matrix.group(1) if matrix else "")
    ptx = compiled.asm["ptx"]
    matrix = re.search(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)", ptx)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    spills = int(re.search(r"LOCAL:(\d+)", usage).group(1)) + int(re.search(r"STACK:(\d+)", usage).group(1))
    return Footprint(registers, shared, spills, matrix.group(1) if matrix else "")
