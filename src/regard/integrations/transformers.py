"""Serve Hugging Face transformers models: ``attn_implementation="regard"`` after one `register()`.

Two functions are registered. `visibility_mask` runs once a forward pass and layer kind and says what is visible as a
few numbers and short vectors (`Visibility`) instead of an S x S mask; `attention_forward` runs in every layer and hands
that to `regard.attention`.

transformers counts positions from the start of a sequence, regard aligns bottom-right. With query i at position
``i + q_offset`` and key j at ``j + kv_offset``, "key <= query" reads ``j <= i + q_offset - kv_offset``, which is
regard's causal with ``kv_lens = q_offset - kv_offset + Sq`` keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from inspect import getclosurevars
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.utils.import_utils import is_tracing

from regard.api import attention, varlen_attention
from regard.errors import ConfigError

NAME = "regard"

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

MaskFunction = Callable[..., Any]


def register(name: str = NAME) -> None:
    """Make ``attn_implementation=name`` work in every transformers model that uses the attention interface.

    Registers the attention function and the mask function under one name: without the latter transformers passes no
    mask at all and padding would be attended to. Calling it again is fine.

    Args:
        name: what to pass as ``attn_implementation``. transformers gives names that contain ``flash``, ``sdpa``,
            ``flex_attention``, ``eager``, ``paged`` or ``/`` a meaning of its own.

    Raises:
        ConfigError: the name is one that transformers would redirect.
    """
    if not name or any(taken in name for taken in ("flash", "sdpa", "flex_attention", "eager", "paged", "/", "|")):
        raise ConfigError("name", repr(name), "a name in which transformers reads nothing of its own, such as 'regard'")
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, visibility_mask)


@dataclass(frozen=True, eq=False)
class Visibility:
    """Which keys each query sees, for all layers of one kind in one forward pass.

    Key j is visible to query i iff it lies within the band ``-left <= j - (i + L - Sq) <= right``, L being ``kv_lens``
    where given and ``kv_length`` otherwise, ``j < L``, and ``mask`` allows it. Where ``cu_seqlens`` is given the batch
    holds packed sequences and the band applies within each.

    Models that look into the mask before they pass it on find the 4-D bool mask it stands for: attributes, indexing and
    torch functions fall through to `materialise`. Only what takes it for an additive mask is refused.

    Attributes:
        q_length, kv_length: Sq and Sk the band was computed for.
        left, right: the band; None is unlimited on that side. ``right`` is 0 for causal.
        kv_lens: int32 (B,), the keys that count, the same for every query of a sequence.
        mask: bool, True = attend: (B, 1, 1, Sk) for padding that is no mere prefix, (B, 1, Sq, Sk) for what is no band.
        cu_seqlens: int32 (sequences + 1,), where packed sequences start in the flattened batch.
        max_seqlen: the longest packed sequence.
        build: makes the bool (B, 1, Sq, Sk) mask all this stands for.
    """

    q_length: int
    kv_length: int
    build: Callable[[], Tensor]
    left: int | None = None
    right: int | None = None
    kv_lens: Tensor | None = None
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None

    ndim = 4  # transformers computes no new mask from one that is 4-D already

    @property
    def causal(self) -> bool:
        return self.right == 0

    @property
    def window(self) -> tuple[int | None, int | None] | None:
        if self.left is None and self.right in (None, 0):
            return None
        return self.left, self.right

    def materialise(self) -> Tensor:
        """The bool (B, 1, Sq, Sk) mask, True = attend."""
        return self.build()

    def contiguous(self) -> Visibility:
        return self

    def to(self, *args: Any, **kwargs: Any) -> Visibility:
        """Move to a device, as accelerate does between layers of one kind."""
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None:
            raise _takes_it_for_additive(f"to({dtype})")

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return replace(
            self,
            kv_lens=moved(self.kv_lens),
            mask=moved(self.mask),
            cu_seqlens=moved(self.cu_seqlens),
            build=lambda: self.build().to(device),
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in ("float", "half", "bfloat16", "double"):
            raise _takes_it_for_additive(name)
        return getattr(self.materialise(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.materialise()[index]

    def __invert__(self) -> Tensor:
        return ~self.materialise()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.__name__.strip("_") in ("add", "radd", "iadd", "sub", "masked_fill"):
            raise _takes_it_for_additive(function.__name__)

        def tensors(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(map(tensors, value))
            return value.materialise() if isinstance(value, Visibility) else value

        return function(*tensors(args), **{key: tensors(value) for key, value in (kwargs or {}).items()})


def _takes_it_for_additive(operation: str) -> ConfigError:
    """The error for models that compute attention themselves but let any ``attn_implementation`` pass."""
    return ConfigError(
        "attn_implementation",
        f"regard for a model that applies its mask itself ({operation})",
        "a model that uses transformers' attention interface; 'eager' serves the others",
    )


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


def visibility_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = causal_mask_function,
    attention_mask: Tensor | Visibility | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    local_size: int | None = None,
    config: Any = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Visibility | Tensor:
    """The mask function of transformers' `AttentionMaskInterface`.

    Reads the padding once (one synchronisation a forward pass and layer kind), and not at all while tracing.

    Args:
        batch_size, q_length, kv_length: B, Sq, Sk.
        q_offset: position of the first query; a 0-d tensor with a static cache.
        kv_offset: position of the first key; above 0 where a sliding cache has dropped keys.
        mask_function: ``(batch, head, query position, key position) -> visible``.
        attention_mask: bool (B, keys), False = padding; or a `Visibility` made in advance, which is returned.
        allow_is_causal_skip, allow_is_bidirectional_skip: False where the caller wants a tensor.
        local_size: window or chunk size.
        config: the model's.
        use_vmap: whether mask_function takes scalars only.
        device: of the tensors made.

    Returns:
        a `Visibility`, with an S x S mask in it only where ``mask_function`` is neither a band (causal, bidirectional,
        sliding) nor packed sequences; or the bool (B, 1, Sq, Sk) mask of a band where the caller wants a tensor.
    """
    if isinstance(attention_mask, Visibility):
        return attention_mask

    def build() -> Tensor:
        mask: Tensor = sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
            kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
            allow_is_causal_skip=False, allow_is_bidirectional_skip=False, use_vmap=use_vmap, device=device,
        )  # fmt: skip
        return mask

    whole = Visibility(q_length, kv_length, build)
    tracing = is_tracing(attention_mask)
    wants_tensor = not (allow_is_causal_skip or allow_is_bidirectional_skip)
    # A decoding step into a static cache is denied the skip too, only so that sdpa compiles once; it wants no tensor.
    decodes_statically = q_length == 1 and isinstance(q_offset, Tensor)
    if local_size is not None and local_size == getattr(config, "attention_chunk_size", None):
        band = _Band(right=0) if not tracing and kv_length + kv_offset <= local_size else None
    elif tracing and wants_tensor:
        band = None  # it may index tensors by position, which the tracer cannot follow with symbolic positions
    else:
        band = _band_of(mask_function)
    if band is None:
        packed = _packed_sequences(mask_function, whole) if attention_mask is None and not tracing else None
        return packed or _as_built(whole)
    if wants_tensor and not decodes_statically:
        return build()
    aligned = _align(band, whole, batch_size, q_offset, kv_offset, device)
    if aligned is None:
        return _as_built(whole)
    return aligned if attention_mask is None else _add_padding(aligned, attention_mask, kv_offset, tracing)


def _as_built(whole: Visibility) -> Visibility:
    """The whole mask, for what is no band."""
    mask = whole.materialise()
    return replace(whole, mask=mask, build=lambda: mask)


def _align(
    band: _Band,
    unaligned: Visibility,
    batch_size: int,
    q_offset: int | Tensor,
    kv_offset: int,
    device: torch.device | str,
) -> Visibility | None:
    """Turn a band over absolute positions into regard's, which ends at the last key that counts; None if it cannot."""
    if band.left is None and band.right is None:
        return unaligned
    if not band.contains_diagonal:
        return None
    kv_length = unaligned.kv_length
    counted = q_offset - kv_offset + unaligned.q_length
    kv_lens = None
    if isinstance(counted, Tensor):
        kv_lens = counted.to(device, torch.int32).expand(batch_size).contiguous()
    elif counted != kv_length:
        if not 0 <= counted < kv_length:
            return None
        kv_lens = torch.full((batch_size,), counted, dtype=torch.int32, device=device)
    if kv_lens is not None and band.right != 0:
        return None  # keys past the last query are visible, so the keys cannot end there
    # a window as long as the keys is none
    left = None if band.left is not None and band.left >= kv_length - 1 else band.left
    right = None if band.right is not None and band.right >= max(kv_length - 1, 1) else band.right
    return replace(unaligned, left=left, right=right, kv_lens=kv_lens)


