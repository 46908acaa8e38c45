"""The `sdpa` backend: torch's own `scaled_dot_product_attention`, with its limits said as reasons."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.backends.reference import compact, gradients_by_autograd
from regard.config import AttentionConfig, AttentionInputs, KvCacheLayout
from regard.errors import Reason
from regard.registry import Gradients, Shortcut
from regard.tracing import is_traced

_WORD = 16  # bytes that torch's CUDA kernels load at once, trusting that addresses and strides are multiples of it


class SdpaBackend:
    """torch's fused attention on CPU and CUDA. Autograd and torch.compile see through it."""

    name = "sdpa"
    composed_of_torch_ops = True

    def unsupported_reasons(self, config: AttentionConfig) -> Sequence[Reason]:
        return [*_device_reasons(config), *_visibility_reasons(config), *_feature_reasons(config)]

    def required_kv_layout(self, config: AttentionConfig) -> KvCacheLayout:
        return config.kv_layout

    def forward(self, config: AttentionConfig, inputs: AttentionInputs) -> tuple[Tensor, Tensor | None]:
        q, k, v = (tensor.transpose(1, 2) for tensor in inputs[:3])
        added, hidden_rows = _without_hidden_rows(inputs)
        out = _attend(config, q, k, v, added, trusting=config.device == "cuda" and not is_traced(inputs))
        if hidden_rows is not None:
            out = out.masked_fill(hidden_rows, 0.0)
        return out.transpose(1, 2).contiguous(), None

    def shortcut(self, config: AttentionConfig, layout: str) -> Shortcut | None:
        if config.mask_shape is not None or config.bias_shape is not None:
            return None
        trusting = config.device == "cuda"
        if layout == "bhsd":
            return lambda q, k, v: compact(_attend(config, q, k, v, None, trusting))
        return lambda q, k, v: (
            _attend(config, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, trusting)
            .transpose(1, 2).contiguous()
        )  # fmt: skip

    def backward(
        self,
        config: AttentionConfig,
        inputs: AttentionInputs,
        out: Tensor,
        lse: Tensor | None,
        grad_out: Tensor,
        grad_lse: Tensor | None,
    ) -> Gradients:
        return gradients_by_autograd(self.forward, config, inputs, grad_out, grad_lse)


def _attend(config: AttentionConfig, q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, trusting: bool) -> Tensor:
    """SDPA, (B, H, S, D) to (B, Hq, Sq, Dv), on what its kernel needs; ``trusting``: it checks no alignment."""
    if trusting:
        q, k, v = _aligned(q), _aligned(k), _aligned(v)
        if added is not None:
            added = _aligned(added.expand(*added.shape[:3], config.seqlen_k))[..., : config.seqlen_k]
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=added, is_causal=_is_causal(config), scale=config.softmax_scale,
        enable_gqa=bool(config.heads_q != config.heads_kv),
    )  # fmt: skip
    if out.shape[-1] != config.head_dim_v:
        out = out[..., : config.head_dim_v]
    if trusting and out.requires_grad:
        out.register_hook(lambda gradient: _aligned(gradient)[..., : config.head_dim_v])  # type: ignore[no-untyped-call]
    return out


def _aligned(tensor: Tensor) -> Tensor:
    """A tensor that torch's CUDA kernels may trust: rows of whole words, at addresses that are multiples of one.

    Itself, or a differentiable copy with its last dimension padded with zeros.
    """
    columns, size = tensor.shape[-1], tensor.element_size()
    if tensor.data_ptr() % _WORD == 0 and _in_words(columns, tensor.stride(), size):
        return tensor
    if columns % _step(size):
        return F.pad(tensor, (0, -columns % _step(size))).contiguous()
    return tensor.clone(memory_format=torch.contiguous_format)


@functools.lru_cache(maxsize=1024)
def _in_words(columns: int, strides: tuple[int, ...], size: int) -> bool:
    *outer, last = strides
    return last == 1 and columns % _step(size) == 0 and not any(stride * size % _WORD for stride in outer)


