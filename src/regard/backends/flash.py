"""The `flash` backend: the portable Triton kernels on CUDA and ROCm devices.

On a CPU it serves only where Triton's interpreter is active (TRITON_INTERPRET=1), which is how its tests run.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regard.backends.flash_launches import (
    FORWARD_TENSORS,
    SCORE_TENSORS,
    backward_launches,
    bias_launch,
    forward_launches,
    forward_tensors,
    new_bias_gradient,
    new_gradients,
    product_precision,
    row_tensors,
    row_terms_launch,
    rows_are_aligned,
    score_tensors,
    splits_of,
)
from regard.backends.key_splits import multiprocessors, new_parts
from regard.backends.launch import Launch, PlainCalls, appearance, launch_or_repeat, new_results, on_device
from regard.backends.padded_rows import with_padded_rows
from regard.config import AttentionConfig, AttentionInputs, KvCacheLayout
from regard.errors import Reason
from regard.kernels import tuning
from regard.registry import Gradients, Shortcut

MAX_HEAD_DIM = 256
LEAST_SOFTCAP = 1e-6  # by far smaller ones make 0 / 0 of a score in float32


class FlashBackend:
    """Flash attention in portable Triton: every semantic, any strides, head dims 1 to 256.

    Out and gradients are bitwise repeatable always; ``deterministic`` changes nothing.
    """

    name = "flash"

    def unsupported_reasons(self, config: AttentionConfig) -> Sequence[Reason]:
        reasons = []
        if config.device != "cuda" and not (config.device == "cpu" and _interpreting()):
            reasons.append(Reason("device", config.device, "cuda (NVIDIA or ROCm)"))
        elif (missing := triton_reason()) is not None:
            reasons.append(missing)
        elif config.device == "cuda" and tuning.table_architecture(config.arch) is None:
            known = ", ".join(tuning.ARCHITECTURES)
            reasons.append(Reason("arch", config.arch, f"one of {known}"))
        if config.dtype == torch.float64:
            reasons.append(
                Reason("dtype_float64", "float64", "float16, bfloat16 or float32", "reference computes in float64")
            )
        head_dim = max(config.head_dim, config.head_dim_v)
        if head_dim > MAX_HEAD_DIM:
            reasons.append(Reason("head_dim", str(head_dim), f"at most {MAX_HEAD_DIM}"))
        if config.page_size is not None and config.requires_grad:
            reasons.append(Reason("backward", "a gradient through a paged KV cache", "contiguous keys and values"))
        return [*reasons, *softcap_reasons(config)]

    def required_kv_layout(self, config: AttentionConfig) -> KvCacheLayout:
        return config.kv_layout

    def forward(self, config: AttentionConfig, inputs: AttentionInputs) -> tuple[Tensor, Tensor | None]:
        device, inputs = inputs.q.device, with_padded_rows(inputs)
        out, lse = new_results(config, inputs)
        parts = new_parts(config, inputs.q, multiprocessors(device), splits_of)
        tensors = (*score_tensors(config, inputs), *forward_tensors(inputs, out, lse, parts))
        with on_device(device):
            launch_or_repeat(
                config.prepared,
                _forward_key(config, inputs),
                dict(zip(SCORE_TENSORS + FORWARD_TENSORS, tensors, strict=True)),
                lambda: forward_launches(config, inputs, out, lse, parts),
                device,
            )
        return out, lse

    def shortcut(self, config: AttentionConfig, layout: str) -> Shortcut | None:
        if config.mask_shape is not None or config.bias_shape is not None or config.device != "cuda":
            return None
        if config.dtype == torch.float32:  # which has torch's precision of the moment
            return None
        others = (None,) * (len(SCORE_TENSORS) - 3)
        key = functools.partial(_forward_key, config)

        def arguments(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Sequence[Tensor | None]:
            parts = new_parts(config, q, multiprocessors(q.device), splits_of) or (out, lse)
            return q, k, v, *others, *parts, out, lse, None, None

        return PlainCalls(self.forward, config, layout, key, arguments)

    @torch.no_grad()
    def backward(
        self,
        config: AttentionConfig,
        inputs: AttentionInputs,
        out: Tensor,
        lse: Tensor | None,
        grad_out: Tensor,
        grad_lse: Tensor | None,
    ) -> Gradients:
        assert lse is not None
        if not rows_are_aligned(grad_out):
            grad_out = grad_out.contiguous()
        device, inputs = grad_out.device, with_padded_rows(inputs)
        found = new_gradients(config, inputs)
        row_lse, delta = torch.empty_like(lse), torch.empty_like(lse)
        bias = inputs.bias if config.bias_requires_grad else None
        dbias = None if bias is None or bias.shape[3] == 1 else new_bias_gradient(config, bias)
        tensors = dict(
            zip(SCORE_TENSORS, score_tensors(config, inputs), strict=True),
            **row_tensors(out, grad_out, lse, grad_lse, row_lse, delta),
            **{f"d{name}_ptr": gradient for name, gradient in found.items()},
            dbias_ptr=dbias,
        )

        def launches() -> list[Launch]:
            made = [row_terms_launch(config, inputs, out, grad_out, lse, grad_lse, row_lse, delta)]
            made += backward_launches(config, inputs, grad_out, row_lse, delta, inputs._replace(**found))
            if dbias is not None:
                made.append(bias_launch(config, inputs, grad_out, row_lse, delta, dbias))
            return made

        key = "flash backward", device.index, product_precision(config), appearance(tensors.values())
        with on_device(device):
            launch_or_repeat(config.prepared, key, tensors, launches, device)
        if bias is not None:
            rows = _summed_over_keys(inputs, row_lse, delta, grad_lse) if dbias is None else dbias
            found["bias"] = rows.sum_to_size(bias.shape)
        if inputs.sinks is not None:
            found["sinks"] = sink_gradient(inputs, row_lse, delta)
        return {name: gradient.to(getattr(inputs, name).dtype) for name, gradient in found.items()}


def _forward_key(config: AttentionConfig, inputs: AttentionInputs) -> tuple[Any, ...]:
    """What the forward's launch depends on beyond its config."""
    return "flash forward", inputs.q.device.index, product_precision(config), appearance(inputs)


