"""The `cpu` backend: blockwise attention in O(S) memory with torch ops, and torch's fused kernel where that is exact.

Dao 2023, "FlashAttention-2", algorithm 1 (forward) and 2 (backward): a block of queries meets one block of keys after
the other with an online softmax, and the backward recomputes the weights from lse. Blocks outside the causal or window
band are never visited. Everything runs in a fixed order, so that results are repeatable.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from regard.backends.reference import dropout_keep, gather_pages
from regard.config import AttentionConfig, AttentionInputs, KvCacheLayout
from regard.errors import Reason
from regard.registry import Gradients

_QUERIES = 256  # rows of a block
_KEYS = 1024  # columns of a block
_FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class CpuBackend:
    """Every semantic on the CPU, linear memory, gradients included."""

    name = "cpu"

    def unsupported_reasons(self, config: AttentionConfig) -> Sequence[Reason]:
        reasons = []
        if config.device != "cpu":
            reasons.append(Reason("device", config.device, "cpu"))
        if config.requires_grad and config.page_size is not None:
            reasons.append(Reason("backward", "a gradient through a paged cache", "contiguous keys and values"))
        return reasons

    def required_kv_layout(self, config: AttentionConfig) -> KvCacheLayout:
        return config.kv_layout

    def forward(self, config: AttentionConfig, inputs: AttentionInputs) -> tuple[Tensor, Tensor | None]:
        out = inputs.q.new_empty((*inputs.q.shape[:-1], inputs.v.shape[-1]))
        q_shape = inputs.q.shape
        lse_shape = (q_shape[1], q_shape[0]) if config.varlen else (q_shape[0], q_shape[2], q_shape[1])
        lse = inputs.q.new_empty(lse_shape, dtype=_compute_dtype(inputs.q))
        for part in _sequences(config, inputs):
            part_out, part_lse = _attend(config, part)
            part.rows_of(out).copy_(part_out.transpose(1, 2))
            part.lse_of(lse).copy_(part_lse)
        return out, lse

    def backward(
        self,
        config: AttentionConfig,
        inputs: AttentionInputs,
        out: Tensor,
        lse: Tensor | None,
        grad_out: Tensor,
        grad_lse: Tensor | None,
    ) -> Gradients:
        assert lse is not None
        compute = _compute_dtype(inputs.q)
        totals = {
            name: torch.zeros(tensor.shape, dtype=compute)
            for name in ("q", "k", "v", "bias", "sinks")
            if (tensor := getattr(inputs, name)) is not None
        }
        for part in _sequences(config, inputs):
            # delta = rowsum(dO * O) - dlse: what every score's gradient has in common (algorithm 2, line 4)
            d_out = part.rows_of(grad_out).transpose(1, 2).to(compute)
            delta = (d_out * part.rows_of(out).transpose(1, 2).to(compute)).sum(-1)
            if grad_lse is not None:
                delta = delta - part.lse_of(grad_lse).to(compute)
            _differentiate(config, part, part.lse_of(lse).to(compute), d_out, delta, totals)
        return {name: total.to(getattr(inputs, name).dtype) for name, total in totals.items()}


class _Part(NamedTuple):
    """Sequences of one key length, as (B, H, S, D) views: the whole batch, or one sequence of it."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    bias: Tensor | None
    slopes: Tensor | None  # (B, Hq)
    sinks: Tensor | None
    seed: Tensor | None
    first_sequence: int
    rows: tuple[slice, ...]  # where its queries lie in q, out and their gradients
    keys: tuple[slice, ...]  # where its keys lie in k, v and their gradients

    def rows_of(self, tensor: Tensor) -> Tensor:
        """(B, Sq, H, D) view of this part of q's or out's kind of tensor."""
        view = tensor[self.rows]
        return view if view.ndim == 4 else view[None]

    def keys_of(self, tensor: Tensor) -> Tensor:
        """(B, Sk, H, D) view of this part of k's or v's kind of tensor."""
        view = tensor[self.keys]
        return view if view.ndim == 4 else view[None]

    def lse_of(self, tensor: Tensor) -> Tensor:
        """(B, Hq, Sq) view of this part of lse."""
        return tensor[self.rows[0]] if tensor.ndim == 3 else tensor[None, :, self.rows[0]]


