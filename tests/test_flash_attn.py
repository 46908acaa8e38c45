"""The drop-in for flash-attn: its signatures and conventions, each against plain calls or formulas written here."""

import importlib
import importlib.metadata
import importlib.util
import inspect
import math
import sys

import pytest
import torch

import regard
from regard import ConfigError, UnsupportedError
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


# flash_attn_with_kvcache


def rotated(x, cos, sin, positions, interleaved):
    """x (S, H, D) with its pairs turned as complex numbers by the angle of each position (S,)."""
    half = cos.shape[1]
    turn = torch.complex(cos[positions], sin[positions])[:, None]
    part = x[..., : 2 * half]
    pairs = part.unflatten(-1, (half, 2)) if interleaved else part.unflatten(-1, (2, half)).transpose(-1, -2)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    turned = turned if interleaved else turned.transpose(-1, -2)
    return torch.cat([turned.flatten(-2), x[..., 2 * half :]], dim=-1)


def tables(positions=24, rotary_dim=8):
    angle = torch.rand(positions, rotary_dim // 2, generator=torch.Generator().manual_seed(7)) * 2 * math.pi
    return angle.cos(), angle.sin()


# name: (arguments of the call, seqlens held, new keys or None, left padding or None)
CACHE_CASES = {
    "whole": (dict(), None, None, None),
    "int": (dict(causal=True), 13, None, None),
    "lengths": (dict(causal=True), (5, 24, 0), None, None),
    "append": (dict(causal=True), (5, 20, 0), 4, None),
    "append_fewer_than_queries": (dict(causal=True), (5, 20, 0), 2, None),
    "append_int": (dict(), 3, 4, None),
    "options": (
        dict(window_size=(6, -1), causal=True, softcap=2.0, alibi_slopes=torch.rand(3, 4), softmax_scale=0.4),
        (5, 20, 9), 4, None,
    ),
    "leftpad": (dict(causal=True), (9, 24, 3), None, (2, 20, 3)),
    "leftpad_append": (dict(window_size=(4, 0), alibi_slopes=torch.rand(4)), (9, 20, 3), 4, (2, 13, 3)),
    "rotary_interleaved": (dict(causal=True), (5, 20, 0), 4, None),
    "rotary_halves": (dict(window_size=(9, 2), rotary_interleaved=False), (5, 20, 0), 4, None),
    "rotary_unordered": (dict(), (5, 20, 0), 3, None),
    "rotary_leftpad": (dict(causal=True), (5, 20, 2), 4, (1, 7, 2)),
}  # fmt: skip


def expected_of_cache(q, caches, new, held, leftpad, angles, options):
    """What the cache holds afterwards, out and lse: a sequence at a time, in float64."""
    options = {**options, "window": flash_attn_interface.window_of(options.get("window_size", (-1, -1)))}
    options.pop("window_size", None)
    interleaved, slopes = options.pop("rotary_interleaved", True), options.pop("alibi_slopes", None)
    ordered = options.get("causal") or options["window"] is not None
    keys, values, outs, lses = [], [], [], []
    for b in range(q.shape[0]):
        first, query, k, v = held[b], q[b], caches[0][b].clone(), caches[1][b].clone()
        length = first
        if new is not None:
            k_new, length = new[0][b], first + new[0].shape[1]
            if angles is not None:
                k_new = rotated(k_new, *angles, torch.arange(first, length), interleaved)
                turns = torch.arange(first, first + len(query)) if ordered else torch.full((len(query),), first)
                query = rotated(query, *angles, turns, interleaved)
            k[first:length], v[first:length] = k_new, new[1][b]
        seen = slice(leftpad[b], length)
        own = {} if slopes is None else {"alibi_slopes": slopes[b] if slopes.ndim == 2 else slopes}
        arguments = (query[None].double(), k[None, seen].double(), v[None, seen].double())
        out, lse = regard.attention(*arguments, **options, **own, return_lse=True, backend="reference")
        keys, values, outs, lses = [*keys, k], [*values, v], [*outs, out[0]], [*lses, lse[0]]
    return torch.stack(keys), torch.stack(values), torch.stack(outs).float(), torch.stack(lses).float()


def stored(storage, k, v):
    """Caches that hold k and v, the arguments that say where, and how to read a cache as k lies."""
    if storage == "contiguous":
        return (k.clone(), v.clone()), {}, lambda cache: cache
    if storage == "strided":
        heads_first = (torch.stack([t, t], dim=3).transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))
        return tuple(t[:, :, :, 1] for t in heads_first), {}, lambda cache: cache
    if storage == "rows":
        rows = torch.tensor([4, 0, 2])
        caches = tuple(torch.full((6, *t.shape[1:]), 7.0).index_copy(0, rows, t) for t in (k, v))
        return caches, {"cache_batch_idx": rows.int()}, lambda cache: cache[rows]
    table = torch.randperm(26, generator=torch.Generator().manual_seed(1))[:24].view(3, 8)
    pages = (t.reshape(24, 3, 2, 16) for t in (k, v))
    caches = tuple(torch.full((26, 3, 2, 16), 7.0).index_copy(0, table.flatten(), t) for t in pages)
    return caches, {"block_table": strided(table.int())}, lambda cache: cache[table].flatten(1, 2)


