"""The one rule that says whether a result is right, and the plain torch attention it is measured against.

With ``reference`` computed in float64 and ``baseline`` by `plain_attention` in the backend's own dtype,

    max|out - reference| <= 2 * max|baseline - reference| + floor        (3 * for gradients)

A backend may be at most twice as far from the truth as plain torch is in the same dtype; `floor` is the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.backends.reference import dropout_keep
from regard.config import AttentionConfig
from regard.testing.calls import Call

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0


def plain_attention(call: Call) -> tuple[Tensor, Tensor]:
    """The baseline: attention as one writes it in torch in the dtype of the call's tensors, a sequence at a time.

    Operands of every matrix product, in the forward and in the backward, are rounded to the dtype (so the
    probabilities and the gradient of the scores are); products accumulate and return float32, as matrix units do, and
    the softmax between them is float32. This is the least error a backend can have that feeds matrix units of this
    dtype. Scores themselves are not rounded, although eager code commonly does: that would only loosen the rule.

    Returns:
        out and lse in the shapes of the public call, differentiable.
    """
    config, tensors = call.config(), call.tensors
    transposed = call.options.get("layout") == "bhsd"
    q, k, v = (tensors[name].transpose(1, 2) if transposed else tensors[name] for name in "qkv")
    seed = call.dropout_seed(config)
    outs, lses = [], []
    for sequence in range(config.batch):
        if config.varlen:
            first, last = tensors["cu_seqlens_q"].tolist()[sequence : sequence + 2]
            rows = q[first:last]
            first, last = tensors["cu_seqlens_k"].tolist()[sequence : sequence + 2]
            keys, values = k[first:last], v[first:last]
        else:
            rows, keys, values = q[sequence], k, v
            length = int(tensors["kv_lens"][sequence]) if config.kv_lens else config.seqlen_k
            if config.page_size is not None:
                pages = tensors["block_table"][sequence, : math.ceil(length / config.page_size)].long()
                keys, values = (cache[pages].flatten(0, 1)[:length] for cache in (k, v))
            else:
                keys, values = k[sequence, :length], v[sequence, :length]
        out, lse = _plain_sequence(config, tensors, sequence, rows, keys, values, seed)
        outs.append(out)
        lses.append(lse)
    if not outs:
        shape = (*q.shape[:-1], v.shape[-1])
        lse_shape = (q.shape[-2], q.shape[0]) if config.varlen else (0, q.shape[-2], q.shape[1])
        return q.new_zeros(shape), q.new_zeros(lse_shape, dtype=_accumulator(q.dtype))
    if config.varlen:
        return torch.cat(outs), torch.cat(lses, dim=1)
    out = torch.stack(outs)
    return out.transpose(1, 2) if transposed else out, torch.stack(lses)


def _plain_sequence(
    config: AttentionConfig,
    tensors: dict[str, Tensor],
    sequence: int,
    q: Tensor,  # (Sq, Hq, D)
    k: Tensor,  # (Sk, Hk, D), the sequence's own length
    v: Tensor,  # (Sk, Hk, Dv)
    dropout_seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dtype, accumulator = q.dtype, _accumulator(q.dtype)
    group = config.heads_q // config.heads_kv
    q, k, v = (t.transpose(0, 1).to(accumulator) for t in (q, k, v))
    k, v = k.repeat_interleave(group, dim=0), v.repeat_interleave(group, dim=0)
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]

    product = q @ k.transpose(1, 2)
    if product.requires_grad:
        product.register_hook(lambda gradient: gradient.to(dtype).to(accumulator))  # type: ignore[no-untyped-call]
    assert config.softmax_scale is not None
    scores = product * config.softmax_scale
    if config.softcap:
        scores = config.softcap * torch.tanh(scores / config.softcap)

    def own(name: str) -> Tensor:
        """The sequence's part of a mask or bias, as (Hq, Sq, Sk)."""
        tensor = tensors[name]
        full = (config.batch, config.heads_q, config.seqlen_q, config.seqlen_k)
        return tensor.expand(full)[sequence, :, :, :seqlen_k]

    query = torch.arange(seqlen_q, device=q.device)[:, None]
    key = torch.arange(seqlen_k, device=q.device)
    distance = key - (query + seqlen_k - seqlen_q)
    if "bias" in tensors:
        scores = scores + own("bias")
    if "alibi_slopes" in tensors:
        slopes = tensors["alibi_slopes"].to(accumulator).expand(config.batch, config.heads_q)[sequence]
        scores = scores - slopes[:, None, None] * distance.abs()

    visible = own("mask") if "mask" in tensors else torch.ones_like(distance, dtype=torch.bool)
    left, right = config.window or (None, None)
    if left is not None:
        visible = visible & (distance >= -left)
    if right is not None:
        visible = visible & (distance <= right)
    if config.causal:
        visible = visible & (distance <= 0)
    scores = scores.masked_fill(~visible, float("-inf"))
    if "sinks" in tensors:
        sinks = tensors["sinks"].to(accumulator)[:, None, None].expand(-1, seqlen_q, 1)
        scores = torch.cat([scores, sinks], dim=-1)
    nothing_visible = (scores == float("-inf")).all(-1)
    scores = scores.masked_fill(nothing_visible[..., None], 0.0)
    lse = torch.logsumexp(scores, dim=-1).masked_fill(nothing_visible, float("-inf"))
    weights = torch.softmax(scores, dim=-1).masked_fill(nothing_visible[..., None], 0.0)[..., :seqlen_k]
    if dropout_seed is not None:
        heads = sequence * config.heads_q + torch.arange(config.heads_q, device=q.device)
        keep = dropout_keep(dropout_seed, heads[:, None, None], query, key, config.dropout_p)
        weights = weights * keep / (1 - config.dropout_p)
    out = weights.to(dtype).to(accumulator) @ v
    return out.to(dtype).transpose(0, 1), lse


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Comparison:
    """How one tensor fared under the rule.

    Attributes:
        name: of the tensor.
        error, baseline_error: largest distances from the reference, of the tensor and of the baseline.
        bound: what the error may be at most.
    """

    name: str
    error: float
    baseline_error: float
    bound: float

    @property
    def ratio(self) -> float:
        """The error in units of the bound; more than 1 fails."""
        return self.error / self.bound

    def __str__(self) -> str:
        return (
            f"{self.name}: error {self.error:.3g}, torch's own {self.baseline_error:.3g}, bound {self.bound:.3g}, "
            f"ratio {self.ratio:.2f}"
        )


