"""Calls of q, k, v, a mask and a bias may skip the canonical inputs: the same answer, and only where no more is asked."""

import contextlib
import operator

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard.backends.reference import ReferenceBackend
from regard.registry import registry
from regard.testing import assert_close

B = 2


class Short(ReferenceBackend):
    """The reference as a backend made of kernels, with a shortcut that leaves a trace."""

    name = "short"
    composed_of_torch_ops = False

    def __init__(self):
        self.taken = 0
        self.fails = False

    def shortcut(self, config, layout):
        def attend(q, k, v):
            self.taken += 1
            if self.fails:
                raise RuntimeError("no such kernel")
            return regard.attention(q, k, v, layout=layout, causal=config.causal, backend="reference")

        return attend


@pytest.fixture
def short():
    backend = Short()
    regard.register(backend, priority=99)
    yield backend
    regard.unregister("short")


def qkv(*, sq=9, sk=9, heads=4, heads_kv=2, head_dim=16, layout="bshd", dtype=torch.float32, batch=B):
    q, k, v = (
        torch.randn(batch, s, h, head_dim, dtype=dtype) for s, h in ((sq, heads), (sk, heads_kv), (sk, heads_kv))
    )
    return [t if layout == "bshd" else t.transpose(1, 2).contiguous() for t in (q, k, v)]


def requiring_gradient():
    return [t.requires_grad_() for t in qkv()]


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_plain_calls_take_it(short, layout):
    q, k, v = qkv(layout=layout)
    for taken in (1, 2):
        with regard.record_selections() as recorded:
            out = regard.attention(q, k, v, causal=True, layout=layout)
        assert short.taken == taken and recorded[0][1].backend == "short"
    torch.testing.assert_close(out, regard.attention(q, k, v, causal=True, layout=layout, backend="reference"))


MORE = {
    "lse": dict(return_lse=True),
    "window": dict(window=(3, 3)),
    "mask": dict(mask=torch.ones(9, 9, dtype=torch.bool)),
    "bias": dict(bias=torch.zeros(9, 9)),
    "softcap": dict(softcap=2.0),
    "slopes": dict(alibi_slopes=torch.ones(4)),
    "sinks": dict(sinks=torch.ones(4)),
    "lengths": dict(kv_lens=torch.tensor([9, 9], dtype=torch.int32)),
    "dropout": dict(dropout_p=0.5),
}


@pytest.mark.parametrize("options", MORE.values(), ids=MORE)
def test_calls_that_need_more_do_not(short, options):
    q, k, v = qkv()
    regard.attention(q, k, v)
    for _ in range(2):
        regard.attention(q, k, v, **options)
    assert short.taken == 1


def test_packed_paged_and_empty_calls_do_not(short):
    packed, offsets = torch.randn(9, 2, 8), torch.tensor([0, 4, 9], dtype=torch.int32)
    regard.varlen_attention(packed, packed, packed, offsets, offsets)
    cache, table = torch.randn(4, 3, 2, 8), torch.zeros(1, 2, dtype=torch.int32)
    regard.paged_attention(packed[None, :1], cache, cache, table, torch.tensor([4], dtype=torch.int32))
    assert not regard.attention(*qkv(sk=0)).any()
    assert short.taken == 0


def test_gradients_go_round_it_unless_autograd_sees_through(short):
    q, k, v = qkv()
    regard.attention(q, k, v)
    with torch.no_grad():
        regard.attention(*requiring_gradient())
    assert short.taken == 2
    regard.attention(*requiring_gradient()).sum().backward()
    assert short.taken == 2
    short.composed_of_torch_ops = True
    leaves = [torch.randn(1, 5, 2, 8, requires_grad=True) for _ in range(3)]
    regard.attention(*leaves).sum().backward()
    assert short.taken == 3 and all(t.grad.any() for t in leaves)


def test_traced_calls_go_round_it(short):
    q, k, v = qkv()
    regard.attention(q, k, v)
    torch.func.vmap(regard.attention)(q[None], k[None], v[None])
    with FlopCounterMode(display=False):
        regard.attention(q, k, v)
    with torch._subclasses.FakeTensorMode():
        regard.attention(*qkv())
    torch.compile(regard.attention, backend="aot_eager", fullgraph=True)(q, k, v)
    assert short.taken == 1


def test_autocast_comes_first(short):
    q, k, v = qkv()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert regard.attention(q, k, v).dtype == torch.bfloat16
    assert short.taken == 1 and regard.attention(q, k, v).dtype == torch.float32


def test_the_choice_of_the_moment_decides(short):
    q, k, v = qkv()
    regard.attention(q, k, v)
    regard.attention(q, k, v, backend="reference")
    with regard.use_backend("cpu"):
        regard.attention(q, k, v)
    regard.set_default("reference")
    try:
        regard.attention(q, k, v)
    finally:
        regard.set_default(None)
    assert short.taken == 1