@pytest.mark.parametrize("storage", ["contiguous", "strided", "rows", "pages"])
@pytest.mark.parametrize("name", CACHE_CASES)
def test_kvcache(name, storage):
    options, held, new_keys, leftpad = CACHE_CASES[name]
    batch, capacity = 3, 24
    q = normal(batch, 4, 4, 16)
    k, v = (normal(batch, capacity, 2, 16, seed=seed) for seed in (1, 2))
    new = None if new_keys is None else tuple(normal(batch, new_keys, 2, 16, seed=seed) for seed in (3, 4))
    angles = tables(capacity) if "rotary" in name else None
    lengths = [capacity if held is None else held] * batch if not isinstance(held, tuple) else held
    for b in range(batch):  # what no call may read
        for cache in (k, v):
            cache[b, lengths[b] :] = math.nan
            cache[b, : (leftpad or (0,) * batch)[b]] = math.nan
    expected = expected_of_cache(q, (k, v), new, lengths, leftpad or (0,) * batch, angles, options)

    caches, arguments, read = stored(storage, k, v)
    arguments |= options
    before = [cache.clone() for cache in caches]

    if held is not None:
        arguments["cache_seqlens"] = held if isinstance(held, int) else torch.tensor(held, dtype=INT)
    if leftpad is not None:
        arguments["cache_leftpad"] = torch.tensor(leftpad, dtype=INT)
    if angles is not None:
        arguments.update(rotary_cos=angles[0], rotary_sin=angles[1])
    out, lse = flash_attn.flash_attn_with_kvcache(q, *caches, *(new or ()), **arguments, return_softmax_lse=True)

    for cache, wanted, old in zip(caches, expected, before, strict=False):
        torch.testing.assert_close(read(cache), wanted, rtol=1e-5, atol=1e-5, equal_nan=True)
        changed = int((~torch.isclose(cache, old, equal_nan=True)).sum())
        assert changed == (0 if new is None else new[0].numel()), "keys were written that are not the new ones"
    close((out, lse), expected[2:])
    assert torch.equal(out, flash_attn.flash_attn_with_kvcache(q, *caches, *(new or ()), **arguments, num_splits=3))


def test_kvcache_has_no_gradient_and_says_so():
    q = Q.clone().requires_grad_()
    out = flash_attn.flash_attn_with_kvcache(q, K.clone(), V.clone(), cache_seqlens=5)
    assert out.requires_grad
    with pytest.raises(UnsupportedError, match="flash_attn_with_kvcache has no backward"):
        out.sum().backward()
    with torch.no_grad():
        assert not flash_attn.flash_attn_with_kvcache(q, K.clone(), V.clone(), cache_seqlens=5).requires_grad


