"""Results are checked before they are timed, times come with their uncertainty, memory and ceilings are measured."""

import math
import statistics
import time
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from regard.bench import measure, peers
from regard.bench.cases import Workload, parse
from regard.bench.inputs import dense_gradient, draw, tiny
from regard.bench.measure import Settings, Timing
from regard.bench.verify import Verifier

CPU = torch.device("cpu")
SAMPLED = [
    "b2-s70-h4/2-d32-fp32-causal",
    "b2-q21-k70-h4/2-d40-bf16-causal",
    "b2-q70-k21-h2-d32-fp32-causal",
    "b1-s90-h2-d32-fp32-window=11:5",
    "b2-s45-h4/2-d32/48-fp32-softcap=3-sinks",
    "b2-s45-h4/2-d32-fp32-bias=1hqk-mask=b11k-causal",
    "b2-s45-h4-d32-bf16-bias=b1q1",
    "b2-s45-h4-d32-fp32-alibi-causal",
    "b3-s60-h4/2-d32-fp32-causal-varlen",
    "b2-q1-k70-h4/2-d32-fp32-paged=16",
    "b2-q3-k70-h4/2-d32-fp32-causal-paged=16",
    "bwd-b2-s45-h4/2-d32-fp32-causal",
    "fwdbwd-b2-q30-k45-h4/2-d32-bf16-mask=11qk-window=20:none",
    "fwdbwd-b3-s45-h4/2-d32-fp32-causal-varlen",
]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors: other threads would only be waited for
    yield
    torch.set_num_threads(threads)


def results(workload, call, backend="reference", gradient=None):
    ready = peers.OurBackend(backend).prepare(workload.mode, call, gradient)
    return ready.results(ready.run())


@pytest.mark.parametrize("budget", [1 << 18, 400], ids=["all rows", "few rows"])
@pytest.mark.parametrize("name", SAMPLED)
def test_a_right_result_passes(name, budget, monkeypatch):
    monkeypatch.setattr("regard.bench.verify.SCORES", {"cpu": budget})
    workload = parse(name)
    call = draw(workload, CPU)
    verifier = Verifier(workload, call)
    comparisons = verifier.check(results(workload, call, gradient=verifier.grad_out))
    names = {each.name for each in comparisons}
    assert names >= ({"out"} if workload.mode == "fwd" else {"dq", "dk", "dv"})
    assert all(each.ratio <= 1 for each in comparisons)


@pytest.mark.parametrize("name", [n for n in SAMPLED if "bf16" not in n])
def test_a_wrong_result_is_caught(name, monkeypatch):
    """The causal flag ignored, the scale wrong, a head swapped: whatever differs on the sampled rows."""
    monkeypatch.setattr("regard.bench.verify.SCORES", {"cpu": 2000})
    workload = parse(name)
    call = draw(workload, CPU)
    verifier = Verifier(workload, call)
    right = results(workload, call, gradient=verifier.grad_out)
    for tensor in right:
        wrong = {**right, tensor: right[tensor] * 1.01}
        with pytest.raises(AssertionError, match=tensor):
            verifier.check(wrong)
        swapped = right[tensor].flip(-2)  # heads
        with pytest.raises(AssertionError, match=tensor):
            verifier.check({**right, tensor: swapped})
    poisoned = {**right, next(iter(right)): torch.full_like(next(iter(right.values())), float("nan"))}
    with pytest.raises(AssertionError, match="not finite"):
        verifier.check(poisoned)


def test_a_feature_ignored_is_caught():
    workload = parse("b1-s64-h2-d32-fp32-causal")
    verifier = Verifier(workload, draw(workload, CPU))
    ignored = parse("b1-s64-h2-d32-fp32")
    with pytest.raises(AssertionError):
        verifier.check(results(ignored, draw(ignored, CPU)))


