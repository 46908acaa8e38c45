"""Whether a call is looked at by something other than its backend: a tracer, a transform, a dispatch mode."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)


def is_traced(tensors: Iterable[object]) -> bool:
    """Whether some of these tensors may have no memory or values to look at, or operations on them are recorded.

    True while torch.compile traces, under a torch dispatch mode (fake tensors, FLOP counters), inside a torch.func
    transform, and for tensor subclasses.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return True
    for tensor in tensors:  # noqa: SIM110 - this runs in every call, and any() takes twice as long
        if tensor is not None and type(tensor) not in _PLAIN:
            return True
    return False
