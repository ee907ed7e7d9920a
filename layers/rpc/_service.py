"""A class of methods as a service: `service` reads it, `client` makes calls of it, and `router` makes answers."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import types
import typing
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Final, TypeVar, cast, overload

import anyio
from anyio.abc import TaskGroup

from towline.errors import CallFailed, MisuseError, StatusCode, TowlineError
from towline.scope import plain_task_group
from towline.service import Service

from ._codec import JSON, Codec, Coder, coder_of
from ._core import OutgoingCall
from ._messages import Request, Response
from ._router import Router
from ._stream import Stream, open_stream
from ._typed import answered, answering, asked

__all__ = ["client", "method", "router", "service"]

T = TypeVar("T")
C = TypeVar("C", bound=type)
F = TypeVar("F", bound=Callable[..., object])


# --- a class of methods --------------------------------------------------------------------------------------------

SPEC: Final = "__towline_service__"
NAME: Final = "__towline_name__"

STREAMS: Final = (AsyncIterator, AsyncIterable, AsyncGenerator)


@dataclass(frozen=True, slots=True)
class _Method:
    """What the signature of a method says."""

    name: str
    on_wire: str
    function: Callable[..., Any]
    signature: inspect.Signature
    parameter: str | None
    takes: Any
    gives: Any
    takes_stream: bool
    gives_stream: bool

    def argument(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The request among the arguments of a call. None for a method that takes none."""
        if len(args) == 1 and not kwargs and self.parameter is not None:
            return args[0]
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return None if self.parameter is None else bound.arguments[self.parameter]


@dataclass(frozen=True, slots=True)
class _Bound:
    """A method, with what writes and reads its bodies."""

    method: _Method
    takes: Coder[Any]
    gives: Coder[Any]

    @property
    def name(self) -> str:
        return self.method.on_wire


@dataclass(frozen=True, slots=True)
class _Spec:
    """What a class of methods says. Codecs and the classes of clients are made once for each codec, and kept."""

    cls: type
    methods: tuple[_Method, ...]
    bound: dict[Codec, tuple[_Bound, ...]] = field(default_factory=dict[Codec, tuple[_Bound, ...]])
    clients: dict[Codec, type] = field(default_factory=dict[Codec, type])

    def bind(self, codec: Codec) -> tuple[_Bound, ...]:
        if codec not in self.bound:
            self.bound[codec] = tuple(_bind(self.cls, method, codec) for method in self.methods)
        return self.bound[codec]

    def client(self, codec: Codec) -> type:
        if codec not in self.clients:
            self.clients[codec] = _client_class(self.cls, self.bind(codec))
        return self.clients[codec]


def _bind(cls: type, method: _Method, codec: Codec) -> _Bound:
    try:
        return _Bound(method, coder_of(codec, method.takes), coder_of(codec, method.gives))
    except TypeError as error:
        raise TypeError(f"{cls.__name__}.{method.name}: {error}") from error


@overload
def service(cls: C, /) -> C: ...
@overload
def service(*, name: str) -> Callable[[C], C]: ...
def service(cls: Any = None, /, *, name: str | None = None) -> Any:
    """Decorator: a class whose methods are called over a connection, as a protocol or an abstract class.

    Each public method takes one request, or none, and is ``async def``; one that gives a stream is a plain ``def`` that
    returns an ``AsyncIterator``, as an async generator is when it is called. One that takes a stream has an
    ``AsyncIterator`` for its parameter.

        @service
        class Users(Protocol):
            async def get(self, request: GetUser) -> User: ...
            def watch(self, request: Filter) -> AsyncIterator[User]: ...
            async def load(self, users: AsyncIterator[User]) -> int: ...

    Args:
        name: what stands before the dot in the name of a method, ``Users.get``: the name of the class by default.

    Raises:
        TypeError: if a method's signature does not say what it takes and gives.
    """
    if cls is None:
        return functools.partial(_serviced, name=name)
    return _serviced(cls)


def _serviced(cls: C, *, name: str | None = None) -> C:
    if not isinstance(cls, type):  # pyright: ignore[reportUnnecessaryIsInstance] -- a user's
        raise TypeError(f"service decorates a class, not {cls!r}")
    prefix = cls.__name__ if name is None else name
    methods: dict[str, _Method] = {}
    for attribute in dir(cls):
        if attribute.startswith("_"):
            continue
        value = inspect.getattr_static(cls, attribute)
        if isinstance(value, (property, classmethod, staticmethod)):
            raise TypeError(f"{cls.__name__}.{attribute} is a {type(value).__name__}, where a method is expected")  # pyright: ignore[reportUnknownArgumentType]
        if isinstance(value, types.FunctionType):
            read = _read(cls, attribute, prefix, value)
            if read.on_wire in methods:
                other = methods[read.on_wire].name
                raise TypeError(f"{cls.__name__} has two methods by the name of {read.on_wire!r}: {other}, {attribute}")
            methods[read.on_wire] = read
    if not methods:
        raise TypeError(f"{cls.__name__} has no methods")
    setattr(cls, SPEC, _Spec(cls, tuple(methods.values())))
    return cls


