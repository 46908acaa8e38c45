"""What the `hopper` backend refuses, what it is chosen for, and what it tells TMA. Its kernels need a GPU of their own."""

import csv
import dataclasses
import importlib.util
import itertools
import math
import statistics
import warnings
from pathlib import Path

import pytest
import torch
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import ShapeEnv

pytest.importorskip("triton")

from regard import AttentionConfig, AttentionInputs, FallbackWarning, Registry
from regard.backends import flash, hopper, register_builtin_backends
from regard.backends.flash import FlashBackend
from regard.backends.hopper import HopperBackend
from regard.export.cross_compile import meta_inputs
from regard.kernels import hopper_tuning, tuning

REPORTS = Path(__file__).parents[1] / "reports"
MULTIPROCESSORS = 132
SHARED_LIMIT = 227 * 1024
HEAD_DIMS = range(8, 257, 8)
CONFIG = AttentionConfig(
    batch=2, seqlen_q=512, seqlen_k=512, heads_q=8, heads_kv=8, head_dim=64, dtype=torch.bfloat16, device="cuda",
    arch="sm90",
)  # fmt: skip


def config(**options):
    made = dataclasses.replace(CONFIG, head_dim_v=options.get("head_dim", 64), softmax_scale=0.125)
    return dataclasses.replace(made, **options)


PACKED = dict(varlen=True, total_q=700, total_k=600)


# --- What it refuses


@pytest.mark.parametrize(
    "options, code, sentence",
    [
        (dict(dtype=torch.float32), "dtype", "got float32, needs float16 or bfloat16"),
        (dict(dtype=torch.float64), "dtype_float64", "got float64, needs float16 or bfloat16"),
        (dict(head_dim=60), "head_dim", "got 60, needs a multiple of 8, at most 256"),
        (dict(head_dim=264), "head_dim", "got 264, needs a multiple of 8, at most 256"),
        (dict(head_dim_v=68), "head_dim", "got 68, needs a multiple of 8"),
        (dict(arch="sm100"), "arch", "got sm100, needs sm90"),
        (dict(arch="gfx942"), "arch", "got gfx942, needs sm90"),
        (dict(device="cpu", arch="cpu"), "device", "got cpu, needs cuda"),
        (dict(mask_shape=(1, 1, 512, 512)), "mask", "got a mask, needs causal, window or lengths"),
        (dict(bias_shape=(1, 8, 512, 512), bias_dtype=torch.bfloat16), "bias", "got a bias, needs ALiBi slopes"),
        (dict(dropout_p=0.25), "dropout", "got dropout_p=0.25, needs 0"),
        (dict(softmax_scale=-0.5), "softmax_scale", "got -0.5, needs a positive number"),
        (dict(softmax_scale=0.0), "softmax_scale", "got 0.0, needs a positive number"),
        (dict(requires_grad=True, deterministic=True), "backward",
         "got a gradient with deterministic=True at head dim 64, needs head dims above 64 (flash is faster"),
        (dict(requires_grad=True, softcap=30.0, head_dim=40), "backward",
         "got a gradient with softcap=30.0 at head dim 40, needs head dims above 64 (flash is faster"),
        (dict(requires_grad=True, softcap=30.0, deterministic=True), "backward",
         "got a gradient with deterministic=True at head dim 64"),
    ],
)  # fmt: skip
def test_what_it_cannot_serve_has_one_reason(options, code, sentence):
    (reason,) = HopperBackend().unsupported_reasons(config(**options))
    assert reason.code == code
    assert str(reason).startswith(f"{code}: {sentence}")


def test_reasons_add_up():
    reasons = HopperBackend().unsupported_reasons(
        config(arch="sm80", dtype=torch.float32, head_dim=60, head_dim_v=57, dropout_p=0.5, requires_grad=True,
               softcap=1.0, deterministic=True)
    )  # fmt: skip
    codes = [reason.code for reason in reasons]
    assert codes == ["arch", "dtype", "head_dim", "head_dim", "dropout", "backward"]


BACKENDS = pytest.mark.parametrize("backend", [HopperBackend(), FlashBackend()], ids=lambda backend: backend.name)


