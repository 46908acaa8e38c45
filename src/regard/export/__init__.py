"""Attention for programs without Python: a C library of kernels compiled ahead of time.

`regard.export.library.write` compiles the `flash` backend's kernels for GPUs that need not be there, and writes C
source that needs a C compiler and, when it runs, the GPU's driver; `build` makes a shared library of it. What other
languages call is `regard_attention.h`, beside this file.
"""

from __future__ import annotations

import importlib.util

from regard.errors import ConfigError


def require_compiler() -> None:
    """Raise a `ConfigError` unless Triton is there and compiles."""
    if importlib.util.find_spec("triton") is None:
        raise ConfigError("triton", "none installed", "pip install triton (CPU builds of torch bring none)")
    import triton

    if triton.knobs.runtime.interpret:
        raise ConfigError("TRITON_INTERPRET", "1", "an environment without it: the interpreter compiles nothing")
