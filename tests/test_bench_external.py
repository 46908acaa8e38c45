"""Adapters of other packages, against stand-ins that compute what those packages document with our reference."""

import inspect
import sys
import warnings
from dataclasses import replace
from types import ModuleType

import pytest
import torch

import regard
from regard import AttentionConfig, ConfigError, UnsupportedError
from regard.backends import external
from regard.backends.external import ADAPTERS, PRIORITY, ExternalBackend
from regard.bench import peers
from regard.bench.cases import Workload, parse
from regard.bench.inputs import canonical_inputs, draw
from regard.bench.run import use_fa3
from regard.bench.verify import Verifier

CPU = torch.device("cpu")
BY_NAME = {adapter.name: adapter for adapter in ADAPTERS}


@pytest.fixture(autouse=True)
def forget_modules():
    external._module.cache_clear()
    yield
    external._module.cache_clear()


def reference(q, k, v, window=(None, None), lse=False, varlen=None, **options):
    """Our specification, called as other packages describe their windows."""
    window = tuple(None if side in (-1, None) else side for side in window)
    options["window"] = None if window == (None, None) else window
    if varlen is not None:
        return regard.varlen_attention(q, k, v, *varlen, return_lse=lse, backend="reference", **options)
    return regard.attention(q, k, v, return_lse=lse, backend="reference", **options)


def module(monkeypatch, name, **members):
    made = ModuleType(name)
    vars(made).update(members)
    monkeypatch.setitem(sys.modules, name, made)
    return made


def flash_attn_2(monkeypatch):
    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                        alibi_slopes=None, deterministic=False, return_attn_probs=False):  # fmt: skip
        found = reference(q, k, v, window_size, return_attn_probs, softmax_scale=softmax_scale, causal=causal,
                          softcap=softcap, alibi_slopes=alibi_slopes)  # fmt: skip
        return (*found, None) if return_attn_probs else found

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                               softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                               deterministic=False, return_attn_probs=False):  # fmt: skip
        found = reference(q, k, v, window_size, return_attn_probs, (cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                          max_seqlen_k), softmax_scale=softmax_scale, causal=causal, softcap=softcap,
                          alibi_slopes=alibi_slopes)  # fmt: skip
        return (*found, None) if return_attn_probs else found

    def flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=None, block_table=None, softmax_scale=None,
                                causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                                return_softmax_lse=False):  # fmt: skip
        return regard.paged_attention(q, k_cache, v_cache, block_table, cache_seqlens, softmax_scale=softmax_scale,
                                      causal=causal, softcap=softcap, return_lse=return_softmax_lse,
                                      backend="reference")  # fmt: skip

    module(monkeypatch, "flash_attn")
    module(monkeypatch, "flash_attn.flash_attn_interface", flash_attn_func=flash_attn_func,
           flash_attn_varlen_func=flash_attn_varlen_func, flash_attn_with_kvcache=flash_attn_with_kvcache)  # fmt: skip


def flash_attn_3(monkeypatch):
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                        deterministic=False, return_attn_probs=False):  # fmt: skip
        return reference(q, k, v, window_size, return_attn_probs, softmax_scale=softmax_scale, causal=causal,
                         softcap=softcap)  # fmt: skip

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None,
                               causal=False, window_size=(-1, -1), softcap=0.0):  # fmt: skip
        return reference(q, k, v, window_size, False, (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
                         softmax_scale=softmax_scale, causal=causal, softcap=softcap)  # fmt: skip

    module(monkeypatch, "flash_attn_interface", flash_attn_func=flash_attn_func,
           flash_attn_varlen_func=flash_attn_varlen_func)  # fmt: skip


def flash_attn_4(monkeypatch):
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(None, None), softcap=0.0):
        return reference(q, k, v, window_size, True, softmax_scale=softmax_scale, causal=causal, softcap=softcap)

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, softmax_scale=None, causal=False,
                               window_size=(None, None), softcap=0.0):  # fmt: skip
        return reference(q, k, v, window_size, True, (cu_seqlens_q, cu_seqlens_k), softmax_scale=softmax_scale,
                         causal=causal, softcap=softcap)  # fmt: skip

    module(monkeypatch, "flash_attn")
    module(
        monkeypatch, "flash_attn.cute", flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func
    )


