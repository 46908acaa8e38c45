"""The `flash` backend: launches the portable Triton kernels on CUDA and ROCm devices.

On a CPU it serves only where Triton's interpreter is active (TRITON_INTERPRET=1), which is how its tests run.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from regard.backends.reference import dropout_threshold
from regard.config import AttentionConfig, AttentionInputs, KvCacheLayout
from regard.errors import Reason, UnsupportedError
from regard.kernels import tuning
from regard.registry import Gradients

MAX_HEAD_DIM = 256
_INTERPRETER_ARCH = "sm80"
_LARGEST_TILE = 256  # rows or columns; a larger stride than 2**31 / this needs 64-bit offsets inside a tile


_NO_BACKWARD = Reason("backward", "a gradient", "a forward-only call", "its kernels have no backward")


class FlashBackend:
    """Flash attention in portable Triton: every semantic, any strides, head dims 1 to 256."""

    name = "flash"

    def unsupported_reasons(self, config: AttentionConfig) -> Sequence[Reason]:
        reasons = []
        if importlib.util.find_spec("triton") is None:
            reasons.append(
                Reason("not_installed", "no triton", "triton >= 3.6", "CUDA and ROCm builds of torch bring it")
            )
        elif config.device != "cuda" and not (config.device == "cpu" and _interpreting()):
            reasons.append(Reason("device", config.device, "cuda (NVIDIA or ROCm)"))
        elif config.device == "cuda" and tuning.table_architecture(config.arch) is None:
            known = ", ".join(tuning.ARCHITECTURES)
            reasons.append(Reason("arch", config.arch, f"one of {known}"))
        if config.dtype == torch.float64:
            reasons.append(
                Reason("dtype_float64", "float64", "float16, bfloat16 or float32", "reference computes in float64")
            )
        head_dim = max(config.head_dim, config.head_dim_v)
        if head_dim > MAX_HEAD_DIM:
            reasons.append(Reason("head_dim", str(head_dim), f"at most {MAX_HEAD_DIM}"))
        if config.requires_grad:
            reasons.append(_NO_BACKWARD)
        return reasons

    def required_kv_layout(self, config: AttentionConfig) -> KvCacheLayout:
        return config.kv_layout

    def forward(self, config: AttentionConfig, inputs: AttentionInputs) -> tuple[Tensor, Tensor | None]:
        from regard.kernels.forward import attention_forward

        q, v = inputs.q, inputs.v
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        lse_shape = (q.shape[1], q.shape[0]) if config.varlen else (q.shape[0], q.shape[2], q.shape[1])
        lse = q.new_empty(lse_shape, dtype=torch.float32)
        programs, arguments, options = forward_launch(config, inputs, out, lse)
        with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
            attention_forward[(programs,)](**arguments, **options)
        return out, lse

    def backward(
        self,
        config: AttentionConfig,
        inputs: AttentionInputs,
        out: Tensor,
        lse: Tensor | None,
        grad_out: Tensor,
        grad_lse: Tensor | None,
    ) -> Gradients:
        raise UnsupportedError("flash has no backward kernel", {self.name: [_NO_BACKWARD]})


def forward_launch(
    config: AttentionConfig, inputs: AttentionInputs, out: Tensor, lse: Tensor
) -> tuple[int, Mapping[str, Any], Mapping[str, int]]:
    """Number of programs, arguments by name and compile options of the forward kernel for one call.

    Reads shapes and strides only, so that the compile gate can ask for calls on devices that are not there.
    """
    arch = tuning.table_architecture(config.arch) or _INTERPRETER_ARCH
    left, right = _bounded_band(config)
    tile = tuning.forward_tile(
        arch,
        config.dtype.itemsize,
        max(config.head_dim, config.head_dim_v),
        right is not None,
        config.seqlen_k if left is None or right is None else min(config.seqlen_k, left + right + 1),
        triton_version(),
        aligned=_aligned(inputs.k) and _aligned(inputs.v),
    )
    strides = {name: _strides4(getattr(inputs, name)) for name in ("q", "k", "v")}
    strides["out"] = _strides4(out)
    mask = None if inputs.mask is None else inputs.mask.view(torch.uint8)
    slopes = None if inputs.alibi_slopes is None else inputs.alibi_slopes.float().expand(config.batch, config.heads_q)
    raw = config.softcap == 0 and inputs.bias is None and slopes is None and config.softmax_scale > 0
    arguments = dict(
        q_ptr=inputs.q,
        k_ptr=inputs.k,
        v_ptr=inputs.v,
        out_ptr=out,
        lse_ptr=lse,
        mask_ptr=mask,
        bias_ptr=inputs.bias,
        alibi_ptr=slopes,
        sinks_ptr=inputs.sinks,
        cu_seqlens_q_ptr=inputs.cu_seqlens_q,
        cu_seqlens_k_ptr=inputs.cu_seqlens_k,
        kv_lens_ptr=inputs.kv_lens,
        block_table_ptr=inputs.block_table,
        seed_ptr=inputs.dropout_seed,
        q_strides=strides["q"],
        k_strides=strides["k"],
        v_strides=strides["v"],
        out_strides=strides["out"],
        lse_strides=lse.stride()[:2] if lse.ndim == 3 else (0, lse.stride(0)),
        mask_strides=_broadcast_strides(mask),
        bias_strides=_broadcast_strides(inputs.bias),
        alibi_strides=(0, 0) if slopes is None else slopes.stride(),
        block_table_stride=0 if inputs.block_table is None else inputs.block_table.stride(0),
        heads_q=config.heads_q,
        group=config.heads_q // config.heads_kv,
        seqlen_q=config.seqlen_q,
        seqlen_k=config.seqlen_k,
        total_q=config.total_q or 0,
        total_k=config.total_k or 0,
        page_size=config.page_size or 1,
        softmax_scale=float(config.softmax_scale),
        softcap=float(config.softcap) if config.softcap > 0 else None,
        window_left=left,
        window_right=right,
        dropout_threshold=dropout_threshold(config.dropout_p) if inputs.dropout_seed is not None else None,
        dropout_rescale=1 / (1 - config.dropout_p) if inputs.dropout_seed is not None else None,
        HEAD_DIM=config.head_dim,
        HEAD_DIM_V=config.head_dim_v,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_D=tuning.padded_head_dim(config.head_dim),
        BLOCK_DV=tuning.padded_head_dim(config.head_dim_v),
        RAW=raw,
        RAGGED=left is not None
        or right is not None
        or config.varlen
        or config.kv_lens
        or config.seqlen_k % tile.block_n != 0,
        WIDE=_wide(inputs, out),
        PRECISION=_product_precision(config),
    )
    programs = -(-config.seqlen_q // tile.block_m) * config.batch * config.heads_q
    return programs, arguments, dict(num_warps=tile.num_warps, num_stages=tile.num_stages)


def _bounded_band(config: AttentionConfig) -> tuple[int | None, int | None]:
    """The band with sides that bound nothing dropped: they would cost masked blocks."""
    left, right = config.band
    reach = config.seqlen_q + config.seqlen_k
    return (None if left is None or left >= reach else left), (None if right is None or right >= reach else right)


def _strides4(tensor: Tensor) -> tuple[int, ...]:
    """Strides as (batch, row, head, dim); packed tensors have no batch."""
    return tensor.stride() if tensor.ndim == 4 else (0, *tensor.stride())


def _broadcast_strides(tensor: Tensor | None) -> tuple[int, ...]:
    """Strides with 0 along broadcast dimensions."""
    if tensor is None:
        return (0, 0, 0, 0)
    return tuple(0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _aligned(tensor: Tensor) -> bool:
    """Whether Triton can tell that rows start at multiples of 16 bytes: it looks for factors of 16 in the strides."""
    return (
        tensor.stride(-1) == 1
        and all(stride % 16 == 0 for stride in tensor.stride()[:-1])
        and (tensor.is_meta or tensor.data_ptr() % 16 == 0)
    )


def _wide(inputs: AttentionInputs, out: Tensor) -> bool:
    """Whether a tile's own extent can pass 2**31 elements."""
    tensors = (inputs.q, inputs.k, inputs.v, inputs.mask, inputs.bias, out)
    return any(stride * _LARGEST_TILE >= 2**31 for t in tensors if t is not None for stride in t.stride())


def _product_precision(config: AttentionConfig) -> str:
    """How float32 products are computed: exactly, unless torch's own matmul precision is set lower."""
    if config.dtype != torch.float32 or config.arch.startswith("gfx"):
        return "ieee"
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[torch.get_float32_matmul_precision()]


@functools.cache
def triton_version() -> tuple[int, int]:
    """(major, minor) of the installed Triton."""
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def _interpreting() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
