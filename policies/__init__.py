"""Decisions, apart from the layers that carry them out: no I/O, no clock of their own and no event loop."""

from __future__ import annotations

from .backoff import Backoff
from .breaker import Admitted, Breaker, BreakerChange, BreakerCounts, BreakerPolicy, BreakerState
from .budget import Budget, ConcurrencyBudget, Empty, TokenRatioBudget, TpsBudget, Unlimited
from .classify import Errors, excluder, is_transient, matcher, says_retryable
from .failover import Failover
from .hedge import Percentile, RotatingHistogram
from .jitter import Jitter
from .load import PeakEwma, RoundTrips
from .rate import FixedWindow, Gcra, Meter, Rate
from .retry import NOT_CLONEABLE, Answer, Attempt, GiveUp, NotCloneable, Policy, PolicySession
from .standard import StandardPolicy

__all__ = [
    "NOT_CLONEABLE",
    "Admitted",
    "Answer",
    "Attempt",
    "Backoff",
    "Breaker",
    "BreakerChange",
    "BreakerCounts",
    "BreakerPolicy",
    "BreakerState",
    "Budget",
    "ConcurrencyBudget",
    "Empty",
    "Errors",
    "Failover",
    "FixedWindow",
    "Gcra",
    "GiveUp",
    "Jitter",
    "Meter",
    "NotCloneable",
    "PeakEwma",
    "Percentile",
    "Policy",
    "PolicySession",
    "Rate",
    "RotatingHistogram",
    "RoundTrips",
    "StandardPolicy",
    "TokenRatioBudget",
    "TpsBudget",
    "Unlimited",
    "excluder",
    "is_transient",
    "matcher",
    "says_retryable",
]
