"""Offsets inside a tile that 32 bits do not hold, in the portable kernels."""

import pytest
import torch

import regard
from regard import AttentionInputs
from regard.backends import flash

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
    assert flash._wide(AttentionInputs(**tensors)) is wide
    if name in "qkv":
        assert flash._wide(AttentionInputs(*[torch.empty(1, 4, 1, 8)] * 3), tensors[name]) is wide


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
    monkeypatch.setattr(flash, "_INTERPRETER_ARCH", arch)
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
