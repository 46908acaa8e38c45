"""Every registered backend of ours on every case. A refusal is asserted first and then shown as a skip with its reasons."""

import pytest
import torch

import regard
from regard.backends.external import ADAPTERS
from regard.testing import CASES, REPEATED_CASES, check_backward, check_forward, check_repeatable

# A peer's own numbers, not ours to mend: strict, so that a torch that mends it is noticed.
KNOWN = {
    "sdpa-large_logits-float32": "torch's fused CPU backward loses twice the allowed precision in dv at scores near 200"
}
BACKENDS = [name for name in regard.list_backends() if name not in {adapter.name for adapter in ADAPTERS}]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parameters(cases):
    """backend, case and dtype of every case; float64 too on the backend that is the specification."""
    return [
        pytest.param(backend, case, dtype, id=f"{backend}-{case.name}-{str(dtype).removeprefix('torch.')}")
        for backend in BACKENDS
        for case in cases
        for dtype in ((*case.dtypes, torch.float64) if backend == "reference" else case.dtypes)
    ]


def passed_or_refused(result, record_property):
    record_property("ratio", round(result.ratio, 3))
    print(result)
    if result.status == "refused":
        pytest.skip("; ".join(map(str, result.reasons)))


@pytest.mark.parametrize("backend, case, dtype", parameters(CASES))
def test_forward(backend, case, dtype, record_property):
    passed_or_refused(check_forward(backend, case, DEVICE, dtype), record_property)


# Triton's interpreter takes seconds for a gradient: there each of these runs in one dtype, the other cases on a GPU.
INTERPRETED = {
    torch.float32: "one_query no_keys_but_sinks head_dim_111 strides_head_dim_every_other causal_bottom_right bias_b11k "
    "scale_negative large_logits sinks_fully_masked_rows dropout_varlen softcap mask_b11k_empty_rows",
    torch.float16: "odd_lengths more_queries_than_keys gqa_7_to_1 head_dim_v_smaller head_dim_256 "
    "causal_fully_masked_rows window_left window_both mask_window_gqa bias_float32 bias_1hqk bias_bhqk_minus_inf "
    "bias_1h11 alibi_bh_causal scale_zero_causal kv_lens_mask_bias varlen_causal_gqa paged_decode everything",
    torch.bfloat16: "one_key several_tiles_causal head_dim_v_larger strides_expanded window_right mask_bhq1 bias_11q1 "
    "sinks_window_causal dropout_causal_gqa varlen varlen_alibi_softcap_sinks kv_lens kv_lens_causal "
    "everything_but_dropout",
}


def in_budget(backend, case, dtype):
    return backend != "flash" or DEVICE == "cuda" or case.name in INTERPRETED[dtype].split()


@pytest.mark.parametrize(
    "backend, case, dtype",
    [p for p in parameters([case for case in CASES if case.gradients]) if in_budget(*p.values)],
)
def test_backward(backend, case, dtype, record_property, request):
    known = KNOWN.get(request.node.callspec.id)
    if known is not None and DEVICE == "cpu":
        request.applymarker(pytest.mark.xfail(reason=known, raises=AssertionError, strict=True))
    passed_or_refused(check_backward(backend, case, DEVICE, dtype), record_property)


# The interpreter runs programs in order, and flash computes deterministic gradients always: nothing to see.
REPEATED = [p for p in parameters(REPEATED_CASES) if p.values[0] != "flash" or DEVICE == "cuda"]


@pytest.mark.parametrize("backend, case, dtype", REPEATED)
def test_repeatable(backend, case, dtype, record_property):
    passed_or_refused(check_repeatable(backend, case, DEVICE, dtype, runs=2), record_property)


@pytest.mark.parametrize("backend, case, dtype", REPEATED)
def test_deterministic_backward(backend, case, dtype, record_property):
    passed_or_refused(check_backward(backend, case, DEVICE, dtype, deterministic=True), record_property)