@BACKENDS
def test_triton_must_be_installed_beside_the_gpu(backend, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert backend.unsupported_reasons(CONFIG) == [], "no GPU here: the question is about another machine"
    (reason,) = backend.unsupported_reasons(config(device="cpu", arch="cpu"))
    assert reason.code == "device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (reason,) = backend.unsupported_reasons(CONFIG)
    assert str(reason).startswith("not_installed: got no triton, needs triton >= 3.6")


@BACKENDS
def test_triton_must_be_new_enough(backend, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(flash, "_installed_triton", lambda: "3.5.1")
    (reason,) = backend.unsupported_reasons(CONFIG)
    assert str(reason).startswith("not_installed: got triton 3.5.1, needs triton >= 3.6")
    monkeypatch.setattr(flash, "_installed_triton", lambda: None)  # installed under another name
    assert backend.unsupported_reasons(CONFIG) == []


# --- What it is chosen for

SERVED = {
    "plain": {},
    "fp16": dict(dtype=torch.float16),
    "causal": dict(causal=True),
    "window": dict(window=(128, 64)),
    "gqa": dict(heads_kv=2),
    "lengths": dict(kv_lens=True),
    "varlen": PACKED,
    "softcap": dict(softcap=30.0),
    "sinks": dict(sinks=True),
    "alibi": dict(alibi=True),
    "head dims": dict(head_dim=192, head_dim_v=128),
    "head dim 256": dict(head_dim=256),
    "deterministic forward": dict(deterministic=True),
    "gradient": dict(requires_grad=True, causal=True, heads_kv=2, sinks=True, alibi=True, head_dim=128),
    "gradient of packed sequences": dict(requires_grad=True, window=(128, 64), **PACKED),
    "wide gradient": dict(requires_grad=True, head_dim=256, causal=True),
    "gradient of wide values": dict(requires_grad=True, head_dim=64, head_dim_v=256),
    "gradient of softcap": dict(requires_grad=True, head_dim=72, softcap=30.0),
    "deterministic gradient": dict(requires_grad=True, head_dim=128, deterministic=True, **PACKED),
    "everything": dict(causal=True, window=(128, None), heads_kv=2, softcap=30.0, sinks=True, alibi=True, **PACKED),
    "gradient of everything": dict(requires_grad=True, head_dim=128, deterministic=True, causal=True, window=(128, None),
                                   heads_kv=2, softcap=30.0, sinks=True, alibi=True, **PACKED),
}  # fmt: skip
LEFT_TO_FLASH = {
    "mask": (dict(mask_shape=(1, 1, 512, 512)), "mask: got a mask"),
    "bias": (dict(bias_shape=(1, 1, 512, 512), bias_dtype=torch.bfloat16), "bias: got a bias"),
    "dropout": (dict(dropout_p=0.1), "dropout: got dropout_p=0.1"),
    "paged": (dict(kv_lens=True, page_size=16), "kv_layout: got paged keys and values, needs contiguous"),
    "fp32": (dict(dtype=torch.float32), "dtype: got float32"),
    "deterministic gradient": (
        dict(requires_grad=True, deterministic=True), "backward: got a gradient with deterministic=True at head dim 64"
    ),
    "gradient of softcap": (
        dict(requires_grad=True, softcap=30.0), "backward: got a gradient with softcap=30.0 at head dim 64"
    ),
    "odd head dim": (dict(head_dim=60), "head_dim: got 60"),
}  # fmt: skip


@pytest.fixture
def builtin(registry) -> Registry:
    register_builtin_backends(registry)
    return registry


@pytest.mark.parametrize("case", SERVED)
def test_hopper_serves(builtin, case):
    large = dict(batch=64, seqlen_q=2048, seqlen_k=2048, **SERVED[case])
    if "varlen" in large:
        large |= dict(total_q=64 * 1500, total_k=64 * 1400)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        assert builtin.select(config(**large)).backend == "hopper"


def sizes(batch, seqlen_q, seqlen_k, heads_q, head_dim, heads_kv=None, **options):
    return config(batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, heads_q=heads_q, heads_kv=heads_kv or heads_q,
                  head_dim=head_dim, **options)  # fmt: skip


def packed(batch, longest, mean, heads_q, head_dim):
    return sizes(batch, longest, longest, heads_q, head_dim, varlen=True, total_q=batch * mean, total_k=batch * mean)


# As measured on an H200, both backends side by side.
FASTER_WITH_FLASH = {
    "short sequences of the widest heads": sizes(8, 64, 64, 8, 256),
    "decode with keys in parts": sizes(1, 1, 4096, 32, 64, heads_kv=8),
    "decode of many": sizes(64, 1, 16384, 32, 128, heads_kv=8),
    "decode of two tokens of eight heads each": sizes(4, 2, 65536, 32, 256, heads_kv=4),
    "decode of packed sequences": packed(64, 1, 1, 8, 128),
    "short sequences": sizes(32, 64, 64, 16, 64),
    "short sequences of wide heads": sizes(32, 64, 64, 16, 128),
    "few tiles": sizes(1, 1024, 1024, 8, 64),
    "few tiles of wide heads": sizes(4, 256, 256, 8, 128),
    "packed": packed(32, 512, 272, 8, 64),
    "few packed": packed(8, 256, 144, 8, 128),
    "decode with few keys": sizes(1, 1, 512, 32, 128, heads_kv=8),
    "gradient": sizes(8, 256, 256, 8, 64, requires_grad=True),
    "narrower than its tile": sizes(32, 64, 64, 16, 40),
}
FASTER_WITH_HOPPER = {
    "long": sizes(1, 16384, 16384, 32, 64),
    "many tiles": sizes(4, 1024, 1024, 8, 128),
    "widest heads": sizes(8, 128, 128, 8, 256),
    "gradient of the widest heads": sizes(8, 64, 64, 8, 256, requires_grad=True),
    "long packed": packed(32, 1024, 800, 8, 128),
    "keys in parts": sizes(1, 8, 4096, 32, 64, heads_kv=8),
    "shared heads": sizes(64, 8, 512, 32, 64, heads_kv=8),
    "decode with ALiBi": sizes(1, 1, 4096, 32, 64, heads_kv=8, alibi=True),
    "gradient of one query": sizes(64, 1, 4096, 32, 64, heads_kv=8, requires_grad=True),
    "gradient": sizes(8, 1024, 1024, 8, 128, requires_grad=True),
}


@pytest.mark.parametrize("case", FASTER_WITH_FLASH)
def test_flash_serves_what_is_too_small_for_hopper(builtin, case):
    called = FASTER_WITH_FLASH[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        selection = builtin.select(called)
    assert selection.backend == "flash" and not selection.strict
    ((passed_over, (reason,)),) = selection.passed_over
    assert passed_over == "hopper" and str(reason).startswith("small: got ")
    assert selection.why == f"flash: hopper supports the call too, and yields: {reason}"
    explained = builtin.explain(called)
    assert explained.chosen == selection.__class__("flash", False, selection.why, explained.chosen.passed_over)
    assert explained.reasons("hopper") == () and selection.why in str(explained)
    assert builtin.select(called, "hopper").backend == "hopper"


@pytest.mark.parametrize("case", FASTER_WITH_HOPPER)
def test_hopper_serves_what_is_large_enough(builtin, case):
    assert builtin.select(FASTER_WITH_HOPPER[case]).backend == "hopper"


def measured_small_calls(requires_grad):
    """Calls, and the times of both backends: of the forward, or of it and the backward."""
    times, backward = {}, {}
    with (REPORTS / "h200_small_calls.csv").open() as file:
        for row in csv.DictReader(file):
            mode, *microseconds = row.pop("mode"), float(row.pop("hopper_us")), float(row.pop("flash_us"))
            (times if mode == "fwd" else backward)[tuple(row.items())] = microseconds
    if requires_grad:
        times = {call: list(map(sum, zip(times[call], more, strict=True))) for call, more in backward.items()}
    for call, (hopper_us, flash_us) in times.items():
        given = {name: int(value) for name, value in call if value}
        given |= dict(causal=bool(given["causal"]), varlen="total_q" in given, requires_grad=requires_grad)
        yield config(**given), {"hopper": hopper_us, "flash": flash_us}


@pytest.mark.parametrize(
    "requires_grad, calls, cost, cost_of_hopper", [(False, 585, 1.014, 1.19), (True, 78, 1.004, 1.13)]
)
def test_selection_takes_the_faster_backend_of_small_calls(builtin, requires_grad, calls, cost, cost_of_hopper):
    """As a geometric mean over the faster one's time; reports/README.md says how they were measured."""
    chosen, hopper = [], []
    for called, times in measured_small_calls(requires_grad):
        chosen.append(math.log(times[builtin.select(called).backend] / min(times.values())))
        hopper.append(math.log(times["hopper"] / min(times.values())))
    assert len(chosen) == calls
    assert math.exp(statistics.mean(hopper)) > cost_of_hopper
    assert math.exp(statistics.mean(chosen)) < cost


def test_small_calls_are_hoppers_where_flash_is_gone(builtin):
    builtin.unregister("flash")
    assert builtin.select(FASTER_WITH_FLASH["short sequences"]).backend == "hopper"


def test_small_calls_are_hoppers_where_flash_failed(builtin):
    called = FASTER_WITH_FLASH["short sequences"]
    with pytest.warns(FallbackWarning, match="flash"):
        builtin.quarantine("flash", called, RuntimeError("no such kernel"))
    assert builtin.select(called).backend == "hopper"


def test_sizes_that_are_symbols_are_not_compared():
    """torch.compile would compile the graph again for other sizes."""
    shapes = ShapeEnv()
    source = ConstantSource("seqlen")
    symbol = shapes.create_symintnode(shapes.create_symbol(64, source), hint=64, source=source)
    called = sizes(32, symbol, symbol, 16, 64)
    before = len(shapes.guards)
    assert HopperBackend().yields_to(called) is None
    assert len(shapes.guards) == before
    assert HopperBackend().yields_to(sizes(32, 64, 64, 16, 64)) is not None


@pytest.mark.parametrize("case", LEFT_TO_FLASH)
def test_flash_serves_the_rest_and_says_so(builtin, case):
    options, sentence = LEFT_TO_FLASH[case]
    with pytest.warns(FallbackWarning) as said:
        selection = builtin.select(config(**options))
    assert selection.backend == "flash" and selection.passed_over[0][0] == "hopper"
    (message,) = (str(warning.message) for warning in said)
    assert "'flash' serves" in message and f"instead of 'hopper', which cannot: {sentence}" in message


@pytest.mark.parametrize("arch", ["sm80", "sm100", "gfx942"])
def test_other_gpus_pass_it_over_in_silence(builtin, arch):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        assert builtin.select(config(arch=arch)).backend == "flash"


# --- What TMA can follow


def stored(*shape, dtype=torch.bfloat16):
    return (torch.arange(torch.Size(shape).numel()) % 251).to(dtype).view(shape)  # bfloat16 tells these apart


FOLLOWED = {
    "bshd": stored(2, 5, 3, 16),
    "bhsd": stored(2, 3, 5, 16).transpose(1, 2),
    "one of q, k and v in a row": stored(2, 5, 3, 4, 16)[:, :, 1],
    "heads of a wider row": stored(2, 5, 3, 48)[..., 16:32],
    "a slice of a cache": stored(4, 9, 3, 16)[1:3, 2:7],
    "packed": stored(11, 3, 16),
    "packed heads first": stored(3, 11, 16).transpose(0, 1),
    "float32": stored(2, 5, 3, 4, dtype=torch.float32),
}
NOT_FOLLOWED = {
    "heads without a stride": stored(2, 5, 1, 16).expand(2, 5, 3, 16),
    "batch without a stride": stored(1, 5, 3, 16).expand(2, 5, 3, 16),
    "rows of 24 bytes": stored(2, 5, 3, 12)[..., :8],
    "batches of 72 bytes": torch.as_strided(stored(200), (2, 2, 2, 8), (36, 16, 8, 1)),
    "every other element": stored(2, 5, 3, 32)[..., ::2],
    "head dim not innermost": stored(2, 5, 16, 8).transpose(2, 3),
    "starts between addresses": stored(2 * 5 * 3 * 16 + 8)[4:-4].view(2, 5, 3, 16),
}


@pytest.mark.parametrize("case", FOLLOWED)
def test_what_tma_can_follow_is_not_copied(case):
    assert hopper._readable_by_tma(FOLLOWED[case]) is FOLLOWED[case]


@pytest.mark.parametrize("case", NOT_FOLLOWED)
def test_what_tma_cannot_follow_is_copied(case):
    tensor = NOT_FOLLOWED[case]
    copied = hopper._readable_by_tma(tensor)
    assert copied.is_contiguous() and copied.data_ptr() % 16 == 0
    assert copied.data_ptr() != tensor.data_ptr() and torch.equal(copied, tensor)


# --- What a launch says


def forward_arguments(called, given=None):
    """Arguments of the forward's launch; on the inputs given, or without storage."""
    given = meta_inputs(called) if given is None else given
    out = given.q.new_empty((*given.q.shape[:-1], called.head_dim_v))
    lse = given.q.new_empty(1, dtype=torch.float32)
    counter = given.q.new_empty(2, dtype=torch.int32)
    return hopper.forward_launch(called, given, out, lse, counter, MULTIPROCESSORS).arguments


def backward_arguments(called, given=None):
    given = meta_inputs(called) if given is None else given
    grad_out = given.q.new_empty((*given.q.shape[:-1], called.head_dim_v))
    terms = given.q.new_empty(1, dtype=torch.float32)
    return backward_launch(called, given, grad_out, terms).arguments


def backward_launch(called, given, grad_out, terms):
    sums = given.q.new_zeros(hopper.query_sums_shape(called), dtype=torch.float32)
    dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (given.k, given.v))
    counter = given.q.new_empty(2, dtype=torch.int32)
    return hopper.backward_launch(
        called, given, grad_out, terms, terms, sums, dk, dv, counter, MULTIPROCESSORS
    )  # fmt: skip


def two_pass_arguments(index):
    """Of the pass for dK and dV, or of that for dQ."""

    def arguments(called, given=None):
        given = meta_inputs(called) if given is None else given
        grad_out = given.q.new_empty((*given.q.shape[:-1], called.head_dim_v))
        terms = given.q.new_empty(1, dtype=torch.float32)
        gradients = given._replace(**{name: getattr(given, name).clone(memory_format=torch.contiguous_format)
                                      for name in "qkv"})  # fmt: skip
        return hopper.two_pass_launches(called, given, grad_out, terms, terms, gradients)[index].arguments

    return arguments


ARGUMENTS = {
    "forward": forward_arguments,
    "backward": backward_arguments,
    "keys": two_pass_arguments(0),
    "queries": two_pass_arguments(1),
}


def tile_bytes(descriptor):
    return torch.Size(descriptor.block_shape).numel() * descriptor.base.element_size()


BARRIERS = 1024
"""Bytes beside the tiles, at most: barriers, tile records, alignment."""


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_forward_tiles_fit_in_shared_memory(head_dim):
    for head_dim_v in HEAD_DIMS:
        for options in (
            {},
            dict(causal=True),
            dict(causal=True, seqlen_k=8192),
            dict(softcap=1.0),
            dict(window=(9, 0)),
        ):
            said = forward_arguments(config(head_dim=head_dim, head_dim_v=head_dim_v, **options))
            blocks = [said[name].block_shape for name in ("q_desc", "k_desc", "v_desc", "out_desc")]
            assert blocks[0][-1] == blocks[1][-1] >= head_dim and blocks[2][-1] == blocks[3][-1] >= head_dim_v
            warpgroups = said["BLOCK_M"] // hopper_tuning.ROWS
            needed = warpgroups * said["QUERY_STAGES"] * tile_bytes(said["q_desc"])
            needed += said["KEY_STAGES"] * tile_bytes(said["k_desc"])
            needed += said["VALUE_STAGES"] * tile_bytes(said["v_desc"])
            needed += 0 if said["SHARE_Q"] else warpgroups * tile_bytes(said["out_desc"])
            assert needed + BARRIERS <= SHARED_LIMIT, (head_dim_v, options)
            if said["SHARE_Q"]:
                assert said["q_desc"].block_shape == said["out_desc"].block_shape, "they lie in one place"
                assert said["QUERY_STAGES"] == 1, "a tile's output is out before the next tile's queries come"


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim_has_a_tile_that_a_multiprocessor_holds(head_dim):
    flags = ("causal", "windowed", "one_cut", "raw", "wide_range")
    for rows, span, *given in itertools.product((1, 128, 129, 257), (1, 300, 1025, 2**20), *[(False, True)] * 5):
        said = dict(zip(flags, given, strict=True))
        tile = hopper_tuning.forward_tile(head_dim, head_dim, rows=rows, span=span, **said)
        warpgroups = tile.block_m // hopper_tuning.ROWS
        assert tile.block_m % hopper_tuning.ROWS == 0 and warpgroups in (2, 3), "the kernel specializes into 2 or 3"
        assert (warpgroups + 1) * 128 * tile.max_registers <= 65536, "with the loading warp's group"
        assert tile.key_stages >= 2 and tile.value_stages >= 2, "a product overlaps with the next tile's softmax"
        assert rows > 128 or warpgroups == 2, "a third would have nothing to do"
        assert not (tile.hold_q and tile.share_q), "the queries' memory goes back once, and is not the output's"


@pytest.mark.parametrize("options", [dict(causal=True), dict(window=(None, 37)), dict(window=(None, -5 + 64))])
@pytest.mark.parametrize("group", [1, 4])
def test_where_one_block_is_cut_no_other_is(options, group):
    """Key block by key block: what the rows of a warpgroup see of it, by the band's definition."""
    found = set()
    for seqlen_q, seqlen_k in itertools.product((1, 63, 64, 190, 256), (1, 64, 127, 128, 190, 320, 321)):
        called = config(seqlen_q=seqlen_q, seqlen_k=seqlen_k, heads_q=2 * group, heads_kv=2, **options)
        said = forward_arguments(called)
        found.add(said["ONE_CUT"])
        if not said["ONE_CUT"]:
            continue
        query, key = torch.arange(seqlen_q)[:, None], torch.arange(seqlen_k)
        seen = key <= query + seqlen_k - seqlen_q + (called.band[1] or 0)
        for rows in seen.split(hopper_tuning.ROWS // said["PACK"]):
            blocks = [block for block in rows.split(said["BLOCK_N"], dim=1) if block.any()]
            assert all(block.all() for block in blocks[:-1]), (seqlen_q, seqlen_k)
    assert found == {True, False}
    for other in (dict(window=(9, None)), dict(varlen=True, total_q=256, total_k=256), dict(kv_lens=True)):
        assert not forward_arguments(config(seqlen_q=256, seqlen_k=256, causal=True, **other))["ONE_CUT"]
    assert forward_arguments(config(seqlen_q=256, seqlen_k=256, varlen=True, total_q=256, total_k=256))["ONE_CUT"]


PACKS = {1: 1, 2: 2, 3: 1, 4: 4, 5: 1, 6: 2, 7: 1, 8: 8, 9: 1, 10: 2, 11: 1, 12: 4, 128: 64}


@pytest.mark.parametrize("group", PACKS)
def test_query_heads_of_one_key_head_share_a_tile(group):
    said = forward_arguments(config(heads_q=3 * group, heads_kv=3))
    pack = PACKS[group]
    assert (said["PACK"], said["heads"], said["group"]) == (pack, 3 * group // pack, group // pack)
    for name in ("q_desc", "out_desc"):
        assert said[name].shape == [2, 3 * group // pack, 512, pack, 64]
        assert said[name].block_shape == [1, 1, 64 // pack, pack, 64]
    assert said["section"] % said["group"] == 0, "heads that share keys stay together"


def test_packed_heads_take_fewer_programs():
    def programs(heads_q, heads_kv, **options):
        called = config(heads_q=heads_q, heads_kv=heads_kv, batch=1, **options)
        given = meta_inputs(called)
        lse, counter = given.q.new_empty(1, dtype=torch.float32), given.q.new_empty(2, dtype=torch.int32)
        return hopper.forward_launch(called, given, torch.empty_like(given.q), lse, counter, MULTIPROCESSORS).programs

    assert programs(8, 1, seqlen_q=1) == 1
    assert programs(8, 8, seqlen_q=1) == 8
    assert programs(64, 64, seqlen_q=4096) == MULTIPROCESSORS, "persistent: one program a multiprocessor"


def test_programs_of_the_backward_in_one_pass():
    def programs(**options):
        called = config(heads_q=8, heads_kv=2, batch=3, **options)
        given = meta_inputs(called)
        sums = given.q.new_empty(hopper.query_sums_shape(called), dtype=torch.float32)
        backward = backward_launch(called, given, given.q, given.q.new_empty(1, dtype=torch.float32))
        return backward.programs, hopper.finish_launch(called, given, sums, given.q).programs

    assert programs(seqlen_k=129) == (3 * 2 * 2, 3 * 8 * 4 * 2), "a key tile each; two for every block of queries"
    assert programs(seqlen_k=10**5, seqlen_q=129)[0] == MULTIPROCESSORS, "persistent: one program a multiprocessor"
    assert programs(head_dim=128, head_dim_v=128, seqlen_q=129)[1] == 3 * 8 * 3 * 2


@pytest.mark.parametrize(
    "head_dim, head_dim_v, block_m, columns",
    [(64, 64, 128, 64), (40, 8, 128, 64), (128, 128, 64, 64), (96, 128, 64, 64), (64, 128, 64, 32)],
)
def test_how_the_sums_of_one_pass_are_finished(head_dim, head_dim_v, block_m, columns):
    called = config(head_dim=head_dim, head_dim_v=head_dim_v, **PACKED)
    given = meta_inputs(called)
    sums = given.q.new_empty(hopper.query_sums_shape(called), dtype=torch.float32)
    said = hopper.finish_launch(called, given, sums, given.q).arguments
    assert (said["BLOCK_M"], said["COLUMNS"], said["HEAD_DIM"]) == (block_m, columns, head_dim)
    assert said["sums_ptr"] is sums and said["dq_ptr"] is given.q and said["scale"] == 0.125
    assert said["cu_seqlens_q_ptr"] is given.cu_seqlens_q and (said["batch"], said["total_q"]) == (2, 700)
    assert sums.numel() == 8 * (700 // block_m + 2) * 2 * 64 * columns, "a block more for every sequence"
    added = backward_arguments(called)
    assert added["BLOCK_M"] == block_m and added["dq_desc"].shape == list(sums.shape)
    assert tile_bytes(added["dq_desc"]) == 64 * columns * 4, "TMA adds what a program finishes"


def inputs(layout, heads_q=4, heads_kv=2, head_dim=16, head_dim_v=32):
    def made(heads, columns):
        if layout == "packed":
            return stored(21, heads, columns)
        return stored(2, 9, heads, columns) if layout == "bshd" else stored(2, heads, 9, columns).transpose(1, 2)

    q, k, v = made(heads_q, head_dim), made(heads_kv, head_dim), made(heads_kv, head_dim_v)
    offsets = torch.tensor([0, 8, 21], dtype=torch.int32) if layout == "packed" else None
    options = dict(varlen=True, total_q=21, total_k=21) if layout == "packed" else {}
    called = config(batch=2, seqlen_q=13 if layout == "packed" else 9, seqlen_k=13 if layout == "packed" else 9,
                    heads_q=heads_q, heads_kv=heads_kv, head_dim=head_dim, head_dim_v=head_dim_v, **options)  # fmt: skip
    return called, AttentionInputs(q, k, v, cu_seqlens_q=offsets, cu_seqlens_k=offsets)


def seen(descriptor):
    """The tensor that TMA sees through a descriptor."""
    return torch.as_strided(descriptor.base, descriptor.shape, descriptor.strides)


def by_head(tensor):
    """(B, H, S, D), packed sequences (1, H, total, D)."""
    return (tensor if tensor.ndim == 4 else tensor[None]).transpose(1, 2)


LAYOUTS = ("bshd", "bhsd", "packed")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_descriptors_of_the_forward(layout):
    called, given = inputs(layout)
    said = forward_arguments(called, given)
    for name, tensor in (("q_desc", given.q), ("k_desc", given.k), ("v_desc", given.v)):
        assert said[name].base is tensor, "no copy"
    queries = by_head(given.q)
    assert torch.equal(seen(said["q_desc"]), queries.unflatten(1, (2, 2)).transpose(2, 3)), "two heads a tile"
    assert torch.equal(seen(said["k_desc"]), by_head(given.k))
    assert torch.equal(seen(said["v_desc"]), by_head(given.v))
    assert said["out_desc"].shape == [*said["q_desc"].shape[:-1], 32]
    assert [said[name].block_shape[-1] for name in ("q_desc", "k_desc", "v_desc", "out_desc")] == [16, 16, 32, 32]


@pytest.mark.parametrize("launch", ["backward", "keys", "queries"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_descriptors_of_the_backward(layout, launch):
    called, given = inputs(layout)
    said = ARGUMENTS[launch](called, given)
    for name, tensor in (("q_desc", given.q), ("k_desc", given.k), ("v_desc", given.v)):
        assert said[name].base is tensor, "no copy"
        assert torch.equal(seen(said[name]), by_head(tensor))
    shapes = {"grad_out": (given.q, 32), "dq": (given.q, 16), "dk": (given.k, 16), "dv": (given.v, 32)}
    for name, (like, columns) in shapes.items():
        if f"{name}_desc" in said and (name, launch) != ("dq", "backward"):
            assert seen(said[f"{name}_desc"]).shape == (*by_head(like).shape[:-1], columns)
            assert said[f"{name}_desc"].base is said.get(f"{name}_ptr", said[f"{name}_desc"].base)
    filled = {name for name in ("dq", "dk", "dv") if f"{name}_desc" in said}
    assert filled == {"backward": {"dq", "dk", "dv"}, "keys": {"dk", "dv"}, "queries": {"dq"}}[launch]
    if launch == "backward":
        sums = said["dq_desc"]
        assert sums.base.dtype == torch.float32, "it is summed in memory"
        assert sums.shape == list(hopper.query_sums_shape(called)) and seen(sums).is_contiguous()
        assert sums.block_shape == [32, 128] and sums.layout.swizzle_byte_width == 0, "as threads hold it"


def test_descriptors_of_calls_that_look_alike_point_at_their_own_tensors():
    first, second = inputs("bshd")[1], inputs("bshd")[1]
    called = inputs("bshd")[0]
    said = [forward_arguments(called, given)["k_desc"] for given in (first, second)]
    assert said[0].base is first.k and said[1].base is second.k


def test_an_expanded_key_head_is_copied_for_tma():
    called, given = inputs("bshd", heads_kv=4)
    keys = stored(2, 9, 1, 16).expand(2, 9, 4, 16)
    descriptor = forward_arguments(called, given._replace(k=keys))["k_desc"]
    assert descriptor.base is not keys and torch.equal(seen(descriptor), by_head(keys))


@pytest.mark.parametrize(
    "options, left, reach",
    [
        ({}, None, None),
        (dict(causal=True), None, 1),
        (dict(window=(7, 3)), 7, 4),
        (dict(window=(7, 3), causal=True), 7, 1),
        (dict(window=(None, 3)), None, 4),
        (dict(window=(1023, 1023)), 1023, 1024),
        (dict(window=(1024, 2**31 - 2)), None, None),  # in 32 bits the last query's place and this are negative
        (dict(window=(2**40, 2**40), causal=True), None, 1),
    ],
)
@pytest.mark.parametrize("launch", ARGUMENTS)
def test_the_band(launch, options, left, reach):
    said = ARGUMENTS[launch](config(**options))
    assert (said["window_left"], said["right_reach"]) == (left, reach)


def test_features_that_are_off_are_compiled_out():
    said = forward_arguments(CONFIG)
    pointers = ("cu_seqlens_q_ptr", "cu_seqlens_k_ptr", "kv_lens_ptr", "alibi_ptr", "sinks_ptr", "softcap")
    assert all(said[name] is None for name in pointers) and not said["RAGGED"]


def test_features_that_are_on():
    called = config(alibi=True, sinks=True, softcap=30.0, kv_lens=True)
    given = meta_inputs(called)
    said = forward_arguments(called, given)
    assert said["kv_lens_ptr"] is given.kv_lens and said["sinks_ptr"] is given.sinks and said["softcap"] == 30.0
    assert said["alibi_ptr"].shape == (2, 8) and said["alibi_ptr"].is_contiguous(), "slopes for every sequence"
    assert said["RAGGED"] and forward_arguments(config(seqlen_k=509))["RAGGED"]


def test_no_kernel_is_compiled_for_a_number_of_packed_sequences():
    few, many = (forward_arguments(config(batch=sequences, **PACKED)) for sequences in (1, 100))
    assert few["cu_seqlens_q_ptr"].shape == (2,) and many["cu_seqlens_q_ptr"].shape == (101,)
    differing = {name for name in few if not name.endswith(("_desc", "_ptr")) and few[name] != many[name]}
    assert differing == {"batch"}


@pytest.mark.parametrize(("causal", "share", "least"), [(False, 4 * 2**20, 1), (True, 16 * 2**20, 4)])
def test_heads_whose_tiles_take_turns(causal, share, least):
    def forward(seqlen_k, **options):
        return forward_arguments(config(causal=causal, seqlen_q=seqlen_k, seqlen_k=seqlen_k, **options))["section"]

    def backward(seqlen_q, **options):
        return backward_arguments(config(causal=causal, seqlen_q=seqlen_q, seqlen_k=seqlen_q, **options))["section"]

    assert forward(1024) == share // (1024 * 128 * 2)
    assert forward(2**20) == least and backward(2**20) == 1
    assert forward(2**20, heads_q=24, heads_kv=8) == 3 * least, "a key head's queries stay together"
    row = 64 * (2 + 2 + 4)  # queries, output gradients and fp32 sums
    assert backward(1024) == share // (1024 * row)
    assert backward(1024, heads_q=24, heads_kv=8) == share // (3 * 1024 * row)


def test_table_covers_every_padded_head_dim():
    assert set(hopper_tuning.FORWARD) == set(tuning.HEAD_DIMS)
    assert {hopper_tuning.backward_block_m(d, d) for d in HEAD_DIMS if d <= 128} == {64, 128}
    assert {hopper_tuning.two_pass_tile(d, d).block_m for d in HEAD_DIMS} == {64, 128}
