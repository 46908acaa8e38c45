"""The portable flash-attention forward: one Triton kernel, features compiled in only where used.

Dao 2023, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", algorithm 1: each program
keeps one tile of queries and streams the visible key/value tiles past it with an online softmax (Milakov and
Gimelshein 2018). Runs wherever Triton does; the launcher is `regard.backends.flash_launches`.
"""

import triton
import triton.language as tl

from regard.kernels.scores import (
    GROWTH,
    LN_2,
    LOG2_E,
    band_visible,
    dropout_keep,
    edge_span,
    head_base,
    key_span,
    load_pairs,
    load_rows,
    load_tile,
    own_queries,
    pair_base,
    row_offset,
    rows_from,
    scaled_scores,
    sequence_bounds,
    store_rows,
    tile_offsets,
)

EDGES, INTERIOR, WHOLE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # parts of a query tile's range of keys


@triton.jit
def first_softmax(sinks_ptr, head, BLOCK_M: tl.constexpr, ROW_SUMS: tl.constexpr):
    """State of the online softmax before any key: row maximum (log2 units) and row sum, (BLOCK_M,) or in parts
    (BLOCK_M, ROW_SUMS). ``head``: of all rows, or of each.

    A sink is a key without a value: it starts the softmax off (Xiao et al. 2023, "attention sinks").
    """
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
        row_max = tl.full([BLOCK_M], 0.0, tl.float32) + sink
        row_sum += tl.where(sink == float("-inf"), 0.0, 1.0)
    if ROW_SUMS > 1:
        row_sum = tl.where((tl.arange(0, ROW_SUMS) == 0)[None, :], row_sum[:, None], 0.0)
    return row_max, row_sum


@triton.jit
def online_softmax(scores, row_max, row_sum, scale, MASKED: tl.constexpr, RAW: tl.constexpr):
    """One step of the online softmax: this tile's weights, the old state's decay, and the new state."""
    factor = scale * LOG2_E if RAW else LOG2_E
    new_max = tl.maximum(row_max, tl.max(scores, 1) * factor)
    anchor = new_max
    if MASKED:
        anchor = tl.where(new_max == float("-inf"), 0.0, new_max)  # a row that has seen no key yet
    weights = tl.exp2(scores * factor - anchor[:, None])
    decay = tl.exp2(row_max - anchor)
    kept = row_sum * (decay[:, None] if len(row_sum.shape) == 2 else decay)
    return weights, decay, new_max, kept + sum_of_weights(weights, row_sum)


@triton.jit
def steady_softmax(scores, row_max, row_sum, scale):
    """The same with maxima that stay as they are: this tile's weights, and the new sum.

    A maximum is a mere reference, which cancels in the end. That of the keys at the edges serves all others but where
    these score far higher, see `has_grown`.
    """
    weights = tl.exp2(scores * (scale * LOG2_E) - row_max[:, None])
    return weights, row_sum + sum_of_weights(weights, row_sum)


