"""Device functions every portable kernel shares: where a tile lies, what its scores are, which of them are visible.

Index arguments ``query`` and ``key`` broadcast against each other, so that the same functions serve a (queries, keys)
tile of the forward and a (keys, queries) tile of the backward. The exponential that scores go to is the GPU's, exp2, so
that a factor of log2(e) joins the last product. A feature whose pointer or bound is None is absent from the compiled
kernel.

Q, K, V and dO come as pointers, or each as a TMA descriptor of (B, H, S, D) for a tile's rows at a time, which fills up
with zeros what lies outside of a head. The base of a head's rows is then such a descriptor and where in it they begin.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
GROWTH = tl.constexpr(2.0**48)  # of sums whose maxima stay: 2**80 is left for what the values come to


@triton.jit
def sequence_bounds(cu_seqlens_ptr, lengths_ptr, sequence, padded_length, total):
    """First packed row of a sequence and its length, clamped so that no offset in memory can cause a stray access."""
    start = sequence * 0
    length = start + padded_length
    if cu_seqlens_ptr is not None:
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequence), 0), total)
        stop = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequence + 1), start), total)
        length = tl.minimum(stop - start, length)
    if lengths_ptr is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths_ptr + sequence), 0), length)
    return start, length


@triton.jit
def own_queries(seqlen_q, heads_q, window_right, BLOCK_M: tl.constexpr):
    """First query, head and sequence of this program, where each has a block of queries of one head (or of rows of
    heads that share a tile).

    Neighbouring programs share a head's keys and values; with a causal bound the longest rows go first.
    """
    blocks_m = tl.cdiv(seqlen_q, BLOCK_M)
    program = tl.program_id(0)
    block_m = program % blocks_m
    if window_right is not None:
        block_m = blocks_m - 1 - block_m
    return block_m * BLOCK_M, (program // blocks_m) % heads_q, program // blocks_m // heads_q


@triton.jit
def tile_offsets(row, column, row_stride, column_stride, WIDE: tl.constexpr):
    """Offsets of a tile from its first element; 64-bit only where a stride is so large that 32 bits could overflow."""
    if WIDE:
        row = tl.cast(row, tl.int64)
        column = tl.cast(column, tl.int64)
    return row * row_stride + column * column_stride


@triton.jit
def packed_offsets(row, column, strides, WIDE: tl.constexpr, PACK: tl.constexpr):
    """Offsets of a tile of (B, S, H, D) that has PACK rows of each query, those of as many heads side by side."""
    offsets = tile_offsets(row // PACK, column, strides[1], strides[3], WIDE)
    if PACK > 1:
        offsets += tile_offsets(row % PACK, 0, strides[2], 0, WIDE)
    return offsets


@triton.jit
def head_base(matrix, strides, sequence, row, head):
    """A head's rows from one on: the offsets of whole heads and sequences may pass 2**31 elements."""
    if isinstance(matrix, tl.tensor):
        first = matrix + sequence.to(tl.int64) * strides[0]
        return first + row.to(tl.int64) * strides[1] + head.to(tl.int64) * strides[2]
    else:
        return matrix, sequence, head, row


@triton.jit
def rows_from(base, strides, row):
    """Of a head's rows those from one on."""
    if isinstance(base, tl.tensor):
        return base + tl.cast(row, tl.int64) * strides[1]
    else:
        return base[0], base[1], base[2], base[3] + row


@triton.jit
def pair_base(pointer, strides, sequence, head, query, key):
    """The element of a mask or bias for a pair of query and key."""
    pointer += sequence.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    return pointer + (tl.cast(query, tl.int64) * strides[2] + tl.cast(key, tl.int64) * strides[3])


@triton.jit
def load_pairs(first, strides, row, column, exists, WIDE: tl.constexpr):
    """Load a tile of a mask or bias by the pointer to its first pair, in its dtype.

    ``exists`` bounds the keys by ``readable_k``, which where rows are padded is a multiple of 16, so that elements come
    several at a time. What lies between the last key and there may be NaN, and has to be masked.
    """
    return tl.load(first + tile_offsets(row, column, strides[2], strides[3], WIDE), mask=exists, other=0)


