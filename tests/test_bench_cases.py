"""Workloads as data: names that parse back, counts that are right, grids that are refused where they are impossible."""

import itertools
from dataclasses import replace

import pytest
import torch

from regard import ConfigError
from regard.bench.cases import SUITES, Workload, choose, grid, parse
from regard.bench.inputs import canonical_inputs, draw, visible


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("suite", SUITES)
def test_every_case_of_a_suite_parses_back_from_its_name(suite, device):
    workloads = list(SUITES[suite].workloads(device))
    assert workloads
    assert [parse(each.name) for each in workloads] == workloads
    assert len({each.name for each in workloads}) == len(workloads)
    assert all(" " not in each.name for each in workloads)


@pytest.mark.parametrize(
    "workload",
    [
        Workload(head_dim=192, head_dim_v=128, heads_q=8, heads_kv=2, seqlen_q=3, seqlen_k=70),
        Workload("bwd", window=(None, 7), softcap=30.0, bias="1hqk", mask="b11k", alibi=True, sinks=True),
        Workload(batch=3, varlen=True, window=(128, 0), causal=True, dtype="fp16"),
        Workload(seqlen_q=1, seqlen_k=100, page_size=16, causal=True),
    ],
    ids=lambda workload: workload.name,
)
def test_every_feature_is_in_the_name(workload):
    assert parse(workload.name) == workload


def test_a_short_name_takes_the_defaults():
    assert parse("s256-d32") == Workload(seqlen_q=256, seqlen_k=256, head_dim=32)
    assert parse("q1-k4096-h32/8").heads_kv == 8
    assert parse("k64").seqlen_q == 64


@pytest.mark.parametrize(
    "name", ["", "b0", "s128-d", "d64-causl", "b1/2", "window=1", "paged=x", "bias=hqk", "h3/2", "bwd-paged=16", "d0"]
)
def test_a_name_that_cannot_be_is_refused(name):
    with pytest.raises(ConfigError):
        parse(name)


def test_the_papers_grid():
    workloads = list(SUITES["fa3"].workloads("cuda"))
    assert {each.batch * each.seqlen_q for each in workloads} == {16384}
    assert {each.heads_q * each.head_dim for each in workloads} == {2048}
    assert {each.head_dim for each in workloads} == {64, 128, 256}
    assert {each.seqlen_q for each in workloads} == {512, 1024, 2048, 4096, 8192, 16384}
    assert len(workloads) == 36


def test_the_first_grid():
    workloads = list(SUITES["seeds"].workloads("cuda"))
    found = {(each.seqlen_q, each.head_dim, each.causal, each.batch) for each in workloads}
    assert found == set(itertools.product((128, 256, 512, 1024, 2048), (32, 64, 128), (False, True), (1, 2, 4, 8)))


@pytest.mark.parametrize(
    "workload",
    [
        Workload(seqlen_q=13, seqlen_k=29, causal=True),
        Workload(seqlen_q=29, seqlen_k=13, causal=True),
        Workload(seqlen_q=31, seqlen_k=31, window=(5, 3)),
        Workload(seqlen_q=9, seqlen_k=40, window=(12, None), causal=True, heads_q=4, heads_kv=2),
        Workload(batch=3, seqlen_q=17, seqlen_k=17, causal=True, varlen=True),
        Workload(batch=3, seqlen_q=7, seqlen_k=20, varlen=True),
    ],
    ids=lambda workload: workload.name,
)
def test_operations_are_those_of_the_visible_pairs(workload):
    pairs = 0
    for queries, keys in workload.lengths():
        config = replace(workload, varlen=False, batch=1, seqlen_q=queries, seqlen_k=keys).config("cpu", "cpu")
        seen = visible(config, torch.arange(queries), keys, queries)
        pairs += queries * keys if seen is None else int(seen.sum())
    assert workload.flops() == 4 * pairs * workload.heads_q * workload.head_dim
    assert replace(workload, mode="bwd").flops() == 10 * pairs * workload.heads_q * workload.head_dim


def test_bytes_of_grouped_queries_count_keys_once():
    full, grouped = Workload(), Workload(heads_kv=1)
    rows = 1024 * 8
    assert full.bytes() == 2 * 64 * (2 * rows + 2 * rows) + 4 * rows
    assert grouped.bytes() == full.bytes() - 2 * 64 * 2 * (rows - 1024)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("suite", SUITES)
