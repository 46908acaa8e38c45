"""The compile gate: what every entry of the tile tables costs on its architecture, against what was recorded.

    python tests/arch/footprints.py            compile everything and compare with the record of the installed Triton
    python tests/arch/footprints.py --write    and record what was seen
    python tests/arch/footprints.py --arch gfx1100 --match d256    some of it

Needs no GPU and no driver. `test_footprints.py` runs the same comparison one case a test.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from regard import AttentionConfig, AttentionInputs
from regard.backends import flash_launches, hopper
from regard.backends.key_splits import new_parts
from regard.backends.launch import new_results
from regard.backends.padded_rows import with_padded_rows
from regard.kernels import hopper_tuning, tuning

RECORDS = Path(__file__).parent / "recorded"

KIB = 1024
SHARED_LIMIT = {
    "sm80": 163 * KIB, "sm89": 99 * KIB, "sm90": 227 * KIB, "sm100": 227 * KIB, "sm120": 99 * KIB,
    "gfx90a": 64 * KIB, "gfx942": 64 * KIB, "gfx950": 160 * KIB, "gfx1100": 64 * KIB, "gfx1201": 64 * KIB,
}  # fmt: skip
"""Bytes of shared memory (LDS) a workgroup may have: CUDA C++ Programming Guide, technical specifications per compute
capability; AMD's ISA guides."""

BARRIER_BYTES = 8
BARRIER_SPACING = 32
"""From one mbarrier to the next, at most: arrays of them start at multiples of 16, and 16 bytes of Triton's own may lie
between. No tile is as small."""

MATRIX_INSTRUCTIONS = {
    "sm80": {"mma"}, "sm89": {"mma"}, "sm90": {"wgmma"}, "sm100": {"tcgen05", "mma"}, "sm120": {"mma"},
    "gfx90a": {"mfma"}, "gfx942": {"mfma"}, "gfx950": {"mfma"}, "gfx1100": {"wmma"}, "gfx1201": {"wmma"},
}  # fmt: skip
"""Kinds of matrix instruction of which a kernel on 16-bit inputs must use one."""


class Kernel(NamedTuple):
    """A kernel under the gate: its tile table (the Hopper kernels' cases are written out instead), its launch (kernel,
    arguments, options) for a call, and whether it multiplies matrices."""

    table: Mapping[tuple[str, int, int], tuple[tuning.Rule, ...]]
    launch: Callable[[AttentionConfig, AttentionInputs], tuple[Any, Mapping[str, Any], Mapping[str, int]]]
    products: bool = True


def _forward(config: AttentionConfig, inputs: AttentionInputs) -> tuple[Any, Mapping[str, Any], Mapping[str, int]]:
    parts = new_parts(config, inputs.q, hopper_tuning.MULTIPROCESSORS, flash_launches.splits_of)
    launch = flash_launches.forward_launches(config, inputs, *new_results(config, inputs), parts)[0]
    return launch.kernel, launch.arguments, launch.options


def _backward(index: int) -> Callable[..., tuple[Any, Mapping[str, Any], Mapping[str, int]]]:
    """Launch ``index`` of the backward."""

    def launch(config: AttentionConfig, inputs: AttentionInputs) -> tuple[Any, Mapping[str, Any], Mapping[str, int]]:
        grad_out, lse = new_results(config, inputs)
        launches = flash_launches.backward_launches(config, inputs, grad_out, lse, lse, inputs)
        if inputs.bias is not None:
            dbias = flash_launches.new_bias_gradient(config, inputs.bias)
            launches.append(flash_launches.bias_launch(config, inputs, grad_out, lse, lse, dbias))
        return launches[index].kernel, launches[index].arguments, launches[index].options

    return launch


def _hopper_forward(
    config: AttentionConfig, inputs: AttentionInputs
) -> tuple[Any, Mapping[str, Any], Mapping[str, int]]:
    launch = hopper.forward_launch(
        config,
        inputs,
        *new_results(config, inputs),
        _counter(inputs),
        hopper_tuning.MULTIPROCESSORS,
        _parts(config, inputs),
    )
    return launch.kernel, launch.arguments, launch.options


