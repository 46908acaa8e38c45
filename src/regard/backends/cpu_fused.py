"""Torch's fused CPU kernel: which of its forms is fastest, what its results lack, and calls that are one call of it.

Tensors are (B, H, S, D) here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from regard.config import AttentionConfig

FEWEST_KEYS = 16  # what a vector of the kernel holds: it takes fewer scores that are all NaN for a hidden row
FULL_SPEED_ROWS = 256  # fewest rows for which it works at full speed
_PAIRS_KEPT = 2**18  # of a causal mask that is kept; calls with more take so long that a mask is soon made
_WORTH_GROUPING = 2**16  # key elements, times query heads beyond two in a group, for one product of the group to pay
_WORTH_DOUBLING = 2**17  # key elements for two bfloat16 rows to take less time than one
_WORTH_SHIFTING = 2**15  # elements of a mask for three operations without branches to take less time than one with them
_INF = float("inf")

kernel = torch._scaled_dot_product_flash_attention_for_cpu
kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

Call = Callable[..., tuple[Tensor, Tensor]]
"""From q, k and v, and the mask and the bias of a call that has them, to out and lse.

Raises FloatingPointError where the kernel is not to be trusted, see `lse_test`.
"""


def needs_exact_lse(config: AttentionConfig) -> bool:
    """Whether lse is looked at."""
    return config.return_lse or config.requires_grad or config.sinks


def is_widened(config: AttentionConfig) -> bool:
    """Whether the kernel is given float32 for a call in half precision.

    Its exponentials are coarse there, good enough for out but not for lse, and its float16 is slow.
    """
    return config.dtype == torch.float16 or (config.dtype == torch.bfloat16 and needs_exact_lse(config))


def one_call(config: AttentionConfig) -> Call | None:
    """The whole call as one of the kernel, where that is possible.

    Small calls notice every microsecond beside the kernel, and a function of Python costs one right after it: all that
    the config tells is decided here, and not in the call.
    """
    if one_call not in config.prepared:
        config.prepared[one_call] = unmasked_call(config) or _masked_call(config)
    found: Call | None = config.prepared[one_call]
    return found


def unmasked_call(config: AttentionConfig) -> Call | None:
    """The kernel on q, k and v as they are, and nothing else."""
    causal = config.causal and config.seqlen_q > 1
    # its is_causal fills scores that are scaled later with -inf: the scale must be positive
    aligned = config.seqlen_q == config.seqlen_k and config.softmax_scale > 0
    shaped = config.mask_shape is not None or config.bias_shape is not None
    if shaped or (causal and not aligned) or not _suits(config):
        return None
    form = functools.partial(_form(config), is_causal=True) if causal else _form(config)
    trusted = _lse_test(config, hidden=False)
    if trusted is None:
        return form

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = form(q, k, v)
        if not trusted(lse):
            raise FloatingPointError
        return out, lse

    return attend


def _masked_call(config: AttentionConfig) -> Call | None:
    """With an additive mask, in one block; a large one only where it is the bias as it is, and needs no memory."""
    rows, causal = config.seqlen_q, config.causal and config.seqlen_q > 1
    hidden = causal or config.mask_shape is not None
    made = hidden or _converted_bias(config) is not None
    if not _suits(config) or (made and (rows > FULL_SPEED_ROWS or rows * config.seqlen_k > _PAIRS_KEPT)):
        return None
    additive, form, exact = _additive_maker(config, causal), _form(config), needs_exact_lse(config)
    trusted = _lse_test(config, hidden=hidden)

    def attend(q: Tensor, k: Tensor, v: Tensor, *shaping: Tensor) -> tuple[Tensor, Tensor]:
        added = additive(*shaping)
        out, lse = form(q, k, v, attn_mask=added)
        if trusted is not None and not trusted(lse):
            raise FloatingPointError
        return out, exact_lse(lse, added) if exact else lse

    return attend


def _kernel_dtype(config: AttentionConfig) -> torch.dtype:
    """Of what the kernel is given."""
    return torch.float32 if is_widened(config) else config.dtype


def _converted_bias(config: AttentionConfig) -> torch.dtype | None:
    """What a bias must become for the kernel; None where there is none, or where the kernel takes it as it is."""
    dtype = _kernel_dtype(config)
    wide = torch.promote_types(dtype, torch.float32)
    return None if config.bias_dtype in (None, dtype, wide) else wide


def _additive_maker(config: AttentionConfig, causal: bool) -> Callable[..., Tensor]:
    """From the mask and the bias, those that there are, to what the kernel adds to scores.

    A hidden bias of infinity becomes NaN, which lse tells.
    """
    rows, keys, dtype = config.seqlen_q, config.seqlen_k, _kernel_dtype(config)
    masked, biased, converted = config.mask_shape is not None, config.bias_shape is not None, _converted_bias(config)

    def of_bias(bias: Tensor) -> Tensor:
        if converted is not None:
            bias = bias.to(converted)
        return bias if bias.ndim == 4 else _as_the_kernel_takes(bias)

    def of_all(*shaping: Tensor) -> Tensor:
        parts = [of_bias(shaping[-1])] if biased else []
        if masked:
            parts.append(of_mask(shaping[0]))
        if causal:
            parts.append(_causal_mask(rows, keys, dtype))
        return functools.reduce(torch.add, parts)

    of_mask = _mask_maker(config.mask_shape or (), dtype)
    if masked + biased + causal > 1 or causal:
        return of_all
    return of_mask if masked else of_bias


def _suits(config: AttentionConfig) -> bool:
    """Whether the kernel, with an additive mask if need be, takes the inputs and gives the results as they are."""
    strides = config.q_strides, config.k_strides, config.v_strides
    return (
        {"causal", "mask", "bias", "lse", "grad", "deterministic"}.issuperset(config.features())
        and config.head_dim == config.head_dim_v
        and all(each is not None and each[3] == 1 for each in strides)
        and not config.is_empty
        and config.seqlen_k >= FEWEST_KEYS
    )


def _form(config: AttentionConfig) -> Call:
    """The kernel for the sizes and the dtype of a call, given its scale where that is not torch's default."""
    keys = config.batch, config.heads_kv, config.seqlen_k, config.head_dim
    dtype, scale = config.dtype, config.softmax_scale
    form: Call = kernel
    if config.seqlen_q == 1:
        form = fastest_for_a_row(_kernel_dtype(config), config.heads_q, keys)
    if scale != config.head_dim**-0.5:
        form = functools.partial(form, scale=scale)

    def widen(q: Tensor, k: Tensor, v: Tensor, **said: Any) -> tuple[Tensor, Tensor]:
        out, lse = form(q.float(), k.float(), v.float(), **said)
        return out.to(dtype), lse

    return widen if is_widened(config) else form


