"""Attention from other installed packages, as backends one can ask for by name.

They are registered below `reference` (priority -10), which supports every call: automatic selection therefore never
picks one, and nobody's results change because some package happens to be installed. An adapter translates a call into
its package's own function and says as reasons what that function cannot do. Nothing is imported before a first call;
what is not importable is not registered.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from regard.backends.reference import gradients_by_autograd
from regard.config import AttentionConfig, AttentionInputs, KvCacheLayout
from regard.errors import Reason
from regard.registry import Gradients, Registry

PRIORITY = -10

Result = tuple[Tensor, Tensor | None]


class Package(Protocol):
    """What differs between packages: where it runs, what it cannot do, and how it is called."""

    @property
    def name(self) -> str:
        """Of the backend."""

    @property
    def missing(self) -> str:
        """What a reader must install, where `installed` is false."""

    def installed(self) -> bool:
        """Whether it can be imported; must not import it."""

    def reasons(self, config: AttentionConfig) -> Sequence[Reason]:
        """Reasons against a call, given that the package is there and the device is a GPU."""

    def call(self, config: AttentionConfig, inputs: AttentionInputs) -> Result:
        """Out and, where asked for, lse; differentiable where a gradient is not refused."""


@dataclass(frozen=True)
class ExternalBackend:
    """The backend made of a package's function. Autograd sees through it: the function brings its own backward."""

    package: Package
    composed_of_torch_ops: bool = field(default=True, init=False)

    @property
    def name(self) -> str:
        return self.package.name

    def unsupported_reasons(self, config: AttentionConfig) -> Sequence[Reason]:
        if not self.package.installed():
            return [Reason("not_installed", f"no {self.package.name}", self.package.missing)]
        if config.device != "cuda":
            return [Reason("device", config.device, "cuda")]
        try:
            return self.package.reasons(config)
        except (ImportError, OSError) as error:  # found, but not for this torch, CUDA or GPU
            return [
                Reason("not_installed", f"a {self.package.name} that does not load ({error})", self.package.missing)
            ]

    def required_kv_layout(self, config: AttentionConfig) -> KvCacheLayout:
        return config.kv_layout

    def forward(self, config: AttentionConfig, inputs: AttentionInputs) -> Result:
        return self.package.call(config, inputs)

    def backward(
        self,
        config: AttentionConfig,
        inputs: AttentionInputs,
        out: Tensor,
        lse: Tensor | None,
        grad_out: Tensor,
        grad_lse: Tensor | None,
    ) -> Gradients:
        return gradients_by_autograd(self.forward, config, inputs, grad_out, grad_lse)


def register_installed(registry: Registry, registered: Collection[str] = ()) -> None:
    """Register every adapter whose package can be imported, but for those that are ``registered`` already."""
    for adapter in ADAPTERS:
        if adapter.package.installed() and adapter.name not in registered:
            registry.register(adapter, priority=PRIORITY)


# --- What functions lack, said once


_FEATURES: dict[str, tuple[Callable[[AttentionConfig], object], str]] = {
    "mask": (lambda c: c.mask_shape, "a mask"),
    "bias": (lambda c: c.bias_shape, "an additive bias"),
    "window": (lambda c: c.window is not None, "a window"),
    "softcap": (lambda c: c.softcap > 0, "softcap"),
    "alibi": (lambda c: c.alibi, "ALiBi slopes"),
    "sinks": (lambda c: c.sinks, "attention sinks"),
    "dropout": (lambda c: c.dropout_p > 0, "dropout (its mask is not the Philox mask of the other backends)"),
    "varlen": (lambda c: c.varlen, "packed sequences"),
    "kv_lens": (lambda c: c.kv_lens and c.page_size is None, "key lengths"),
    "paged": (lambda c: c.page_size is not None, "a paged KV cache"),
    "lse": (lambda c: c.return_lse, "the log-sum-exp"),
    "backward": (lambda c: c.requires_grad, "a gradient"),
    "lse_backward": (lambda c: c.return_lse and c.requires_grad, "a gradient of the log-sum-exp"),
    "deterministic": (lambda c: c.deterministic and c.requires_grad, "a repeatable gradient"),
    "head_dim_v": (lambda c: c.head_dim_v != c.head_dim, "a value head dim of its own"),
}


