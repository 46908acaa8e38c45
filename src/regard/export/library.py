"""Writes the C source of an exported library, and builds it."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

import regard
from regard.backends import flash
from regard.errors import ConfigError
from regard.export.kernels import (
    FEATURES,
    SLOTS,
    STEPS,
    Kernel,
    Variant,
    architecture_order,
    check_architectures,
    compile_kernels,
    parse_features,
)

HEADER, SOURCE, KERNELS = "regard_attention.h", "regard_attention.c", "regard_kernels.h"
LIBRARY = "libregard_attention.so"

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
"""In the order of the header's numbers for them, from 1 on."""

Progress = Callable[[str, int, int], None]
"""Is told what is done, how much of it, and of how much."""


def write(
    folder: Path,
    *,
    archs: Sequence[str],
    dtypes: Sequence[str],
    head_dims: Sequence[tuple[int, int]],
    features: Sequence[str],
    backward: bool = False,
    progress: Progress | None = None,
) -> list[Kernel]:
    """Compile a kernel for every combination, and write the C source of a library that has them.

    Needs Triton, and no GPU. The folder then holds `HEADER`, `SOURCE` and `KERNELS`, the source's data. Products of
    float32 are computed as `torch.get_float32_matmul_precision` says now.

    Args:
        folder: where to; made if it is not there.
        archs: GPU architectures of one vendor, such as ``("sm80", "sm90")`` or ``("gfx1100",)``.
        dtypes: of `DTYPES`.
        head_dims: pairs of D and Dv.
        features: for each kernel the features that a call must have, see `regard.export.kernels.FEATURES`.
        backward: also the kernels of the gradients of q, k and v.
        progress: called for every combination.

    Returns:
        the kernels.

    Raises:
        ConfigError: an argument is malformed, or nothing can be written to the folder.
        UnsupportedError: the `flash` backend has reasons against such calls.
    """
    check_architectures(archs)
    for name in dtypes:
        if name not in DTYPES:
            raise ConfigError("dtype", repr(name), f"one of {', '.join(DTYPES)}")
    wanted = dict.fromkeys(
        (Variant(DTYPES[dtype], *dims, parse_features(each)), arch)
        for arch in sorted(archs, key=architecture_order)
        for dtype in dtypes
        for dims in head_dims
        for each in features
    )
    _make(folder)
    kernels: list[Kernel] = []
    for done, (variant, arch) in enumerate(wanted, 1):
        kernels += compile_kernels(variant, arch, backward=backward)
        if progress is not None:
            progress("compiling kernels", done, len(wanted))
    for name in (HEADER, SOURCE):
        (folder / name).write_text(importlib.resources.files(__package__).joinpath(name).read_text())
    (folder / KERNELS).write_text("\n".join(_data(kernels)) + "\n")
    return kernels


def find_compiler(name: str) -> str:
    """The path of a C compiler.

    Raises:
        ConfigError: there is none of that name.
    """
    path = shutil.which(name)
    if path is None:
        raise ConfigError("compiler", repr(name), "a C compiler on the PATH")
    return path


