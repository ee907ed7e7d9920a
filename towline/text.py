"""How a value with many settings shows itself: by those that were set."""

from __future__ import annotations

import dataclasses
from typing import Any

__all__ = ["differing"]


def differing(self: Any) -> str:  # as a method names it
    """A dataclass as it could have been written: the fields that differ from their defaults.

    For ``__repr__ = differing`` in the class.

    >>> from towline import Timeout
    >>> differing(Timeout(5))
    'Timeout(seconds=5)'
    """
    shown: list[str] = []
    for field in dataclasses.fields(self):
        if not field.repr or not field.init:
            continue
        current = getattr(self, field.name)
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        if current is not default and current != default:
            text = f"0o{current:03o}" if field.type == "FileMode" else repr(current)
            shown.append(f"{field.name}={text}")
    return f"{type(self).__name__}({', '.join(shown)})"
