"""A kernel launch, made once through Triton's JIT and from then on past it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.backends.triton_launcher import direct_launch, with_tensor
from regard.config import AttentionConfig, AttentionInputs

_HERE = contextlib.nullcontext()


class Launch(NamedTuple):
    """One kernel launch: everything but the device."""

    kernel: Any
    programs: int
    arguments: Mapping[str, Any]
    options: Mapping[str, int]

    def run(self, device: torch.device) -> Any:
        """Launch, and return the compiled kernel."""
        with on_device(device):
            return self.kernel[(self.programs,)](**self.arguments, **self.options)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make the device current, which Triton launches on; that costs microseconds where it is not already."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return _HERE
    return torch.cuda.device(device)


def new_results(config: AttentionConfig, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Memory for out and lse.

    Allocated like tensors of one element that are kept: half the host time of giving shape, dtype and device anew.
    """
    q = inputs.q
    key = (new_results, q.device)
    if key not in config.prepared:
        config.prepared[key] = (
            q.new_empty(()).expand(inputs.out_shape),
            q.new_empty((), dtype=torch.float32).expand(inputs.lse_shape),
        )
    out, lse = config.prepared[key]
    return (
        torch.empty_like(out, memory_format=torch.contiguous_format),
        torch.empty_like(lse, memory_format=torch.contiguous_format),
    )


def appearance(tensors: Iterable[Tensor | None]) -> tuple[Any, ...]:
    """What a launch depends on beyond its config: strides, dtypes and alignment of the tensors that are there.

    Triton compiles for dtypes and for addresses that are multiples of 16, and strides are arguments.
    """
    return tuple([t if t is None else (t.stride(), t.dtype, t.data_ptr() % 16 == 0) for t in tensors])


class Repetition:
    """A launch to be made again on other tensors that look the same.

    It goes past Triton's JIT, which would look over some forty arguments anew to find the kernel that is already known,
    and where that is possible past the Python of Triton's launcher.
    """

    def __init__(self, launch: Launch, compiled: Any, tensors: Iterable[str], device: torch.device) -> None:
        """``tensors``: names of the arguments that are tensors or describe one, in the order that `run` takes them."""
        names, values = list(launch.arguments), list(launch.arguments.values())
        self._places = [names.index(name) for name in tensors]
        self._direct = direct_launch(compiled, launch.programs, values, self._places, device)
        self._launch = compiled[(launch.programs, 1, 1)]
        self._values = [with_tensor(value, None) if hasattr(value, "base") else value for value in values]
        for place in self._places:
            if isinstance(values[place], Tensor):
                self._values[place] = None

    def run(self, tensors: Sequence[Tensor | None]) -> None:
        """Launch on the current device."""
        if self._direct is not None and not self._direct.is_watched():
            self._direct.run(tensors)
            return
        values = self._values.copy()
        for place, tensor in zip(self._places, tensors, strict=True):
            values[place] = tensor if values[place] is None else with_tensor(values[place], tensor)
        self._launch(*values)


def launch_and_remember(
    launch: Launch, device: torch.device, tensors: Iterable[str], launches: dict[Any, Any], key: Any
) -> None:
    """Launch, and keep the `Repetition` under a key; Triton's interpreter compiles nothing that could be repeated."""
    compiled = launch.run(device)
    if compiled is not None:
        launches[key] = Repetition(launch, compiled, tensors, device)
