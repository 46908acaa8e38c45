"""What the conformance cases do not reach: long rows, memory, NaN under a mask, the backward by itself."""

import dataclasses
import itertools

import pytest
import torch

import regard
from regard.backends import cpu_fused
from regard.backends.cpu import CpuBackend
from regard.backends.reference import ReferenceBackend
from regard.config import AttentionConfig, AttentionInputs


def both(q, k, v, **arguments):
    return [regard.attention(q, k, v, backend=name, return_lse=True, **arguments) for name in ("cpu", "reference")]


def test_reasons():
    sizes = dict(batch=1, seqlen_q=4, seqlen_k=8, heads_q=2, heads_kv=1, head_dim=8, arch="cpu")
    backend = CpuBackend()
    assert not backend.unsupported_reasons(AttentionConfig(**sizes, kv_lens=True, page_size=4))
    for fields, code in (
        (dict(device="cuda"), "device"),
        (dict(kv_lens=True, page_size=4, requires_grad=True), "backward"),
    ):
        assert [reason.code for reason in backend.unsupported_reasons(AttentionConfig(**sizes, **fields))] == [code]


@pytest.mark.parametrize("band", [{}, {"causal": True}, {"window": (300, 10)}, {"window": (None, 3)}])
def test_rows_hidden_over_several_key_blocks(band):
    """Rows hidden for the first key blocks only, and rows hidden for all of them, longer than the kernel's blocks."""
    q, k, v = torch.randn(1, 601, 2, 16), torch.randn(1, 1301, 1, 16), torch.randn(1, 1301, 1, 16)
    mask = torch.rand(1, 1, 601, 1301) < 0.5
    mask[..., 5, :] = False
    mask[..., 7, :900] = False
    (out, lse), (expected, expected_lse) = both(q, k, v, mask=mask, **band)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert lse[0, 0, 5] == float("-inf") and not out[0, 5].any()


def test_nan_of_a_hidden_key_does_not_leak():
    q, k, v = (torch.randn(1, 9, 2, 8) for _ in range(3))
    k[:, 4] = float("nan")
    mask = torch.ones(1, 1, 1, 9, dtype=torch.bool)
    mask[..., 4] = False
    (out, lse), (expected, expected_lse) = both(q, k, v, mask=mask)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("keys", [1, 5, 15, 16, 520])
