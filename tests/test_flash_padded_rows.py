"""Masks and biases whose rows the flash kernels could not read 16 elements at a time: padded, and right all the same."""

import math

import pytest
import torch

pytest.importorskip("triton")

import regard
from regard import AttentionConfig, AttentionInputs
from regard.backends import flash, flash_launches
from regard.backends.padded_rows import readable_keys, with_padded_rows
from regard.testing import Case, check_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATTERNS = ["bhqk", "1hqk", "11qk", "bh1k", "111k", "b1qk", "bhq1", "b11k"]


@pytest.fixture
def nan_in_new_memory():
    """Whatever torch.empty returns holds NaN, or True: so do the rows' ends."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def given(**tensors):
    """Inputs of a call with this mask or bias."""
    memory = torch.empty(1, device=DEVICE)
    return AttentionInputs(memory, memory, memory, **tensors)


def bias_of(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device=DEVICE).to(dtype)


@pytest.mark.usefixtures("nan_in_new_memory")
@pytest.mark.parametrize("bias", PATTERNS)
def test_gradients(bias):
    mask = PATTERNS[-1 - PATTERNS.index(bias)]
    case = Case("odd_rows", seqlen_q=9, seqlen_k=75, head_dim=16, empty_rows=True, bias=bias, mask=mask)
    assert check_backward("flash", case, DEVICE, torch.float16).status == "passed"


@pytest.mark.usefixtures("nan_in_new_memory")
@pytest.mark.parametrize(
    "case",
    [
        Case("both", seqlen_q=17, seqlen_k=81, mask="b11k", bias="1hqk", causal=True, window=(40, None), softcap=5.0),
        Case("lengths", seqlen_q=20, seqlen_k=70, kv_lens=(33, 5), mask="b1qk", bias="bhqk", dropout_p=0.2, heads_q=4),
        Case("one_broadcast_over_keys", seqlen_q=20, seqlen_k=70, mask="b1q1", bias="b11k", bias_dtype=torch.float32),
        Case("one_query", seqlen_q=1, seqlen_k=99, mask="b11k", bias="bh1k", sinks=True),
        Case("one_key", seqlen_k=1, mask="b11k", bias="1hqk"),
    ],
    ids=lambda case: case.name,
)
def test_gradients_of_features_together(case):
    assert check_backward("flash", case, DEVICE, torch.bfloat16).status == "passed"


def shifted(*shape):
    """Contiguous, one element past an aligned address."""
    return bias_of(torch.Size(shape).numel() + 1)[1:].view(shape)


def cut(*shape):
    """Padded rows, between which there is NaN."""
    *rows, keys = shape
    memory = torch.full((*rows, (keys + 31) // 16 * 16), float("nan"), device=DEVICE, dtype=torch.bfloat16)
    return memory[..., :keys].copy_(bias_of(*shape))


def last_of_memory(*shape):
    """Padded rows but for the last, which ends where the memory does."""
    *rows, keys = shape
    steps = torch.empty(*rows, (keys + 15) // 16 * 16, device="meta").stride()
    end = sum((size - 1) * step for size, step in zip(shape, steps, strict=True)) + 1
    return bias_of(end).as_strided(shape, steps)


ROWS = (2, 2, 21, 45)
BIASES = {  # a bias, and whether it is copied
    "contiguous": (lambda: bias_of(*ROWS), True),
    "a multiple of 16 bytes but not of 16 elements": (lambda: bias_of(2, 2, 21, 40), True),
    "padded": (lambda: cut(*ROWS), False),
    "a multiple of 16": (lambda: bias_of(2, 2, 21, 48), False),
    "at an odd address": (lambda: shifted(2, 2, 21, 48), True),
    "at the end of memory": (lambda: last_of_memory(*ROWS), True),
    "one row, padded": (lambda: cut(2, 2, 1, 45), False),
    "one row a head": (lambda: bias_of(1, 2, 1, 45), True),
    "one row": (lambda: bias_of(1, 1, 1, 45), True),
    "one element a row": (lambda: bias_of(2, 2, 21, 1), False),
    "expanded": (lambda: bias_of(2, 1, 21, 45).expand(ROWS), True),
    "expanded along keys": (lambda: bias_of(2, 2, 21, 1).expand(ROWS), False),
    "transposed": (lambda: bias_of(2, 2, 45, 21).mT, False),
    "every other": (lambda: bias_of(2, 2, 21, 90)[..., ::2], False),
    "heads last": (lambda: bias_of(2, 21, 2, 45).transpose(1, 2), True),
    "overlapping": (lambda: bias_of(1, 1, 65).unfold(-1, 45, 1), False),
}
APART = ("transposed", "every other", "overlapping")
"""Those whose rows are neither padded nor copied."""


@pytest.mark.parametrize("name", BIASES)
def test_what_is_copied(name):
    make, copied = BIASES[name]
    bias = make()
    for field, pairs in (("bias", bias), ("mask", in_bytes(bias))):
        padded = with_padded_rows(given(**{field: pairs}))
        kept = getattr(padded, field)
        assert (kept is not pairs) == copied
        if copied:
            rows = [size for size, stride in zip(pairs.shape[:-1], pairs.stride()[:-1], strict=True) if stride]
            assert kept.untyped_storage().nbytes() == math.prod(rows) * 48 * pairs.element_size(), "nothing is expanded"
            assert kept.shape == pairs.shape and torch.equal(kept, pairs)
            assert with_padded_rows(padded) is padded
        assert readable_keys(padded, 45) == (45 if name in APART else 48)


def in_bytes(bias):
    """A mask with a bias's strides, in as many elements of memory, and as far from an aligned address."""
    size = bias.untyped_storage().nbytes() // bias.element_size()
    torch.manual_seed(0)
    memory = torch.rand(size, device=DEVICE) > 0.3
    return memory.as_strided(bias.shape, bias.stride(), bias.storage_offset())


