"""A run end to end: rows, resuming, interrupts, wrong and failing implementations, baselines, and bad input."""

import json
import math
import shlex
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("typer", reason="the command line needs typer")

from typer.testing import CliRunner

import regard
from regard import ConfigError
from regard.bench import baselines, environment, model, peers, progress, rows, summary
from regard.bench.measure import SECONDS, Settings
from regard.bench.run import DeviceLost, Options, run
from regard.cli import app

SMALL = ("b1-s24-h2-d16-fp32", "b1-s24-h2-d16-fp32-causal")
QUICKLY = Settings(seconds=0.01)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("regard.bench.run._Cells._measured_ceilings", lambda *_: peers_free_ceilings())
    monkeypatch.setattr("regard.bench.report.missing_packages", lambda: ["matplotlib"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors: other threads would only be waited for
    yield
    torch.set_num_threads(threads)


def peers_free_ceilings():
    from regard.bench.measure import Ceilings

    return Ceilings(1e11, 1e10)


def command(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "400", "TERM": "dumb"})


def measured(**options):
    defaults = dict(cases=SMALL, device="cpu", implementations=["cpu"], out="rows.jsonl", settings=QUICKLY)
    return run(Options(**{**defaults, **options}))


def test_a_row_says_everything_needed_to_read_and_repeat_it():
    outcome = measured()
    assert [(row["case"], row["implementation"]) for row in outcome.rows] == [
        (case, name) for case in SMALL for name in ("cpu", "torch-sdpa")
    ]
    assert [json.loads(line) for line in written().splitlines()] == list(outcome.rows)
    row = outcome.rows[2]
    assert row["status"] == "ok" and row["timer"] == "wall" and row["repetitions"] >= 1
    assert row["ms_low"] <= row["ms"] <= row["ms_high"]
    assert row["reference"] == "torch-sdpa" and row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
    assert row["tflops"] == pytest.approx(row["flops"] / row["ms"] / 1e9, rel=1e-3)
    assert row["matmul_share"] == pytest.approx(row["tflops"] / row["matmul_tflops"], rel=1e-3)
    assert row["copy_share"] == pytest.approx(row["gbs"] / row["copy_gbs"], rel=1e-3)
    assert 0 <= row["error_ratio"] <= 1 and row["host_us"] > 0 and row["peak_bytes"] > 0
    assert row["chosen"] == "cpu"
    assert row["environment"]["torch"] == torch.__version__ and row["environment"]["machine"]
    assert outcome.rows[1]["speedup"] == 1.0


def test_the_command_of_a_row_repeats_it():
    row = measured().rows[2]
    words = shlex.split(row["command"])
    assert words[:2] == ["regard", "bench"]
    again = command(*words[2:], "--out", "again.jsonl", "--seconds", "0.01")
    assert again.exit_code == 0, again.output
    repeated, _ = rows.read(Path("again.jsonl"))
    assert {rows.key(each) for each in repeated} == {rows.key(row), (row["case"], "torch-sdpa", "cpu")}


def test_the_limits_that_help_states_are_those_that_hold():
    limits = f"{SECONDS['cuda']:g} on a GPU, {SECONDS['cpu']:g} on a CPU"
    assert limits in " ".join(command("--help").stdout.split())


def test_the_time_of_a_row_lies_in_its_interval():
    for row in measured().rows:
        low, high = row["ms_interval"]
        assert low <= row["ms"] <= high


def written():
    return Path("rows.jsonl").read_text()


def test_torch_stands_beside_every_cpu_figure():
    assert {row["implementation"] for row in measured(implementations=["eager"]).rows} == {"eager", "torch-sdpa"}


def test_flash_is_said_to_be_left_out_on_a_cpu(monkeypatch):
    monkeypatch.setattr("regard.backends.flash._interpreting", lambda: False)
    skipped = dict(measured().skipped)
    assert skipped["flash"] == "device: got cpu, needs cuda (NVIDIA or ROCm)"


def test_a_refusal_is_a_row_with_its_reason():
    outcome = measured(cases=["b1-s24-h2-d16-fp32-window=3:0"], implementations=["sdpa"])
    row = outcome.rows[0]
    assert row["status"] == "refused" and row["reason"].startswith("window: got window=(3, 0)")
    assert "ms" not in row
    assert "refused: sdpa: window" in summary.text(outcome.rows)


class Broken:
    """A backend that is wrong or raises."""

    composed_of_torch_ops = False

    def __init__(self, name, forward):
        self.name, self._forward = name, forward

    def unsupported_reasons(self, config):
        return ()

    def required_kv_layout(self, config):
        return config.kv_layout

    def forward(self, config, inputs):
        return self._forward(config, inputs), None

    def backward(self, *_):
        raise NotImplementedError


@pytest.fixture
def broken():
    def forget_the_scale(config, inputs):
        return regard.attention(inputs.q * 2, inputs.k, inputs.v, causal=config.causal)

    def raise_something(config, inputs):
        raise RuntimeError("no such kernel\nwith a long story")

    made = [Broken("wrong", forget_the_scale), Broken("raising", raise_something)]
    for each in made:
        regard.register(each, priority=-50)
    yield [each.name for each in made]
    for each in made:
        regard.unregister(each.name)


def test_wrong_and_failing_cells_say_why_and_are_never_timed(broken):
    outcome = measured(cases=SMALL[:1], implementations=[*broken, "cpu"])
    wrong, raising, right, reference = outcome.rows
    assert wrong["status"] == "wrong" and "out: error" in wrong["reason"] and "beyond it" in wrong["reason"]
    assert raising["status"] == "failed" and raising["reason"] == "RuntimeError: no such kernel"
    assert not any("ms" in row or "speedup" in row for row in (wrong, raising))
    assert right["status"] == reference["status"] == "ok", "the others go on"
    text = summary.text(outcome.rows)
    assert "wrong, so not timed: wrong: out: error" in text and "failed: raising" in text


def test_failing_while_it_is_timed_is_a_row_too(monkeypatch):
    def fail(*_):
        raise RuntimeError("launch failed")

    monkeypatch.setattr("regard.bench.measure.time_together", fail)
    assert {row["reason"] for row in measured().rows} == {"while timed: RuntimeError: launch failed"}


def test_a_lost_device_ends_the_run_and_keeps_its_rows(monkeypatch):
    def lose(self, error):
        raise DeviceLost("the device was lost: illegal address")

    monkeypatch.setattr("regard.bench.run._Cells._synchronise_after", lose)
    monkeypatch.setattr(peers.Eager, "prepare", lambda *_: 1 / 0)
    outcome = measured(implementations=["cpu", "eager"])
    assert outcome.interrupted == "the device was lost: illegal address"
    assert [(row["implementation"], row["status"]) for row in outcome.rows] == [("eager", "failed")]
    assert rows.read(outcome.path)[0] == list(outcome.rows)


# --- Interrupting and resuming


def interrupt_after(cells):
    def listen(name, done, total, made):
        if made and done == cells:
            raise KeyboardInterrupt

    return listen


def test_an_interrupt_keeps_what_was_measured_and_resume_does_the_rest():
    options = Options(cases=SMALL, device="cpu", implementations=["cpu"], out="rows.jsonl", settings=QUICKLY)
    first = run(options, interrupt_after(1))
    assert first.interrupted and {row["case"] for row in first.rows} == {SMALL[0]}
    assert rows.read(first.path)[0] == list(first.rows)

    seen = []
    resumed = Options(**{**vars(options), "resume": True})
    second = run(resumed, lambda name, done, total, made: seen.append((name, len(made))))
    assert (SMALL[0], 0) in seen and (SMALL[1], 2) in seen
    assert [row["case"] for row in second.rows] == [SMALL[0], SMALL[0], SMALL[1], SMALL[1]]
    assert list(second.rows[:2]) == list(first.rows), "measured once"
    assert rows.read(second.path)[0] == list(second.rows)


def test_an_interrupted_command_still_reports(monkeypatch):
    real = progress.line

    def interrupt(name, done, total, made):
        real(name, done, total, made)
        if made:
            raise KeyboardInterrupt

    monkeypatch.setattr("regard.bench.progress.line", interrupt)
    result = command("--case", SMALL[0], "--case", SMALL[1], "-i", "cpu", "--out", "rows.jsonl", "--seconds", "0.01")
    assert result.exit_code == 130
    assert "interrupted: what was measured is kept, --resume --out rows.jsonl continues" in result.stderr
    assert SMALL[0] in result.stdout and SMALL[1] not in result.stdout
    assert "rows: rows.jsonl" in result.stdout


def test_rows_that_are_there_are_never_overwritten():
    before = measured().rows
    with pytest.raises(ConfigError, match="out: got rows.jsonl, which exists, needs a new file, or --resume"):
        measured()
    assert rows.read(Path("rows.jsonl"))[0] == list(before)
    with pytest.raises(ConfigError, match="resume: got no --out"):
        measured(out=None, resume=True)


def test_corrupt_lines_are_skipped_with_a_count_and_kept():
    measured()
    whole = written()
    Path("rows.jsonl").write_text('{"schema": 1, "cas\n' + whole + '[1, 2]\n{"schema": 99}\n{"schema":1,"case":"x"}\n')
    found, corrupt = rows.read(Path("rows.jsonl"))
    assert len(found) == 4 and corrupt == 4
    resumed = measured(resume=True)
    assert len(resumed.rows) == 4 and resumed.corrupt == 4
    assert whole in written()


@pytest.mark.parametrize(
    "place, value",
    [
        ("ms_low", "fast"), ("tflops", None), ("bytes", 0), ("speedup", -1), ("speedup", True), ("reference", None),
        ("reference", ["eager"]), ("mode", 3), ("host_us", "x"), ("status", "odd"), ("environment", []),
        ("environment", {}), ("workload", "x"), ("workload", {}), ("date", 2026), ("error_ratio", math.nan),
    ],
)  # fmt: skip
def test_a_row_that_was_tampered_with_is_none(whole_row, place, value):
    assert rows.read(written_as(whole_row))[1] == 0
    assert rows.read(written_as(whole_row | {place: value})) == ([], 1)


@pytest.mark.parametrize("field, value", [("batch", "x"), ("seqlen_k", None), ("page_size", 0), ("window", "ab"),
                                          ("dtype", "fp8"), ("colour", "red")])  # fmt: skip
def test_a_row_of_no_workload_is_none(whole_row, field, value):
    workload = whole_row["workload"] | {field: value}
    assert rows.read(written_as(whole_row | {"workload": workload})) == ([], 1)


@pytest.fixture
def whole_row():
    return dict(measured(cases=SMALL[:1]).rows[0])


def written_as(row):
    path = Path("altered.jsonl")
    path.write_text(json.dumps(row) + "\n")
    return path


def test_rows_of_a_torn_write_do_not_swallow_the_next():
    """A run that was killed in the middle of a line, then resumed."""
    measured()
    whole = written()
    Path("rows.jsonl").write_text(whole[:-40])
    resumed = measured(resume=True)
    assert resumed.corrupt == 1
    found, corrupt = rows.read(Path("rows.jsonl"))
    assert {rows.key(row): row for row in found} == {rows.key(row): row for row in resumed.rows}
    assert len(found) == 4 and corrupt == 1


# --- Baselines


def made_up(ms, spread=0.01, case="b1-s24-h2-d16-fp32", name="cpu"):
    return {"schema": 1, "suite": "grid", "case": case, "implementation": name, "device": "cpu", "status": "ok",
            "environment": {}, "ms": ms, "ms_low": ms * (1 - spread), "ms_high": ms * (1 + spread)}  # fmt: skip


@pytest.mark.parametrize(
    "after, spread, verdict",
    [(2.0, 0.01, "regressed"), (0.5, 0.01, "improved"), (1.1, 0.2, "within noise"), (1.02, 0.001, "within noise"),
     (0.98, 0.001, "within noise"), (1.0, 0.01, "within noise")],
)  # fmt: skip
def test_verdicts_come_from_the_quantiles_and_the_threshold(after, spread, verdict):
    (change,) = baselines.compare([made_up(1.0, spread)], [made_up(after, spread)], threshold=3)
    assert change.verdict == verdict
    assert change.percent == pytest.approx(100 * (after - 1))
    if verdict != "within noise":
        assert f"{verdict} {change.percent:+.1f} %" in baselines.describe([change])


def test_another_machine_or_torch_is_said():
    here = {**made_up(1.0), "environment": {"machine": "A", "torch": "2.9", "threads": 2}}
    there = {**made_up(1.0), "environment": {"machine": "B", "torch": "2.9", "threads": 2}}
    assert baselines.differences([here], [there]) == ["machine: the baseline has A, this run B"]
    assert baselines.differences([here], [here]) == []


def test_saving_keeps_what_the_baseline_has_of_other_cases():
    baselines.save("main", [made_up(1.0), made_up(2.0, case="b1-s8-h1-d8-fp32")])
    path = baselines.save("main", [made_up(3.0)])
    assert {row["case"]: row["ms"] for row in baselines.load("main")} == {
        "b1-s24-h2-d16-fp32": 3.0, "b1-s8-h1-d8-fp32": 2.0,
    }  # fmt: skip
    assert not list(path.parent.glob("*.part"))


def test_a_regression_fails_the_command_if_asked():
    arguments = ["--case", SMALL[0], "-i", "cpu", "--seconds", "0.01"]
    assert command(*arguments, "--out", "a.jsonl", "--save", "now").exit_code == 0
    slow = [{**row, "ms": row["ms"] * 100, "ms_low": row["ms"] * 99, "ms_high": row["ms"] * 101}
            for row in baselines.load("now")]  # fmt: skip
    fast = [{**row, "ms": row["ms"] / 100, "ms_low": row["ms"] / 101, "ms_high": row["ms"] / 99}
            for row in baselines.load("now")]  # fmt: skip
    baselines.save("slow", slow)
    baselines.save("fast", fast)
    improved = command(*arguments, "--out", "b.jsonl", "--compare", "slow", "--fail-on-regression")
    assert improved.exit_code == 0 and "2 improved, 0 regressed" in improved.stdout
    regressed = command(*arguments, "--out", "c.jsonl", "--compare", "fast", "--fail-on-regression")
    assert regressed.exit_code == 1 and "0 improved, 2 regressed" in regressed.stdout
    assert command(*arguments, "--out", "d.jsonl", "--compare", "fast").exit_code == 0


# --- The machine


def test_what_nvidia_smi_says_is_recorded(monkeypatch):
    asked = []

    def output(*words):
        asked.append(words)
        return "580.159.04, 700.00, 1980, 3201, [N/A]"

    monkeypatch.setattr(environment, "_output", output)
    environment._nvidia_smi.cache_clear()
    assert environment._nvidia_smi(3) == {
        "driver": "580.159.04", "power_limit_w": 700.0, "max_sm_clock_mhz": 1980.0, "max_memory_clock_mhz": 3201.0,
        "application_clock_mhz": None,
    }  # fmt: skip
    assert asked[0][:2] == ("nvidia-smi", "--id=3")
    environment._nvidia_smi.cache_clear()


def test_without_nvidia_smi_or_git_the_rest_is_recorded(monkeypatch):
    def missing(*_):
        raise FileNotFoundError

    monkeypatch.setattr(environment, "_output", missing)
    environment._nvidia_smi.cache_clear()
    environment.commit.cache_clear()
    assert environment._nvidia_smi(0) == {} and environment.commit() is None
    row = measured(cases=SMALL[:1], commit="abc1234").rows[0]
    assert row["environment"]["commit"] == "abc1234" and row["environment"]["threads"] == 1
    environment._nvidia_smi.cache_clear()
    environment.commit.cache_clear()


# --- The command line


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["quikc"], "suite: got 'quikc', needs one of quick, seeds, fa3"),
        ([], "suite: got none, needs one of quick"),
        (["--case", "b1-s8-nonsense"], "case: got 'nonsense' in 'b1-s8-nonsense'"),
        (["--seqlen", "12x"], "seqlen: got '12x', needs whole numbers"),
        (["--seqlen", "²"], "seqlen: got '²', needs whole numbers"),
        (["quick", "--report", "."], "report: got ., needs a file that can be written"),
        (["quick", "--report", "page.html/page.html"], "report: got page.html/page.html, needs a file"),
        (["quick", "--out", "page.html/rows"], "out: got page.html/rows, needs a file that can be written"),
        (["--heads", "3", "--heads-kv", "2"], "heads_q: got 3 query heads"),
        (["quick", "--seqlen", "77"], "grid: got seqlen 77"),
        (["quick", "--causal", "maybe"], "causal: got 'maybe', needs yes, no or both"),
        (["quick", "--window", "5"], "window: got '5'"),
        (["quick", "-i", "flash4"], "implementation: got 'flash4', needs one of"),
        (["quick", "--compare", "none"], "compare: got 'none', needs one of the baselines"),
        (["quick", "--save", "a/b"], "save: got 'a/b'"),
        (["quick", "--fail-on-regression"], "fail-on-regression: got no --compare"),
        (["quick", "--timer", "sundial"], "timer: got 'sundial'"),
        (["quick", "--device", "tpu"], "device: got 'tpu'"),
        (["quick", "--fa3-path", "/nowhere"], "fa3-path: got '/nowhere', needs a folder with flash_attn_interface.py"),
    ],
)
def test_bad_input_is_one_sentence_and_measures_nothing(arguments, sentence, tmp_path):
    Path("page.html").touch()  # no folder
    result = command(*arguments, *([] if "--device" in arguments else ["--device", "cpu"]))
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) == 1 and sentence in result.stderr
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_grid_from_the_command_line():
    result = command("--seqlen", "8,16", "--head-dim", "8", "--heads", "2", "--causal", "both", "--batch", "2",
                     "--device", "cpu", "-i", "cpu,sdpa", "--seconds", "0.01")  # fmt: skip
    assert result.exit_code == 0, result.output
    (path,) = Path(".benchmarks").glob("grid-cpu-*.jsonl")
    found, _ = rows.read(path)
    assert {row["case"] for row in found} == {
        f"b2-s{length}-h2-d8-fp32{causal}" for length in (8, 16) for causal in ("", "-causal")
    }
    assert {row["implementation"] for row in found} == {"cpu", "sdpa", "torch-sdpa"}
    assert "cpu: " in result.stdout and "x the speed of torch-sdpa over 4 cases (geometric mean)" in result.stdout
    assert f"no HTML report without matplotlib: regard report {path}" in result.stdout


