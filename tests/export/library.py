"""An exported library as Python sees it through ctypes, and as a backend of the registry."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from regard import AttentionConfig, KvCacheLayout, Reason
from regard.backends.flash_launches import new_gradients
from regard.backends.launch import new_results
from regard.backends.padded_rows import broadcast_strides, with_padded_rows

I32, I64, F32, POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
OK, INVALID, UNSUPPORTED, DRIVER = range(4)
DTYPES = {torch.float16: 1, torch.bfloat16: 2, torch.float32: 3}


class Args(ctypes.Structure):
    """The header's struct, field by field."""

    _fields_ = [
        ("struct_size", ctypes.c_size_t), ("dtype", I32),
        *((name, I32) for name in ("batch", "seqlen_q", "seqlen_k", "heads_q", "heads_kv", "head_dim", "head_dim_v")),
        *((name, POINTER) for name in ("q", "k", "v", "out", "lse")),
        *((f"{name}_strides", I64 * 3) for name in ("q", "k", "v", "out")),
        ("softmax_scale", F32), ("softcap", F32),
        ("causal", I32), ("window_left", I32), ("window_right", I32),
        ("mask", POINTER), ("bias", POINTER), ("mask_strides", I64 * 3), ("bias_strides", I64 * 3),
        ("alibi_slopes", POINTER), ("alibi_batch_stride", I64), ("sinks", POINTER),
        ("cu_seqlens_q", POINTER), ("cu_seqlens_k", POINTER), ("total_q", I32), ("total_k", I32),
        ("kv_lens", POINTER), ("block_table", POINTER), ("block_table_stride", I64),
        ("num_pages", I32), ("page_size", I32),
    ]  # fmt: skip


class Grads(ctypes.Structure):
    """The header's struct of gradients."""

    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        *((name, POINTER) for name in ("grad_out", "dq", "dk", "dv")),
        *((f"{name}_strides", I64 * 3) for name in ("grad_out", "dq", "dk", "dv")),
        ("scratch", POINTER),
    ]  # fmt: skip


class Library:
    """The C calls."""

    def __init__(self, path: Path) -> None:
        self.c = ctypes.CDLL(str(path))
        self.c.regard_last_error.restype = self.c.regard_description.restype = ctypes.c_char_p
        self.c.regard_close.argtypes = [POINTER]
        self.c.regard_attention_check.argtypes = [POINTER] * 2
        self.c.regard_attention_forward.argtypes = [POINTER] * 3
        self.c.regard_attention_backward.argtypes = [POINTER] * 4
        self.handle = POINTER()

    def open(self) -> int:
        return int(self.c.regard_open(ctypes.byref(self.handle)))

    def close(self) -> None:
        self.c.regard_close(self.handle)
        self.handle = POINTER()

    def args(self, **fields: Any) -> Args:
        made = Args()
        self.c.regard_attention_args_init(ctypes.byref(made))
        for name, value in fields.items():
            setattr(made, name, (I64 * 3)(*value) if name.endswith("strides") else value)
        return made

    def check(self, args: Args) -> tuple[int, str]:
        return self.c.regard_attention_check(self.handle, ctypes.byref(args)), self.error

    def forward(self, args: Args, stream: int | None = None) -> tuple[int, str]:
        return self.c.regard_attention_forward(self.handle, ctypes.byref(args), stream), self.error

    def grads(self, **fields: Any) -> Grads:
        fields = {name: (I64 * 3)(*value) if name.endswith("strides") else value for name, value in fields.items()}
        return Grads(**{"struct_size": ctypes.sizeof(Grads), **fields})

    def backward(self, args: Args, grads: Grads, stream: int | None = None) -> tuple[int, str]:
        said = self.c.regard_attention_backward(self.handle, ctypes.byref(args), ctypes.byref(grads), stream)
        return said, self.error

    @property
    def error(self) -> str:
        return str(self.c.regard_last_error().decode())


