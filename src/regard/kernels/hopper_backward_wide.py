"""The Hopper flash-attention backward for head dims above 128: one gradient for each warpgroup.

dK and dV of 64 keys fill the registers of one warpgroup each at head dim 256, so the work is divided by product and
not by rows: one warpgroup computes S and P and keeps dV, one computes dP and dS and keeps dK, one computes dQ and has
TMA add it to memory. P, then dS in its place, goes from one to the next through shared memory; no two of them ever
need the same accumulator, and each one's waiting is covered by the others' products.
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

from regard.kernels.hopper_backward import LOG2_E, query_blocks, spread
from regard.kernels.hopper_pipeline import (
    SIZES,
    Ring,
    clear_rows,
    copy_in,
    copy_out,
    make_companion,
    make_ring,
    matrix,
    optional,
    record,
    reduce_out,
    sequence_bounds,
    stages_for,
    transposed,
)

BLOCK = gl.constexpr(64)  # queries, and keys, of a tile


@record
class Call:
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
    alibi_ptr: optional
    scale: gl.tensor
    window_left: optional
    right_reach: optional
    heads: optional
    heads_kv: optional
    rows: optional
    sequence: optional
    plane: optional
    head_k: optional
    first_key: optional
    start_q: optional
    start_k: optional
    length_q: optional
    length_k: optional
    low: optional
    full_low: optional
    full_high: optional
    high: optional
    queries: Ring
    grads: Ring
    row_lses: Ring
    deltas: Ring
    weights: Ring
    score_gradients: Ring
    k_tile: gl.shared_memory_descriptor
    v_tile: gl.shared_memory_descriptor
    dq_tiles: gl.shared_memory_descriptor
    loaded: gl.shared_memory_descriptor
    cleaned: gl.shared_memory_descriptor
    finished: gl.shared_memory_descriptor
    HEAD_DIM: gl.constexpr
    HEAD_DIM_V: gl.constexpr
    DQ_TILES: gl.constexpr
    VARLEN: gl.constexpr
    UNCLEAN: gl.constexpr
    RAGGED: gl.constexpr


@gluon.jit
def load_tiles(call):
    """Producer: the key tile once, then the queries, output gradients and row terms of every block that sees it."""
    mbarrier.expect(call.loaded, call.k_desc.block_type.nbytes + call.v_desc.block_type.nbytes)
    place = [call.plane, call.head_k, call.start_k + call.first_key, 0]
    copy_in(call.k_desc, place, call.loaded, call.k_tile)
    copy_in(call.v_desc, place, call.loaded, call.v_tile)
    layout: gl.constexpr = gl.BlockedLayout([BLOCK // 32], [32], [1], [0])
    row = gl.arange(0, BLOCK, layout=layout)
    group = call.heads // call.heads_kv
    step = 0
    for member in range(group):
        head = call.head_k * group + member
        terms = (call.plane * call.heads + head).to(gl.int64) * call.rows + call.start_q
        for block in range(call.low, call.high):
            first = block * BLOCK
            place = [call.plane, head, call.start_q + first, 0]
            exists = first + row < call.length_q
            row_lse = gl.load(call.row_lse_ptr + terms + first + row, mask=exists, other=float("inf"))
            delta = gl.load(call.delta_ptr + terms + first + row, mask=exists, other=0.0)
            call.queries.copy(step, call.q_desc, place)
            call.row_lses.tile(step).store(-row_lse / (call.scale * LOG2_E))
            call.row_lses.publish(step)
            call.grads.copy(step, call.grad_out_desc, place)
            call.deltas.tile(step).store(-delta)
            call.deltas.publish(step)
            step += 1


@gluon.jit
def wait_for_keys(call):
    """Consumer: wait for the key tile, rid of what lies past the sequence."""
    if call.UNCLEAN:
        mbarrier.wait(call.cleaned, 0)
    else:
        mbarrier.wait(call.loaded, 0)


@gluon.jit
def value_gradient(call):
    """Consumer: P of every block of queries, and dV = P^T dO."""
    HEAD_DIM_V: gl.constexpr = call.v_desc.block_type.shape[3]
    dtype: gl.constexpr = call.k_tile.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    dv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, min(HEAD_DIM_V, 128), 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, dv_layout, 2)
    of_keys: gl.constexpr = gl.SliceLayout(1, s_layout)
    of_queries: gl.constexpr = gl.SliceLayout(0, s_layout)

    zeros = gl.zeros([BLOCK, BLOCK], gl.float32, layout=s_layout)
    dv = gl.zeros([BLOCK, HEAD_DIM_V], gl.float32, layout=dv_layout)
    key = call.first_key + gl.arange(0, BLOCK, layout=of_keys)
    column = gl.arange(0, BLOCK, layout=of_queries)
    shift = call.length_k - call.length_q
    k = matrix(call.k_tile)
    group = call.heads // call.heads_kv
    step = 0
    wait_for_keys(call)
    for member in range(group):
        slope = None
        if call.alibi_ptr is not None:
            slope = gl.load(call.alibi_ptr + call.sequence * call.heads + call.head_k * group + member)
        for block in range(call.low, call.high):
            call.row_lses.wait(step)
            minus_lse = spread(call.row_lses.tile(step).load(of_queries), zeros)
            call.queries.wait(step)
            s = warpgroup_mma(k, transposed(call.queries, step), minus_lse, is_async=True)
            s = warpgroup_mma_wait(0, deps=(s,))
            call.queries.release(step)
            distance = block * BLOCK + column[None, :] + shift - key[:, None]
            if call.RAGGED or call.window_left is not None or call.right_reach is not None:
                if (block < call.full_low) | (block >= call.full_high):
                    visible = key[:, None] < call.length_k
                    if call.right_reach is not None:
                        visible = visible & (distance > -call.right_reach)
                    if call.window_left is not None:
                        visible = visible & (distance <= call.window_left)
                    s = gl.where(visible, s, float("-inf"))
            logits = s * (call.scale * LOG2_E)
            if slope is not None:
                logits -= slope * LOG2_E * gl.abs(distance).to(gl.float32)
            p = gl.exp2(logits).to(dtype)
            call.weights.acquire(step)
            call.weights.tile(step).store(p)
            call.weights.publish(step)
            call.grads.wait(step)
            dv = warpgroup_mma(gl.convert_layout(p, p_layout), matrix(call.grads.tile(step)), dv, is_async=True)
            dv = warpgroup_mma_wait(0, deps=(dv,))
            call.grads.release(step)
            step += 1
    mbarrier.arrive(call.finished)
    mbarrier.wait(call.finished, 0)
    store_gradient(call.dv_desc, call.dv_ptr, call, dv.to(dtype), call.v_tile, call.HEAD_DIM_V)


@gluon.jit
def key_gradient(call):
    """Consumer: dS of every block of queries, and dK = dS^T Q."""
    HEAD_DIM: gl.constexpr = call.q_desc.block_type.shape[3]
    dtype: gl.constexpr = call.k_tile.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    dk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, min(HEAD_DIM, 128), 16])
    ds_layout: gl.constexpr = gl.DotOperandLayout(0, dk_layout, 2)
    of_queries: gl.constexpr = gl.SliceLayout(0, s_layout)

    zeros = gl.zeros([BLOCK, BLOCK], gl.float32, layout=s_layout)
    dk = gl.zeros([BLOCK, HEAD_DIM], gl.float32, layout=dk_layout)
    v = matrix(call.v_tile)
    group = call.heads // call.heads_kv
    wait_for_keys(call)
    for step in range(group * (call.high - call.low)):
        call.deltas.wait(step)
        minus_delta = spread(call.deltas.tile(step).load(of_queries), zeros)
        call.grads.wait(step)
        dp = warpgroup_mma(v, transposed(call.grads, step), minus_delta, is_async=True)
        dp = warpgroup_mma_wait(0, deps=(dp,))
        call.grads.release(step)
        call.weights.wait(step)
        scores = call.weights.tile(step)
        ds = (scores.load(s_layout).to(gl.float32) * dp).to(dtype)
        scores.store(ds)
        fence_async_shared()
        call.score_gradients.publish(step)
        dk = warpgroup_mma(gl.convert_layout(ds, ds_layout), matrix(call.queries.tile(step)), dk, is_async=True)
        dk = warpgroup_mma_wait(0, deps=(dk,))
        call.queries.release(step)
    mbarrier.arrive(call.finished)
    mbarrier.wait(call.finished, 0)
    store_gradient(call.dk_desc, call.dk_ptr, call, (dk * call.scale).to(dtype), call.k_tile, call.HEAD_DIM)


@gluon.jit
def query_gradient(call):
    """Consumer: dQ = dS K of every block of queries, some columns at a time, added to memory by TMA."""
    COLUMNS: gl.constexpr = call.dq_desc.block_type.shape[3]
    HEAD_DIM: gl.constexpr = call.q_desc.block_type.shape[3]
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    zeros = gl.zeros([BLOCK, COLUMNS], gl.float32, layout=dq_layout)
    k = matrix(call.k_tile)
    group = call.heads // call.heads_kv
    step = 0
    mbarrier.wait(call.loaded, 0)
    if call.UNCLEAN:
        clear_rows(k, call.length_k - call.first_key)
        clear_rows(matrix(call.v_tile), call.length_k - call.first_key)
        mbarrier.arrive(call.cleaned)
    for member in range(group):
        head = call.head_k * group + member
        for block in range(call.low, call.high):
            call.score_gradients.wait(step)
            ds = transposed(call.score_gradients, step)
            for part in gl.static_range(HEAD_DIM // COLUMNS):
                dq = warpgroup_mma(ds, k.slice(part * COLUMNS, COLUMNS, dim=1), zeros, use_acc=False, is_async=True)
                dq = warpgroup_mma_wait(0, deps=(dq,))
                if part == HEAD_DIM // COLUMNS - 1:
                    call.weights.release(step)
                tile = call.dq_tiles.index(part % call.DQ_TILES)
                tma.store_wait(call.DQ_TILES - 1)
                matrix(tile).store(dq)
                fence_async_shared()
                reduce_out(call.dq_desc, [call.plane, head, call.start_q + block * BLOCK, part * COLUMNS], tile)
            step += 1
    mbarrier.arrive(call.finished)
    tma.store_wait(0)


@gluon.jit
def store_gradient(desc, ptr, call, gradient, tile, HEAD_DIM: gl.constexpr):
    """Write dK or dV of the key tile: by TMA through the tile's shared memory, or row by row in packed sequences."""
    start = call.start_k + call.first_key
    if call.VARLEN:
        layout: gl.constexpr = gradient.type.layout
        row = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, layout))
        dim = gl.arange(0, gradient.shape[1], layout=gl.SliceLayout(0, layout))
        place = (start + row).to(gl.int64) * call.heads_kv + call.head_k
        inside = (call.first_key + row < call.length_k)[:, None] & (dim < HEAD_DIM)[None, :]
        gl.store(ptr + place[:, None] * HEAD_DIM + dim[None, :], gradient, mask=inside)
    else:
        matrix(tile).store(gradient)
        fence_async_shared()
        copy_out(desc, [call.plane, call.head_k, start, 0], tile)
        tma.store_wait(0)


