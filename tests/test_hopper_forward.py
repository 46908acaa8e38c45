"""The Hopper forward, whole, without a GPU, role by role. See `gluon_on_cpu.py`."""

import dataclasses
import itertools
import math
import threading
import time
from types import SimpleNamespace

import gluon_on_cpu
import pytest
import torch

pytest.importorskip("triton")

from gluon_on_cpu import HOPPER, PATIENCE, Registers, arguments_on_cpu, plain, run_programs

import regard
from regard import AttentionConfig, AttentionInputs
from regard.backends import hopper

CONFIG = AttentionConfig(
    batch=2, seqlen_q=100, seqlen_k=300, heads_q=4, heads_kv=2, head_dim=64, dtype=torch.bfloat16, device="cuda",
    arch="sm90",
)  # fmt: skip


def config(head_dim=64, head_dim_v=None, **options):
    return dataclasses.replace(CONFIG, head_dim=head_dim, head_dim_v=head_dim_v or head_dim, **options)


# --- What the forward needs of a multiprocessor beyond the backward


class Columns(Registers):
    """Key columns, whose layout knows that of the scores."""

    type = SimpleNamespace(layout=SimpleNamespace(parent=None))


def arange(start, stop, layout):
    return torch.arange(start, stop).as_subclass(Columns)


def elementwise(of_numbers, of_tensors):
    def extreme(a, b):
        if any(isinstance(each, torch.Tensor) and each.ndim for each in (a, b)):
            return of_tensors(*(torch.as_tensor(each) for each in (a, b)))
        return of_numbers(a, b)

    return extreme


def load(pointer, mask=None):
    if mask is None and torch.as_tensor(pointer.place).ndim:
        return pointer.tensor.view(-1)[pointer.place]
    return pointer.load(mask)


_turns = {}


def turn(warpgroup):
    """The hardware barrier at which a warpgroup of this program waits for its turn."""
    return _turns.setdefault((gluon_on_cpu._role.number, int(warpgroup)), threading.Semaphore(0))


def await_turn(warpgroup):
    if not turn(warpgroup).acquire(timeout=PATIENCE):
        raise TimeoutError("a warpgroup waits for its turn for ever")


def pass_turn(warpgroup, warpgroups):
    turn((warpgroup + 1) % warpgroups).release()


FORWARD = HOPPER | dict(
    await_turn=await_turn,
    pass_turn=pass_turn,
    rescale=lambda acc, decay: acc * decay[:, None],
    gl=SimpleNamespace(
        **vars(HOPPER["gl"])
        | dict(
            arange=arange, load=load, log2=torch.log2, associative_scan=lambda values, axis, _add: values.cumsum(axis),
            maximum=elementwise(max, torch.maximum), minimum=elementwise(min, torch.minimum),
            max=lambda values, axis: values.amax(axis) if values.ndim > 1 else int(values.max()),
            sum=lambda values, axis: values.sum(axis) if values.ndim > 1 else int(values.sum()),
            full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype).as_subclass(Registers),
        )
    ),
)  # fmt: skip


# --- The kernel


def random_inputs(called, **others):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    rows_q, rows_k = (
        ((called.total_q,), (called.total_k,))
        if called.varlen
        else ((called.batch, called.seqlen_q), (called.batch, called.seqlen_k))
    )
    return AttentionInputs(
        random(*rows_q, called.heads_q, called.head_dim),
        random(*rows_k, called.heads_kv, called.head_dim),
        random(*rows_k, called.heads_kv, called.head_dim_v),
        alibi_slopes=random(called.heads_q).abs() / 8 if called.alibi else None,
        sinks=random(called.heads_q) if called.sinks else None,
        **others,
    )


def expected(called, given):
    """Out and lse by the reference in float64."""
    q, k, v = (each.double() for each in given[:3])
    options = dict(
        causal=called.causal, window=called.window, softmax_scale=called.softmax_scale, softcap=called.softcap,
        alibi_slopes=given.alibi_slopes, sinks=given.sinks, return_lse=True, backend="reference",
    )  # fmt: skip
    if called.varlen:
        return regard.varlen_attention(q, k, v, given.cu_seqlens_q, given.cu_seqlens_k, **options)
    return regard.attention(q, k, v, kv_lens=given.kv_lens, **options)


