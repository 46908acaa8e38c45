"""Derivatives beyond the conformance cases' first ones, and what training code wraps around a call."""

import warnings

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import regard
from regard import ops
from regard.backends.reference import ReferenceBackend
from regard.registry import registry


class Fused(ReferenceBackend):
    """The reference as a backend made of kernels would be: nothing sees through it."""

    name = "fused"
    composed_of_torch_ops = False


@pytest.fixture(autouse=True)
def fused():
    regard.register(Fused(), priority=-1)
    yield
    regard.unregister("fused")


@pytest.fixture(autouse=True)
def unwarned():
    ops._warn_of_second_derivative.cache_clear()
    registry._warned.clear()
    torch.manual_seed(0)


def leaves(*shapes, dtype=torch.float64):
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def qkv(batch=1, seqlen_q=3, seqlen_k=4, heads=2, heads_kv=1, head_dim=3, **options):
    kv = (batch, seqlen_k, heads_kv, head_dim)
    return leaves((batch, seqlen_q, heads, head_dim), kv, kv, **options)


def everything(backend):
    """A differentiable function of q, k, v, bias and sinks with a row that sees nothing, and a point for it."""
    mask = torch.tensor([[True, True, False, True], [False] * 4, [True] * 4])

    def function(q, k, v, bias, sinks):
        return regard.attention(q, k, v, bias=bias, sinks=sinks, mask=mask, causal=True, softcap=2.0, return_lse=True,
                                backend=backend)  # fmt: skip

    return function, [*qkv(), *leaves((1, 1, 1, 4), (2,))]


@pytest.mark.parametrize("backend", ["reference", "cpu", "fused"])
def test_second_derivatives(backend):
    function, point = everything(backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.autograd.gradcheck(function, point)
        assert torch.autograd.gradgradcheck(function, point)


@pytest.mark.parametrize("backend", ["cpu", "fused"])
def test_second_derivatives_of_packed_sequences(backend):
    offsets_q, offsets_k = (torch.tensor(n, dtype=torch.int32) for n in ([0, 2, 2, 5], [0, 3, 4, 6]))

    def function(q, k, v):
        return regard.varlen_attention(q, k, v, offsets_q, offsets_k, causal=True, backend=backend)

    with pytest.warns(regard.FallbackWarning, match="second derivative"):
        assert torch.autograd.gradgradcheck(function, leaves((5, 2, 3), (6, 1, 3), (6, 1, 3)))


def test_shared_inputs_and_third_derivatives():
    """k depends on q, so partial derivatives must not be taken for total ones."""

    def third(backend):
        (q,) = leaves((1, 3, 1, 2))
        total = regard.attention(q, q.sin(), q * 2, backend=backend).square().sum()
        for _ in range(2):
            (gradient,) = torch.autograd.grad(total, q, create_graph=True)
            total = gradient.square().sum()
        return torch.autograd.grad(total, q)[0]

    torch.manual_seed(1)
    expected = third("reference")
    torch.manual_seed(1)
    with pytest.warns(regard.FallbackWarning, match="second derivative"):
        torch.testing.assert_close(third("fused"), expected)


def test_second_derivative_warns_once_and_only_when_asked_for():
    def penalty():
        q, k, v = qkv()
        (gradient,) = torch.autograd.grad(regard.attention(q, k, v).sum(), q, create_graph=True)
        return gradient.square().sum()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = penalty()
    with pytest.warns(regard.FallbackWarning, match="'cpu' has no second derivative.*quadratic") as seen:
        first.backward()
        penalty().backward()
    assert len(seen) == 1


@pytest.mark.filterwarnings("error")
def test_an_empty_call_has_second_derivatives_of_zero():
    q, k, v = qkv(seqlen_k=0)
    (gradient,) = torch.autograd.grad(regard.attention(q, k, v).sum(), q, create_graph=True)
    assert not torch.autograd.grad(gradient.sum(), q, allow_unused=True, materialize_grads=True)[0].any()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_draws_the_same_dropout(use_reentrant):
    def run(wrap):
        torch.manual_seed(3)
        q, k, v = qkv(2, 16, 16, 4, 2, 8, dtype=torch.float32)

        def block(q):
            return regard.attention(q * 2, k, v, causal=True, dropout_p=0.3).sin()

        out = wrap(block, q)
        out.sum().backward()
        return out, q.grad

    plain = run(lambda block, q: block(q))
    saved = run(lambda block, q: checkpoint(block, q, use_reentrant=use_reentrant))
    torch.testing.assert_close(saved, plain, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["cpu", "reference", "fused"])
def test_autocast_training_step(backend):
    """Computed in bfloat16, gradients in float32; a backend's own operations are not cast a second time."""
    torch.manual_seed(0)
    x = torch.randn(2, 16, 32)
    project, merge = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)

    def step(inside):
        with torch.autocast("cpu", torch.bfloat16):
            q, k, v = project(x).unflatten(-1, (3, 4, 8)).unbind(2)
            out = regard.attention(q.float(), k.float(), v.float(), causal=True, backend=backend)
            assert out.dtype == torch.bfloat16
            loss = merge(out.flatten(2)).float().square().mean()
            if inside:
                return torch.autograd.grad(loss, project.weight)[0]
        return torch.autograd.grad(loss, project.weight)[0]

    q, k, v = project(x).unflatten(-1, (3, 4, 8)).unbind(2)
    full = merge(regard.attention(q, k, v, causal=True, backend=backend).flatten(2)).square().mean()
    expected = torch.autograd.grad(full, project.weight)[0]
    for inside in (False, True):
        found = step(inside)
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 0.02 * expected.norm()

    half = [t.detach().bfloat16().requires_grad_() for t in (q, k, v)]

    def exactly():
        out, lse = regard.attention(*half, return_lse=True, backend=backend)
        return out, lse, *torch.autograd.grad(out.float().square().sum() + lse.sum(), half)

    with torch.autocast("cpu", torch.bfloat16):
        inside = exactly()
    compared = 2 if backend == "reference" else 5  # torch casts the backward of its own operations inside autocast
    torch.testing.assert_close(inside[:compared], exactly()[:compared], rtol=0, atol=0)