def build(folder: Path, compiler: str = "cc") -> Path:
    """Build the shared library from what `write` wrote; returns its path.

    Raises:
        ConfigError: there is no such compiler, or it failed, with what it said.
    """
    library = folder / LIBRARY
    command = [find_compiler(compiler), "-std=c11", "-O2", "-fPIC", "-fvisibility=hidden", "-shared"]
    done = subprocess.run(  # noqa: S603 - the caller's compiler
        [*command, "-o", str(library), str(folder / SOURCE), "-ldl", "-lm"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = f"{compiler!r}, which failed on {folder / SOURCE}\n{done.stderr}"
        raise ConfigError("compiler", said, "one that builds C11 (or --no-build)")
    return library


def _make(folder: Path) -> None:
    needed = "a folder that can be made and written to"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("folder", f"{str(folder)!r} ({error.strerror})", needed) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError("folder", f"{str(folder)!r} (without permission to write)", needed)


def name_of(dtype: torch.dtype) -> str:
    """Of `DTYPES`."""
    return next(name for name, each in DTYPES.items() if each == dtype)


def _data(kernels: Sequence[Kernel]) -> Iterator[str]:
    """The lines of `KERNELS`."""
    versions = {"regard": regard.__version__, "triton": importlib.metadata.version("triton")}
    archs = list(dict.fromkeys(kernel.arch for kernel in kernels))
    yield f"/* Written by regard {versions['regard']} with Triton {versions['triton']}. */"
    yield f"#define REGARD_HIP {int(archs[0].startswith('gfx'))}"
    yield f"static const char architectures[] = {json.dumps(', '.join(archs))};"
    yield from _array("char description", json.dumps(_description(kernels, versions)).encode() + b"\0")
    yield f"static const char *const dtype_names[] = {{{_strings(['', *DTYPES])}}};"
    yield f"static const char *const feature_names[] = {{{_strings(list(FEATURES))}}};"
    yield f"enum {{{', '.join(f'FEATURE_{name} = {1 << bit}' for bit, name in enumerate(FEATURES))}}};"
    yield f"static const float least_softcap = {flash.LEAST_SOFTCAP}f;"
    greatest = (flash.greatest_softcap(dtype) for dtype in DTYPES.values())
    yield f"static const float greatest_softcaps[] = {{0, {', '.join(map(str, greatest))}}};"
    yield f"enum {{{', '.join(f'STEP_{name}' for name in STEPS)}}};"
    yield f"enum {{{', '.join(f'SLOT_{name}' for name in SLOTS)}, SLOT_COUNT}};"
    for i, kernel in enumerate(kernels):
        yield f"static const unsigned char slots_{i}[] = {{{', '.join(f'SLOT_{name}' for name in kernel.slots)}}};"
        yield from _array(f"unsigned char image_{i}", kernel.image)
    yield "static const struct kernel kernels[] = {"
    for i, kernel in enumerate(kernels):
        fields = {
            "arch": f'"{kernel.arch}"',
            "step": f"STEP_{kernel.step}",
            "dtype": 1 + list(DTYPES.values()).index(kernel.variant.dtype),
            "head_dim": kernel.variant.head_dim,
            "head_dim_v": kernel.variant.head_dim_v,
            "features": " | ".join(f"FEATURE_{name}" for name in kernel.variant.features) or 0,
            "strides_of": kernel.strides_of,
            "most_bytes": kernel.most_bytes,
            "rows": kernel.rows,
            "threads": kernel.threads,
            "shared": kernel.footprint.shared,
            "name": f'"{kernel.name}"',
            "image": f"image_{i}",
            "slots": f"slots_{i}",
            "slot_count": len(kernel.slots),
        }
        yield f"    {{{', '.join(f'.{name} = {value}' for name, value in fields.items())}}},"
    yield "};"


def _array(name: str, data: bytes) -> Iterator[str]:
    """A definition as numbers: strings of C need not be longer than 4095."""
    yield f"static const {name}[] = {{"
    yield from (",".join(map(str, data[at : at + 40])) + "," for at in range(0, len(data), 40))
    yield "};"


def _strings(texts: Sequence[str]) -> str:
    return ", ".join(map(json.dumps, texts))


def _description(kernels: Sequence[Kernel], versions: dict[str, str]) -> dict[str, object]:
    """What `regard_description` returns."""
    return {
        **versions,
        "kernels": [
            {
                "arch": kernel.arch,
                "dtype": name_of(kernel.variant.dtype),
                "head_dim": kernel.variant.head_dim,
                "head_dim_v": kernel.variant.head_dim_v,
                "features": list(kernel.variant.features),
                "step": kernel.step,
                "rows_per_program": kernel.rows,
                "threads": kernel.threads,
                "registers": kernel.footprint.registers,
                "spilled_bytes": kernel.footprint.spills,
                "shared_bytes": kernel.footprint.shared,
                "float32_products": kernel.precision,
                "strides_of": kernel.strides_of,
            }
            for kernel in kernels
        ],
    }