@pytest.mark.parametrize("fails", [False, True])
def test_a_failure_is_handled_by_the_long_way(short, monkeypatch, fails):
    short.fails = True
    q, k, v = qkv()
    if fails:
        monkeypatch.setattr(short, "forward", lambda config, inputs: 1 / 0)
    with pytest.warns(regard.FallbackWarning, match="ZeroDivisionError") if fails else contextlib.nullcontext():
        out = regard.attention(q, k, v)
    torch.testing.assert_close(out, regard.attention(q, k, v, backend="reference"))
    assert ("quarantine" in [reason.code for reason in regard.explain(q, k, v).reasons("short")]) == fails


DECODING = [(1, 24, 4, 4), (1, 2500, 10, 2), (1, 2500, 10, 1), (1, 24, 4, 2), (1, 1, 4, 2)]  # Sq, Sk, Hq, Hk


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("backend", ["cpu", "sdpa"])
@pytest.mark.parametrize("sizes", [*DECODING, (19, 19, 4, 2), (9, 24, 4, 2)])
def test_shortcuts_are_exact(backend, sizes, dtype, layout):
    """Against the reference, in contiguous memory."""
    sq, sk, heads, heads_kv = sizes
    q, k, v = qkv(sq=sq, sk=sk, heads=heads, heads_kv=heads_kv, layout=layout, dtype=dtype, batch=3)
    causal = sq in (1, sk)
    config = regard.AttentionConfig.from_tensors(q, k, v, causal=causal, layout=layout)
    offered = registry.get(backend).shortcut(config, layout)
    assert (offered is None) == (backend == "cpu" and sk < 16)
    truth = regard.attention(q.double(), k.double(), v.double(), causal=causal, layout=layout, backend="reference")
    plain = regard.attention(q, k, v, causal=causal, layout=layout, backend="reference")
    out = regard.attention(q, k, v, causal=causal, layout=layout, backend=backend)
    assert_close(out, truth, plain)
    assert out.dtype == dtype
    assert out.is_contiguous() or (layout == "bhsd" and out.transpose(1, 2).is_contiguous())


MASKED = {  # Sq, Sk, causal, the mask's shape
    "every pair": (9, 24, False, (3, 4, 9, 24)),
    "of a batch": (9, 24, True, (3, 1, 1, 24)),
    "two dimensions": (19, 19, True, (19, 19)),
    "one dimension": (9, 24, False, (24,)),
    "a row for every head": (1, 40, True, (4, 1, 40)),
    "long row": (1, 2500, True, (3, 1, 1, 2500)),
    "a column": (24, 16, False, (24, 1)),
    "causal alone": (9, 24, True, None),
    "more queries than keys": (24, 17, True, None),
    "few keys": (9, 9, False, (9, 9)),
    "many rows": (300, 40, True, (300, 40)),
    "many pairs": (200, 170, True, (200, 170)),
    "many pairs of heads": (100, 90, False, (4, 100, 90)),
    "a long row for every head": (1, 2500, False, (4, 1, 2500)),
    "a long row for every sequence": (1, 2500, False, (2500,)),
}


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", MASKED.values(), ids=MASKED)
def test_masked_calls_are_exact(case, dtype, layout):
    """In every call alike, with rows and sequences that see nothing, and with NaN in a hidden key."""
    sq, sk, causal, shape = case
    q, k, v = qkv(sq=sq, sk=sk, layout=layout, dtype=dtype, batch=3)
    calls = [dict(causal=causal)]
    if shape is not None:
        some, first = torch.rand(shape) > 0.4, torch.rand(shape) > 0.4
        first[0] = False
        calls = [dict(causal=causal, mask=mask) for mask in (some, first, torch.zeros(shape, dtype=torch.bool), some)]
        if shape[-1] == sk:
            some[..., 3] = False
            k.select(1 if layout == "bshd" else 2, 3).fill_(float("nan"))
    for call in calls:
        for more in (dict(), dict(return_lse=True)):
            call = call | more | dict(layout=layout)
            truth = regard.attention(q.double(), k.double(), v.double(), **call, backend="reference")
            plain = regard.attention(q, k, v, **call, backend="reference")
            found = regard.attention(q, k, v, **call, backend="cpu")
            for one, of, beside in zip(*((x if more else [x]) for x in (found, truth, plain)), strict=True):
                assert_close(one, of, beside)


