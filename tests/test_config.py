"""The one validator, and the figures a config computes about itself."""

import dataclasses
import itertools

import numpy
import pytest
import torch

from regard import AttentionConfig, ConfigError, KvCacheLayout, attention, paged_attention, varlen_attention

B, SQ, SK, HQ, HK, D = 2, 5, 7, 4, 2, 8


def qkv(**changes):
    made = {
        "q": torch.randn(B, SQ, HQ, D),
        "k": torch.randn(B, SK, HK, D),
        "v": torch.randn(B, SK, HK, D),
    }
    return {**made, **changes}


def packed(**changes):
    made = {
        "q": torch.randn(9, HQ, D),
        "k": torch.randn(11, HK, D),
        "v": torch.randn(11, HK, D),
        "cu_seqlens_q": torch.tensor([0, 4, 9], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 11, 11], dtype=torch.int32),
    }
    return {**made, **changes}


def paged(**changes):
    made = {
        "q": torch.randn(B, 1, HQ, D),
        "k_cache": torch.randn(6, 4, HK, D),
        "v_cache": torch.randn(6, 4, HK, D),
        "block_table": torch.tensor([[0, 1, 2], [3, 4, 5]], dtype=torch.int32),
        "kv_lens": torch.tensor([12, 5], dtype=torch.int32),
    }
    return {**made, **changes}


