"""What carries the frames of a connection: a session, or a plain stream of frames where no session stands below."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, Final, NoReturn

import anyio

from towline.endpoint import Endpoint
from towline.errors import CloseIncomplete, ConnectionLost, SessionLost
from towline.layers.resume import Session
from towline.streams import FrameStream

__all__ = ["Channel", "FrameChannel", "SessionChannel"]


GOODBYE_TIMEOUT: Final = 1.0
"""How long the other end of a session may take to hear that this one closes, in seconds."""


class Channel(ABC):
    """Frames both ways, in order. The five that are done for every call are attributes, to save a step.

    Attributes:
        try_send: sends a frame if it need not wait, and says its number, counted from 1; 0 if it was not sent.
        wait_to_send: waits until `try_send` sends a frame like this one, if that comes next. Raises if it never will.
        send_now: sends a frame whatever waits: what is to be said in the step that receives, which can never wait.
            Raises `BufferFull` if that is abused, by a peer that asks on and on and takes no answer.
        cork: says that several tasks, which were just woken, are going to send.
        receive_each: has frames given to a function in the very step in which they arrive, as many as another says;
            raises at the end.
    """

    try_send: Callable[[bytes], int]
    wait_to_send: Callable[[bytes], Awaitable[None]]
    send_now: Callable[[bytes], None]
    cork: Callable[[], None]
    receive_each: Callable[[Callable[[list[bytes]], None], Callable[[int], int]], Awaitable[NoReturn]]

    @property
    @abstractmethod
    def endpoint(self) -> Endpoint:
        """The endpoint that was dialled, or that accepted."""

    async def send(self, frame: bytes) -> int:
        """Send a frame, with back-pressure, and say its number. Raised or cancelled means not sent."""
        while not (number := self.try_send(frame)):
            await self.wait_to_send(frame)
        return number

    @abstractmethod
    def was_delivered(self, number: int, error: Exception) -> bool:
        """Whether the peer may have received a frame, once the connection has ended with an error."""

    @abstractmethod
    def events(self) -> AsyncIterator[Any]:
        """What happens below."""

    @abstractmethod
    async def aclose(self) -> None:
        """Close, and tell the other end if it is there. Raises nothing but a cancellation."""

    @abstractmethod
    def abort(self) -> None:
        """End at once."""

    @abstractmethod
    async def wait_closed(self) -> None:
        """Wait until it is over."""


class SessionChannel(Channel):
    """Over a session: frames are numbered, so a loss can be told apart for each of them."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.try_send = session.try_send
        self.wait_to_send = session.wait_to_send
        self.send_now = session.send_at_once
        self.cork = session.cork
        self.receive_each = session.receive_each

    @property
    def endpoint(self) -> Endpoint:
        return self._session.endpoint

    def was_delivered(self, number: int, error: Exception) -> bool:
        if not isinstance(error, SessionLost):
            return True
        return number <= error.sent_upto and (error.delivered_upto is None or number <= error.delivered_upto)

    def events(self) -> AsyncIterator[Any]:
        return self._session.events()

    async def aclose(self) -> None:
        # Nobody waits for an answer any more, so there is nothing that must arrive: the session's own patience, which
        # is as long as it can be resumed, would hold up whoever leaves while the other end is gone.
        session = self._session
        if session.attachment is not None:
            with anyio.move_on_after(GOODBYE_TIMEOUT), suppress(CloseIncomplete, ConnectionLost):
                await session.aclose()
                return
        session.abort()

    def abort(self) -> None:
        self._session.abort()

    async def wait_closed(self) -> None:
        await self._session.wait_closed()


class FrameChannel(Channel):
    """Over one link, which says nothing about what has arrived."""

    def __init__(self, stream: FrameStream) -> None:
        self._stream = stream
        self.try_send = stream.try_send
        self.wait_to_send = stream.wait_to_send
        self.send_now = stream.send_at_once
        self.cork = stream.cork
        self.receive_each = stream.receive_each

    @property
    def endpoint(self) -> Endpoint:
        return self._stream.link.endpoint

    def was_delivered(self, number: int, error: Exception) -> bool:
        return True

    def events(self) -> AsyncIterator[Any]:
        return _Nothing()

    async def aclose(self) -> None:
        await self._stream.aclose()

    def abort(self) -> None:
        self._stream.abort()

    async def wait_closed(self) -> None:
        await self._stream.wait_closed()


class _Nothing(AsyncIterator[Any]):
    async def __anext__(self) -> Any:
        raise StopAsyncIteration
