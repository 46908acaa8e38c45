"""A kernel launch, made once through Triton's JIT and from then on past it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

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


def appearance(tensors: Iterable[Tensor | None]) -> tuple[Any, ...]:
    """What a launch depends on beyond its config: strides, dtypes and alignment of the tensors that are there.

    Triton compiles for dtypes and for addresses that are multiples of 16, and strides are arguments.
    """
    return tuple([t if t is None else (t.stride(), t.dtype, t.data_ptr() % 16 == 0) for t in tensors])


def launch_or_repeat(
    launches: dict[Any, Any],
    key: Any,
    tensors: Mapping[str, Tensor | None],
    make: Callable[[], Launch],
    device: torch.device,
) -> None:
    """Make a launch, or make it again on other tensors where ``launches`` has one under this key.

    Args:
        launches: such as ``config.prepared``.
        key: everything that the launch depends on but the addresses of its tensors, as far as ``launches`` does not.
        tensors: the arguments that are tensors by name, and those that TMA describes, in an order of their own.
        make: the launch itself.
        device: which must be the current one.
    """
    known: _Repetition | None = launches.get(key)
    if known is not None:
        known.run(tensors.values())
        return
    launch = make()
    compiled = launch.run(device)
    if compiled is not None:  # Triton's interpreter compiles nothing
        launches[key] = _Repetition(launch, compiled, tensors)


class _Repetition:
    """A launch to be made again with other tensors that look the same.

    It goes past Triton's JIT, which would look over some forty arguments anew to find the kernel that is already known.
    """

    def __init__(self, launch: Launch, compiled: Any, tensors: Iterable[str]) -> None:
        """``tensors``: names of the arguments that `run` is given, in its order."""
        names = list(launch.arguments)
        self._launch = compiled[(launch.programs, 1, 1)]
        self._values = list(launch.arguments.values())
        self._places = [names.index(name) for name in tensors]
        self._descriptors: list[tuple[type, dict[str, Any]] | None] = []
        for place in self._places:
            value, self._values[place] = self._values[place], None
            described = value is not None and not isinstance(value, Tensor)
            self._descriptors.append((type(value), {**value.__dict__, "base": None}) if described else None)

    def run(self, tensors: Iterable[Tensor | None]) -> None:
        """Launch on these tensors."""
        values = self._values.copy()
        for place, descriptor, tensor in zip(self._places, self._descriptors, tensors, strict=True):
            if descriptor is None:
                values[place] = tensor
            else:
                kind, fields = descriptor
                made: Any = object.__new__(kind)
                made.__dict__ = {**fields, "base": tensor}
                values[place] = made
        self._launch(*values)