@triton.jit
def row_offset(strides, sequence, head, row):
    """Where a query has its entry in lse, row_lse and delta."""
    return sequence.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1] + row


@triton.jit
def load_tile(pointers, row_exists, dim_exists, MASK_ROWS: tl.constexpr, FULL_DIM: tl.constexpr):
    """Load a tile of a (rows, head dim) matrix, 0 outside it, with only the bounds that can be crossed."""
    if MASK_ROWS:
        if FULL_DIM:
            return tl.load(pointers, mask=row_exists, other=0.0)
        return tl.load(pointers, mask=row_exists & dim_exists, other=0.0)
    if FULL_DIM:
        return tl.load(pointers)
    return tl.load(pointers, mask=dim_exists, other=0.0)


@triton.jit
def load_rows(
    base, strides, exists, ROWS: tl.constexpr, EXTENT: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
    WIDE: tl.constexpr, PACK: tl.constexpr = 1,
):  # fmt: skip
    """Load ROWS rows of EXTENT elements from ``base`` on as a (ROWS, BLOCK) tile; MASKED: some may not exist."""
    if isinstance(base, tl.tensor):
        dim = tl.arange(0, BLOCK)[None, :]
        pointers = base + packed_offsets(tl.arange(0, ROWS)[:, None], dim, strides, WIDE, PACK)
        return load_tile(pointers, exists[:, None], dim < EXTENT, MASKED, EXTENT >= BLOCK)
    else:
        return base[0].load([base[1], base[2], base[3], 0]).reshape(ROWS, BLOCK)