def test_checking_a_large_call_recomputes_a_small_part_of_it(monkeypatch):
    monkeypatch.setattr("regard.bench.verify.SCORES", {"cpu": 1 << 12})
    verifier = Verifier(workload := Workload(seqlen_q=1024, seqlen_k=1024, dtype="fp32"), draw(workload, CPU))
    assert sum(part.rows.numel() for part in verifier.parts) * 1024 <= 1 << 12
    assert {int(part.rows[-1]) for part in verifier.parts} == {1023}
    assert [part.kv_head for part in verifier.parts] == [0, 7]


def test_torch_and_eager_are_right_where_they_do_not_refuse():
    for name in SAMPLED:
        workload = parse(name)
        call = draw(workload, CPU)
        verifier = Verifier(workload, call)
        for each in (peers.TorchKernel("torch-sdpa"), peers.Eager()):
            hidden_rows = workload.causal and workload.seqlen_q > workload.seqlen_k  # torch gives NaN or 0 there
            if each.reasons(call.config()) or hidden_rows:
                continue
            ready = each.prepare(workload.mode, call, verifier.grad_out)
            verifier.check(ready.results(ready.run()), getattr(each, "slack", 1.0))


@pytest.mark.parametrize("each", [peers.TorchKernel("torch-sdpa"), peers.Eager(), peers.OurBackend("cpu")])
def test_a_training_call_can_be_made_again_and_again(each):
    call = draw(parse("fwdbwd-b1-s24-h2-d16-fp32-causal-bias=1hqk"), CPU)
    ready = each.prepare("fwdbwd", call, dense_gradient(call))
    first, second = (ready.results(ready.run()) for _ in range(2))
    assert first["dbias"].shape == (1, 2, 24, 24)
    assert all(torch.allclose(first[name], second[name]) for name in ("out", "dq", "dk", "dv", "dbias"))


def test_only_eager_may_round_its_scores():
    assert peers.Eager().slack > 1
    assert not any(hasattr(each, "slack") for each in (peers.TorchKernel("torch-sdpa"), peers.OurBackend("cpu")))
    workload = parse("b1-s256-h2-d64-bf16-alibi")
    call = draw(workload, CPU)
    ready = peers.Eager().prepare("fwd", call, None)
    found = ready.results(ready.run())
    with pytest.raises(AssertionError):
        Verifier(workload, call).check(found)
    Verifier(workload, call).check(found, peers.Eager().slack)


# --- Times


def timed(rounds):
    """A `Timing` of these samples, a list for each round."""
    return Timing(samples=[s for taken in rounds for s in taken], rounds=[statistics.median(taken) for taken in rounds])


def one_by_one(timing):
    """The same samples, taken for independent ones."""
    return timed([[sample] for sample in timing.samples])


def test_quantiles_and_interval_of_known_samples():
    timing = timed([[float(i)] for i in range(1, 101)])
    assert timing.median == 50.5
    assert (timing.quantile(0.2), timing.quantile(0.8)) == (21.0, 81.0)
    low, high = timing.interval()
    assert 40 <= low < 50.5 < high <= 61
    assert timed([[3.0]]).interval() == (3.0, 3.0)


def test_the_interval_covers_the_median_as_often_as_stated():
    """Of samples that share a factor within a round too, as at a clock that swings; one by one they promise too much."""
    generator = torch.Generator().manual_seed(0)
    inside = pretended = 0
    clocks = torch.empty(400, 60, 1).exponential_(generator=generator)
    for draws in (clocks * (1 + 0.01 * torch.rand(400, 60, 9, generator=generator) - 0.005)).tolist():
        (low, high), (first, last) = timed(draws).interval(), one_by_one(timed(draws)).interval()
        inside += low <= 0.6931 <= high
        pretended += first <= 0.6931 <= last
    assert inside / 400 >= 0.93
    assert pretended / 400 < 0.7


def test_the_median_is_that_of_the_rounds_and_lies_in_its_interval():
    """Most rounds a little more fast than slow, the others all slow: most samples are slow, most rounds are not."""
    timing = timed([[1.0] * 6 + [1.1] * 5] * 30 + [[1.1] * 11] * 10)
    assert statistics.median(timing.samples) == 1.1
    assert timing.median == 1.0 and timing.interval() == (1.0, 1.0)
    assert timing.quantile(0.2) <= timing.median <= timing.quantile(0.8)


