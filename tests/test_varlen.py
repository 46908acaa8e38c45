"""`varlen_attention`: every packed sequence gets what it gets alone, forward and backward, and nothing from the others."""

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import regard
from regard.testing import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FACTOR = 3.0  # of the correctness rule, for gradients


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def offsets(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(DEVICE)


def packed(lens_q, lens_k, heads=(4, 2), head_dim=16, dtype=torch.float32):
    """q, k, v and the offsets of sequences of these lengths."""
    q, k, v = (
        normal(sum(lens), count, head_dim, seed=seed, dtype=dtype)
        for seed, (lens, count) in enumerate(((lens_q, heads[0]), (lens_k, heads[1]), (lens_k, heads[1])))
    )
    return q, k, v, offsets(lens_q), offsets(lens_k)


def one_by_one(q, k, v, cu_q, cu_k, alibi_slopes=None, **options):
    """The same by `regard.attention` on one sequence after the other."""
    outs, lses = [], []
    for number, (rows, keys) in enumerate(zip(spans(cu_q), spans(cu_k), strict=True)):
        slopes = {} if alibi_slopes is None else {"alibi_slopes": alibi_slopes[number]}
        out, lse = regard.attention(
            q[None, rows], k[None, keys], v[None, keys], **options, **slopes, return_lse=True, backend="reference"
        )
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)


def spans(cu_seqlens):
    ends = cu_seqlens.tolist()
    return [slice(first, last) for first, last in zip(ends, ends[1:], strict=False)]


def results(attend, q, k, v, *cu_seqlens, sinks=None, **options):
    """out, lse, and the gradients of a loss in both, by name."""
    leaves = {"q": q, "k": k, "v": v} | ({} if sinks is None else {"sinks": sinks})
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in leaves.items()}
    extra = {} if sinks is None else {"sinks": leaves["sinks"]}
    out, lse = attend(leaves["q"], leaves["k"], leaves["v"], *cu_seqlens, **options, **extra)
    seen = torch.where(lse == -math.inf, 0.0, lse)
    loss = (out * normal(*out.shape, seed=8, dtype=out.dtype)).sum() + (seen * normal(*lse.shape, seed=9)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"out": out.detach(), "lse": lse.detach()} | {
        f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)
    }


def varlen(backend):
    def attend(*arguments, **options):
        return regard.varlen_attention(*arguments, **options, return_lse=True, backend=backend)

    return attend


def serves_gradients(backend):
    """Skip, in the backend's own words, where it has no gradient of packed sequences here."""
    q, k, v, cu_q, cu_k = packed((3,), (3,))
    config = regard.AttentionConfig.from_tensors(
        q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True, requires_grad=True
    )
    if reasons := regard.explain(config, backend=backend).reasons(backend):
        pytest.skip(f"{backend}: {'; '.join(map(str, reasons))}")


# name: (query lengths, key lengths, options)
CASES = {
    "different_lengths": ((17, 1, 40), (23, 31, 5), {}),
    "zero_lengths": ((9, 0, 4, 0, 0), (0, 7, 6, 0, 3), {}),
    "causal": ((5, 12, 1, 8), (9, 12, 30, 8), dict(causal=True)),
    "causal_more_queries_than_keys": ((20, 6, 9), (7, 6, 0), dict(causal=True)),
    "window": ((30, 3, 11), (30, 21, 4), dict(window=(6, 2))),
    "window_causal": ((30, 3), (41, 21), dict(window=(6, None), causal=True)),
    "softcap_sinks_alibi": ((8, 0, 26), (19, 4, 20), dict(softcap=3.0, sinks=True, alibi_slopes=True, causal=True)),
}


HEADS = {"mha": (4, 4), "gqa": (6, 2), "mqa": (5, 1)}
TAKE_VARLEN = [name for name in regard.list_backends() if name != "sdpa"]


def in_budget(backend, name, heads):
    """Triton's interpreter takes seconds for a gradient: it runs the causal cases with grouped heads."""
    return backend != "flash" or DEVICE == "cuda" or (heads == "gqa" and "causal" in name)


@pytest.mark.parametrize(
    "backend, name, heads",
    [call for call in itertools.product(TAKE_VARLEN, CASES, HEADS) if in_budget(*call)],
)
def test_each_sequence_gets_what_it_gets_alone(backend, name, heads):
    serves_gradients(backend)
    heads, (lens_q, lens_k, options) = HEADS[heads], CASES[name]
    arguments = packed(lens_q, lens_k, heads)
    options = dict(options)
    if options.pop("sinks", False):
        options["sinks"] = normal(heads[0], seed=4)
    if options.pop("alibi_slopes", False):
        options["alibi_slopes"] = normal(len(lens_q), heads[0], seed=5).abs()
    found = results(varlen(backend), *arguments, **options)
    plain = results(one_by_one, *arguments, **options)
    exact = {n: t.double() if isinstance(t, torch.Tensor) else t for n, t in options.items()}
    truth = results(one_by_one, *(t.double() for t in arguments[:3]), *arguments[3:], **exact)
    for what, tensor in found.items():
        assert_close(tensor, truth[what], plain[what], name=what, factor=FACTOR)


