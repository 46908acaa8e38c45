"""How long a call takes, how much memory it takes, and what the machine could do at best, all measured.

Implementations of a workload are timed in turns by the same timer, so that a clock that drops or another program that
starts hits all of them; ratios are taken round by round. A turn is one round, on a GPU several, of which the first are
not counted: its clock follows the power that was drawn in the last tenths of a second, by whatever ran before.
Rounds go on until the median is known well enough or time is up. How well it is known is judged by rounds: what is
timed in one shares the clock of its moment.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

Run = Callable[[], Any]

CONFIDENCE = 0.95
_Z = 1.96  # of the normal distribution at that confidence
LOW, HIGH = 0.2, 0.8  # quantiles that rows give beside the median
SECONDS = {"cpu": 0.25, "cuda": 1.0}
"""Of measuring an implementation at most, unless told otherwise: a GPU at its power limit needs many rounds."""
_MIN_ROUNDS = 10  # before an early stop: the interval of five is their range, which is small by chance now and then
_ROUND = 20e-3  # seconds at most, on a GPU: short, so that a clock that swings is met at many moments
_ROUNDS = {"cpu": (0, 1), "cuda": (10, 25)}  # of a turn: those that are not counted, and those that are
_LEAST_ROUNDS = 3  # of a turn, counted, where a call is longer than a round should be
_QUEUE = 256  # calls put on the GPU's queue at once; it holds about a thousand launches
_FLUSH_BYTES = 512 << 20  # larger than any L2 cache


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        seconds: of measuring for each implementation of a workload, at most; on a GPU 10 in 35 rounds, during which
            its clock settles, come on top. None: `SECONDS`.
        precision: stop earlier once the 95 % confidence interval of every median is within this fraction of it.
        flush_l2: empty the GPU's cache before every call.
        timer: ``"events"``, or ``"auto"`` for CUDA-graph replay, during which the GPU never waits for the host. It is
            the same for all of a workload: one that cannot be captured is timed by events, and the others with it.
    """

    seconds: float | None = None
    precision: float = 0.01
    flush_l2: bool = False
    timer: str = "auto"


@dataclass
class Timing:
    """Times of one implementation, in seconds a call.

    Attributes:
        samples: every time taken.
        rounds: the median of each round.
        timer: ``"wall"``, ``"events"`` or ``"graph"``.
    """

    timer: str = "wall"
    samples: list[float] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.rounds)

    def quantile(self, fraction: float) -> float:
        """The sample that this fraction of samples does not exceed."""
        return _quantile(self.samples, fraction)

    def interval(self) -> tuple[float, float]:
        """Confidence interval of the median, free of any assumption on the distribution: two order statistics
        (Le Boudec 2010, "Performance Evaluation of Computer and Communication Systems", theorem 2.1). The theorem asks
        for independent draws, so they are of rounds: samples of one round share a clock, and many tell hardly more
        than one.
        """
        ordered, count = sorted(self.rounds), len(self.rounds)
        reach = _Z * math.sqrt(count) / 2
        first, last = math.floor(count / 2 - reach), math.ceil(count / 2 + reach)
        return ordered[max(0, first)], ordered[min(count - 1, last)]

    def is_precise(self, precision: float) -> bool:
        """Whether the interval lies within this fraction around the median."""
        low, high = self.interval()
        return len(self.rounds) >= _MIN_ROUNDS and (high - low) / 2 <= precision * self.median


def time_together(runs: Mapping[str, Run], device: torch.device, settings: Settings) -> dict[str, Timing]:
    """Time several calls in turns.

    Args:
        runs: calls by name, each already made once.
        device: what they run on.
        settings: see `Settings`.
    """
    seconds = SECONDS[device.type] if settings.seconds is None else settings.seconds
    per_round = min(_ROUND, seconds / max(_MIN_ROUNDS, *_ROUNDS[device.type]))
    samplers = _samplers(runs, device, settings, per_round)
    timings = {name: Timing(sampler.timer) for name, sampler in samplers.items()}
    uncounted, counted = _rounds_of_a_turn(device, max(s.estimate for s in samplers.values()) / per_round)
    limit = seconds * len(samplers) * (uncounted + counted) / counted
    started = time.perf_counter()
    for number, turn in enumerate(itertools.islice(_turns(samplers, uncounted + counted), 10_000), start=1):
        for name, rounds in turn.items():
            for taken in rounds[uncounted:]:
                timings[name].samples += taken
                timings[name].rounds.append(statistics.median(taken))
        after_half_a_turn_more = (time.perf_counter() - started) * (1 + 0.5 / number)
        if after_half_a_turn_more > limit or all(t.is_precise(settings.precision) for t in timings.values()):
            break
    return timings


