"""What stands between a call and an SDK, an exporter or a propagator that raises."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["safely"]

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger(__name__)


def safely(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T | None:
    """Call a function; what it raises is logged, and stands for None.

    >>> safely(len, "four")
    4
    """
    try:
        return function(*args, **kwargs)
    except Exception:
        logger.exception("telemetry failed; what it is about goes on", extra={"event": "telemetry.failed"})
        return None
