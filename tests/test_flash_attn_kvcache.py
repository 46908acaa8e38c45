"""The drop-in's key/value caches and rotary embedding, against formulas written here a sequence at a time."""

import math

import pytest
import torch

import regard
from regard import ConfigError, UnsupportedError
from regard.integrations import flash_attn
from regard.integrations.flash_attn import flash_attn_interface
from regard.integrations.flash_attn.rotary import apply_rotary_emb

INT = torch.int32


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def offsets(*lengths):
    return torch.tensor([0, *lengths], dtype=INT).cumsum(0, dtype=INT)


def close(actual, expected, tolerance=2e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def strided(table):
    """The same block table with rows that are not contiguous, which flash-attn takes too."""
    return table.T.contiguous().T


Q, K, V = normal(2, 7, 6, 16), normal(2, 11, 2, 16, seed=1), normal(2, 11, 2, 16, seed=2)


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
    caches = [torch.full((2, 12, 2, 16), math.nan) for _ in range(2)]
    outs = [
        flash_attn.flash_attn_with_kvcache(
            q[:, t : t + 1], *caches, k[:, t : t + 1], v[:, t : t + 1], cache_seqlens=t, causal=True
        )
        for t in range(9)
    ]
    close(torch.cat(outs, dim=1), flash_attn.flash_attn_func(q, k, v, causal=True))


# what cannot be honoured raises

CACHES = dict(k_cache=normal(2, 8, 2, 16), v_cache=normal(2, 8, 2, 16))
NEW = dict(k=normal(2, 3, 2, 16), v=normal(2, 3, 2, 16))
COS, SIN = tables(8)


def one(value):
    return torch.tensor([value, 0], dtype=INT)


@pytest.mark.parametrize(
    "arguments, match",
    [
        (dict(q=Q, **CACHES, cache_seqlens=9), "cache_seqlens: got 9,"),
        (dict(q=Q, **CACHES, cache_seqlens=one(-1)), "cache_seqlens: got .*-1"),
        (dict(q=Q, **CACHES, cache_seqlens=one(1).long()), "cache_seqlens: .*int64.*int32"),
        (dict(q=Q, **CACHES, cache_seqlens=2.5), "cache_seqlens: got 2.5"),
        (dict(q=Q, **CACHES, **NEW, cache_seqlens=6), "cache_seqlens: got 6, needs values in 0..5"),
        (dict(q=Q, **CACHES, **NEW), "cache_seqlens: got None"),
        (dict(q=Q, **CACHES, k=NEW["k"], cache_seqlens=1), "v: got None"),
        (dict(q=Q, **CACHES, k=NEW["k"], v=NEW["v"][:, :1], cache_seqlens=1), "v: got"),
        (dict(q=Q, **CACHES, k=NEW["k"], v=NEW["v"][:1], cache_seqlens=1), "v: got"),
        (dict(q=Q, **CACHES, k=NEW["k"].half(), v=NEW["v"], cache_seqlens=1), "k: .*float16"),
        (dict(q=Q, **CACHES, rotary_cos=COS, rotary_sin=SIN), "k: got None"),
        (dict(q=Q, **CACHES, **NEW, cache_seqlens=1, rotary_cos=COS), "rotary_sin: got None"),
        (
            dict(q=Q, **CACHES, **NEW, cache_seqlens=1, rotary_cos=COS[:7], rotary_sin=SIN[:7]),
            "7 positions, needs at least 8",
        ),
        (
            dict(q=Q, **CACHES, **NEW, cache_seqlens=1, rotary_cos=COS.repeat(1, 3), rotary_sin=SIN.repeat(1, 3)),
            "rotary_dim 24, needs at most the head dim, 16",
        ),
        (dict(q=Q[:1], **CACHES), "k_cache: .*cache_batch_idx"),
        (dict(q=Q, **CACHES, cache_batch_idx=one(2)), "cache_batch_idx: .*2.*needs .*0..1"),
        (dict(q=Q, **CACHES, cache_leftpad=one(5), cache_seqlens=3), "cache_leftpad"),
        (dict(q=Q, **CACHES, cache_leftpad=one(-2), cache_seqlens=3), "cache_leftpad"),
        (
            dict(q=Q, **CACHES, cache_batch_idx=one(0), block_table=torch.zeros(2, 1, dtype=INT)),
            "cache_batch_idx: .*block_table",
        ),
        (dict(q=Q, **CACHES, block_table=torch.zeros(3, 1, dtype=INT)), "block_table"),
        (
            dict(q=Q, **CACHES, **NEW, cache_seqlens=1, block_table=torch.full((2, 1), 5, dtype=INT)),
            "block_table: .*5.*needs .*0..1",
        ),
        (dict(q=Q, **CACHES, k=[1], v=[1], cache_seqlens=1), "k: got list"),
        (dict(q=Q, **CACHES, k=NEW["k"].to("meta"), v=NEW["v"], cache_seqlens=1), "k: got device meta"),
        (dict(q=Q, **CACHES, k=NEW["k"].to_sparse(), v=NEW["v"], cache_seqlens=1), "k: got a torch.sparse_coo"),
        (dict(q=Q, **CACHES, **NEW, cache_seqlens=1, rotary_cos=COS, rotary_sin=SIN.numpy()), "sin: got ndarray"),
        (dict(q=Q, **CACHES, **NEW, cache_seqlens=1, rotary_cos=COS.to("meta"), rotary_sin=SIN), "cos: got device"),
        (dict(q=Q, **CACHES, block_table=[[0], [1]]), "block_table: got list"),
        (dict(q=Q, **CACHES, **NEW, cache_seqlens=1, block_table=torch.zeros(2, 1)), "block_table: got torch.float32"),
        (
            dict(q=Q, k_cache=CACHES["k_cache"][:1].expand(2, -1, -1, -1), v_cache=CACHES["v_cache"], **NEW,
                 cache_seqlens=1),
            "k_cache: got stride",
        ),
        (dict(q=Q, **CACHES, num_splits=-1), "num_splits: got -1"),
        (dict(q=Q[0], **CACHES), "q: got shape"),
        (dict(q=Q, k_cache=K, v_cache=V[:, :3]), "v_cache"),
    ],
)  # fmt: skip
def test_malformed_arguments_are_named(arguments, match):
    with pytest.raises(ConfigError, match=match):
        flash_attn.flash_attn_with_kvcache(**arguments)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (dict(cache_seqlens=one(6)), "cache_seqlens"),
        (dict(alibi_slopes=torch.rand(3)), "alibi_slopes"),
        (dict(alibi_slopes=[0.5]), "alibi_slopes"),
        (dict(softmax_scale=float("nan")), "softmax_scale"),
        (dict(softcap=-1.0), "softcap"),
        (dict(causal=1), "causal"),
        (dict(return_softmax_lse="yes"), "return_lse"),
        (dict(q=Q.double()), "k: got torch.float32"),
    ],
)
def test_an_error_leaves_the_cache_alone(arguments, match):
    caches = [cache.clone() for cache in CACHES.values()]
    arguments = dict(q=Q, cache_seqlens=one(1)) | arguments
    with pytest.raises(ConfigError, match=match):
        flash_attn.flash_attn_with_kvcache(arguments.pop("q"), *caches, **NEW, **arguments)
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
        (dict(x=normal(9, 2, 16), cu_seqlens=offsets(5)), "cu_seqlens: got last offset 5, needs 9"),
        (dict(x=normal(9, 2, 16), cu_seqlens=torch.tensor([0, 10, 9])), "cu_seqlens: got 9 after 10"),
        (dict(x=normal(9, 2, 16), cu_seqlens=[0, 9]), "cu_seqlens: got list"),
        (dict(x=normal(9, 2, 16), cu_seqlens=offsets(9).float()), "cu_seqlens: got torch.float32"),
        (dict(x=normal(1, 9, 2, 16), seqlen_offsets=1.5), "seqlen_offsets: got 1.5"),
        (dict(x=normal(2, 9, 2, 16), seqlen_offsets=offsets(1, 2)), r"seqlen_offsets: got shape \(3,\)"),
        (dict(x=normal(1, 9, 2, 16).int()), "x: got torch.int32"),
        (dict(x=None), "x: got NoneType"),
    ],
)
def test_rotary_of_malformed_arguments(arguments, match):
    cos, sin = tables(20)
    with pytest.raises(ConfigError, match=match):
        apply_rotary_emb(cos=cos, sin=sin, **arguments)