def method(*, name: str) -> Callable[[F], F]:
    """Decorator: another name for a method of a `service`, after the dot. So the function may be renamed.

    >>> from typing import Protocol
    >>> @service(name="users.v1")
    ... class Users(Protocol):
    ...     @method(name="get")
    ...     async def find(self, number: int) -> str: ...
    >>> class Nobody:
    ...     async def find(self, number: int) -> str:
    ...         return "nobody"
    >>> router(Users)(Nobody())
    Router(users.v1.get)
    """

    def decorate(function: F) -> F:
        setattr(function, NAME, name)
        return function

    return decorate


def _read(cls: type, name: str, prefix: str, function: Callable[..., Any]) -> _Method:
    """Read a signature."""
    where = f"{cls.__name__}.{name}"
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except Exception as error:  # whatever an annotation raises when it is evaluated
        raise TypeError(f"the annotations of {where} cannot be resolved at run time: {error}") from error
    signature = inspect.signature(function)
    parameters = [*signature.parameters.values()][1:]  # without self
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if len(parameters) > 1 or any(each.kind not in by_position for each in parameters):
        raise TypeError(f"{where} takes {', '.join(map(str, parameters))}, where one request by position is expected")
    missing = [each for each in [*(each.name for each in parameters), "return"] if each not in hints]
    if missing:
        raise TypeError(f"{where} has no annotation for {', '.join(missing)}")
    takes_stream, takes = _item(where, hints[parameters[0].name]) if parameters else (False, NoneType)
    gives_stream, gives = _item(where, hints["return"])
    is_coroutine = inspect.iscoroutinefunction(function)
    if gives_stream and is_coroutine:
        raise TypeError(f"{where} gives a stream, so write it as def, not async def: it is iterated over, not awaited")
    if not gives_stream and not is_coroutine:
        raise TypeError(f"{where} is not async")
    return _Method(
        name=name,
        on_wire=f"{prefix}.{getattr(function, NAME, name)}",
        function=function,
        signature=signature.replace(parameters=parameters),
        parameter=parameters[0].name if parameters else None,
        takes=takes,
        gives=gives,
        takes_stream=takes_stream,
        gives_stream=gives_stream,
    )


def _item(where: str, hint: Any) -> tuple[bool, Any]:
    """Whether a type is that of a stream, and the type that it has, or that its messages have."""
    origin = typing.get_origin(hint) or hint
    if not any(origin is each for each in STREAMS):  # not by its hash, which an annotation need not have
        return False, hint
    of = typing.get_args(hint)
    if not of:
        raise TypeError(f"{where} has a stream that does not say of what: write AsyncIterator[...]")
    return True, of[0]


def _spec_of(cls: object) -> _Spec:
    spec = vars(cls).get(SPEC) if isinstance(cls, type) else None  # its own, not one that it inherits
    if spec is None:
        raise TypeError(f"{cls!r} is no service: decorate its class with @service")
    return cast(_Spec, spec)


# --- its client ----------------------------------------------------------------------------------------------------


# A class is taken as what makes its instances: given for ``type[T]``, mypy refuses one that is a protocol or abstract.
def client(
    service: Callable[..., T],
    call: Service[Request, Response],
    /,
    *,
    codec: Codec = JSON,
    tasks: TaskGroup | None = None,
) -> T:
    """A service's methods as calls: an object of the class ``service``, each of whose methods makes a call.

    A method is cancelled, and has a deadline, as any call. One that gives a stream begins with the first message
    that is asked for, and leaving the loop cancels it. One that takes a stream sends, in order, what it is given, until
    it is answered; what comes after that is not sent.

    Args:
        service: a class that `service` decorates.
        call: what is called: a `Peer`, or anything around it.
        codec: how requests and responses travel, `JsonCodec` by default. The other end must use the same.
        tasks: where a method sends that takes a stream and gives one at the same time. Only such a method needs it.

    Raises:
        TypeError: if ``service`` is none, or the codec cannot carry one of its types.
        CallFailed: when a method is called, if it is answered with an error, or with what is not of its type: INTERNAL.
        MisuseError: when a method is called, if its request is of another type. Nothing was sent.

    >>> import anyio
    >>> from typing import Protocol
    >>> @service
    ... class Texts(Protocol):
    ...     async def length(self, text: str) -> int: ...
    >>> async def call(request: Request, /) -> Response:
    ...     print(request)
    ...     return Response(b"4")
    >>> texts = client(Texts, call)
    >>> anyio.run(texts.length, "four")
    Request('Texts.length', b'"four"')
    4
    """
    kind: Any = _spec_of(service).client(codec)
    made = kind.__new__(kind)  # not __init__, which is that of the service's class
    made._towline_call = call
    made._towline_tasks = tasks
    return cast(T, made)


