"""Every error that Towline raises, and the tree they stand in.

    TowlineError
    ├── MisuseError                    your call or your configuration is wrong; nothing was sent
    │   ├── StackError                 layers in an order that cannot work (also a ValueError)
    │   ├── EndpointError              an endpoint that cannot be read, or no transport for it (also a ValueError)
    │   ├── KeyFileError               a key that is missing, malformed or readable by others (also a ValueError)
    │   ├── ConfigError                a configuration that cannot work; says where in it (also a ValueError)
    │   ├── MessageTooLarge            a message above ``max_message`` (also a ValueError)
    │   └── BufferFull                 ``send_nowait`` with no room left (also anyio.WouldBlock)
    ├── ProtocolViolation              the peer, or something that poses as the peer, broke the protocol
    │   ├── FrameTooLarge              it announced a frame above the limit
    │   └── NonceExhausted             a key was used for all the records it may protect
    ├── HandshakeFailed                no connection came to be (also anyio.ConnectionFailed)
    │   ├── HandshakeRefused           the other end answered, and said no
    │   └── HandshakeTimeout           the other end did not finish in time
    ├── ConnectFailed                  the transport could not reach the endpoint (also anyio.ConnectionFailed)
    │   └── UnknownHost                its name does not resolve
    ├── ConnectionLost                 what was connected is no more (also anyio.BrokenResourceError)
    │   ├── LinkLost                   one link died; a session above it lives on
    │   └── SessionLost                the session cannot go on; says what was delivered
    │       └── SessionTakenOver       another holder of this session's secret has resumed it
    ├── CloseIncomplete                closed, but without proof that all was delivered
    ├── CallRejected                   a layer here turned a call away; nothing was sent
    │   ├── Overloaded                 there is no room: a limit is reached, a queue is full
    │   ├── RateLimited                too many calls in too short a time; says when there is room again
    │   ├── CircuitOpen                what is called has failed too often; says when it is tried again
    │   ├── Filtered                   a filter does not let this request through
    │   └── ServiceUnavailable         there is nothing behind this service
    ├── CallFailed                     the other end answered a call with an error; says whether the call had begun
    ├── Elapsed                        a call took longer than it may (also a TimeoutError)
    │   └── DeadlineExceeded           the caller's deadline has passed, or would before an answer
    └── ServiceClosed                  the service is closed, or was never entered (also anyio.ClosedResourceError)

Read it as *whose fault, and what next*. What a policy needs is an attribute, never text: ``retryable`` (would trying
again make sense), ``retry_after`` (seconds to wait before the next attempt, where somebody knows), ``sent`` (whether
the request may have been carried out). Errors of a stream are also anyio's, so an ``except anyio.BrokenResourceError``
written for any other stream works here.

No message, argument or repr holds a secret.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import anyio

__all__ = [
    "BufferFull",
    "CallFailed",
    "CallRejected",
    "CircuitOpen",
    "CloseIncomplete",
    "ConfigError",
    "ConnectFailed",
    "ConnectionLost",
    "DeadlineExceeded",
    "Elapsed",
    "EndpointError",
    "Fault",
    "Filtered",
    "FrameTooLarge",
    "HandshakeFailed",
    "HandshakeRefused",
    "HandshakeTimeout",
    "KeyFileError",
    "LinkLost",
    "LossReason",
    "MessageTooLarge",
    "MisuseError",
    "NonceExhausted",
    "Overloaded",
    "ProtocolViolation",
    "RateLimited",
    "ServiceClosed",
    "ServiceUnavailable",
    "SessionLost",
    "SessionTakenOver",
    "StackError",
    "StatusCode",
    "TowlineError",
    "UnknownHost",
]


ClosedHere: Final = anyio.ClosedResourceError
"""What using something raises that was closed on this side. For policies, which know no event loop: never retry it."""


class TowlineError(Exception):
    """The root: everything that Towline raises on purpose is one of these."""

    retryable: bool = False
    """Whether doing the same again may succeed. Policies decide by this, never by the class."""

    retry_after: float | None = None
    """Seconds to wait before the next attempt, where somebody knows: mostly the other end, which asked for it."""

    sent: bool | None = None
    """False: the request never left. True: it did, and nobody knows what became of it. None: this does not say."""

    def __reduce__(self) -> tuple[Any, ...]:
        # What __init__ takes differs from class to class; args and attributes are all there is to copy or pickle.
        return _rebuilt, (type(self), self.args, self.__dict__.copy())


def _rebuilt(cls: type[TowlineError], args: tuple[Any, ...], attributes: dict[str, Any]) -> TowlineError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(attributes)
    return error


# --- your call or your configuration -------------------------------------------------------------------------------


class MisuseError(TowlineError):
    """The call or the configuration is wrong. Nothing was sent; trying again changes nothing."""


class StackError(MisuseError, ValueError):
    """The layers cannot work in this order. The message names both layers and the fix."""


class EndpointError(MisuseError, ValueError):
    """An endpoint that cannot be read, or that no transport here serves."""


class KeyFileError(MisuseError, ValueError):
    """A key, or a file of keys, is missing, malformed, or readable by others. Never shows its content."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with a configuration.

    Attributes:
        problem: what, and what would be right.
        path: where in it, as ``layers.1.ttl``; empty for the whole.
        file: the file, if it is from one.
        line: the line there, counted from 1, where that is known.
    """

    problem: str
    path: str = ""
    file: str | None = None
    line: int | None = None

    def __str__(self) -> str:
        if self.file is None:
            place = "" if self.line is None else f"line {self.line}"
        else:
            place = self.file if self.line is None else f"{self.file}:{self.line}"
        return ": ".join(each for each in (place, self.path, self.problem) if each)


class ConfigError(MisuseError, ValueError):
    """A configuration cannot be read, or says what cannot work. The message has one line for each fault, and shows
    nothing of what was given where a key should stand.

    Attributes:
        faults: all that is wrong, as far as it can be told at once.
    """

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("\n".join(map(str, faults)))
        self.faults = tuple(faults)


class MessageTooLarge(MisuseError, ValueError):
    """A message is longer than this session can ever carry. It was not sent.

    Attributes:
        size: bytes in the message.
        limit: the most bytes that a message may have here.
    """

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(size, limit)
        self.size = size
        self.limit = limit

    def __str__(self) -> str:
        return f"a message of {self.size:,} bytes, where max_message is {self.limit:,}"


class BufferFull(MisuseError, anyio.WouldBlock):
    """``send_nowait`` found no room in the replay buffer. The message was not sent; ``await send()`` waits for room.

    Attributes:
        buffered: bytes of cost that wait for an acknowledgement.
        limit: the size of the replay buffer, in bytes of cost.
    """

    retryable = True

    def __init__(self, buffered: int, limit: int) -> None:
        super().__init__(buffered, limit)
        self.buffered = buffered
        self.limit = limit

    def __str__(self) -> str:
        return f"the replay buffer holds {self.buffered:,} bytes of {self.limit:,}"


# --- the peer broke the protocol -----------------------------------------------------------------------------------


class ProtocolViolation(TowlineError):
    """The peer broke the protocol, or is not a Towline peer at all. Ends the link, not the session above it."""

    retryable = True


class FrameTooLarge(ProtocolViolation):
    """The peer announced a frame above the limit. Nothing was allocated for it.

    Attributes:
        size: bytes that the header announced.
        limit: the most that is accepted at this point.
    """

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(size, limit)
        self.size = size
        self.limit = limit

    def __str__(self) -> str:
        return f"the peer announced a frame of {self.size:,} bytes, where {self.limit:,} are accepted"


class NonceExhausted(ProtocolViolation):
    """A key has protected as many records as it may; nothing more is sealed or opened with it."""


# --- no connection came to be --------------------------------------------------------------------------------------


class HandshakeFailed(TowlineError, anyio.ConnectionFailed):
    """The other end was reached, and no connection came of it.

    On a first connect this is final; on the way back to a session that exists it is retried, since a captive portal or
    a re-used address must not end a session.

    Attributes:
        ended: the other end closed the link without a word, as a server does that is just starting.
    """

    def __init__(self, message: str, *, ended: bool = False) -> None:
        super().__init__(message)
        self.ended = ended
        self.retryable = ended


class HandshakeRefused(HandshakeFailed):
    """The other end answered and refused: a wrong key, another stack, another version. It does not say which."""


class HandshakeTimeout(HandshakeFailed):
    """The other end did not finish its handshake in time."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.retryable = True