def test_kvcache_decodes_token_by_token_what_one_call_computes():
    q, k, v = (normal(2, 9, heads, 16, seed=seed) for heads, seed in ((6, 0), (2, 1), (2, 2)))
    caches = (torch.full((2, 12, 2, 16), math.nan) for _ in range(2))
    caches = tuple(caches)
    outs = [
        flash_attn.flash_attn_with_kvcache(
            q[:, t : t + 1], *caches, k[:, t : t + 1], v[:, t : t + 1], cache_seqlens=t, causal=True
        )
        for t in range(9)
    ]
    close(torch.cat(outs, dim=1), flash_attn.flash_attn_func(q, k, v, causal=True))


# what cannot be honoured raises

CU = offsets(3, 4)
CACHES = dict(k_cache=normal(2, 8, 2, 16), v_cache=normal(2, 8, 2, 16))
NEW = dict(k=normal(2, 3, 2, 16), v=normal(2, 3, 2, 16))
COS, SIN = tables(8)


def one(value):
    return torch.tensor([value, 0], dtype=INT)


@pytest.mark.parametrize(
    "name, arguments, match",
    [
        ("flash_attn_func", dict(q=Q, k=K, v=V, window_size=(1, 2, 3)), "window_size"),
        ("flash_attn_func", dict(q=Q, k=K, v=V, dropout_p=1.5), "dropout_p"),
        ("flash_attn_func", dict(q=Q, k=K[:1], v=V), "k: got"),
        ("flash_attn_func", dict(q=Q, k=K, v=V, alibi_slopes=SLOPES[:, :3]), "alibi_slopes"),
        ("flash_attn_func", dict(q=Q, k=K, v=V, alibi_slopes=SLOPES.clone().requires_grad_()), "alibi_slopes"),
        ("flash_attn_qkvpacked_func", dict(qkv=normal(2, 5, 2, 4, 8)), r"qkv: .* needs \(B, S, 3, H, D\)"),
        ("flash_attn_kvpacked_func", dict(q=Q, kv=normal(2, 5, 4, 8)), r"kv: .* needs \(B, S, 2, H, D\)"),
        ("flash_attn_varlen_qkvpacked_func", dict(qkv=normal(7, 2, 4, 8), cu_seqlens=CU, max_seqlen=4), "total, 3"),
        ("flash_attn_varlen_qkvpacked_func", dict(qkv=normal(7, 3, 4, 8), cu_seqlens=CU, max_seqlen=3), "max_seqlen"),
        ("flash_attn_varlen_qkvpacked_func", dict(qkv=normal(8, 3, 4, 8), cu_seqlens=CU, max_seqlen=4), "cu_seqlens"),
        ("flash_attn_with_kvcache", dict(q=Q, **CACHES, cache_seqlens=9), "cache_seqlens: got values in 9..9"),
        ("flash_attn_with_kvcache", dict(q=Q, **CACHES, cache_seqlens=one(-1)), "cache_seqlens: got .*-1"),
        ("flash_attn_with_kvcache", dict(q=Q, **CACHES, cache_seqlens=one(1).long()), "cache_seqlens: .*int64.*int32"),
        ("flash_attn_with_kvcache", dict(q=Q, **CACHES, cache_seqlens=2.5), "cache_seqlens: got 2.5"),
        ("flash_attn_with_kvcache", dict(q=Q, **CACHES, **NEW, cache_seqlens=6), "cache_seqlens: got values in 6..6, needs values in 0..5"),
        ("flash_attn_with_kvcache", dict(q=Q, **CACHES, **NEW), "cache_seqlens: got None"),
        ("flash_attn_with_kvcache", dict(q=Q, **CACHES, k=NEW["k"], cache_seqlens=1), "v: got None"),
        ("flash_attn_with_kvcache", dict(q=Q, **CACHES, k=NEW["k"], v=NEW["v"][:, :1], cache_seqlens=1), "v: got"),
        ("flash_attn_with_kvcache", dict(q=Q, **CACHES, k=NEW["k"], v=NEW["v"][:1], cache_seqlens=1), "v: got"),
        ("flash_attn_with_kvcache", dict(q=Q, **CACHES, k=NEW["k"].half(), v=NEW["v"], cache_seqlens=1), "k: .*float16"),
        ("flash_attn_with_kvcache", dict(q=Q, **CACHES, rotary_cos=COS, rotary_sin=SIN), "k: got None"),
        ("flash_attn_with_kvcache", dict(q=Q, **CACHES, **NEW, cache_seqlens=1, rotary_cos=COS), "rotary_sin: got None"),
        (
            "flash_attn_with_kvcache",
            dict(q=Q, **CACHES, **NEW, cache_seqlens=1, rotary_cos=COS[:7], rotary_sin=SIN[:7]),
            "7 positions, needs at least 8",
        ),
        (
            "flash_attn_with_kvcache",
            dict(q=Q, **CACHES, **NEW, cache_seqlens=1, rotary_cos=COS.repeat(1, 3), rotary_sin=SIN.repeat(1, 3)),
            "rotary_dim 24, needs at most the head dim, 16",
        ),
        ("flash_attn_with_kvcache", dict(q=Q[:1], **CACHES), "k_cache: .*cache_batch_idx"),
        ("flash_attn_with_kvcache", dict(q=Q, **CACHES, cache_batch_idx=one(2)), "cache_batch_idx: .*2.*needs .*0..1"),
        ("flash_attn_with_kvcache", dict(q=Q, **CACHES, cache_leftpad=one(5), cache_seqlens=3), "cache_leftpad"),
        (
            "flash_attn_with_kvcache",
            dict(q=Q, **CACHES, cache_batch_idx=one(0), block_table=torch.zeros(2, 1, dtype=INT)),
            "cache_batch_idx: .*block_table",
        ),
        ("flash_attn_with_kvcache", dict(q=Q, **CACHES, block_table=torch.zeros(3, 1, dtype=INT)), "block_table"),
        (
            "flash_attn_with_kvcache",
            dict(q=Q, **CACHES, **NEW, cache_seqlens=1, block_table=torch.full((2, 1), 5, dtype=INT)),
            "block_table: .*5.*needs .*0..1",
        ),
        ("flash_attn_with_kvcache", dict(q=Q, **CACHES, num_splits=-1), "num_splits: got -1"),
        ("flash_attn_with_kvcache", dict(q=Q[0], **CACHES), "q: got shape"),
        ("flash_attn_with_kvcache", dict(q=Q, k_cache=K, v_cache=V[:, :3]), "v_cache"),
    ],
)  # fmt: skip
def test_malformed_arguments_are_named(name, arguments, match):
    with pytest.raises(ConfigError, match=match):
        getattr(flash_attn, name)(**arguments)