BIASED = {  # Sq, Sk, causal, the bias's shape, the mask's
    "every pair": (9, 24, False, (3, 4, 9, 24), None),
    "of a head": (19, 19, True, (4, 19, 19), None),
    "two dimensions": (9, 24, True, (9, 24), None),
    "one dimension": (9, 24, False, (24,), (3, 1, 9, 24)),
    "a column": (24, 40, False, (4, 24, 1), (24, 40)),
    "a row for every head": (1, 40, True, (4, 1, 40), (3, 1, 1, 40)),
    "many rows": (300, 40, False, (300, 40), None),
    "many pairs with a mask": (200, 170, True, (170,), (200, 170)),
}


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", BIASED.values(), ids=BIASED)
def test_biased_calls_are_exact(case, dtype, layout):
    """In the call's dtype and a wider one, of any strides, with rows that see nothing and infinities that are hidden."""
    sq, sk, causal, shape, mask_shape = case
    q, k, v = qkv(sq=sq, sk=sk, layout=layout, dtype=dtype, batch=3)
    call = dict(causal=causal, layout=layout)
    if mask_shape is not None:
        call["mask"] = torch.rand(mask_shape) > 0.4
        call["mask"][..., 3] = False
    biases = [torch.randn(shape, dtype=dtype), torch.randn(shape), torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]]
    biases[0][..., :5] = float("-inf")
    biases[1][0] = float("-inf")
    if shape[-1] == sk and mask_shape is not None:
        biases[1][..., 3] = float("inf")
    for bias in biases:
        for more in (dict(), dict(return_lse=True)):
            wide = dict(call, **more, bias=bias.double())
            truth = regard.attention(q.double(), k.double(), v.double(), **wide, backend="reference")
            plain = regard.attention(q, k, v, **call, **more, bias=bias, backend="reference")
            found = regard.attention(q, k, v, **call, **more, bias=bias, backend="cpu")
            for one, of, beside in zip(*((x if more else [x]) for x in (found, truth, plain)), strict=True):
                assert_close(one, of, beside)


def test_masks_and_biases_are_given_to_a_shortcut_as_they_are_in_every_call(short, monkeypatch):
    seen = []
    monkeypatch.setattr(short, "shortcut", lambda *_: lambda q, k, v, *shaping: seen.append(shaping) or q.clone())
    masks = [torch.ones(9, 9, dtype=torch.bool), torch.zeros(9, 9, dtype=torch.bool), torch.ones(9, dtype=torch.bool)]
    biases = [torch.zeros(9, 9), torch.ones(9, 9), torch.zeros(9)]
    for mask, bias in zip(masks, biases, strict=True):
        regard.attention(*qkv(), mask=mask)
        regard.attention(*qkv(), bias=bias)
        regard.attention(*qkv(), mask=mask, bias=bias)
    expected = [
        shaping for mask, bias in zip(masks, biases, strict=True) for shaping in ((mask,), (bias,), (mask, bias))
    ]
    assert len(seen) == 9
    for found, given in zip(seen, expected, strict=True):
        assert len(found) == len(given) and all(map(operator.is_, found, given))


def test_a_causal_mask_made_in_inference_mode_serves_training():
    with torch.inference_mode():
        regard.attention(*qkv(sq=7, sk=29), causal=True, backend="cpu")
    q, k, v = (t.requires_grad_() for t in qkv(sq=7, sk=29))
    regard.attention(q, k, v, causal=True, backend="cpu").sum().backward()
    found = [t.grad for t in (q, k, v)]
    expected = torch.autograd.grad(regard.attention(q, k, v, causal=True, backend="reference").sum(), (q, k, v))
    torch.testing.assert_close(found, list(expected))


@pytest.mark.parametrize("sizes", DECODING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_row_by_the_long_way(sizes, dtype):
    """Lengths, a bias for every head and lse go through the same kernel call."""
    sq, sk, heads, heads_kv = sizes
    q, k, v = qkv(sq=sq, sk=sk, heads=heads, heads_kv=heads_kv, dtype=dtype, batch=3)
    for options in (
        dict(kv_lens=torch.tensor([sk, 0, 1], dtype=torch.int32)),
        dict(bias=torch.randn(1, heads, 1, sk, dtype=dtype)),
        dict(mask=torch.rand(3, heads, 1, sk) > 0.5),
        dict(alibi_slopes=torch.rand(heads)),
        dict(),
    ):
        call = dict(options, return_lse=True)
        wide = {name: t.double() if t.is_floating_point() else t for name, t in options.items()} | {"return_lse": True}
        found = regard.attention(q, k, v, **call, backend="cpu")
        truth = regard.attention(q.double(), k.double(), v.double(), **wide, backend="reference")
        plain = regard.attention(q, k, v, **call, backend="reference")
        for one, of, beside in zip(found, truth, plain, strict=True):
            assert_close(one, of, beside)


def test_a_head_dim_that_is_not_the_innermost_is_not_given_to_the_kernel():
    q = torch.randn(2, 6, 16, 2).transpose(2, 3)
    torch.testing.assert_close(regard.attention(q, q, q, backend="cpu"), regard.attention(q, q, q, backend="reference"))


def test_calls_without_a_shortcut_have_none():
    q, k, v = qkv(sk=24)
    config = regard.AttentionConfig.from_tensors(q, k, v[..., :8])
    assert registry.get("cpu").shortcut(config, "bshd") is None, "two head dims"
    for backend, device in (("sdpa", "cpu"), ("flash", "cuda")):
        config = regard.AttentionConfig(
            batch=1, seqlen_q=9, seqlen_k=24, heads_q=2, heads_kv=2, head_dim=16, device=device, dtype=torch.float16,
            bias_shape=(1, 1, 9, 24),
        )  # fmt: skip
        assert registry.get(backend).shortcut(config, "bshd") is None, "a bias"
