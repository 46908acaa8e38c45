"""Tiles brought by TMA, as on sm90, against the reference: Triton's interpreter has descriptors too."""

import pytest
import torch

pytest.importorskip("triton")

from regard import AttentionConfig, AttentionInputs
from regard.backends import flash, flash_launches
from regard.kernels import tuning
from regard.testing import Case, check_backward, check_forward


@pytest.fixture(autouse=True)
def tiles_of_sm90(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("device: got cuda, needs cpu (the interpreter, which takes any architecture's tiles)")
    monkeypatch.setattr(flash_launches, "_INTERPRETER_ARCH", "sm90")


FORWARDS = [
    Case("plain", head_dim=128, seqlen_q=70, seqlen_k=130),
    Case("causal_in_one_loop", head_dim=128, seqlen_q=140, seqlen_k=140, causal=True, heads_q=4),
    Case("causal_more_queries_than_keys", head_dim=96, seqlen_q=90, seqlen_k=33, causal=True),
    Case("one_key", head_dim=128, seqlen_k=1),
    Case("whole_tiles", head_dim=128, seqlen_q=64, seqlen_k=128, layout="bhsd"),
    Case("other_head_dims", head_dim=72, head_dim_v=104, heads_q=3, heads_kv=1, strides="head_dim_sliced", causal=True),
    Case("narrow_values", head_dim=120, head_dim_v=24, seqlen_k=100),
    Case("band", head_dim=128, seqlen_q=130, seqlen_k=200, window=(70, 3), softcap=3.0, alibi="h", sinks=True),
    Case("mask_bias_dropout", head_dim=128, mask="b1qk", bias="1hqk", dropout_p=0.2, empty_rows=True),
    Case("nan_query", head_dim=128, nan_query=True, causal=True),
]
BACKWARDS = [
    Case("plain", head_dim=256, seqlen_q=70, seqlen_k=66, heads_q=4),
    Case("causal", head_dim=200, seqlen_q=129, seqlen_k=65, causal=True, batch=1),
    Case("whole_tiles", head_dim=256, seqlen_q=64, seqlen_k=64, batch=1, layout="bhsd"),
    Case("band", head_dim=144, head_dim_v=160, window=(20, 9), softcap=3.0, alibi="bh", sinks=True),
]
NOT_BY_TMA = [
    Case("lengths_with_nan_behind", head_dim=128, kv_lens=(50, 7), causal=True),
    Case("packed", head_dim=128, lens_q=(9, 0, 33), lens_k=(67, 5, 12)),
    Case("pages", head_dim=128, kv_lens=(50, 20), page_size=16, seqlen_k=64, seqlen_q=3),
    Case("strides", head_dim=128, strides="head_dim_every_other"),
    Case("odd_head_dim", head_dim=111),
]


@pytest.fixture
def described(monkeypatch):
    """Names of the arguments that launches were given as descriptors."""
    found = []

    def launch(kernel, programs, arguments, tile, made=flash_launches._launch):
        launch = made(kernel, programs, arguments, tile)
        found.append({name for name, value in launch.arguments.items() if hasattr(value, "block_shape")})
        return launch

    monkeypatch.setattr(flash_launches, "_launch", launch)
    return found


@pytest.mark.parametrize("case", FORWARDS, ids=lambda case: case.name)
def test_forward(case, described):
    assert check_forward("flash", case, "cpu", torch.float16).status == "passed"
    assert described == [{"q_ptr", "k_ptr", "v_ptr"}]


@pytest.mark.parametrize("case", BACKWARDS, ids=lambda case: case.name)
def test_gradients(case, described):
    assert check_backward("flash", case, "cpu", torch.float16).status == "passed"
    assert described == [set(), *2 * [{"q_ptr", "k_ptr", "v_ptr", "grad_out_ptr"}]]


@pytest.mark.parametrize("case", NOT_BY_TMA, ids=lambda case: case.name)
def test_what_tma_cannot_bring_comes_by_pointers(case, described):
    assert check_forward("flash", case, "cpu", torch.bfloat16).status == "passed"
    assert described == [set()]


def tensors(size=128, start=0, rows=64):
    """q, k and v of one head at an element of aligned memory."""
    memory = torch.randn(3, 1, rows, 1, size + 64).to(torch.float16)
    assert memory.data_ptr() % 16 == 0
    return AttentionInputs(*memory[..., start : start + size])


@pytest.mark.parametrize(("start", "by_tma"), [(0, True), (8, True), (4, False)])
def test_addresses_that_tma_cannot_read(start, by_tma, described):
    inputs = tensors(start=start)
    config = AttentionConfig.from_tensors(*inputs[:3])
    out, _ = flash.FlashBackend().forward(config, inputs)
    assert bool(described[0]) == by_tma
    q, k, v = (t[0, :, 0].double() for t in inputs[:3])
    assert (out[0, :, 0] - (q @ k.mT * 128**-0.5).softmax(-1) @ v).abs().max() < 2e-3


def test_a_descriptor_ends_where_a_head_does(described):
    """Rows of the next head, of the next sequence and past the tensor hold NaN, which no product may meet."""
    memory = torch.full((3, 3, 80, 2, 192), float("nan"), dtype=torch.float16)
    memory[:, 1, :70, 0, :120] = torch.randn(3, 70, 120)
    inputs = AttentionInputs(*memory[:, 1:2, :70, :1, :120])
    out, lse = flash.FlashBackend().forward(AttentionConfig.from_tensors(*inputs[:3]), inputs)
    assert described[0] and out.isfinite().all() and lse.isfinite().all()


def test_the_table_says_what_is_brought_by_tma():
    def by_tma(table, head_dim, causal, steady=False):
        call = tuning.Call(causal, 4096, (3, 6), by_tma=True, steady=steady)
        return tuning.select_tile(table, "sm90", 2, head_dim, call).by_tma

    for causal in (False, True):
        assert [by_tma(tuning.FORWARD, dim, causal) for dim in (64, 65, 128, 129)] == [False, True, True, False]
        assert all(by_tma(tuning.FORWARD, dim, causal, steady=True) for dim in (64, 128, 256))
        for table in (tuning.BACKWARD_KEYS, tuning.BACKWARD_QUERIES):
            assert [by_tma(table, dim, causal) for dim in (64, 128, 129, 256)] == [False, False, True, True]