def test_an_error_leaves_the_cache_alone():
    caches = [cache.clone() for cache in CACHES.values()]
    with pytest.raises(ConfigError):
        flash_attn.flash_attn_with_kvcache(Q, *caches, **NEW, cache_seqlens=one(6))
    assert torch.equal(caches[0], CACHES["k_cache"]) and torch.equal(caches[1], CACHES["v_cache"])


@pytest.mark.parametrize("lengths", [(40, 0), (-2, 9)])
def test_offsets_beyond_the_pages_are_refused(lengths):
    cu_k = torch.tensor([0, lengths[0], sum(lengths)], dtype=INT)
    q = Q[0].clone().requires_grad_()  # asks for the copy out of the pages
    table = torch.zeros(2, 2, dtype=INT)
    with pytest.raises(ConfigError, match="cu_seqlens_k: got lengths in"):
        flash_attn.flash_attn_varlen_func(
            q, CACHES["k_cache"], CACHES["v_cache"], offsets(3, 4), cu_k, 4, 40, block_table=table
        )
    with pytest.raises(ConfigError, match="cu_seqlens_k: got lengths in"):
        flash_attn.flash_attn_varlen_func(
            Q[0], CACHES["k_cache"], CACHES["v_cache"], offsets(3, 4), cu_k, 4, 40, block_table=table
        )
    with pytest.raises(ConfigError, match="max_seqlen_q"):
        flash_attn.flash_attn_varlen_func(
            Q[0], CACHES["k_cache"], CACHES["v_cache"], offsets(3, 4), offsets(3, 4), 3, 4, block_table=table
        )


