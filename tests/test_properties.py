"""Properties over random shapes, masks, windows and scales: what must hold for every input, not for chosen ones."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import regard
from regard.testing import Case, assert_close, check_forward, make_inputs

FAST = [name for name in ("reference", "cpu") if name in regard.list_backends()]
PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)

windows = st.none() | st.tuples(*[st.none() | st.integers(0, 12)] * 2)
patterns = st.none() | st.tuples(*(st.sampled_from((letter, "1")) for letter in "bhqk")).map("".join)


@st.composite
def cases(draw):
    group, heads_kv = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    seqlen_k = draw(st.integers(0, 40))
    batch = draw(st.integers(1, 3))
    return Case(
        name="drawn",
        batch=batch,
        seqlen_q=draw(st.integers(0, 40)),
        seqlen_k=seqlen_k,
        heads_q=group * heads_kv,
        heads_kv=heads_kv,
        head_dim=draw(st.integers(1, 33)),
        head_dim_v=draw(st.none() | st.integers(1, 20)),
        causal=draw(st.booleans()),
        window=draw(windows),
        softmax_scale=draw(st.none() | st.floats(-2, 2, width=32)),
        softcap=draw(st.just(0.0) | st.floats(0.5, 30, width=32)),
        mask=draw(patterns),
        bias=draw(patterns),
        empty_rows=draw(st.booleans()),
        alibi=draw(st.sampled_from((None, "h", "bh"))),
        sinks=draw(st.booleans()),
        dropout_p=draw(st.sampled_from((0.0, 0.0, 0.3))),
        kv_lens=draw(st.none() | st.tuples(*[st.integers(0, seqlen_k)] * batch)),
        layout=draw(st.sampled_from(("bshd", "bhsd"))),
        strides=draw(st.sampled_from(("contiguous", "heads_outside", "head_dim_sliced", "head_dim_every_other"))),
    )


@pytest.mark.parametrize("backend", FAST)
@PROPERTY
@given(case=cases(), dtype=st.sampled_from((torch.float32, torch.bfloat16)))
def test_any_call_obeys_the_rule(backend, case, dtype):
    assert check_forward(backend, case, dtype=dtype).status == "passed"


@pytest.mark.parametrize("backend", FAST)
@PROPERTY
@given(case=cases())
def test_rows_are_weighted_means_of_the_values(backend, case):
    """Without dropout no output leaves the range of the visible values; rows that see nothing are 0 and -inf."""
    call = make_inputs(case)
    options = {"dropout_p": 0.0} if case.dropout_p else {}
    out, lse = call(backend, return_lse=True, **options)
    assert out.isfinite().all() and not lse.isnan().any()
    if out.numel() and case.seqlen_k:
        v = call.tensors["v"].nan_to_num(0.0)
        assert out.abs().max() <= v.abs().max() * (1 + 1e-5)
    if case.layout == "bhsd":
        out = out.transpose(1, 2)
    blind = (lse == -math.inf).transpose(1, 2)
    assert (out[blind] == 0).all()


def normal(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


@pytest.mark.parametrize("backend", FAST)
@PROPERTY
@given(
    seqlen_k=st.integers(1, 40),
    scale=st.floats(-2, 2, width=32),
    softcap=st.just(0.0) | st.floats(0.5, 30, width=32),
    seed=st.integers(0, 1000),
)
def test_order_of_the_keys_does_not_matter_without_positions(backend, seqlen_k, scale, softcap, seed):
    q, k, v = normal(seed, (2, 7, 4, 8), (2, seqlen_k, 2, 8), (2, seqlen_k, 2, 5))
    order = torch.randperm(seqlen_k, generator=torch.Generator().manual_seed(seed))
    options = {"softmax_scale": scale, "softcap": softcap}
    plain = regard.attention(q, k, v, **options, backend=backend)
    shuffled = regard.attention(q, k[:, order], v[:, order], **options, backend=backend)
    truth = regard.attention(q.double(), k.double(), v.double(), **options, backend="reference")
    assert_close(shuffled, truth, plain)


@pytest.mark.parametrize("backend", FAST)
@PROPERTY
@given(
    lens=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=5),
    causal=st.booleans(),
    window=windows,
)
def test_packed_sequences_do_not_see_each_other(backend, lens, causal, window):
    lens_q, lens_k = (tuple(side) for side in zip(*lens, strict=True))
    case = Case("drawn", lens_q=lens_q, lens_k=lens_k, heads_q=4, head_dim=8, causal=causal, window=window)
    assert check_forward(backend, case).status == "passed"


@pytest.mark.parametrize("backend", FAST)
@PROPERTY
@given(cut=st.integers(0, 30), seqlen_k=st.integers(1, 30), seed=st.integers(0, 100))
def test_attention_over_split_keys_merges(backend, cut, seqlen_k, seed):
    q, k, v = normal(seed, (1, 3, 2, 8), (1, seqlen_k, 2, 8), (1, seqlen_k, 2, 8))
    cut = min(cut, seqlen_k)
    halves = (slice(cut), slice(cut, None))
    parts = [regard.attention(q, k[:, half], v[:, half], return_lse=True, backend=backend) for half in halves]
    merged, _ = regard.merge([out for out, _ in parts], [lse for _, lse in parts])
    truth = regard.attention(q.double(), k.double(), v.double(), backend="reference")
    assert_close(merged, truth, regard.attention(q, k, v, backend=backend))
