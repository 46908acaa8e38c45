"""Calls that look alike share one config and selection; any difference makes another."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard import plans
from regard.registry import registry

B, S, H, D = 2, 8, 4, 16


class Probe:
    """A backend that does nothing and shows the config it was given."""

    name = "probe"

    def __init__(self, name="probe", reasons=()):
        self.name, self.reasons, self.seen = name, reasons, []

    def unsupported_reasons(self, config):
        return self.reasons

    def required_kv_layout(self, config):
        return config.kv_layout

    def forward(self, config, inputs):
        self.seen.append(config)
        lse = inputs.q.new_zeros(*inputs.q.shape[:-3], inputs.q.shape[-2], inputs.q.shape[-3], dtype=torch.float32)
        return inputs.q[..., :1].expand(*inputs.q.shape[:-1], inputs.v.shape[-1]).contiguous(), lse

    def backward(self, config, inputs, out, lse, grad_out, grad_lse):
        return {}


@pytest.fixture(autouse=True)
def probe():
    made = Probe()
    regard.register(made, priority=99)
    yield made
    regard.unregister("probe")


def arguments(**changes):
    made = dict(
        q=torch.randn(B, S, H, D), k=torch.randn(B, S, 2, D), v=torch.randn(B, S, 2, D), mask=None, bias=None,
        alibi_slopes=None, sinks=None, kv_lens=None, causal=True, window=(4, 0), softmax_scale=0.5, softcap=1.0,
        dropout_p=0.1, layout="bshd", return_lse=True, deterministic=False,
    )  # fmt: skip
    return made | changes


def config_of(probe, **changes):
    with regard.record_selections() as record:
        regard.attention(**arguments(**changes))
    return record[-1][0]


def test_calls_that_look_alike_share_the_config(probe):
    assert config_of(probe) is config_of(probe)
    lens = {"kv_lens": torch.tensor([3, 4], dtype=torch.int32)}
    assert config_of(probe, **lens) is config_of(probe, kv_lens=torch.tensor([8, 0], dtype=torch.int32))


def strided(*shape):
    return torch.randn(*shape[:-1], shape[-1] + 8)[..., : shape[-1]]


CHANGES = {
    "batch": {name: torch.randn(3, S, heads, D) for name, heads in (("q", H), ("k", 2), ("v", 2))},
    "seqlen_q": {"q": torch.randn(B, S + 1, H, D)},
    "seqlen_k": {"k": torch.randn(B, S + 1, 2, D), "v": torch.randn(B, S + 1, 2, D)},
    "heads_q": {"q": torch.randn(B, S, 2, D)},
    "heads_kv": {"k": torch.randn(B, S, 4, D), "v": torch.randn(B, S, 4, D)},
    "head_dim": {"q": torch.randn(B, S, H, 8), "k": torch.randn(B, S, 2, 8)},
    "head_dim_v": {"v": torch.randn(B, S, 2, 8)},
    "q strides": {"q": strided(B, S, H, D)},
    "k strides": {"k": strided(B, S, 2, D)},
    "v strides": {"v": strided(B, S, 2, D)},
    "dtype": {name: torch.randn(B, S, h, D, dtype=torch.bfloat16) for name, h in (("q", H), ("k", 2), ("v", 2))},
    "device": {name: torch.randn(B, S, h, D, device="meta") for name, h in (("q", H), ("k", 2), ("v", 2))},
    "layout": {"layout": "bhsd", "q": torch.randn(B, H, S, D), "k": torch.randn(B, 2, S, D), "v": torch.randn(B, 2, S, D)},
    **{f"{name} gradient": {name: torch.randn(B, S, h, D, requires_grad=True)} for name, h in (("q", H), ("k", 2), ("v", 2))},
    "mask": {"mask": torch.ones(1, 1, S, S, dtype=torch.bool)},
    "mask shape": {"mask": torch.ones(1, 1, 1, S, dtype=torch.bool)},
    "bias": {"bias": torch.zeros(1, 1, S, S)},
    "bias shape": {"bias": torch.zeros(1, 1, 1, S)},
    "bias strides": {"bias": torch.zeros(1, 1, S, S + 1)[..., :S]},
    "bias dtype": {"bias": torch.zeros(1, 1, S, S, dtype=torch.float16)},
    "bias gradient": {"bias": torch.zeros(1, 1, S, S, requires_grad=True)},
    "alibi_slopes": {"alibi_slopes": torch.ones(H)},
    "alibi_slopes shape": {"alibi_slopes": torch.ones(B, H)},
    "sinks": {"sinks": torch.ones(H)},
    "sinks gradient": {"sinks": torch.ones(H, requires_grad=True)},
    "sinks dtype": {"sinks": torch.ones(H, dtype=torch.float16)},
    "kv_lens": {"kv_lens": torch.tensor([8, 8], dtype=torch.int32)},
    "causal": {"causal": False},
    "window": {"window": (5, 0)},
    "no window": {"window": None},
    "window side": {"window": (None, 0)},
    "softmax_scale": {"softmax_scale": 0.25},
    "default scale": {"softmax_scale": None},
    "softcap": {"softcap": 2.0},
    "dropout_p": {"dropout_p": 0.2},
    "return_lse": {"return_lse": False},
    "deterministic": {"deterministic": True},
}  # fmt: skip


def test_one_difference_makes_another_config(probe):
    """Each change against the plain call and against every other one, so that presence alone is not what is told."""
    configs = {"unchanged": config_of(probe)}
    for name, change in CHANGES.items():
        configs[name] = config_of(probe, **change)
    assert len({id(config) for config in configs.values()}) == len(configs)
    for name, change in CHANGES.items():
        assert config_of(probe) is configs["unchanged"], name
        assert config_of(probe, **change) is configs[name], name


def test_without_guards_of_torch_configs_are_shared_all_the_same(probe, monkeypatch):
    monkeypatch.setattr(plans, "TensorGuards", None)
    monkeypatch.setattr(plans, "_latest", plans._Recent(4))
    test_one_difference_makes_another_config(probe)


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_modes_make_another_config(probe, context):
    q = torch.randn(B, S, H, D, requires_grad=True)
    before = config_of(probe, q=q)
    with context():
        inside = config_of(probe, q=q)
    assert inside != before
    assert config_of(probe, q=q) is before


def chosen(**options):
    q = torch.randn(1, 4, 2, 8)
    with regard.record_selections() as recorded:
        regard.attention(q, q, q, **options)
    ((_, selection),) = recorded
    return selection.backend, selection.strict


def test_every_call_is_selected_by_the_registry_of_its_moment(probe):
    """One call, one property of the registry changed at a time; the second of two equal calls is a remembered one."""
    for _ in range(2):
        assert chosen() == ("probe", False)
        assert chosen(backend="reference") == ("reference", True)
        assert chosen(backend="auto") == ("probe", False)
        with regard.use_backend("sdpa"):
            assert chosen() == chosen() == ("sdpa", True)
            assert chosen(backend="cpu") == ("cpu", True)
            with regard.use_backend("auto"):
                assert chosen() == ("probe", False)
        regard.set_default("cpu")
        assert chosen() == chosen() == ("cpu", True)
        regard.set_default(None)
        assert chosen() == ("probe", False)
        regard.register(Probe("newcomer"), priority=100)
        assert chosen() == chosen() == ("newcomer", False)
        regard.unregister("newcomer")
        assert chosen() == ("probe", False)


def test_every_recorder_hears_of_every_call():
    """Calls outside, before, between and inside recordings; none of them is recalled for another's recorder."""
    q = torch.randn(1, 4, 2, 8)
    regard.attention(q, q, q)
    with regard.record_selections() as outer:
        regard.attention(q, q, q)
        with regard.record_selections() as inner:
            for _ in range(2):
                regard.attention(q, q, q)
        regard.attention(q, q, q)
    for _ in range(2):
        regard.attention(q, q, q)
    with regard.record_selections() as later:
        regard.attention(q, q, q)
    assert (len(outer), len(inner), len(later)) == (4, 2, 1)


