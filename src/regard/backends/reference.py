"""The specification: softmax attention written as the formulas read, in plain torch.

Every other backend must match this one. It materialises the (Sq, Sk) scores, so its memory is quadratic in the length.
Computes in float32, or in float64 where q is float64 (then lse is float64 too, so that gradcheck can run).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from regard.config import DIFFERENTIABLE_INPUTS, AttentionConfig, AttentionInputs, KvCacheLayout
from regard.errors import Reason
from regard.registry import Gradients


class ReferenceBackend:
    """Materialising attention on any device; supports every semantic of the design."""

    name = "reference"
    composed_of_torch_ops = True

    def unsupported_reasons(self, config: AttentionConfig) -> Sequence[Reason]:
        return ()

    def required_kv_layout(self, config: AttentionConfig) -> KvCacheLayout:
        return config.kv_layout

    def forward(self, config: AttentionConfig, inputs: AttentionInputs) -> tuple[Tensor, Tensor | None]:
        if config.varlen:
            return _attend_packed(config, inputs)
        return _attend(config, gather_pages(inputs))

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


def _attend(config: AttentionConfig, inputs: AttentionInputs, first_sequence: int = 0) -> tuple[Tensor, Tensor]:
    """Attention of a padded batch. ``first_sequence`` numbers its first row in the dropout counter."""
    q, k, v = inputs.q, inputs.k, inputs.v
    batch, seqlen_q, heads_q, _ = q.shape
    seqlen_k, heads_kv = k.shape[1], k.shape[2]
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v = q.to(compute), k.to(compute), v.to(compute)

    key = torch.arange(seqlen_k, device=q.device)
    key_length = torch.full((batch,), seqlen_k, device=q.device)
    if inputs.kv_lens is not None:
        key_length = inputs.kv_lens.long().clamp(0, seqlen_k)
        padding = (key >= key_length[:, None])[:, :, None, None]
        k, v = k.masked_fill(padding, 0), v.masked_fill(padding, 0)  # padded keys are never read, NaN or not
    k = k.repeat_interleave(heads_q // heads_kv, dim=2)
    v = v.repeat_interleave(heads_q // heads_kv, dim=2)

    # (B, 1, Sq, Sk): how far key j lies to the right of query i's own position
    own_key = torch.arange(seqlen_q, device=q.device) + (key_length[:, None] - seqlen_q)
    distance = (key - own_key[:, :, None])[:, None]

    scores = torch.einsum("bihd,bjhd->bhij", q, k) * config.softmax_scale
    if config.softcap > 0:
        scores = config.softcap * torch.tanh(scores / config.softcap)
    if inputs.bias is not None:
        scores = scores + inputs.bias.to(compute)
    if inputs.alibi_slopes is not None:
        slopes = inputs.alibi_slopes.to(compute).expand(batch, heads_q)[:, :, None, None]
        scores = scores - slopes * distance.abs()

    visible = (key < key_length[:, None])[:, None, None, :]
    left, right = config.band
    if left is not None:
        visible = visible & (distance >= -left)
    if right is not None:
        visible = visible & (distance <= right)
    if inputs.mask is not None:
        visible = visible & inputs.mask
    scores = scores.masked_fill(~visible, float("-inf"))

    # The sink joins the denominator as one more key without a value; without sinks it weighs exp(-inf) = 0.
    sink = scores.new_full((heads_q,), float("-inf")) if inputs.sinks is None else inputs.sinks.to(compute)
    logits = torch.cat([scores, sink[:, None, None].expand(batch, heads_q, seqlen_q, 1)], dim=-1)
    highest = logits.detach().amax(-1, keepdim=True)
    highest = torch.where(highest == float("-inf"), 0.0, highest)
    exponentials = torch.exp(logits - highest)
    denominator = exponentials.sum(-1, keepdim=True)
    nothing_visible = denominator == 0
    denominator = torch.where(nothing_visible, 1.0, denominator)
    weights = exponentials[..., :-1] / denominator
    lse = torch.where(nothing_visible, float("-inf"), highest + torch.log(denominator)).squeeze(-1)

    if inputs.dropout_seed is not None:
        sequences = torch.arange(first_sequence, first_sequence + batch, device=q.device)
        heads = sequences[:, None] * heads_q + torch.arange(heads_q, device=q.device)
        queries = torch.arange(seqlen_q, device=q.device)
        keep = dropout_keep(inputs.dropout_seed, heads[:, :, None, None], queries[:, None], key, config.dropout_p)
        weights = torch.where(keep, weights / (1 - config.dropout_p), 0.0)
    out = torch.einsum("bhij,bjhd->bihd", weights, v)
    return out.to(inputs.q.dtype).contiguous(), lse


def _attend_packed(config: AttentionConfig, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Attention of packed sequences: each on its own, as a batch of one."""
    assert inputs.cu_seqlens_q is not None and inputs.cu_seqlens_k is not None
    starts_q, starts_k = inputs.cu_seqlens_q.tolist(), inputs.cu_seqlens_k.tolist()
    outs, lses = [], []
    for sequence in range(len(starts_q) - 1):
        rows = slice(starts_q[sequence], starts_q[sequence + 1])
        keys = slice(starts_k[sequence], starts_k[sequence + 1])
        slopes = inputs.alibi_slopes
        if slopes is not None and slopes.ndim == 2:
            slopes = slopes[sequence]
        alone = inputs._replace(
            q=inputs.q[None, rows],
            k=inputs.k[None, keys],
            v=inputs.v[None, keys],
            alibi_slopes=slopes,
            cu_seqlens_q=None,
            cu_seqlens_k=None,
        )
        out, lse = _attend(config, alone, first_sequence=sequence)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs, dim=0), torch.cat(lses, dim=1)