INT = torch.int32
BAD_ATTENTION = [
    ("q", {"q": [1, 2]}),
    ("q", {"q": torch.randn(SQ, HQ, D)}),
    ("q", {"q": torch.ones(B, SQ, HQ, D, dtype=torch.int64)}),
    ("q", {"q": torch.randn(B, SQ, HQ, D).to_sparse()}),
    ("k", {"k": torch.randn(B, SK, HK, D).to_mkldnn()}),
    ("v", {"v": torch.nested.nested_tensor([torch.randn(SK, HK, D)] * B, layout=torch.jagged)}),
    ("k", {"k": torch.randn(B, SK, HK, D, dtype=torch.float64)}),
    ("k", {"k": torch.randn(B, SK, HK, D, device="meta")}),
    ("k", {"k": torch.randn(B + 1, SK, HK, D), "v": torch.randn(B + 1, SK, HK, D)}),
    ("k", {"k": torch.randn(B, SK, HK, D + 1)}),
    ("v", {"v": torch.randn(B, SK + 1, HK, D)}),
    ("v", {"v": torch.randn(B, SK, HK + 2, D)}),
    ("v", {"v": None}),
    ("heads_q", {"k": torch.randn(B, SK, 3, D), "v": torch.randn(B, SK, 3, D)}),
    ("heads_kv", {"k": torch.randn(B, SK, 0, D), "v": torch.randn(B, SK, 0, D)}),
    ("head_dim", {"q": torch.randn(B, SQ, HQ, 0), "k": torch.randn(B, SK, HK, 0)}),
    ("head_dim_v", {"v": torch.randn(B, SK, HK, 0)}),
    ("layout", {"layout": "sbhd"}),
    ("mask", {"mask": torch.ones(SQ, SK)}),
    ("mask", {"mask": torch.ones(SQ, SK + 1, dtype=torch.bool)}),
    ("mask", {"mask": torch.ones(HK, SQ, SK, dtype=torch.bool)}),
    ("mask", {"mask": torch.ones(1, B, HQ, SQ, SK, dtype=torch.bool)}),
    ("mask", {"mask": torch.tensor(True)}),
    ("mask", {"mask": torch.ones(SQ, SK, dtype=torch.bool).to_sparse()}),
    ("mask", {"mask": "causal"}),
    ("mask", {"mask": torch.ones(SQ, SK, dtype=torch.bool, device="meta")}),
    ("bias", {"bias": torch.ones(SQ, SK, dtype=torch.int32)}),
    ("bias", {"bias": torch.randn(3, 1, SQ, SK)}),
    ("alibi_slopes", {"alibi_slopes": torch.randn(HK)}),
    ("alibi_slopes", {"alibi_slopes": torch.randn(B + 1, HQ)}),
    ("alibi_slopes", {"alibi_slopes": torch.randn(HQ, requires_grad=True)}),
    ("alibi_slopes", {"alibi_slopes": 0.5}),
    ("sinks", {"sinks": torch.randn(HK)}),
    ("sinks", {"sinks": torch.ones(HQ, dtype=torch.int64)}),
    ("kv_lens", {"kv_lens": torch.tensor([3, 3])}),
    ("kv_lens", {"kv_lens": torch.tensor([3], dtype=INT)}),
    ("kv_lens", {"kv_lens": torch.tensor([[3], [3]], dtype=INT)}),
    ("kv_lens", {"kv_lens": torch.tensor([3, 9, 3, 9], dtype=INT)[::2]}),
    ("kv_lens", {"kv_lens": [3, 3]}),
    ("kv_lens[1]", {"kv_lens": torch.tensor([3, SK + 1], dtype=INT)}),
    ("kv_lens[0]", {"kv_lens": torch.tensor([-1, 3], dtype=INT)}),
    ("softmax_scale", {"softmax_scale": float("nan")}),
    ("softmax_scale", {"softmax_scale": float("inf")}),
    ("softmax_scale", {"softmax_scale": 10**400}),
    ("softmax_scale", {"softmax_scale": -1e39}),
    ("softmax_scale", {"softmax_scale": "auto"}),
    ("softmax_scale", {"softmax_scale": True}),
    ("softcap", {"softcap": -1.0}),
    ("softcap", {"softcap": float("nan")}),
    ("softcap", {"softcap": float("inf")}),
    ("softcap", {"softcap": None}),
    ("dropout_p", {"dropout_p": 1.0}),
    ("dropout_p", {"dropout_p": -0.1}),
    ("dropout_p", {"dropout_p": float("nan")}),
    ("causal", {"causal": 1}),
    ("causal", {"causal": None}),
    ("return_lse", {"return_lse": "yes"}),
    ("deterministic", {"deterministic": 0}),
    ("window", {"window": (-1, 0)}),
    ("window", {"window": (0, 2**63)}),
    ("window", {"window": (1, -2)}),
    ("window", {"window": (1, 2, 3)}),
    ("window", {"window": (1.0, 2)}),
    ("window", {"window": (True, 2)}),
    ("window", {"window": 4}),
    ("window", {"window": "ab"}),
    ("window", {"window": numpy.array([1, 2])}),
    ("backend", {"backend": "no_such_backend"}),
    ("backend", {"backend": ["reference"]}),
]
BAD_VARLEN = [
    ("q", {"q": torch.randn(1, 9, HQ, D)}),
    ("cu_seqlens_q", {"cu_seqlens_q": None}),
    ("cu_seqlens_k", {"cu_seqlens_k": None}),
    ("cu_seqlens_q", {"cu_seqlens_q": torch.tensor([0, 4, 9])}),
    ("cu_seqlens_q", {"cu_seqlens_q": [0, 4, 9]}),
    ("cu_seqlens_q", {"cu_seqlens_q": torch.tensor([], dtype=INT)}),
    ("cu_seqlens_q", {"cu_seqlens_q": torch.tensor([1, 4, 9], dtype=INT)}),
    ("cu_seqlens_q", {"cu_seqlens_q": torch.tensor([0, 10, 9], dtype=INT)}),
    ("cu_seqlens_q", {"cu_seqlens_q": torch.tensor([0, 4, 8], dtype=INT)}),
    ("cu_seqlens_q", {"cu_seqlens_q": torch.tensor([0, 4, 10], dtype=INT)}),
    ("cu_seqlens_k", {"cu_seqlens_k": torch.tensor([0, 11], dtype=INT)}),
    ("cu_seqlens_k", {"cu_seqlens_k": torch.tensor([0, 12, 11], dtype=INT)}),
    ("max_seqlen_q", {"max_seqlen_q": 4}),
    ("max_seqlen_k", {"max_seqlen_k": 10}),
    ("max_seqlen_k", {"max_seqlen_k": 11.0}),
    ("alibi_slopes", {"alibi_slopes": torch.randn(3, HQ)}),
]
BAD_PAGED = [
    ("kv_lens", {"kv_lens": None}),
    ("kv_lens", {"kv_lens": torch.tensor([12, 5])}),
    ("kv_lens[0]", {"kv_lens": torch.tensor([13, 5], dtype=INT)}),
    ("block_table", {"block_table": torch.tensor([[0, 1, 2], [3, 4, 5]])}),
    ("block_table", {"block_table": torch.tensor([0, 1, 2], dtype=INT)}),
    ("block_table", {"block_table": torch.tensor([[0, 1, 2]], dtype=INT)}),
    ("block_table", {"block_table": torch.tensor([[0, 3], [1, 4], [2, 5]], dtype=INT).T}),
    ("block_table[0]", {"block_table": torch.tensor([[0, 1, 6], [3, 4, 5]], dtype=INT)}),
    ("block_table[1]", {"block_table": torch.tensor([[0, 1, 2], [3, -1, 5]], dtype=INT)}),
    ("k", {"k_cache": torch.randn(6, 0, HK, D), "v_cache": torch.randn(6, 0, HK, D)}),
    ("k", {"k_cache": torch.randn(0, 4, HK, D), "v_cache": torch.randn(0, 4, HK, D)}),
    ("v", {"v_cache": torch.randn(5, 4, HK, D)}),
]


