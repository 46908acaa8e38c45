"""The specification against torch's own attention, its derivatives, and the dropout generator against known answers."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import regard
from regard.backends.reference import _philox, dropout_keep, dropout_threshold
from regard.registry import registry

F64 = torch.float64


def normal(*shape, seed=0, **options):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64, **options)


def exact(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def reference(q, k, v, **options):
    return regard.attention(q, k, v, backend="reference", layout="bhsd", **options)


Q, K, V = normal(2, 6, 5, 8), normal(2, 2, 9, 8, seed=1), normal(2, 2, 9, 8, seed=2)
MASK = torch.rand(2, 1, 5, 9, generator=torch.Generator().manual_seed(3)) < 0.6
BIAS = normal(6, 5, 9, seed=4)


@pytest.mark.parametrize(
    "ours, torchs",
    [
        ({}, {}),
        ({"softmax_scale": 0.7}, {"scale": 0.7}),
        ({"softmax_scale": -0.7}, {"scale": -0.7}),
        ({"mask": MASK}, {"attn_mask": MASK}),
        ({"bias": BIAS}, {"attn_mask": BIAS}),
        ({"bias": BIAS, "mask": MASK}, {"attn_mask": BIAS.masked_fill(~MASK, -math.inf)}),
        ({"causal": True}, {"attn_mask": torch.ones(5, 9, dtype=torch.bool).tril(4)}),
        ({"window": (2, 1)}, {"attn_mask": torch.ones(5, 9, dtype=torch.bool).tril(5).triu(2)}),
        ({"window": (2, None), "causal": True}, {"attn_mask": torch.ones(5, 9, dtype=torch.bool).tril(4).triu(2)}),
    ],
)
def test_equals_torch_attention(ours, torchs):
    exact(reference(Q, K, V, **ours), scaled_dot_product_attention(Q, K, V, enable_gqa=True, **torchs))


def test_bias_of_alibi_slopes_equals_alibi():
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0, 1.0, 2.0], dtype=F64)
    distance = (torch.arange(9) - torch.arange(5)[:, None] - 4).abs()
    bias = -slopes[:, None, None] * distance
    exact(reference(Q, K, V, alibi_slopes=slopes), reference(Q, K, V, bias=bias))
    per_sequence = torch.stack([slopes, 2 * slopes])
    exact(
        reference(Q, K, V, alibi_slopes=per_sequence),
        reference(Q, K, V, bias=torch.stack([bias, 2 * bias])),
    )


def test_softcap_bounds_the_scores_before_bias():
    capped = 2.0 * torch.tanh(torch.einsum("bhid,bhjd->bhij", Q, K.repeat_interleave(3, 1)) * 8**-0.5 / 2.0)
    expected = torch.softmax(capped + BIAS, -1) @ V.repeat_interleave(3, 1)
    exact(reference(Q, K, V, softcap=2.0, bias=BIAS), expected)


def test_sink_is_one_more_key_without_a_value():
    sinks = normal(6, seed=5)
    scores = torch.einsum("bhid,bhjd->bhij", Q, K.repeat_interleave(3, 1)) * 8**-0.5
    logits = torch.cat([scores, sinks[:, None, None].expand(2, 6, 5, 1)], -1)
    out, lse = reference(Q, K, V, sinks=sinks, return_lse=True)
    exact(out, torch.softmax(logits, -1)[..., :-1] @ V.repeat_interleave(3, 1))
    exact(lse, torch.logsumexp(logits, -1))


@pytest.mark.parametrize("causal", [False, True])
def test_kv_lens_is_each_sequence_alone(causal):
    lens = (3, 9)
    out, lse = reference(Q, K, V, kv_lens=torch.tensor(lens, dtype=torch.int32), causal=causal, return_lse=True)
    for b, length in enumerate(lens):
        alone = reference(
            Q[b : b + 1], K[b : b + 1, :, :length], V[b : b + 1, :, :length], causal=causal, return_lse=True
        )
        exact(out[b], alone[0][0])
        exact(lse[b], alone[1][0])


def test_varlen_is_each_sequence_alone():
    q, k, v = normal(7, 6, 8), normal(11, 2, 8, seed=1), normal(11, 2, 8, seed=2)
    cu_q, cu_k = (torch.tensor(c, dtype=torch.int32) for c in ([0, 3, 3, 7], [0, 4, 9, 11]))
    out, lse = regard.varlen_attention(q, k, v, cu_q, cu_k, causal=True, return_lse=True, backend="reference")
    for b in range(3):
        rows, keys = slice(int(cu_q[b]), int(cu_q[b + 1])), slice(int(cu_k[b]), int(cu_k[b + 1]))
        alone = regard.attention(q[None, rows], k[None, keys], v[None, keys], causal=True, return_lse=True)
        exact(out[rows], alone[0][0])
        exact(lse[:, rows], alone[1][0])


def test_row_without_a_visible_key_is_zero_and_minus_infinity():
    out, lse = reference(Q, K[:, :, :2], V[:, :, :2], causal=True, return_lse=True)
    assert (out[:, :, :3] == 0).all() and (lse[:, :, :3] == -math.inf).all()
    assert (out[:, :, 3:] != 0).any() and lse[:, :, 3:].isfinite().all()
    sinks = normal(6, seed=5)
    _, lse = reference(Q, K[:, :, :2], V[:, :, :2], causal=True, sinks=sinks, return_lse=True)
    exact(lse[:, :, :3], sinks[None, :, None].expand(2, 6, 3))


SMALL = {
    "plain": {},
    "causal with masked rows": {"causal": True},
    "window, softcap": {"window": (1, 1), "softcap": 1.5},
    "mask": {"mask": torch.tensor([[True, False], [False, False], [True, True]])},
    "alibi": {"alibi_slopes": torch.tensor([0.3, 0.7], dtype=F64)},
    "kv_lens": {"kv_lens": torch.tensor([1], dtype=torch.int32)},
    "scale": {"softmax_scale": -0.4},
}


@pytest.mark.parametrize("name", SMALL)
def test_first_and_second_derivatives(name):
    q, k, v = (normal(1, n, h, 2, seed=i).requires_grad_() for i, (n, h) in enumerate([(3, 2), (2, 1), (2, 1)]))
    bias, sinks = normal(1, 2, 1, 2, seed=5).requires_grad_(), normal(2, seed=6).requires_grad_()

    def call(q, k, v, bias, sinks):
        out, lse = regard.attention(
            q, k, v, bias=bias, sinks=sinks, return_lse=True, backend="reference", **SMALL[name]
        )
        return out, lse

    assert torch.autograd.gradcheck(call, (q, k, v, bias, sinks))
    assert torch.autograd.gradgradcheck(call, (q, k, v, bias, sinks))


def test_masked_rows_get_no_gradient_without_sinks():
    q, k, v = (t.clone().requires_grad_() for t in (Q, K[:, :, :2], V[:, :, :2]))
    out, lse = reference(q, k, v, causal=True, return_lse=True)
    torch.autograd.backward([out, lse], [torch.ones_like(out), torch.ones_like(lse)])
    assert (q.grad[:, :, :3] == 0).all() and (q.grad[:, :, 3:] != 0).any()
    assert k.grad.isfinite().all() and v.grad.isfinite().all()


def test_backward_method_equals_autograd():
    q, k, v = (t.transpose(1, 2).clone().requires_grad_() for t in (Q, K, V))
    out, lse = regard.attention(q, k, v, return_lse=True, causal=True, backend="reference")
    grad_out, grad_lse = normal(*out.shape, seed=7), normal(*lse.shape, seed=8)
    expected = torch.autograd.grad([out, lse], [q, k, v], [grad_out, grad_lse])
    config = regard.AttentionConfig.from_tensors(q, k, v, causal=True)
    inputs = regard.AttentionInputs(q.detach(), k.detach(), v.detach())
    found = registry.get("reference").backward(config, inputs, out, lse, grad_out, grad_lse)
    for name, gradient in zip("qkv", expected, strict=True):
        exact(found[name], gradient)


# Dropout. Known answers: Random123 1.14, tests/kat_vectors, philox4x32 with 10 rounds.
KNOWN = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
]


@pytest.mark.parametrize("counter, seed, words", KNOWN)
def test_philox_known_answers(counter, seed, words):
    found = _philox(torch.tensor([seed]), *(torch.tensor([c]) for c in counter[:3]))
    assert tuple(int(word) for word in found) == words


def philox_by_integers(seed, counter):
    """Salmon et al. 2011, section 3.3, in Python's unbounded integers."""
    c, k = list(counter), [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return tuple(c)


COUNTERS = [(0, 0, 0), (1, 2, 3), (0x7FFFFFFF, 0x7FFFFFFF, 0x7FFFFFFF), (123456789, 987654321, 5)]
SEEDS = [0, 1, 2**31 - 1, 2**31, 2**32 + 7, 2**63 - 1]


@pytest.mark.parametrize("seed", SEEDS)
def test_philox_equals_integer_arithmetic(seed):
    for counter in COUNTERS:
        found = _philox(torch.tensor([seed]), *(torch.tensor([c]) for c in counter))
        assert tuple(int(word) for word in found) == philox_by_integers(seed, (*counter, 0))
    assert philox_by_integers(0, (0, 0, 0, 0)) == KNOWN[0][2]
    ones = 0xFFFFFFFF
    assert philox_by_integers(2**64 - 1, (ones,) * 4) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox_by_integers(0x299F31D0_A4093822, pi) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_dropout_mask_is_word_of_position_and_of_the_right_frequency():
    seed, p = torch.tensor([2**40 + 3]), 0.3
    head, query, key = torch.arange(4)[:, None, None], torch.arange(50)[:, None], torch.arange(203)
    keep = dropout_keep(seed, head, query, key, p)
    for h, i, j in ((0, 0, 0), (3, 49, 202), (1, 17, 6)):
        word = philox_by_integers(int(seed), (j // 4, i, h, 0))[j % 4]
        assert bool(keep[h, i, j]) == (word >= p * 2**32)
    n = keep.numel()
    assert abs(keep.double().mean().item() - 0.7) < 4 * math.sqrt(0.3 * 0.7 / n)
    assert torch.equal(dropout_keep(seed, head[1:], query[7:], key[5:], p), keep[1:, 7:, 5:])


@pytest.mark.parametrize("p, threshold", [(0.0, 0), (0.5, 2**31), (1 - 2**-40, 2**32 - 1)])
def test_dropout_threshold(p, threshold):
    assert dropout_threshold(p) == threshold


def test_dropout_follows_torchs_generator_and_keeps_the_mean():
    q, k, v = normal(1, 3, 1, 4), normal(1, 4000, 1, 4, seed=1), torch.ones(1, 4000, 1, 4, dtype=F64)
    torch.manual_seed(5)
    first, second = (regard.attention(q, k, v, dropout_p=0.4, backend="reference") for _ in range(2))
    torch.manual_seed(5)
    again = regard.attention(q, k, v, dropout_p=0.4, backend="reference")
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert (first - 1).abs().max() < 0.15