class ExportedBackend:
    """A backend that makes its calls through an exported library."""

    name = "exported"

    def __init__(self, library: Library, *, stream: Callable[[], int | None] = lambda: None) -> None:
        self.library, self.stream = library, stream

    def unsupported_reasons(self, config: AttentionConfig) -> list[Reason]:
        if config.requires_grad and config.return_lse:
            return [Reason("backward", "a gradient of lse", "out's alone")]
        return []

    def required_kv_layout(self, config: AttentionConfig) -> KvCacheLayout:
        return config.kv_layout

    def forward(self, config: AttentionConfig, inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = with_padded_rows(inputs)
        results = new_results(config, inputs)
        said = self.library.forward(self.args_of(config, inputs, *results), self.stream())
        if said[0] != OK:
            raise RuntimeError(said)
        return results

    def backward(
        self, config: AttentionConfig, inputs: Any, out: torch.Tensor, lse: Any, grad_out: torch.Tensor, grad_lse: Any
    ) -> dict[str, Any]:
        assert grad_lse is None or not grad_lse.any()
        inputs = with_padded_rows(inputs)
        grad_out = grad_out.contiguous()
        args = self.args_of(config, inputs, out, lse)
        found = new_gradients(config, inputs)
        scratch = lse.new_empty((2, *lse.shape))
        self.kept += (grad_out, scratch[0], scratch[1], *found.values())
        tensors = {"grad_out": grad_out, **{f"d{name}": tensor for name, tensor in found.items()}}
        grads = self.library.grads(
            scratch=scratch.data_ptr(),
            **{name: tensor.data_ptr() for name, tensor in tensors.items()},
            **{f"{name}_strides": _strides(tensor) for name, tensor in tensors.items()},
        )
        said = self.library.backward(args, grads, self.stream())
        if said[0] != OK:
            raise RuntimeError(said)
        return {**found, "bias": None, "sinks": None}

    def args_of(self, config: AttentionConfig, inputs: Any, out: torch.Tensor, lse: torch.Tensor) -> Args:
        q, k, v, mask, bias, slopes, sinks, cu_seqlens_q, cu_seqlens_k, kv_lens, pages, _ = inputs
        slopes = None if slopes is None else slopes.float().contiguous()
        sinks = None if sinks is None else sinks.float().contiguous()
        left, right = config.window or (None, None)
        self.kept = inputs, out, lse, slopes, sinks  # alive, and to be found by their addresses
        optional = dict(
            mask=mask, bias=bias, alibi_slopes=slopes, sinks=sinks, cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k, kv_lens=kv_lens, block_table=pages,
        )  # fmt: skip
        return self.library.args(
            dtype=DTYPES[config.dtype],
            **{name: getattr(config, name) for name in ("batch", "seqlen_q", "seqlen_k", "heads_q", "heads_kv")},
            head_dim=config.head_dim,
            head_dim_v=config.head_dim_v,
            **dict(q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), out=out.data_ptr(), lse=lse.data_ptr()),
            **{f"{name}_strides": _strides(t) for name, t in (("q", q), ("k", k), ("v", v), ("out", out))},
            softmax_scale=config.softmax_scale,
            softcap=config.softcap,
            causal=int(config.causal),
            window_left=-1 if left is None else left,
            window_right=-1 if right is None else right,
            **{name: tensor.data_ptr() for name, tensor in optional.items() if tensor is not None},
            mask_strides=broadcast_strides(mask)[:3],
            bias_strides=broadcast_strides(bias)[:3],
            alibi_batch_stride=config.heads_q if slopes is not None and slopes.ndim == 2 else 0,
            total_q=config.total_q or 0,
            total_k=config.total_k or 0,
            block_table_stride=0 if pages is None else pages.stride(0),
            num_pages=0 if pages is None else k.shape[0],
            page_size=config.page_size or 0,
        )


def _strides(tensor: torch.Tensor) -> tuple[int, ...]:
    return tensor.stride()[:3] if tensor.ndim == 4 else (0, *tensor.stride()[:2])
