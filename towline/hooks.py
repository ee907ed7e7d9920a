"""What layers tell whoever wants to know: telemetry, a log, a test.

A layer that has something to tell takes ``hooks``. Subclass `Hooks`, write the methods that you care about, and give
the same object to as many layers as you like. Hooks are called in the task that does what they are told of, must not
block, and can harm nothing: what they raise is logged and dropped.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from towline.layers.resume import Session
    from towline.link import Link

__all__ = [
    "AllOf",
    "AttemptEnded",
    "CallShed",
    "ConnectBegan",
    "ConnectEnded",
    "GaveUp",
    "GiveUp",
    "HandshakeEnded",
    "HedgeStarted",
    "Hooks",
    "LinkAttached",
    "LinkDetached",
    "RetryScheduled",
    "RoundTripMeasured",
    "SessionEnded",
    "StateChanged",
    "tell",
    "tell_handshake",
]

E = TypeVar("E")

logger = logging.getLogger(__name__)


class GiveUp(enum.StrEnum):
    """Why no further attempt is made."""

    NOT_RETRYABLE = "not_retryable"
    NOT_CLONEABLE = "not_cloneable"
    NOT_IDEMPOTENT = "not_idempotent"
    BREAKER = "breaker"
    INNER = "inner"
    ATTEMPTS = "attempts"
    ELAPSED = "elapsed"
    BACKOFF = "backoff_exhausted"
    DEADLINE = "deadline"
    BUDGET = "budget"

    @property
    def is_exhaustion(self) -> bool:
        """Whether an outer Retry must take it for final, too: everything was tried that was allowed."""
        return self in _EXHAUSTIONS


_EXHAUSTIONS: Final = {GiveUp.ATTEMPTS, GiveUp.ELAPSED, GiveUp.BACKOFF, GiveUp.DEADLINE, GiveUp.BUDGET, GiveUp.INNER}


@dataclass(frozen=True, slots=True)
class AttemptEnded:
    """An attempt is over.

    Attributes:
        attempt: its number, counted from 1.
        elapsed: seconds that it took.
        error: what it raised; None if it answered.
        handled: the policy wants another attempt, so this outcome is not the caller's.
    """

    attempt: int
    elapsed: float
    error: Exception | None
    handled: bool


@dataclass(frozen=True, slots=True)
class RetryScheduled:
    """Another attempt will be made.

    Attributes:
        attempt: its number, so 2 for the first retry.
        delay: seconds until it begins; None if the policy waits for something other than time.
        error: what the attempt before it raised; None after a response that the policy did not like.
    """

    attempt: int
    delay: float | None
    error: Exception | None


@dataclass(frozen=True, slots=True)
class GaveUp:
    """No further attempt is made, and the caller gets the last outcome.

    Attributes:
        attempts: how many there were.
        elapsed: seconds since the first began.
        reason: why.
        error: what the caller gets; None if it is a response that the policy did not like.
    """

    attempts: int
    elapsed: float
    reason: GiveUp
    error: Exception | None


@dataclass(frozen=True, slots=True)
class StateChanged:
    """A circuit breaker has changed its state, or a `Reconnect`.

    Attributes:
        name: what it is called.
        old: the state before. Of a breaker ``closed``, ``open``, ``half_open`` or ``isolated``; of a `Reconnect`
            ``closed``, ``idle``, ``connecting``, ``connected`` or ``waiting``.
        new: the state now.
        reason: why, for people.
    """

    name: str
    old: str
    new: str
    reason: str


@dataclass(frozen=True, slots=True)
class HedgeStarted:
    """A second call, or a later one, was started beside one that has not answered yet.

    Attributes:
        attempt: its number, so 2 for the first hedge.
        elapsed: seconds since the first call began.
        error: the failure that it was started for; None if it was started because time had passed.
    """

    attempt: int
    elapsed: float
    error: Exception | None


@dataclass(frozen=True, slots=True)
class CallShed:
    """A call was turned away.

    Attributes:
        layer: the layer that did so.
        error: what the caller gets.
    """

    layer: str
    error: Exception


@dataclass(frozen=True, slots=True)
class ConnectBegan:
    """A client looks for a link.

    Attributes:
        session: the session that needs it; None for the first link of one that does not exist yet.
    """

    session: Session | None


@dataclass(frozen=True, slots=True)
class ConnectEnded:
    """A client looks for a link no longer. Told in the task in which it began, however it ends.

    Attributes:
        session: as it was told at the beginning.
        error: why there is none; None if there is one, or nobody needs it any more.
    """

    session: Session | None
    error: BaseException | None


@dataclass(frozen=True, slots=True)
class HandshakeEnded:
    """A layer has negotiated with the other end of a link.

    Attributes:
        layer: which one.
        link: over which link.
        elapsed: seconds that it took.
        error: what it failed with, a cancellation included; None if it succeeded.
    """

    layer: str
    link: Link
    elapsed: float
    error: BaseException | None


@dataclass(frozen=True, slots=True)
class LinkAttached:
    """A session goes on over a link, or begins.

    Attributes:
        session: which one; its ``epoch`` is the number of the link.
        link: the link.
        is_resumed: whether there was another before.
        replayed: messages that are sent again.
        replayed_bytes: their bytes.
    """

    session: Session
    link: Link
    is_resumed: bool
    replayed: int
    replayed_bytes: int


@dataclass(frozen=True, slots=True)
class LinkDetached:
    """A session has lost its link, or is over and needs it no longer: see its ``state``.

    Attributes:
        session: which one.
        link: the link.
        error: why.
        is_lost: it broke; else it is replaced, or not needed any more.
    """

    session: Session
    link: Link
    error: Exception
    is_lost: bool


@dataclass(frozen=True, slots=True)
class SessionEnded:
    """A session is over.

    Attributes:
        session: which one.
        error: why it was lost; None if it was closed.
    """

    session: Session
    error: Exception | None


@dataclass(frozen=True, slots=True)
class RoundTripMeasured:
    """A heartbeat has come back.

    Attributes:
        link: over which link.
        seconds: the round trip.
    """

    link: Link
    seconds: float


class Hooks:
    """Does nothing with what it is told. Subclass it, and write the methods that you care about.

    >>> class Printed(Hooks):
    ...     def on_retry_scheduled(self, event: RetryScheduled) -> None:
    ...         print(f"attempt {event.attempt} in {event.delay} s")
    >>> Printed().on_retry_scheduled(RetryScheduled(2, 0.5, None))
    attempt 2 in 0.5 s
    """

    def on_attempt(self, event: AttemptEnded, /) -> None:
        """An attempt is over."""

    def on_retry_scheduled(self, event: RetryScheduled, /) -> None:
        """Another attempt will be made; called before the wait for it."""

    def on_give_up(self, event: GaveUp, /) -> None:
        """No further attempt is made."""

    def on_state_change(self, event: StateChanged, /) -> None:
        """A circuit breaker or a `Reconnect` has changed its state."""

    def on_hedge(self, event: HedgeStarted, /) -> None:
        """A call was started beside one that has not answered yet."""

    def on_shed(self, event: CallShed, /) -> None:
        """A call was turned away."""

    def on_connect_begin(self, event: ConnectBegan, /) -> None:
        """A client looks for a link."""

    def on_connect_end(self, event: ConnectEnded, /) -> None:
        """A client looks for a link no longer."""

    def on_handshake(self, event: HandshakeEnded, /) -> None:
        """A layer has negotiated, or failed to."""

    def on_attach(self, event: LinkAttached, /) -> None:
        """A session goes on over a link, or begins."""

    def on_detach(self, event: LinkDetached, /) -> None:
        """A session has no link any more."""

    def on_session_end(self, event: SessionEnded, /) -> None:
        """A session is over."""

    def on_round_trip(self, event: RoundTripMeasured, /) -> None:
        """A heartbeat has come back."""


class AllOf(Hooks):
    """Several hooks as one. Each is told, whatever those before it raise. Equal to another of the very same.

    >>> class Printed(Hooks):
    ...     def on_shed(self, event: CallShed) -> None:
    ...         print(f"shed by {event.layer}")
    >>> AllOf(Printed(), Printed()).on_shed(CallShed("LoadShed", ValueError()))
    shed by LoadShed
    shed by LoadShed
    """

    def __init__(self, *hooks: Hooks) -> None:
        self.hooks = hooks

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AllOf) and [*map(id, self.hooks)] == [*map(id, other.hooks)]

    def __hash__(self) -> int:
        return hash((*map(id, self.hooks),))

    def __repr__(self) -> str:
        return f"AllOf({', '.join(map(repr, self.hooks))})"


def _telling(name: str) -> Callable[[AllOf, object], None]:
    def tell_all(self: AllOf, event: object, /) -> None:
        for hooks in self.hooks:
            tell(getattr(hooks, name), event)

    return tell_all


for _name in [name for name in vars(Hooks) if name.startswith("on_")]:
    setattr(AllOf, _name, _telling(_name))


def tell(hook: Callable[[E], None], event: E) -> None:
    """Call a hook for a layer: what it raises is logged, and goes no further."""
    try:
        hook(event)
    except Exception:
        logger.exception("a hook raised; the call goes on", extra={"event": "hook.failed"})


@contextmanager
def tell_handshake(hooks: Hooks | None, layer: str, link: Link) -> Generator[None]:
    """Tell hooks of the handshake that the block is, whatever becomes of it."""
    if hooks is None:
        yield
        return
    clock = link._clock
    began = clock()
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
        raise
    finally:
        tell(hooks.on_handshake, HandshakeEnded(layer, link, clock() - began, error))
        del error  # or it would hold this frame, and this frame the error
