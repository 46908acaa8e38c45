"""The portable flash-attention backward: softmax weights recomputed tile by tile from the saved lse.

Dao 2023, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", section 3.1 and algorithm
2, as a pass over key blocks for dK and dV and a pass over query blocks for dQ: two products more than the algorithm
has, but no two programs add to the same element, so that the result is bitwise repeatable. (Atomic sums of dQ in the
first pass, measured on an H200, are slower as well.) The launcher is `regard.backends.flash_launches`.
"""

import triton
import triton.language as tl

from regard.kernels.scores import (
    LOG2_E,
    band_visible,
    dropout_keep,
    edge_span,
    head_base,
    key_span,
    load_pairs,
    load_rows,
    own_queries,
    pair_base,
    product_in_parts,
    row_offset,
    rows_from,
    scaled_scores,
    sequence_bounds,
    softcap_slope,
    store_rows,
)


@triton.jit
def of_queries(vector, KEYS_FIRST: tl.constexpr):
    """A vector over the queries, to broadcast to a (queries, keys) tile or with KEYS_FIRST to a (keys, queries) one."""
    return vector[None, :] if KEYS_FIRST else vector[:, None]


@triton.jit
def of_keys(vector, KEYS_FIRST: tl.constexpr):
    """A vector over the keys, likewise."""
    return vector[:, None] if KEYS_FIRST else vector[None, :]