def _sequences(config: AttentionConfig, inputs: AttentionInputs) -> Iterator[_Part]:
    """Cut a call into parts whose sequences share their lengths."""
    inputs = gather_pages(inputs)
    slopes = None
    if inputs.alibi_slopes is not None:
        slopes = inputs.alibi_slopes.expand(config.batch, config.heads_q)
    whole = slice(None)
    if config.varlen:
        assert inputs.cu_seqlens_q is not None
        assert inputs.cu_seqlens_k is not None
        q_starts, k_starts = inputs.cu_seqlens_q.tolist(), inputs.cu_seqlens_k.tolist()
        cuts: list[tuple[int, tuple[slice, ...], tuple[slice, ...]]] = [
            (b, (slice(q_starts[b], q_starts[b + 1]),), (slice(k_starts[b], k_starts[b + 1]),))
            for b in range(config.batch)
        ]
    elif inputs.kv_lens is not None:
        lengths = inputs.kv_lens.tolist()
        cuts = [(b, (slice(b, b + 1), whole), (slice(b, b + 1), slice(0, lengths[b]))) for b in range(config.batch)]
    else:
        cuts = [(0, (whole,), (whole,))]
    for sequence, rows, keys in cuts:
        part = _Part(inputs.q, inputs.k, inputs.v, inputs.mask, inputs.bias, slopes, inputs.sinks, inputs.dropout_seed,
                     sequence, rows, keys)  # fmt: skip
        alone = len(cuts) > 1 or config.varlen or config.kv_lens
        only = slice(sequence, sequence + 1) if alone else whole
        yield part._replace(
            q=part.rows_of(inputs.q).transpose(1, 2),
            k=part.keys_of(inputs.k).transpose(1, 2),
            v=part.keys_of(inputs.v).transpose(1, 2),
            mask=_one_of(inputs.mask, only),
            bias=_one_of(inputs.bias, only),
            slopes=None if slopes is None else slopes[only],
        )


def _one_of(tensor: Tensor | None, sequences: slice) -> Tensor | None:
    """The sequences of a mask or bias whose batch dimension may be broadcast."""
    return tensor if tensor is None or tensor.shape[0] == 1 else tensor[sequences]


def _compute_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _attend(config: AttentionConfig, part: _Part) -> tuple[Tensor, Tensor]:
    """Attention of one part: out (B, Hq, Sq, Dv) and lse (B, Hq, Sq)."""
    seqlen_q, seqlen_k = part.q.shape[2], part.k.shape[2]
    fused = _fused_applies(config, part)
    left, right = config.band
    # The fused kernel's own causal mask is top-left: the same only where the lengths are equal.
    own_causal = fused and left is None and right == 0 and seqlen_q == seqlen_k and part.mask is None is part.bias
    if fused and (own_causal or (left is None and right is None)):
        out, lse = _fused(config, part, 0, seqlen_q, 0, seqlen_k, own_causal)
    else:
        outs, lses = [], []
        for first in range(0, seqlen_q, _QUERIES):
            stop = min(first + _QUERIES, seqlen_q)
            low, high = _key_range(config, part, first, stop)
            step = _fused if fused and high > low else _online_softmax
            block_out, block_lse = step(config, part, first, stop, low, high)
            outs.append(block_out)
            lses.append(block_lse)
        out = torch.cat(outs, dim=2) if outs else part.q.new_zeros((*part.q.shape[:3], part.v.shape[-1]))
        lse = torch.cat(lses, dim=2) if lses else part.q.new_zeros(part.q.shape[:3], dtype=_compute_dtype(part.q))
    if part.sinks is None:
        return out, lse
    # A sink is one more key without a value: it only enlarges the denominator.
    sink = part.sinks.to(lse.dtype)[:, None].expand_as(lse)
    with_sink = torch.logaddexp(lse, sink)
    kept = torch.where(with_sink == float("-inf"), 0.0, torch.exp(lse - with_sink))
    return (out.to(lse.dtype) * kept[..., None]).to(out.dtype), with_sink


def _key_range(config: AttentionConfig, part: _Part, first: int, stop: int) -> tuple[int, int]:
    """Keys that some query of [first, stop) may see."""
    left, right = config.band
    seqlen_k = part.k.shape[2]
    shift = seqlen_k - part.q.shape[2]
    low = 0 if left is None else max(0, first + shift - left)
    high = seqlen_k if right is None else min(seqlen_k, stop - 1 + shift + right + 1)
    return min(low, seqlen_k), max(high, 0)


def _fused_applies(config: AttentionConfig, part: _Part) -> bool:
    """Whether torch's fused CPU kernel computes exactly this call, given a small mask for each block."""
    # It adds masks in the dtype of q, which holds a bias of that dtype exactly but not ALiBi's products.
    return (
        part.q.dtype in _FUSED_DTYPES
        and part.q.shape[-1] == part.v.shape[-1]
        and part.k.shape[2] > 0
        and config.softcap == 0
        and config.dropout_p == 0
        and part.slopes is None
        and (part.bias is None or part.bias.dtype == part.q.dtype)
    )