def _hopper_merge(config: AttentionConfig, inputs: AttentionInputs) -> tuple[Any, Mapping[str, Any], Mapping[str, int]]:
    parts = _parts(config, inputs)
    assert parts is not None, "its keys are split"
    launch = hopper.merge_launch(config, inputs, parts, *new_results(config, inputs))
    return launch.kernel, launch.arguments, launch.options


def _parts(config: AttentionConfig, inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What the splits of the keys pass on to their merge."""
    return hopper.new_parts(config, inputs.q, hopper_tuning.MULTIPROCESSORS)


def _hopper_backward(
    config: AttentionConfig, inputs: AttentionInputs
) -> tuple[Any, Mapping[str, Any], Mapping[str, int]]:
    grad_out, lse = new_results(config, inputs)
    launch = hopper.backward_launch(
        config, inputs, grad_out, lse, lse, _sums(config, inputs), inputs.k, inputs.v, _counter(inputs),
        hopper_tuning.MULTIPROCESSORS,
    )  # fmt: skip
    return launch.kernel, launch.arguments, launch.options


def _hopper_finish(
    config: AttentionConfig, inputs: AttentionInputs
) -> tuple[Any, Mapping[str, Any], Mapping[str, int]]:
    launch = hopper.finish_launch(config, inputs, _sums(config, inputs), inputs.q)
    return launch.kernel, launch.arguments, launch.options


def _sums(config: AttentionConfig, inputs: AttentionInputs) -> torch.Tensor:
    """The sums of dQ that pass between the two."""
    return inputs.q.new_empty(hopper.query_sums_shape(config), dtype=torch.float32)


def _counter(inputs: AttentionInputs) -> torch.Tensor:
    """The tile counter of a persistent kernel."""
    return inputs.q.new_empty(2, dtype=torch.int32)


def _hopper_two_pass(index: int) -> Callable[..., tuple[Any, Mapping[str, Any], Mapping[str, int]]]:
    """Launch ``index`` of the Hopper backward in two passes."""

    def launch(config: AttentionConfig, inputs: AttentionInputs) -> tuple[Any, Mapping[str, Any], Mapping[str, int]]:
        grad_out, lse = new_results(config, inputs)
        made = hopper.two_pass_launches(config, inputs, grad_out, lse, lse, inputs)[index]
        return made.kernel, made.arguments, made.options

    return launch


KERNELS = {
    "forward": Kernel(tuning.FORWARD, _forward),
    "backward-keys": Kernel(tuning.BACKWARD_KEYS, _backward(0)),
    "backward-queries": Kernel(tuning.BACKWARD_QUERIES, _backward(1)),
    "backward-bias": Kernel({}, _backward(2)),
    "hopper-forward": Kernel({}, _hopper_forward),
    "hopper-merge": Kernel({}, _hopper_merge, products=False),
    "hopper-backward": Kernel({}, _hopper_backward),
    "hopper-backward-finish": Kernel({}, _hopper_finish, products=False),
    "hopper-backward-keys": Kernel({}, _hopper_two_pass(0)),
    "hopper-backward-queries": Kernel({}, _hopper_two_pass(1)),
}


# --- Cases: every tile of a table (float32 has one set of tiles for a family of architectures: compiled once for each),
# causal where it serves that: such a kernel holds a plain one's loop; features; awkward head dims; everything at once.

_BATCH, _HEADS, _SEQLEN = 2, 8, 512
_ODD = 509
"""A length that is no multiple of 16, so that Triton cannot assume one."""
_SQUARE = (_BATCH, _HEADS, _ODD, _ODD)

_PAGED: dict[str, Any] = dict(kv_lens=True, page_size=16)

FEATURES: dict[str, dict[str, Any]] = {
    "window-alibi-softcap-sinks": dict(window=(128, 64), alibi=True, softcap=30.0, sinks=True),
    "bias": dict(bias_shape=_SQUARE, bias_dtype=torch.bfloat16, seqlen_q=_ODD, seqlen_k=_ODD),
    "dropout": dict(dropout_p=0.1, causal=True),
    "varlen-gqa": dict(varlen=True, total_q=_ODD, total_k=_ODD, heads_kv=2, causal=True),
    "paged-gqa": dict(**_PAGED, heads_kv=2, causal=True),
    "paged-decode": dict(**_PAGED, heads_kv=2, seqlen_q=1, seqlen_k=8192),
}
EVERYTHING: dict[str, Any] = dict(
    mask_shape=_SQUARE, bias_shape=_SQUARE, bias_dtype=torch.bfloat16, seqlen_q=_ODD, seqlen_k=_ODD, window=(128, 64),
    softcap=30.0, alibi=True, sinks=True, dropout_p=0.1, kv_lens=True, heads_kv=2,
)  # fmt: skip
FEATURE_ARCHITECTURES = ("sm80", "sm90", "gfx942", "gfx1100")
"""These compile features one by one too."""
EVERYTHING_ARCHITECTURES = (*FEATURE_ARCHITECTURES, "gfx1201")
"""These compile everything at once in the backward too, and at the largest head dim."""
FLOAT32_ARCHITECTURES = ("sm80", "gfx942", "gfx1100")
"""One of each family that shares its float32 tiles; the others compile head dim 64."""
HEAD_DIMS: dict[str, dict[str, Any]] = {
    "d40-mqa": dict(head_dim=40, heads_kv=1, causal=True),  # rows at multiples of 80 bytes
    "d192-dv128": dict(head_dim=192, head_dim_v=128, causal=True),
}
_HOPPER_EVERYTHING: dict[str, Any] = dict(
    varlen=True, total_q=_ODD, total_k=_ODD, heads_kv=2, window=(300, 64), alibi=True, sinks=True
)
_DECODE: dict[str, Any] = dict(seqlen_q=1, seqlen_k=8192, heads_kv=2, kv_lens=True)
_HOPPER_SPLITS: list[tuple[str, dict[str, Any]]] = [
    ("d64 split", dict(head_dim=64, seqlen_q=1, seqlen_k=8192, heads_kv=2)),
    ("d64 split causal k2048", dict(head_dim=64, heads_q=2, heads_kv=2, causal=True, seqlen_q=2048, seqlen_k=2048)),
    ("d128 split", dict(head_dim=128, **_DECODE)),
    ("d192-dv128 split", dict(head_dim=192, head_dim_v=128, causal=True, **_DECODE)),
    ("d256 split", dict(head_dim=256, **_DECODE)),
    ("d128 split everything", dict(head_dim=128, softcap=30.0, window=(8000, 64), alibi=True, sinks=True, **_DECODE)),
]
_HOPPER_TWO_PASSES: list[tuple[str, dict[str, Any]]] = [
    ("d128 deterministic", dict(head_dim=128, causal=True, deterministic=True)),
    ("d128 softcap", dict(head_dim=128, softcap=30.0)),
    ("d192-dv128", dict(head_dim=192, head_dim_v=128, causal=True)),
    ("d256 plain", dict(head_dim=256)),
    ("d256 causal", dict(head_dim=256, causal=True)),
    ("d128 everything", dict(head_dim=128, softcap=30.0, **_HOPPER_EVERYTHING)),
    ("d256 everything", dict(head_dim=256, softcap=30.0, **_HOPPER_EVERYTHING)),
]
HOPPER_CASES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "hopper-forward": [
        ("d64 plain", dict(head_dim=64)),
        ("d64 causal", dict(head_dim=64, causal=True)),
        ("d64 causal k4096", dict(head_dim=64, causal=True, seqlen_q=4096, seqlen_k=4096)),
        ("d64 causal cuts", dict(head_dim=64, causal=True, seqlen_q=_ODD)),
        ("d64 causal cuts k4096", dict(head_dim=64, causal=True, seqlen_q=_ODD, seqlen_k=4096)),
        ("d128 plain", dict(head_dim=128)),
        ("d128 varlen", dict(head_dim=128, varlen=True, total_q=_ODD, total_k=_ODD)),
        ("d128 causal", dict(head_dim=128, causal=True)),
        ("d128 causal", dict(head_dim=128, causal=True, dtype=torch.float16)),
        ("d128 causal cuts", dict(head_dim=128, causal=True, seqlen_q=_ODD)),
        ("d64 narrow", dict(head_dim=64, window=(127, 0))),
        ("d128 narrow", dict(head_dim=128, window=(127, 0))),
        ("d128 window", dict(head_dim=128, window=(400, 0))),
        ("d128 packed-gqa", dict(head_dim=128, causal=True, heads_kv=2)),
        ("d192-dv128", dict(head_dim=192, head_dim_v=128, causal=True)),
        ("d256 causal", dict(head_dim=256, causal=True)),
        ("d256 causal cuts", dict(head_dim=256, causal=True, seqlen_q=_ODD)),
        ("d128 everything", dict(head_dim=128, softcap=30.0, **_HOPPER_EVERYTHING)),
        *_HOPPER_SPLITS,
    ],
    "hopper-merge": [_HOPPER_SPLITS[0], *_HOPPER_SPLITS[4:]],
    "hopper-backward": [
        ("d64 plain", dict(head_dim=64)),
        ("d64 causal", dict(head_dim=64, causal=True)),
        ("d128 plain", dict(head_dim=128)),
        ("d128 causal", dict(head_dim=128, causal=True)),
        ("d64-dv128", dict(head_dim=64, head_dim_v=128)),
        ("d64 everything", dict(head_dim=64, **_HOPPER_EVERYTHING)),
        ("d128 everything", dict(head_dim=128, **_HOPPER_EVERYTHING)),
    ],
    "hopper-backward-finish": [
        ("d40 plain", dict(head_dim=40)),
        ("d64-dv128", dict(head_dim=64, head_dim_v=128)),
        ("d128 everything", dict(head_dim=128, **_HOPPER_EVERYTHING)),
    ],
    "hopper-backward-keys": _HOPPER_TWO_PASSES,
    "hopper-backward-queries": _HOPPER_TWO_PASSES,
}
"""Calls that between them compile every tile and every feature of the Gluon kernels."""


def cases(kernel: str, arch: str) -> dict[str, AttentionConfig]:
    """The covering set of calls for one architecture, by name."""
    made: dict[str, AttentionConfig] = {}

    def add(name: str, dtype: torch.dtype, **options: Any) -> None:
        sizes = dict(batch=_BATCH, seqlen_q=_SEQLEN, seqlen_k=_SEQLEN, heads_q=_HEADS, heads_kv=_HEADS)
        label = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
        made[f"{kernel} {name} {label}"] = AttentionConfig(
            **{**sizes, "dtype": dtype, "device": "cuda", "arch": arch, **options}  # type: ignore[arg-type]
        )

    if kernel in HOPPER_CASES:
        for name, options in HOPPER_CASES[kernel] if arch == "sm90" else ():
            add(name, **{"dtype": torch.bfloat16, **options})
        return made
    for (entry_arch, itemsize, head_dim), rules in KERNELS[kernel].table.items():
        if entry_arch != arch:
            continue
        if itemsize == 4:
            shared = kernel == "forward" and arch in FLOAT32_ARCHITECTURES
            alone = kernel == "forward" or (kernel == "backward-keys" and arch in FLOAT32_ARCHITECTURES)
            if shared or (head_dim == 64 and alone):
                add(f"d{head_dim} causal", torch.float32, head_dim=head_dim, causal=True)
            continue
        for causal, length, by_tma, steady in _calls_by_tile(rules).values():
            name = f"d{head_dim} {'causal' if causal else 'plain'}" + (f" k{length}" if length != _SEQLEN else "")
            name += "" if by_tma else " lengths"  # of which TMA knows nothing
            options = dict(seqlen_q=length, seqlen_k=length, causal=causal, kv_lens=not by_tma)
            follows = kernel == "forward" and any(rule.tile.steady for rule in rules) and not steady
            dtype = torch.float16 if follows else torch.bfloat16  # whose maxima would stay
            add(name + (" steady" if steady else ""), dtype, head_dim=head_dim, **options)
        for rows, paged, length in _calls_of_few_rows(rules):
            name = f"d{head_dim} rows{rows} k{length}" + (" paged" if paged else "")
            few = dict(head_dim=head_dim, heads_kv=2, seqlen_q=rows * 2 // _HEADS, seqlen_k=length, causal=True)
            add(name, torch.bfloat16, **few, **(_PAGED if paged else {}))
        if kernel == "forward" and any(rule.aligned is False for rule in rules):
            add(f"d{head_dim - 8}-mqa unaligned", torch.bfloat16, head_dim=head_dim - 8, heads_kv=1)
            if any(rule.tile.by_tma for rule in rules):
                name = f"d{head_dim - 8}-mqa unaligned lengths"
                add(name, torch.bfloat16, head_dim=head_dim - 8, heads_kv=1, kv_lens=True)
    if arch in EVERYTHING_ARCHITECTURES:
        add("d128 everything", torch.bfloat16, head_dim=128, **EVERYTHING)
    if kernel != "forward":
        return made  # its features are the forward's own device functions: all at once is enough
    if arch in EVERYTHING_ARCHITECTURES:
        add("d256 everything", torch.bfloat16, head_dim=256, **EVERYTHING)
    if arch in FLOAT32_ARCHITECTURES:
        add("d64 everything", torch.float32, head_dim=64, **EVERYTHING)
    if arch in FEATURE_ARCHITECTURES:
        add("d128 causal", torch.float16, head_dim=128, causal=True)
        for name, options in FEATURES.items():
            add(f"d128 {name}", torch.bfloat16, head_dim=128, **options)
        for name, options in HEAD_DIMS.items():
            add(name, torch.bfloat16, **options)
    return made


def _calls_by_tile(rules: tuple[tuning.Rule, ...]) -> dict[tuning.Tile, tuple[bool, int, bool, bool]]:
    """For each tile that aligned calls get, one of them: causal, its length, whether TMA can bring the tiles, and
    whether maxima may stay.
    """
    found: dict[tuning.Tile, tuple[bool, int, bool, bool]] = {}
    lengths = sorted({_SEQLEN, *(rule.min_seqlen_k for rule in rules if rule.min_seqlen_k)})
    for steady, by_tma, length, causal in itertools.product((False, True), (True, False), lengths, (True, False)):
        call = tuning.Call(causal, length, flash_launches.triton_version(), by_tma=by_tma, steady=steady)
        tile = next(rule.tile for rule in rules if rule.applies(call))
        found.setdefault(tile, (causal, length, by_tma, tile.steady))
    return found


def _calls_of_few_rows(rules: tuple[tuning.Rule, ...]) -> Iterator[tuple[int, bool, int]]:
    """For each rule of few rows a call of which it is the first: rows, whether keys are paged, and how many there are,
    if possible enough to be taken in parts.
    """
    for rule in rules:
        for length in (8192, _SEQLEN) if rule.max_rows < tuning.MANY_ROWS else ():
            call = tuning.Call(
                True, length, flash_launches.triton_version(), rows=rule.max_rows, paged=rule.paged is True
            )
            if next(first for first in rules if first.applies(call)) is rule:
                yield call.rows, call.paged, length
                break


# --- Measuring


def measure(name: str, config: AttentionConfig) -> dict[str, Any]:
    """Compile one case and return its record: the tile it runs with and its `Footprint`; of one that is given TMA
    descriptors also whether it copies with TMA and what ptxas says of wgmma instructions that it made wait; of a Gluon
    kernel `stray_barriers`."""
    from regard.export.cross_compile import (
        barrier_offsets,
        compile_launch,
        footprint,
        has_tma,
        meta_inputs,
        tile_of,
        wgmma_serializations,
    )

    gated = KERNELS[name.split()[0]]
    kernel, arguments, options = gated.launch(config, with_padded_rows(meta_inputs(config)))
    arch = tuning.table_architecture(config.arch)
    assert arch is not None
    compiled = compile_launch(kernel, arguments, options, arch)
    block, stages = tile_of(arguments, options)
    block += f" d{arguments['DIMS']}" if arguments.get("DIMS", 256) < config.head_dim else ""
    record = {"tile": f"{block} w{compiled.metadata.num_warps} s{stages}", **footprint(compiled, arch)._asdict()}
    if not gated.products:
        record["products"] = False
    if any(hasattr(argument, "block_shape") for argument in arguments.values()):
        record |= {"tma": has_tma(compiled), "serialized": wgmma_serializations(compiled, arch)}
    if kernel.is_gluon():
        record["stray_barriers"] = stray_barriers(barrier_offsets(compiled))
    return record


def stray_barriers(offsets: Sequence[int]) -> list[int]:
    """Barriers, from where all of them lie in ascending order, that share memory with something else.

    Triton packs barriers side by side, 8 bytes each, beyond the tiles. One that nothing uses after its initialization
    is free to be overlaid, by a tile or another barrier; but the hardware may still write it (PTX ISA, mbarrier.inval).
    """
    together = [[offsets[0]]]
    stray = []
    for before, offset in itertools.pairwise(offsets):
        if offset - before < BARRIER_BYTES:
            stray.append(offset)
        elif offset - before <= BARRIER_SPACING:
            together[-1].append(offset)
        else:
            together.append([offset])
    together.remove(max(together, key=len))
    return sorted([*stray, *itertools.chain(*together)])


@contextlib.contextmanager
def compiling_processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """Fresh processes to call `measure` in: they compile where this one may interpret, and a compiler that aborts takes
    only itself down."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "0"
    with ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_start) as pool:
        try:
            for ready in [pool.submit(os.getpid) for _ in range(count)]:
                ready.result()
        finally:
            os.environ.pop("TRITON_INTERPRET")
            if before is not None:
                os.environ["TRITON_INTERPRET"] = before
        yield pool


