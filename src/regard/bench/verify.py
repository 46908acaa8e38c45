"""Correctness before timing: a sample of every result is held against float64 under the rule of `regard.testing`.

Checking all of a large call would cost more than timing it. The sample is exact all the same: some rows of a few heads
are recomputed over all of their keys. Gradients are sampled by an output gradient that is zero but on those rows, so
that the gradients of all keys and values of those heads depend on nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.bench.cases import Workload
from regard.bench.inputs import sequence, visible
from regard.config import AttentionConfig
from regard.testing import Call, Comparison, assert_close, plain_attention
from regard.testing.tolerance import FORWARD_FACTOR, GRADIENT_FACTOR

SCORES = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Scores (rows x keys x heads) recomputed for a call, by device type."""


@dataclass(frozen=True)
class Part:
    """Rows of one sequence and the query heads of one key/value head.

    Attributes:
        rows: positions in the sequence, ascending.
        where: positions of these rows among all rows of out, seen as (total rows, Hq, Dv).
        heads: of q and out.
        kv_head: of k and v.
        call: the same rows as a call of its own, what they may see being spelt out as a mask.
    """

    index: int
    rows: Tensor
    where: Tensor
    heads: slice
    kv_head: int
    call: Call


class Verifier:
    """What a workload's results are compared with; computed once for all implementations.

    Attributes:
        grad_out: the gradient of out to ask for gradients with, zero but on the sampled rows; None in forward mode.
    """

    def __init__(self, workload: Workload, call: Call) -> None:
        self.call = call
        self.config = call.config()
        self.parts = _sample(call, self.config)
        self.grad_out: Tensor | None = None
        if workload.mode != "fwd":
            self.grad_out = self._sparse_gradient()
        self._expected = [self._recompute(part) for part in self.parts]

    def check(self, results: dict[str, Tensor], slack: float = 1.0) -> list[Comparison]:
        """Compare out and, where given, the gradients of q, k and v.

        Args:
            results: by name: out, dq, dk, dv.
            slack: how many times the rule's bound is allowed: 1 for everything but `regard.bench.peers.Eager`.

        Raises:
            AssertionError: the rule is broken; the message names the tensor and the worst element.
        """
        found = []
        for part, expected in zip(self.parts, self._expected, strict=True):
            for name, (truth, plain) in expected.items():
                if name in results:
                    actual = self._sampled(name, results[name], part)
                    factor = slack * (FORWARD_FACTOR if name == "out" else GRADIENT_FACTOR)
                    found.append(assert_close(actual, truth, plain, name=name, factor=factor))
        return found

    def _sampled(self, name: str, result: Tensor, part: Part) -> Tensor:
        """The part of out (B, Sq, Hq, Dv), or of a gradient, that the part's own call computes."""
        if name in ("out", "dq"):
            return result.reshape(-1, *result.shape[-2:])[part.where, part.heads][None]
        alone = Call({**self.call.tensors, "k": result, "v": result}, self.call.options, 0)
        _, d_k, d_v, _ = sequence(alone, self.config, part.index)
        keys = d_k if name == "dk" else d_v
        return keys[:, part.kv_head][None, :, None]

    def _sparse_gradient(self) -> Tensor:
        q, v = self.call.tensors["q"], self.call.tensors["v"]
        gradient = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
        rows = gradient.view(-1, *gradient.shape[-2:])
        generator = torch.Generator(q.device).manual_seed(1)
        for part in self.parts:
            shape = rows[part.where, part.heads].shape
            rows[part.where, part.heads] = torch.randn(shape, generator=generator, device=q.device, dtype=q.dtype)
        return gradient

    def _recompute(self, part: Part) -> dict[str, tuple[Tensor, Tensor]]:
        """(truth, torch's own in the same dtype) of every tensor that can be compared."""
        if self.grad_out is None:
            truth = part.call.in_float64()("reference")
            return {"out": (truth, plain_attention(part.call)[0])}
        rows = self.grad_out.view(-1, *self.grad_out.shape[-2:])
        seed = rows[part.where, part.heads][None]
        exact, plain = part.call.in_float64().with_leaves(), part.call.with_leaves()
        outs = exact("reference"), plain_attention(plain)[0]
        gradients = [
            torch.autograd.grad(out, [call.tensors[name] for name in "qkv"], seed.to(out.dtype))
            for out, call in zip(outs, (exact, plain), strict=True)
        ]
        pairs = {f"d{name}": pair for name, pair in zip("qkv", zip(*gradients, strict=True), strict=True)}
        return {"out": (outs[0].detach(), outs[1].detach()), **pairs}


def _sample(call: Call, config: AttentionConfig) -> list[Part]:
    """The first and the last sequence and head, with as many rows, evenly spread, as the budget allows."""
    budget = SCORES["cpu" if config.device == "cpu" else "cuda"]
    places = sorted({(0, 0), (config.batch - 1, config.heads_kv - 1)})
    return [_part(call, config, index, head, budget // len(places)) for index, head in places]


def _part(call: Call, config: AttentionConfig, index: int, kv_head: int, budget: int) -> Part:
    q, k, v, where = sequence(call, config, index)
    queries, keys = q.shape[0], k.shape[0]
    group = config.heads_q // config.heads_kv
    count = max(1, min(queries, budget // max(1, keys * group)))
    rows = torch.arange(count, device=q.device) * (queries - 1) // max(1, count - 1)
    if count == 1:
        rows = torch.tensor([queries - 1], device=q.device)
    heads = slice(kv_head * group, (kv_head + 1) * group)
    tensors = {"q": q[rows, heads][None], "k": k[None, :, kv_head, None], "v": v[None, :, kv_head, None]}
    seen = visible(config, rows, keys, queries)
    if "mask" in call.tensors:
        own = _own(call.tensors["mask"], index, heads, rows)
        seen = own if seen is None else own & seen
    if seen is not None:
        tensors["mask"] = seen
    added: Tensor | None = None
    if "bias" in call.tensors:
        added = _own(call.tensors["bias"], index, heads, rows)
    if "alibi_slopes" in call.tensors:
        slopes = call.tensors["alibi_slopes"].expand(config.batch, -1)[index, heads]
        distance = torch.arange(keys, device=q.device) - (rows[:, None] + keys - queries)
        alibi = -slopes[:, None, None] * distance.abs()
        added = alibi[None] if added is None else added.float() + alibi
    if added is not None:
        tensors["bias"] = added
    if "sinks" in call.tensors:
        tensors["sinks"] = call.tensors["sinks"][heads]
    options = {"softcap": call.options["softcap"]}
    detached = {name: tensor.detach() for name, tensor in tensors.items()}
    return Part(index, rows, rows + where.start, heads, kv_head, Call(detached, options, 0))


def _own(tensor: Tensor, index: int, heads: slice, rows: Tensor) -> Tensor:
    """A mask's or bias's part for one sequence, some heads and rows, as (1, H or 1, rows or 1, Sk or 1)."""
    batch, head, query, _ = tensor.shape
    tensor = tensor[index : index + 1] if batch > 1 else tensor
    tensor = tensor[:, heads] if head > 1 else tensor
    return tensor[:, :, rows] if query > 1 else tensor