def results_on_cpu(called, given, multiprocessors=3):
    """Out and lse as the kernel finds them."""
    out = torch.full((*given.q.shape[:-1], called.head_dim_v), math.nan)
    lse = torch.full((*given.q.shape[:-3], called.heads_q, given.q.shape[-3]), math.nan)
    counter = torch.zeros(2, dtype=torch.int32)
    launch = hopper.forward_launch(called, given, out, lse, counter, multiprocessors)
    start, arguments = plain(launch.kernel, **FORWARD), arguments_on_cpu(launch)
    _turns.clear()
    run_programs(lambda: start(**arguments), launch.programs)
    assert not counter.any(), "as the next launch needs them"
    assert not any(turn._value for turn in _turns.values()), "every turn that is passed is taken"
    return out, lse


def check(found, truth):
    for name, mine, wanted in zip(("out", "lse"), found, truth, strict=True):
        torch.testing.assert_close(mine, wanted.float(), rtol=0, atol=1e-5, msg=lambda said, of=name: f"{of}: {said}")


CALLS = {
    "plain": config(),
    "plain, wide": config(128, seqlen_k=256),
    "causal": config(128, causal=True),
    "more queries than keys": config(causal=True, seqlen_q=300, seqlen_k=150),
    "one query": config(seqlen_q=1),
    "three warpgroups": config(causal=True, seqlen_q=200, seqlen_k=1100, heads_q=1, heads_kv=1, batch=1),
    "window": config(96, window=(130, 9)),
    "window and sinks": config(256, window=(70, None), sinks=True, causal=True),
    "head dims": config(192, 128, heads_q=2),
    "everything": config(window=(150, 3), softcap=2.0, alibi=True, sinks=True, heads_q=6),
}


@pytest.mark.parametrize("call", CALLS)
def test_results(call):
    called = CALLS[call]
    given = random_inputs(called)
    check(results_on_cpu(called, given), expected(called, given))


@pytest.mark.parametrize("options", [{}, dict(causal=True), dict(window=(140, None), sinks=True)],
                         ids=["plain", "causal", "window and sinks"])  # fmt: skip
def test_keys_past_kv_lens(options):
    """What lies there is not looked at, were it not a number."""
    called = config(batch=4, kv_lens=True, seqlen_q=5, **options)
    lengths = (0, 1, 130, 300)
    given = random_inputs(called, kv_lens=torch.tensor(lengths, dtype=torch.int32))
    truth = expected(called, given)
    for sequence, length in enumerate(lengths):
        given.k[sequence, length:] = given.v[sequence, length:] = math.nan
    check(results_on_cpu(called, given), truth)


def test_results_of_packed_sequences():
    starts_q, starts_k = (torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
                          for lengths in ((100, 0, 1, 70), (130, 9, 200, 0)))  # fmt: skip
    called = config(batch=4, seqlen_q=100, seqlen_k=200, varlen=True, total_q=171, total_k=339, causal=True, sinks=True)
    given = random_inputs(called, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k)
    check(results_on_cpu(called, given), expected(called, given))


def test_a_warpgroup_that_lags_behind(monkeypatch):
    """The first may be done with a tile, and have cleared the next one's values, before the second begins with it."""

    def pass_late(warpgroup, warpgroups):
        pass_turn(warpgroup, warpgroups)
        time.sleep(0.02 * int(warpgroup))

    monkeypatch.setitem(FORWARD, "pass_turn", pass_late)
    called = config(batch=5, seqlen_k=100, causal=True, kv_lens=True)
    given = random_inputs(called, kv_lens=torch.full((5,), 60, dtype=torch.int32))
    check(results_on_cpu(called, given, multiprocessors=1), expected(called, given))
