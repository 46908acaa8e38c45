"""The compile gate's Hopper cases cover every tile and every feature, and it sees what it is there to see.

`test_footprints.py` compiles them.
"""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import footprints
import pytest
from gluon_on_cpu import SCRATCH, shared_memory_of

from regard.backends import hopper
from regard.backends.hopper import HopperBackend
from regard.export.cross_compile import barrier_offsets, has_tma, meta_inputs, source_of, wgmma_serializations
from regard.kernels import hopper_tuning

FORWARD, ONE_PASS, FINISH, KEYS, QUERIES = (
    footprints.cases(f"hopper-{kernel}", "sm90")
    for kernel in ("forward", "backward", "backward-finish", "backward-keys", "backward-queries")
)
BACKWARD = {**ONE_PASS, **FINISH, **KEYS, **QUERIES}
CASES = {**FORWARD, **BACKWARD}
GOOD = dict(
    tile="128x128 w12 s2", registers=168, shared=197000, spills=0, matrix="wgmma", tma=True, serialized=[],
    stray_barriers=[],
)  # fmt: skip


def launch_of(name, config):
    return footprints.KERNELS[name.split()[0]].launch(config, meta_inputs(config))


def source(name, **changes):
    config = dataclasses.replace(CASES[name], **changes)
    kernel, arguments, _ = launch_of(name, config)
    made = source_of(kernel, arguments, "sm90")
    return made.signature, made.constants, made.attrs


@pytest.mark.parametrize("name", CASES)
def test_the_backend_serves_every_case(name):
    config = dataclasses.replace(CASES[name], requires_grad=name in BACKWARD)
    assert not HopperBackend().unsupported_reasons(config)
    if name in BACKWARD:
        assert hopper._needs_two_passes(config) == (name in {**KEYS, **QUERIES}), (
            "it takes the kernels that are compiled"
        )


def test_no_other_architecture_has_cases():
    hopper_kernels = [kernel for kernel in footprints.KERNELS if kernel.startswith("hopper")]
    assert len(hopper_kernels) == 6
    for kernel in hopper_kernels:
        assert not footprints.cases(kernel, "sm80") and not footprints.cases(kernel, "sm100")


def test_every_tile_is_compiled():
    compiled = {
        tuple(launch_of(name, config)[1][key] for key in ("BLOCK_M", "BLOCK_N")) for name, config in FORWARD.items()
    }
    bands = [dict(causal=False, windowed=False), dict(causal=True, windowed=False), dict(causal=True, windowed=True)]
    tiles = [
        hopper_tuning.forward_tile(d, d, rows=rows, span=span, one_cut=one_cut, raw=raw, wide_range=wide_range, **band)
        for d, rows, span, one_cut, raw, wide_range, band in itertools.product(
            (64, 128, 256), (1, 8192), (9, 8192), (False, True), (False, True), (False, True), bands
        )
    ]
    assert {(tile.block_m, tile.block_n) for tile in tiles} <= compiled
    sizes = {launch_of(name, config)[1]["BLOCK_M"] for name, config in ONE_PASS.items()}
    assert sizes == {hopper_tuning.backward_block_m(d, d) for d in (64, 128)}
    parts = {
        tuple(launch_of(name, config)[1][key] for key in ("BLOCK_M", "COLUMNS")) for name, config in FINISH.items()
    }
    assert parts == {(128, 64), (64, 64), (64, 32)}
    for cases in (KEYS, QUERIES):
        compiled = {hopper_tuning.two_pass_tile(config.head_dim, config.head_dim_v) for config in cases.values()}
        assert compiled == {hopper_tuning.two_pass_tile(d, d) for d in range(8, 257, 8)}
        assert any(config.head_dim != config.head_dim_v for config in cases.values())


def test_every_feature_is_compiled():
    for cases in (FORWARD, ONE_PASS, KEYS, QUERIES):
        features = {feature.split("=")[0] for config in cases.values() for feature in config.features()}
        assert features >= {"causal", "window", "alibi", "sinks", "varlen"}
        assert any(config.heads_kv < config.heads_q for config in cases.values())
        assert any(config.softcap for config in cases.values()) == (cases is not ONE_PASS)
        assert any(config.deterministic for config in cases.values()) == (cases in (KEYS, QUERIES))
    assert {config.dtype.itemsize for config in CASES.values()} == {2}
    assert len({config.dtype for config in FORWARD.values()}) == 2


def test_descriptors_and_what_is_off_are_compiled_in():
    signature, constants, attributes = source("hopper-forward d64 causal bf16")
    layout = "NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4"
    assert signature["k_desc"].startswith(f"tensordesc<bf16[1, 1, 128, 64],{layout}")
    assert signature["lse_ptr"] == "*fp32" and signature["scale"] == "fp32"
    off = [name for name, kind in signature.items() if kind == "constexpr"]
    assert {"softcap", "alibi_ptr", "sinks_ptr", "window_left", "right_reach", "BLOCK_M"} <= set(off)
    assert len(constants) == len(off) and attributes


