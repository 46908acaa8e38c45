"""The `hopper` backend: launches the Gluon kernels for NVIDIA H100 and H200 (sm90)."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from regard.backends.flash import row_terms_launch, sink_gradient
from regard.config import AttentionConfig, AttentionInputs, KvCacheLayout
from regard.errors import Reason
from regard.kernels import hopper_tuning, tuning
from regard.registry import Gradients

MAX_HEAD_DIM = 256
MAX_BACKWARD_HEAD_DIM = 128
_TMA_BYTES = 16  # granularity of addresses and strides that TMA can follow
_L2_SHARE = 32 * 2**20  # bytes of keys and values that tiles in flight may share: most of an H200's 50 MB

_LEFT_TO_FLASH = "flash serves these calls: a tile's worth of it per key block would not fit beside the pipeline"


class HopperBackend:
    """Flash attention for sm90 with TMA, wgmma and warp specialization: float16 and bfloat16, head dims 8 to 256."""

    name = "hopper"

    def unsupported_reasons(self, config: AttentionConfig) -> Sequence[Reason]:
        reasons = []
        if importlib.util.find_spec("triton") is None:
            reasons.append(
                Reason("not_installed", "no triton", "triton >= 3.6", "CUDA and ROCm builds of torch bring it")
            )
        if config.device != "cuda":
            reasons.append(Reason("device", config.device, "cuda"))
        elif config.arch != "sm90":
            reasons.append(Reason("arch", config.arch, "sm90"))
        if config.dtype == torch.float64:
            reasons.append(Reason("dtype_float64", "float64", "float16 or bfloat16", "reference computes in float64"))
        elif config.dtype not in (torch.float16, torch.bfloat16):
            reasons.append(Reason("dtype", str(config.dtype).removeprefix("torch."), "float16 or bfloat16"))
        for head_dim in {config.head_dim, config.head_dim_v}:
            if head_dim > MAX_HEAD_DIM or head_dim % 8:
                reasons.append(Reason("head_dim", str(head_dim), f"a multiple of 8, at most {MAX_HEAD_DIM}"))
        if config.mask_shape is not None:
            reasons.append(Reason("mask", "a mask", "causal, window or lengths", _LEFT_TO_FLASH))
        if config.bias_shape is not None:
            reasons.append(Reason("bias", "a bias", "ALiBi slopes", _LEFT_TO_FLASH))
        if config.dropout_p > 0:
            reasons.append(Reason("dropout", f"dropout_p={config.dropout_p}", "0", _LEFT_TO_FLASH))
        if config.softmax_scale <= 0:
            reasons.append(Reason("softmax_scale", str(config.softmax_scale), "a positive number"))
        if config.requires_grad:
            reasons += _backward_reasons(config)
        return reasons

    def required_kv_layout(self, config: AttentionConfig) -> KvCacheLayout:
        return KvCacheLayout.PACKED if config.varlen else KvCacheLayout.CONTIGUOUS

    def forward(self, config: AttentionConfig, inputs: AttentionInputs) -> tuple[Tensor, Tensor | None]:
        from regard.kernels.hopper_forward import attention_forward

        q, v = inputs.q, inputs.v
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        lse_shape = (q.shape[1], q.shape[0]) if config.varlen else (q.shape[0], q.shape[2], q.shape[1])
        lse = q.new_empty(lse_shape, dtype=torch.float32)
        with torch.cuda.device(q.device):
            programs, arguments, options = forward_launch(config, inputs, out, lse)
            attention_forward[(programs,)](**arguments, **options)
        return out, lse

    @torch.no_grad()
    def backward(
        self,
        config: AttentionConfig,
        inputs: AttentionInputs,
        out: Tensor,
        lse: Tensor | None,
        grad_out: Tensor,
        grad_lse: Tensor | None,
    ) -> Gradients:
        from regard.kernels.hopper_backward import attention_backward

        assert lse is not None
        inputs = inputs._replace(**{name: _readable_by_tma(getattr(inputs, name)) for name in ("q", "k", "v")})
        grad_out = _readable_by_tma(grad_out)
        row_lse, delta = torch.empty_like(lse), torch.empty_like(lse)
        row_terms_launch(config, inputs, out, grad_out, lse, grad_lse, row_lse, delta).run(grad_out.device)
        # Every row of a padded batch is written, but packed sequences may leave some out.
        new = torch.zeros_like if config.varlen else torch.empty_like
        dk, dv = (new(t, memory_format=torch.contiguous_format) for t in (inputs.k, inputs.v))
        sums = torch.zeros(inputs.q.shape, dtype=torch.float32, device=inputs.q.device)
        with torch.cuda.device(grad_out.device):
            programs, arguments, options = backward_launch(config, inputs, grad_out, row_lse, delta, sums, dk, dv)
            attention_backward[(programs,)](**arguments, **options)
        dq = torch.mul(sums, config.softmax_scale, out=torch.empty(sums.shape, dtype=dk.dtype, device=dk.device))
        found: Gradients = {"q": dq, "k": dk, "v": dv}
        if inputs.sinks is not None:
            found["sinks"] = sink_gradient(inputs, row_lse, delta)
        return found


def _backward_reasons(config: AttentionConfig) -> list[Reason]:
    reasons = []
    head_dim = max(config.head_dim, config.head_dim_v)
    if head_dim > MAX_BACKWARD_HEAD_DIM:
        reasons.append(Reason("backward", f"a gradient at head dim {head_dim}", f"at most {MAX_BACKWARD_HEAD_DIM}"))
    if config.softcap > 0:
        reasons.append(Reason("backward", "a gradient through softcap", "no softcap", "flash has it"))
    if config.deterministic:
        reasons.append(
            Reason("deterministic", "deterministic=True", "False", "dQ is summed in the order programs come to it")
        )
    return reasons


def forward_launch(
    config: AttentionConfig,
    inputs: AttentionInputs,
    out: Tensor,
    lse: Tensor,
    tile: Any = None,
) -> tuple[int, Mapping[str, Any], Mapping[str, int]]:
    """Number of programs, arguments by name and compile options of the forward kernel for one call."""
    left, right = config.band
    raw = config.softcap == 0 and inputs.alibi_slopes is None
    tile = tile or hopper_tuning.forward_tile(
        config.head_dim, config.head_dim_v, right is not None, config.seqlen_k, raw
    )
    pack = _packed_heads(config)
    heads = config.heads_q // pack
    group = heads // config.heads_kv
    rows = tile.block_m // pack
    q, k, v = (_readable_by_tma(t) for t in (inputs.q, inputs.k, inputs.v))
    block_d, block_dv = (tuning.padded_head_dim(d) for d in (config.head_dim, config.head_dim_v))
    key_bytes = config.seqlen_k * (config.head_dim + config.head_dim_v) * config.dtype.itemsize
    slopes = inputs.alibi_slopes
    if slopes is not None:
        slopes = slopes.float().expand(config.batch, config.heads_q).contiguous()
    arguments = dict(
        q_desc=_query_descriptor(q, pack, 64, block_d),
        k_desc=_key_descriptor(k, tile.block_n, block_d),
        v_desc=_key_descriptor(v, tile.block_n, block_dv),
        out_desc=_query_descriptor(out, pack, 64, block_dv),
        out_ptr=out,
        lse_ptr=lse,
        counter_ptr=_counter(q.device),
        cu_seqlens_q_ptr=inputs.cu_seqlens_q,
        cu_seqlens_k_ptr=inputs.cu_seqlens_k,
        kv_lens_ptr=inputs.kv_lens,
        alibi_ptr=slopes,
        sinks_ptr=inputs.sinks,
        batch=config.batch,
        heads=heads,
        group=group,
        seqlen_q=config.seqlen_q,
        seqlen_k=config.seqlen_k,
        total_q=config.total_q or 0,
        total_k=config.total_k or 0,
        section=max(1, _L2_SHARE // max(key_bytes, 1)) * group,
        scale=float(config.softmax_scale),
        softcap=float(config.softcap) if config.softcap > 0 else None,
        window_left=left,
        right_reach=None if right is None else right + 1,
        HEAD_DIM_V=config.head_dim_v,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        KEY_STAGES=tile.key_stages,
        VALUE_STAGES=tile.value_stages,
        PACK=pack,
        SEQUENCES=max(32, 1 << (config.batch - 1).bit_length()) if config.varlen else 32,
        RAGGED=config.varlen or config.kv_lens or config.seqlen_k % tile.block_n != 0,
        SHARE_Q=tile.share_q,
        TAKE_TURNS=tile.take_turns,
        ONE_LOOP=tile.one_loop,
    )
    if config.varlen:
        tiles = heads * (-(-(config.total_q or 0) // rows) + config.batch)
    else:
        tiles = config.batch * heads * -(-config.seqlen_q // rows)
    programs = min(_multiprocessors(q.device), tiles)
    return programs, arguments, dict(num_warps=4, maxnreg=tile.max_registers)


def backward_launch(
    config: AttentionConfig,
    inputs: AttentionInputs,
    grad_out: Tensor,
    row_lse: Tensor,
    delta: Tensor,
    sums: Tensor,
    dk: Tensor,
    dv: Tensor,
    block_m: int | None = None,
    stages: int = 2,
) -> tuple[int, Mapping[str, Any], Mapping[str, int]]:
    """Number of programs, arguments by name and compile options of the backward kernel for one call.

    It adds dQ, but for the scale, to the float32 ``sums``.
    """
    left, right = config.band
    block_d, block_dv = (max(64, tuning.padded_head_dim(d)) for d in (config.head_dim, config.head_dim_v))
    block_m = block_m or hopper_tuning.backward_block_m(config.head_dim, config.head_dim_v)
    block_n, keys = 128, 64
    slopes = inputs.alibi_slopes
    if slopes is not None:
        slopes = slopes.float().expand(config.batch, config.heads_q).contiguous()
    arguments = dict(
        q_desc=_key_descriptor(inputs.q, block_m, block_d),
        k_desc=_key_descriptor(inputs.k, block_n, block_d),
        v_desc=_key_descriptor(inputs.v, block_n, block_dv),
        grad_out_desc=_key_descriptor(grad_out, block_m, block_dv),
        dq_desc=_key_descriptor(sums, 64, block_d if block_m == 128 else block_d // 2),
        dk_desc=_key_descriptor(dk, keys, block_d),
        dv_desc=_key_descriptor(dv, keys, block_dv),
        dk_ptr=dk,
        dv_ptr=dv,
        row_lse_ptr=row_lse,
        delta_ptr=delta,
        cu_seqlens_q_ptr=inputs.cu_seqlens_q,
        cu_seqlens_k_ptr=inputs.cu_seqlens_k,
        kv_lens_ptr=inputs.kv_lens,
        alibi_ptr=slopes,
        batch=config.batch,
        heads=config.heads_q,
        heads_kv=config.heads_kv,
        seqlen_q=config.seqlen_q,
        seqlen_k=config.seqlen_k,
        total_q=config.total_q or 0,
        total_k=config.total_k or 0,
        scale=float(config.softmax_scale),
        window_left=left,
        right_reach=None if right is None else right + 1,
        HEAD_DIM=config.head_dim,
        HEAD_DIM_V=config.head_dim_v,
        BLOCK_M=block_m,
        STAGES=stages,
        RAGGED=config.varlen or config.kv_lens or config.seqlen_k % block_n != 0,
    )
    programs = -(-config.seqlen_k // block_n) * config.batch * config.heads_kv
    return programs, arguments, dict(num_warps=4, maxnreg=168)


def _packed_heads(config: AttentionConfig) -> int:
    """Query heads of one key/value head that share a tile: as many as a power of two allows."""
    group = config.heads_q // config.heads_kv
    return min(group & -group, 64)


def _readable_by_tma(tensor: Tensor) -> Tensor:
    """The tensor itself where TMA can follow its strides, else a contiguous copy."""
    size = tensor.element_size()
    strided = tensor.stride(-1) == 1 and all(
        stride > 0 and stride * size % _TMA_BYTES == 0 for stride in tensor.stride()[:-1]
    )
    return (
        tensor
        if strided and tensor.data_ptr() % _TMA_BYTES == 0
        else tensor.clone(memory_format=torch.contiguous_format)
    )


def _query_descriptor(tensor: Tensor, pack: int, rows: int, block_d: int) -> Any:
    """TMA descriptor of q or out as (B, Hq / pack, Sq, pack, D)."""
    batch, length, heads, head_dim = tensor.shape if tensor.ndim == 4 else (1, *tensor.shape)
    strides = tensor.stride() if tensor.ndim == 4 else (tensor.numel(), *tensor.stride())
    shape = [batch, heads // pack, length, pack, head_dim]
    steps = [strides[0], strides[2] * pack, strides[1], strides[2], 1]
    return _descriptor(tensor, shape, steps, [1, 1, rows // pack, pack, block_d])


def _key_descriptor(tensor: Tensor, block_n: int, block_d: int) -> Any:
    """TMA descriptor of k or v as (B, Hk, Sk, D)."""
    batch, length, heads, head_dim = tensor.shape if tensor.ndim == 4 else (1, *tensor.shape)
    strides = tensor.stride() if tensor.ndim == 4 else (tensor.numel(), *tensor.stride())
    shape = [batch, heads, length, head_dim]
    return _descriptor(tensor, shape, [strides[0], strides[2], strides[1], 1], [1, 1, block_n, block_d])


def _descriptor(tensor: Tensor, shape: list[int], strides: list[int], block: list[int]) -> Any:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(tensor, shape, strides, block, _tile_layout(tuple(block), tensor.dtype))


@functools.cache
def _tile_layout(block: tuple[int, ...], dtype: torch.dtype) -> Any:
    """Layout of a tile in shared memory: the widest swizzle that TMA and wgmma share."""
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout.get_default_for(list(block), getattr(gl, str(dtype).removeprefix("torch.")))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


_counters: dict[tuple[torch.device, int], Tensor] = {}


def _counter(device: torch.device) -> Tensor:
    """The tile counter of the current stream: two zeros that every launch leaves as zeros.

    Launches on one stream follow each other; a captured graph may run beside them and gets a counter of its own.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(2, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _counters:
        _counters[key] = torch.zeros(2, dtype=torch.int32, device=device)
    return _counters[key]