def lse_test(dtype: torch.dtype, *, hidden: bool, contiguous: bool) -> Callable[[Tensor], bool] | None:
    """Of the kernel's lse, whether its out is to be trusted; None where it always is.

    Args:
        dtype: of what the kernel was given.
        hidden: whether an additive mask hid keys: then not where lse is NaN, which may have leaked from one. In
            bfloat16 nor where it is infinite: the exponentials there take for 0 the NaN that an infinite score leaves.
        contiguous: whether lse is.
    """
    if dtype == torch.bfloat16:
        highest = torch.max if contiguous else torch.amax  # of which one copies and the other takes longer
        return lambda lse: highest(lse).item() < _INF
    return (lambda lse: lse.equal(lse)) if hidden else None


def _lse_test(config: AttentionConfig, *, hidden: bool) -> Callable[[Tensor], bool] | None:
    contiguous = config.heads_q == 1 or config.seqlen_q == 1  # the kernel's lse has heads innermost
    return lse_test(_kernel_dtype(config), hidden=hidden, contiguous=contiguous)


def exact_lse(lse: Tensor, additive: Tensor) -> Tensor:
    """The kernel's lse, but -inf instead of 0 for rows that see nothing."""
    if not (lse == 0).any():
        return lse
    return lse.masked_fill((additive.amax(-1) == -_INF).expand(lse.shape), -_INF)


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What hides scores by being added to them: 0 where a mask is True, and -inf."""
    if mask.numel() < _WORTH_SHIFTING:
        return torch.where(mask, *_seen_and_hidden(dtype))
    bits, mantissa = _LAYOUTS[dtype]
    return mask.to(bits).sub_(1).bitwise_left_shift_(mantissa).view(dtype)


def _mask_maker(shape: Sequence[int], dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """`additive_mask` in two or four dimensions, of masks that broadcast to the four of ``shape``."""
    seen = hidden = None  # not yet: a tracer may be listening while a call is prepared

    def of_few(mask: Tensor) -> Tensor:
        nonlocal seen, hidden
        if seen is None or hidden is None:
            seen, hidden = (each.view(1, 1, 1, 1) for each in _seen_and_hidden(dtype))
        return torch.where(mask, seen, hidden)

    def of_many(mask: Tensor) -> Tensor:
        return _as_the_kernel_takes(additive_mask(mask, dtype))

    return of_few if math.prod(shape) < _WORTH_SHIFTING else of_many


def _as_the_kernel_takes(additive: Tensor) -> Tensor:
    """In two or four dimensions."""
    return additive[None] if additive.ndim in (1, 3) else additive


_LAYOUTS = {torch.float32: (torch.int32, 23), torch.bfloat16: (torch.int16, 7), torch.float64: (torch.int64, 52)}
"""Of the dtypes that the kernel is given: an integer of as many bits, and those of the mantissa, below -inf's ones."""


