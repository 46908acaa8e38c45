"""What is measured: workloads as data, the named suites, and grids made on the command line.

A workload is one call of a public function. Its name is one word without blanks, such as
``bwd-b2-s4096-h32/8-d128-bf16-causal``, and parses back to the workload, so that any row of a report can be repeated.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from regard.config import AttentionConfig
from regard.errors import ConfigError

MODES = ("fwd", "bwd", "fwdbwd")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
MASK_PATTERN = re.compile(r"[b1][h1][q1][k1]")

GRAMMAR = (
    "words joined by '-': fwd|bwd|fwdbwd, bN (batch), sN or qN and kN (lengths), hN or hN/N (query/KV heads), dN or "
    "dN/N (head dim of q and k/of v), fp16|bf16|fp32, causal, window=L:R, softcap=X, bias=PATTERN, mask=PATTERN (of b, "
    "h, q, k, or 1 where broadcast: 1hqk), alibi, sinks, varlen, paged=N; such as b2-s4096-h32/8-d128-bf16-causal"
)


@dataclass(frozen=True)
class Workload:
    """One call to measure.

    Attributes:
        mode: ``"fwd"``, ``"bwd"`` (the backward alone) or ``"fwdbwd"`` (both together, as a training step has them).
        batch, seqlen_q, seqlen_k, heads_q, heads_kv, head_dim, head_dim_v: shapes (head_dim_v None: head_dim).
        dtype: a key of `DTYPES`.
        causal, window, softcap: as in `regard.attention`.
        bias, mask: broadcast pattern over (B, Hq, Sq, Sk): a letter of ``"bhqk"`` keeps the dimension, ``1`` is size 1.
        alibi, sinks: with slopes, with sink logits.
        varlen: packed sequences of lengths rising evenly to seqlen_q and seqlen_k (see `lengths`).
        page_size: keys lie in pages of this size, scattered.

    Raises:
        ConfigError: a call of this shape cannot exist.
    """

    mode: str = "fwd"
    batch: int = 1
    seqlen_q: int = 1024
    seqlen_k: int = 1024
    heads_q: int = 8
    heads_kv: int = 8
    head_dim: int = 64
    head_dim_v: int | None = None
    dtype: str = "bf16"
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    softcap: float = 0.0
    bias: str | None = None
    mask: str | None = None
    alibi: bool = False
    sinks: bool = False
    varlen: bool = False
    page_size: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError("mode", repr(self.mode), ", ".join(MODES))
        if self.dtype not in DTYPES:
            raise ConfigError("dtype", repr(self.dtype), ", ".join(DTYPES))
        for size in ("batch", "seqlen_q", "seqlen_k"):
            if getattr(self, size) < 1:
                raise ConfigError(size, getattr(self, size), "at least 1: nothing is computed otherwise")
        if self.page_size is not None and self.page_size < 1:
            raise ConfigError("page_size", self.page_size, "at least 1 key a page")
        for name, pattern in (("bias", self.bias), ("mask", self.mask)):
            if pattern is not None and not MASK_PATTERN.fullmatch(pattern):
                raise ConfigError(name, repr(pattern), "a pattern such as 1hqk: b or 1, h or 1, q or 1, k or 1")
        if (self.varlen or self.page_size is not None) and (self.bias or self.mask):
            raise ConfigError("bias, mask", "one together with varlen or paged", "padded sequences")
        if self.varlen and self.page_size is not None:
            raise ConfigError("varlen", "it together with paged", "one of the two")
        if self.page_size is not None and self.mode != "fwd":
            raise ConfigError("mode", f"{self.mode} with a paged cache", "fwd: a cache has no gradient")
        self.config("cpu", "cpu")  # the one validator of shapes and semantics

    @property
    def name(self) -> str:
        """One word that says everything, and from which `parse` makes the workload again."""
        lengths = (
            [f"s{self.seqlen_q}"] if self.seqlen_q == self.seqlen_k else [f"q{self.seqlen_q}", f"k{self.seqlen_k}"]
        )
        heads = f"h{self.heads_q}" + (f"/{self.heads_kv}" if self.heads_kv != self.heads_q else "")
        head_dim = f"d{self.head_dim}" + (f"/{self.head_dim_v}" if self.head_dim_v not in (None, self.head_dim) else "")
        words = [self.mode] if self.mode != "fwd" else []
        return "-".join([*words, f"b{self.batch}", *lengths, heads, head_dim, self.dtype, *self.features()])

    def features(self) -> list[str]:
        """The words of the name that go beyond shapes and dtype."""
        words = ["causal"] if self.causal else []
        if self.window is not None:
            words.append("window=" + ":".join("none" if side is None else str(side) for side in self.window))
        if self.softcap:
            words.append(f"softcap={self.softcap:g}")
        words += [f"{name}={getattr(self, name)}" for name in ("bias", "mask") if getattr(self, name) is not None]
        words += [name for name in ("alibi", "sinks", "varlen") if getattr(self, name)]
        return words if self.page_size is None else [*words, f"paged={self.page_size}"]

    def lengths(self) -> list[tuple[int, int]]:
        """(query, key) length of each sequence: all full, or where packed rising evenly to the longest."""
        if not self.varlen:
            return [(self.seqlen_q, self.seqlen_k)] * self.batch

        def rising(longest: int, index: int) -> int:
            return max(1, longest * (index + 1) // self.batch)

        return [(rising(self.seqlen_q, i), rising(self.seqlen_k, i)) for i in range(self.batch)]

    def config(self, device: str, arch: str) -> AttentionConfig:
        """The configuration selection sees, of contiguous tensors."""
        totals = [sum(side) for side in zip(*self.lengths(), strict=True)]
        keys = self.seqlen_k
        if self.page_size is not None:
            keys = -(-keys // self.page_size) * self.page_size
        return AttentionConfig(
            batch=self.batch, seqlen_q=self.seqlen_q, seqlen_k=keys, heads_q=self.heads_q, heads_kv=self.heads_kv,
            head_dim=self.head_dim, head_dim_v=self.head_dim if self.head_dim_v is None else self.head_dim_v,
            dtype=DTYPES[self.dtype], device=device, arch=arch, causal=self.causal, window=self.window,
            softcap=self.softcap, mask_shape=self.pattern_shape(self.mask), bias_shape=self.pattern_shape(self.bias),
            bias_dtype=DTYPES[self.dtype] if self.bias else None, alibi=self.alibi, sinks=self.sinks,
            varlen=self.varlen, total_q=totals[0] if self.varlen else None,
            total_k=totals[1] if self.varlen else None, kv_lens=self.page_size is not None, page_size=self.page_size,
            requires_grad=self.mode != "fwd", bias_requires_grad=self.mode != "fwd" and self.bias is not None,
        )  # fmt: skip

    def pattern_shape(self, pattern: str | None) -> tuple[int, ...] | None:
        """The 4-D shape of a mask or bias with this broadcast pattern."""
        if pattern is None:
            return None
        full = (self.batch, self.heads_q, self.seqlen_q, self.seqlen_k)
        return tuple(1 if letter == "1" else size for letter, size in zip(pattern, full, strict=True))

    def flops(self) -> int:
        """Operations of the matrix products the mode needs; what causal or a window hides is left out."""
        plain = replace(self, varlen=False, page_size=None, mode="fwd")
        total = 0
        for queries, keys in self.lengths():
            config = replace(plain, batch=1, seqlen_q=queries, seqlen_k=keys).config("cpu", "cpu")
            total += {"fwd": config.flops(), "bwd": config.flops(backward=True),
                      "fwdbwd": config.flops() + config.flops(backward=True)}[self.mode]  # fmt: skip
        return total

    def bytes(self) -> int:
        """Fewest bytes the mode must move: inputs read and results written, once each."""
        forward = self.config("cpu", "cpu").bytes()
        # The backward reads q, k, v, out, lse and the gradient of out, and writes the gradients of q, k and v.
        return {"fwd": 1, "bwd": 2, "fwdbwd": 3}[self.mode] * forward


def parse(name: str) -> Workload:
    """The workload of a name (see `GRAMMAR`).

    Raises:
        ConfigError: a word is not understood, or the call cannot exist.
    """
    values: dict[str, Any] = {}
    for word in name.strip().split("-"):
        found = _parse_word(word)
        if found is None:
            raise ConfigError("case", f"{word!r} in {name!r}", GRAMMAR)
        if values.keys() & found.keys():
            raise ConfigError("case", f"{word!r} beside another word for the same in {name!r}", GRAMMAR)
        values |= found
    values.setdefault("heads_kv", values.get("heads_q", Workload.heads_kv))
    for side, other in (("seqlen_q", "seqlen_k"), ("seqlen_k", "seqlen_q")):
        if side in values:
            values.setdefault(other, values[side])
    return Workload(**values)


def _parse_word(word: str) -> dict[str, Any] | None:
    if word in MODES:
        return {"mode": word}
    if word in DTYPES:
        return {"dtype": word}
    if word in ("causal", "alibi", "sinks", "varlen"):
        return {word: True}
    if sizes := re.fullmatch(r"([bsqkhd])(\d+)(?:/(\d+))?", word):
        letter, first, second = sizes[1], int(sizes[2]), sizes[3] and int(sizes[3])
        if letter == "h":
            return {"heads_q": first, "heads_kv": second or first}
        if letter == "d":
            return {"head_dim": first, "head_dim_v": second}
        names = {"b": ("batch",), "s": ("seqlen_q", "seqlen_k"), "q": ("seqlen_q",), "k": ("seqlen_k",)}[letter]
        return None if second else dict.fromkeys(names, first)
    key, _, value = word.partition("=")
    if key == "window" and re.fullmatch(r"(\d+|none):(\d+|none)", value):
        left, right = (None if side == "none" else int(side) for side in value.split(":"))
        return {"window": (left, right)}
    if key == "softcap" and re.fullmatch(r"\d+(\.\d+)?", value):
        return {"softcap": float(value)}
    if key in ("bias", "mask"):
        return {key: value}
    if key == "paged" and value.isdecimal():
        return {"page_size": int(value)}
    return None


# --- Suites


class Suite(NamedTuple):
    """A named list of workloads: what it measures in a sentence, and its workloads on a device type."""

    purpose: str
    workloads: Callable[[str], Iterable[Workload]]


def grid(**axes: Sequence[Any]) -> Iterator[Workload]:
    """Every combination of the values given for the workload's fields; ``seqlen`` stands for both lengths and ``heads``
    for both counts of heads.
    """
    for values in itertools.product(*axes.values()):
        cell = dict(zip(axes, values, strict=True))
        for short, pair in (("seqlen", ("seqlen_q", "seqlen_k")), ("heads", ("heads_q", "heads_kv"))):
            if short in cell:
                cell |= dict.fromkeys(pair, cell.pop(short))
        yield Workload(**cell)


def default_dtype(device: str) -> str:
    """What attention is mostly computed in on a device type."""
    return "fp32" if device == "cpu" else "bf16"


def _quick(device: str) -> Iterator[Workload]:
    dtype = default_dtype(device)
    plain = Workload(dtype=dtype)
    yield from grid(head_dim=(64,), seqlen=(128, 1024), dtype=(dtype,), causal=(False, True))
    yield from grid(head_dim=(128,), seqlen=(128, 512), dtype=(dtype,), causal=(False, True))
    yield replace(plain, dtype="bf16" if dtype == "fp32" else "fp16", seqlen_q=512, seqlen_k=512, causal=True)
    yield replace(plain, causal=True, window=(128, 0))
    yield replace(plain, mask="11qk")
    yield replace(plain, bias="1hqk")
    yield replace(plain, heads_kv=2, causal=True)
    yield from grid(seqlen_q=(1,), seqlen_k=(1024, 4096), heads_kv=(2,), head_dim=(128,), dtype=(dtype,))
    yield replace(plain, batch=4, varlen=True, causal=True)
    yield from grid(mode=("fwdbwd",), seqlen=(512,), dtype=(dtype,), causal=(False, True))


def _seeds(device: str) -> Iterator[Workload]:
    return grid(head_dim=(32, 64, 128), causal=(False, True), batch=(1, 2, 4, 8), seqlen=(128, 256, 512, 1024, 2048),
                dtype=(default_dtype(device),))  # fmt: skip


def _sixteen_k_tokens(device: str, mode: str, head_dims: Sequence[int]) -> Iterator[Workload]:
    """16k tokens and a model dimension of 2048; a sixteenth of the tokens on a CPU."""
    tokens, model_dim, dtype = (1024, 512, "fp32") if device == "cpu" else (16384, 2048, "bf16")
    for head_dim, causal in itertools.product(head_dims, (False, True)):
        for seqlen in (tokens >> shift for shift in reversed(range(6))):
            heads = max(1, model_dim // head_dim)
            yield Workload(mode, tokens // seqlen, seqlen, seqlen, heads, heads, head_dim, dtype=dtype, causal=causal)


def _decode(device: str) -> Iterator[Workload]:
    batches, caches = ((1, 8), (512, 2048, 8192)) if device == "cpu" else ((1, 8, 64), (1024, 4096, 16384, 65536))
    llama = dict(seqlen_q=(1,), heads_q=(32,), heads_kv=(8,), head_dim=(128,), dtype=(default_dtype(device),))
    yield from grid(batch=batches, seqlen_k=caches, **llama)
    yield from grid(batch=batches[-1:], seqlen_k=caches[:-1], page_size=(16, 256), **llama)
    yield from grid(batch=(1,), seqlen_k=caches[-1:], **{**llama, "seqlen_q": (4,)}, causal=(True,))


def _varlen(device: str) -> Iterator[Workload]:
    lengths = (256, 1024) if device == "cpu" else (512, 2048, 8192)
    common = dict(seqlen=lengths, head_dim=(64, 128), causal=(False, True), dtype=(default_dtype(device),))
    return grid(batch=(8,), varlen=(False, True), **common)


def _window(device: str) -> Iterator[Workload]:
    seqlen, heads = (4096, 8) if device == "cpu" else (16384, 16)
    reaches = (seqlen // 128, seqlen // 16, seqlen // 4)
    return grid(seqlen=(seqlen,), heads=(heads,), head_dim=(64, 128), causal=(True,), dtype=(default_dtype(device),),
                window=(None, *((reach, 0) for reach in reaches)))  # fmt: skip


def _bias(device: str) -> Iterator[Workload]:
    batch, heads, lengths = (2, 8, (512, 1024)) if device == "cpu" else (4, 16, (1024, 4096))
    for options in (dict(), dict(bias="1hqk"), dict(bias="b11k"), dict(mask="b1qk"), dict(alibi=True)):
        for head_dim, seqlen in itertools.product((64, 128), lengths):
            yield Workload("fwd", batch, seqlen, seqlen, heads, heads, head_dim, dtype=default_dtype(device), **options)


def _gqa(device: str) -> Iterator[Workload]:
    lengths = (512, 2048) if device == "cpu" else (2048, 8192)
    return grid(heads_q=(32,), heads_kv=(32, 8, 4, 1), seqlen=lengths, head_dim=(128,), causal=(True,),
                dtype=(default_dtype(device),))  # fmt: skip


def _longctx(device: str) -> Iterator[Workload]:
    lengths = (8192, 16384) if device == "cpu" else (32768, 65536, 131072)
    return grid(seqlen=lengths, heads_q=(2 if device == "cpu" else 16,), heads_kv=(2,), head_dim=(128,), causal=(True,),
                dtype=(default_dtype(device),))  # fmt: skip


SUITES: Mapping[str, Suite] = {
    "quick": Suite("a little of everything, one minute on two CPU cores", _quick),
    "seeds": Suite("this project's first grid: lengths 128 to 2048, head dims 32 to 128, batches 1 to 8", _seeds),
    "fa3": Suite("the grid of the FlashAttention-3 paper: 16k tokens, head dims 64, 128, 256, lengths 512 to 16k",
                 lambda device: _sixteen_k_tokens(device, "fwd", (64, 128, 256))),
    "decode": Suite("one query (and four) over a long KV cache, contiguous and paged", _decode),
    "varlen": Suite("packed sequences of uneven length beside padded ones", _varlen),
    "window": Suite("sliding windows beside full causal attention", _window),
    "bias": Suite("additive bias, mask and ALiBi beside plain attention", _bias),
    "gqa": Suite("32 query heads on 32, 8, 4 and 1 key/value heads", _gqa),
    "train": Suite("forward and backward together, on the paper's grid",
                   lambda device: _sixteen_k_tokens(device, "fwdbwd", (64, 128))),
    "longctx": Suite("single long causal sequences, grouped-query", _longctx),
}  # fmt: skip
MODEL_SUITE = "model"
MODEL_PURPOSE = "time to first token and decode tokens/s of a language model, by backend (needs the worker extra)"


def suite_workloads(names: Sequence[str], device: str) -> list[tuple[str, Workload]]:
    """(suite, workload) of the named suites on a device type, each workload once.

    Raises:
        ConfigError: a suite of that name does not exist.
    """
    made: dict[Workload, str] = {}
    for name in names:
        if name not in SUITES:
            suites = ", ".join([*SUITES, MODEL_SUITE])
            raise ConfigError("suite", repr(name), f"one of {suites} (--case takes a workload by its name)")
        for workload in SUITES[name].workloads(device):
            made.setdefault(workload, name)
    return [(suite, workload) for workload, suite in made.items()]


REPLACED = ("mode", "dtype")
"""Filters that change a suite's workloads rather than select among them."""


