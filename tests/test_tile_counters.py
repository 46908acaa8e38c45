"""The counters of persistent kernels: one a stream, and one of its own for every launch in a captured graph."""

import weakref

import pytest
import torch

from regard.backends import tile_counters
from regard.backends.tile_counters import tile_counter

CPU = torch.device("cpu")


class Stream:
    def synchronize(self):
        pass


@pytest.fixture
def gpu(monkeypatch):
    """A current stream and whether it is being captured, as torch.cuda would say."""

    class State:
        stream, capturing = 1, False

    monkeypatch.setattr(tile_counters, "_of_streams", {})
    monkeypatch.setattr(tile_counters, "_spare", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: State.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: State.stream, raising=False)
    return State


def test_launches_on_one_stream_share_a_counter(gpu):
    first = tile_counter(CPU)
    assert first.dtype == torch.int32 and first.tolist() == [0, 0]
    assert tile_counter(CPU) is first
    gpu.stream = 2
    assert tile_counter(CPU).data_ptr() != first.data_ptr()


def test_every_captured_launch_has_a_counter_made_beforehand(gpu, monkeypatch):
    of_stream = tile_counter(CPU)
    gpu.capturing = True
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: pytest.fail("the graph would fill it every time"))
    counters = [tile_counter(CPU) for _ in range(100)]
    addresses = {counter.data_ptr() for counter in [of_stream, *counters]}
    assert len(addresses) == 101
    assert all(counter.data_ptr() % 16 == 0 and counter.tolist() == [0, 0] for counter in counters)


def test_captured_launches_without_one_fill_theirs(gpu, monkeypatch):
    gpu.capturing = True
    assert tile_counter(CPU).tolist() == [0, 0], "nothing ran on this device before"
    gpu.capturing = False
    monkeypatch.setattr(tile_counters, "_SPARE", 2)
    tile_counter(CPU)
    gpu.capturing = True
    counters = [tile_counter(CPU) for _ in range(4)]
    assert len({counter.data_ptr() for counter in counters}) == 4
    assert all(counter.tolist() == [0, 0] for counter in counters)


def test_memory_of_graphs_outlives_the_last_counter_made_beforehand(gpu, monkeypatch):
    made, zeros = [], torch.zeros

    def noted(*shape, **options):
        tensor = zeros(*shape, **options)
        made.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    monkeypatch.setattr(torch, "zeros", noted)
    monkeypatch.setattr(tile_counters, "_SPARE", 2)
    tile_counter(CPU)
    gpu.capturing = True
    for _ in range(3):
        tile_counter(CPU)  # a graph keeps the address only
    assert made[1]() is not None
