"""From a chosen backend to its kernel: straight, by an autograd function, or by a custom op where a call is traced.

`regard::attention_fwd` and `regard::attention_bwd` are opaque to torch.compile and carry the chosen backend's name, so
a graph keeps the choice that was made when it was traced.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from regard import lengths, plans
from regard.backends.reference import ReferenceBackend
from regard.config import DIFFERENTIABLE_INPUTS, AttentionConfig, AttentionInputs
from regard.errors import ConfigError, FallbackWarning, UnsupportedError
from regard.registry import Gradients, Selection, backend_is_composed_of_torch_ops, registry
from regard.tracing import are_batched_gradients, is_traced

# Errors that a different backend would meet as well, or that are the caller's to handle: never a reason to fall back.
_NOT_THE_KERNELS_FAULT = (ConfigError, UnsupportedError, torch.OutOfMemoryError)


def attend(
    config: AttentionConfig, inputs: AttentionInputs, selection: Selection, *, traced: bool
) -> tuple[Tensor, Tensor | None]:
    """Run the selected backend, differentiably where ``config.requires_grad``.

    Args:
        config, inputs: the call.
        selection: which backend, and whether another may take over if its kernel fails.
        traced: what `is_traced` says of the inputs; then the call is recorded as a custom op.

    Returns:
        out (B, Sq, Hq, Dv) and lse (B, Hq, Sq), or packed out (total_q, Hq, Dv) and lse (Hq, total_q); lse may be None
        where it was not asked for.
    """
    if traced or config.requires_grad:
        backend = registry.get(selection.backend)
        opaque = config.is_empty or (traced and config.varlen and not config.transformed)  # offsets have no values yet
        if backend_is_composed_of_torch_ops(backend) and not opaque:
            return backend.forward(config, inputs)
        if traced:
            _inform_flop_counters()
            out, lse = attention_fwd(*inputs, *_scalars(config), selection.backend, selection.strict)
        else:
            out, lse = _Attention.apply(config, selection.backend, selection.strict, *inputs)  # type: ignore[no-untyped-call]
        return out, lse
    return _forward(config, inputs, selection.backend, selection.strict)


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
    out = inputs.q.new_zeros(inputs.out_shape)
    lse = inputs.q.new_full(inputs.lse_shape, float("-inf"), dtype=_lse_dtype(inputs.q))
    if inputs.sinks is not None:
        lse = torch.maximum(lse, inputs.sinks.to(lse.dtype)[:, None])
    return out, lse


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
    if inputs.cu_seqlens_q is None:
        max_q = max_k = None
    window = None if left is None and right is None else (left, right)
    dropout_p = 0.0 if inputs.dropout_seed is None else dropout_p
    options = ("bshd", causal, window, scale, softcap, dropout_p, True, deterministic, max_q, max_k, requires_grad,
               bias_grad)  # fmt: skip
    return plans.describe(inputs[:-1], options, traced=is_traced(inputs))


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
    inputs = AttentionInputs(q, k, v)
    return q.new_empty(inputs.out_shape), q.new_empty(inputs.lse_shape, dtype=_lse_dtype(q))


@attention_fwd.register_vmap
def _attention_fwd_mapped(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    """torch.func.vmap: one call on a larger batch where the inputs have a batch dimension, else one call an element."""
    tensors = len(AttentionInputs._fields)
    leading: list[Any] = [
        t if dim is None else t.movedim(dim, 0) for t, dim in zip(arguments[:tensors], in_dims[:tensors], strict=True)
    ]
    inputs = AttentionInputs._make(leading)
    mapped: Any = AttentionInputs._make(dim is not None for dim in in_dims[:tensors])
    scalars, size = arguments[tensors:], info.batch_size
    packed_or_paged = inputs.cu_seqlens_q is not None or inputs.block_table is not None
    if packed_or_paged or inputs.dropout_seed is not None or mapped.sinks:
        calls = [
            attention_fwd(*(t[i] if is_mapped else t for t, is_mapped in zip(leading, mapped, strict=True)), *scalars)
            for i in range(size)
        ]
        results = [torch.stack(each) for each in zip(*calls, strict=True)]
    else:
        batch = inputs.q.shape[1 if mapped.q else 0]
        folded = [
            _fold_into_batch(t, is_mapped, size, batch, name)
            for name, t, is_mapped in zip(AttentionInputs._fields, inputs, mapped, strict=True)
        ]
        results = [each.unflatten(0, (size, batch)) for each in attention_fwd(*folded, *scalars)]
    return tuple(results), (0, 0)


def _fold_into_batch(tensor: Tensor | None, is_mapped: bool, size: int, batch: int, name: str) -> Tensor | None:
    """(size, B, ...), or (B, ...) for every element alike, as (size * B, ...); what broadcasts over both stays."""
    if tensor is None or (not is_mapped and (name == "sinks" or (name == "alibi_slopes" and tensor.ndim == 1))):
        return tensor
    if not is_mapped and name in ("mask", "bias") and tensor.shape[0] == 1:
        return tensor
    if not is_mapped:
        tensor = tensor.expand(size, *tensor.shape)
    if name == "alibi_slopes" and tensor.ndim == 2:
        tensor = tensor[:, None]
    return tensor.expand(size, batch, *tensor.shape[2:]).flatten(0, 1)


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
    return _ordered(found, inputs)  # type: ignore[return-value]  # five, as DIFFERENTIABLE_INPUTS has


def _ordered(found: Gradients, inputs: AttentionInputs) -> tuple[Tensor, ...]:
    """Gradients in the order of `DIFFERENTIABLE_INPUTS`, as `attention_bwd`'s fake promises them."""
    gradients = []
    for name in DIFFERENTIABLE_INPUTS:
        tensor, gradient = getattr(inputs, name), found.get(name)
        if tensor is None:
            gradients.append(inputs.q.new_empty(0))
        elif gradient is None:
            gradients.append(tensor.new_zeros(tensor.shape))
        else:
            gradients.append(gradient.to(tensor.dtype).contiguous())
    return tuple(gradients)


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
            with _without_autocast(inputs.q.device.type):
                return registry.get(backend).backward(config, inputs, out, lse, grad_out, grad_lse)
        except _NOT_THE_KERNELS_FAULT:
            raise
        except Exception as error:
            if strict:
                raise
            registry.quarantine(backend, config, error)
            backend = registry.select(config, "auto").backend


