"""Exact softmax attention at hardware speed, on whatever device the tensors are on."""

import importlib.util
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from regard.public import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        """Import what the package exports, and torch with it, when one of its names is first used.

        ``regard --help`` answers at once that way.
        """
        if name.startswith("_") or importlib.util.find_spec(f"{__name__}.{name}"):  # a submodule is only ever imported
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        public = vars(importlib.import_module(f"{__name__}.public"))
        globals().update({key: value for key, value in public.items() if not key.startswith("_")})
        if name not in public:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return public[name]