@gluon.jit(do_not_specialize=SIZES)
def attention_backward_wide(
    q_desc,
    k_desc,
    v_desc,
    grad_out_desc,
    dq_desc,
    dk_desc,
    dv_desc,
    dk_ptr,
    dv_ptr,
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
    window_left,
    right_reach,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    QUERY_STAGES: gl.constexpr,
    GRAD_STAGES: gl.constexpr,
    DQ_TILES: gl.constexpr,
    RAGGED: gl.constexpr,
):
    VARLEN: gl.constexpr = cu_seqlens_q_ptr is not None
    UNCLEAN: gl.constexpr = VARLEN or kv_lens_ptr is not None
    program = gl.program_id(0)
    blocks_n = gl.cdiv(seqlen_k, BLOCK)
    first_key = program % blocks_n * BLOCK
    head_k = program // blocks_n % heads_kv
    sequence = program // blocks_n // heads_kv
    start_q = 0 * program
    start_k = 0 * program
    length_q = seqlen_q + start_q
    length_k = seqlen_k + start_k
    plane = sequence
    rows = seqlen_q
    if VARLEN:
        start_q, length_q = sequence_bounds(cu_seqlens_q_ptr, sequence, seqlen_q, total_q, None)
        start_k, length_k = sequence_bounds(cu_seqlens_k_ptr, sequence, seqlen_k, total_k, None)
        plane = 0 * program
        rows = total_q
        if first_key >= length_k:
            return
    if kv_lens_ptr is not None:
        length_k = gl.minimum(gl.maximum(gl.load(kv_lens_ptr + sequence), 0), seqlen_k)
    low, full_low, full_high, high = query_blocks(first_key, length_q, length_k, window_left, right_reach, BLOCK, BLOCK)

    terms_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    scores_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, BLOCK], q_desc.dtype)
    queries = make_ring(stages_for(q_desc, QUERY_STAGES), QUERY_STAGES, 1, 2)
    grads = make_ring(stages_for(grad_out_desc, GRAD_STAGES), GRAD_STAGES, 1, 2)
    row_lses = make_companion(queries, gl.allocate_shared_memory(gl.float32, [QUERY_STAGES, BLOCK], terms_layout), 1)
    deltas = make_companion(grads, gl.allocate_shared_memory(gl.float32, [GRAD_STAGES, BLOCK], terms_layout), 1)
    weights = make_ring(gl.allocate_shared_memory(q_desc.dtype, [2, BLOCK, BLOCK], scores_layout), 2, 1, 1)
    score_gradients = make_companion(weights, weights.tiles, 1)
    loaded = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    cleaned = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    finished = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(loaded, count=1)
    mbarrier.init(cleaned, count=1)
    mbarrier.init(finished, count=3)
    k_tile = stages_for(k_desc, 1).index(0)
    v_tile = stages_for(v_desc, 1).index(0)
    dq_tiles = stages_for(dq_desc, DQ_TILES)
    fence_async_shared()
    call = Call(
        q_desc, k_desc, v_desc, grad_out_desc, dq_desc, dk_desc, dv_desc, dk_ptr, dv_ptr, row_lse_ptr, delta_ptr,
        alibi_ptr, scale, window_left, right_reach, heads, heads_kv, rows, sequence, plane, head_k, first_key,
        start_q, start_k, length_q, length_k, low, full_low, full_high, high, queries, grads, row_lses, deltas, weights,
        score_gradients, k_tile, v_tile, dq_tiles, loaded, cleaned, finished, HEAD_DIM, HEAD_DIM_V, DQ_TILES, VARLEN, UNCLEAN,
        RAGGED,
    )  # fmt: skip
    gl.warp_specialize(
        [(value_gradient, (call,)), (key_gradient, (call,)), (query_gradient, (call,)), (load_tiles, (call,))],
        [4, 4, 1],
        [192, 96, 32],
    )