def test_samples_of_one_moment_do_not_make_a_median_precise():
    clocks = [0.97, 1.03, 1.0, 0.96, 1.04, 0.98, 1.02, 0.97, 1.04, 0.96, 1.03, 0.99]
    timing = timed([[clock * (1 + 1e-5 * i) for i in range(60)] for clock in clocks])
    assert one_by_one(timing).is_precise(0.01), "one sample after the other they look precise"
    assert timing.interval() == pytest.approx((0.97, 1.04), rel=0.01)
    assert not timing.is_precise(0.01) and timing.is_precise(0.05)


def test_implementations_take_turns_and_ratios_are_paired():
    calls = []

    def run(name, seconds):
        def call():
            calls.append(name)
            time.sleep(seconds)

        return call

    timings = measure.time_together(
        {"slow": run("slow", 4e-3), "fast": run("fast", 1e-3)}, CPU, Settings(seconds=0.05, precision=0)
    )
    assert len(timings["slow"].rounds) == len(timings["fast"].rounds) >= 3
    assert "slow" in calls[-4:] and "fast" in calls[-4:], "neither is timed in one go"
    ratio, low, high = measure.speedup(timings["slow"], timings["fast"])
    assert 2 < low <= ratio <= high < 5


def test_timing_stops_once_the_median_is_known():
    started = time.perf_counter()
    timings = measure.time_together({"steady": lambda: time.sleep(2e-3)}, CPU, Settings(seconds=5, precision=0.5))
    assert time.perf_counter() - started < 1
    assert timings["steady"].is_precise(0.5)


def test_memory_is_what_the_allocator_handed_out():
    a = torch.randn(256, 1024)
    assert measure.peak_bytes(lambda: (a + 1).sum(), CPU) == pytest.approx(a.nbytes, rel=0.01)
    assert measure.peak_bytes(lambda: (a + 1) * 2, CPU) == pytest.approx(2 * a.nbytes, rel=0.01)


def test_memory_of_eager_is_quadratic_and_ours_is_not():
    workload = Workload(seqlen_q=512, seqlen_k=512, dtype="fp32")
    call = draw(workload, CPU)
    scores = 8 * 512 * 512 * 4
    taken = {
        each.name: measure.peak_bytes(each.prepare("fwd", call, None).run, CPU)
        for each in (peers.Eager(), peers.OurBackend("cpu"))
    }
    assert taken["eager"] > 2 * scores
    assert taken["cpu"] < scores


def test_ceilings_are_measured():
    ceilings = measure.measure_ceilings(CPU, torch.float32)
    assert 1e8 < ceilings.flops < 1e14
    assert 1e8 < ceilings.bytes < 1e13


def test_the_cost_of_calling_leaves_the_computing_out():
    workload = Workload("fwdbwd", seqlen_q=512, seqlen_k=512, dtype="fp32", varlen=True, batch=2)
    small = tiny(workload, CPU)
    ready = peers.OurBackend("cpu").prepare("fwdbwd", small, dense_gradient(small))
    assert 0 < measure.host_seconds(ready.run, CPU, 1.0) < 0.1


# --- The GPU's timers, driven by a clock that stands in for a GPU


