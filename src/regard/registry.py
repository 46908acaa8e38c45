"""The registry: which backends exist, which one serves a call, and why.

Automatic selection takes the first backend, in order of priority, that gives no reason against the configuration. A
choice by name is strict. Both say what they did: `explain` lists every backend with its reasons, a passed-over faster
backend of the same device causes one `FallbackWarning`.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib.metadata
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from regard.config import AttentionConfig, AttentionInputs, KvCacheLayout
from regard.errors import ConfigError, FallbackWarning, Reason, UnsupportedError

ENTRY_POINT_GROUP = "regard.backends"

# A backend with one of these reasons does not belong on the device at all: passing it over is no fallback.
INAPPLICABLE = frozenset({"device", "arch", "not_installed", "dtype_float64"})

Gradients = dict[str, Tensor | None]
"""Gradients by input name: q, k, v always; bias and sinks where given."""

_Entries = Sequence[tuple[str, tuple[Reason, ...]]]
_YieldsTo = Callable[[AttentionConfig], "tuple[str, Reason] | None"]

Shortcut = Callable[..., Tensor]
"""From q, k and v in the caller's layout, and the caller's mask and bias if there are any, to out in the layout."""


@runtime_checkable
class AttentionBackend(Protocol):
    """What a backend provides. Stateless; called with canonical inputs (see `AttentionInputs`).

    Optional: ``composed_of_torch_ops``, true where autograd and torch.compile can see through ``forward``; a method
    ``shortcut(config, layout)``, see `shortcut`; and a method ``yields_to(config)`` for calls that it supports, which
    returns the name of a backend that is faster for them, and the reason, or None. Automatic selection then takes that
    backend, if it supports the call.
    """

    @property
    def name(self) -> str:
        """The name it is chosen by."""

    def unsupported_reasons(self, config: AttentionConfig) -> Sequence[Reason]:
        """Every reason why this backend cannot serve ``config``; empty if it can. Must not need the device.

        The answer must follow from ``config`` alone: it is remembered for calls that look alike.
        """

    def required_kv_layout(self, config: AttentionConfig) -> KvCacheLayout:
        """The layout k and v must be in: ``config.kv_layout`` where the backend reads that one."""

    def forward(self, config: AttentionConfig, inputs: AttentionInputs) -> tuple[Tensor, Tensor | None]:
        """Return out (B, Sq, Hq, Dv) in the inputs' dtype and lse (B, Hq, Sq) fp32 (packed: out (total_q, Hq, Dv), lse
        (Hq, total_q)). lse may be None unless ``config.return_lse`` or ``config.requires_grad``.
        """

    def backward(
        self,
        config: AttentionConfig,
        inputs: AttentionInputs,
        out: Tensor,
        lse: Tensor | None,
        grad_out: Tensor,
        grad_lse: Tensor | None,
    ) -> Gradients:
        """Return the gradients of the inputs, each in the shape and dtype of its input."""


@dataclass(frozen=True)
class Selection:
    """The backend that serves a configuration.

    Attributes:
        backend: its name.
        strict: chosen by name, so that a failure is an error and never a fallback.
        why: one sentence.
        passed_over: backends of higher priority, their reasons, and the reason why one of them yielded.
    """

    backend: str
    strict: bool
    why: str
    passed_over: tuple[tuple[str, tuple[Reason, ...]], ...] = ()


@dataclass(frozen=True)
class Explanation:
    """Every registered backend and its reasons against one configuration. Prints as a table."""

    config: AttentionConfig
    chosen: Selection | None
    entries: tuple[tuple[str, tuple[Reason, ...]], ...]

    def reasons(self, backend: str) -> tuple[Reason, ...]:
        """The reasons against one backend; empty if it supports the configuration."""
        return dict(self.entries)[backend]

    def __str__(self) -> str:
        rows = [
            (
                ("> " if self.chosen and name == self.chosen.backend else "  ") + name,
                "; ".join(map(str, reasons)) if reasons else "supported",
            )
            for name, reasons in self.entries
        ]
        width = max((len(name) for name, _ in rows), default=0)
        verdict = self.chosen.why if self.chosen else "no backend supports this call"
        return "\n".join([self.config.describe(), *(f"{name:<{width}}  {text}" for name, text in rows), verdict])


class Registry:
    """A set of backends and the rules that pick one. The package has one instance, `registry`; tests make more."""

    def __init__(self, builtin: str | None = None) -> None:
        """``builtin`` names a function, as an entry point does, that is given the registry when it is first used."""
        self._builtin = builtin
        self._lock = threading.RLock()
        self._backends: dict[str, AttentionBackend] = {}
        self._priority: dict[str, int] = {}
        self._default: str | None = None
        self._quarantined: dict[tuple[str, tuple[Any, ...]], str] = {}
        self._warned: set[tuple[Any, ...]] = set()
        self._entry_points_loaded = False
        self._changes = 0
        self._scoped: contextvars.ContextVar[str | None] = contextvars.ContextVar("regard_backend", default=None)
        self.recorders: contextvars.ContextVar[tuple[list[tuple[AttentionConfig, Selection]], ...]] = (
            contextvars.ContextVar("regard_recorders", default=())
        )

    def register(self, backend: AttentionBackend, *, priority: int = 10) -> None:
        """Add a backend.

        Args:
            backend: an object with the members of `AttentionBackend`.
            priority: automatic selection tries higher numbers first. Built in: hopper 50, cpu 40, flash 30, sdpa 20,
                reference 0, installed peers -10.

        Raises:
            ConfigError: a member is missing, the name is empty, reserved or taken, the priority is no number.
        """
        missing = [
            member
            for member in ("name", "unsupported_reasons", "required_kv_layout", "forward", "backward")
            if not hasattr(backend, member)
        ]
        if missing:
            raise ConfigError("backend", f"{type(backend).__name__} without {', '.join(missing)}", "AttentionBackend")
        self._load_builtin()
        name = backend.name
        if not isinstance(name, str) or not name or name == "auto":
            raise ConfigError("backend.name", repr(name), "a non-empty string other than 'auto'")
        if not isinstance(priority, (int, float)) or math.isnan(priority):  # it would break every later selection
            raise ConfigError("priority", repr(priority), "a number")
        with self._lock:
            if name in self._backends:
                raise ConfigError(
                    "backend.name", repr(name), "a name not yet registered (unregister the old one first)"
                )
            self._backends[name] = backend
            self._priority[name] = priority
            self._changes += 1

    def unregister(self, name: str) -> None:
        """Remove a backend. A default that names it, and its quarantines, are cleared."""
        self.get(name)
        with self._lock:
            del self._backends[name], self._priority[name]
            self._quarantined = {key: failure for key, failure in self._quarantined.items() if key[0] != name}
            if self._default == name:
                self._default = None
            self._changes += 1

    def get(self, name: str) -> AttentionBackend:
        """The backend of that name."""
        self._load_entry_points()
        try:
            return self._backends[name]
        except (KeyError, TypeError):
            raise ConfigError(
                "backend", repr(name), f"'auto' or one of {', '.join(map(repr, self._backends))}"
            ) from None

    def list_backends(self) -> list[str]:
        """Names in the order automatic selection tries them."""
        self._load_entry_points()
        with self._lock:
            return sorted(self._backends, key=lambda name: -self._priority[name])

    def set_default(self, name: str | None) -> None:
        """Use this backend for every call of the process that names none. None or ``"auto"``: automatic again."""
        if name is not None and name != "auto":
            self.get(name)
        with self._lock:
            self._default = None if name == "auto" else name
            self._changes += 1

    @contextlib.contextmanager
    def use_backend(self, name: str) -> Iterator[None]:
        """Use this backend inside the ``with`` block, in this thread and task only; ``"auto"`` lifts an outer one."""
        if name != "auto":
            self.get(name)
        token = self._scoped.set(name)
        try:
            yield
        finally:
            self._scoped.reset(token)

    @contextlib.contextmanager
    def record_selections(self) -> Iterator[list[tuple[AttentionConfig, Selection]]]:
        """Collect (config, selection) of every eager call inside the ``with`` block, in this thread and task."""
        recorder: list[tuple[AttentionConfig, Selection]] = []
        token = self.recorders.set((*self.recorders.get(), recorder))
        try:
            yield recorder
        finally:
            self.recorders.reset(token)

    def requested(self, backend: str | None) -> str | None:
        """The name that an argument, the innermost `use_backend`, or the default asks for; None is automatic."""
        for name in (backend, self._scoped.get(), self._default):
            if name is not None:
                return None if name == "auto" else name
        return None

    def reasons(self, name: str, config: AttentionConfig) -> tuple[Reason, ...]:
        """Every reason against a backend: its own, its KV-cache layout, and a quarantine."""
        backend = self.get(name)
        found = list(backend.unsupported_reasons(config))
        layout = backend.required_kv_layout(config)
        if layout is not config.kv_layout:
            found.append(
                Reason("kv_layout", f"{config.kv_layout.value} keys and values", f"{layout.value} keys and values")
            )
        if config.transformed and not backend_is_composed_of_torch_ops(backend):
            found.append(Reason("transform", "torch.func.grad, jvp or a forward-mode tangent", "autograd's backward",
                                "reference serves every transform"))  # fmt: skip
        failure = self._quarantined.get((name, _kernel_class(config)))
        if failure is not None:
            found.append(Reason("quarantine", f"an earlier failure: {failure}", "a kernel that compiles and launches"))
        return tuple(found)

    def select(self, config: AttentionConfig, backend: str | None = None) -> Selection:
        """Pick the backend for a configuration.

        Args:
            config: the call.
            backend: a name, ``"auto"``, or None for what `use_backend` or `set_default` say.

        Raises:
            ConfigError: the name is not registered.
            UnsupportedError: the named backend, or every backend, has reasons against the call.
        """
        name = self.requested(backend)
        if name is not None:
            reasons = self.reasons(name, config)
            if reasons:
                raise UnsupportedError(f"backend {name!r} was asked for and cannot serve {config.describe()}",
                                       {name: reasons})  # fmt: skip
            selection = Selection(name, strict=True, why=f"{name}: chosen by name")
        else:
            selection = self._select_automatically(config)
        self.record(config, selection)
        return selection

    def record(self, config: AttentionConfig, selection: Selection) -> None:
        """Tell every `record_selections` around this call."""
        for recorder in self.recorders.get():
            recorder.append((config, selection))

    @property
    def state(self) -> tuple[int, str | None]:
        """Everything of the registry that `select` depends on: equal states choose alike."""
        return self._changes, self._scoped.get()

    def explain(self, config: AttentionConfig, backend: str | None = None) -> Explanation:
        """List every backend with its reasons, and what `select` would choose. Raises nothing for lack of support.

        Raises:
            ConfigError: the name is not registered.
        """
        requested = self.requested(backend)
        if requested is not None:
            self.get(requested)
        with self._lock:  # nobody unregisters a backend that is being asked
            entries = tuple((name, self.reasons(name, config)) for name in self.list_backends())
        supported = [name for name, reasons in entries if not reasons and requested in (None, name)]
        if requested is not None:
            chosen = Selection(requested, True, f"{requested}: chosen by name") if supported else None
        else:
            chosen = self._preferred(entries, config)
        return Explanation(config, chosen, entries)

    def quarantine(self, name: str, config: AttentionConfig, error: BaseException) -> None:
        """Stop offering a backend for this class of calls after its kernel failed, and warn once."""
        message = (
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
        )
        with self._lock:
            self._quarantined[name, _kernel_class(config)] = message
            self._changes += 1
        warnings.warn(
            f"regard: backend {name!r} failed on {config.describe()} and is not used for such calls any more in this "
            f"process: {message}",
            FallbackWarning,
            stacklevel=2,
        )

    def _select_automatically(self, config: AttentionConfig) -> Selection:
        entries = []
        with self._lock:  # nobody unregisters a backend that is being asked
            for name in self.list_backends():
                reasons = self.reasons(name, config)
                entries.append((name, reasons))
                if not reasons:
                    break
            selection = self._preferred(entries, config)
        if selection is None:
            raise UnsupportedError(f"no backend can serve {config.describe()}", dict(entries))
        self._warn_of_fallback(config, selection.backend, entries[:-1])
        return selection

    def _preferred(self, entries: _Entries, config: AttentionConfig) -> Selection | None:
        """The first backend without a reason against it, or the one that it yields to."""
        for index, (name, reasons) in enumerate(entries):
            if reasons:
                continue
            before = tuple(entries[:index])
            yields_to: _YieldsTo | None = getattr(self.get(name), "yields_to", None)
            faster = None if yields_to is None else yields_to(config)
            if faster is not None and faster[0] in self._backends and not self.reasons(faster[0], config):
                other, reason = faster
                return Selection(other, False, f"{other}: {name} supports the call too, and yields: {reason}",
                                 (*before, (name, (reason,))))  # fmt: skip
            return Selection(name, False, f"{name}: first in priority without a reason against it", before)
        return None

    def _warn_of_fallback(self, config: AttentionConfig, chosen: str, unable: _Entries) -> None:
        for name, reasons in unable:
            codes = tuple(reason.code for reason in reasons)
            key = (chosen, name, codes)
            if INAPPLICABLE.intersection(codes) or "quarantine" in codes or key in self._warned:
                continue
            self._warned.add(key)
            warnings.warn(
                f"regard: {chosen!r} serves {config.describe()} instead of {name!r}, which cannot: "
                f"{'; '.join(map(str, reasons))}",
                FallbackWarning,
                stacklevel=4,
            )

    def _load_builtin(self) -> None:
        with self._lock:
            builtin, self._builtin = self._builtin, None
            if builtin is not None:
                importlib.metadata.EntryPoint("builtin", builtin, ENTRY_POINT_GROUP).load()(self)

    def _load_entry_points(self) -> None:
        """Register third-party backends: entry points of group ``regard.backends`` that name a factory."""
        if self._entry_points_loaded:
            return
        self._load_builtin()
        with self._lock:
            if self._entry_points_loaded:
                return
            self._entry_points_loaded = True
            for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
                try:
                    factory: Callable[[], AttentionBackend] = entry_point.load()
                    self.register(factory())
                except Exception as error:  # a broken plug-in must not take attention down, and must not hide
                    warnings.warn(
                        f"regard: backend entry point {entry_point.name!r} was not registered: {error!r}",
                        FallbackWarning,
                        stacklevel=3,
                    )


def _kernel_class(config: AttentionConfig) -> tuple[Any, ...]:
    """Calls that compile to the same kernels, roughly: a quarantine covers these."""
    return (
        config.arch,
        config.dtype,
        int(config.head_dim),  # a symbol while torch.compile traces: kernels are compiled per head dim anyway
        int(config.head_dim_v),
        tuple(feature.split("=")[0] for feature in config.features()),
    )


registry = Registry(builtin="regard.backends:register_builtin_backends")


def can_use_flash_attention(config: AttentionConfig) -> bool:
    """Whether one of the flash kernels (`flash`, `hopper`) supports the configuration."""
    return any(name in ("flash", "hopper") and not reasons for name, reasons in registry.explain(config).entries)


def backend_is_composed_of_torch_ops(backend: AttentionBackend) -> bool:
    """Whether autograd and torch.compile can see through the backend's forward, so that it needs no custom op."""
    return bool(getattr(backend, "composed_of_torch_ops", False))


def shortcut(backend: AttentionBackend, config: AttentionConfig, layout: str) -> Shortcut | None:
    """What a backend offers in its optional method ``shortcut(config, layout)`` for calls of q, k, v and at most a
    mask and a bias: the call itself, for backends where making the canonical inputs would take as long.

    It is asked for calls with tensors of the same shapes, strides, dtypes and device, those that ``config`` was made
    from; their addresses differ. Where it raises, the call goes through ``forward``.

    None where it offers nothing, or where the call needs more than its output: lse, or autograd to go round a backend
    that it cannot see through.
    """
    offered: Callable[[AttentionConfig, str], Shortcut | None] | None = getattr(backend, "shortcut", None)
    opaque = config.requires_grad and not backend_is_composed_of_torch_ops(backend)
    if offered is None or opaque or config.is_empty or not _PLAIN.issuperset(config.features()):
        return None
    return offered(config, layout)


_PLAIN = {"causal", "mask", "bias", "grad", "deterministic"}  # of a call of q, k, v and at most a mask and a bias
