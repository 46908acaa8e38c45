"""The functions of `flash_attn.flash_attn_interface`, in terms of `regard.attention` and its siblings.

All take what flash-attn 2.8 takes, in its order and with its defaults:

- ``dropout_p``: probability that an attention weight is dropped.
- ``softmax_scale``: None is ``D ** -0.5``.
- ``causal``: key j is visible to query i iff ``j <= i + Sk - Sq`` (bottom-right aligned).
- ``window_size``: inclusive (left, right) around ``i + Sk - Sq``; a negative bound is unlimited.
- ``softcap``: 0 is off; else scores become ``softcap * tanh(score / softcap)``.
- ``alibi_slopes``: (Hq,) or (B, Hq); adds ``-slope * |i + Sk - Sq - j|``.
- ``deterministic``: make the backward bitwise repeatable; the forward always is.
- ``return_attn_probs``: return (out, softmax_lse, S_dmask); see `s_dmask` for the last, which is for testing only.

Hq may be a multiple of Hk. Malformed arguments raise `regard.ConfigError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from regard.api import attention, varlen_attention
from regard.config import require_tensor
from regard.errors import ConfigError
from regard.integrations.flash_attn.kvcache import (
    attention_over_pages,
    check_caches,
    flash_attn_with_kvcache,
    keys_of_pages,
    window_of,
)
from regard.integrations.flash_attn.s_dmask import s_dmask

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

USE_TRITON_ROCM = True
"""flash-attn's own tests ask by it whether its CUDA extension is absent."""

Result = Tensor | tuple[Tensor, ...]
Window = Sequence[int] | Tensor


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Attention of q (B, Sq, Hq, D) over k and v (B, Sk, Hk, D).

    Returns:
        out (B, Sq, Hq, D); with ``return_attn_probs`` also softmax_lse, float32 (B, Hq, Sq), and S_dmask.
    """
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    if not return_attn_probs:
        return attention(q, k, v, dropout_p=dropout_p, **options)
    matrix = s_dmask(q, k, dropout_p, options)
    out, lse = attention(q, k, v, dropout_p=dropout_p, **options, return_lse=True)
    return out, lse, matrix


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` with keys and values stacked: kv (B, Sk, 2, Hk, D)."""
    k, v = _unstack("kv", kv, dim=2, parts=2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` with queries, keys and values stacked: qkv (B, S, 3, H, D)."""
    q, k, v = _unstack("qkv", qkv, dim=2, parts=3)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """Attention of sequences packed back to back.

    Args:
        q: (total_q, Hq, D).
        k, v: (total_k, Hk, D), or (num_pages, page_size, Hk, D) with ``block_table``.
        cu_seqlens_q, cu_seqlens_k: int32 (B + 1,) offsets of the sequences.
        max_seqlen_q, max_seqlen_k: the longest sequence.
        block_table: int32 (B, pages a sequence), the pages of each sequence in order. Where a gradient or dropout is
            asked for, the keys are copied out of their pages first.

    Returns:
        out (total_q, Hq, D); with ``return_attn_probs`` also softmax_lse, float32 (Hq, total_q), and S_dmask.
    """
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    max_seqlen_q, max_seqlen_k = _integer("max_seqlen_q", max_seqlen_q), _integer("max_seqlen_k", max_seqlen_k)
    if block_table is not None:
        check_caches(q, k, v, rank_q=3)
        if dropout_p == 0 and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
            if not isinstance(options.pop("deterministic"), bool):  # of a backward that does not come
                raise ConfigError("deterministic", repr(deterministic), "a bool")
            longest = max_seqlen_q, max_seqlen_k
            out, lse = attention_over_pages(q, k, v, block_table, cu_seqlens_q, cu_seqlens_k, longest, options)
            return (out, lse, q.new_empty(0)) if return_attn_probs else out
        k, v = keys_of_pages(k, v, block_table, cu_seqlens_k)
    options |= dict(
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k
    )
    if not return_attn_probs:
        return varlen_attention(q, k, v, dropout_p=dropout_p, **options)
    matrix = s_dmask(q, k, dropout_p, options)
    out, lse = varlen_attention(q, k, v, dropout_p=dropout_p, **options, return_lse=True)
    return out, lse, matrix


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` with keys and values stacked: kv (total_k, 2, Hk, D)."""
    k, v = _unstack("kv", kv, dim=1, parts=2)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` with queries, keys and values stacked: qkv (total, 3, H, D)."""
    q, k, v = _unstack("qkv", qkv, dim=1, parts=3)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def _get_block_size_n(device: torch.device, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """Over how many keys flash-attn's tests take each running maximum of ``S_dmask``: here it is the row's own."""
    return 2**31 - 1


def _options(
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
) -> dict[str, Any]:
    return dict(
        softmax_scale=softmax_scale,
        causal=causal,
        window=window_of(window_size),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
    )


def _unstack(name: str, stacked: Tensor, dim: int, parts: int) -> tuple[Tensor, ...]:
    """Views of what is stacked along ``dim``."""
    require_tensor(name, stacked)
    if stacked.ndim != dim + 3 or stacked.shape[dim] != parts:
        leading = "B, S" if dim == 2 else "total"
        raise ConfigError(name, f"shape {tuple(stacked.shape)}", f"({leading}, {parts}, H, D)")
    return stacked.unbind(dim)


def _integer(name: str, length: int | Tensor) -> int:
    """The length as an int, where it is a tensor or an integer of NumPy."""
    if isinstance(length, Tensor):
        if length.numel() != 1 or length.is_floating_point() or length.is_complex() or length.dtype == torch.bool:
            raise ConfigError(name, f"{length.dtype}, shape {tuple(length.shape)}", "an int, or a tensor of one")
        return int(length.item())
    return int(length) if isinstance(length, Integral) and not isinstance(length, bool) else length
