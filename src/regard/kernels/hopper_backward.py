"""The Hopper flash-attention backward in Gluon: dK and dV of a key tile in registers, dQ added to memory by TMA.

Dao 2023, "FlashAttention-2", algorithm 2, with the roles of Shah et al. 2024, "FlashAttention-3": a producer warp
streams the queries that see a key tile; two consumer warpgroups keep 64 keys each, with keys as the rows of S and dP,
so that P and dS feed the products for dV and dK from registers. dS also goes to shared memory, where both warpgroups
read it for a part of dQ each. Query heads of one key/value head follow each other, so that dK and dV are summed over
the group in registers. Programs are persistent, as in the forward: the producer fetches the next key tile from a
counter in global memory and hands its record to the consumers, and its keys, values and first queries are there before
the last tile is done.

dQ is summed in fp32 in the order in which the registers of a warpgroup hold a product, so that its way through shared
memory has no bank conflicts; `finish_queries` brings it in its place.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from regard.kernels.hopper_pipeline import (
    SIZES,
    Ring,
    anew,
    claim_tile,
    clear_loaded,
    clear_rows,
    copy_out,
    leave_counters,
    make_companion,
    make_ring,
    matrix,
    no_sequences,
    optional,
    place_of,
    read_field,
    record,
    reduce_out,
    seek_sequences,
    sequence_of,
    stages_for,
    store_rows,
    transposed,
    view_as,
    write_record,
)
from regard.kernels.scores import LOG2_E, sequence_bounds

KEYS = gl.constexpr(64)  # of a warpgroup
BLOCK_N = gl.constexpr(128)  # of a tile: two warpgroups
RECORD = gl.constexpr(16)  # integers that a tile's record has room for
# Its fields. ``EXISTS`` is 0 in the one that says that there are no more tiles; ``SHIFT`` is length_k - length_q.
EXISTS, FIRST_KEY, HEAD_K, SEQUENCE, START_Q, START_K, LENGTH_K, SHIFT, LOW, FULL_LOW, FULL_HIGH, HIGH = map(
    gl.constexpr, range(12)
)


@record
class Call:
    """What both roles know: the arguments of `attention_backward`, and the shared memory they meet in."""

    q_desc: tma.tensor_descriptor
    k_desc: tma.tensor_descriptor
    v_desc: tma.tensor_descriptor
    grad_out_desc: tma.tensor_descriptor
    dq_desc: tma.tensor_descriptor
    dk_desc: tma.tensor_descriptor
    dv_desc: tma.tensor_descriptor
    dk_ptr: gl.tensor
    dv_ptr: gl.tensor
    row_lse_ptr: gl.tensor
    delta_ptr: gl.tensor
    counter_ptr: gl.tensor
    cu_seqlens_q_ptr: optional
    cu_seqlens_k_ptr: optional
    kv_lens_ptr: optional
    alibi_ptr: optional
    batch: optional
    heads: optional
    heads_kv: optional
    seqlen_q: optional
    seqlen_k: optional
    total_q: optional
    total_k: optional
    section: optional
    scale: gl.tensor
    window_left: optional
    right_reach: optional
    queries: Ring
    grads: Ring
    terms: Ring
    scores: Ring
    keys: Ring
    values: Ring
    records: Ring
    stages_out: gl.shared_memory_descriptor
    HEAD_DIM: gl.constexpr
    HEAD_DIM_V: gl.constexpr
    BLOCK_M: gl.constexpr
    RAGGED: gl.constexpr


@gluon.jit
def query_blocks(first, length_q, length_k, window_left, right_reach, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Query blocks [low, high) that see a key tile, and those of them, [full_low, full_high), that see all of it.

    A tile with keys past the sequence has no full blocks: such a key's weight must come out as 0.
    """
    shift = length_k - length_q
    last = first + BLOCK_N - 1
    low = 0 * length_q
    full_low = 0 * length_q
    high = gl.cdiv(length_q, BLOCK_M)
    full_high = high
    if right_reach is not None:
        low = gl.maximum(first - shift - right_reach + 1, 0) // BLOCK_M
        full_low = gl.cdiv(gl.maximum(last - shift - right_reach + 1, 0), BLOCK_M)
    if window_left is not None:
        high = gl.minimum(
            high, gl.cdiv(gl.maximum(gl.minimum(last, length_k - 1) - shift + window_left + 1, 0), BLOCK_M)
        )
        full_high = gl.minimum(high, gl.maximum(first - shift + window_left + 1, 0) // BLOCK_M)
    if first >= length_k:
        high = 0 * length_q
    if last >= length_k:
        full_high = 0 * length_q
    low = gl.minimum(low, high)
    full_low = gl.minimum(gl.maximum(full_low, low), high)
    full_high = gl.maximum(gl.minimum(full_high, high), full_low)
    return low, full_low, full_high, high


@gluon.jit
def tile_of(index, blocks_n, batch, heads_kv, section):
    """First key, key/value head and sequence of a tile.

    Sections of heads whose queries fit in L2 together; inside, one block of every head in turn. With a causal bound
    the first keys are seen by most queries: the longest tiles come first.
    """
    first_head = index // (section * blocks_n) * section
    heads_here = gl.minimum(section, batch * heads_kv - first_head)
    within = index - first_head * blocks_n
    head = first_head + within % heads_here
    return within // heads_here * BLOCK_N, head % heads_kv, head // heads_kv


@gluon.jit
def load_tiles(call):
    """Producer: fetch key tiles until there are none left; for each, stream the queries, output gradients and row terms
    of every block that sees it.
    """
    blocks_n = gl.cdiv(call.seqlen_k, BLOCK_N)
    total = call.batch * call.heads_kv * blocks_n
    group = call.heads // call.heads_kv
    index = gl.program_id(0)
    if call.cu_seqlens_k_ptr is not None:
        first, before, ends = no_sequences()
        first, before, ends, total = seek_keys(call, index, first, before, ends)
    tile = 0
    filled = 0
    step = 0
    while index < total:
        if call.cu_seqlens_k_ptr is None:
            first_key, head_k, sequence = tile_of(index, blocks_n, call.batch, call.heads_kv, call.section)
        else:
            sequence, within = sequence_of(index, first, before, ends)
        start_q, length_q, start_k, length_k, plane, rows = place_of(
            sequence, call.cu_seqlens_q_ptr, call.cu_seqlens_k_ptr, call.kv_lens_ptr, call.seqlen_q, call.seqlen_k,
            call.total_q, call.total_k,
        )  # fmt: skip
        if call.cu_seqlens_k_ptr is not None:
            first_key, head_k, _ = tile_of(within, gl.cdiv(length_k, BLOCK_N), 1, call.heads_kv, call.section)
        low, full_low, full_high, high = query_blocks(
            first_key, length_q, length_k, call.window_left, call.right_reach, call.BLOCK_M, BLOCK_N
        )
        fields = (1, first_key, head_k, sequence, start_q, start_k, length_k, length_k - length_q, low, full_low,
                  full_high, high)  # fmt: skip
        write_record(call.records, tile, fields)
        tile += 1
        key_place = [plane, head_k, start_k + first_key, 0]
        for member in range(group):
            for block in range(low, high):
                opens = (member == 0) & (block == low)
                if opens:
                    call.keys.copy(filled, call.k_desc, key_place)
                load_block(call, step, plane, head_k * group + member, block, start_q, length_q, rows)
                if call.cu_seqlens_q_ptr is None:
                    call.terms.publish(step)
                if opens:
                    call.values.copy(filled, call.v_desc, key_place)
                    filled += 1
                if call.cu_seqlens_q_ptr is not None:
                    publish_cut_block(call, step, length_q - block * call.BLOCK_M)
                step += 1
        index = claim_tile(call.counter_ptr)
        if call.cu_seqlens_k_ptr is not None:
            first, before, ends, total = seek_keys(call, index, first, before, ends)
    write_record(call.records, tile, (0, 0))
    leave_counters(call.counter_ptr)


@gluon.jit
def seek_keys(call, index, first, before, ends):
    """Producer: where a tile's sequence is to be found, see `seek_sequences`."""
    return seek_sequences(
        index, first, before, ends, call.cu_seqlens_k_ptr, call.batch, call.seqlen_k, call.total_k, call.heads_kv,
        BLOCK_N,
    )  # fmt: skip


@gluon.jit
def load_block(call, step, plane, head, block, start_q, length_q, rows):
    """Producer: queries, output gradients and row terms of one block. Of its terms the consumers are not told yet."""
    row = gl.arange(0, call.BLOCK_M, layout=gl.BlockedLayout([call.BLOCK_M // 32], [32], [1], [0]))
    first = block * call.BLOCK_M
    place = [plane, head, start_q + first, 0]
    call.queries.copy(step, call.q_desc, place)
    call.grads.copy(step, call.grad_out_desc, place)
    exists = first + row < length_q
    at = (plane * call.heads + head).to(gl.int64) * rows + start_q + first + row
    row_lse = gl.load(call.row_lse_ptr + at, mask=exists, other=float("inf"))
    delta = gl.load(call.delta_ptr + at, mask=exists, other=0.0)
    call.terms.tile(step).slice(0, call.BLOCK_M).store(-row_lse / (call.scale * LOG2_E))
    call.terms.tile(step).slice(call.BLOCK_M, call.BLOCK_M).store(-delta)


@gluon.jit
def publish_cut_block(call, step, valid):
    """Producer: say that a block of packed queries is there, which the consumers hear from its row terms.

    The last block of a sequence has rows of the next one, whose P and dS are 0: they must not be NaN.
    """
    if valid < call.BLOCK_M:
        clear_loaded(call.queries, step, valid)
        clear_loaded(call.grads, step, valid)
    call.terms.publish(step)


@gluon.jit
def spread(of_query, zeros):
    """A value of each query over all keys, in registers of its own for each key.

    Copied by an instruction with an effect, for shared registers would be copied between the products they start.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r", [of_query[None, :], zeros], gl.float32, False, 1)


@gluon.jit
def visible_pairs(key, distance, length_k, window_left, right_reach):
    """Which pairs of a tile lie in the band and the sequence; ``key`` lies along the tile's rows or columns."""
    visible = key < length_k
    if right_reach is not None:
        visible = visible & (distance > -right_reach)
    if window_left is not None:
        visible = visible & (distance <= window_left)
    return visible


@gluon.jit
def distances(call, tile, block, keys, queries):
    """How far each query of a block lies behind each key: 0 on the diagonal. ``keys``, ``queries``: their numbers in
    the tile and in the block.
    """
    query = block * call.BLOCK_M + queries + read_field(call.records, tile, SHIFT)
    return query[None, :] - (read_field(call.records, tile, FIRST_KEY) + keys)[:, None]


@gluon.jit
def softmax_weights(s, call, tile, block, keys, queries, slope, edge):
    """P of a tile whose rows are keys and whose columns are queries, from S - lse / scale. ``edge``: whether some pair
    may be hidden.
    """
    if call.RAGGED or call.window_left is not None or call.right_reach is not None:
        if edge:
            key = (read_field(call.records, tile, FIRST_KEY) + keys)[:, None]
            length_k = read_field(call.records, tile, LENGTH_K)
            distance = distances(call, tile, block, keys, queries)
            visible = visible_pairs(key, distance, length_k, call.window_left, call.right_reach)
            s = gl.where(visible, s, float("-inf"))
    logits = s * (call.scale * LOG2_E)
    if slope is not None:
        logits -= slope * LOG2_E * gl.abs(distances(call, tile, block, keys, queries)).to(gl.float32)
    return gl.exp2(logits)


@gluon.jit
def accumulate(WARPGROUP: gl.constexpr, call):
    """Consumer: dK and dV of 64 keys, and a part of dQ of every block of queries, tile after tile."""
    HEAD_DIM: gl.constexpr = call.q_desc.block_type.shape[3]
    HEAD_DIM_V: gl.constexpr = call.v_desc.block_type.shape[3]
    MASKED: gl.constexpr = call.RAGGED or call.window_left is not None or call.right_reach is not None
    dtype: gl.constexpr = call.keys.tiles.dtype
    dk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    dv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM_V, 16])
    group = call.heads // call.heads_kv

    tile = 0
    filled = 0
    step = 0
    last_filled = 0
    last_place = 0
    call.records.wait(tile)
    while read_field(call.records, tile, EXISTS) > 0:
        dk = gl.zeros([KEYS, HEAD_DIM], gl.float32, layout=dk_layout)
        dv = gl.zeros([KEYS, HEAD_DIM_V], gl.float32, layout=dv_layout)
        low = read_field(call.records, tile, LOW)
        high = read_field(call.records, tile, HIGH)
        full_low = 0
        full_high = 0
        if MASKED:
            full_low = read_field(call.records, tile, FULL_LOW)
            full_high = read_field(call.records, tile, FULL_HIGH)
        place = first_sum(call, tile)
        if low < high:
            await_keys(WARPGROUP, call, tile, filled)
        for member in range(group):
            slope = None
            if call.alibi_ptr is not None:
                head = read_field(call.records, tile, HEAD_K) * group + member
                slope = gl.load(call.alibi_ptr + read_field(call.records, tile, SEQUENCE) * call.heads + head)
            for block in range(low, high):
                edge = False
                if MASKED:
                    edge = (block < full_low) | (block >= full_high)
                dk, dv = attend_block(
                    WARPGROUP, call, tile, filled, step, block, slope, edge, dk, dv, last_filled, last_place
                )
                last_filled = filled
                last_place = place + block
                step += 1
            place += blocks_of_sums(call)
        if low < high:
            call.values.release(filled)
            filled += 1
        store_gradient(call.dv_desc, call.dv_ptr, WARPGROUP, call, tile, dv.to(dtype), call.HEAD_DIM_V)
        store_gradient(call.dk_desc, call.dk_ptr, WARPGROUP, call, tile, (dk * call.scale).to(dtype), call.HEAD_DIM)
        call.records.release(tile)
        tile += 1
        call.records.wait(tile)
    if step > 0:
        call.scores.wait(step - 1)
        dq = query_gradient(call, WARPGROUP, step - 1, last_filled)
        dq = warpgroup_mma_wait(0, deps=(dq,))
        add_query_gradient(call, WARPGROUP, dq, last_place)
    tma.store_wait(0)


@gluon.jit
def await_keys(WARPGROUP: gl.constexpr, call, tile, filled):
    """Consumer: wait for a tile's keys and values, and clear those of its own that lie past the sequence."""
    call.keys.wait(filled)
    call.values.wait(filled)
    if call.cu_seqlens_k_ptr is not None or call.kv_lens_ptr is not None:
        my_key: gl.constexpr = WARPGROUP * KEYS
        valid = read_field(call.records, tile, LENGTH_K) - read_field(call.records, tile, FIRST_KEY) - my_key
        clear_rows(matrix(call.keys.tile(filled)).slice(my_key, KEYS, dim=0), valid)
        clear_rows(matrix(call.values.tile(filled)).slice(my_key, KEYS, dim=0), valid)


@gluon.jit
def attend_block(
    WARPGROUP: gl.constexpr, call, tile, filled, step, block, slope, edge, dk, dv, last_filled, last_place
):  # fmt: skip
    """Consumer: what a block of queries adds to dK and dV, and the last block's part of dQ.

    dQ comes a step late, also from tile to tile, so that neither warpgroup waits for the other's dS. Its way through
    shared memory overlaps with the product for dK.
    """
    dtype: gl.constexpr = call.keys.tiles.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, call.BLOCK_M, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, dv.type.layout, 2)
    ds_layout: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    of_queries: gl.constexpr = gl.SliceLayout(0, s_layout)
    my_key: gl.constexpr = WARPGROUP * KEYS
    keys = my_key + gl.arange(0, KEYS, layout=gl.SliceLayout(1, s_layout))
    queries = gl.arange(0, call.BLOCK_M, layout=of_queries)
    zeros = gl.zeros([KEYS, call.BLOCK_M], gl.float32, layout=s_layout)

    call.terms.wait(step)
    terms = call.terms.tile(step)
    # The products start from what is to be taken off them: exp2(S * scale - lse) and dP - delta.
    minus_lse = spread(terms.slice(0, call.BLOCK_M).load(of_queries), zeros)
    minus_delta = spread(terms.slice(call.BLOCK_M, call.BLOCK_M).load(of_queries), zeros)
    call.queries.wait(step)
    now = anew(filled)
    my_k = matrix(call.keys.tile(now)).slice(my_key, KEYS, dim=0)
    my_v = matrix(call.values.tile(now)).slice(my_key, KEYS, dim=0)
    s = warpgroup_mma(my_k, transposed(call.queries, step), minus_lse, is_async=True)
    call.grads.wait(step)
    dp = warpgroup_mma(my_v, transposed(call.grads, step), minus_delta, is_async=True)
    s, dp = warpgroup_mma_wait(0, deps=(s, dp))
    p = softmax_weights(s, call, tile, block, keys, queries, slope, edge)
    narrow_p = gl.convert_layout(p.to(dtype), p_layout)
    narrow_ds = (p * dp).to(dtype)
    call.scores.acquire(step)
    call.scores.tile(step).slice(my_key, KEYS, dim=0).store(narrow_ds)
    fence_async_shared()
    call.scores.publish(step)
    dv = warpgroup_mma(narrow_p, matrix(call.grads.tile(step)), dv, is_async=True)
    if step > 0:
        call.scores.wait(step - 1)
    dq = query_gradient(call, WARPGROUP, step + 1, last_filled)
    dk = warpgroup_mma(gl.convert_layout(narrow_ds, ds_layout), matrix(call.queries.tile(step)), dk, is_async=True)
    dv, dq = warpgroup_mma_wait(1, deps=(dv, dq))
    if step > 0:
        call.scores.release(step - 1)
        if last_filled != filled:
            call.keys.release(last_filled)
        add_query_gradient(call, WARPGROUP, dq, last_place)
    dk = warpgroup_mma_wait(0, deps=(dk,))
    call.queries.release(step)
    return dk, dv


@gluon.jit
def query_gradient(call, WARPGROUP: gl.constexpr, step, filled):
    """Consumer: start a warpgroup's part of dQ = dS K: 64 rows where there are 64 for each, else half the columns."""
    HEAD_DIM: gl.constexpr = call.q_desc.block_type.shape[3]
    COLUMNS: gl.constexpr = HEAD_DIM if call.BLOCK_M == 128 else HEAD_DIM // 2
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    ds = transposed(call.scores, step)
    k = matrix(call.keys.tile(anew(filled)))
    if call.BLOCK_M == 128:
        ds = ds.slice(WARPGROUP * 64, 64, dim=0)
    else:
        k = k.slice(WARPGROUP * COLUMNS, COLUMNS, dim=1)
    return warpgroup_mma(ds, k, gl.zeros([64, COLUMNS], gl.float32, layout=dq_layout), use_acc=False, is_async=True)


@gluon.jit
def blocks_of_sums(call):
    """Blocks of dQ that a head has in the sums: those of packed sequences start at blocks of their own."""
    if call.cu_seqlens_q_ptr is not None:
        return call.total_q // call.BLOCK_M + call.batch
    return gl.cdiv(call.seqlen_q, call.BLOCK_M)


@gluon.jit
def first_sum(call, tile):
    """Where in the sums dQ of a tile's sequence and first head begins, in blocks."""
    head = read_field(call.records, tile, HEAD_K) * (call.heads // call.heads_kv)
    sequence = read_field(call.records, tile, SEQUENCE)
    if call.cu_seqlens_q_ptr is not None:
        return head * blocks_of_sums(call) + read_field(call.records, tile, START_Q) // call.BLOCK_M + sequence
    return (sequence * call.heads + head) * blocks_of_sums(call)


@gluon.jit
def add_query_gradient(call, WARPGROUP: gl.constexpr, dq, place):
    """Consumer: have TMA add a part of dQ to what other key tiles gave.

    A thread holds four neighbouring values of each 16 x 8 tile of wgmma; `finish_queries` undoes this order.
    """
    shape: gl.constexpr = call.dq_desc.block_type.shape
    TILES: gl.constexpr = dq.shape[1] // 8
    # of a row: warp, half, lane; of a column: tile, lane, pair
    values = dq.reshape([4, 2, 8, TILES, 4, 2]).permute(3, 0, 2, 4, 1, 5).reshape(shape)
    part = view_as(call.stages_out.index(WARPGROUP), gl.float32, shape, call.dq_desc.layout)
    tma.store_wait(0)
    part.store(values)
    fence_async_shared()
    reduce_out(call.dq_desc, [(2 * place + WARPGROUP) * shape[0], 0], part)


@gluon.jit
def store_gradient(desc, ptr, WARPGROUP: gl.constexpr, call, tile, gradient, HEAD_DIM: gl.constexpr):
    """Consumer: write 64 rows of dK or dV, by TMA, or row by row in packed sequences."""
    first = read_field(call.records, tile, FIRST_KEY) + WARPGROUP * KEYS
    head_k = read_field(call.records, tile, HEAD_K)
    if call.cu_seqlens_k_ptr is not None:
        start_k = read_field(call.records, tile, START_K)
        count = read_field(call.records, tile, LENGTH_K) - first
        store_rows(ptr, start_k + first, count, call.heads_kv, head_k, gradient, HEAD_DIM)
    else:
        out_tile = view_as(call.stages_out.index(WARPGROUP), desc.dtype, desc.block_type.shape, desc.layout)
        tma.store_wait(0)
        matrix(out_tile).store(gradient)
        fence_async_shared()
        copy_out(desc, [read_field(call.records, tile, SEQUENCE), head_k, first, 0], out_tile)


@gluon.constexpr_function
def largest(*sizes):
    return max(sizes)


@gluon.jit(do_not_specialize=SIZES)
def attention_backward(
    q_desc,  # (B, Hq, Sq, D), packed sequences (1, Hq, total_q, D)
    k_desc,  # (B, Hk, Sk, D), packed (1, Hk, total_k, D)
    v_desc,  # as k, with Dv
    grad_out_desc,  # as q, with Dv
    dq_desc,  # fp32 zeros (blocks * 2 * rows, 128): sums without the scale, as `finish_queries` reads them
    dk_desc,  # as k, in tiles of 64 keys
    dv_desc,  # as v, in tiles of 64 keys
    dk_ptr,  # the same tensors, contiguous, for packed sequences
    dv_ptr,
    row_lse_ptr,  # (B, Hq, Sq), or (Hq, total_q): in units of log2, +inf where no key is visible
    delta_ptr,  # as row_lse: rowsum(dO * O) - dlse
    counter_ptr,  # two zeros, and zeros again after the launch
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    kv_lens_ptr,
    alibi_ptr,  # (B, Hq) fp32
    batch,
    heads,
    heads_kv,
    seqlen_q,
    seqlen_k,
    total_q,
    total_k,
    section,  # key/value heads whose queries share L2
    scale,
    window_left,
    right_reach,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    KEY_STAGES: gl.constexpr,
    VALUE_STAGES: gl.constexpr,
    RAGGED: gl.constexpr,  # the last key tile may be cut
):
    queries = make_ring(stages_for(q_desc, STAGES), STAGES, 1, 2)
    grads = make_companion(queries, stages_for(grad_out_desc, STAGES), 1)
    plain_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    terms = make_companion(queries, gl.allocate_shared_memory(gl.float32, [STAGES, 2 * BLOCK_M], plain_layout), 1)
    scores_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_M], q_desc.dtype)
    scores = make_ring(gl.allocate_shared_memory(q_desc.dtype, [2, BLOCK_N, BLOCK_M], scores_layout), 2, 2, 2)
    keys = make_ring(stages_for(k_desc, KEY_STAGES), KEY_STAGES, 1, 2)
    values = make_ring(stages_for(v_desc, VALUE_STAGES), VALUE_STAGES, 1, 2)
    records = make_ring(gl.allocate_shared_memory(gl.int32, [2, RECORD], plain_layout), 2, 1, 2)
    # Of each warpgroup, what is on its way out: dQ of every block, dV and dK of every tile.
    OUT_BYTES: gl.constexpr = largest(dq_desc.block_type.nbytes, dk_desc.block_type.nbytes, dv_desc.block_type.nbytes)
    stages_out = gl.allocate_shared_memory(gl.int8, [2, OUT_BYTES], plain_layout)
    fence_async_shared()
    call = Call(
        q_desc, k_desc, v_desc, grad_out_desc, dq_desc, dk_desc, dv_desc, dk_ptr, dv_ptr, row_lse_ptr, delta_ptr,
        counter_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, kv_lens_ptr, alibi_ptr, batch, heads, heads_kv, seqlen_q,
        seqlen_k, total_q, total_k, section, scale, window_left, right_reach, queries, grads, terms, scores, keys,
        values, records, stages_out, HEAD_DIM, HEAD_DIM_V, BLOCK_M, RAGGED,
    )  # fmt: skip
    gl.warp_specialize([(accumulate, (0, call)), (accumulate, (1, call)), (load_tiles, (call,))], [4, 1], [240, 24])


