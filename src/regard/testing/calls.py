"""From a case to a call: draws the tensors, lays them out, and makes the public call on any backend and dtype."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard import api
from regard.config import AttentionConfig
from regard.testing.cases import STRIDES, Case


@dataclass(frozen=True)
class Call:
    """One call of a public function, ready to be made on any backend and in any dtype.

    Attributes:
        tensors: by argument name of `regard.AttentionConfig.from_tensors`.
        options: the other arguments.
        seed: of the dropout mask.
    """

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    seed: int

    def __call__(self, backend: str, **overrides: Any) -> Any:
        """Make the call with ``backend`` chosen by name."""
        tensors = dict(self.tensors)
        q, k, v = tensors.pop("q"), tensors.pop("k"), tensors.pop("v")
        with self._seeded():
            return self._function(q, k, v, **tensors, **{**self.options, **overrides}, backend=backend)

    @property
    def _function(self) -> Callable[..., Any]:
        function: Callable[..., Any] = api.attention
        if "cu_seqlens_q" in self.tensors:
            function = api.varlen_attention
        elif "block_table" in self.tensors:
            function = api.paged_attention
        return function

    def config(self, **overrides: Any) -> AttentionConfig:
        """The configuration the call is selected by."""
        arguments: dict[str, Any] = {**self.tensors, **self.options, **overrides}
        return AttentionConfig.from_tensors(**arguments)

    def in_float64(self) -> Call:
        """The same call on the same values in float64."""
        return self._with({name: t.double() if t.is_floating_point() else t for name, t in self.tensors.items()})

    def with_leaves(self) -> Call:
        """The same call with q, k, v, bias and sinks as leaves that want a gradient."""
        wanted = ("q", "k", "v", "bias", "sinks")
        return self._with({name: t.detach().requires_grad_(name in wanted) for name, t in self.tensors.items()})

    def leaves(self) -> dict[str, Tensor]:
        """The tensors that want a gradient."""
        return {name: t for name, t in self.tensors.items() if t.requires_grad}

    def dropout_seed(self, config: AttentionConfig) -> Tensor | None:
        """The seed the call draws."""
        with self._seeded():
            return api._draw_seed(config, self.tensors["q"])

    def _with(self, tensors: dict[str, Tensor]) -> Call:
        return Call(tensors, self.options, self.seed)

    @contextlib.contextmanager
    def _seeded(self) -> Iterator[None]:
        """Torch's generator at the call's seed, where the call draws from it: seeding takes milliseconds."""
        if "dropout_p" not in self.options:
            yield
            return
        device = self.tensors["q"].device
        on_cpu = device.type == "cpu"
        with torch.random.fork_rng([] if on_cpu else [device], device_type="cuda" if on_cpu else device.type):
            torch.manual_seed(self.seed)
            yield


def make_inputs(
    case: Case, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Call:
    """Draw a case's tensors: standard normal values, the same on every device, laid out as the case says."""
    generator = torch.Generator("cpu").manual_seed(seed)
    sizes = _Sizes.of(case)

    def normal(*shape: int, factor: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator, device="cpu") * factor).to(device=device, dtype=dtype)

    head_dim_v = case.head_dim if case.head_dim_v is None else case.head_dim_v
    q = normal(*sizes.rows, case.heads_q, case.head_dim, factor=case.logits)
    k = normal(*sizes.keys, case.heads_kv, case.head_dim)
    v = normal(*sizes.keys, case.heads_kv, head_dim_v)
    if case.nan_query:
        q[0, 3, 1, case.head_dim // 2] = float("nan")
    tensors: dict[str, Tensor] = {}
    if case.kv_lens is not None and case.page_size is None:
        for sequence, length in enumerate(case.kv_lens):
            k[sequence, length:], v[sequence, length:] = float("nan"), float("nan")
        tensors["kv_lens"] = torch.tensor(case.kv_lens, dtype=torch.int32, device=device)
    if case.page_size is not None:
        tensors |= _page_table(case, k, v, generator)
    for side, lengths in (("q", case.lens_q), ("k", case.lens_k)):
        if lengths is not None:
            offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
            tensors[f"cu_seqlens_{side}"] = torch.tensor(offsets, dtype=torch.int32, device=device)

    full = dict(zip("bhqk", (sizes.batch, case.heads_q, case.seqlen_q, case.seqlen_k), strict=True))
    if case.mask is not None:
        shape = [full[letter] if letter in full else 1 for letter in case.mask]
        mask = torch.rand(shape, generator=generator, device="cpu") < 0.7
        tensors["mask"] = _hide(mask, case.mask, False).to(device) if case.empty_rows else mask.to(device)
    if case.bias is not None:
        bias = normal(*(full[letter] if letter in full else 1 for letter in case.bias), dtype=case.bias_dtype or dtype)
        if case.empty_rows:
            bias[..., ::5] = float("-inf")
            bias = _hide(bias, case.bias, float("-inf"))
        tensors["bias"] = bias
    if case.alibi is not None:
        slopes = torch.rand((sizes.batch, case.heads_q), generator=generator, device="cpu") * 0.5
        tensors["alibi_slopes"] = (slopes if case.alibi == "bh" else slopes[0]).to(device)
    if case.sinks:
        tensors["sinks"] = normal(case.heads_q)

    lay_out = STRIDES[case.strides]
    order = (1, 2) if case.layout == "bhsd" else (1, 1)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        tensors[name] = (lay_out(tensor) if tensor.numel() else tensor).transpose(*order)
    options: dict[str, Any] = {"causal": case.causal, "window": case.window, "softcap": case.softcap}
    if case.softmax_scale is not None:
        options["softmax_scale"] = case.softmax_scale
    if case.dropout_p:
        options["dropout_p"] = case.dropout_p
    if case.layout != "bshd":
        options["layout"] = case.layout
    return Call(tensors, options, seed)


@dataclass(frozen=True)
class _Sizes:
    """Leading dimensions of q and of k and v."""

    batch: int
    rows: tuple[int, ...]
    keys: tuple[int, ...]

    @classmethod
    def of(cls, case: Case) -> _Sizes:
        if case.lens_q is not None and case.lens_k is not None:
            return cls(len(case.lens_q), (sum(case.lens_q),), (sum(case.lens_k),))
        keys = (case.batch, case.seqlen_k)
        if case.page_size is not None and case.kv_lens is not None:
            pages = sum(math.ceil(length / case.page_size) for length in case.kv_lens)
            keys = (pages + 3, case.page_size)
        return cls(case.batch, (case.batch, case.seqlen_q), keys)


def _hide(tensor: Tensor, pattern: str, value: float) -> Tensor:
    """Hide every key from some rows, whichever dimensions the tensor has."""
    if pattern[2] == "q":
        tensor[..., 2::9, :] = value
    else:
        tensor[0] = value
    return tensor


def _page_table(case: Case, k: Tensor, v: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Scatter the sequences over the pages; what no sequence holds becomes NaN, unused table entries become garbage."""
    assert case.page_size is not None and case.kv_lens is not None
    order = torch.randperm(k.shape[0], generator=generator, device="cpu").tolist()
    counts = [math.ceil(length / case.page_size) for length in case.kv_lens]
    table = torch.full((case.batch, max(counts) + 1), 2**30, dtype=torch.int32, device="cpu")
    used = torch.zeros(k.shape[:2], dtype=torch.bool, device=k.device)
    for sequence, (length, count) in enumerate(zip(case.kv_lens, counts, strict=True)):
        for page in range(count):
            table[sequence, page] = order.pop()
            used[table[sequence, page], : length - page * case.page_size] = True
    for cache in (k, v):
        cache[~used.to(cache.device)] = float("nan")
    lengths = torch.tensor(case.kv_lens, dtype=torch.int32, device="cpu")
    return {"block_table": table.to(k.device), "kv_lens": lengths.to(k.device)}
