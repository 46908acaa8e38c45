"""What is decided about a call before it runs, remembered for calls that look the same.

Validation and selection cost more host time than a launch, and depend on nothing but what `_appearance` and the
registry's state say. Values inside tensors are looked at in every call.
"""

from __future__ import annotations

import contextlib
import marshal
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from regard import lengths
from regard.config import AttentionConfig, AttentionInputs
from regard.registry import Selection, Shortcut, registry, shortcut
from regard.tracing import is_traced, is_watched_silently

try:
    from torch._C._dynamo.guards import TensorGuards as _TensorGuards
except ImportError:  # torch promises nothing of it; without it plans are made anew from what is remembered
    TensorGuards: Any = None
else:
    TensorGuards = _TensorGuards

TENSORS = AttentionInputs._fields[:-1]
"""The tensor arguments of a call in the order of `describe`: all of `AttentionInputs` but the dropout seed."""

OPTIONS = (
    "layout", "causal", "window", "softmax_scale", "softcap", "dropout_p", "return_lse", "deterministic",
    "max_seqlen_q", "max_seqlen_k", "requires_grad", "bias_requires_grad",
)  # fmt: skip
"""The other arguments of `AttentionConfig.from_tensors` in the order of `describe`."""


class Plan(NamedTuple):
    """How a call is served.

    Attributes:
        config, selection: what it is, and which backend serves it.
        shortcut: see `regard.registry.shortcut`; None for traced calls.
        traced: what `is_traced` says of it.
    """

    config: AttentionConfig
    selection: Selection
    shortcut: Shortcut | None
    traced: bool


def recall(tensors: tuple[Any, ...], options: tuple[Any, ...], backend: str | None) -> Plan | None:
    """The plan of a call with these options, where this one is alike in all that a plan depends on.

    `TensorGuards` compares type, shape, strides, dtype, device, requires_grad and the dispatcher's state at once: this
    takes a fifth of the time of `make`. That state shows autocast and inference mode, and all that `is_watched`
    finds but what `is_watched_silently` does: nothing is kept of calls that are watched.

    Raises:
        ConfigError: values in index tensors are not legal.
    """
    if is_watched_silently():
        return None
    try:
        kept = _latest.find(_said(options, backend))
    except ValueError:  # what cannot be said in bytes, such as a float of numpy
        return None
    if kept is None:
        return None
    state = registry.state
    for known in kept:
        if known.state == state and known.shows(tensors):
            plan = known.plan
            if known.look is None and not _values_fit(plan.config, tensors, options):
                return None
            if registry.recorders.get():
                registry.record(plan.config, plan.selection)
            return plan
    return None


def make(tensors: tuple[Any, ...], options: tuple[Any, ...], backend: str | None) -> Plan:
    """Describe the call, and select its backend.

    Args:
        tensors: tensors or None in the order of `TENSORS`, or whatever the caller passed for them.
        options: in the order of `OPTIONS`.
        backend: the caller's choice.

    Raises:
        ConfigError: an argument is malformed.
        UnsupportedError: no backend serves the call.
    """
    traced = is_traced(tensors)
    config = describe(tensors, options, traced=traced)
    selection, shortcut = select(config, backend, options[0])
    plan = Plan(config, selection, None if traced else shortcut, traced)
    if not traced and TensorGuards is not None:
        with contextlib.suppress(ValueError):
            said = _said(options, backend)
            latest = _Latest(*_looks(config, tensors), registry.state, plan)
            _latest.keep(said, (latest, *(_latest.find(said) or ())[: _TAKING_TURNS - 1]))
    return plan


def _said(options: tuple[Any, ...], backend: str | None) -> bytes:
    """What a caller says beside tensors; as bytes 1 differs from True and 1.0."""
    return marshal.dumps((options, backend, torch.is_grad_enabled()), 2)


class _Latest(NamedTuple):
    """A plan, and when it holds: for tensors of these looks, in this state of the registry.

    Attributes:
        look: of q, k, v and the mask if there is one together, where they are different tensors and all that is given:
            one question instead of many.
        masked: whether a mask is one of them.
        looks: where there is no ``look``, of each of `TENSORS`.
    """

    look: Any
    masked: bool
    looks: tuple[Any, ...]
    state: tuple[int, str | None]
    plan: Plan

    def shows(self, tensors: tuple[Any, ...]) -> bool:
        """Whether these tensors look the same. What has no strides does not: `TensorGuards` asks for those of nested
        tensors, and ends the process.
        """
        look = self.look
        try:
            if look is None:
                for each, tensor in zip(self.looks, tensors):  # noqa: B905 - as many as there are `TENSORS`
                    if tensor is None or each is None:
                        if tensor is not each:
                            return False
                    elif tensor.is_nested or not each.check(tensor):
                        return False
                return True
            q, k, v, mask, bias, slopes, sinks, offsets_q, offsets_k, kv_lens, pages = tensors
            alone = bias is slopes is sinks is offsets_q is offsets_k is kv_lens is pages is None
            if not alone or (mask is None) is self.masked or q.is_nested or k.is_nested or v.is_nested:
                return False
            if mask is None:
                same: bool = look.check(q, k, v)
                return same
            return not mask.is_nested and look.check(q, k, v, mask)
        except AttributeError:  # of what is no tensor: the validator says it better
            return False