@pytest.mark.parametrize(
    "call, arguments, argument, changes",
    [
        (call, arguments, argument, changes)
        for call, arguments, table in (
            (attention, qkv, BAD_ATTENTION),
            (varlen_attention, packed, BAD_VARLEN),
            (paged_attention, paged, BAD_PAGED),
        )
        for argument, changes in table
    ],
)
def test_malformed_argument_is_named(call, arguments, argument, changes):
    with pytest.raises(ConfigError) as raised:
        call(**arguments(**changes))
    assert raised.value.argument == argument
    assert str(raised.value).startswith(f"{argument}: got ")
    assert raised.value.required


@pytest.mark.parametrize("call, arguments", [(attention, qkv), (varlen_attention, packed), (paged_attention, paged)])
def test_well_formed_call_passes(call, arguments):
    assert call(**arguments()).isfinite().all()


@pytest.mark.parametrize("name", ["mask", "bias", "kv_lens"])
def test_varlen_takes_no_padded_extras(name):
    extra = {
        "mask": torch.ones(1, 1, dtype=torch.bool),
        "bias": torch.ones(1, 1),
        "kv_lens": torch.ones(2, dtype=torch.int32),
    }
    with pytest.raises(ConfigError) as raised:
        AttentionConfig.from_tensors(**packed(), **{name: extra[name]})
    assert raised.value.argument == name


@pytest.mark.parametrize(
    "argument, changes",
    [
        ("batch", {"batch": -1}),
        ("seqlen_q", {"seqlen_q": 1.5}),
        ("seqlen_k", {"seqlen_k": True}),
        ("heads_kv", {"heads_kv": 0}),
        ("heads_q", {"heads_q": 3}),
        ("head_dim", {"head_dim": "64"}),
        ("dtype", {"dtype": torch.int8}),
        ("dtype", {"dtype": "bfloat16"}),
        ("device", {"device": torch.device("cuda")}),
        ("device", {"device": "cuda:0"}),
        ("arch", {"device": "cuda", "arch": 90}),
        ("requires_grad", {"requires_grad": "no"}),
        ("kv_lens", {"kv_lens": 9}),
        ("total_k", {"varlen": True, "total_q": 4, "total_k": -9}),
        ("total_q, total_k", {"varlen": True}),
        ("page_size", {"page_size": 16}),
        ("page_size", {"page_size": 0, "kv_lens": True}),
        ("page_size", {"page_size": "16", "kv_lens": True}),
        ("mask", {"mask_shape": (1, 1, 3, 9)}),
        ("mask", {"mask_shape": [1, 1, 4, 9]}),
        ("bias", {"bias_shape": (9,)}),
        ("bias", {"bias_shape": (1, 1, 4, 9), "bias_dtype": torch.int8}),
        ("bias", {"bias_shape": (1, 1, 4, 9), "bias_dtype": "float32"}),
        ("bias_shape", {"bias_dtype": torch.float32}),
        ("bias_shape", {"bias_requires_grad": True}),
        ("q_strides", {"q_strides": [256, 64, 16, 1]}),
        ("k_strides", {"k_strides": (16, 1)}),
        ("v_strides", {"v_strides": (288, 32, 16, 1.0)}),
        ("q_strides", {"varlen": True, "total_q": 4, "total_k": 9, "q_strides": (256, 64, 16, 1)}),
    ],
)
def test_malformed_description_is_named(argument, changes):
    fields = dict(batch=2, seqlen_q=4, seqlen_k=9, heads_q=4, heads_kv=2, head_dim=16)
    with pytest.raises(ConfigError) as raised:
        AttentionConfig(**{**fields, **changes})
    assert raised.value.argument == argument