def test_a_quarantine_ends_what_was_remembered(probe, monkeypatch):
    assert chosen() == ("probe", False)

    def fail(config, inputs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(probe, "forward", fail)
    q = torch.randn(1, 4, 2, 8)
    with pytest.warns(regard.FallbackWarning, match="probe"):
        regard.attention(q, q, q)
    assert chosen() == ("cpu", False)


def test_a_passed_over_backend_is_warned_of_once():
    regard.register(Probe("faster", reasons=(regard.Reason("length", "4", "8"),)), priority=100)
    try:
        with pytest.warns(regard.FallbackWarning, match="faster"):
            chosen()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            chosen()
    finally:
        regard.unregister("faster")


@pytest.mark.parametrize("name, wrong", [
    ("causal", 1), ("window", (True, 0)), ("window", [4.0, 0]), ("window", (4.0, 0)), ("window", [[4], 0]),
    ("softmax_scale", True), ("softcap", True), ("dropout_p", False), ("return_lse", 1), ("deterministic", 0),
])  # fmt: skip
def test_what_equals_a_legal_value_is_still_refused(name, wrong):
    legal = {"softmax_scale": 1.0, "dropout_p": 0.0, "window": (1, 0)}.get(name)
    regard.attention(**arguments(**({} if legal is None else {name: legal})))
    with pytest.raises(regard.ConfigError, match=name):
        regard.attention(**arguments(**{name: wrong}))


@pytest.mark.parametrize(
    "name, wrong",
    [
        *((name, None) for name in "qkv"),
        *((name, [1.0]) for name in ("q", "k", "v", "mask", "bias", "alibi_slopes", "sinks", "kv_lens")),
    ],
)
def test_what_is_no_tensor_is_refused_by_name(name, wrong):
    with pytest.raises(regard.ConfigError, match=name):
        regard.attention(**arguments(**{name: wrong}))


def test_values_in_index_tensors_are_checked_in_every_call(probe):
    lens = torch.tensor([3, 4], dtype=torch.int32)
    config_of(probe, kv_lens=lens)
    lens[1] = S + 1
    for _ in range(2):
        with pytest.raises(regard.ConfigError, match=r"kv_lens\[1\]: got 9"):
            config_of(probe, kv_lens=lens)
    lens[1] = S
    assert config_of(probe, kv_lens=lens).kv_lens


def test_offsets_give_the_longest_sequence_of_every_call(probe):
    q = torch.randn(9, 2, 8)

    def longest(*offsets, **stated):
        offsets = torch.tensor(offsets, dtype=torch.int32)
        regard.varlen_attention(q, q, q, offsets, offsets, **stated)
        return probe.seen[-1].seqlen_q

    assert longest(0, 3, 9) == longest(0, 6, 9) == 6
    assert probe.seen[-1] is probe.seen[-2]
    assert longest(0, 1, 9) == 8
    for wrong in ((0, 7, 8), (0, 10, 9), (1, 3, 9)):
        with pytest.raises(regard.ConfigError, match="cu_seqlens"):
            longest(*wrong)
    with pytest.raises(regard.ConfigError, match="max_seqlen_q"):
        longest(0, 3, 9, max_seqlen_q=5, max_seqlen_k=9)


def test_one_tensor_as_offsets_and_as_lengths(probe):
    """What was found in a tensor in one role says nothing about the other."""
    numbers = torch.tensor([0, 9], dtype=torch.int32)
    packed, padded = torch.randn(9, 2, 8), torch.randn(2, 9, 2, 8)
    for _ in range(2):
        regard.varlen_attention(packed, packed, packed, numbers, numbers)
        regard.attention(padded, padded, padded, kv_lens=numbers)
    with pytest.raises(regard.ConfigError, match="kv_lens"):
        regard.attention(padded[:, :4], padded[:, :4], padded[:, :4], kv_lens=numbers)


def test_pages_are_checked_in_every_call(probe):
    q, cache = torch.randn(2, 1, 2, 8), torch.randn(4, 2, 2, 8)
    table, lens = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32), torch.tensor([3, 4], dtype=torch.int32)
    regard.paged_attention(q, cache, cache, table, lens)
    table[1, 1] = 4
    with pytest.raises(regard.ConfigError, match=r"block_table\[1\]"):
        regard.paged_attention(q, cache, cache, table, lens)
    lens[1] = 2  # then that entry is not in use
    regard.paged_attention(q, cache, cache, table, lens)