@pytest.fixture
def device_clock(monkeypatch):
    """A GPU that works through its queue on a clock of its own: each call takes 10 µs, or longer where the clock is low
    at that moment. The host takes no time for a call unless told to, and the GPU waits for what is not queued yet; the
    clock of the host also moves while it waits for the GPU.
    """
    now, host = [0.0], [0.0]

    def spend(seconds):
        now[0] = max(now[0], host[0]) + seconds

    def sleep(cycles):
        spend(cycles / work.hertz)
        work.slept += cycles / work.hertz

    def synchronize(*_):
        host[0] = now[0] = max(now[0], host[0])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            spend(0.0)
            self.at = now[0]

        def elapsed_time(self, other):
            return (other.at - self.at) * 1e3

    class Graph:
        calls = 0

        def replay(self):
            spend(self.calls * work.seconds / work.clock(now[0]))

    def work():
        host[0] += work.queueing
        spend(work.seconds / work.clock(now[0]))
        if work.capturing:
            work.capturing[-1].calls += 1

    work.seconds, work.clock, work.waited = 10e-6, lambda at: 1.0, lambda: host[0]
    work.queueing, work.hertz, work.slept, work.capturing = 0.0, 1e9, 0.0, []

    class Stream:
        def wait_stream(self, other):
            pass

    streams = [Stream()]

    @contextmanager
    def on(stream):
        streams.append(stream)
        try:
            yield
        finally:
            streams.pop()

    @contextmanager
    def graph(made, stream):
        work.capturing.append(made)
        try:
            with on(stream):
                yield
        finally:
            work.capturing.pop()

    for name, value in dict(
        Event=Event, CUDAGraph=Graph, graph=graph, Stream=Stream, stream=on, current_stream=lambda: streams[-1],
        synchronize=synchronize, _sleep=sleep,
    ).items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: host[0]))
    measure._capture_stream.cache_clear()
    yield work
    measure._capture_stream.cache_clear()


GPU = torch.device("cuda")


@pytest.mark.parametrize("timer", ["auto", "events"])
def test_gpu_timers_count_the_calls_alone(device_clock, timer):
    timings = measure.time_together({"kernel": device_clock}, GPU, Settings(timer=timer))
    assert timings["kernel"].median == pytest.approx(10e-6)
    assert timings["kernel"].timer == ("events" if timer == "events" else "graph")


def test_the_gpu_does_not_idle_for_the_host_of_long_kernels_either(device_clock):
    """It would cool meanwhile and run them at a clock of its own, which differs as the host's time does."""
    device_clock.seconds, device_clock.queueing = 2e-3, 3e-3
    slept_by = {}
    for timer in ("auto", "events"):
        before = device_clock.slept
        timings = measure.time_together({"kernel": device_clock}, GPU, Settings(timer=timer, precision=0))
        slept_by[timer] = device_clock.slept - before
        assert timings["kernel"].median == pytest.approx(2e-3)
        assert timings["kernel"].timer == ("graph" if timer == "auto" else "events")
    assert slept_by["auto"] < 0.25 * slept_by["events"]


def timed_beside(other, clock):
    """Timers and medians of the kernel and of another call, in one workload."""
    timings = measure.time_together({"kernel": clock, "other": other}, GPU, Settings())
    return [timing.timer for timing in timings.values()], [timing.median for timing in timings.values()]


def test_a_long_kernel_is_timed_as_the_short_one_beside_it(device_clock):
    timers, medians = timed_beside(lambda: [device_clock() for _ in range(30)], device_clock)
    assert timers == ["graph", "graph"]
    assert medians == pytest.approx([10e-6, 300e-6])


def test_where_one_cannot_be_captured_all_are_timed_by_events(device_clock):
    def synchronising():
        if device_clock.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        device_clock()

    timers, medians = timed_beside(synchronising, device_clock)
    assert timers == ["events", "events"]
    assert medians == pytest.approx([10e-6, 10e-6])


@pytest.mark.parametrize(("on_stream", "timer"), [(measure.on_capture_stream, "graph"), (nullcontext, "events")])
def test_a_backward_is_captured_on_the_stream_of_its_forward(device_clock, on_stream, timer):
    with on_stream(GPU):
        forward_on = torch.cuda.current_stream()

    def backward():
        if device_clock.capturing and torch.cuda.current_stream() is not forward_on:
            raise RuntimeError("operation not permitted when stream is capturing")
        device_clock()

    timings = measure.time_together({"backward": backward}, GPU, Settings())
    assert timings["backward"].timer == timer


