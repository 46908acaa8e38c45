"""The names that `regard` exports."""

from regard.api import attention as attention
from regard.api import explain as explain
from regard.api import merge as merge
from regard.api import paged_attention as paged_attention
from regard.api import varlen_attention as varlen_attention
from regard.config import AttentionConfig as AttentionConfig
from regard.config import AttentionInputs as AttentionInputs
from regard.config import KvCacheLayout as KvCacheLayout
from regard.errors import ConfigError as ConfigError
from regard.errors import FallbackWarning as FallbackWarning
from regard.errors import Reason as Reason
from regard.errors import UnsupportedError as UnsupportedError
from regard.registry import AttentionBackend as AttentionBackend
from regard.registry import Explanation as Explanation
from regard.registry import Registry as Registry
from regard.registry import Selection as Selection
from regard.registry import can_use_flash_attention as can_use_flash_attention
from regard.registry import registry as _registry

register = _registry.register
unregister = _registry.unregister
set_default = _registry.set_default
use_backend = _registry.use_backend
list_backends = _registry.list_backends
record_selections = _registry.record_selections