def test_memory_of_plans_is_bounded():
    recent = plans._Recent(4)
    for number in range(100):
        recent.keep(number, number)
        recent.find(0)
    kept = [number for number in range(1, 100) if recent.find(number) is not None]
    assert recent.find(0) == 0 and 4 <= len(kept) < 8 and kept[-1] == 99


PACKED = torch.tensor([0, 3, 8], dtype=torch.int32)
CALLS = {
    "plain": lambda q: regard.attention(q, q.clone(), q.clone(), causal=True),
    "one tensor": lambda q: regard.attention(q, q, q, causal=True),
    "mask": lambda q: regard.attention(q, q.clone(), q.clone(), mask=torch.ones(S, S, dtype=torch.bool)),
    "lse": lambda q: regard.attention(q, q, q, return_lse=True),
    "heads outside": lambda q: regard.attention(q, q, q, layout="bhsd"),
    "bias": lambda q: regard.attention(q, q, q, bias=torch.zeros(S, S)),
    "sinks": lambda q: regard.attention(q, q, q, sinks=torch.zeros(H)),
    "lengths": lambda q: regard.attention(q, q, q, kv_lens=torch.tensor([3, 4], dtype=torch.int32)),
    "packed": lambda q: regard.varlen_attention(q[0], q[0], q[0], PACKED, PACKED),
    "by name": lambda q: regard.attention(q, q, q, backend="probe"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_plan_of_the_latest_call_is_recalled(monkeypatch, call):
    call(torch.randn(B, S, H, D))
    monkeypatch.setattr(plans, "make", None)
    call(torch.randn(B, S, H, D))


def test_plans_of_calls_that_take_turns_are_recalled(monkeypatch):
    """Self- and cross-attention of several shapes, with and without a mask, under one set of options."""
    calls = [(torch.randn(B, S, H, D), torch.randn(B, keys, H, D)) for keys in (8, 9, 10)]

    def run():
        for q, k in calls:
            for mask in (None, torch.ones(S, k.shape[1], dtype=torch.bool)):
                with regard.record_selections() as recorded:
                    regard.attention(q, k, k.clone(), mask=mask)
                ((config, _),) = recorded
                assert (config.seqlen_k, config.mask_shape is None) == (k.shape[1], mask is None)

    run()
    monkeypatch.setattr(plans, "make", None)
    run()


@pytest.mark.parametrize(
    "context",
    [
        torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16), FakeTensorMode,
        lambda: FlopCounterMode(display=False), forward_ad.dual_level, lambda: regard.use_backend("reference"),
    ],
    ids=["no_grad", "inference_mode", "autocast", "fake", "flops", "dual", "use_backend"],
)  # fmt: skip
@pytest.mark.parametrize("apart", [False, True])
def test_no_plan_is_recalled_inside_a_context_that_it_was_not_made_in(context, apart):
    q, k, v = (torch.randn(B, S, H, D, requires_grad=True) for _ in "qkv")
    if not apart:
        k = v = q
    tensors, options = (q, k, v, *[None] * 8), ("bshd", True, None, None, 0, 0, False, False, None, None, None, None)
    regard.attention(q, k, v, causal=True)
    assert plans.recall(tensors, options, None) is not None
    with context():
        assert plans.recall(tensors, options, None) is None
    assert plans.recall(tensors, options, None) is not None
    torch.func.vmap(lambda x: (x, plans.recall(tensors, options, None) and 1 / 0)[0])(torch.randn(2))
    torch.jit.trace(lambda x: (x + 1, plans.recall(tensors, options, None) and 1 / 0)[0], torch.randn(2))
    make_fx(lambda x: (x + 1, plans.recall(tensors, options, None) and 1 / 0)[0])(torch.randn(2))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_plans_made_inside_a_context_are_recalled_there(monkeypatch, context):
    outside = torch.randn(B, S, H, D)
    regard.attention(outside, outside, outside)
    with context():
        inside = torch.randn(B, S, H, D)
        for q in (outside, inside):
            regard.attention(q, q, q)
            with monkeypatch.context() as patch:
                patch.setattr(plans, "make", None)
                regard.attention(q, q, q)
    regard.attention(inside, inside, inside)


def test_a_plan_is_not_recalled_for_other_tensors_beside_q_k_and_v():
    """A mask, or q as k too, or a subclass, or what is no tensor: each looks otherwise."""
    q, k, v = (torch.randn(B, S, H, D) for _ in "qkv")
    options = ("bshd", True, None, None, 0, 0, False, False, None, None, None, None)
    regard.attention(q, k, v, causal=True)
    assert plans.recall((q, k, v, *[None] * 8), options, None) is not None
    for place in range(3, 11):
        others = [None] * 8
        others[place - 3] = torch.ones(S, S, dtype=torch.bool)
        assert plans.recall((q, k, v, *others), options, None) is None

    class Subclass(torch.Tensor):
        pass

    for place in range(3):
        for other in (q.as_subclass(Subclass), q.to("meta"), q.half(), q.mT.contiguous().mT, None, [1.0]):
            tensors = [q, k, v]
            tensors[place] = other
            assert plans.recall((*tensors, *[None] * 8), options, None) is None


def test_numbers_of_numpy_are_remembered_too(probe):
    scale = pytest.importorskip("numpy").float64(0.5)
    assert config_of(probe, softmax_scale=scale) is config_of(probe, softmax_scale=scale)


def test_a_remembered_call_is_neither_validated_nor_selected_again(monkeypatch):
    q = torch.randn(1, 16, 2, 8)
    regard.attention(q, q, q, causal=True)
    monkeypatch.setattr(regard.AttentionConfig, "from_tensors", None)
    monkeypatch.setattr(registry, "select", None)
    regard.attention(q, q, q, causal=True)


def test_traced_calls_are_not_remembered(monkeypatch):
    """A fake tensor looks like a real one, but a config with symbols in it must not serve a real call."""
    for name in ("_recent", "_latest"):  # without what other tests left: a hit may be kept anew
        monkeypatch.setattr(plans, name, plans._Recent(4))
    monkeypatch.setattr(plans._recent, "find", None)
    for recent in (plans._recent, plans._latest):
        monkeypatch.setattr(recent, "keep", None)
    with FakeTensorMode():
        q = torch.randn(1, 4, 2, 8)
        assert regard.attention(q, q, q, causal=True).shape == q.shape
    torch.func.vmap(lambda q: regard.attention(q, q, q, backend="reference"))(torch.randn(2, 1, 4, 2, 8))


@pytest.mark.parametrize("place", ["q", "mask", "bias"])
def test_a_nested_tensor_after_a_plain_one_is_refused_and_ends_no_process(place):
    """In a process of its own: torch's guards abort where a tensor has no strides."""
    code = f"""
import torch, regard
call = {{name: torch.zeros(2, 3, 1, 8) for name in "qkv"}}
if "{place}" != "q":
    call["{place}"] = torch.ones(3, 3, dtype=torch.bool if "{place}" == "mask" else torch.float32)
regard.attention(**call)
call["{place}"] = torch.nested.nested_tensor([torch.zeros(3, 1, 8)] * 2)
try:
    regard.attention(**call)
except regard.ConfigError as error:
    assert str(error).startswith("{place}: got a nested tensor"), error
else:
    raise AssertionError("served")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
