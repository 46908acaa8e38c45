"""``regard export``: arguments to a library's sources, and what is printed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regard.errors import ConfigError


def export(
    folder: Annotated[Path, typer.Argument(help="Where the C source goes.")],
    arch: Annotated[str, typer.Option(help="gfx1100, sm90, ...; several of one vendor with commas.")],
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32; several with commas.")] = "float16,bfloat16",
    head_dim: Annotated[str, typer.Option(help="D, or D:Dv; several with commas.")] = "64,128",
    features: Annotated[
        str, typer.Option(help="What the calls of each kernel have, joined by '+'; kernels with commas.")
    ] = "plain,causal,causal+kv_lens,causal+paged,mask",
    backward: Annotated[bool, typer.Option("--backward", help="With kernels for the gradients of q, k and v.")] = False,
    build: Annotated[bool, typer.Option(help="Build the shared library too.")] = True,
    compiler: Annotated[str, typer.Option(help="The C compiler for that.")] = "cc",
) -> None:
    """Write a C library of attention kernels for programs without Python. Needs Triton, and no GPU."""
    from regard.cli import one_line_errors, progress_bars, table

    with one_line_errors():
        from rich.console import Console

        from regard.export import require_compiler

        require_compiler()
        from regard.export import library

        if build:
            library.find_compiler(compiler)
        with progress_bars(Console(stderr=True)) as progress:
            kernels = library.write(
                folder,
                archs=_listed(arch),
                dtypes=_listed(dtype),
                head_dims=[_head_dims(each) for each in _listed(head_dim)],
                features=_listed(features),
                backward=backward,
                progress=progress,
            )
            made = library.build(folder, compiler) if build else folder / library.SOURCE
        rows = [
            (
                kernel.arch,
                library.name_of(kernel.variant.dtype),
                f"{kernel.variant.head_dim}, {kernel.variant.head_dim_v}",
                " ".join(kernel.variant.features) or "plain",
                kernel.step,
                f"{kernel.footprint.registers}, {kernel.footprint.spills}",
                f"{len(kernel.image):,}",
            )
            for kernel in kernels
        ]
        columns = ["arch", "dtype", "head dims", "features", "step", "registers, spilled bytes", "bytes"]
        Console().print(table(columns, rows))
        typer.echo(f"wrote {made}; {folder / library.HEADER} says how it is called")


def _listed(text: str) -> list[str]:
    return [each.strip() for each in text.split(",")]


def _head_dims(text: str) -> tuple[int, int]:
    try:
        head_dim, colon, head_dim_v = text.partition(":")
        return int(head_dim), int(head_dim_v if colon else head_dim)
    except ValueError:
        raise ConfigError("head_dim", repr(text), "a number, or two with a colon: 128, 192:128") from None