def test_a_bias_is_in_the_dtype_of_q_unless_said_otherwise():
    config = AttentionConfig(2, 4, 9, 4, 2, 16, dtype=torch.float16, bias_shape=(1, 1, 4, 9))
    assert config.bias_dtype == torch.float16
    assert config.bytes() - dataclasses.replace(config, bias_shape=None, bias_dtype=None).bytes() == 4 * 9 * 2


def test_a_window_without_bounds_is_none():
    assert AttentionConfig.from_tensors(**qkv(), window=(None, None)) == AttentionConfig.from_tensors(**qkv())


def test_tensors_without_memory_give_tensors_without_memory():
    shapes = {name: t.to("meta") for name, t in packed().items()}
    out, lse = varlen_attention(**shapes, max_seqlen_q=5, max_seqlen_k=11, return_lse=True)
    assert out.device.type == lse.device.type == "meta" and (out.shape, lse.shape) == ((9, HQ, D), (HQ, 9))
    assert paged_attention(**{name: t.to("meta") for name, t in paged().items()}).shape == (B, 1, HQ, D)
    q, k, v = (t.to("meta").requires_grad_() for t in qkv().values())
    assert torch.autograd.grad(attention(q, k, v).sum(), k)[0].shape == k.shape


def test_changed_offsets_are_read_again():
    arguments = packed()
    AttentionConfig.from_tensors(**arguments)
    arguments["cu_seqlens_q"][1] = 100
    with pytest.raises(ConfigError, match="cu_seqlens_q: got 9 after 100 at index 2"):
        AttentionConfig.from_tensors(**arguments)


def test_inference_tensors_are_accepted():
    with torch.inference_mode():
        arguments = packed()
        assert AttentionConfig.from_tensors(**arguments).seqlen_q == 5


