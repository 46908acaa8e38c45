"""A run of the suite: every workload is checked, then its implementations are timed in turns and written as rows."""

from __future__ import annotations

import datetime
import shlex
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from regard.bench import environment, measure, peers, rows
from regard.bench.cases import DTYPES, MODEL_SUITE, Workload, choose
from regard.bench.inputs import dense_gradient, draw, tiny
from regard.bench.measure import HIGH, LOW, Ceilings, Settings, Timing
from regard.bench.peers import Implementation, Prepared
from regard.bench.rows import SCHEMA, Row
from regard.bench.verify import Verifier
from regard.config import architecture
from regard.errors import ConfigError, UnsupportedError
from regard.registry import registry
from regard.testing import Call

REFERENCES = {"cpu": ("torch-sdpa",), "cuda": ("torch-flash", "torch-efficient", "eager")}
"""What speed-ups are relative to: the first of these that served the workload."""

FOLDER = Path(".benchmarks")
"""Where rows and baselines go unless told otherwise."""


@dataclass(frozen=True)
class Options:
    """What to measure and how. Construction validates nothing; `run` does, before anything is measured.

    Attributes:
        suites, cases, filters: what, see `regard.bench.cases.choose`. The suite ``"model"`` runs a language model.
        device: ``"cpu"``, ``"cuda"``; None: a GPU if there is one.
        implementations: names; None: see `regard.bench.peers.available`.
        out: the file of rows; None: a new one in `FOLDER`.
        resume: continue that file, leaving out what it already has.
        settings: see `regard.bench.measure.Settings`.
        reference: the implementation that speed-ups are relative to; None: see `REFERENCES`.
        fa3_path: a folder with ``flash_attn_interface.py``.
        commit: to record where git cannot tell.
        model: of the model suite, see ``regard generate --model``.
    """

    suites: Sequence[str] = ()
    cases: Sequence[str] = ()
    filters: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    device: str | None = None
    implementations: Sequence[str] | None = None
    out: str | Path | None = None
    resume: bool = False
    settings: Settings = field(default_factory=Settings)
    reference: str | None = None
    fa3_path: str | Path | None = None
    commit: str | None = None
    model: str = "gemma3-270m"


@dataclass(frozen=True)
class Outcome:
    """What a run left behind.

    Attributes:
        path: the file of rows.
        rows: of this run and, where resumed, those that were there.
        interrupted: why it ended early, or "".
        skipped: implementations that cannot run on this device, with the reason.
        corrupt: lines of a resumed file that are no rows.
    """

    path: Path
    rows: tuple[Row, ...]
    interrupted: str
    skipped: tuple[tuple[str, str], ...]
    corrupt: int


Listener = Callable[[str, int, int, Sequence[Row]], None]
"""Told before and after each workload: its name, workloads done, workloads in all, its rows (none before)."""


def run(options: Options, listener: Listener = lambda *_: None) -> Outcome:
    """Measure. Every row is written as soon as it is there; an interrupt keeps them.

    Raises:
        ConfigError: an unknown suite, case or implementation, an impossible grid, a file that is there already.
    """
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if options.fa3_path is not None:
        use_fa3(options.fa3_path)
    suites = [name for name in options.suites if name != MODEL_SUITE]
    with_model = MODEL_SUITE in options.suites
    chosen = choose(suites, options.cases, options.filters, device.type) if suites or not with_model else []
    implementations = _implementations(options, device)
    path = _path(options, device)
    existing, corrupt = rows.read(path) if path.exists() else ([], 0)
    done = {rows.key(row) for row in existing}

    collected = list(existing)
    cells = _Cells(options, device, implementations)
    interrupted = ""
    total = len(chosen) + with_model
    try:
        for number, (suite, workload) in enumerate(chosen):
            listener(workload.name, number, total, ())
            made: list[Row] = []
            if any((workload.name, each.name, device.type) not in done for each in implementations):
                with measure.on_capture_stream(device):
                    made = cells.measure(suite, workload)
                rows.write(path, made)
            collected += made
            listener(workload.name, number + 1, total, made)
        if with_model:
            from regard.bench.model import measure_model

            listener(MODEL_SUITE, total - 1, total, ())
            for row in measure_model(options, device, cells.common):
                rows.write(path, [row])
                collected.append(row)
            listener(MODEL_SUITE, total, total, ())
    except KeyboardInterrupt:
        interrupted = "interrupted"
    except DeviceLost as lost:
        interrupted = str(lost)
        rows.write(path, lost.rows)
        collected += lost.rows
    latest = {rows.key(row): row for row in collected}
    skipped = cells.inapplicable()
    return Outcome(path, tuple(latest.values()), interrupted, skipped, corrupt)


class DeviceLost(RuntimeError):
    """The device does not answer any more after a kernel failed; nothing else can be measured in this process.

    Attributes:
        rows: of the workload that lost it.
    """

    rows: Sequence[Row] = ()