@pytest.mark.parametrize("name", ["hopper-forward d128 causal bf16", "hopper-backward d128 causal bf16",
                                  "hopper-backward-keys d256 causal bf16", "hopper-backward-queries d256 causal bf16"])  # fmt: skip
def test_sizes_compile_nothing_anew(name):
    sizes = dict(batch=1, seqlen_q=640, seqlen_k=768, heads_q=1, heads_kv=1)  # too few keys to be split
    assert source(name) == source(name, **sizes)
    assert source(name) != source(name, window=(64, 0)), "a feature does"


@pytest.mark.parametrize("path", sorted(footprints.RECORDS.glob("*.json")), ids=lambda path: path.stem)
def test_kernels_take_little_shared_memory_beside_what_they_ask_for(path):
    """So that `SCRATCH` bounds what other head dims take too."""
    recorded = json.loads(path.read_text())["sm90"]
    beside = {}
    for name, config in {**ONE_PASS, **KEYS, **QUERIES}.items():
        kernel, arguments, _ = launch_of(name, config)
        asked = shared_memory_of(SimpleNamespace(kernel=kernel, arguments=arguments))
        beside[name] = recorded[name]["shared"] - asked
    assert min(beside.values()) >= 0 and max(beside.values()) <= SCRATCH, beside


PTX = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry product(.param .u64 out, .param .u64 tile) {
  .reg .f32 %f<4>;
  .reg .b64 %rd<2>;
  ld.param.u64 %rd0, [out];
  ld.param.u64 %rd1, [tile];
  ld.global.v4.f32 {%f0, %f1, %f2, %f3}, [%rd0];
  wgmma.fence.sync.aligned;
  wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %rd1, %rd1, 1, 1, 1, 0, 0;
  wgmma.commit_group.sync.aligned;
  WAIT
  st.global.v4.f32 [%rd0], {%f0, %f1, %f2, %f3};
  ret;
}
"""


def compiled(ptx):
    return SimpleNamespace(asm={"ptx": ptx})


def test_what_ptxas_says_of_wgmma_is_read():
    waits = compiled(PTX.replace("WAIT", "wgmma.wait_group.sync.aligned 0;"))
    assert wgmma_serializations(waits, "sm90") == []
    (said,) = wgmma_serializations(compiled(PTX.replace("WAIT", "")), "sm90")
    assert said.startswith("C7517") and "injected" in said


def test_tma_is_seen():
    assert has_tma(compiled("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r1];"))
    assert not has_tma(compiled("cp.async.cg.shared.global [%r1], [%rd1], 16;"))


BARRIERS = """
	mov.b32 	%r30, global_smem;
	add.s32 	%r7, %r30, 197040;
	@%p1 mbarrier.init.shared::cta.b64 [%r7], 1;
	add.s32 	%r9, %r7, 8;
	@%p1 mbarrier.init.shared::cta.b64 [%r9], 2;
	add.s32 	%r5, %r4, 16;
	@%p1 mbarrier.init.shared.b64 [LAST], 1;
"""
"""As Triton writes them; ``%r5`` is no place in shared memory."""


def test_where_barriers_lie_is_read():
    for last, offset in (("%r30", 0), ("global_smem", 0), ("%r7", 197040)):
        assert barrier_offsets(compiled(BARRIERS.replace("LAST", last))) == sorted([offset, 197040, 197048])
    with pytest.raises(ValueError, match=r"a barrier at %r5, which is no constant place"):
        barrier_offsets(compiled(BARRIERS.replace("LAST", "%r5")))
    with pytest.raises(ValueError, match="the PTX has no mbarrier"):
        barrier_offsets(compiled(PTX))


@pytest.mark.parametrize(
    ("offsets", "stray"),
    [
        ([197040, 197048, 197056, 197072, 197096], []),
        ([0, 197040, 197048, 197056], [0]),
        ([0, 0, 197040, 197048, 197056], [0, 0]),
        ([4096, 65536, 197040, 197048], [4096, 65536]),
        ([197008 - 8, 197040, 197048], [197000]),
        ([197040, 197048, 197048, 197056], [197048]),
        ([197040, 197048, 197052, 197060], [197052]),
        ([197040, 197048, 197112], [197112]),
    ],
)
def test_barriers_apart_from_the_others_are_found(offsets, stray):
    assert footprints.stray_barriers(offsets) == stray


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(tma=False), "no TMA: found no cp.async.bulk.tensor in the PTX"),
        (dict(stray_barriers=[1024]), "the mbarrier at byte 1024 of shared memory is not side by side with the others"),
        (dict(serialized=["C7510) Potential Performance Loss"]), "ptxas on wgmma: C7510) Potential Performance Loss"),
        (dict(shared=232449), "shared memory is 232449 bytes; sm90 has 232448"),
        (dict(matrix="mma"), "no matrix instruction: found mma, expected wgmma"),
        (dict(spills=16), "spills rose from 0 to 16"),
        ({}, None),
    ],
)
def test_what_is_wrong_with_a_hopper_kernel_is_said(change, sentence):
    found = footprints.faults(CASES["hopper-forward d128 causal bf16"], {**GOOD, **change}, GOOD)
    assert not found if sentence is None else any(sentence in fault for fault in found)
