"""Without a GPU the Triton kernels run in Triton's interpreter, taught here to compute with bfloat16."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported, so before anything else here

import numpy
import pytest

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, (os.cpu_count() or 1) // WORKERS))


def teach_interpreter_bfloat16() -> None:
    """Make the interpreter's bfloat16 products right and its casts round to nearest, as hardware does.

    Triton 3.6 to 3.9 keep bfloat16 as raw bits: `create_dot` multiplies the bits, and casting from float32 truncates.
    """
    from triton import language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    dot, cast = builder.create_dot, builder.cast_impl

    def widened(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return handle((operand.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32)

    def create_dot(self, a, b, d, *precision):
        a, b = widened(a), widened(b)
        if a.dtype.scalar == tl.float32:
            # NumPy adds in an order that depends on the shapes; hardware gives Q K^T and its transpose the same bits.
            product = numpy.matmul(a.data, b.data, dtype=numpy.float64)
            return handle((product + d.data).astype(numpy.float32), d.dtype.scalar)
        return dot(self, a, b, d, *precision)

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if (source, target) == (tl.bfloat16, tl.float32):
            return widened(src)
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(numpy.ascontiguousarray(src.data)).to(torch.bfloat16)
            return handle(rounded.view(torch.int16).numpy().view(numpy.uint16), tl.bfloat16)
        return cast(self, src, dst_type)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl


try:
    import triton
except ImportError:
    triton = None
else:
    if triton.knobs.runtime.interpret:
        teach_interpreter_bfloat16()


@pytest.fixture
def registry():
    """An empty registry of the test's own; calls go through the package's."""
    from regard import Registry

    made = Registry()
    made._entry_points_loaded = True
    return made


@pytest.fixture(autouse=True)
def same_numbers_in_every_run():
    """What fails once fails again, in any order and on its own."""
    torch.manual_seed(0)