def _lacks(config: AttentionConfig, *features: str) -> list[Reason]:
    """A reason for each of these features that the call uses."""
    return [Reason(name, _FEATURES[name][1], "a call without it") for name in features if _FEATURES[name][0](config)]


def _half_only(config: AttentionConfig, largest_head_dim: int) -> list[Reason]:
    reasons = []
    if config.dtype not in (torch.float16, torch.bfloat16):
        code = "dtype_float64" if config.dtype == torch.float64 else "dtype"
        reasons.append(Reason(code, str(config.dtype), "float16 or bfloat16"))
    head_dim = max(config.head_dim, config.head_dim_v)
    if head_dim > largest_head_dim or config.head_dim % 8 or config.head_dim_v % 8:
        reasons.append(
            Reason("head_dim", f"{config.head_dim} and {config.head_dim_v}", f"multiples of 8 up to {largest_head_dim}")
        )
    return reasons


def _compute_capability(config: AttentionConfig, lowest: int, highest: int) -> list[Reason]:
    """A reason where the architecture is not an NVIDIA one within these bounds (90 for sm90)."""
    number = config.arch.removeprefix("sm")
    if number.isdigit() and lowest <= int(number) <= highest:
        return []
    return [Reason("arch", config.arch, f"sm{lowest}" + (f" to sm{highest}" if highest > lowest else ""))]


def _importable(module: str) -> bool:
    """Whether a module can be found, without importing the package it is in."""
    package, _, rest = module.partition(".")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return False
    if spec is None or not rest:
        return spec is not None
    places = [Path(place, *rest.split(".")) for place in spec.submodule_search_locations or ()]
    return any(place.is_dir() or place.with_suffix(".py").exists() for place in places)


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(name)


def _accepted(function: Callable[..., Any]) -> frozenset[str]:
    """Names of the arguments a function takes: releases of the same package differ."""
    return frozenset(inspect.signature(function).parameters)


def _window(config: AttentionConfig, unlimited: int | None) -> tuple[int | None, int | None]:
    """The window as flash-attn's functions take it: these intersect it with causal themselves."""
    left, right = config.window or (None, None)
    return (unlimited if left is None else left), (unlimited if right is None else right)


def _out_and_lse(value: Any) -> Result:
    return (value[0], value[1]) if isinstance(value, (tuple, list)) else (value, None)


# --- Packages


class FlashAttn2:
    """The ``flash-attn`` package: FlashAttention-2 (Dao 2023)."""

    name = "flash_attn"
    missing = "pip install flash-attn"

    def installed(self) -> bool:
        return _importable("flash_attn.flash_attn_interface")

    def reasons(self, config: AttentionConfig) -> Sequence[Reason]:
        lacking = _lacks(config, "mask", "bias", "sinks", "dropout", "kv_lens", "lse_backward", "head_dim_v")
        if config.page_size is not None:
            lacking += _lacks(config, "backward")
            if config.page_size % 256:
                lacking.append(Reason("paged", f"pages of {config.page_size} keys", "pages of a multiple of 256"))
        architecture = [] if torch.version.hip is not None else _compute_capability(config, 80, 121)
        return [*architecture, *_half_only(config, 256), *lacking]

    def call(self, config: AttentionConfig, inputs: AttentionInputs) -> Result:
        module = _module("flash_attn.flash_attn_interface")
        options: dict[str, Any] = dict(
            softmax_scale=config.softmax_scale, causal=config.causal, window_size=_window(config, -1),
            softcap=config.softcap, alibi_slopes=None if inputs.alibi_slopes is None else inputs.alibi_slopes.float(),
        )  # fmt: skip
        if config.page_size is not None:
            return _out_and_lse(
                module.flash_attn_with_kvcache(
                    inputs.q, inputs.k, inputs.v, cache_seqlens=inputs.kv_lens, block_table=inputs.block_table,
                    return_softmax_lse=config.return_lse, **options,
                )
            )  # fmt: skip
        options |= dict(deterministic=config.deterministic, return_attn_probs=config.return_lse)
        if config.varlen:
            return _out_and_lse(
                module.flash_attn_varlen_func(
                    inputs.q, inputs.k, inputs.v, inputs.cu_seqlens_q, inputs.cu_seqlens_k, config.seqlen_q,
                    config.seqlen_k, **options,
                )
            )  # fmt: skip
        return _out_and_lse(module.flash_attn_func(*inputs[:3], **options))


