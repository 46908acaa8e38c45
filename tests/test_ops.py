"""torch's side of the calls: custom ops, fakes, compilation without a recompile per length."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import TorchRuntimeError
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard import ops
from regard.backends.reference import ReferenceBackend
from regard.testing import CASES, make_inputs


class Opaque(ReferenceBackend):
    """The reference, hidden from tracers: a stand-in for a backend made of kernels."""

    name = "opaque"
    composed_of_torch_ops = False


@pytest.fixture(autouse=True)
def opaque():
    regard.register(Opaque(), priority=-1)
    yield
    regard.unregister("opaque")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


OP_CASES = (
    "odd_lengths strides_heads_outside strides_head_dim_outside strides_expanded layout_bhsd head_dim_v_larger "
    "mask_b11k bias_1hqk kv_lens varlen paged_decode no_keys everything"
).split()


def op_arguments(name, requires_grad=False):
    """The arguments that `regard.attention` hands to the custom op for a case."""
    call = make_inputs(next(case for case in CASES if case.name == name))
    if requires_grad:
        call = call.with_leaves()
    config = call.config()
    tensors = dict(call.tensors)
    if call.options.get("layout") == "bhsd":
        tensors |= {name: tensors[name].transpose(1, 2).detach().requires_grad_(requires_grad) for name in "qkv"}
    inputs = regard.AttentionInputs(**tensors, dropout_seed=call.dropout_seed(config))
    return (*inputs, *ops._scalars(config), "opaque", True)


@pytest.mark.parametrize("name", OP_CASES)
def test_opcheck_of_the_forward(name):
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ops.attention_fwd, op_arguments(name), test_utils=checks)


@pytest.mark.parametrize("name", OP_CASES)
def test_opcheck_with_gradients(name):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.attention_fwd, op_arguments(name, requires_grad=True), test_utils=checks)


@pytest.mark.parametrize("name", OP_CASES)
def test_fake_has_the_shapes_strides_and_dtypes_of_the_real(name):
    arguments = op_arguments(name)
    real = ops.attention_fwd(*arguments)
    with torch._subclasses.FakeTensorMode() as mode:
        faked = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        fake = ops.attention_fwd(*faked)
    for r, f in zip(real, fake, strict=True):
        assert (f.shape, f.stride(), f.dtype, f.device) == (r.shape, r.stride(), r.dtype, r.device)


# Sizes of the first call differ from one another: torch.compile takes equal ones for the same symbol.
LENGTHS = [(3, 7, 9), (2, 16, 40), (3, 33, 33), (5, 12, 8)]
PACKED_LENGTHS = [(3, 9, 5), (8, 2, 30), (5, 5, 5, 5)]


def attend(q, k, v, **options):
    return regard.attention(q, k, v, causal=True, softcap=5.0, **options) * 2


@pytest.mark.parametrize("backend", ["reference", "opaque"])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_compiles_whole_and_once_for_every_length(backend, layout):
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def compiled(q, k, v, kv_lens):
        return attend(q, k, v, kv_lens=kv_lens, layout=layout, backend=backend)

    for batch, seqlen_q, seqlen_k in LENGTHS:
        q, k, v = (torch.randn(batch, n, h, 16) for n, h in ((seqlen_q, 4), (seqlen_k, 2), (seqlen_k, 2)))
        if layout == "bhsd":
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        kv_lens = torch.randint(1, seqlen_k, (batch,), dtype=torch.int32)
        out = compiled(q, k, v, kv_lens)
        expected = attend(q, k, v, kv_lens=kv_lens, layout=layout, backend=backend)
        torch.testing.assert_close(out, expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["reference", "opaque"])
def test_varlen_compiles_whole_and_once(backend):
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def compiled(q, k, v, offsets, longest):
        return regard.varlen_attention(q, k, v, offsets, offsets, longest, longest, backend=backend) * 2

    for lengths in PACKED_LENGTHS:
        offsets = torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32)
        q, k, v = (torch.randn(sum(lengths), 2, 16) for _ in range(3))
        expected = regard.varlen_attention(q, k, v, offsets, offsets, backend=backend) * 2
        torch.testing.assert_close(compiled(q, k, v, offsets, max(lengths)), expected)
    assert counter.frame_count == 1


def test_training_step_compiles_whole_and_once():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def compiled(q, k, v, bias, sinks):
        out, lse = regard.attention(q, k, v, bias=bias, sinks=sinks, causal=True, return_lse=True, backend="opaque")
        return (out.sin().sum() + lse.cos().sum()) * 2

    for batch, seqlen_q, seqlen_k in LENGTHS[:3]:
        shapes = (batch, seqlen_q, 4, 16), (batch, seqlen_k, 2, 16), (batch, seqlen_k, 2, 24), (4, 1, seqlen_k), (4,)
        leaves = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
        found = torch.autograd.grad(compiled(*leaves), leaves)
        q, k, v, bias, sinks = leaves
        out, lse = regard.attention(q, k, v, bias=bias, sinks=sinks, causal=True, return_lse=True, backend="reference")
        expected = torch.autograd.grad((out.sin().sum() + lse.cos().sum()) * 2, leaves)
        torch.testing.assert_close(found, expected)
    assert counter.frame_count == 1


def test_automatic_dynamic_needs_two_graphs_at_most():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for seqlen in (5, 9, 17, 31, 64):
        q, k, v = (torch.randn(2, seqlen, 2, 16) for _ in range(3))
        torch.testing.assert_close(compiled(q, k, v, backend="opaque"), attend(q, k, v))
    assert counter.frame_count <= 2


def test_automatic_selection_takes_symbolic_sizes():
    """Every size a symbol: heads and head dims too."""
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    options = dict(mask=torch.rand(2, 1, 5, 9) < 0.8, bias=torch.randn(4, 5, 9), window=(3, 2), sinks=torch.randn(4))
    q, k, v = torch.randn(2, 5, 4, 16), torch.randn(2, 9, 2, 16), torch.randn(2, 9, 2, 24)
    torch.testing.assert_close(compiled(q, k, v, **options), attend(q, k, v, **options))


def test_the_graph_keeps_the_backend_it_was_traced_with():
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(attend, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    q, k, v = (torch.randn(1, 4, 2, 16) for _ in range(3))
    with regard.use_backend("opaque"):
        compiled(q, k, v)
    compiled(q, k, v)
    (graph,) = graphs
    (node,) = (node for node in graph.graph.nodes if node.target is torch.ops.regard.attention_fwd.default)
    assert node.args[-2:] == ("opaque", True)


def test_eager_calls_skip_the_dispatcher(monkeypatch):
    monkeypatch.setattr(ops, "attention_fwd", None)
    q, k, v = (torch.randn(1, 4, 2, 16) for _ in range(3))
    assert regard.attention(q, k, v, backend="opaque").shape == (1, 4, 2, 16)


def counted(function):
    """FLOPs that torch counts while the function runs, by op."""
    with FlopCounterMode(display=False) as counter:
        function()
    return {str(op): flops for op, flops in counter.get_flop_counts().get("Global", {}).items()}


@pytest.mark.parametrize("compiled", [False, True])
def test_torch_counts_our_flops(compiled, monkeypatch):
    """Also where its counter was there first: it copies the formulas that it knows at its beginning."""
    for op in (torch.ops.regard.attention_fwd, torch.ops.regard.attention_bwd):
        monkeypatch.delitem(flop_counter.flop_registry, op, raising=False)
    q, k, v = (torch.randn(2, length, heads, 8, requires_grad=True) for length, heads in ((9, 4), (13, 2), (13, 2)))
    config = regard.AttentionConfig.from_tensors(q, k, v, causal=True, window=(5, 0))
    call = torch.compile(regard.attention, backend="aot_eager") if compiled else regard.attention

    def step():
        call(q, k, v, causal=True, window=(5, 0), backend="opaque").sum().backward()

    forward, backward = config.flops(), config.flops(backward=True)
    assert backward == 2.5 * forward > 0
    assert counted(step) == {"regard.attention_fwd": forward, "regard.attention_bwd": backward}
    out = regard.attention(q, k, v, causal=True, window=(5, 0), backend="opaque")
    assert counted(lambda: out.sum().backward()) == {"regard.attention_bwd": backward}
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert counted(step) == {"regard.attention_fwd": forward, "regard.attention_bwd": backward}


def test_torch_counts_each_packed_sequence_at_its_own_length():
    q = torch.randn(10, 2, 8)
    cu_seqlens = torch.tensor([0, 1, 1, 10], dtype=torch.int32)

    def call():
        return regard.varlen_attention(q, q, q, cu_seqlens, cu_seqlens, 9, 9, causal=True, backend="opaque")

    assert counted(call) == {"regard.attention_fwd": 2 * 2 * (1 + 45) * (8 + 8)}
    longest = {"regard.attention_fwd": 2 * 2 * 3 * 45 * (8 + 8)}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        q, cu_seqlens = mode.from_tensor(q), mode.from_tensor(cu_seqlens)
        assert counted(call) == longest


@pytest.mark.parametrize(
    "malformed",
    [{"window": ()}, {"window": (1,)}, {"window": (True, 2)}, {"window": (-1, 2)}, {"causal": 1}, {"causal": None},
     {"return_lse": 1}, {"deterministic": 0}, {"softcap": True}, {"softmax_scale": float("nan")}],
    ids=str,
)  # fmt: skip
def test_compiled_calls_refuse_what_eager_ones_do(malformed):
    q = torch.randn(1, 4, 2, 16)
    with pytest.raises(regard.ConfigError) as eager:
        regard.attention(q, q, q, **malformed)
    with pytest.raises(TorchRuntimeError) as compiled:  # torch wraps whatever happens while it traces
        torch.compile(regard.attention, backend="aot_eager")(q, q, q, **malformed)
    assert repr(eager.value) in str(compiled.value)