class ConnectFailed(TowlineError, anyio.ConnectionFailed):
    """The transport could not reach the endpoint: refused, unreachable, timed out, no such socket file."""

    retryable = True


class UnknownHost(ConnectFailed):
    """The host's name does not resolve. Final on a first connect, retried on the way back to a session."""

    retryable = False


# --- what was connected is no more ---------------------------------------------------------------------------------


class ConnectionLost(TowlineError, anyio.BrokenResourceError):
    """What was connected is no more, and no promise says that the last messages arrived."""

    retryable = True


class LinkLost(ConnectionLost):
    """One link died: cut, reset, silent for too long, or closed by a protocol error (then the ``__cause__``)."""


class LossReason(enum.Enum):
    """Why a session cannot go on."""

    EXPIRED = "it was detached for longer than its time to live"
    EVICTED = "the peer had to make room and gave it up while it was detached"
    UNKNOWN_SESSION = "the peer does not know it: it was restarted, or forgot it"
    CLOSED = "the peer had closed it already"
    ABORTED = "the peer aborted it"
    UNREAD = "the peer closed it without reading what was still under way"
    GOING_AWAY = "the peer is shutting down"
    REVOKED = "the peer no longer accepts our key"
    TAKEN_OVER = "another holder of its secret has resumed it"
    STATE_MISMATCH = "the two ends disagree about what was sent"
    UNSUPPORTED = "the two ends no longer speak one version"
    INTERNAL = "the peer's handler failed"
    GAVE_UP = "no way back to the peer was found in time"
    LOCAL_ABORT = "it was aborted here"

    def __str__(self) -> str:
        return self.value