class FlashAttn3:
    """FlashAttention-3 (Shah et al. 2024): ``flash_attn_interface`` from the hopper folder of flash-attn, or any module
    of that name with a ``flash_attn_func``, such as one beside extracted binaries.
    """

    name = "fa3"
    missing = "flash_attn_interface importable: build flash-attn's hopper folder"

    def installed(self) -> bool:
        return _importable("flash_attn_interface")

    def reasons(self, config: AttentionConfig) -> Sequence[Reason]:
        lacking = _lacks(
            config, "mask", "bias", "alibi", "sinks", "dropout", "kv_lens", "paged", "lse_backward", "head_dim_v"
        )
        found = [*_compute_capability(config, 90, 90), *_half_only(config, 256), *lacking]
        if found:
            return found
        module = _module("flash_attn_interface")
        dense = _accepted(module.flash_attn_func)
        for used, argument, feature in (
            (config.window is not None, "window_size", "window"),
            (config.softcap > 0, "softcap", "softcap"),
        ):
            if used and argument not in dense:
                found.append(
                    Reason(feature, _FEATURES[feature][1], "a call without it", "this build has no such argument")
                )
        if config.varlen and not hasattr(module, "flash_attn_varlen_func"):
            found.append(Reason("varlen", "packed sequences", "padded ones", "this build has no such function"))
        if config.return_lse and not hasattr(module, "fwd_raw") and "return_attn_probs" not in dense:
            found += _lacks(config, "lse")
        return found

    def call(self, config: AttentionConfig, inputs: AttentionInputs) -> Result:
        module = _module("flash_attn_interface")
        options: dict[str, Any] = dict(softmax_scale=config.softmax_scale, causal=config.causal)
        if config.window is not None:
            options["window_size"] = _window(config, -1)
        if config.softcap > 0:
            options["softcap"] = config.softcap
        if config.varlen:
            return _out_and_lse(
                module.flash_attn_varlen_func(
                    inputs.q, inputs.k, inputs.v, inputs.cu_seqlens_q, inputs.cu_seqlens_k,
                    max_seqlen_q=config.seqlen_q, max_seqlen_k=config.seqlen_k, **options,
                )
            )  # fmt: skip
        if hasattr(module, "fwd_raw") and not config.requires_grad and len(options) == 2:
            # FA3's training functions never split the keys; its decoding function chooses, as 0 asks for.
            splits = dict(num_splits=0) if "num_splits" in _accepted(module.fwd_raw) else {}
            return _out_and_lse(module.fwd_raw(*inputs[:3], config.causal, config.softmax_scale, **splits))
        if config.requires_grad:
            options["deterministic"] = config.deterministic
        if config.return_lse:
            options["return_attn_probs"] = True
        return _out_and_lse(module.flash_attn_func(*inputs[:3], **options))


