"""Rotary position embedding (Su et al. 2021, "RoFormer", section 3.2.2) as `flash_attn.layers.rotary` offers it."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.errors import ConfigError
from regard.integrations.flash_attn.positions import check_range, sequence_and_position

__all__ = ["apply_rotary_emb", "apply_rotary_emb_func"]


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotate the first ``rotary_dim`` elements of each head by the angles of the token's position.

    Args:
        x: (B, S, H, D), or packed (total, H, D) with ``cu_seqlens``. Computed in float32 or better, rounded once.
        cos, sin: (positions, rotary_dim / 2), ``rotary_dim <= D``.
        interleaved: rotate elements (0, 1), (2, 3), ... as GPT-J does, instead of (0, rotary_dim / 2), ... (GPT-NeoX).
        inplace: write the result into x and return x.
        seqlen_offsets: position of the first token, an int or one int a sequence (B,).
        cu_seqlens: int32 (B + 1,) offsets of packed sequences.
        max_seqlen: the longest packed sequence.

    Returns:
        x rotated, in its shape and dtype. Differentiable in x.

    Raises:
        ConfigError: cos and sin do not fit each other or x, or hold too few positions (on a GPU, positions past the
            last that come of ``seqlen_offsets`` are clamped, to spare a synchronisation).
    """
    if x.ndim != (4 if cu_seqlens is None else 3):
        raise ConfigError("x", f"shape {tuple(x.shape)}", "(B, S, H, D), or (total, H, D) with cu_seqlens")
    check_tables(cos, sin, x.shape[-1])
    longest = x.shape[1] if cu_seqlens is None else max_seqlen
    if longest is not None and longest > cos.shape[0]:
        raise ConfigError("cos, sin", f"{cos.shape[0]} positions", f"at least {longest}, the longest sequence")
    if cu_seqlens is None:
        position = torch.arange(x.shape[1], device=x.device)
        offset = seqlen_offsets[:, None] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets
    else:
        sequence, position = sequence_and_position(cu_seqlens, x.shape[0])
        offset = seqlen_offsets[sequence] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets
    rotated = rotate(x, cos, sin, position + offset, interleaved)
    return x.copy_(rotated) if inplace else rotated


apply_rotary_emb_func = apply_rotary_emb
"""An older name of `apply_rotary_emb` that flash-attn keeps."""


def check_tables(cos: Tensor, sin: Tensor, head_dim: int) -> None:
    """Raise a `ConfigError` unless cos and sin are two (positions, rotary_dim / 2) with ``rotary_dim <= head_dim``."""
    if cos.ndim != 2 or cos.shape != sin.shape:
        raise ConfigError(
            "cos, sin", f"shapes {tuple(cos.shape)}, {tuple(sin.shape)}", "both (positions, rotary_dim / 2)"
        )
    if 2 * cos.shape[1] > head_dim:
        raise ConfigError("cos, sin", f"rotary_dim {2 * cos.shape[1]}", f"at most the head dim, {head_dim}")


def rotate(x: Tensor, cos: Tensor, sin: Tensor, position: Tensor, interleaved: bool) -> Tensor:
    """Rotate x (..., S, H, D) at integer positions that broadcast to (..., S)."""
    check_range("position", position, 0, cos.shape[0] - 1)
    position = position.clamp(0, cos.shape[0] - 1)
    compute = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (table[position].to(compute).unsqueeze(-2) for table in (cos, sin))  # (..., S, 1, rotary_dim / 2)
    rotary_dim = 2 * cos.shape[-1]
    turned = x[..., :rotary_dim].to(compute)
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    pair = (first * cos - second * sin, first * sin + second * cos)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([turned.to(x.dtype), x[..., rotary_dim:]], dim=-1)
