"""Launches past Triton's Python say to its C function what Triton says; what the C function is, is played here.

Triton's own classes around it are those that are installed.
"""

import dataclasses
import itertools
import types

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.nvidia import driver

from regard import AttentionConfig, AttentionInputs
from regard.backends import flash, flash_launches, hopper, key_splits, launch, triton_launcher
from regard.backends.launch import Launch, Repetition
from regard.kernels import tuning

B, S, H, HK, D = 2, 32, 4, 2, 64
CONFIG = AttentionConfig(batch=B, seqlen_q=S, seqlen_k=S, heads_q=H, heads_kv=HK, head_dim=D, dtype=torch.bfloat16,
                         device="cuda", arch="sm90", causal=True, sinks=True)  # fmt: skip


class Map(tuple):
    """Stands for an encoded TMA map: all that went into it."""


class Machine:
    """A GPU that takes down what it is told to launch."""

    def __init__(self):
        self.said, self.encoded, self.stream = [], 0, 77
        self.counter = torch.zeros(2, dtype=torch.int32)

    def launch(self, *values):
        self.said.append(tuple(map(address, flattened(values))))

    def encode(self, *fields):
        self.encoded += 1
        return Map(map(str, fields))


def flattened(values):
    for value in values:
        if isinstance(value, (list, tuple)) and not isinstance(value, Map):
            yield from flattened(value)
        else:
            yield value


def address(value):
    return value.data_ptr() if isinstance(value, torch.Tensor) else value


def specialized(value):
    """What a kernel is compiled for, of an argument, and more."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    return (value.base.dtype, value.block_shape) if hasattr(value, "base") else value


class Compiled:
    """A kernel as Triton's JIT would return it, around the launcher of the installed Triton."""

    packed_metadata, launcher = (4, 1, 1000), driver.CudaLauncher

    def __init__(self, launch, machine):
        made_for = launch.kernel.__name__, launch.options, *map(specialized, launch.arguments.values())
        self.function = hash(str(made_for))
        signature = {name: "tensordesc<bf16[1]>" if hasattr(value, "base") else "i32" for name, value in
                     launch.arguments.items()}  # fmt: skip
        tiles = [dict(swizzle=3, elem_size=2, elem_type=index, block_size=[*value.block_shape, value.base.dtype],
                      fp4_padded=False)
                 for index, value in enumerate(launch.arguments.values()) if hasattr(value, "base")]  # fmt: skip
        self.metadata = types.SimpleNamespace(tensordesc_meta=tiles)
        self.run = object.__new__(self.launcher)
        self.run.launch = driver.wrap_handle_tensordesc(machine.launch, signature, tiles)
        self.run.num_ctas, self.run.launch_cooperative_grid, self.run.launch_pdl = 1, False, False
        self.run.global_scratch_size = self.run.global_scratch_align = 0
        self.run.profile_scratch_size = self.run.profile_scratch_align = 0
        self.run.gsan_enabled = False
        self.run.arg_annotations, self.run.kernel_signature = ["annotations"], b"signature"
        self.launched = 0
        self.machine = machine

    def __getitem__(self, grid):
        def launch(*arguments):
            self.launched += 1
            hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
            played = [None if not hook.calls else hook for hook in hooks]
            self.run(*grid, self.machine.stream, self.function, self.packed_metadata, None, *played, *arguments)

        return launch


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    utils = types.SimpleNamespace(fill_tma_descriptor=machine.encode, fill_tma_descriptor_tiled=machine.encode)
    monkeypatch.setattr(triton.runtime.driver, "_active", types.SimpleNamespace(utils=utils))
    monkeypatch.setattr(driver, "PyCUtensorMap", Map)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: machine.stream, raising=False)
    monkeypatch.setattr(hopper, "tile_counter", lambda device: machine.counter)
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(Launch, "run", lambda self, device: Compiled(self, machine))
    yield machine
    CONFIG.prepared.clear()


@pytest.fixture
def backend(request, monkeypatch):
    """A backend; "flash by TMA" with tiles of head dims at which sm90 has TMA bring them."""
    if request.param == "flash by TMA":
        for table, head_dim in ((tuning.FORWARD, 128), (tuning.BACKWARD_KEYS, 256), (tuning.BACKWARD_QUERIES, 256)):
            assert any(rule.tile.by_tma for rule in table["sm90", 2, head_dim])
            of_many_rows = tuple(rule for rule in table["sm90", 2, head_dim] if rule.max_rows == tuning.MANY_ROWS)
            monkeypatch.setitem(table, ("sm90", 2, D), of_many_rows)
        monkeypatch.setattr(flash_launches, "_FEW_QUERIES", 0)
    return hopper.HopperBackend() if request.param == "hopper" else flash.FlashBackend()