def speedup(reference: Timing, timing: Timing) -> tuple[float, float, float]:
    """How many times faster than the reference: the median of the ratios of each round, and their quantiles."""
    ratios = [a / b for a, b in zip(reference.rounds, timing.rounds, strict=True)]
    return statistics.median(ratios), _quantile(ratios, LOW), _quantile(ratios, HIGH)


def _quantile(values: Sequence[float], fraction: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]


def _rounds_of_a_turn(device: torch.device, stretch: float) -> tuple[int, int]:
    """How many are not counted and how many are, where the longest call takes ``stretch`` times as long as a round."""
    uncounted, counted = (math.ceil(rounds / max(1.0, stretch)) for rounds in _ROUNDS[device.type])
    return uncounted, max(counted, min(_LEAST_ROUNDS, _ROUNDS[device.type][1]))


_Samplers = Mapping[str, "_WallClock | _Events | _GraphReplay"]


def _samplers(runs: Mapping[str, Run], device: torch.device, settings: Settings, per_round: float) -> _Samplers:
    """Of one kind for all: times by different timers do not compare."""
    if device.type != "cuda":
        return {name: _WallClock(run) for name, run in runs.items()}
    events = {name: _Events(run, settings.flush_l2, per_round) for name, run in runs.items()}
    if settings.flush_l2 or settings.timer == "events":
        return events
    try:
        return {name: _GraphReplay(run, events[name].estimate, per_round) for name, run in runs.items()}
    except Exception:  # one cannot be captured (it synchronises, or plans on the host)
        torch.cuda.synchronize()
        return events


def _turns(samplers: _Samplers, rounds: int) -> Iterator[dict[str, list[list[float]]]]:
    """The samples of so many rounds of each, one implementation after the other, back and forth, without end."""
    order = list(samplers)
    for names in itertools.cycle([order, order[::-1]]):
        yield {name: [samplers[name].sample() for _ in range(rounds)] for name in names}


class _WallClock:
    """Calls on the CPU; a sample is long enough for the clock."""

    timer = "wall"
    _LONG_ENOUGH = 300e-6

    def __init__(self, run: Run) -> None:
        self._run = run
        estimate = self._seconds(1)
        if estimate < 10 * self._LONG_ENOUGH:
            estimate = min(estimate, self._seconds(3))
        self._calls = max(1, math.ceil(self._LONG_ENOUGH / estimate))
        self.estimate = estimate

    def sample(self) -> list[float]:
        return [self._seconds(self._calls)]

    def _seconds(self, calls: int) -> float:
        run = self._run
        started = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - started) / calls


class _Events:
    """Device events around every call. The GPU first sleeps while the host gets ahead with putting calls on its queue,
    so that the time the host needs for a call does not count.
    """

    timer = "events"
    _MARGIN = 1.5  # by which the host may be slower than when it was measured
    _LONGEST_SLEEP = 0.05

    def __init__(self, run: Run, flush_l2: bool, per_round: float) -> None:
        self._run = run
        self._flush = _flush_buffer() if flush_l2 else None
        self._per_round = per_round
        self._host = host_seconds(lambda: self._queue(_event(), _event()), torch.device("cuda"), math.inf)
        self._cycles_per_second = _cycles_per_second()
        self.estimate = 0.0  # not known yet: the GPU sleeps until the host has put all calls on the queue
        self.estimate = statistics.median(self._batch(3))
        self.estimate = statistics.median(self.sample())  # three calls are few to choose the length of rounds by

    def sample(self) -> list[float]:
        return self._batch(max(1, min(_QUEUE, int(self._per_round / max(self.estimate, 1e-6)))))

    def _batch(self, calls: int) -> list[float]:
        pairs = [(_event(), _event()) for _ in range(calls)]
        _sleep(int(self._cycles_per_second * self._head_start(calls)))
        for before, after in pairs:
            self._queue(before, after)
        torch.cuda.synchronize()
        return [before.elapsed_time(after) * 1e-3 for before, after in pairs]

    def _head_start(self, calls: int) -> float:
        """Seconds the host needs so that every call is on the queue when the one before it ends. It gains on long
        kernels by itself; a GPU that slept for them would cool between rounds and run at clocks of its own.
        """
        host = self._MARGIN * self._host
        return min(self._LONGEST_SLEEP, host + calls * max(0.0, host - self.estimate))

    def _queue(self, before: Any, after: Any) -> None:
        if self._flush is not None:
            self._flush.zero_()
        before.record()
        self._run()
        after.record()


