"""Conformance cases through the C library of a folder, in a process of their own: its driver is `fake_driver.c`, which
hands launches back to here, and Triton's interpreter runs the kernels on exactly what the C code gave as parameters.

Reads JSON, the arguments of `cases`, of `calls` or of `places`, and prints as JSON what that returns.
"""

import ctypes
import json
import sys
import threading
from dataclasses import replace
from pathlib import Path

import conftest  # noqa: F401 - teaches the interpreter bfloat16
import torch
from library import F32, I32, I64, OK, Args, ExportedBackend, Library

import regard
from regard.export import kernels as exported
from regard.testing import CASES, check_backward, check_forward

CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip


STRIDES = {
    **{f"{name}_strides": (I64, I32, I64) for name in ("q", "k", "v", "out", "grad_out", "dq", "dk", "dv")},
    **dict.fromkeys(("mask_strides", "bias_strides"), (I64, I64, I32)),
    "alibi_strides": (I64,),
}


class Device:
    """What the fake driver's launches run on."""

    def __init__(self, library, backend):
        self.description = json.loads(library.c.regard_description())["kernels"]
        self.backend, self.launches, self.failure = backend, 0, None

    def launch(self, module, name, programs, threads, shared, stream, parameters):
        try:
            self.run(self.description[module], programs, threads, parameters)
        except Exception as error:
            self.failure = repr(error)
            return 999
        self.launches += 1
        return 0

    def run(self, described, programs, threads, parameters):
        assert threads == described["threads"]
        variant = exported.Variant(
            getattr(torch, described["dtype"]), described["head_dim"], described["head_dim_v"],
            tuple(described["features"]),
        )  # fmt: skip
        config = replace(variant.config(described["arch"]), requires_grad=described["step"] != "forward")
        launch = exported.launches(config)[described["step"]]
        addresses = iter(parameters[i] for i in range(99))
        arguments = {name: self.read(name, launch.arguments, addresses) for name in launch.arguments}
        launch.kernel[(programs,)](**arguments)

    def read(self, name, arguments, addresses):
        """An argument from where the parameters are: what is no constant of the kernel, in its order, as C's types."""
        value = arguments[name]
        if name.isupper() or value is None:
            return value
        if name.endswith("_strides") and arguments.get(name.replace("_strides", "_ptr"), 0) is None:
            return value
        if name in STRIDES:
            return *(kind.from_address(next(addresses)).value for kind in STRIDES[name]), 1
        if isinstance(value, torch.Tensor):
            return self.tensor(ctypes.c_void_p.from_address(next(addresses)).value)
        if name == "lse_strides":
            return *(I64.from_address(next(addresses)).value for _ in range(2)), *value[2:]
        kind = F32 if isinstance(value, float) else I64 if name == "block_table_stride" else I32
        return kind.from_address(next(addresses)).value

    def tensor(self, address):
        inputs, *others = self.backend.kept
        for tensor in (*inputs, *others):
            if tensor is not None and tensor.data_ptr() == address:
                return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
        raise AssertionError("the C code gave an address that is no tensor's")


def opened(folder):
    """The library of a folder, and a fake driver of the kind that it wants."""
    (path,) = [*folder.glob("libcuda*"), *folder.glob("libamdhip*")]
    driver = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    return Library(folder / "libregard_attention.so"), driver


def cases(folder, dtype, names, backward=False):
    """For each case None, or what is wrong."""
    library, driver = opened(folder)
    backend = ExportedBackend(library)
    device = Device(library, backend)
    callback = CALLBACK(device.launch)
    driver.fake_driver(callback, 0, 0)
    assert library.open() == OK, library.error
    regard.register(backend)
    found = {}
    for case in CASES:
        if case.name in names:
            before = device.launches
            try:
                check = check_backward if backward else check_forward
                check("exported", case, "cpu", getattr(torch, dtype))
                assert device.launches == before + 1 + 3 * backward, f"{device.launches - before} launches"
                found[case.name] = None
            except Exception as error:
                found[case.name] = f"{error!r} {device.failure or ''}"
    library.close()
    return {**found, "still loaded": driver.fake_loaded()}


