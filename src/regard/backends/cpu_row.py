"""One query a sequence, as in decoding: two products of each group of query heads, with its keys and with its values.

Torch's fused kernel takes every query head by itself, and reads the keys and values of a group for each of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.backends.cpu_fused import additive_mask, seen_and_hidden
from regard.config import AttentionConfig
from regard.registry import Shortcut

_WORTH_GROUPS = 2**16  # key elements, times query heads in a group, for products of groups to pay
_WORTH_HEADS = range(2**18, 2**20 + 1)  # key elements for those of single query heads to pay


def row_call(config: AttentionConfig, layout: str) -> Shortcut | None:
    """The call by these products, where they take the inputs as they are and less time than the kernel.

    It raises FloatingPointError where a result is NaN: a row that sees nothing has to be 0.
    """
    if config.seqlen_q != 1 or config.dtype not in (torch.float32, torch.float64) or not _pays(config):
        return None
    products, group = config.batch * config.heads_kv, config.heads_q // config.heads_kv
    strides = []
    for tensor, heads in (("q", config.heads_q), ("k", config.heads_kv), ("v", config.heads_kv)):
        of_batch, of_row, of_head, of_column = getattr(config, f"{tensor}_strides")
        if config.batch > 1 and of_batch != heads * of_head:  # batch and heads are not one dimension
            return None
        strides.append((of_head, of_row, of_column))
    (q_head, _, q_column), (k_head, k_row, k_column), v_strides = strides
    rows = (products, group, config.head_dim), (group * q_head, q_head, q_column)
    keys = (products, config.head_dim, config.seqlen_k), (k_head, k_column, k_row)
    values = (products, config.seqlen_k, config.head_dim_v), v_strides
    shape = (config.batch, 1, config.heads_q) if layout == "bshd" else (config.batch, config.heads_q, 1)
    of_batch, of_heads, _, columns = config.mask_shape or (1, 1, 1, 1)
    if of_batch * of_heads not in (1, products * group):
        return None
    added = (1, 1, columns) if of_batch * of_heads == 1 else (products, group, columns)
    scale = config.softmax_scale

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = q.as_strided(*rows), k.as_strided(*keys), v.as_strided(*values)
        if mask is None:
            scores = torch.baddbmm(seen_and_hidden(q.dtype)[0], q, k, beta=0, alpha=scale)
        else:
            scores = torch.baddbmm(additive_mask(mask, q.dtype).reshape(added), q, k, alpha=scale)
        out = torch.bmm(scores.softmax(-1), v)
        if not out.equal(out):
            raise FloatingPointError("NaN in out")
        return out.view(*shape, -1)

    return attend


def _pays(config: AttentionConfig) -> bool:
    products, group = config.batch * config.heads_kv, config.heads_q // config.heads_kv
    elements = products * config.seqlen_k * config.head_dim
    if group == 1:
        return elements in _WORTH_HEADS
    return elements * group >= _WORTH_GROUPS and products >= torch.get_num_threads()
