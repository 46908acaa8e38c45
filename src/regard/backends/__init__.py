"""Backends: each says what it cannot do (`unsupported_reasons`) and computes the rest."""

from regard.backends.cpu import CpuBackend
from regard.backends.external import register_installed
from regard.backends.flash import FlashBackend
from regard.backends.hopper import HopperBackend
from regard.backends.reference import ReferenceBackend
from regard.backends.sdpa import SdpaBackend
from regard.registry import Registry


def register_builtin_backends(registry: Registry) -> None:
    """Add the built-in backends in the order automatic selection tries them."""
    registry.register(HopperBackend(), priority=50)
    registry.register(CpuBackend(), priority=40)
    registry.register(FlashBackend(), priority=30)
    registry.register(SdpaBackend(), priority=20)
    registry.register(ReferenceBackend(), priority=0)
    register_installed(registry)