class FlashAttn4:
    """FlashAttention-4: the CuTe DSL kernels, ``flash_attn.cute``."""

    name = "fa4"
    missing = "pip install flash-attn-4"

    def installed(self) -> bool:
        return _importable("flash_attn.cute")

    def reasons(self, config: AttentionConfig) -> Sequence[Reason]:
        lacking = _lacks(
            config, "mask", "bias", "alibi", "sinks", "dropout", "kv_lens", "paged", "lse_backward", "deterministic"
        )
        return [*_compute_capability(config, 90, 121), *_half_only(config, 128), *lacking]

    def call(self, config: AttentionConfig, inputs: AttentionInputs) -> Result:
        module = _module("flash_attn.cute")
        options: dict[str, Any] = dict(softmax_scale=config.softmax_scale, causal=config.causal)
        if config.window is not None:
            options["window_size"] = _window(config, None)
        if config.softcap > 0:
            options["softcap"] = config.softcap
        if config.varlen:
            return _out_and_lse(
                module.flash_attn_varlen_func(
                    *inputs[:3], cu_seqlens_q=inputs.cu_seqlens_q, cu_seqlens_k=inputs.cu_seqlens_k, **options
                )
            )
        if config.return_lse and "return_lse" in _accepted(module.flash_attn_func):
            options["return_lse"] = True
        return _out_and_lse(module.flash_attn_func(*inputs[:3], **options))