def _looks(config: AttentionConfig, tensors: tuple[Tensor | None, ...]) -> tuple[Any, bool, tuple[Any, ...]]:
    """The first fields of `_Latest` for these tensors, which are those that the config describes."""
    inference = [t is not None and t.is_inference() for t in tensors]  # no matter of the config, but of the dispatcher
    given, masked = [t for t in tensors if t is not None], tensors[3] is not None
    alone = len(given) == 3 + masked == len({id(t) for t in given})  # many in one refuse a tensor that is there twice
    key = (_looks, alone, torch.is_inference_mode_enabled(), *inference, *map(type, tensors))
    if key not in config.prepared:
        config.prepared[key] = (
            (_look(*given), masked, ())
            if alone
            else (None, masked, tuple(None if t is None else _look(t) for t in tensors))
        )
    found: tuple[Any, bool, tuple[Any, ...]] = config.prepared[key]
    return found


def _look(*tensors: Tensor) -> Any:
    """What tells whether other tensors look the same."""
    sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)


def describe(tensors: tuple[Any, ...], options: tuple[Any, ...], *, traced: bool) -> AttentionConfig:
    """Validate a call, or remember the config of a call that looked the same: it is the same object then.

    Args:
        tensors: tensors or None in the order of `TENSORS`, or whatever the caller passed for them.
        options: in the order of `OPTIONS`.
        traced: what `is_traced` says of the tensors; then nothing is remembered.

    Raises:
        ConfigError: an argument is malformed.
    """
    key = known = None
    if not traced:
        try:
            key = _appearance(tensors, options)
            known = _recent.find(key)
        except (TypeError, RuntimeError):  # a hash or strides of something malformed: the validator says it better
            key = None
    if known is not None and _values_fit(known, tensors, options):
        return known
    arguments = dict(zip((*TENSORS, *OPTIONS), (*tensors, *options), strict=True))
    config = AttentionConfig.from_tensors(**arguments)
    if key is not None:
        _recent.keep(key, config)
    return config


def select(config: AttentionConfig, backend: str | None, layout: str) -> tuple[Selection, Shortcut | None]:
    """`Registry.select`, remembered with the config for as long as the registry does not change, and the shortcut of
    the selected backend for calls in this layout.
    """
    if backend is not None and not isinstance(backend, str):
        return registry.select(config, backend), None
    changes, scoped = registry.state
    key = (backend, scoped, layout)
    known: tuple[int, Selection, Shortcut | None] | None = config.prepared.get(key)
    if known is None or known[0] != changes:
        selection = registry.select(config, backend)
        known = config.prepared[key] = changes, selection, shortcut(registry.get(selection.backend), config, layout)
    else:
        registry.record(config, known[1])
    return known[1:]


def _appearance(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[Any, ...]:
    """Everything a config and what is prepared for it can depend on, but values in tensors.

    The types of options count: 1 and True are equal, but only one of them is a legal ``causal``.
    """
    window = options[2]
    return (
        *[t if t is None else (t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in tensors],
        options,
        *map(type, options),
        None if window is None else tuple(map(type, window)),
        torch.is_grad_enabled(),
    )


def _values_fit(config: AttentionConfig, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> bool:
    """Whether a remembered config holds for the values in index tensors of a call that looks the same.

    Raises:
        ConfigError: some values are not legal.
    """
    if not config.varlen and not config.kv_lens:
        return True
    k, (*_, cu_seqlens_q, cu_seqlens_k, kv_lens, block_table) = tensors[1], tensors
    if cu_seqlens_q is not None:
        stated_q, stated_k = options[8:10]
        return _longest_fits("cu_seqlens_q", cu_seqlens_q, config.total_q, stated_q, config.seqlen_q) and _longest_fits(
            "cu_seqlens_k", cu_seqlens_k, config.total_k, stated_k, config.seqlen_k
        )
    if kv_lens is not None:
        lengths.check_kv_lens(kv_lens, config.seqlen_k)
        if block_table is not None and config.page_size is not None:
            lengths.check_pages(block_table, kv_lens, k.shape[0], config.page_size)
    return True


def _longest_fits(name: str, cu_seqlens: Tensor, total: int | None, stated: int | None, remembered: int) -> bool:
    assert total is not None
    longest = lengths.longest_sequence(name, cu_seqlens, total)
    if longest is None:
        return stated == remembered
    return longest == remembered and (stated is None or stated >= longest)


_Kept = TypeVar("_Kept")


class _Recent(Generic[_Kept]):
    """What was used last: at least ``size`` of them, at most twice as many.

    Two generations instead of an exact order of use, since a hit in the younger one costs a single lookup.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._younger: dict[Any, _Kept] = {}
        self._older: dict[Any, _Kept] = {}

    def find(self, key: Any) -> _Kept | None:
        found = self._younger.get(key)
        if found is None and (found := self._older.get(key)) is not None:
            self.keep(key, found)
        return found

    def keep(self, key: Any, kept: _Kept) -> None:
        if len(self._younger) >= self._size:
            self._older, self._younger = self._younger, {}
        self._younger[key] = kept


_TAKING_TURNS = 8  # looks of calls with the same options, as of self- and cross-attention, that are told apart at once
_recent: _Recent[AttentionConfig] = _Recent(512)
_latest: _Recent[tuple[_Latest, ...]] = _Recent(64)