def _add_padding(visibility: Visibility, attention_mask: Tensor, kv_offset: int, tracing: bool) -> Visibility:
    """Combine a band with the 2-D padding mask: as nothing if it hides nothing, as kv_lens if it can, else by key."""
    kv_length = visibility.kv_length
    real = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    width = real.shape[1]
    banded = visibility.left is not None or visibility.right is not None
    if not tracing:
        lengths = real.sum(-1, dtype=torch.int32)
        if banded:
            hides_nothing = lengths.amin() == width  # of the keys it knows; it must know all that causal shows
            if width < kv_length:
                hides_nothing = hides_nothing & (visibility.kv_lens is not None and (visibility.kv_lens <= width).all())
            if bool(hides_nothing):
                return visibility
        else:
            prefix = torch.arange(width, device=real.device) < lengths[:, None]
            is_prefix, shortest = torch.stack([(real == prefix).all(), lengths.amin()]).tolist()
            if is_prefix:
                return visibility if shortest == kv_length else replace(visibility, kv_lens=lengths)
    real = nn.functional.pad(real, (0, kv_length - width))
    return replace(visibility, mask=real[:, None, None, :])


def _packed_sequences(mask_function: MaskFunction, whole: Visibility) -> Visibility | None:
    """Read where sequences start, and the band within each, out of transformers' mask function for packed sequences.

    That is the intersection of "same sequence" and of a band. Newer releases count the band's positions from the start
    of each sequence; since it depends on differences only, it is the same band.
    """
    functions = _nonlocals(mask_function).get("mask_functions", ())
    numbered = [function for function in functions if "packed_sequence_mask" in _nonlocals(function)]
    others = [function for function in functions if "packed_sequence_mask" not in _nonlocals(function)]
    if len(numbered) != 1 or len(others) != 1:
        return None
    within = _nonlocals(others[0])
    band = _band_of(within["mask_function"] if "position_ids" in within else others[0])
    if band is None or not band.contains_diagonal:
        return None
    sequence = _nonlocals(numbered[0])["packed_sequence_mask"]
    first = torch.ones_like(sequence, dtype=torch.bool)
    first[:, 1:] = sequence[:, 1:] != sequence[:, :-1]
    starts = first.flatten().nonzero().flatten()
    cu_seqlens = nn.functional.pad(starts, (0, 1), value=first.numel()).to(torch.int32)
    longest = int(cu_seqlens.diff().amax())
    return replace(whole, left=band.left, right=band.right, cu_seqlens=cu_seqlens, max_seqlen=longest)


