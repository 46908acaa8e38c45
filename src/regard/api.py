"""The public calls: `attention`, `varlen_attention`, `paged_attention` and `merge`.

Their defaults are 0 and not 0.0, since torch.compile(dynamic=True) makes an input of every float that it meets, default
or not, and compiles twice on finding that it is a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regard import ops, plans
from regard.config import FLOAT_DTYPES, AttentionConfig, AttentionInputs, require_tensor
from regard.errors import ConfigError
from regard.registry import Explanation, registry


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0,
    kv_lens: Tensor | None = None,
    layout: str = "bshd",
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention on the fastest backend that supports the call.

    ``softmax(softcap(q @ k.T * softmax_scale) + bias - alibi, over visible keys) @ v`` with fp32 accumulation
    (Dao 2023, "FlashAttention-2", algorithm 1, in the flash backends). Key j is visible to query i iff mask, causal,
    window and kv_lens all allow it. A row that sees no key gives 0 and lse -inf.

    Args:
        q: (B, Sq, Hq, D), or (B, Hq, Sq, D) with ``layout="bhsd"``. float16, bfloat16, float32; float64 on the
            reference backend. Any strides.
        k: (B, Sk, Hk, D); Hq must be a multiple of Hk (grouped-query attention).
        v: (B, Sk, Hk, Dv); Dv may differ from D.
        causal: key j is visible to query i iff ``j <= i + Sk - Sq`` (bottom-right aligned).
        window: inclusive ``(left, right)`` around position ``i + Sk - Sq``; None is unlimited on that side.
        mask: bool, True = attend; broadcasts to (B, Hq, Sq, Sk).
        bias: float, added to the scaled scores; broadcasts to (B, Hq, Sq, Sk). Gets a gradient.
        softmax_scale: default ``D ** -0.5``.
        softcap: 0 is off; else scores become ``softcap * tanh(score / softcap)``.
        alibi_slopes: (Hq,) or (B, Hq); adds ``-slope * |i + Sk - Sq - j|``.
        sinks: (Hq,) logits that join the softmax denominator only. Gets a gradient.
        dropout_p: probability that an attention weight is dropped, in [0, 1). Drawn from torch's generator of the
            device; forward and backward use the same Philox mask.
        kv_lens: int32 (B,), the keys of each sequence that count; the rest of k and v is never read. Takes the place
            of Sk in causal, window and ALiBi. Values outside 0..Sk are an error on the CPU and are clamped on a GPU.
        layout: ``"bshd"`` or ``"bhsd"``, of q, k, v and the output.
        return_lse: also return the natural log of the softmax denominator, fp32 (B, Hq, Sq), differentiable.
        deterministic: make the backward bitwise repeatable, as `flash` always does. The forward always is.
        backend: a name from `list_backends` (strict: it serves the call or raises), ``"auto"``, or None for what
            `use_backend` and `set_default` say.

    Returns:
        out in q's dtype and layout with head dim Dv; with ``return_lse`` a pair (out, lse).

    Raises:
        ConfigError: an argument is malformed.
        UnsupportedError: the named backend, or every backend, lacks something the call needs.
    """
    return _attend(
        (q, k, v, mask, bias, alibi_slopes, sinks, None, None, kv_lens, None),
        (layout, causal, window, softmax_scale, softcap, dropout_p, return_lse, deterministic, None, None, None, None),
        backend,
    )


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over sequences packed back to back, without padding.

    Args:
        q: (total_q, Hq, D).
        k: (total_k, Hk, D).
        v: (total_k, Hk, Dv).
        cu_seqlens_q, cu_seqlens_k: int32 (sequences + 1,) offsets: sequence b is rows ``cu[b]:cu[b + 1]``. Query and
            key lengths are independent; zero-length sequences are allowed.
        max_seqlen_q, max_seqlen_k: the longest sequence; read from the offsets if not given, which on a GPU
            synchronises once per offsets tensor.

    The other arguments are those of `attention`, applied to each sequence on its own.

    Returns:
        out (total_q, Hq, Dv); with ``return_lse`` also lse (Hq, total_q), fp32.
    """
    return _attend(
        (q, k, v, None, None, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, None, None),
        ("bshd", causal, window, softmax_scale, softcap, dropout_p, return_lse, deterministic, max_seqlen_q,
         max_seqlen_k, None, None),
        backend,
    )  # fmt: skip


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    kv_lens: Tensor,
    *,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of new queries over a paged KV cache (Kwon et al. 2023, "PagedAttention", section 4.1).

    Args:
        q: (B, Sq, Hq, D); the last query of sequence b sits at key position ``kv_lens[b] - 1``.
        k_cache: (num_pages, page_size, Hk, D).
        v_cache: (num_pages, page_size, Hk, Dv).
        block_table: int32 (B, pages per sequence), the pages of each sequence in order. Entries past a sequence's
            length are not read.
        kv_lens: int32 (B,), keys held for each sequence, the new ones included.

    The other arguments are those of `attention`. No backend differentiates through a paged cache.

    Returns:
        out (B, Sq, Hq, Dv); with ``return_lse`` also lse (B, Hq, Sq), fp32.
    """
    return _attend(
        (q, k_cache, v_cache, None, None, alibi_slopes, sinks, None, None, kv_lens, block_table),
        ("bshd", causal, window, softmax_scale, softcap, 0.0, return_lse, False, None, None, None, None),
        backend,
    )


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Combine attention over disjoint sets of keys into attention over their union.

    Args:
        outs: each (B, Sq, Hq, Dv), or packed (total_q, Hq, Dv).
        lses: each (B, Hq, Sq), or packed (Hq, total_q), natural log.

    Returns:
        (out, lse) as one call over all the keys would give them; a row that saw no key anywhere stays 0 and -inf.

    Raises:
        ConfigError: the lists are empty, or their lengths or the shapes, dtypes and devices in them do not fit.
    """
    _check_parts(outs, lses)
    stacked = torch.stack(list(lses))
    highest = stacked.detach().amax(0)
    shares = torch.exp(stacked - torch.where(highest == float("-inf"), 0.0, highest))
    total = shares.sum(0)
    total = total.masked_fill(total == 0, 1.0)  # no key anywhere: highest is -inf, out 0, and gradients are no NaN
    parts = torch.stack([out.to(stacked.dtype) for out in outs])
    merged = (parts * (shares / total).transpose(-1, -2)[..., None]).sum(0)
    return merged.to(outs[0].dtype), highest + total.log()


def _check_parts(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    """Raise a `ConfigError` unless `merge` can take these."""
    if not (isinstance(outs, (Sequence, Tensor)) and isinstance(lses, (Sequence, Tensor))):
        raise ConfigError("outs, lses", f"{type(outs).__name__} and {type(lses).__name__}", "two lists of tensors")
    if len(outs) == 0 or len(outs) != len(lses):
        raise ConfigError("outs, lses", f"{len(outs)} and {len(lses)} tensors", "two lists of the same length > 0")
    for name, tensors in (("outs", outs), ("lses", lses)):
        for index, tensor in enumerate(tensors):
            require_tensor(f"{name}[{index}]", tensor)
            if tensor.dtype not in FLOAT_DTYPES:
                raise ConfigError(f"{name}[{index}]", tensor.dtype, "float16, bfloat16, float32 or float64")
            if tensor.device != outs[0].device:
                raise ConfigError(f"{name}[{index}]", f"device {tensor.device}", f"{outs[0].device} as outs[0]")
    if outs[0].ndim not in (3, 4):
        raise ConfigError("outs[0]", f"shape {tuple(outs[0].shape)}", "(B, Sq, Hq, Dv), or packed (total_q, Hq, Dv)")
    *batch, rows, heads, _ = outs[0].shape
    for index, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.shape != outs[0].shape:
            raise ConfigError(f"outs[{index}]", f"shape {tuple(out.shape)}", f"{tuple(outs[0].shape)} as outs[0]")
        if lse.shape != (*batch, heads, rows):
            raise ConfigError(f"lses[{index}]", f"shape {tuple(lse.shape)}", f"{(*batch, heads, rows)} for such an out")


def explain(q: AttentionConfig | Tensor, *tensors: Tensor, backend: str | None = None, **arguments: Any) -> Explanation:
    """Say which backend would serve a call, and every backend's reasons against it.

    Args:
        q: an `AttentionConfig`, or q of a call whose k, v and keyword arguments follow (those of `attention`; with
            ``cu_seqlens_q`` those of `varlen_attention`, with ``block_table`` those of `paged_attention`).
        backend: explain the choice of this name instead of the automatic one.

    Returns:
        an `Explanation`; ``print`` shows it as a table.
    """
    if not isinstance(q, AttentionConfig):
        q = AttentionConfig.from_tensors(q, *tensors, **arguments)
    elif tensors or arguments:
        raise ConfigError("q", "an AttentionConfig together with arguments of a call", "one of the two")
    return registry.explain(q, backend)


def _attend(tensors: tuple[Any, ...], options: tuple[Any, ...], backend: str | None) -> Tensor | tuple[Tensor, Tensor]:
    """Every public call from here on.

    Args:
        tensors: the arguments that are tensors, in the order of `plans.TENSORS`.
        options: the others, in the order of `plans.OPTIONS`.
        backend: the caller's choice.
    """
    if not torch.compiler.is_compiling():
        return _run(tensors, options, backend)
    results = torch.ops.regard.call(*tensors, *options[:-2], backend)
    return results[0] if len(results) == 1 else (results[0], results[1])


def _run(tensors: tuple[Any, ...], options: tuple[Any, ...], backend: str | None) -> Tensor | tuple[Tensor, Tensor]:
    """Describe the call, select its backend, run it."""
    plan = plans.recall(tensors, options, backend)
    if plan is None:
        if torch._C._is_any_autocast_enabled() and isinstance(q := tensors[0], Tensor):
            kind = q.device.type
            if torch.is_autocast_enabled(kind):
                with torch.autocast(kind, enabled=False):
                    return _run(_autocast(tensors, torch.get_autocast_dtype(kind)), options, backend)
        plan = plans.make(tensors, options, backend)
    config, selection, shortcut, traced = plan
    q, k, v, mask, bias = tensors[:5]
    if shortcut is not None:
        try:
            if bias is not None:
                return shortcut(q, k, v, bias) if mask is None else shortcut(q, k, v, mask, bias)
            return shortcut(q, k, v) if mask is None else shortcut(q, k, v, mask)
        except Exception:  # noqa: S110 - the long way says what is wrong, or finds another backend
            pass
    transposed = options[0] == "bhsd"
    if transposed:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    seed = None if config.dropout_p == 0 else _draw_seed(config, q)
    inputs = AttentionInputs._make((q, k, v, _four_dimensional(mask), _four_dimensional(bias), *tensors[5:], seed))
    out, lse = ops.attend(config, inputs, selection, traced=traced)
    if transposed:
        out = out.transpose(1, 2)
    if not config.return_lse:
        return out
    assert lse is not None
    return out, lse


# A public call as torch.compile records it; the tracers below see through it to the ops of the selected backend.
# Options are what they may be and more: a schema of bools and floats would make legal values of 1, True and ().
_library = torch.library.Library("regard", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "call(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? kv_lens, Tensor? block_table, str layout, Scalar? causal, "
    "Scalar?[]? window, Scalar? softmax_scale, Scalar? softcap, Scalar? dropout_p, Scalar? return_lse, "
    "Scalar? deterministic, Scalar? max_seqlen_q, Scalar? max_seqlen_k, str? backend) -> Tensor[]"
)


def _run_recorded(*arguments: Any) -> list[Tensor]:
    tensors = arguments[: len(plans.TENSORS)]
    *options, backend = arguments[len(plans.TENSORS) :]
    results = _run(tensors, (*options, None, None), backend)
    return list(results) if isinstance(results, tuple) else [results]


_library.impl("call", _run_recorded, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]


def _autocast(tensors: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """q, k and v, where they are float32, in the autocast dtype, as torch's own attention does."""
    qkv = (t.to(dtype) if isinstance(t, Tensor) and t.dtype == torch.float32 else t for t in tensors[:3])
    return *qkv, *tensors[3:]


def _four_dimensional(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.ndim == 4 else tensor.view(*(1,) * (4 - tensor.ndim), *tensor.shape)


def _draw_seed(config: AttentionConfig, q: Tensor) -> Tensor | None:
    if config.dropout_p == 0:
        return None
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=q.device)
