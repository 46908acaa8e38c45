"""A kernel launch, made once through Triton's JIT and from then on past it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    """Memory for out and lse."""
    return allocate(*results_without_memory(config, inputs))


def results_without_memory(config: AttentionConfig, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Tensors of one element with the looks of out and lse, kept with the config.

    To allocate like them takes half the host time of giving shape, dtype and device anew.
    """
    q = inputs.q
    key = (results_without_memory, q.device)
    if key not in config.prepared:
        config.prepared[key] = (
            q.new_empty(()).expand(inputs.out_shape),
            q.new_empty((), dtype=torch.float32).expand(inputs.lse_shape),
        )
    found: tuple[Tensor, Tensor] = config.prepared[key]
    return found


def allocate(out: Tensor, lse: Tensor, form: torch.memory_format = torch.contiguous_format) -> tuple[Tensor, Tensor]:
    """Contiguous memory for tensors like these."""
    return torch.empty_like(out, memory_format=form), torch.empty_like(lse, memory_format=form)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """Its elements side by side, where it is there."""
    return None if tensor is None else tensor.contiguous()


def is_aligned(tensor: Tensor) -> bool:
    """Whether an address is a multiple of 16, or will be: without storage it is taken for one."""
    return tensor.is_meta or tensor.data_ptr() % 16 == 0


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

    def __init__(self, launch: Launch, compiled: Any, tensors: Sequence[str], device: torch.device) -> None:
        """``tensors``: names of what `run` takes, in its order: every argument that is a tensor or describes one, and
        others that the kernel may lack.
        """
        names, values = list(launch.arguments), list(launch.arguments.values())
        assert names == list(launch.kernel.arg_names)
        self._places = {
            number: names.index(name)
            for number, name in enumerate(tensors)
            if launch.arguments.get(name) is not None  # another launch may have what this one lacks
        }
        self._direct = direct_launch(compiled, launch.programs, values, self._places, device)
        self._launch = compiled[(launch.programs, 1, 1)]
        self._values = [with_tensor(value, None) if hasattr(value, "base") else value for value in values]
        for place in self._places.values():
            if isinstance(values[place], Tensor):
                self._values[place] = None
        assert not any(isinstance(value, Tensor) for value in self._values), "a tensor would be that of the first call"

    def run(self, tensors: Sequence[Tensor | None]) -> None:
        """Launch on the current device."""
        if self._direct is not None and not self._direct.is_watched():
            self._direct.run(tensors)
            return
        values = self._values.copy()
        for number, place in self._places.items():
            tensor = tensors[number]
            values[place] = tensor if values[place] is None else with_tensor(values[place], tensor)
        self._launch(*values)


def launch_or_repeat(
    known: dict[Any, Any],
    key: Any,
    tensors: Mapping[str, Tensor | None],
    launches: Callable[[], Sequence[Launch]],
    device: torch.device,
) -> None:
    """Launch on the current device: the first time through Triton's JIT, and from then on by `Repetition`.

    Args:
        known: where repetitions are kept, by key.
        key: all that the launches depend on, other than values in tensors.
        tensors: all that the launches take, by the arguments' names, always in the same order.
        launches: makes them, in their order; not called where they are known.
        device: the current one.
    """
    repetitions: Sequence[Repetition] | None = known.get(key)
    if repetitions is not None:
        values = tuple(tensors.values())
        for repetition in repetitions:
            repetition.run(values)
        return
    made = launches()
    compiled = [launch.run(device) for launch in made]
    if all(kernel is not None for kernel in compiled):  # Triton's interpreter compiles nothing
        names = tuple(tensors)
        known[key] = [Repetition(launch, kernel, names, device) for launch, kernel in zip(made, compiled, strict=True)]


class PlainCalls:
    """A `regard.registry.Shortcut`: of calls of q, k and v alone only addresses change, once their launch is known.

    Until then, and where it is another one (at addresses that are no multiples of 16, or on a device that is not
    current), a call goes through the backend's forward.
    """

    def __init__(
        self,
        forward: Callable[[AttentionConfig, AttentionInputs], tuple[Tensor, Tensor | None]],
        config: AttentionConfig,
        layout: str,
        key: Callable[[AttentionInputs], Any],
        arguments: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Sequence[Tensor | None]],
    ) -> None:
        """Args:
        forward: of the backend; must launch on q, k and v as they are.
        config, layout: of the calls.
        key: under what ``forward`` keeps the `Repetition` of each launch.
        arguments: what those are to be run on, given q, k, v, out and lse, of which only the addresses are right.
        """
        self._forward, self._config, self._transposed = forward, config, layout == "bhsd"
        self._key, self._arguments = key, arguments
        self._known: tuple[Sequence[Repetition], int | None, Tensor, Tensor] | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        aligned = (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16 == 0
        if self._known is None or not aligned:
            return self._long_way(q, k, v, aligned)
        repetitions, device, out_like, lse_like = self._known
        if torch.cuda.current_device() != device:
            return self._long_way(q, k, v, False)
        out, lse = allocate(out_like, lse_like)
        tensors = self._arguments(q, k, v, out, lse)
        for repetition in repetitions:
            repetition.run(tensors)
        return out.transpose(1, 2) if self._transposed else out

    def _long_way(self, q: Tensor, k: Tensor, v: Tensor, usual: bool) -> Tensor:
        if self._transposed:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        inputs = AttentionInputs(q, k, v)
        out, _ = self._forward(self._config, inputs)
        if usual and (found := self._config.prepared.get(self._key(inputs))) is not None:
            self._known = found, q.device.index, *results_without_memory(self._config, inputs)
        return out.transpose(1, 2) if self._transposed else out
