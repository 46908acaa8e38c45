"""The `hopper` backend: launches the Gluon kernels for NVIDIA H100 and H200 (sm90)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regard.backends import key_splits, tma
from regard.backends.flash import sink_gradient, softcap_reasons, triton_reason
from regard.backends.flash_launches import bounded_band, new_gradients, row_tensors, row_terms_launch
from regard.backends.hopper_plan import forward_tile, one_cut, query_tiles, splits_of, too_small
from regard.backends.key_splits import Parts, merge_launch, multiprocessors
from regard.backends.launch import (
    Launch,
    PlainCalls,
    appearance,
    contiguous,
    launch_or_repeat,
    new_results,
    on_device,
)
from regard.backends.tile_counters import tile_counter
from regard.config import AttentionConfig, AttentionInputs, KvCacheLayout
from regard.errors import Reason
from regard.kernels import hopper_tuning, tuning
from regard.registry import Gradients, Shortcut

MAX_HEAD_DIM = 256
_ONE_PASS_HEAD_DIM = 128  # beyond, the backward in one pass keeps too few keys in registers
_LEAST_TWO_PASS_HEAD_DIM = 64  # up to here, flash's two passes are faster
_SUMS_ROW = 128  # values in a row of the sums of dQ, as TMA sees them
_SECTION_BYTES = 4 * 2**20  # of keys and values (backward: queries) whose tiles take turns, where all are equally long
_CAUSAL_SECTION_BYTES = 16 * 2**20  # where they are not
_CAUSAL_SECTION_HEADS = 4  # of the forward, at least

_LEFT_TO_FLASH = "flash serves such calls: a tile of it for every key tile has no room beside the pipeline"


class HopperBackend:
    """Flash attention for sm90 with TMA, wgmma and warp specialization: float16 and bfloat16, head dims 8 to 256."""

    name = "hopper"

    def unsupported_reasons(self, config: AttentionConfig) -> Sequence[Reason]:
        reasons = []
        if config.device != "cuda":
            reasons.append(Reason("device", config.device, "cuda"))
        elif config.arch != "sm90":
            reasons.append(Reason("arch", config.arch, "sm90"))
        elif (missing := triton_reason()) is not None:
            reasons.append(missing)
        if config.dtype == torch.float64:
            reasons.append(Reason("dtype_float64", "float64", "float16 or bfloat16", "reference computes in float64"))
        elif config.dtype not in (torch.float16, torch.bfloat16):
            reasons.append(Reason("dtype", str(config.dtype).removeprefix("torch."), "float16 or bfloat16"))
        head_dim = max(config.head_dim, config.head_dim_v)
        reasons += [
            Reason("head_dim", str(wrong), f"a multiple of 8, at most {MAX_HEAD_DIM}")
            for wrong in sorted({int(config.head_dim), int(config.head_dim_v)})  # symbols have no hash
            if wrong > MAX_HEAD_DIM or wrong % 8
        ]
        if config.mask_shape is not None:
            reasons.append(Reason("mask", "a mask", "causal, window or lengths", _LEFT_TO_FLASH))
        if config.bias_shape is not None:
            reasons.append(Reason("bias", "a bias", "ALiBi slopes", _LEFT_TO_FLASH))
        if config.dropout_p > 0:
            reasons.append(Reason("dropout", f"dropout_p={config.dropout_p}", "0", "flash serves such calls"))
        if config.softmax_scale <= 0:
            reasons.append(Reason("softmax_scale", str(config.softmax_scale), "a positive number"))
        if config.requires_grad and _needs_two_passes(config) and head_dim <= _LEAST_TWO_PASS_HEAD_DIM:
            feature = "deterministic=True" if config.deterministic else f"softcap={config.softcap}"
            observed = f"a gradient with {feature} at head dim {head_dim}"
            needed = f"head dims above {_LEAST_TWO_PASS_HEAD_DIM}"
            reasons.append(Reason("backward", observed, needed, "flash is faster: this takes two passes here"))
        return [*reasons, *softcap_reasons(config)]

    def yields_to(self, config: AttentionConfig) -> tuple[str, Reason] | None:
        small = too_small(config)
        return None if small is None else ("flash", Reason("small", *small, "flash is faster"))

    def required_kv_layout(self, config: AttentionConfig) -> KvCacheLayout:
        return KvCacheLayout.PACKED if config.varlen else KvCacheLayout.CONTIGUOUS

    def forward(self, config: AttentionConfig, inputs: AttentionInputs) -> tuple[Tensor, Tensor | None]:
        device = inputs.q.device
        out, lse = new_results(config, inputs)
        key = _forward_key(inputs)
        *_, looks = key
        if not tma.are_readable(looks[:3]):
            inputs = _all_readable_by_tma(inputs)
        with on_device(device):
            counter, count = tile_counter(device), multiprocessors(device)
            parts = new_parts(config, inputs.q, count)
            tensors = (
                *inputs[:3], out, *(parts or (out, lse)), counter, out, lse, contiguous(inputs.sinks),
                *_shared_tensors(config, inputs),
            )  # fmt: skip

            def launches() -> list[Launch]:
                made = [forward_launch(config, inputs, out, lse, counter, count, parts)]
                return made if parts is None else [*made, merge_launch(config, inputs, parts, out, lse)]

            launch_or_repeat(config.prepared, key, dict(zip(_FORWARD_TENSORS, tensors, strict=True)), launches, device)
        return out, lse

    def shortcut(self, config: AttentionConfig, layout: str) -> Shortcut | None:
        strides = (config.q_strides, config.k_strides, config.v_strides)
        if any(each is None or not tma.strides_suit(each, config.dtype.itemsize) for each in strides):
            return None
        others = (None,) * (1 + len(_SHARED_TENSORS))

        def arguments(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Sequence[Tensor | None]:
            parts = new_parts(config, q, multiprocessors(q.device)) or (out, lse)
            return q, k, v, out, *parts, tile_counter(q.device), out, lse, *others

        return PlainCalls(self.forward, config, layout, _forward_key, arguments)

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
        assert lse is not None
        device = grad_out.device
        grad_out, inputs = _readable_by_tma(grad_out), _all_readable_by_tma(inputs)
        row_lse, delta = torch.empty_like(lse), torch.empty_like(lse)
        found = new_gradients(config, inputs)
        dq, dk, dv = found.values()
        tensors = dict(
            zip(_SHARED_TENSORS, _shared_tensors(config, inputs), strict=True),
            **row_tensors(out, grad_out, lse, grad_lse, row_lse, delta),
            q_desc=inputs.q, k_desc=inputs.k, v_desc=inputs.v, grad_out_desc=grad_out,
            dq_desc=dq, dk_desc=dk, dv_desc=dv, dq_ptr=dq, dk_ptr=dk, dv_ptr=dv,
        )  # fmt: skip
        with on_device(device):
            if not _needs_two_passes(config):
                sums = torch.zeros(query_sums_shape(config), dtype=torch.float32, device=device)
                counter = tile_counter(device)
                tensors |= dict(dq_desc=sums, sums_ptr=sums, counter_ptr=counter)

            def launches() -> list[Launch]:
                rows = row_terms_launch(config, inputs, out, grad_out, lse, grad_lse, row_lse, delta)
                if _needs_two_passes(config):
                    gradients = inputs._replace(**found)
                    return [rows, *two_pass_launches(config, inputs, grad_out, row_lse, delta, gradients)]
                both = backward_launch(
                    config, inputs, grad_out, row_lse, delta, sums, dk, dv, counter, multiprocessors(device)
                )
                return [rows, both, finish_launch(config, inputs, sums, dq)]

            key = "hopper backward", device.index, appearance(tensors.values())
            launch_or_repeat(config.prepared, key, tensors, launches, device)
        if inputs.sinks is not None:
            found["sinks"] = sink_gradient(inputs, row_lse, delta).to(inputs.sinks.dtype)
        return {**found}


def _needs_two_passes(config: AttentionConfig) -> bool:
    """Whether the backward takes dQ in a pass of its own: at wide heads that is faster; a repeatable sum needs it; and
    the gradient of a softcap has no room in one pass.
    """
    return max(config.head_dim, config.head_dim_v) > _ONE_PASS_HEAD_DIM or config.deterministic or config.softcap > 0


def _forward_key(inputs: AttentionInputs) -> tuple[Any, ...]:
    """What the forward's launch depends on beyond its config."""
    return "hopper forward", inputs.q.device.index, appearance(inputs)


