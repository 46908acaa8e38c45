"""The drop-in for flash-attn: its signatures and conventions, each against plain calls or formulas written here."""

import importlib
import importlib.metadata
import importlib.util
import inspect
import math
import sys

import numpy
import pytest
import torch

import regard
from regard import ConfigError
from regard.backends import external
from regard.integrations import flash_attn
from regard.integrations.flash_attn import bert_padding, flash_attn_interface
from regard.integrations.flash_attn.rotary import apply_rotary_emb

INT = torch.int32


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def offsets(*lengths):
    return torch.tensor([0, *lengths], dtype=INT).cumsum(0, dtype=INT)


def close(actual, expected, tolerance=2e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# signatures

_TAIL = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
SIGNATURES = {
    "flash_attn_func": f"q, k, v, {_TAIL}",
    "flash_attn_kvpacked_func": f"q, kv, {_TAIL}",
    "flash_attn_qkvpacked_func": f"qkv, {_TAIL}",
    "flash_attn_varlen_func": (
        f"q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, {_TAIL}, block_table=None"
    ),
    "flash_attn_varlen_kvpacked_func": f"q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, {_TAIL}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {_TAIL}",
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
        "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
        "return_softmax_lse=False"
    ),
    "bert_padding.unpad_input": "hidden_states, attention_mask, unused_mask=None",
    "bert_padding.unpad_input_for_concatenated_sequences": "hidden_states, attention_mask_in_length",
    "bert_padding.pad_input": "hidden_states, indices, batch, seqlen",
    "bert_padding.index_first_axis": "input, indices",
    "rotary.apply_rotary_emb": (
        "x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None"
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_flash_attn_2_8(name):
    found = flash_attn
    for part in name.split("."):
        found = getattr(found, part)
    signature = inspect.signature(found)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    written = inspect.Signature(bare)
    assert str(written) == f"({SIGNATURES[name]})"


# flash_attn_func and the packed forms of it

Q, K, V = normal(2, 7, 6, 16), normal(2, 11, 2, 16, seed=1), normal(2, 11, 2, 16, seed=2)
SLOPES = torch.rand(2, 6, generator=torch.Generator().manual_seed(3))
OPTIONS = {
    "plain": ({}, {}),
    "causal": (dict(causal=True), dict(causal=True)),
    "scale": (dict(softmax_scale=0.3), dict(softmax_scale=0.3)),
    "unlimited": (dict(window_size=(-1, -1)), dict(window=None)),
    "window": (dict(window_size=(3, 2)), dict(window=(3, 2))),
    "window_left": (dict(window_size=(3, -1)), dict(window=(3, None))),
    "window_right": (dict(window_size=[-1, 0]), dict(causal=True)),
    "window_tensor": (dict(window_size=torch.tensor([2, 1])), dict(window=(2, 1))),
    "window_causal": (dict(window_size=(3, 3), causal=True), dict(window=(3, 3), causal=True)),
    "softcap": (dict(softcap=2.0), dict(softcap=2.0)),
    "alibi": (dict(alibi_slopes=SLOPES, causal=True), dict(alibi_slopes=SLOPES, causal=True)),
    "alibi_heads": (dict(alibi_slopes=SLOPES[0]), dict(alibi_slopes=SLOPES[0])),
    "dropout": (dict(dropout_p=0.4), dict(dropout_p=0.4)),
    "all": (
        dict(dropout_p=0.2, softmax_scale=0.5, causal=True, window_size=(5, 1), softcap=3.0, alibi_slopes=SLOPES),
        dict(dropout_p=0.2, softmax_scale=0.5, causal=True, window=(5, 1), softcap=3.0, alibi_slopes=SLOPES),
    ),
}


def value_and_gradients(call, *tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    torch.manual_seed(5)
    out = call(*leaves)
    return out, torch.autograd.grad((out * normal(*out.shape, seed=9)).sum(), leaves)


@pytest.mark.parametrize("name", OPTIONS)
def test_func_is_regard_attention(name):
    theirs, ours = OPTIONS[name]
    found = value_and_gradients(lambda q, k, v: flash_attn.flash_attn_func(q, k, v, **theirs), Q, K, V)
    close(found, value_and_gradients(lambda q, k, v: regard.attention(q, k, v, **ours), Q, K, V))


@pytest.mark.parametrize("name", ["causal", "window", "all"])
def test_kvpacked_and_qkvpacked_are_func_on_views(name):
    options, _ = OPTIONS[name]
    func = flash_attn.flash_attn_func
    q, kv = Q, torch.stack([K, V], dim=2)
    found = value_and_gradients(lambda q, kv: flash_attn.flash_attn_kvpacked_func(q, kv, **options), q, kv)
    close(found, value_and_gradients(lambda q, kv: func(q, kv[:, :, 0], kv[:, :, 1], **options), q, kv))
    qkv = normal(2, 7, 3, 6, 16, seed=4)
    found = value_and_gradients(lambda qkv: flash_attn.flash_attn_qkvpacked_func(qkv, **options), qkv)
    close(found, value_and_gradients(lambda qkv: func(*qkv.unbind(2), **options), qkv))


def test_positional_arguments_land_where_flash_attn_has_them():
    torch.manual_seed(0)
    out, lse, _ = flash_attn.flash_attn_func(Q, K, V, 0.3, 0.2, True, (4, -1), 5.0, SLOPES, True, True)
    torch.manual_seed(0)
    expected = regard.attention(
        Q, K, V, dropout_p=0.3, softmax_scale=0.2, causal=True, window=(4, None), softcap=5.0, alibi_slopes=SLOPES,
        return_lse=True,
    )  # fmt: skip
    close((out, lse), expected)


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_is_passed_on(deterministic):
    q = Q.clone().requires_grad_()
    with regard.record_selections() as record:
        flash_attn.flash_attn_func(q, K, V, deterministic=deterministic)
        flash_attn.flash_attn_varlen_func(q[0], K[0], V[0], offsets(7), offsets(11), 7, 11, deterministic=deterministic)
    assert [config.deterministic for config, _ in record] == [deterministic] * 2


def test_half_precision_and_odd_head_dims():
    for dtype, head_dim in ((torch.float16, 59), (torch.bfloat16, 40)):
        qkv = normal(1, 33, 3, 2, head_dim, dtype=dtype)
        out = flash_attn.flash_attn_qkvpacked_func(qkv, causal=True)
        assert (out.shape, out.dtype) == ((1, 33, 2, head_dim), dtype)
        close(out.float(), regard.attention(*qkv.double().unbind(2), causal=True).float(), tolerance=2e-2)


def test_rows_that_see_no_key():
    out, lse, _ = flash_attn.flash_attn_func(K, Q[:, :, :2], Q[:, :, :2], causal=True, return_attn_probs=True)
    assert (out[:, :4] == 0).all() and (lse[:, :, :4] == -math.inf).all() and lse[:, :, 4:].isfinite().all()


# return_attn_probs


def packed(lens_q=(7, 0, 12), lens_k=(11, 4, 5), heads=(6, 2), head_dim=16):
    q = normal(sum(lens_q), heads[0], head_dim)
    k, v = (normal(sum(lens_k), heads[1], head_dim, seed=seed) for seed in (1, 2))
    return q, k, v, offsets(*lens_q), offsets(*lens_k), max(lens_q), max(lens_k)


def test_return_attn_probs_without_dropout_has_an_empty_third():
    out, lse, matrix = flash_attn.flash_attn_func(Q, K, V, return_attn_probs=True)
    assert (lse.shape, lse.dtype) == ((2, 6, 7), torch.float32)
    assert matrix.shape == (0,)
    close((out, lse), regard.attention(Q, K, V, return_lse=True))
    out, lse, matrix = flash_attn.flash_attn_varlen_func(*packed(), return_attn_probs=True)
    assert (out.shape, lse.shape, matrix.shape) == ((19, 6, 16), (6, 19), (0,))


def attend_by_matrix(matrix, v, lens, dropout_p):
    """The output that |S_dmask|, its signs and the values give for one sequence."""
    seqlen_q, seqlen_k = lens
    matrix = matrix[:, :seqlen_q, :seqlen_k]
    weights = matrix.abs() / matrix.abs().sum(-1, keepdim=True).clamp_min(1e-30)
    weights = torch.where(matrix < 0, 0.0, weights / (1 - dropout_p))
    return torch.einsum("hij,jhd->ihd", weights, v.repeat_interleave(matrix.shape[0] // v.shape[1], dim=1))


@pytest.mark.parametrize("name", ["plain", "all"])
def test_s_dmask_shows_the_softmax_and_the_dropout_mask(name):
    options = {**OPTIONS[name][0], "dropout_p": 0.3}
    torch.manual_seed(1)
    out, _, matrix = flash_attn.flash_attn_func(Q, K, V, **options, return_attn_probs=True)
    assert (matrix.shape, matrix.dtype) == ((2, 6, 128, 128), torch.float32)
    assert (matrix[:, :, 7:] == 0).all() and (matrix[..., 11:] == 0).all()
    assert (matrix < 0).any() and (matrix.abs().amax(-1)[:, :, :7] == 1).all()
    for sequence in range(2):
        close(out[sequence], attend_by_matrix(matrix[sequence], V[sequence], (7, 11), 0.3))
    torch.manual_seed(1)
    assert torch.equal(out, flash_attn.flash_attn_func(Q, K, V, **options)), "the matrix changed what dropout draws"


def test_s_dmask_of_packed_sequences():
    q, k, v, cu_q, cu_k, *longest = packed()
    torch.manual_seed(2)
    arguments = (q, k, v, cu_q, cu_k, *longest)
    out, _, matrix = flash_attn.flash_attn_varlen_func(*arguments, dropout_p=0.4, causal=True, return_attn_probs=True)
    assert matrix.shape == (3, 6, 128, 128)
    for sequence in range(3):
        rows, keys = slice(*cu_q[sequence : sequence + 2]), slice(*cu_k[sequence : sequence + 2])
        lens = (rows.stop - rows.start, keys.stop - keys.start)
        close(out[rows], attend_by_matrix(matrix[sequence], v[keys], lens, 0.4))


def test_block_size_n_covers_a_row():
    """flash-attn's test takes the running maximum of S_dmask over such blocks; ours is the maximum of the row."""
    assert flash_attn_interface._get_block_size_n(torch.device("cpu"), 64, True, False) >= 2**30


# varlen

VARLEN_OPTIONS = {
    "plain": {},
    "causal": dict(causal=True),
    "window": dict(window_size=(4, 1)),
    "alibi_softcap": dict(alibi_slopes=torch.rand(3, 6), softcap=3.0, causal=True),
    "dropout": dict(dropout_p=0.3, softmax_scale=0.4),
}


def as_regard(options):
    return {"window" if n == "window_size" else n: v for n, v in options.items()}


@pytest.mark.parametrize("name", VARLEN_OPTIONS)
def test_varlen_is_regard_varlen_attention(name):
    options = VARLEN_OPTIONS[name]
    q, k, v, *rest = packed()
    found = value_and_gradients(lambda q, k, v: flash_attn.flash_attn_varlen_func(q, k, v, *rest, **options), q, k, v)
    expected = value_and_gradients(
        lambda q, k, v: regard.varlen_attention(q, k, v, *rest, **as_regard(options)), q, k, v
    )
    close(found, expected)


def test_varlen_packed_forms():
    q, k, v, *rest = packed()
    kv = torch.stack([k, v], dim=1)
    expected = flash_attn.flash_attn_varlen_func(q, k, v, *rest, causal=True)
    close(flash_attn.flash_attn_varlen_kvpacked_func(q, kv, *rest, causal=True), expected)
    qkv, cu = normal(19, 3, 6, 16), offsets(7, 0, 12)
    expected = flash_attn.flash_attn_varlen_func(*qkv.unbind(1), cu, cu, 12, 12, 0.0, None, True)
    close(flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu, 12, 0.0, None, True), expected)


def test_max_seqlen_may_be_a_tensor():
    q, k, v, cu_q, cu_k, max_q, max_k = packed()
    out = flash_attn.flash_attn_varlen_func(q, k, v, cu_q, cu_k, torch.tensor(max_q), torch.tensor(max_k))
    close(out, flash_attn.flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k))


def strided(table):
    """The same block table with rows that are not contiguous, which flash-attn takes too."""
    return table.T.contiguous().T


def paged(k, cu_seqlens, page_size=3, spare=2, seed=0):
    """Packed keys scattered over pages; what no key fills is NaN. Returns the cache and the block table."""
    lengths = cu_seqlens.diff().tolist()
    needed = [math.ceil(length / page_size) for length in lengths]
    numbers = torch.randperm(sum(needed) + spare, generator=torch.Generator().manual_seed(seed)).tolist()
    cache = torch.full((len(numbers), page_size, *k.shape[1:]), math.nan)
    table = torch.zeros(len(lengths), max(needed) + 1, dtype=INT)
    for sequence, length in enumerate(lengths):
        for position in range(length):
            page = table[sequence, position // page_size]
            if position % page_size == 0:
                page.fill_(numbers.pop())
            cache[page, position % page_size] = k[cu_seqlens[sequence] + position]
    return cache, strided(table)


@pytest.mark.parametrize("name", VARLEN_OPTIONS)
def test_varlen_over_pages_is_varlen_over_packed_keys(name):
    options = VARLEN_OPTIONS[name]
    q, k, v, cu_q, cu_k, *longest = packed()
    (k_pages, table), (v_pages, _) = paged(k, cu_k), paged(v, cu_k)
    results = []
    for keys, values, block_table in ((k, v, None), (k_pages, v_pages, table)):
        torch.manual_seed(3)
        results.append(
            flash_attn.flash_attn_varlen_func(
                q, keys, values, cu_q, cu_k, *longest, **options, return_attn_probs=True, block_table=block_table
            )
        )
    close(results[1], results[0])


def test_gradients_reach_paged_keys():
    q, k, v, cu_q, cu_k, *longest = packed()
    (k_pages, table), (v_pages, _) = paged(k, cu_k), paged(v, cu_k)
    expected = value_and_gradients(
        lambda q, k, v: flash_attn.flash_attn_varlen_func(q, k, v, cu_q, cu_k, *longest, causal=True), q, k, v
    )
    found = value_and_gradients(
        lambda q, k, v: flash_attn.flash_attn_varlen_func(
            q, k, v, cu_q, cu_k, *longest, causal=True, block_table=table
        ),
        q, k_pages, v_pages,
    )  # fmt: skip
    close(found[0], expected[0])
    close(found[1][0], expected[1][0])
    close(found[1][1][~k_pages.isnan()].sort().values, expected[1][1].flatten().sort().values)
    assert (found[1][2][v_pages.isnan()] == 0).all()


# what cannot be honoured raises

CU = offsets(3, 4)
PACKED, PAGES = normal(7, 4, 8), normal(4, 4, 2, 8)
TABLE = torch.arange(4, dtype=INT).view(2, 2)
OVER_PAGES = dict(q=PACKED, k=PAGES, v=PAGES, cu_seqlens_q=CU, cu_seqlens_k=CU, max_seqlen_q=4, max_seqlen_k=4,
                  block_table=TABLE)  # fmt: skip


@pytest.mark.parametrize(
    "name, arguments, match",
    [
        ("flash_attn_func", dict(q=Q, k=K, v=V, window_size=(1, 2, 3)), "window_size"),
        ("flash_attn_func", dict(q=Q, k=K, v=V, window_size=3), "window_size"),
        ("flash_attn_func", dict(q=Q, k=K, v=V, window_size=(1.5, 2)), "window_size"),
        ("flash_attn_func", dict(q=Q, k=K, v=V, window_size=(None, 2)), "window_size"),
        ("flash_attn_func", dict(q=Q, k=K, v=V, window_size=torch.tensor([1.0, 2.0])), "window_size"),
        ("flash_attn_func", dict(q=Q, k=K, v=V, window_size=torch.tensor(3)), "window_size"),
        ("flash_attn_func", dict(q=Q.numpy(), k=K, v=V, dropout_p=0.5, return_attn_probs=True), "q: got ndarray"),
        ("flash_attn_func", dict(q=Q, k=K, v=V, dropout_p=1.5), "dropout_p"),
        ("flash_attn_func", dict(q=Q, k=K[:1], v=V), "k: got"),
        ("flash_attn_func", dict(q=Q, k=K, v=V, alibi_slopes=SLOPES[:, :3]), "alibi_slopes"),
        ("flash_attn_func", dict(q=Q, k=K, v=V, alibi_slopes=SLOPES.clone().requires_grad_()), "alibi_slopes"),
        ("flash_attn_qkvpacked_func", dict(qkv=normal(2, 5, 2, 4, 8)), r"qkv: .* needs \(B, S, 3, H, D\)"),
        ("flash_attn_kvpacked_func", dict(q=Q, kv=normal(2, 5, 4, 8)), r"kv: .* needs \(B, S, 2, H, D\)"),
        ("flash_attn_kvpacked_func", dict(q=Q, kv=None), "kv: got NoneType"),
        ("flash_attn_varlen_qkvpacked_func", dict(qkv=normal(7, 3, 4, 8), cu_seqlens=CU, max_seqlen=torch.tensor(4.5)),
         "max_seqlen_q: got torch.float32"),
        ("flash_attn_varlen_qkvpacked_func", dict(qkv=normal(7, 3, 4, 8), cu_seqlens=CU, max_seqlen=CU), "max_seqlen"),
        ("flash_attn_varlen_qkvpacked_func", dict(qkv=normal(7, 2, 4, 8), cu_seqlens=CU, max_seqlen=4), "total, 3"),
        ("flash_attn_varlen_qkvpacked_func", dict(qkv=normal(7, 3, 4, 8), cu_seqlens=CU, max_seqlen=3), "max_seqlen"),
        ("flash_attn_varlen_qkvpacked_func", dict(qkv=normal(8, 3, 4, 8), cu_seqlens=CU, max_seqlen=4), "cu_seqlens"),
    ],
)  # fmt: skip
def test_malformed_arguments_are_named(name, arguments, match):
    with pytest.raises(ConfigError, match=match):
        getattr(flash_attn, name)(**arguments)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "changes, match",
    [
        (dict(q=None), "q: got NoneType"),
        (dict(k=PAGES.numpy()), "k_cache: got ndarray"),
        (dict(v=PAGES[:, :3]), "v_cache: got shape"),
        (dict(block_table=TABLE.tolist()), "block_table: got list"),
        (dict(block_table=TABLE.float()), "block_table: got torch.float32"),
        (dict(block_table=TABLE.to("meta")), "block_table: got device meta"),
        (dict(cu_seqlens_k=None), "cu_seqlens_k: got NoneType"),
        (dict(cu_seqlens_k=CU.long()), "cu_seqlens_k: got torch.int64"),
        (dict(cu_seqlens_q=CU[:0]), "cu_seqlens_"),
        (dict(max_seqlen_q="4"), "max_seqlen_q: got '4'"),
        (dict(max_seqlen_k="4"), "max_seqlen_k: got '4'"),
        (dict(max_seqlen_k=3), "max_seqlen_k: got"),
        (dict(deterministic="yes"), "deterministic: got 'yes'"),
    ],
)
def test_malformed_arguments_of_pages_are_named_with_and_without_a_gradient(changes, match, training):
    arguments = OVER_PAGES | changes
    if training and arguments["q"] is not None:
        arguments["q"] = PACKED.clone().requires_grad_()
    with pytest.raises(ConfigError, match=match):
        flash_attn.flash_attn_varlen_func(**arguments)


def test_overstated_and_numpys_lengths_over_pages():
    expected = flash_attn.flash_attn_varlen_func(**OVER_PAGES)
    found = flash_attn.flash_attn_varlen_func(**OVER_PAGES | dict(max_seqlen_q=10**12, max_seqlen_k=numpy.int64(9)))
    assert torch.equal(found, expected)


# bert_padding


def test_unpad_and_pad_are_inverse():
    x = normal(3, 5, 2, 4)
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 1]])
    for kept in (mask, mask.bool()):
        tokens, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, kept)
        assert torch.equal(tokens, x[mask.bool()]) and indices.tolist() == [0, 1, 11, 12, 14]
        assert (cu_seqlens.tolist(), cu_seqlens.dtype, longest) == ([0, 2, 2, 5], INT, 3)
        assert (used.tolist(), used.dtype) == ([2, 0, 3], INT)
    back = bert_padding.pad_input(tokens, indices, 3, 5)
    assert torch.equal(back, x * mask[:, :, None, None])


