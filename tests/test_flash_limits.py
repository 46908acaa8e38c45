"""Where 32 bits end in the portable kernels: offsets inside a tile, and tanh."""

import pytest
import torch

import regard
from regard import AttentionConfig, AttentionInputs
from regard.backends import flash_launches

FAR = 2**30  # three elements this far apart, or a row and a dim of two each, reach 2**31


@pytest.mark.parametrize(
    ("name", "shape", "strides", "wide"),
    [
        ("q", (2, 512, 8, 64), (2**40, 512, 64, 1), False),
        ("k", (2, 512, 8, 64), (2**18, 512, 2**40, 1), False),
        ("q", (1, 2, 1, 3), (8, 4, 4, 2**23), True),
        ("v", (1, 2, 1, 3), (8, 2**23, 4, 1), True),
        ("k", (1, 2, 1, 3), (8, 2**22, 4, 2**22), True),
        ("mask", (1, 1, 1, 8), (8, 8, 2**40, 1), False),
        ("mask", (1, 1, 2, 8), (8, 8, 2**23, 1), True),
        ("bias", (1, 1, 2, 3), (8, 8, 2**22, 2**22), True),
    ],
)
def test_offsets_are_wide_where_a_tile_reaches_far(name, shape, strides, wide):
    tensors = dict.fromkeys("qkv", torch.empty(1, 4, 1, 8)) | {name: torch.empty_strided(shape, strides, device="meta")}
    assert flash_launches._wide(AttentionInputs(**tensors)) is wide
    if name in "qkv":
        assert flash_launches._wide(AttentionInputs(*[torch.empty(1, 4, 1, 8)] * 3), tensors[name]) is wide


def spread_out(shape, strides):
    """A tensor whose elements are far apart; of its storage only their pages are ever in memory."""
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return torch.empty(last + 1, dtype=torch.float16).as_strided(shape, strides).copy_(torch.randn(shape))


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="device: got cuda, needs cpu (whose memory is not there until used)"
)
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize(
    ("shape", "strides", "arch"),
    [
        ((1, 2, 1, 3), (1, 4, 2, FAR), "sm80"),
        ((1, 3, 1, 2), (1, FAR, 2, 1), "sm80"),
        ((1, 2, 1, 2), (1, FAR, 2, FAR), "sm80"),
        ((1, 2, 1, 130), (1, 4, 2, FAR // 64), "gfx1100"),  # products in parts
    ],
    ids=["dims", "rows", "rows_and_dims", "parts"],
)
def test_elements_far_apart(shape, strides, arch, name, monkeypatch):
    monkeypatch.setattr(flash_launches, "_INTERPRETER_ARCH", arch)
    near = {each: torch.randn(shape, dtype=torch.float16) for each in "qkv"}
    near[name] = spread_out(shape, strides)
    far = {each: tensor.detach().requires_grad_() for each, tensor in near.items()}
    near = {each: tensor.contiguous().requires_grad_() for each, tensor in near.items()}
    results = []
    for tensors in (near, far):
        out = regard.attention(**tensors, backend="flash")
        results.append((out, *torch.autograd.grad(out.float().square().sum(), tuple(tensors.values()))))
    for expected, found in zip(*results, strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("softcap", [2.0, 128.0])
def test_scores_are_capped_exactly(softcap):
    """A tanh made of one exponential is as exact as the products of float32, up to the greatest cap that is served."""
    q, k, v = (4 * torch.randn(8, 40, 2, 64) for _ in range(3))
    call = {"softcap": softcap, "return_lse": True}
    wanted = regard.attention(q.double(), k.double(), v.double(), backend="reference", **call)
    plain = regard.attention(q, k, v, backend="reference", **call)
    if torch.cuda.is_available():
        q, k, v = q.cuda(), k.cuda(), v.cuda()
    for found, expected, torchs in zip(regard.attention(q, k, v, backend="flash", **call), wanted, plain, strict=True):
        error, torchs_error = ((each.cpu().double() - expected).square().mean().sqrt() for each in (found, torchs))
        assert error <= 2 * torchs_error  # at four times the greatest cap 5 times, and 1.5 at most here


@pytest.mark.parametrize(
    ("softcap", "dtype", "served"),
    [(0.0, "float32", True), (128.0, "float32", True), (129.0, "float32", False), (1e30, "bfloat16", False),
     (4096.0, "float16", True), (5000, "float16", False), (1e-40, "bfloat16", False)],
)  # fmt: skip
def test_a_softcap_that_tanh_is_too_coarse_for_is_left_to_others(softcap, dtype, served):
    config = AttentionConfig(
        1, 8, 8, 2, 2, 64, dtype=getattr(torch, dtype), device="cuda", arch="sm90", softcap=softcap
    )
    explanation = regard.explain(config)
    for backend in ("flash", "hopper"):
        found = [reason.observed for reason in explanation.reasons(backend) if reason.code == "softcap"]
        assert found == ([] if served else [str(softcap)])
    assert explanation.chosen.backend == "reference" or served
