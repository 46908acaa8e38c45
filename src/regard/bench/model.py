"""The ``model`` suite: time to first token and decode rate of a language model, by backend, through the worker."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from regard.bench.rows import Row
from regard.config import AttentionConfig, architecture
from regard.errors import ConfigError, UnsupportedError
from regard.registry import INAPPLICABLE, registry

if TYPE_CHECKING:
    from regard.bench.run import Options

PROMPT = "The history of computing is a story of people who wanted to be spared arithmetic. " * 12
NEW_TOKENS = 16
_RUNS = 2
TRANSFORMERS = ("eager", "sdpa")  # implementations of transformers itself, named transformers-eager, transformers-sdpa


def measure_model(options: Options, device: torch.device, common: Callable[[str, str, str, str], Row]) -> Iterator[Row]:
    """Generate greedily from one prompt with each of our backends and with transformers' own implementations.

    A row's ``ms`` is the time to first token, the better of two runs (``ms_high`` is the worse), and
    ``decode_tokens_per_second`` the best rate after it. Speed-ups are of the time to first token against
    transformers' eager attention; ``decode_speedup`` of the rate, None where the model ends after one token. Tokens
    must be those of eager attention.
    """
    from regard.worker import models
    from regard.worker.generate import tune_threads

    source = models.find(options.model)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    loaded = models.load(source, device=device, dtype=dtype)
    threads = {"threads": tune_threads(loaded)} if device.type == "cpu" else {}
    ours = loaded.model.config._attn_implementation
    case = f"model-{source.name}-{str(dtype).removeprefix('torch.')}-new{NEW_TOKENS}"
    reference: dict[str, Any] | None = None
    for name in [*(f"transformers-{each}" for each in TRANSFORMERS), *_backends(options, device)]:
        row = common("model", case, name, "model")
        row["environment"] = row["environment"] | threads
        row["command"] = f"regard bench model --model {options.model} --device {device.type}"
        try:
            with _served_by(loaded.model, name, ours):
                measured = _generate(loaded)
        except (UnsupportedError, ConfigError) as error:
            yield row | {"status": "refused", "reason": " ".join(str(error).split())}
            continue
        tokens = measured.pop("tokens")
        if reference is None:
            reference = {**measured, "tokens": tokens}
        elif tokens != reference["tokens"]:
            same = next(i for i, (a, b) in enumerate(zip(tokens, reference["tokens"], strict=False)) if a != b)
            yield row | {"status": "wrong", "reason": f"token {same + 1} differs from transformers' eager attention"}
            continue
        row |= {"status": "ok", **measured, "reference": "transformers-eager"}
        row["speedup"] = round(reference["ms"] / measured["ms"], 4)
        rate = reference["decode_tokens_per_second"]
        row["decode_speedup"] = round(measured["decode_tokens_per_second"] / rate, 4) if rate else None
        yield row


def _backends(options: Options, device: torch.device) -> list[str]:
    """Our backends to run the model with: those asked for, or all that belong on the device but the reference."""
    arch = architecture(device)
    config = AttentionConfig(1, 64, 64, 1, 1, 64, device=device.type, arch=arch)
    return [
        name
        for name in registry.list_backends()
        if (name in options.implementations if options.implementations else name != "reference")
        and not INAPPLICABLE.intersection(reason.code for reason in registry.reasons(name, config))
    ]


@contextlib.contextmanager
def _served_by(model: Any, name: str, ours: str) -> Iterator[None]:
    """Serve the model's attention by a backend of ours, or by transformers itself."""
    own = name.removeprefix("transformers-")
    if own == name:
        with registry.use_backend(name):
            yield
        return
    model.set_attn_implementation(own)
    try:
        yield
    finally:
        model.set_attn_implementation(ours)


def _generate(loaded: Any) -> dict[str, Any]:
    from regard.worker.generate import Request, generate

    request = Request(PROMPT, NEW_TOKENS, chat=False)
    runs = [generate(loaded, request, lambda _: None) for _ in range(_RUNS)]
    first = sorted(1e3 * run.time_to_first_token for run in runs)
    rates = [run.decode_rate for run in runs if run.decode_rate is not None]
    return {
        "ms": round(first[0], 4),
        "ms_low": round(first[0], 4),
        "ms_high": round(first[-1], 4),
        "repetitions": _RUNS,
        "timer": "wall",
        "decode_tokens_per_second": round(max(rates, default=0.0), 3),
        "prompt_tokens": len(runs[0].prompt_tokens),
        "peak_bytes": runs[-1].peak_memory,
        "tokens": runs[0].new_tokens,
    }
