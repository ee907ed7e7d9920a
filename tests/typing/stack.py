"""What must type-check, and what must not: the fluent stack. Never run; mypy and pyright read it.

A line that must be refused carries a ``type: ignore``, which both checkers heed, and complain about where it is not
needed.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import Callable
from typing import assert_type

from towline import (
    Backoff,
    Balance,
    Buffer,
    CircuitBreaker,
    ConcurrencyLimit,
    ConnectionLost,
    Deadline,
    Dial,
    Encryption,
    Fallback,
    Filter,
    Framing,
    Heartbeat,
    Hedge,
    LoadShed,
    Psk,
    RateLimit,
    Resume,
    Retry,
    Service,
    Stack,
    StandardPolicy,
    Timeout,
)
from towline.layers import map_error, map_request, map_response
from towline.layers.resume import ClientSession
from towline.link import Link
from towline.service import Wrapper
from towline.streams import FrameStream, LinkByteStream


def transparent(inner: Service[str, int], /) -> Service[str, int]:
    return inner


def to_text(inner: Service[str, int], /) -> Service[bytes, float]:
    """A codec: asked in bytes, it asks in text; answered with an int, it answers with a float."""

    async def call(request: bytes, /) -> float:
        return await inner(request.decode())

    return call


async def length(text: str, /) -> int:
    return len(text)


async def double(number: int, /) -> int:
    return 2 * number


# --- a plain function is a service, and a layer keeps its types ------------------------------------------------

service: Service[str, int] = length
assert_type(Retry()(length), Wrapper[str, int])
assert_type(Timeout(5)(Retry()(length)), Wrapper[str, int])

wrong_service: Service[int, int] = length  # type: ignore[assignment]

# --- ten layers, outermost first -------------------------------------------------------------------------------

ten = (
    Stack.of(bytes, float)
    .layer(Timeout(60))
    .layer(Retry(StandardPolicy(on=ConnectionLost)))
    .layer(Timeout(30))
    .layer(Retry(Backoff.exponential()))
    .layer(to_text)
    .layer(Timeout(20))
    .layer(Retry())
    .layer(transparent)
    .layer(Timeout(10))
    .layer(Retry())
)
assert_type(ten, Stack[bytes, float, str, int])
assert_type(ten(length), Service[bytes, float])

ten(double)  # type: ignore[arg-type]


async def calls() -> None:
    assert_type(await ten(length)(b"four"), float)
    await ten(length)("four")  # type: ignore[arg-type]


# A layer whose outside does not fit what stands outside it, although it fits what stands inside.
Stack.of(str, str).layer(to_text)  # type: ignore[arg-type]

# A class in place of a layer.
Stack.of(str, int).layer(Retry)  # type: ignore[arg-type]

# --- layers that change one type, and all kinds together -------------------------------------------------------


def digits(number: int, /) -> str:
    return str(number)


def halved(number: int, /) -> float:
    return number / 2


def same_error(error: Exception, /) -> Exception:
    return error


def small(number: int, /) -> bool:
    return number < 10


mixed = (
    Stack.of(int, float)
    .layer(Deadline(60))
    .layer(LoadShed())
    .layer(ConcurrencyLimit(100))
    .layer(Filter(small))
    .layer(Fallback.value(0.0, on=ConnectionLost))
    .layer(map_request(digits))
    .layer(map_response(halved))
    .layer(map_error(same_error))
    .layer(Hedge(0.1))
    .layer(CircuitBreaker())
    .layer(RateLimit(100, per=1))
    .layer(Buffer(10))
)
assert_type(mixed, Stack[int, float, str, int])
assert_type(mixed(length), Service[int, float])
mixed(double)  # type: ignore[arg-type]
Stack.of(str, float).layer(map_request(digits))  # type: ignore[arg-type]

spread = Balance([length, length])
assert_type(spread, Balance[str, int])
assert_type(Stack.of(str, int).layer(Retry())(spread), Service[str, int])


# --- connections ------------------------------------------------------------------------------------------------

key = Psk.generate()

assert_type(Stack(), Stack[Dial, LinkByteStream, Dial, Link])
assert_type(Stack(Resume(), Retry(), Framing()), Stack[Dial, ClientSession, Dial, Link])
assert_type(Stack(Framing()), Stack[Dial, FrameStream, Dial, Link])
assert_type(Stack.resilient(psk=key), Stack[Dial, ClientSession, Dial, Link])

fluent = (
    Stack()
    .layer(Timeout(60))
    .layer(Resume())
    .layer(Retry(Backoff.exponential()))
    .layer(Heartbeat())
    .layer(Timeout(10))
    .layer(Framing())
    .layer(Encryption(psk=key))
)
assert_type(fluent, Stack[Dial, ClientSession, Dial, Link])


async def connections() -> None:
    async with fluent.connect("tcp://localhost:7000") as session:
        assert_type(session, ClientSession)
        session.reconnect()
    async with Stack(Encryption(psk=key)).connect("tcp://localhost:7000") as stream:
        assert_type(stream, LinkByteStream)
    async with fluent.open() as opened:
        assert_type(await opened.connect("tcp://localhost:7000"), ClientSession)
    async for each in fluent.sessions("tcp://localhost:7000"):
        assert_type(each, ClientSession)


async def handler(stream: FrameStream) -> None: ...


async def served() -> None:
    async with Stack(Framing()).serve("tcp://localhost:7000", handler):
        pass
    async with fluent.serve("tcp://localhost:7000", handler):  # type: ignore[arg-type]
        pass


any_layer: Callable[[Service[str, int]], Service[str, int]] = Stack.of(str, int).layer(Retry())
