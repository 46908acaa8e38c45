"""How the Hopper forward divides a call: its tile, the heads that share one, the parts of its keys."""

from __future__ import annotations

import torch

from regard.backends.flash_launches import bounded_band, keys_seen
from regard.config import AttentionConfig
from regard.kernels import hopper_tuning, tuning


def forward_tile(config: AttentionConfig) -> tuple[hopper_tuning.HopperTile, int]:
    """Tile of the forward, and how many heads share it: as many of one key/value head as a power of two allows."""
    group = config.heads_q // config.heads_kv
    pack = min(group & -group, hopper_tuning.ROWS)
    left, right = bounded_band(config)
    tile = hopper_tuning.forward_tile(
        config.head_dim,
        config.head_dim_v,
        rows=config.seqlen_q * pack,
        span=keys_seen(config, 1),
        causal=right is not None,
        windowed=left is not None and right is not None,
        one_cut=one_cut(config, pack),
        raw=config.softcap == 0 and not config.alibi,
        wide_range=config.dtype == torch.bfloat16 and not config.varlen,
    )
    return tile, pack


def splits_of(config: AttentionConfig, multiprocessors: int) -> int:
    """Parts in which a query tile's keys are taken; 1 where whole, as those of packed sequences are."""
    if config.varlen:
        return 1
    tile, pack = forward_tile(config)
    return tuning.key_splits(
        query_tiles(config, tile, pack),
        keys_seen(config, min(config.seqlen_q, tile.block_m // pack)),
        config.batch * config.seqlen_q * config.heads_q,
        multiprocessors,
    )


def query_tiles(config: AttentionConfig, tile: hopper_tuning.HopperTile, pack: int) -> int:
    """Of all heads; packed sequences may have fewer."""
    positions = tile.block_m // pack
    if config.varlen:
        return config.heads_q // pack * (-(-(config.total_q or 0) // positions) + config.batch)
    return config.batch * (config.heads_q // pack) * -(-config.seqlen_q // positions)


def one_cut(config: AttentionConfig, pack: int) -> bool:
    """Whether of the key blocks that a warpgroup attends to only the first, at the right edge, may need a mask: there
    is no left edge, and the right one leaves no block in the middle of a warpgroup's rows.
    """
    left, right = bounded_band(config)
    if right is None:
        return left is None
    aligned = (config.seqlen_k - config.seqlen_q + right) % (hopper_tuning.ROWS // pack) == 0
    return left is None and aligned and not config.varlen and not config.kv_lens


def too_small(config: AttentionConfig) -> tuple[str, str] | None:
    """What a call has, and what it needs for these kernels to be the faster ones; None where they are, or where its
    sizes are symbols, for torch.compile makes one graph for any size.
    """
    sizes = (config.batch, config.seqlen_q, config.seqlen_k, config.total_q or 0, config.total_k or 0)
    if not all(isinstance(size, int) for size in sizes):
        return None
    rows = config.seqlen_q * (config.heads_q // config.heads_kv)
    if rows <= tuning.FEW_ROWS and not config.alibi and not config.requires_grad:
        return f"{rows} rows of queries for a key/value head", f"more than {tuning.FEW_ROWS}"
    tile, pack = forward_tile(config)
    if splits_of(config, hopper_tuning.MULTIPROCESSORS) > 1:
        return None
    keys = -(-(config.total_k or 0) // max(1, config.batch)) if config.varlen else config.seqlen_k
    tiles = query_tiles(config, tile, pack)
    return hopper_tuning.small_call(
        config.head_dim, config.head_dim_v, tiles=tiles, keys=keys, pack=pack, requires_grad=config.requires_grad
    )
