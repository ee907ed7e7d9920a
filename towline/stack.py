"""Stack: layers, outermost first, as one value that describes both ends of a connection.

Its order is checked when it is built. ``connect`` and ``serve`` open a scope for it: a task group, a clock and a random
generator, in which everything it starts lives and with which everything ends (D6).
"""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, Generic, TypeAlias, overload

import anyio
import anyio.lowlevel
from anyio.abc import ByteStream, ByteStreamConnectable, ObjectStream, ObjectStreamConnectable
from typing_extensions import TypeIs, TypeVar

from towline._host import Host
from towline.endpoint import Endpoint
from towline.errors import EndpointError, StackError, TowlineError
from towline.layers.encryption import Encryption
from towline.layers.encryption.keys import Psk, StaticKeys
from towline.layers.fallback import Fallback
from towline.layers.framing import Framing
from towline.layers.heartbeat import Heartbeat
from towline.layers.map import RequestLayer, ResponseLayer
from towline.layers.reconnect import ConnectionState, Reconnect, Reconnecting
from towline.layers.resume import ClientSession, Resume, ServerSession, Session
from towline.layers.retry import Retry
from towline.layers.rpc import MIN_MESSAGE, Peer, Request, Response, Rpc, handling
from towline.link import Link
from towline.policies import Backoff
from towline.scope import Scope, plain_task_group
from towline.server import Server
from towline.service import Dial, Kind, Layer, Service, TwoSided, Wrapper
from towline.streams import FrameStream, LinkByteStream
from towline.transport import Transport
from towline.transports import Fd, Memory, Pipe, Stdio, Tcp, Unix

if TYPE_CHECKING:
    from towline.config import StackConfig

__all__ = ["Handler", "OpenStack", "Stack"]

Q = TypeVar("Q", default=Any)
R = TypeVar("R", default=Any)
InQ = TypeVar("InQ", default=Any)
InR = TypeVar("InR", default=Any)
Q1 = TypeVar("Q1")
R1 = TypeVar("R1")
C = TypeVar("C", default=Any)

Handler: TypeAlias = Callable[[Any], Awaitable[object]]
"""What serves a session (or a stream, for a stack without `Resume`): a coroutine function with one argument."""

_WHOLE: Final = (Kind.MESSAGES, Kind.CALLS)
"""What an application takes as the outermost two-sided layer gives it. Of the others it gets a stream."""

_DEFAULT_TRANSPORTS: Final[tuple[Transport, ...]] = (Tcp(), Unix(), Fd(), Pipe(), Stdio(), Memory())

REDIAL_PAUSE: Final = 0.1
"""The least time from one dial of `Stack.sessions` to the next: a floor for a stack that has no Retry, and for a peer
that ends every session at once."""

_FIXES: Final = {
    (Kind.FRAMES, Kind.BYTES): "put Framing between them",
    (Kind.FRAMES, Kind.MESSAGES): "put {outer} inside {inner}",
    (Kind.MESSAGES, Kind.BYTES): "put Framing between them, and Resume between these two",
    (Kind.MESSAGES, Kind.LINES): "use Framing in place of Lines, which only an application can take",
    (Kind.FRAMES, Kind.CALLS): "put {outer} inside {inner}",
    (Kind.BYTES, Kind.CALLS): "put {outer} inside {inner}, and inside Framing",
    (Kind.FRAMES, Kind.LINES): "use Framing in place of Lines, which only an application can take",
    (Kind.BYTES, Kind.FRAMES): "put {outer} inside {inner}",
    (Kind.BYTES, Kind.LINES): "put {outer} inside {inner}",
    (Kind.BYTES, Kind.MESSAGES): "put {outer} inside {inner}, and inside Framing",
}


def _is_two_sided(layer: object) -> TypeIs[TwoSided]:
    return isinstance(layer, TwoSided)


def _is_reconnect(layer: object) -> TypeIs[Reconnect[Any]]:
    return isinstance(layer, Reconnect)


def _flat(layer: Any) -> tuple[Any, ...]:
    return layer._within_another() if isinstance(layer, Stack) else (layer,)


def _is_mistaken_class(layer: object) -> bool:
    return isinstance(layer, type) and not issubclass(layer, Wrapper)  # which is called with a service, as a layer is


def _name(layer: object) -> str:
    return type(layer).__name__