@pytest.mark.usefixtures("nan_in_new_memory")
@pytest.mark.parametrize("name", BIASES)
def test_results_do_not_depend_on_how_rows_lie(name):
    bias = BIASES[name][0]().detach()
    seqlen_k = 45 if bias.shape[-1] == 1 else bias.shape[-1]
    q, k, v = (torch.randn(2, n, 2, 16, device=DEVICE, dtype=torch.bfloat16) for n in (21, seqlen_k, seqlen_k))
    results = []
    for pairs, mask in ((bias, in_bytes(bias)), (bias.contiguous(), in_bytes(bias).contiguous())):
        given = [t.detach().requires_grad_() for t in (q, k, v, pairs)]
        out = regard.attention(*given[:3], bias=given[3], mask=mask, backend="flash")
        results.append([out, *torch.autograd.grad(out.square().sum(), given)])
    for found, wanted in zip(*results, strict=True):
        assert found.isfinite().all() and torch.equal(found, wanted)


def test_without_mask_and_bias_nothing_is_read():
    inputs = given()
    assert with_padded_rows(inputs) is inputs and readable_keys(inputs, 45) is None


def test_padding_of_one_is_of_no_use_without_the_other():
    padded, apart = bias_of(1, 1, 4, 48)[..., :45], bias_of(1, 1, 4, 90)[..., ::2]
    assert readable_keys(given(bias=padded), 45) == 48
    assert readable_keys(given(bias=padded, mask=apart > 0), 45) == 45
    assert readable_keys(given(bias=apart), 45) == 45


def test_each_call_copies_anew():
    q, k, v = (torch.randn(1, n, 1, 16, device=DEVICE, dtype=torch.float16) for n in (5, 45, 45))
    bias = torch.zeros(1, 1, 5, 45, device=DEVICE, dtype=torch.float16)
    first = regard.attention(q, k, v, bias=bias, backend="flash")
    bias[..., :44] = float("-inf")
    second = regard.attention(q, k, v, bias=bias, backend="flash")
    assert not torch.equal(first, second)
    assert torch.allclose(second, v[:, 44:].expand_as(second))


def test_launches_are_told_how_far_rows_can_be_read():
    q, k = (torch.empty(2, n, 4, 64, device="meta", dtype=torch.bfloat16) for n in (33, 45))
    rows = torch.empty(2, 4, 33, device="meta")
    bias = torch.empty(2, 1, 33, 45, device="meta", dtype=torch.bfloat16)
    inputs = with_padded_rows(AttentionInputs(q, k, k, bias=bias))
    config = AttentionConfig.from_tensors(q, k, k, bias=bias)
    made = [
        flash.forward_launches(config, inputs, q, rows)[0],
        *flash_launches.backward_launches(config, inputs, q, rows, rows, inputs),
        flash_launches.bias_launch(config, inputs, q, rows, rows, flash_launches.new_bias_gradient(config, bias)),
    ]
    assert [launch.arguments["readable_k"] for launch in made] == [48] * 4
    assert all(launch.arguments["bias_strides"] == (33 * 48, 0, 48, 1) for launch in made)
