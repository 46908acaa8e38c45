"""Which backend serves a call, what is said about it, and what happens when a kernel fails."""

import asyncio
import dataclasses
import importlib.metadata
import pickle
import threading
import warnings

import pytest
import torch

import regard
from regard import ConfigError, FallbackWarning, KvCacheLayout, Reason, UnsupportedError
from regard.backends.reference import ReferenceBackend
from regard.registry import registry as package_registry

CONFIG = regard.AttentionConfig(batch=1, seqlen_q=4, seqlen_k=4, heads_q=1, heads_kv=1, head_dim=8)
TOO_WIDE = Reason("head_dim", "8", "at most 4", "use a smaller head")


class Fake(ReferenceBackend):
    """The reference under another name, with reasons, a layout or an error of the test's choosing."""

    composed_of_torch_ops = False

    def __init__(self, name, reasons=(), layout=None, error=None):
        self.name, self.reasons, self.layout, self.error = name, reasons, layout, error
        self.calls = 0

    def unsupported_reasons(self, config):
        return self.reasons

    def required_kv_layout(self, config):
        return self.layout or config.kv_layout

    def forward(self, config, inputs):
        self.calls += 1
        if self.error is not None:
            raise self.error
        return super().forward(config, inputs)


@pytest.fixture
def added():
    """Register a fake with the package's registry for one test."""
    names = []

    def add(backend, priority=100):
        regard.register(backend, priority=priority)
        names.append(backend.name)
        return backend

    yield add
    for name in names:
        if name in regard.list_backends():
            regard.unregister(name)
    package_registry._warned = {key for key in package_registry._warned if key[1] not in names}


def tensors(**options):
    return tuple(torch.randn(1, 4, 1, 8, **options) for _ in range(3))


# Registering


def test_backends_are_listed_by_priority(registry):
    for name, priority in (("low", 1), ("high", 9), ("middle", 5)):
        registry.register(Fake(name), priority=priority)
    assert registry.list_backends() == ["high", "middle", "low"]
    assert registry.select(CONFIG).backend == "high"


@pytest.mark.parametrize("name", ["", "auto", None, 3])
def test_unusable_name_is_refused(registry, name):
    with pytest.raises(ConfigError, match=r"backend\.name"):
        registry.register(Fake(name))


def test_taken_name_is_refused(registry):
    registry.register(Fake("one"))
    with pytest.raises(ConfigError, match="not yet registered"):
        registry.register(Fake("one"))


@pytest.mark.parametrize("priority", ["high", None, float("nan")])
def test_a_priority_that_orders_nothing_is_refused(registry, priority):
    with pytest.raises(ConfigError, match="priority"):
        registry.register(Fake("one"), priority=priority)
    assert registry.list_backends() == []


def test_incomplete_backend_is_refused_with_what_is_missing(registry):
    class Incomplete:
        name = "incomplete"
        forward = unsupported_reasons = None

    with pytest.raises(ConfigError, match="without required_kv_layout, backward"):
        registry.register(Incomplete())


def test_unregister(registry):
    registry.register(Fake("one"))
    registry.set_default("one")
    registry.unregister("one")
    assert registry.list_backends() == [] and registry.requested(None) is None
    with pytest.raises(ConfigError, match="backend: got 'one'"):
        registry.unregister("one")


def test_builtin_backends_satisfy_the_protocol():
    assert "reference" in regard.list_backends()
    for name in regard.list_backends():
        assert isinstance(package_registry.get(name), regard.AttentionBackend)


# Choosing


def test_argument_beats_scope_beats_default(registry):
    for name in ("auto_choice", "default", "scoped", "argument"):
        registry.register(Fake(name))
    assert registry.select(CONFIG).backend == "auto_choice"
    registry.set_default("default")
    assert registry.select(CONFIG).backend == "default"
    with registry.use_backend("scoped"):
        assert registry.select(CONFIG).backend == "scoped"
        assert registry.select(CONFIG, "argument").backend == "argument"
        assert registry.select(CONFIG, "auto").backend == "auto_choice"
        with registry.use_backend("auto"):
            assert registry.select(CONFIG).backend == "auto_choice"
        assert registry.select(CONFIG).backend == "scoped"
    registry.set_default("auto")
    assert registry.select(CONFIG).backend == "auto_choice"