_SHARED_TENSORS = ("cu_seqlens_q_ptr", "cu_seqlens_k_ptr", "kv_lens_ptr", "alibi_ptr")
_FORWARD_TENSORS = (
    "q_desc", "k_desc", "v_desc", "out_desc", "out_ptr", "lse_ptr", "counter_ptr", "merged_ptr", "merged_lse_ptr",
    "sinks_ptr", *_SHARED_TENSORS,
)  # fmt: skip
"""What the forward kernel and the merge of its splits take, by the names of their arguments."""


def new_parts(config: AttentionConfig, q: Tensor, multiprocessors: int) -> Parts | None:
    """Memory for out and lse of every split of the keys, as `attention_forward` has them; None where keys are whole."""
    return key_splits.new_parts(config, q, multiprocessors, splits_of)


def forward_launch(
    config: AttentionConfig,
    inputs: AttentionInputs,
    out: Tensor,
    lse: Tensor,
    counter: Tensor,
    multiprocessors: int,
    parts: Parts | None = None,
) -> Launch:
    """The forward kernel's launch for one call.

    Args:
        config, inputs: the call.
        out: contiguous, (B, Sq, Hq, Dv) or (total_q, Hq, Dv).
        lse: contiguous fp32, (B, Hq, Sq) or (Hq, total_q).
        counter: int32 (2,), two zeros that the launch leaves as zeros.
        multiprocessors: of the device; as many programs stay resident.
        parts: of `new_parts`: where they are given, they are filled instead of out and lse, for `merge_launch`.
    """
    from regard.kernels.hopper_forward import attention_forward

    tile, pack = forward_tile(config)
    heads = config.heads_q // pack
    block_d, block_dv = (tuning.padded_head_dim(d) for d in (config.head_dim, config.head_dim_v))
    key_bytes = config.seqlen_k * (config.head_dim + config.head_dim_v) * config.dtype.itemsize
    arguments = dict(
        **_shared_arguments(config, inputs),
        q_desc=_query_descriptor(_readable_by_tma(inputs.q), pack, block_d),
        k_desc=_descriptor(_readable_by_tma(inputs.k), tile.block_n, block_d),
        v_desc=_descriptor(_readable_by_tma(inputs.v), tile.block_n, block_dv),
        out_desc=_query_descriptor(out, pack, block_dv),
        out_ptr=out,
        lse_ptr=lse,
        counter_ptr=counter,
        sinks_ptr=contiguous(inputs.sinks),
        heads=heads,
        group=heads // config.heads_kv,
        section=_heads_in_turn(config, key_bytes, _CAUSAL_SECTION_HEADS) * (heads // config.heads_kv),
        splits=None,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        QUERY_STAGES=tile.query_stages,
        KEY_STAGES=tile.key_stages,
        VALUE_STAGES=tile.value_stages,
        PACK=pack,
        RAGGED=_cut(config, tile.block_n),
        ONE_CUT=one_cut(config, pack),
        SHARE_Q=tile.share_q,
        HOLD_Q=tile.hold_q,
        TAKE_TURNS=tile.take_turns,
        PASS_EARLY=tile.pass_early,
        ONE_LOOP=tile.one_loop,
        RESCALE_EARLY=tile.rescale_early,
        VOTE=tile.vote,
        STEADY=tile.steady,
    )
    tiles = query_tiles(config, tile, pack)
    if parts is not None:
        part_out, part_lse = parts
        splits = len(part_out)
        tiles *= splits
        rows = splits * config.batch * config.seqlen_q
        arguments |= dict(out_ptr=part_out, lse_ptr=part_lse, sinks_ptr=None, splits=splits, total_q=rows)
    options = dict(num_warps=4, maxnreg=tile.max_registers)
    return Launch(attention_forward, min(multiprocessors, tiles), _wanted(attention_forward, arguments), options)


def _heads_in_turn(config: AttentionConfig, head_bytes: int, least_causal: int) -> int:
    """Key/value heads whose tiles take turns, one block of each, before those of other heads come up.

    Where all tiles are equally long, few: otherwise all programs ask memory for new heads at once, and then L2 alone.
    Below a causal bound more, so that the programs come to an end together: the longest tiles of a section go first.
    """
    _, right = bounded_band(config)
    if right is None:
        return max(1, _SECTION_BYTES // max(head_bytes, 1))
    return max(least_causal, _CAUSAL_SECTION_BYTES // max(head_bytes, 1))


def query_sums_shape(config: AttentionConfig) -> tuple[int, int]:
    """Shape of the fp32 sums of dQ in one pass: what `regard.kernels.hopper_backward.blocks_of_sums` counts, each block
    in two parts, as rows of 128.
    """
    block_m = hopper_tuning.backward_block_m(config.head_dim, config.head_dim_v)
    if config.varlen:
        blocks = config.heads_q * ((config.total_q or 0) // block_m + config.batch)
    else:
        blocks = config.batch * config.heads_q * -(-config.seqlen_q // block_m)
    return blocks * 2 * _rows_of_a_part(config), _SUMS_ROW


def _rows_of_a_part(config: AttentionConfig) -> int:
    """Rows of 128 that a warpgroup's part of a block of dQ takes."""
    block_m = hopper_tuning.backward_block_m(config.head_dim, config.head_dim_v)
    return block_m * _backward_block_d(config.head_dim) // (2 * _SUMS_ROW)


def _backward_block_d(head_dim: int) -> int:
    return max(64, tuning.padded_head_dim(head_dim))


def backward_launch(
    config: AttentionConfig,
    inputs: AttentionInputs,
    grad_out: Tensor,
    row_lse: Tensor,
    delta: Tensor,
    sums: Tensor,
    dk: Tensor,
    dv: Tensor,
    counter: Tensor,
    multiprocessors: int,
) -> Launch:
    """The backward kernel's launch for one call: fills dk and dv, and adds dQ, but for the scale, to ``sums``.

    Args:
        config, inputs: the call.
        grad_out: gradient of the output, as TMA can read it.
        row_lse, delta: see `regard.kernels.backward.row_terms`.
        sums: fp32 zeros of `query_sums_shape`, for `finish_launch`.
        dk, dv: contiguous, of k's and v's shapes.
        counter, multiprocessors: as for `forward_launch`.
    """
    from regard.kernels.hopper_backward import BLOCK_N, KEYS, attention_backward

    block_d, block_dv = (_backward_block_d(d) for d in (config.head_dim, config.head_dim_v))
    row_bytes = (config.head_dim + config.head_dim_v) * config.dtype.itemsize + config.head_dim * sums.element_size()
    query_bytes = row_bytes * config.seqlen_q * (config.heads_q // config.heads_kv)
    block_m = hopper_tuning.backward_block_m(config.head_dim, config.head_dim_v)
    arguments = dict(
        **_shared_arguments(config, inputs),
        q_desc=_descriptor(_readable_by_tma(inputs.q), block_m, block_d),
        k_desc=_descriptor(_readable_by_tma(inputs.k), BLOCK_N.value, block_d),
        v_desc=_descriptor(_readable_by_tma(inputs.v), BLOCK_N.value, block_dv),
        grad_out_desc=_descriptor(grad_out, block_m, block_dv),
        dq_desc=_described(sums, sums, (_rows_of_a_part(config), _SUMS_ROW), swizzled=False),
        dk_desc=_descriptor(dk, KEYS.value, block_d),
        dv_desc=_descriptor(dv, KEYS.value, block_dv),
        dk_ptr=dk,
        dv_ptr=dv,
        row_lse_ptr=row_lse,
        delta_ptr=delta,
        counter_ptr=counter,
        heads=config.heads_q,
        heads_kv=config.heads_kv,
        section=_heads_in_turn(config, query_bytes, 1),
        HEAD_DIM=config.head_dim,
        BLOCK_M=block_m,
        STAGES=2,
        KEY_STAGES=2,
        VALUE_STAGES=2 if block_m == 128 else 1,  # what shared memory has room for
        RAGGED=_cut(config, BLOCK_N.value),
    )
    programs = min(multiprocessors, -(-config.seqlen_k // BLOCK_N.value) * config.batch * config.heads_kv)
    return Launch(attention_backward, programs, _wanted(attention_backward, arguments), dict(num_warps=4, maxnreg=168))


def finish_launch(config: AttentionConfig, inputs: AttentionInputs, sums: Tensor, dq: Tensor) -> Launch:
    """The launch that fills dq, contiguous and of q's shape, from the sums of `backward_launch`."""
    from regard.kernels.hopper_backward import finish_queries

    block_m = hopper_tuning.backward_block_m(config.head_dim, config.head_dim_v)
    arguments = dict(
        **_shared_arguments(config, inputs),
        sums_ptr=sums,
        dq_ptr=dq,
        heads=config.heads_q,
        HEAD_DIM=config.head_dim,
        BLOCK_M=block_m,
        COLUMNS=_rows_of_a_part(config) * _SUMS_ROW // hopper_tuning.ROWS,
    )
    programs = sums.shape[0] // _rows_of_a_part(config)
    return Launch(finish_queries, programs, _wanted(finish_queries, arguments), dict(num_warps=4))


def two_pass_launches(
    config: AttentionConfig,
    inputs: AttentionInputs,
    grad_out: Tensor,
    row_lse: Tensor,
    delta: Tensor,
    gradients: AttentionInputs,
) -> list[Launch]:
    """The launches that fill q, k and v of ``gradients`` (contiguous): dK and dV, then dQ.

    The other arguments are those of `backward_launch`.
    """
    from regard.kernels.hopper_two_pass import backward_keys, backward_queries

    rows = hopper_tuning.ROWS
    tile = hopper_tuning.two_pass_tile(config.head_dim, config.head_dim_v)
    block_d, block_dv = (_backward_block_d(d) for d in (config.head_dim, config.head_dim_v))
    q = _readable_by_tma(inputs.q)
    arguments = dict(
        **_shared_arguments(config, inputs),
        k_desc=_descriptor(_readable_by_tma(inputs.k), rows, block_d),
        v_desc=_descriptor(_readable_by_tma(inputs.v), rows, block_dv),
        dq_desc=_descriptor(gradients.q, rows, block_d),
        dk_desc=_descriptor(gradients.k, rows, block_d),
        dv_desc=_descriptor(gradients.v, rows, block_dv),
        dq_ptr=gradients.q,
        dk_ptr=gradients.k,
        dv_ptr=gradients.v,
        row_lse_ptr=row_lse,
        delta_ptr=delta,
        heads=config.heads_q,
        heads_kv=config.heads_kv,
        HEAD_DIM=config.head_dim,
        KEY_STAGES=2,
        VALUE_STAGES=tile.value_stages,
        RAGGED=_cut(config, rows),
    )
    key_tiles = -(-config.seqlen_k // rows) * config.batch * config.heads_kv
    query_tiles = -(-config.seqlen_q // (2 * rows)) * config.batch * config.heads_q
    launches = []
    for kernel, programs, block_m in (
        (backward_keys, key_tiles, tile.block_m),
        (backward_queries, query_tiles, rows),
    ):
        arguments["q_desc"] = _descriptor(q, block_m, block_d)
        arguments["grad_out_desc"] = _descriptor(grad_out, block_m, block_dv)
        launches.append(Launch(kernel, programs, _wanted(kernel, arguments), dict(num_warps=4, maxnreg=168)))
    return launches


def _shared_arguments(config: AttentionConfig, inputs: AttentionInputs) -> dict[str, Any]:
    """What both kernels are told of a call."""
    left, right = bounded_band(config)
    return dict(
        **dict(zip(_SHARED_TENSORS, _shared_tensors(config, inputs), strict=True)),
        batch=config.batch,
        seqlen_q=config.seqlen_q,
        seqlen_k=config.seqlen_k,
        total_q=config.total_q or 0,
        total_k=config.total_k or 0,
        scale=float(config.softmax_scale),
        softcap=float(config.softcap) if config.softcap > 0 else None,
        window_left=left,
        right_reach=None if right is None else right + 1,  # the 1 of a causal call is compiled in
        HEAD_DIM_V=config.head_dim_v,
    )


def _shared_tensors(config: AttentionConfig, inputs: AttentionInputs) -> tuple[Tensor | None, ...]:
    """In the order of `_SHARED_TENSORS`; ALiBi slopes are (B, Hq) fp32."""
    slopes = inputs.alibi_slopes
    if slopes is not None:
        slopes = slopes.float().expand(config.batch, config.heads_q).contiguous()
    return inputs.cu_seqlens_q, inputs.cu_seqlens_k, inputs.kv_lens, slopes


def _wanted(kernel: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: arguments[name] for name in kernel.arg_names}


def _cut(config: AttentionConfig, block_n: int) -> bool:
    """Whether the last key tile may be cut."""
    return config.varlen or config.kv_lens or config.seqlen_k % block_n != 0


def _readable_by_tma(tensor: Tensor) -> Tensor:
    """The tensor itself where TMA can follow its strides, else a contiguous copy."""
    return tensor if tma.is_readable(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def _all_readable_by_tma(inputs: AttentionInputs) -> AttentionInputs:
    """The same with q, k and v that TMA can follow."""
    q, k, v = map(_readable_by_tma, inputs[:3])
    return inputs._replace(q=q, k=k, v=v)


def _query_descriptor(tensor: Tensor, pack: int, block_d: int) -> Any:
    """TMA descriptor of q or out as (B, Hq / pack, Sq, pack, D), for 64 rows at a time."""
    batch, heads, length, head_dim = (by_head := tma.by_head(tensor)).shape
    packed = by_head.view(batch, heads // pack, pack, length, head_dim).transpose(2, 3)
    return _described(tensor, packed, (1, 1, hopper_tuning.ROWS // pack, pack, block_d))


def _descriptor(tensor: Tensor, rows: int, block_d: int) -> Any:
    """TMA descriptor of a tensor as (B, H, S, D), for so many rows at a time."""
    return _described(tensor, tma.by_head(tensor), (1, 1, rows, block_d))


def _described(tensor: Tensor, view: Tensor, block: tuple[int, ...], swizzled: bool = True) -> Any:
    """TMA descriptor of a tensor in the shape of a view of it."""
    return tma.descriptor(tensor, view, block, _layout(block, tensor.dtype, swizzled))


@functools.cache
def _layout(block: tuple[int, ...], dtype: torch.dtype, swizzled: bool) -> Any:
    """How such a block lies in shared memory."""
    from triton.experimental.gluon import language as gl

    if swizzled:
        return gl.NVMMASharedLayout.get_default_for(list(block), getattr(gl, str(dtype).removeprefix("torch.")))
    return gl.NVMMASharedLayout(0, 8 * dtype.itemsize, len(block))
