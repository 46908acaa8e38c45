"""Attention over key/value caches: `flash_attn_with_kvcache`, and packed queries over paged keys.

Every cache is read as a paged one: a contiguous cache (B, S, Hk, D) has one page a sequence, of S keys; with
``cache_leftpad`` it has pages of one key, so that a sequence can begin anywhere in its row.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from regard import plans
from regard.api import attention, paged_attention
from regard.config import require_tensor
from regard.errors import ConfigError, Reason, UnsupportedError
from regard.integrations.flash_attn.positions import check_range, page_and_row, sequence_and_position
from regard.integrations.flash_attn.rotary import check_tables, rotate
from regard.lengths import check_block_table, check_index_vector, longest_sequence
from regard.tracing import is_traced


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Append new keys and values to a cache in place, then attend over what it holds.

    Args:
        q: (B, Sq, Hq, D). The last query sits at the last key held.
        k_cache, v_cache: (B, S, Hk, D); with ``cache_batch_idx`` any number of rows; with ``block_table``
            (num_pages, page_size, Hk, D). Any strides.
        k, v: (B, Snew, Hk, D), written behind the ``cache_seqlens`` keys held so far. None: nothing is appended.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2) with at least as many positions as a sequence can hold.
            Need k: rotates k at its positions and q at the positions from ``cache_seqlens`` on; where neither
            ``causal`` nor ``window_size`` orders the queries, all of them at ``cache_seqlens``.
        cache_seqlens: keys held for each sequence before the call, an int or int32 (B,), left padding included. None:
            as many as fit. Required with k.
        cache_batch_idx: int32 (B,), the row of the cache that is each sequence's. Where rows repeat and k is given,
            any of the new keys may end up in the row.
        cache_leftpad: int32 (B,), keys at the start of each sequence that do not count.
        block_table: int32 (B, pages a sequence), the pages of each sequence in order; not with ``cache_batch_idx``.
        rotary_interleaved: rotate elements (0, 1), (2, 3), ...; else (0, rotary_dim / 2), ...
        num_splits: accepted, at least 0; the backend divides the keys among multiprocessors as it sees fit.
        return_softmax_lse: also return softmax_lse.

    The other arguments are those of `flash_attn_func`.

    Returns:
        out (B, Sq, Hq, D); with ``return_softmax_lse`` also softmax_lse, float32 (B, Hq, Sq). Neither has a gradient:
        a backward that reaches them raises.

    Raises:
        ConfigError: an argument is malformed; then nothing is appended. Tensors of lengths, rows and pages are checked
            on the CPU; on a GPU what does not exist is clamped, to spare a synchronisation.
    """
    check_caches(q, k_cache, v_cache, rank_q=4)
    if isinstance(num_splits, bool) or not isinstance(num_splits, int) or num_splits < 0:
        raise ConfigError("num_splits", repr(num_splits), "an int of at least 0")
    window = window_of(window_size)
    pages = _pages(k_cache, block_table, cache_batch_idx, batch=q.shape[0])
    capacity = pages.shape[1] * k_cache.shape[1]
    held = _lengths("cache_seqlens", capacity if cache_seqlens is None else cache_seqlens, q)
    leftpad = None if cache_leftpad is None else _lengths("cache_leftpad", cache_leftpad, q)
    new = 0
    if any(tensor is not None for tensor in (k, v, rotary_cos, rotary_sin)):
        k, v = _check_new(q, k_cache, v_cache, k, v, cache_seqlens, capacity)
        new = k.shape[1]
    check_range("cache_seqlens", held if isinstance(cache_seqlens, Tensor) else cache_seqlens or 0, 0, capacity - new)
    if leftpad is not None:
        check_range("cache_leftpad", leftpad, 0, capacity)
        check_range("cache_leftpad", held + new - leftpad, 0, capacity, "numbers of keys after it")
    wants_gradient = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (q, k_cache, v_cache, k, v)
    )
    with torch.no_grad():
        if k is not None and v is not None:
            if rotary_cos is not None or rotary_sin is not None:
                ordered = causal or window is not None
                angles = _check_tables(rotary_cos, rotary_sin, q, capacity)
                q, k = _rotate(q, k, angles, held, ordered, rotary_interleaved)
            _check_options(q, k, v, alibi_slopes, causal, window, softmax_scale, softcap, return_softmax_lse)
            _append(k_cache, v_cache, k, v, pages, held)
            held = held + new
        if leftpad is not None:
            k_cache, v_cache, pages = _pages_of_one_key(k_cache, v_cache, pages, leftpad)
            held = (held - leftpad).clamp_min(0)
        options: dict[str, Any] = dict(
            causal=causal, window=window, softmax_scale=softmax_scale, softcap=softcap, alibi_slopes=alibi_slopes,
            return_lse=return_softmax_lse,
        )  # fmt: skip
        if block_table is None and cache_batch_idx is None and leftpad is None:
            kv_lens = None if cache_seqlens is None else held
            result = attention(q, k_cache, v_cache, kv_lens=kv_lens, **options)
        else:
            result = paged_attention(q, k_cache, v_cache, pages, held, **options)
    return _without_gradient(result) if wants_gradient else result


