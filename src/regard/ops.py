"""From a chosen backend to its kernel: eager calls go straight there, traced and differentiated ones through custom ops.

`regard::attention_fwd` and `regard::attention_bwd` are opaque to torch.compile and carry the chosen backend's name, so
a graph keeps the choice that was made when it was traced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.config import AttentionConfig, AttentionInputs
from regard.errors import ConfigError, UnsupportedError
from regard.registry import Gradients, Selection, backend_is_composed_of_torch_ops, registry

# Errors that a different backend would meet as well, or that are the caller's to handle: never a reason to fall back.
_NOT_THE_KERNELS_FAULT = (ConfigError, UnsupportedError, torch.OutOfMemoryError)


def attend(config: AttentionConfig, inputs: AttentionInputs, selection: Selection) -> tuple[Tensor, Tensor | None]:
    """Run the selected backend, differentiably where ``config.requires_grad``.

    Returns:
        out (B, Sq, Hq, Dv) and lse (B, Hq, Sq), or packed out (total_q, Hq, Dv) and lse (Hq, total_q); lse may be None
        where it was not asked for.
    """
    if _must_trace(inputs) or config.requires_grad:
        if backend_is_composed_of_torch_ops(registry.get(selection.backend)) and not config.is_empty:
            return registry.get(selection.backend).forward(config, inputs)
        out, lse = attention_fwd(*inputs, *_scalars(config), selection.backend, selection.strict)
        return out, lse
    return _forward(config, inputs, selection.backend, selection.strict)


def _must_trace(inputs: AttentionInputs) -> bool:
    """Whether something other than the backend must see the call: a tracer, a dispatch mode, a tensor subclass."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any(t is not None and type(t) not in (Tensor, torch.nn.Parameter) for t in inputs)
    )


def _forward(
    config: AttentionConfig, inputs: AttentionInputs, backend: str, strict: bool
) -> tuple[Tensor, Tensor | None]:
    """Run a backend's forward. Unless strict, a failing kernel is quarantined and the next backend serves the call."""
    if config.is_empty:
        return _empty_result(config, inputs)
    while True:
        try:
            return registry.get(backend).forward(config, inputs)
        except _NOT_THE_KERNELS_FAULT:
            raise
        except Exception as error:
            if strict:
                raise
            registry.quarantine(backend, config, error)
            backend = registry.select(config, "auto").backend


def _empty_result(config: AttentionConfig, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """No rows, or rows that see no key: out 0, lse -inf (the sink alone where there is one)."""
    out = inputs.q.new_zeros(_out_shape(inputs))
    lse = inputs.q.new_full(_lse_shape(config, inputs), float("-inf"), dtype=_lse_dtype(inputs.q))
    if inputs.sinks is not None:
        lse = torch.maximum(lse, inputs.sinks.to(lse.dtype)[:, None])
    return out, lse


def _out_shape(inputs: AttentionInputs) -> tuple[int, ...]:
    return (*inputs.q.shape[:-1], inputs.v.shape[-1])


def _lse_shape(config: AttentionConfig, inputs: AttentionInputs) -> tuple[int, ...]:
    return _lse_shape_of(inputs.q)


def _lse_shape_of(q: Tensor) -> tuple[int, ...]:
    return (q.shape[0], q.shape[2], q.shape[1]) if q.ndim == 4 else (q.shape[1], q.shape[0])


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _scalars(config: AttentionConfig) -> tuple[Any, ...]:
    """The config's values as custom-op arguments, in the order of the op's schema."""
    left, right = config.window or (None, None)
    return (
        config.softmax_scale,
        config.causal,
        left,
        right,
        config.softcap,
        config.dropout_p,
        config.seqlen_q,
        config.seqlen_k,
        config.bias_requires_grad,
        config.deterministic,
    )


def _config_of(inputs: AttentionInputs, scalars: tuple[Any, ...]) -> AttentionConfig:
    """The config a custom op was called with: the inverse of `_scalars`."""
    scale, causal, left, right, softcap, dropout_p, max_q, max_k, bias_grad, deterministic = scalars
    tensors = inputs._asdict()
    seed = tensors.pop("dropout_seed")
    bias = tensors["bias"]
    if bias is not None and bias.requires_grad != bias_grad:
        tensors["bias"] = bias.detach().requires_grad_(bias_grad)
    with torch.set_grad_enabled(bias_grad):
        return AttentionConfig.from_tensors(
            **tensors,
            max_seqlen_q=max_q if inputs.cu_seqlens_q is not None else None,
            max_seqlen_k=max_k if inputs.cu_seqlens_k is not None else None,
            softmax_scale=scale,
            causal=causal,
            window=None if left is None and right is None else (left, right),
            softcap=softcap,
            dropout_p=dropout_p if seed is not None else 0.0,
            return_lse=True,
            requires_grad=True,
            deterministic=deterministic,
        )


@torch.library.custom_op("regard::attention_fwd", mutates_args=())
def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    kv_lens: Tensor | None,
    block_table: Tensor | None,
    dropout_seed: Tensor | None,
    softmax_scale: float,
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    dropout_p: float,
    max_seqlen_q: int,
    max_seqlen_k: int,
    bias_requires_grad: bool,
    deterministic: bool,
    backend: str,
    strict: bool,
) -> tuple[Tensor, Tensor]:
    """Forward on canonical inputs (`AttentionInputs`): out and lse."""
    inputs = AttentionInputs(q, k, v, mask, bias, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, kv_lens,
                             block_table, dropout_seed)  # fmt: skip
    scalars = (softmax_scale, causal, window_left, window_right, softcap, dropout_p, max_seqlen_q, max_seqlen_k,
               bias_requires_grad, deterministic)  # fmt: skip
    out, lse = _forward(_config_of(inputs, scalars), inputs, backend, strict)
    assert lse is not None
    return out.contiguous(), lse.contiguous()  # as the fake promises; a backend of torch ops may return a view


@attention_fwd.register_fake
def _attention_fwd_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    return out, q.new_empty(_lse_shape_of(q), dtype=_lse_dtype(q))
