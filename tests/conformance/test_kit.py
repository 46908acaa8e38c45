"""The kit itself: each defect that backends are known for must fail a case, and the rule must say where."""

import dataclasses
import itertools
import json
import sys

import pytest
import torch

import regard
from regard import Reason
from regard.backends.reference import ReferenceBackend
from regard.registry import registry as package_registry
from regard.testing import (
    CASES,
    assert_close,
    check_backward,
    check_forward,
    check_repeatable,
    make_inputs,
    plain_attention,
    run_conformance,
)
from regard.testing.__main__ import main
from regard.testing.checks import _gradients

BY_NAME = {case.name: case for case in CASES}


class Defective(ReferenceBackend):
    """The reference with its inputs, or its results, changed."""

    name = "defective"

    def __init__(self, change=None, spoil=None, reasons=(), layout=None):
        self.change, self.spoil, self.reasons = change, spoil, reasons

    def unsupported_reasons(self, config):
        return self.reasons

    def forward(self, config, inputs):
        if self.change is not None:
            config, inputs = self.change(config, inputs)
        out, lse = super().forward(config, inputs)
        return (out, lse) if self.spoil is None else self.spoil(out, lse)


@pytest.fixture
def defective():
    def make(**defects):
        regard.register(Defective(**defects), priority=-1)

    yield make
    regard.unregister("defective")


def configured(**changes):
    return lambda config, inputs: (dataclasses.replace(config, **changes), inputs)


def given(**changes):
    return lambda config, inputs: (config, inputs._replace(**changes))


def top_left_causal(config, inputs):
    lower = torch.ones(config.seqlen_q, config.seqlen_k, dtype=torch.bool).tril()
    return dataclasses.replace(config, causal=False), inputs._replace(mask=lower[None, None])


def padding_read(config, inputs):
    return config, inputs._replace(k=inputs.k.nan_to_num(0.0), v=inputs.v.nan_to_num(0.0), kv_lens=None)


def scale_as_contiguous(config, inputs):
    def misread(t):
        return torch.as_strided(t, t.shape, t.contiguous().stride())

    return config, inputs._replace(q=misread(inputs.q))


