"""The gradient of an additive bias, reduced over the dimensions it was broadcast along without a score-sized temporary.

A pass of its own over the tiles of the bias, not of the scores: what a tile was added to is recomputed (as in
`regard.kernels.backward`) and summed in registers, always in the same order.
"""

import triton
import triton.language as tl

from regard.kernels.backward import load_row_terms, softmax_gradient
from regard.kernels.scores import head_base, load_rows, pair_base, row_offset, sequence_bounds, tile_offsets


@triton.jit
def backward_bias(
    q_ptr,  # everything as in `backward_keys`, but not packed
    k_ptr,
    v_ptr,
    grad_out_ptr,
    row_lse_ptr,
    delta_ptr,
    dbias_ptr,  # (B or 1, Hq or 1, Sq or 1, Sk)
    mask_ptr,
    bias_ptr,
    alibi_ptr,
    kv_lens_ptr,
    seed_ptr,
    q_strides,
    k_strides,
    v_strides,
    grad_out_strides,
    lse_strides,
    dbias_strides,
    mask_strides,
    bias_strides,
    alibi_strides,
    heads_q,
    group,
    seqlen_q,
    seqlen_k,
    readable_k,
    summed_batch,  # 1, or the batch entries that share an element of the bias
    summed_heads,
    softmax_scale,
    softcap,
    window_left,
    window_right,
    dropout_threshold,
    dropout_rescale,
    SUM_ROWS: tl.constexpr,  # every query shares it too
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    RAW: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of a tile of bias: the scores' own, summed over everything the tile was added to."""
    blocks_n = tl.cdiv(seqlen_k, BLOCK_N)
    blocks_m = tl.cdiv(seqlen_q, BLOCK_M)
    program = tl.program_id(0)
    first_key = program % blocks_n * BLOCK_N
    program = program // blocks_n
    block_m = 0 * program
    summed_blocks = blocks_m
    if not SUM_ROWS:
        block_m = program % blocks_m
        program = program // blocks_m
        summed_blocks = 1
    own_head = program % (heads_q // summed_heads)
    own_sequence = program // (heads_q // summed_heads)

    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    key = first_key + column
    seed = None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(summed_batch * summed_heads * summed_blocks):
        head = own_head + step // summed_blocks % summed_heads
        sequence = own_sequence + step // summed_blocks // summed_heads
        first_query = (block_m + step % summed_blocks) * BLOCK_M
        length_k = sequence_bounds(None, kv_lens_ptr, sequence, seqlen_k, 0)[1]
        shift = length_k - seqlen_q
        seen = first_key < length_k
        if window_right is not None:
            seen = seen & (first_key <= first_query + BLOCK_M - 1 + shift + window_right)
        if window_left is not None:
            seen = seen & (first_key + BLOCK_N - 1 >= first_query + shift - window_left)
        if seen:
            query = first_query + row
            query_exists = query < seqlen_q
            key_exists = key < length_k
            q_base = head_base(q_ptr, q_strides, sequence, first_query, head)
            grad_out_base = head_base(grad_out_ptr, grad_out_strides, sequence, first_query, head)
            k_base = head_base(k_ptr, k_strides, sequence, first_key, head // group)
            v_base = head_base(v_ptr, v_strides, sequence, first_key, head // group)
            q = load_rows(q_base, q_strides, query_exists, BLOCK_M, HEAD_DIM, BLOCK_D, True, WIDE)
            k = load_rows(k_base, k_strides, key_exists, BLOCK_N, HEAD_DIM, BLOCK_D, True, WIDE)
            qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            grad_out = load_rows(
                grad_out_base, grad_out_strides, query_exists, BLOCK_M, HEAD_DIM_V, BLOCK_DV, True, WIDE
            )
            v = load_rows(v_base, v_strides, key_exists, BLOCK_N, HEAD_DIM_V, BLOCK_DV, True, WIDE)
            grad_weights = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
            terms = row_offset(lse_strides, sequence, head, 0)
            row_lse, delta = load_row_terms(row_lse_ptr + terms, delta_ptr + terms, query, query_exists, True)
            bias_tile = pair_base(bias_ptr, bias_strides, sequence, head, first_query, first_key)
            mask_tile = None
            if mask_ptr is not None:
                mask_tile = pair_base(mask_ptr, mask_strides, sequence, head, first_query, first_key)
            slope = None
            if alibi_ptr is not None:
                slope = tl.load(alibi_ptr + sequence * alibi_strides[0] + head * alibi_strides[1])
            dbias += softmax_gradient(
                qk, grad_weights, row_lse, delta, query, query_exists, first_key, shift, length_k,
                readable_k, sequence * heads_q + head, mask_tile, bias_tile, mask_strides, bias_strides, slope, seed,
                softmax_scale, softcap, window_left, window_right, dropout_threshold, dropout_rescale,
                BLOCK_M, BLOCK_N, True, False, RAW, WIDE,
            )[1]  # fmt: skip

    # dbias tile, of one row where all rows share it
    dbias_base = pair_base(dbias_ptr, dbias_strides, own_sequence, own_head, block_m * BLOCK_M, first_key)
    if SUM_ROWS:
        tl.store(dbias_base + column * dbias_strides[3], tl.sum(dbias, 0), mask=key < seqlen_k)
    else:
        pointers = dbias_base + tile_offsets(row[:, None], column[None, :], dbias_strides[2], dbias_strides[3], WIDE)
        stored = (block_m * BLOCK_M + row < seqlen_q)[:, None] & (key < seqlen_k)[None, :]
        tl.store(pointers, dbias.to(dbias_ptr.dtype.element_ty), mask=stored)