def _client_class(cls: type, methods: tuple[_Bound, ...]) -> type:
    def __repr__(self: Any) -> str:
        return f"<client of {cls.__name__} over {self._towline_call!r}>"

    members: dict[str, Any] = {"__repr__": __repr__}
    for each in methods:
        make = _streaming if each.method.gives_stream else _sending if each.method.takes_stream else _calling
        # Not its __dict__, which says of an abstract method that it is one.
        members[each.method.name] = functools.update_wrapper(make(each), each.method.function, updated=())
    return types.new_class(f"{cls.__name__}Client", (cls,), exec_body=lambda namespace: namespace.update(members))


def _calling(bound: _Bound) -> Callable[..., Any]:
    async def call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        payload = bound.takes.encode(bound.method.argument(args, kwargs))
        response: Response = await self._towline_call(Request(bound.name, payload))
        return answered(bound.gives, response.payload, bound.name)

    return call


def _sending(bound: _Bound) -> Callable[..., Any]:
    async def call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        items = bound.method.argument(args, kwargs)
        request = Request(bound.name, is_stream=True)
        async with open_stream(self._towline_call, request) as stream, plain_task_group() as tasks:
            tasks.start_soon(_send_all, stream, items, bound.takes)
            response = await stream.response()
            tasks.cancel_scope.cancel()
        return answered(bound.gives, response.payload, bound.name)

    return call


def _streaming(bound: _Bound) -> Callable[..., Any]:
    def call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        argument = bound.method.argument(args, kwargs)
        if not bound.method.takes_stream:
            return _Answers(self._towline_call, bound, bound.takes.encode(argument))
        if self._towline_tasks is None:
            raise MisuseError(f"{bound.name!r} sends while it receives: give its client a task group, by tasks=")
        return _Answers(self._towline_call, bound, b"", argument, self._towline_tasks)

    return call


class _Answers(AsyncGenerator[Any, None]):
    """The messages that a call gives.

    No generator, though it is used as one: a generator that is left by ``break`` runs on until somebody closes it.
    """

    def __init__(
        self,
        call: Service[Request, Response],
        bound: _Bound,
        payload: bytes,
        items: AsyncIterable[Any] | None = None,
        tasks: TaskGroup | None = None,
    ) -> None:
        self._call = call
        self._bound = bound
        self._request = Request(bound.name, payload, is_stream=True)
        self._items = items
        self._tasks = tasks
        self._stream: Stream | None = None
        self._sender: _Sender | None = None
        self._is_over = False

    def __repr__(self) -> str:
        return f"<answers of {self._bound.name!r}>"

    async def asend(self, value: None, /) -> Any:
        """The next message. Ends with the call, and raises what it failed with."""
        if self._is_over:
            raise StopAsyncIteration
        try:
            stream = self._stream or await self._begin()
            data = await stream.receive()
            return answered(self._bound.gives, data, self._bound.name)
        except anyio.EndOfStream:
            self._leave()
            raise StopAsyncIteration from None
        except anyio.ClosedResourceError:
            self._leave()
            if self._sender is None or self._sender.error is None:
                raise
            raise self._sender.error from None
        except BaseException:
            self._leave()
            raise

    async def _begin(self) -> Stream:
        response = await self._call(self._request)
        stream = response.stream
        if stream is None:
            raise MisuseError(f"{self._request!r} was not answered with a stream: a layer has answered it itself")
        self._stream = stream
        if self._items is not None and self._tasks is not None:
            self._sender = _Sender(stream)
            self._tasks.start_soon(self._sender.run, self._items, self._bound.takes)
        return stream

    async def athrow(self, typ: Any, val: Any = None, tb: Any = None, /) -> Any:
        """Cancel the call, and raise."""
        self._leave()
        raise typ if val is None else val

    def _leave(self) -> None:
        self._is_over = True
        if self._sender is not None:
            self._sender.scope.cancel()
        if self._stream is not None:
            _give_up(self._stream)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the event loop may be gone, and everything with it
            self._leave()


class _Sender:
    """Sends in a task of its own. It does not hold the `_Answers` of the call, whose end is that nobody does."""

    def __init__(self, stream: Stream) -> None:
        self.scope = anyio.CancelScope()
        self.error: Exception | None = None
        self._stream = stream

    async def run(self, items: AsyncIterable[Any], coder: Coder[Any]) -> None:
        with self.scope:
            try:
                await _send_all(self._stream, items, coder)
            except Exception as error:
                self.error = error
                _give_up(self._stream)
            except BaseException:
                _give_up(self._stream)
                raise


