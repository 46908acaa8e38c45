"""The Hopper backwards, whole, without a GPU: their kernels, role by role, against autograd. See `gluon_on_cpu.py`."""

import itertools
import math

import pytest
import torch

pytest.importorskip("triton")

from gluon_on_cpu import HOPPER, arguments_on_cpu, plain, run_programs
from hopper_calls import DEVICE, config, expected, random_inputs

from regard.backends import hopper


def run_on_cpu(launch):
    start, arguments = plain(launch.kernel, **HOPPER), arguments_on_cpu(launch)
    run_programs(lambda: start(**arguments), launch.programs)


def gradients_on_cpu(called, given, multiprocessors=3, spoilt=slice(0)):
    """dQ, dK and dV as the kernels find them, and as autograd does. The gradient of the output is inf in the rows
    ``spoilt``.
    """
    leaves = [given.q.double(), given.k.double(), given.v.double()]
    for leaf in leaves:
        leaf.requires_grad_()
    out, lse = expected(called, given._replace(q=leaves[0], k=leaves[1], v=leaves[2]))
    generator = torch.Generator().manual_seed(1)
    grad_out, grad_lse = (torch.randn(each.shape, generator=generator) for each in (out, lse))
    grad_out[spoilt] = math.inf
    seen = lse.isfinite()
    truth = torch.autograd.grad((out * grad_out).sum() + (lse[seen] * grad_lse[seen]).sum(), leaves)
    row_lse = torch.where(seen, lse / math.log(2), math.inf).detach().float()
    delta = (out * grad_out).sum(-1).transpose(-1, -2) - torch.where(seen, grad_lse, 0.0)
    delta = delta.detach().float().contiguous()

    dq, dk, dv = (torch.full(each.shape, math.nan) for each in given[:3])
    if hopper._needs_two_passes(called):
        gradients = given._replace(q=dq, k=dk, v=dv)
        for launch in hopper.two_pass_launches(called, given, grad_out, row_lse, delta, gradients):
            run_on_cpu(launch)
        return (dq, dk, dv), truth
    sums, counter = torch.zeros(hopper.query_sums_shape(called)), torch.zeros(2, dtype=torch.int32)
    run_on_cpu(hopper.backward_launch(called, given, grad_out, row_lse, delta, sums, dk, dv, counter, multiprocessors))
    assert not counter.any(), "as the next launch needs them"
    dq = dq.to(DEVICE)
    on_device = given._replace(
        **{name: value.to(DEVICE) for name, value in given._asdict().items() if value is not None}
    )
    hopper.finish_launch(called, on_device, sums.to(DEVICE), dq).run(dq.device)
    return (dq.cpu(), dk, dv), truth


CALLS = {
    "plain": config(),
    "causal": config(128, causal=True, seqlen_q=150, seqlen_k=300),
    "window and ALiBi": config(96, window=(70, 9), alibi=True),
    "wide values": config(64, 128, window=(None, 20), seqlen_q=100),
    "narrow values": config(128, 32, window=(20, None), seqlen_q=70, heads_q=2),
    "one query, one key": config(40, seqlen_q=1, seqlen_k=1),
    "two passes": config(128, deterministic=True),
    "two passes, causal": config(256, causal=True, seqlen_q=150, heads_q=2),
    "two passes, softcap, window and ALiBi": config(96, softcap=2.0, window=(70, 9), alibi=True),
    "two passes, wide values": config(64, 192, window=(None, 20), seqlen_q=100),
    "two passes, one query, one key": config(136, seqlen_q=1, seqlen_k=1),
}
ONE_AND_TWO_PASSES = pytest.mark.parametrize("deterministic", [False, True], ids=["one pass", "two passes"])


def check_gradients(found, expected, rows_q=slice(None), rows_k=slice(None)):
    for name, mine, truth, rows in zip(("dq", "dk", "dv"), found, expected, (rows_q, rows_k, rows_k), strict=True):
        mine, truth = mine[rows], truth[rows]
        floor = 1e-5 * float(truth.abs().amax()) if truth.numel() else 0.0
        assert torch.equal(mine.isnan(), truth.isnan()), name
        assert not truth.numel() or (mine - truth).abs().max() <= floor, name


@pytest.mark.parametrize("call", CALLS)
def test_gradients(call):
    check_gradients(*gradients_on_cpu(CALLS[call], random_inputs(CALLS[call])))


@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_gradients_with_other_numbers_of_programs(multiprocessors):
    called = config(causal=True, seqlen_q=130, seqlen_k=260)
    check_gradients(*gradients_on_cpu(called, random_inputs(called), multiprocessors))


def packed_call(lengths_q, lengths_k, head_dim, **options):
    """A call with packed sequences, and its inputs."""
    starts_q, starts_k = ([0, *itertools.accumulate(lengths)] for lengths in (lengths_q, lengths_k))
    called = config(head_dim, batch=len(lengths_q), heads_q=2, heads_kv=1, seqlen_q=max(lengths_q),
                    seqlen_k=max(lengths_k), varlen=True, total_q=starts_q[-1], total_k=starts_k[-1],
                    **options)  # fmt: skip
    offsets = {f"cu_seqlens_{name}": torch.tensor(starts, dtype=torch.int32)
               for name, starts in (("q", starts_q), ("k", starts_k))}  # fmt: skip
    return called, random_inputs(called, **offsets)


PACKED = [
    (40, {}), (40, dict(window=(70, 30), alibi=True)), (128, dict(causal=True)),
    (128, dict(deterministic=True, window=(70, 30), alibi=True)), (192, dict(causal=True)),
]  # fmt: skip


@pytest.mark.parametrize("head_dim, options", PACKED)
def test_gradients_of_packed_sequences(head_dim, options):
    check_gradients(*gradients_on_cpu(*packed_call((0, 100, 1, 170, 130), (3, 129, 128, 0, 200), head_dim, **options)))


def test_gradients_of_many_packed_sequences():
    """More than a producer has lanes."""
    lengths = [number % 4 * 11 for number in range(70)]
    check_gradients(*gradients_on_cpu(*packed_call(lengths, [*lengths[1:], 131], 64, causal=True)))


@pytest.mark.parametrize("head_dim, options", PACKED)
def test_packed_sequences_do_not_meet(head_dim, options):
    """What one holds, were it not a number, does not reach the others' gradients, though tiles reach into it."""
    called, given = packed_call((100, 75, 130), (129, 60, 200), head_dim, **options)
    rows_q, rows_k = slice(100, 175), slice(129, 189)
    given.q[rows_q] = given.v[rows_k] = math.nan
    given.k[rows_k] = math.inf
    found, expected = gradients_on_cpu(called, given, spoilt=rows_q)
    assert found[0][rows_q].isnan().any(), "it reaches its own"
    for q, k in ((slice(100), slice(129)), (slice(175, None), slice(189, None))):
        assert not any(each.isnan().any() for each in (expected[0][q], expected[1][k], expected[2][k]))
        check_gradients(found, expected, q, k)


@ONE_AND_TWO_PASSES
@pytest.mark.parametrize("lengths", [(0, 130), (200, 5)])
def test_gradients_with_keys_past_kv_lens(lengths, deterministic):
    """What lies there is not looked at: its gradient is 0."""
    called = config(kv_lens=True, causal=True, deterministic=deterministic)
    given = random_inputs(called, kv_lens=torch.tensor(lengths, dtype=torch.int32))
    for sequence, length in enumerate(lengths):
        given.k[sequence, length:] = math.nan
        given.v[sequence, length:] = math.inf
    check_gradients(*gradients_on_cpu(called, given))
