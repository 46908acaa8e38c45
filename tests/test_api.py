"""The public calls as a user meets them: shapes, layouts, autocast, lse, merge, explain."""

import math

import pytest
import torch

import regard
from regard import ConfigError
from regard.testing import assert_close


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


Q, K, V = normal(2, 5, 6, 16), normal(2, 9, 2, 16, seed=1), normal(2, 9, 2, 24, seed=2)


def test_shapes_dtypes_and_lse():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        out, lse = regard.attention(*(t.to(dtype) for t in (Q, K, V)), return_lse=True)
        assert (out.shape, out.dtype) == ((2, 5, 6, 24), dtype)
        assert (lse.shape, lse.dtype) == ((2, 6, 5), torch.float32)
    assert isinstance(regard.attention(Q, K, V), torch.Tensor)


@pytest.mark.parametrize("backend", ["cpu", "flash"])
@pytest.mark.parametrize("name", ["sinks", "alibi_slopes"])
def test_values_of_heads_may_have_any_stride(backend, name):
    reasons = regard.explain(Q, K, V).reasons(backend)
    if reasons:
        pytest.skip("; ".join(map(str, reasons)))
    for values in (normal(12, seed=3)[::2], normal(1, seed=3).expand(6)):
        out, expected = (regard.attention(Q, K, V, backend=backend, **{name: t}) for t in (values, values.contiguous()))
        assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", ["cpu", "flash"])
def test_lazily_negated_views(backend):
    if reasons := regard.explain(Q, K, V).reasons(backend):
        pytest.skip("; ".join(map(str, reasons)))
    negated = torch.view_as_complex(normal(2, 9, 2, 16, 2, seed=3)).conj().imag
    assert negated.is_neg()
    expected = regard.attention(Q, negated.resolve_neg(), V, backend=backend)
    assert torch.equal(regard.attention(Q, negated, V, backend=backend), expected)


def test_float64_is_served_by_the_reference():
    out = regard.attention(Q.double(), K.double(), V.double())
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, regard.attention(Q, K, V, backend="reference").double(), rtol=1e-5, atol=1e-5)


def test_bhsd_is_the_same_call_transposed():
    out, lse = regard.attention(Q, K, V, causal=True, return_lse=True)
    swapped, swapped_lse = regard.attention(
        *(t.transpose(1, 2) for t in (Q, K, V)), causal=True, layout="bhsd", return_lse=True
    )
    assert torch.equal(swapped.transpose(1, 2), out) and torch.equal(swapped_lse, lse)


@pytest.mark.parametrize("shape", [(9,), (5, 9), (6, 5, 9), (1, 6, 1, 9)])
def test_mask_and_bias_of_fewer_dimensions_broadcast_from_the_right(shape):
    mask, bias = normal(*shape) > -0.5, normal(*shape, seed=3)
    full = (2, 6, 5, 9)
    out = regard.attention(Q, K, V, mask=mask, bias=bias)
    expected = regard.attention(Q, K, V, mask=mask.expand(full), bias=bias.expand(full))
    torch.testing.assert_close(out, expected)


def test_every_way_to_say_causal_agrees():
    expected = regard.attention(Q, K, V, causal=True)
    lower = torch.ones(5, 9, dtype=torch.bool).tril(9 - 5)
    torch.testing.assert_close(regard.attention(Q, K, V, mask=lower), expected)
    torch.testing.assert_close(regard.attention(Q, K, V, window=(None, 0)), expected)
    torch.testing.assert_close(regard.attention(Q, K, V, window=[100, 0]), expected)
    hidden = torch.zeros(5, 9).masked_fill(~lower, -math.inf)
    torch.testing.assert_close(regard.attention(Q, K, V, bias=hidden), expected)


def test_inputs_are_left_alone():
    tensors = [t.clone() for t in (Q, K, V)]
    regard.attention(*tensors, causal=True, softcap=3.0)
    assert all(torch.equal(a, b) for a, b in zip(tensors, (Q, K, V), strict=True))


def test_autocast_takes_float32_to_its_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        out = regard.attention(Q, K, V)
        assert regard.attention(Q.double(), K.double(), V.double()).dtype == torch.float64
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, regard.attention(Q.bfloat16(), K.bfloat16(), V.bfloat16()))
    cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32) for n in (5, 9))
    with torch.autocast("cpu", torch.bfloat16):
        assert regard.varlen_attention(Q[0], K[0], V[0], cu_q, cu_k).dtype == torch.bfloat16


def test_varlen_equals_padded():
    lens_q, lens_k = (5, 2), (9, 4)
    q, k, v = (torch.cat([t[0, :a], t[1, :b]]) for t, (a, b) in zip((Q, K, V), (lens_q, lens_k, lens_k), strict=True))
    cu_q, cu_k = (torch.tensor([0, a, a + b], dtype=torch.int32) for a, b in (lens_q, lens_k))
    out, lse = regard.varlen_attention(q, k, v, cu_q, cu_k, causal=True, return_lse=True)
    assert (out.shape, lse.shape) == ((7, 6, 24), (6, 7))
    second = regard.attention(Q[1:, :2], K[1:, :4], V[1:, :4], causal=True)
    torch.testing.assert_close(out[5:], second[0])


def test_paged_equals_contiguous():
    pages_k, pages_v = (t.reshape(2 * 3, 3, 2, -1)[[3, 0, 4, 2, 5, 1]] for t in (K, V))
    table = torch.tensor([[1, 5, 3], [0, 2, 4]], dtype=torch.int32)
    lens = torch.tensor([9, 4], dtype=torch.int32)
    out = regard.paged_attention(Q[:, :2], pages_k, pages_v, table, lens)
    torch.testing.assert_close(out, regard.attention(Q[:, :2], K, V, kv_lens=lens, causal=True))


