"""What of the Hopper backward needs no GPU: the order in which key tiles add to dQ, and the gradient through softcap.

The kernels' own functions run here, on plain numbers and torch tensors instead of Gluon's.
"""

import itertools
import math
from collections import Counter
from dataclasses import replace
from types import FunctionType, SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from regard import AttentionConfig
from regard.backends import hopper
from regard.kernels import hopper_backward, hopper_turns

BLOCK_N = hopper_backward.BLOCK_N.value


def plain(function, **names):
    """A kernel's function as one of Python, where its globals mean this."""
    return FunctionType(function.fn.__code__, {**function.fn.__globals__, **names})


INTEGERS = SimpleNamespace(maximum=max, minimum=min, cdiv=lambda a, b: -(-a // b))
nth_program, turn_of = (plain(f, gl=INTEGERS) for f in (hopper_turns.nth_program, hopper_turns.turn_of))
query_blocks = plain(hopper_backward.query_blocks, gl=INTEGERS)

BANDS = {
    "full": (None, None),
    "causal": (None, 0),
    "window": (200, 0),
    "narrow window": (0, 0),
    "both sides": (70, 130),
    "left only": (100, None),
    "right only": (None, 100),
    "behind": (300, -150),
    "ahead": (-150, 300),
    "unlimited": (2**31 - 2, 2**31 - 2),
}
LENGTHS = (0, 1, 63, 64, 65, 127, 128, 129, 300, 700)


def programs(sequences, tiles, heads_kv, section):
    """(first key, sequence, head) of every ticket in turn; ``sequences``: how many."""
    heads = sequences * heads_kv
    for ticket in range(tiles * heads):
        tile, head = nth_program(ticket, tiles, heads, section)
        yield tile * BLOCK_N, head // heads_kv, head % heads_kv


@pytest.mark.parametrize("block_m", [64, 128])
@pytest.mark.parametrize("band", BANDS)
def test_programs_of_smaller_numbers_are_all_that_a_turn_waits_for(band, block_m):
    """Run one after the other in their order, programs find that each of their turns has come.

    So no turn is left out, none is given twice, and a device that holds a single program at a time does not hang.
    """
    left, right = BANDS[band]
    reach = None if right is None else right + 1
    lengths = list(itertools.product(LENGTHS, LENGTHS))
    longest_k = max(LENGTHS)
    turns, waits = Counter(), Counter()
    for first_key, sequence, _ in programs(len(lengths), -(-longest_k // BLOCK_N), 1, section=7):
        length_q, length_k = lengths[sequence]
        low, _, _, high = query_blocks(first_key, length_q, length_k, left, reach, block_m, BLOCK_N)
        for block in range(low, high):
            turn = turn_of(first_key, block, length_q, length_k, reach, block_m, BLOCK_N)
            assert turn == turns[sequence, block], (length_q, length_k, first_key, block)
            turns[sequence, block] += 1
            waits[turn] += 1
    assert len(waits) > 1 or band == "ahead", "some blocks are seen by more than one tile"


@pytest.mark.parametrize("section", [1, 2, 3, 5, 6, 100])
def test_every_tile_of_every_head_is_some_program(section):
    found = list(programs(sequences=2, tiles=4, heads_kv=3, section=min(section, 6)))
    assert len(set(found)) == len(found) == 24
    expected = itertools.product(range(0, 4 * BLOCK_N, BLOCK_N), range(2), range(3))
    assert sorted(found) == sorted(expected)
    width = min(section, 6)
    assert {place[1:] for place in found[: 4 * width]} == {divmod(head, 3) for head in range(width)}, "a section"


def test_nobody_waits_under_a_causal_mask():
    """Programs that start together and do a block at a time find every turn come, but for the time to pass it on."""
    length, block_m = 2048, 128
    tiles = range(0, length, BLOCK_N)
    done = Counter()
    for time in range(length // block_m):
        steps = []
        for first_key in tiles:
            low, _, _, high = query_blocks(first_key, length, length, None, 1, block_m, BLOCK_N)
            if low + time < high:
                steps.append((low + time, turn_of(first_key, low + time, length, length, 1, block_m, BLOCK_N)))
        assert all(done[block] == turn for block, turn in steps)
        done.update(block for block, _ in steps)


def test_what_a_deterministic_launch_is_told():
    config = AttentionConfig(batch=3, seqlen_q=1000, seqlen_k=700, heads_q=8, heads_kv=2, head_dim=64,
                             dtype=torch.bfloat16, device="cuda", arch="sm90", deterministic=True)  # fmt: skip
    sums = torch.empty(0)
    told = hopper._turns(config, sums, 128)
    assert told["turns_ptr"].dtype == torch.int32 and not told["turns_ptr"].any()
    assert told["turns_ptr"].shape == (1 + 3 * 8 * 8,), "a ticket, and a semaphore for each head and block"
    assert told["section"] == 6, "no more heads than there are"
    sections = {
        length: hopper._turns(replace(config, seqlen_q=length), sums, 128)["section"] for length in (4096, 2**16)
    }
    assert sections == {4096: 2**25 // (4096 * 4 * 512), 2**16: 1}, "what the queries of the heads take is in L2"
    assert hopper._turns(replace(config, deterministic=False), sums, 128) == dict(turns_ptr=None, section=None)


TENSORS = SimpleNamespace(where=torch.where, exp2=torch.exp2, abs=torch.abs, float32=torch.float32)


@pytest.mark.parametrize("softcap", [0.5, 5.0, 50.0, 1e4])
@pytest.mark.parametrize("sloped", [False, True])
def test_softcap_gradient(softcap, sloped):
    """P and dS of a tile against autograd, with hidden pairs and a row that sees nothing."""
    generator = torch.Generator().manual_seed(0)
    keys, queries, dim, scale = 48, 40, 16, 0.25
    q = torch.randn(queries, dim, generator=generator, dtype=torch.float64) * 6
    k = torch.randn(keys, dim, generator=generator, dtype=torch.float64) * 6
    dp = torch.randn(keys, queries, generator=generator, dtype=torch.float64)
    key, query, shift, length_k, left, reach = torch.arange(keys), torch.arange(queries), 4, 45, 20, 1
    slope = 0.1 if sloped else None

    s = (k @ q.T).requires_grad_()
    distance = query[None, :] + shift - key[:, None]
    logits = softcap * torch.tanh(s * scale / softcap) - (slope or 0.0) * distance.abs()
    seen = (key[:, None] < length_k) & (distance > -reach) & (distance <= left)
    seen[:, 7] = False
    logits = torch.where(seen, logits, -1e4)
    lse = logits.logsumexp(0)
    p = torch.where(seen, logits.softmax(0), 0.0)
    delta = (p * dp).sum(0)
    (ds,) = torch.autograd.grad(p, s, dp)

    p, delta, lse = p.detach(), delta.detach(), lse.detach()
    row_lse = torch.where(seen.any(0), lse * math.log2(math.e), math.inf)
    most = softcap * math.log2(math.e) - row_lse
    names = dict(gl=TENSORS, LOG2_E=math.log2(math.e), inverse=lambda x: 1 / x, visible=plain(hopper_backward.visible))
    found_p, found_ds = plain(hopper_backward.capped_softmax_gradient, **names)(
        s.detach().float(), (dp - delta).float(), most.float(), key, query, shift, length_k, slope, scale, softcap,
        left, reach, True,
    )  # fmt: skip
    # float32 rounds the logits to what it can tell apart near softcap.
    assert (found_p - p).abs().max() < 1e-6 * max(1, softcap)
    assert (found_ds * scale - ds).abs().max() < 1e-6 * max(1, softcap)
    assert not found_p[~seen].any() and not found_ds[~seen].any()
