"""The messages within a call: a stream in both directions, with credit of its own."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
from anyio.abc import ObjectStream

from towline.errors import MisuseError
from towline.service import Service

from ._core import IncomingCall, OutgoingCall
from ._messages import Request, Response

if TYPE_CHECKING:
    from ._peer import Peer

__all__ = ["Stream", "open_stream"]


class Stream(ObjectStream[bytes]):
    """Messages in both directions within one call, each direction with its own back-pressure.

    On the side that calls see `open_stream`. On the side that is called it is ``request.stream``; there the stream ends
    when the handler returns, and what it returns comes to the caller as `response`.
    """

    def __init__(self, peer: Peer, call: OutgoingCall | IncomingCall) -> None:
        self._peer = peer
        self._call = call

    def __repr__(self) -> str:
        return f"<Stream of call {self._call.id}>"

    async def send(self, item: bytes) -> None:
        """Send a message; waits until the peer has room for it.

        Raises:
            CallFailed: on the side that calls, if the call was answered with an error.
            ConnectionLost: if the connection is lost.
            anyio.ClosedResourceError: after `send_eof` or `aclose`, or once the call has ended.
        """
        await self._peer.send_message(self._call, bytes(item))

    async def receive(self) -> bytes:
        """The next message. Raises as `send` does, after the last one that has arrived.

        Raises:
            anyio.EndOfStream: if the peer sends no more.
        """
        return await self._peer.receive_message(self._call)

    async def send_eof(self) -> None:
        """End this side's messages. The side that is called ends them by returning, so there it does nothing."""
        await self._peer.send_end(self._call)

    async def response(self) -> Response:
        """What the call was answered in the end. On the side that calls; messages that nobody took are dropped.

        Raises:
            CallFailed, ConnectionLost: if it was no answer.
            MisuseError: on the side that is called.
        """
        if isinstance(self._call, IncomingCall):
            raise MisuseError("on the side that is called the response is what the handler returns")
        return await self._peer.answer_of(self._call)

    def when_over(self, told: Callable[[Response | Exception], None], /) -> None:
        """Have a function told, once, what the call was answered in the end, or what it has failed with (if it was
        cancelled here, anyio.ClosedResourceError); at once, if it is over. It may not wait, and what it raises is
        logged. On the side that calls.

        Raises:
            MisuseError: on the side that is called.
        """
        if isinstance(self._call, IncomingCall):
            raise MisuseError("on the side that is called the call is over when the handler returns")
        self._peer.when_over(self._call, told)

    async def aclose(self) -> None:
        """End it: cancels the call, if it has not ended yet."""
        if isinstance(self._call, OutgoingCall):
            self._peer.give_up(self._call)
        await anyio.lowlevel.checkpoint()


@asynccontextmanager
async def open_stream(call: Service[Request, Response], request: Request) -> AsyncGenerator[Stream]:
    """Make a call with messages in both directions. Leaving the block before its end cancels the call.

        async with open_stream(call, Request("tail", b"/var/log/syslog")) as stream:
            await stream.send_eof()  # nothing more to say
            async for line in stream:
                print(line)

    Raises:
        CallFailed, ConnectionLost: if the call fails.
    """
    if not request.is_stream:
        request = Request(request.method, request.payload, request.metadata, is_stream=True)
    response = await call(request)
    if response.stream is None:
        raise MisuseError(f"{request!r} was not answered with a stream: a layer has answered it itself")
    async with response.stream as stream:
        yield stream