def test_the_list_of_suites_says_what_each_is_for():
    output = command("--list", "--device", "cpu").stdout
    assert "36 cases  the grid of the FlashAttention-3 paper" in output
    assert "implementations on cpu: cpu" in output and "torch-sdpa, eager" in output


def test_what_is_timed_is_made_on_the_stream_it_is_captured_on(monkeypatch):
    within, prepared = [None], []

    @contextmanager
    def on_capture_stream(device):
        within.append(device.type)
        yield
        within.pop()

    def prepare(self, *arguments, prepare=peers.OurBackend.prepare):
        prepared.append(within[-1])
        return prepare(self, *arguments)

    monkeypatch.setattr("regard.bench.measure.on_capture_stream", on_capture_stream)
    monkeypatch.setattr(peers.OurBackend, "prepare", prepare)
    measured(cases=SMALL[:1], filters={"mode": ["bwd"]})
    assert prepared and set(prepared) == {"cpu"}


def test_overhead_of_a_small_cell(monkeypatch):
    """What the harness itself costs: everything but the timing of a cell, with four implementations."""
    spent = []
    monkeypatch.setattr("regard.bench.measure.time_together", lambda runs, *_: {
        name: fake_timing() for name in runs
    })  # fmt: skip
    for number in range(5):
        started = time.process_time()  # not disturbed by other programs
        measured(cases=SMALL[:1], implementations=["cpu", "sdpa", "eager"], out=f"{number}.jsonl")
        spent.append(time.process_time() - started)
    assert min(spent) < 0.05


def fake_timing():
    from regard.bench.measure import Timing

    return Timing(samples=[1e-3], rounds=[1e-3])


def test_a_language_model_that_ends_after_one_token_has_no_decode_speed_up(monkeypatch):
    from regard.worker import generate, models

    made = {"ms": 2.0, "decode_tokens_per_second": 0.0, "tokens": [7]}
    network = SimpleNamespace(config=SimpleNamespace(_attn_implementation="ours"), set_attn_implementation=str)
    monkeypatch.setattr(models, "find", lambda name: SimpleNamespace(name=name))
    monkeypatch.setattr(models, "load", lambda *_, **__: SimpleNamespace(model=network))
    monkeypatch.setattr(generate, "tune_threads", lambda _: 1)
    monkeypatch.setattr(model, "_generate", lambda _: dict(made))
    options = SimpleNamespace(model="tiny", implementations=("cpu",))
    measured = list(model.measure_model(options, torch.device("cpu"), lambda *_: {"environment": {}}))
    assert [(row["status"], row["speedup"], row["decode_speedup"]) for row in measured] == [("ok", 1.0, None)] * 3
