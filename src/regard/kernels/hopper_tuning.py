"""Tiles of the Hopper kernels: pure data, measured on an H200."""

from typing import NamedTuple

from regard.kernels.tuning import padded_head_dim, table_head_dim

ROWS = 64
"""Query rows of a warpgroup in the forward, key rows in the backward: as many as one wgmma covers."""


class HopperTile(NamedTuple):
    """A tile of the Gluon forward: 64 query rows a warpgroup, and a warp more that loads.

    ``query_stages``: with two, the queries of a warpgroup's next tile are there before it has done with this one.
    ``share_q``: the output leaves through the queries' shared memory, where there is no room for both.
    ``take_turns``: the warpgroups start their products one after the other, so that one's softmax meets another's
    products (FlashAttention-3's ping-pong).
    ``pass_early``: a turn ends once the products are under way, and not once the scores are there.
    ``one_loop``: see `hopper_forward.attend_rest`; it saves registers.
    ``hold_q``: the queries stay in registers, so that products read less shared memory and the next tile's may come.
    ``rescale_early``: the sums are rescaled beside the product of the next scores, and not after their own product.
    ``vote``: see `hopper_softmax.online_softmax`.
    ``steady``: see `hopper_softmax.steady_softmax`.
    """

    block_m: int
    block_n: int
    key_stages: int
    value_stages: int
    query_stages: int = 1
    share_q: bool = False
    take_turns: bool = False
    pass_early: bool = True
    one_loop: bool = False
    hold_q: bool = False
    rescale_early: bool = True
    vote: bool = False
    steady: bool = False

    @property
    def max_registers(self) -> int:
        """What the compiler may use a thread at launch, before the warpgroups trade registers."""
        return 168 if self.block_m == 128 else 128


# Three warpgroups hide more of the softmax at head dim 64; two waste less at the diagonal and at the end of a short
# sequence, and have the registers for softcap and ALiBi.
_TWO_WARPGROUPS_64 = HopperTile(128, 128, 3, 3, query_stages=2, take_turns=True, one_loop=True)
_SHORT_64 = 1024  # keys that a row sees
_FEW_ROWS_64 = 256

_NARROW = {64: 512, 128: 256}
"""Keys of a window up to which blocks of 64 are faster than blocks of 128, by head dim."""

MULTIPROCESSORS = 132
"""Of an H100 SXM or H200."""

_STEP_KEYS = 128
_SMALL = {64: (384, 1584), 128: (96, 660), 256: (64, 0)}
"""Keys of a sequence, and steps of all tiles, up to which the portable kernels are faster, by head dim; the backward of
wide heads never is. Where heads share a tile, and so its keys, as many times less."""

# padded head dim, the larger of D and Dv -> tile
FORWARD = {
    64: HopperTile(192, 128, 3, 3, take_turns=True, one_loop=True),
    128: HopperTile(128, 128, 2, 2, take_turns=True, pass_early=False),
    256: HopperTile(128, 64, 3, 2, share_q=True, take_turns=True, rescale_early=False),
}


def forward_tile(
    head_dim: int,
    head_dim_v: int,
    *,
    rows: int,
    span: int,
    causal: bool,
    windowed: bool,
    one_cut: bool,
    raw: bool,
    wide_range: bool,
) -> HopperTile:
    """Tile of the Hopper forward.

    Args:
        head_dim, head_dim_v: D and Dv, at most 256.
        rows: of the longest sequence, of the heads that share a tile.
        span: keys that a row sees, at most.
        causal: whether the right side of the band is bounded.
        windowed: whether both sides are.
        one_cut: whether of the blocks that a warpgroup attends to only the first may need a mask.
        raw: whether scores need nothing but their scale (no softcap, no ALiBi).
        wide_range: whether weights may be large (not in float16) and a tile may be taken again (not a packed one).
    """
    entry = table_head_dim(max(head_dim, head_dim_v))
    tile = FORWARD[entry]
    if entry == 64 and (rows <= _FEW_ROWS_64 or not raw or (causal and span <= _SHORT_64)):
        tile = _TWO_WARPGROUPS_64
    elif entry == 64:
        tile = tile._replace(vote=causal and one_cut)
    elif entry == 128 and raw and one_cut:
        tile = tile._replace(one_loop=True, hold_q=not causal, vote=not causal)
    elif entry == 128 and raw:
        tile = tile._replace(one_loop=windowed)
    elif entry == 256:
        tile = tile._replace(share_q=padded_head_dim(head_dim) == padded_head_dim(head_dim_v))
    if entry <= 128 and raw and one_cut and wide_range:
        tile = tile._replace(one_loop=True, steady=True, vote=False, pass_early=not causal or tile.block_m == 128)
    if windowed and span <= _NARROW.get(entry, 0):
        tile = tile._replace(block_n=64, key_stages=4, value_stages=4)
    return tile


def small_call(
    head_dim: int, head_dim_v: int, *, tiles: int, keys: int, pack: int, requires_grad: bool
) -> tuple[str, str] | None:
    """What a call has, and what it needs, where it is too small for the pipeline of these kernels: the portable ones,
    of which a multiprocessor runs several programs at a time, are faster. None where it is not.

    Args:
        head_dim, head_dim_v: of the call.
        tiles: of the call, whose keys are whole.
        keys: of a sequence, on average.
        pack: query heads that share a tile.
        requires_grad: whether a backward follows.
    """
    entry = table_head_dim(max(head_dim, head_dim_v))
    if entry == 256 and requires_grad:
        return None
    small_keys, small_steps = (most // pack for most in _SMALL[entry])
    if keys <= small_keys:
        return f"sequences of {keys} keys", f"more than {small_keys}"
    if tiles * -(-keys // _STEP_KEYS) <= small_steps:
        return f"{tiles} tiles of queries by {keys} keys", f"more than {small_steps} steps of {_STEP_KEYS} keys"
    return None


def backward_block_m(head_dim: int, head_dim_v: int) -> int:
    """Queries in a tile of the Hopper backward in one pass, whose key tile is always 128."""
    return 128 if max(head_dim, head_dim_v) <= 64 else 64


class TwoPassTile(NamedTuple):
    """Tiles of the backward in two passes, where they are not 64 rows.

    ``block_m``: queries that the pass for dK and dV takes at a time; ``value_stages``: of the pass for dQ.
    """

    block_m: int
    value_stages: int


def two_pass_tile(head_dim: int, head_dim_v: int) -> TwoPassTile:
    """Tiles of the Hopper backward in two passes: what shared memory has room for."""
    return TwoPassTile(128, 2) if max(head_dim, head_dim_v) <= 128 else TwoPassTile(64, 1)
