"""What files are made of, for checkers of types: tables and lists of anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import TypeIs

__all__ = ["is_list", "is_table"]


def is_table(value: object) -> TypeIs[Mapping[str, Any]]:
    return isinstance(value, Mapping)


def is_list(value: object) -> TypeIs[list[Any] | tuple[Any, ...]]:
    return isinstance(value, (list, tuple))
