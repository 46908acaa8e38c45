"""What kernels ask of a GPU that is not there, and what bounds a measured time."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="profiling compiles Triton kernels")
pytest.importorskip("typer", reason="the command line needs typer")

import torch
from typer.testing import CliRunner

from regard import ConfigError, UnsupportedError
from regard.bench import rows
from regard.bench.cases import parse
from regard.bench.profile import MULTIPROCESSORS, KernelProfile, bound, launches, profile_kernels, residency
from regard.cli import app
from regard.export.cross_compile import meta_inputs
from regard.kernels import tuning

CASE = "b1-s512-h8-d64-bf16-causal"


def command(*arguments):
    return CliRunner().invoke(app, ["profile", *arguments], env={"COLUMNS": "400", "TERM": "dumb"})


@pytest.mark.parametrize(
    "arch, warps, registers, shared, expected",
    [
        # NVIDIA's occupancy calculator: 65536 registers, given to warps in 256s
        ("sm90", 4, 128, 16 * 1024, (4, "registers")),
        ("sm90", 4, 228, 114_688, (2, "registers")),
        ("sm90", 8, 255, 132_000, (1, "registers")),
        ("sm90", 4, 32, 64 * 1024, (3, "shared memory")),
        ("sm90", 4, 32, 1024, (16, "registers")),
        ("sm90", 1, 24, 0, (32, "blocks")),
        ("sm80", 4, 168, 40 * 1024, (3, "registers")),
        ("sm89", 8, 40, 512, (6, "registers")),
        # RDNA3: 1536 registers a lane, in 24s, two SIMDs a compute unit
        ("gfx1100", 8, 254, 32 * 1024, (1, "registers")),
        ("gfx1100", 4, 96, 20 * 1024, (3, "shared memory")),
        # CDNA3: 512 a lane, in 8s, four SIMDs
        ("gfx942", 4, 128, 16 * 1024, (4, "registers")),
        ("gfx942", 4, 64, 32 * 1024, (2, "shared memory")),
    ],
)
def test_programs_a_multiprocessor_holds(arch, warps, registers, shared, expected):
    assert residency(MULTIPROCESSORS[arch], warps, registers, shared) == expected


def test_every_architecture_of_the_tile_tables_is_known():
    assert set(MULTIPROCESSORS) == set(tuning.ARCHITECTURES)


def kernel_names(backend, case, arch):
    workload = parse(case)
    config = workload.config("cuda", arch)
    return [each.kernel.__name__ for each in launches(backend, config, meta_inputs(config), workload.mode)]


@pytest.mark.parametrize("arch", ["sm90", "gfx1100"])
def test_launches_are_written_down_and_not_made(arch):
    config = parse(CASE).config("cuda", arch)
    (launch,) = launches("flash", config, meta_inputs(config), "fwd")
    assert launch.kernel.__name__ == "attention_forward"
    assert launch.programs == 8 * -(-512 // launch.arguments["BLOCK_M"])
    names = kernel_names("flash", "fwdbwd-" + CASE, arch)
    assert names[:3] == ["attention_forward", "row_terms", "backward_keys"]
    assert kernel_names("flash", "bwd-" + CASE, arch) == names[1:]


def test_launches_of_hopper_are_written_down():
    assert kernel_names("hopper", CASE, "sm90") == ["attention_forward"]
    backward = ["row_terms", "attention_backward", "finish_queries"]
    assert kernel_names("hopper", "bwd-" + CASE, "sm90") == backward
    assert kernel_names("hopper", "fwdbwd-" + CASE, "sm90") == ["attention_forward", *backward]


@pytest.mark.parametrize(
    "case, arch, backends",
    [(CASE, "sm90", ["hopper", "flash"]), (CASE, "sm80", ["flash"]), ("s64-d60-bf16", "sm90", ["flash"])],
)
def test_every_backend_that_can_serve_a_case_is_profiled(monkeypatch, case, arch, backends):
    monkeypatch.setattr("regard.bench.profile.require_compiler", lambda: None)
    monkeypatch.setattr("regard.bench.profile._profile", lambda backend, launch, arch: kernel(backend=backend))
    assert [each.backend for each in profile_kernels(parse(case), arch)] == backends


def test_a_launch_is_made_again_afterwards():
    from regard.backends.launch import Launch

    config = parse(CASE).config("cuda", "sm90")
    before = Launch.run
    with pytest.raises(ZeroDivisionError):
        launches("flash", config, meta_inputs(config)._replace(q=Broken()), "fwd")
    assert Launch.run is before


class Broken:
    def __getattr__(self, name):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    "case, arch, error", [(CASE, "sm70", ConfigError), ("b1-s64-d512-bf16", "sm90", UnsupportedError)]
)
def test_what_cannot_be_compiled_is_said(case, arch, error):
    with pytest.raises(error):
        profile_kernels(parse(case), arch)


def test_a_machine_without_triton_is_told_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ConfigError, match="triton: got none installed, needs pip install triton"):
        profile_kernels(parse(CASE), "sm90")


def profiled(case, arch):
    """What the command prints, from a fresh process: this one may interpret kernels instead of compiling them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", "regard", "profile", case, "--arch", arch, "--json"],
                          capture_output=True, text=True, env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_command_compiles_for_a_gpu_that_is_not_here():
    facts = profiled(CASE, "gfx1100")
    assert facts["arch"] == "gfx1100" and facts["flops"] == parse(CASE).flops() and facts["rows"] == []
    (kernel,) = facts["kernels"]
    assert (kernel["backend"], kernel["kernel"], kernel["matrix"]) == ("flash", "attention_forward", "wmma")
    assert 0 < kernel["registers"] <= 256 and 0 < kernel["shared"] <= 65536 and kernel["spills"] == 0
    assert kernel["resident"] >= 1 and 0 < kernel["occupancy"] <= 1
    assert kernel["limited_by"] in ("registers", "shared memory", "warps", "blocks")


