"""What can be said of a connection in text: in a file, or in a variable of the environment.

`Duration`, `Size` and `EndpointText` are types for fields of pydantic models, yours too. They read what people write,
give what layers take (seconds and bytes as plain numbers, an `Endpoint`), and write back the shortest text that means
the same.
"""

from ._text import (
    Duration,
    EndpointText,
    Size,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)

__all__ = [
    "Duration",
    "EndpointText",
    "Size",
    "format_duration",
    "format_size",
    "parse_duration",
    "parse_size",
]
