"""What Retry and CircuitBreaker tell."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from opentelemetry import context, trace
from opentelemetry.metrics import CallbackOptions, Observation

from towline.hooks import AttemptEnded, GaveUp, Hooks, RetryScheduled, StateChanged

from ._names import CURRENT, Attributes, Instruments, error_type

__all__ = ["Breakers", "RetryHooks"]

MAX_BREAKERS: Final = 1_000
"""Names of breakers whose state is kept."""

_STATES: Final = ("closed", "open", "half_open", "isolated")


class RetryHooks(Hooks):
    """What a Retry tells, around calls or around dials."""

    def __init__(self, operation: str, instruments: Instruments) -> None:
        self._operation = operation
        self._instruments = instruments

    def _about(self, error: Exception | None) -> Attributes:
        about: Attributes = {"towline.operation": self._operation}
        if error is not None:
            about["error.type"] = error_type(error)
        return about

    def on_attempt(self, event: AttemptEnded, /) -> None:
        self._instruments.attempts(1, self._about(event.error))

    def on_retry_scheduled(self, event: RetryScheduled, /) -> None:
        about = self._about(event.error)
        self._instruments.retries(1, about)
        if context.get_value(CURRENT) is not None:  # the current span is that of our call, or of our connection
            span = trace.get_current_span()
            if span.is_recording():
                del about["towline.operation"]
                span.add_event("towline.retry", {**about, "towline.resend_count": event.attempt - 1})

    def on_give_up(self, event: GaveUp, /) -> None:
        self._instruments.give_ups(1, {"towline.operation": self._operation, "towline.reason": event.reason.value})


class Breakers(Hooks):
    """The states of the breakers that have ever changed theirs."""

    def __init__(self) -> None:
        self._states: dict[str, str] = {}

    def on_state_change(self, event: StateChanged, /) -> None:
        if event.name in self._states or len(self._states) < MAX_BREAKERS:
            self._states[event.name] = event.new

    def observe(self, options: CallbackOptions, /) -> Iterable[Observation]:
        for name, current in list(self._states.items()):
            for state in _STATES:
                about = {"towline.breaker.name": name, "towline.breaker.state": state}
                yield Observation(int(state == current), about)