def gather_pages(inputs: AttentionInputs) -> AttentionInputs:
    """Copy a paged cache into contiguous (B, Sk, Hk, D) keys and values; other inputs pass through."""
    if inputs.block_table is None:
        return inputs
    pages = inputs.block_table.long().clamp(0, inputs.k.shape[0] - 1)
    k, v = (cache[pages].flatten(1, 2) for cache in (inputs.k, inputs.v))
    return inputs._replace(k=k, v=v, block_table=None)


@contextlib.contextmanager
def _autograd_visible() -> Iterator[None]:
    """Let autograd record inside a custom op, whose body runs with autograd's dispatch key excluded."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    if not excluded.has(torch._C.DispatchKey.AutogradFunctionality):
        yield
        return
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
        yield


def gradients_by_autograd(
    forward: Callable[[AttentionConfig, AttentionInputs], tuple[Tensor, Tensor | None]],
    config: AttentionConfig,
    inputs: AttentionInputs,
    grad_out: Tensor,
    grad_lse: Tensor | None,
) -> Gradients:
    """Differentiate a forward made of torch ops by running it again under autograd."""
    leaves = {
        name: tensor.detach().requires_grad_()
        for name in DIFFERENTIABLE_INPUTS
        if (tensor := getattr(inputs, name)) is not None
    }
    with _autograd_visible(), torch.enable_grad():
        out, lse = forward(config, inputs._replace(**leaves))
    outputs, seeds = [out], [grad_out]
    if grad_lse is not None and lse is not None:
        outputs.append(lse)
        seeds.append(grad_lse.to(lse.dtype))
    found = torch.autograd.grad(outputs, list(leaves.values()), seeds, allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), found, strict=True)
    }


# Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3).
_PHILOX_ROUNDS = 10
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def dropout_keep(seed: Tensor, head: Tensor, query: Tensor, key: Tensor, dropout_p: float) -> Tensor:
    """Which attention weights survive dropout: one Philox word for each (head, query, key).

    The word of key j is output ``j % 4`` of the counter ``(j // 4, query, head, 0)`` under the 64-bit key ``seed``, so
    that the mask depends on position only: every backend, tile size and pass draws the same one.

    Args:
        seed: int64 (1,).
        head: ``sequence * Hq + head``, int64; with query and key it broadcasts to the shape wanted.
        query, key: positions in their sequence, int64.
        dropout_p: probability of a False.

    Returns:
        bool, True = keep.
    """
    quad = torch.div(key, 4, rounding_mode="floor")
    words = _philox(seed, quad, query, head)
    lane = key % 4
    word = torch.where(lane == 0, words[0], words[1])
    word = torch.where(lane == 2, words[2], word)
    word = torch.where(lane == 3, words[3], word)
    return word >= dropout_threshold(dropout_p)


def dropout_threshold(dropout_p: float) -> int:
    """The smallest 32-bit word that is kept."""
    return min(round(dropout_p * 2**32), _WORD)


def _philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four output words of counter (c0, c1, c2, 0), as int64 in 0..2**32-1."""
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    c0, c1, c2 = torch.broadcast_tensors(c0, c1, c2)  # type: ignore[no-untyped-call]
    c3 = torch.zeros_like(c0)
    for _ in range(_PHILOX_ROUNDS):
        high_a, low_a = _wide_product(_PHILOX_MULTIPLIERS[0], c0)
        high_b, low_b = _wide_product(_PHILOX_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + _PHILOX_KEY_STEPS[0]) & _WORD, (k1 + _PHILOX_KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def _wide_product(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product, by 16-bit halves so that int64 does not overflow."""
    low = constant * (word & 0xFFFF)
    middle = constant * (word >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def compact(out: Tensor) -> Tensor:
    """Out (B, Hq, Sq, Dv) in contiguous memory, of this layout or of (B, Sq, Hq, Dv)."""
    return out if out.is_contiguous() else out.transpose(1, 2).contiguous().transpose(1, 2)
