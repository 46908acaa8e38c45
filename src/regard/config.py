"""`AttentionConfig`: everything selection may depend on, and the one validator of arguments.

A config holds no tensors, so the same object describes a call that is about to run and a call somebody only asks about
(`regard explain --arch gfx1100` on a laptop).
"""

from __future__ import annotations

import enum
import functools
import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard import lengths
from regard.errors import ConfigError
from regard.tracing import is_transformed, requires_grad

LAYOUTS = ("bshd", "bhsd")
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


DIFFERENTIABLE_INPUTS = ("q", "k", "v", "bias", "sinks")
"""The fields of `AttentionInputs` that get a gradient."""


class KvCacheLayout(enum.Enum):
    """How keys and values lie in memory."""

    CONTIGUOUS = "contiguous"
    """(B, Sk, Hk, D), any strides: one run of keys a sequence, padded to the longest."""
    PACKED = "packed"
    """(total_k, Hk, D) with ``cu_seqlens_k``: sequences back to back, no padding."""
    PAGED = "paged"
    """(num_pages, page_size, Hk, D) with a ``block_table`` (B, pages_per_sequence)."""


class AttentionInputs(NamedTuple):
    """The tensors of one call in canonical form, as every backend receives them.

    q is (B, Sq, Hq, D), k (B, Sk, Hk, D), v (B, Sk, Hk, Dv). Packed sequences: (total, H, D). Paged: k and v are
    (num_pages, page_size, Hk, D). mask and bias are 4-D with size 1 on broadcast dimensions.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    kv_lens: Tensor | None = None
    block_table: Tensor | None = None
    dropout_seed: Tensor | None = None

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Of the output: q's, with v's head dim."""
        *rows, _ = self.q.shape
        return (*rows, self.v.shape[-1])

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """(B, Hq, Sq), or packed (Hq, total_q)."""
        *batch, rows, heads, _ = self.q.shape
        return (*batch, heads, rows)


