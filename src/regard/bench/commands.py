"""``regard bench``, ``regard report``, ``regard profile``: arguments to options, and what is printed."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regard.errors import ConfigError

if TYPE_CHECKING:
    from regard.bench.run import Outcome

_GRID = "Grid"
_RUN = "Run"
_RESULTS = "Results"

_INSTALL = "pip install 'regard[bench]'"

CaseList = Annotated[
    list[str] | None, typer.Option("--case", help="A single workload by name, as rows give it; repeatable.")
]


def _numbers(help_text: str) -> Any:
    return typer.Option(help=f"{help_text}; several with commas.", rich_help_panel=_GRID, show_default=False)


def bench(
    suites: Annotated[
        list[str] | None, typer.Argument(help="quick, seeds, fa3, decode, ...; --list says what each measures.")
    ] = None,
    case: CaseList = None,
    list_suites: Annotated[bool, typer.Option("--list", help="List the suites and the implementations here.")] = False,
    mode: Annotated[str | None, _numbers("fwd, bwd or fwdbwd; replaces a suite's own")] = None,
    dtype: Annotated[str | None, _numbers("bf16, fp16 or fp32; replaces a suite's own")] = None,
    batch: Annotated[str | None, _numbers("B")] = None,
    seqlen: Annotated[str | None, _numbers("Sq and Sk")] = None,
    seqlen_q: Annotated[str | None, _numbers("Sq")] = None,
    seqlen_k: Annotated[str | None, _numbers("Sk")] = None,
    heads: Annotated[str | None, _numbers("Hq")] = None,
    heads_kv: Annotated[str | None, _numbers("Hk")] = None,
    head_dim: Annotated[str | None, _numbers("D")] = None,
    causal: Annotated[str | None, _numbers("yes, no or both")] = None,
    window: Annotated[str | None, _numbers("LEFT:RIGHT, or none for no window")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda.", show_default="cuda if there", rich_help_panel=_RUN)
    ] = None,
    implementation: Annotated[
        list[str] | None,
        typer.Option(
            "--implementation",
            "-i",
            show_default="all but reference and flex",
            rich_help_panel=_RUN,
            help="Backends and peers to measure; repeatable, or with commas.",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="What speed-ups are relative to.",
            show_default="torch-sdpa, or torch-flash on a GPU",
            rich_help_panel=_RUN,
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Most seconds of timing for one implementation of a workload.",
            show_default="1 on a GPU, 0.25 on a CPU",
            rich_help_panel=_RUN,
        ),
    ] = None,
    precision: Annotated[
        float, typer.Option(min=0, help="Stop earlier once medians are known this well (95 %).", rich_help_panel=_RUN)
    ] = 0.01,
    timer: Annotated[str, typer.Option(help="On a GPU: auto or events.", rich_help_panel=_RUN)] = "auto",
    flush_l2: Annotated[
        bool, typer.Option("--flush-l2", help="Empty the GPU's cache before each call.", rich_help_panel=_RUN)
    ] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads.", show_default="torch's", rich_help_panel=_RUN)
    ] = None,
    fa3_path: Annotated[
        Path | None, typer.Option(help="A folder with flash_attn_interface.py.", rich_help_panel=_RUN)
    ] = None,
    model: Annotated[
        str, typer.Option(help="Of the model suite, as for generate.", rich_help_panel=_RUN)
    ] = "gemma3-270m",
    commit: Annotated[str | None, typer.Option(help="To record where git cannot tell.", rich_help_panel=_RUN)] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File of rows, JSON lines.", show_default="a new one in .benchmarks", rich_help_panel=_RESULTS
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue --out: measure only what it lacks.", rich_help_panel=_RESULTS)
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option("--report", help="HTML report.", show_default="beside the rows", rich_help_panel=_RESULTS),
    ] = None,
    save: Annotated[
        str | None, typer.Option(help="Keep the rows as a baseline of this name.", rich_help_panel=_RESULTS)
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help="Compare with the baseline of this name.", rich_help_panel=_RESULTS)
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=0, help="Changes up to this many % are noise.", rich_help_panel=_RESULTS)
    ] = 3.0,
    fail_on_regression: Annotated[
        bool, typer.Option("--fail-on-regression", help="Exit code 1 if a case got slower.", rich_help_panel=_RESULTS)
    ] = False,
) -> None:
    """Measure attention: every result is checked before it is timed, implementations take turns."""
    from regard.cli import one_line_errors

    with one_line_errors():
        if list_suites:
            _list(device)
            return
        from regard.bench import baselines
        from regard.bench.measure import Settings
        from regard.bench.progress import shown
        from regard.bench.run import Options, run

        if timer not in ("auto", "events"):
            raise ConfigError("timer", repr(timer), "auto or events")
        if fail_on_regression and compare is None:
            raise ConfigError("fail-on-regression", "no --compare", "the baseline to compare with")
        before = None if compare is None else baselines.load(compare)
        if save is not None:
            baselines.check_name(save)
        _check_place("report", html)
        _check_place("out", out)
        _set_threads(threads)
        filters = _filters(
            mode=mode, dtype=dtype, batch=batch, seqlen=seqlen, seqlen_q=seqlen_q, seqlen_k=seqlen_k, heads_q=heads,
            heads_kv=heads_kv, head_dim=head_dim, causal=causal, window=window,
        )  # fmt: skip
        options = Options(
            suites=suites or (), cases=case or (), filters=filters, device=_device_type(device),
            implementations=_split(implementation), out=out, resume=resume, reference=reference, fa3_path=fa3_path,
            commit=commit, model=model,
            settings=Settings(seconds=seconds, precision=precision, flush_l2=flush_l2, timer=timer),
        )  # fmt: skip
        with shown() as listener:
            outcome = run(options, listener)
        regressed = _finish(outcome, html, save, before, threshold)
        if outcome.interrupted:
            raise typer.Exit(130)
        if regressed and fail_on_regression:
            raise typer.Exit(1)


def report(
    rows_files: Annotated[list[Path], typer.Argument(help="Files that regard bench wrote.", metavar="ROWS...")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file.")] = Path("report.html"),
    plots: Annotated[Path | None, typer.Option(help="Also write each plot as an SVG file into this folder.")] = None,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "regard benchmarks",
) -> None:
    """Make one self-contained HTML page of benchmark rows."""
    from regard.cli import one_line_errors

    with one_line_errors():
        from regard.bench import rows, summary
        from regard.bench.report import missing_packages, write_report

        if missing := missing_packages():
            raise ConfigError("report", f"no {' and '.join(missing)}", _INSTALL)
        _check_place("out", out)
        _check_place("plots", plots, folder=True)
        found, corrupt = rows.read_all(rows_files)
        _say_corrupt(corrupt)
        if not found:
            raise ConfigError("rows", ", ".join(map(str, rows_files)), "at least one row that regard bench wrote")
        write_report(found, out, plots=plots, title=title)
        for sentence in summary.sentences(found):
            typer.echo(sentence)
        typer.echo(f"wrote {out}" + (f" and plots to {plots}" if plots else ""))


def profile(
    case: Annotated[str, typer.Argument(help="A workload by name, such as b1-s4096-h16-d128-bf16-causal.")],
    arch: Annotated[
        str | None, typer.Option(help="sm90, gfx1100, ...; need not be in this machine.", show_default="this GPU's")
    ] = None,
    rows_file: Annotated[
        Path | None, typer.Option("--rows", help="Take the times from these rows instead of a run here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """What a workload's kernels ask of a GPU, and where there is a run what bounds its time."""
    from regard.cli import one_line_errors

    with one_line_errors():
        import json

        import torch

        from regard.bench.cases import parse
        from regard.bench.profile import bound, facts, profile_kernels
        from regard.cli import device_of
        from regard.config import architecture

        workload = parse(case)
        here = architecture(device_of(None))
        if arch is None and here == "cpu":
            raise ConfigError(
                "arch", "none, and no GPU here", "the architecture to compile for, such as sm90 or gfx1100"
            )
        kernels = profile_kernels(workload, arch or here)
        can_run = torch.cuda.is_available() and (arch or here) == here
        names = tuple(dict.fromkeys(kernel.backend for kernel in kernels)) if can_run else ()
        measured = _rows_of(case, arch or here, rows_file, names)
        known = facts(workload, arch or here, kernels)
        if as_json:
            typer.echo(json.dumps({**known, "rows": measured}, indent=2))
            return
        _print_profile(known)
        for row in measured:
            for sentence in bound(row, kernels):
                typer.echo(sentence)
        if not measured:
            typer.echo("no run: times need this GPU in the machine, or --rows of a run on one")


