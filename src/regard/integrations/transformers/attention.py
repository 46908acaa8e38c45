"""The attention function of transformers' `AttentionInterface`: what a mask says and a layer asks, as one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regard.api import attention, varlen_attention
from regard.errors import ConfigError
from regard.integrations.transformers.visibility import Visibility

# Keywords that models and trainers pass along and that say nothing about which scores or weights attention has.
_WITHOUT_MEANING_HERE = frozenset(
    {
        "cache_position",  # where the cache is written, which happened before; visibility is in the mask
        "layer_idx",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_ids",  # already in the rotary embedding, and in the mask where sequences are packed
        "return_dict",
        "seq_idx",  # for the convolutions of hybrid models
        "use_cache",
    }
)

_HINTS = {
    "cache": "continuous batching is not served; transformers allows it for sdpa and flash attention only",
    "head_mask": "attention weights are not materialised",
    "layer_head_mask": "attention weights are not materialised",
    "output_attentions": "attention weights are not materialised; use attn_implementation='eager' to look at them",
}


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Visibility | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    deterministic: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' `AttentionInterface`.

    A mask is complete: where there is one it alone says what is visible, as with transformers' own sdpa. ``is_causal``
    (then ``module.is_causal``) and ``sliding_window`` count where there is none.

    Args:
        module: the attention layer; dropout applies while it is training.
        query: (B, Hq, Sq, D).
        key, value: (B, Hk, Sk, D), heads not repeated.
        attention_mask: what `visibility_mask` returned; or a 4-D mask of the caller, bool (True = attend) or float
            (added to the scores), which broadcasts to (B, Hq, Sq, Sk); or None.
        scaling: factor on the scores, default ``D ** -0.5``.
        sliding_window: a query sees itself and the ``sliding_window - 1`` keys before it (and after it, unless causal).
        s_aux: (Hq,) sink logits.
        position_bias: float, added to the scaled scores; broadcasts to (B, Hq, Sq, Sk).
        cu_seq_lens_q, cu_seq_lens_k: (sequences + 1,) offsets of packed sequences in the flattened batch.
        max_length_q, max_length_k: the longest of those.

    Returns:
        ((B, Sq, Hq, D), None).

    Raises:
        ConfigError: a keyword whose meaning is not known or cannot be honoured, or a malformed argument.
    """
    _refuse_unknown(kwargs)
    visible = _visible(module, query, key, attention_mask, sliding_window, is_causal)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    arguments: dict[str, Any] = {
        "softmax_scale": scaling,
        "softcap": softcap or 0.0,
        "sinks": s_aux,
        "dropout_p": dropout if module.training else 0.0,
        "deterministic": bool(deterministic),
    }
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        visible = _packed_by_caller(visible, position_bias, cu_seq_lens_q, cu_seq_lens_k)
        lengths = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        return _attend_packed(q, k, v, visible, *lengths, arguments), None
    if isinstance(visible, Visibility) and visible.cu_seqlens is not None:
        if position_bias is None:
            longest = visible.max_seqlen
            lengths = (visible.cu_seqlens, visible.cu_seqlens, longest, longest)
            return _attend_packed(q, k, v, visible, *lengths, arguments), None
        visible = visible.materialise()
    if isinstance(visible, Visibility):
        arguments.update(
            causal=visible.causal, window=visible.window, kv_lens=visible.kv_lens, mask=visible.mask, bias=position_bias
        )
    elif visible.dtype == torch.bool:
        arguments.update(mask=visible, bias=position_bias)
    else:
        arguments.update(bias=visible if position_bias is None else visible + position_bias)
    out = attention(q, k, v, **arguments)
    assert isinstance(out, Tensor)
    return out, None


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    for name, value in kwargs.items():
        if name in _WITHOUT_MEANING_HERE or value is None or value is False:
            continue
        hint = _HINTS.get(name, "attn_implementation='regard' does not know what it means and ignores nothing")
        raise ConfigError(name, f"a {type(value).__name__}", f"None ({hint})")


def _visible(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | Visibility | None,
    sliding_window: int | None,
    is_causal: bool | None,
) -> Visibility | Tensor:
    """What the mask, or else is_causal and sliding_window, say about this layer's queries and keys."""
    q_length, kv_length = query.shape[2], key.shape[2]
    if isinstance(attention_mask, Visibility):
        aligned = attention_mask.left is not None or attention_mask.right is not None
        measured = attention_mask.kv_lens is not None or attention_mask.mask is not None
        if (aligned or measured) and attention_mask.kv_length != kv_length:
            raise ConfigError("key", f"{kv_length} keys", f"the {attention_mask.kv_length} the mask was made for")
        if aligned and attention_mask.q_length != q_length:
            raise ConfigError("query", f"{q_length} queries", f"the {attention_mask.q_length} the mask was made for")
        return attention_mask
    if attention_mask is not None:
        if attention_mask.ndim != 4 or not (attention_mask.dtype == torch.bool or attention_mask.is_floating_point()):
            raise ConfigError(
                "attention_mask",
                f"{attention_mask.dtype}, shape {tuple(attention_mask.shape)}",
                "4 dimensions that broadcast to (B, Hq, Sq, Sk), bool or float",
            )
        return attention_mask
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if (is_causal or sliding_window) and q_length != kv_length and q_length != 1:
        # Queries may be the first positions (an empty static cache) or the last (a filled one): only a mask can say.
        raise ConfigError(
            "attention_mask", f"None with {q_length} queries and {kv_length} keys", "a mask that places the queries"
        )
    reach = sliding_window - 1 if sliding_window else None
    return Visibility(q_length, kv_length, _no_mask_to_build, left=reach, right=0 if is_causal else reach)


def _no_mask_to_build() -> Tensor:
    raise AssertionError("made inside attention_forward, which never materialises it")


def _packed_by_caller(
    visible: Visibility | Tensor,
    position_bias: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
) -> Visibility:
    """Check that packed sequences come with nothing that has no place in a packed batch."""
    if cu_seq_lens_q is None or cu_seq_lens_k is None:
        missing = "cu_seq_lens_q" if cu_seq_lens_q is None else "cu_seq_lens_k"
        raise ConfigError(missing, None, "offsets, since the other one is given")
    if position_bias is not None:
        raise ConfigError("position_bias", "a tensor together with cu_seq_lens_q", "one of the two")
    if isinstance(visible, Tensor) or visible.mask is not None or visible.kv_lens is not None:
        raise ConfigError("attention_mask", "a mask together with cu_seq_lens_q", "one of the two")
    return visible


def _attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Visibility,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    arguments: dict[str, Any],
) -> Tensor:
    """Attention over sequences packed into the flattened (B, S) of the batch."""
    assert cu_seqlens_q is not None and cu_seqlens_k is not None
    out = varlen_attention(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1),
        cu_seqlens_q.to(torch.int32), cu_seqlens_k.to(torch.int32),
        None if max_seqlen_q is None else int(max_seqlen_q), None if max_seqlen_k is None else int(max_seqlen_k),
        causal=visible.causal, window=visible.window, **arguments,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out.view(*q.shape[:2], *out.shape[1:])