@dataclass(frozen=True)
class AttentionConfig:
    """One attention problem, described without its tensors. Construction validates; see `from_tensors`.

    Attributes:
        batch: B, or the number of packed sequences.
        seqlen_q, seqlen_k: query and key lengths; the longest sequence's where ``varlen``, the padded capacity where
            ``kv_lens`` or ``page_size`` is set.
        heads_q, heads_kv: Hq and Hk; Hq is a multiple of Hk (GQA, MQA).
        head_dim, head_dim_v: D of q and k, Dv of v and the output.
        dtype: of q, k and v.
        device: torch device type (``"cpu"``, ``"cuda"``; ROCm is ``"cuda"`` too).
        arch: ``"cpu"``, ``"sm90"``, ``"gfx1100"``, ...
        softmax_scale: factor on q @ k.T; default ``head_dim ** -0.5``.
        causal: key j is visible to query i iff ``j <= i + Sk - Sq``.
        window: inclusive ``(left, right)`` around ``i + Sk - Sq``; ``None`` is unlimited on that side.
        softcap: 0 is off; else ``s = softcap * tanh(s / softcap)``.
        mask_shape, bias_shape: 4-D shapes before broadcasting, or None.
        bias_dtype, bias_requires_grad: of the additive bias; default dtype and False.
        alibi, sinks: whether ALiBi slopes, sink logits are given.
        dropout_p: probability that an attention weight is dropped.
        varlen: packed sequences with cu_seqlens; ``total_q`` and ``total_k`` are their summed lengths.
        kv_lens: whether per-sequence key lengths are given.
        page_size: keys a page of a paged KV cache, or None.
        return_lse: whether the caller wants the log-sum-exp.
        requires_grad: whether a gradient will be asked for.
        deterministic: whether that gradient must be bitwise repeatable.
        transformed: whether torch.func.grad, jvp or forward-mode differentiation want derivatives.
        q_strides, k_strides, v_strides: in elements; None stands for contiguous.
    """

    batch: int
    seqlen_q: int
    seqlen_k: int
    heads_q: int
    heads_kv: int
    head_dim: int
    head_dim_v: int = None  # type: ignore[assignment]  # head_dim, once constructed
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    arch: str = "cpu"
    softmax_scale: float = None  # type: ignore[assignment]  # head_dim ** -0.5, once constructed
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    softcap: float = 0.0
    mask_shape: tuple[int, ...] | None = None
    bias_shape: tuple[int, ...] | None = None
    bias_dtype: torch.dtype | None = None
    bias_requires_grad: bool = False
    alibi: bool = False
    sinks: bool = False
    dropout_p: float = 0.0
    varlen: bool = False
    total_q: int | None = None
    total_k: int | None = None
    kv_lens: bool = False
    page_size: int | None = None
    return_lse: bool = False
    requires_grad: bool = False
    deterministic: bool = False
    transformed: bool = False
    q_strides: tuple[int, ...] | None = None
    k_strides: tuple[int, ...] | None = None
    v_strides: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.head_dim_v is None:
            object.__setattr__(self, "head_dim_v", self.head_dim)
        _check_sizes(self)
        if self.softmax_scale is None:
            object.__setattr__(self, "softmax_scale", self.head_dim**-0.5)
        if self.bias_shape is not None and self.bias_dtype is None:
            object.__setattr__(self, "bias_dtype", self.dtype)
        if isinstance(self.window, tuple) and self.window == (None, None):
            object.__setattr__(self, "window", None)
        _check_semantics(self)

    @classmethod
    def from_tensors(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layout: str = "bshd",
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        kv_lens: Tensor | None = None,
        block_table: Tensor | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window: tuple[int | None, int | None] | None = None,
        softcap: float = 0.0,
        dropout_p: float = 0.0,
        return_lse: bool = False,
        deterministic: bool = False,
        requires_grad: bool | None = None,
        bias_requires_grad: bool | None = None,
    ) -> AttentionConfig:
        """Describe and validate a call.

        Takes the arguments of `regard.attention`, `regard.varlen_attention` and `regard.paged_attention`, as the user
        wrote them, and ``requires_grad`` and ``bias_requires_grad`` to overrule what tensors and grad mode say. The
        values inside ``cu_seqlens``, ``kv_lens`` and ``block_table`` are checked where that needs no device
        synchronisation, and once per tensor version for ``cu_seqlens`` on a GPU.

        Raises:
            ConfigError: naming the argument, what was seen and what is needed.
        """
        varlen = cu_seqlens_q is not None or cu_seqlens_k is not None
        paged = block_table is not None
        if layout not in LAYOUTS:
            raise ConfigError("layout", repr(layout), f"one of {', '.join(map(repr, LAYOUTS))}")
        _check_qkv(q, k, v, rank_q=3 if varlen else 4, rank_k=3 if varlen else 4)
        strides = [t.stride() for t in (q, k, v)]
        total_q: int | None = None
        total_k: int | None = None
        page_size: int | None = None
        if varlen:
            if paged:
                raise ConfigError("block_table", "a tensor together with cu_seqlens", "one of the two")
            total_q, total_k = q.shape[0], k.shape[0]
            batch, seqlen_q, seqlen_k = lengths.describe_packed(
                (total_q, total_k), (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), q.device
            )
            heads_q, heads_kv = q.shape[1], k.shape[1]
        else:
            seq, head = (1, 2) if layout == "bshd" else (2, 1)
            if layout == "bhsd":
                strides = [(s[0], s[2], s[1], s[3]) for s in strides]
            batch, seqlen_q, heads_q = q.shape[0], q.shape[seq], q.shape[head]
            seqlen_k, heads_kv = k.shape[seq], k.shape[head]
            if paged:
                page_size = seqlen_k
                seqlen_k = lengths.describe_paged(k, block_table, kv_lens, batch, page_size)
            elif k.shape[0] != batch:
                raise ConfigError("k", _shape(k), f"batch {batch} as in q {_shape(q)}")
        if tuple(v.shape[:-1]) != tuple(k.shape[:-1]):
            raise ConfigError("v", _shape(v), f"the shape of k {_shape(k)} but for the last dimension")
        if q.shape[-1] != k.shape[-1]:
            raise ConfigError("k", _shape(k), f"head_dim {q.shape[-1]} as in q {_shape(q)}")
        device = q.device
        if kv_lens is not None:
            lengths.check_kv_lens(lengths.check_index_vector("kv_lens", kv_lens, batch, device), seqlen_k)
        config = cls(
            batch=batch,
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            heads_q=heads_q,
            heads_kv=heads_kv,
            head_dim=q.shape[-1],
            head_dim_v=v.shape[-1],
            dtype=q.dtype,
            device=device.type,
            arch=architecture(device),
            softmax_scale=softmax_scale,  # type: ignore[arg-type]  # None is the default
            causal=causal,
            window=tuple(window) if isinstance(window, list) else window,
            softcap=softcap,
            mask_shape=_shape4("mask", mask),
            bias_shape=_shape4("bias", bias),
            bias_dtype=None if bias is None else bias.dtype,
            bias_requires_grad=_any_requires_grad(bias) if bias_requires_grad is None else bias_requires_grad,
            alibi=alibi_slopes is not None,
            sinks=sinks is not None,
            dropout_p=dropout_p,
            varlen=varlen,
            total_q=total_q,
            total_k=total_k,
            kv_lens=kv_lens is not None,
            page_size=page_size,
            return_lse=return_lse,
            requires_grad=_any_requires_grad(q, k, v, bias, sinks) if requires_grad is None else requires_grad,
            deterministic=deterministic,
            transformed=is_transformed((q, k, v, bias, sinks)),
            q_strides=strides[0],
            k_strides=strides[1],
            v_strides=strides[2],
        )
        _check_extras(config, device, mask, bias, alibi_slopes, sinks)
        return config

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, name) for name in CONFIG_FIELDS))

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in CONFIG_FIELDS}  # nothing cached: hashes differ between processes

    @functools.cached_property
    def prepared(self) -> dict[Any, Any]:
        """Room for what a backend derives from this description once, such as a launch, under a key of its own.

        Calls that look alike share one config object, which is dropped when it has not been used for long. What is
        kept here must follow from the config alone or be keyed by whatever else it depends on.
        """
        return {}

    @functools.cached_property
    def band(self) -> tuple[int | None, int | None]:
        """Causal and window as one band: key j is visible to query i iff ``-left <= j - (i + Sk - Sq) <= right``."""
        left, right = self.window or (None, None)
        if self.causal:
            right = 0 if right is None else min(right, 0)
        return left, right

    @property
    def kv_layout(self) -> KvCacheLayout:
        """The layout the caller's keys and values are in."""
        if self.page_size is not None:
            return KvCacheLayout.PAGED
        return KvCacheLayout.PACKED if self.varlen else KvCacheLayout.CONTIGUOUS

    @functools.cached_property
    def is_empty(self) -> bool:
        """Nothing to compute: no query rows, no keys (then every row is fully masked), or no memory."""
        sizes = (self.batch, self.seqlen_q, self.seqlen_k, self.total_q, self.total_k)
        return any(size == 0 for size in sizes if size is not None) or self.device == "meta"

    def visible_pairs(self) -> int:
        """Query-key pairs the band leaves visible in one head of one full-length sequence. A mask is not counted."""
        left, right = self.band
        sq, sk = self.seqlen_q, self.seqlen_k
        shift = sk - sq

        def keys_up_to(offset: int) -> int:
            """Sum over queries i of the number of keys j with j <= i + offset."""
            first, last = max(0, -offset), min(sq, sk - offset)  # rows that see some keys, and not yet all of them
            rising = max(0, last - first)
            partial = rising * (first + last - 1 + 2 * (offset + 1)) // 2 if rising else 0
            return partial + sk * (sq - max(last, 0) if last < sq else 0)

        upper = sq * sk if right is None else keys_up_to(shift + right)
        lower = 0 if left is None else keys_up_to(shift - left - 1)
        return upper - lower

    def flops(self, *, backward: bool = False) -> int:
        """Floating-point operations of the two products of the forward (five of the backward), masked pairs left out.

        For packed and padded batches this takes every sequence at full length: an upper bound.
        """
        pairs = self.batch * self.heads_q * self.visible_pairs()
        if backward:
            return 2 * pairs * (3 * self.head_dim + 2 * self.head_dim_v)
        return 2 * pairs * (self.head_dim + self.head_dim_v)

    def bytes(self) -> int:
        """Fewest bytes of device memory the forward must move: each input read once, each output written once."""
        rows = self.total_q if self.total_q is not None else self.batch * self.seqlen_q
        keys = self.total_k if self.total_k is not None else self.batch * self.seqlen_k
        query_side = rows * self.heads_q * (self.head_dim + self.head_dim_v)
        key_side = keys * self.heads_kv * (self.head_dim + self.head_dim_v)
        total = (query_side + key_side) * self.dtype.itemsize + rows * self.heads_q * 4
        if self.mask_shape is not None:
            total += math.prod(self.mask_shape)
        if self.bias_shape is not None and self.bias_dtype is not None:
            total += math.prod(self.bias_shape) * self.bias_dtype.itemsize
        return total

    def describe(self) -> str:
        """One line for people: sizes, then only the features that are on."""
        sizes = (
            f"B={self.batch} Sq={self.seqlen_q} Sk={self.seqlen_k} Hq={self.heads_q} Hk={self.heads_kv} "
            f"D={self.head_dim}" + (f" Dv={self.head_dim_v}" if self.head_dim_v != self.head_dim else "")
        )
        return " ".join([sizes, str(self.dtype).removeprefix("torch."), self.arch, *self.features()])

    def features(self) -> tuple[str, ...]:
        """The semantics in use beyond plain attention, by name."""
        named = {
            "causal": self.causal,
            f"window={self.window}": self.window is not None,
            "mask": self.mask_shape is not None,
            "bias": self.bias_shape is not None,
            "softcap": self.softcap > 0,
            "alibi": self.alibi,
            "sinks": self.sinks,
            "dropout": self.dropout_p > 0,
            "varlen": self.varlen,
            "kv_lens": self.kv_lens,
            "paged": self.page_size is not None,
            "lse": self.return_lse,
            "grad": self.requires_grad,
            "deterministic": self.deterministic,
            "transformed": self.transformed,
        }
        return tuple(name for name, on in named.items() if on)


