"""What the conformance cases do not reach: torch's own limits, and rows that see nothing."""

import dataclasses
import math

import pytest
import torch

import regard
from regard.backends.sdpa import SdpaBackend
from regard.config import AttentionConfig, AttentionInputs


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


def misaligned(shape, dtype=torch.float16):
    """Values at an address that is no multiple of 16 bytes."""
    return torch.randn(math.prod(shape) + 1).to(dtype)[1:].view(shape)


@pytest.mark.parametrize(
    "lay_out",
    [
        lambda t: t,
        lambda t: misaligned(t.shape),
        lambda t: torch.cat([t, t[..., :1]], -1)[..., :-1],  # rows not at multiples of 16 bytes
        lambda t: t.transpose(1, 3).contiguous().transpose(1, 3),
        lambda t: t[..., :5],
    ],
    ids=["contiguous", "address", "rows", "head_dim_outside", "odd_head_dim"],
)
@pytest.mark.parametrize("extra", ["", "mask", "bias", "bias_keys_broadcast"])
def test_cuda_kernels_get_aligned_memory_only(lay_out, extra, monkeypatch):
    """torch's kernels read 16 bytes at a time and fault on other addresses; shown on the CPU by what they are given."""
    q, k, v = (lay_out(torch.randn(2, 6, 2, 16, dtype=torch.float16)).requires_grad_() for _ in range(3))
    bias = misaligned((2, 1, 6, 1 if extra == "bias_keys_broadcast" else 6)).requires_grad_()
    inputs = {"": {}, "mask": {"mask": torch.rand(6, 6) < 0.5}}.get(extra, {"bias": bias})
    config = AttentionConfig.from_tensors(q, k, v, **inputs)
    on_cuda = dataclasses.replace(config, device="cuda", arch="sm90")
    inputs = AttentionInputs(q, k, v, **({"mask": inputs["mask"][None, None]} if extra == "mask" else inputs))
    seen = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v, attn_mask=None, **options):
        seen.extend(t for t in (q, k, v, attn_mask) if t is not None)
        return sdpa(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    out, _ = SdpaBackend().forward(on_cuda, inputs)
    for tensor in seen:
        assert tensor.data_ptr() % 16 == 0 and tensor.stride(-1) == 1
        assert all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:-1])
    assert len(seen) == (4 if extra else 3)
    expected, _ = SdpaBackend().forward(config, inputs)
    float16 = dict(rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(out, expected, **float16)
    leaves = (q, k, v, bias) if extra.startswith("bias") else (q, k, v)
    seed = misaligned(out.shape)
    found, truth = (torch.autograd.grad(result, leaves, seed) for result in (out, expected))
    torch.testing.assert_close(found, truth, **float16)


def test_aligned_memory_is_not_copied(monkeypatch):
    q = torch.randn(2, 6, 2, 16)
    config = dataclasses.replace(AttentionConfig.from_tensors(q, q, q), device="cuda", arch="sm90")
    seen = []
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, **options: seen.append(q) or q
    )
    SdpaBackend().forward(config, AttentionInputs(q, q, q))
    assert seen[0].data_ptr() == q.data_ptr()
