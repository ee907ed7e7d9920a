"""The two ideas everything is made of: a Service answers one request, a Layer wraps a Service.

Nothing else belongs here. A plain ``async def`` with one parameter is a Service; a function from Service to Service is
a Layer. What a layer makes is a `Wrapper`, so that hints (`ready_now`, `refuses_now`, `load`) and lifetimes (`running`)
reach through any number of layers. A layer that changes what comes out of connecting has two sides (`TwoSided`), since
both ends of a connection must speak it; one `Stack` value then describes both ends.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, Self, TypeVar, cast

from typing_extensions import TypeVar as TypeVarWithDefault

from towline.endpoint import Endpoint
from towline.errors import MisuseError

if TYPE_CHECKING:
    from towline.link import Link
    from towline.scope import Scope

__all__ = [
    "Dial",
    "Kind",
    "Layer",
    "Service",
    "Side",
    "TwoSided",
    "Upgrade",
    "Wrapper",
    "load",
    "offered",
    "ready_now",
    "refuses_now",
    "running",
]

Request = TypeVar("Request", contravariant=True)
Response = TypeVar("Response", covariant=True)
Q = TypeVar("Q")
R = TypeVar("R")
C_co = TypeVarWithDefault("C_co", covariant=True, default=Any)


class Service(Protocol[Request, Response]):
    """Answers one request with one response, or raises. Shared and re-entrant; awaiting it is the back-pressure."""

    # Not ``async def``, which checkers take for a coroutine of one certain class, as a decorated function gives none.
    def __call__(self, request: Request, /) -> Coroutine[Any, Any, Response]: ...


@dataclass(frozen=True, slots=True)
class Dial:
    """The request that a connector answers with a connection.

    Attributes:
        endpoint: where to. A policy may change it before the next attempt.
        failures: how many dials and connections in a row carried nothing. Retry waits before its first attempt when
            there were any, so whoever dials again need not wait.
        cause: what ended the connection, or the attempt, before this one; None for a first dial. Whoever dials again
            bounds the whole, so a policy sets no limit of its own then.
        pinned: this endpoint holds a session, so a policy must not fail over to another.
        on_attempt: called by Retry before every attempt, and before the wait for it, with the attempt's
            number counted from 1, its delay in seconds, and the error before it if there was one. What it
            raises is logged and goes no further.

    >>> Dial(Endpoint.parse("tcp://localhost:7000")).failures
    0
    """

    endpoint: Endpoint
    failures: int = 0
    cause: Exception | None = None
    pinned: bool = False
    on_attempt: Callable[[int, float, Exception | None], None] | None = field(default=None, compare=False, repr=False)


class Layer(Protocol):
    """A transparent layer: wraps a Service and answers the same request with the same kind of response.

    A layer that changes either is a ``Callable[[Service[Q1, R1]], Service[Q2, R2]]``.
    """

    def __call__(self, inner: Service[Q, R], /) -> Service[Q, R]: ...


# --- what layers make ----------------------------------------------------------------------------------------------


class Wrapper(ABC, Generic[Q, R]):
    """A service around another one: the base of what layers make.

    A subclass writes ``__call__``. Hints and lifetimes are those of the service inside, unless it overrides them.

    Attributes:
        inner: the service inside.

    >>> import anyio
    >>> class Twice(Wrapper[int, int]):
    ...     async def __call__(self, request: int, /) -> int:
    ...         return 2 * await self.inner(request)
    >>> async def same(request: int, /) -> int:
    ...     return request
    >>> Twice(same)
    <Twice around same>
    >>> anyio.run(Twice(same), 21)
    42
    """

    __slots__ = ("_exit", "inner")

    inner: Service[Any, Any]

    def __init__(self, inner: Service[Any, Any]) -> None:  # Any: a layer may change both types
        self.inner = inner
        self._exit: AsyncExitStack | None = None

    @abstractmethod
    async def __call__(self, request: Q, /) -> R:
        """Answer a request."""

    def ready_now(self) -> bool:
        """Whether a call would probably begin without waiting. A hint: it reserves nothing."""
        return ready_now(self.inner)

    def refuses_now(self) -> bool:
        """Whether a call would be turned away at once, rather than wait. A hint: it reserves nothing."""
        return refuses_now(self.inner)

    def load(self) -> float:
        """How busy the service is, in a unit that only compares with its like. A hint."""
        return load(self.inner)

    def _running(self) -> AbstractAsyncContextManager[object] | None:
        """What this service itself runs while it is entered, such as a task; None for nothing."""
        return None

    async def __aenter__(self) -> Self:
        """Start what this service and those inside it run. If that is nothing, any number of users may do so at once.

        Raises:
            MisuseError: if it is entered already.
        """
        if self._exit is not None:
            raise MisuseError(f"{self!r} is entered already")
        if not _owns(self):
            return self
        self._exit = AsyncExitStack()
        try:
            async with AsyncExitStack() as entered:
                await entered.enter_async_context(running(self.inner))
                own = self._running()
                if own is not None:
                    await entered.enter_async_context(own)
                self._exit = entered.pop_all()
        except BaseException:
            self._exit = None
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        """End what was started, the outermost first."""
        entered, self._exit = self._exit, None
        return None if entered is None else await entered.__aexit__(kind, error, traceback)

    def __repr__(self) -> str:
        return f"<{type(self).__name__.lstrip('_')} around {getattr(self.inner, '__name__', None) or repr(self.inner)}>"


def _owns(service: object) -> bool:
    """Whether there is anything to start: a service that nobody owns the life of is not entered, only called."""
    kind: type = type(service)
    if not issubclass(kind, Wrapper):
        return hasattr(service, "__aenter__")
    starts = kind._running is not Wrapper._running  # pyright: ignore[reportUnknownMemberType]
    return starts or _owns(getattr(service, "inner", None))


def ready_now(service: object) -> bool:
    """Whether a call to ``service`` would probably begin without waiting; True for one that gives no such hint."""
    hint: Callable[[], bool] | None = getattr(service, "ready_now", None)
    return True if hint is None else hint()


def refuses_now(service: object) -> bool:
    """Whether a call to ``service`` would be turned away at once; False for one that gives no such hint.

    One that is not ready either makes a call wait or refuses it, and whoever has a choice prefers to wait.
    """
    hint: Callable[[], bool] | None = getattr(service, "refuses_now", None)
    return False if hint is None else hint()


def load(service: object) -> float:
    """How busy ``service`` says it is; 0 for one that gives no such hint."""
    hint: Callable[[], float] | None = getattr(service, "load", None)
    return 0.0 if hint is None else hint()


def offered(service: object, name: str) -> Callable[[], Any] | None:
    """A method that ``service`` has, or one that it wraps; None if nobody has it.

    Three are asked for: ``async ready()``, until a call would probably begin without waiting; ``async wait_closing()``,
    until a connection takes no further calls, since it is lost or on its way out; and ``events()``, an async iterator
    of what happens to a connection.
    """
    while True:
        method = getattr(service, name, None)
        if callable(method):
            return cast("Callable[[], Any]", method)
        if not isinstance(service, Wrapper):
            return None
        inner: object = service.inner  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        service = inner


@asynccontextmanager
async def running(service: Service[Q, R]) -> AsyncGenerator[Service[Q, R]]:
    """Run whatever ``service`` and those inside it own, such as the worker of a `Buffer`, for the length of a block.

    For a service that owns nothing it does nothing, so what is composed of layers can always be entered.

    >>> import anyio
    >>> async def double(request: int, /) -> int:
    ...     return 2 * request
    >>> async def main() -> int:
    ...     async with running(double) as call:
    ...         return await call(21)
    >>> anyio.run(main)
    42
    """
    if hasattr(service, "__aenter__") and hasattr(service, "__aexit__"):
        entered: Any = service  # checked just now; a protocol for it would have to be imported by whoever makes one
        async with entered:
            yield service
    else:
        yield service


# --- two sides -----------------------------------------------------------------------------------------------------


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


class TwoSided(ABC, Generic[C_co]):
    """A layer that both ends of a connection must have.

    The type parameter is what an application gets of a stack in which this is the outermost such layer.

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


class Upgrade(TwoSided[C_co]):
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