def test_unused_tokens_take_their_place():
    x, mask = normal(2, 4, 3), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    unused = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 1]])
    tokens, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask, unused)
    assert indices.tolist() == [0, 1, 2, 4, 7] and cu_seqlens.tolist() == [0, 3, 5]
    assert (longest, used.tolist(), tokens.shape) == (3, [2, 1], (5, 3))


def test_padding_helpers_are_differentiable():
    x = normal(2, 4, 3).requires_grad_()
    tokens, indices, *_ = bert_padding.unpad_input(x, torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]]))
    (bert_padding.pad_input(tokens**2, indices, 2, 4) * 3).sum().backward()
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])[..., None]
    close(x.grad, 6 * x.detach() * mask)


def test_concatenated_sequences_are_told_apart():
    x = normal(3, 6, 2)
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    tokens, indices, cu_seqlens, longest = bert_padding.unpad_input_for_concatenated_sequences(x, lengths)
    assert torch.equal(tokens, torch.cat([x[0, :5], x[1, :5], x[2]])) and len(indices) == 16
    assert (cu_seqlens.tolist(), cu_seqlens.dtype, longest) == ([0, 2, 5, 8, 10, 16], INT, 6)


def test_a_mask_of_another_shape_is_named():
    for unpad in (bert_padding.unpad_input, bert_padding.unpad_input_for_concatenated_sequences):
        with pytest.raises(ConfigError, match=r"attention_mask.*: got shape \(2, 4\), needs shape \(2, 5\)"):
            unpad(normal(2, 5, 3), torch.ones(2, 4, dtype=torch.int32))