def _start() -> None:
    warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION")  # Triton 3.9, once a process
    torch.set_num_threads(1)


# --- Judging


def faults(config: AttentionConfig, seen: Mapping[str, Any], recorded: Mapping[str, Any] | None) -> list[str]:
    """What is wrong with a measured case, a sentence each: limits of the hardware, then figures that got worse."""
    found = []
    arch = tuning.table_architecture(config.arch) or config.arch
    limit = SHARED_LIMIT[arch]
    if seen["shared"] > limit:
        found.append(f"shared memory is {seen['shared']} bytes; {arch} has {limit} for a workgroup")
    products = seen.get("products", True)
    kinds = MATRIX_INSTRUCTIONS[arch]
    if products and arch == "sm90" and int(seen["tile"].split("x")[0]) < 64:
        kinds = {"mma", "wgmma"}  # wgmma multiplies 64 rows at a time, which of a backward tile may be the keys
    if products and config.dtype.itemsize == 2 and not kinds & set(seen["matrix"].split("+")):
        found.append(f"no matrix instruction: found {seen['matrix'] or 'none'}, expected {' or '.join(sorted(kinds))}")
    if config.dtype == torch.float32 and arch.startswith("sm") and seen["matrix"]:
        found.append(f"float32 products use {seen['matrix']}, which rounds them to tf32 unasked")
    if not seen.get("tma", True):
        found.append("no TMA: found no cp.async.bulk.tensor in the PTX")
    found += [
        f"the mbarrier at byte {offset} of shared memory is not side by side with the others: a tile may share its memory"
        for offset in seen.get("stray_barriers", ())
    ]
    found += [f"ptxas on wgmma: {sentence}" for sentence in seen.get("serialized", ())]
    if recorded is None:
        return [*found, f"no record of this case (seen: {describe(seen)}); record it with footprints.py --write"]
    for figure, unit in (("spills", "bytes a thread"), ("shared", "bytes")):
        if seen[figure] > recorded[figure]:
            found.append(
                f"{figure} rose from {recorded[figure]} to {seen[figure]} {unit} "
                f"(recorded: {describe(recorded)}; seen: {describe(seen)})"
            )
    if not set(recorded["matrix"].split("+")) <= set(seen["matrix"].split("+")) and recorded["matrix"]:
        found.append(f"matrix instructions went from {recorded['matrix']} to {seen['matrix'] or 'none'}")
    return found


