"""From a workload to tensors on the device, and to a small part of them that can be checked in float64."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from regard.bench.cases import DTYPES, Workload
from regard.config import AttentionConfig, AttentionInputs
from regard.testing import Call


def draw(workload: Workload, device: torch.device, seed: int = 0) -> Call:
    """Standard normal tensors for a workload, drawn on the device; leaves that want a gradient in backward modes."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = DTYPES[workload.dtype]
    lengths = workload.lengths()
    rows: tuple[int, ...] = (workload.batch, workload.seqlen_q)
    keys: tuple[int, ...] = (workload.batch, workload.seqlen_k)
    tensors: dict[str, Tensor] = {}
    options: dict[str, Any] = {"causal": workload.causal, "window": workload.window, "softcap": workload.softcap}
    if workload.varlen:
        rows, keys = (sum(q for q, _ in lengths),), (sum(k for _, k in lengths),)
        for index, side in enumerate("qk"):
            offsets = [0, *itertools.accumulate(pair[index] for pair in lengths)]
            tensors[f"cu_seqlens_{side}"] = torch.tensor(offsets, dtype=torch.int32, device=device)
            options[f"max_seqlen_{side}"] = max(pair[index] for pair in lengths)
    if workload.page_size is not None:
        pages = -(-workload.seqlen_k // workload.page_size)
        keys = (workload.batch * pages, workload.page_size)
        order = torch.randperm(keys[0], generator=generator, device=device).int()
        tensors["block_table"] = order.view(workload.batch, pages)
        tensors["kv_lens"] = torch.full((workload.batch,), workload.seqlen_k, dtype=torch.int32, device=device)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    head_dim_v = workload.head_dim if workload.head_dim_v is None else workload.head_dim_v
    tensors["q"] = normal(*rows, workload.heads_q, workload.head_dim)
    tensors["k"] = normal(*keys, workload.heads_kv, workload.head_dim)
    tensors["v"] = normal(*keys, workload.heads_kv, head_dim_v)
    if (shape := workload.pattern_shape(workload.bias)) is not None:
        tensors["bias"] = normal(*shape)
    if (shape := workload.pattern_shape(workload.mask)) is not None:
        tensors["mask"] = torch.rand(shape, generator=generator, device=device) < 0.9
    if workload.alibi:
        exponents = torch.arange(1, workload.heads_q + 1, device=device, dtype=torch.float32)
        tensors["alibi_slopes"] = torch.exp2(-8 * exponents / workload.heads_q)  # Press et al. 2022, section 3
    if workload.sinks:
        tensors["sinks"] = normal(workload.heads_q)
    call = Call(tensors, options, seed)
    return call if workload.mode == "fwd" else call.with_leaves()


def canonical_inputs(call: Call) -> AttentionInputs:
    """The call's tensors as a backend receives them."""
    names = set(AttentionInputs._fields)
    return AttentionInputs(**{name: tensor for name, tensor in call.tensors.items() if name in names})


def visible(config: AttentionConfig, rows: Tensor, keys: int, queries: int) -> Tensor | None:
    """Which of the ``keys`` each of ``rows`` (positions among ``queries``) may see under causal and window: bool
    (rows, keys), or None where it is all of them.
    """
    left, right = config.band
    if left is None and right is None:
        return None
    distance = torch.arange(keys, device=rows.device) - (rows[:, None] + keys - queries)
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left is not None:
        seen &= distance >= -left
    if right is not None:
        seen &= distance <= right
    return seen


def sequence(call: Call, config: AttentionConfig, index: int) -> tuple[Tensor, Tensor, Tensor, slice]:
    """Q (Sq, Hq, D), k (Sk, Hk, D), v (Sk, Hk, Dv) of one sequence, and where its rows are among the rows of out."""
    q, k, v = (call.tensors[name] for name in "qkv")
    if config.varlen:
        first_q, last_q = call.tensors["cu_seqlens_q"][index : index + 2].tolist()
        first_k, last_k = call.tensors["cu_seqlens_k"][index : index + 2].tolist()
        return q[first_q:last_q], k[first_k:last_k], v[first_k:last_k], slice(first_q, last_q)
    if config.page_size is not None:
        length = int(call.tensors["kv_lens"][index])
        pages = call.tensors["block_table"][index].long()
        k, v = (cache[pages].flatten(0, 1)[:length] for cache in (k, v))
    else:
        k, v = k[index], v[index]
    return q[index], k, v, slice(index * config.seqlen_q, (index + 1) * config.seqlen_q)


def tiny(workload: Workload, device: torch.device) -> Call:
    """The same kind of call with next to nothing to compute: what it takes is the cost of calling."""
    return draw(replace(workload, batch=1, seqlen_q=1, seqlen_k=1), device)


def dense_gradient(call: Call) -> Tensor:
    """A gradient of out with no zeros, for timing."""
    q, v = call.tensors["q"], call.tensors["v"]
    return torch.randn(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