def _fused(
    config: AttentionConfig, part: _Part, first: int, stop: int, low: int, high: int, own_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Queries [first, stop) over keys [low, high) by torch's fused kernel, with an additive mask where needed."""
    q, k, v = part.q[:, :, first:stop], part.k[:, :, low:high], part.v[:, :, low:high]
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    hidden = None if own_causal else _hidden(config, part, first, stop, low, high)
    added = None if part.bias is None else _slice(part.bias, first, stop, low, high)
    if hidden is not None:
        base = q.new_zeros(()) if added is None else added
        added = base.masked_fill(hidden, float("-inf"))
    if added is not None:
        added = _dense_rows(added.expand(*added.shape[:2], stop - first, high - low))
    q, k, v = _dense_rows(q), _dense_rows(k), _dense_rows(v)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, own_causal, attn_mask=added, scale=config.softmax_scale
    )
    if added is not None:
        nothing = (added == float("-inf")).all(-1)
        out = out.masked_fill(nothing[..., None], 0.0)
        lse = lse.masked_fill(nothing, float("-inf"))
    return out, lse


def _dense_rows(tensor: Tensor) -> Tensor:
    """The tensor with a contiguous last dimension, which the fused kernel takes for granted."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _hidden(config: AttentionConfig, part: _Part, first: int, stop: int, low: int, high: int) -> Tensor | None:
    """Pairs of a block that band or mask hides, broadcast to (B, Hq, queries, keys); None where there are none."""
    left, right = config.band
    shift = part.k.shape[2] - part.q.shape[2]
    cut_left = left is not None and stop - 1 + shift - left > low
    cut_right = right is not None and first + shift + right < high - 1
    hidden = None
    if cut_left or cut_right:
        distance = torch.arange(low, high) - (torch.arange(first, stop) + shift)[:, None]
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if left is not None:
            hidden |= distance < -left
        if right is not None:
            hidden |= distance > right
        hidden = hidden[None, None]
    if part.mask is not None:
        masked = ~_slice(part.mask, first, stop, low, high)
        hidden = masked if hidden is None else hidden | masked
    return hidden


def _slice(tensor: Tensor, first: int, stop: int, low: int, high: int) -> Tensor:
    """A block of a mask or bias, broadcast dimensions left alone."""
    if tensor.shape[2] > 1:
        tensor = tensor[:, :, first:stop]
    return tensor if tensor.shape[3] == 1 else tensor[..., low:high]


def _block_scores(
    config: AttentionConfig, part: _Part, q: Tensor, k: Tensor, first: int, low: int
) -> tuple[Tensor, Tensor | None]:
    """Scores of a block (B, Hq, queries, keys), -inf where hidden, and tanh of the capped ones for the backward."""
    stop, high = first + q.shape[2], low + k.shape[2]
    scores = torch.matmul(q, k.transpose(-1, -2)) * config.softmax_scale
    capped = None
    if config.softcap > 0:
        capped = torch.tanh(scores / config.softcap)
        scores = config.softcap * capped
    if part.bias is not None:
        scores = scores + _slice(part.bias, first, stop, low, high).to(scores.dtype)
    if part.slopes is not None:
        shift = part.k.shape[2] - part.q.shape[2]
        distance = (torch.arange(low, high) - (torch.arange(first, stop) + shift)[:, None]).abs()
        scores = scores - part.slopes.to(scores.dtype)[:, :, None, None] * distance
    hidden = _hidden(config, part, first, stop, low, high)
    return (scores if hidden is None else scores.masked_fill(hidden, float("-inf"))), capped


def _kept(config: AttentionConfig, part: _Part, scores: Tensor, first: int, low: int) -> Tensor | None:
    """Which weights of a block dropout keeps."""
    if part.seed is None:
        return None
    batch, heads, queries, keys = scores.shape
    sequence = torch.arange(part.first_sequence, part.first_sequence + batch)
    head = sequence[:, None] * heads + torch.arange(heads)
    query, key = torch.arange(first, first + queries), torch.arange(low, low + keys)
    return dropout_keep(part.seed, head[:, :, None, None], query[:, None], key, config.dropout_p)


def _key_blocks(part: _Part, low: int, high: int, compute: torch.dtype) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Blocks of keys and values with their heads repeated for the query heads."""
    group = part.q.shape[1] // part.k.shape[1]
    for start in range(low, high, _KEYS):
        end = min(start + _KEYS, high)
        k, v = (t[:, :, start:end].to(compute).repeat_interleave(group, dim=1) for t in (part.k, part.v))
        yield start, end, k, v