BACKENDS = pytest.mark.parametrize("backend", ["hopper", "flash", "flash by TMA"], indirect=True)


def memory(size=2**16, dtype=torch.bfloat16):
    """Aligned as TMA asks, and as an allocator of a GPU aligns."""
    raw = torch.empty(size + 64, dtype=dtype)
    return raw[-raw.data_ptr() % 128 // raw.element_size() :][:size]


def tensors(*, apart=0, start=0, dtype=torch.bfloat16, at=None, transposed=False):
    """Inputs whose rows are further apart, or start so many elements later, or lie in given memory one after another."""
    at = itertools.repeat(None) if at is None else iter(at)

    def rows(heads):
        place = next(at)
        shape = (B, heads, S, D + apart) if transposed else (B, S, heads, D + apart)
        raw = (memory(dtype=dtype) if place is None else place).view(dtype)[: torch.Size(shape).numel()].view(shape)
        return (raw.transpose(1, 2) if transposed else raw)[..., start : start + D]

    return AttentionInputs(rows(H), rows(HK), rows(HK), sinks=torch.zeros(H))


def repetitions(config=CONFIG):
    kept = [known for known in config.prepared.values() if isinstance(known, list)]
    found = [known for each in kept for known in each]
    assert found and all(isinstance(known, Repetition) for known in found)
    return found


def test_the_installed_launcher_is_as_expected(machine):
    """Else every launch goes Triton's way, which works but takes three times as long."""
    for backend in (hopper.HopperBackend(), flash.FlashBackend()):
        backend.forward(CONFIG, tensors())
    assert all(known._direct is not None for known in repetitions())


CHANGES = {
    "none": {}, "strides": dict(apart=64), "unaligned": dict(apart=64, start=4), "other rows": dict(transposed=True),
    "further on": dict(apart=64, start=8),
}  # fmt: skip


@BACKENDS
def test_the_same_is_said_in_both_ways(machine, backend, monkeypatch):
    """Whatever changes from one call to the next, at addresses of its own or at the same ones."""
    places = [memory() for _ in range(3)]
    results = (torch.empty(B, S, H, D, dtype=torch.bfloat16), torch.empty(B, H, S))
    for module in (hopper, flash):
        monkeypatch.setattr(module, "new_results", lambda config, inputs: results)
    copies = memory()  # where hopper puts what TMA cannot follow
    monkeypatch.setattr(torch.Tensor, "clone", lambda t, memory_format: copies[: t.numel()].view(t.shape).copy_(t))
    for at in (None, places):
        for change in CHANGES.values():
            for _ in range(2):
                backend.forward(CONFIG, tensors(**change, at=at))
    machine.said.clear()
    assert len(repetitions()) == len(CHANGES) - 1, "a multiple of 16 bytes further on is another address only"
    for at, change in [*itertools.product((places, None), CHANGES.values())] * 2:
        inputs, machine.stream = tensors(**change, at=at), machine.stream + 1
        backend.forward(CONFIG, inputs)
        with monkeypatch.context() as patched:
            patched.setattr(triton_launcher.DirectLaunch, "is_watched", lambda self: True)
            backend.forward(CONFIG, inputs)
        direct, of_triton = machine.said
        machine.said.clear()
        assert direct == of_triton and machine.stream in direct


@BACKENDS
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("change", [{}, dict(apart=64)], ids=["dense", "rows apart"])
def test_shortcuts_say_the_same(machine, backend, layout, change, monkeypatch):
    results = (torch.empty(B, S, H, D, dtype=torch.bfloat16), torch.empty(B, H, S))
    monkeypatch.setattr(launch, "allocate", lambda *like: results)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index of a CPU
    bhsd, long = layout == "bhsd", []
    first = tensors(transposed=bhsd, **change)
    config = dataclasses.replace(CONFIG, sinks=False, **{f"{n}_strides": getattr(first, n).stride() for n in "qkv"})
    forward = backend.forward
    monkeypatch.setattr(backend, "forward", lambda *call: long.append(call) or forward(*call), raising=False)
    shortcut = backend.shortcut(config, layout)

    def call(inputs):
        out = shortcut(*(t.transpose(1, 2) if bhsd else t for t in inputs[:3]))
        wanted = results[0].transpose(1, 2) if bhsd else results[0]
        assert out.data_ptr() == wanted.data_ptr() and out.stride() == wanted.stride() and out.shape == wanted.shape

    def said_the_same(inputs, *, is_long):
        machine.said.clear(), long.clear()
        call(inputs)
        assert len(long) == is_long
        forward(config, inputs._replace(sinks=None))
        assert machine.said[0] == machine.said[1]

    call(first)
    for machine.stream in range(3):
        for inputs in (first, tensors(transposed=bhsd, **change)):
            said_the_same(inputs, is_long=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    said_the_same(first, is_long=True)


@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
def test_split_keys_are_two_launches_in_every_way(machine, monkeypatch, sinks):
    """The sinks of the second are not there for the first."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    q, k, v = (memory(B * rows * heads * D).view(B, rows, heads, D) for rows, heads in ((1, H), (4096, HK), (4096, HK)))
    config = dataclasses.replace(CONFIG, seqlen_q=1, seqlen_k=4096, sinks=sinks, q_strides=q.stride(),
                                 k_strides=k.stride(), v_strides=v.stride())  # fmt: skip
    inputs = AttentionInputs(q, k, v, sinks=torch.zeros(H) if sinks else None)
    results, parts = (torch.empty_like(q), torch.empty(B, H, 1)), hopper.new_parts(config, q, 132)
    monkeypatch.setattr(key_splits, "allocate", lambda *like: parts)
    monkeypatch.setattr(hopper, "new_results", lambda *call: results)
    monkeypatch.setattr(launch, "allocate", lambda *like: results)
    backend = hopper.HopperBackend()
    shortcut = backend.shortcut(config, "bshd")
    for _ in range(2):
        backend.forward(config, inputs)
    assert len(repetitions(config)) == 2 and all(known._direct is not None for known in repetitions(config))
    with monkeypatch.context() as patched:
        patched.setattr(triton_launcher.DirectLaunch, "is_watched", lambda self: True)
        backend.forward(config, inputs)
    if not sinks:
        for _ in range(2):
            shortcut(q, k, v)
    split, merge = machine.said[:2]
    assert parts[0].data_ptr() in split and results[0].data_ptr() not in split
    assert {parts[0].data_ptr(), results[0].data_ptr()} <= set(merge)
    assert sinks == (inputs.sinks is not None and inputs.sinks.data_ptr() in merge)
    assert machine.said == [split, merge] * (len(machine.said) // 2) and len(machine.said) == (4 if sinks else 8)


BACKWARDS = {
    "hopper in one pass": ("hopper", {}, 3),
    "hopper in two passes": ("hopper", dict(deterministic=True), 3),
    "flash": ("flash", {}, 3),
    "flash by TMA": ("flash by TMA", {}, 3),
    "flash with a bias": (
        "flash by TMA",
        dict(bias_shape=(1, H, S, S), bias_dtype=torch.bfloat16, bias_requires_grad=True, requires_grad=True),
        4,
    ),
}


def gradient(*, apart=0, start=0, dtype=torch.bfloat16):
    return memory(dtype=dtype)[: B * S * H * (D + apart)].view(B, S, H, D + apart)[..., start : start + D]


def rows_of(*, step=1, start=0):
    return memory(dtype=torch.float32)[: B * H * (S + 1) * step].view(B, H, S + 1, step)[:, :, start : start + S, 0]


# One property of a backward's tensors each, by the name of the argument.
LOOKS = {
    "as before": {},
    "grad_out's rows apart": dict(grad_out=lambda: gradient(apart=64)),
    "grad_out unaligned": dict(grad_out=lambda: gradient(apart=64, start=4)),
    "grad_out by heads": dict(grad_out=lambda: gradient().view(B, H, S, D).transpose(1, 2)),
    "grad_out of one sequence": dict(grad_out=lambda: gradient()[:1].expand(B, S, H, D)),
    "grad_out of one number": dict(grad_out=lambda: gradient()[:1, :1, :1, :1].expand(B, S, H, D)),
    "grad_out of another dtype": dict(grad_out=lambda: gradient(dtype=torch.float16)),
    "lse's gradient": dict(grad_lse=rows_of),
    "lse's gradient unaligned": dict(grad_lse=lambda: rows_of(start=1)),
    "lse's gradient of rows apart": dict(grad_lse=lambda: rows_of(step=3)),
    "lse's gradient of one number": dict(grad_lse=lambda: rows_of()[:1, :1, :1].expand(B, H, S)),
    "out's rows apart": dict(out=lambda: gradient(apart=64)),
    "out unaligned": dict(out=lambda: gradient(apart=64, start=4)),
    "lse unaligned": dict(lse=lambda: rows_of(start=1)),
    "inputs' rows apart": dict(inputs=lambda: tensors(apart=64)),
    "inputs unaligned": dict(inputs=lambda: tensors(apart=64, start=4)),
    "inputs by heads": dict(inputs=lambda: tensors(transposed=True)),
}


@pytest.mark.parametrize(("backend", "changes", "count"), BACKWARDS.values(), ids=BACKWARDS, indirect=["backend"])
def test_a_repeated_backward_says_what_fresh_launches_say(machine, backend, changes, count, monkeypatch):
    config, met = dataclasses.replace(CONFIG, **changes), []
    real = launch.launch_or_repeat

    def compared(known, key, tensors, launches, device):
        met.append(key in known)
        machine.said.clear()
        real(known, key, tensors, launches, device)
        said = machine.said.copy()
        machine.said.clear()
        for each in launches() if met[-1] else ():
            Compiled(each, machine)[(each.programs, 1, 1)](*each.arguments.values())
        assert said == machine.said and len(said) == count * met[-1]

    for module in (hopper, flash):
        monkeypatch.setattr(module, "launch_or_repeat", compared)

    def call(look):
        given = dict(inputs=tensors, out=gradient, lse=rows_of, grad_out=gradient, grad_lse=lambda: None) | look
        made = {name: make() for name, make in given.items()}
        if config.bias_shape is not None:
            made["inputs"] = made["inputs"]._replace(bias=memory()[: H * S * S].view(1, H, S, S))
        machine.stream += 1
        backend.backward(config, **made)

    for look in LOOKS.values():
        call(look)
    for look in LOOKS.values():
        for _ in range(2):
            call({})
            call(look)
    assert all(met[len(LOOKS) :]), "all were repeated"
    assert len(repetitions(config)) == met.count(False) * count
    assert all(known._direct is not None for known in repetitions(config))


@pytest.mark.parametrize("backend", ["flash by TMA"], indirect=True)
def test_flash_gives_descriptors_only_of_what_tma_can_read(machine, backend):
    for change, maps in (({}, 3), (dict(start=4, apart=64), 0), (dict(start=8, apart=64), 3), ({}, 3)):
        backend.forward(CONFIG, tensors(**change))
        inputs = tensors(**change)
        backend.forward(CONFIG, inputs)
        addresses = [str(t.data_ptr()) for t in inputs[:maps]]
        assert [value[0] for value in machine.said[-1] if isinstance(value, Map)] == addresses


def test_an_argument_that_would_be_that_of_the_first_call_is_noticed(machine):
    inputs, out = tensors(), gradient()
    made = flash_launches.forward_launches(CONFIG, inputs, out, rows_of())[0]
    names = [name for name in (*flash_launches.SCORE_TENSORS, *flash_launches.FORWARD_TENSORS) if name != "lse_ptr"]
    with pytest.raises(AssertionError, match="of the first call"):
        Repetition(made, Compiled(made, machine), names, inputs.q.device)


def test_shortcuts_leave_other_alignments_to_the_forward(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    first, other = tensors(apart=64), tensors(apart=64, start=4)
    config = dataclasses.replace(CONFIG, sinks=False, **{f"{n}_strides": getattr(first, n).stride() for n in "qkv"})
    for backend in (hopper.HopperBackend(), flash.FlashBackend()):
        shortcut = backend.shortcut(config, "bshd")
        for inputs in (first, first, other, first, other):
            shortcut(*inputs[:3])
        assert len(repetitions(config)) == 2
        config.prepared.clear()


def test_calls_that_depend_on_more_than_addresses_have_no_shortcut():
    strides = dict.fromkeys(("q_strides", "k_strides", "v_strides"), (4096, 64, 16, 1))
    assert hopper.HopperBackend().shortcut(dataclasses.replace(CONFIG, **strides), "bshd") is not None
    copied = strides | {"k_strides": (4096, 64, 0, 1)}
    assert hopper.HopperBackend().shortcut(dataclasses.replace(CONFIG, **copied), "bshd") is None, "k is copied"
    assert hopper.HopperBackend().shortcut(CONFIG, "bshd") is None, "strides are not known"
    exact = dataclasses.replace(CONFIG, dtype=torch.float32)
    assert flash.FlashBackend().shortcut(CONFIG, "bshd") is not None
    assert flash.FlashBackend().shortcut(exact, "bshd") is None, "it has torch's matmul precision of the moment"
    assert flash.FlashBackend().shortcut(dataclasses.replace(CONFIG, device="cpu"), "bshd") is None, "interpreted"


def test_a_map_is_encoded_once_for_an_address(machine):
    backend, inputs = hopper.HopperBackend(), [tensors(), tensors()]
    kept = [backend.forward(CONFIG, each) for each in (inputs[0], *inputs)]
    encoded = machine.encoded
    for each in inputs:
        kept.append(backend.forward(CONFIG, each))
    results = {out.data_ptr() for out, _ in kept}
    assert machine.encoded - encoded == 2 and len(results) == 5, "of two new results; q, k and v are known"
    backend.forward(CONFIG, AttentionInputs(*inputs[0][:2], inputs[0].v.clone(), sinks=inputs[0].sinks))
    assert machine.encoded - encoded <= 4


def test_another_dtype_at_the_same_address_has_maps_of_its_own(machine):
    places = [memory() for _ in range(3)]
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        config = dataclasses.replace(CONFIG, dtype=dtype) if dtype != CONFIG.dtype else CONFIG
        for _ in range(2):
            hopper.HopperBackend().forward(config, tensors(dtype=dtype, at=places))
        maps = [value for value in machine.said[-1] if isinstance(value, Map)]
        assert [value[0] for value in maps[:3]] == [str(place.data_ptr()) for place in places]
        assert len(maps) == 4 and all(str(dtype) in value[4] for value in maps)


def test_maps_are_not_kept_without_end(machine, monkeypatch):
    monkeypatch.setattr(triton_launcher, "KNOWN_MAPS", 3)
    backend, kept = hopper.HopperBackend(), []
    for _ in range(12):
        kept.append(tensors())
        backend.forward(CONFIG, kept[-1])
    (known,) = repetitions()
    assert all(1 <= len(maps.known) <= 3 for *_, maps in known._direct._maps) and len(known._direct._maps) == 4


@BACKENDS
@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_of_a_profiler_are_called(machine, backend, hook, monkeypatch):
    inputs = tensors()
    backend.forward(CONFIG, inputs)
    (known,) = repetitions()
    backend.forward(CONFIG, inputs)
    assert not known._direct.is_watched()
    chain = getattr(triton.knobs.runtime, hook)

    def profile(metadata):
        raise AssertionError("nobody calls it here")

    chain.add(profile)
    try:
        assert known._direct.is_watched()
        monkeypatch.setattr(known._direct, "run", None)
        backend.forward(CONFIG, inputs)
    finally:
        chain.remove(profile)
    for value, watched in ((profile, True), (None, False)):
        monkeypatch.setattr(triton.knobs.runtime, hook, value)
        assert known._direct.is_watched() is watched


@pytest.mark.parametrize("change", ["global_scratch_size", "profile_scratch_size", "gsan_enabled"])
def test_a_kernel_that_needs_memory_goes_by_triton(machine, monkeypatch, change):
    def compiled(launch, device):
        made = Compiled(launch, machine)
        setattr(made.run, change, 8)
        return made

    monkeypatch.setattr(Launch, "run", compiled)
    hopper.HopperBackend().forward(CONFIG, tensors())
    (known,) = repetitions()
    assert known._direct is None


@pytest.mark.parametrize("wrong", ["another launcher", "other maps", "no maps", "other arguments"])
def test_what_is_not_as_expected_goes_by_triton(machine, monkeypatch, wrong):
    inputs = tensors()
    if wrong == "another launcher":  # such as that for ROCm
        monkeypatch.setattr(Compiled, "launcher", type("HIPLauncher", (driver.CudaLauncher,), {}))
    elif wrong == "other maps":
        monkeypatch.setattr(driver, "PyCUtensorMap", type("PyCUtensorMap", (), {}))
    elif wrong == "no maps":
        monkeypatch.setattr(driver, "make_tensordesc_arg", lambda descriptor, *others: [0])
    else:
        monkeypatch.setattr(driver.CudaLauncher, "__call__", lambda self, *arguments: self.launch(*arguments[:5]))
    hopper.HopperBackend().forward(CONFIG, inputs)
    (known,) = repetitions()
    assert known._direct is None