@triton.jit
def product_in_parts(
    a_base, a_strides, a_exists, b_base, b_strides, b_exists, ROWS_A: tl.constexpr, ROWS_B: tl.constexpr,
    EXTENT: tl.constexpr, DIMS: tl.constexpr, MASKED_B: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A B^T of two tiles (rows, EXTENT) in memory, DIMS of their head dims at a time.

    For a tile A that a loop would hold in registers if there were enough. The barrier is what keeps compilers from
    taking its loads out of that loop.
    """
    tl.debug_barrier()
    product = tl.zeros([ROWS_A, ROWS_B], tl.float32)
    for first in tl.static_range(0, EXTENT, DIMS):
        a_part = a_base + tile_offsets(0, first, 0, a_strides[3], WIDE)
        b_part = b_base + tile_offsets(0, first, 0, b_strides[3], WIDE)
        a = load_rows(a_part, a_strides, a_exists, ROWS_A, EXTENT - first, DIMS, True, WIDE)
        b = load_rows(b_part, b_strides, b_exists, ROWS_B, EXTENT - first, DIMS, MASKED_B, WIDE)
        product = tl.dot(a, tl.trans(b), product, input_precision=PRECISION)
    return product


@triton.jit
def store_rows(
    base, strides, tile, exists, ROWS: tl.constexpr, EXTENT: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    PACK: tl.constexpr = 1,
):  # fmt: skip
    """Store the rows that exist of a (ROWS, BLOCK) tile."""
    dim = tl.arange(0, BLOCK)
    pointers = base + packed_offsets(tl.arange(0, ROWS)[:, None], dim[None, :], strides, WIDE, PACK)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=exists[:, None] & (dim < EXTENT)[None, :])


@triton.jit
def key_span(
    first_query, last_query, shift, seqlen_k, window_left, window_right, BLOCK_N: tl.constexpr, RAGGED: tl.constexpr
):
    """Key range [start, stop) of a tile of queries, and the part of it [full_start, full_stop) that needs no mask.

    With keys and queries, left and right exchanged and ``shift`` negated it is the query range of a tile of keys.
    Blocks outside the range are never visited. The edges around the middle part share one loop, which is never empty
    (where nothing is cut, the last whole block serves): around a loop that might not run, between two others, ptxas
    serialises the wgmma pipeline, which costs up to a quarter of the speed on sm90.
    """
    start = 0
    stop = seqlen_k
    full_start = 0
    full_stop = seqlen_k
    if window_right is not None:
        stop = tl.minimum(stop, tl.maximum(last_query + shift + window_right + 1, 0))
        full_stop = tl.minimum(full_stop, tl.maximum(first_query + shift + window_right + 1, 0))
    if window_left is not None:
        start = tl.minimum(tl.maximum(first_query + shift - window_left, 0), stop) // BLOCK_N * BLOCK_N
        full_start = tl.cdiv(tl.maximum(last_query + shift - window_left, 0), BLOCK_N) * BLOCK_N
        full_start = tl.minimum(full_start, tl.cdiv(stop, BLOCK_N) * BLOCK_N)
    if RAGGED:
        full_stop = tl.minimum(full_stop, tl.maximum(stop - 1, 0)) // BLOCK_N * BLOCK_N
        if window_left is not None:
            full_start = tl.minimum(full_start, tl.maximum(stop - 1, 0) // BLOCK_N * BLOCK_N)
        full_stop = tl.maximum(full_stop, full_start)
        stop = tl.maximum(stop, full_stop + 1)
    return start, full_start, full_stop, stop


@triton.jit
def edge_span(start, full_start, full_stop, stop, window_left):
    """The edges around the middle part of a `key_span` as one range of positions, and the ``gap`` that those from
    full_start on must be moved by to come after that part.
    """
    gap = full_stop - full_start
    if window_left is None:
        return full_stop, stop, gap  # there is only a right edge
    return start, tl.maximum(stop - gap, start + 1), gap


@triton.jit
def scaled_scores(qk, query, key, shift, scale, softcap, slope, bias, RAW: tl.constexpr):
    """Scale, softcap, bias and ALiBi, in that order. RAW leaves the scale to the exponential."""
    if RAW:
        return qk
    scores = qk * scale
    if softcap is not None:
        scores = softcap * tanh(scores / softcap)
    if bias is not None:
        scores += bias
    if slope is not None:
        scores -= slope * tl.abs(key - query - shift).to(tl.float32)
    return scores


@triton.jit
def softcap_slope(qk, scale, softcap):
    """Derivative of the capped scores by the scaled products."""
    capped = tanh(qk * scale / softcap)
    return 1 - capped * capped


@triton.jit
def tanh(x):
    """Tanh through exp2; exact at the ends because exp2 overflows to inf."""
    return 1 - 2 / (1 + tl.exp2(x * (2 * LOG2_E)))


@triton.jit
def band_visible(query, key, shift, seqlen_k, window_left, window_right):
    """Whether key j lies in the sequence and in query i's causal and window band."""
    visible = key < seqlen_k
    if window_right is not None:
        visible = visible & (key <= query + shift + window_right)
    if window_left is not None:
        visible = visible & (key >= query + shift - window_left)
    return visible


@triton.jit
def dropout_keep(seed, head, query, first_key, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which weights of a (BLOCK_M, BLOCK_N) tile survive: Philox word ``key % 4`` of counter (key // 4, query, head, 0)
    (Salmon et al. 2011, section 3.3), so that the mask does not depend on the tiling.
    """
    quad = (first_key // 4 + tl.arange(0, BLOCK_N // 4))[None, :] + tl.zeros([BLOCK_M, BLOCK_N // 4], tl.int32)
    row = query[:, None] + tl.zeros([BLOCK_M, BLOCK_N // 4], tl.int32)
    zero = tl.zeros([BLOCK_M, BLOCK_N // 4], tl.int32)
    word0, word1, word2, word3 = tl.philox(seed, quad, row, zero + head, zero)
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3)).reshape(BLOCK_M, BLOCK_N)
    return words.to(tl.uint32, bitcast=True) >= threshold.to(tl.uint32)
