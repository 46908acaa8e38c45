"""The cases: few, awkward and named, not a cross product. Each is data; `regard.testing.calls` makes tensors of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Case:
    """One awkward call, as data. `make_inputs` turns it into tensors.

    Attributes:
        name: what the case is about.
        batch, seqlen_q, seqlen_k, heads_q, heads_kv, head_dim, head_dim_v: shapes (head_dim_v None: head_dim).
        causal, window, softmax_scale, softcap, dropout_p: as in `regard.attention`.
        mask, bias: broadcast pattern over (B, Hq, Sq, Sk): a letter of ``"bhqk"`` keeps the dimension, ``1`` is size 1.
        empty_rows: the mask (or an -inf bias) hides every key from some query rows.
        bias_dtype: of the bias; None is the dtype of q.
        alibi: slopes of shape ``"h"`` or ``"bh"``.
        sinks: with sink logits.
        lens_q, lens_k: lengths of packed sequences; the call is then `regard.varlen_attention`.
        kv_lens: keys that count; k and v hold NaN from there on.
        page_size: the call is then `regard.paged_attention`; pages lie scattered, NaN past each length.
        strides: how q, k and v lie in memory, a key of `STRIDES`.
        layout: as in `regard.attention`.
        logits: factor on q, for large scores.
        nan_query: one element of q is NaN and must poison its own row only.
        gradients: whether `check_backward` applies.
        dtypes: dtypes of q, k and v the case is run in.
    """

    name: str
    batch: int = 2
    seqlen_q: int = 37
    seqlen_k: int = 53
    heads_q: int = 2
    heads_kv: int = 2
    head_dim: int = 32
    head_dim_v: int | None = None
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    softmax_scale: float | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0
    mask: str | None = None
    bias: str | None = None
    empty_rows: bool = False
    bias_dtype: torch.dtype | None = None
    alibi: str | None = None
    sinks: bool = False
    lens_q: tuple[int, ...] | None = None
    lens_k: tuple[int, ...] | None = None
    kv_lens: tuple[int, ...] | None = None
    page_size: int | None = None
    strides: str = "contiguous"
    layout: str = "bshd"
    logits: float = 1.0
    nan_query: bool = False
    gradients: bool = True
    dtypes: tuple[torch.dtype, ...] = HALF_AND_SINGLE


def _length_cases() -> Iterator[Case]:
    yield Case("odd_lengths")
    yield Case("more_queries_than_keys", seqlen_q=65, seqlen_k=17)
    yield Case("one_query", seqlen_q=1, seqlen_k=77)
    yield Case("one_key", seqlen_q=31, seqlen_k=1)
    yield Case("one_query_one_key", seqlen_q=1, seqlen_k=1)
    yield Case("no_queries", seqlen_q=0, seqlen_k=5)
    yield Case("no_keys", seqlen_q=7, seqlen_k=0)
    yield Case("no_keys_but_sinks", seqlen_q=7, seqlen_k=0, sinks=True)
    yield Case("no_batch", batch=0)
    yield Case("several_tiles", batch=1, seqlen_q=259, seqlen_k=387, heads_q=1, heads_kv=1, head_dim=64)
    yield Case("several_tiles_causal", batch=1, seqlen_q=300, seqlen_k=300, head_dim=64, causal=True)


def _head_cases() -> Iterator[Case]:
    yield Case("gqa_7_to_1", heads_q=14, heads_kv=2, seqlen_q=19, causal=True)
    yield Case("mqa", heads_q=5, heads_kv=1)
    for head_dim in (1, 8, 40, 80, 96, 111, 192, 256):
        yield Case(f"head_dim_{head_dim}", batch=1, head_dim=head_dim, causal=head_dim % 16 == 0)
    yield Case("head_dim_v_smaller", head_dim=192, head_dim_v=128, batch=1, causal=True)
    yield Case("head_dim_v_larger", head_dim=40, head_dim_v=72, batch=1)
    yield Case("head_dim_v_one", head_dim=16, head_dim_v=1, batch=1)


def _stride_cases() -> Iterator[Case]:
    for strides in STRIDES:
        if strides != "contiguous":
            yield Case(f"strides_{strides}", heads_q=4, heads_kv=2, strides=strides, causal=True)
    yield Case("layout_bhsd", heads_q=4, heads_kv=2, layout="bhsd", causal=True)
    yield Case("layout_bhsd_of_bshd_memory", heads_q=4, heads_kv=2, layout="bhsd", strides="heads_outside")


def _band_cases() -> Iterator[Case]:
    yield Case("causal_square", seqlen_q=45, seqlen_k=45, causal=True)
    yield Case("causal_bottom_right", seqlen_q=21, seqlen_k=70, causal=True)
    yield Case("causal_fully_masked_rows", seqlen_q=70, seqlen_k=21, causal=True)
    yield Case("causal_one_query", seqlen_q=1, seqlen_k=45, causal=True)
    yield Case("window_left", seqlen_q=90, seqlen_k=90, window=(11, None))
    yield Case("window_right", seqlen_q=90, seqlen_k=90, window=(None, 7))
    yield Case("window_both", seqlen_q=75, seqlen_k=110, window=(19, 5))
    yield Case("window_itself", seqlen_q=50, seqlen_k=50, window=(0, 0))
    yield Case("window_causal", seqlen_q=150, seqlen_k=150, window=(33, None), causal=True, batch=1)
    yield Case("window_causal_overrides_right", seqlen_q=50, seqlen_k=60, window=(9, 9), causal=True)
    yield Case("window_wider_than_keys", window=(1000, 1000))
    yield Case("window_fully_masked_rows", seqlen_q=90, seqlen_k=20, window=(4, 3))
    yield Case("window_gqa_one_query", seqlen_q=1, seqlen_k=130, window=(40, 0), heads_q=6)


def _mask_cases() -> Iterator[Case]:
    for pattern in ("bhqk", "11qk", "b11k", "1h1k", "b1qk", "bhq1", "1111"):
        yield Case(f"mask_{pattern}", mask=pattern, heads_q=4)
    for pattern in ("bhqk", "b11k", "11q1"):
        yield Case(f"mask_{pattern}_empty_rows", mask=pattern, empty_rows=True)
    yield Case("mask_causal", mask="b11k", causal=True, seqlen_q=53)
    yield Case("mask_window_gqa", mask="b1qk", window=(20, 6), heads_q=4)


def _bias_cases() -> Iterator[Case]:
    for pattern in ("bhqk", "1hqk", "b11k", "11q1", "b1qk", "1h11", "1111"):
        yield Case(f"bias_{pattern}", bias=pattern, heads_q=4)
    for pattern in ("bhqk", "11qk", "b11k"):
        yield Case(f"bias_{pattern}_minus_inf", bias=pattern, empty_rows=True)
    yield Case("bias_float32", bias="1hqk", bias_dtype=torch.float32)
    yield Case("bias_mask_causal", bias="1hqk", mask="b11k", causal=True, seqlen_q=53)


def _score_cases() -> Iterator[Case]:
    yield Case("scale_negative", softmax_scale=-0.3)
    yield Case("scale_zero", softmax_scale=0.0)
    yield Case("scale_zero_causal", softmax_scale=0.0, causal=True)
    yield Case("softcap", softcap=3.0, logits=4.0)
    yield Case("softcap_causal_large_logits", softcap=20.0, logits=60.0, causal=True)
    yield Case("large_logits", logits=40.0)
    yield Case("large_logits_causal", logits=40.0, causal=True, head_dim=64)
    yield Case("alibi_h", alibi="h", heads_q=4)
    yield Case("alibi_bh_causal", alibi="bh", causal=True, seqlen_q=20)
    yield Case("alibi_causal_more_queries", alibi="h", causal=True, seqlen_q=60, seqlen_k=31)
    yield Case("sinks", sinks=True, heads_q=4)
    yield Case("sinks_window_causal", sinks=True, window=(12, None), causal=True, seqlen_q=53, heads_q=4)
    yield Case("sinks_fully_masked_rows", sinks=True, causal=True, seqlen_q=60, seqlen_k=13)
    yield Case("nan_query", nan_query=True, causal=True, gradients=False)


def _dropout_cases() -> Iterator[Case]:
    yield Case("dropout", dropout_p=0.3)
    yield Case("dropout_causal_gqa", dropout_p=0.1, causal=True, heads_q=6, seqlen_q=61, seqlen_k=61)
    yield Case("dropout_varlen", dropout_p=0.5, lens_q=(9, 0, 33), lens_k=(18, 5, 21))


def _varlen_cases() -> Iterator[Case]:
    lens_q, lens_k = (17, 0, 1, 40), (23, 9, 31, 0)
    yield Case("varlen", lens_q=lens_q, lens_k=lens_k)
    yield Case("varlen_causal_gqa", lens_q=(17, 30, 1), lens_k=(23, 12, 31), causal=True, heads_q=6)
    yield Case("varlen_window", lens_q=(50, 3), lens_k=(50, 41), window=(7, 2))
    yield Case("varlen_strided", lens_q=lens_q, lens_k=lens_k, strides="head_dim_sliced", causal=True)
    yield Case("varlen_alibi_softcap_sinks", lens_q=(8, 26), lens_k=(19, 26), alibi="bh", softcap=5.0, sinks=True)
    yield Case("varlen_all_empty", lens_q=(0, 0), lens_k=(0, 0))
    yield Case("varlen_one_sequence", lens_q=(67,), lens_k=(67,), causal=True, head_dim=80)


def _cache_cases() -> Iterator[Case]:
    yield Case("kv_lens", batch=4, kv_lens=(0, 1, 29, 53))
    yield Case("kv_lens_causal", batch=3, kv_lens=(0, 20, 53), causal=True, seqlen_q=25, heads_q=4)
    yield Case("kv_lens_decode_window", batch=2, seqlen_q=1, seqlen_k=90, kv_lens=(3, 90), window=(17, 0), heads_q=8)
    yield Case("kv_lens_mask_bias", batch=2, kv_lens=(11, 50), mask="b11k", bias="1hqk")
    long = Case("", batch=1, seqlen_q=1, seqlen_k=2611, heads_kv=1, gradients=False, dtypes=(torch.bfloat16,))
    yield replace(long, name="long_cache", heads_q=4)
    yield replace(long, name="long_cache_kv_lens", batch=3, kv_lens=(0, 700, 2611), seqlen_q=3, causal=True, sinks=True)
    yield replace(long, name="long_cache_window", window=(2100, 0), softcap=9.0, alibi="h", head_dim=64)
    paged = Case("", batch=3, seqlen_q=1, kv_lens=(0, 37, 80), page_size=16, causal=True, heads_q=4, head_dim=64)
    yield replace(paged, name="paged_decode")
    yield replace(paged, name="paged_odd_page", page_size=7, kv_lens=(5, 36, 14))
    yield replace(paged, name="paged_one_key_pages", page_size=1, kv_lens=(3, 1, 20), head_dim=40)
    yield replace(paged, name="paged_append", seqlen_q=9, window=(30, None), softcap=8.0, sinks=True)
    yield replace(paged, name="paged_mqa", heads_q=7, heads_kv=1, page_size=32, alibi="h")


def _combined_cases() -> Iterator[Case]:
    everything = Case(
        "everything", seqlen_q=45, seqlen_k=61, heads_q=6, head_dim=40, head_dim_v=24, causal=True, window=(30, None),
        softmax_scale=0.4, softcap=9.0, dropout_p=0.2, mask="b1qk", bias="1hqk", empty_rows=True, alibi="bh",
        sinks=True, kv_lens=(52, 61), strides="head_dim_sliced", layout="bhsd",
    )  # fmt: skip
    yield everything
    yield replace(everything, name="everything_but_dropout", dropout_p=0.0, strides="heads_outside", layout="bshd")


# How a contiguous (..., S, H, D) tensor is laid out again; values are kept, except by "expanded".
STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "heads_outside": lambda t: t.transpose(-3, -2).contiguous().transpose(-3, -2),
    "head_dim_sliced": lambda t: torch.cat([t, t.flip(-1), t], dim=-1)[..., : t.shape[-1]],
    "sequence_sliced": lambda t: torch.stack([t, t.flip(-1)], dim=-3).flatten(-4, -3)[..., ::2, :, :],
    "qkv_packed": lambda t: torch.stack([t, t.flip(-1), t], dim=-3)[..., 0, :, :],
    "unaligned": lambda t: torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape),
    "head_dim_outside": lambda t: t.transpose(-3, -1).contiguous().transpose(-3, -1),
    "head_dim_every_other": lambda t: torch.stack([t, t.flip(-1)], dim=-1)[..., 0],
    "expanded": lambda t: t[..., :1, :].expand_as(t),
}

CASES: tuple[Case, ...] = tuple(
    case
    for family in (
        _length_cases, _head_cases, _stride_cases, _band_cases, _mask_cases, _bias_cases, _score_cases, _dropout_cases,
        _varlen_cases, _cache_cases, _combined_cases,
    )
    for case in family()
)  # fmt: skip

_REPEATED = ("several_tiles_causal", "varlen_causal_gqa", "everything")
REPEATED_CASES = tuple(case for case in CASES if case.name in _REPEATED)
"""Cases whose results `check_repeatable` compares bit by bit."""