def test_the_command_compiles_gluon_kernels():
    hopper, flash = profiled(CASE, "sm90")["kernels"]
    assert (hopper["backend"], hopper["kernel"], hopper["matrix"]) == ("hopper", "attention_forward", "wgmma")
    assert (flash["backend"], flash["kernel"]) == ("flash", "attention_forward")
    assert hopper["warps"] >= 12, "two warpgroups that compute, and the one that loads"
    assert hopper["tile"].count("x") == 1 and hopper["stages"] >= 2
    assert hopper["resident"] == 1 and 0 < hopper["programs"] <= 132


@pytest.mark.skipif(torch.cuda.is_available(), reason="device: got a GPU, needs a machine without one")
@pytest.mark.parametrize(
    "arguments, sentence",
    [((CASE,), "arch: got none, and no GPU here"), ((CASE, "--arch", "sm70"), "arch: got 'sm70', needs one of sm80"),
     (("d64-x", "--arch", "sm90"), "case: got 'x' in 'd64-x'")],
)  # fmt: skip
def test_bad_input_is_one_sentence(arguments, sentence):
    result = command(*arguments)
    assert result.exit_code == 2 and sentence in result.stderr


# --- What bounds a time


def kernel(programs=1024, resident=2, backend="flash"):
    return KernelProfile(
        backend, "attention_forward", "64x64", 4, 3, programs, 128, 0, 65536, "wgmma", resident, "registers", 0.5
    )


def row(**changes):
    return {"schema": 1, "suite": "case", "case": CASE, "device": "cuda", "status": "ok", "implementation": "flash",
            "ms": 1.0, "tflops": 400.0, "matmul_share": 0.5, "gbs": 100.0, "copy_share": 0.1, "timer": "events",
            "host_us": 20.0, "environment": {"arch": "sm90", "multiprocessors": 132}, **changes}  # fmt: skip


@pytest.mark.parametrize(
    "changes, programs, sentence",
    [
        (dict(matmul_share=0.8), 1024, "bound by the matrix units"),
        (dict(copy_share=0.9), 1024, "bound by device memory"),
        ({}, 64, "bound by parallelism: 64 programs, where 132 multiprocessors hold 264 at a time"),
        (dict(ms=0.01, host_us=20.0), 1024, "bound by the host, which needs 20 µs a call"),
        (dict(ms=0.01, host_us=20.0, timer="graph"), 1024, "bound by none of the two alone"),
        ({}, 1024, "bound by none of the two alone (the matrix units at 50%)"),
    ],
)
def test_what_bounds_a_time(changes, programs, sentence):
    found = bound(row(**changes), [kernel(programs)])
    assert "flash takes" in found[0] and found[1].startswith(sentence)


def test_kernels_of_another_backend_bound_nothing():
    found = bound(row(implementation="hopper"), [kernel(64), kernel(132, 1, "hopper")])
    assert not any("parallelism" in each for each in found)
    assert any("132 multiprocessors" in each for each in bound(row(), [kernel(64), kernel(132, 1, "hopper")]))


def test_an_unfilled_last_wave_is_said():
    assert any("1.14 waves of programs" in each for each in bound(row(), [kernel(300)]))
    assert not any("waves" in each for each in bound(row(), [kernel(1024 * 10)]))


def test_times_come_from_rows_of_another_machine(tmp_path, monkeypatch):
    monkeypatch.setattr("regard.bench.profile.profile_kernels", lambda *_: [kernel()])
    path = tmp_path / "rows.jsonl"
    rows.write(path, [row(), row(case="s64-d64", ms=7.0), row(environment={"arch": "sm80"}, implementation="eager")])
    result = command(CASE, "--arch", "sm90", "--rows", str(path))
    assert result.exit_code == 0, result.output
    assert "flash takes 1 ms: 400 TFLOP/s are 50% of a large matrix product" in result.stdout
    assert "7 ms" not in result.stdout and "eager" not in result.stdout
    assert "attention_forward" in result.stdout and "50% (2 at once, registers)" in result.stdout
    nothing = command("s128-d64-h8-bf16", "--arch", "sm90", "--rows", str(path))
    assert "no run: times need this GPU in the machine" in nothing.stdout