class Stack(Generic[Q, R, InQ, InR]):
    """Layers, outermost first: over a transport, or over any service.

    With a layer that both ends must have (`Resume`, `Framing` ...) it describes both ends of a connection,
    which `connect` and `serve` make. Of transparent layers only (`Retry`, `Timeout` ...) it is a layer
    itself: call it with a service.

    ``Stack().layer(a).layer(b)`` is ``Stack(a, b)`` with its types: what `connect` gives, and, after `Stack.of`, which
    service fits inside. A type checker then finds the wrong one.

    Args:
        layers: the layers; the first is the one the application sees.
        transports: what serves the endpoints; by default TCP, Unix sockets, sockets that were handed over, named pipes,
            stdio and memory.

    Raises:
        StackError: if the order cannot work; the message names both layers and the fix.

    >>> Stack(Resume(), Framing())
    Stack(Resume(), Framing())
    >>> Stack(Resume(), Encryption(psk=Psk.generate()))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    towline.errors.StackError: Resume needs frames from the layer inside it, but Encryption gives bytes: ...
    """

    # The types of a stack are the request and the response outside, then those inside. Nothing infers through a list
    # of layers of any length, so of ``Stack(a, b, c)`` only what the first one says is known.

    @overload
    def __init__(
        self: Stack[Dial, C, Dial, Link], first: TwoSided[C], /, *layers: Any, transports: Iterable[Transport] = ...
    ) -> None: ...
    @overload
    def __init__(
        self: Stack[Any, Any, Any, Any], first: Any, /, *layers: Any, transports: Iterable[Transport] = ...
    ) -> None: ...
    @overload
    def __init__(self: Stack[Dial, LinkByteStream, Dial, Link], *, transports: Iterable[Transport] = ...) -> None: ...

    def __init__(self, *layers: Any, transports: Iterable[Transport] = _DEFAULT_TRANSPORTS) -> None:
        # A stack within a stack is its layers: so they are checked, shown and left out as if they stood there.
        self.layers: tuple[Any, ...] = tuple(chain.from_iterable(map(_flat, layers)))
        self.transports = tuple(transports)
        self._kind = _check(self.layers)

    @classmethod
    def of(cls, request: type[Q1], response: type[R1]) -> Stack[Q1, R1, Q1, R1]:
        """An empty stack around calls, with their types: what the outermost layer is asked, and what it answers.

        >>> from towline import Timeout
        >>> Stack.of(str, int).layer(Timeout(5)).layer(Retry())
        Stack(Timeout(seconds=5), Retry())
        """
        del request, response  # they are only there to be inferred from
        empty: Stack[Any, Any, Any, Any] = Stack()
        return empty

    @classmethod
    def resilient(
        cls, *, psk: Psk | None = None, keys: StaticKeys | None = None
    ) -> Stack[Dial, ClientSession, Dial, Link]:
        """The recommended stack: sessions that survive, found again with backoff, watched and encrypted.

        Args:
            psk: the key that both ends share.
            keys: or a key pair, and whom to trust.

        Raises:
            StackError: if neither is given: a connection that anybody can read or take over is not resilient.
        """
        if psk is None and keys is None:
            raise StackError("Stack.resilient needs psk=Psk.from_file(...) or keys=StaticKeys(...)")
        return Stack(Resume(), Retry(Backoff.exponential()), Heartbeat(), Framing(), Encryption(psk=psk, keys=keys))

    @overload
    def layer(self: Stack[Dial, LinkByteStream, Any, Any], layer: TwoSided[C], /) -> Stack[Dial, C, Dial, Link]: ...
    @overload
    def layer(self, layer: TwoSided[Any], /) -> Stack[Q, R, Dial, Link]: ...
    @overload
    def layer(self, layer: Layer, /) -> Stack[Q, R, InQ, InR]: ...
    # Where a layer is itself generic in the type that it leaves alone, only its own type says enough.
    @overload
    def layer(self, layer: RequestLayer[InQ, Q1], /) -> Stack[Q, R, Q1, InR]: ...
    @overload
    def layer(self, layer: ResponseLayer[R1, InR], /) -> Stack[Q, R, InQ, R1]: ...
    @overload
    def layer(self, layer: Fallback[InR], /) -> Stack[Q, R, InQ, InR]: ...
    @overload
    def layer(self, layer: Callable[[Service[Q1, R1]], Service[InQ, InR]], /) -> Stack[Q, R, Q1, R1]: ...

    def layer(self, layer: Any, /) -> Any:
        """A new stack with one more layer, inside those there are: ``Stack().layer(a).layer(b) == Stack(a, b)``."""
        return self._like(*self.layers, layer)

    # Three things that a stack which is more than its layers does otherwise, as an instrumented one.

    def _like(self, *layers: Any) -> Stack:
        """A stack of other layers, and otherwise as this one."""
        return Stack(*layers, transports=self.transports)

    def _within_another(self) -> tuple[Any, ...]:
        """What stands in another stack for this one."""
        return self.layers

    def _to_open(self) -> Stack[Q, R, InQ, InR]:
        """What is opened, or put around a service."""
        return self

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Stack):
            return NotImplemented
        return self.layers == other.layers and self.transports == other.transports

    def __hash__(self) -> int:
        return hash(tuple(map(type, self.layers)))

    def __iter__(self) -> Iterator[Any]:
        return iter(self.layers)

    def __repr__(self) -> str:
        return f"Stack({', '.join(map(repr, self.layers))})"

    def describe(self) -> str:
        """Both ends as text, from the application to the wire.

        >>> print(Stack(Resume(), Retry(), Framing()).describe())
        application  messages
          Resume()   both ends: needs frames, gives messages
          Retry()    dialling end
          Framing()  both ends: needs bytes, gives frames
        transport    bytes
        """
        rows = [("application", self._kind.value)]
        two_sided_outside = False
        for layer in self.layers:
            if _is_two_sided(layer):
                needs, gives = _either(layer.needs), layer.gives.value
                rows.append((f"  {layer!r}", f"both ends: needs {needs}, gives {gives}"))
                two_sided_outside = True
            elif two_sided_outside or getattr(layer, "client_only", False):
                rows.append((f"  {layer!r}", "dialling end"))
            else:
                rows.append((f"  {layer!r}", "dialling end, and around the handler"))
        rows.append(("transport", Kind.BYTES.value))
        width = max(len(left) for left, _ in rows)
        return "\n".join(f"{left:{width}}  {right}" for left, right in rows)

    @property
    def wire(self) -> tuple[str, ...]:
        """The protocols that both ends must stack, outermost first."""
        return tuple(layer.wire for layer in self.layers if _is_two_sided(layer))

    def to_config(self, endpoint: str | Endpoint | None = None) -> StackConfig:
        """This stack as a configuration, which builds one that is equal, and can be written down.

        Args:
            endpoint: where it connects to, or listens, if that is to be part of it.

        Raises:
            ConfigError: for each layer that only code can say, such as a `Filter` with its function.

        >>> from towline import Timeout
        >>> Stack(Timeout(5), Framing()).to_config("tcp://localhost:7000").model_dump_json(exclude_none=True)
        '{"endpoint":"tcp://localhost:7000","layers":[{"kind":"timeout","seconds":"5s"},"framing"]}'
        """
        from towline.config import StackConfig  # which is built on this, and on pydantic

        data: dict[str, Any] = {"endpoint": endpoint, "layers": self.layers}
        if self.transports != _DEFAULT_TRANSPORTS:
            data["transports"] = self.transports
        return StackConfig.from_dict(data)

    # --- around a service ------------------------------------------------------------------------------------------

    def __call__(self, service: Service[InQ, InR], /) -> Service[Q, R]:
        """Wrap ``service`` in all layers. If one of them owns a task (`Buffer`, say), use it within `running`.

        Raises:
            StackError: if a layer needs a connection, or gives something that is no service.

        >>> from towline import Timeout
        >>> async def length(text: str, /) -> int:
        ...     return len(text)
        >>> anyio.run(Stack(Timeout(5), Retry())(length), "four")
        4
        """
        for layer in self.layers:
            if _is_two_sided(layer):
                raise StackError(f"{_name(layer)} needs a connection inside it: use connect or serve, or leave it out")
        wrapped: Any = service
        for layer in reversed(self._to_open().layers):
            wrapped = _wrap(layer, wrapped)
        result: Service[Q, R] = wrapped
        return result

    # --- both ends -------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def open(
        self,
        *,
        clock: Callable[[], float] = anyio.current_time,
        rng: random.Random | None = None,
    ) -> AsyncGenerator[OpenStack[R]]:
        """Open a scope in which this stack connects and serves as often as asked; leaving it ends everything."""
        async with plain_task_group() as tasks:
            scope = Scope(tasks, clock, rng or random.Random(), self.wire)
            tasks.start_soon(scope.timers.run)
            opened: OpenStack[R] = OpenStack(self._to_open(), scope)
            async with AsyncExitStack() as owned:
                for service in opened.owned:
                    await owned.enter_async_context(service)
                yield opened
            tasks.cancel_scope.cancel()

    @asynccontextmanager
    async def connect(self, endpoint: str | Endpoint) -> AsyncGenerator[R]:
        """Connect, and close at the end of the block; an exception in the block aborts the session instead.

        Gives a `Session`; for a stack without `Resume` a stream over one link.

        Raises:
            ConnectFailed, HandshakeFailed: if no connection comes about in time.
            EndpointError: if the endpoint cannot be read, or no transport serves it.
            CloseIncomplete, SessionLost: at the end of the block, if not everything is known to have arrived.
        """
        async with self.open() as opened:
            connection = await opened.connect(endpoint)
            async with _closing(connection):
                yield connection

    # With Rpc it is a service that answers calls.
    @overload
    def serve(
        self: Stack[Any, Peer, Any, Any],
        endpoint: str | Endpoint,
        handler: Service[Request, Response],
        *,
        max_pending: int = ...,
        max_pending_per_source: int = ...,
    ) -> AbstractAsyncContextManager[Server]: ...
    # With Resume the two ends hold sessions of two kinds.
    @overload
    def serve(
        self: Stack[Any, ClientSession, Any, Any],
        endpoint: str | Endpoint,
        handler: Callable[[ServerSession], Awaitable[object]],
        *,
        max_pending: int = ...,
        max_pending_per_source: int = ...,
    ) -> AbstractAsyncContextManager[Server]: ...
    @overload
    def serve(
        self,
        endpoint: str | Endpoint,
        handler: Callable[[R], Awaitable[object]],
        *,
        max_pending: int = ...,
        max_pending_per_source: int = ...,
    ) -> AbstractAsyncContextManager[Server]: ...

    @asynccontextmanager
    async def serve(
        self,
        endpoint: str | Endpoint,
        handler: Handler,
        *,
        max_pending: int = 256,
        max_pending_per_source: int = 64,
    ) -> AsyncGenerator[Server]:
        """Listen, and run ``handler`` once for each session (for each link, in a stack without `Resume`).

        A handler that returns closes its session; one that raises aborts it, and never harms the server.

        Args:
            endpoint: where to listen; a port 0 lets the system choose, and ``server.endpoint`` says which.
            handler: a coroutine function that takes the session.
            max_pending: connections whose handshake is not done, in all, 256.
            max_pending_per_source: the same from one address, 64.

        Raises:
            ConnectFailed: if the endpoint cannot be bound.
            EndpointError: if it cannot be read, or no transport serves it.
        """
        async with self.open() as opened:
            server = await opened.serve(
                endpoint, handler, max_pending=max_pending, max_pending_per_source=max_pending_per_source
            )
            try:
                yield server
            finally:
                with anyio.CancelScope(shield=True):
                    await server.aclose()

    def sessions(self, endpoint: str | Endpoint) -> AsyncIterator[R]:
        """One session after another, for ever: when one is over or lost, the next.

            async for session in stack.sessions("tcp://localhost:7000"):
                try:
                    async for message in session: ...
                except SessionLost as lost: ...
                    # the loop goes on with a new session

        Retry's policy waits between attempts. Leave the loop by ``break`` or by an exception.

        Raises:
            MisuseError: what no waiting mends.
            HandshakeFailed: if the server refuses the first session.
        """
        return _Sessions(self, Endpoint.parse(endpoint))

    def transport(self, endpoint: Endpoint) -> Transport:
        """The transport that serves an endpoint.

        Raises:
            EndpointError: if there is none.
        """
        for transport in self.transports:
            if endpoint.scheme in transport.schemes:
                return transport
        known = ", ".join(f"{scheme}://" for each in self.transports for scheme in each.schemes)
        raise EndpointError(f"no transport of this stack serves {endpoint}: it has {known}")


