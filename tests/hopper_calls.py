"""Calls of the `hopper` backend that its tests share: what they are like, random inputs, and what is true of them."""

import dataclasses

import torch

import regard
from regard import AttentionConfig, AttentionInputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where kernels of plain Triton run: in its interpreter, without a GPU."""

_CONFIG = AttentionConfig(
    batch=2, seqlen_q=300, seqlen_k=200, heads_q=4, heads_kv=2, head_dim=64, dtype=torch.bfloat16, device="cuda",
    arch="sm90", requires_grad=True,
)  # fmt: skip


def config(head_dim=64, head_dim_v=None, **options):
    """A small call with gradients, if nothing else is said."""
    return dataclasses.replace(_CONFIG, head_dim=head_dim, head_dim_v=head_dim_v or head_dim, **options)


def random_inputs(called, **others):
    """Inputs of a call on the CPU, in fp32; ``others``: offsets and lengths."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    rows_q, rows_k = (
        ((called.total_q,), (called.total_k,))
        if called.varlen
        else ((called.batch, called.seqlen_q), (called.batch, called.seqlen_k))
    )
    return AttentionInputs(
        random(*rows_q, called.heads_q, called.head_dim),
        random(*rows_k, called.heads_kv, called.head_dim),
        random(*rows_k, called.heads_kv, called.head_dim_v),
        alibi_slopes=random(called.heads_q).abs() / 8 if called.alibi else None,
        sinks=random(called.heads_q) if called.sinks else None,
        **others,
    )


def expected(called, given):
    """Out and lse by the reference in float64."""
    q, k, v = (each.double() for each in given[:3])
    options = dict(
        causal=called.causal, window=called.window, softmax_scale=called.softmax_scale, softcap=called.softcap,
        alibi_slopes=given.alibi_slopes, sinks=given.sinks, return_lse=True, backend="reference",
    )  # fmt: skip
    if called.varlen:
        return regard.varlen_attention(q, k, v, given.cu_seqlens_q, given.cu_seqlens_k, **options)
    return regard.attention(q, k, v, kv_lens=given.kv_lens, **options)
