"""The Hopper flash-attention backward in two passes: one for dK and dV, one for dQ, each summed in registers.

Dao 2023, "FlashAttention-2", algorithm 2, taken apart. S and dP are computed twice, 7 products in place of 5. In
return no gradient goes through memory to be summed there: the result is bitwise repeatable, and at head dims above 128,
where 64 keys are all that fit in registers, the sums of dQ in memory would cost more than the two products.

Pass one divides the work by product: one warpgroup computes S and P and keeps dV, the other computes dP and dS and
keeps dK; P goes from one to the other through shared memory. Pass two is built like the forward: each warpgroup keeps
dQ of 64 queries, and P and dS never leave its registers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from regard.kernels.hopper_backward import query_blocks, visible_pairs
from regard.kernels.hopper_pipeline import (
    SIZES,
    Ring,
    anew,
    clear_loaded,
    clear_rows,
    copy_in,
    copy_out,
    make_companion,
    make_ring,
    matrix,
    optional,
    place_of,
    record,
    stages_for,
    store_rows,
    transposed,
)
from regard.kernels.hopper_tiles import ROWS, key_blocks
from regard.kernels.scores import LOG2_E


@record
class Call:
    """What all roles know: the arguments of either pass, where the program is, and the shared memory."""

    scale: gl.tensor
    alibi_ptr: optional
    softcap: optional
    window_left: optional
    right_reach: optional
    heads: optional
    heads_kv: optional
    rows: optional
    sequence: optional
    plane: optional
    head: optional
    first: optional
    start_q: optional
    start_k: optional
    length_q: optional
    length_k: optional
    low: optional
    full_low: optional
    full_high: optional
    high: optional
    row_lse_ptr: gl.tensor
    delta_ptr: gl.tensor
    loaded: gl.shared_memory_descriptor
    met: gl.shared_memory_descriptor
    HEAD_DIM: gl.constexpr
    HEAD_DIM_V: gl.constexpr
    VARLEN: gl.constexpr
    UNCLEAN: gl.constexpr
    RAGGED: gl.constexpr


@record
class KeyPass:
    """The tensors of pass one."""

    q_desc: tma.tensor_descriptor
    k_desc: tma.tensor_descriptor
    v_desc: tma.tensor_descriptor
    grad_out_desc: tma.tensor_descriptor
    dk_desc: tma.tensor_descriptor
    dv_desc: tma.tensor_descriptor
    dk_ptr: gl.tensor
    dv_ptr: gl.tensor
    queries: Ring
    grads: Ring
    row_lses: Ring
    deltas: Ring
    weights: Ring
    k_tile: gl.shared_memory_descriptor
    v_tile: gl.shared_memory_descriptor


@record
class QueryPass:
    """The tensors of pass two."""

    q_desc: tma.tensor_descriptor
    k_desc: tma.tensor_descriptor
    v_desc: tma.tensor_descriptor
    grad_out_desc: tma.tensor_descriptor
    dq_desc: tma.tensor_descriptor
    dq_ptr: gl.tensor
    keys: Ring
    values: Ring
    q_tiles: gl.shared_memory_descriptor
    grad_out_tiles: gl.shared_memory_descriptor


@gluon.jit
def softmax_weights(s, lse, key, query, call, slope, block, full_low, full_high):
    """P of a tile from its raw products, and what the softcap multiplies dS by.

    ``lse`` (in units of log2), ``key`` and ``query`` lie along the tile's rows or columns: (rows, 1) or (1, columns).
    Pairs are looked at in blocks outside full_low..full_high only.
    """
    distance = query + (call.length_k - call.length_q) - key
    bend = 1.0
    if call.softcap is None:
        logits = s * (call.scale * LOG2_E) - lse
    else:
        # With r = 1 / (1 + exp(2x)), tanh(x) is 1 - 2r and its slope 4r(1 - r).
        r = 1.0 / (1.0 + gl.exp2(s * (call.scale * (2.0 * LOG2_E) / call.softcap)))
        logits = call.softcap * LOG2_E * (1.0 - 2.0 * r) - lse
        bend = 4.0 * r * (1.0 - r)
    if slope is not None:
        logits -= slope * LOG2_E * gl.abs(distance).to(gl.float32)
    if call.RAGGED or call.window_left is not None or call.right_reach is not None:
        if (block < full_low) | (block >= full_high):
            visible = visible_pairs(key, distance, call.length_k, call.window_left, call.right_reach)
            logits = gl.where(visible, logits, float("-inf"))
    return gl.exp2(logits), bend


@gluon.jit
def load_queries(call, tensors):
    """Producer of pass one: the key tile once, then every block of queries that sees it."""
    mbarrier.expect(call.loaded, tensors.k_desc.block_type.nbytes + tensors.v_desc.block_type.nbytes)
    place = [call.plane, call.head, call.start_k + call.first, 0]
    copy_in(tensors.k_desc, place, call.loaded, tensors.k_tile)
    copy_in(tensors.v_desc, place, call.loaded, tensors.v_tile)
    BLOCK_M: gl.constexpr = tensors.q_desc.block_type.shape[2]
    row = gl.arange(0, BLOCK_M, layout=gl.BlockedLayout([BLOCK_M // 32], [32], [1], [0]))
    group = call.heads // call.heads_kv
    step = 0
    for member in range(group):
        head = call.head * group + member
        terms = (call.plane * call.heads + head).to(gl.int64) * call.rows + call.start_q
        for block in range(call.low, call.high):
            first = block * BLOCK_M
            exists = first + row < call.length_q
            row_lse = gl.load(call.row_lse_ptr + terms + first + row, mask=exists, other=float("inf"))
            delta = gl.load(call.delta_ptr + terms + first + row, mask=exists, other=0.0)
            place = [call.plane, head, call.start_q + first, 0]
            tensors.queries.copy(step, tensors.q_desc, place)
            tensors.row_lses.tile(step).store(row_lse)
            clear_next_sequence(call, tensors.queries, step, first)
            tensors.row_lses.publish(step)
            tensors.grads.copy(step, tensors.grad_out_desc, place)
            tensors.deltas.tile(step).store(delta)
            clear_next_sequence(call, tensors.grads, step, first)
            tensors.deltas.publish(step)
            step += 1


@gluon.jit
def clear_next_sequence(call, ring, step, first):
    """Producer of pass one: the last block of packed queries has rows of the next sequence, whose P and dS are 0: they
    must not be NaN. The consumers hear of it from the row terms.
    """
    if call.VARLEN:
        if first + ring.tile(step).shape[2] > call.length_q:
            clear_loaded(ring, step, call.length_q - first)


@gluon.jit
def value_gradient(call, tensors):
    """Consumer of pass one: P of every block of queries, and dV = P^T dO."""
    BLOCK_DV: gl.constexpr = tensors.v_desc.block_type.shape[3]
    dtype: gl.constexpr = tensors.k_tile.dtype
    BLOCK_M: gl.constexpr = tensors.q_desc.block_type.shape[2]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    dv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, dv_layout, 2)
    of_queries: gl.constexpr = gl.SliceLayout(0, s_layout)

    zeros = gl.zeros([ROWS, BLOCK_M], gl.float32, layout=s_layout)
    dv = gl.zeros([ROWS, BLOCK_DV], gl.float32, layout=dv_layout)
    key = call.first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
    column = gl.arange(0, BLOCK_M, layout=of_queries)
    k = matrix(tensors.k_tile)
    group = call.heads // call.heads_kv
    step = 0
    mbarrier.wait(call.loaded, 0)
    if call.UNCLEAN:
        clear_rows(k, call.length_k - call.first)
    for member in range(group):
        slope = None
        if call.alibi_ptr is not None:
            slope = gl.load(call.alibi_ptr + call.sequence * call.heads + call.head * group + member)
        for block in range(call.low, call.high):
            tensors.queries.wait(step)
            if call.VARLEN:
                tensors.row_lses.wait(step)
            s = warpgroup_mma(k, transposed(tensors.queries, step), zeros, use_acc=False, is_async=True)
            tensors.row_lses.wait(step)
            lse = tensors.row_lses.tile(step).load(of_queries)
            s = warpgroup_mma_wait(0, deps=(s,))
            tensors.queries.release(step)
            query = block * BLOCK_M + column
            p, bend = softmax_weights(
                s, lse[None, :], key[:, None], query[None, :], call, slope, block, call.full_low, call.full_high
            )
            tensors.weights.acquire(step)
            tensors.weights.tile(step).store((p * bend).to(dtype))
            tensors.weights.publish(step)
            tensors.grads.wait(step)
            if call.VARLEN:
                tensors.deltas.wait(step)
            p = gl.convert_layout(p.to(dtype), p_layout)
            dv = warpgroup_mma(p, matrix(tensors.grads.tile(step)), dv, is_async=True)
            dv = warpgroup_mma_wait(0, deps=(dv,))
            tensors.grads.release(step)
            step += 1
    store_tile(tensors.dv_desc, tensors.dv_ptr, call, dv.to(dtype), tensors.v_tile, call.met, call.HEAD_DIM_V)


@gluon.jit
def key_gradient(call, tensors):
    """Consumer of pass one: dS of every block of queries, and dK = dS^T Q."""
    BLOCK_D: gl.constexpr = tensors.q_desc.block_type.shape[3]
    dtype: gl.constexpr = tensors.k_tile.dtype
    BLOCK_M: gl.constexpr = tensors.q_desc.block_type.shape[2]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    dk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    ds_layout: gl.constexpr = gl.DotOperandLayout(0, dk_layout, 2)
    of_queries: gl.constexpr = gl.SliceLayout(0, s_layout)

    zeros = gl.zeros([ROWS, BLOCK_M], gl.float32, layout=s_layout)
    dk = gl.zeros([ROWS, BLOCK_D], gl.float32, layout=dk_layout)
    v = matrix(tensors.v_tile)
    group = call.heads // call.heads_kv
    mbarrier.wait(call.loaded, 0)
    if call.UNCLEAN:
        clear_rows(v, call.length_k - call.first)
    for step in range(group * (call.high - call.low)):
        tensors.grads.wait(step)
        if call.VARLEN:
            tensors.deltas.wait(step)
        dp = warpgroup_mma(v, transposed(tensors.grads, step), zeros, use_acc=False, is_async=True)
        tensors.deltas.wait(step)
        delta = tensors.deltas.tile(step).load(of_queries)
        dp = warpgroup_mma_wait(0, deps=(dp,))
        tensors.grads.release(step)
        tensors.weights.wait(step)
        weights = tensors.weights.tile(step).load(s_layout).to(gl.float32)
        tensors.weights.release(step)
        ds = gl.convert_layout((weights * (dp - delta[None, :])).to(dtype), ds_layout)
        # The weights were made from these queries, which need no wait of their own.
        dk = warpgroup_mma(ds, matrix(tensors.queries.tile(step)), dk, is_async=True)
        dk = warpgroup_mma_wait(0, deps=(dk,))
        tensors.queries.release(step)
    dk = (dk * call.scale).to(dtype)
    store_tile(tensors.dk_desc, tensors.dk_ptr, call, dk, tensors.k_tile, call.met, call.HEAD_DIM)


@gluon.jit
def store_tile(desc, ptr, call, gradient, tile, met, HEAD_DIM: gl.constexpr):
    """Write 64 rows of dK or dV: by TMA through the key tile's shared memory, or row by row in packed sequences."""
    start = call.start_k + call.first
    if call.VARLEN:
        store_rows(ptr, start, call.length_k - call.first, call.heads_kv, call.head, gradient, HEAD_DIM)
    else:
        mbarrier.arrive(met)
        mbarrier.wait(met, 0)
        matrix(tile).store(gradient)
        fence_async_shared()
        copy_out(desc, [call.plane, call.head, start, 0], tile)
        tma.store_wait(0)