def improvements(seen: Mapping[str, Any], recorded: Mapping[str, Any]) -> list[str]:
    """Figures better than recorded, a sentence each."""
    return [
        f"{figure} fell from {recorded[figure]} to {seen[figure]}"
        for figure in ("spills", "shared")
        if seen[figure] < recorded[figure]
    ]


def describe(record: Mapping[str, Any]) -> str:
    """A record in one line."""
    return (
        f"{record['tile']}, {record['registers']} registers, {record['shared']} B shared, {record['spills']} B spilled, "
        f"{record['matrix'] or 'no matrix instruction'}"
    )


# --- Records


def record_path() -> Path:
    return RECORDS / "triton-{}.{}.json".format(*flash_launches.triton_version())


def read_records() -> dict[str, dict[str, Any]] | None:
    """Recorded figures by architecture and case for the installed Triton, or None where that version has none."""
    path = record_path()
    return json.loads(path.read_text()) if path.exists() else None


def write_records(records: Mapping[str, Mapping[str, Any]]) -> None:
    """Write one case a line, so that an upgrade shows as a diff."""
    blocks = []
    for arch, by_case in records.items():
        lines = ",\n".join(f"    {json.dumps(case)}: {json.dumps(record)}" for case, record in by_case.items())
        blocks.append(f'  "{arch}": {{\n{lines}\n  }}')
    RECORDS.mkdir(exist_ok=True)
    record_path().write_text("{\n" + ",\n".join(blocks) + "\n}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="record what was seen for the installed Triton version")
    parser.add_argument("--arch", action="append", choices=tuning.ARCHITECTURES, help="only this architecture")
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compiling processes (default: %(default)s)")
    arguments = parser.parse_args()

    previous = read_records() or {}
    records: dict[str, dict[str, Any]] = {}
    wrong = 0
    with compiling_processes(arguments.jobs) as pool:
        running = {}
        for arch in tuning.ARCHITECTURES:
            selected = arguments.arch is None or arch in arguments.arch
            records[arch] = {}
            for kernel in KERNELS:
                for case, config in cases(kernel, arch).items():
                    if selected and arguments.match in case:
                        running[arch, case] = config, pool.submit(measure, case, config)
                    elif case in previous.get(arch, {}):
                        records[arch][case] = previous[arch][case]
        for (arch, case), (config, future) in running.items():
            recorded = previous.get(arch, {}).get(case)
            try:
                seen = future.result()
            except Exception as error:
                print(f"FAIL {arch} {case}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
                wrong += 1
                continue
            records[arch][case] = seen
            found = faults(config, seen, seen if arguments.write else recorded)
            wrong += bool(found)
            print(f"{'FAIL' if found else 'ok  '} {arch} {case}: {describe(seen)}", flush=True)
            changes = improvements(seen, recorded) + faults(config, seen, recorded) if recorded else found
            for sentence in dict.fromkeys([*found, *changes]):
                print(f"       {sentence}", flush=True)
    if arguments.write:
        order = {arch: [c for kernel in KERNELS for c in cases(kernel, arch)] for arch in records}
        write_records({arch: {c: found[c] for c in order[arch] if c in found} for arch, found in records.items()})
        print(f"wrote {record_path()}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