CONFIG_FIELDS = tuple(field.name for field in fields(AttentionConfig))
_FLAGS = tuple(field.name for field in fields(AttentionConfig) if field.default is False)
_LEAST_SIZES = dict(batch=0, seqlen_q=0, seqlen_k=0, heads_q=1, heads_kv=1, head_dim=1, head_dim_v=1, total_q=0,
                    total_k=0, page_size=1)  # fmt: skip


@functools.cache
def _architecture(kind: str, index: int | None) -> str:
    if kind != "cuda":
        return kind
    properties = torch.cuda.get_device_properties(torch.device(kind, index or 0))
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm{properties.major}{properties.minor}"


def architecture(device: torch.device) -> str:
    """The architecture name selection and tile tables use: ``cpu``, ``sm90``, ``gfx1100``, ..."""
    index = device.index
    if device.type == "cuda" and index is None:
        index = torch.cuda.current_device()
    return _architecture(device.type, index)


def _shape(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"


def _shape4(name: str, tensor: Tensor | None) -> tuple[int, ...] | None:
    if tensor is None:
        return None
    require_tensor(name, tensor)
    if not 1 <= tensor.ndim <= 4:
        raise ConfigError(name, _shape(tensor), "1 to 4 dimensions that broadcast to (B, Hq, Sq, Sk)")
    return (1,) * (4 - tensor.ndim) + tuple(tensor.shape)


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and requires_grad(t) for t in tensors)


