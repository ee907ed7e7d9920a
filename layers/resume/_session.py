"""The session that an application holds: what it may do, and what that waits for."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Final, NoReturn

import anyio
import anyio.lowlevel
from anyio.abc import ObjectStream

from towline.endpoint import Endpoint
from towline.errors import BufferFull, CloseIncomplete
from towline.streams import LinkAttribute

from ._events import Event
from ._life import Life, Sender
from ._replay import OVERHEAD, cost
from ._state import State

__all__ = ["Session"]

BEYOND: Final = 1 << 20
"""What `Session.send_at_once` may add to a full buffer, in bytes of cost."""

FAIR_SIZE: Final = 128 << 10
"""After so many bytes appended, a sender makes a real checkpoint: others want to run, too (D14)."""


class Session(Life, ObjectStream[bytes]):
    """Messages both ways, exactly once and in order, while the link below is cut, stalls or moves.

    An application gets one from ``Stack.connect`` or as the argument of its handler. When a promise cannot be kept, the
    next call raises `SessionLost`, which says what was delivered.
    """

    # --- what it is ------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        waiting = len(self.core.inbox)
        return (
            f"<{type(self).__name__} {self.short_id} {self._state.value} epoch={self.epoch} "
            f"buffered={self.core.replay.cost} waiting={waiting}>"
        )

    @property
    def peer_identity(self) -> Any:
        """Who the peer proved to be when the session began: a `PeerIdentity`, or None where nobody asked."""
        return self._peer_identity

    @property
    def endpoint(self) -> Endpoint:
        """The endpoint that was dialled, or that accepted."""
        assert self._endpoint is not None  # an application gets a session only once it was attached
        return self._endpoint

    @property
    def credit(self) -> int:
        """What the peer would take now, in bytes of cost, of what was never sent."""
        return max(0, self.core.peer_credit - self._replay.sent_cost)

    @property
    def max_message(self) -> int:
        """The most bytes that a message may have."""
        return self.core.max_message

    @property
    def last_number(self) -> int:
        """The number of the last message that was sent, counted from 1: as `SessionLost` counts them."""
        replay = self._replay
        return replay.base + len(replay.messages) - 1

    @property
    def buffered(self) -> int:
        """What the replay buffer holds, in bytes of cost: each message counts its length and 128."""
        return self.core.replay.cost

    @property
    def sent_bytes(self) -> int:
        """Bytes of all messages that went out, each counted once, however often it was sent again."""
        return self.core.sent_bytes

    @property
    def received_bytes(self) -> int:
        """Bytes of all messages that arrived, each counted once."""
        return self.core.received_bytes

    @property
    def rtt(self) -> float | None:
        """The last round trip that Heartbeat measured on the current link, in seconds."""
        return None if self.attachment is None else self.attachment.link.rtt

    def events(self) -> AsyncIterator[Event]:
        """What happens to the session, as an async iterator: connected, detached with the reason, each attempt on the
        way back, resumed with what was replayed, draining, and at last closed or lost.
        """
        return self.log.follow()

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        return {
            LinkAttribute.peer_identity: lambda: self.peer_identity,
            LinkAttribute.epoch: lambda: self.epoch,
            LinkAttribute.rtt: lambda: self.rtt,
        }

    # --- sending ---------------------------------------------------------------------------------------------------

    async def send(self, item: bytes) -> None:
        """Send a message: returns when it is in the replay buffer, and waits while there is no room in it.

        Cancelled or raised means not sent; returned means sent. Nothing else can happen (D12).

        Raises:
            MessageTooLarge: if it could never be carried.
            SessionLost: if the session cannot go on.
            anyio.ClosedResourceError: after `send_eof`, `aclose` or `abort`.
        """
        if type(item) is not bytes:
            item = bytes(item)  # a buffer that its owner may change
        price = len(item) + OVERHEAD
        budget = self._budget - price
        if budget < 0:
            budget = await self._admit(item, price)
        # Nothing waits from here on.
        self._budget = budget
        replay = self._replay
        replay.messages.append(item)
        replay.cost += price
        attachment = self.attachment
        if attachment is not None and attachment.link.parked is not None:
            attachment.link.wake()

    def send_nowait(self, item: bytes) -> None:
        """Send a message, or raise at once: for a broadcast that must not wait for its slowest peer.

        Raises:
            BufferFull: if there is no room for it; it was not sent.
            MessageTooLarge, SessionLost, anyio.ClosedResourceError: as `send`.
        """
        item = bytes(item)
        self.core.check_size(item)
        self._check_sending()
        price = cost(item)
        if self._senders or not self.core.has_room(price):
            raise BufferFull(self._replay.cost, self.core.limits.buffer)
        self._budget -= price
        self._replay.extend([item])
        self._wake_link()

    def send_at_once(self, item: bytes) -> None:
        """Send a message whatever waits, up to a megabyte beyond the buffer: for a protocol above this that must answer
        in the step that receives, and so can never wait.

        Raises:
            BufferFull: if even that is used up. It was not sent.
            MessageTooLarge, SessionLost, anyio.ClosedResourceError: as `send`.
        """
        self.core.check_size(item)
        self._check_sending()
        price = cost(item)
        limit = self.core.limits.buffer + BEYOND
        if self._replay.cost + price > limit:
            raise BufferFull(self._replay.cost, limit)
        self._budget -= price
        self._replay.extend([item])
        self._wake_link()

    def cork(self) -> None:
        """Say that several tasks, which were just woken, are going to send: all of it then goes in one write."""
        if self.attachment is not None:
            self.attachment.link.cork()

    def try_send(self, item: bytes) -> int:
        """Send a message if there is room for it. Raises nothing.

        Unlike `send` it lets nobody else run however much was sent: for whoever waits after it for other reasons.

        Returns:
            The message's number, counted from 1, as `SessionLost` counts them. 0 if it would have to wait, or may not
            be sent at all, and was not: `wait_to_send` then waits, or says why.
        """
        price = len(item) + OVERHEAD
        budget = self._budget - price
        if budget < 0:
            budget = self._refill(item, price)
            if budget < 0:
                return 0
        self._budget = budget
        replay = self._replay
        replay.messages.append(item)
        replay.cost += price
        number = replay.base + len(replay.messages) - 1
        attachment = self.attachment
        if attachment is not None and attachment.link.parked is not None:
            attachment.link.wake()
        return number

    def _refill(self, item: bytes, price: int) -> int:
        """As `_admit`, for one that does not wait: below 0 if it would have to, or may not send at all."""
        core = self.core
        is_over = self._error is not None or core.fin is not None or self._state.is_over
        if is_over or self._senders or len(item) > core.max_message or not core.has_room(price):
            return -1
        return min(FAIR_SIZE, core.room, core.max_message + OVERHEAD) - price

    async def wait_to_send(self, item: bytes) -> None:
        """Wait until `try_send` will send a message as long as this one, if it is called before anything else.

        For a protocol above this whose messages are to be numbered in the order in which they are sent.

        Raises:
            MessageTooLarge, SessionLost, anyio.ClosedResourceError: as `send`.
        """
        price = len(item) + OVERHEAD
        self._budget = max(0, await self._admit(item, price)) + price

    async def send_many(self, items: Iterable[bytes]) -> None:
        """Send messages in order, as `send` for each, but with one look at the buffer for all that fit.

        Raises as `send` does; then a prefix of ``items`` was sent. What is not sent is not known from here: count with
        `send` where that matters.
        """
        core = self.core
        ready: list[bytes] = []
        price = 0
        for item in items:
            item = bytes(item)
            core.check_size(item)
            step_price = cost(item)
            if price + step_price > FAIR_SIZE or not core.has_room(price + step_price):
                await self._send_ready(ready, price)
                ready, price = [], 0
            ready.append(item)
            price += step_price
        await self._send_ready(ready, price)

    async def _send_ready(self, ready: list[bytes], price: int) -> None:
        if not ready:
            return
        budget = self._budget - price
        if budget < 0:
            budget = await self._admit(ready[0], price)
        self._budget = budget
        self._replay.extend(ready)
        self._wake_link()

    async def _admit(self, item: bytes, price: int) -> int:
        """Everything that `send` need not look at for each message: once for a budget's worth of them.

        Returns:
            The budget that is left after this price: what may be appended before anybody looks again.
        """
        self._budget = -1
        self.core.check_size(item)
        self._check_sending()
        await anyio.lowlevel.checkpoint()  # others want to run, too (D14)
        self._check_sending()
        if self._senders or not self.core.has_room(price):
            await self._wait_for_room(price)
        if self._senders:
            return -1  # whoever comes now must stand in line
        return min(FAIR_SIZE, self.core.room, self.core.max_message + OVERHEAD) - price

    def _check_sending(self) -> None:
        if self._error is not None:
            raise self._fresh_error()
        if self.core.fin is not None or self._state.is_over:
            raise anyio.ClosedResourceError

    async def _wait_for_room(self, price: int) -> None:
        """Return when a message of this price may be appended, with no suspension after that."""
        sender = Sender()
        self._senders.append(sender)
        try:
            while self._senders[0] is not sender or not self.core.has_room(price):
                await sender.event.wait()
                sender.event = anyio.Event()
                self._check_sending()
        finally:
            self._senders.remove(sender)
            self._wake_sender()

    async def send_eof(self) -> None:
        """End our direction: the peer receives everything before it, then the end. Receiving goes on.

        Raises:
            SessionLost: if the session cannot go on.
        """
        await anyio.lowlevel.checkpoint()
        if self._error is not None:
            raise self._fresh_error()
        self.core.end()
        self._wake_link()
        self._wake_all_senders()

    async def flush(self, *, acked: bool = True) -> None:
        """Wait until all that was sent so far is acknowledged by the peer.

        Args:
            acked: False: wait only until it was handed to a link once.

        Raises:
            SessionLost: if the session cannot go on before that.
        """
        target = self.core.replay.next - 1
        asked = (0, 0)
        await anyio.lowlevel.checkpoint()
        while (self.core.replay.base - 1 if acked else self.core.replay.sent_upto) < target:
            if self._error is not None:
                raise self._fresh_error()
            if self._state.is_over:
                return  # the peer's last word was that it has everything, and no ack came before it
            sent = (self.epoch, self.core.replay.sent_upto)
            if acked and sent != asked and self.core.replay.sent_upto >= self.core.replay.base:
                asked = sent  # once for what was sent: with no credit left, each answer would ask again at once
                self.core.request_ack()
                self._wake_link()
            await self._next_news()

    # --- receiving -------------------------------------------------------------------------------------------------

    async def receive(self) -> bytes:
        """The next message.

        Raises:
            anyio.EndOfStream: after the peer's last message, when it ended its direction.
            SessionLost: if the session cannot go on, after all that had arrived before was received.
            anyio.ClosedResourceError: after `aclose` or `abort`.
            anyio.BusyResourceError: if another task is receiving.
        """
        core = self.core
        if not core.inbox or self._closing or self._hand_over is not None:
            await self._wait_for_arrival()
        message = core.inbox.popleft()
        price = len(message) + OVERHEAD
        core.consumed_cost += price
        limit = core.limits.window
        if core.consumed_cost + limit - core.granted >= limit // 4:
            core.consumed(0)
            self._wake_link()
        return message

    async def receive_many(self, limit: int | None = None) -> list[bytes]:
        """All messages that have arrived, at least one: waits for the first. Raises as `receive` does.

        Args:
            limit: the most messages to take.
        """
        if not self.core.inbox or self._closing or self._hand_over is not None:
            await self._wait_for_arrival()
        return self._taken(limit)

    def _taken(self, limit: int | None) -> list[bytes]:
        core = self.core
        if limit is None or limit >= len(core.inbox):
            messages = list(core.inbox)
            core.inbox.clear()
        else:
            messages = [core.inbox.popleft() for _ in range(limit)]
        core.consumed(sum(map(len, messages)) + OVERHEAD * len(messages))
        if core.wants:
            self._wake_link()
        return messages

    async def receive_each(self, take: Callable[[list[bytes]], None], turn: Callable[[int], int]) -> NoReturn:
        """Have what arrives given to ``take`` in the very step in which it arrives: for a protocol above this that only
        wakes others by it. Never returns: raises at the end as `receive` does.

        Args:
            take: called with messages, in order. It may neither wait nor raise, nor take long: it holds up the link.
            turn: given how many messages there are, how many to take in this turn of the event loop: at least one.
        """

        def hand_over() -> None:
            take(self._taken(turn(len(self.core.inbox))))

        if self._hand_over is not None or self._arrival is not None:
            raise anyio.BusyResourceError("receiving from")
        self._hand_over = hand_over
        try:
            while True:
                await self._wait_for_arrival(hand_over)  # of what came before this, or of more than went into one turn
                hand_over()
                if self.core.inbox:
                    await anyio.lowlevel.checkpoint()
        finally:
            self._hand_over = None

    async def _wait_for_arrival(self, hand_over: Callable[[], None] | None = None) -> None:
        """Return when there is something to take: for the `receive_each` with this ``hand_over``, or for `receive`."""
        await anyio.lowlevel.checkpoint_if_cancelled()
        while True:
            if self._closing:
                raise anyio.ClosedResourceError
            if self._hand_over is not hand_over:  # between two of its turns the other one does not wait for an arrival
                raise anyio.BusyResourceError("receiving from")
            if self.core.inbox:
                return
            if self.core.peer_fin is not None:
                await anyio.lowlevel.checkpoint()
                raise anyio.EndOfStream
            if self._error is not None:
                await anyio.lowlevel.checkpoint()
                raise self._fresh_error()
            if self._arrival is not None:
                raise anyio.BusyResourceError("receiving from")
            self._arrival = anyio.Event()
            try:
                await self._arrival.wait()
            finally:
                self._arrival = None

    # --- ending ---------------------------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """End our direction, and wait until the peer has everything: as long as that makes progress or the session can
        be resumed. What the peer sent and nobody read makes it learn that (`LossReason.UNREAD`).

        Cancelled, it aborts the session.

        Raises:
            CloseIncomplete: if the attached peer acknowledged nothing for ``linger`` seconds.
            SessionLost: if the session was lost with messages that the peer has not acknowledged.
        """
        if (self._closing and self._state.is_over) or self._state is State.NEW:
            await anyio.lowlevel.checkpoint()
            return
        try:
            self._closing = True  # a second call waits as the first does: whoever returns knows that all has arrived
            self.core.end()
            self._wake_link()
            self._wake_waiters()
            await anyio.lowlevel.checkpoint()
            await self._wait_for_delivery()
        except BaseException:
            self.abort()
            raise

    async def _wait_for_delivery(self) -> None:
        """Until our FIN is acknowledged and, when the peer's has come, until the session is over on both ends."""
        core = self.core
        while not self._state.is_over:
            if core.fin_acked and core.peer_fin is None:
                self._say_farewell()
                return
            before = (core.acked, self.epoch)
            with anyio.move_on_after(self._patience) as patience:
                await self._next_news()
            if patience.cancelled_caught and self._state is State.ATTACHED and before == (core.acked, self.epoch):
                if core.fin_acked:
                    self.finish()  # everything arrived; only the peer's last word did not
                    return
                raise CloseIncomplete(core.replay.next - core.replay.base)
        error = self._error
        if error is not None and error.unacked and not self._told:
            raise self._fresh_error()

    @property
    def _patience(self) -> float:
        """Linger, and the time in which Heartbeat finds a dead link dead: then it is detached, which is no reason."""
        guarded = None if self.attachment is None else self.attachment.link.write_timeout
        return self.linger + (guarded or 0.0)

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        if exc_type is not None:
            self.abort()
        await self.aclose()
