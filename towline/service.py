"""The two ideas everything is made of: a Service answers one request, a Layer wraps a Service.

Nothing else belongs here. A plain ``async def`` with one parameter is a Service; a function from Service to Service is
a Layer. A layer that changes what comes out of connecting has two sides (`TwoSided`), since both ends of a connection
must speak it; one `Stack` value then describes both ends.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from towline.endpoint import Endpoint

if TYPE_CHECKING:
    from towline.link import Link
    from towline.scope import Scope

__all__ = ["Dial", "Kind", "Layer", "Service", "Side", "TwoSided", "Upgrade"]

Request = TypeVar("Request", contravariant=True)
Response = TypeVar("Response", covariant=True)
Q = TypeVar("Q")
R = TypeVar("R")


class Service(Protocol[Request, Response]):
    """Answers one request with one response, or raises. Shared and re-entrant; awaiting it is the back-pressure."""

    async def __call__(self, request: Request, /) -> Response: ...


@dataclass(frozen=True, slots=True)
class Dial:
    """The request that a connector answers with a connection.

    Attributes:
        endpoint: where to. A policy may change it before the next attempt.
        failures: how many dials and connections in a row carried nothing. Retry waits before its first attempt when
            there were any, so whoever dials again need not wait.
        cause: what ended the connection, or the attempt, before this one; None for a first dial. Whoever dials again
            bounds the whole, so a policy sets no limit of its own then.
        on_attempt: called by Retry before every attempt, and before the wait for it, with the attempt's
            number counted from 1, its delay in seconds, and the error before it if there was one. What it
            raises is logged and goes no further.

    >>> Dial(Endpoint.parse("tcp://localhost:7000")).failures
    0
    """

    endpoint: Endpoint
    failures: int = 0
    cause: Exception | None = None
    on_attempt: Callable[[int, float, Exception | None], None] | None = field(default=None, compare=False, repr=False)


class Layer(Protocol[Q, R]):
    """A transparent layer: wraps a Service and answers the same request with the same kind of response."""

    def __call__(self, inner: Service[Q, R], /) -> Service[Q, R]: ...


class Kind(enum.Enum):
    """What a layer gives to the layer outside it, and needs from the one inside it."""

    BYTES = "bytes"
    FRAMES = "frames"
    LINES = "lines"
    MESSAGES = "messages"
    CALLS = "calls"


class Side(enum.Enum):
    """Which end of a connection this is."""

    DIALLING = "dialling"
    LISTENING = "listening"

    @property
    def is_dialling(self) -> bool:
        return self is Side.DIALLING


class TwoSided(ABC):
    """A layer that both ends of a connection must have.

    ``needs`` and ``gives`` let a `Stack` check its order when it is built. ``wire`` names the protocol and its version,
    for the check that both ends stack the same layers.
    """

    needs: ClassVar[tuple[Kind, ...]]
    gives: ClassVar[Kind]
    wire: ClassVar[str]

    @abstractmethod
    def connector(self, inner: Service[Dial, Any], scope: Scope) -> Service[Dial, Any]:
        """The dialling side: a service that connects through ``inner`` and gives this layer's kind."""

    @abstractmethod
    def acceptor(self, inner: Service[Any, None], scope: Scope) -> Service[Any, None]:
        """The listening side: a service that takes what the layer inside accepted and hands ``inner`` this kind."""


class Upgrade(TwoSided):
    """A two-sided layer that negotiates once on a link, then leaves a stage behind on it.

    A subclass writes one coroutine, `upgrade`; both sides follow from it. Every such layer passes the same Link on.
    """

    @abstractmethod
    async def upgrade(self, link: Link, side: Side) -> None:
        """Negotiate over ``link``, then ``link.push`` the stage. The caller closes the link if this raises.

        Raises:
            HandshakeFailed: if the two ends come to no agreement. Each layer bounds its own negotiation in time.
        """

    def connector(self, inner: Service[Dial, Link], scope: Scope) -> Service[Dial, Link]:
        async def connect(dial: Dial, /) -> Link:
            link = await inner(dial)
            with link.closing_on_error():
                await self.upgrade(link, Side.DIALLING)
            return link

        return connect

    def acceptor(self, inner: Service[Link, None], scope: Scope) -> Service[Link, None]:
        async def accept(link: Link, /) -> None:
            with link.closing_on_error():
                await self.upgrade(link, Side.LISTENING)
            await inner(link)

        return accept
