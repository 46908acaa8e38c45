"""From a call of `flash` to the launches of its kernels: their tiles, how many programs, every argument."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from regard.backends import tma
from regard.backends.key_splits import Parts, merge_launch
from regard.backends.launch import Launch, contiguous, is_aligned
from regard.backends.padded_rows import broadcast_strides, readable_keys
from regard.backends.reference import dropout_threshold
from regard.config import AttentionConfig, AttentionInputs
from regard.kernels import tuning

_INTERPRETER_ARCH = "sm80"
_LARGEST_TILE = 256  # rows or columns


def forward_launches(
    config: AttentionConfig,
    inputs: AttentionInputs,
    out: Tensor,
    lse: Tensor,
    parts: Parts | None = None,
    *,
    by_tma: bool = True,
    steady: bool = True,
) -> list[Launch]:
    """The launches for one call: one, or one for parts of the keys and their merge.

    Reads shapes and strides only, so that the compile gate can ask for calls on devices that are not there.

    Args:
        config, inputs, out, lse: the call.
        parts: of `new_parts`: where they are given, they are filled, and then merged.
        by_tma: whether TMA may bring tiles, where the table says so and it can.
        steady: whether maxima may stay, where the table says so and they can.
    """
    from regard.kernels.forward import attention_forward

    splits, merges = None, []
    if parts is not None:
        part_out, part_lse = parts
        splits, merges = len(part_out), [merge_launch(config, inputs, parts, out, lse)]
        out, lse, inputs = part_out.flatten(0, 1), part_lse.flatten(1, 2).transpose(0, 1), inputs._replace(sinks=None)
    tile, pack = _forward_tile(
        config,
        aligned=rows_are_aligned(inputs.k) and rows_are_aligned(inputs.v),
        by_tma=by_tma and _suits_tma(config, inputs[:3]),
        steady=steady and splits is None and _keeps_maxima(config),
    )
    arguments = dict(
        **_score_arguments(config, inputs),
        **_tile_arguments(config, tile, splits is not None or config.seqlen_k % tile.block_n != 0),
        out_ptr=out,
        lse_ptr=lse,
        sinks_ptr=contiguous(inputs.sinks),
        block_table_ptr=inputs.block_table,
        out_strides=_strides4(out),
        lse_strides=(*_lse_strides(lse), lse.stride(-1)),
        block_table_stride=0 if inputs.block_table is None else inputs.block_table.stride(0),
        page_size=config.page_size or 1,
        splits=splits,
        batch=None if splits is None else config.batch,
        PACK=pack,
        WIDE=_wide(inputs, out, pack=pack),
    )
    programs = _query_tiles(config, tile, pack) * (splits or 1)
    return [_launch(attention_forward, programs, arguments, tile), *merges]


def splits_of(config: AttentionConfig, multiprocessors: int) -> int:
    """Parts in which a query tile's keys are taken; 1 where whole, as those of packed sequences are."""
    if config.varlen:
        return 1
    tile, pack = _forward_tile(config)
    rows = config.batch * config.seqlen_q * config.heads_q
    keys = keys_seen(config, config.seqlen_q)
    return tuning.key_splits(_query_tiles(config, tile, pack), keys, rows, tile.programs * multiprocessors)