class SessionLost(ConnectionLost):
    """The session cannot go on. Every message is in one of three classes, and this says which.

    A message numbered above ``sent_upto`` was *not sent*; one numbered up to ``delivered_upto`` (when that is known)
    was placed in the peer's receive queue; what is between is unknown.

    Attributes:
        reason: why, as a `LossReason`.
        delivered_upto: the number of the last message that the peer is known to have received, counted from 1; None
            when nobody can say any more.
        sent_upto: the number of the last message that was ever handed to a link.
        unacked: the messages that the peer has not acknowledged, oldest first.
    """

    retryable = False

    def __init__(
        self,
        reason: LossReason,
        *,
        delivered_upto: int | None = None,
        sent_upto: int = 0,
        unacked: Sequence[bytes] = (),
        detail: str = "",
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.delivered_upto = delivered_upto
        self.sent_upto = sent_upto
        self.unacked = tuple(unacked)
        self.detail = detail

    def __str__(self) -> str:
        delivered = "nobody can say what was" if self.delivered_upto is None else f"{self.delivered_upto}"
        detail = f" ({self.detail})" if self.detail else ""
        return (
            f"the session is lost: {self.reason}{detail}; sent up to message {self.sent_upto}, "
            f"delivered: {delivered}, not acknowledged: {len(self.unacked)}"
        )


class SessionTakenOver(SessionLost):
    """Another process that holds this session's secret has resumed it. This end must not fight for it."""

    def __init__(
        self,
        *,
        delivered_upto: int | None = None,
        sent_upto: int = 0,
        unacked: Sequence[bytes] = (),
    ) -> None:
        super().__init__(LossReason.TAKEN_OVER, delivered_upto=delivered_upto, sent_upto=sent_upto, unacked=unacked)


class CloseIncomplete(TowlineError):
    """The session is closed, but the peer did not acknowledge everything in time.

    Attributes:
        unacked: how many messages it has not acknowledged.
    """

    def __init__(self, unacked: int) -> None:
        super().__init__(unacked)
        self.unacked = unacked

    def __str__(self) -> str:
        return f"closed with {self.unacked} messages that the peer did not acknowledge"


# --- a layer around calls said no ----------------------------------------------------------------------------------


class CallRejected(TowlineError):
    """A layer on this side turned the call away, before anything was sent: trying again repeats nothing."""

    retryable = True
    sent = False


class Overloaded(CallRejected):
    """There is no room for one more call: a limit is reached, or a queue is full, and nobody is to wait."""


class RateLimited(CallRejected):
    """There were too many calls in too short a time; ``retry_after`` says in how many seconds there is room again."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class CircuitOpen(CallRejected):
    """What is called has failed too often, so a circuit breaker lets nothing through for a while.

    Attributes:
        retry_after: seconds until it is tried again; None if nobody can say: it was isolated by hand, or is being tried
            just now.
    """

    retryable = False

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Filtered(CallRejected):
    """A filter does not let this request through; the same request again would meet the same answer."""

    retryable = False


class ServiceUnavailable(CallRejected):
    """There is nothing behind this service that could answer."""

    retryable = False


# --- the other end answered a call with an error -------------------------------------------------------------------


class StatusCode(enum.IntEnum):
    """What became of a call, in one word that programs understand. The numbers and their meanings are gRPC's."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


_RETRYABLE_CODES: Final = {StatusCode.UNAVAILABLE, StatusCode.RESOURCE_EXHAUSTED, StatusCode.ABORTED}


class CallFailed(TowlineError):
    """A call was answered with an error. A handler raises it, and the caller gets it: the same on both sides.

    Attributes:
        code: what went wrong, as a `StatusCode`.
        message: the same for people; "" for nothing to say.
        details: more of it for programs: text to bytes.
        refused: the call had not begun, and will not: to make it again repeats nothing (``sent`` is False then).
        retry_after: seconds until it is worth another attempt, where the other end knows.

    >>> CallFailed(StatusCode.NOT_FOUND, "no user 7")
    CallFailed(StatusCode.NOT_FOUND, 'no user 7')
    >>> print(CallFailed(StatusCode.NOT_FOUND, "no user 7"))
    NOT_FOUND: no user 7
    """

    def __init__(
        self,
        code: StatusCode,
        message: str = "",
        *,
        details: Mapping[str, bytes] | None = None,
        refused: bool = False,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.details: Mapping[str, bytes] = {} if details is None else details
        self.refused = refused
        self.sent = not refused
        self.retryable = code in _RETRYABLE_CODES
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"{self.code.name}: {self.message}" if self.message else self.code.name

    def __repr__(self) -> str:
        code = f"StatusCode.{self.code.name}"
        shown = [code, repr(self.message)] if self.message else [code]
        shown += [f"details={self.details!r}"] * bool(self.details) + ["refused=True"] * self.refused
        return f"CallFailed({', '.join(shown)})"


# --- a call took too long ------------------------------------------------------------------------------------------


class Elapsed(TowlineError, TimeoutError):
    """A call took longer than it may, and was cancelled. Whether it was carried out, nobody can say.

    Attributes:
        seconds: how long it was given.
    """

    sent = True

    def __init__(self, seconds: float, message: str = "") -> None:
        super().__init__(message or f"no response within {seconds:g} s")
        self.seconds = seconds


class DeadlineExceeded(Elapsed):
    """The caller's deadline has passed, or would before an answer. With ``sent`` False the call was never begun."""

    def __init__(self, seconds: float, message: str = "", *, sent: bool = True) -> None:
        super().__init__(seconds, message or f"the deadline has passed after {seconds:g} s")
        self.sent = sent


class ServiceClosed(TowlineError, anyio.ClosedResourceError):
    """The service was closed here, or was never entered by ``async with``. Trying again changes nothing."""

    sent = False