@pytest.mark.parametrize(
    "mask, unused",
    [([[2, 1], [1, 0]], None), ([[-1, 1], [1, 0]], None), ([[1, 1], [1, 0]], [[0, 1], [0, 1]])],
)
def test_masks_that_select_no_tokens_are_refused(mask, unused):
    with pytest.raises(ConfigError, match="attention_mask.*got a value other than 0 and 1"):
        bert_padding.unpad_input(normal(2, 2, 3), torch.tensor(mask), None if unused is None else torch.tensor(unused))


@pytest.mark.parametrize("lengths", [[2, 2, 0], [3, -1, 0]])
def test_lengths_that_pass_the_end_of_their_row_are_refused(lengths):
    with pytest.raises(ConfigError, match="attention_mask_in_length"):
        bert_padding.unpad_input_for_concatenated_sequences(normal(1, 3, 2), torch.tensor([lengths]))


@pytest.mark.parametrize("indices", [[0, 1], [0, 1, 8], [0, 1, -1], [0.0, 1.0, 2.0], None])
def test_indices_that_are_no_rows_are_named(indices):
    with pytest.raises(ConfigError, match="indices"):
        bert_padding.pad_input(normal(3, 2), indices if indices is None else torch.tensor(indices), 2, 4)


def test_empty_batches_are_packed_too():
    tokens, indices, cu_seqlens, longest, _ = bert_padding.unpad_input(normal(0, 5, 2), torch.ones(0, 5))
    assert (tokens.shape, len(indices), cu_seqlens.tolist(), longest) == ((0, 2), 0, [0], 0)