def attention_over_pages(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    stated: tuple[int, int],
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Packed queries (total_q, Hq, D) over a paged cache, without a gradient.

    The queries are padded to one length from the left, which leaves the last of each sequence at its last key.
    ``stated`` are the longest query and key sequence according to the caller.

    Returns:
        out (total_q, Hq, D) and lse (Hq, total_q).
    """
    check_index_vector("cu_seqlens_q", cu_seqlens_q, None, q.device)
    check_index_vector("cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape[0], q.device)
    if cu_seqlens_q.shape[0] < 1:
        raise ConfigError("cu_seqlens_q", f"shape {tuple(cu_seqlens_q.shape)}", "at least the leading 0")
    for side, claim in zip("qk", stated, strict=True):
        if isinstance(claim, bool) or not isinstance(claim, (int, torch.SymInt)):
            raise ConfigError(f"max_seqlen_{side}", repr(claim), "an int")
    max_seqlen_q, max_seqlen_k = stated
    longest = longest_sequence("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    if longest is not None and max_seqlen_q < longest:
        raise ConfigError("max_seqlen_q", max_seqlen_q, f"at least {longest}, the longest sequence of cu_seqlens_q")
    rows = max_seqlen_q if longest is None else longest  # an overstated length costs nothing
    sequence, position = sequence_and_position(cu_seqlens_q, q.shape[0])
    row = position + (rows - cu_seqlens_q.diff()[sequence])
    padded = q.new_zeros((cu_seqlens_q.numel() - 1, rows, *q.shape[1:]))
    padded[sequence, row] = q
    pages = _pages(k_cache, block_table, None, batch=padded.shape[0])
    kv_lens = _key_lengths(cu_seqlens_k, pages, k_cache)
    check_range("max_seqlen_k", kv_lens, 0, max_seqlen_k, "lengths")
    out, lse = paged_attention(padded, k_cache, v_cache, pages, kv_lens, **options, return_lse=True)
    return out[sequence, row], lse[sequence, :, row].T


def keys_of_pages(k_cache: Tensor, v_cache: Tensor, block_table: Tensor, cu_seqlens_k: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of the keys and values of a paged cache, packed (total_k, Hk, D). Differentiable."""
    check_index_vector("cu_seqlens_k", cu_seqlens_k, None, k_cache.device)
    pages = _pages(k_cache, block_table, None, batch=cu_seqlens_k.numel() - 1)
    total = int(_key_lengths(cu_seqlens_k, pages, k_cache).sum())
    sequence, position = sequence_and_position(cu_seqlens_k, total)
    page, row = page_and_row(pages[sequence], k_cache.shape[1], position[:, None], k_cache.shape[0])
    return k_cache[page, row].squeeze(1), v_cache[page, row].squeeze(1)


def window_of(window_size: Sequence[int] | Tensor) -> tuple[int | None, int | None] | None:
    """flash-attn's (left, right), where a negative bound is unlimited, as `regard.attention` takes it."""
    bounds = window_size.tolist() if isinstance(window_size, Tensor) else window_size
    if not isinstance(bounds, Sequence) or len(bounds) != 2:
        raise ConfigError("window_size", window_size, "a pair (left, right)")
    for bound in bounds:
        if isinstance(bound, bool) or not isinstance(bound, (Integral, torch.SymInt)):
            raise ConfigError("window_size", window_size, "two ints")
    left, right = (None if bound < 0 else int(bound) for bound in bounds)
    return None if left is None and right is None else (left, right)


def _key_lengths(cu_seqlens_k: Tensor, pages: Tensor, k_cache: Tensor) -> Tensor:
    """int32 (B,): the keys each sequence has in its pages."""
    lengths = cu_seqlens_k.diff()
    check_range("cu_seqlens_k", lengths, 0, pages.shape[1] * k_cache.shape[1], "lengths")
    return lengths


def _pages(k_cache: Tensor, block_table: Tensor | None, cache_batch_idx: Tensor | None, batch: int) -> Tensor:
    """int32 (B, pages a sequence): which ``k_cache[page]`` hold each sequence's keys."""
    if block_table is not None:
        if cache_batch_idx is not None:
            raise ConfigError("cache_batch_idx", "a tensor together with block_table", "one of the two")
        require_tensor("block_table", block_table)
        return check_block_table(block_table, batch, k_cache.device).contiguous()
    if cache_batch_idx is not None:
        rows = check_index_vector("cache_batch_idx", cache_batch_idx, batch, k_cache.device)
        check_range("cache_batch_idx", rows, 0, k_cache.shape[0] - 1)
        return rows[:, None]
    if k_cache.shape[0] != batch:
        raise ConfigError("k_cache", f"shape {tuple(k_cache.shape)}", f"batch {batch} as in q, or cache_batch_idx")
    return torch.arange(batch, dtype=torch.int32, device=k_cache.device)[:, None]


def _pages_of_one_key(
    k_cache: Tensor, v_cache: Tensor, pages: Tensor, leftpad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same keys in pages of one, each sequence from its key ``leftpad`` on."""
    num_pages, page_size = k_cache.shape[:2]
    position = torch.arange(pages.shape[1] * page_size, device=pages.device) + leftpad[:, None]
    page, row = page_and_row(pages, page_size, position, num_pages)
    k_cache, v_cache = (cache.flatten(0, 1)[:, None] for cache in (k_cache, v_cache))
    return k_cache, v_cache, (page * page_size + row).int()


def _append(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, pages: Tensor, held: Tensor) -> None:
    """Write k and v behind the ``held`` keys of each sequence, in place."""
    num_pages, page_size = k_cache.shape[:2]
    position = held[:, None] + torch.arange(k.shape[1], device=k.device)
    page, row = page_and_row(pages, page_size, position, num_pages)
    k_cache[page, row] = k
    v_cache[page, row] = v


def _rotate(
    q: Tensor, k: Tensor, angles: tuple[Tensor, Tensor], held: Tensor, ordered: bool, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Rotate the new keys at their positions, and the queries there too if something orders them."""
    first = held[:, None].long()
    q_position = first + torch.arange(q.shape[1], device=q.device) if ordered else first
    k_position = first + torch.arange(k.shape[1], device=q.device)
    return rotate(q, *angles, q_position, interleaved), rotate(k, *angles, k_position, interleaved)


def check_caches(q: Tensor, k_cache: Tensor, v_cache: Tensor, rank_q: int) -> None:
    """Raise a `ConfigError` unless these are tensors of one device, q of ``rank_q`` dimensions, the caches of 4."""
    for name, tensor, rank in (("q", q, rank_q), ("k_cache", k_cache, 4), ("v_cache", v_cache, 4)):
        require_tensor(name, tensor)
        if tensor.ndim != rank:
            raise ConfigError(name, f"shape {tuple(tensor.shape)}", f"a tensor of {rank} dimensions")
        if tensor.device != q.device:
            raise ConfigError(name, f"device {tensor.device}", f"the device of q, {q.device}")
    if k_cache.shape[:3] != v_cache.shape[:3]:
        raise ConfigError("v_cache", f"shape {tuple(v_cache.shape)}", f"that of k_cache, {tuple(k_cache.shape)}")


def _check_new(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache_seqlens: int | Tensor | None,
    capacity: int,
) -> tuple[Tensor, Tensor]:
    """The new keys and values, once they are known to fit the cache."""
    for name, tensor, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if tensor is None:
            raise ConfigError(name, None, "a tensor: k and v come together, and rotary_cos and rotary_sin need them")
        require_tensor(name, tensor)
        if tensor.ndim != 4 or tensor.shape[0] != q.shape[0] or tensor.shape[2:] != cache.shape[2:]:
            heads, head_dim = cache.shape[2:]
            expected = f"({q.shape[0]}, new keys, {heads}, {head_dim}), as {name}_cache has"
            raise ConfigError(name, f"shape {tuple(tensor.shape)}", expected)
        if tensor.dtype != cache.dtype:
            raise ConfigError(name, tensor.dtype, f"the dtype of {name}_cache, {cache.dtype}")
        if tensor.device != cache.device:
            raise ConfigError(name, f"device {tensor.device}", f"that of {name}_cache, {cache.device}")
        if any(stride == 0 and size > 1 for stride, size in zip(cache.stride(), cache.shape, strict=True)):
            raise ConfigError(f"{name}_cache", f"stride {cache.stride()}", "memory for every key, since k is given")
    assert k is not None and v is not None
    if k.shape[1] != v.shape[1]:
        raise ConfigError("v", f"shape {tuple(v.shape)}", f"{k.shape[1]} new keys, as in k")
    if k.shape[1] > capacity:
        raise ConfigError("k", f"{k.shape[1]} new keys", f"at most {capacity}, what the cache can hold")
    if cache_seqlens is None:
        raise ConfigError("cache_seqlens", None, "an int or an int32 tensor (B,), since k is given")
    return k, v


def _check_options(q: Tensor, k: Tensor, v: Tensor, alibi_slopes: Tensor | None, *options: Any) -> None:
    """Raise a `ConfigError` for what the attention over the cache would refuse, before anything is written: k and v are
    of the caches' heads and dtypes. ``options`` are causal, window, softmax_scale, softcap and return_lse.
    """
    mixed = not q.dtype == k.dtype == v.dtype
    if torch.compiler.is_compiling() or (mixed and torch.is_autocast_enabled(q.device.type)):  # which makes them alike
        return
    causal, window, softmax_scale, softcap, return_lse = options
    tensors = (q, k, v, None, None, alibi_slopes, None, None, None, None, None)
    said = ("bshd", causal, window, softmax_scale, softcap, 0.0, return_lse, False, None, None, None, None)
    plans.describe(tensors, said, traced=is_traced(tensors))


def _check_tables(cos: Tensor | None, sin: Tensor | None, q: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    if cos is None or sin is None:
        raise ConfigError("rotary_cos" if cos is None else "rotary_sin", None, "a tensor, since the other is given")
    check_tables(cos, sin, q)
    if cos.shape[0] < capacity:
        raise ConfigError("rotary_cos", f"{cos.shape[0]} positions", f"at least {capacity}, what the cache can hold")
    return cos, sin


def _lengths(name: str, lengths: int | Tensor, q: Tensor) -> Tensor:
    """int32 (B,)."""
    if isinstance(lengths, Tensor):
        return check_index_vector(name, lengths, q.shape[0], q.device)
    if isinstance(lengths, bool) or not isinstance(lengths, (int, torch.SymInt)):
        raise ConfigError(name, repr(lengths), "an int or an int32 tensor (B,)")
    return torch.full((q.shape[0],), lengths, dtype=torch.int32, device=q.device)


def _without_gradient(result: Tensor | tuple[Tensor, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
    """The same for callers that did not turn gradients off: a backward that comes here raises."""
    out, *lse = result if isinstance(result, tuple) else (result,)
    marked: tuple[Tensor, Tensor] = _Raising.apply(out.new_empty(0).requires_grad_(), out, *lse)  # type: ignore[no-untyped-call]
    return marked if lse else marked[0]


class _Raising(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, requires_grad: Tensor, *results: Tensor) -> tuple[Tensor, ...]:
        return tuple(result.view_as(result) for result in results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        raise UnsupportedError(
            "flash_attn_with_kvcache has no backward",
            {"flash_attn": [Reason("backward", "a gradient", "flash_attn_func on contiguous keys and values")]},
        )