def test_config_is_frozen_hashable_and_defaults_scale_and_head_dim_v():
    config = AttentionConfig(batch=1, seqlen_q=3, seqlen_k=4, heads_q=2, heads_kv=1, head_dim=16)
    assert (config.softmax_scale, config.head_dim_v) == (0.25, 16)
    assert hash(config) == hash(dataclasses.replace(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.causal = True


def test_from_tensors_reads_both_layouts_alike():
    arguments = qkv()
    swapped = {name: t.transpose(1, 2) for name, t in arguments.items()}
    bshd, bhsd = AttentionConfig.from_tensors(**arguments), AttentionConfig.from_tensors(**swapped, layout="bhsd")
    assert bshd == bhsd
    assert bhsd.q_strides == arguments["q"].stride()


@pytest.mark.parametrize(
    "config, layout",
    [
        (AttentionConfig.from_tensors(**qkv()), KvCacheLayout.CONTIGUOUS),
        (AttentionConfig.from_tensors(**packed()), KvCacheLayout.PACKED),
        (
            AttentionConfig.from_tensors(
                **{name.removesuffix("_cache"): tensor for name, tensor in paged().items()}, causal=True
            ),
            KvCacheLayout.PAGED,
        ),
    ],
)
def test_kv_layout(config, layout):
    assert config.kv_layout is layout


def test_requires_grad_follows_the_tensors_and_the_grad_mode():
    arguments = qkv(bias=torch.randn(SQ, SK, requires_grad=True))
    config = AttentionConfig.from_tensors(**arguments)
    assert config.requires_grad and config.bias_requires_grad
    with torch.no_grad():
        config = AttentionConfig.from_tensors(**arguments)
    assert not config.requires_grad and not config.bias_requires_grad


BANDS = [None, (0, 0), (2, None), (None, 1), (3, 2), (100, 100)]


@pytest.mark.parametrize("sq, sk", [(1, 1), (5, 5), (3, 9), (9, 3), (0, 4), (4, 0), (1, 7)])
@pytest.mark.parametrize("causal, window", list(itertools.product((False, True), BANDS)))
def test_visible_pairs_and_flops_count_what_is_visible(sq, sk, causal, window):
    config = AttentionConfig(
        batch=3, seqlen_q=sq, seqlen_k=sk, heads_q=4, heads_kv=2, head_dim=8, head_dim_v=6, causal=causal, window=window
    )
    left, right = window or (None, None)
    pairs = 0
    for i, j in itertools.product(range(sq), range(sk)):
        offset = j - (i + sk - sq)
        pairs += (
            (not causal or offset <= 0) and (left is None or offset >= -left) and (right is None or offset <= right)
        )
    assert config.visible_pairs() == pairs
    assert config.flops() == 2 * 3 * 4 * pairs * (8 + 6)
    assert config.flops(backward=True) == 2 * 3 * 4 * pairs * (3 * 8 + 2 * 6)


def test_bytes_count_every_tensor_once():
    mask = torch.ones(B, 1, 1, SK, dtype=torch.bool)
    bias = torch.randn(HQ, SQ, SK)
    arguments = qkv(v=torch.randn(B, SK, HK, 3))
    config = AttentionConfig.from_tensors(**arguments, mask=mask, bias=bias)
    out_and_lse = B * SQ * HQ * (3 * 4 + 4)
    tensors = [*arguments.values(), mask, bias]
    assert config.bytes() == sum(t.numel() * t.element_size() for t in tensors) + out_and_lse
    config = AttentionConfig.from_tensors(**packed())
    assert config.bytes() == 4 * (9 * HQ * 2 * D + 11 * HK * 2 * D) + 9 * HQ * 4


def test_describe_names_the_features_that_are_on():
    config = AttentionConfig(
        batch=1, seqlen_q=2, seqlen_k=3, heads_q=2, heads_kv=2, head_dim=4, head_dim_v=5, causal=True, window=(1, None)
    )
    assert config.describe() == "B=1 Sq=2 Sk=3 Hq=2 Hk=2 D=4 Dv=5 bfloat16 cpu causal window=(1, None)"


@pytest.mark.parametrize(
    "fields",
    [
        {"mask_shape": (1, 1, 1, 9)},
        {"bias_shape": (1, 1, 1, 9), "bias_dtype": torch.float32},
        {"kv_lens": True},
        {"kv_lens": True, "page_size": 4},
    ],
    ids=lambda fields: list(fields)[-1],
)
def test_what_packed_sequences_cannot_have_is_refused_without_tensors_too(fields):
    sizes = dict(batch=2, seqlen_q=9, seqlen_k=9, heads_q=2, heads_kv=2, head_dim=8, total_q=12, total_k=12)
    with pytest.raises(ConfigError, match="cu_seqlens"):
        AttentionConfig(**sizes, varlen=True, **fields)


def test_packed_sequences_with_a_block_table_are_refused():
    q, offsets = torch.randn(9, 2, 8), torch.tensor([0, 9], dtype=torch.int32)
    table = torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(ConfigError, match="block_table"):
        AttentionConfig.from_tensors(q, q, q, cu_seqlens_q=offsets, cu_seqlens_k=offsets, block_table=table)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_jit_trace_is_refused_by_name():
    q = torch.randn(1, 4, 2, 8)
    attention(q, q, q)  # remembered calls are refused as well
    with pytest.raises(ConfigError, match=r"torch\.jit\.trace"):
        torch.jit.trace(attention, (q, q, q))