def floor(dtype: torch.dtype, peak: float) -> float:
    """The error allowed where the baseline happens to have none, for values of magnitude up to ``peak``.

    One unit in the last place of the dtype at the peak (the result's own rounding, and that of the row sum or of the
    output that the backward reads), and 16 of the accumulator's, at no less than the inputs' magnitude of 1: sums of
    up to 256 products in any order and an exponential good to 2 units.
    """
    accumulator = torch.finfo(_accumulator(dtype)).eps
    return torch.finfo(dtype).eps * peak + 16 * accumulator * max(1.0, peak)


def assert_close(
    actual: Tensor, reference: Tensor, baseline: Tensor, *, name: str = "out", factor: float = FORWARD_FACTOR
) -> Comparison:
    """Apply the rule to one tensor.

    Args:
        actual: what the backend returned.
        reference: the truth, float64, same shape.
        baseline: `plain_attention`'s result, same shape.
        name: of the tensor, for the message.
        factor: how many times the baseline's error is allowed.

    Raises:
        AssertionError: naming the worst coordinate, both values, the bound and the ratio. NaN and infinities must
            stand exactly where the reference has them.
    """
    if actual.shape != reference.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)}, reference has {tuple(reference.shape)}")
    found, truth, plain = (t.detach().double().cpu() for t in (actual, reference, baseline))
    misplaced = (found.isnan() != truth.isnan()) | ((found != truth) & (found.isinf() | truth.isinf()))
    if misplaced.any():
        where = tuple(misplaced.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int(misplaced.sum())} of {found.numel()} elements are not finite where the reference is, or the "
            f"reverse; first at {where}: {found[where].item()}, reference {truth[where].item()}"
        )
    finite = truth.isfinite()
    distance = torch.where(finite, (found - truth).abs(), 0.0)
    baseline_error = _peak(torch.where(finite & plain.isfinite(), plain - truth, 0.0))
    bound = factor * baseline_error + floor(actual.dtype, _peak(torch.where(finite, truth, 0.0)))
    comparison = Comparison(name, _peak(distance), baseline_error, bound)
    if comparison.error > bound:
        worst = tuple(int(i) for i in torch.unravel_index(distance.argmax(), distance.shape))
        raise AssertionError(
            f"{comparison}; {int((distance > bound).sum())} of {found.numel()} elements beyond it, worst at {worst}: "
            f"{found[worst].item()}, reference {truth[worst].item()}"
        )
    return comparison


def _peak(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0
