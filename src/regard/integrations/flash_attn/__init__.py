"""A drop-in for flash-attn 2.8: its public functions, with its signatures, served by regard on any device.

    from regard.integrations.flash_attn import flash_attn_func   # instead of: from flash_attn import flash_attn_func

or, for code that only knows the name ``flash_attn``, once before that code is imported:

    regard.integrations.flash_attn.install()

Where flash-attn has limits of its own (half precision, head dims to 256, pages of 256 keys, softcap without dropout)
these functions have those of the backend that serves the call. Three things differ on purpose:

- ``softmax_lse`` of a row that sees no key is -inf, as the formula says; flash-attn writes +inf. It is differentiable.
- with ALiBi and ``causal``, ``softmax_lse`` belongs to the bias that flash-attn documents,
  ``-slope * |i + Sk - Sq - j|``; its kernel adds a constant to each row there, which changes lse and not out.
- malformed input raises `regard.ConfigError` where flash-attn would read out of bounds.
"""

from regard.integrations.flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from regard.integrations.flash_attn.module_tree import __version__, install

__all__ = [
    "__version__",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install",
]