EVENTS = Settings(timer="events")


def test_the_gpu_sleeps_until_a_slow_host_is_ahead(device_clock):
    device_clock.queueing = 40e-6
    timing = measure.time_together({"kernel": device_clock}, GPU, EVENTS)["kernel"]
    assert timing.samples == pytest.approx([10e-6] * len(timing.samples))


@pytest.mark.parametrize("hiccup", [0.0, 5e-3])
def test_the_gpu_hardly_sleeps_where_the_host_gets_ahead_by_itself(device_clock, hiccup):
    """Not even after the first call took the host long."""
    device_clock.seconds, device_clock.queueing = 150e-6, 30e-6
    first = [hiccup]

    def run():
        device_clock.queueing = 30e-6 + (first.pop() if first else 0.0)
        device_clock()

    timing = measure.time_together({"kernel": run}, GPU, EVENTS)["kernel"]
    assert timing.samples == pytest.approx([150e-6] * len(timing.samples))
    assert device_clock.slept < 0.02 * device_clock.waited()


def test_a_sleep_is_as_long_at_the_clock_of_a_later_workload(device_clock):
    device_clock.queueing = 40e-6
    for device_clock.hertz in (0.5e9, 2e9):
        timing = measure.time_together({"kernel": device_clock}, GPU, EVENTS)["kernel"]
        assert timing.samples == pytest.approx([10e-6] * len(timing.samples))


@pytest.mark.parametrize("timer", ["events", "auto"])
def test_the_first_moments_on_a_gpu_do_not_count(device_clock, timer):
    """It comes from the check, cool, and runs faster for a while."""
    device_clock.seconds, device_clock.clock = 2e-3, lambda at: 2.0 if at < 0.08 else 1.0
    timing = measure.time_together({"kernel": device_clock}, GPU, Settings(timer=timer))["kernel"]
    assert timing.samples == pytest.approx([2e-3] * len(timing.samples))


def test_what_ran_before_does_not_decide(device_clock):
    """A GPU at its power limit that did easier work for a while has hard work run faster for as long, at most 0.18 s."""
    credit, hard = [0.0], [True]
    device_clock.seconds, device_clock.clock = 150e-6, lambda at: 1.12 if hard[0] and credit[0] > 0 else 1.0

    def of(is_hard):
        def run():
            hard[0] = is_hard
            credit[0] = min(0.18, max(0.0, credit[0] + (-1 if is_hard else 1) * device_clock.seconds))
            device_clock()

        return run

    runs = {"first": of(True), "second": of(True), "easy": of(False), "as easy": of(False)}
    timings = measure.time_together(runs, GPU, Settings(timer="events", precision=0))
    assert [timing.median for timing in timings.values()] == pytest.approx([150e-6] * 4, rel=1e-3)
    assert measure.speedup(timings["first"], timings["second"]) == pytest.approx((1, 1, 1), rel=1e-3)


def test_little_time_is_not_spent_on_settling(device_clock):
    device_clock.seconds = 1e-3
    timing = measure.time_together({"kernel": device_clock}, GPU, Settings(seconds=0.04))["kernel"]
    assert len(timing.rounds) == 25
    assert device_clock.waited() < 0.1


@pytest.mark.parametrize(("seconds", "uncounted", "counted"), [(0.06, 4, 9), (0.5, 1, 3)])
def test_long_calls_settle_for_as_long_and_not_for_as_many_rounds(device_clock, seconds, uncounted, counted):
    device_clock.seconds = seconds
    timing = measure.time_together({"kernel": device_clock}, GPU, Settings())["kernel"]
    assert len(timing.rounds) % counted == 0
    replayed = len(timing.rounds) * (uncounted + counted) / counted * seconds
    assert device_clock.waited() == pytest.approx(replayed, abs=12 * seconds)  # and what preparing took


def swinging(at):
    """The clock of a GPU at its power limit: up and down by up to 10 %, in about a tenth of a second."""
    return 1 + 0.1 * math.sin(at / 17e-3) * math.cos(at / 41e-3)


