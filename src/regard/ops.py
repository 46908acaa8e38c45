"""From a chosen backend to its kernel: eager calls go straight there, traced or differentiated ones by a custom op.

`regard::attention_fwd` and `regard::attention_bwd` are opaque to torch.compile and carry the chosen backend's name, so
a graph keeps the choice that was made when it was traced.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from regard.config import DIFFERENTIABLE_INPUTS, AttentionConfig, AttentionInputs
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
        return _empty_result(inputs)
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


def _empty_result(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """No rows, or rows that see no key: out 0, lse -inf (the sink alone where there is one)."""
    out = inputs.q.new_zeros(_out_shape(inputs))
    lse = inputs.q.new_full(_lse_shape(inputs.q), float("-inf"), dtype=_lse_dtype(inputs.q))
    if inputs.sinks is not None:
        lse = torch.maximum(lse, inputs.sinks.to(lse.dtype)[:, None])
    return out, lse


def _out_shape(inputs: AttentionInputs) -> tuple[int, ...]:
    return (*inputs.q.shape[:-1], inputs.v.shape[-1])


def _lse_shape(q: Tensor) -> tuple[int, ...]:
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
        config.requires_grad,
        config.bias_requires_grad,
        config.deterministic,
    )


def _config_of(inputs: AttentionInputs, scalars: tuple[Any, ...]) -> AttentionConfig:
    """The config a custom op was called with: the inverse of `_scalars`."""
    scale, causal, left, right, softcap, dropout_p, max_q, max_k, requires_grad, bias_grad, deterministic = scalars
    tensors = inputs._asdict()
    seed = tensors.pop("dropout_seed")
    config = AttentionConfig.from_tensors(
        **tensors,
        max_seqlen_q=max_q if inputs.cu_seqlens_q is not None else None,
        max_seqlen_k=max_k if inputs.cu_seqlens_k is not None else None,
        softmax_scale=scale,
        causal=causal,
        window=None if left is None and right is None else (left, right),
        softcap=softcap,
        dropout_p=dropout_p if seed is not None else 0.0,
        return_lse=True,
        requires_grad=requires_grad,
        deterministic=deterministic,
    )
    return dataclasses.replace(config, bias_requires_grad=bias_grad)


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
    requires_grad: bool,
    bias_requires_grad: bool,
    deterministic: bool,
    backend: str,
    strict: bool,
) -> tuple[Tensor, Tensor]:
    """Forward on canonical inputs (`AttentionInputs`): out and lse."""
    inputs = AttentionInputs(q, k, v, mask, bias, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, kv_lens,
                             block_table, dropout_seed)  # fmt: skip
    scalars = (softmax_scale, causal, window_left, window_right, softcap, dropout_p, max_seqlen_q, max_seqlen_k,
               requires_grad, bias_requires_grad, deterministic)  # fmt: skip
    out, lse = _forward(_config_of(inputs, scalars), inputs, backend, strict)
    assert lse is not None
    return out.contiguous(), lse.contiguous()  # as the fake promises; a backend of torch ops may return a view


@attention_fwd.register_fake
def _attention_fwd_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    return out, q.new_empty(_lse_shape(q), dtype=_lse_dtype(q))


@torch.library.custom_op("regard::attention_bwd", mutates_args=())
def attention_bwd(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
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
    requires_grad: bool,
    bias_requires_grad: bool,
    deterministic: bool,
    backend: str,
    strict: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, bias and sinks; those of absent inputs are empty tensors."""
    inputs = AttentionInputs(q, k, v, mask, bias, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, kv_lens,
                             block_table, dropout_seed)  # fmt: skip
    scalars = (softmax_scale, causal, window_left, window_right, softcap, dropout_p, max_seqlen_q, max_seqlen_k,
               requires_grad, bias_requires_grad, deterministic)  # fmt: skip
    found = _backward(_config_of(inputs, scalars), inputs, backend, strict, out, lse, grad_out, grad_lse)
    gradients = []
    for name in DIFFERENTIABLE_INPUTS:
        tensor, gradient = getattr(inputs, name), found.get(name)
        if tensor is None:
            gradients.append(q.new_empty(0))
        else:
            gradients.append(torch.zeros_like(tensor) if gradient is None else gradient.to(tensor.dtype).contiguous())
    return tuple(gradients)  # type: ignore[return-value]  # five, as DIFFERENTIABLE_INPUTS has


def _backward(
    config: AttentionConfig,
    inputs: AttentionInputs,
    backend: str,
    strict: bool,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
) -> Gradients:
    """Run a backend's backward. Unless strict, a failing kernel is quarantined and the next backend takes over."""
    if config.is_empty:  # then lse is the sink's own logit
        if inputs.sinks is None or grad_lse is None:
            return {}
        return {"sinks": grad_lse.sum((0, 2) if grad_lse.ndim == 3 else 1)}
    while True:
        try:
            return registry.get(backend).backward(config, inputs, out, lse, grad_out, grad_lse)
        except _NOT_THE_KERNELS_FAULT:
            raise
        except Exception as error:
            if strict:
                raise
            registry.quarantine(backend, config, error)
            backend = registry.select(config, "auto").backend


@attention_bwd.register_fake
def _attention_bwd_fake(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = AttentionInputs(*arguments[: len(AttentionInputs._fields)])
    tensors = [getattr(inputs, name) for name in DIFFERENTIABLE_INPUTS]
    return tuple(inputs.q.new_empty(0) if t is None else t.new_empty(t.shape) for t in tensors)  # type: ignore[return-value]  # five


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors = len(AttentionInputs._fields)
    ctx.save_for_backward(*output, *inputs[:tensors])
    ctx.scalars = inputs[tensors:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    computed = attention_bwd(grad_out, grad_lse, out, lse, *tensors, *ctx.scalars)
    found = dict(zip(DIFFERENTIABLE_INPUTS, computed, strict=True))
    gradients = [
        found[name] if name in found and tensor is not None and ctx.needs_input_grad[index] else None
        for index, (name, tensor) in enumerate(zip(AttentionInputs._fields, tensors, strict=True))
    ]
    return (*gradients, *(None for _ in ctx.scalars))


attention_fwd.register_autograd(_differentiate, setup_context=_save_for_backward)