def flashinfer(monkeypatch):
    class Ragged:
        def __init__(self, workspace, layout):
            assert layout == "NHD"

        def plan(self, qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk, *, head_dim_vo, causal, sm_scale,
                 window_left, logits_soft_cap, q_data_type):  # fmt: skip
            self.offsets = qo_indptr, kv_indptr
            self.options = dict(softmax_scale=sm_scale, causal=causal, softcap=logits_soft_cap or 0.0)
            self.window = window_left, -1

        def run(self, q, k, v, return_lse=False):
            found = reference(q, k, v, self.window, return_lse, self.offsets, **self.options)
            return (found[0], found[1].T / torch.tensor(2.0).log()) if return_lse else found

    class Paged(Ragged):
        def plan(self, qo_indptr, indptr, pages, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, *,
                 causal, sm_scale, window_left, logits_soft_cap, q_data_type):  # fmt: skip
            self.offsets = qo_indptr
            counts = indptr.diff()
            self.lens = (counts - 1) * page_size + last_page_len
            self.table = torch.zeros(len(counts), int(counts.max()), dtype=torch.int32)
            for row, (start, count) in enumerate(zip(indptr, counts, strict=False)):
                self.table[row, :count] = pages[start : start + count]
            self.options = dict(softmax_scale=sm_scale, causal=causal, softcap=logits_soft_cap or 0.0)

        def run(self, q, cache, return_lse=False):
            batch = len(self.lens)
            found = regard.paged_attention(q.unflatten(0, (batch, -1)), *cache, self.table, self.lens,
                                           backend="reference", **self.options)  # fmt: skip
            return found.flatten(0, 1)

    module(monkeypatch, "flashinfer", BatchPrefillWithRaggedKVCacheWrapper=Ragged,
           BatchPrefillWithPagedKVCacheWrapper=Paged)  # fmt: skip


def xformers(monkeypatch):
    class LowerTriangularMask:
        pass

    class LowerTriangularFromBottomRightMask:
        pass

    class LocalAttentionFromBottomRightMask:
        def __init__(self, window_left, window_right):
            self.window = window_left, window_right

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
        grouped = query.ndim == 5
        if grouped:
            assert (key.stride(3) == 0 and attn_bias is None) or not torch.is_tensor(attn_bias) or attn_bias.ndim == 5
            query, key, value = (t.flatten(2, 3) for t in (query, key, value))
        causal = isinstance(attn_bias, (LowerTriangularMask, LowerTriangularFromBottomRightMask))
        assert not isinstance(attn_bias, LowerTriangularMask) or query.shape[1] == key.shape[1]
        window = getattr(attn_bias, "window", (None, None))
        bias = attn_bias if torch.is_tensor(attn_bias) else None
        out = reference(query, key, value, window, softmax_scale=scale, causal=causal,
                        bias=bias.flatten(1, 2) if bias is not None and grouped else bias)  # fmt: skip
        return out.unflatten(2, (2, -1)) if grouped else out

    module(monkeypatch, "xformers")
    module(monkeypatch, "xformers.ops", memory_efficient_attention=memory_efficient_attention)
    module(monkeypatch, "xformers.ops.fmha.attn_bias", LowerTriangularMask=LowerTriangularMask,
           LowerTriangularFromBottomRightMask=LowerTriangularFromBottomRightMask,
           LocalAttentionFromBottomRightMask=LocalAttentionFromBottomRightMask)  # fmt: skip