@pytest.mark.parametrize("arguments", [{}, {"window": (4, 4)}, {"causal": True}])
def test_nan_of_a_query_stays_in_its_row(keys, arguments):
    """Of a row that is nothing but NaN torch's kernel makes zeros, where the keys are few."""
    q, k, v = torch.randn(1, 4, 2, 8), torch.randn(1, keys, 2, 8), torch.randn(1, keys, 2, 8)
    q[0, 3, 1, 2] = float("nan")  # the last row sees keys in any case
    results = both(q, k, v, **arguments)
    for out, lse in results:
        assert out[0, 3, 1].isnan().all() and lse[0, 1, 3].isnan() and out.isnan().sum() == 8
    torch.testing.assert_close(*results, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("feature", ["plain", "causal", "mask", "bias", "alibi", "window"])
def test_infinite_scores_give_nan_and_not_zero(feature, rows, dtype):
    """Torch's bfloat16 exponentials take the NaN of infinity less infinity for 0."""
    options = {
        "causal": dict(causal=True), "mask": dict(mask=torch.rand(rows, 70) < 0.7), "window": dict(window=(40, 40)),
        "bias": dict(bias=torch.randn(rows, 70)), "alibi": dict(alibi_slopes=torch.rand(2)),
    }.get(feature, {})  # fmt: skip
    for value, place in itertools.product((float("inf"), float("-inf"), 3e30), ("q", "k")):
        tensors = {
            name: torch.randn(2, length, 2, 16).to(dtype) for name, length in (("q", rows), ("k", 70), ("v", 70))
        }
        tensors[place][0, rows // 2, 1, 3] = value
        if value == 3e30:
            tensors["k" if place == "q" else "q"][0, :, 1] *= 1e30  # the products overflow
        out, again = (regard.attention(**tensors, backend="cpu", **options) for _ in range(2))
        expected = regard.attention(**tensors, backend="reference", **options)
        torch.testing.assert_close(out, expected, equal_nan=True, atol=3e-2, rtol=3e-2)
        torch.testing.assert_close(out, again, equal_nan=True, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("side", [3, 190])
def test_an_additive_mask_is_made_of_any_strides(side, dtype):
    square = torch.rand(side, side) > 0.5
    for mask in (square, square.T, square[:, :1].expand(-1, side), square[::2, 1:], square.flip(1)):
        expected = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, float("-inf"))
        assert torch.equal(cpu_fused.additive_mask(mask, dtype), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_of_a_sink_stays_in_its_head(value):
    q, k, v = (torch.randn(1, 9, 2, 8) for _ in range(3))
    results = both(q, k, v, sinks=torch.tensor([value, 0.0]))
    for out, lse in results:
        assert out[:, :, 0].isnan().all() and lse[:, 0].isnan().all()
    torch.testing.assert_close(*results, equal_nan=True)


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_causal_with_a_scale_that_is_not_positive(scale):
    q, k, v = (torch.randn(1, 9, 2, 8) for _ in range(3))
    (out, _), (expected, _) = both(q, k, v, causal=True, softmax_scale=scale)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_a_bias_in_a_wider_dtype(softcap):
    q, k, v = (torch.randn(1, 9, 2, 8, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, 2, 9, 9, dtype=torch.float64)
    (out, _), (expected, _) = both(q, k, v, bias=bias, softcap=softcap)
    torch.testing.assert_close(out, expected)
    found, wanted = torch.autograd.grad(out.sum(), q), torch.autograd.grad(expected.sum(), q)
    torch.testing.assert_close(found, wanted)


def test_a_window_makes_no_square_of_scores():
    length = 20_000
    q, k, v = (torch.randn(1, length, 1, 8) for _ in range(3))
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        regard.attention(q, k, v, window=(64, 0), backend="cpu")
    assert max(event.cpu_memory_usage for event in profile.events()) < length * length / 8


def test_a_large_bias_of_another_dtype_is_converted_in_parts():
    length = 4096
    q, k, v = (torch.randn(1, length, 1, 16) for _ in range(3))
    bias = torch.randn(length, length, dtype=torch.bfloat16)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        regard.attention(q, k, v, bias=bias, backend="cpu")
    assert max(event.cpu_memory_usage for event in profile.events()) < bias.nbytes


def test_backward_in_float64_with_everything():
    """Blocks of several sizes, every input that has a gradient, against the reference to float64's precision."""
    torch.manual_seed(1)
    shape = dict(dtype=torch.float64)
    inputs = AttentionInputs(
        q=torch.randn(2, 130, 4, 12, **shape),
        k=torch.randn(2, 700, 2, 12, **shape),
        v=torch.randn(2, 700, 2, 20, **shape),
        mask=torch.rand(1, 4, 130, 1) < 0.9,
        bias=torch.randn(2, 1, 1, 700, **shape),
        alibi_slopes=torch.rand(4, **shape),
        sinks=torch.randn(4, **shape),
        kv_lens=torch.tensor([650, 700], dtype=torch.int32),
        dropout_seed=torch.tensor([5]),
    )
    arguments = {name: t for name, t in inputs._asdict().items() if name != "dropout_seed" and t is not None}
    config = AttentionConfig.from_tensors(
        **arguments, causal=True, window=(600, 0), softcap=3.0, dropout_p=0.2, return_lse=True
    )
    config = dataclasses.replace(config, requires_grad=True)
    out, lse = CpuBackend().forward(config, inputs)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    found = CpuBackend().backward(config, inputs, out, lse, grad_out, grad_lse)
    expected = ReferenceBackend().backward(config, inputs, out, lse, grad_out, grad_lse)
    assert set(found) == {"q", "k", "v", "bias", "sinks"}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("causal", [False, True])
def test_plain_gradients_are_the_fused_kernels(causal):
    """Grouped heads, an expanded output gradient, and no time lost: algorithm 2 in torch operations is never entered."""
    q, k, v = (torch.randn(2, 70, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    results = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for deterministic in (False, True):
            out = regard.attention(q, k, v, causal=causal, backend="cpu", deterministic=deterministic)
            results.append(torch.autograd.grad(out.sum(), (q, k, v)))
    torch.testing.assert_close(*results)
    calls = [event.name for event in profile.events() if "flash_attention_for_cpu_backward" in event.name]
    assert len(calls) == 1


@pytest.mark.parametrize(
    "options",
    [
        dict(causal=True),
        dict(window=(5, 3)),
        dict(causal=True, softcap=5.0),
        dict(alibi_slopes=torch.tensor([0.5, 0.25, 0.1, 0.0])),
        dict(kv_lens=torch.tensor([7, 30], dtype=torch.int32)),
        dict(dropout_p=0.2),
    ],
    ids=lambda options: next(reversed(options)),
)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_tensors_decide_the_device_and_not_the_default(backend, options):
    def run():
        torch.manual_seed(0)
        q, k, v = (torch.randn(2, length, heads, 16, device="cpu") for length, heads in ((20, 4), (33, 2), (33, 2)))
        q.requires_grad_()
        out, lse = regard.attention(q, k, v, backend=backend, return_lse=True, **options)
        out.sum().backward()
        return out, lse, q.grad

    expected = run()
    with torch.device("meta"):
        found = run()
    assert all(map(torch.equal, found, expected))