@pytest.mark.parametrize("timer", ["events", "auto"])
@pytest.mark.parametrize("seconds", [0.5, 1.0, 5.0])
def test_rounds_on_a_gpu_are_short_however_long_is_measured(device_clock, timer, seconds):
    device_clock.seconds, device_clock.clock = 150e-6, lambda at: 1 + 1e-3 * math.sin(at)  # never quite known
    runs = {"one": device_clock, "other": device_clock}
    timings = measure.time_together(runs, GPU, Settings(seconds=seconds, precision=0, timer=timer))
    for timing in timings.values():
        per_round = 150e-6 * len(timing.samples) * (7 if timer == "auto" else 1) / len(timing.rounds)
        assert 0.9 * measure._ROUND < per_round <= measure._ROUND == 20e-3
        assert 50 * seconds <= len(timing.rounds) <= 55 * seconds + 25


@pytest.mark.parametrize("seconds", [0.04, 0.1])
def test_rounds_get_shorter_where_ten_would_not_fit(device_clock, seconds):
    device_clock.seconds = 150e-6
    timings = measure.time_together({"kernel": device_clock}, GPU, Settings(seconds=seconds, precision=0))
    assert len(timings["kernel"].rounds) >= measure._MIN_ROUNDS == 10


def test_a_swinging_clock_is_measured_on_after_samples_look_precise(device_clock):
    device_clock.seconds, device_clock.clock = 200e-6, swinging
    timing = measure.time_together({"kernel": device_clock}, GPU, EVENTS)["kernel"]
    per_round = len(timing.samples) // len(timing.rounds)
    looked_precise = [
        count
        for count in range(measure._MIN_ROUNDS, len(timing.rounds))
        if one_by_one(Timing(samples=timing.samples[: count * per_round])).is_precise(0.01)
    ]
    assert looked_precise and looked_precise[0] < 25, "the samples alone would have ended it"
    assert not timing.is_precise(0.01)
    assert len(timing.rounds) == 50, "the limit is a second, and it was used"
    low, high = timing.interval()
    assert low < 200e-6 < high


def test_repeated_medians_of_a_swinging_clock_agree(device_clock):
    device_clock.seconds, device_clock.clock = 200e-6, swinging

    def spread(settings):
        medians = [measure.time_together({"kernel": device_clock}, GPU, settings)["kernel"].median for _ in range(20)]
        return max(medians) / min(medians)

    assert spread(Settings()) < 1.03 < spread(Settings(seconds=0.1))


def test_a_steady_kernel_is_timed_for_few_short_rounds(device_clock):
    device_clock.seconds = 2e-3
    timing = measure.time_together({"kernel": device_clock}, GPU, Settings())["kernel"]
    assert len(timing.rounds) == 25, "one turn"
    assert device_clock.waited() < 0.9, "with ten rounds to settle"


@pytest.mark.parametrize(("device", "limit", "rounds", "counted"), [("cpu", 0.25, 1, 1), ("cuda", 1.0, 35, 25)])
def test_the_limit_is_a_quarter_of_a_second_and_on_a_gpu_a_second(monkeypatch, device, limit, rounds, counted):
    """For each implementation, where none gets precise; of rounds that are counted, and in whole turns."""
    now = [0.0]

    class Sampler:
        timer, estimate = "wall", 0.0

        def sample(self):
            now[0] += 1e-2
            return [1.0 + now[0]]

    def spent(settings):
        started = now[0]
        measure.time_together(dict.fromkeys(["one", "other"], None), torch.device(device), settings)
        return now[0] - started

    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(measure, "_samplers", lambda runs, *_, **__: dict.fromkeys(runs, Sampler()))
    turn = 2 * rounds * 1e-2
    for settings, seconds in ((Settings(), limit), (Settings(seconds=3.0), 3.0)):
        assert spent(settings) == pytest.approx(2 * seconds * rounds / counted, abs=turn / 2 + 1e-9)
