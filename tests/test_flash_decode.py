"""Few queries over many keys: heads that share a tile, and parts of the keys that are merged, against the reference."""

import pytest
import torch

pytest.importorskip("triton")

from regard import AttentionConfig
from regard.backends import flash, flash_launches
from regard.backends.key_splits import multiprocessors, new_parts
from regard.kernels import tuning
from regard.testing import Case, check_forward

HEADS = dict(seqlen_q=1, heads_q=6, heads_kv=2, head_dim=64)
FEW = {**HEADS, "seqlen_q": 5}
TOGETHER = [
    Case("plain", **HEADS, seqlen_k=200),
    Case("causal", **HEADS, seqlen_k=200, causal=True),
    Case("one_head_for_all", seqlen_q=1, heads_q=4, heads_kv=1, seqlen_k=70),
    Case("one_key", **HEADS, seqlen_k=1),
    Case("lengths", **HEADS, seqlen_k=200, kv_lens=(130, 0), causal=True),
    Case("pages", **HEADS, seqlen_k=208, kv_lens=(130, 17), page_size=16),
    Case("softcap", **HEADS, seqlen_k=200, softcap=5.0),
    Case("window", **HEADS, seqlen_k=100, window=(40, 0)),
    Case("sinks", **HEADS, seqlen_k=100, sinks=True),
    Case("values_of_other_width", seqlen_q=1, heads_q=4, heads_kv=2, head_dim=72, head_dim_v=40, seqlen_k=70),
    Case("every_other_element", **HEADS, seqlen_k=100, strides="head_dim_every_other"),
    Case("heads_first", **HEADS, seqlen_k=100, layout="bhsd"),
    Case("wide_window", **HEADS, seqlen_k=100, window=(1000, 0)),
    Case("packed", heads_q=6, heads_kv=2, head_dim=64, lens_q=(1, 0, 1), lens_k=(67, 9, 5)),
    Case("few", **FEW, seqlen_k=100),
    Case("few_causal", **FEW, seqlen_k=100, causal=True),
    Case("few_and_fewer_keys", **FEW, seqlen_k=3, causal=True, sinks=True),
    Case("few_in_a_window", **FEW, seqlen_k=200, window=(30, 2), sinks=True, softcap=5.0, layout="bhsd"),
    Case("few_of_lengths", **FEW, seqlen_k=100, kv_lens=(70, 3), causal=True),
    Case("few_pages", **FEW, seqlen_k=208, kv_lens=(130, 17), page_size=16, causal=True, window=(99, 0)),
    Case("few_packed", heads_q=6, heads_kv=2, head_dim=64, lens_q=(5, 0, 1, 3), lens_k=(67, 9, 5, 1), causal=True),
    Case("several_tiles", seqlen_q=32, heads_q=16, heads_kv=2, head_dim=64, seqlen_k=70, causal=True, sinks=True),
    Case("several_tiles_of_lengths", seqlen_q=19, heads_q=32, heads_kv=2, seqlen_k=70, kv_lens=(60, 12), causal=True),
    Case("several_packed_tiles", heads_q=16, heads_kv=1, lens_q=(30, 3), lens_k=(35, 70), causal=True),
]
APART = [
    Case("every_head_its_own", seqlen_q=1, heads_q=4, heads_kv=4, seqlen_k=70),
    Case("alibi", **HEADS, seqlen_k=100, alibi="h"),
    Case("mask", **HEADS, seqlen_k=100, mask="bhqk"),
    Case("bias", **HEADS, seqlen_k=100, bias="1hqk"),
    Case("dropout", **HEADS, seqlen_k=100, dropout_p=0.3),
    Case("many", heads_q=4, heads_kv=2, seqlen_q=33, seqlen_k=100, causal=True),
    Case("tiles_that_would_begin_amid_a_query", heads_q=7, heads_kv=1, seqlen_q=32, seqlen_k=70, causal=True),
]
PARTED = [
    *(case for case in (*TOGETHER, *APART) if case.lens_q is None),
    Case("chunk", seqlen_q=70, seqlen_k=300, causal=True, heads_q=2, heads_kv=1, head_dim=64),
    Case("chunk_of_lengths", seqlen_q=70, seqlen_k=300, causal=True, kv_lens=(300, 80), head_dim=64),
    Case("more_queries_than_keys", seqlen_q=150, seqlen_k=140, causal=True, head_dim=64),
    Case("window_over_parts", seqlen_q=70, seqlen_k=400, window=(130, 0), head_dim=64, sinks=True),
    Case("left_bound_alone", seqlen_q=70, seqlen_k=400, window=(130, None), head_dim=64),
    Case("everything", seqlen_q=33, seqlen_k=300, heads_q=4, heads_kv=2, head_dim=64, mask="b1qk", bias="1hqk",
         window=(150, 20), softcap=8.0, alibi="bh", sinks=True, dropout_p=0.2, empty_rows=True, kv_lens=(280, 90)),
    Case("wide", seqlen_q=3, seqlen_k=200, causal=True, head_dim=128, heads_q=4, heads_kv=2),
    Case("empty_rows", seqlen_q=1, seqlen_k=200, mask="b1qk", empty_rows=True),
    Case("nan_query", seqlen_q=4, seqlen_k=200, nan_query=True, head_dim=64),
]  # fmt: skip


