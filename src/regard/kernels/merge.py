"""The merge of attention over parts of the keys: the softmax of the parts' lse weighs their outputs."""

import triton
import triton.language as tl

_CHUNK = tl.constexpr(16)  # parts that are read at once


@triton.jit(do_not_specialize=("splits", "rows"))
def merge_splits(
    out_ptr,  # (splits, B, Sq, Hq, Dv) fp32
    lse_ptr,  # (Hq, splits, B, Sq) fp32
    merged_ptr,  # (B, Sq, Hq, Dv)
    merged_lse_ptr,  # (B, Hq, Sq) fp32
    sinks_ptr,  # (Hq,) or None
    splits,
    rows,  # B * Sq
    heads,
    seqlen_q,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    MOST_SPLITS: tl.constexpr,  # a power of two
):
    """Of one query of one head out and lse, from those of the splits of its keys.

    Dao, Haziza, Massa and Sizov 2023, "Flash-Decoding for long-context inference", the last step: lse is the logsumexp
    of the splits' own, out the sum of theirs, each times exp(lse of the split - lse). A sink, a key without a value,
    enters here, once. Where a split saw no key its out may be anything.
    """
    row = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    lse_ptr += head.to(tl.int64) * splits * rows + row
    out_ptr += (row.to(tl.int64) * heads + head) * HEAD_DIM_V
    split = tl.arange(0, MOST_SPLITS)
    lse = tl.load(lse_ptr + split.to(tl.int64) * rows, mask=split < splits, other=float("-inf"))
    highest = tl.max(lse, 0)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        highest = tl.maximum(highest, sink)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.exp(lse - base), 0)
    if sinks_ptr is not None:
        total += tl.exp(sink - base)
    total = tl.where(total == 0.0, 1.0, total)  # of a row that sees nothing; NaN, which a maximum passes over, stays

    column = tl.arange(0, BLOCK_DV)
    inside = column < HEAD_DIM_V
    merged = tl.zeros([BLOCK_DV], tl.float32)
    for first in range(0, splits, _CHUNK):
        some = first + tl.arange(0, _CHUNK)
        there = some.to(tl.int64) * rows
        lse_there = tl.load(lse_ptr + there, mask=some < splits, other=float("-inf"))
        places = (there * heads * HEAD_DIM_V)[:, None] + column[None, :]
        out = tl.load(out_ptr + places, mask=(some < splits)[:, None] & inside[None, :], other=0.0)
        out = tl.where((lse_there == float("-inf"))[:, None], 0.0, out)
        merged += tl.sum(tl.exp(lse_there - base)[:, None] * out, 0)
    merged_row = (row.to(tl.int64) * heads + head) * HEAD_DIM_V
    tl.store(merged_ptr + merged_row + column, (merged / total).to(merged_ptr.dtype.element_ty), mask=inside)
    lse_row = ((row // seqlen_q).to(tl.int64) * heads + head) * seqlen_q + row % seqlen_q
    tl.store(merged_lse_ptr + lse_row, highest + tl.log(total))