# torch.compile


def test_compiles_into_one_graph():
    cos, sin = tables(8)

    def step(q, k, v, k_cache, v_cache, lengths):
        out = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(4, 0))
        decoded = flash_attn.flash_attn_with_kvcache(q[:, :1], k_cache, v_cache, k[:, :1], v[:, :1], cos, sin, lengths)
        return out, decoded

    lengths = torch.tensor([3, 7], dtype=INT)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        caches = [[cache.clone() for cache in CACHES.values()] for _ in range(2)]
        close(compiled(Q, K, V, *caches[0], lengths), step(Q, K, V, *caches[1], lengths))
    close(caches[0], caches[1])


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


def test_empty_batches_are_packed_too():
    tokens, indices, cu_seqlens, longest, _ = bert_padding.unpad_input(normal(0, 5, 2), torch.ones(0, 5))
    assert (tokens.shape, len(indices), cu_seqlens.tolist(), longest) == ((0, 2), 0, [0], 0)


# rotary


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offset", [0, 5, torch.tensor([4, 11])], ids=["zero", "int", "tensor"])
def test_rotary_turns_pairs(interleaved, offset):
    cos, sin = tables(20, rotary_dim=10)
    x = normal(2, 9, 3, 16)
    found = apply_rotary_emb(x, cos, sin, interleaved=interleaved, seqlen_offsets=offset)
    for b in range(2):
        first = int(offset[b]) if isinstance(offset, torch.Tensor) else offset
        close(found[b], rotated(x[b], cos, sin, torch.arange(first, first + 9), interleaved))
    close(found.norm(dim=-1), x.norm(dim=-1))


def test_rotary_of_packed_sequences_in_place_and_its_gradient():
    cos, sin = tables(20)
    x, cu = normal(12, 3, 16), offsets(5, 0, 7)
    starts = torch.tensor([3, 9, 1])
    expected = torch.cat(
        [
            rotated(x[:5], cos, sin, torch.arange(3, 8), False),
            rotated(x[5:], cos, sin, torch.arange(1, 8), False),
        ]
    )
    leaf = x.clone().requires_grad_()
    found = apply_rotary_emb(leaf, cos, sin, cu_seqlens=cu, max_seqlen=7, seqlen_offsets=starts)
    close(found, expected)
    (gradient,) = torch.autograd.grad(found, leaf, found.detach())
    close(gradient, x)  # a rotation's transpose is its inverse
    written = x.clone()
    assert apply_rotary_emb(written, cos, sin, False, True, starts, cu, 7) is written
    close(written, expected)


def test_rotary_rounds_once_in_half_precision():
    cos, sin = tables(9)
    x = normal(1, 9, 2, 8, dtype=torch.bfloat16)
    found = apply_rotary_emb(x, cos.bfloat16(), sin.bfloat16(), interleaved=True)
    truth = rotated(x[0].float(), cos.bfloat16().float(), sin.bfloat16().float(), torch.arange(9), True)
    assert torch.equal(found[0], truth.bfloat16())


@pytest.mark.parametrize(
    "arguments, match",
    [
        (dict(x=normal(9, 2, 16)), "x: got shape"),
        (dict(x=normal(1, 21, 2, 16)), "20 positions, needs at least 21"),
        (dict(x=normal(1, 9, 2, 6)), "rotary_dim 8, needs at most the head dim, 6"),
        (dict(x=normal(1, 9, 2, 16), seqlen_offsets=15), "position: got values in 15..23, needs values in 0..19"),
        (dict(x=normal(9, 2, 16), cu_seqlens=offsets(9), max_seqlen=30), "at least 30"),
    ],
)
def test_rotary_of_malformed_arguments(arguments, match):
    cos, sin = tables(20)
    with pytest.raises(ConfigError, match=match):
        apply_rotary_emb(cos=cos, sin=sin, **arguments)


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
