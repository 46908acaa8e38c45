"""flash-attn's helpers between padded batches (B, S, ...) and packed tokens (total, ...). All are differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.config import require_tensor
from regard.errors import ConfigError
from regard.integrations.flash_attn.positions import check_range

__all__ = [
    "index_first_axis",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:  # noqa: A002  # flash-attn's name
    """The rows ``indices`` (n,) of ``input`` (rows, ...), as (n, ...)."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros (first_axis_dim, ...) whose rows ``indices`` (n,) are ``values`` (n, ...)."""
    require_tensor("values", values)
    require_tensor("indices", indices)
    if indices.dtype not in (torch.int32, torch.int64) or indices.shape != values.shape[:1]:
        seen = f"{indices.dtype}, shape {tuple(indices.shape)}"
        raise ConfigError("indices", seen, f"int64 ({values.shape[0]},): one for each row of values")
    check_range("indices", indices, 0, first_axis_dim - 1)
    return values.new_zeros((first_axis_dim, *values.shape[1:])).index_copy(0, indices.long(), values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Pack the tokens that the masks select.

    Args:
        hidden_states: (B, S, ...).
        attention_mask: (B, S), bool or int, 1 = a token that counts.
        unused_mask: (B, S), 1 = a token that takes its place among the packed ones and does not count.

    Returns:
        the packed tokens (total, ...); their indices (total,) into the B * S flattened ones; ``cu_seqlens`` int32
        (B + 1,); the longest sequence; ``seqused`` int32 (B,), the tokens of each sequence that count.

    Raises:
        ConfigError: a mask has another shape, a value other than 0 and 1, or a 1 where the other one has it.
    """
    _check_mask("attention_mask", attention_mask, hidden_states)
    if unused_mask is not None:
        _check_mask("unused_mask", unused_mask, hidden_states)
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens, longest, fits = _offsets(kept.sum(dim=-1, dtype=torch.int32), len(indices))
    if not fits:
        names = "attention_mask" if unused_mask is None else "attention_mask + unused_mask"
        raise ConfigError(names, "a value other than 0 and 1", "1 for each token that is kept, else 0")
    packed = index_first_axis(hidden_states.flatten(0, 1), indices)
    return packed, indices, cu_seqlens, longest, attention_mask.sum(dim=-1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Pack rows that hold several short sequences back to back, each sequence on its own.

    Args:
        hidden_states: (B, S, ...).
        attention_mask_in_length: int (B, S): the nonzero entries of a row are the lengths of the sequences in it, in
            order; what is left of the row is padding. ``[2, 3, 0, 0, 0, 0]``: two sequences and one token of padding.

    Returns:
        the packed tokens (total, ...); their indices (total,) into the B * S flattened ones; ``cu_seqlens`` int32
        (sequences + 1,); the longest sequence.

    Raises:
        ConfigError: a length is negative, or those of a row are more than S together.
    """
    _check_mask("attention_mask_in_length", attention_mask_in_length, hidden_states)
    lengths = attention_mask_in_length[attention_mask_in_length != 0]
    filled = attention_mask_in_length.sum(dim=-1, keepdim=True)
    column = torch.arange(attention_mask_in_length.shape[-1], device=filled.device)
    indices = (column < filled).flatten().nonzero().flatten()
    cu_seqlens, longest, fits = _offsets(lengths, len(indices))
    if not fits:
        raise ConfigError(
            "attention_mask_in_length", "a row whose lengths pass its end", f"lengths of at most {len(column)} a row"
        )
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Put packed tokens (total, ...) back to their ``indices``, as (batch, seqlen, ...) with zeros elsewhere."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).view(batch, seqlen, *hidden_states.shape[1:])


def _check_mask(name: str, mask: Tensor, hidden_states: Tensor) -> None:
    require_tensor("hidden_states", hidden_states)
    require_tensor(name, mask)
    batch, seqlen = hidden_states.shape[:2]
    if mask.shape != (batch, seqlen):
        raise ConfigError(name, f"shape {tuple(mask.shape)}", f"shape {(batch, seqlen)} as hidden_states")


def _offsets(lengths: Tensor, tokens: int) -> tuple[Tensor, int, bool]:
    """``cu_seqlens`` of sequences of these lengths, the longest, and whether they are lengths of so many tokens."""
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    if lengths.numel() == 0:
        return cu_seqlens, 0, tokens == 0
    shortest, longest, total = torch.stack([*lengths.int().aminmax(), cu_seqlens[-1]]).tolist()
    return cu_seqlens, longest, shortest >= 0 and total == tokens