@triton.jit
def softmax_gradient(
    qk, grad_weights, row_lse, delta, query, query_exists, first_key, shift, seqlen_k, readable_k, head,
    mask_tile, bias_tile, mask_strides, bias_strides, slope, seed,
    softmax_scale, softcap, window_left, window_right, dropout_threshold, dropout_rescale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, KEYS_FIRST: tl.constexpr, RAW: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Algorithm 2, lines 10 to 14, for one tile, (queries, keys) or with KEYS_FIRST (keys, queries).

    Args:
        qk, grad_weights: products of queries with keys and of dO with V, tiles.
        row_lse, delta: what `row_terms` made of the queries.
        query, query_exists: positions of the queries in the sequence.
        mask_tile, bias_tile: pointers to the first pair of the tile, or None.

    Returns:
        The weights V was multiplied with, but for dropout's rescale, and the gradients of the scores and of the scaled
        products.
    """
    row = of_queries(tl.arange(0, BLOCK_M), KEYS_FIRST)
    column = of_keys(tl.arange(0, BLOCK_N), KEYS_FIRST)
    key = first_key + column
    if readable_k is not None:
        pair_exists = of_queries(query_exists, KEYS_FIRST) & (key < readable_k)
    bias = None
    if bias_tile is not None:
        bias = load_pairs(bias_tile, bias_strides, row, column, pair_exists, WIDE).to(tl.float32)
    positions = of_queries(query, KEYS_FIRST)
    scores = scaled_scores(qk, positions, key, shift, softmax_scale, softcap, slope, bias, RAW)
    factor = softmax_scale * LOG2_E if RAW else LOG2_E
    weights = tl.exp2(scores * factor - of_queries(row_lse, KEYS_FIRST))
    if MASKED:
        weights = tl.where(band_visible(positions, key, shift, seqlen_k, window_left, window_right), weights, 0.0)
    if mask_tile is not None:
        allowed = load_pairs(mask_tile, mask_strides, row, column, pair_exists, WIDE)
        weights = tl.where(allowed != 0, weights, 0.0)
    kept = weights
    if seed is not None:
        keep = dropout_keep(seed, head, query, first_key, dropout_threshold, BLOCK_M, BLOCK_N)
        if KEYS_FIRST:
            keep = tl.trans(keep)
        kept = tl.where(keep, weights, 0.0)
        grad_weights = tl.where(keep, grad_weights * dropout_rescale, 0.0)
    grad_scores = weights * (grad_weights - of_queries(delta, KEYS_FIRST))
    grad_products = grad_scores
    if softcap is not None:
        grad_products = grad_scores * softcap_slope(qk, softmax_scale, softcap)
    return kept, grad_scores, grad_products


@triton.jit
def row_terms(
    out_ptr,
    grad_out_ptr,
    lse_ptr,
    grad_lse_ptr,
    row_lse_ptr,
    delta_ptr,
    out_strides,
    grad_out_strides,
    lse_strides,
    grad_lse_strides,
    heads_q,
    rows,  # queries of a batch entry, or all packed ones
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDE: tl.constexpr,
):
    """What the passes need of each query.

    delta = rowsum(dO * O) - dlse (algorithm 2, line 4; the gradient of lse is the softmax as well), and lse in units of
    log2, +inf where no key is visible so that every weight comes out as 0.
    """
    blocks_m = tl.cdiv(rows, BLOCK_M)
    program = tl.program_id(0)
    head = (program // blocks_m) % heads_q
    sequence = program // blocks_m // heads_q
    first_row = program % blocks_m * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    exists = row < rows
    out = load_rows(
        head_base(out_ptr, out_strides, sequence, first_row, head), out_strides, exists,
        BLOCK_M, HEAD_DIM_V, BLOCK_DV, True, WIDE,
    )  # fmt: skip
    grad_out = load_rows(
        head_base(grad_out_ptr, grad_out_strides, sequence, first_row, head), grad_out_strides, exists,
        BLOCK_M, HEAD_DIM_V, BLOCK_DV, True, WIDE,
    )  # fmt: skip
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)

    terms = row_offset(lse_strides, sequence, head, row)
    lse = tl.load(lse_ptr + terms, mask=exists, other=0.0)
    if grad_lse_ptr is not None:
        grad_lse_base = grad_lse_ptr + row_offset(grad_lse_strides, sequence, head, 0)
        delta -= tl.load(grad_lse_base + row.to(tl.int64) * grad_lse_strides[2], mask=exists, other=0.0)
    nothing_visible = lse == float("-inf")
    tl.store(row_lse_ptr + terms, tl.where(nothing_visible, float("inf"), lse * LOG2_E), mask=exists)
    tl.store(delta_ptr + terms, tl.where(nothing_visible, 0.0, delta), mask=exists)


@triton.jit
def load_row_terms(row_lse_base, delta_base, query, query_exists, MASKED: tl.constexpr, TOGETHER: tl.constexpr = False):
    """Row terms (lse, delta) of some queries; of those that do not exist, what makes their weights 0.

    TOGETHER: in one load, an element a thread where there are two threads for each query. A load of fewer elements than
    threads takes the layout of its use, in which every thread copies the terms of a quarter of the queries.
    """
    if TOGETHER:
        which = tl.arange(0, 2)[None, :]
        terms = tl.where(which == 0, row_lse_base, delta_base) + query[:, None]
        if MASKED:
            absent = tl.where(which == 0, float("inf"), 0.0)
            row_lse, delta = tl.split(tl.load(terms, mask=query_exists[:, None], other=absent))
        else:
            row_lse, delta = tl.split(tl.load(terms))
    elif MASKED:
        row_lse = tl.load(row_lse_base + query, mask=query_exists, other=float("inf"))
        delta = tl.load(delta_base + query, mask=query_exists, other=0.0)
    else:
        row_lse = tl.load(row_lse_base + query)
        delta = tl.load(delta_base + query)
    return row_lse, delta


@triton.jit
def attend_queries(
    dk, dv, k, v, start, stop, gap_start, gap,
    head, first_key, key_exists, shift, seqlen_q, seqlen_k, readable_k,
    q_base, k_base, v_base, grad_out_base, row_lse_base, delta_base, mask_base, bias_base, slope, seed,
    q_strides, k_strides, v_strides, grad_out_strides, mask_strides, bias_strides,
    softmax_scale, softcap, window_left, window_right, dropout_threshold, dropout_rescale,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, MASKED: tl.constexpr, RAW: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, DIMS: tl.constexpr, TERMS_TOGETHER: tl.constexpr,
):  # fmt: skip
    """Stream the query blocks of [start, stop) past the key tile, on (keys, queries) tiles of scores.

    MASKED: some pair may lie outside the band; with a right bound, positions from gap_start on lie ``gap`` rows on.
    """
    row = tl.arange(0, BLOCK_M)
    for position in tl.range(start, stop, BLOCK_M):
        first_query = position
        if MASKED and window_right is not None:
            first_query = tl.where(position < gap_start, position, position + gap)
        query = first_query + row
        query_exists = query < seqlen_q
        first_row = tl.cast(first_query, tl.int64)

        # Q and dO tiles: (BLOCK_M, BLOCK_D), (BLOCK_M, BLOCK_DV)
        q_tile = rows_from(q_base, q_strides, first_query)
        if max(BLOCK_D, BLOCK_DV) > DIMS:
            # Before the products: LLVM would keep all their operands across the branches of masked loads.
            row_lse, delta = load_row_terms(row_lse_base, delta_base, query, query_exists, MASKED, TERMS_TOGETHER)
        q = load_rows(q_tile, q_strides, query_exists, BLOCK_M, HEAD_DIM, BLOCK_D, MASKED, WIDE)
        if BLOCK_D > DIMS:
            qk = product_in_parts(
                k_base, k_strides, key_exists, q_tile, q_strides, query_exists, BLOCK_N, BLOCK_M,
                HEAD_DIM, DIMS, MASKED, WIDE, PRECISION,
            )  # fmt: skip
        else:
            qk = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        grad_tile = rows_from(grad_out_base, grad_out_strides, first_query)
        grad_out = load_rows(grad_tile, grad_out_strides, query_exists, BLOCK_M, HEAD_DIM_V, BLOCK_DV, MASKED, WIDE)
        if BLOCK_DV > DIMS:
            grad_weights = product_in_parts(
                v_base, v_strides, key_exists, grad_tile, grad_out_strides, query_exists, BLOCK_N, BLOCK_M,
                HEAD_DIM_V, DIMS, MASKED, WIDE, PRECISION,
            )  # fmt: skip
        else:
            grad_weights = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
        if max(BLOCK_D, BLOCK_DV) <= DIMS:
            row_lse, delta = load_row_terms(row_lse_base, delta_base, query, query_exists, MASKED, TERMS_TOGETHER)

        mask_tile = None
        if mask_base is not None:
            mask_tile = mask_base + first_row * mask_strides[2]
        bias_tile = None
        if bias_base is not None:
            bias_tile = bias_base + first_row * bias_strides[2]
        weights, _, grad_products = softmax_gradient(
            qk, grad_weights, row_lse, delta, query, query_exists, first_key, shift, seqlen_k, readable_k, head,
            mask_tile, bias_tile, mask_strides, bias_strides, slope, seed,
            softmax_scale, softcap, window_left, window_right, dropout_threshold, dropout_rescale,
            BLOCK_M, BLOCK_N, MASKED, True, RAW, WIDE,
        )  # fmt: skip
        dv = tl.dot(weights.to(grad_out.dtype), grad_out, dv, input_precision=PRECISION)
        dk = tl.dot(grad_products.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def query_span(
    first_key, shift, length_q, length_k, window_left, window_right,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """The queries that see a block of keys: a `key_span` of the same band, looked at from the other side."""
    last_key = tl.minimum(first_key + BLOCK_N, length_k) - 1
    seeing = tl.where(first_key < length_k, length_q, 0)
    start, full_start, full_stop, stop = key_span(
        first_key, last_key, -shift, seeing, window_right, window_left, BLOCK_M, RAGGED
    )
    if RAGGED:
        # A block that reaches past the last key is masked throughout.
        full_stop = tl.where(first_key + BLOCK_N > length_k, full_start, full_stop)
    return start, full_start, full_stop, stop


@triton.jit
def backward_keys(
    q_ptr,  # q, k and v, mask, bias and the like as in the forward kernel, but not paged
    k_ptr,
    v_ptr,
    grad_out_ptr,  # as q, with Dv; as a TMA descriptor where q, k and v are
    row_lse_ptr,  # (B, Hq, Sq), or packed (1, Hq, total_q); fp32, of `row_terms`
    delta_ptr,  # likewise
    dk_ptr,
    dv_ptr,
    mask_ptr,
    bias_ptr,
    alibi_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    kv_lens_ptr,
    seed_ptr,
    q_strides,
    k_strides,
    v_strides,
    grad_out_strides,
    lse_strides,
    dk_strides,
    dv_strides,
    mask_strides,
    bias_strides,
    alibi_strides,
    heads_q,
    heads_kv,
    group,
    seqlen_q,
    seqlen_k,
    total_q,
    total_k,
    readable_k,
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
    RAW: tl.constexpr,
    RAGGED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    DIMS: tl.constexpr,
    TERMS_TOGETHER: tl.constexpr,  # see `load_row_terms`
):
    """Of a block of keys, dK and dV, summed over the query heads that share it."""
    # Neighbouring programs share a head's queries; with a causal bound the first keys have the most of them.
    blocks_n = tl.cdiv(seqlen_k, BLOCK_N)
    program = tl.program_id(0)
    head_k = (program // blocks_n) % heads_kv
    sequence = program // blocks_n // heads_kv
    first_key = program % blocks_n * BLOCK_N

    start_q, length_q = sequence_bounds(cu_seqlens_q_ptr, None, sequence, seqlen_q, total_q)
    start_k, length_k = sequence_bounds(cu_seqlens_k_ptr, kv_lens_ptr, sequence, seqlen_k, total_k)
    capacity = length_k
    if cu_seqlens_k_ptr is not None:
        if first_key >= length_k:
            return
    else:
        capacity = seqlen_k
    shift = length_k - length_q

    key = first_key + tl.arange(0, BLOCK_N)
    key_exists = key < length_k
    seed = None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    # K and V tiles: (BLOCK_N, BLOCK_D), (BLOCK_N, BLOCK_DV)
    k_base = head_base(k_ptr, k_strides, sequence, start_k + first_key, head_k)
    v_base = head_base(v_ptr, v_strides, sequence, start_k + first_key, head_k)
    k = load_rows(k_base, k_strides, key_exists, BLOCK_N, HEAD_DIM, BLOCK_D, True, WIDE)
    v = load_rows(v_base, v_strides, key_exists, BLOCK_N, HEAD_DIM_V, BLOCK_DV, True, WIDE)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    start, full_start, full_stop, stop = query_span(
        first_key, shift, length_q, length_k, window_left, window_right, BLOCK_M, BLOCK_N, RAGGED
    )
    start, stop, gap = edge_span(start, full_start, full_stop, stop, window_right)
    for member in range(group):
        head = head_k * group + member
        sequence64, head64 = sequence.to(tl.int64), head.to(tl.int64)
        q_base = head_base(q_ptr, q_strides, sequence, start_q, head)
        grad_out_base = head_base(grad_out_ptr, grad_out_strides, sequence, start_q, head)
        terms = row_offset(lse_strides, sequence, head, start_q)
        mask_base = None
        if mask_ptr is not None:  # not as `pair_base` has it: ptxas spills more for that order
            mask_base = mask_ptr + sequence64 * mask_strides[0] + head64 * mask_strides[1]
            mask_base += first_key.to(tl.int64) * mask_strides[3]
        bias_base = None
        if bias_ptr is not None:
            bias_base = bias_ptr + sequence64 * bias_strides[0] + head64 * bias_strides[1]
            bias_base += first_key.to(tl.int64) * bias_strides[3]
        slope = None
        if alibi_ptr is not None:
            slope = tl.load(alibi_ptr + sequence * alibi_strides[0] + head * alibi_strides[1])
        for part in tl.static_range(0, 2 if RAGGED else 1):
            # the interior, then the edges, as in the forward
            dk, dv = attend_queries(
                dk, dv, k, v,
                full_start if part == 0 else start,
                full_stop if part == 0 else stop,
                full_start, gap,
                sequence * heads_q + head, first_key, key_exists, shift, length_q, length_k, readable_k,
                q_base, k_base, v_base, grad_out_base, row_lse_ptr + terms, delta_ptr + terms, mask_base, bias_base,
                slope, seed,
                q_strides, k_strides, v_strides, grad_out_strides, mask_strides, bias_strides,
                softmax_scale, softcap, window_left, window_right, dropout_threshold, dropout_rescale,
                HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, part == 1, RAW, WIDE, PRECISION, DIMS,
                TERMS_TOGETHER,
            )  # fmt: skip

    dk = dk * softmax_scale
    if seed_ptr is not None:
        dv = dv * dropout_rescale
    # dK and dV tiles; keys past the length, where there is room for them, get zeros
    dk_base = head_base(dk_ptr, dk_strides, sequence, start_k + first_key, head_k)
    dv_base = head_base(dv_ptr, dv_strides, sequence, start_k + first_key, head_k)
    store_rows(dk_base, dk_strides, dk, key < capacity, BLOCK_N, HEAD_DIM, BLOCK_D, WIDE)
    store_rows(dv_base, dv_strides, dv, key < capacity, BLOCK_N, HEAD_DIM_V, BLOCK_DV, WIDE)


@triton.jit
def gather_keys(
    dq, q, grad_out, row_lse, delta, start, stop, gap_start, gap,
    query, query_exists, head, shift, seqlen_k, readable_k,
    q_base, k_base, v_base, grad_out_base, mask_base, bias_base, slope, seed,
    q_strides, k_strides, v_strides, grad_out_strides, mask_strides, bias_strides,
    softmax_scale, softcap, window_left, window_right, dropout_threshold, dropout_rescale,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, MASKED: tl.constexpr, RAW: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """Stream the key blocks of [start, stop) past the query tile.

    MASKED: some pair may lie outside the band; with a left bound, positions from gap_start on are ``gap`` keys further.
    """
    for position in tl.range(start, stop, BLOCK_N):
        first_key = position
        if MASKED and window_left is not None:
            first_key = tl.where(position < gap_start, position, position + gap)
        key_exists = first_key + tl.arange(0, BLOCK_N) < seqlen_k
        first_row = tl.cast(first_key, tl.int64)

        # K and V tiles: (BLOCK_N, BLOCK_D), (BLOCK_N, BLOCK_DV)
        k_tile, v_tile = rows_from(k_base, k_strides, first_key), rows_from(v_base, v_strides, first_key)
        k = load_rows(k_tile, k_strides, key_exists, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED, WIDE)
        if BLOCK_D > DIMS:
            qk = product_in_parts(
                q_base, q_strides, query_exists, k_tile, k_strides, key_exists, BLOCK_M, BLOCK_N,
                HEAD_DIM, DIMS, MASKED, WIDE, PRECISION,
            )  # fmt: skip
        else:
            qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        v = load_rows(v_tile, v_strides, key_exists, BLOCK_N, HEAD_DIM_V, BLOCK_DV, MASKED, WIDE)
        if BLOCK_DV > DIMS:
            grad_weights = product_in_parts(
                grad_out_base, grad_out_strides, query_exists, v_tile, v_strides, key_exists, BLOCK_M, BLOCK_N,
                HEAD_DIM_V, DIMS, MASKED, WIDE, PRECISION,
            )  # fmt: skip
        else:
            grad_weights = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)

        mask_tile = None
        if mask_base is not None:
            mask_tile = mask_base + first_row * mask_strides[3]
        bias_tile = None
        if bias_base is not None:
            bias_tile = bias_base + first_row * bias_strides[3]
        grad_products = softmax_gradient(
            qk, grad_weights, row_lse, delta, query, query_exists, first_key, shift, seqlen_k, readable_k, head,
            mask_tile, bias_tile, mask_strides, bias_strides, slope, seed,
            softmax_scale, softcap, window_left, window_right, dropout_threshold, dropout_rescale,
            BLOCK_M, BLOCK_N, MASKED, False, RAW, WIDE,
        )[2]  # fmt: skip
        dq = tl.dot(grad_products.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def backward_queries(
    q_ptr,  # everything as in `backward_keys`
    k_ptr,
    v_ptr,
    grad_out_ptr,
    row_lse_ptr,
    delta_ptr,
    dq_ptr,
    mask_ptr,
    bias_ptr,
    alibi_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    kv_lens_ptr,
    seed_ptr,
    q_strides,
    k_strides,
    v_strides,
    grad_out_strides,
    lse_strides,
    dq_strides,
    mask_strides,
    bias_strides,
    alibi_strides,
    heads_q,
    group,
    seqlen_q,
    seqlen_k,
    total_q,
    total_k,
    readable_k,
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
    RAW: tl.constexpr,
    RAGGED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Of a block of queries, dQ."""
    first_query, head, sequence = own_queries(seqlen_q, heads_q, window_right, BLOCK_M)
    start_q, length_q = sequence_bounds(cu_seqlens_q_ptr, None, sequence, seqlen_q, total_q)
    start_k, length_k = sequence_bounds(cu_seqlens_k_ptr, kv_lens_ptr, sequence, seqlen_k, total_k)
    if cu_seqlens_q_ptr is not None:
        if first_query >= length_q:
            return
    shift = length_k - length_q

    query = first_query + tl.arange(0, BLOCK_M)
    query_exists = query < length_q
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

    # Q and dO tiles: (BLOCK_M, BLOCK_D), (BLOCK_M, BLOCK_DV)
    first_row = start_q + first_query
    q_base = head_base(q_ptr, q_strides, sequence, first_row, head)
    grad_out_base = head_base(grad_out_ptr, grad_out_strides, sequence, first_row, head)
    q = load_rows(q_base, q_strides, query_exists, BLOCK_M, HEAD_DIM, BLOCK_D, True, WIDE)
    grad_out = load_rows(grad_out_base, grad_out_strides, query_exists, BLOCK_M, HEAD_DIM_V, BLOCK_DV, True, WIDE)
    terms = row_offset(lse_strides, sequence, head, start_q)
    row_lse, delta = load_row_terms(row_lse_ptr + terms, delta_ptr + terms, query, query_exists, True)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    last_query = tl.minimum(first_query + BLOCK_M, length_q) - 1
    start, full_start, full_stop, stop = key_span(
        first_query, last_query, shift, length_k, window_left, window_right, BLOCK_N, RAGGED
    )
    start, stop, gap = edge_span(start, full_start, full_stop, stop, window_left)
    for part in tl.static_range(0, 2 if RAGGED else 1):
        # the interior, then the edges, as in the forward
        dq = gather_keys(
            dq, q, grad_out, row_lse, delta,
            full_start if part == 0 else start,
            full_stop if part == 0 else stop,
            full_start, gap,
            query, query_exists, sequence * heads_q + head, shift, length_k, readable_k,
            q_base, k_base, v_base, grad_out_base, mask_base, bias_base, slope, seed,
            q_strides, k_strides, v_strides, grad_out_strides, mask_strides, bias_strides,
            softmax_scale, softcap, window_left, window_right, dropout_threshold, dropout_rescale,
            HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, part == 1, RAW, WIDE, PRECISION, DIMS,
        )  # fmt: skip

    # dQ tile (BLOCK_M, BLOCK_D)
    dq = dq * softmax_scale
    dq_base = head_base(dq_ptr, dq_strides, sequence, first_row, head)
    store_rows(dq_base, dq_strides, dq, query_exists, BLOCK_M, HEAD_DIM, BLOCK_D, WIDE)