class OpenStack(Generic[C]):
    """A stack with a scope: connects and serves as often as asked. From ``async with stack.open()``."""

    def __init__(self, stack: Stack[Any, C, Any, Any], scope: Scope) -> None:
        self.stack = stack
        self.scope = scope
        self.owned: list[Wrapper[Any, Any]] = []  # what to enter while the scope is open, innermost first
        self._client: Reconnecting[Any, Any] | None = None  # holds a connection, where there is a Reconnect
        self._connect = self._connector()

    def __repr__(self) -> str:
        return f"<OpenStack {self.stack!r}>"

    async def _base(self, dial: Dial, /) -> Link:
        link = await self.stack.transport(dial.endpoint)(dial)
        link.bind(self.scope)
        return link

    def _connector(self) -> Service[Dial, Any]:
        service: Service[Dial, Any] = self._base
        for layer in reversed(self.stack.layers):
            if _is_two_sided(layer):
                self._own(service)
                service = layer.connector(service, self.scope)
            elif _is_reconnect(layer):
                service = self._client = self._dialling(layer)(service)
            else:
                service = _wrap(layer, service)
        self._own(service)
        if self.stack._kind in _WHOLE:
            return service

        async def stream(dial: Dial, /) -> Any:
            link: Link = await service(dial)
            link.established()
            top = self._stream(link)
            self.scope.task_group.start_soon(top.run)
            return top

        return stream

    def _dialling(self, layer: Reconnect[Any]) -> Callable[[Service[Dial, Any]], Reconnecting[Any, Any]]:
        """The layer with an endpoint for a target made into a `Dial`."""
        target = layer.target
        dial = target if isinstance(target, Dial) else Dial(Endpoint.parse(target))
        self.stack.transport(dial.endpoint)
        return replace(layer, target=dial, name=layer.name or str(dial.endpoint))

    def _own(self, service: Service[Dial, Any]) -> None:
        # A wrapper enters those inside it, as far as the next two-sided layer, which is none.
        if isinstance(service, Wrapper):
            self.owned.append(service)

    def _stream(self, link: Link) -> LinkByteStream | FrameStream:
        return LinkByteStream(link) if self.stack._kind is Kind.BYTES else FrameStream(link)

    def _acceptor(self, handler: Handler) -> Service[Link, None]:
        async def handle(session: Any, /) -> None:
            await handler(session)

        async def handle_stream(link: Link, /) -> None:
            link.established()
            stream = self._stream(link)
            failed: Exception | None = None
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(stream.run)
                try:
                    await wrapped(stream)
                except Exception as error:
                    stream.abort()
                    failed = error  # raised below, so that it does not leave as an ExceptionGroup
                else:
                    await stream.aclose()
            if failed is not None:
                raise failed

        # What is called is a service already; a session or a stream is handed to any async function.
        wrapped: Any = handling(handler) if self.stack._kind is Kind.CALLS else handle  # type: ignore[arg-type]
        service: Service[Any, None] | None = None
        whole = self.stack._kind in _WHOLE
        for layer in self.stack.layers:
            if _is_two_sided(layer):
                service = layer.acceptor(service or (wrapped if whole else handle_stream), self.scope)
            elif service is None and not getattr(layer, "client_only", False):
                wrapped = _wrap(layer, wrapped)
        return service or handle_stream

    async def __call__(self, request: Request, /) -> Response:
        """Call the other end over the connection that a `Reconnect` in the stack holds, through all layers outside it.

        Raises:
            StackError: if there is none: connect first.
        """
        self._held()
        response: Response = await self._connect(request)  # type: ignore[arg-type]
        return response

    @property
    def state(self) -> ConnectionState:
        """What becomes of the connection that a `Reconnect` in the stack holds.

        Raises:
            StackError: if there is none.
        """
        return self._held().state

    def events(self) -> AsyncIterator[Any]:
        """What happens to the connection that a `Reconnect` in the stack holds, and to the session below it, as one
        stream: see `Reconnecting.events`.

        Raises:
            StackError: if there is none.
        """
        return self._held().events()

    def _held(self) -> Reconnecting[Any, Any]:
        if self._client is None:
            raise StackError("this stack holds no connection: put Reconnect(endpoint) outside Rpc, or use connect")
        return self._client

    async def connect(self, endpoint: str | Endpoint) -> C:
        """Connect; the caller closes what it gets. Raises as `Stack.connect` does."""
        return await self.dial(Dial(Endpoint.parse(endpoint)))

    async def dial(self, dial: Dial) -> C:
        """Connect by a `Dial`, which says what was tried before. Raises as `Stack.connect` does."""
        if self._client is not None:
            raise StackError("this stack connects by itself, as it has a Reconnect: call what `open` gives")
        self.stack.transport(dial.endpoint)
        connection: C = await self._connect(dial)
        return connection

    async def probe(self, endpoint: str | Endpoint) -> None:
        """Go through every layer to the far end, be let in, and leave, in one attempt: no handler runs there.

        Raises:
            ConnectFailed, HandshakeFailed: if there is no way; whether there may be later, ``retryable`` says.
            EndpointError: if the endpoint cannot be read, or no transport serves it.
            StackError: if the stack has no `Resume`: without one, connecting is all there is to it.
        """
        dial = Dial(Endpoint.parse(endpoint))
        self.stack.transport(dial.endpoint)
        service: Service[Dial, Any] = self._base
        for layer in reversed(self.stack.layers):
            if isinstance(layer, Resume):
                await layer.prober(service, self.scope)(dial)
                return
            if _is_two_sided(layer):  # not Retry or Timeout: it is one attempt, and each layer bounds itself
                service = layer.connector(service, self.scope)
        raise StackError("this stack has no sessions to ask for: put Resume into it, or connect")

    def connectable(self, endpoint: str | Endpoint) -> ObjectStreamConnectable[bytes] | ByteStreamConnectable:
        """The endpoint as anyio's connectable, for libraries that take one.

        Raises:
            EndpointError: if the endpoint cannot be read, or no transport serves it.
        """
        parsed = Endpoint.parse(endpoint)
        self.stack.transport(parsed)
        if self.stack._kind is Kind.BYTES:
            return _ByteConnectable(self, parsed)
        return _ObjectConnectable(self, parsed)

    # With Rpc it is a service that answers calls.
    @overload
    async def serve(
        self: OpenStack[Peer],
        endpoint: str | Endpoint,
        handler: Service[Request, Response],
        *,
        max_pending: int = ...,
        max_pending_per_source: int = ...,
    ) -> Server: ...
    @overload
    async def serve(
        self: OpenStack[ClientSession],
        endpoint: str | Endpoint,
        handler: Callable[[ServerSession], Awaitable[object]],
        *,
        max_pending: int = ...,
        max_pending_per_source: int = ...,
    ) -> Server: ...
    @overload
    async def serve(
        self,
        endpoint: str | Endpoint,
        handler: Callable[[C], Awaitable[object]],
        *,
        max_pending: int = ...,
        max_pending_per_source: int = ...,
    ) -> Server: ...

    async def serve(
        self,
        endpoint: str | Endpoint,
        handler: Handler,
        *,
        max_pending: int = 256,
        max_pending_per_source: int = 64,
    ) -> Server:
        """Listen; the caller closes the server, or the scope ends it. As `Stack.serve`."""
        parsed = Endpoint.parse(endpoint)
        listener = await self.stack.transport(parsed).listen(parsed)
        others = len(self.scope.servers)
        service = self._acceptor(handler)
        server = Server(
            listener,
            service,
            self.scope,
            holders=self.scope.servers[others:],
            max_pending=max_pending,
            max_pending_per_source=max_pending_per_source,
        )
        self.scope.task_group.start_soon(server.run)
        return server