async def _send_all(stream: Stream, items: AsyncIterable[Any], coder: Coder[Any]) -> None:
    """Send all there is, or until the call ends. Raises what ``items`` does, and MisuseError."""
    async with _closing(items):
        async for item in items:
            data = coder.encode(item)
            try:
                await stream.send(data)
            except (TowlineError, anyio.ClosedResourceError):
                return  # the call has ended, and what it was answered says why
    with contextlib.suppress(TowlineError, anyio.ClosedResourceError):
        await stream.send_eof()


def _closing(items: Any) -> contextlib.AbstractAsyncContextManager[object]:
    """Close a generator at the end of the block: one that is left open goes on until it is collected."""
    return contextlib.aclosing(items) if isinstance(items, AsyncGenerator) else contextlib.nullcontext()  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]


def _give_up(stream: Stream) -> None:
    """Cancel a call without waiting: what `Stream.aclose` does, for where nothing can be awaited."""
    assert isinstance(stream._call, OutgoingCall)
    stream._peer.give_up(stream._call)


# --- its router ----------------------------------------------------------------------------------------------------


# In two steps: of ``router(Users, implementation)`` a checker would make one type that fits both, whatever they are.
def router(service: Callable[..., T], /, *, codec: Codec = JSON) -> Callable[[T], Router]:
    """A service's methods as handlers: call what this gives with an object that has these methods.

    A `CallFailed` that the object raises comes to the caller as it is; any other exception as one does that a handler
    raises. `current_request` gives it the call, with its metadata.

        async with stack.serve("tcp://0.0.0.0:7000", router(Users)(Database())):

    Args:
        service: a class that `service` decorates.
        codec: how requests and responses travel, `JsonCodec` by default. The other end must use the same.

    Raises:
        TypeError: if ``service`` is none, or the codec cannot carry one of its types; or later, if the object lacks
            one of the methods.
        CallFailed: when a method is called with what it does not take: INVALID_ARGUMENT. It is refused then, unless it
            was a message of a stream. Of the details, ``errors`` is a JSON array of what is wrong.

    >>> from typing import Protocol
    >>> @service
    ... class Texts(Protocol):
    ...     async def length(self, text: str) -> int: ...
    >>> class Counter:
    ...     async def length(self, text: str) -> int:
    ...         return len(text)
    >>> router(Texts)(Counter())
    Router(Texts.length)
    """
    methods = _spec_of(service).bind(codec)
    cls: Any = service

    def of(implementation: T) -> Router:
        if isinstance(implementation, type):
            raise TypeError(f"{implementation.__name__} is a class: give router an object of it")
        handlers = {each.name: _handler(cls, each, implementation) for each in methods}
        return Router(handlers)

    return of


def _handler(cls: type, bound: _Bound, implementation: Any) -> Service[Request, Response]:
    name = bound.method.name
    function: Callable[..., Any] | None = getattr(implementation, name, None)
    # One that an implementation inherits from the protocol itself does nothing.
    if not callable(function) or inspect.getattr_static(implementation, name, None) is bound.method.function:
        close = difflib.get_close_matches(name, (each for each in dir(implementation) if each != name), 1)
        hint = f": did you mean {close[0]!r}?" if close else ""
        raise TypeError(f"{implementation!r} does not implement {cls.__name__}.{name}{hint}")
    has_parameter = bound.method.parameter is not None

    async def answer(request: Request, /) -> Response:
        argument = asked(bound.takes, request.payload, bound.name)
        token = answering.set(request)
        try:
            result = await (function(argument) if has_parameter else function())
        finally:
            answering.reset(token)
        return Response(bound.gives.encode(result))

    async def answer_stream(request: Request, /) -> Response:
        stream = request.stream
        if stream is None:
            text = f"{bound.name!r} is a stream: call it by open_stream"
            raise CallFailed(StatusCode.UNIMPLEMENTED, text, refused=True)
        argument: Any
        if bound.method.takes_stream:
            argument = _Items(stream, bound)
        else:
            argument = asked(bound.takes, request.payload, bound.name)
        token = answering.set(request)
        try:
            result = function(argument) if has_parameter else function()
            if not bound.method.gives_stream:
                return Response(bound.gives.encode(await result))
            async with _closing(result):
                async for item in result:
                    await stream.send(bound.gives.encode(item))
        finally:
            answering.reset(token)
        return Response()

    return answer_stream if bound.method.takes_stream or bound.method.gives_stream else answer


class _Items(AsyncIterator[Any]):
    """The messages that a call brings. No generator, since a handler may leave it by ``break``."""

    def __init__(self, stream: Stream, bound: _Bound) -> None:
        self._stream = stream
        self._bound = bound

    async def __anext__(self) -> Any:
        try:
            data = await self._stream.receive()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None
        return asked(self._bound.takes, data, self._bound.name, has_begun=True)
