"""Which kernels an exported library has, and how a C program's arguments become their parameters.

They are the `flash` backend's, on what its launcher would pass, but that all which a call decides stays a parameter:
lengths, heads, strides, scale, the sides of a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton

from regard.backends import flash, flash_launches
from regard.backends.launch import Launch, new_results
from regard.backends.padded_rows import with_padded_rows
from regard.config import AttentionConfig
from regard.errors import ConfigError, UnsupportedError
from regard.export.cross_compile import (
    TYPE_NAMES,
    Footprint,
    Unknown,
    compile_launch,
    footprint,
    meta_inputs,
    target_of,
)
from regard.kernels import tuning

_SEQLEN = 16411  # as of a long call; prime, since kernels must not count on whole blocks
_SIZES = dict(batch=3, seqlen_q=_SEQLEN, seqlen_k=_SEQLEN, heads_q=6, heads_kv=2)

FEATURES: Mapping[str, Mapping[str, Any]] = {
    "causal": dict(causal=True),
    "window": dict(window=(1000, 1000)),
    "mask": dict(mask_shape=(1, 1, _SEQLEN, _SEQLEN)),
    "bias": dict(bias_shape=(1, 1, _SEQLEN, _SEQLEN)),
    "softcap": dict(softcap=30.0),
    "alibi": dict(alibi=True),
    "sinks": dict(sinks=True),
    "varlen": dict(varlen=True, total_q=3 * _SEQLEN, total_k=3 * _SEQLEN),
    "kv_lens": dict(kv_lens=True),
    "paged": dict(kv_lens=True, page_size=16, seqlen_k=_SEQLEN // 16 * 16),
}
"""What a kernel can be compiled for, and what says so in an `AttentionConfig`.

A causal kernel serves any right side of a window, a window kernel any two sides, causal or not.
"""

_IMPLIED = {"window": "causal", "paged": "kv_lens"}
_NOT_PACKED = ("mask", "bias", "kv_lens", "paged")

STEPS = ("forward", "row_terms", "keys", "queries")
"""What a kernel is of: the forward, or in their order the launches of the backward."""

_ROWS = ("q", "k", "v", "out", "grad_out", "dq", "dk", "dv")
_PAIRS = ("mask", "bias")
_CLOSE = {f"{name}_strides" for name in (*_ROWS, *_PAIRS)}
"""Elements of a row lie side by side: of these the last stride is 1."""

_WIDE = {
    **{f"{name}_strides": (0, 2) for name in _ROWS},
    **{f"{name}_strides": (0, 1) for name in (*_PAIRS, "lse")},
    "alibi_strides": (0,),
}
"""Strides of 64 bits: those between batches and heads. The kernels multiply those between rows by 32-bit numbers."""

_ALIGNED = {f"{name}_ptr" for name in (*_ROWS, *_PAIRS)}
"""Addresses that must be multiples of 16."""

_BUFFERS = {*_ALIGNED, "block_table_ptr"}
"""Addresses that AMD's loads and stores of buffers, which take less of the registers, are worth it for."""

SLOTS = (
    *(f"{name}_ptr" for name in (*_ROWS, *_PAIRS)),
    *(f"{name}_strides_{i}" for name in (*_ROWS, *_PAIRS) for i in range(3)),
    "lse_ptr", "lse_strides_0", "lse_strides_1", "row_lse_ptr", "delta_ptr",
    "alibi_ptr", "alibi_strides_0", "sinks_ptr", "cu_seqlens_q_ptr", "cu_seqlens_k_ptr", "kv_lens_ptr",
    "block_table_ptr", "block_table_stride", "page_size",
    "heads_q", "heads_kv", "group", "seqlen_q", "seqlen_k", "total_q", "total_k", "rows", "readable_k",
    "softmax_scale", "softcap", "window_left", "window_right", "scratch",
)  # fmt: skip
"""Everything that a kernel may have for a parameter: the kernels' own names, strides one by one, and Triton's scratch
memory, which these kernels do without."""