lengths = st.integers(0, 9)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lens=st.lists(st.tuples(lengths, lengths), min_size=1, max_size=5),
    causal=st.booleans(),
    window=st.none() | st.tuples(st.none() | st.integers(0, 6), st.none() | st.integers(0, 6)),
    group=st.integers(1, 3),
)
def test_any_lengths_agree_in_float64(lens, causal, window, group):
    lens_q, lens_k = zip(*lens, strict=True)
    arguments = packed(lens_q, lens_k, (2 * group, 2), head_dim=5, dtype=torch.float64)
    backend = "cpu" if DEVICE == "cpu" else "reference"
    found = results(varlen(backend), *arguments, causal=causal, window=window)
    expected = results(one_by_one, *arguments, causal=causal, window=window)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def differentiating_backends():
    return [name for name in ("cpu" if DEVICE == "cpu" else "flash", "reference") if name in regard.list_backends()]


@pytest.mark.parametrize("backend", differentiating_backends())
def test_a_sequence_without_a_partner_is_zero_and_gets_zero_gradients(backend):
    serves_gradients(backend)
    lens_q, lens_k = (4, 0, 5), (0, 6, 7)
    found = results(varlen(backend), *packed(lens_q, lens_k), causal=True)
    assert (found["out"][:4] == 0).all() and (found["lse"][:, :4] == -math.inf).all()
    assert (found["dq"][:4] == 0).all()
    assert (found["dk"][:6] == 0).all() and (found["dv"][:6] == 0).all()
    assert all(found[name][-5:].abs().sum() > 0 for name in ("out", "dq", "dk", "dv"))


@pytest.mark.parametrize("backend", differentiating_backends())
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_one_sequence_holds_stays_in_it(backend, poison):
    serves_gradients(backend)
    lens_q, lens_k = (6, 5, 7), (9, 4, 7)
    q, k, v, cu_q, cu_k = packed(lens_q, lens_k)
    clean = results(varlen(backend), q, k, v, cu_q, cu_k, causal=True, deterministic=True)
    for tensor, cu_seqlens in ((q, cu_q), (k, cu_k), (v, cu_k)):
        tensor[spans(cu_seqlens)[1]] = poison
    found = results(varlen(backend), q, k, v, cu_q, cu_k, causal=True, deterministic=True)
    assert not found["out"][spans(cu_q)[1]].isfinite().any()
    for name, tensor in found.items():
        tensor, expected = (t.T if name == "lse" else t for t in (tensor, clean[name]))
        for number in (0, 2):
            span = spans(cu_q if name in ("out", "lse", "dq") else cu_k)[number]
            torch.testing.assert_close(tensor[span], expected[span], rtol=1e-6, atol=1e-6, msg=f"{name} of {number}")


@pytest.mark.parametrize("backend", differentiating_backends())
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_sequences_of_one_length_are_a_batch(backend, dropout_p):
    """Also the dropout masks: they are drawn for (sequence, head, query, key), packed or not."""
    serves_gradients(backend)
    batch, seqlen_q, seqlen_k = 3, 7, 10
    q, k, v, cu_q, cu_k = packed([seqlen_q] * batch, [seqlen_k] * batch)

    def batched(q, k, v, **options):
        q, k, v = (t.unflatten(0, (batch, -1)) for t in (q, k, v))
        out, lse = regard.attention(q, k, v, **options, return_lse=True, backend=backend)
        return out.flatten(0, 1), lse.transpose(0, 1).flatten(1)

    options = dict(causal=True, dropout_p=dropout_p)
    torch.manual_seed(6)
    found = results(varlen(backend), q, k, v, cu_q, cu_k, **options)
    torch.manual_seed(6)
    expected = results(lambda q, k, v, *_, **options: batched(q, k, v, **options), q, k, v, **options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", differentiating_backends())
def test_views_of_one_packed_projection(backend):
    """q, k and v as strided views of one (total, heads, D) tensor, as models make them: one gradient comes back."""
    serves_gradients(backend)
    cu = offsets((5, 0, 8))
    projection = normal(13, 8, 16).requires_grad_()

    def loss(attend, tensor):
        out, lse = attend(*tensor.split((4, 2, 2), dim=1), cu, cu, causal=True)
        return (out * normal(*out.shape, seed=3)).sum() + (lse * normal(*lse.shape, seed=4)).sum()

    (found,) = torch.autograd.grad(loss(varlen(backend), projection), projection)
    (expected,) = torch.autograd.grad(loss(one_by_one, projection), projection)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_longest_length_may_be_left_out_or_overstated():
    arguments = packed((6, 0, 3), (4, 5, 8))
    expected = regard.varlen_attention(*arguments, causal=True)
    assert torch.equal(regard.varlen_attention(*arguments, 6, 8, causal=True), expected)
    torch.testing.assert_close(regard.varlen_attention(*arguments, 100, 77, causal=True), expected)


@pytest.mark.parametrize("lens", [(), (0,), (0, 0)])
def test_nothing_at_all(lens):
    found = results(varlen(None), *packed(lens, lens))
    assert found["out"].shape == (0, 4, 16) and found["lse"].shape == (4, 0)
    assert found["dq"].shape == (0, 4, 16) and found["dk"].shape == (0, 2, 16)


def test_offsets_written_behind_torchs_back_count():
    q, k, v = (torch.randn(9, 2, 8) for _ in range(3))
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    call = functools.partial(regard.varlen_attention, q, k, v, backend="cpu")
    call(cu_seqlens, cu_seqlens)
    cu_seqlens.numpy()[1] = 1
    assert torch.equal(call(cu_seqlens, cu_seqlens), call(cu_seqlens.clone(), cu_seqlens.clone()))
    cu_seqlens.numpy()[1] = 10
    with pytest.raises(regard.ConfigError, match="cu_seqlens_q: got 9 after 10"):
        call(cu_seqlens, cu_seqlens)