def use_fa3(folder: str | Path) -> None:
    """Make ``flash_attn_interface`` importable from a folder, and the `fa3` backend selectable.

    Raises:
        ConfigError: it is not there.
    """
    import sys

    from regard.backends.external import register_installed

    place = Path(folder).resolve()
    if not (place / "flash_attn_interface.py").is_file():
        raise ConfigError("fa3-path", repr(str(folder)), "a folder with flash_attn_interface.py")
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))
    register_installed(registry, registry.list_backends())


def _implementations(options: Options, device: torch.device) -> list[Implementation]:
    found = peers.resolve(options.implementations, device.type, architecture(device))
    wanted = [options.reference] if options.reference else []
    if device.type == "cpu":  # figures of a CPU mean little without torch's beside them
        wanted += REFERENCES["cpu"]
    have = {each.name for each in found}
    return found + peers.resolve([name for name in wanted if name not in have], device.type, architecture(device))


def _path(options: Options, device: torch.device) -> Path:
    if options.out is None:
        if options.resume:
            raise ConfigError("resume", "no --out", "the file of rows to continue")
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        return FOLDER / f"{'-'.join(options.suites) or 'grid'}-{device.type}-{stamp}.jsonl"
    path = Path(options.out)
    if path.is_dir():
        raise ConfigError("out", str(path), "a file, not a folder")
    if path.exists() and not options.resume:
        raise ConfigError("out", f"{path}, which exists", "a new file, or --resume to continue this one")
    return path


class _Cells:
    """Measures workloads one by one; holds what they share."""

    def __init__(self, options: Options, device: torch.device, implementations: Sequence[Implementation]) -> None:
        self._options = options
        self._device = device
        self._implementations = implementations
        self._ceilings: dict[str, Ceilings] = {}
        facts = environment.describe(device)
        self._environment = {**facts, "commit": options.commit or facts["commit"]}

    def inapplicable(self) -> tuple[tuple[str, str], ...]:
        """Implementations of ours that do not belong on the device."""
        config = Workload().config(self._device.type, architecture(self._device))
        return tuple(
            (name, "; ".join(map(str, reasons)))
            for name in registry.list_backends()
            if (reasons := registry.reasons(name, config)) and name not in {each.name for each in self._implementations}
        )

    def common(self, suite: str, case: str, implementation: str, mode: str) -> Row:
        """The fields every row begins with."""
        now = datetime.datetime.now(datetime.timezone.utc)
        return dict(schema=SCHEMA, suite=suite, case=case, implementation=implementation, mode=mode,
                    device=self._device.type, date=now.isoformat(timespec="seconds"),
                    environment=self._environment)  # fmt: skip

    def measure(self, suite: str, workload: Workload) -> list[Row]:
        """One row for each implementation."""
        made: dict[str, Row] = {}
        prepared: dict[str, Prepared] = {}
        common = {
            each.name: self.common(suite, workload.name, each.name, workload.mode)
            | {"command": self._command(workload, each.name), "workload": asdict(workload)}
            for each in self._implementations
        }
        try:
            call = draw(workload, self._device)
            verifier = Verifier(workload, call)
            chosen = _automatic(call)
        except torch.OutOfMemoryError as error:
            return [row | {"status": "failed", "reason": _first_line(error)} for row in common.values()]
        gradient = dense_gradient(call) if workload.mode != "fwd" else None
        try:
            for each in self._implementations:
                row = made[each.name] = common[each.name] | {"chosen": chosen}
                with warnings.catch_warnings():  # torch's many words on a kernel that will not do: the row has one
                    warnings.simplefilter("ignore", UserWarning)
                    ready = self._check(each, workload, call, verifier, gradient, row)
                if ready is not None:
                    prepared[each.name] = ready
            if prepared:
                self._time(workload, call, prepared, made)
        except DeviceLost as lost:
            lost.rows = [row for row in made.values() if "status" in row]
            raise
        return list(made.values())

    def _check(
        self,
        implementation: Implementation,
        workload: Workload,
        call: Call,
        verifier: Verifier,
        gradient: torch.Tensor | None,
        row: Row,
    ) -> Prepared | None:
        """Make a call and compare its results; None, and why in the row, where it must not be timed."""
        reasons = implementation.reasons(call.config())
        if reasons:
            row |= {"status": "refused", "reason": "; ".join(map(str, reasons))}
            return None
        try:
            started = time.perf_counter()
            checked = implementation.prepare(workload.mode, call, verifier.grad_out)
            value = checked.run()
            self._synchronise()
            row["first_call_ms"] = _rounded(1e3 * (time.perf_counter() - started))
            slack = getattr(implementation, "slack", 1.0)
            comparisons = verifier.check(checked.results(value), slack)
            row["error_ratio"] = _rounded(slack * max(each.ratio for each in comparisons))
            del checked, value
            ready = implementation.prepare(workload.mode, call, gradient)
            row["peak_bytes"] = measure.peak_bytes(ready.run, self._device)
        except AssertionError as error:
            row |= {"status": "wrong", "reason": str(error)}
        except UnsupportedError as error:
            row |= {"status": "refused", "reason": _first_line(error)}
        except Exception as error:  # whatever a peer raises is its row's reason, and the others go on
            row |= {"status": "failed", "reason": f"{type(error).__name__}: {_first_line(error)}"}
            self._synchronise_after(error)
        else:
            return ready
        return None

    def _time(self, workload: Workload, call: Call, prepared: Mapping[str, Prepared], made: Mapping[str, Row]) -> None:
        runs = {name: ready.run for name, ready in prepared.items()}
        try:
            timings = measure.time_together(runs, self._device, self._options.settings)
        except Exception as error:
            for name in runs:
                made[name] |= {
                    "status": "failed",
                    "reason": f"while timed: {type(error).__name__}: {_first_line(error)}",
                }
            self._synchronise_after(error)
            return
        reference = self._reference(timings)
        ceilings = self._measured_ceilings(workload.dtype)
        small = tiny(workload, self._device) if self._device.type == "cpu" else call
        by_name = {each.name: each for each in self._implementations}
        inputs = sum(t.numel() * t.element_size() for t in call.tensors.values())
        for name, timing in timings.items():
            row = made[name]
            host = prepared[name].run if small is call else _prepare_small(by_name[name], workload.mode, small)
            row |= {"status": "ok", **_times(timing), **_rates(workload, timing.median, ceilings)}
            if reference is not None:
                ratio = measure.speedup(timings[reference], timing)
                row |= dict(zip(("speedup", "speedup_low", "speedup_high"), map(_rounded, ratio), strict=True))
                row["reference"] = reference
            row["host_us"] = _rounded(1e6 * measure.host_seconds(host, self._device, timing.median)) if host else None
            row |= {"input_bytes": inputs, "result_bytes": _result_bytes(workload, call)}

    def _reference(self, timings: Mapping[str, Timing]) -> str | None:
        names = (self._options.reference,) if self._options.reference else REFERENCES[self._device.type]
        return next((name for name in names if name in timings), None)

    def _measured_ceilings(self, dtype: str) -> Ceilings:
        if dtype not in self._ceilings:
            self._ceilings[dtype] = measure.measure_ceilings(self._device, DTYPES[dtype])
            if "sm_clock_mhz" not in self._environment:
                clock = environment.clock_under_load(self._device, self._ceilings[dtype].flops)
                self._environment |= {} if clock is None else {"sm_clock_mhz": clock}
        return self._ceilings[dtype]

    def _command(self, workload: Workload, implementation: str) -> str:
        options = self._options
        reference = options.reference or REFERENCES[self._device.type][0]
        names = dict.fromkeys([implementation, reference])
        words = ["regard", "bench", "--case", workload.name, "--implementation", ",".join(names)]
        words += ["--device", self._device.type]
        if options.settings.flush_l2:
            words.append("--flush-l2")
        if options.fa3_path is not None and "fa3" in names:
            words += ["--fa3-path", str(options.fa3_path)]
        return shlex.join(words)

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _synchronise_after(self, error: Exception) -> None:
        try:
            self._synchronise()
        except Exception as lost:
            raise DeviceLost(f"the device was lost: {_first_line(error)}") from lost


