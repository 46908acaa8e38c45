"""Which band of diagonals a mask function of transformers stands for, if it is one.

Found by asking the function once about symbolic positions, instead of about every pair of indices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MaskFunction = Callable[..., Any]
"""``(batch, head, query position, key position) -> visible``."""


def band_of(mask_function: MaskFunction) -> Band | None:
    """The band a mask function stands for, found by asking it about symbolic positions; None if it is no band."""
    try:
        band = mask_function(0, 0, _Position(1, 0), _Position(0, 1))
    except Exception:  # it needs real indices, whichever way that shows
        return None
    return band if isinstance(band, Band) else None


class _NotABand(Exception):
    """A mask function asked something of a position that a band of diagonals cannot answer."""


@dataclass(frozen=True)
class Band:
    """Keys with ``-left <= key - query <= right``: what comparing a `_Position` gives."""

    left: int | None = None
    right: int | None = None

    device = None

    @property
    def contains_diagonal(self) -> bool:
        """Whether a query sees its own position, as regard's windows have it."""
        return (self.left is None or self.left >= 0) and (self.right is None or self.right >= 0)

    def __and__(self, other: object) -> Band:
        if not isinstance(other, Band):
            raise _NotABand
        left = self.left if other.left is None else other.left if self.left is None else min(self.left, other.left)
        right = (
            self.right if other.right is None else other.right if self.right is None else min(self.right, other.right)
        )
        return Band(left, right)

    def to(self, device: None) -> Band:
        return self

    def __bool__(self) -> bool:
        raise _NotABand


@dataclass(frozen=True, eq=False)
class _Position:
    """``query * q + key * k + constant``, on which a mask function is evaluated once instead of on every index."""

    query: int
    key: int
    constant: int = 0

    def new_ones(self, *args: Any, **kwargs: Any) -> Band:
        return Band()

    def __add__(self, other: object) -> _Position:
        if isinstance(other, int):
            return _Position(self.query, self.key, self.constant + other)
        raise _NotABand

    def __neg__(self) -> _Position:
        return _Position(-self.query, -self.key, -self.constant)

    def __sub__(self, other: object) -> _Position:
        if isinstance(other, int):
            return _Position(self.query, self.key, self.constant - other)
        if isinstance(other, _Position):
            return _Position(self.query - other.query, self.key - other.key, self.constant - other.constant)
        raise _NotABand

    def __abs__(self) -> _Distance:
        if (self.query, self.key) not in ((1, -1), (-1, 1)) or self.constant != 0:
            raise _NotABand
        return _Distance()

    def __ge__(self, other: object) -> Band:
        """``self - other >= 0``, of which every other comparison is a case."""
        difference = self - other
        if (difference.query, difference.key) == (-1, 1):
            return Band(left=difference.constant)
        if (difference.query, difference.key) == (1, -1):
            return Band(right=difference.constant)
        if difference.query >= 0 and difference.key >= 0 and difference.constant >= 0:
            return Band()  # positions are never negative
        raise _NotABand

    def __gt__(self, other: object) -> Band:
        return (self - 1) >= other

    def __le__(self, other: object) -> Band:
        return -(self - other) >= 0

    def __lt__(self, other: object) -> Band:
        return (self + 1) <= other

    def __eq__(self, other: object) -> bool:
        raise _NotABand


@dataclass(frozen=True, eq=False)
class _Distance:
    """``abs(query - key)``."""

    def __le__(self, bound: object) -> Band:
        if not isinstance(bound, int):
            raise _NotABand
        return Band(bound, bound)