def _rows_of(case: str, arch: str, rows_file: Path | None, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of a case on an architecture: from a file, or of these implementations, measured here and now."""
    import tempfile

    from regard.bench import rows
    from regard.bench.run import Options, run

    if rows_file is not None:
        found, corrupt = rows.read(rows_file)
        _say_corrupt(corrupt)
    elif names:
        with tempfile.TemporaryDirectory() as folder:
            options = Options(cases=(case,), device="cuda", implementations=names, out=Path(folder, "rows.jsonl"))
            found = list(run(options).rows)
    else:
        return []
    timed = [row for row in found if row["status"] == "ok" and row["environment"].get("arch") == arch]
    return [row for row in timed if row["case"] == case]


def _print_profile(known: dict[str, Any]) -> None:
    from rich.console import Console

    from regard.cli import table

    console = Console()
    typer.echo(
        f"{known['case']} on {known['arch']}: {known['flops']:.4g} operations, at least {known['bytes']:.4g} bytes, "
        f"{known['intensity']:.4g} operations a byte"
    )
    kernels = known["kernels"]
    launched = ["backend", "kernel", "tile", "warps", "stages", "programs", "matrix"]
    console.print(table(launched, ([str(each[name] or "none") for name in launched] for each in kernels)))
    # A second table: one of all columns would not fit 80 characters.
    taken = ["kernel", "registers", "spilled", "shared", "occupancy"]
    lines = [
        (
            each["kernel"], str(each["registers"]), f"{each['spills']} B", f"{each['shared'] / 1024:.1f} KiB",
            f"{each['occupancy']:.0%} ({each['resident']} at once, {each['limited_by']})",
        )
        for each in kernels
    ]  # fmt: skip
    console.print(table(taken, lines))


def _finish(outcome: Outcome, html: Path | None, save: str | None, before: Any, threshold: float) -> bool:
    """Print and write what a run came to; whether something got slower than the baseline."""
    from regard.bench import baselines, summary

    _say_corrupt(outcome.corrupt)
    if outcome.interrupted:
        typer.echo(
            f"{outcome.interrupted}: what was measured is kept, --resume --out {outcome.path} continues", err=True
        )
    if not outcome.rows:
        return False
    typer.echo(summary.text(outcome.rows))
    for name, reason in outcome.skipped:
        typer.echo(f"left out: {name}: {reason}")
    regressed = False
    if before is not None:
        changes = baselines.compare(before, outcome.rows, threshold)
        typer.echo("\n" + baselines.describe(changes))
        for sentence in baselines.differences(before, outcome.rows):
            typer.echo(f"  mind that other things changed too: {sentence}")
        regressed = any(change.verdict == "regressed" for change in changes)
    if save is not None:
        typer.echo(f"saved the baseline {baselines.save(save, outcome.rows)}")
    typer.echo(f"rows: {outcome.path}")
    _write_html(outcome, html)
    return regressed


def _write_html(outcome: Outcome, html: Path | None) -> None:
    from regard.bench.report import missing_packages, write_report

    missing = missing_packages()
    if missing:
        if html is not None:
            raise ConfigError("report", f"no {' and '.join(missing)}", f"{_INSTALL}; the rows are kept")
        typer.echo(f"no HTML report without {' and '.join(missing)}: regard report {outcome.path}, where they are")
        return
    place = html or outcome.path.with_suffix(".html")
    write_report(outcome.rows, place)
    typer.echo(f"report: {place}")


def _list(device: str | None) -> None:
    import torch

    from regard.bench.cases import MODEL_PURPOSE, MODEL_SUITE, SUITES
    from regard.bench.peers import available
    from regard.config import architecture

    kind = torch.device(_device_type(device) or ("cuda" if torch.cuda.is_available() else "cpu"))
    for name, suite in SUITES.items():
        typer.echo(f"{name:<8} {len(list(suite.workloads(kind.type))):>4} cases  {suite.purpose}")
    typer.echo(f"{MODEL_SUITE:<8}    1 case   {MODEL_PURPOSE}")
    typer.echo(f"implementations on {kind}: {', '.join(available(kind.type, architecture(kind)))}")


def _device_type(name: str | None) -> str | None:
    """Check the device and say its type."""
    from regard.cli import device_of

    return None if name is None else device_of(name).type


def _set_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def _filters(**given: str | None) -> dict[str, Sequence[Any]]:
    """Values by field of `Workload`, from comma-separated text."""
    parsers: dict[str, Callable[[str], Any]] = {"mode": str, "dtype": _dtype, "causal": _yes_or_no, "window": _window}
    found: dict[str, Sequence[Any]] = {}
    for name, text in given.items():
        if text is not None:
            parse = parsers.get(name, functools.partial(_size, name))
            found[name] = tuple(dict.fromkeys(parse(word.strip()) for word in text.split(",")))
    if given.get("causal") == "both":
        found["causal"] = (False, True)
    return found


def _size(name: str, word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise ConfigError(name.replace("_", "-"), repr(word), "whole numbers of at least 1, with commas: 512,1024")
    return int(word)


def _dtype(word: str) -> str:
    names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    return names.get(word, word)


def _yes_or_no(word: str) -> bool:
    if word not in ("yes", "no", "both"):
        raise ConfigError("causal", repr(word), "yes, no or both")
    return word == "yes"


def _window(word: str) -> tuple[int | None, int | None] | None:
    sides = word.split(":")
    if word == "none":
        return None
    if len(sides) != 2 or not all(side == "none" or side.isdecimal() for side in sides):
        raise ConfigError("window", repr(word), "LEFT:RIGHT, each a number or none, or none alone: 1024:0")
    left, right = (None if side == "none" else int(side) for side in sides)
    return left, right


def _split(names: Sequence[str] | None) -> list[str] | None:
    found = [name.strip() for given in names or () for name in given.split(",") if name.strip()]
    return found or None


def _check_place(argument: str, path: Path | None, *, folder: bool = False) -> None:
    """Raise a `ConfigError` unless this file, or folder, can be written."""
    if path is None:
        return
    nearest = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    if nearest.is_dir() != (folder or nearest != path.absolute()) or not os.access(nearest, os.W_OK):
        raise ConfigError(argument, str(path), f"a {'folder' if folder else 'file'} that can be written")


def _say_corrupt(corrupt: int) -> None:
    if corrupt:
        typer.echo(f"skipped {corrupt} {'line that is' if corrupt == 1 else 'lines that are'} not a row", err=True)
