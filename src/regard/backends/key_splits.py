"""Parts of the keys: memory for out and lse of each, and the launch that merges them (Flash-Decoding)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from regard.backends.launch import Launch, allocate, contiguous
from regard.config import AttentionConfig, AttentionInputs
from regard.kernels import tuning

Parts = tuple[Tensor, Tensor]
"""out (splits, B, Sq, Hq, Dv) and lse (Hq, splits, B, Sq), fp32."""


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors or compute units; 0 where there are none, so that nothing is split for them."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


def new_parts(
    config: AttentionConfig, q: Tensor, multiprocessors: int, key_splits: Callable[[AttentionConfig, int], int]
) -> Parts | None:
    """Memory for out and lse of every part of the keys; None where they are taken whole.

    Args:
        config, q: the call.
        multiprocessors: of the device.
        key_splits: says how many parts a call has there.
    """
    key = key_splits, q.device, multiprocessors
    if key not in config.prepared:
        config.prepared[key] = _without_memory(config, q, key_splits(config, multiprocessors))
    found: Parts | None = config.prepared[key]
    return None if found is None else allocate(*found)


def _without_memory(config: AttentionConfig, q: Tensor, splits: int) -> Parts | None:
    if splits == 1:
        return None
    rows, one = (splits, config.batch, config.seqlen_q), q.new_empty((), dtype=torch.float32)
    return one.expand(*rows, config.heads_q, config.head_dim_v), one.expand(config.heads_q, *rows)


def merge_launch(config: AttentionConfig, inputs: AttentionInputs, parts: Parts, out: Tensor, lse: Tensor) -> Launch:
    """The launch that fills out and lse from those of the parts; the sinks enter here."""
    from regard.kernels.merge import merge_splits

    part_out, part_lse = parts
    rows = config.batch * config.seqlen_q
    arguments = dict(
        out_ptr=part_out,
        lse_ptr=part_lse,
        merged_ptr=out,
        merged_lse_ptr=lse,
        sinks_ptr=contiguous(inputs.sinks),
        splits=len(part_out),
        rows=rows,
        heads=config.heads_q,
        seqlen_q=config.seqlen_q,
        HEAD_DIM_V=config.head_dim_v,
        BLOCK_DV=tuning.padded_head_dim(config.head_dim_v),
        MOST_SPLITS=tuning.MOST_SPLITS,
    )
    return Launch(merge_splits, rows * config.heads_q, arguments, dict(num_warps=1))
