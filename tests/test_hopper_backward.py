"""What of the Hopper kernels needs no GPU: which blocks a tile visits, the weights of a tile and their gradient, and
what the programs of a backward in two passes cover. `test_hopper_one_pass.py` has the backward in one pass.

The kernels' own functions run here, on plain numbers and torch tensors instead of Gluon's.
"""

import functools
import itertools
import math
from types import SimpleNamespace

import hopper_calls
import pytest
import torch

pytest.importorskip("triton")

from gluon_on_cpu import HOPPER, INTEGERS, SCRATCH, Numbers, Pointer, cdiv, plain, shared_memory_of, start_program

from regard.backends import hopper
from regard.backends.hopper import HopperBackend
from regard.backends.launch import Launch
from regard.export.cross_compile import meta_inputs
from regard.kernels import hopper_backward, hopper_forward, hopper_tiles, hopper_two_pass

# --- Which blocks a tile visits

query_blocks = plain(hopper_backward.query_blocks, gl=INTEGERS)
key_blocks = plain(hopper_tiles.key_blocks, gl=INTEGERS)

BANDS = {
    "full": (None, None),
    "causal": (None, 0),
    "window": (191, 0),
    "narrow window": (0, 0),
    "both sides": (128, 63),
    "left only": (127, None),
    "right only": (None, 64),
}
LENGTHS = (0, 1, 63, 64, 65, 127, 128, 129, 300, 700)
TILES = [(64, 64), (128, 64), (64, 128), (128, 128)]


def right_reach(band):
    return None if band[1] is None else band[1] + 1


def visible_pairs(band, length_q, length_k, rows, columns):
    """(rows, columns) of queries and keys, from the definition of `AttentionConfig.band`; no key past the sequence."""
    left, right = band
    key, query = torch.arange(columns)[None, :], torch.arange(rows)[:, None]
    ahead = key - query - (length_k - length_q)
    visible = (key < length_k).expand(rows, columns).clone()
    if left is not None:
        visible &= ahead >= -left
    if right is not None:
        visible &= ahead <= right
    return visible


def any_and_all(pairs, block_m, block_n):
    """Of every block (rows, columns), whether any pair and whether all of it is visible."""
    shape = len(pairs) // block_m, block_m, pairs.shape[1] // block_n, block_n
    blocks = pairs.reshape(shape).transpose(1, 2).flatten(2)
    return blocks.any(2), blocks.all(2)


