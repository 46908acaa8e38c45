"""The `cpu` backend: every semantic in memory linear in the lengths.

Forward: torch's fused CPU kernel, once for the whole call or once for a block of queries and the keys it can see, with
what hides or shifts scores as a small additive mask. What the kernel cannot compute (softcap, dropout) goes through
`_online_softmax`, FlashAttention-2's algorithm 1 in torch operations. Backward: its algorithm 2 (Dao 2023,
"FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", section 3.1), or torch's where the
forward was one call of its kernel.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regard.backends import cpu_fused as fused
from regard.backends.reference import compact, dropout_keep, gather_pages
from regard.config import AttentionConfig, AttentionInputs, KvCacheLayout
from regard.errors import Reason
from regard.registry import Gradients, Shortcut

_INF = float("inf")
_SCORES_IN_FLIGHT = 2**20  # scores that a step in torch operations holds at once, over all heads
_ADDITIVE_IN_FLIGHT = 2**22  # elements of the additive mask made for one call of the fused kernel


class CpuBackend:
    """Blockwise attention on the CPU: float16, bfloat16, float32 and float64, forward and backward."""

    name = "cpu"

    def unsupported_reasons(self, config: AttentionConfig) -> Sequence[Reason]:
        reasons = []
        if config.device != "cpu":
            reasons.append(Reason("device", config.device, "cpu"))
        if config.page_size is not None and config.requires_grad:
            reasons.append(Reason("backward", "a gradient through a paged KV cache", "contiguous keys and values"))
        return reasons

    def required_kv_layout(self, config: AttentionConfig) -> KvCacheLayout:
        return config.kv_layout

    def forward(self, config: AttentionConfig, inputs: AttentionInputs) -> tuple[Tensor, Tensor | None]:
        call = fused.one_call(config)
        if call is not None:
            q, k, v = (t.transpose(1, 2) for t in inputs[:3])
            with contextlib.suppress(FloatingPointError):
                out, lse = call(q, k, v, *(t for t in (inputs.mask, inputs.bias) if t is not None))
                return out.transpose(1, 2).contiguous(), lse
        inputs = gather_pages(inputs)
        spans = _spans(config, inputs)
        if spans == [_WHOLE]:
            out, lse = _attend(_Piece.of(config, inputs, spans[0]))
            return out.transpose(1, 2).contiguous(), lse
        q = inputs.q
        out = q.new_empty(inputs.out_shape)
        lse = q.new_empty(inputs.lse_shape, dtype=_accumulator(q.dtype))
        for span in spans:
            piece_out, piece_lse = _attend(_Piece.of(config, inputs, span))
            span.queries(out).copy_(piece_out)
            span.rows_of_lse(lse).copy_(piece_lse)
        return out, lse

    def shortcut(self, config: AttentionConfig, layout: str) -> Shortcut | None:
        call = fused.one_call(config)
        if call is None:
            return None
        if layout == "bhsd":
            return lambda *tensors: compact(call(*tensors)[0])
        transpose = torch.transpose  # takes less time than the method
        return lambda q, k, v, *shaping: transpose(
            call(transpose(q, 1, 2), transpose(k, 1, 2), transpose(v, 1, 2), *shaping)[0], 1, 2
        ).contiguous()

    @torch.no_grad()
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
        plain = grad_lse is None and not config.deterministic and not fused.is_widened(config)
        if plain and fused.unmasked_call(config) is not None:
            return _differentiate_fused(config, inputs, out, lse, grad_out)
        found = {
            name: torch.zeros(tensor.shape, dtype=_accumulator(inputs.q.dtype), device="cpu")
            for name in ("q", "k", "v", "bias", "sinks")
            if (tensor := getattr(inputs, name)) is not None
        }
        gradients = inputs._replace(**found)
        for span in _spans(config, inputs):
            _differentiate(
                _Piece.of(config, inputs, span),
                _Piece.of(config, gradients, span),
                span.queries(out),
                span.rows_of_lse(lse),
                span.queries(grad_out),
                None if grad_lse is None else span.rows_of_lse(grad_lse),
            )
        return {name: gradient.to(getattr(inputs, name).dtype) for name, gradient in found.items()}


@dataclass(frozen=True)
class _Span:
    """Where sequences that share one query length and one key length lie in the tensors of a call.

    Its methods return views (B, H, S, D), so gradients are written through them as well.
    """

    sequences: slice | None = None  # None: the whole batch at full length
    keys: slice | None = None
    rows: slice | None = None  # of packed sequences

    def queries(self, tensor: Tensor) -> Tensor:
        if self.rows is not None:
            tensor = tensor[None, self.rows]
        elif self.sequences is not None:
            tensor = tensor[self.sequences]
        return tensor.transpose(1, 2)

    def keys_of(self, tensor: Tensor) -> Tensor:
        if self.rows is not None:
            tensor = tensor[None, self.keys]
        elif self.sequences is not None:
            tensor = tensor[self.sequences, self.keys]
        return tensor.transpose(1, 2)

    def rows_of_lse(self, tensor: Tensor) -> Tensor:
        if self.rows is not None:
            return tensor[None, :, self.rows]
        return tensor if self.sequences is None else tensor[self.sequences]

    def pairs(self, tensor: Tensor | None) -> Tensor | None:
        """Of a mask or bias, broadcast dimensions kept at size 1."""
        if tensor is None or self.sequences is None:
            return tensor
        tensor = tensor if tensor.shape[0] == 1 else tensor[self.sequences]
        return tensor if tensor.shape[3] == 1 else tensor[..., self.keys]


_WHOLE = _Span()


def _spans(config: AttentionConfig, inputs: AttentionInputs) -> list[_Span]:
    if inputs.cu_seqlens_q is not None and inputs.cu_seqlens_k is not None:
        q_offsets, k_offsets = inputs.cu_seqlens_q.tolist(), inputs.cu_seqlens_k.tolist()
        return [
            _Span(slice(i, i + 1), slice(k_offsets[i], k_offsets[i + 1]), slice(q_offsets[i], q_offsets[i + 1]))
            for i in range(len(q_offsets) - 1)
        ]
    if inputs.kv_lens is not None:
        capacity = config.seqlen_k
        lengths = [min(max(length, 0), capacity) for length in inputs.kv_lens.tolist()]
        return [_Span(slice(i, i + 1), slice(0, length)) for i, length in enumerate(lengths)]
    return [_WHOLE]


@dataclass(frozen=True)
class _Piece:
    """The sequences of one span: q (B, Hq, Sq, D), k (B, Hk, Sk, D), v (B, Hk, Sk, Dv), and what shapes the scores."""

    config: AttentionConfig
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    bias: Tensor | None
    slopes: Tensor | None  # (B or 1, Hq, 1, 1)
    sinks: Tensor | None  # (Hq,)
    dropout_seed: Tensor | None
    first_sequence: int

    @classmethod
    def of(cls, config: AttentionConfig, inputs: AttentionInputs, span: _Span) -> _Piece:
        slopes = inputs.alibi_slopes
        if slopes is not None:
            slopes = slopes.to(_accumulator(inputs.q.dtype))
            slopes = slopes.expand(config.batch, -1)[span.sequences or slice(None), :, None, None]
        return cls(
            config, span.queries(inputs.q), span.keys_of(inputs.k), span.keys_of(inputs.v), span.pairs(inputs.mask),
            span.pairs(inputs.bias), slopes, inputs.sinks, inputs.dropout_seed,
            0 if span.sequences is None else span.sequences.start,
        )  # fmt: skip

    @property
    def shift(self) -> int:
        """Query i stands at key i + shift."""
        return self.k.shape[2] - self.q.shape[2]

    def visible_keys(self, rows: range) -> range:
        """The keys that the band lets some of these queries see."""
        left, right = self.config.band
        seqlen_k = self.k.shape[2]
        first = 0 if left is None else max(0, rows.start + self.shift - left)
        last = seqlen_k if right is None else min(seqlen_k, rows.stop + self.shift + right)
        return range(first, max(first, last))

    def seeing_queries(self, keys: range) -> range:
        """The queries that the band lets see some of these keys."""
        left, right = self.config.band
        seqlen_q = self.q.shape[2]
        first = 0 if right is None else max(0, keys.start - self.shift - right)
        last = seqlen_q if left is None else min(seqlen_q, keys.stop - self.shift + left)
        return range(first, max(first, last))

    def visible(self, rows: range, keys: range) -> Tensor | None:
        """Which pairs of a block the band and the mask leave, broadcastable to (B, Hq, rows, keys); None is all."""
        left, right = self.config.band
        visible = None if self.mask is None else _block(self.mask, rows, keys)
        nearest, farthest = keys.start - (rows.stop - 1 + self.shift), keys.stop - 1 - (rows.start + self.shift)
        if left is not None and nearest < -left:
            inside = self._distance(rows, keys) >= -left
            visible = inside if visible is None else visible & inside
        if right is not None and farthest > right:
            inside = self._distance(rows, keys) <= right
            visible = inside if visible is None else visible & inside
        return visible

    def added(self, rows: range, keys: range) -> Tensor | None:
        """Bias and ALiBi of a block."""
        added = None if self.bias is None else _block(self.bias, rows, keys)
        if self.slopes is not None:
            alibi = -self.slopes * self._distance(rows, keys).abs()
            added = alibi if added is None else added.to(alibi.dtype) + alibi
        return added

    def _distance(self, rows: range, keys: range) -> Tensor:
        """How far key j lies to the right of query i's own position."""
        return _numbers(keys) - _numbers(rows)[:, None] - self.shift

    def kept(self, rows: range, keys: range) -> Tensor:
        """Dropout's factor on the weights of a block: 0 or 1 / (1 - p)."""
        batch, heads = self.q.shape[:2]
        head = _numbers(range(self.first_sequence * heads, (self.first_sequence + batch) * heads))
        query, key = _numbers(rows), _numbers(keys)
        assert self.dropout_seed is not None
        keep = dropout_keep(
            self.dropout_seed, head.view(batch, heads, 1, 1), query[:, None], key, self.config.dropout_p
        )
        return keep.to(_accumulator(self.q.dtype)) / (1 - self.config.dropout_p)