def calls(folder, overrides, refused=0, most_shared=227 * 1024):
    """For each call, a plain one with other fields (one of the backward where ``grads`` is one of them), what it returns,
    says, and whether it launched, with a driver that refuses the first images; then the failures of one that refuses
    all, and of one that refuses launches."""
    library, driver = opened(folder)
    launched = []
    callback = CALLBACK(lambda *said: launched.append(said) or 0)
    driver.fake_driver(callback, refused, 0)
    driver.fake_shared(most_shared)
    assert library.open() == OK, library.error
    found = []
    for fields in overrides:
        before = len(launched)
        grads = fields.pop("grads", None)
        args = library.args(**{**PLAIN, **fields})
        if grads is None:
            said = library.forward(args)
            assert library.check(args)[0] == said[0]
        else:
            said = library.backward(args, library.grads(**{**PLAIN_GRADS, **grads}))
        found.append((*said, len(launched) - before))
    library.close()
    failures = []
    for images, error in ((99, 0), (0, 1)):
        driver.fake_driver(callback, images, error)
        status = library.open()
        failures.append((status, library.error) if status else library.forward(library.args(**PLAIN)))
        library.close()
    made = library.args()
    values = {name: getattr(made, name) for name, _ in Args._fields_}
    unset = [name for name, value in values.items() if {-1} == (set(value) if name.endswith("strides") else {value})]
    sizes = {"size": made.struct_size, "expected": ctypes.sizeof(Args)}
    return {"calls": found, "failures": failures, "unset": unset, **sizes}


def places(folder, fields, backward=False):
    """A library opened in place 1, called from threads where others are current, 0 to 2 (CUDA contexts, 0 for none, or
    HIP devices). For each call its thread's place and which switch of places fails there, from 1 on: the status and
    sentence, the launches, the switches, and the thread's place afterwards."""
    library, driver = opened(folder)
    launched = []
    callback = CALLBACK(lambda *said: launched.append(said) or 0)
    args, grads = library.args(**PLAIN | fields), library.grads(**PLAIN_GRADS)
    found = {}

    def in_thread(name, place, failing, call):
        def run():
            driver.fake_place(place, failing)
            before = len(launched)
            said = call()
            status, sentence = said if isinstance(said, tuple) else (said, library.error)
            switches, after = driver.fake_switches(), driver.fake_current()
            found[name] = [status, sentence if status else "", len(launched) - before, switches, after]

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    def attend():
        return library.backward(args, grads) if backward else library.forward(args)

    driver.fake_driver(callback, 0, 0)
    in_thread("opened without", 0, 0, library.open)
    library.close()
    for launch_error in (0, 1):
        driver.fake_driver(callback, 0, launch_error)
        assert library.open() == OK, library.error
        for place in (0, 1, 2):
            in_thread(f"{place}, launch error {launch_error}", place, 0, attend)
            for failing in (1, 2):
                in_thread(f"{place}, launch error {launch_error}, switch {failing} fails", place, failing, attend)
        in_thread("closed elsewhere", 2, 0, lambda: library.close() or OK)
        found["still loaded"] = driver.fake_loaded()
    return found


PLAIN = dict(
    dtype=1, batch=2, seqlen_q=100, seqlen_k=200, heads_q=6, heads_kv=2, head_dim=32,
    q=1 << 20, k=1 << 20, v=1 << 20, out=1 << 20, lse=1 << 20,
    q_strides=(19200, 192, 32), k_strides=(12800, 64, 32), v_strides=(12800, 64, 32), out_strides=(19200, 192, 32),
)  # fmt: skip
PLAIN_GRADS = dict(
    grad_out=1 << 20, dq=1 << 20, dk=1 << 20, dv=1 << 20, scratch=1 << 20, grad_out_strides=(19200, 192, 32),
    dq_strides=(19200, 192, 32), dk_strides=(12800, 64, 32), dv_strides=(12800, 64, 32),
)  # fmt: skip


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    folder = Path(asked.pop("folder"))
    answer = cases if "names" in asked else places if "fields" in asked else calls
    print(json.dumps(answer(folder, **asked)))
