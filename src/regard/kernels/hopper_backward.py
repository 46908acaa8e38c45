"""The Hopper flash-attention backward in Gluon: dK and dV of a key tile in registers, dQ added to memory by TMA.

Dao 2023, "FlashAttention-2", algorithm 2, with the roles of Shah et al. 2024, "FlashAttention-3": a producer warp
streams the queries that see a key tile; two consumer warpgroups keep 64 keys each, with keys as the rows of S and dP,
so that P and dS feed the products for dV and dK from registers. dS also goes to shared memory, where both warpgroups
read it for a part of dQ each. Query heads of one key/value head follow each other, so that dK and dV are summed over
the group in registers.
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

from regard.kernels.hopper_pipeline import (
    SIZES,
    Ring,
    anew,
    clear_rows,
    copy_in,
    copy_out,
    make_companion,
    make_ring,
    matrix,
    optional,
    place_of,
    record,
    reduce_out,
    stages_for,
    store_rows,
    transposed,
)
from regard.kernels.hopper_softmax import LOG2_E

KEYS = gl.constexpr(64)  # of a warpgroup
BLOCK_N = gl.constexpr(128)  # of a program: two warpgroups


@record
class Call:
    """What both roles know: the arguments of `attention_backward`, where the program is, and the shared memory."""

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
    terms: Ring
    scores: Ring
    k_tiles: gl.shared_memory_descriptor
    v_tiles: gl.shared_memory_descriptor
    dq_tiles: gl.shared_memory_descriptor
    loaded: gl.shared_memory_descriptor
    HEAD_DIM: gl.constexpr
    HEAD_DIM_V: gl.constexpr
    BLOCK_M: gl.constexpr
    VARLEN: gl.constexpr
    UNCLEAN: gl.constexpr
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
def load_tiles(call):
    """Producer: the key tile once, then the queries, output gradients and row terms of every block that sees it."""
    mbarrier.expect(call.loaded, call.k_desc.block_type.nbytes + call.v_desc.block_type.nbytes)
    place = [call.plane, call.head_k, call.start_k + call.first_key, 0]
    copy_in(call.k_desc, place, call.loaded, call.k_tiles.index(0))
    copy_in(call.v_desc, place, call.loaded, call.v_tiles.index(0))
    layout: gl.constexpr = gl.BlockedLayout([call.BLOCK_M // 32], [32], [1], [0])
    row = gl.arange(0, call.BLOCK_M, layout=layout)
    group = call.heads // call.heads_kv
    step = 0
    for member in range(group):
        head = call.head_k * group + member
        terms = (call.plane * call.heads + head).to(gl.int64) * call.rows + call.start_q
        for block in range(call.low, call.high):
            first = block * call.BLOCK_M
            place = [call.plane, head, call.start_q + first, 0]
            call.queries.copy(step, call.q_desc, place)
            call.grads.copy(step, call.grad_out_desc, place)
            exists = first + row < call.length_q
            row_lse = gl.load(call.row_lse_ptr + terms + first + row, mask=exists, other=float("inf"))
            delta = gl.load(call.delta_ptr + terms + first + row, mask=exists, other=0.0)
            call.terms.tile(step).slice(0, call.BLOCK_M).store(-row_lse / (call.scale * LOG2_E))
            call.terms.tile(step).slice(call.BLOCK_M, call.BLOCK_M).store(-delta)
            call.terms.publish(step)
            step += 1


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
def softmax_gradient(s, dp, key, query, shift, length_k, slope, scale, window_left, right_reach, edge):
    """P and dS (but for the scale) of a tile whose rows are keys and whose columns are queries.

    ``s`` is S - lse / scale, ``dp`` is dP - delta; ``edge``: whether some pair may be hidden.
    """
    distance = query[None, :] + shift - key[:, None]
    if edge:
        visible = visible_pairs(key[:, None], distance, length_k, window_left, right_reach)
        s = gl.where(visible, s, float("-inf"))
    logits = s * (scale * LOG2_E)
    if slope is not None:
        logits -= slope * LOG2_E * gl.abs(distance).to(gl.float32)
    p = gl.exp2(logits)
    return p, p * dp


@gluon.jit
def accumulate(WARPGROUP: gl.constexpr, call):
    """Consumer: dK and dV of 64 keys, and a part of dQ of every block of queries."""
    HEAD_DIM: gl.constexpr = call.q_desc.block_type.shape[3]
    HEAD_DIM_V: gl.constexpr = call.v_desc.block_type.shape[3]
    dtype: gl.constexpr = call.k_tiles.dtype
    DQ_COLUMNS: gl.constexpr = call.dq_desc.block_type.shape[3]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, call.BLOCK_M, 16])
    dk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    dv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM_V, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DQ_COLUMNS, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, dv_layout, 2)
    ds_layout: gl.constexpr = gl.DotOperandLayout(0, dk_layout, 2)
    of_keys: gl.constexpr = gl.SliceLayout(1, s_layout)
    of_queries: gl.constexpr = gl.SliceLayout(0, s_layout)

    zeros = gl.zeros([KEYS, call.BLOCK_M], gl.float32, layout=s_layout)
    zeros_dq = gl.zeros([64, DQ_COLUMNS], gl.float32, layout=dq_layout)
    dk = gl.zeros([KEYS, HEAD_DIM], gl.float32, layout=dk_layout)
    dv = gl.zeros([KEYS, HEAD_DIM_V], gl.float32, layout=dv_layout)
    my_key: gl.constexpr = WARPGROUP * KEYS
    key = call.first_key + my_key + gl.arange(0, KEYS, layout=of_keys)
    column = gl.arange(0, call.BLOCK_M, layout=of_queries)
    shift = call.length_k - call.length_q
    my_k = matrix(call.k_tiles.index(0)).slice(my_key, KEYS, dim=0)
    my_v = matrix(call.v_tiles.index(0)).slice(my_key, KEYS, dim=0)

    group = call.heads // call.heads_kv
    step = 0
    last_head = 0 * call.head_k
    last_row = 0 * call.head_k
    mbarrier.wait(call.loaded, 0)
    if call.UNCLEAN:
        clear_rows(my_k, call.length_k - call.first_key - my_key)
        clear_rows(my_v, call.length_k - call.first_key - my_key)
    for member in range(group):
        head = call.head_k * group + member
        slope = None
        if call.alibi_ptr is not None:
            slope = gl.load(call.alibi_ptr + call.sequence * call.heads + head)
        for block in range(call.low, call.high):
            edge = False
            if call.RAGGED or call.window_left is not None or call.right_reach is not None:
                edge = (block < call.full_low) | (block >= call.full_high)
            call.terms.wait(step)
            terms = call.terms.tile(step)
            # The products start from what is to be taken off them: exp2(S * scale - lse) and dP - delta.
            minus_lse = spread(terms.slice(0, call.BLOCK_M).load(of_queries), zeros)
            minus_delta = spread(terms.slice(call.BLOCK_M, call.BLOCK_M).load(of_queries), zeros)
            call.queries.wait(step)
            only = anew(0)
            my_k = matrix(call.k_tiles.index(only)).slice(my_key, KEYS, dim=0)
            my_v = matrix(call.v_tiles.index(only)).slice(my_key, KEYS, dim=0)
            s = warpgroup_mma(my_k, transposed(call.queries, step), minus_lse, is_async=True)
            call.grads.wait(step)
            dp = warpgroup_mma(my_v, transposed(call.grads, step), minus_delta, is_async=True)
            s, dp = warpgroup_mma_wait(0, deps=(s, dp))
            p, ds = softmax_gradient(
                s, dp, key, block * call.BLOCK_M + column, shift, call.length_k, slope, call.scale,
                call.window_left, call.right_reach, edge,
            )  # fmt: skip
            narrow_p = gl.convert_layout(p.to(dtype), p_layout)
            narrow_ds = ds.to(dtype)
            call.scores.acquire(step)
            call.scores.tile(step).slice(my_key, KEYS, dim=0).store(narrow_ds)
            fence_async_shared()
            call.scores.publish(step)
            dv = warpgroup_mma(narrow_p, matrix(call.grads.tile(step)), dv, is_async=True)
            dk = warpgroup_mma(
                gl.convert_layout(narrow_ds, ds_layout), matrix(call.queries.tile(step)), dk, is_async=True
            )
            # dQ comes a step late, so that neither warpgroup waits for the other's dS.
            if step > 0:
                call.scores.wait(step - 1)
            dq = query_gradient(call, WARPGROUP, step + 1, zeros_dq)
            dv, dk = warpgroup_mma_wait(1, deps=(dv, dk))
            call.queries.release(step)
            dq = warpgroup_mma_wait(0, deps=(dq,))
            if step > 0:
                add_query_gradient(call, WARPGROUP, step - 1, dq, last_head, last_row)
            last_head = head
            last_row = call.start_q + block * call.BLOCK_M
            step += 1
    if step > 0:
        call.scores.wait(step - 1)
        dq = query_gradient(call, WARPGROUP, step - 1, zeros_dq)
        dq = warpgroup_mma_wait(0, deps=(dq,))
        add_query_gradient(call, WARPGROUP, step - 1, dq, last_head, last_row)
    store_gradient(call.dk_desc, call.dk_ptr, call, my_key, (dk * call.scale).to(dtype), call.k_tiles, step,
                   call.HEAD_DIM)  # fmt: skip
    store_gradient(call.dv_desc, call.dv_ptr, call, my_key, dv.to(dtype), call.v_tiles, step, call.HEAD_DIM_V)
    tma.store_wait(0)


@gluon.jit
def query_gradient(call, WARPGROUP: gl.constexpr, step, zeros):
    """Consumer: start a warpgroup's part of dQ = dS K: 64 rows where there are 64 for each, else half the columns."""
    COLUMNS: gl.constexpr = call.dq_desc.block_type.shape[3]
    ds = transposed(call.scores, step)
    k = matrix(call.k_tiles.index(anew(0)))
    if call.BLOCK_M == 128:
        ds = ds.slice(WARPGROUP * 64, 64, dim=0)
    else:
        k = k.slice(WARPGROUP * COLUMNS, COLUMNS, dim=1)
    return warpgroup_mma(ds, k, zeros, use_acc=False, is_async=True)