def flex(monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(external, "_flex_compiled", lambda: flex_attention)
    warnings.filterwarnings("ignore", "flex_attention called without torch.compile")


STAND_INS = {"flash_attn": flash_attn_2, "fa3": flash_attn_3, "fa4": flash_attn_4, "flashinfer": flashinfer,
             "xformers": xformers, "flex": flex}  # fmt: skip
CALLS = (
    "b2-s24-h4/2-d16-bf16",
    "b2-s24-h4/2-d16-bf16-causal",
    "b2-q9-k24-h4/2-d16-bf16-causal",
    "b2-s24-h4/2-d16-bf16-causal-window=5:0",
    "b2-s24-h4/2-d16-bf16-window=5:3",
    "b2-s24-h4/2-d16-bf16-window=none:3",
    "b2-s24-h4/2-d16-bf16-softcap=3-causal",
    "b2-s24-h4/2-d16-bf16-alibi",
    "b2-s24-h4/2-d16-bf16-bias=1hqk",
    "b2-s24-h4/2-d16-bf16-mask=b1qk",
    "b3-s24-h4/2-d16-bf16-causal-varlen",
    "b2-q3-k50-h4/2-d16-bf16-causal-paged=16",
    "b2-q3-k600-h4/2-d16-bf16-causal-paged=256",
    "b2-s24-h4/2-d16-bf16-sinks",
    "fwdbwd-b2-s24-h4/2-d16-bf16-causal",
)


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("name", STAND_INS)
def test_a_call_is_translated_exactly_or_refused(name, case, monkeypatch):
    """What an adapter does not refuse must come out right; what it refuses has a reason."""
    STAND_INS[name](monkeypatch)
    workload = parse(case)
    on_gpu = workload.config("cuda", "sm90")
    adapter = BY_NAME[name]
    monkeypatch.setattr(type(adapter.package), "installed", lambda self: True)
    reasons = adapter.unsupported_reasons(on_gpu)
    if reasons:
        assert all(reason.observed and reason.required for reason in reasons)
        return
    if name == "flex" and workload.mode != "fwd":
        pytest.skip("device: FlexAttention has no backward on a CPU")
    call = draw(workload, CPU)
    verifier = Verifier(workload, call)
    ready = peers.Peer(adapter).prepare(workload.mode, call, verifier.grad_out)
    verifier.check(ready.results(ready.run()))


@pytest.mark.parametrize("name, served", [
    ("flash_attn", 11), ("fa3", 9), ("fa4", 9), ("flashinfer", 8), ("xformers", 7), ("flex", 11),
])  # fmt: skip
def test_how_many_of_these_calls_each_serves(name, served, monkeypatch):
    STAND_INS[name](monkeypatch)
    monkeypatch.setattr(type(BY_NAME[name].package), "installed", lambda self: True)
    reasons = {case: BY_NAME[name].unsupported_reasons(parse(case).config("cuda", "sm90")) for case in CALLS}
    assert sum(not found for found in reasons.values()) == served, reasons


@pytest.mark.parametrize("name", ["flash_attn", "fa4", "flashinfer", "flex"])
def test_lse_is_the_natural_logarithm(name, monkeypatch):
    STAND_INS[name](monkeypatch)
    for workload in (Workload(batch=2, seqlen_q=9, seqlen_k=24, heads_q=4, heads_kv=2, head_dim=16, dtype="fp32"),
                     Workload(batch=2, seqlen_q=9, seqlen_k=24, heads_q=4, heads_kv=2, head_dim=16, dtype="fp32",
                              varlen=True)):  # fmt: skip
        if name == "flex" and workload.varlen:
            continue
        call = draw(workload, CPU)
        config = replace(call.config(), return_lse=True)
        out, lse = BY_NAME[name].package.call(config, canonical_inputs(call))
        expected = call("reference", return_lse=True)
        torch.testing.assert_close(out, expected[0])
        torch.testing.assert_close(lse, expected[1])


# --- Selection


def test_what_is_measured_unasked(monkeypatch):
    for adapter in ADAPTERS:
        monkeypatch.setattr(type(adapter.package), "installed", lambda self: True)
    flash_attn_3(monkeypatch)
    found = peers.available("cuda", "sm90")
    assert {"flash", "sdpa", "torch-flash", "torch-efficient", "torch-cudnn", "eager", "fa3", "flash_attn"} <= set(
        found
    )
    assert not {"flex", "reference", "cpu", "torch-sdpa"} & set(found)
    assert "fa3" not in peers.available("cuda", "sm80")
    assert set(peers.available("cpu", "cpu")) == {"cpu", "sdpa", "torch-sdpa", "eager"}
    asked = [each.name for each in peers.resolve(["flex", "reference", "flex"], "cuda", "sm90")]
    assert asked == ["flex", "reference"]


def test_no_peer_is_ever_chosen_automatically(registry, monkeypatch):
    for adapter in ADAPTERS:
        monkeypatch.setattr(type(adapter.package), "installed", lambda self: True)
    regard.backends.register_builtin_backends(registry)
    order = registry.list_backends()
    assert set(order[order.index("reference") + 1 :]) == set(BY_NAME)
    assert PRIORITY < 0
    for arch, dtype in (("sm90", torch.bfloat16), ("sm70", torch.float16), ("gfx1030", torch.float32)):
        config = AttentionConfig(1, 64, 64, 2, 2, 64, device="cuda", arch=arch, dtype=dtype, causal=True)
        assert registry.select(config).backend not in BY_NAME


def test_what_is_not_installed_is_not_registered(registry):
    external.register_installed(registry)
    assert set(registry.list_backends()) == {a.name for a in ADAPTERS if a.package.installed()}
    for adapter in ADAPTERS:
        if not adapter.package.installed():
            (reason,) = adapter.unsupported_reasons(Workload().config("cuda", "sm90"))
            assert reason.code == "not_installed" and reason.required


def test_asking_whether_a_package_is_there_does_not_import_it(tmp_path, monkeypatch):
    package = tmp_path / "flash_attn"
    (package / "cute").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert BY_NAME["fa4"].package.installed()
    assert not BY_NAME["flash_attn"].package.installed(), "the package has no flash_attn_interface"
    assert "flash_attn" not in sys.modules


def test_a_package_that_does_not_load_says_so(tmp_path, monkeypatch):
    (tmp_path / "flash_attn_interface.py").write_text("raise OSError('libcudart.so.12: no such file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn_interface", raising=False)
    (reason,) = BY_NAME["fa3"].unsupported_reasons(Workload().config("cuda", "sm90"))
    assert reason.code == "not_installed" and "libcudart.so.12" in reason.observed


@pytest.mark.parametrize("arch", ["sm80", "sm100", "gfx942"])
def test_fa3_is_for_hopper_alone(arch, monkeypatch):
    flash_attn_3(monkeypatch)
    monkeypatch.setattr(external.FlashAttn3, "installed", lambda self: True)
    reasons = BY_NAME["fa3"].unsupported_reasons(Workload().config("cuda", arch))
    assert [reason.code for reason in reasons] == ["arch"]


def test_on_a_cpu_every_adapter_refuses(monkeypatch):
    for adapter in ADAPTERS:
        monkeypatch.setattr(type(adapter.package), "installed", lambda self: True)
        assert [r.code for r in adapter.unsupported_reasons(Workload().config("cpu", "cpu"))] == ["device"]


# --- FA3 from a folder of binaries


RAW = """
import regard
def fwd_raw(q, k, v, causal=False, softmax_scale=None, out=None, num_splits=1):
    assert num_splits == 0, "it may split the keys where that is faster"
    return regard.attention(q, k, v, causal=causal, softmax_scale=softmax_scale, return_lse=True, backend="reference")
def flash_attn_func(q, k, v, softmax_scale=None, causal=False, deterministic=False):
    return regard.attention(q, k, v, causal=causal, softmax_scale=softmax_scale, backend="reference")
"""


@pytest.fixture
def fa3_folder(tmp_path, monkeypatch):
    (tmp_path / "flash_attn_interface.py").write_text(RAW)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "flash_attn_interface", raising=False)
    yield tmp_path
    sys.modules.pop("flash_attn_interface", None)
    if "fa3" in regard.list_backends():
        regard.unregister("fa3")