def _numbers(positions: range) -> Tensor:
    return torch.arange(positions.start, positions.stop, device="cpu")  # not the default device, which may be another


_AttendBlock = Callable[[_Piece, range, range], tuple[Tensor, Tensor]]
"""(piece, rows, keys) -> out (B, Hq, rows, Dv) and lse (B, Hq, rows)."""


def _block(tensor: Tensor, rows: range, keys: range) -> Tensor:
    """Cut a block out of (B, H, Sq or 1, Sk or 1)."""
    if tensor.shape[2] != 1:
        tensor = _narrow(tensor, rows)
    return tensor if tensor.shape[3] in (1, len(keys)) else tensor[..., keys.start : keys.stop]


def _narrow(tensor: Tensor, rows: range) -> Tensor:
    """Some queries or keys of (B, H, S, ..), as a view."""
    return tensor if len(rows) == tensor.shape[2] else tensor[:, :, rows.start : rows.stop]


def _blocks(whole: range, size: int) -> Iterator[range]:
    for start in range(whole.start, whole.stop, size):
        yield range(start, min(start + size, whole.stop))


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _attend(piece: _Piece) -> tuple[Tensor, Tensor]:
    """Out (B, Hq, Sq, Dv) and lse (B, Hq, Sq) of one piece."""
    config, q, k = piece.config, piece.q, piece.k
    if q.shape[2] == 0 or k.shape[2] == 0:
        out, lse = _nothing_visible(piece, q.shape[2])
    elif config.softcap > 0 or config.dropout_p > 0:
        out, lse = _by_query_blocks(piece, _online_softmax, _block_side(piece), range(q.shape[2]))
    else:
        out, lse = _attend_fused(piece)
    if piece.sinks is not None:
        sinks = piece.sinks.to(lse.dtype)[:, None]
        sinks = sinks.masked_fill(sinks == _INF, math.nan)  # as an infinite score: inf / inf
        # The share of the softmax that the sink leaves to the keys; where both are -inf there is none to share.
        share = torch.sigmoid(lse - sinks)
        lse = torch.logaddexp(lse, sinks)
        out = (out * share.masked_fill(lse == -_INF, 0.0)[..., None]).to(q.dtype)
    return out.to(q.dtype), lse


