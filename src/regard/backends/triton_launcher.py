"""Past the Python of Triton's launcher for NVIDIA GPUs, to the C function behind it.

In every launch Triton asks for the device, calls hooks that are not there, looks up each pointer, flattens descriptors
and encodes a TMA map for each of them: longer, together, than all the rest of a call. What has to be known of Triton's
internals to do without stands here alone; where they are not as expected, launches go Triton's way.
"""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

KNOWN_MAPS = 128  # a descriptor, some 400 bytes each; few models have as many layers


def with_tensor(descriptor: Any, tensor: Tensor | None) -> Any:
    """A TMA descriptor like this one, of another tensor: past the constructor, which would check what is known."""
    made = object.__new__(type(descriptor))
    made.__dict__ = {**descriptor.__dict__, "base": tensor}
    return made


class TensorMaps:
    """The TMA maps of one descriptor argument by address.

    A map says address, sizes, strides, tile and dtype, and all but the address are the descriptor's. It keeps no memory
    alive: the map of an address that was freed is used again only for a tensor that lies there and looks the same.
    """

    def __init__(self, descriptor: Any, encode: Callable[[Any], Any]) -> None:
        """``encode`` makes the map of such a descriptor."""
        self._descriptor, self._encode = with_tensor(descriptor, None), encode
        self.known: dict[int, Any] = {}
        self.add(descriptor.base)

    def add(self, tensor: Tensor) -> Any:
        """Encode the map of a tensor, and keep it."""
        if len(self.known) >= KNOWN_MAPS:
            self.known.clear()
        made = self.known[tensor.data_ptr()] = self._encode(with_tensor(self._descriptor, tensor))
        return made


class DirectLaunch:
    """A launch that gives Triton's C function what Triton gave it, but for the stream, addresses and TMA maps.

    Addresses are given as numbers, which the C function takes without asking the driver what they are.
    """

    def __init__(
        self, compiled: Any, programs: int, arguments: Sequence[Any], places: Mapping[int, int], device: torch.device
    ) -> None:
        """Take down what Triton says.

        Args:
            compiled: the kernel, as an earlier launch returned it.
            programs, arguments: of that launch; the arguments in the kernel's order.
            places: of the arguments that `run` takes anew (tensors, descriptors, or None, which stay None), by their
                numbers among what it takes.
            device: of the tensors.

        Raises:
            Exception: of any kind, where Triton's launcher is not as expected.
        """
        from triton import knobs
        from triton.backends.nvidia import driver

        self._knobs = knobs.runtime
        self._device = device.index
        self._compiled = compiled  # some versions unload the kernel with it
        stream = object()
        marks = {place: object() for place in places.values() if isinstance(arguments[place], Tensor)}
        marked = [marks.get(place, argument) for place, argument in enumerate(arguments)]
        self._function, said = _said_to_c(compiled, programs, stream, marked, driver.CudaLauncher)
        # Triton 3.6 says the kernel's arguments in one row with its own, later versions in a row at the end of that.
        nested = not any(value is mark for value in said for mark in marks.values())
        self._own = list(said[:-1]) if nested else None
        self._values = list(said[-1] if nested else said)
        self._stream = _index(said, stream)
        self._pointers = [
            (number, _index(self._values, marks[place])) for number, place in places.items() if place in marks
        ]
        described = [(place, number) for number, place in places.items() if hasattr(arguments[place], "base")]
        found = [index for index, value in enumerate(self._values) if isinstance(value, driver.PyCUtensorMap)]
        self._maps = [
            (number, index, TensorMaps(arguments[place], encode))
            for (place, number), index, encode in zip(
                sorted(described), found, _encoders(compiled, len(described), driver), strict=True
            )
        ]

    def is_watched(self) -> bool:
        """Whether a profiler has hooks on launches; those are called on Triton's way only."""
        enter, leave = self._knobs.launch_enter_hook, self._knobs.launch_exit_hook
        return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))

    def run(self, tensors: Sequence[Tensor | None]) -> None:
        """Launch on the current stream.

        Args:
            tensors: by the numbers of ``places``, on the current device, looking as those of the first launch did.
        """
        values = self._values.copy()
        for number, index in self._pointers:
            values[index] = tensors[number].data_ptr()  # type: ignore[union-attr]
        for number, index, maps in self._maps:
            tensor: Tensor = tensors[number]  # type: ignore[assignment]
            values[index] = maps.known.get(tensor.data_ptr()) or maps.add(tensor)
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        if self._own is None:
            values[self._stream] = stream
            self._function(*values)
        else:
            own = self._own.copy()
            own[self._stream] = stream
            self._function(*own, values)


def direct_launch(
    compiled: Any, programs: int, arguments: Sequence[Any], places: Mapping[int, int], device: torch.device
) -> DirectLaunch | None:
    """A `DirectLaunch`, or None where Triton's launcher is another one or not as expected."""
    try:
        return DirectLaunch(compiled, programs, arguments, places, device)
    except Exception:  # nothing of this is promised by Triton, and its own way remains
        return None


def _said_to_c(
    compiled: Any, programs: int, stream: object, arguments: Sequence[Any], expected: Any
) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """Triton's C function, and what it would be given for a launch, which is not made."""
    launcher: Any = compiled.run
    needed = (launcher.global_scratch_size, launcher.profile_scratch_size, getattr(launcher, "gsan_enabled", False))
    if type(launcher) is not expected or any(needed):
        raise NotImplementedError("another launcher, or one that allocates memory for each launch")
    said: list[tuple[Any, ...]] = []

    def note(*values: Any) -> None:
        said.append(values)

    probe, function = copy.copy(launcher), launcher.launch
    probe.launch = note
    if isinstance(function, types.FunctionType) and "launcher" in function.__code__.co_freevars:
        # Triton's Python around the C function, which flattens descriptors: the same with `note` in its place.
        around, names = function, function.__code__.co_freevars
        cells = dict(zip(names, around.__closure__ or (), strict=True))
        function = cells["launcher"].cell_contents
        closure = tuple(types.CellType(note) if name == "launcher" else cell for name, cell in cells.items())
        probe.launch = types.FunctionType(around.__code__, around.__globals__, closure=closure)
    probe(programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)
    return function, *said


def _encoders(compiled: Any, count: int, driver: Any) -> list[Callable[[Any], Any]]:
    """For each descriptor argument of a kernel what makes a TMA map of such a descriptor."""
    make = driver.make_tensordesc_arg
    others = [None] * (len(inspect.signature(make).parameters) - 2)  # of no use to TMA

    def encoder(tile: Any) -> Callable[[Any], Any]:
        return lambda descriptor: make(descriptor, tile, *others)[0]

    return [encoder(tile) for tile in (compiled.metadata.tensordesc_meta if count else ())]


def _index(values: Sequence[Any], wanted: object) -> int:
    (index,) = (index for index, value in enumerate(values) if value is wanted)
    return index
