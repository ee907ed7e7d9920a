"""Decisions, apart from the layers that carry them out: no I/O, no clock and no event loop."""

from __future__ import annotations

from .backoff import Backoff, Jitter
from .retry import Failure, Policy, PolicySession, StandardPolicy

__all__ = [
    "Backoff",
    "Failure",
    "Jitter",
    "Policy",
    "PolicySession",
    "StandardPolicy",
]