@pytest.fixture(autouse=True)
def interpreted():
    if torch.cuda.is_available():
        pytest.skip("device: got cuda, needs cpu (the interpreter)")


@pytest.fixture
def programs(monkeypatch):
    """Programs of every launch."""
    found = []

    def forward_launches(*given, launches=flash.forward_launches):
        made = launches(*given)
        found.append([launch.programs for launch in made])
        return made

    monkeypatch.setattr(flash, "forward_launches", forward_launches)
    return found


@pytest.mark.parametrize("arch", ["sm80", "sm90"])
@pytest.mark.parametrize("case", [*TOGETHER, *APART], ids=lambda case: case.name)
def test_heads_of_a_group_share_a_tile_where_queries_are_few(case, arch, programs, monkeypatch):
    monkeypatch.setattr(flash_launches, "_INTERPRETER_ARCH", arch)
    check_forward("flash", case, dtype=torch.float32 if arch == "sm80" else torch.bfloat16)
    sequences, queries = (len(case.lens_q), max(case.lens_q)) if case.lens_q else (case.batch, case.seqlen_q)
    shared = case.heads_q // case.heads_kv if case in TOGETHER else 1
    tiles = [sequences * case.heads_q // shared * -(-queries * shared // rows) for rows in (16, 32, 64, 128)]
    assert programs and all(launched in [[count] for count in tiles] for launched in programs)


@pytest.mark.parametrize(("arch", "splits"), [("sm80", 3), ("sm90", 17)])
@pytest.mark.parametrize("case", PARTED, ids=lambda case: case.name)
def test_parts_of_the_keys(case, splits, arch, programs, monkeypatch):
    monkeypatch.setattr(flash_launches, "_INTERPRETER_ARCH", arch)
    monkeypatch.setattr(flash, "splits_of", lambda config, _: splits)
    check_forward("flash", case, dtype=torch.bfloat16 if arch == "sm90" else torch.float32)
    for first, merge in programs:
        assert first % splits == 0 and merge == case.batch * case.seqlen_q * case.heads_q


def config(**options):
    sizes = dict(batch=1, seqlen_q=1, seqlen_k=16384, heads_q=32, heads_kv=8, head_dim=128, arch="sm90", device="cuda")
    return AttentionConfig(**{**sizes, **options})


@pytest.mark.parametrize(
    "options, splits",
    [
        ({}, 16),  # 8 tiles, and a program for each of 132 multiprocessors
        (dict(head_dim=64), 33),  # two
        (dict(causal=True), 16),
        (dict(batch=4), 4),
        (dict(batch=64), 1),
        (dict(seqlen_k=1023), 1),
        (dict(sinks=True), 16),
        (dict(alibi=True), 4),  # 32 tiles
        (dict(window=(511, 0)), 1),
        (dict(seqlen_q=4, causal=True), 16),
        (dict(seqlen_q=8, causal=True), 33),  # 32 rows
        (dict(varlen=True, total_q=1, total_k=16384), 1),
        (dict(page_size=16, kv_lens=True), 66),
        (dict(seqlen_q=4096, causal=True), 1),
    ],
)
def test_which_calls_are_split(options, splits):
    assert flash.splits_of(config(**options), 132) == splits


def test_a_device_without_multiprocessors_takes_keys_whole():
    called = config(device="cpu", arch="cpu", dtype=torch.float32)
    assert multiprocessors(torch.device("cpu")) == 0
    assert new_parts(called, torch.empty(1), 0, flash.splits_of) is None


def test_no_split_is_longer_than_the_merge_can_take():
    assert flash.splits_of(config(heads_q=1, heads_kv=1, seqlen_k=2**22), 10_000) == tuning.MOST_SPLITS
