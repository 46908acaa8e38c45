"""Whether a call is looked at by something other than its backend: a tracer, a transform, a dispatch mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import TransformType, peek_interpreter_stack
from torch.autograd import forward_ad

_PLAIN = (Tensor, torch.nn.Parameter)


def is_watched() -> bool:
    """Whether something looks at every call: torch.compile, a dispatch mode, a transform, forward-mode derivatives; or
    torch.jit.trace, which `AttentionConfig.from_tensors` refuses.
    """
    return (
        torch.compiler.is_compiling()
        or _get_tracing_state() is not None
        or peek_interpreter_stack() is not None
        or is_watched_silently()
    )


def is_watched_silently() -> bool:
    """The part of `is_watched` that the dispatcher's state, as torch's guards compare it, does not always show."""
    return _len_torch_dispatch_stack() > 0 or forward_ad._current_level >= 0


def is_traced(tensors: Iterable[object]) -> bool:
    """Whether some of these tensors may have no memory or values to look at, or operations on them are recorded.

    True while torch.compile traces, under a torch dispatch mode (fake tensors, FLOP counters), inside a torch.func
    transform or a level of forward-mode differentiation, for tensor subclasses, and for lazily negated views (such as
    ``z.conj().imag``), whose memory holds the wrong sign until an operation of torch has resolved it.
    """
    if is_watched():
        return True
    for tensor in tensors:  # noqa: SIM110 - this runs in every call, and any() takes twice as long
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_neg()):  # type: ignore[attr-defined]
            return True
    return False


def are_batched_gradients(gradients: Iterable[Tensor | None]) -> bool:
    """Whether autograd asks with ``is_grads_batched``, whose batched tensors are not on torch.func's stack."""
    is_batched: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor
    return any(gradient is not None and is_batched(gradient) for gradient in gradients)


def is_transformed(tensors: Iterable[object]) -> bool:
    """Whether torch.func.grad, jvp or forward-mode differentiation want derivatives that autograd does not ask for.

    Only what is made of torch operations has those.
    """
    stack = torch._C._functorch.get_interpreter_stack() or ()
    if any(interpreter.key() in (TransformType.Grad, TransformType.Jvp) for interpreter in stack):
        return True
    if forward_ad._current_level < 0:
        return False
    unpack: Callable[[Tensor], tuple[Tensor, Tensor | None]] = forward_ad.unpack_dual
    return any(isinstance(t, Tensor) and unpack(t)[1] is not None for t in tensors)


def requires_grad(tensor: Tensor) -> bool:
    """What the tensor says, or inside torch.func.vmap, what the tensor that is mapped over says."""
    while not tensor.requires_grad and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.requires_grad
