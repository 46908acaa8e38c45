"""The online softmax of the Hopper forward, on the rows that a warpgroup keeps in registers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from regard.kernels.scores import LN_2, LOG2_E

LOWEST = gl.constexpr(-3.0e38)  # maximum of a row that has seen no key yet: finite, so that inf - inf never occurs
SLACK = gl.constexpr(8.0)  # weights may come to 2**SLACK before the sums are rescaled


@gluon.jit
def biased_scores(s, distance, scale, softcap, slope):
    """Scores in units of log2 from raw products: scale, softcap, ALiBi."""
    s = s * scale
    if softcap is not None:
        s = softcap * (1.0 - 2.0 / (1.0 + gl.exp2(s * (2.0 * LOG2_E / softcap))))  # softcap * tanh(s / softcap)
    if slope is not None:
        s -= slope[:, None] * gl.abs(distance).to(gl.float32)
    return s * LOG2_E


_FOLLOW = gl.constexpr(
    "{ .reg .pred behind; "
    "setp.gt.f32 behind, $4, $8; "
    "setp.gt.or.f32 behind, $5, $9, behind; "
    "vote.sync.any.pred behind, behind, -1; "
    "mov.f32 $0, $6; mov.f32 $1, $7; mov.f32 $2, 0f3F800000; mov.f32 $3, 0f3F800000; "
    "@!behind bra done; "
    "setp.gt.f32 behind, $4, $8; selp.f32 $0, $4, $6, behind; "
    "setp.gt.f32 behind, $5, $9; selp.f32 $1, $5, $7, behind; "
    "sub.f32 $2, $6, $0; ex2.approx.ftz.f32 $2, $2; "
    "sub.f32 $3, $7, $1; ex2.approx.ftz.f32 $3, $3; "
    "done: }"
)


@gluon.jit
def follow_together(highest, row_max, limit):
    """The new maximum of each row, ``highest`` where that is above ``limit``, and the decay of what came before. A warp
    of whose rows none is above it works nothing out.
    """
    return gl.inline_asm_elementwise(
        _FOLLOW, "=&f,=&f,=&f,=&f,f,f,f,f,f,f", [highest, row_max, limit], (gl.float32, gl.float32), True, 2
    )


@gluon.jit
def online_softmax(s, row_max, row_sum, factor, VOTE: gl.constexpr):
    """One step of the online softmax: weights, the old state's decay, and the new state (maximum in log2 units).

    The maximum is a mere reference, which cancels in the end. It follows the scores only where they leave it far
    behind, so that nearly always the decay is 1 (the conditional rescaling of FlashAttention-4).

    VOTE: warp by warp. What that saves is little; but ptxas puts the wait for the last product of weights and values no
    earlier than its branch, so that the product runs beside the maxima. Otherwise it may put the wait before them.
    """
    highest = gl.max(s, 1) * factor
    limit = row_max + SLACK
    if VOTE:
        new_max, decay = follow_together(highest, row_max, limit)
    else:
        new_max = gl.where(highest > limit, highest, row_max)
        decay = gl.exp2(row_max - new_max)
    weights = gl.exp2(s * factor - new_max[:, None])
    return weights, decay, new_max, row_sum * decay + gl.sum(weights, 1)


@gluon.jit
def steady_softmax(s, row_max, row_sum, factor):
    """The same with maxima that stay as they are: weights, and their new sum.

    A maximum is a mere reference. That of a tile's first block serves all of it but where scores rise by more than some
    30 above it, of which the sum tells in the end; such a tile is taken again. It saves a third of the instructions.
    """
    weights = gl.exp2(s * factor - row_max[:, None])
    return weights, row_sum + gl.sum(weights, 1)


@gluon.constexpr_function
def _rescale_assembly(COUNT):
    """Multiplies COUNT sums of a thread, which lie in two rows in turns of two, unless no row of the warp decays."""
    products = "".join(f"mul.f32 ${i}, ${i}, ${2 * COUNT + i}; " for i in range(COUNT))
    return (
        "{ .reg .pred decays; "
        f"setp.neu.f32 decays, ${2 * COUNT}, 0f3F800000; "
        f"setp.neu.or.f32 decays, ${2 * COUNT + 2}, 0f3F800000, decays; "
        "vote.sync.any.pred decays, decays, -1; "
        "@!decays bra done; "
        f"{products} done: }}"
    )


@gluon.constexpr_function
def _rescale_constraints(COUNT):
    return ",".join(["=f"] * COUNT + [str(i) for i in range(COUNT)] + ["f"] * COUNT)


@gluon.jit
def rescale(acc, decay):
    """The sums of weighted values after their rows' decay; a warp of whose rows none decays leaves them alone."""
    COUNT: gl.constexpr = min(32, acc.shape[1] // 2)
    return gl.inline_asm_elementwise(
        _rescale_assembly(COUNT), _rescale_constraints(COUNT), [acc, decay[:, None]], gl.float32, True, COUNT
    )


@gluon.jit
def finish_softmax(row_max, row_sum, sinks_ptr, q_head):
    """What the rows' sums of weighted values are multiplied by in the end, and lse (natural log)."""
    decay = 1.0
    if sinks_ptr is not None:
        # A sink is a key without a value (Xiao et al. 2023, "attention sinks").
        sink = gl.load(sinks_ptr + q_head).to(gl.float32) * LOG2_E
        with_sink = gl.maximum(row_max, sink)
        decay = gl.exp2(row_max - with_sink)
        row_sum = row_sum * decay + gl.exp2(sink - with_sink)
        row_max = with_sink
    nothing_visible = row_sum == 0.0
    inverse = decay / gl.where(nothing_visible, 1.0, row_sum)
    return inverse, gl.where(nothing_visible, float("-inf"), (row_max + gl.log2(row_sum)) * LN_2)
