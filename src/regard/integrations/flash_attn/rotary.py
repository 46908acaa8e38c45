"""Rotary position embedding (Su et al. 2021, "RoFormer", section 3.2.2) as `flash_attn.layers.rotary` offers it."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from regard.config import require_tensor
from regard.errors import ConfigError
from regard.integrations.flash_attn.positions import check_range, sequence_and_position
from regard.lengths import longest_sequence

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
        seqlen_offsets: position of the first token, an int or one int a sequence, int32 or int64 (B,).
        cu_seqlens: int32 or int64 (B + 1,) offsets of packed sequences.
        max_seqlen: the longest packed sequence.

    Returns:
        x rotated, in its shape and dtype. Differentiable in x.

    Raises:
        ConfigError: an argument is malformed: cos and sin do not fit each other or x, or hold too few positions, say.
            On a GPU the values of ``cu_seqlens`` are not checked and positions past the last that come of
            ``seqlen_offsets`` are clamped, to spare a synchronisation.
    """
    require_tensor("x", x)
    if not x.is_floating_point():
        raise ConfigError("x", x.dtype, "a float dtype")
    if x.ndim != (4 if cu_seqlens is None else 3):
        raise ConfigError("x", f"shape {tuple(x.shape)}", "(B, S, H, D), or (total, H, D) with cu_seqlens")
    check_tables(cos, sin, x)
    if cu_seqlens is not None:
        _check_integers("cu_seqlens", cu_seqlens, None, x.device)
        if not x.is_cuda:
            longest_sequence("cu_seqlens", cu_seqlens, x.shape[0])
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if isinstance(seqlen_offsets, Tensor):
        _check_integers("seqlen_offsets", seqlen_offsets, sequences, x.device)
    elif isinstance(seqlen_offsets, bool) or not isinstance(seqlen_offsets, (Integral, torch.SymInt)):
        raise ConfigError("seqlen_offsets", repr(seqlen_offsets), "an int or a tensor of one a sequence")
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


def _check_integers(name: str, tensor: Tensor, length: int | None, device: torch.device) -> None:
    """Raise a `ConfigError` unless these are ``length`` integers on the device; None is any number above 0."""
    require_tensor(name, tensor)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ConfigError(name, tensor.dtype, "int32 or int64")
    if tensor.ndim != 1 or (tensor.shape[0] < 1 if length is None else tensor.shape[0] != length):
        raise ConfigError(name, f"shape {tuple(tensor.shape)}", f"shape ({'B + 1' if length is None else length},)")
    if tensor.device != device:
        raise ConfigError(name, f"device {tensor.device}", f"the device of x, {device}")


def check_tables(cos: Tensor, sin: Tensor, x: Tensor) -> None:
    """Raise a `ConfigError` unless cos and sin are two (positions, rotary_dim / 2) that fit x (..., H, D)."""
    for name, table in (("cos", cos), ("sin", sin)):
        require_tensor(name, table)
        if not table.is_floating_point():
            raise ConfigError(name, table.dtype, "a float dtype")
        if table.device != x.device:
            raise ConfigError(name, f"device {table.device}", f"the device of what it rotates, {x.device}")
    if cos.ndim != 2 or cos.shape != sin.shape:
        raise ConfigError(
            "cos, sin", f"shapes {tuple(cos.shape)}, {tuple(sin.shape)}", "both (positions, rotary_dim / 2)"
        )
    if 2 * cos.shape[1] > x.shape[-1]:
        raise ConfigError("cos, sin", f"rotary_dim {2 * cos.shape[1]}", f"at most the head dim, {x.shape[-1]}")


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