@gluon.jit
def add_query_gradient(call, WARPGROUP: gl.constexpr, step, dq, head, first_row):
    """Consumer: have TMA add a part of dQ to what other key tiles gave."""
    COLUMNS: gl.constexpr = call.dq_desc.block_type.shape[3]
    call.scores.release(step)
    tile = call.dq_tiles.index(WARPGROUP)
    tma.store_wait(0)
    matrix(tile).store(dq)
    fence_async_shared()
    if call.BLOCK_M == 128:
        reduce_out(call.dq_desc, [call.plane, head, first_row + WARPGROUP * 64, 0], tile)
    else:
        reduce_out(call.dq_desc, [call.plane, head, first_row, WARPGROUP * COLUMNS], tile)


@gluon.jit
def store_gradient(desc, ptr, call, my_key: gl.constexpr, gradient, tiles, step, HEAD_DIM: gl.constexpr):
    """Write 64 rows of dK or dV: by TMA through the key tile's shared memory, or row by row in packed sequences."""
    first = call.first_key + my_key
    if call.VARLEN:
        count = call.length_k - first
        store_rows(ptr, call.start_k + first, count, call.heads_kv, call.head_k, gradient, HEAD_DIM)
    else:
        # Both warpgroups have read the tile for dQ once they have released the last step's scores.
        call.scores.acquire(step + 1)
        tile = tiles.index(0)
        matrix(tile).slice(my_key, KEYS, dim=0).store(gradient)
        fence_async_shared()
        copy_out(desc, [call.plane, call.head_k, first, 0], tile.slice(my_key, KEYS, dim=2))