def test_scope_ends_with_an_exception(registry):
    registry.register(Fake("one"))
    with pytest.raises(KeyError), registry.use_backend("one"):
        raise KeyError
    assert registry.requested(None) is None


@pytest.mark.parametrize("choose", ["set_default", "use_backend", "get", "select"])
def test_unknown_name_lists_the_known_ones(registry, choose):
    registry.register(Fake("one"))
    with pytest.raises(ConfigError, match="backend: got 'two', needs 'auto' or one of 'one'"):
        if choose == "use_backend":
            with registry.use_backend("two"):
                pass
        elif choose == "select":
            registry.select(CONFIG, "two")
        else:
            getattr(registry, choose)("two")


def test_other_threads_do_not_see_a_scope(registry):
    registry.register(Fake("auto_choice"))
    registry.register(Fake("scoped"), priority=0)
    seen = []
    with registry.use_backend("scoped"):
        thread = threading.Thread(target=lambda: seen.append(registry.select(CONFIG).backend))
        thread.start()
        thread.join()
        seen.append(registry.select(CONFIG).backend)
    assert seen == ["auto_choice", "scoped"]


def test_no_backend_goes_while_another_thread_chooses(registry):
    asked, gone = threading.Event(), threading.Event()

    class Asked(Fake):
        def unsupported_reasons(self, config):
            asked.set()
            gone.wait(0.05)
            return self.reasons

    registry.register(Asked("asked", reasons=(TOO_WIDE,)), priority=20)
    registry.register(Fake("goes", reasons=(Reason("device", "cpu", "cuda"),)))
    registry.register(Fake("stays"), priority=0)
    thread = threading.Thread(target=lambda: (asked.wait(), registry.unregister("goes"), gone.set()))
    thread.start()
    with pytest.warns(FallbackWarning, match="'asked'"):
        assert registry.select(CONFIG).backend == "stays"
    thread.join()
    assert registry.list_backends() == ["asked", "stays"]