def test_compiled_training_step_is_the_eager_one():
    torch._dynamo.reset()
    block = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

    def step(x):
        q, k, v = torch.nn.functional.linear(x, block.self_attn.in_proj_weight).unflatten(-1, (3, 2, 8)).unbind(2)
        return block.linear2(block.linear1(regard.attention(q, k, v, causal=True).flatten(2)).relu()).square().mean()

    x = torch.randn(2, 9, 16)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    parameters = [block.self_attn.in_proj_weight, block.linear1.weight, block.linear2.weight]
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x), parameters), torch.autograd.grad(step(x), parameters), rtol=1e-5, atol=1e-6
    )
    torch._dynamo.reset()


def mapped_calls():
    """Arguments of a call with one more dimension in front of those that are mapped over, and in_dims."""
    normal = torch.randn
    q, k, v = normal(3, 2, 5, 4, 8), normal(3, 2, 6, 2, 8), normal(3, 2, 6, 2, 8)
    shared = {"q": (q, 0), "k": (k[0], None), "v": (v[0], None)}
    full = {"q": (q, 0), "k": (k, 0), "v": (v, 0)}
    return {
        "q_only": shared,
        "all": full,
        "mask_shared": {**full, "mask": (torch.rand(1, 1, 5, 6) < 0.7, None)},
        "mask_and_bias": {**full, "mask": (torch.rand(3, 5, 6) < 0.7, 0), "bias": (normal(3, 2, 1, 1, 6), 0)},
        "bias_of_batch_shared": {**full, "bias": (normal(2, 1, 1, 6), None)},
        "alibi": {**full, "alibi_slopes": (torch.rand(4), None)},
        "alibi_mapped": {**shared, "alibi_slopes": (torch.rand(3, 4), 0)},
        "alibi_of_batch": {**full, "alibi_slopes": (torch.rand(2, 4), None)},
        "sinks": {**full, "sinks": (normal(4), None)},
        "sinks_mapped": {**full, "sinks": (normal(3, 4), 0)},
        "kv_lens": {**full, "kv_lens": (torch.tensor([[1, 2], [6, 0], [4, 5]], dtype=torch.int32), 0)},
        "kv_lens_shared": {**full, "kv_lens": (torch.tensor([1, 5], dtype=torch.int32), None)},
    }