@functools.cache
def _seen_and_hidden(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What an additive mask holds."""
    with torch.inference_mode(False):  # which what is kept must not come from
        return torch.tensor(0.0, dtype=dtype, device="cpu"), torch.tensor(-_INF, dtype=dtype, device="cpu")


@functools.lru_cache(maxsize=16)
def _causal_mask(rows: int, keys: int, dtype: torch.dtype) -> Tensor:
    """Additive; kept since every layer of a model asks for the same one."""
    with torch.inference_mode(False):
        return torch.full((rows, keys), -_INF, dtype=dtype, device="cpu").triu_(keys - rows + 1)


def fastest_for_a_row(dtype: torch.dtype, heads: int, keys: Sequence[int]) -> Call:
    """For one query a sequence: the kernel, or a way to give it the query as several rows.

    Args:
        dtype, heads: of q.
        keys: the shape (B, Hk, Sk, D) of k.
    """
    batch, heads_kv = keys[:2]
    elements, group = math.prod(keys), heads // heads_kv
    if dtype == torch.bfloat16:
        if group > 1:
            return _grouped_row
        return _doubled_row if elements >= _WORTH_DOUBLING else kernel
    enough = elements * (group - 2) >= _WORTH_GROUPING and batch * heads_kv >= torch.get_num_threads()
    return _grouped_row if enough else kernel


def _doubled_row(
    q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The kernel's product of a single bfloat16 row is several times slower than that of two."""
    out, lse = kernel(q.expand(-1, -1, 2, -1), k, v, attn_mask=attn_mask, scale=scale)
    return out[:, :, :1].contiguous(), lse[:, :, :1]


def _grouped_row(
    q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The kernel with the query heads of a key/value head as rows of one product."""
    batch, heads, _, head_dim = q.shape
    heads_kv = k.shape[1]
    group = heads // heads_kv
    if attn_mask is not None and attn_mask.ndim == 4 and attn_mask.shape[1] != 1:
        attn_mask = attn_mask.reshape(attn_mask.shape[0], heads_kv, group, -1)
    out, lse = kernel(q.reshape(batch, heads_kv, group, head_dim), k, v, attn_mask=attn_mask, scale=scale)
    return out.reshape(batch, heads, 1, head_dim), lse.reshape(batch, heads, 1)
