"""Counters from which the programs of a persistent kernel take their next tiles."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_of_streams: dict[tuple[int, int], Tensor] = {}
_spare: dict[int, Iterator[Tensor]] = {}
_SPARE = 2**14  # launches in all graphs that a process captures on a device; later ones fill theirs each time
_SPACING = 4  # int32 from one to the next: their addresses are multiples of 16


def tile_counter(device: torch.device) -> Tensor:
    """Two zeros of the current stream, int32, that every launch leaves as zeros.

    Launches on one stream follow each other. One in a captured graph may run beside them and beside others of its
    graph: it gets two of its own, made beforehand, so that the graph need not fill them with zeros.
    """
    if torch.cuda.is_current_stream_capturing():
        spare = next(_spare.get(device.index, iter(())), None)
        return torch.zeros(2, dtype=torch.int32, device=device) if spare is None else spare
    key = (device.index, torch._C._cuda_getCurrentRawStream(device.index))
    known = _of_streams.get(key)
    if known is None:
        known = _of_streams[key] = torch.zeros(2, dtype=torch.int32, device=device)
        if device.index not in _spare:
            _spare[device.index] = _made_beforehand(device)
    return known


def _made_beforehand(device: torch.device) -> Iterator[Tensor]:
    zeros = torch.zeros(_SPARE, _SPACING, dtype=torch.int32, device=device)
    torch.cuda.current_stream(device).synchronize()  # graphs run on any stream
    # Unlike a generator, `map` may be asked by several threads, and keeps the memory, which graphs use, at its end.
    return map(zeros[:, :2].__getitem__, range(_SPARE))