@dataclass(frozen=True)
class Variant:
    """What one kernel is for.

    Attributes:
        dtype: of q, k, v, out and bias.
        head_dim, head_dim_v: of q and k, of v and out.
        features: of `FEATURES`; a call must have exactly these.
    """

    dtype: torch.dtype
    head_dim: int
    head_dim_v: int
    features: tuple[str, ...]

    def __post_init__(self) -> None:
        implied = {_IMPLIED.get(name) for name in self.features}
        names = tuple(name for name in FEATURES if name in self.features and name not in implied)
        object.__setattr__(self, "features", names)

    def config(self, arch: str) -> AttentionConfig:
        """A long call of this kind."""
        arguments: dict[str, Any] = dict(_SIZES)
        for name in self.features:
            arguments |= FEATURES[name]
        return AttentionConfig(
            **arguments, head_dim=self.head_dim, head_dim_v=self.head_dim_v, dtype=self.dtype,
            device="cuda", arch=arch,
        )  # fmt: skip


class Kernel(NamedTuple):
    """A compiled kernel.

    Attributes:
        arch, variant: what it is for.
        step: of `STEPS`.
        name: in the image.
        image: cubin or code object.
        slots: of `SLOTS`, one for each of its parameters.
        rows: queries of a program, or of the step "keys" keys.
        threads: of a program.
        footprint: what it asks of the hardware.
        precision: of its float32 products: "ieee", "tf32x3" or "tf32".
        strides_of: what strides of q, k, v and out must be multiples of.
        most_bytes: that a tensor may span; 0 is any that 64-bit offsets reach.
    """

    arch: str
    variant: Variant
    step: str
    name: str
    image: bytes
    slots: tuple[str, ...]
    rows: int
    threads: int
    footprint: Footprint
    precision: str
    strides_of: int
    most_bytes: int


def parse_features(text: str) -> tuple[str, ...]:
    """Features joined by "+" (``"causal+sinks"``), or ``"plain"`` for none.

    Raises:
        ConfigError: a feature is unknown, or two cannot be together.
    """
    names = [] if text == "plain" else text.split("+")
    for name in names:
        if name not in FEATURES:
            raise ConfigError("features", repr(text), f"'plain', or some of {', '.join(FEATURES)} joined by '+'")
    if "varlen" in names and (clash := [name for name in _NOT_PACKED if name in names]):
        raise ConfigError("features", repr(text), f"varlen without {', '.join(clash)}")
    return tuple(names)


def compile_kernels(variant: Variant, arch: str, *, backward: bool) -> list[Kernel]:
    """Compile the forward, and the backward if asked for; needs no such GPU.

    Raises:
        UnsupportedError: the `flash` backend has reasons against such calls.
    """
    config = replace(variant.config(arch), requires_grad=backward)
    if reasons := flash.FlashBackend().unsupported_reasons(config):
        raise UnsupportedError(f"no kernel can be exported for {config.describe()}", {"flash": reasons})
    return [_compile(variant, arch, step, launch) for step, launch in launches(config).items()]


def launches(config: AttentionConfig) -> dict[str, Launch]:
    """What the `flash` backend would launch for a call, by step."""
    inputs = with_padded_rows(meta_inputs(config))
    out, lse = new_results(config, inputs)
    made = flash_launches.forward_launches(config, inputs, out, lse, by_tma=False, steady=False)
    if config.requires_grad:
        made.append(flash_launches.row_terms_launch(config, inputs, out, out, lse, None, lse, lse))
        made += flash_launches.backward_launches(config, inputs, out, lse, lse, inputs, by_tma=False)
    return dict(zip(STEPS, made, strict=False))