@pytest.mark.parametrize("name", mapped_calls())
def test_vmap_is_a_loop_over_calls(name):
    call = mapped_calls()[name]
    names, tensors, in_dims = list(call), [t for t, _ in call.values()], tuple(dim for _, dim in call.values())

    def function(*tensors):
        return regard.attention(**dict(zip(names, tensors, strict=True)), causal=True, return_lse=True, backend="fused")

    looped = [
        function(*(t if dim is None else t[i] for t, dim in zip(tensors, in_dims, strict=True))) for i in range(3)
    ]
    found = torch.func.vmap(function, in_dims=in_dims)(*tensors)
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*looped, strict=True))))


def test_vmap_of_packed_sequences_and_gradients_of_vmap():
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32)

    def function(q):
        return regard.varlen_attention(q, q, q, offsets, offsets, 3, 3, backend="fused")

    q = torch.randn(3, 5, 2, 4, requires_grad=True)
    seed = torch.randn(3, 5, 2, 4)
    found = torch.func.vmap(function)(q)
    looped = torch.stack([function(each) for each in q])
    torch.testing.assert_close(found, looped)
    torch.testing.assert_close(*(torch.autograd.grad(out, q, seed) for out in (found, looped)))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("backend", ["fused", "cpu"])
def test_a_jacobian_may_batch_the_gradients(backend):
    q, k, v = qkv(head_dim=2)
    batched, looped = (
        torch.autograd.functional.jacobian(lambda q: regard.attention(q, k, v, backend=backend), q, vectorize=vectorize)
        for vectorize in (True, False)
    )
    torch.testing.assert_close(batched, looped)


def transforms(function, q):
    """By name: derivatives that torch.func or forward-mode differentiation compute."""

    def tangent():
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(q, torch.ones_like(q)))).tangent

    return {
        "grad": lambda: torch.func.grad(lambda q: function(q).sin().sum())(q),
        "grad of vmap": lambda: torch.func.grad(lambda q: torch.func.vmap(function)(q[None]).sin().sum())(q),
        "vmap of grad": lambda: torch.func.vmap(torch.func.grad(lambda q: function(q).sin().sum()))(q[None])[0],
        "jvp": lambda: torch.func.jvp(function, (q,), (torch.ones_like(q),))[1],
        "forward mode": tangent,
    }


@pytest.mark.parametrize("name", transforms(None, None))
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_transforms_are_right_or_refused(name):
    """A kernel sees none of these derivatives: refused by name, while automatic selection finds what can serve them."""
    q = torch.randn(1, 4, 2, 3, dtype=torch.float64)
    k, v = torch.randn(2, 1, 4, 2, 3, dtype=torch.float64)

    def served_by(backend):
        return transforms(lambda q: regard.attention(q, k, v, causal=True, backend=backend), q)[name]()

    for backend in ("fused", "cpu", "sdpa"):
        with pytest.raises(regard.UnsupportedError, match="transform"):
            served_by(backend)
    with pytest.warns(regard.FallbackWarning, match="transform"):
        found = served_by(None)
    point = q.clone().requires_grad_()
    out = regard.attention(point, k, v, causal=True, backend="reference")
    if "grad" in name:
        (expected,) = torch.autograd.grad(out.sin().sum(), point)
    else:
        seed = torch.zeros_like(out, requires_grad=True)
        (pulled,) = torch.autograd.grad(out, point, seed, create_graph=True)
        (expected,) = torch.autograd.grad(pulled, seed, torch.ones_like(point))
    torch.testing.assert_close(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("training", [False, True], ids=["forward", "forward_and_backward"])
def test_a_captured_graph_computes_on_new_values(training):
    q, k, v = (
        torch.randn(2, 256, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=training) for _ in range(3)
    )
    seed = torch.randn_like(q)

    def step():
        out = regard.attention(q, k, v, causal=True, window=(100, 0))
        return (out, *torch.autograd.grad(out, (q, k, v), seed)) if training else (out,)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels compile before the capture
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for tensor in (q, k, v):
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    torch.testing.assert_close(captured, step(), rtol=1e-2, atol=1e-2)