# merge


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cuts", [(4,), (2, 3, 8), (0, 9)])
def test_merge_of_split_keys_equals_the_whole(dtype, cuts):
    q, k, v = (t.to(dtype) for t in (Q, K, V))
    bounds = [0, *cuts, 9]
    parts = [
        regard.attention(q, k[:, a:b], v[:, a:b], return_lse=True) for a, b in zip(bounds, bounds[1:], strict=False)
    ]
    out, lse = regard.merge([out for out, _ in parts], [lse for _, lse in parts])
    whole = regard.attention(q, k, v, return_lse=True)
    truth = regard.attention(q.double(), k.double(), v.double(), return_lse=True)
    assert out.dtype == dtype
    assert_close(out, truth[0], whole[0])
    assert_close(lse, truth[1], whole[1], name="lse")


def test_merge_of_rows_that_saw_nothing_stays_zero_and_minus_infinity():
    nothing = torch.zeros(1, 3, 2, 4), torch.full((1, 2, 3), -math.inf)
    out, lse = regard.merge([nothing[0]] * 2, [nothing[1]] * 2)
    assert torch.equal(out, nothing[0]) and torch.equal(lse, nothing[1])
    some = normal(1, 3, 2, 4), normal(1, 2, 3)
    out, lse = regard.merge([nothing[0], some[0]], [nothing[1], some[1]])
    torch.testing.assert_close((out, lse), some)


@pytest.mark.parametrize("outs, lses", [([], []), ([Q], []), ([Q, Q], [Q])])
def test_merge_of_mismatched_lists_is_an_error(outs, lses):
    with pytest.raises(ConfigError, match="outs, lses"):
        regard.merge(outs, lses)


@pytest.mark.parametrize(
    "outs, lses", [([Q, K], [Q[..., 0].mT] * 2), ([Q], [Q[..., 0]]), ([Q.transpose(1, 2)], [Q]), ([Q[0, 0]], [Q[0, 0]])]
)
def test_merge_names_a_shape_that_does_not_fit(outs, lses):
    with pytest.raises(ConfigError, match=r"(outs|lses)\[\d\]: got shape"):
        regard.merge(outs, lses)


LSE = Q[..., 0].mT


@pytest.mark.parametrize(
    "outs, lses, match",
    [
        (None, None, "outs, lses: got NoneType"),
        ((Q for _ in range(2)), [LSE] * 2, "outs, lses: got generator"),
        ([Q.numpy()], [LSE], r"outs\[0\]: got ndarray"),
        ([Q, Q], [LSE, None], r"lses\[1\]: got NoneType"),
        ([Q.int()] * 2, [LSE] * 2, r"outs\[0\]: got torch.int32"),
        ([Q] * 2, [LSE, LSE.long()], r"lses\[1\]: got torch.int64"),
        ([Q, Q.to("meta")], [LSE] * 2, r"outs\[1\]: got device meta"),
    ],
)
def test_merge_names_what_is_no_part(outs, lses, match):
    with pytest.raises(ConfigError, match=match):
        regard.merge(outs, lses)


@pytest.mark.parametrize("hidden_row", [None, 2])
def test_merge_is_differentiable(hidden_row):
    q, k, v = (t.double().requires_grad_() for t in (Q, K, V))
    mask = torch.ones(5, 9, dtype=torch.bool)
    if hidden_row is not None:
        mask[hidden_row] = False
    parts = [
        regard.attention(q, k[:, s], v[:, s], mask=mask[:, s], return_lse=True) for s in (slice(0, 4), slice(4, 9))
    ]
    merged = regard.merge([out for out, _ in parts], [lse for _, lse in parts])[0]
    whole = regard.attention(q, k, v, mask=mask)
    found, expected = (torch.autograd.grad(out.sin().sum(), [q, k, v]) for out in (merged, whole))
    torch.testing.assert_close(found, expected)


# explain


def test_explain_takes_a_config_or_the_tensors_of_any_call():
    config = regard.AttentionConfig.from_tensors(Q, K, V, causal=True)
    assert regard.explain(Q, K, V, causal=True) == regard.explain(config)
    cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32) for n in (5, 9))
    assert regard.explain(Q[0], K[0], V[0], cu_seqlens_q=cu_q, cu_seqlens_k=cu_k).config.varlen
    table, lens = torch.tensor([[0], [1]], dtype=torch.int32), torch.tensor([9, 9], dtype=torch.int32)
    assert regard.explain(Q, K, V, block_table=table, kv_lens=lens).config.page_size == 9
    named = regard.explain(Q, K, V, backend="reference")
    assert named.chosen.strict and named.chosen.backend == "reference"
    assert "> reference" in str(named)
    with pytest.raises(ConfigError, match="q: got an AttentionConfig together with"):
        regard.explain(config, causal=True)
    with pytest.raises(ConfigError, match="backend: got 'no_such_backend'"):
        regard.explain(config, backend="no_such_backend")


def test_explain_tells_what_the_call_then_does():
    with regard.record_selections() as record:
        regard.attention(Q, K, V, window=(3, 1))
    assert regard.explain(Q, K, V, window=(3, 1)).chosen == record[0][1]


def test_explain_answers_for_a_machine_that_is_not_there():
    config = regard.AttentionConfig(
        batch=1, seqlen_q=4096, seqlen_k=4096, heads_q=32, heads_kv=8, head_dim=128, device="cuda", arch="gfx1100"
    )
    explanation = regard.explain(config)
    assert {name for name, _ in explanation.entries} == set(regard.list_backends())
    assert "gfx1100" in str(explanation)