@triton.jit
def sum_of_weights(weights, row_sum):
    """In as many parts as the row sum has: each of columns that a thread holds, so that none moves between threads."""
    if len(row_sum.shape) == 2:
        parts: tl.constexpr = row_sum.shape[1]
        return tl.sum(weights.reshape(weights.shape[0], weights.shape[1] // parts, parts), 1)
    else:
        return tl.sum(weights, 1)


@triton.jit
def whole_sum(row_sum):
    """Of all parts."""
    if len(row_sum.shape) == 2:
        return tl.sum(row_sum, 1)
    else:
        return row_sum


@triton.jit
def has_grown(row_sum):
    """Whether a row's sum over a maximum that stayed grew so far that values may overflow."""
    return tl.max((whole_sum(row_sum) > GROWTH).to(tl.int32), 0) != 0


@triton.jit
def last_softmax(acc, row_max, row_sum):
    """Out and lse of the final state (algorithm 1, lines 12 and 13): 0 and -inf in rows that saw no key."""
    row_sum = whole_sum(row_sum)
    nothing_visible = row_sum == 0
    row_sum = tl.where(nothing_visible, 1.0, row_sum)
    out = acc * (1 / row_sum)[:, None]
    lse = tl.where(nothing_visible, float("-inf"), row_max * LN_2 + tl.log2(row_sum) * LN_2)
    return out, lse


@triton.jit
def own_keys(split, splits, length_k, BLOCK_N: tl.constexpr):
    """Where the keys of this program's part begin and end, where several share those of a query tile (Flash-Decoding,
    see `merge.merge_splits`). A part that is left without keys ends at 0, so that nothing is visible.
    """
    keys = tl.cdiv(tl.cdiv(length_k, BLOCK_N), splits) * BLOCK_N
    first = split * keys
    return first, tl.where(first < length_k, tl.minimum(first + keys, length_k), 0)


@triton.jit
def lse_places(lse_ptr, strides, entry, head, start_q, query, row, PACK: tl.constexpr):
    """Where a tile's rows have their entries in lse."""
    places = lse_ptr + row_offset(strides, entry, head, start_q) + query * strides[2]
    if PACK > 1:
        places += (row % PACK).to(tl.int64) * strides[1]
    return places


@triton.jit
def locate_block(
    k_base, v_base, k_strides, v_strides, first_key, column, key_exists, block_table_ptr, page_size, WIDE: tl.constexpr
):  # fmt: skip
    """Where a block of keys lies: what to load K and V tiles from, and, by pointers, the offsets of its rows."""
    if not isinstance(k_base, tl.tensor):
        return rows_from(k_base, k_strides, first_key), rows_from(v_base, v_strides, first_key), 0, 0
    elif block_table_ptr is None:
        k_tile = k_base + tl.cast(first_key, tl.int64) * k_strides[1]
        v_tile = v_base + tl.cast(first_key, tl.int64) * v_strides[1]
        k_rows = tile_offsets(column, 0, k_strides[1], 0, WIDE)
        v_rows = tile_offsets(column, 0, v_strides[1], 0, WIDE)
        return k_tile, v_tile, k_rows, v_rows
    else:
        key = first_key + column
        page = tl.load(block_table_ptr + key // page_size, mask=key_exists, other=0).to(tl.int64)
        k_rows = page * k_strides[0] + (key % page_size).to(tl.int64) * k_strides[1]
        v_rows = page * v_strides[0] + (key % page_size).to(tl.int64) * v_strides[1]
        return k_base, v_base, k_rows, v_rows


@triton.jit
def load_keys(
    tile, strides, rows, exists, first: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """Head dims ``first`` on, at most DIMS of them, of a block's keys: a transposed K tile."""
    if isinstance(tile, tl.tensor):
        PART: tl.constexpr = min(BLOCK_D, DIMS)
        dim = tl.arange(0, PART)
        pointers = tile + tile_offsets(0, first, 0, strides[3], WIDE)
        pointers = pointers + (rows[None, :] + tile_offsets(0, dim[:, None], 0, strides[3], WIDE))
        return load_tile(pointers, exists[None, :], (first + dim < HEAD_DIM)[:, None], MASKED, HEAD_DIM - first >= PART)
    else:
        return tl.trans(load_rows(tile, strides, exists, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED, WIDE))


@triton.jit
def load_values(
    tile, strides, rows, exists, HEAD_DIM_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A block's V tile (BLOCK_N, BLOCK_DV)."""
    if isinstance(tile, tl.tensor):
        dim = tl.arange(0, BLOCK_DV)
        pointers = tile + (rows[:, None] + tile_offsets(0, dim[None, :], 0, strides[3], WIDE))
        return load_tile(pointers, exists[:, None], (dim < HEAD_DIM_V)[None, :], MASKED, HEAD_DIM_V == BLOCK_DV)
    else:
        return load_rows(tile, strides, exists, BLOCK_N, HEAD_DIM_V, BLOCK_DV, MASKED, WIDE)


@triton.jit
def attend_keys(
    acc, row_max, row_sum, q, start, stop, gap_start, gap,
    query, query_exists, head, shift, seqlen_k, readable_k,
    q_base, k_base, v_base, mask_base, bias_base, block_table_ptr, slope, seed,
    q_strides, k_strides, v_strides, mask_strides, bias_strides,
    page_size, softmax_scale, softcap, window_left, window_right, dropout_threshold,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, MASKED: tl.constexpr, RAW: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, DIMS: tl.constexpr, PACK: tl.constexpr, STEADY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Stream the key blocks of [start, stop) past the query tile.

    MASKED: some pair may lie outside the band; with a left bound, positions from gap_start on are ``gap`` keys further.
    """
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    for position in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        first_key = position
        if MASKED and window_left is not None:
            first_key = tl.where(position < gap_start, position, position + gap)
        key = first_key + column
        key_exists = key < seqlen_k
        k_tile, v_tile, k_rows, v_rows = locate_block(
            k_base, v_base, k_strides, v_strides, first_key, column, key_exists, block_table_ptr, page_size, WIDE
        )

        if BLOCK_D > DIMS:
            tl.debug_barrier()  # as in `product_in_parts`
        qk = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in tl.static_range(0, HEAD_DIM, DIMS):
            part = q
            if BLOCK_D > DIMS:
                q_part = q_base + tile_offsets(0, first, 0, q_strides[3], WIDE)
                part = load_rows(q_part, q_strides, query_exists, BLOCK_M, HEAD_DIM - first, DIMS, True, WIDE, PACK)
            # K tile, transposed: (BLOCK_D or DIMS, BLOCK_N)
            k = load_keys(k_tile, k_strides, k_rows, key_exists, first, HEAD_DIM, BLOCK_N, BLOCK_D, MASKED, WIDE, DIMS)
            qk = tl.dot(part, k, qk, input_precision=PRECISION)

        if readable_k is not None:
            pair_exists = query_exists[:, None] & (key < readable_k)[None, :]
        bias = None
        if bias_base is not None:
            # bias tile (BLOCK_M, BLOCK_N)
            bias_tile = bias_base + tl.cast(first_key, tl.int64) * bias_strides[3]
            bias = load_pairs(bias_tile, bias_strides, row[:, None], column[None, :], pair_exists, WIDE).to(tl.float32)
        scores = scaled_scores(qk, query[:, None], key[None, :], shift, softmax_scale, softcap, slope, bias, RAW)
        if MASKED:
            visible = band_visible(query[:, None], key[None, :], shift, seqlen_k, window_left, window_right)
            scores = tl.where(visible, scores, float("-inf"))
        if mask_base is not None:
            # mask tile (BLOCK_M, BLOCK_N)
            mask_tile = mask_base + tl.cast(first_key, tl.int64) * mask_strides[3]
            allowed = load_pairs(mask_tile, mask_strides, row[:, None], column[None, :], pair_exists, WIDE)
            scores = tl.where(allowed != 0, scores, float("-inf"))

        if STEADY:
            weights, row_sum = steady_softmax(scores, row_max, row_sum, softmax_scale)
        else:
            weights, decay, row_max, row_sum = online_softmax(
                scores, row_max, row_sum, softmax_scale, MASKED or mask_base is not None or bias_base is not None, RAW
            )
        if seed is not None:
            keep = dropout_keep(seed, head, query, first_key, dropout_threshold, BLOCK_M, BLOCK_N)
            weights = tl.where(keep, weights, 0.0)

        # V tile (BLOCK_N, BLOCK_DV)
        v = load_values(v_tile, v_strides, v_rows, key_exists, HEAD_DIM_V, BLOCK_N, BLOCK_DV, MASKED, WIDE)
        if not STEADY:
            acc = acc * decay[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, row_max, row_sum


@triton.jit
def attention_forward(
    q_ptr,  # (B, Sq, Hq, D), or packed (1, total_q, Hq, D) with a batch stride of 0; or like k and v a TMA descriptor
    k_ptr,  # (B, Sk, Hk, D), packed (1, total_k, Hk, D), or paged (pages, page_size, Hk, D)
    v_ptr,  # as k, with Dv
    out_ptr,  # as q, with Dv; of parts of the keys (splits * B, Sq, Hq, Dv), fp32
    lse_ptr,  # (B, Hq, Sq), or packed (1, Hq, total_q); fp32; of parts of the keys (splits * B, Hq, Sq)
    mask_ptr,  # uint8, broadcast to (B, Hq, Sq, Sk) by zero strides
    bias_ptr,  # float, likewise
    alibi_ptr,  # (B, Hq) fp32
    sinks_ptr,  # (Hq,)
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    kv_lens_ptr,
    block_table_ptr,
    seed_ptr,  # int64 (1,)
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    lse_strides,
    mask_strides,
    bias_strides,
    alibi_strides,
    block_table_stride,
    splits,  # parts that the keys of a query tile are taken in, or None
    batch,  # B where there are such, or None
    heads_q,
    group,  # query heads per key/value head
    seqlen_q,  # the longest, where packed
    seqlen_k,
    total_q,
    total_k,
    readable_k,  # keys that the rows of mask and bias can be read for: seqlen_k, or up to padding
    page_size,
    softmax_scale,
    softcap,
    window_left,
    window_right,
    dropout_threshold,
    dropout_rescale,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    RAW: tl.constexpr,  # scores need nothing but a positive scale, which then fuses into the exponential
    RAGGED: tl.constexpr,  # the last key blocks may be cut by the length or the band
    WIDE: tl.constexpr,  # some stride is too large for 32-bit offsets inside a tile
    PRECISION: tl.constexpr,  # of fp32 products: "ieee", "tf32x3" or "tf32"
    DIMS: tl.constexpr,  # head dims of Q K^T at once: Q with more is read part by part for every key tile
    PACK: tl.constexpr,  # query heads of one key/value head that share a tile: so many rows of each query
    ROW_SUMS: tl.constexpr,  # parts that the sum of a row's weights is kept in, see `tuning.Tile`
    ONE_LOOP: tl.constexpr,  # the interior is masked as well, in one loop with the edges
    STEADY: tl.constexpr,  # the interior comes last and keeps the edges' maxima, see `steady_softmax`
):
    first_row, head, entry = own_queries(seqlen_q * PACK, heads_q // PACK, window_right, BLOCK_M)
    first_query, head = first_row // PACK, head * PACK
    sequence = entry
    if splits is not None:
        sequence = entry % batch
    start_q, length_q = sequence_bounds(cu_seqlens_q_ptr, None, sequence, seqlen_q, total_q)
    start_k, length_k = sequence_bounds(cu_seqlens_k_ptr, kv_lens_ptr, sequence, seqlen_k, total_k)
    if cu_seqlens_q_ptr is not None:
        if first_query >= length_q:
            return
    shift = length_k - length_q
    row = tl.arange(0, BLOCK_M)
    query = first_query + row // PACK
    query_exists = query < length_q

    # Offsets of whole heads and sequences may pass 2**31 elements.
    sequence64, head_k64 = sequence.to(tl.int64), (head // group).to(tl.int64)
    if isinstance(k_ptr, tl.tensor):
        k_base = k_ptr + start_k.to(tl.int64) * k_strides[1] + head_k64 * k_strides[2]
        v_base = v_ptr + start_k.to(tl.int64) * v_strides[1] + head_k64 * v_strides[2]
        if block_table_ptr is None:
            k_base += sequence64 * k_strides[0]
            v_base += sequence64 * v_strides[0]
        else:
            block_table_ptr += sequence64 * block_table_stride
    else:
        k_base = head_base(k_ptr, k_strides, sequence, start_k, head // group)
        v_base = head_base(v_ptr, v_strides, sequence, start_k, head // group)
    mask_base = None
    if mask_ptr is not None:
        mask_base = pair_base(mask_ptr, mask_strides, sequence, head, first_query, 0)
    bias_base = None
    if bias_ptr is not None:
        bias_base = pair_base(bias_ptr, bias_strides, sequence, head, first_query, 0)
    slope = None
    if alibi_ptr is not None:
        slope = tl.load(alibi_ptr + sequence * alibi_strides[0] + head * alibi_strides[1])
    seed = None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    # Q tile (BLOCK_M, BLOCK_D)
    q_base = head_base(q_ptr, q_strides, sequence, start_q + first_query, head)
    q = load_rows(q_base, q_strides, query_exists, BLOCK_M, HEAD_DIM, BLOCK_D, True, WIDE, PACK)
    last_query = tl.minimum(first_query + (BLOCK_M + PACK - 1) // PACK, length_q) - 1
    end_k = length_k
    if splits is not None:
        first_k, end_k = own_keys(entry // batch, splits, length_k, BLOCK_N)
    start, full_start, full_stop, stop = key_span(
        first_query, last_query, shift, end_k, window_left, window_right, BLOCK_N, RAGGED or STEADY
    )
    if splits is not None:
        start, full_start = tl.maximum(start, first_k), tl.maximum(full_start, first_k)
        full_stop = tl.maximum(full_stop, full_start)
        stop = tl.maximum(stop, full_stop + 1)
    if STEADY and window_right is not None:
        # the first row's last key belongs to the edge too, so that every row has a maximum from there
        last_key = tl.maximum(first_query + shift + window_right, full_start)
        full_stop = tl.minimum(full_stop, last_key // BLOCK_N * BLOCK_N)
    edge_start, edge_stop, gap = edge_span(start, full_start, full_stop, stop, window_left)

    row_head = head if PACK == 1 else head + row % PACK
    row_max, row_sum = first_softmax(sinks_ptr, row_head, BLOCK_M, ROW_SUMS)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    # The interior, then the edges if something is cut; in one loop the whole. Where maxima stay, the edges first, then
    # the interior, then the whole again if the maxima did not serve: rarely, so that addresses to load far ahead, which
    # TMA has none of, would take registers for nothing.
    AGAIN_STAGES: tl.constexpr = 1 if STEADY and isinstance(k_ptr, tl.tensor) else None
    FIRST: tl.constexpr = WHOLE if ONE_LOOP else EDGES if STEADY else INTERIOR
    LAST: tl.constexpr = WHOLE if ONE_LOOP or STEADY else EDGES if RAGGED else INTERIOR
    STEP: tl.constexpr = 1 if ONE_LOOP or STEADY else -1
    for part in tl.static_range(FIRST, LAST + STEP, STEP):
        if part != WHOLE or ONE_LOOP or has_grown(row_sum):
            if part == WHOLE:
                row_max, row_sum = first_softmax(sinks_ptr, row_head, BLOCK_M, ROW_SUMS)
                acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
            acc, row_max, row_sum = attend_keys(
                acc, row_max, row_sum, q,
                start if part == WHOLE else edge_start if part == EDGES else full_start,
                stop if part == WHOLE else edge_stop if part == EDGES else full_stop,
                full_start, 0 if part == WHOLE else gap,
                query, query_exists, sequence * heads_q + head, shift, end_k, readable_k,
                q_base, k_base, v_base, mask_base, bias_base, block_table_ptr, slope, seed,
                q_strides, k_strides, v_strides, mask_strides, bias_strides,
                page_size, softmax_scale, softcap, window_left, window_right, dropout_threshold,
                HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, part != INTERIOR, RAW, WIDE, PRECISION,
                DIMS, PACK, STEADY and part == INTERIOR, AGAIN_STAGES if part == WHOLE else None,
            )  # fmt: skip

    out, lse = last_softmax(acc, row_max, row_sum)
    if seed is not None:
        out = out * dropout_rescale
    # out tile (BLOCK_M, BLOCK_DV)
    out_base = head_base(out_ptr, out_strides, entry, start_q + first_query, head)
    store_rows(out_base, out_strides, out, query_exists, BLOCK_M, HEAD_DIM_V, BLOCK_DV, WIDE, PACK)
    tl.store(lse_places(lse_ptr, lse_strides, entry, head, start_q, query, row, PACK), lse, mask=query_exists)