def require_tensor(name: str, value: object) -> None:
    """Raise a `ConfigError` unless the value is a tensor in dense memory."""
    if not isinstance(value, Tensor):
        raise ConfigError(name, type(value).__name__, "a torch.Tensor")
    if value.is_nested or value.layout is not torch.strided:
        layout = "nested" if value.is_nested else str(value.layout)
        raise ConfigError(name, f"a {layout} tensor", "a dense tensor (varlen_attention takes sequences back to back)")


def _check_qkv(q: Tensor, k: Tensor, v: Tensor, rank_q: int, rank_k: int) -> None:
    if torch._C._get_tracing_state() is not None:  # sizes are tensors
        raise ConfigError("q", "a tensor that torch.jit.trace records", "torch.export or torch.compile")
    form = {3: "(total, H, D) with cu_seqlens", 4: "4 dimensions (B, S, H, D) or (B, H, S, D)"}
    for name, tensor, rank in (("q", q, rank_q), ("k", k, rank_k), ("v", v, rank_k)):
        require_tensor(name, tensor)
        if tensor.ndim != rank:
            raise ConfigError(name, _shape(tensor), form[rank])
        if tensor.dtype not in FLOAT_DTYPES:
            raise ConfigError(name, tensor.dtype, "float16, bfloat16, float32 or float64")
        if tensor.dtype != q.dtype:
            raise ConfigError(name, tensor.dtype, f"the dtype of q, {q.dtype}")
        if tensor.device != q.device:
            raise ConfigError(name, f"device {tensor.device}", f"the device of q, {q.device}")