def test_fa3_from_a_folder_becomes_a_backend(fa3_folder):
    use_fa3(fa3_folder)
    use_fa3(fa3_folder)  # twice is no mistake
    assert regard.list_backends().count("fa3") == 1
    adapter = BY_NAME["fa3"]
    plain = parse("b2-q9-k24-h4/2-d16-bf16-causal")
    assert not adapter.unsupported_reasons(plain.config("cuda", "sm90"))
    (reason,) = adapter.unsupported_reasons(replace(plain, window=(3, 0)).config("cuda", "sm90"))
    assert reason.code == "window" and reason.hint == "this build has no such argument"
    for mode in ("fwd", "bwd"):
        workload = replace(plain, mode=mode)
        call = draw(workload, CPU)
        verifier = Verifier(workload, call)
        ready = peers.Peer(adapter).prepare(mode, call, verifier.grad_out)
        verifier.check(ready.results(ready.run()))


def test_a_strict_choice_of_a_peer_that_cannot_raises_its_reasons(fa3_folder):
    use_fa3(fa3_folder)
    q = torch.randn(1, 8, 2, 16)
    with pytest.raises(UnsupportedError, match="device: got cpu, needs cuda"):
        regard.attention(q, q, q, backend="fa3")


def test_a_folder_without_fa3_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="fa3-path"):
        use_fa3(tmp_path)


def test_adapters_are_backends():
    for adapter in ADAPTERS:
        assert isinstance(adapter, regard.AttentionBackend)
        assert isinstance(adapter, ExternalBackend)
        assert not inspect.signature(adapter.package.installed).parameters
