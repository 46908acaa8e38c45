"""What can go wrong, and how it is said.

A `Reason` is the one sentence used everywhere a backend cannot serve a call: selection, errors, `explain()`, skipped
tests and blank benchmark cells print the same text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """Why a backend cannot serve a configuration.

    Attributes:
        code: stable identifier to branch on, such as ``"head_dim"`` or ``"device"``.
        observed: what the call asks for.
        required: what the backend needs instead.
        hint: what the caller can do about it; empty when there is nothing.
    """

    code: str
    observed: str
    required: str
    hint: str = ""

    def __str__(self) -> str:
        sentence = f"{self.code}: got {self.observed}, needs {self.required}"
        return f"{sentence} ({self.hint})" if self.hint else sentence


class ConfigError(ValueError):
    """An argument is malformed. Names the argument, what was seen and what is needed; raised before anything runs."""

    def __init__(self, argument: str, observed: object, required: str) -> None:
        self.argument = argument
        self.observed = observed
        self.required = required
        super().__init__(f"{argument}: got {observed}, needs {required}")

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.argument, self.observed, self.required)  # to cross from a worker process


class UnsupportedError(NotImplementedError):
    """No permitted backend can serve a well-formed call. ``reasons`` maps each backend's name to its `Reason`s."""

    def __init__(self, summary: str, reasons: Mapping[str, Sequence[Reason]]) -> None:
        self.summary = summary
        self.reasons = {name: tuple(listed) for name, listed in reasons.items()}
        lines = [f"  {name}: {'; '.join(map(str, listed))}" for name, listed in self.reasons.items()]
        super().__init__("\n".join([summary, *lines]))

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.summary, self.reasons)


class FallbackWarning(UserWarning):
    """Automatic selection passed over a faster backend of this device, or a backend's kernel failed."""