def on_capture_stream(device: torch.device) -> AbstractContextManager[Any]:
    """Queue what follows on the stream that CUDA graphs are captured on: a backward runs on the stream of its forward,
    and can be captured on no other. On a CPU nothing.
    """
    return torch.cuda.stream(_capture_stream()) if device.type == "cuda" else nullcontext()


@functools.cache
def _capture_stream() -> Any:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


class _GraphReplay:
    """Several calls captured in a CUDA graph: the GPU runs them back to back, the host takes no part."""

    timer = "graph"
    _LONG_ENOUGH = 1e-3

    def __init__(self, run: Run, estimate: float, per_round: float) -> None:
        self._run = run  # what the graph reads lives as long as this
        self.estimate = estimate = max(estimate, 1e-6)
        self._calls = min(_QUEUE, math.ceil(self._LONG_ENOUGH / estimate))
        self._replays = max(1, int(per_round / (self._calls * estimate)))
        self._graph = torch.cuda.CUDAGraph()
        side = _capture_stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self._graph, stream=side):
            for _ in range(self._calls):
                run()
        self._graph.replay()
        torch.cuda.synchronize()

    def sample(self) -> list[float]:
        events = [_event() for _ in range(self._replays + 1)]
        events[0].record()
        for event in events[1:]:
            self._graph.replay()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) * 1e-3 / self._calls for a, b in zip(events[:-1], events[1:], strict=True)]


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _sleep(cycles: int) -> None:
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]


def _cycles_per_second() -> float:
    """Of the counter that `torch.cuda._sleep` counts by, measured: it follows the GPU's clock."""
    cycles = 2_000_000
    _sleep(cycles)
    first, last = _event(), _event()
    first.record()
    _sleep(cycles)
    last.record()
    torch.cuda.synchronize()
    return float(cycles / (first.elapsed_time(last) * 1e-3))


@functools.cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")


def host_seconds(run: Run, device: torch.device, seconds: float) -> float:
    """Median time the host needs for a call that takes ``seconds`` on a GPU (infinite if that is not known: few calls
    do). On a CPU, give one with next to nothing to compute.
    """
    taken = []
    calls = max(3, min(20, int(0.1 / seconds))) if device.type == "cuda" else 20
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    for _ in range(calls):
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return statistics.median(taken)


def peak_bytes(run: Run, device: torch.device) -> int | None:
    """Memory that torch's allocator hands out during a call beyond what is held before it, the result included. None
    where this torch cannot say.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = run()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    return _peak_bytes_on_cpu(run)


def _peak_bytes_on_cpu(run: Run) -> int | None:
    """The running sum of what the CPU allocator reports to torch's profiler."""
    autograd: Any = torch.autograd
    if not hasattr(autograd, "_enable_profiler_legacy"):
        return None
    experimental = torch._C._profiler._ExperimentalConfig()
    config = autograd.ProfilerConfig(autograd.ProfilerState.CPU, False, True, False, False, False, experimental)
    autograd._enable_profiler_legacy(config)
    try:
        run()
    finally:
        threads = autograd._disable_profiler_legacy()
    held = peak = 0
    for event in (event for thread in threads for event in thread):
        if event.kind() == "memory_alloc":
            held += event.cpu_memory_usage()
            peak = max(peak, held)
    return peak


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches where nothing is in the way, measured: operations a second of a large matrix product,
    and bytes a second (read and written) of a large copy.
    """

    flops: float
    bytes: float


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Time a square matrix product of this dtype and a copy that fits no cache."""
    on_cpu = device.type == "cpu"
    side, size = (512, 64 << 20) if on_cpu else (8192, 1 << 30)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    settings = Settings(seconds=0.3, timer="events")
    runs: dict[str, Run] = {"product": lambda: torch.mm(a, b), "copy": lambda: target.copy_(source)}
    for run in runs.values():
        run()
    best = {name: timing.quantile(0.0) for name, timing in time_together(runs, device, settings).items()}
    return Ceilings(2 * side**3 / best["product"], 2 * size / best["copy"])
