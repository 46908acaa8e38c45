"""The Hopper flash-attention forward in Gluon: TMA, mbarriers, wgmma and warp specialization.

Shah et al. 2024, "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision", algorithm 2: a
producer warp streams key and value tiles through shared memory; each consumer warpgroup keeps 64 rows of queries and
overlaps the softmax of one key tile with the product of the last tile's weights and values. Programs are persistent:
the producer fetches the next query tile from a counter in global memory, longest tiles first, and hands its record to
the consumers through shared memory. A feature whose pointer or bound is None is absent from the compiled kernel.

Where there are too few tiles for the device, each is taken in splits: parts of its key blocks, whose results
`regard.kernels.merge` weighs (Dao, Haziza, Massa and Sizov 2023, "Flash-Decoding for long-context inference"). They are
written as packed sequences are, those of the second split after those of the first.
"""

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
    claim_tile,
    clear_rows,
    copy_out,
    leave_counters,
    make_companion,
    make_ring,
    matrix,
    no_sequences,
    optional,
    read_field,
    record,
    stages_for,
    transposed,
    write_record,
)
from regard.kernels.hopper_softmax import (
    LOG2_E,
    LOWEST,
    biased_scores,
    finish_softmax,
    online_softmax,
    rescale,
    steady_softmax,
)
from regard.kernels.hopper_tiles import (
    EXACT,
    RECORD,
    ROWS,
    VERDICTS,
    failed_tile,
    give_verdict,
    key_blocks,
    next_tile,
    read_record,
    seek_queries,
    within_split,
)


@record
class Call:
    """What both roles know: the arguments of `attention_forward`, and the shared memory they meet in."""

    q_desc: tma.tensor_descriptor
    k_desc: tma.tensor_descriptor
    v_desc: tma.tensor_descriptor
    out_desc: tma.tensor_descriptor
    out_ptr: gl.tensor
    lse_ptr: gl.tensor
    counter_ptr: gl.tensor
    cu_seqlens_q_ptr: optional
    cu_seqlens_k_ptr: optional
    kv_lens_ptr: optional
    alibi_ptr: optional
    sinks_ptr: optional
    batch: optional
    heads: optional
    group: optional
    seqlen_q: optional
    seqlen_k: optional
    total_q: optional
    total_k: optional
    section: optional
    splits: optional
    scale: gl.tensor
    softcap: optional
    window_left: optional
    right_reach: optional
    queries: Ring
    keys: Ring
    values: Ring
    records: Ring
    out_tiles: gl.shared_memory_descriptor
    clean: Ring
    HEAD_DIM_V: gl.constexpr
    BLOCK_M: gl.constexpr
    BLOCK_N: gl.constexpr
    PACK: gl.constexpr
    RAGGED: gl.constexpr
    ONE_CUT: gl.constexpr
    SHARE_Q: gl.constexpr
    HOLD_Q: gl.constexpr
    TAKE_TURNS: gl.constexpr
    PASS_EARLY: gl.constexpr
    ONE_LOOP: gl.constexpr
    RESCALE_EARLY: gl.constexpr
    VOTE: gl.constexpr
    STEADY: gl.constexpr


