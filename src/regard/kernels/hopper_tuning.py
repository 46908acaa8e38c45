"""Tiles of the Hopper kernels: pure data, measured on an H200."""

from typing import NamedTuple

from regard.kernels.tuning import padded_head_dim, table_head_dim


class HopperTile(NamedTuple):
    """A tile of the Gluon kernels: 64 query rows a warpgroup, and a warp more that loads.

    ``share_q``: the output leaves through the queries' shared memory, where there is no room for both.
    ``take_turns``: the warpgroups start their products one after the other, so that one's softmax meets another's
    products (FlashAttention-3's ping-pong).
    """

    block_m: int
    block_n: int
    num_stages: int
    share_q: bool = False
    take_turns: bool = False

    @property
    def max_registers(self) -> int:
        """What the compiler may use a thread at launch, before the warpgroups trade registers."""
        return 168 if self.block_m == 128 else 128


# padded head dim, the larger of D and Dv -> tile
FORWARD = {
    64: HopperTile(192, 128, 3, take_turns=True),
    128: HopperTile(128, 128, 2),
    256: HopperTile(128, 64, 2, share_q=True),
}


def forward_tile(head_dim: int, head_dim_v: int) -> HopperTile:
    """Tile of the Hopper forward."""
    tile = FORWARD[table_head_dim(max(head_dim, head_dim_v))]
    return tile._replace(share_q=tile.share_q and padded_head_dim(head_dim) == padded_head_dim(head_dim_v))
