"""``S_dmask``: the matrix with which flash-attn's tests look at the softmax and at the dropout mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.api import attention, varlen_attention
from regard.config import AttentionConfig
from regard.integrations.flash_attn.positions import sequence_and_position

_TILE = 128


def s_dmask(q: Tensor, k: Tensor, dropout_p: float, options: dict[str, Any]) -> Tensor:
    """``exp(score - highest score of its row)`` of every pair, negative where dropout drops it.

    For testing only: quadratic memory, computed by the reference backend. Leaves torch's generator as it was, so that
    the call that follows draws the mask shown here.

    Args:
        q: (B, Sq, Hq, D), or packed (total_q, Hq, D).
        k: (B, Sk, Hk, D), or packed.
        dropout_p: 0 gives an empty tensor, as flash-attn does.
        options: the other arguments of `regard.attention` or, where they hold ``cu_seqlens_q``, of
            `regard.varlen_attention`.

    Returns:
        (B, Hq, Sq, Sk) in q's dtype, both lengths zero-padded to multiples of 128; packed sequences start at row 0.
    """
    if dropout_p == 0:
        return q.new_empty(0)
    AttentionConfig.from_tensors(q, k, k, dropout_p=dropout_p, **options)  # raises what is malformed
    packed = "cu_seqlens_q" in options
    attend = varlen_attention if packed else attention
    unit_values = _unit_values_packed(k, options) if packed else _unit_values(k)
    matrix = _encode(attend, q, k, unit_values, dropout_p, options)
    if packed:
        matrix = _padded(matrix, options["cu_seqlens_q"], options["max_seqlen_q"])
    matrix = matrix.transpose(1, 2)
    return F.pad(matrix, (0, -matrix.shape[3] % _TILE, 0, -matrix.shape[2] % _TILE))


@torch.no_grad()
def _encode(
    attend: Callable[..., Any], q: Tensor, k: Tensor, unit_values: Tensor, dropout_p: float, options: dict[str, Any]
) -> Tensor:
    """With unit vectors for values, attention returns its own weights."""
    compute = torch.promote_types(q.dtype, torch.float32)
    arguments = (q.to(compute), k.to(compute), unit_values.to(compute))
    weights = attend(*arguments, **options, backend="reference")
    highest = weights.amax(-1, keepdim=True)
    exponentials = (weights / torch.where(highest > 0, highest, 1.0)).to(q.dtype)
    with torch.random.fork_rng([q.device] if q.is_cuda else [], device_type="cuda"):
        level = options | dict(softmax_scale=0.0, alibi_slopes=None)  # equal weights: a zero is a dropped one
        survivors = attend(*arguments, **level, dropout_p=dropout_p, backend="reference")
    limits = torch.finfo(q.dtype)
    dropped = -exponentials.clamp_min(limits.tiny * limits.eps)  # the smallest number, so that the sign survives
    return torch.where((weights > 0) & (survivors == 0), dropped, exponentials)


def _unit_values(k: Tensor) -> Tensor:
    batch, seqlen_k, heads_kv, _ = k.shape
    return torch.eye(seqlen_k, device=k.device)[None, :, None].expand(batch, -1, heads_kv, -1)


def _unit_values_packed(k: Tensor, options: dict[str, Any]) -> Tensor:
    _, position = sequence_and_position(options["cu_seqlens_k"], k.shape[0])
    return F.one_hot(position, options["max_seqlen_k"])[:, None].expand(-1, k.shape[1], -1)


def _padded(rows: Tensor, cu_seqlens: Tensor, seqlen: int) -> Tensor:
    """Packed rows (total, ...) as (B, seqlen, ...), zeros elsewhere."""
    padded = rows.new_zeros((cu_seqlens.numel() - 1, seqlen, *rows.shape[1:]))
    padded[sequence_and_position(cu_seqlens, rows.shape[0])] = rows
    return padded