def _without_autocast(device: str) -> contextlib.AbstractContextManager[object]:
    """A backend computes in the precision of its inputs, also when ``backward()`` is called inside autocast."""
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


@attention_bwd.register_fake
def _attention_bwd_fake(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = AttentionInputs(*arguments[: len(AttentionInputs._fields)])
    tensors = [getattr(inputs, name) for name in DIFFERENTIABLE_INPUTS]
    return tuple(inputs.q.new_empty(0) if t is None else t.new_empty(t.shape) for t in tensors)  # type: ignore[return-value]  # five


def _differentiate_twice(
    config: AttentionConfig,
    inputs: AttentionInputs,
    backend: str,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    seeds: Sequence[Tensor | None],
) -> dict[str, Tensor | None]:
    """Gradients of a backward pass: of every differentiable input, ``grad_out`` and ``grad_lse``, by name.

    Kernels have no second derivative, so this differentiates the reference's own backward: exact, but with memory
    quadratic in the lengths.

    Args:
        config, inputs, grad_out, grad_lse: what the backward was given.
        backend: whose backward it was; the warning names it.
        seeds: gradients of its results, in the order of `DIFFERENTIABLE_INPUTS`.
    """
    points = {name: getattr(inputs, name) for name in DIFFERENTIABLE_INPUTS} | {
        "grad_out": grad_out, "grad_lse": grad_lse
    }  # fmt: skip
    if config.is_empty or all(seed is None for seed in seeds):
        return dict.fromkeys(points)  # of an empty call the gradients are constant
    _warn_of_second_derivative(backend)
    with torch.enable_grad():
        # Aliases, so that what one input owes to another does not count twice.
        points = {
            name: point.view_as(point) if point.requires_grad else point.detach().requires_grad_()
            for name, point in points.items()
            if point is not None
        }
        leaves = {name: points[name] for name in DIFFERENTIABLE_INPUTS if name in points}
        out, lse = ReferenceBackend().forward(config, inputs._replace(**leaves))
        results, gradients = [out], [points["grad_out"]]
        if grad_lse is not None and lse is not None:
            results.append(lse)
            gradients.append(points["grad_lse"])
        first = dict(
            zip(leaves, torch.autograd.grad(results, list(leaves.values()), gradients, create_graph=True,
                                            allow_unused=True), strict=True)
        )  # fmt: skip
    wanted = [
        (first[name], seed)
        for name, seed in zip(DIFFERENTIABLE_INPUTS, seeds, strict=True)
        if seed is not None and first.get(name) is not None
    ]
    second = torch.autograd.grad(
        [gradient for gradient, _ in wanted], list(points.values()), [seed for _, seed in wanted],
        create_graph=torch.is_grad_enabled(), allow_unused=True,
    )  # fmt: skip
    return {**dict.fromkeys((*DIFFERENTIABLE_INPUTS, "grad_out", "grad_lse")), **dict(zip(points, second, strict=True))}


@functools.cache
def _warn_of_second_derivative(backend: str) -> None:
    warnings.warn(
        f"regard: backend {backend!r} has no second derivative; the reference computes it, with memory quadratic in "
        "the sequence length",
        FallbackWarning,
        stacklevel=2,
    )


def _save_for_second_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad_out, grad_lse, _, _, *arguments = inputs
    tensors = len(AttentionInputs._fields)
    ctx.save_for_backward(grad_out, grad_lse, *arguments[:tensors])
    ctx.scalars = arguments[tensors:]
    ctx.set_materialize_grads(False)


def _differentiate_gradient(ctx: Any, *seeds: Tensor | None) -> tuple[Tensor | None, ...]:
    (grad_out, grad_lse, *tensors), (*scalars, backend, _) = ctx.saved_tensors, ctx.scalars
    inputs = AttentionInputs(*tensors)
    second = _differentiate_twice(_config_of(inputs, tuple(scalars)), inputs, backend, grad_out, grad_lse, seeds)
    return (second["grad_out"], second["grad_lse"], None, None,
            *(second.get(name) for name in AttentionInputs._fields), *(None for _ in ctx.scalars))  # fmt: skip


attention_bwd.register_autograd(_differentiate_gradient, setup_context=_save_for_second_backward)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors = len(AttentionInputs._fields)
    ctx.save_for_backward(*output, *inputs[:tensors])
    ctx.scalars = inputs[tensors:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    found = attention_bwd(grad_out, grad_lse, out, lse, *tensors, *ctx.scalars)
    return (*_by_input(found, tensors, ctx.needs_input_grad), *(None for _ in ctx.scalars))


attention_fwd.register_autograd(_differentiate, setup_context=_save_for_backward)


def _forward_flops(*arguments: Any, out_val: object = None) -> int:
    """What `torch.utils.flop_counter` asks of `attention_fwd`."""
    return _flops(arguments, backward=False)


def _backward_flops(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any,
                    out_val: object = None) -> int:  # fmt: skip
    """What it asks of `attention_bwd`."""
    return _flops(arguments, backward=True)


def _flops(arguments: tuple[Any, ...], *, backward: bool) -> int:
    """`AttentionConfig.flops` of a custom op's call, of packed sequences one by one where their lengths can be read."""
    tensors = len(AttentionInputs._fields)
    inputs = AttentionInputs(*arguments[:tensors])
    config = _config_of(inputs, arguments[tensors:-2])
    packed = lengths.of_packed(inputs.cu_seqlens_q, inputs.cu_seqlens_k)
    if packed is None:
        return config.flops(backward=backward)
    return sum(
        replace(config, batch=1, seqlen_q=queries, seqlen_k=keys).flops(backward=backward) for queries, keys in packed
    )


def _inform_flop_counters() -> None:
    """Give torch's FLOP counters the formulas of these ops, those included that are counting already.

    Importing their module takes a while, and nobody has a counter without it.
    """
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    counters = [getattr(mode, "counter", None) for mode in _get_current_dispatch_mode_stack()]
    for known in (module, *(counter for counter in counters if isinstance(counter, module.FlopCounterMode))):
        known.flop_registry.setdefault(torch.ops.regard.attention_fwd, _forward_flops)
        known.flop_registry.setdefault(torch.ops.regard.attention_bwd, _backward_flops)


def _by_input(found: Sequence[Tensor], tensors: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
    """Gradients in the order of `DIFFERENTIABLE_INPUTS` put in the order of `AttentionInputs`."""
    named = dict(zip(DIFFERENTIABLE_INPUTS, found, strict=True))
    return [
        named[name] if name in named and tensor is not None and want else None
        for name, tensor, want in zip(AttentionInputs._fields, tensors, wanted[: len(tensors)], strict=True)
    ]


class _Attention(torch.autograd.Function):
    """What `attention_fwd` and its registered gradient do, without the dispatcher: for calls nobody traces."""

    @staticmethod
    def forward(ctx: Any, config: AttentionConfig, backend: str, strict: bool, *tensors: Any) -> tuple[Tensor, Tensor]:
        out, lse = _forward(config, AttentionInputs(*tensors), backend, strict)
        assert lse is not None
        ctx.save_for_backward(out, lse, *tensors)
        ctx.call = config, backend, strict
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse, *tensors = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        config, backend, strict = ctx.call
        if is_traced((grad_out, grad_lse)) or are_batched_gradients((grad_out, grad_lse)):
            _inform_flop_counters()
            scalars = *_scalars(config), backend, strict
            found = attention_bwd(grad_out, grad_lse, out, lse, *tensors, *scalars)
        else:
            found = _AttentionGradient.apply(*ctx.call, grad_out, grad_lse, out, lse, *tensors)  # type: ignore[no-untyped-call]
        return (None, None, None, *_by_input(found, tensors, ctx.needs_input_grad[3:]))


class _AttentionGradient(torch.autograd.Function):
    """What `attention_bwd` does, likewise."""

    @staticmethod
    def forward(
        ctx: Any,
        config: AttentionConfig,
        backend: str,
        strict: bool,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        inputs = AttentionInputs(*tensors)
        found = _backward(config, inputs, backend, strict, out, lse, grad_out, grad_lse)
        ctx.save_for_backward(grad_out, grad_lse, *tensors)
        ctx.call = config, backend
        ctx.set_materialize_grads(False)
        return _ordered(found, inputs)

    @staticmethod
    def backward(ctx: Any, *seeds: Tensor | None) -> tuple[Tensor | None, ...]:
        (config, backend), (grad_out, grad_lse, *tensors) = ctx.call, ctx.saved_tensors
        second = _differentiate_twice(config, AttentionInputs(*tensors), backend, grad_out, grad_lse, seeds)
        return (None, None, None, second["grad_out"], second["grad_lse"], None, None,
                *(second.get(name) for name in AttentionInputs._fields))  # fmt: skip