def choose(
    suites: Sequence[str], cases: Sequence[str], filters: Mapping[str, Sequence[Any]], device: str
) -> list[tuple[str, Workload]]:
    """(suite, workload) of everything asked for, each workload once.

    Args:
        suites: names of suites.
        cases: names of single workloads.
        filters: values by field of `Workload`, or by ``"seqlen"`` for both lengths. Where suites or cases are given
            they select among those workloads (``mode`` and ``dtype`` replace theirs); alone they make a grid.
        device: the torch device type.

    Raises:
        ConfigError: an unknown suite, a case that is not understood, an impossible grid, or nothing is left.
    """
    chosen = suite_workloads(suites, device) + [("case", parse(name)) for name in cases]
    if not chosen:
        if not filters:
            raise ConfigError("suite", "none", f"one of {', '.join([*SUITES, MODEL_SUITE])}, a case, or a grid")
        return [("grid", workload) for workload in _custom_grid(filters, device)]
    for axis in REPLACED:
        if axis in filters:
            chosen = [
                (suite, replace(workload, **{axis: value})) for suite, workload in chosen for value in filters[axis]
            ]
    kept = [(suite, workload) for suite, workload in chosen if _selected(workload, filters)]
    if not kept:
        asked = ", ".join(f"{axis} {'/'.join(map(str, values))}" for axis, values in filters.items())
        raise ConfigError("grid", asked, "values that the chosen suites have (leave the suite out for a grid)")
    return list({workload: (suite, workload) for suite, workload in reversed(kept)}.values())[::-1]


def _custom_grid(filters: Mapping[str, Sequence[Any]], device: str) -> list[Workload]:
    axes = {"dtype": (default_dtype(device),), **filters}
    if "seqlen" in axes and {"seqlen_q", "seqlen_k"} & axes.keys():
        raise ConfigError("grid", "a length for both sides and one for a single side", "one of the two ways")
    if "heads_kv" not in axes:
        axes["heads"] = axes.pop("heads_q", (Workload.heads_q,))
    for side, other in (("seqlen_q", "seqlen_k"), ("seqlen_k", "seqlen_q")):
        if side in axes and other not in axes:
            axes["seqlen"] = axes.pop(side)
    return list(dict.fromkeys(grid(**axes)))


def _selected(workload: Workload, filters: Mapping[str, Sequence[Any]]) -> bool:
    return all(
        workload.seqlen_q in values and workload.seqlen_k in values
        if axis == "seqlen"
        else getattr(workload, axis) in values
        for axis, values in filters.items()
    )