@pytest.mark.parametrize(
    "error",
    [ConfigError("q", (1, 2), "more"), UnsupportedError("no", {"a": (TOO_WIDE,)})],
)
def test_errors_cross_processes(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and str(copy) == str(error) and vars(copy) == vars(error)


def test_tasks_keep_their_own_scope_and_recorder(registry):
    for name in ("one", "two"):
        registry.register(Fake(name))

    async def task(name):
        with registry.use_backend(name), registry.record_selections() as record:
            await asyncio.sleep(0)  # the other task enters its own scope here
            registry.select(CONFIG)
            await asyncio.sleep(0)
            return [selection.backend for _, selection in record]

    async def both():
        return await asyncio.gather(task("one"), task("two"))

    assert asyncio.run(both()) == [["one"], ["two"]]


# Strictness and reasons


def test_named_backend_that_cannot_raises_its_reasons(registry):
    registry.register(Fake("able"))
    registry.register(Fake("unable", [TOO_WIDE]))
    with pytest.raises(UnsupportedError) as raised:
        registry.select(CONFIG, "unable")
    assert raised.value.reasons == {"unable": (TOO_WIDE,)}
    assert "head_dim: got 8, needs at most 4 (use a smaller head)" in str(raised.value)
    assert isinstance(raised.value, NotImplementedError)


def test_nobody_can_raises_everybodys_reasons(registry):
    other = Reason("device", "cpu", "cuda")
    registry.register(Fake("one", [TOO_WIDE]))
    registry.register(Fake("two", [other, TOO_WIDE]))
    with pytest.raises(UnsupportedError) as raised:
        registry.select(CONFIG)
    assert raised.value.reasons == {"one": (TOO_WIDE,), "two": (other, TOO_WIDE)}


def test_kv_layout_a_backend_cannot_read_is_a_reason(registry):
    registry.register(Fake("packed_only", layout=KvCacheLayout.PACKED))
    (reason,) = registry.reasons("packed_only", CONFIG)
    assert (reason.code, reason.required) == ("kv_layout", "packed keys and values")
    packed = dataclasses.replace(CONFIG, varlen=True, total_q=4, total_k=4)
    assert registry.reasons("packed_only", packed) == ()
    with pytest.raises(UnsupportedError, match="kv_layout: got contiguous keys and values"):
        registry.select(CONFIG)


def test_fallback_warns_once_per_cause(registry):
    registry.register(Fake("fast", [TOO_WIDE]))
    registry.register(Fake("slow"), priority=0)
    with pytest.warns(FallbackWarning, match="'slow' serves .* instead of 'fast', which cannot: head_dim") as caught:
        selection = registry.select(CONFIG)
        registry.select(dataclasses.replace(CONFIG, seqlen_q=9))
    assert len(caught) == 1
    assert selection.passed_over == (("fast", (TOO_WIDE,)),)
    registry.get("fast").reasons = [Reason("softcap", "3", "0")]
    with pytest.warns(FallbackWarning, match="softcap"):
        registry.select(CONFIG)


class Yielding(Fake):
    """Supports every call, and leaves those of four queries to another backend."""

    def yields_to(self, config):
        return ("other", Reason("small", "4 queries", "more")) if config.seqlen_q == 4 else None


def test_a_backend_yields_to_a_faster_one(registry):
    registry.register(Yielding("first"), priority=3)
    registry.register(Fake("between"), priority=2)
    registry.register(Fake("other"), priority=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        selection = registry.select(CONFIG)
    assert (selection.backend, selection.strict) == ("other", False)
    assert selection.passed_over == (("first", (Reason("small", "4 queries", "more"),)),)
    assert selection.why == "other: first supports the call too, and yields: small: got 4 queries, needs more"
    assert registry.explain(CONFIG).chosen.backend == "other"
    assert registry.select(dataclasses.replace(CONFIG, seqlen_q=9)).backend == "first"
    assert registry.select(CONFIG, "first").backend == "first"


def test_a_backend_yields_to_none_that_cannot(registry):
    registry.register(Yielding("first"), priority=3)
    registry.register(Fake("between"), priority=2)
    assert registry.select(CONFIG).backend == "first", "the other one is not registered"
    registry.register(Fake("other", [TOO_WIDE]), priority=1)
    assert registry.select(CONFIG).backend == "first"


def test_a_fallback_is_warned_of_where_the_next_one_yields(registry):
    registry.register(Fake("fast", [TOO_WIDE]), priority=4)
    registry.register(Yielding("first"), priority=3)
    registry.register(Fake("other"), priority=1)
    with pytest.warns(FallbackWarning, match="'other' serves .* instead of 'fast', which cannot: head_dim") as caught:
        selection = registry.select(CONFIG)
    assert len(caught) == 1 and [name for name, _ in selection.passed_over] == ["fast", "first"]


@pytest.mark.parametrize("code", ["device", "arch", "not_installed"])
def test_a_backend_of_another_machine_is_no_fallback(registry, code):
    registry.register(Fake("elsewhere", [Reason(code, "this", "that")]))
    registry.register(Fake("here"), priority=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.select(CONFIG).backend == "here"


def test_explain_lists_every_backend_and_raises_nothing(registry):
    registry.register(Fake("fast", [TOO_WIDE]), priority=3)
    registry.register(Fake("chosen"), priority=2)
    registry.register(Fake("spare"), priority=1)
    explanation = registry.explain(CONFIG)
    assert str(explanation).splitlines() == [
        CONFIG.describe(),
        "  fast    head_dim: got 8, needs at most 4 (use a smaller head)",
        "> chosen  supported",
        "  spare   supported",
        "chosen: first in priority without a reason against it",
    ]
    assert explanation.reasons("fast") == (TOO_WIDE,)
    with pytest.warns(FallbackWarning):
        assert explanation.chosen == registry.select(CONFIG)
    by_name = registry.explain(CONFIG, "spare")
    assert by_name.chosen == registry.select(CONFIG, "spare")
    assert registry.explain(CONFIG, "fast").chosen is None
    registry.unregister("chosen")
    registry.unregister("spare")
    assert str(registry.explain(CONFIG)).endswith("no backend supports this call")


def test_recorder_sees_every_call_and_nests():
    q, k, v = tensors()
    with regard.record_selections() as outer:
        regard.attention(q, k, v)
        with regard.record_selections() as inner:
            regard.attention(q, k, v, causal=True, backend="reference")
    assert [config.causal for config, _ in outer] == [False, True]
    assert [(config.causal, chosen.backend, chosen.strict) for config, chosen in inner] == [(True, "reference", True)]
    regard.attention(q, k, v)
    assert len(outer) == 2


# Failing kernels


def test_failing_kernel_is_quarantined_with_one_warning_and_the_next_backend_serves(added):
    broken = added(Fake("broken", error=RuntimeError("ptxas died\nat line 3")))
    q, k, v = tensors()
    with pytest.warns(FallbackWarning) as caught:
        out = regard.attention(q, k, v)
        again = regard.attention(q, k, v)
        longer = regard.attention(torch.cat([q, q], 1), k, v)
    mentions = [str(warning.message) for warning in caught if "'broken'" in str(warning.message)]
    assert len(mentions) == 1 and "RuntimeError: ptxas died" in mentions[0]
    assert broken.calls == 1
    torch.testing.assert_close(out, regard.attention(q, k, v, backend="reference"))
    assert torch.equal(out, again) and longer.shape == (1, 8, 1, 8)
    (reason,) = regard.explain(q, k, v).reasons("broken")
    assert reason.code == "quarantine" and "ptxas died" in reason.observed
    # another kernel of the same backend is still tried
    with pytest.warns(FallbackWarning, match="causal"):
        regard.attention(q, k, v, causal=True)
    assert broken.calls == 2


def test_registering_a_name_again_lifts_its_quarantine(registry):
    registry.register(Fake("one"))
    with pytest.warns(FallbackWarning):
        registry.quarantine("one", CONFIG, RuntimeError("ptxas died"))
    assert registry.reasons("one", CONFIG)
    registry.unregister("one")
    registry.register(Fake("one"))
    assert registry.reasons("one", CONFIG) == ()


def test_failing_kernel_chosen_by_name_raises(added):
    broken = added(Fake("broken", error=RuntimeError("ptxas died")))
    q, k, v = tensors()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="ptxas died"):
            regard.attention(q, k, v, backend="broken")
    assert broken.calls == 2, "an explicit choice is never quarantined"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), ConfigError("q", "bad", "good")])
