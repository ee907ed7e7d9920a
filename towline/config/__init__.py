"""A stack in text: in a file, or in variables of the environment.

`StackConfig` reads one from TOML, JSON, YAML or the environment and builds the stack that code would have built;
``Stack.to_config`` is the way back. `TunnelConfig` is one with what the two ends of a tunnel do.

`Duration`, `Size` and `EndpointText` are types for fields of pydantic models, yours too. They read what people write,
give what layers take (seconds and bytes as plain numbers, an `Endpoint`), and write back the shortest text that means
the same.
"""

from ._advice import Advice, advise
from ._stack import StackConfig
from ._text import (
    Duration,
    EndpointText,
    Size,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)
from ._tunnel import ForwardConfig, ListenConfig, TunnelConfig

__all__ = [
    "Advice",
    "Duration",
    "EndpointText",
    "ForwardConfig",
    "ListenConfig",
    "Size",
    "StackConfig",
    "TunnelConfig",
    "advise",
    "format_duration",
    "format_size",
    "parse_duration",
    "parse_size",
]