def _online_softmax(
    config: AttentionConfig, part: _Part, first: int, stop: int, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """Queries [first, stop) over keys [low, high), one block of keys after the other (algorithm 1, lines 6 to 15)."""
    compute = _compute_dtype(part.q)
    q = part.q[:, :, first:stop].to(compute)
    row_max = q.new_full(q.shape[:3], float("-inf"))
    row_sum = q.new_zeros(q.shape[:3])
    acc = q.new_zeros((*q.shape[:3], part.v.shape[-1]))
    for start, _, k, v in _key_blocks(part, low, high, compute):
        scores, _ = _block_scores(config, part, q, k, first, start)
        new_max = torch.maximum(row_max, scores.amax(-1))
        anchor = torch.where(new_max == float("-inf"), 0.0, new_max)
        weights = torch.exp(scores - anchor[..., None])
        decay = torch.exp(row_max - anchor)
        row_sum = row_sum * decay + weights.sum(-1)
        kept = _kept(config, part, scores, first, start)
        if kept is not None:
            weights = torch.where(kept, weights / (1 - config.dropout_p), 0.0)
        acc = acc * decay[..., None] + torch.matmul(weights, v)
        row_max = new_max
    nothing = row_sum == 0
    row_sum = torch.where(nothing, 1.0, row_sum)
    lse = torch.where(nothing, float("-inf"), row_max + torch.log(row_sum))
    return (acc / row_sum[..., None]).to(part.q.dtype), lse


def _differentiate(
    config: AttentionConfig, part: _Part, lse: Tensor, d_out: Tensor, delta: Tensor, totals: dict[str, Tensor]
) -> None:
    """Add one part's gradients to the totals (algorithm 2); d_out is (B, Hq, Sq, Dv), lse and delta (B, Hq, Sq)."""
    compute = lse.dtype
    group = part.q.shape[1] // part.k.shape[1]
    anchor = torch.where(lse == float("-inf"), 0.0, lse)
    d_q, d_k, d_v = part.rows_of(totals["q"]), part.keys_of(totals["k"]), part.keys_of(totals["v"])
    for first in range(0, part.q.shape[2], _QUERIES):
        stop = min(first + _QUERIES, part.q.shape[2])
        rows = slice(first, stop)
        q = part.q[:, :, rows].to(compute)
        for start, end, k, v in _key_blocks(part, *_key_range(config, part, first, stop), compute):
            scores, capped = _block_scores(config, part, q, k, first, start)
            weights = torch.exp(scores - anchor[:, :, rows, None])
            d_weights = torch.matmul(d_out[:, :, rows], v.transpose(-1, -2))
            dropped = weights
            kept = _kept(config, part, scores, first, start)
            if kept is not None:
                dropped = torch.where(kept, weights / (1 - config.dropout_p), 0.0)
                d_weights = torch.where(kept, d_weights / (1 - config.dropout_p), 0.0)
            d_scores = weights * (d_weights - delta[:, :, rows, None])
            if part.bias is not None:
                _add_reduced(totals["bias"], part, d_scores, first, stop, start, end)
            if capped is not None:
                d_scores = d_scores * (1 - capped * capped)
            d_scores = d_scores * config.softmax_scale
            d_v[:, start:end] += _sum_group(torch.matmul(dropped.transpose(-1, -2), d_out[:, :, rows]), group)
            d_k[:, start:end] += _sum_group(torch.matmul(d_scores.transpose(-1, -2), q), group)
            d_q[:, rows] += torch.matmul(d_scores, k).transpose(1, 2)
    if part.sinks is not None:
        sink = part.sinks.to(compute)[:, None]
        totals["sinks"] -= torch.where(lse == float("-inf"), 0.0, torch.exp(sink - anchor) * delta).sum((0, 2))


def _sum_group(gradient: Tensor, group: int) -> Tensor:
    """(B, Hq, S, D) to (B, S, Hk, D), summed over the query heads of each key head."""
    batch, heads, rows, dim = gradient.shape
    return gradient.view(batch, heads // group, group, rows, dim).sum(2).transpose(1, 2)


def _add_reduced(total: Tensor, part: _Part, d_scores: Tensor, first: int, stop: int, start: int, end: int) -> None:
    """Add a block's score gradients to the bias gradient, summed over the bias's broadcast dimensions."""
    target = total if part.bias is None or total.shape[0] == part.bias.shape[0] else total[part.rows[0]]
    target = _slice(target, first, stop, start, end)
    broadcast = [dim for dim in range(4) if target.shape[dim] == 1 and d_scores.shape[dim] > 1]
    target += d_scores.sum(broadcast, keepdim=True) if broadcast else d_scores