def _check_sizes(config: AttentionConfig) -> None:
    for name, least in _LEAST_SIZES.items():
        value = getattr(config, name)
        if value is None and name in ("total_q", "total_k", "page_size"):
            continue
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)) or value < least:
            raise ConfigError(name, repr(value), f"an int of at least {least}")
    if config.heads_q % config.heads_kv != 0:
        raise ConfigError(
            "heads_q", f"{config.heads_q} query heads, {config.heads_kv} key/value heads", "a multiple of heads_kv"
        )
    if config.dtype not in FLOAT_DTYPES:
        raise ConfigError("dtype", repr(config.dtype), "float16, bfloat16, float32 or float64")
    if not isinstance(config.device, str) or ":" in config.device:
        raise ConfigError("device", repr(config.device), "the name of a device type: 'cpu', 'cuda', ...")
    if not isinstance(config.arch, str):
        raise ConfigError("arch", repr(config.arch), "a name such as 'cpu', 'sm90', 'gfx1100'")
    if config.varlen and (config.total_q is None or config.total_k is None):
        raise ConfigError("total_q, total_k", (config.total_q, config.total_k), "the packed lengths where varlen")
    for name in ("mask_shape", "bias_shape", "kv_lens", "page_size"):
        if config.varlen and getattr(config, name):
            argument = name.removesuffix("_shape")
            raise ConfigError(argument, f"a {argument} together with cu_seqlens", "padded (B, S, H, D) inputs for it")
    if config.page_size is not None and not config.kv_lens:
        raise ConfigError("page_size", f"{config.page_size} without kv_lens", "both: a paged cache has no other length")


def _check_number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        raise ConfigError(name, repr(value), "a number")
    if isinstance(value, (int, float)) and abs(value) > torch.finfo(torch.float32).max:
        seen = f"an int of {value.bit_length()} bits" if isinstance(value, int) else value
        raise ConfigError(name, seen, "a finite number that float32 holds")
    return value  # type: ignore[return-value]