def _nonlocals(function: MaskFunction) -> dict[str, Any]:
    return dict(getclosurevars(function).nonlocals) if hasattr(function, "__closure__") else {}


def _band_of(mask_function: MaskFunction) -> _Band | None:
    """The band a mask function stands for, found by asking it about symbolic positions; None if it is no band."""
    try:
        band = mask_function(0, 0, _Position(1, 0), _Position(0, 1))
    except Exception:  # it needs real indices, whichever way that shows
        return None
    return band if isinstance(band, _Band) else None


class _NotABand(Exception):
    """A mask function asked something of a position that a band of diagonals cannot answer."""


@dataclass(frozen=True)
class _Band:
    """Keys with ``-left <= key - query <= right``: what comparing a `_Position` gives."""

    left: int | None = None
    right: int | None = None

    device = None

    @property
    def contains_diagonal(self) -> bool:
        """Whether a query sees its own position, as regard's windows have it."""
        return (self.left is None or self.left >= 0) and (self.right is None or self.right >= 0)

    def __and__(self, other: object) -> _Band:
        if not isinstance(other, _Band):
            raise _NotABand
        left = self.left if other.left is None else other.left if self.left is None else min(self.left, other.left)
        right = (
            self.right if other.right is None else other.right if self.right is None else min(self.right, other.right)
        )
        return _Band(left, right)

    def to(self, device: None) -> _Band:
        return self

    def __bool__(self) -> bool:
        raise _NotABand


@dataclass(frozen=True, eq=False)
class _Position:
    """``query * q + key * k + constant``, on which a mask function is evaluated once instead of on every index."""

    query: int
    key: int
    constant: int = 0

    def new_ones(self, *args: Any, **kwargs: Any) -> _Band:
        return _Band()

    def __add__(self, other: object) -> _Position:
        if isinstance(other, int):
            return _Position(self.query, self.key, self.constant + other)
        raise _NotABand

    def __neg__(self) -> _Position:
        return _Position(-self.query, -self.key, -self.constant)

    def __sub__(self, other: object) -> _Position:
        if isinstance(other, int):
            return _Position(self.query, self.key, self.constant - other)
        if isinstance(other, _Position):
            return _Position(self.query - other.query, self.key - other.key, self.constant - other.constant)
        raise _NotABand

    def __abs__(self) -> _Distance:
        if (self.query, self.key) not in ((1, -1), (-1, 1)) or self.constant != 0:
            raise _NotABand
        return _Distance()

    def __ge__(self, other: object) -> _Band:
        """``self - other >= 0``, of which every other comparison is a case."""
        difference = self - other
        if (difference.query, difference.key) == (-1, 1):
            return _Band(left=difference.constant)
        if (difference.query, difference.key) == (1, -1):
            return _Band(right=difference.constant)
        if difference.query >= 0 and difference.key >= 0 and difference.constant >= 0:
            return _Band()  # positions are never negative
        raise _NotABand

    def __gt__(self, other: object) -> _Band:
        return (self - 1) >= other

    def __le__(self, other: object) -> _Band:
        return -(self - other) >= 0

    def __lt__(self, other: object) -> _Band:
        return (self + 1) <= other

    def __eq__(self, other: object) -> bool:
        raise _NotABand


@dataclass(frozen=True, eq=False)
class _Distance:
    """``abs(query - key)``."""

    def __le__(self, bound: object) -> _Band:
        if not isinstance(bound, int):
            raise _NotABand
        return _Band(bound, bound)
