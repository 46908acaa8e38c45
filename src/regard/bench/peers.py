"""The implementations a workload is measured with, all behind one interface.

Ours are called as a user calls them, through the public functions. Eager attention and torch's kernels are written here
as their users write them. Peers from other packages are called by their adapter in `regard.backends.external` without
our validation and selection in between, so that none of our overhead counts against them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from regard import api
from regard.backends.external import ADAPTERS, ExternalBackend
from regard.bench.inputs import canonical_inputs, sequence, visible
from regard.config import DIFFERENTIABLE_INPUTS, AttentionConfig
from regard.errors import ConfigError, Reason, UnsupportedError
from regard.registry import INAPPLICABLE, registry
from regard.testing import Call

Results = dict[str, Tensor]
"""out (B, Sq, Hq, Dv) or packed (total, Hq, Dv); dq, dk, dv and dbias in backward modes."""


@dataclass(frozen=True)
class Prepared:
    """A call ready to be timed: ``run`` makes it, ``results`` names what it returned."""

    run: Callable[[], Any]
    results: Callable[[Any], Results]


class Implementation(Protocol):
    """What is measured."""

    @property
    def name(self) -> str:
        """As in rows and on the command line."""

    def reasons(self, config: AttentionConfig) -> Sequence[Reason]:
        """Every reason against a call; empty if it can be measured."""

    def prepare(self, mode: str, call: Call, grad_out: Tensor | None) -> Prepared:
        """Make everything that is not part of the call itself: masks, plans, the forward of a backward."""


@dataclass(frozen=True)
class OurBackend:
    """A registered backend, called through `regard.attention` and its siblings."""

    name: str

    def reasons(self, config: AttentionConfig) -> Sequence[Reason]:
        return registry.reasons(self.name, config)

    def prepare(self, mode: str, call: Call, grad_out: Tensor | None) -> Prepared:
        tensors = dict(call.tensors)
        q, k, v = tensors.pop("q"), tensors.pop("k"), tensors.pop("v")
        function: Callable[..., Any] = api.attention
        if "cu_seqlens_q" in tensors:
            function = api.varlen_attention
        elif "block_table" in tensors:
            function = api.paged_attention
        arguments = {**tensors, **call.options, "backend": self.name}
        return differentiated(mode, call, grad_out, lambda: function(q, k, v, **arguments))


@dataclass(frozen=True)
class TorchKernel:
    """`torch.nn.functional.scaled_dot_product_attention`, held to one of its kernels or left to choose.

    What it has no argument for is given as a mask or bias made beforehand; packed sequences are a call each.
    """

    name: str
    kernel: SDPBackend | None = None

    def reasons(self, config: AttentionConfig) -> Sequence[Reason]:
        found = [
            Reason(code, observed, "a call without it", "torch has no such argument")
            for used, code, observed in (
                (config.softcap > 0, "softcap", f"softcap={config.softcap:g}"),
                (config.sinks, "sinks", "attention sinks"),
                (config.page_size is not None, "paged", "a paged KV cache"),
            )
            if used
        ]
        if self.kernel is not None and config.device != "cuda":
            found.append(Reason("device", config.device, "cuda"))
        if self.kernel is SDPBackend.FLASH_ATTENTION and _needs_mask(config):
            found.append(Reason("mask", "a call that needs an explicit mask or bias", "plain or square causal calls"))
        return found

    def prepare(self, mode: str, call: Call, grad_out: Tensor | None) -> Prepared:
        config = call.config()
        if config.varlen:
            return differentiated(mode, call, grad_out, self._packed(call, config))
        q, k, v = (call.tensors[name].transpose(1, 2) for name in "qkv")
        arguments = self._arguments(config, call)

        def forward() -> Tensor:
            with self._held():
                return F.scaled_dot_product_attention(q, k, v, **arguments).transpose(1, 2)

        return differentiated(mode, call, grad_out, forward)

    def _packed(self, call: Call, config: AttentionConfig) -> Callable[[], Tensor]:
        sequences: list[tuple[Tensor, Tensor, Tensor, dict[str, Any]]] = []
        for index in range(config.batch):
            q, k, v, _ = sequence(call, config, index)
            rows = torch.arange(q.shape[0], device=q.device)
            plain = q.shape[0] == k.shape[0] and config.window is None
            mask = None if plain else visible(config, rows, k.shape[0], q.shape[0])
            arguments: dict[str, Any] = dict(
                attn_mask=mask, is_causal=config.causal and plain, scale=config.softmax_scale,
                enable_gqa=config.heads_q != config.heads_kv,
            )  # fmt: skip
            q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
            sequences.append((q, k, v, arguments))

        def forward() -> Tensor:
            with self._held():
                outs = [F.scaled_dot_product_attention(q, k, v, **arguments) for q, k, v, arguments in sequences]
            return torch.cat([out[0].transpose(0, 1) for out in outs])

        return forward

    def _arguments(self, config: AttentionConfig, call: Call) -> dict[str, Any]:
        common = dict(scale=config.softmax_scale, enable_gqa=config.heads_q != config.heads_kv)
        if not _needs_mask(config):
            return dict(is_causal=config.causal and config.seqlen_q > 1, **common)
        added = added_scores(config, call, call.tensors["q"].dtype)
        if added is not None and self.kernel is not None:  # the GPU's kernels take no mask that is left to broadcast
            added = added.expand(config.batch, config.heads_q, config.seqlen_q, config.seqlen_k)
        return dict(attn_mask=added, **common)

    @contextmanager
    def _held(self) -> Iterator[None]:
        if self.kernel is None:
            yield
            return
        try:
            with sdpa_kernel([self.kernel]):
                yield
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
            reason = Reason("kernel", "a call that torch refuses", f"one that its {self.kernel.name} kernel takes")
            raise UnsupportedError(f"{self.name}: {reason}", {self.name: [reason]}) from None


@dataclass(frozen=True)
class Eager:
    """Attention as models write it without a fused kernel: the scores are materialised in the inputs' dtype.

    That rounds them, which the tolerance rule does not allow a backend; ``slack`` lets it be timed all the same.
    """

    name: str = "eager"
    slack: float = 4.0

    def reasons(self, config: AttentionConfig) -> Sequence[Reason]:
        unusual = (
            (config.varlen, "varlen", "packed sequences"),
            (config.page_size is not None, "paged", "a paged KV cache"),
            (config.sinks, "sinks", "attention sinks"),
        )
        return [Reason(code, observed, "padded, contiguous calls") for used, code, observed in unusual if used]

    def prepare(self, mode: str, call: Call, grad_out: Tensor | None) -> Prepared:
        config = call.config()
        q, k, v = (call.tensors[name].transpose(1, 2) for name in "qkv")
        group = config.heads_q // config.heads_kv
        added = added_scores(config, call, q.dtype)
        if added is not None and added.dtype == torch.bool:
            added = torch.zeros(added.shape, dtype=q.dtype, device=q.device).masked_fill(~added, float("-inf"))

        def forward() -> Tensor:
            keys, values = (t.repeat_interleave(group, 1) if group > 1 else t for t in (k, v))
            scores = q @ keys.transpose(-1, -2) * config.softmax_scale
            if config.softcap > 0:
                scores = config.softcap * torch.tanh(scores / config.softcap)
            if added is not None:
                scores = scores + added
            weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
            return (weights @ values).transpose(1, 2)

        return differentiated(mode, call, grad_out, forward)


@dataclass(frozen=True)
class Peer:
    """An implementation from another package, called through its adapter alone."""

    adapter: ExternalBackend

    @property
    def name(self) -> str:
        return self.adapter.name

    def reasons(self, config: AttentionConfig) -> Sequence[Reason]:
        return self.adapter.unsupported_reasons(config)

    def prepare(self, mode: str, call: Call, grad_out: Tensor | None) -> Prepared:
        config, inputs = call.config(), canonical_inputs(call)
        return differentiated(mode, call, grad_out, lambda: self.adapter.forward(config, inputs)[0])


def differentiated(mode: str, call: Call, grad_out: Tensor | None, forward: Callable[[], Any]) -> Prepared:
    """A differentiable forward in one of the three modes."""
    if mode == "fwd":
        return Prepared(forward, lambda out: {"out": out})
    leaves = {name: t for name in DIFFERENTIABLE_INPUTS if (t := call.tensors.get(name)) is not None}
    names, tensors = list(leaves), list(leaves.values())

    def gradients(out: Tensor, retain_graph: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, tensors, grad_out, retain_graph=retain_graph)

    def named(values: tuple[Tensor, ...]) -> Results:
        return {f"d{name}": value for name, value in zip(names, values, strict=True)}

    if mode == "bwd":
        kept = forward()
        return Prepared(lambda: gradients(kept, True), named)

    def both() -> tuple[Tensor, tuple[Tensor, ...]]:
        out = forward()
        # a bias made ready before the call is part of every call's graph
        return out.detach(), gradients(out, "bias" in leaves)

    return Prepared(both, lambda value: {"out": value[0], **named(value[1])})


def added_scores(config: AttentionConfig, call: Call, dtype: torch.dtype) -> Tensor | None:
    """Everything that hides keys or is added to scores, as one tensor that broadcasts to (B, Hq, Sq, Sk): bool where
    nothing is added, None where nothing is hidden either.
    """
    q = call.tensors["q"]
    rows = torch.arange(config.seqlen_q, device=q.device)
    seen = visible(config, rows, config.seqlen_k, config.seqlen_q)
    if "mask" in call.tensors:
        seen = call.tensors["mask"] if seen is None else call.tensors["mask"] & seen
    added = call.tensors.get("bias")
    if "alibi_slopes" in call.tensors:
        keys = torch.arange(config.seqlen_k, device=q.device)
        distance = (keys - (rows[:, None] + config.seqlen_k - config.seqlen_q)).abs()
        alibi = -call.tensors["alibi_slopes"].reshape(-1, config.heads_q)[:, :, None, None] * distance
        added = alibi if added is None else added + alibi
    if added is None:
        return seen
    added = added.to(dtype)
    return added if seen is None else added.masked_fill(~seen, float("-inf"))


def _needs_mask(config: AttentionConfig) -> bool:
    rectangular = config.causal and config.seqlen_q not in (1, config.seqlen_k)
    return bool(rectangular or config.window or config.mask_shape or config.bias_shape or config.alibi)


TORCH_KERNELS = {
    "torch-flash": SDPBackend.FLASH_ATTENTION,
    "torch-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "torch-cudnn": SDPBackend.CUDNN_ATTENTION,
}


ON_REQUEST = ("reference", "flex")
"""Measured only where named: the specification is no competitor, and flex compiles anew for each shape."""


def is_ours(name: str) -> bool:
    """Whether an implementation of that name is a backend of this package or of a plug-in, not a peer."""
    return not (name in TORCH_KERNELS or name in ("torch-sdpa", "eager") or name in {each.name for each in ADAPTERS})


def available(device: str, arch: str) -> dict[str, Implementation]:
    """Every implementation that could run on a device but those `ON_REQUEST`, by name, ours first in order of
    selection.
    """
    plain = AttentionConfig(1, 64, 64, 1, 1, 64, device=device, arch=arch)
    found: dict[str, Implementation] = {}
    adapters = {adapter.name: adapter for adapter in ADAPTERS}
    for name in registry.list_backends():
        interpreted = device == "cpu" and name in ("flash", "hopper")  # as their tests run, not as anybody would
        if name not in adapters and not interpreted:
            found[name] = OurBackend(name)
    torch_kernels = [TorchKernel("torch-sdpa")] if device == "cpu" else [
        TorchKernel(name, kernel) for name, kernel in TORCH_KERNELS.items()
    ]  # fmt: skip
    others: list[Implementation] = [*torch_kernels, Eager(), *map(Peer, ADAPTERS)]
    found |= {each.name: each for each in others}
    return {
        name: each
        for name, each in found.items()
        if name not in ON_REQUEST and not INAPPLICABLE.intersection(reason.code for reason in each.reasons(plain))
    }


def resolve(names: Sequence[str] | None, device: str, arch: str) -> list[Implementation]:
    """Implementations by name; None is every one that is available here.

    Raises:
        ConfigError: there is none of that name. One that exists and cannot run here is kept: its rows say why.
    """
    here = available(device, arch)
    if names is None:
        return list(here.values())
    known = {**here, "reference": OurBackend("reference"), "torch-sdpa": TorchKernel("torch-sdpa")}
    known |= {name: TorchKernel(name, kernel) for name, kernel in TORCH_KERNELS.items()}
    known |= {adapter.name: Peer(adapter) for adapter in ADAPTERS}
    known |= {name: OurBackend(name) for name in registry.list_backends() if name not in known}
    for name in names:
        if name not in known:
            raise ConfigError("implementation", repr(name), f"one of {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]