def _compile(variant: Variant, arch: str, step: str, launch: Launch) -> Kernel:
    aligned = variant.head_dim % 16 == 0 and variant.head_dim_v % 16 == 0
    buffers = arch.startswith("gfx")  # which have 32-bit offsets
    arguments = dict(_unspecialized(launch.kernel, launch.arguments, aligned, buffers))
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True  # which is half of an image and more
        compiled = compile_launch(launch.kernel, arguments, launch.options, arch)
    slots = tuple(slot for name in launch.kernel.arg_names for slot in _slots(name, arguments[name]))
    return Kernel(
        arch=arch,
        variant=variant,
        step=step,
        name=compiled.metadata.name,
        image=compiled.asm["hsaco" if arch.startswith("gfx") else "cubin"],
        slots=(*slots, *["scratch"] * (_parameter_count(compiled) - len(slots))),
        rows=launch.arguments["BLOCK_N" if step == "keys" else "BLOCK_M"],
        threads=compiled.metadata.num_warps * target_of(arch).warp_size,
        footprint=footprint(compiled, arch),
        precision=launch.arguments.get("PRECISION", "ieee"),
        strides_of=16 if aligned else 1,
        most_bytes=2**31 - 2 if buffers else 0,  # as many bytes as Triton gives a buffer
    )


def _unspecialized(
    kernel: Any, arguments: Mapping[str, Any], aligned: bool, buffers: bool
) -> Iterator[tuple[str, Any]]:
    """A launch's arguments with what another call may have otherwise made `Unknown`."""
    for parameter in kernel.params:
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            yield name, value
        elif isinstance(value, tuple):
            is_given = arguments.get(name.replace("_strides", "_ptr"), value) is not None
            yield name, tuple(_unknown_strides(name, len(value), aligned)) if is_given else (1,) * len(value)
        elif isinstance(value, torch.Tensor):
            yield name, Unknown("*" + TYPE_NAMES[value.dtype], name in _ALIGNED, buffers and name in _BUFFERS)
        elif isinstance(value, float):
            yield name, Unknown("fp32")
        else:
            yield name, Unknown("i64" if name == "block_table_stride" else "i32", name == "readable_k")


def _unknown_strides(name: str, count: int, aligned: bool) -> Iterator[Any]:
    divisible = name in _CLOSE and (aligned or name in ("mask_strides", "bias_strides"))
    for i in range(count):
        of_rows = name == "lse_strides" and i == 2  # a query's follows the one before
        if of_rows or (i == count - 1 and (name in _CLOSE or name == "alibi_strides")):
            yield 1
        else:
            yield Unknown("i64" if i in _WIDE[name] else "i32", divisible)


def _slots(name: str, argument: Any) -> Sequence[str]:
    """Of the parameters that an argument becomes."""
    if isinstance(argument, tuple):
        return [f"{name}_{i}" for i, each in enumerate(argument) if isinstance(each, Unknown)]
    return [name] if isinstance(argument, Unknown) else []


def _parameter_count(compiled: Any) -> int:
    """How many parameters a compiled kernel has: those of its arguments, then addresses of scratch memory."""
    if "amdgcn" in compiled.asm:
        arguments: str = compiled.asm["amdgcn"].split(".args:", 1)[1].split(".group_segment_fixed_size", 1)[0]
        return arguments.count(".value_kind:") - arguments.count("hidden_")
    parameters: str = compiled.asm["ptx"].split(".entry", 1)[1].split(")", 1)[0]
    return parameters.count(".param ")


def architecture_order(arch: str) -> tuple[Any, ...]:
    """Sorts newer NVIDIA architectures first: of compute capability 8, a device also takes the images of older ones."""
    return -int(arch[2:]) if arch.startswith("sm") else 0, arch


def check_architectures(archs: Sequence[str]) -> None:
    """Raise a `ConfigError` unless one library can be for all of these."""
    for arch in archs:
        if tuning.table_architecture(arch) is None:
            raise ConfigError("arch", repr(arch), f"one of {', '.join(tuning.ARCHITECTURES)}")
    if len({target_of(arch).backend for arch in archs}) != 1:
        raise ConfigError("arch", ", ".join(archs) or "none", "architectures of one vendor")
