"""Which tiles the Hopper forward takes, and what its roles tell each other about them.

The producer hands a tile's record to the consumers, and they give it back with a verdict: where the maxima of its first
key block did not serve all of it (`hopper_softmax.steady_softmax`), the producer, who still has the record's fields,
hands it out once more, and it is taken with running maxima.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from regard.kernels import hopper_tuning
from regard.kernels.hopper_pipeline import read_field, seek_sequences, sequence_bounds, sequence_of
from regard.kernels.scores import GROWTH

ROWS = gl.constexpr(hopper_tuning.ROWS)
RECORD = gl.constexpr(16)  # integers in a tile's record, a power of two, see `read_record`
EXACT = gl.constexpr(8)  # the field beyond these that says that the tile comes again
VERDICTS = gl.constexpr(2)  # the first of the verdicts' stages, beyond those of the records


@gluon.jit
def key_blocks(first, last, length_q, length_k, window_left, right_reach, BLOCK_N: gl.constexpr):
    """Key blocks [low, high) that queries first..last see, and those of them, [full_low, full_high), that all see.

    There is always one block, so that every tile takes the same path; where nothing is visible it is masked whole.
    """
    shift = length_k - length_q
    stop = length_k
    full_stop = length_k
    if right_reach is not None:
        stop = gl.maximum(gl.minimum(length_k, last + shift + right_reach), 0)
        full_stop = gl.maximum(gl.minimum(length_k, first + shift + right_reach), 0)
    low = 0 * length_k
    full_low = 0 * length_k
    if window_left is not None:
        low = gl.maximum(first + shift - window_left, 0) // BLOCK_N
        full_low = gl.cdiv(gl.maximum(last + shift - window_left, 0), BLOCK_N)
    high = gl.maximum(gl.cdiv(stop, BLOCK_N), low + 1)
    full_high = gl.maximum(gl.minimum(full_stop // BLOCK_N, high), low)
    full_low = gl.minimum(full_low, full_high)
    return low, full_low, full_high, high


@gluon.jit
def split_blocks(split, splits, low, high):
    """Of key blocks [low, high), those of a split: all have as many, give or take one."""
    least = (high - low) // splits
    more = (high - low) % splits  # splits with one more
    start = low + split * least + gl.minimum(split, more)
    return start, low + (split + 1) * least + gl.minimum(split + 1, more)


@gluon.jit
def within_split(my_low, full_high, my_high, first, length_q, low):
    """Consumer: of the blocks that a warpgroup's rows see, those that start no earlier than the split does, and where
    those end that all rows see. There is one at least: for a warpgroup too that sees none, or has no rows and no need.
    """
    my_high = gl.maximum(my_high, low + 1)
    if first >= length_q:
        my_high = low + 1
    my_low = gl.minimum(gl.maximum(my_low, low), my_high - 1)
    return my_low, gl.maximum(full_high, my_low), my_high


@gluon.jit
def locate_tile(call, index, among, before, ends):
    """Producer: a tile's sequence, head, first query and split; first row and length of its queries and of its keys.

    ``among``, ``before``, ``ends``: of packed sequences, see `seek_sequences`.
    """
    blocks_m = gl.cdiv(call.seqlen_q, call.BLOCK_M // call.PACK)
    split = 0 * index
    start_q = 0 * index
    start_k = 0 * index
    length_q = call.seqlen_q + start_q
    length_k = call.seqlen_k + start_k
    if call.cu_seqlens_q_ptr is not None:
        sequence, within = sequence_of(index, among, before, ends)
        start_q, length_q = sequence_bounds(call.cu_seqlens_q_ptr, sequence, call.seqlen_q, call.total_q, None)
        start_k, length_k = sequence_bounds(call.cu_seqlens_k_ptr, sequence, call.seqlen_k, call.total_k, None)
        head = within % call.heads
        block_m = within // call.heads
        blocks_m = gl.cdiv(length_q, call.BLOCK_M // call.PACK)
    else:
        place = index
        if call.splits is not None:
            place = index // call.splits
            split = index % call.splits
        # Sections of heads; inside, one block of every head in turn.
        first_head = place // (call.section * blocks_m) * call.section
        heads_here = gl.minimum(call.section, call.batch * call.heads - first_head)
        within = place - first_head * blocks_m
        block_m = within // heads_here
        sequence = (first_head + within % heads_here) // call.heads
        head = (first_head + within % heads_here) % call.heads
    if call.kv_lens_ptr is not None:
        length_k = gl.minimum(gl.maximum(gl.load(call.kv_lens_ptr + sequence), 0), call.seqlen_k)
    if call.right_reach is not None:
        block_m = blocks_m - 1 - block_m  # the longest rows first
    return sequence, head, block_m * (call.BLOCK_M // call.PACK), split, start_q, length_q, start_k, length_k


@gluon.jit
def next_tile(call, index, among, before, ends):
    """Producer: what `read_record` tells of a tile, and the first row of its sequence's queries and keys."""
    sequence, head, first, split, start_q, length_q, start_k, length_k = locate_tile(call, index, among, before, ends)
    last = gl.minimum(first + call.BLOCK_M // call.PACK, length_q) - 1
    low, _full_low, _full_high, high = key_blocks(
        first, last, length_q, length_k, call.window_left, call.right_reach, call.BLOCK_N
    )
    start_out = start_q
    if call.splits is not None:
        start_out = (split * call.batch + sequence) * call.seqlen_q
        low, high = split_blocks(split, call.splits, low, high)
        if low == high:
            # As if there were no keys: one block, which is masked whole.
            low = 0 * low
            high = low + 1
            length_k = 0 * length_k
    return high, low, first, head, sequence, start_out, length_q, length_k, start_q, start_k


@gluon.jit
def seek_queries(call, index, among, before, ends):
    """Producer: where a tile's sequence is to be found, see `seek_sequences`."""
    return seek_sequences(
        index, among, before, ends, call.cu_seqlens_q_ptr, call.batch, call.seqlen_q, call.total_q, call.heads,
        call.BLOCK_M // call.PACK,
    )  # fmt: skip


@gluon.jit
def read_record(records, tile, WARPS: gl.constexpr = 4):
    """Consumer: high, low, first, head, sequence, start_out, length_q and length_k of a tile. Its results' first row is
    ``start_out + first`` where they are packed.
    """
    high = read_field(records, tile, 0, WARPS)
    low = read_field(records, tile, 1, WARPS)
    first = read_field(records, tile, 2, WARPS)
    head = read_field(records, tile, 3, WARPS)
    sequence = read_field(records, tile, 4, WARPS)
    start_out = read_field(records, tile, 5, WARPS)
    length_q = read_field(records, tile, 6, WARPS)
    length_k = read_field(records, tile, 7, WARPS)
    return high, low, first, head, sequence, start_out, length_q, length_k


@gluon.jit
def give_verdict(WARPGROUP: gl.constexpr, call, tile, row_sum):
    """Consumer: fail a tile whose sums grew too far for the maxima of its first block, or are NaN: but not twice."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    failed = gl.max(gl.where(row_sum < GROWTH, 0, 1), 0) * (1 - read_field(call.records, tile, EXACT))
    verdict = call.records.tiles.index(VERDICTS + tile % 2).slice(WARPGROUP, 1)
    verdict.store(gl.full([1], 0, gl.int32, layout=layout) + failed)


@gluon.jit
def failed_tile(call, tile, settle):
    """Producer: whether a tile must be taken again, 1 or 0, and the number under which its record still lies there.

    It is one whose record makes room for that of ``tile``; or, to ``settle`` all after the last, the one after it.
    """
    failed = gl.to_tensor(0)
    number = tile + 0
    if call.STEADY:
        failed = take_verdict(call, tile)
        if settle & (failed == 0):
            number = tile + 1
            failed = take_verdict(call, number)
    return failed, number


@gluon.jit
def take_verdict(call, tile):
    """Producer: once the consumers gave the stage of a record back, whether one of them failed its tile."""
    WARPGROUPS: gl.constexpr = call.BLOCK_M // ROWS
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    call.records.acquire(tile)
    failed = gl.to_tensor(0)
    for warpgroup in gl.static_range(WARPGROUPS):
        verdict = call.records.tiles.index(VERDICTS + tile % 2).slice(warpgroup, 1)
        failed = gl.maximum(failed, gl.max(verdict.load(layout), 0))
        verdict.store(gl.zeros([1], gl.int32, layout=layout))
    return failed