class _Sessions(AsyncIterator[Any]):
    """One session after another. No generator: one that is left by ``break`` runs on until it is collected."""

    def __init__(self, stack: Stack, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._host = Host(stack)
        self._connection: Any = None
        self._dialled_at = 0.0
        self._failures = 0
        self._cause: Exception | None = None
        self._is_first = True
        self._is_over = False

    async def __anext__(self) -> Any:
        if self._is_over:
            raise StopAsyncIteration
        try:
            if self._connection is not None:
                await self._end()
            self._connection = self._host.connection = await self._begin()
        except BaseException:
            self._leave()
            raise
        return self._connection

    async def _begin(self) -> Any:
        while True:
            self._dialled_at = anyio.current_time()
            try:
                connection = await self._host.dial(Dial(self._endpoint, self._failures, self._cause))
            except TowlineError as error:
                if self._is_first or not error.retryable:
                    raise
                self._failures, self._cause = self._failures + 1, error
            else:
                self._is_first, self._failures, self._cause = False, 0, None
                return connection
            await anyio.sleep_until(self._dialled_at + REDIAL_PAUSE)

    async def _end(self) -> None:
        try:
            async with _closing(self._connection):
                pass
        except TowlineError as error:
            self._cause = error
        self._connection = None
        await anyio.sleep_until(self._dialled_at + REDIAL_PAUSE)

    async def aclose(self) -> None:
        """End the loop's scope; what ``break`` does as well."""
        self._leave()
        await anyio.lowlevel.checkpoint()

    def _leave(self) -> None:
        if self._is_over:
            return
        self._is_over = True
        if self._connection is not None:
            self._connection.abort()
        self._host.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the event loop may be gone, and everything with it
            self._leave()


class _ByteConnectable(ByteStreamConnectable):
    def __init__(self, opened: OpenStack, endpoint: Endpoint) -> None:
        self._opened = opened
        self._endpoint = endpoint

    async def connect(self) -> ByteStream:
        stream: ByteStream = await self._opened.connect(self._endpoint)
        return stream


class _ObjectConnectable(ObjectStreamConnectable[bytes]):
    def __init__(self, opened: OpenStack, endpoint: Endpoint) -> None:
        self._opened = opened
        self._endpoint = endpoint

    async def connect(self) -> ObjectStream[bytes]:
        stream: ObjectStream[bytes] = await self._opened.connect(self._endpoint)
        return stream


@asynccontextmanager
async def _closing(connection: Any) -> AsyncGenerator[None]:
    """Close at the end of the block, abort on an exception, and in both cases let the last word out."""
    try:
        yield
        await connection.aclose()
        if isinstance(connection, Session):
            connection.leave()
    except BaseException:
        connection.abort()
        raise
    finally:
        with anyio.move_on_after(1.0, shield=True):
            await connection.wait_closed()


def _either(kinds: tuple[Kind, ...]) -> str:
    return " or ".join(kind.value for kind in kinds)


def _wrap(layer: Any, service: Service[Any, Any]) -> Service[Any, Any]:
    wrapped = layer(service)
    if not callable(wrapped):
        raise StackError(f"{layer!r} gives {wrapped!r}, where a layer gives a service")
    return wrapped  # type: ignore[no-any-return]  # that it is async, a checker of types can see, and nothing else


def _check(layers: tuple[Any, ...]) -> Kind:
    kind = Kind.BYTES
    inner = "the transport"
    seen: dict[type, TwoSided] = {}
    for layer in reversed(layers):
        if _is_mistaken_class(layer):
            raise StackError(f"{layer.__name__} is a class: write {layer.__name__}(...)")
        if not _is_two_sided(layer):
            if not callable(layer):
                raise StackError(f"{layer!r} is not a layer: it wraps no service")
            if inspect.iscoroutinefunction(layer) or inspect.iscoroutinefunction(type(layer).__call__):
                raise StackError(f"{layer!r} is a service, not a layer: call the stack of layers with it")
            if isinstance(layer, Reconnect) and seen and kind is not Kind.CALLS:
                raise StackError(
                    f"Reconnect needs calls from the layer inside it, but {inner} gives {kind.value}: put Rpc inside it"
                )
            continue
        name = _name(layer)
        if type(layer) in seen:
            raise StackError(f"{name} stands twice in this stack: leave one out")
        if kind not in layer.needs:
            fix = _FIXES.get((layer.needs[0], kind), "change their order").format(outer=name, inner=inner)
            raise StackError(
                f"{name} needs {_either(layer.needs)} from the layer inside it, but {inner} gives {kind.value}: {fix}"
            )
        seen[type(layer)] = layer
        kind, inner = layer.gives, name
    resume, framing = seen.get(Resume), seen.get(Framing)
    if isinstance(resume, Resume) and isinstance(framing, Framing):
        room = framing.max_frame_size - 64
        if resume.max_message > room:
            raise StackError(
                f"Resume has max_message {resume.max_message:,}, but Framing's max_frame_size leaves {room:,}: "
                "raise the one or lower the other"
            )
    if isinstance(resume, Resume) and Rpc in seen and resume.max_message < MIN_MESSAGE:
        raise StackError(
            f"Rpc needs messages of up to {MIN_MESSAGE:,} bytes, but Resume has max_message {resume.max_message:,}"
        )
    return kind
