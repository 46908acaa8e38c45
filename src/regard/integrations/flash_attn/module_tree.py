"""`install`: the modules that ``import flash_attn`` then finds."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from regard.errors import ConfigError
from regard.integrations.flash_attn import bert_padding, flash_attn_interface, rotary

__version__ = "2.8.3"
"""The release of flash-attn whose signatures these are."""

_PACKAGE = "flash_attn"
_ORIGIN = "regard.integrations.flash_attn"
_FUNCTIONS = {name: getattr(flash_attn_interface, name) for name in flash_attn_interface.__all__}
_CONTENTS: dict[str, dict[str, object]] = {
    "flash_attn": {"__version__": __version__, **_FUNCTIONS},
    "flash_attn.flash_attn_interface": {
        **_FUNCTIONS,
        "USE_TRITON_ROCM": flash_attn_interface.USE_TRITON_ROCM,
        "_get_block_size_n": flash_attn_interface._get_block_size_n,
    },
    "flash_attn.bert_padding": {name: getattr(bert_padding, name) for name in bert_padding.__all__},
    "flash_attn.layers": {},
    "flash_attn.layers.rotary": {name: getattr(rotary, name) for name in rotary.__all__},
}


def install(force: bool = False) -> ModuleType:
    """Make ``import flash_attn`` resolve to this drop-in, in this process, for code that imports it from now on.

    Calling it again changes nothing. Modules that hold flash-attn's own functions already keep them. What the drop-in
    does not provide (``flash_attn.ops``, ``flash_attn.modules``, ...) fails to import. The metadata of an installed
    distribution cannot be stood in for: ``importlib.metadata.version("flash_attn")`` still raises where flash-attn is
    not installed, so code that asks it, rather than ``flash_attn.__version__``, finds no flash-attn.

    Args:
        force: also where flash-attn itself is importable; it is then hidden from later imports.

    Returns:
        the module ``flash_attn``.

    Raises:
        ConfigError: flash-attn itself is importable and ``force`` is not given.
    """
    present = sys.modules.get(_PACKAGE)
    if present is not None and getattr(present.__spec__, "origin", None) == _ORIGIN:
        return present
    if not force and (found := _location_of_flash_attn()) is not None:
        raise ConfigError("force", force, f"True to hide the flash_attn that is importable already ({found})")
    for name in [name for name in sys.modules if name.split(".")[0] == _PACKAGE]:
        del sys.modules[name]
    sys.modules.update(_made_modules())
    return sys.modules[_PACKAGE]


def _location_of_flash_attn() -> str | None:
    if _PACKAGE in sys.modules:
        return str(getattr(sys.modules[_PACKAGE], "__file__", None) or "imported already")
    spec = importlib.util.find_spec(_PACKAGE)
    return None if spec is None else str(spec.origin or list(spec.submodule_search_locations or ()))


def _made_modules() -> dict[str, ModuleType]:
    modules = {}
    for name, contents in _CONTENTS.items():
        is_package = any(other.startswith(f"{name}.") for other in _CONTENTS)
        module = importlib.util.module_from_spec(ModuleSpec(name, None, origin=_ORIGIN, is_package=is_package))
        module.__doc__ = f"{name}, as {_ORIGIN} provides it."
        module.__dict__.update(contents)
        modules[name] = module
    for name, module in modules.items():
        parent, _, attribute = name.rpartition(".")
        if parent:
            setattr(modules[parent], attribute, module)
    return modules