DEFECTS = {
    "scale ignored": ("scale_negative", configured(softmax_scale=32**-0.5)),
    "scale of zero taken for the default": ("scale_zero", configured(softmax_scale=32**-0.5)),
    "causal ignored": ("causal_square", configured(causal=False)),
    "causal top-left": ("causal_bottom_right", top_left_causal),
    "window left ignored": ("window_left", configured(window=None)),
    "window off by one": ("window_both", configured(window=(19, 4))),
    "window of zero taken for none": ("window_itself", configured(window=(0, None))),
    "window dropped with causal": ("window_causal", configured(window=None)),
    "softcap ignored": ("softcap", configured(softcap=0.0)),
    "mask ignored": ("mask_bhqk", given(mask=None)),
    "mask dropped with causal": ("mask_causal", given(mask=None)),
    "bias ignored": ("bias_11q1", lambda config, inputs: (config, inputs._replace(bias=inputs.bias * 0))),
    "alibi ignored": ("alibi_h", given(alibi_slopes=None)),
    "sinks ignored": ("sinks", given(sinks=None)),
    "dropout ignored": ("dropout", given(dropout_seed=None)),
    "another dropout mask": ("dropout", given(dropout_seed=torch.tensor([1]))),
    "padding read": ("kv_lens_mask_bias", padding_read),
    "strides ignored": ("strides_heads_outside", scale_as_contiguous),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_wrong_semantics_fail_forward_and_backward(defect, defective):
    case, change = DEFECTS[defect]
    defective(change=change)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(AssertionError, match="worst at|not finite"):
            check_forward("defective", BY_NAME[case], dtype=dtype)
        with pytest.raises(AssertionError, match="worst at|not finite"):
            check_backward("defective", BY_NAME[case], dtype=dtype)


@pytest.mark.parametrize(
    "case, spoil, message",
    [
        ("odd_lengths", lambda out, lse: (out, lse / 0.6931), "lse"),
        ("causal_fully_masked_rows", lambda out, lse: (out, lse.clamp(min=-1e30)), "lse: .* not finite"),
        ("causal_fully_masked_rows", lambda out, lse: (out.masked_fill(out == 0, float("nan")), lse), "out: .*nan"),
        ("nan_query", lambda out, lse: (out.nan_to_num(0.0), lse), "first at .* reference nan"),
        ("odd_lengths", lambda out, lse: (out.float(), lse), "dtype"),
        ("odd_lengths", lambda out, lse: (out[..., :-1], lse), "shape"),
        ("odd_lengths", lambda out, lse: (out * (1 + 2**-6), lse), "bound"),
    ],
)
def test_wrong_results_fail(case, spoil, message, defective):
    defective(spoil=spoil)
    with pytest.raises(AssertionError, match=message):
        check_forward("defective", BY_NAME[case], dtype=torch.bfloat16)


def test_tf32_products_fail_in_float32(defective):
    def rounded(t):
        return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    defective(change=lambda config, inputs: (config, inputs._replace(q=rounded(inputs.q), k=rounded(inputs.k))))
    with pytest.raises(AssertionError, match="bound"):
        check_forward("defective", BY_NAME["odd_lengths"], dtype=torch.float32)


def test_refusal_is_asserted_and_returned(defective):
    reason = Reason("softcap", "3.0", "0", "")
    defective(reasons=(reason,))
    for check in (check_forward, check_backward, check_repeatable):
        result = check("defective", BY_NAME["softcap"])
        assert (result.status, result.reasons) == ("refused", (reason,))


def test_a_call_served_in_spite_of_reasons_fails(defective, monkeypatch):
    defective(reasons=(Reason("softcap", "3.0", "0", ""),))
    monkeypatch.setattr(
        package_registry, "select", lambda config, backend=None: regard.Selection("defective", True, "careless")
    )
    with pytest.raises(AssertionError, match="has reasons against the call and served it"):
        check_forward("defective", BY_NAME["softcap"])


def test_unrepeatable_results_fail(defective):
    runs = itertools.count()
    defective(spoil=lambda out, lse: (out * (1 + 2**-20 * next(runs)), lse))
    with pytest.raises(AssertionError, match="out of run 1 differs"):
        check_repeatable("defective", BY_NAME["everything_but_dropout"])


def test_assert_close_names_the_worst_coordinate():
    truth = torch.zeros(2, 3, dtype=torch.float64)
    found = truth.float()
    found[1, 2] = 0.5
    with pytest.raises(
        AssertionError, match=r"thing: error 0.5, .* ratio .* 1 of 6 elements .* worst at \(1, 2\): 0.5"
    ):
        assert_close(found, truth, truth, name="thing")
    assert assert_close(truth.float(), truth, truth).ratio == 0


def test_report_counts_prints_and_survives_crashes(defective, tmp_path, monkeypatch, capsys):
    def crash(out, lse):
        raise RuntimeError("illegal memory access")

    defective(spoil=crash)
    cases = [BY_NAME["odd_lengths"], BY_NAME["everything"]]
    report = run_conformance("defective", dtypes=[torch.float32], cases=cases)
    assert [row["failed"] for row in report.summary()] == [2, 2, 1]
    assert "RuntimeError: illegal memory access" in str(report)
    json.dumps(report.to_json())

    path = tmp_path / "report.json"
    monkeypatch.setattr("sys.argv", f"x --backend reference --case softcap --check forward --json {path}".split())
    assert main() == 0
    assert json.loads(path.read_text())["summary"][0]["passed"] == 1
    assert "softcap" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", "x --backend defective --case softcap --check forward".split())
    assert main() == 1


@pytest.mark.parametrize("name", BY_NAME)
def test_the_baseline_is_the_reference_where_nothing_is_rounded(name):
    """Two independent writings of the semantics, in float64: what one gets wrong, the other shows."""
    call = make_inputs(BY_NAME[name]).in_float64().with_leaves()
    results = call("reference", return_lse=True), plain_attention(call)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12, equal_nan=True)
    if BY_NAME[name].gradients:
        gradients = [_gradients(call, result, torch.float64) for result in results]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-11)


def test_case_names_are_unique():
    assert len(BY_NAME) == len(CASES)


@pytest.mark.parametrize("device", ["tpu", "cuda:99"])
def test_a_device_that_is_not_there_is_said_in_a_sentence(device, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["testing", "--backend", "cpu", "--device", device])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and "error: argument --device: " in capsys.readouterr().err
