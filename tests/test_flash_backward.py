"""The flash backward where conformance cannot look: what it launches, allocates and leaves unwritten."""

import pytest
import torch

import regard
from regard import AttentionConfig, AttentionInputs
from regard.backends import flash, flash_launches
from regard.kernels import tuning
from regard.testing import CASES, Case, check_backward, check_repeatable

pytest.importorskip("triton")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
CASE = {case.name: case for case in CASES}


def inputs(batch=1, seqlen_q=40, seqlen_k=24, heads_q=2, heads_kv=1, head_dim=16, dtype=torch.float16, device=DEVICE):
    q = torch.randn(batch, seqlen_q, heads_q, head_dim, device=device, dtype=dtype)
    k, v = (torch.randn(batch, seqlen_k, heads_kv, head_dim, device=device, dtype=dtype) for _ in range(2))
    return [t.requires_grad_() for t in (q, k, v)]


@pytest.mark.parametrize("deterministic", [False, True])
def test_every_gradient_takes_the_two_repeatable_passes(monkeypatch, deterministic):
    launched = []
    run = flash.Launch.run
    monkeypatch.setattr(flash.Launch, "run", lambda self, device: (launched.append(self.kernel), run(self, device))[1])
    q, k, v = inputs()
    out = regard.attention(q, k, v, deterministic=deterministic, backend="flash")
    launched.clear()  # a forward that was launched before is repeated
    out.sum().backward()
    assert [kernel.__name__ for kernel in launched] == ["row_terms", "backward_keys", "backward_queries"]


TERMS_TOGETHER = [
    Case("cut", seqlen_q=71, seqlen_k=85, head_dim=64, heads_q=4),
    Case("causal", seqlen_q=130, seqlen_k=130, head_dim=64, causal=True),
    Case("rows without keys", seqlen_q=70, seqlen_k=33, head_dim=64, causal=True, sinks=True),
    Case("packed", lens_q=(9, 0, 70), lens_k=(67, 5, 12), head_dim=128, window=(30, 6), dropout_p=0.2),
    Case("masked", seqlen_q=71, seqlen_k=69, head_dim=128, mask="b1qk", kv_lens=(50, 7), softcap=4.0, alibi="h"),
]


@pytest.mark.skipif(
    ON_GPU, reason="device: got cuda, needs cpu (the interpreter, which takes any architecture's tiles)"
)
@pytest.mark.parametrize("case", TERMS_TOGETHER, ids=lambda case: case.name)
def test_row_terms_in_one_load(monkeypatch, case):
    launched = []
    run = flash.Launch.run
    monkeypatch.setattr(flash_launches, "_INTERPRETER_ARCH", "sm90")
    monkeypatch.setattr(flash.Launch, "run", lambda self, device: (launched.append(self), run(self, device))[1])
    assert check_backward("flash", case, "cpu", torch.float16).status == "passed"
    (keys,) = (launch for launch in launched if launch.kernel.__name__ == "backward_keys")
    assert keys.arguments["TERMS_TOGETHER"] and 2 * keys.arguments["BLOCK_M"] == 32 * keys.options["num_warps"]


def test_row_terms_come_together_where_each_thread_has_one():
    tiles = {rule.tile for rules in tuning.BACKWARD_KEYS.values() for rule in rules if rule.tile.terms_together}
    assert tiles and all(2 * tile.block_m == 32 * tile.num_warps for tile in tiles)


@pytest.mark.skipif(not ON_GPU, reason="device: got cpu, needs cuda; the interpreter runs programs in order")
@pytest.mark.parametrize("case", ["several_tiles_causal", "varlen_causal_gqa", "everything"])
def test_gradients_repeat_100_times(case):
    check_repeatable("flash", CASE[case], DEVICE, torch.bfloat16, runs=100)


@pytest.mark.parametrize(
    ("options", "constant"),
    [
        (dict(), ()),
        (dict(kv_lens=torch.tensor([17, 0], dtype=torch.int32)), ("k", "v")),
        (dict(causal=True), ()),
    ],
    ids=["plain", "kv_lens", "causal"],
)
def test_every_element_is_written_and_hidden_ones_are_zero(options, constant):
    options = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    q, k, v = inputs(batch=2)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        regard.attention(q, k, v, backend="flash", **options).square().sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(t.grad.isfinite().all() for t in (q, k, v))
    if constant:
        assert not k.grad[0, 17:].any() and not v.grad[0, 17:].any(), "keys past the length"
        assert not any(t.grad[1].any() for t in (q, k, v)), "a sequence without keys"
        assert k.grad[0, :17].all(-1).all() and q.grad[0].any()
    if options.get("causal"):  # the first 16 of 40 queries come before the first of 24 keys
        assert not q.grad[:, :16].any() and q.grad[:, 17:].any()


@pytest.mark.parametrize(
    ("bias", "filled"),
    [
        ((2, 4, 37, 53), (2, 4, 37, 53)),
        ((1, 4, 37, 53), (1, 4, 37, 53)),
        ((2, 1, 37, 53), (2, 1, 37, 53)),
        ((1, 1, 37, 53), (1, 1, 37, 53)),
        ((1, 4, 1, 53), (2, 4, 1, 53)),
        ((1, 1, 1, 53), (2, 4, 1, 53)),
    ],
)
def test_bias_gradient_needs_no_score_sized_temporary(bias, filled):
    q = torch.empty(2, 37, 4, 32, device="meta")
    k = torch.empty(2, 53, 4, 32, device="meta")
    rows = torch.empty(2, 4, 37, device="meta")
    tensor = torch.empty(bias, device="meta")
    config = AttentionConfig.from_tensors(q, k, k, bias=tensor)
    reduced = flash_launches.new_bias_gradient(config, tensor)
    made = flash_launches.bias_launch(config, AttentionInputs(q, k, k, bias=tensor), q, rows, rows, reduced)
    assert made.arguments["dbias_ptr"].shape == filled


def test_gradient_through_pages_is_refused_with_the_reason():
    config = AttentionConfig(
        1, 1, 32, 2, 2, 16, dtype=torch.float16, device="cuda", arch="sm90", kv_lens=True, page_size=16,
        requires_grad=True,
    )  # fmt: skip
    reasons = flash.FlashBackend().unsupported_reasons(config)
    assert [(reason.code, reason.observed) for reason in reasons] == [
        ("backward", "a gradient through a paged KV cache")
    ]


def test_gradient_of_out_with_any_strides():
    q, k, v = inputs()
    out = regard.attention(q, k, v, backend="flash")
    seeds = torch.randn(1, device=DEVICE, dtype=out.dtype).expand_as(out)
    expanded = torch.autograd.grad(out, (q, k, v), seeds, retain_graph=True)
    contiguous = torch.autograd.grad(out, (q, k, v), seeds.contiguous(), retain_graph=True)
    assert all(map(torch.equal, expanded, contiguous))


def test_infinite_lse_gradient_of_a_row_without_keys_stays_out():
    q, k, v = inputs()
    out, lse = regard.attention(q, k, v, causal=True, return_lse=True, backend="flash")
    seeds = torch.where(lse.isinf(), torch.inf, 1.0)
    gradients = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), seeds))
    assert all(gradient.isfinite().all() for gradient in gradients)