@gluon.jit(do_not_specialize=SIZES)
def attention_backward(
    q_desc,  # (B, Hq, Sq, D), packed sequences (1, Hq, total_q, D)
    k_desc,  # (B, Hk, Sk, D), packed (1, Hk, total_k, D)
    v_desc,  # as k, with Dv
    grad_out_desc,  # as q, with Dv
    dq_desc,  # as q, fp32, zeros: sums without the scale
    dk_desc,  # as k, in tiles of 64 keys
    dv_desc,  # as v, in tiles of 64 keys
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
    window_left,
    right_reach,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    RAGGED: gl.constexpr,  # the last key tile may be cut
):
    VARLEN: gl.constexpr = cu_seqlens_q_ptr is not None
    UNCLEAN: gl.constexpr = VARLEN or kv_lens_ptr is not None
    # With a causal bound the first keys are seen by most queries: the longest programs come first.
    # Those of one head are neighbours, and read the same queries from L2.
    program = gl.program_id(0)
    blocks_n = gl.cdiv(seqlen_k, BLOCK_N)
    first_key = program % blocks_n * BLOCK_N
    head_k = program // blocks_n % heads_kv
    sequence = program // blocks_n // heads_kv
    start_q, length_q, start_k, length_k, plane, rows = place_of(
        sequence, cu_seqlens_q_ptr, cu_seqlens_k_ptr, kv_lens_ptr, seqlen_q, seqlen_k, total_q, total_k
    )
    if VARLEN:
        if first_key >= length_k:
            return
    low, full_low, full_high, high = query_blocks(
        first_key, length_q, length_k, window_left, right_reach, BLOCK_M, BLOCK_N
    )

    queries = make_ring(stages_for(q_desc, STAGES), STAGES, 1, 2)
    grads = make_companion(queries, stages_for(grad_out_desc, STAGES), 1)
    terms_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    terms = make_companion(queries, gl.allocate_shared_memory(gl.float32, [STAGES, 2 * BLOCK_M], terms_layout), 1)
    scores_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_M], q_desc.dtype)
    scores = make_ring(gl.allocate_shared_memory(q_desc.dtype, [2, BLOCK_N, BLOCK_M], scores_layout), 2, 2, 2)
    loaded = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(loaded, count=1)
    k_tiles = stages_for(k_desc, 1)
    v_tiles = stages_for(v_desc, 1)
    dq_tiles = stages_for(dq_desc, 2)
    fence_async_shared()
    call = Call(
        q_desc, k_desc, v_desc, grad_out_desc, dq_desc, dk_desc, dv_desc, dk_ptr, dv_ptr, row_lse_ptr, delta_ptr,
        alibi_ptr, scale, window_left, right_reach, heads, heads_kv, rows, sequence, plane, head_k, first_key,
        start_q, start_k, length_q, length_k, low, full_low, full_high, high, queries, grads, terms, scores,
        k_tiles, v_tiles, dq_tiles, loaded, HEAD_DIM, HEAD_DIM_V, BLOCK_M, VARLEN, UNCLEAN, RAGGED,
    )  # fmt: skip
    gl.warp_specialize([(accumulate, (0, call)), (accumulate, (1, call)), (load_tiles, (call,))], [4, 1], [240, 24])