def _query_tiles(config: AttentionConfig, tile: tuning.Tile, pack: int) -> int:
    """Of all heads; some of packed sequences may be empty."""
    return -(-config.seqlen_q * pack // tile.block_m) * config.batch * (config.heads_q // pack)


def _forward_tile(
    config: AttentionConfig, aligned: bool = True, by_tma: bool = False, steady: bool = False
) -> tuple[tuning.Tile, int]:
    """The forward's tile, and how many heads share it: where queries are few, a group's, whose keys are the same."""
    group = config.heads_q // config.heads_kv
    apart = config.mask_shape or config.bias_shape or config.alibi or config.dropout_p > 0
    if group > 1 and config.seqlen_q <= _FEW_QUERIES and not apart:
        tile = _tile(config, tuning.FORWARD, aligned=aligned, rows=config.seqlen_q * group)
        if config.seqlen_q * group <= tile.block_m or tile.block_m % group == 0:  # a tile begins with whole queries
            return tile, group
    return _tile(config, tuning.FORWARD, aligned=aligned, by_tma=by_tma, steady=steady, rows=config.seqlen_q), 1


_FEW_QUERIES = 32
"""Up to which they leave half of a tile of their own empty."""


def _keeps_maxima(config: AttentionConfig) -> bool:
    """Whether a call allows it: weights of float16 would overflow, and a row must see a key at the edges."""
    return config.dtype == torch.bfloat16 and config.mask_shape is None and _is_raw(config)


def _is_raw(config: AttentionConfig) -> bool:
    """Whether scores need nothing but a positive scale."""
    return config.softcap == 0 and config.bias_shape is None and not config.alibi and config.softmax_scale > 0


FORWARD_TENSORS = ("out_ptr", "lse_ptr", "merged_ptr", "merged_lse_ptr", "sinks_ptr", "block_table_ptr")


def forward_tensors(
    inputs: AttentionInputs, out: Tensor, lse: Tensor, parts: Parts | None
) -> tuple[Tensor | None, ...]:
    """In the order of `FORWARD_TENSORS`."""
    return *(parts or (out, lse)), out, lse, contiguous(inputs.sinks), inputs.block_table


def new_gradients(config: AttentionConfig, inputs: AttentionInputs) -> dict[str, Tensor]:
    """Memory for the gradients of q, k and v.

    Every row of a padded batch is written, but packed sequences may leave some out.
    """
    new = torch.zeros_like if config.varlen else torch.empty_like
    return {name: new(getattr(inputs, name), memory_format=torch.contiguous_format) for name in ("q", "k", "v")}


def row_tensors(
    out: Tensor, grad_out: Tensor, lse: Tensor, grad_lse: Tensor | None, row_lse: Tensor, delta: Tensor
) -> dict[str, Tensor | None]:
    """The tensors that `row_terms_launch` takes, by the names of its arguments."""
    return dict(
        out_ptr=out,
        grad_out_ptr=grad_out,
        lse_ptr=lse,
        grad_lse_ptr=grad_lse,
        row_lse_ptr=row_lse,
        delta_ptr=delta,
    )


def row_terms_launch(
    config: AttentionConfig,
    inputs: AttentionInputs,
    out: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    row_lse: Tensor,
    delta: Tensor,
) -> Launch:
    """The launch that prepares the backward: fills row_lse and delta, which have lse's shape and strides."""
    from regard.kernels.backward import row_terms

    block_m = 64
    rows = lse.shape[-1]
    arguments = dict(
        **row_tensors(out, grad_out, lse, grad_lse, row_lse, delta),
        out_strides=_strides4(out),
        grad_out_strides=_strides4(grad_out),
        lse_strides=_lse_strides(lse),
        grad_lse_strides=(0, 0, 0) if grad_lse is None else (*_lse_strides(grad_lse), grad_lse.stride(-1)),
        heads_q=config.heads_q,
        rows=rows,
        HEAD_DIM_V=config.head_dim_v,
        BLOCK_DV=tuning.padded_head_dim(config.head_dim_v),
        BLOCK_M=block_m,
        WIDE=_wide(inputs, out, grad_out),
    )
    programs = -(-rows // block_m) * lse.shape[:-1].numel()
    return Launch(row_terms, programs, arguments, dict(num_warps=4, num_stages=1))


def backward_launches(
    config: AttentionConfig,
    inputs: AttentionInputs,
    grad_out: Tensor,
    row_lse: Tensor,
    delta: Tensor,
    gradients: AttentionInputs,
    *,
    by_tma: bool = True,
) -> list[Launch]:
    """The launches that fill q, k and v of ``gradients``: dK and dV, then dQ. ``by_tma``: see `forward_launches`."""
    from regard.kernels.backward import backward_keys, backward_queries

    def arguments(tile: tuning.Tile, cut: bool) -> dict[str, Any]:
        return dict(
            **_score_arguments(config, inputs),
            **_tile_arguments(config, tile, cut),
            **_backward_arguments(grad_out, row_lse, delta),
            dq_ptr=gradients.q,
            dk_ptr=gradients.k,
            dv_ptr=gradients.v,
            dq_strides=_strides4(gradients.q),
            dk_strides=_strides4(gradients.k),
            dv_strides=_strides4(gradients.v),
            heads_kv=config.heads_kv,
            WIDE=_wide(inputs, grad_out),
        )

    # Around a bias ptxas serialises the wgmma of these tiles, and around dropout it spills more.
    alone = config.mask_shape is None and config.bias_shape is None and config.dropout_p == 0
    by_tma = by_tma and alone and _suits_tma(config, (*inputs[:3], grad_out))
    kinds = dict(aligned=_all_aligned(inputs, grad_out), by_tma=by_tma)
    tile = _tile(config, tuning.BACKWARD_KEYS, **kinds)
    cut = config.seqlen_k % tile.block_n != 0 or config.seqlen_q % tile.block_m != 0
    programs = -(-config.seqlen_k // tile.block_n) * config.batch * config.heads_kv
    keys = _launch(backward_keys, programs, arguments(tile, cut), tile)
    tile = _tile(config, tuning.BACKWARD_QUERIES, **kinds)
    programs = -(-config.seqlen_q // tile.block_m) * config.batch * config.heads_q
    cut = config.seqlen_k % tile.block_n != 0
    return [keys, _launch(backward_queries, programs, arguments(tile, cut), tile)]


def new_bias_gradient(config: AttentionConfig, bias: Tensor) -> Tensor:
    """Memory for the gradient of a bias with keys, or where all rows share the bias for one row of each head, still to
    be summed.
    """
    batch, heads, rows, seqlen_k = bias.shape
    if rows == 1 and config.seqlen_q > 1:
        return bias.new_empty((config.batch, config.heads_q, rows, seqlen_k), dtype=torch.float32)
    return bias.new_empty((batch, heads, rows, seqlen_k))


def bias_launch(
    config: AttentionConfig, inputs: AttentionInputs, grad_out: Tensor, row_lse: Tensor, delta: Tensor, dbias: Tensor
) -> Launch:
    """The launch that fills ``dbias``, of `new_bias_gradient`."""
    from regard.kernels.backward_bias import backward_bias

    batch, heads, rows, seqlen_k = dbias.shape
    tile = _tile(config, tuning.BACKWARD_QUERIES, aligned=_all_aligned(inputs, grad_out))._replace(num_stages=1)
    arguments = dict(
        **_score_arguments(config, inputs),
        **_tile_arguments(config, tile, True),
        **_backward_arguments(grad_out, row_lse, delta),
        dbias_ptr=dbias,
        dbias_strides=dbias.stride(),
        summed_batch=config.batch // batch,
        summed_heads=config.heads_q // heads,
        SUM_ROWS=rows == 1 and config.seqlen_q > 1,
        WIDE=_wide(inputs, grad_out, dbias),
    )
    programs = -(-seqlen_k // tile.block_n) * -(-rows // tile.block_m) * heads * batch
    return _launch(backward_bias, programs, arguments, tile)


def _launch(kernel: Any, programs: int, arguments: Mapping[str, Any], tile: tuning.Tile) -> Launch:
    """A launch with those of the arguments that the kernel has."""
    wanted = {name: arguments[name] for name in kernel.arg_names}
    if tile.by_tma:
        for name, rows, columns in _TILES:
            if name in wanted:
                view, block = tma.by_head(wanted[name]), (1, 1, wanted[rows], wanted[columns])
                wanted[name] = tma.descriptor(wanted[name], view, block)
    return Launch(kernel, programs, wanted, dict(num_warps=tile.num_warps, num_stages=tile.num_stages))


_TILES = (
    ("q_ptr", "BLOCK_M", "BLOCK_D"),
    ("grad_out_ptr", "BLOCK_M", "BLOCK_DV"),
    ("k_ptr", "BLOCK_N", "BLOCK_D"),
    ("v_ptr", "BLOCK_N", "BLOCK_DV"),
)
"""What TMA brings, in tiles of so many rows and columns."""


def _suits_tma(config: AttentionConfig, tensors: Sequence[Tensor]) -> bool:
    """Whether TMA can bring tiles of these: it makes zeros of what lies outside of a tensor, but not of rows that lie
    inside past the end of a sequence and may hold NaN.
    """
    ends_with_tensor = not config.varlen and not config.kv_lens and config.page_size is None
    return ends_with_tensor and all(map(tma.is_readable, tensors))


def _tile(config: AttentionConfig, table: tuning.TileTable, **options: Any) -> tuning.Tile:
    """``options``: of `tuning.Call`."""
    _, right = bounded_band(config)
    arch = tuning.table_architecture(config.arch) or _INTERPRETER_ARCH
    head_dim = max(config.head_dim, config.head_dim_v)
    paged = config.page_size is not None
    call = tuning.Call(right is not None, keys_seen(config, 1), triton_version(), paged=paged, **options)
    return tuning.select_tile(table, arch, config.dtype.itemsize, head_dim, call)


def _score_arguments(config: AttentionConfig, inputs: AttentionInputs) -> dict[str, Any]:
    """What every kernel needs to compute scores: the tensors that shape them, sizes and semantics."""
    left, right = bounded_band(config)
    tensors = dict(zip(SCORE_TENSORS, score_tensors(config, inputs), strict=True))
    slopes = tensors["alibi_ptr"]
    return dict(
        **tensors,
        q_strides=_strides4(inputs.q),
        k_strides=_strides4(inputs.k),
        v_strides=_strides4(inputs.v),
        mask_strides=broadcast_strides(inputs.mask),
        bias_strides=broadcast_strides(inputs.bias),
        alibi_strides=(0, 0) if slopes is None else slopes.stride(),
        heads_q=config.heads_q,
        group=config.heads_q // config.heads_kv,
        seqlen_q=config.seqlen_q,
        seqlen_k=config.seqlen_k,
        total_q=config.total_q or 0,
        total_k=config.total_k or 0,
        readable_k=readable_keys(inputs, config.seqlen_k),
        softmax_scale=float(config.softmax_scale),
        softcap=float(config.softcap) if config.softcap > 0 else None,
        window_left=left,
        window_right=right,
        dropout_threshold=dropout_threshold(config.dropout_p) if inputs.dropout_seed is not None else None,
        dropout_rescale=1 / (1 - config.dropout_p) if inputs.dropout_seed is not None else None,
        RAW=_is_raw(config),
        PRECISION=product_precision(config),
    )


SCORE_TENSORS = (
    "q_ptr", "k_ptr", "v_ptr", "mask_ptr", "bias_ptr", "alibi_ptr", "cu_seqlens_q_ptr", "cu_seqlens_k_ptr",
    "kv_lens_ptr", "seed_ptr",
)  # fmt: skip


def score_tensors(config: AttentionConfig, inputs: AttentionInputs) -> tuple[Tensor | None, ...]:
    """In the order of `SCORE_TENSORS`."""
    q, k, v, mask, bias, slopes, _, cu_seqlens_q, cu_seqlens_k, kv_lens, _, seed = inputs
    if mask is not None:
        mask = mask.view(torch.uint8)
    if slopes is not None:
        slopes = slopes.float().contiguous().expand(config.batch, config.heads_q)
    return q, k, v, mask, bias, slopes, cu_seqlens_q, cu_seqlens_k, kv_lens, seed


def _tile_arguments(config: AttentionConfig, tile: tuning.Tile, cut: bool) -> dict[str, Any]:
    """What depends on the tile; ``cut``: the lengths are no multiples of it."""
    return dict(
        HEAD_DIM=config.head_dim,
        HEAD_DIM_V=config.head_dim_v,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        DIMS=tile.dims,
        ROW_SUMS=tile.row_sums,
        ONE_LOOP=tile.one_loop,
        STEADY=tile.steady,
        TERMS_TOGETHER=tile.terms_together,
        BLOCK_D=tuning.padded_head_dim(config.head_dim),
        BLOCK_DV=tuning.padded_head_dim(config.head_dim_v),
        RAGGED=cut or bounded_band(config) != (None, None) or config.varlen or config.kv_lens,
    )


def _backward_arguments(grad_out: Tensor, row_lse: Tensor, delta: Tensor) -> dict[str, Any]:
    return dict(
        grad_out_ptr=grad_out,
        grad_out_strides=_strides4(grad_out),
        row_lse_ptr=row_lse,
        delta_ptr=delta,
        lse_strides=_lse_strides(row_lse),
    )


def bounded_band(config: AttentionConfig) -> tuple[int | None, int | None]:
    """The band with sides that bound nothing dropped: they would cost masked blocks, or take 32-bit numbers too far."""
    left, right = config.band
    reach = config.seqlen_q + config.seqlen_k
    left = None if left is None or left >= reach else left
    is_last_alone = config.seqlen_q == 1 and left is None  # which sees all keys up to the last
    return left, None if right is None or right >= reach or is_last_alone else right


def keys_seen(config: AttentionConfig, queries: int) -> int:
    """Keys that so many queries side by side see together, at most."""
    left, right = bounded_band(config)
    if left is None or right is None:
        return config.seqlen_k
    return min(config.seqlen_k, left + right + queries)


def _strides4(tensor: Tensor) -> tuple[int, ...]:
    """Strides as (batch, row, head, dim); packed tensors have no batch."""
    return tensor.stride() if tensor.ndim == 4 else (0, *tensor.stride())


def _lse_strides(tensor: Tensor) -> tuple[int, int]:
    """Strides of (batch, head); packed ones have no batch."""
    return (tensor.stride(0), tensor.stride(1)) if tensor.ndim == 3 else (0, tensor.stride(0))


def rows_are_aligned(tensor: Tensor) -> bool:
    """Whether Triton can tell that rows start at multiples of 16 bytes: it looks for factors of 16 in the strides."""
    return tensor.stride(-1) == 1 and all(stride % 16 == 0 for stride in tensor.stride()[:-1]) and is_aligned(tensor)


def _all_aligned(inputs: AttentionInputs, grad_out: Tensor) -> bool:
    return all(rows_are_aligned(tensor) for tensor in (inputs.q, inputs.k, inputs.v, grad_out))


def _wide(inputs: AttentionInputs, *others: Tensor, pack: int = 1) -> bool:
    """Whether a tile's own extent, of rows by head dim or of queries by keys, can pass 2**31 elements. ``pack``: heads
    that share one.
    """
    steps = [tensor.stride(-3) + tensor.stride(-1) for tensor in (inputs.q, inputs.k, inputs.v, *others)]
    if pack > 1:
        steps += [sum(tensor.stride()[-3:]) for tensor in (inputs.q, *others)]
    steps += [sum(broadcast_strides(tensor)[2:]) for tensor in (inputs.mask, inputs.bias)]
    return max(steps) * _LARGEST_TILE >= 2**31


def product_precision(config: AttentionConfig) -> str:
    """How float32 products are computed: exactly, unless torch's own matmul precision is set lower."""
    if config.dtype != torch.float32 or config.arch.startswith("gfx"):
        return "ieee"
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[torch.get_float32_matmul_precision()]


@functools.cache
def triton_version() -> tuple[int, int]:
    """(major, minor) of the installed Triton."""
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)