@gluon.jit
def load_keys(call, tensors):
    """Producer of pass two: the queries and output gradients of the tile, then every block of keys that they see."""
    NBYTES: gl.constexpr = tensors.q_desc.block_type.nbytes + tensors.grad_out_desc.block_type.nbytes
    head_k = call.head // (call.heads // call.heads_kv)
    for block in range(call.high - call.low):
        place = [call.plane, head_k, call.start_k + (call.high - 1 - block) * ROWS, 0]
        tensors.keys.copy(block, tensors.k_desc, place)
        if block == 0:
            for warpgroup in gl.static_range(2):
                loaded = call.loaded.index(warpgroup)
                mbarrier.expect(loaded, NBYTES)
                mine = [call.plane, call.head, call.start_q + call.first + warpgroup * ROWS, 0]
                copy_in(tensors.q_desc, mine, loaded, tensors.q_tiles.index(warpgroup))
                copy_in(tensors.grad_out_desc, mine, loaded, tensors.grad_out_tiles.index(warpgroup))
        tensors.values.copy(block, tensors.v_desc, place)


@gluon.jit
def query_gradient(WARPGROUP: gl.constexpr, call, tensors):
    """Consumer of pass two: dQ = dS K of 64 queries."""
    BLOCK_D: gl.constexpr = tensors.q_desc.block_type.shape[3]
    dtype: gl.constexpr = tensors.keys.tiles.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    ds_layout: gl.constexpr = gl.DotOperandLayout(0, dq_layout, 2)

    first = call.first + WARPGROUP * ROWS
    row = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
    column = gl.arange(0, ROWS, layout=gl.SliceLayout(0, s_layout))
    zeros = gl.zeros([ROWS, ROWS], gl.float32, layout=s_layout)
    dq = gl.zeros([ROWS, BLOCK_D], gl.float32, layout=dq_layout)
    terms = (call.plane * call.heads + call.head).to(gl.int64) * call.rows + call.start_q + row
    row_lse = gl.load(call.row_lse_ptr + terms, mask=row < call.length_q, other=float("inf"))
    delta = gl.load(call.delta_ptr + terms, mask=row < call.length_q, other=0.0)
    slope = None
    if call.alibi_ptr is not None:
        slope = gl.load(call.alibi_ptr + call.sequence * call.heads + call.head)
    my_low, full_low, full_high, my_high = key_blocks(
        first, gl.minimum(first + ROWS, call.length_q) - 1, call.length_q, call.length_k, call.window_left,
        call.right_reach, ROWS,
    )  # fmt: skip
    my_high = gl.minimum(my_high, call.high)
    my_low = gl.minimum(my_low, my_high - 1)
    if call.UNCLEAN:
        if WARPGROUP == 0:
            tensors.keys.wait(0)
            clear_rows(matrix(tensors.keys.tile(0)), call.length_k - (call.high - 1) * ROWS)
            tensors.values.wait(0)
            clear_rows(matrix(tensors.values.tile(0)), call.length_k - (call.high - 1) * ROWS)
            mbarrier.arrive(call.met)
        mbarrier.wait(call.met, 0)
    skip_keys(tensors, 0, call.high - my_high)
    mbarrier.wait(call.loaded.index(WARPGROUP), 0)
    for turn in range(my_high - my_low):
        block = my_high - 1 - turn
        mine = anew(WARPGROUP)
        q = matrix(tensors.q_tiles.index(mine))
        grad_out = matrix(tensors.grad_out_tiles.index(mine))
        step = call.high - 1 - block
        tensors.keys.wait(step)
        s = warpgroup_mma(q, transposed(tensors.keys, step), zeros, use_acc=False, is_async=True)
        tensors.values.wait(step)
        dp = warpgroup_mma(grad_out, transposed(tensors.values, step), zeros, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s,))
        key = block * ROWS + column
        p, bend = softmax_weights(
            s, row_lse[:, None], key[None, :], row[:, None], call, slope, block, full_low, full_high
        )
        dp = warpgroup_mma_wait(0, deps=(dp,))
        tensors.values.release(step)
        ds = gl.convert_layout((p * bend * (dp - delta[:, None])).to(dtype), ds_layout)
        dq = warpgroup_mma(ds, matrix(tensors.keys.tile(step)), dq, is_async=True)
        dq = warpgroup_mma_wait(0, deps=(dq,))
        tensors.keys.release(step)
    skip_keys(tensors, call.high - my_low, my_low - call.low)
    dq = (dq * call.scale).to(dtype)
    if call.VARLEN:
        store_rows(
            tensors.dq_ptr, call.start_q + first, call.length_q - first, call.heads, call.head, dq, call.HEAD_DIM
        )
    else:
        matrix(tensors.q_tiles.index(WARPGROUP)).store(dq)
        fence_async_shared()
        copy_out(tensors.dq_desc, [call.plane, call.head, first, 0], tensors.q_tiles.index(WARPGROUP))
        tma.store_wait(0)


