"""Gluon kernels without a GPU: their functions as functions of Python, and what of a Hopper multiprocessor they need.

`plain` makes a kernel's function one of Python, which computes with whatever stands in for Gluon's names. `HOPPER` is
such a stand-in: its tensors are torch's, its barriers wait, the roles of a program are threads. It is as unkind as the
hardware may be: products and stores read shared memory at the last moment that the kernel's waits allow, a product of
what changed meanwhile is NaN, what is loaded comes no sooner than it is waited for, shared memory is NaN until it is
written and again once a ring's stage is given back, and a role that waits for ever is an error.
"""

import inspect
import itertools
import math
import sys
import threading
import time
from types import FunctionType, SimpleNamespace

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import ConstexprFunction

PATIENCE = 60
"""Seconds that a role waits for another."""


def cdiv(a, b):
    return -(-a // b)


INTEGERS = SimpleNamespace(maximum=max, minimum=min, cdiv=cdiv)
"""What functions that only reckon with integers need of Gluon."""


def plain(function, _known=None, **names):
    """A kernel's function, and those and the records it uses, as functions and classes of Python; ``names`` stand in
    for what its module has under these names."""
    made = {} if _known is None else _known
    if function not in made:
        known = dict(function.fn.__globals__)
        made[function] = FunctionType(function.fn.__code__, known, argdefs=function.fn.__defaults__)
        for name in set(function.fn.__code__.co_names) & set(known):
            known[name] = _plain_value(known[name], made, names)
        known.update(names)
    return made[function]


def _plain_value(value, made, names):
    if isinstance(value, gluon._runtime.GluonJITFunction):
        return plain(value, made, **names)
    if isinstance(value, gl.constexpr):
        return value.value
    if getattr(value, "__triton_aggregate__", False):
        return _plain_record(value, made, names)
    return value


def _plain_record(cls, made, names):
    """A `regard.kernels.hopper_pipeline.record` as a class of Python."""
    if cls not in made:
        initializer = next(each for each in cls.hash_attrs if isinstance(each, ConstexprFunction))
        fields = inspect.getclosurevars(initializer.fn).nonlocals["names"]

        def construct(self, *values):
            vars(self).update(zip(fields, values, strict=True))
            if "empty" in fields:
                _forget_on_release(self)

        made[cls] = made_class = type(cls.__name__, (), {"__init__": construct})
        for name, method in vars(cls).items():
            if isinstance(method, gluon._runtime.GluonJITFunction):
                setattr(made_class, name, plain(method, made, **names))
    return made[cls]


def _forget_on_release(ring):
    for stage in range(ring.STAGES):
        ring.empty.index(stage).forgets.append(ring.tiles.index(stage))


# --- How a program starts

SCRATCH = 640
"""Bytes of shared memory that the compiler takes beside what a kernel asks for, at most: the compile gate looks."""


class Numbers:
    """A place among numbers in global memory."""

    def __init__(self, *numbers, place=0):
        self.numbers, self.place = numbers, place

    def __add__(self, offset):
        return Numbers(*self.numbers, place=self.place + offset)

    def load(self, mask=None):
        return self.numbers[self.place]


def start_program(launch, number, **pointers):
    """What a program of a launch knows when its roles begin, by the names its kernel gives it, and how much shared
    memory it asked for, as "shared"; None where it ends before. Its pointers are `Numbers`."""
    known = {}
    asked = []

    def allocate(itemsize, shape, _layout):
        asked.append(itemsize * math.prod(shape))
        return SimpleNamespace(index=nothing)

    def warp_specialize(*_roles):
        known.update(sys._getframe(1).f_locals)

    def nothing(*_values, **_options):
        return None

    language = SimpleNamespace(
        **vars(INTEGERS), program_id=lambda _: number, load=Numbers.load, allocate_shared_memory=allocate,
        warp_specialize=warp_specialize, static_range=range, int64=8, int32=4, int8=1, float32=4,
        SwizzledSharedLayout=nothing,
        NVMMASharedLayout=SimpleNamespace(get_default_for=nothing),
    )  # fmt: skip
    barriers = SimpleNamespace(MBarrierLayout=nothing, init=nothing, invalidate=nothing)

    def ring(_tiles, _full, empty, stages):
        return SimpleNamespace(empty=empty, STAGES=stages)

    def described(descriptor):
        size = descriptor.base.element_size()
        block = SimpleNamespace(shape=descriptor.block_shape, nbytes=size * math.prod(descriptor.block_shape))
        return SimpleNamespace(block_type=block, dtype=size, layout=None)

    start = plain(launch.kernel, gl=language, mbarrier=barriers, fence_async_shared=nothing, Ring=ring, Call=nothing,
                  KeyPass=nothing, QueryPass=nothing)  # fmt: skip
    arguments = {
        name: described(value) if name.endswith("_desc") else value for name, value in launch.arguments.items()
    }
    start(**{**arguments, **pointers})
    return {**known, "shared": sum(asked)} if known else None


def shared_memory_of(launch):
    """Bytes of shared memory that a launch's kernel asks for."""
    long = {"cu_seqlens_q_ptr": Numbers(0, 10**6), "cu_seqlens_k_ptr": Numbers(0, 10**6), "kv_lens_ptr": Numbers(10**6)}
    present = {name: value for name, value in long.items() if launch.arguments[name] is not None}
    return start_program(launch, 0, **present)["shared"]


# --- Values


class Registers(torch.Tensor):
    """A tensor that has a type with a layout, which nothing here looks at."""

    type = SimpleNamespace(layout=None)


class Memory:
    """A view of shared memory. What was given back only the role that wrote it may still read, if ``kept``."""

    def __init__(self, values, kept=None, writer=None):
        self.values, self.kept, self.writer = values, kept, writer

    shape = property(lambda self: list(self.values.shape))
    rank = property(lambda self: self.values.ndim)
    numel = property(lambda self: self.values.numel())
    dtype = property(lambda self: self.values.dtype)

    def _view(self, view):
        return Memory(*(each if each is None else view(each) for each in (self.values, self.kept, self.writer)))

    def index(self, stage):
        return self._view(lambda values: values[int(stage)])

    def slice(self, start, length, dim=0):
        return self._view(lambda values: values.narrow(dim, int(start), length))

    def reshape(self, shape):
        return self._view(lambda values: values.view(shape))

    def permute(self, order):
        return self._view(lambda values: values.permute(order))

    def load(self, _layout):
        found = self.values.clone()
        if self.kept is not None:
            found = torch.where(self.writer == threading.get_ident(), self.kept, found)
        return found.as_subclass(Registers)

    def store(self, values):
        assert values.shape == self.values.shape
        self.values.copy_(values)
        if self.kept is not None:
            self.kept.copy_(values)
            self.writer.fill_(threading.get_ident())

    def forget(self):
        self.values.fill_(_nothing(self.values.dtype))


class Chunks:
    """A tile of 16-bit elements as TMA and wgmma have it, rows at a time: in panels of 64 columns, one after the other
    (PTX ISA, "Strides": 128 bytes a row, which swizzling permutes in itself). It is not done at once."""

    def __init__(self, tile, shape):
        self.tile, (count, self.rows, columns) = tile.values.flatten(0, -2), shape
        assert columns == 64 and count * self.rows * columns == tile.numel

    def index(self, number):
        time.sleep(2e-4)
        panel, first = divmod(int(number) * self.rows, len(self.tile))
        return Memory(self.tile[first : first + self.rows, panel * 64 : (panel + 1) * 64])


class Bytes:
    """Shared memory that different tiles take turns in: it holds what was stored last."""

    def __init__(self, sizes):
        self.size, self.parts = sizes[-1], [Bytes(sizes[1:]) for _ in range(sizes[0])] if len(sizes) > 1 else []
        self.held = None

    def index(self, stage):
        return self.parts[int(stage)]


class View:
    """A tile in `Bytes`, of elements that take ``itemsize`` bytes on the GPU."""

    def __init__(self, memory, _dtype, shape, itemsize):
        assert math.prod(shape) * itemsize <= memory.size, "it fits"
        self.memory, self.shape = memory, list(shape)

    rank = property(lambda self: len(self.shape))
    numel = property(lambda self: math.prod(self.shape))
    values = property(lambda self: self.memory.held)

    def reshape(self, _shape):
        return self

    def store(self, values):
        assert values.numel() == self.numel
        self.memory.held = values


def view_as(memory, dtype, shape, layout):
    return View(memory, dtype, shape, layout) if isinstance(memory, Bytes) else Chunks(memory, shape)


class Pointer:
    """Places in a tensor in global memory."""

    def __init__(self, tensor, place=0):
        self.tensor, self.place = tensor, place

    def __add__(self, offset):
        return Pointer(self.tensor, self.place + offset)

    def load(self, mask=None, other=0.0):
        values = self.tensor.view(-1)
        if mask is None:
            return values[int(self.place)]
        found = values[torch.where(mask, self.place, 0)]
        return torch.where(mask, found, torch.tensor(other, dtype=found.dtype))

    def store(self, values, mask=None):
        into = self.tensor.view(-1)
        if mask is None:
            into[int(self.place)] = values
        else:
            into[self.place[mask]] = values[mask].to(into.dtype)

    def add(self, value):
        with _changed:
            before = self.load().clone()
            self.store(before + value)
        return before


class Descriptor:
    """A TMA descriptor: what lies outside its tensor is read as 0 and not written. Its layout is the bytes that an
    element takes on the GPU."""

    def __init__(self, descriptor, itemsize):
        self.tensor = torch.as_strided(descriptor.base, descriptor.shape, descriptor.strides)
        self.dtype, self.layout, shape = torch.float64, itemsize, list(descriptor.block_shape)
        self.block_type = SimpleNamespace(shape=shape, nbytes=math.prod(shape) * itemsize)

    def inside(self, coordinates):
        """The tensor's part of a box, and that part's place in the box: it starts inside or past the end."""
        spans = []
        for at, size, extent in zip(map(int, coordinates), self.block_type.shape, self.tensor.shape, strict=True):
            start = min(at, extent)
            spans.append((start, max(start, min(at + size, extent))))
        there = tuple(slice(start, stop) for start, stop in spans)
        here = tuple(slice(0, stop - start) for start, stop in spans)
        return self.tensor[there], here


def _nothing(dtype):
    return float("nan") if dtype.is_floating_point else -(10**6)


# --- Barriers

_changed = threading.Condition(threading.RLock())


class Barrier:
    """An mbarrier: see PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier"."""

    def __init__(self):
        self.phase, self.count, self.missing, self.bytes, self.forgets, self.under_way = 0, 0, 0, 0, [], []

    def init(self, count):
        self.count = self.missing = count

    def expect(self, count):
        with _changed:
            self.bytes += count
            self.arrive()

    def load(self, descriptor, coordinates, tile):
        with _changed:
            self.under_way.append((descriptor, coordinates, tile))
            _changed.notify_all()

    def _receive(self):
        while self.under_way:
            descriptor, coordinates, tile = self.under_way.pop(0)
            values, here = descriptor.inside(coordinates)
            tile.values.zero_()
            tile.values[here] = values.to(tile.dtype)
            self.bytes -= descriptor.block_type.nbytes
            self._complete()

    def arrive(self, count=1):
        with _changed:
            self.missing -= count
            assert self.missing >= 0, "nobody arrives twice"
            self._complete()

    def _complete(self):
        if self.missing == self.bytes == 0:
            for tile in self.forgets:
                tile.forget()
            self.phase, self.missing = self.phase + 1, self.count
            _changed.notify_all()

    def wait(self, parity):
        def is_over():
            self._receive()
            return self.phase % 2 != int(parity) or _failures

        with _changed:
            if not _changed.wait_for(is_over, PATIENCE):
                raise TimeoutError("a role waits for ever")
            if _failures:
                raise threading.BrokenBarrierError("another role failed")


class Barriers(list):
    def index(self, stage):
        return self[int(stage)]


# --- What a role does

_role = threading.local()
_failures = []


class Product:
    """A product that is under way."""

    def __init__(self, a, b, start, use_acc=True, is_async=False):
        assert is_async
        self.operands, self.start, self.found = (a, b), start if use_acc else torch.zeros_like(start), None
        self.before = [each.clone() for each in self._values()]
        _role.products.append(self)

    def _values(self):
        return [each.values if isinstance(each, Memory) else each for each in self.operands]

    def finish(self):
        a, b = self._values()
        self.found = self.start + (a @ b).as_subclass(Registers)
        if not all(map(_same, self.before, (a, b))):
            self.found.fill_(math.nan)


def _same(a, b):
    return torch.equal(a.nan_to_num(nan=1e300), b.nan_to_num(nan=1e300))


def wait_for_products(number, deps):
    while len(_role.products) > number:
        _role.products.pop(0).finish()
    assert all(product.found is not None for product in deps), "it is awaited before it is used"
    found = tuple(product.found for product in deps)
    return found if len(found) > 1 else found[0]


def copy_in(descriptor, coordinates, barrier, tile):
    barrier.load(descriptor, coordinates, tile)


def copy_out(descriptor, coordinates, tile):
    _role.stores.append((descriptor, coordinates, tile, False))


def reduce_out(descriptor, coordinates, tile):
    _role.stores.append((descriptor, coordinates, tile, True))


def wait_for_stores(number):
    assert number == 0
    for descriptor, coordinates, tile, adds in _role.stores:
        there, here = descriptor.inside(coordinates)
        values = tile.values.reshape(descriptor.block_type.shape)[here].to(there.dtype)
        with _changed:
            assert not adds or there.numel() == values.numel() == tile.numel, "sums lie inside"
            there.copy_(there + values if adds else values)
    _role.stores.clear()


def _start_roles(roles, _warps, _registers):
    """The roles of a program run on; `run_programs` waits for them."""
    for role, arguments in roles:
        _start(role, *arguments, number=_role.number)


def _start(function, *arguments, number):
    def run():
        _role.number, _role.products, _role.stores = number, [], []
        try:
            function(*arguments)
            assert not _role.products and not _role.stores, "nothing is left under way"
        except BaseException as error:
            with _changed:
                _failures.append(error)
                _changed.notify_all()

    _threads.append(threading.Thread(target=run, daemon=True))
    _threads[-1].start()


_threads = []
_programs = SimpleNamespace(count=0)


def run_programs(start, count):
    """Run ``start()``, a kernel in plain, as so many programs at once."""
    _threads.clear(), _failures.clear()
    _programs.count = count
    for number in range(count):
        _start(start, number=number)
    for index in itertools.count():
        if index == len(_threads):
            break
        _threads[index].join()
    if _failures:
        raise _failures[0]


def _allocate(dtype, shape, layout):
    if layout == "barriers":
        return Barriers(Barrier() for _ in range(shape[0])) if len(shape) > 1 else Barrier()
    if dtype == torch.int8:
        return Bytes(shape)
    if dtype == torch.int32:
        return Memory(*(torch.full(shape, _nothing(dtype), dtype=kind) for kind in (dtype, dtype, torch.int64)))
    return Memory(torch.full(shape, _nothing(torch.float64), dtype=torch.float64))


def _layout(*_values):
    return None


def _larger(a, b):
    return a.clamp(min=b) if isinstance(a, torch.Tensor) and a.ndim else max(a, b)


def _smaller(a, b):
    return a.clamp(max=b) if isinstance(a, torch.Tensor) and a.ndim else min(a, b)


_no_layout = SimpleNamespace(get_default_for=_layout)
_LANGUAGE = SimpleNamespace(
    cdiv=cdiv, maximum=_larger, minimum=_smaller, int8=torch.int8, int32=torch.int32, int64=torch.int64, float32=torch.float64, where=torch.where,
    exp2=torch.exp2, abs=torch.abs, static_range=range, zeros_like=torch.zeros_like, BlockedLayout=_layout,
    NVMMADistributedLayout=_layout, NVMMASharedLayout=_no_layout, SwizzledSharedLayout=_layout, DotOperandLayout=_layout,
    SliceLayout=_layout, allocate_shared_memory=_allocate, warp_specialize=_start_roles, load=Pointer.load,
    store=Pointer.store, atomic_add=Pointer.add, program_id=lambda _axis: torch.tensor(_role.number),
    num_programs=lambda _axis: _programs.count, max=lambda values, _axis: int(values.max()),
    sum=lambda values, _axis: int(values.sum()), associative_scan=lambda values, _axis, _add: values.cumsum(0),
    to_tensor=lambda number: number,
    arange=lambda start, stop, layout: torch.arange(start, stop).as_subclass(Registers),
    zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype).as_subclass(Registers),
    convert_layout=lambda values, _layout: values,
)  # fmt: skip
HOPPER = dict(
    gl=_LANGUAGE, view_as=view_as, copy_in=copy_in, copy_out=copy_out, reduce_out=reduce_out, warpgroup_mma=Product,
    warpgroup_mma_wait=wait_for_products, fence_async_shared=lambda: None, anew=lambda index: index,
    spread=lambda of_query, zeros: of_query[None, :] + zeros, tma=SimpleNamespace(store_wait=wait_for_stores),
    mbarrier=SimpleNamespace(
        MBarrierLayout=lambda: "barriers", init=Barrier.init, expect=Barrier.expect, arrive=Barrier.arrive,
        wait=Barrier.wait, invalidate=lambda _barrier: None,
    ),
)  # fmt: skip
"""The names that `plain` gives a kernel to run it with `run_programs`."""


def arguments_on_cpu(launch):
    """A launch's arguments as `HOPPER` takes them; a TMA tile counts two bytes an element, sums four."""
    found = {}
    for name, value in launch.arguments.items():
        if hasattr(value, "block_shape"):
            found[name] = Descriptor(value, 4 if name == "dq_desc" else 2)
        else:
            found[name] = Pointer(value) if isinstance(value, torch.Tensor) else value
    return found