def _check_semantics(config: AttentionConfig) -> None:
    scale = _check_number("softmax_scale", config.softmax_scale)
    if not math.isfinite(scale):
        raise ConfigError("softmax_scale", scale, "a finite number")
    softcap = _check_number("softcap", config.softcap)
    if not softcap >= 0:
        raise ConfigError("softcap", softcap, "a finite number of at least 0 (0 is off)")
    dropout_p = _check_number("dropout_p", config.dropout_p)
    if not 0 <= dropout_p < 1:
        raise ConfigError("dropout_p", dropout_p, "a probability in [0, 1)")
    for name in _FLAGS:
        if not isinstance(getattr(config, name), bool):
            raise ConfigError(name, repr(getattr(config, name)), "a bool")
    if config.window is not None:
        if not isinstance(config.window, tuple) or len(config.window) != 2:
            raise ConfigError("window", repr(config.window), "a pair (left, right)")
        for bound in config.window:
            if bound is not None and (isinstance(bound, bool) or not isinstance(bound, (int, torch.SymInt))):
                raise ConfigError("window", config.window, "ints or None")
            if bound is not None and bound < 0:
                raise ConfigError("window", config.window, "sizes of at least 0 (None is unlimited)")
            if isinstance(bound, int) and bound >= 2**63:
                raise ConfigError("window", config.window, "sizes that 64 bits hold (None is unlimited)")
    full = (config.batch, config.heads_q, config.seqlen_q, config.seqlen_k)
    for name, shape in (("mask", config.mask_shape), ("bias", config.bias_shape)):
        if shape is not None and (
            not isinstance(shape, tuple)
            or len(shape) != 4
            or any(n not in (1, size) for n, size in zip(shape, full, strict=True))
        ):
            raise ConfigError(name, f"shape {shape}", f"a tuple that broadcasts to (B, Hq, Sq, Sk) = {full}")
    if config.bias_dtype is not None and config.bias_dtype not in FLOAT_DTYPES:
        raise ConfigError("bias", repr(config.bias_dtype), "a float dtype")
    if config.bias_shape is None and (config.bias_dtype is not None or config.bias_requires_grad):
        raise ConfigError("bias_shape", None, "a shape, since bias_dtype or bias_requires_grad is given")
    rank = 3 if config.varlen else 4
    for name in ("q_strides", "k_strides", "v_strides"):
        strides = getattr(config, name)
        if strides is not None and not (
            isinstance(strides, tuple)
            and len(strides) == rank
            and all(isinstance(stride, (int, torch.SymInt)) for stride in strides)
        ):
            raise ConfigError(name, repr(strides), f"a tuple of {rank} ints, or None for contiguous")


def _check_extras(
    config: AttentionConfig,
    device: torch.device,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> None:
    for name, tensor in (("mask", mask), ("bias", bias), ("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if tensor is None:
            continue
        require_tensor(name, tensor)
        if tensor.device != device:
            raise ConfigError(name, f"device {tensor.device}", f"the device of q, {device}")
        if name == "mask":
            if tensor.dtype != torch.bool:
                raise ConfigError("mask", tensor.dtype, "bool, True = attend (pass additive values as bias)")
        elif tensor.dtype not in FLOAT_DTYPES:
            raise ConfigError(name, tensor.dtype, "a float dtype")
    heads = config.heads_q
    if alibi_slopes is not None and tuple(alibi_slopes.shape) not in ((heads,), (config.batch, heads)):
        raise ConfigError("alibi_slopes", _shape(alibi_slopes), f"({heads},) or ({config.batch}, {heads})")
    if alibi_slopes is not None and alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise ConfigError("alibi_slopes", "a tensor that requires a gradient", "a constant (use bias for a gradient)")
    if sinks is not None and tuple(sinks.shape) != (heads,):
        raise ConfigError("sinks", _shape(sinks), f"shape ({heads},)")