@triton.jit(do_not_specialize=SIZES)
def finish_queries(
    sums_ptr,  # fp32, what `attention_backward` added to zeros
    dq_ptr,  # contiguous, (B, Sq, Hq, D) or (total_q, Hq, D)
    cu_seqlens_q_ptr,
    batch,
    heads,
    seqlen_q,
    total_q,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COLUMNS: tl.constexpr,  # of dQ in a warpgroup's part
):
    """Fill dQ from its sums, scaled. A program does a warpgroup's part: 64 rows, or half the columns of 64 rows."""
    part = tl.program_id(0) % 2
    place = tl.program_id(0) // 2
    if cu_seqlens_q_ptr is None:
        blocks = tl.cdiv(seqlen_q, BLOCK_M)
        head, sequence = place // blocks % heads, place // blocks // heads
        start, length, block = sequence * seqlen_q, seqlen_q, place % blocks
    else:  # see `blocks_of_sums` and `first_sum`
        blocks = total_q // BLOCK_M + batch
        head = place // blocks
        sequence = 0 * place
        beyond = sequence + batch
        while beyond - sequence > 1:
            middle = (sequence + beyond) // 2
            start, _length = sequence_bounds(cu_seqlens_q_ptr, None, middle, seqlen_q, total_q)
            follows = start // BLOCK_M + middle > place % blocks
            beyond = tl.where(follows, middle, beyond)
            sequence = tl.where(follows, sequence, middle)
        start, length = sequence_bounds(cu_seqlens_q_ptr, None, sequence, seqlen_q, total_q)
        block = place % blocks - start // BLOCK_M - sequence
    if (block >= 0) & (block * BLOCK_M < length):
        sums = tl.load(sums_ptr + (2 * place + part).to(tl.int64) * (64 * COLUMNS) + tl.arange(0, 64 * COLUMNS))
        # tile of the columns, warp, lane's row, lane's column, half, pair -> rows, columns
        sums = tl.reshape(sums, (COLUMNS // 8, 4, 8, 4, 2, 2))
        dq = tl.reshape(tl.permute(sums, (1, 4, 2, 0, 3, 5)), (64, COLUMNS))
        row = block * BLOCK_M + tl.arange(0, 64)
        dim = tl.arange(0, COLUMNS)
        if BLOCK_M == 128:
            row += part * 64
        else:
            dim += part * COLUMNS
        at = ((start + row).to(tl.int64) * heads + head) * HEAD_DIM
        inside = (row < length)[:, None] & (dim < HEAD_DIM)[None, :]
        tl.store(dq_ptr + at[:, None] + dim[None, :], (dq * scale).to(dq_ptr.dtype.element_ty), mask=inside)