def test_errors_that_are_not_the_kernels_are_raised_and_not_quarantined(added, error):
    added(Fake("honest", error=error))
    q, k, v = tensors()
    with pytest.raises(type(error)):
        regard.attention(q, k, v)
    assert regard.explain(q, k, v).reasons("honest") == ()


# Entry points


def test_entry_points_are_registered_and_a_broken_one_is_only_a_warning(monkeypatch):
    class EntryPoint:
        def __init__(self, name, load):
            self.name, self.load = name, load

    def broken():
        raise ImportError("no such module")

    groups = []

    def entry_points(*, group):
        groups.append(group)
        return [EntryPoint("bad", broken), EntryPoint("good", lambda: lambda: Fake("plugged_in"))]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    registry = regard.Registry()
    with pytest.warns(FallbackWarning, match="'bad' was not registered: ImportError"):
        assert registry.list_backends() == ["plugged_in"]
    assert registry.list_backends() == ["plugged_in"]
    assert groups == ["regard.backends"], "read once"


# can_use_flash_attention


def test_can_use_flash_attention_asks_the_flash_backends():
    on_gpu = dataclasses.replace(CONFIG, device="cuda", arch="sm90")
    expected = any(
        name in ("flash", "hopper") and not package_registry.reasons(name, on_gpu) for name in regard.list_backends()
    )
    assert regard.can_use_flash_attention(on_gpu) == expected
    assert not regard.can_use_flash_attention(dataclasses.replace(on_gpu, dtype=torch.float64))
