"""Every entry of the tile tables compiles for its architecture and costs no more than recorded. Needs no GPU."""

import warnings

import footprints
import pytest

from regard.backends.flash_launches import triton_version
from regard.kernels import tuning

CASES = {
    f"{arch} {name}": (name, config)
    for arch in tuning.ARCHITECTURES
    for kernel in footprints.KERNELS
    for name, config in footprints.cases(kernel, arch).items()
}


@pytest.fixture(scope="session")
def compiler():
    with footprints.compiling_processes(1) as pool:
        yield pool


@pytest.mark.parametrize("case", CASES)
def test_case_costs_no_more_than_recorded(compiler, case):
    name, config = CASES[case]
    records = footprints.read_records()
    seen = compiler.submit(footprints.measure, name, config).result()
    # A Triton version between the recorded ones is held to the hardware's limits only.
    recorded = seen if records is None else records.get(config.arch, {}).get(name)
    found = footprints.faults(config, seen, recorded)
    assert not found, f"{case}: " + "; ".join(found)
    better = footprints.improvements(seen, recorded)
    if better:
        warnings.warn(f"{case}: {'; '.join(better)}; record it with footprints.py --write", stacklevel=1)


def test_oldest_and_newest_supported_triton_are_recorded():
    assert {path.stem for path in footprints.RECORDS.glob("*.json")} >= {"triton-3.6", "triton-3.9"}


def test_records_hold_no_case_that_is_gone():
    records = footprints.read_records()
    if records is None:
        pytest.skip(f"triton: got {triton_version()}, needs a version with recorded footprints")
    recorded = {f"{arch} {name}" for arch, by_case in records.items() for name in by_case}
    assert recorded <= set(CASES)


GOOD = dict(tile="64x64 w4 s1", registers=128, shared=32768, spills=0, matrix="mma")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(spills=8), "spills rose from 0 to 8"),
        (dict(shared=40000), "shared rose from 32768 to 40000"),
        (dict(shared=200000), "sm80 has 166912"),
        (dict(matrix=""), "no matrix instruction: found none, expected mma"),
        (dict(tile="64x64 w8 s1", registers=255), None),
    ],
)
def test_what_got_worse_is_said(change, sentence):
    config = footprints.cases("forward", "sm80")["forward d64 causal bf16"]
    found = footprints.faults(config, {**GOOD, **change}, GOOD)
    assert not found if sentence is None else any(sentence in fault for fault in found)


def test_a_case_without_record_is_a_fault():
    config = footprints.cases("forward", "sm80")["forward d64 causal bf16"]
    assert "no record of this case" in footprints.faults(config, GOOD, None)[0]


def test_what_got_better_is_no_fault():
    config = footprints.cases("forward", "sm80")["forward d64 causal bf16"]
    worse = {**GOOD, "spills": 16}
    assert footprints.faults(config, GOOD, worse) == []
    assert footprints.improvements(GOOD, worse) == ["spills fell from 16 to 0"]