def _prepare_small(implementation: Implementation, mode: str, call: Call) -> Callable[[], Any] | None:
    """A call with next to nothing to compute, or None where the implementation does not do such calls."""
    try:
        ready = implementation.prepare(mode, call, dense_gradient(call) if mode != "fwd" else None)
        ready.run()
    except Exception:  # the cost of a call is a figure beside the others, not worth their loss
        return None
    return ready.run


def _automatic(call: Call) -> str | None:
    """The backend selection takes, whatever `use_backend` says."""
    chosen = registry.explain(call.config(), "auto").chosen
    return None if chosen is None else chosen.backend


def _times(timing: Timing) -> Row:
    low, high = timing.interval()
    return {
        "ms": _rounded(1e3 * timing.median),
        "ms_low": _rounded(1e3 * timing.quantile(LOW)),
        "ms_high": _rounded(1e3 * timing.quantile(HIGH)),
        "ms_interval": [_rounded(1e3 * low), _rounded(1e3 * high)],
        "repetitions": len(timing.samples),
        "timer": timing.timer,
    }


def _rates(workload: Workload, seconds: float, ceilings: Ceilings) -> Row:
    flops, moved = workload.flops() / seconds, workload.bytes() / seconds
    return {
        "tflops": _rounded(flops / 1e12),
        "gbs": _rounded(moved / 1e9),
        "matmul_tflops": _rounded(ceilings.flops / 1e12),
        "copy_gbs": _rounded(ceilings.bytes / 1e9),
        "matmul_share": _rounded(flops / ceilings.flops),
        "copy_share": _rounded(moved / ceilings.bytes),
        "flops": workload.flops(),
        "bytes": workload.bytes(),
    }


def _result_bytes(workload: Workload, call: Call) -> int:
    q, v = call.tensors["q"], call.tensors["v"]
    out = q.numel() // q.shape[-1] * v.shape[-1] * q.element_size()
    gradients = sum(call.tensors[name].numel() * q.element_size() for name in "qkv")
    return {"fwd": out, "bwd": gradients, "fwdbwd": out + gradients}[workload.mode]


def _rounded(value: float) -> float:
    """To five significant digits: more is noise, and rows stay readable."""
    return float(f"{value:.5g}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
