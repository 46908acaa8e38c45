"""What compute-sanitizer's racecheck says of hand-overs between warp groups that are right: for an H100 or H200.

    compute-sanitizer --tool racecheck python tests/arch/racecheck_limits.py empty
    compute-sanitizer --tool racecheck python tests/arch/racecheck_limits.py one-warp
    compute-sanitizer --tool racecheck python tests/arch/racecheck_limits.py four-warps

``empty`` starts warp groups that do nothing: racecheck names the words by which Triton starts them, as it does in every
kernel with warp groups. In the others a producer hands a tile of 64 numbers, written by plain stores, to two consumers,
64 times, through an mbarrier on which one of its threads arrives once all have stored. With four warps ``bar.sync`` sees
to that, and the tile is not named. With one warp ``bar.warp.sync`` does, which ptxas leaves out where it knows that the
warp has not parted: the order of the stores holds, but racecheck, which reads what ptxas wrote, names the tile.
"""

import sys

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

STEPS = gl.constexpr(64)
SIZE = gl.constexpr(64)
PROGRAMS = 24


@gluon.jit
def consume(stages, full, empty, out_ptr, TILES: gl.constexpr, GROUP: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    column = gl.arange(0, SIZE, layout=layout)
    total = gl.zeros([SIZE], gl.float32, layout=layout)
    for step in range(TILES):
        mbarrier.wait(full.index(step % 2), (step // 2) & 1)
        total += stages.index(step % 2).load(layout)
        mbarrier.arrive(empty.index(step % 2))
    gl.store(out_ptr + (gl.program_id(0) * 2 + GROUP) * SIZE + column, total)


@gluon.jit
def produce(stages, full, empty, in_ptr, TILES: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    column = gl.arange(0, SIZE, layout=layout)
    for step in range(TILES):
        mbarrier.wait(empty.index(step % 2), ((step // 2) & 1) ^ 1)
        stages.index(step % 2).store(gl.load(in_ptr + step * SIZE + column))
        mbarrier.arrive(full.index(step % 2))


@gluon.jit
def hand_over(in_ptr, out_ptr, TILES: gl.constexpr, PRODUCER_WARPS: gl.constexpr):
    stages = gl.allocate_shared_memory(gl.float32, [2, SIZE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(2):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume, (stages, full, empty, out_ptr, TILES, 0)),
            (consume, (stages, full, empty, out_ptr, TILES, 1)),
            (produce, (stages, full, empty, in_ptr, TILES)),
        ],
        [4, PRODUCER_WARPS],
        [128, 24],
    )


CASES = {"empty": (0, 1), "one-warp": (STEPS.value, 1), "four-warps": (STEPS.value, 4)}

if __name__ == "__main__":
    tiles, producer_warps = CASES[sys.argv[1]]
    values = torch.randn(STEPS.value, SIZE.value, device="cuda")
    totals = torch.empty(PROGRAMS, 2, SIZE.value, device="cuda")
    hand_over[(PROGRAMS,)](values, totals, tiles, producer_warps, num_warps=4, maxnreg=128)
    torch.testing.assert_close(totals, values[:tiles].sum(0).expand_as(totals))