def test_the_config_is_that_of_the_tensors(suite, device):
    """What profile and report are told is what selection sees, but for strides and the device."""
    seen = set()
    for workload in SUITES[suite].workloads(device):
        small = replace(workload, batch=min(workload.batch, 2), seqlen_q=min(workload.seqlen_q, 32), seqlen_k=64)
        if small in seen:
            continue
        seen.add(small)
        call = draw(small, torch.device("cpu"))
        actual = call.config()
        expected = small.config("cpu", "cpu")
        neutral = dict(q_strides=None, k_strides=None, v_strides=None)
        assert replace(actual, **neutral) == replace(expected, **neutral)
        inputs = canonical_inputs(call)
        assert inputs.q is call.tensors["q"] and (inputs.bias is not None) == (small.bias is not None)


def test_packed_lengths_differ_and_end_at_the_longest():
    workload = Workload(batch=4, seqlen_q=100, seqlen_k=200, varlen=True)
    assert workload.lengths() == [(25, 50), (50, 100), (75, 150), (100, 200)]
    assert draw(workload, torch.device("cpu")).tensors["cu_seqlens_k"].tolist() == [0, 50, 150, 300, 500]


# --- Choosing


def names(chosen):
    return [workload.name for _, workload in chosen]


def test_filters_select_among_a_suite():
    chosen = choose(["fa3"], [], {"seqlen": (4096, 8192), "head_dim": (128,), "causal": (True,)}, "cuda")
    assert names(chosen) == ["b4-s4096-h16-d128-bf16-causal", "b2-s8192-h16-d128-bf16-causal"]


def test_mode_and_dtype_replace_those_of_a_suite():
    chosen = choose(["fa3"], [], {"mode": ("bwd",), "dtype": ("fp16", "bf16"), "seqlen": (512,)}, "cuda")
    assert {(workload.mode, workload.dtype) for _, workload in chosen} == {("bwd", "fp16"), ("bwd", "bf16")}
    assert len(chosen) == 12


def test_filters_alone_make_a_grid():
    chosen = choose([], [], {"seqlen": (128, 256), "heads_q": (4,), "causal": (False, True)}, "cpu")
    assert names(chosen) == ["b1-s128-h4-d64-fp32", "b1-s128-h4-d64-fp32-causal", "b1-s256-h4-d64-fp32",
                             "b1-s256-h4-d64-fp32-causal"]  # fmt: skip
    assert names(choose([], [], {"seqlen_q": (1,), "seqlen_k": (64,), "heads_kv": (2,)}, "cuda")) == [
        "b1-q1-k64-h8/2-d64-bf16"
    ]


def test_a_case_in_two_suites_is_measured_once():
    twice = choose(["quick"], [names(choose(["quick"], [], {}, "cpu"))[0]], {}, "cpu")
    assert len(twice) == len(choose(["quick"], [], {}, "cpu"))


@pytest.mark.parametrize(
    "suites, filters, sentence",
    [
        (["quikc"], {}, "suite: got 'quikc', needs one of quick"),
        ([], {}, "suite: got none"),
        (["fa3"], {"seqlen": (77,)}, "grid: got seqlen 77"),
        ([], {"heads_q": (3,), "heads_kv": (2,)}, "heads_q: got 3 query heads, 2 key/value heads"),
        ([], {"seqlen": (8,), "seqlen_q": (8,)}, "grid: got a length for both sides"),
        ([], {"head_dim": (64,), "dtype": ("fp8",)}, "dtype: got 'fp8'"),
    ],
)
def test_what_cannot_be_measured_is_said(suites, filters, sentence):
    with pytest.raises(ConfigError) as error:
        choose(suites, [], filters, "cpu")
    assert sentence in str(error.value)


@pytest.mark.parametrize("name", ["b1-s64-s65", "b1-s64-q5", "fwd-bwd-b1", "b1-s64-causal-causal", "b1-bf16-fp16"])
def test_a_word_does_not_overrule_an_earlier_one(name):
    with pytest.raises(ConfigError, match="beside another word for the same"):
        parse(name)


@pytest.mark.parametrize("name", ["b1-s64-paged=0", "b1-s64-paged=²"])
def test_pages_hold_keys(name):
    with pytest.raises(ConfigError):
        parse(name)


def test_a_grid_is_every_combination():
    assert len(list(grid(seqlen=(8, 16), head_dim=(8, 16, 32), causal=(True,)))) == 6
