"""The mask function of transformers' `AttentionMaskInterface`, and what it returns instead of a mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from inspect import getclosurevars
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.utils.import_utils import is_tracing

from regard.errors import ConfigError
from regard.integrations.transformers.bands import Band, MaskFunction, band_of


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
        band = Band(right=0) if not tracing and kv_length + kv_offset <= local_size else None
    elif tracing and wants_tensor:
        band = None  # it may index tensors by position, which the tracer cannot follow with symbolic positions
    else:
        band = band_of(mask_function)
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
    band: Band,
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
    if not tracing and real.numel():
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
    band = band_of(within["mask_function"] if "position_ids" in within else others[0])
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
