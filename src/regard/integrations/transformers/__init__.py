"""Serve Hugging Face transformers models: ``attn_implementation="regard"`` after one `register()`.

Two functions are registered. `visibility_mask` runs once a forward pass and layer kind and says what is visible as a
few numbers and short vectors (`Visibility`) instead of an S x S mask; `attention_forward` runs in every layer and hands
that to `regard.attention`.

transformers counts positions from the start of a sequence, regard aligns bottom-right. With query i at position
``i + q_offset`` and key j at ``j + kv_offset``, "key <= query" reads ``j <= i + q_offset - kv_offset``, which is
regard's causal with ``kv_lens = q_offset - kv_offset + Sq`` keys.
"""

from transformers import AttentionInterface, AttentionMaskInterface

from regard.errors import ConfigError
from regard.integrations.transformers.attention import attention_forward
from regard.integrations.transformers.visibility import Visibility, visibility_mask

__all__ = ["NAME", "Visibility", "attention_forward", "register", "visibility_mask"]

NAME = "regard"


def register(name: str = NAME) -> None:
    """Make ``attn_implementation=name`` work in every transformers model that uses the attention interface.

    Registers the attention function and the mask function under one name: without the latter transformers passes no
    mask at all and padding would be attended to. Calling it again is fine.

    Args:
        name: what to pass as ``attn_implementation``. transformers gives names that contain ``flash``, ``sdpa``,
            ``flex_attention``, ``eager``, ``paged`` or ``/`` a meaning of its own.

    Raises:
        ConfigError: the name is one that transformers would redirect.
    """
    if not name or any(taken in name for taken in ("flash", "sdpa", "flex_attention", "eager", "paged", "/", "|")):
        raise ConfigError("name", repr(name), "a name in which transformers reads nothing of its own, such as 'regard'")
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, visibility_mask)