class FlashInfer:
    """``flashinfer``: planned batch prefill over packed or paged keys. Forward only."""

    name = "flashinfer"
    missing = "pip install flashinfer-python"
    _WORKSPACE_BYTES = 256 << 20

    def __init__(self) -> None:
        self._plans: dict[Any, Any] = {}

    def installed(self) -> bool:
        return _importable("flashinfer")

    def reasons(self, config: AttentionConfig) -> Sequence[Reason]:
        lacking = _lacks(config, "mask", "bias", "alibi", "sinks", "dropout", "kv_lens", "backward")
        if config.window is not None and config.window[1] is not None and not (config.causal):
            lacking.append(Reason("window", f"window={config.window}", "a window bounded on the left, or causal"))
        return [*_compute_capability(config, 75, 121), *_half_only(config, 256), *lacking]

    def call(self, config: AttentionConfig, inputs: AttentionInputs) -> Result:
        plan = self._plan(config, inputs)
        if config.page_size is not None:
            q = inputs.q.flatten(0, 1)
            operands: tuple[Any, ...] = (q, (inputs.k, inputs.v))
        elif config.varlen:
            operands = inputs[:3]
        else:
            operands = tuple(t.flatten(0, 1) for t in inputs[:3])
        found = plan.run(*operands, return_lse=config.return_lse)
        out, lse = _out_and_lse(found)
        if lse is not None:
            lse = lse.transpose(0, 1) * math.log(2)  # it returns log2, (total, Hq)
        if config.varlen:
            return out, lse
        batch, queries = inputs.q.shape[:2]
        if lse is not None:
            lse = lse.reshape(-1, batch, queries).transpose(0, 1)
        return out.view(batch, queries, *out.shape[1:]), lse

    def _plan(self, config: AttentionConfig, inputs: AttentionInputs) -> Any:
        """The planned wrapper of a call; planned once for the same configuration and index tensors."""
        indices = (inputs.cu_seqlens_q, inputs.cu_seqlens_k, inputs.kv_lens, inputs.block_table)
        key = (config, inputs.q.device, *((t.data_ptr(), t._version) if t is not None else None for t in indices))
        if key in self._plans:
            return self._plans[key]
        flashinfer = _module("flashinfer")
        workspace = torch.empty(self._WORKSPACE_BYTES, dtype=torch.uint8, device=inputs.q.device)
        left = (config.window or (None, None))[0]
        options: dict[str, Any] = dict(
            causal=config.causal, sm_scale=config.softmax_scale, window_left=-1 if left is None else left,
            logits_soft_cap=config.softcap or None, q_data_type=config.dtype,
        )  # fmt: skip

        def even(length: int) -> Tensor:
            return torch.arange(config.batch + 1, dtype=torch.int32, device=inputs.q.device) * length

        if config.page_size is not None:
            assert inputs.kv_lens is not None and inputs.block_table is not None
            used = -(-inputs.kv_lens.long() // config.page_size)
            starts = torch.nn.functional.pad(used.cumsum(0), (1, 0)).int()
            column = torch.arange(inputs.block_table.shape[1], device=used.device)
            pages = inputs.block_table[column < used[:, None]]
            last = (inputs.kv_lens - (used.int() - 1) * config.page_size).int()
            plan = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
            plan.plan(even(config.seqlen_q), starts, pages, last, config.heads_q, config.heads_kv, config.head_dim,
                      config.page_size, **options)  # fmt: skip
        else:
            plan = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
            offsets = (inputs.cu_seqlens_q, inputs.cu_seqlens_k)
            if not config.varlen:
                offsets = (even(config.seqlen_q), even(config.seqlen_k))
            plan.plan(*offsets, config.heads_q, config.heads_kv, config.head_dim, head_dim_vo=config.head_dim_v,
                      **options)  # fmt: skip
        self._plans = {key: plan}  # one at a time: each holds its workspace
        return plan


class Xformers:
    """``xformers``: `memory_efficient_attention`, which picks among its own kernels."""

    name = "xformers"
    missing = "pip install xformers"

    def installed(self) -> bool:
        return _importable("xformers.ops")

    def reasons(self, config: AttentionConfig) -> Sequence[Reason]:
        lacking = _lacks(config, "mask", "alibi", "softcap", "sinks", "dropout", "kv_lens", "paged", "lse", "varlen",
                         "deterministic")  # fmt: skip
        if config.bias_shape is not None and (config.causal or config.window is not None):
            lacking.append(Reason("bias", "a bias together with causal or a window", "one of the two"))
        if config.window is not None and None in config.window and not config.causal:
            lacking.append(Reason("window", f"window={config.window}", "a window bounded on both sides, or causal"))
        return [*_compute_capability(config, 75, 121), *_half_only(config, 256), *lacking]

    def call(self, config: AttentionConfig, inputs: AttentionInputs) -> Result:
        ops, biases = _module("xformers.ops"), _module("xformers.ops.fmha.attn_bias")
        q, k, v = inputs[:3]
        group = config.heads_q // config.heads_kv
        if group > 1:  # (B, S, Hk, group, D), keys expanded and not copied
            q = q.view(*q.shape[:2], config.heads_kv, group, q.shape[3])
            k, v = (t.unsqueeze(3).expand(-1, -1, -1, group, -1) for t in (k, v))
        bias: Any = None
        if config.window is not None:
            left, right = config.band
            reach = config.seqlen_q + config.seqlen_k
            bias = biases.LocalAttentionFromBottomRightMask(reach if left is None else left, right or 0)
        elif config.causal:
            square = config.seqlen_q == config.seqlen_k
            bias = biases.LowerTriangularMask() if square else biases.LowerTriangularFromBottomRightMask()
        elif inputs.bias is not None:
            bias = inputs.bias.expand(config.batch, config.heads_q, config.seqlen_q, config.seqlen_k)
            bias = bias.reshape(config.batch, config.heads_kv, group, *bias.shape[2:]) if group > 1 else bias
        out = ops.memory_efficient_attention(q, k, v, attn_bias=bias, scale=config.softmax_scale)
        return (out.flatten(2, 3) if group > 1 else out), None


class FlexAttention:
    """torch's FlexAttention: a kernel compiled for each configuration from a description of scores and mask."""

    name = "flex"
    missing = "a CUDA or ROCm build of torch"

    def installed(self) -> bool:
        return torch.version.cuda is not None or torch.version.hip is not None

    def reasons(self, config: AttentionConfig) -> Sequence[Reason]:
        lacking = _lacks(config, "sinks", "dropout", "varlen", "kv_lens", "paged", "deterministic")
        if config.bias_requires_grad:
            lacking.append(Reason("bias", "a gradient of the bias", "a constant bias"))
        if config.dtype == torch.float64:
            lacking.append(Reason("dtype_float64", "float64", "float16, bfloat16 or float32"))
        return lacking

    def call(self, config: AttentionConfig, inputs: AttentionInputs) -> Result:
        from torch.nn.attention.flex_attention import AuxRequest

        block_mask = _flex_block_mask(config, inputs.q.device) if inputs.mask is None else _flex_mask(config, inputs)
        found = _flex_compiled()(
            *(t.transpose(1, 2) for t in inputs[:3]),
            score_mod=_flex_scores(config, inputs),
            block_mask=block_mask,
            scale=config.softmax_scale,
            enable_gqa=config.heads_q != config.heads_kv,
            return_aux=AuxRequest(lse=True) if config.return_lse else None,
        )
        out, lse = (found[0], found[1].lse) if config.return_lse else (found, None)
        return out.transpose(1, 2), lse


@functools.cache
def _flex_compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # fullgraph: past torch's limit of recompilations a call is an error and not a silent run without a kernel
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def call(*arguments: Any, **options: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=4096):
            return compiled(*arguments, **options)

    return call


def _flex_visible(config: AttentionConfig) -> Callable[..., Any] | None:
    left, right = config.band
    shift = config.seqlen_k - config.seqlen_q
    if left is None and right is None:
        return None

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001 (torch's signature)
        distance = key - query - shift
        seen = distance >= (-(config.seqlen_q + config.seqlen_k) if left is None else -left)
        return seen if right is None else seen & (distance <= right)

    return visible


@functools.lru_cache(maxsize=64)
def _flex_block_mask(config: AttentionConfig, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    visible = _flex_visible(config)
    if visible is None:
        return None
    return create_block_mask(visible, None, None, config.seqlen_q, config.seqlen_k, device=str(device))


def _flex_mask(config: AttentionConfig, inputs: AttentionInputs) -> Any:
    """The block mask of a bool mask: its values may have changed since the last call, so it is made each time."""
    from torch.nn.attention.flex_attention import create_block_mask

    band = _flex_visible(config)
    assert inputs.mask is not None
    full = inputs.mask.expand(config.batch, config.heads_q, config.seqlen_q, config.seqlen_k)

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = full[b, h, query, key]
        return seen if band is None else seen & band(b, h, query, key)

    return create_block_mask(visible, config.batch, config.heads_q, config.seqlen_q, config.seqlen_k,
                             device=str(inputs.q.device))  # fmt: skip


def _flex_scores(config: AttentionConfig, inputs: AttentionInputs) -> Callable[..., Any] | None:
    """softcap, bias and ALiBi, in the order of the specification."""
    if config.softcap == 0 and inputs.bias is None and inputs.alibi_slopes is None:
        return None
    full = (config.batch, config.heads_q, config.seqlen_q, config.seqlen_k)
    bias = None if inputs.bias is None else inputs.bias.expand(full)
    slopes = None if inputs.alibi_slopes is None else inputs.alibi_slopes.expand(config.batch, config.heads_q)
    softcap, shift = config.softcap, config.seqlen_k - config.seqlen_q

    def scores(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if softcap > 0:
            score = softcap * torch.tanh(score / softcap)
        if bias is not None:
            score = score + bias[b, h, query, key]
        if slopes is not None:
            score = score - slopes[b, h] * (query + shift - key).abs()
        return score

    return scores


ADAPTERS: tuple[ExternalBackend, ...] = tuple(
    ExternalBackend(package)
    for package in (FlashAttn2(), FlashAttn3(), FlashAttn4(), FlashInfer(), Xformers(), FlexAttention())
)