def _step(size: int) -> int:
    """Columns come in so many: the efficient kernel counts a mask's rows in 8 elements."""
    return max(8, _WORD // size)


def _is_causal(config: AttentionConfig) -> bool:
    """Whether causality hides anything: a single query is the last one and sees every key."""
    return config.causal and bool(config.seqlen_q != 1)  # a symbol while torch.compile traces


def _without_hidden_rows(inputs: AttentionInputs) -> tuple[Tensor | None, Tensor | None]:
    """The mask or bias with rows that hide every key opened, and which rows those are, as (.., Sq or 1, 1).

    torch gives such rows NaN or 0 depending on the kernel it picks, and some kernels NaN gradients. Attending to
    something and zeroing the output afterwards gives 0 and zero gradients on all of them.
    """
    if inputs.mask is not None:
        hidden = ~inputs.mask.any(-1, keepdim=True)
        return inputs.mask | hidden, hidden
    if inputs.bias is not None:
        hidden = inputs.bias.detach().amax(-1, keepdim=True) == float("-inf")
        return inputs.bias.masked_fill(hidden, 0.0), hidden
    return None, None


def _device_reasons(config: AttentionConfig) -> list[Reason]:
    reasons = []
    if config.device not in ("cpu", "cuda"):
        reasons.append(Reason("device", config.device, "cpu or cuda"))
    if config.softmax_scale <= 0 and (config.device == "cuda" or _is_causal(config)):
        reasons.append(Reason("scale", f"softmax_scale={config.softmax_scale}", "a positive scale",
                              "torch masks before it scales: -inf * 0 is NaN"))  # fmt: skip
    if config.transformed:
        reasons.append(Reason("transform", "torch.func.grad, jvp or a forward-mode tangent", "autograd's backward",
                              "torch's kernels have no second or forward derivative"))  # fmt: skip
    if config.deterministic and config.requires_grad:
        reasons.append(Reason("deterministic", "deterministic=True with a gradient", "deterministic=False",
                              "torch does not promise repeatable gradients"))  # fmt: skip
    return reasons


def _visibility_reasons(config: AttentionConfig) -> list[Reason]:
    """What may hide keys: is_causal (aligned top-left), or one mask, or one bias."""
    reasons = []
    if _is_causal(config):
        if config.seqlen_q != config.seqlen_k:
            reasons.append(
                Reason("causal", f"causal with Sq={config.seqlen_q} Sk={config.seqlen_k}", "Sq = Sk or Sq = 1",
                       "its is_causal is aligned top-left; pass a mask instead")
            )  # fmt: skip
        for name, shape in (("mask", config.mask_shape), ("bias", config.bias_shape)):
            if shape is not None:
                reasons.append(
                    Reason(name, f"a {name} together with causal", f"causal or a {name}", f"make {name} causal")
                )
    if config.window is not None:
        reasons.append(Reason("window", f"window={config.window}", "no window", "pass a mask instead"))
    if config.mask_shape is not None and config.bias_shape is not None:
        reasons.append(
            Reason("mask", "a mask together with a bias", "one of the two", "put -inf into the bias where masked")
        )
    if config.bias_dtype is not None and config.bias_dtype != config.dtype:
        reasons.append(Reason("bias", str(config.bias_dtype), f"the dtype of q, {config.dtype}"))
    return reasons


def _feature_reasons(config: AttentionConfig) -> list[Reason]:
    return [
        Reason(code, observed, required, hint)
        for used, code, observed, required, hint in (
            (config.softcap > 0, "softcap", f"softcap={config.softcap}", "no softcap", ""),
            (config.alibi, "alibi", "ALiBi slopes", "no slopes", "pass them as a bias"),
            (config.sinks, "sinks", "attention sinks", "no sinks", ""),
            (config.dropout_p > 0, "dropout", f"dropout_p={config.dropout_p}", "dropout_p=0",
             "its mask is not the Philox mask of the other backends"),
            (config.varlen, "varlen", "packed sequences", "padded (B, S, H, D)", ""),
            (config.kv_lens, "kv_lens", "key lengths", "no kv_lens", "pass a mask instead"),
            (config.page_size is not None, "paged", "a paged KV cache", "contiguous keys and values", ""),
            (config.return_lse, "lse", "return_lse=True", "return_lse=False", "torch returns no log-sum-exp"),
        )
        if used
    ]  # fmt: skip