@gluon.jit
def skip_keys(tensors, step, count):
    """Consumer of pass two: let blocks pass that the other warpgroup's rows see and this one's do not."""
    for passed in range(count):
        tensors.keys.wait(step + passed)
        tensors.keys.release(step + passed)
        tensors.values.wait(step + passed)
        tensors.values.release(step + passed)


@gluon.jit(do_not_specialize=SIZES)
def backward_keys(
    q_desc,  # (B, Hq, Sq, D), packed sequences (1, Hq, total_q, D)
    k_desc,  # (B, Hk, Sk, D), packed (1, Hk, total_k, D)
    v_desc,  # as k, with Dv
    grad_out_desc,  # as q, with Dv
    dk_desc,  # as k
    dv_desc,  # as v
    dk_ptr,  # the same tensors, contiguous, for packed sequences
    dv_ptr,
    row_lse_ptr,  # (B, Hq, Sq), or (Hq, total_q): in units of log2, +inf where no key is visible
    delta_ptr,  # as row_lse: rowsum(dO * O) - dlse
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
    scale,
    softcap,
    window_left,
    right_reach,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    RAGGED: gl.constexpr,  # the last key tile may be cut
):
    BLOCK_M: gl.constexpr = q_desc.block_type.shape[2]
    VARLEN: gl.constexpr = cu_seqlens_q_ptr is not None
    UNCLEAN: gl.constexpr = VARLEN or kv_lens_ptr is not None
    # With a causal bound the first keys are seen by most queries: the longest programs come first.
    # Those of one head are neighbours, and read the same queries from L2.
    program = gl.program_id(0)
    blocks_n = gl.cdiv(seqlen_k, ROWS)
    first = program % blocks_n * ROWS
    head = program // blocks_n % heads_kv
    sequence = program // blocks_n // heads_kv
    start_q, length_q, start_k, length_k, plane, rows = place_of(
        sequence, cu_seqlens_q_ptr, cu_seqlens_k_ptr, kv_lens_ptr, seqlen_q, seqlen_k, total_q, total_k
    )
    if VARLEN:
        if first >= length_k:
            return
    low, full_low, full_high, high = query_blocks(first, length_q, length_k, window_left, right_reach, BLOCK_M, ROWS)

    loaded = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    met = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(loaded, count=1)
    mbarrier.init(met, count=2)
    terms_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    scores_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_M], q_desc.dtype)
    queries = make_ring(stages_for(q_desc, 2), 2, 1, 2)
    grads = make_ring(stages_for(grad_out_desc, 2), 2, 1, 2)
    row_lses = make_companion(queries, gl.allocate_shared_memory(gl.float32, [2, BLOCK_M], terms_layout), 1)
    deltas = make_companion(grads, gl.allocate_shared_memory(gl.float32, [2, BLOCK_M], terms_layout), 1)
    weights = make_ring(gl.allocate_shared_memory(q_desc.dtype, [2, ROWS, BLOCK_M], scores_layout), 2, 1, 1)
    tensors = KeyPass(
        q_desc, k_desc, v_desc, grad_out_desc, dk_desc, dv_desc, dk_ptr, dv_ptr, queries, grads, row_lses, deltas,
        weights, stages_for(k_desc, 1).index(0), stages_for(v_desc, 1).index(0),
    )  # fmt: skip
    fence_async_shared()
    call = Call(
        scale, alibi_ptr, softcap, window_left, right_reach, heads, heads_kv, rows, sequence, plane, head, first,
        start_q, start_k, length_q, length_k, low, full_low, full_high, high, row_lse_ptr, delta_ptr, loaded, met,
        HEAD_DIM, HEAD_DIM_V, VARLEN, UNCLEAN, RAGGED,
    )  # fmt: skip
    gl.warp_specialize(
        [(value_gradient, (call, tensors)), (key_gradient, (call, tensors)), (load_queries, (call, tensors))],
        [4, 1], [240, 24],
    )  # fmt: skip
    mbarrier.invalidate(met)


