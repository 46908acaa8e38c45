"""One check of one backend on one case, through the public calls with the backend chosen by name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from regard.errors import Reason, UnsupportedError
from regard.registry import registry
from regard.testing.calls import Call, make_inputs
from regard.testing.cases import Case
from regard.testing.tolerance import GRADIENT_FACTOR, Comparison, assert_close, plain_attention


@dataclass(frozen=True)
class Result:
    """What a check found.

    Attributes:
        backend, case, dtype, check: which one; check is ``"forward"``, ``"backward"`` or ``"repeatable"``.
        status: ``"passed"``, ``"refused"`` (the backend gave reasons and the call raised them) or ``"failed"``.
        comparisons: one for each tensor compared.
        reasons: of a refusal.
        message: of a failure.
    """

    backend: str
    case: str
    dtype: str
    check: str
    status: str = "passed"
    comparisons: tuple[Comparison, ...] = ()
    reasons: tuple[Reason, ...] = ()
    message: str = ""

    @property
    def ratio(self) -> float:
        """The largest ratio of the tensors compared."""
        return max((comparison.ratio for comparison in self.comparisons), default=0.0)

    def __str__(self) -> str:
        detail = "; ".join(map(str, self.reasons)) or self.message or "; ".join(map(str, self.comparisons))
        return f"{self.backend} {self.case} {self.dtype} {self.check}: {self.status}: {detail}"


def check_forward(backend: str, case: Case, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Result:
    """Run a case forward on a backend and hold out and lse against the rule.

    Where only ``return_lse`` is refused, the call is checked without it.

    Raises:
        AssertionError: a wrong result, or reasons that the call did not raise.
    """
    call = make_inputs(case, device, dtype)
    result = Result(backend, case.name, _name(dtype), "forward")
    reasons = _refusal(backend, call, return_lse=True)
    return_lse = not reasons
    if reasons and (reasons := _refusal(backend, call)):
        return replace(result, status="refused", reasons=reasons)
    actual = call(backend, return_lse=return_lse)
    actual = actual if return_lse else (actual,)
    truth, plain = call.in_float64()("reference", return_lse=True), plain_attention(call)
    assert actual[0].dtype == dtype, f"out: dtype {actual[0].dtype}, q has {dtype}"
    out = actual[0]
    dense = out.is_contiguous() or (case.layout == "bhsd" and out.transpose(1, 2).is_contiguous())
    assert dense, f"out: strides {out.stride()} of shape {tuple(out.shape)}, not contiguous in either layout"
    compared = zip(("out", "lse"), actual, truth, plain, strict=False)
    return replace(result, comparisons=tuple(assert_close(a, t, p, name=name) for name, a, t, p in compared))


def check_backward(
    backend: str, case: Case, device: str = "cpu", dtype: torch.dtype = torch.float32, deterministic: bool = False
) -> Result:
    """Run a case forward and backward on a backend and hold every gradient against the rule.

    The loss takes in lse, except where a backend refuses only that.

    Raises:
        AssertionError: a wrong gradient, or reasons that the call did not raise.
    """
    call = make_inputs(case, device, dtype).with_leaves()
    result = Result(backend, case.name, _name(dtype), "backward")
    reasons = _refusal(backend, call, return_lse=True, deterministic=deterministic)
    return_lse = not reasons
    if reasons and (reasons := _refusal(backend, call, deterministic=deterministic)):
        return replace(result, status="refused", reasons=reasons)
    arguments = _arguments(call, deterministic=deterministic, return_lse=return_lse)
    outputs = call(backend, **arguments)
    assert (outputs[0] if return_lse else outputs).requires_grad, "out does not require a gradient, though q does"
    actual = _gradients(call, outputs, dtype)
    truth_call = call.in_float64().with_leaves()
    truth = _gradients(truth_call, truth_call("reference", return_lse=return_lse), dtype)
    plain = plain_attention(call)
    baseline = _gradients(call, plain if return_lse else plain[0], dtype)
    comparisons = []
    for name, gradient in actual.items():
        assert gradient.dtype == call.tensors[name].dtype, f"d{name}: dtype {gradient.dtype}"
        comparisons.append(assert_close(gradient, truth[name], baseline[name], name=f"d{name}", factor=GRADIENT_FACTOR))
    return replace(result, comparisons=tuple(comparisons))


def check_repeatable(
    backend: str, case: Case, device: str = "cpu", dtype: torch.dtype = torch.float32, runs: int = 3
) -> Result:
    """Assert that the forward, and the backward with ``deterministic=True``, give the same bits every time.

    Raises:
        AssertionError: two runs differ.
    """
    call = make_inputs(case, device, dtype)
    result = Result(backend, case.name, _name(dtype), "repeatable")
    if reasons := _refusal(backend, call):
        return replace(result, status="refused", reasons=reasons)
    first = call(backend)
    for run in range(1, runs):
        assert torch.equal(call(backend), first), f"out of run {run} differs from the first"
    call = call.with_leaves()
    if not _refusal(backend, call, deterministic=True):
        arguments = _arguments(call, deterministic=True)
        gradients = _gradients(call, call(backend, **arguments), dtype)
        for run in range(1, runs):
            for name, gradient in _gradients(call, call(backend, **arguments), dtype).items():
                assert torch.equal(gradient, gradients[name]), f"d{name} of run {run} differs from the first"
    return result


def _refusal(backend: str, call: Call, **arguments: Any) -> tuple[Reason, ...]:
    """The backend's reasons against a call, after asserting that the call raises exactly these."""
    arguments = _arguments(call, **arguments)
    reasons = registry.reasons(backend, call.config(**arguments))
    if reasons:
        try:
            call(backend, **arguments)
        except UnsupportedError as error:
            assert error.reasons == {backend: reasons}, f"raised {error.reasons}, explained {reasons}"
        else:
            raise AssertionError(
                f"{backend} has reasons against the call and served it: {'; '.join(map(str, reasons))}"
            )
    return reasons


def _arguments(call: Call, **arguments: Any) -> dict[str, Any]:
    """The arguments without those at their default, since `regard.paged_attention` has no ``deterministic``."""
    return {name: value for name, value in arguments.items() if value}


def _gradients(call: Call, results: Tensor | tuple[Tensor, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """Gradients of the call's leaves under a fixed random gradient of each result, of values exact in ``dtype``."""
    outputs = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator("cpu").manual_seed(call.seed + 1)
    seeds = [torch.randn(t.shape, generator=generator, device="cpu").to(dtype).to(t) for t in outputs]
    leaves = call.leaves()
    kept = [i for i, t in enumerate(outputs) if t.requires_grad]
    if not kept:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(
        [outputs[i] for i in kept], list(leaves.values()), [seeds[i] for i in kept], allow_unused=True
    )
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
