"""Sums of many programs in a fixed order, so that they come out the same in every run.

dQ of a block of queries is summed over the key tiles that see it, one program each. With `deterministic` they take
turns, last keys first (the order of FlashAttention-3's deterministic backward): a semaphore for each head and block of
queries counts the tiles that have added theirs, and each waits until the count is its turn.

No program waits forever. Programs are numbered by a ticket that they draw as they start, so a smaller number has
started; by `nth_program` all tiles of a head with later keys have smaller numbers; and by `turn_of` a program waits for
such tiles alone, all of which see the block (see there). So the smallest number that has not ended waits for nobody,
however few programs the device holds at a time, and ends.

With a causal mask the tiles of a head start at blocks of their own, where they are the first, and each is a block
ahead of the next from then on: nobody waits. Without one they start at the same block and fall in step once.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def nth_program(ticket, tiles, heads, section):
    """Key tile and head (of all sequences' key/value heads) of a ticket: last tiles first, of a section of heads each.

    The heads of a section share L2, and side by side they leave each other time to add.
    """
    first_head = ticket // (tiles * section) * section
    width = gl.minimum(section, heads - first_head)
    place = ticket - first_head * tiles
    return tiles - 1 - place // width, first_head + place % width


@gluon.jit
def turn_of(first_key, block, length_q, length_k, right_reach, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """How many key tiles add to a block of queries before the one that starts at first_key, which sees it.

    `query_blocks` gives a tile blocks from ``low``, where a query sees the tile's first key, to ``high``, and neither
    bound falls from one tile to the next. So the tiles that see a block follow each other, from the one with the last
    key that its last query sees, downwards.
    """
    last_key = length_k - 1
    if right_reach is not None:
        last_query = (block + 1) * BLOCK_M - 1
        last_key -= gl.maximum(length_q - last_query - right_reach, 0)
    return (last_key - first_key) // BLOCK_N


@gluon.jit
def await_turn(semaphore, turn):
    """Wait until so many have had their turn; what TMA writes from here on comes after what they wrote.

    For a single warp, all of whose threads ask.
    """
    gl.inline_asm_elementwise(
        """{
        .reg .pred early;
        ask:
        ld.acquire.gpu.global.s32 $0, [$1];
        setp.lt.s32 early, $0, $2;
        @early bra ask;
        fence.proxy.async.global;
        }""",
        "=&r,l,r", [semaphore, turn], gl.int32, False, 1,
    )  # fmt: skip


@gluon.jit
def pass_turn(semaphore, turn):
    """Let the next one have its turn, once what TMA wrote for this warp has arrived (not: has only been read)."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred first;
        .reg .b32 lane;
        cp.async.bulk.wait_group 0;
        bar.warp.sync -1;
        mov.u32 lane, %laneid;
        setp.eq.u32 first, lane, 0;
        @first st.release.gpu.global.s32 [$1], $2;
        mov.b32 $0, $2;
        }""",
        "=r,l,r", [semaphore, turn + 1], gl.int32, False, 1,
    )  # fmt: skip