@gluon.jit(do_not_specialize=SIZES)
def backward_queries(
    q_desc,  # as in `backward_keys`
    k_desc,
    v_desc,
    grad_out_desc,
    dq_desc,  # as q
    dq_ptr,  # the same tensor, contiguous, for packed sequences
    row_lse_ptr,
    delta_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    kv_lens_ptr,
    alibi_ptr,
    batch,
    heads,
    heads_kv,
    seqlen_q,
    seqlen_k,
    total_q,
    total_k,
    scale,
    softcap,
    window_left,
    right_reach,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    KEY_STAGES: gl.constexpr,
    VALUE_STAGES: gl.constexpr,
    RAGGED: gl.constexpr,
):
    VARLEN: gl.constexpr = cu_seqlens_q_ptr is not None
    UNCLEAN: gl.constexpr = VARLEN or kv_lens_ptr is not None
    program = gl.program_id(0)
    blocks_m = gl.cdiv(seqlen_q, 2 * ROWS)
    first = program % blocks_m
    if right_reach is not None:
        first = blocks_m - 1 - first  # the longest rows first
    first *= 2 * ROWS
    head = program // blocks_m % heads
    sequence = program // blocks_m // heads
    start_q, length_q, start_k, length_k, plane, rows = place_of(
        sequence, cu_seqlens_q_ptr, cu_seqlens_k_ptr, kv_lens_ptr, seqlen_q, seqlen_k, total_q, total_k
    )
    if VARLEN:
        if first >= length_q:
            return
    last = gl.minimum(first + 2 * ROWS, length_q) - 1
    low, full_low, full_high, high = key_blocks(first, last, length_q, length_k, window_left, right_reach, ROWS)

    loaded = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    met = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(loaded.index(0), count=1)
    mbarrier.init(loaded.index(1), count=1)
    mbarrier.init(met, count=1)
    keys = make_ring(stages_for(k_desc, KEY_STAGES), KEY_STAGES, 1, 2)
    values = make_ring(stages_for(v_desc, VALUE_STAGES), VALUE_STAGES, 1, 2)
    tensors = QueryPass(
        q_desc, k_desc, v_desc, grad_out_desc, dq_desc, dq_ptr, keys, values, stages_for(q_desc, 2),
        stages_for(grad_out_desc, 2),
    )  # fmt: skip
    fence_async_shared()
    call = Call(
        scale, alibi_ptr, softcap, window_left, right_reach, heads, heads_kv, rows, sequence, plane, head, first,
        start_q, start_k, length_q, length_k, low, full_low, full_high, high, row_lse_ptr, delta_ptr, loaded, met,
        HEAD_DIM, HEAD_DIM_V, VARLEN, UNCLEAN, RAGGED,
    )  # fmt: skip
    gl.warp_specialize(
        [(query_gradient, (0, call, tensors)), (query_gradient, (1, call, tensors)), (load_keys, (call, tensors))],
        [4, 1], [240, 24],
    )  # fmt: skip
    mbarrier.invalidate(met)