def check_blocks(blocks, seen, wholly_seen):
    """``seen``, ``wholly_seen``: of every block of a tile, whether any pair and whether all of it is visible."""
    low, full_low, full_high, high = blocks
    assert 0 <= low <= full_low <= full_high <= high
    if any(seen):
        first, last = seen.index(True), len(seen) - 1 - seen[::-1].index(True)
        assert (low, high) == (first, last + 1), "all that is visible, and no more"
        inside = [block for block in range(low, high) if wholly_seen[block]]
        assert inside == list(range(full_low, full_high)), "no hidden pair is shown, no block masked for nothing"
    else:
        assert full_low == full_high


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: "x".join(map(str, tile)))
@pytest.mark.parametrize("band", BANDS.values(), ids=BANDS)
def test_query_blocks_of_a_key_tile(band, tile):
    block_m, block_n = tile
    for length_q, length_k in itertools.product(LENGTHS, LENGTHS):
        # Queries past the sequence, whose lse is +inf, are taken for what the band says of their place.
        rows, columns = cdiv(length_q, block_m) * block_m, cdiv(length_k, block_n) * block_n
        visible = visible_pairs(band, length_q, length_k, rows, columns)
        _, whole = any_and_all(visible, *tile)
        visible[length_q:] = False
        seen, _ = any_and_all(visible, *tile)
        for first in range(0, columns + 2 * block_n, block_n):
            blocks = query_blocks(first, length_q, length_k, band[0], right_reach(band), block_m, block_n)
            if first < columns:
                check_blocks(blocks, *(found[:, first // block_n].tolist() for found in (seen, whole)))
            if first >= columns or not seen[:, first // block_n].any():
                assert blocks[0] == blocks[3], "nothing is visited where nothing is visible"


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: "x".join(map(str, tile)))
@pytest.mark.parametrize("band", BANDS.values(), ids=BANDS)
def test_key_blocks_of_a_query_tile(band, tile):
    block_m, block_n = tile
    for length_q, length_k in itertools.product(LENGTHS, LENGTHS):
        rows, columns = cdiv(length_q, block_m) * block_m, cdiv(length_k, block_n) * block_n
        visible = visible_pairs(band, length_q, length_k, rows, columns)
        visible[length_q:] = False
        seen, _ = any_and_all(visible, *tile)
        visible[length_q:] = True
        _, whole = any_and_all(visible, *tile)
        for first in range(0, length_q, block_m):
            last = min(first + block_m, length_q) - 1
            blocks = key_blocks(first, last, length_q, length_k, band[0], right_reach(band), block_n)
            of_tile = [found[first // block_m].tolist() for found in (seen, whole)]
            check_blocks(blocks, *of_tile)
            assert any(of_tile[0]) or blocks[3] - blocks[0] == 1, "one block, so that every tile takes the same path"


@pytest.mark.parametrize("warpgroups", [2, 3])
@pytest.mark.parametrize("block_n", [64, 128])
@pytest.mark.parametrize("band", BANDS.values(), ids=BANDS)
def test_a_warpgroup_waits_for_the_blocks_that_are_loaded(band, block_n, warpgroups):
    """Its own blocks, and those it lets pass before and after them, are those that its program loads: no more, for
    which it would wait for ever. Its rows may all lie past the sequence."""
    for length_q, length_k in itertools.product(LENGTHS[1:], LENGTHS):
        bounds = length_q, length_k, band[0], right_reach(band), block_n
        for first in range(0, length_q, warpgroups * 64):
            low, _, _, high = key_blocks(first, min(first + warpgroups * 64, length_q) - 1, *bounds)
            for mine in range(first, first + warpgroups * 64, 64):
                my_low, _, _, my_high = key_blocks(mine, min(mine + 64, length_q) - 1, *bounds)
                my_high = min(my_high, high)  # as in `attend_queries` and `query_gradient`
                my_low = min(my_low, my_high - 1)
                assert low <= my_low < my_high <= high


def test_every_packed_query_tile_of_the_forward_is_taken_once():
    """By programs that take turns; and none claims a tile that is not there."""
    lengths = [number % 5 * 50 for number in range(71)]
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    heads, programs, index, taken = 3, 4, itertools.count(4), []
    nothing = SimpleNamespace(copy=lambda *_: None)
    for number in range(programs):
        load_tiles = plain(
            hopper_forward.load_tiles, claim_tile=lambda _counter: next(index), leave_counters=lambda _counter: None,
            write_record=lambda _records, _tile, fields: taken.append(tuple(map(int, fields))),
            gl=SimpleNamespace(**{**vars(HOPPER["gl"]), "program_id": lambda _axis, number=number: number}),
        )  # fmt: skip
        load_tiles(SimpleNamespace(
            cu_seqlens_q_ptr=Pointer(starts), cu_seqlens_k_ptr=Pointer(starts), kv_lens_ptr=None, batch=len(lengths),
            heads=heads, group=1, seqlen_q=200, seqlen_k=200, total_q=int(starts[-1]), total_k=int(starts[-1]),
            section=1, splits=None, counter_ptr=None, window_left=None, right_reach=1, BLOCK_M=128, BLOCK_N=64, PACK=1, STEADY=False,
            queries=nothing, keys=nothing, values=nothing, records=None, q_desc=None, k_desc=None, v_desc=None,
        ))  # fmt: skip
    tiles = [(sequence, head, first) for sequence, length in enumerate(lengths) for head in range(heads)
             for first in range(0, length, 128)]  # fmt: skip
    records = [record for record in taken if len(record) > 2]
    assert sorted((sequence, head, first) for _, _, first, head, sequence, *_ in records) == tiles
    assert all(
        (start, length) == (starts[sequence], lengths[sequence]) for *_, sequence, start, length, _, _ in records
    )
    assert len(taken) == len(tiles) + programs and next(index) == programs + len(tiles)


# --- The weights of a tile, and their gradient

TENSORS = SimpleNamespace(
    where=torch.where, exp2=torch.exp2, abs=torch.abs, maximum=torch.maximum, float32=torch.float64
)
softmax_weights = plain(hopper_two_pass.softmax_weights, gl=TENSORS)
one_pass_weights = plain(
    hopper_backward.softmax_weights, gl=TENSORS, read_field=lambda records, _, field: records[field]
)
LOG2_E = math.log2(math.e)


def tile_of_products(softcap, slope, dtype=torch.float64, keys=48, queries=40):
    """A tile with hidden pairs and a query that sees nothing: what the kernels know of it, and what they should find.

    Rows are keys. ``ds`` is the gradient of the raw products by autograd, ``row_lse`` in units of log2.
    """
    generator = torch.Generator().manual_seed(0)
    scale, left, reach, length_q, length_k = 0.25, 20, 1, 41, 45
    q = torch.randn(queries, 16, generator=generator, dtype=torch.float64) * 6
    k = torch.randn(keys, 16, generator=generator, dtype=torch.float64) * 6
    dp = torch.randn(keys, queries, generator=generator, dtype=torch.float64)
    key, query = torch.arange(keys), torch.arange(queries)
    s = (k @ q.T).requires_grad_()
    ahead = key[:, None] - (query[None, :] + length_k - length_q)
    logits = s * scale if softcap is None else softcap * torch.tanh(s * scale / softcap)
    logits = logits - (slope or 0.0) * ahead.abs().double()
    seen = (key[:, None] < length_k) & (-left <= ahead) & (ahead < reach)
    seen[:, 7] = False
    logits = torch.where(seen, logits, -1e6)
    p = torch.where(seen, logits.softmax(0), 0.0)
    (ds,) = torch.autograd.grad(p, s, dp)
    p, lse = p.detach(), logits.detach().logsumexp(0)
    call = SimpleNamespace(scale=scale, softcap=softcap, window_left=left, right_reach=reach, length_q=length_q,
                           length_k=length_k, RAGGED=True)  # fmt: skip
    row_lse = torch.where(seen.any(0), lse * LOG2_E, math.inf)
    given = {"s": s.detach(), "row_lse": row_lse, "dp": dp, "delta": (p * dp).sum(0)}
    given = {name: value.to(dtype) for name, value in given.items()}
    return SimpleNamespace(key=key, query=query, call=call, slope=slope, seen=seen, p=p, ds=ds, **given)


def two_pass_weights(tile, rows, block=0, full=(0, 0), **changes):
    """P and what it is multiplied by, as (keys, queries), of either pass: its rows are keys or queries."""
    call = SimpleNamespace(**{**vars(tile.call), **changes})
    if rows == "keys":
        key, query, lse, s = tile.key[:, None], tile.query[None, :], tile.row_lse[None, :], tile.s
    else:
        key, query, lse, s = tile.key[None, :], tile.query[:, None], tile.row_lse[:, None], tile.s.T
    p, bend = softmax_weights(s, lse, key, query, call, tile.slope, block, *full)
    bend = torch.as_tensor(bend, dtype=p.dtype).expand_as(p)
    return (p, bend) if rows == "keys" else (p.T, bend.T)


@pytest.mark.parametrize("rows", ["keys", "queries"])
@pytest.mark.parametrize("softcap", [None, 0.5, 5.0, 50.0, 1e4])
@pytest.mark.parametrize("slope", [None, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_weights_and_gradient_in_two_passes(rows, softcap, slope, dtype):
    tile = tile_of_products(softcap, slope, dtype)
    p, bend = two_pass_weights(tile, rows)
    ds = tile.call.scale * bend * p * (tile.dp - tile.delta)
    # float32 rounds the logits to what it can tell apart near softcap.
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    tolerance *= max(1, (softcap or 0) / 50)
    assert p.dtype == dtype
    assert (p - tile.p).abs().max() < tolerance and (ds - tile.ds).abs().max() < tolerance
    assert not p[~tile.seen].any() and not ds[~tile.seen].any()
    assert tile.ds.abs().max() > 0.005, "there is a gradient to find"


@pytest.mark.parametrize("rows", ["keys", "queries"])
def test_pairs_are_looked_at_where_some_may_be_hidden(rows):
    tile = tile_of_products(None, None)
    unmasked = torch.exp2(tile.s * (tile.call.scale * LOG2_E) - tile.row_lse)
    for block, looked_at in ((2, True), (3, False), (4, False), (5, True)):
        p, _ = two_pass_weights(tile, rows, block, (3, 5))
        assert torch.allclose(p, tile.p if looked_at else unmasked, rtol=1e-10)
    nowhere = dict(window_left=None, right_reach=None)
    p, _ = two_pass_weights(tile, rows, **nowhere, RAGGED=False)
    assert torch.allclose(p, unmasked, rtol=1e-10), "the whole tile is visible"
    p, _ = two_pass_weights(tile, rows, **nowhere)
    assert torch.allclose(p[:45], unmasked[:45], rtol=1e-10) and not p[45:].any(), "keys past the sequence"


def weights_in_one_pass(tile, edge=True, **changes):
    """P from the products that start at -lse; the tile is told of as keys from 5 on and block 2 of queries."""
    call = SimpleNamespace(**{**vars(tile.call), "BLOCK_M": 8, **changes})
    known = {"FIRST_KEY": 5, "LENGTH_K": call.length_k, "SHIFT": call.length_k - call.length_q}
    call.records = {getattr(hopper_backward, field).value: value for field, value in known.items()}
    s = tile.s - tile.row_lse / (call.scale * LOG2_E)
    return one_pass_weights(s, call, 0, 2, tile.key - 5, tile.query - 16, tile.slope, edge)


@pytest.mark.parametrize("slope", [None, 0.1])
def test_weights_in_one_pass(slope):
    tile = tile_of_products(None, slope)
    p = weights_in_one_pass(tile)
    assert (p - tile.p).abs().max() < 1e-11 and not p[~tile.seen].any()
    ds = tile.call.scale * p * (tile.dp - tile.delta)  # products for dP start at -delta
    assert (ds - tile.ds).abs().max() < 1e-11 and tile.ds.abs().max() > 0.005


def test_pairs_are_looked_at_in_one_pass_where_some_may_be_hidden():
    tile = tile_of_products(None, None)
    unmasked = torch.exp2(tile.s * (tile.call.scale * LOG2_E) - tile.row_lse)
    nowhere = dict(window_left=None, right_reach=None)
    for p in (weights_in_one_pass(tile, edge=False), weights_in_one_pass(tile, **nowhere, RAGGED=False)):
        assert torch.allclose(p, unmasked, rtol=1e-10)
    p = weights_in_one_pass(tile, **nowhere)
    assert torch.allclose(p[:45], unmasked[:45], rtol=1e-10) and not p[45:].any(), "keys past the sequence"
    for band in ("window_left", "right_reach"):
        p = weights_in_one_pass(tile, RAGGED=False, **{band: None})
        hidden = p.eq(0) & unmasked.gt(0)
        assert 0 < hidden.sum() < (~tile.seen).sum(), "one side of a band is enough"


# --- What the programs of a backward cover

HEAD_DIMS = range(8, 257, 8)
SHARED_LIMIT = 227 * 1024
config = functools.partial(hopper_calls.config, heads_q=6)


def launches_of(config):
    """The launches of a call's backward, by the name of their kernel."""
    inputs = meta_inputs(config)
    grad_out = inputs.q.new_empty((*inputs.q.shape[:-1], config.head_dim_v))
    terms = inputs.q.new_empty(1, dtype=torch.float32)
    if hopper._needs_two_passes(config):
        launches = hopper.two_pass_launches(config, inputs, grad_out, terms, terms, inputs)
    else:
        sums = inputs.q.new_empty(hopper.query_sums_shape(config), dtype=torch.float32)
        launches = [
            hopper.backward_launch(config, inputs, grad_out, terms, terms, sums, *inputs[1:3], terms.int(), 132),
            hopper.finish_launch(config, inputs, sums, inputs.q),
        ]
    return {launch.kernel.fn.__name__: launch for launch in launches}


ONE_PASS, FINISH, KEYS, QUERIES = "attention_backward", "finish_queries", "backward_keys", "backward_queries"
TILE = {KEYS: 64, QUERIES: 128}
"""Rows of a program: keys, in the pass for dQ queries."""


def tiles_of(launch, **pointers):
    """Of every program that does something, in their order: (sequence, head, first row), how many blocks it visits, and
    all else it knows.
    """
    found = []
    for number in range(launch.programs):
        known = start_program(launch, number, **pointers)
        if known is not None:
            first = known["first_key"] if "first_key" in known else known["first"]
            head = known["head_k"] if "head_k" in known else known["head"]
            found.append(((known["sequence"], head, first), known["high"] - known["low"], known))
    return found


CALLS = {
    "deterministic": config(deterministic=True),
    "softcap": config(head_dim=128, softcap=30.0, causal=True),
    "wide": config(head_dim=256, window=(70, 130)),
    "wide values": config(head_dim_v=136, causal=True),
    "whole tiles": config(head_dim=256, seqlen_q=256, seqlen_k=256),
    "one query": config(head_dim=192, head_dim_v=128, seqlen_q=1),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_row_has_one_program(call):
    called = CALLS[call]
    launches = launches_of(called)
    assert set(launches) == {KEYS, QUERIES}
    for name, launch in launches.items():
        rows, heads = (called.seqlen_q, 6) if name == QUERIES else (called.seqlen_k, 2)
        programs = tiles_of(launch)
        expected = itertools.product(range(2), range(heads), range(0, rows, TILE[name]))
        assert sorted(place for place, *_ in programs) == list(expected)
        if called.causal:
            blocks = [count for place, count, _ in programs if place[:2] == (0, 0)]
            assert blocks == sorted(blocks, reverse=True) and blocks[0] > blocks[-1], "the longest programs first"


def test_every_packed_row_has_one_program():
    starts_q, starts_k = (0, 300, 300, 301, 500), (0, 130, 258, 258, 300)
    called = config(batch=4, varlen=True, total_q=500, total_k=300, deterministic=True)
    pointers = dict(cu_seqlens_q_ptr=Numbers(*starts_q), cu_seqlens_k_ptr=Numbers(*starts_k))
    for name, launch in launches_of(called).items():
        starts, heads = (starts_q, 6) if name == QUERIES else (starts_k, 2)
        programs = tiles_of(launch, **pointers)
        expected = [
            (sequence, head, first) for sequence, head in itertools.product(range(4), range(heads))
            for first in range(0, starts[sequence + 1] - starts[sequence], TILE[name])
        ]  # fmt: skip
        assert sorted(place for place, *_ in programs) == expected, "none for what no sequence holds"
        for (sequence, *_), _, known in programs:
            assert (known["start_q"], known["start_k"]) == (starts_q[sequence], starts_k[sequence])
            assert known["length_q"] == starts_q[sequence + 1] - starts_q[sequence]


def test_keys_past_kv_lens_are_not_read_but_get_their_zeros():
    called = config(batch=3, kv_lens=True, deterministic=True)
    lengths = (0, 70, 10**6)
    for name, launch in launches_of(called).items():
        programs = tiles_of(launch, kv_lens_ptr=Numbers(*lengths))
        assert len(programs) == launch.programs, "every row of the gradients is written"
        for (sequence, _, first), blocks, known in programs:
            assert known["length_k"] == min(lengths[sequence], called.seqlen_k)
            if name != QUERIES:
                assert blocks == 0 if first >= known["length_k"] else blocks > 0


@pytest.mark.parametrize(
    "options, two",
    [
        ({}, False), (dict(head_dim=128), False), (dict(head_dim=128, alibi=True, window=(9, 9)), False),
        (dict(head_dim=136), True), (dict(head_dim=64, head_dim_v=136), True), (dict(head_dim=256), True),
        (dict(head_dim=128, deterministic=True), True), (dict(head_dim=128, softcap=0.5), True),
    ],
)  # fmt: skip
def test_the_backward_launches_what_the_call_needs(options, two, monkeypatch):
    """And every gradient is what one of the launches fills."""
    called = config(**options)
    inputs = meta_inputs(called)
    ran = []
    monkeypatch.setattr(Launch, "run", lambda launch, _device: ran.append(launch))
    counter = inputs.q.new_empty(2, dtype=torch.int32)
    monkeypatch.setattr(hopper, "tile_counter", lambda _device: counter)
    monkeypatch.setattr(hopper, "multiprocessors", lambda _device: 132)
    out = inputs.q.new_empty(inputs.out_shape)
    lse = inputs.q.new_empty(inputs.lse_shape, dtype=torch.float32)
    found = HopperBackend().backward(called, inputs, out, lse, out, None)
    _row_terms, *passes = ran
    assert [launch.kernel.fn.__name__ for launch in passes] == ([KEYS, QUERIES] if two else [ONE_PASS, FINISH])
    filled = {name: value for launch in passes for name, value in launch.arguments.items()}
    assert filled["dk_desc"].base is filled["dk_ptr"] is found["k"]
    assert filled["dv_desc"].base is filled["dv_ptr"] is found["v"]
    if two:
        assert filled["dq_desc"].base is filled["dq_ptr"] is found["q"]
    else:
        assert filled["dq_desc"].base is filled["sums_ptr"] and filled["dq_ptr"] is found["q"]
        assert filled["counter_ptr"] is counter
        assert filled["sums_ptr"].dtype == torch.float32 and filled["sums_ptr"].shape == hopper.query_sums_shape(called)


@pytest.mark.parametrize("options", [{}, dict(deterministic=True)], ids=["default", "deterministic"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_tiles_fit_in_shared_memory(head_dim, options):
    for head_dim_v in HEAD_DIMS:
        launches = launches_of(config(head_dim, head_dim_v, **options))
        launches.pop(FINISH, None)
        for name, launch in launches.items():
            blocks = {key: value.block_shape for key, value in launch.arguments.items() if key.endswith("_desc")}
            assert blocks["q_desc"][-1] == blocks["k_desc"][-1] >= head_dim
            assert blocks["v_desc"][-1] == blocks["grad_out_desc"][-1] >= head_dim_v
            assert shared_memory_of(launch) + SCRATCH <= SHARED_LIMIT, (name, head_dim_v)


KIB = 1024
BARRIERS = 8 * (2 * 2 * 5 + 2 * 2)  # two stages of five rings, full and empty, and of two companions


@pytest.mark.parametrize(
    "head_dim, head_dim_v, tiles",
    [
        # queries, output gradients, scores, keys, values, what leaves, row terms
        (64, 64, (2 * 16 + 2 * 16 + 2 * 32 + 2 * 16 + 2 * 16 + 2 * 16) * KIB + 2 * 2 * 128 * 4),
        (40, 8, (2 * 16 + 2 * 16 + 2 * 32 + 2 * 16 + 2 * 16 + 2 * 16) * KIB + 2 * 2 * 128 * 4),
        (128, 128, (2 * 16 + 2 * 16 + 2 * 16 + 2 * 32 + 1 * 32 + 2 * 16) * KIB + 2 * 2 * 64 * 4),
        (128, 64, (2 * 16 + 2 * 8 + 2 * 16 + 2 * 32 + 1 * 16 + 2 * 16) * KIB + 2 * 2 * 64 * 4),
        (64, 128, (2 * 8 + 2 * 16 + 2 * 16 + 2 * 16 + 1 * 32 + 2 * 16) * KIB + 2 * 2 * 64 * 4),
    ],
)
def test_what_the_backward_in_one_pass_asks_for(head_dim, head_dim_v, tiles):
    barriers = BARRIERS if max(head_dim, head_dim_v) <= 64 else BARRIERS - 16  # the values' second stage
    records = 2 * 16 * 4
    assert shared_memory_of(launches_of(config(head_dim, head_dim_v))[ONE_PASS]) == tiles + records + barriers
