"""Numbers as people read them in a view that is redrawn: short, and of much the same width."""

from __future__ import annotations

from typing import Final

__all__ = ["duration", "round_trip", "size"]

_NEXT: Final = {"m": 60, "h": 24}
"""How many of a unit make the next one."""


def size(count: float) -> str:
    """Bytes.

    >>> size(512), size(1536), size(3 << 30)
    ('512 B', '1.5 KiB', '3.0 GiB')
    """
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def round_trip(seconds: float | None) -> str:
    """A round trip, or a dash where none was measured.

    >>> round_trip(0.0234), round_trip(None)
    ('23.4 ms', '-')
    """
    return "-" if seconds is None else f"{seconds * 1000:.1f} ms"


def duration(seconds: float) -> str:
    """How long something takes: in its two largest units.

    >>> duration(4.24), duration(75), duration(7260), duration(200_000)
    ('4.2 s', '1m 15s', '2h 1m', '2d 7h')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    for large, small, unit, length in (("m", "s", 1, 60), ("h", "m", 60, 60)):
        whole, rest = divmod(int(seconds) // unit, length)
        if whole < _NEXT[large]:
            return f"{whole}{large} {rest}{small}"
    hours = int(seconds) // 3600
    return f"{hours // 24}d {hours % 24}h"