def _sink_weights(inputs: AttentionInputs, row_lse: Tensor) -> Tensor:
    """The weight of the sink in each row, in the shape of lse; 0 where nothing is visible."""
    if inputs.sinks is None:
        return torch.zeros_like(row_lse)
    return torch.exp2(inputs.sinks.float()[:, None] * math.log2(math.e) - row_lse)


def sink_gradient(inputs: AttentionInputs, row_lse: Tensor, delta: Tensor) -> Tensor:
    """Gradient of the sinks, (Hq,): a sink is a key without a value, so that its dP is 0."""
    rows = _sink_weights(inputs, row_lse) * delta
    return -rows.sum((0, 2) if rows.ndim == 3 else 1)


def _summed_over_keys(inputs: AttentionInputs, row_lse: Tensor, delta: Tensor, grad_lse: Tensor | None) -> Tensor:
    """Sum of the scores' gradients over the keys, (B, Hq, Sq, 1).

    Scores' gradients are P * (dP - delta) with sum(P * dP) = delta + dlse and sum(P) = 1 - the sink's weight.
    """
    rows = _sink_weights(inputs, row_lse) * delta
    if grad_lse is not None:
        rows = rows + torch.where(row_lse == math.inf, 0.0, grad_lse)
    return rows[..., None]


def greatest_softcap(dtype: torch.dtype) -> int:
    """That the kernels' tanh is precise enough for."""
    return 2**7 if dtype == torch.float32 else 2**12


def softcap_reasons(config: AttentionConfig) -> list[Reason]:
    """Against a softcap that the kernels' tanh is too coarse for: it errs by 2**-23, and a score by that times the cap.

    From a greatest cap on that is more than the products of the inputs err by.
    """
    greatest = greatest_softcap(config.dtype)
    if config.softcap <= 0 or LEAST_SOFTCAP <= config.softcap <= greatest:
        return []
    needed = f"0 or {LEAST_SOFTCAP} to {greatest} in {str(config.dtype).removeprefix('torch.')}"
    return [Reason("softcap", str(config.softcap), needed, "reference takes any")]


def triton_reason() -> Reason | None:
    """What the kernels miss of Triton, found without importing it.

    Nothing where there is no GPU: then the question is about another machine, whose build of torch brings Triton.
    """
    if not torch.cuda.is_available():
        return None
    if importlib.util.find_spec("triton") is None:
        return Reason("not_installed", "no triton", "triton >= 3.6", "CUDA and ROCm builds of torch bring it")
    installed = _installed_triton()
    if installed is None or tuple(map(int, installed.split(".")[:2])) >= (3, 6):
        return None
    return Reason("not_installed", f"triton {installed}", "triton >= 3.6", "newer builds of torch bring it")


@functools.cache
def _installed_triton() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # some builds for ROCm have a name of their own
        return None


def _interpreting() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)
