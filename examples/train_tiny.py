"""Train a small GPT on Shakespeare twice from one seed, with `regard.attention` and with eager attention.

    python examples/train_tiny.py

On a CPU in under two minutes. Prints both loss curves, checks that they are the same within the noise of training, and
writes ``reports/train_tiny.json`` and, where matplotlib is installed, ``reports/train_tiny.svg``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard

TEXT = Path(__file__).with_name("coriolanus.txt")
REPORTS = Path(__file__).parents[1] / "reports"
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Settings:
    """Of the model and its training; lengths in characters."""

    steps: int = 400
    batch: int = 32
    context: int = 64
    layers: int = 3
    width: int = 64
    heads: int = 4
    heads_kv: int = 2
    learning_rate: float = 1e-2
    seed: int = 0


def causal_regard(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The fused attention, differentiable: q (B, S, Hq, D), k and v (B, S, Hk, D)."""
    return regard.attention(q, k, v, causal=True)


def causal_eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same as most models write it without a fused kernel."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(hidden, -math.inf).softmax(dim=-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


class Block(nn.Module):
    """A transformer layer with normalisation in front and grouped-query attention."""

    def __init__(self, settings: Settings, attention: Attention) -> None:
        super().__init__()
        width, head_dim = settings.width, settings.width // settings.heads
        self.heads = (settings.heads, settings.heads_kv, settings.heads_kv)
        self.head_dim, self.attention = head_dim, attention
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, sum(self.heads) * head_dim, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, self.head_dim))
        attended = self.attention(*qkv.split(self.heads, dim=2))
        x = x + self.out(attended.flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class TinyGpt(nn.Module):
    """Characters in, logits of the next character out."""

    def __init__(self, settings: Settings, vocabulary: int, attention: Attention) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, settings.width)
        self.position = nn.Embedding(settings.context, settings.width)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(settings, attention) for _ in range(settings.layers)))
        self.norm = nn.LayerNorm(settings.width)
        self.logits = nn.Linear(settings.width, vocabulary, bias=False)

    def forward(self, characters: Tensor) -> Tensor:
        x = self.token(characters) + self.position.weight[: characters.shape[1]]
        return self.logits(self.norm(self.blocks(x)))


def train(settings: Settings, attention: Attention) -> dict[str, Any]:
    """Train from the seed: the loss of every step in nats a character, and the seconds it took."""
    text = TEXT.read_text()
    alphabet = sorted(set(text))
    data = torch.tensor([alphabet.index(character) for character in text])
    torch.manual_seed(settings.seed)
    model = TinyGpt(settings, len(alphabet), attention)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=settings.steps + 1)
    window = torch.arange(settings.context + 1)
    losses = []
    started = time.perf_counter()
    for _ in range(settings.steps):
        excerpts = data[torch.randint(len(data) - settings.context, (settings.batch, 1)) + window]
        loss = F.cross_entropy(model(excerpts[:, :-1]).flatten(0, 1), excerpts[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return dict(losses=losses, seconds=round(time.perf_counter() - started, 2))


def compare(ours: list[float], eager: list[float]) -> dict[str, float]:
    """The largest difference of two loss curves, and the noise of one: how much its loss jumps from batch to batch.

    Raises:
        AssertionError: the curves differ by more than a tenth of that noise, or training did not reduce the loss.
    """
    difference = max(abs(a - b) for a, b in zip(ours, eager, strict=True))
    noise = statistics.median(abs(after - before) for before, after in zip(eager, eager[1:], strict=False))
    assert difference <= noise / 10, f"the curves differ by {difference:.2e}; a batch changes the loss by {noise:.2e}"
    assert ours[-1] < ours[0], f"the loss went from {ours[0]:.3f} to {ours[-1]:.3f}"
    return dict(largest_difference=difference, noise=noise)


def draw(path: Path, curves: dict[str, list[float]]) -> None:
    """Both curves over each other, and their difference below."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = path.name  # the same curves make the same file
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, sharex=True, figsize=(7, 5), height_ratios=(3, 1), layout="constrained")
    for (name, losses), style in zip(curves.items(), (dict(linewidth=3, alpha=0.5), dict(linewidth=1)), strict=True):
        above.plot(losses, label=name, **style)
    above.set_ylabel("loss (nats a character)")
    above.legend()
    below.semilogy([abs(a - b) for a, b in zip(*curves.values(), strict=True)], color="black", linewidth=1)
    below.set_ylabel("|difference|")
    below.set_xlabel("training step")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train twice, compare, report. Returns what is written as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--out", type=Path, default=REPORTS, help="folder for train_tiny.json and train_tiny.svg")
    chosen = parser.parse_args(arguments)
    settings = Settings(steps=chosen.steps, seed=chosen.seed)

    runs = {}
    with regard.record_selections() as record:
        runs["regard"] = train(settings, causal_regard)
    runs["eager"] = train(settings, causal_eager)
    ours, eager = (run["losses"] for run in runs.values())
    print("step    regard    eager    difference")
    for step in sorted({*range(0, settings.steps, max(1, settings.steps // 10)), settings.steps - 1}):
        print(f"{step:4d} {ours[step]:9.5f} {eager[step]:8.5f} {abs(ours[step] - eager[step]):13.2e}")
    report = dict(
        **compare(ours, eager), backends=sorted({selection.backend for _, selection in record}),
        settings=asdict(settings), runs=runs, torch=torch.__version__, threads=torch.get_num_threads(),
        machine=platform.machine(),
    )  # fmt: skip
    print(
        f"largest difference {report['largest_difference']:.1e}, noise {report['noise']:.1e} nats; "
        f"regard ({', '.join(report['backends'])}) {runs['regard']['seconds']} s, eager {runs['eager']['seconds']} s"
    )
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "train_tiny.json").write_text(json.dumps(report, indent=1) + "\n")
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed (pip install '.[examples]')")
    else:
        draw(chosen.out / "train_tiny.svg", {"regard": ours, "eager": eager})
    return report


if __name__ == "__main__":
    main()
