"""Prefill and decode with a streaming callback, timed, with a record of which backend served which layer.

The loop is ours so that the figures are: transformers' cache and model are called once for the prompt and once a token,
nothing else runs between two readings of the clock.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.config import AttentionConfig
from regard.errors import ConfigError
from regard.registry import Selection, registry
from regard.worker.models import LoadedModel

_COMPARISON_CHUNK = 256  # positions whose logits two models hold at once while they are compared
_REPLACEMENT = "\ufffd"  # what a decoder shows for the first bytes of an unfinished character

Emit = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What to generate. Construction validates, so that a mistake costs no loading of a model.

    Attributes:
        prompt: what the user wrote.
        max_new_tokens: at least 1.
        chat: write the prompt as a user's turn of a conversation; None: where the model has a chat template.
        temperature: 0 takes the most likely token; else tokens are drawn from ``softmax(logits / temperature)``.
        seed: of those draws.

    Raises:
        ConfigError: an attribute is malformed.
    """

    prompt: str
    max_new_tokens: int = 64
    chat: bool | None = None
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ConfigError("prompt", repr(self.prompt), "some text to continue")
        if self.max_new_tokens < 1:
            raise ConfigError("max_new_tokens", self.max_new_tokens, "at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError("temperature", self.temperature, "a finite number of at least 0 (0 is greedy)")


@dataclass(frozen=True)
class LayerUse:
    """The backend that served the layers of one kind in one phase, and why.

    Attributes:
        phase: ``"prefill"`` or ``"decode"``.
        kind: such as ``"sliding window 512"`` or ``"full"``.
        layers: how many layers of the model are of this kind; 0 where calls could not be matched to layers.
        calls: how many attention calls this stands for.
        config: the last of them.
        selection: the backend, the sentence why, and what was passed over.
    """

    phase: str
    kind: str
    layers: int
    calls: int
    config: AttentionConfig
    selection: Selection


@dataclass(frozen=True)
class Generation:
    """What came out of one run and how long it took.

    Attributes:
        prompt_tokens, new_tokens: ids; new_tokens includes the stop token if one was drawn.
        stopped: why generation ended: ``"stop token"``, ``"max_new_tokens"`` or ``"context length"``.
        time_to_first_token: seconds from the call to the first token's text, tokenising included.
        prefill_seconds: the forward pass over the prompt and the choice of the first token.
        decode_seconds: everything from the first token to the last.
        peak_memory: bytes: of the process on a CPU, allocated by torch on a GPU; None if the system does not say.
        uses: which backend served what.
    """

    prompt_tokens: tuple[int, ...]
    new_tokens: tuple[int, ...]
    stopped: str
    time_to_first_token: float
    prefill_seconds: float
    decode_seconds: float
    peak_memory: int | None
    uses: tuple[LayerUse, ...]

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return len(self.prompt_tokens) / self.prefill_seconds

    @property
    def decode_rate(self) -> float | None:
        """Tokens a second after the first one; None if there was only that."""
        steps = len(self.new_tokens) - 1
        return steps / self.decode_seconds if steps > 0 else None


@dataclass(frozen=True)
class Comparison:
    """A generation held against the same one with another attention implementation.

    Attributes:
        implementation: the other one, such as ``"eager"``.
        differs_at: index of the first new token that it would have chosen otherwise, or None.
        chosen, expected: the two tokens there.
        largest_difference: of any logit, over every position of the prompt and of the new tokens.
        largest_logit: in magnitude, to judge the difference by.
    """

    implementation: str
    differs_at: int | None
    chosen: int | None
    expected: int | None
    largest_difference: float
    largest_logit: float


def encode(loaded: LoadedModel, request: Request) -> tuple[int, ...]:
    """Token ids of a request's prompt.

    Raises:
        ConfigError: the prompt leaves no room in the context, or a chat is asked of a model without a chat template.
    """
    tokenizer = loaded.tokenizer
    if request.chat and not loaded.has_chat_template:
        raise ConfigError("chat", f"{loaded.name}, which has no chat template", "a model tuned on conversations")
    if loaded.has_chat_template and request.chat is not False:
        turns = [{"role": "user", "content": request.prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        tokens = tokenizer(request.prompt)["input_ids"]
    if not tokens:
        raise ConfigError("prompt", f"{request.prompt!r}, which has no tokens", "some text to continue")
    limit = loaded.context_length
    if limit is not None and len(tokens) >= limit:
        raise ConfigError("prompt", f"{len(tokens)} tokens", f"fewer than {limit}, the context length of {loaded.name}")
    return tuple(tokens)


@torch.inference_mode()
def tune_threads(loaded: LoadedModel) -> int:
    """Set torch to the number of CPU threads that decodes fastest here and now, found by timing single steps.

    One token's work is reading the weights once, which a few threads may do as fast as many; where other programs use
    the cores, waiting for the slowest thread can make two many times slower than one.
    """
    limit = torch.get_num_threads()
    best, fastest = 1, float("inf")
    threads = 1
    while threads <= limit:
        torch.set_num_threads(threads)
        seconds = min(_seconds_per_step(loaded.model) for _ in range(3))
        if seconds > 0.95 * fastest:
            break
        best, fastest = threads, seconds
        threads = limit if threads < limit < 2 * threads else 2 * threads
    torch.set_num_threads(best)
    return best


def _seconds_per_step(model: Any) -> float:
    started = time.perf_counter()
    model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    return time.perf_counter() - started


@torch.inference_mode()
def generate(loaded: LoadedModel, request: Request, emit: Emit) -> Generation:
    """Continue a prompt, handing each piece of text to ``emit`` as it comes.

    Raises:
        ConfigError: see `encode`.
        UnsupportedError: a backend chosen by name cannot serve the model.
    """
    model = loaded.model
    device = model.device
    _reset_peak_memory(device)
    started = time.perf_counter()
    prompt_tokens = encode(loaded, request)
    choose = _chooser(request, device)
    detokenizer = _Detokenizer(loaded.tokenizer, prompt_tokens)
    log = _SelectionLog(model)
    room = request.max_new_tokens
    if loaded.context_length is not None:
        room = min(room, loaded.context_length - len(prompt_tokens))

    prefill_started = time.perf_counter()
    with log.phase("prefill"):
        output = model(input_ids=torch.tensor([prompt_tokens], device=device), use_cache=True, logits_to_keep=1)
    token = choose(output.logits[0, -1])
    prefill_ended = time.perf_counter()
    new_tokens = [token]
    emit(detokenizer.push(token))
    first_token = time.perf_counter()
    while len(new_tokens) < room and token not in loaded.stop_tokens:
        with log.phase("decode"):
            output = model(
                input_ids=torch.tensor([[token]], device=device),
                past_key_values=output.past_key_values,
                use_cache=True,
                logits_to_keep=1,
            )
        token = choose(output.logits[0, -1])
        new_tokens.append(token)
        emit(detokenizer.push(token))
    ended = time.perf_counter()
    emit(detokenizer.rest())
    stopped = "max_new_tokens" if room == request.max_new_tokens else "context length"
    return Generation(
        prompt_tokens,
        tuple(new_tokens),
        "stop token" if token in loaded.stop_tokens else stopped,
        time_to_first_token=first_token - started,
        prefill_seconds=prefill_ended - prefill_started,
        decode_seconds=ended - first_token,
        peak_memory=_peak_memory(device),
        uses=log.uses(),
    )


@torch.inference_mode()
def compare(loaded: LoadedModel, generation: Generation, implementation: str = "eager") -> Comparison:
    """Hold a greedy generation against another attention implementation of transformers, with the same weights.

    Both go through the prompt and then, step by step with their own caches, through the tokens that were generated; at
    every step the other's most likely token must be the one that was generated. That is the case for all of them if
    and only if the other would have generated the same text.
    """
    model = loaded.model
    ours = model.config._attn_implementation
    chunks = [*_chunks(generation.prompt_tokens), *((token,) for token in generation.new_tokens[:-1])]
    first_choice = len(generation.prompt_tokens) - 1  # the position whose logits chose the first new token
    caches: dict[str, Any] = {ours: None, implementation: None}
    position, differs_at, expected = 0, None, None
    largest_difference = largest_logit = 0.0
    try:
        for chunk in chunks:
            logits = {}
            for name in caches:
                model.set_attn_implementation(name)
                output = model(
                    input_ids=torch.tensor([chunk], device=model.device), past_key_values=caches[name], use_cache=True
                )
                caches[name], logits[name] = output.past_key_values, output.logits[0].float()
            largest_difference = max(largest_difference, float((logits[ours] - logits[implementation]).abs().amax()))
            largest_logit = max(largest_logit, float(logits[implementation].abs().amax()))
            position += len(chunk)
            step = position - 1 - first_choice
            if step >= 0 and differs_at is None:
                choice = int(logits[implementation][-1].argmax())
                if choice != generation.new_tokens[step]:
                    differs_at, expected = step, choice
    finally:
        model.set_attn_implementation(ours)
    chosen = None if differs_at is None else generation.new_tokens[differs_at]
    return Comparison(implementation, differs_at, chosen, expected, largest_difference, largest_logit)


def _chunks(tokens: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(tokens[at : at + _COMPARISON_CHUNK]) for at in range(0, len(tokens), _COMPARISON_CHUNK)]


def _chooser(request: Request, device: torch.device) -> Callable[[Tensor], int]:
    """How a token is chosen from logits (vocabulary,)."""
    if request.temperature == 0:
        return lambda logits: int(logits.argmax())
    generator = torch.Generator(device).manual_seed(request.seed)

    def draw(logits: Tensor) -> int:
        probabilities = torch.softmax(logits.float() / request.temperature, -1)
        return int(torch.multinomial(probabilities, 1, generator=generator))

    return draw


class _Detokenizer:
    """The text of a growing list of tokens, piece by piece.

    Decoding a token alone loses the space before it and splits characters of several tokens, so each piece is the
    difference between two decodings that share a few tokens of context.
    """

    _CONTEXT = 5

    def __init__(self, tokenizer: Any, prompt_tokens: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt_tokens[-self._CONTEXT :])
        self._start, self._read = 0, len(self._tokens)

    def push(self, token: int) -> str:
        """Add a token; return the text that is now certain."""
        self._tokens.append(token)
        text = self._pending()
        if text.endswith(_REPLACEMENT):
            return ""
        self._read = len(self._tokens)
        self._start = max(0, self._read - self._CONTEXT)
        return text

    def rest(self) -> str:
        """The text of tokens that were held back and never completed."""
        return self._pending()

    def _pending(self) -> str:
        shown, everything = (
            self._tokenizer.decode(self._tokens[self._start : end], skip_special_tokens=True)
            for end in (self._read, len(self._tokens))
        )
        return str(everything[len(shown) :])


class _SelectionLog:
    """Collects, for each phase and kind of layer, which backend served it."""

    def __init__(self, model: Any) -> None:
        self._kinds = [_layer_kind(module) for module in model.modules() if _is_attention(module)]
        self._found: dict[tuple[str, str, str, str], tuple[int, AttentionConfig, Selection]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record one forward pass of the model."""
        with registry.record_selections() as recorded:
            yield
        matched = len(recorded) == len(self._kinds)
        for index, (config, selection) in enumerate(recorded):
            kind = self._kinds[index] if matched else _call_kind(config)
            key = (name, kind, selection.backend, selection.why)
            calls = self._found[key][0] if key in self._found else 0
            self._found[key] = (calls + 1, config, selection)

    def uses(self) -> tuple[LayerUse, ...]:
        return tuple(
            LayerUse(phase, kind, self._kinds.count(kind), calls, config, selection)
            for (phase, kind, _, _), (calls, config, selection) in self._found.items()
        )


def _is_attention(module: Any) -> bool:
    return hasattr(module, "is_causal") and hasattr(module, "layer_idx")


def _layer_kind(module: Any) -> str:
    """What a layer was built as; a short prompt's call does not show a window that it does not fill."""
    window = getattr(module, "sliding_window", None)
    reach = f"sliding window={window}" if window else "full"
    return f"{reach}, causal" if module.is_causal else reach


def _call_kind(config: AttentionConfig) -> str:
    return ", ".join(config.features()) or "full"


def _reset_peak_memory(device: torch.device) -> None:
    """Start counting anew, so that converting or loading a model does not count as generating."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
        except OSError:
            return


def _peak_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return None
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