# install


@pytest.fixture
def no_flash_attn(monkeypatch):
    """A process that has not heard of flash_attn; whatever the test installs is gone afterwards."""

    def forget():
        for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
            del sys.modules[name]

    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("flash-attn is installed here: install() without force is refused")
    forget()
    yield monkeypatch
    forget()


def test_install_makes_imports_resolve(no_flash_attn):
    installed = flash_attn.install()
    assert flash_attn.install() is installed
    import flash_attn as found
    from flash_attn import flash_attn_func, flash_attn_with_kvcache
    from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
    from flash_attn.flash_attn_interface import flash_attn_varlen_func
    from flash_attn.layers.rotary import apply_rotary_emb as rotary

    assert found is installed and found.__version__ == flash_attn.__version__ == "2.8.3"
    assert flash_attn_func is found.flash_attn_func and found.bert_padding.unpad_input is unpad_input
    assert flash_attn_func.__module__.startswith("regard.") and rotary is apply_rotary_emb
    assert flash_attn_with_kvcache and flash_attn_varlen_func and pad_input and index_first_axis
    for name in ("flash_attn", "flash_attn.bert_padding", "flash_attn.layers", "flash_attn.layers.rotary"):
        assert importlib.util.find_spec(name).name == name
    assert importlib.reload is not None and found.layers.__path__ == []
    with pytest.raises(ModuleNotFoundError, match=r"flash_attn\.ops"):
        importlib.import_module("flash_attn.ops")
    with pytest.raises(importlib.metadata.PackageNotFoundError):  # as documented: metadata is not stood in for
        importlib.metadata.version("flash_attn")


@pytest.mark.parametrize("imported", [False, True])
def test_install_does_not_hide_the_real_one_unless_told_to(no_flash_attn, tmp_path, imported):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("real = True\n")
    for name in ("ops", "flash_attn_interface"):
        (tmp_path / "flash_attn" / f"{name}.py").write_text("")
    no_flash_attn.syspath_prepend(tmp_path)
    if imported:
        importlib.import_module("flash_attn.ops")
    with pytest.raises(ConfigError, match=r"force: got False, needs True .*flash_attn"):
        flash_attn.install()
    assert hasattr(importlib.import_module("flash_attn"), "real")
    peer = next(adapter.package for adapter in external.ADAPTERS if adapter.name == "flash_attn")
    assert peer.installed()
    flash_attn.install(force=True)
    assert not peer.installed(), "the backend flash_attn would call itself"
    assert not hasattr(importlib.import_module("flash_attn"), "real")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("flash_attn.ops")