def _nothing_visible(piece: _Piece, rows: int) -> tuple[Tensor, Tensor]:
    batch, heads = piece.q.shape[:2]
    out = piece.q.new_zeros(batch, heads, rows, piece.v.shape[3])
    return out, out.new_full((batch, heads, rows), -_INF, dtype=_accumulator(out.dtype))


def _attend_fused(piece: _Piece) -> tuple[Tensor, Tensor]:
    """Attention without softcap and dropout, by torch's fused kernel."""
    config = piece.config
    if fused.is_widened(config):
        piece = replace(piece, q=piece.q.float(), k=piece.k.float(), v=piece.v.float())
    q, k = piece.q, piece.k
    left, right = config.band
    unlimited = left is None and right is None
    if piece.mask is None and piece.slopes is None and (piece.bias is None or piece.bias.dtype == q.dtype):
        # its is_causal fills scores that are scaled later with -inf: the scale must be positive
        causal = left is None and right == 0 and piece.shift == 0 and config.softmax_scale > 0 and piece.bias is None
        if unlimited or causal:
            return _fused_or_online(piece, range(q.shape[2]), range(k.shape[2]), causal)
    return _by_query_blocks(piece, _fused_or_online, _fused_rows(piece), range(q.shape[2]))


def _fused_rows(piece: _Piece) -> int:
    """Rows of a query block: an additive mask of bounded size, few keys outside the window."""
    left, right = piece.config.band
    windowed = left is not None and right is not None
    span = min(piece.k.shape[2], left + right + 1) if left is not None and right is not None else piece.k.shape[2]
    heads = max([1, *(t.shape[0] * t.shape[1] for t in (piece.mask, piece.bias, piece.slopes) if t is not None)])
    rows = max(fused.FULL_SPEED_ROWS, _ADDITIVE_IN_FLIGHT // (heads * span))
    if left is None and right is None:
        return rows
    return min(rows, max(fused.FULL_SPEED_ROWS, (span if windowed else piece.q.shape[2]) // 4))


def _by_query_blocks(
    piece: _Piece, attend_block: _AttendBlock, rows_in_block: int, whole: range
) -> tuple[Tensor, Tensor]:
    """Every block of queries against the keys the band shows it; blocks outside the band are never visited."""
    outs, lses = [], []
    for rows in _blocks(whole, rows_in_block):
        keys = piece.visible_keys(rows)
        out, lse = attend_block(piece, rows, keys) if keys else _nothing_visible(piece, len(rows))
        outs.append(out)
        lses.append(lse)
    return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs, dim=2), torch.cat(lses, dim=2))


def _fused_or_online(piece: _Piece, rows: range, keys: range, causal: bool = False) -> tuple[Tensor, Tensor]:
    """One call of the fused kernel, or algorithm 1 where the kernel is not to be trusted with NaN: for few keys, and
    where its lse tells, see `fused.lse_test`.
    """
    if len(keys) < fused.FEWEST_KEYS:
        return _online_softmax(piece, rows, keys)
    q, k, v = _narrow(piece.q, rows), _narrow(piece.k, keys), _narrow(piece.v, keys)
    head_dim, head_dim_v = q.shape[3], v.shape[3]
    widest = max(head_dim, head_dim_v)  # the kernel has one head dim: zeros change neither scores nor values
    q, k, v = _fit_kernel(q, widest), _fit_kernel(k, widest), _fit_kernel(v, widest)
    additive = None if causal else _additive_mask(piece, rows, keys)
    kernel: fused.Call = functools.partial(fused.kernel, is_causal=True) if causal else fused.kernel
    if len(rows) == 1:
        kernel = fused.fastest_for_a_row(q.dtype, q.shape[1], k.shape)
    out, lse = kernel(q, k, v, attn_mask=additive, scale=piece.config.softmax_scale)
    trusted = fused.lse_test(q.dtype, hidden=additive is not None, contiguous=lse.is_contiguous())
    if trusted is not None and not trusted(lse):
        return _by_query_blocks(piece, _online_softmax, _block_side(piece), rows)
    if additive is not None and fused.needs_exact_lse(piece.config):
        lse = fused.exact_lse(lse, additive)
    return (out if widest == head_dim_v else out[..., :head_dim_v]), lse


def _fit_kernel(tensor: Tensor, head_dim: int) -> Tensor:
    """Zero-pad the last dimension, and make it contiguous: the kernel takes its stride for 1."""
    if tensor.shape[3] != head_dim:
        return torch.nn.functional.pad(tensor, (0, head_dim - tensor.shape[3]))
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _additive_mask(piece: _Piece, rows: range, keys: range) -> Tensor | None:
    """What the kernel adds to the scores of a block: bias and ALiBi, and -inf where nothing may be seen."""
    visible, added = piece.visible(rows, keys), piece.added(rows, keys)
    if added is None:
        if visible is None:
            return None
        return fused.additive_mask(visible, piece.q.dtype)
    if added.dtype != piece.q.dtype:
        added = added.to(_accumulator(piece.q.dtype))
    return added if visible is None else torch.where(visible, added, -_INF)


def _block_side(piece: _Piece) -> int:
    """Rows and keys of a square block of scores that is computed in torch operations."""
    heads = piece.q.shape[0] * piece.q.shape[1]
    return min(512, max(32, math.isqrt(_SCORES_IN_FLIGHT // max(1, heads))))


def _online_softmax(piece: _Piece, rows: range, keys: range) -> tuple[Tensor, Tensor]:
    """Algorithm 1, lines 5 to 14, for one block of queries."""
    batch, heads = piece.q.shape[:2]
    compute = _accumulator(piece.q.dtype)
    highest = torch.full((batch, heads, len(rows)), -_INF, dtype=compute, device="cpu")
    denominator = torch.zeros_like(highest)
    numerator = torch.zeros((batch, heads, len(rows), piece.v.shape[3]), dtype=compute, device="cpu")
    for block in _blocks(keys, _block_side(piece)):
        scores, _ = _masked_scores(piece, rows, block)
        raised = torch.maximum(highest, scores.amax(-1))
        base = raised.masked_fill(raised == -_INF, 0.0)
        weights = torch.exp(scores - base[..., None])
        rescale = torch.exp(highest - base)
        highest, denominator = raised, denominator * rescale + weights.sum(-1)
        if piece.dropout_seed is not None:
            weights = weights * piece.kept(rows, block)
        numerator = numerator * rescale[..., None] + _times_shared(weights, _rows(piece.v, block))
    nothing_visible = denominator == 0
    out = numerator / denominator.masked_fill(nothing_visible, 1.0)[..., None]
    return out.to(piece.q.dtype), (highest + torch.log(denominator)).masked_fill(nothing_visible, -_INF)


def _masked_scores(piece: _Piece, rows: range, keys: range) -> tuple[Tensor, Tensor | None]:
    """Scores of a block (B, Hq, rows, keys), -inf where hidden, and the tanh of softcap, which its gradient needs."""
    config = piece.config
    scores = _times_shared(_rows(piece.q, rows), _rows(piece.k, keys).transpose(2, 3)) * config.softmax_scale
    tanh = None
    if config.softcap > 0:
        tanh = torch.tanh(scores / config.softcap)
        scores = config.softcap * tanh
    added, visible = piece.added(rows, keys), piece.visible(rows, keys)
    if added is not None:
        scores = scores + added.to(scores.dtype)
    if visible is not None:
        scores = scores.masked_fill(~visible, -_INF)
    return scores, tanh


def _rows(tensor: Tensor, rows: range) -> Tensor:
    """Some queries or keys of (B, H, S, ..) in the accumulator's dtype: a view where it has that already."""
    return _narrow(tensor, rows).to(_accumulator(tensor.dtype))


def _times_shared(per_query_head: Tensor, per_kv_head: Tensor) -> Tensor:
    """(B, Hq, m, n) @ (B, Hk, n, p): the query heads of a group are rows of one product, K and V are not repeated."""
    batch, heads_q, rows, _ = per_query_head.shape
    return (_stack_group(per_query_head, per_kv_head.shape[1]) @ per_kv_head).view(batch, heads_q, rows, -1)


def _sum_over_group(weights: Tensor, per_query_head: Tensor, heads_kv: int) -> Tensor:
    """(B, Hq, m, n).T @ (B, Hq, m, p), summed over the query heads of a group: (B, Hk, n, p)."""
    return _stack_group(weights, heads_kv).transpose(2, 3) @ _stack_group(per_query_head, heads_kv)


def _stack_group(tensor: Tensor, heads_kv: int) -> Tensor:
    """(B, Hq, m, n) as (B, Hk, Hq / Hk * m, n)."""
    batch, heads_q, rows, columns = tensor.shape
    return tensor.reshape(batch, heads_kv, heads_q // heads_kv * rows, columns)


def _differentiate_fused(
    config: AttentionConfig, inputs: AttentionInputs, out: Tensor, lse: Tensor, grad_out: Tensor
) -> Gradients:
    """The fused kernel's own backward, of a call that is one call of its forward."""
    tensors = (grad_out if grad_out.stride(3) == 1 else grad_out.contiguous(), *inputs[:3], out)
    causal = config.causal and config.seqlen_q > 1
    found = fused.kernel_backward(*(t.transpose(1, 2) for t in tensors), lse, 0.0, causal, scale=config.softmax_scale)
    return {name: gradient.transpose(1, 2) for name, gradient in zip("qkv", found, strict=True)}


def _differentiate(
    piece: _Piece,
    gradients: _Piece,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
) -> None:
    """Algorithm 2 on one piece: adds to the views of the gradient buffers that ``gradients`` holds."""
    heads_kv = piece.k.shape[1]
    whole = range(piece.q.shape[2])
    delta = (_rows(grad_out, whole) * _rows(out, whole)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse  # d lse / d score is the softmax as well
    lse = lse.masked_fill(lse == -_INF, _INF)  # so that the weights of rows that see nothing are exp(-inf)
    if piece.sinks is not None and gradients.sinks is not None:
        gradients.sinks.sub_((torch.exp(piece.sinks.to(lse.dtype)[:, None] - lse) * delta).sum((0, 2)))
    side = _block_side(piece)
    for keys in _blocks(range(piece.k.shape[2]), side):
        k, v = _rows(piece.k, keys), _rows(piece.v, keys)
        for rows in _blocks(piece.seeing_queries(keys), side):
            q, grad_rows = _rows(piece.q, rows), _rows(grad_out, rows)
            scores, tanh = _masked_scores(piece, rows, keys)
            weights = torch.exp(scores - _rows(lse, rows)[..., None])
            grad_weights = _times_shared(grad_rows, v.transpose(2, 3))
            used = weights
            if piece.dropout_seed is not None:
                kept = piece.kept(rows, keys)
                used, grad_weights = weights * kept, grad_weights * kept
            _rows(gradients.v, keys).add_(_sum_over_group(used, grad_rows, heads_kv))
            grad_scores = weights * (grad_weights - _rows(delta, rows)[..., None])
            if gradients.bias is not None:
                part = _block(gradients.bias, rows, keys)
                part.add_(grad_scores.sum_to_size(part.shape))
            if tanh is not None:
                grad_scores = grad_scores * (1 - tanh.square())
            grad_scores = grad_scores * piece.config.softmax_scale
            _rows(gradients.q, rows).add_(_times_shared(grad_scores, k))
            _rows(gradients.k, keys).add_(_sum_over_group(grad_scores, q, heads_kv))
