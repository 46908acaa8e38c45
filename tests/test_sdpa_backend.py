"""What the conformance cases do not reach: torch's own limits, and rows that see nothing."""

import pytest
import torch

import regard
from regard.backends.sdpa import SdpaBackend
from regard.config import AttentionConfig


def codes(**fields):
    sizes = dict(batch=2, seqlen_q=16, seqlen_k=16, heads_q=4, heads_kv=2, head_dim=32, dtype=torch.float32)
    return [reason.code for reason in SdpaBackend().unsupported_reasons(AttentionConfig(**{**sizes, **fields}))]


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({}, []),
        ({"causal": True}, []),
        ({"causal": True, "seqlen_q": 1}, []),
        ({"causal": True, "seqlen_q": 1, "mask_shape": (1, 1, 1, 16)}, []),
        ({"causal": True, "seqlen_q": 8}, ["causal"]),
        ({"causal": True, "mask_shape": (1, 1, 1, 16)}, ["mask"]),
        ({"causal": True, "bias_shape": (1, 1, 1, 16), "bias_dtype": torch.float32}, ["bias"]),
        ({"mask_shape": (1, 1, 1, 16), "bias_shape": (1, 1, 1, 16), "bias_dtype": torch.float32}, ["mask"]),
        ({"bias_shape": (1, 1, 1, 16), "bias_dtype": torch.float16}, ["bias"]),
        ({"window": (3, 0)}, ["window"]),
        ({"softcap": 2.0}, ["softcap"]),
        ({"alibi": True}, ["alibi"]),
        ({"sinks": True}, ["sinks"]),
        ({"dropout_p": 0.1}, ["dropout"]),
        ({"varlen": True, "total_q": 20, "total_k": 20}, ["varlen"]),
        ({"kv_lens": True}, ["kv_lens"]),
        ({"kv_lens": True, "page_size": 4}, ["kv_lens", "paged"]),
        ({"return_lse": True}, ["lse"]),
        ({"deterministic": True}, []),
        ({"deterministic": True, "requires_grad": True}, ["deterministic"]),
        ({"causal": True, "softmax_scale": 0.0}, ["scale"]),
        ({"device": "mps"}, ["device"]),
        ({"device": "cuda", "arch": "sm90", "softmax_scale": -1.0}, ["scale"]),
    ],
)
def test_reasons(fields, expected):
    assert codes(**fields) == expected


@pytest.mark.parametrize("kind", ["mask", "bias"])
def test_hidden_rows_are_zero_with_zero_gradient(kind):
    q, k, v = (torch.randn(1, 6, 2, 8, requires_grad=True) for _ in range(3))
    visible = torch.rand(1, 1, 6, 6) < 0.7
    visible[..., 0] = True
    visible[..., 2, :] = False
    bias = torch.randn(1, 1, 6, 6).masked_fill(~visible, float("-inf")).requires_grad_()
    extra = {"mask": visible} if kind == "mask" else {"bias": bias}
    out = regard.attention(q, k, v, **extra, backend="sdpa")
    out.square().sum().backward()
    assert torch.equal(out[:, 2], torch.zeros_like(out[:, 2]))
    assert torch.equal(q.grad[:, 2], torch.zeros_like(q.grad[:, 2]))
    assert all(t.grad.isfinite().all() and t.grad.abs().sum() > 0 for t in (q, k, v))
    if kind == "bias":
        assert bias.grad.isfinite().all() and not bias.grad[..., 2, :].any() and bias.grad[..., 3, 0].any()


def test_traces_with_symbolic_sizes():
    compiled = torch.compile(
        lambda q: regard.attention(q, q, q, causal=True, backend="sdpa"), backend="eager", fullgraph=True, dynamic=True
    )
    for length in (5, 9):
        q = torch.randn(1, length, 2, 8)
        torch.testing.assert_close(compiled(q), regard.attention(q, q, q, causal=True, backend="reference"))
