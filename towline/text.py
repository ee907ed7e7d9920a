"""How values show themselves: those with many settings by what was set, and what may be a key not at all."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Final

__all__ = ["MASK", "differing", "printable", "without_keys"]

MASK: Final = "**********"
"""What stands for a key where it is not shown."""

_A_KEY: Final = re.compile(
    # 32 bytes in base64
    r"(?<![A-Za-z0-9+_-])[A-Za-z0-9+/_-]{43}="
    # or without its padding: then by what it is made of, since a path may be as long
    r"|(?:(?<=://)|(?<![A-Za-z0-9+/_-]))"
    r"(?=[A-Za-z+/_-]*[0-9])(?=[a-z0-9+/_-]*[A-Z])(?=[A-Z0-9+/_-]*[a-z])"
    r"[A-Za-z0-9+/_-]{43}(?![A-Za-z0-9+/_-])"
    # or in hexadecimal
    r"|(?<![0-9A-Fa-f])(?:[0-9A-Fa-f]{2}:?){31}[0-9A-Fa-f]{2}(?![0-9A-Fa-f])"
)


def printable(text: str) -> str:
    """The text in one line that moves no cursor: for what others have said, and a terminal shows.

    >>> printable("a name\\x1b[2J, and\\na line")
    'a name\ufffd[2J, and\ufffda line'
    """
    return text if text.isprintable() else "".join(each if each.isprintable() else "\ufffd" for each in text)


def without_keys(text: str) -> str:
    """The text with a mask in place of whatever could be a key: put in the wrong place, it must not be shown there.

    >>> without_keys("there is no such file: " + "00" * 32)
    'there is no such file: **********'
    """
    return _A_KEY.sub(MASK, text)


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