@gluon.jit
def load_tiles(call):
    """Producer: fetch tiles until there are none left, and stream what each needs through the rings."""
    WARPGROUPS: gl.constexpr = call.BLOCK_M // ROWS
    POSITIONS: gl.constexpr = call.BLOCK_M // call.PACK
    total = call.batch * call.heads * gl.cdiv(call.seqlen_q, POSITIONS)
    if call.splits is not None:
        total *= call.splits
    index = gl.program_id(0)
    among, before, ends = no_sequences()
    if call.cu_seqlens_q_ptr is not None:
        among, before, ends, total = seek_queries(call, index, among, before, ends)
    tile = 0
    step = 0
    failed, number = failed_tile(call, tile, index >= total)
    while (index < total) | (failed != 0):
        if failed != 0:
            start_q = 0 * index
            start_k = 0 * index
            high, low, first, head, sequence, start_out, length_q, length_k = read_record(call.records, number, 1)
        else:
            high, low, first, head, sequence, start_out, length_q, length_k, start_q, start_k = next_tile(
                call, index, among, before, ends
            )
        # In the order in which `read_record` tells them. A first field of 0 says that there are no more tiles.
        fields = (high, low, first, head, sequence, start_out, length_q, length_k, failed)
        write_record(call.records, tile, fields)

        plane = sequence
        if call.cu_seqlens_q_ptr is not None:
            plane = 0
        for block in range(high - low):
            row = start_k + (high - 1 - block) * call.BLOCK_N
            call.keys.copy(step, call.k_desc, [plane, head // call.group, row, 0])
            if block == 0:
                for warpgroup in gl.static_range(WARPGROUPS):
                    position = start_q + first + warpgroup * (ROWS // call.PACK)
                    call.queries.copy(tile * WARPGROUPS + warpgroup, call.q_desc, [plane, head, position, 0, 0])
            if (block == high - low - 1) & (failed == 0):
                # Not earlier, for the tile would wait behind this one; and not later, for the counter answers while the
                # last values wait for their stage.
                index = claim_tile(call.counter_ptr)
            call.values.copy(step, call.v_desc, [plane, head // call.group, row, 0])
            step += 1
        if call.cu_seqlens_q_ptr is not None:
            among, before, ends, total = seek_queries(call, index, among, before, ends)
        tile += 1
        failed, number = failed_tile(call, tile, index >= total)
    write_record(call.records, tile, (0, 0))
    leave_counters(call.counter_ptr)


@gluon.jit
def skip_blocks(call, step, count, WARPGROUP: gl.constexpr):
    """Consumer: let blocks pass that other warpgroups' rows see and this one's do not."""
    for _ in range(count):
        call.keys.wait(step)
        if call.TAKE_TURNS:
            await_turn(WARPGROUP)
            pass_turn(WARPGROUP, call.BLOCK_M // ROWS)
        call.keys.release(step)
        call.values.wait(step)
        call.values.release(step)
        step += 1
    return step


@gluon.constexpr_function
def _turn_assembly(ACTION, WARPGROUP):
    """On the hardware barrier at which a warpgroup meets the one before it; Triton's own have lower numbers."""
    return f"bar.{ACTION} {8 + WARPGROUP}, 256; mov.b32 $0, $1;"


@gluon.jit
def await_turn(WARPGROUP: gl.constexpr):
    """Consumer: wait until the warpgroup before this one has its products of the step under way."""
    ASSEMBLY: gl.constexpr = _turn_assembly("sync", WARPGROUP)
    gl.inline_asm_elementwise(ASSEMBLY, "=r,r", [gl.to_tensor(0)], gl.int32, False, 1)


@gluon.jit
def pass_turn(WARPGROUP: gl.constexpr, WARPGROUPS: gl.constexpr):
    """Consumer: let the next warpgroup have the tensor cores while this one turns to its softmax."""
    ASSEMBLY: gl.constexpr = _turn_assembly("arrive", (WARPGROUP + 1) % WARPGROUPS)
    gl.inline_asm_elementwise(ASSEMBLY, "=r,r", [gl.to_tensor(0)], gl.int32, False, 1)


@gluon.jit
def await_stores():
    """Consumer: wait until what it wrote is in memory, so that the tile may be written once more."""
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; mov.b32 $0, $1;", "=r,r", [gl.to_tensor(0)], gl.int32, False, 1
    )


@gluon.jit
def at_edge(block, full_low, full_high, LEFT: gl.constexpr):
    """Whether some row of the warpgroup does not see all of a block."""
    edge = block >= full_high
    if LEFT:
        edge = edge | (block < full_low)
    return edge


@gluon.jit
def weigh_keys(s, row_max, row_sum, column, first_key, stop, start, diagonal, edge, call, slope, MASKED: gl.constexpr):
    """From raw products of a tile to softmax weights. ``start``, ``stop``: the keys each row sees; looked at where
    MASKED, in blocks at the ``edge`` of the band or of the sequence.
    """
    factor = call.scale * LOG2_E
    if call.softcap is not None or slope is not None:
        factor = 1.0
        s = biased_scores(s, (diagonal - first_key)[:, None] - column[None, :], call.scale, call.softcap, slope)
    if MASKED:
        if edge:
            visible = column[None, :] < (stop - first_key)[:, None]
            if call.window_left is not None:
                visible = visible & (column[None, :] >= (start - first_key)[:, None])
            s = gl.where(visible, s, float("-inf"))
    return online_softmax(s, row_max, row_sum, factor, call.VOTE)


@gluon.jit
def attend_block(
    WARPGROUP: gl.constexpr, call, q, p, acc, decay, row_max, row_sum, column, first_key, stop, start, diagonal, slope,
    step, edge, MASKED: gl.constexpr, STEADY: gl.constexpr,
):  # fmt: skip
    """Consumer: softmax weights of one key block, beside the product of the last block's weights ``p`` and values."""
    WARPGROUPS: gl.constexpr = call.BLOCK_M // ROWS
    s_layout: gl.constexpr = column.type.layout.parent
    of_rows: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    zeros = gl.zeros([ROWS, call.BLOCK_N], gl.float32, layout=s_layout)
    call.keys.wait(step)
    if call.TAKE_TURNS:
        await_turn(WARPGROUP)
    s = warpgroup_mma(q, transposed(call.keys, step), zeros, use_acc=False, is_async=True)
    call.values.wait(step - 1)
    if call.RESCALE_EARLY and not STEADY:
        acc = rescale(acc, gl.convert_layout(decay, of_rows))
    acc = warpgroup_mma(p, matrix(call.values.tile(step - 1)), acc, is_async=True)
    if call.TAKE_TURNS and call.PASS_EARLY:
        pass_turn(WARPGROUP, WARPGROUPS)
    s = warpgroup_mma_wait(1, deps=(s,))
    if call.TAKE_TURNS and not call.PASS_EARLY:
        pass_turn(WARPGROUP, WARPGROUPS)
    call.keys.release(step)
    if STEADY:
        weights, row_sum = steady_softmax(s, row_max, row_sum, call.scale * LOG2_E)
    else:
        weights, decay, row_max, row_sum = weigh_keys(
            s, row_max, row_sum, column, first_key, stop, start, diagonal, edge, call, slope, MASKED
        )
    acc = warpgroup_mma_wait(0, deps=(acc,))
    call.values.release(step - 1)
    if not call.RESCALE_EARLY and not STEADY:
        acc = rescale(acc, gl.convert_layout(decay, of_rows))
    return weights, acc, decay, row_max, row_sum


@gluon.jit
def finish_tile(WARPGROUP: gl.constexpr, call, tile, step, p, acc, decay, row_max, row_sum, row, STEADY: gl.constexpr):
    """Consumer: the last block's product, and out and lse of 64 query rows. Returns the tile's first key block."""
    PACKED: gl.constexpr = call.cu_seqlens_q_ptr is not None or call.splits is not None
    of_rows: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    out_tile = call.out_tiles.index(WARPGROUP)
    call.values.wait(step)
    if call.RESCALE_EARLY and not STEADY:
        acc = rescale(acc, gl.convert_layout(decay, of_rows))
    acc = warpgroup_mma(p, matrix(call.values.tile(step)), acc, is_async=True)

    _high, low, first, head, sequence, start_out, length_q, _length_k = read_record(call.records, tile)
    if STEADY:
        give_verdict(WARPGROUP, call, tile, row_sum)
    call.records.release(tile)
    first += WARPGROUP * (ROWS // call.PACK)
    position = first + row // call.PACK
    q_head = head * call.PACK + row % call.PACK
    inverse, lse = finish_softmax(row_max, row_sum, call.sinks_ptr, q_head)
    lse_row = (sequence * (call.heads * call.PACK) + q_head).to(gl.int64) * call.seqlen_q + position
    if PACKED:
        lse_row = q_head.to(gl.int64) * call.total_q + start_out + position
    gl.store(call.lse_ptr + lse_row, lse, mask=position < length_q)

    acc = warpgroup_mma_wait(0, deps=(acc,))
    call.values.release(step)
    out = acc * gl.convert_layout(inverse, of_rows)[:, None]
    if call.splits is None:
        out = out.to(p.dtype)
    if PACKED:
        store_packed_rows(call, out, head, start_out + first, length_q - first)
    else:
        tma.store_wait(0)
        matrix(out_tile).store(out)
        fence_async_shared()
        copy_out(call.out_desc, [sequence, head, first, 0, 0], out_tile)
    if call.SHARE_Q:
        tma.store_wait(0)
        call.queries.release(tile * (call.BLOCK_M // ROWS) + WARPGROUP)
    return low


@gluon.jit
def attend_rest(
    WARPGROUP: gl.constexpr, call, tile, step, q, weights, decay, row_max, row_sum, row, column, rest, my_low, full_low,
    full_high, stop, start, diagonal, slope, STEADY: gl.constexpr,
):  # fmt: skip
    """Consumer: all key blocks of a tile but the first, and its results. Returns the next step and the tile's first
    block.
    """
    BLOCK_DV: gl.constexpr = call.v_desc.block_type.shape[3]
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    dtype: gl.constexpr = call.keys.tiles.dtype
    LEFT: gl.constexpr = call.window_left is not None
    EDGES: gl.constexpr = (LEFT or call.right_reach is not None) and not call.ONE_CUT
    acc = gl.zeros([ROWS, BLOCK_DV], gl.float32, layout=o_layout)
    p = gl.convert_layout(weights.to(dtype), p_layout)
    for part in gl.static_range(3):
        # Right edge, interior and left edge of the band: three loops over one body, masked at the edges only. Or,
        # where registers are short, one loop with the mask behind a branch: what passes from loop to loop in 16
        # bits takes a whole register a value, so that three loops narrow the weights late.
        if part == 1 or (EDGES and not call.ONE_LOOP and (call.right_reach is not None if part == 0 else LEFT)):
            bottom = my_low
            if not call.ONE_LOOP and part < 2:
                bottom = full_high if part == 0 else gl.maximum(full_low, my_low)
            while rest > bottom:
                rest -= 1
                if not call.ONE_LOOP:
                    p = gl.convert_layout(weights.to(dtype), p_layout)
                edge = part != 1
                if call.ONE_LOOP and EDGES:
                    edge = at_edge(rest, full_low, full_high, LEFT)
                weights, acc, decay, row_max, row_sum = attend_block(
                    WARPGROUP, call, q, p, acc, decay, row_max, row_sum, column, rest * call.BLOCK_N, stop, start,
                    diagonal, slope, step, edge, EDGES and (call.ONE_LOOP or part != 1), STEADY,
                )  # fmt: skip
                if call.ONE_LOOP:
                    p = gl.convert_layout(weights.to(dtype), p_layout)
                step += 1
    if not call.ONE_LOOP:
        p = gl.convert_layout(weights.to(dtype), p_layout)
    if not call.SHARE_Q and not call.HOLD_Q:
        call.queries.release(tile * (call.BLOCK_M // ROWS) + WARPGROUP)
    low = finish_tile(WARPGROUP, call, tile, step - 1, p, acc, decay, row_max, row_sum, row, STEADY)
    return step, low


@gluon.jit
def attend_queries(WARPGROUP: gl.constexpr, call):
    """Consumer: softmax and both products of 64 query rows, tile after tile."""
    WARPGROUPS: gl.constexpr = call.BLOCK_M // ROWS
    VARLEN: gl.constexpr = call.cu_seqlens_q_ptr is not None
    UNCLEAN: gl.constexpr = VARLEN or call.kv_lens_ptr is not None
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, call.BLOCK_N, 16])
    LEFT: gl.constexpr = call.window_left is not None
    BAND: gl.constexpr = call.window_left is not None or call.right_reach is not None

    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
    column = gl.arange(0, call.BLOCK_N, layout=gl.SliceLayout(0, s_layout))
    zeros = gl.zeros([ROWS, call.BLOCK_N], gl.float32, layout=s_layout)

    tile = 0
    step = 0
    if call.TAKE_TURNS and WARPGROUP == WARPGROUPS - 1:
        pass_turn(WARPGROUP, WARPGROUPS)  # the first is the first warpgroup's
    call.records.wait(tile)
    high, low, first, head, sequence, _start_out, length_q, length_k = read_record(call.records, tile)
    while high > 0:
        first += WARPGROUP * (ROWS // call.PACK)
        position = first + row // call.PACK
        q_head = head * call.PACK + row % call.PACK
        diagonal = position + (length_k - length_q)
        my_low, full_low, full_high, my_high = key_blocks(
            first, gl.minimum(first + ROWS // call.PACK, length_q) - 1, length_q, length_k, call.window_left,
            call.right_reach, call.BLOCK_N,
        )  # fmt: skip
        my_high = gl.minimum(my_high, high)
        if LEFT:
            my_low = gl.minimum(my_low, my_high - 1)
        if call.splits is not None:
            my_low, full_high, my_high = within_split(my_low, full_high, my_high, first, length_q, low)
        stop = length_k + 0 * position
        if call.right_reach is not None:
            stop = gl.minimum(stop, diagonal + call.right_reach)
        start = diagonal
        if call.window_left is not None:
            start = diagonal - call.window_left
        slope = None
        if call.alibi_ptr is not None:
            slope = gl.load(call.alibi_ptr + sequence * (call.heads * call.PACK) + q_head)

        row_max = gl.full([ROWS], LOWEST, gl.float32, layout=gl.SliceLayout(1, s_layout))
        row_sum = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, s_layout))

        if UNCLEAN:
            if WARPGROUP == 0:
                call.values.wait(step)
                clear_rows(matrix(call.values.tile(step)), length_k - (high - 1) * call.BLOCK_N)
                call.clean.publish(tile)
            call.clean.wait(tile)
        step = skip_blocks(call, step, high - my_high, WARPGROUP)

        # The first tile's scores have no product of weights and values to overlap with.
        call.queries.wait(tile * WARPGROUPS + WARPGROUP)
        q = matrix(call.queries.tile(tile * WARPGROUPS + WARPGROUP))
        if call.HOLD_Q:
            q = q.load(gl.DotOperandLayout(0, s_layout, 2))
            call.queries.release(tile * WARPGROUPS + WARPGROUP)
        call.keys.wait(step)
        if call.TAKE_TURNS:
            await_turn(WARPGROUP)
        s = warpgroup_mma(q, transposed(call.keys, step), zeros, use_acc=False, is_async=True)
        if call.TAKE_TURNS and call.PASS_EARLY:
            pass_turn(WARPGROUP, WARPGROUPS)
        s = warpgroup_mma_wait(0, deps=(s,))
        if call.TAKE_TURNS and not call.PASS_EARLY:
            pass_turn(WARPGROUP, WARPGROUPS)
        call.keys.release(step)
        rest = my_high - 1
        weights, decay, row_max, row_sum = weigh_keys(
            s, row_max, row_sum, column, rest * call.BLOCK_N, stop, start, diagonal, True, call, slope,
            BAND or call.RAGGED,
        )  # fmt: skip
        step += 1
        exact = 1
        if call.STEADY:
            exact = read_field(call.records, tile, EXACT)
        if call.STEADY and exact == 0:
            step, low = attend_rest(
                WARPGROUP, call, tile, step, q, weights, decay, row_max, row_sum, row, column, rest, my_low, full_low,
                full_high, stop, start, diagonal, slope, True,
            )  # fmt: skip
        else:
            if call.STEADY:
                await_stores()
            step, low = attend_rest(
                WARPGROUP, call, tile, step, q, weights, decay, row_max, row_sum, row, column, rest, my_low, full_low,
                full_high, stop, start, diagonal, slope, False,
            )  # fmt: skip
        if LEFT:
            step = skip_blocks(call, step, my_low - low, WARPGROUP)
        tile += 1
        call.records.wait(tile)
        high, low, first, head, sequence, _start_out, length_q, length_k = read_record(call.records, tile)
    if call.TAKE_TURNS and WARPGROUP == 0:
        await_turn(WARPGROUP)  # the one that was passed last
    tma.store_wait(0)


@gluon.jit
def store_packed_rows(call, out, head, first_row, count):
    """Write the rows of a tile that exist: TMA would write past the end of the sequence, into the next one."""
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, out.type.layout))
    dim = gl.arange(0, out.shape[1], layout=gl.SliceLayout(0, out.type.layout))
    heads = call.heads * call.PACK
    place = (first_row + row // call.PACK).to(gl.int64) * heads + head * call.PACK + row % call.PACK
    inside = (row // call.PACK < count)[:, None] & (dim < call.HEAD_DIM_V)[None, :]
    gl.store(call.out_ptr + place[:, None] * call.HEAD_DIM_V + dim[None, :], out, mask=inside)


@gluon.jit(do_not_specialize=(*SIZES, "splits"))
def attention_forward(
    q_desc,  # (B, Hq / PACK, Sq, PACK, D), packed sequences (1, Hq / PACK, total_q, PACK, D)
    k_desc,  # (B, Hk, Sk, D), packed (1, Hk, total_k, D)
    v_desc,  # as k, with Dv
    out_desc,  # as q, with Dv
    out_ptr,  # the same tensor, contiguous, for packed sequences; of splits (splits, B, Sq, Hq, Dv), fp32
    lse_ptr,  # (B, Hq, Sq), or (Hq, total_q), or of splits (Hq, splits, B, Sq); fp32
    counter_ptr,  # two zeros, and zeros again after the launch
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    kv_lens_ptr,
    alibi_ptr,  # (B, Hq) fp32
    sinks_ptr,  # (Hq,)
    batch,
    heads,  # Hq / PACK
    group,  # of these, per key/value head
    seqlen_q,
    seqlen_k,
    total_q,  # of splits: the rows of a head in lse
    total_k,
    section,  # heads whose keys and values share L2
    splits,
    scale,
    softcap,
    window_left,
    right_reach,
    HEAD_DIM_V: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    QUERY_STAGES: gl.constexpr,  # of each warpgroup
    KEY_STAGES: gl.constexpr,
    VALUE_STAGES: gl.constexpr,
    PACK: gl.constexpr,  # query heads of one key/value head that share a tile
    RAGGED: gl.constexpr,  # the last key block may be cut
    ONE_CUT: gl.constexpr,  # of the blocks that a warpgroup attends to, only the first may need a mask
    SHARE_Q: gl.constexpr,  # the output leaves through the queries' shared memory
    HOLD_Q: gl.constexpr,  # the queries stay in registers
    TAKE_TURNS: gl.constexpr,  # the warpgroups start their products one after the other
    PASS_EARLY: gl.constexpr,  # the turn: once the products are under way, and not once the scores are there
    ONE_LOOP: gl.constexpr,  # see `attend_rest`
    RESCALE_EARLY: gl.constexpr,  # the sums, beside the next scores' product and not after their own
    VOTE: gl.constexpr,  # see `online_softmax`
    STEADY: gl.constexpr,  # see `steady_softmax`; with ONE_CUT and ONE_LOOP, and no packed sequences
):
    WARPGROUPS: gl.constexpr = BLOCK_M // ROWS
    queries = make_ring(stages_for(q_desc, WARPGROUPS * QUERY_STAGES), WARPGROUPS * QUERY_STAGES, 1, 1)
    keys = make_ring(stages_for(k_desc, KEY_STAGES), KEY_STAGES, 1, WARPGROUPS)
    values = make_ring(stages_for(v_desc, VALUE_STAGES), VALUE_STAGES, 1, WARPGROUPS)
    record_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    # The stages of the records, and of the consumers' verdicts on their tiles.
    record_tiles = gl.allocate_shared_memory(gl.int32, [4 if STEADY else 2, RECORD], record_layout)
    records = make_ring(record_tiles, 2, 1, WARPGROUPS)
    clean = records
    if cu_seqlens_q_ptr is not None or kv_lens_ptr is not None:
        # Says that a tile's last values are cleared; who clears them may be a tile ahead of who waits for that.
        clean = make_companion(records, records.tiles, 1)
    if STEADY:
        innocent = gl.zeros([RECORD], gl.int32, layout=gl.BlockedLayout([1], [32], [4], [0]))
        for stage in gl.static_range(2):
            records.tiles.index(VERDICTS + stage).store(innocent)
    out_tiles = queries.tiles if SHARE_Q or splits is not None else stages_for(out_desc, WARPGROUPS)
    fence_async_shared()
    call = Call(
        q_desc, k_desc, v_desc, out_desc, out_ptr, lse_ptr, counter_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
        kv_lens_ptr, alibi_ptr, sinks_ptr, batch, heads, group, seqlen_q, seqlen_k, total_q, total_k, section, splits,
        scale, softcap, window_left, right_reach, queries, keys, values, records, out_tiles, clean,
        HEAD_DIM_V, BLOCK_M, BLOCK_N, PACK, RAGGED, ONE_CUT, SHARE_Q, HOLD_Q, TAKE_TURNS, PASS_EARLY, ONE_LOOP,
        RESCALE_EARLY, VOTE, STEADY,
    )  # fmt: skip
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [(attend_queries, (0, call)), (attend_queries, (1, call)), (load_tiles, (call,))], [4, 1], [240, 24]
        )
    else:
        gl.warp_specialize(
            [(attend_queries, (0, call)), (attend_queries, (1, call)), (attend_queries, (2, call)),
             (load_tiles, (call,))],
            [4, 4, 1], [160, 160, 24],
        )  # fmt: skip
