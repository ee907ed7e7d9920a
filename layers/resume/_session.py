"""The session that an application holds, on either side: waiting, waking, and the one attachment to a link.

It decides nothing about the protocol (that is the core's), and nothing about how to get a link (that is the client's
and the server's). Its law is the fence: only the *current* attachment may touch the session, so frames that an older
link still brings are dropped, and replay covers them.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Final

import anyio
import anyio.lowlevel
from anyio.abc import ObjectStream

from towline.errors import (
    BufferFull,
    CloseIncomplete,
    HandshakeTimeout,
    LinkLost,
    LossReason,
    ProtocolViolation,
    SessionLost,
    SessionTakenOver,
)
from towline.link import Batch, Ended, Link, Top, Units
from towline.scope import Scope
from towline.streams import LinkAttribute

from ._core import AckBeyondSent, Core
from ._events import Closed as ClosedEvent
from ._events import Connected, Detached, Draining, Event, EventLog, Lost, Resumed
from ._replay import OVERHEAD, cost
from ._state import Input, State, step
from ._wire import Abort, AbortCode, Ack, BatchHead, Closed, Fin, GoAway, Superseded, Type, decode

__all__ = ["VIOLATIONS", "Attachment", "Session", "Statistics", "handshake_bound"]

logger = logging.getLogger(__name__)

FAIR_SIZE: Final = 128 << 10
"""After so many bytes appended, a sender makes a real checkpoint: others want to run, too (D14)."""

GOODBYE_TIMEOUT: Final = 1.0
"""A link that is not needed any more gets so long to take the last word."""

VIOLATIONS: Final = 3
"""So many connections in a row that end by a protocol error and carry nothing end the session: a frame that is poison
to the other end must not loop for ever (D28)."""

_ABORT_REASONS: Final[Mapping[AbortCode, LossReason]] = {
    AbortCode.CANCELLED: LossReason.ABORTED,
    AbortCode.INTERNAL: LossReason.INTERNAL,
    AbortCode.UNREAD: LossReason.UNREAD,
    AbortCode.GOING_AWAY: LossReason.GOING_AWAY,
    AbortCode.STATE_MISMATCH: LossReason.STATE_MISMATCH,
    AbortCode.ACK_BEYOND_SENT: LossReason.STATE_MISMATCH,
    AbortCode.REVOKED: LossReason.REVOKED,
    AbortCode.PROTOCOL: LossReason.STATE_MISMATCH,
}


@contextlib.contextmanager
def handshake_bound(seconds: float) -> Iterator[None]:
    """A handshake's own bound in time: absolute, and not moved by bytes that arrive.

    Raises:
        HandshakeTimeout: when it is over.
    """
    with anyio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise HandshakeTimeout(f"the other end did not finish the session's handshake within {seconds:g} s")


class Statistics:
    """Plain integers about one session, for a status view.

    Attributes:
        resumes: how often it went on over a new link.
        replayed: messages that were sent again.
        duplicates: messages that came again and were dropped.
    """

    __slots__ = ("duplicates", "replayed", "resumes")

    def __init__(self) -> None:
        self.resumes = 0
        self.replayed = 0
        self.duplicates = 0

    def __repr__(self) -> str:
        return f"Statistics(resumes={self.resumes}, replayed={self.replayed}, duplicates={self.duplicates})"


class Attachment(Top):
    """One link's hold on a session. Fenced as soon as it is not the session's attachment any more."""

    def __init__(self, session: Session, link: Link) -> None:
        self.session = session
        self.link = link
        self.goodbye: bytes | None = None  # a fenced attachment's last word

    @property
    def is_current(self) -> bool:
        return self.session.attachment is self

    @property
    def is_live(self) -> bool:
        """Whether what this link brings still means something."""
        return self.session.attachment is self and not self.session.state.is_over

    @property
    def wants(self) -> bool:  # type: ignore[override]
        if self.goodbye is not None:
            return True
        return self.is_current and (self.session.core.wants or bool(self.session.controls))

    @property
    def deadline(self) -> float | None:  # type: ignore[override]
        if not self.is_current:
            return None
        ack_at, expires = self.session.core.deadline, self.link.expires
        if ack_at is None or expires is None:
            return ack_at if expires is None else expires
        return min(ack_at, expires)

    def on_time(self, now: float) -> None:
        self.session.core.on_time(now)
        if self.link.expires is not None and self.link.expires <= now:
            self.link.expires = None
            self.session.key_expired()

    def pull(self, now: float) -> Units:
        if self.goodbye is not None:
            note, self.goodbye = self.goodbye, None
            return [Batch([note])]
        if not self.is_current:
            return []
        return self.session.pulled(self)

    def deliver(self, units: Units, now: float) -> None:
        for batch in units:
            for note in batch.notes:
                if not self.is_live:
                    return
                self.session.receive_note(note)
            if batch.frames and self.is_live:
                self.session.core.receive_frames(batch.frames, now)
        if self.is_live:
            self.session.received()

    def receive_eof(self, ended: Ended) -> bool:
        return False  # the end of a link is not the end of a session: it is detached


class _Sender:
    """One task that waits for room in the replay buffer; first come, first served."""

    __slots__ = ("event",)

    def __init__(self) -> None:
        self.event = anyio.Event()


class Session(ObjectStream[bytes]):
    """Messages both ways, exactly once and in order, while the link below is cut, stalls or moves.

    An application gets one from ``Stack.connect`` or as the argument of its handler. When a promise cannot be kept, the
    next call raises `SessionLost`, which says what was delivered.
    """

    def __init__(self, core: Core, scope: Scope, *, linger: float) -> None:
        self.core = core
        self._replay = core.replay
        self.scope = scope
        self.linger = linger
        self.attachment: Attachment | None = None
        self.epoch = 0
        self.statistics = Statistics()
        self.controls: dict[Type, bytes] = {}  # what must be said once more, at most one of each kind (D10)
        self.log = EventLog()
        self.timer_at: float | None = None  # owned by Timers
        self._state = State.NEW
        self._error: SessionLost | None = None
        self._told = False  # the application has seen the error
        self._closing = False  # the application reads no more
        self._untold: AbortCode | None = None  # aborted here, and the peer does not know yet
        self._arrival: anyio.Event | None = None
        self._senders: deque[_Sender] = deque()
        self._changed: anyio.Event | None = None  # acks, states: for whoever waits for the session itself
        self._budget = -1  # what may be appended before `_admit` looks again; below 0: it looks now
        self._farewell_at: float | None = None
        self._violations = 0
        self._peer_identity: Any = None

    # --- what it is ------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        waiting = len(self.core.inbox)
        return (
            f"<{type(self).__name__} {self._state.value} epoch={self.epoch} "
            f"buffered={self.core.replay.cost} waiting={waiting}>"
        )

    @property
    def state(self) -> State:
        """Where the session stands: attached, detached, closed or lost."""
        return self._state

    @property
    def peer_identity(self) -> Any:
        """Who the peer proved to be when the session began: a `PeerIdentity`, or None where nobody asked."""
        return self._peer_identity

    @property
    def max_message(self) -> int:
        """The most bytes that a message may have."""
        return self.core.max_message

    @property
    def buffered(self) -> int:
        """What the replay buffer holds, in bytes of cost: each message counts its length and 128."""
        return self.core.replay.cost

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
        sender = _Sender()
        self._senders.append(sender)
        try:
            while self._senders[0] is not sender or not self.core.has_room(price):
                await sender.event.wait()
                sender.event = anyio.Event()
                self._check_sending()
        finally:
            self._senders.remove(sender)
            self._wake_sender()

    def _wake_sender(self) -> None:
        if self._senders:
            self._senders[0].event.set()

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
        await anyio.lowlevel.checkpoint()
        while (self.core.replay.base - 1 if acked else self.core.replay.sent_upto) < target:
            if self._error is not None:
                raise self._fresh_error()
            if acked:
                self.core.request_ack()
                self._wake_link()
            await self._change()

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
        if not core.inbox or self._closing:
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
        core = self.core
        if not core.inbox or self._closing:
            await self._wait_for_arrival()
        if limit is None or limit >= len(core.inbox):
            messages = list(core.inbox)
            core.inbox.clear()
        else:
            messages = [core.inbox.popleft() for _ in range(limit)]
        core.consumed(sum(map(len, messages)) + OVERHEAD * len(messages))
        if core.wants:
            self._wake_link()
        return messages

    async def _wait_for_arrival(self) -> None:
        await anyio.lowlevel.checkpoint_if_cancelled()
        while True:
            if self._closing:
                raise anyio.ClosedResourceError
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

    # --- ending ----------------------------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """End our direction, and wait until the peer has everything: as long as that makes progress or the session can
        be resumed. What the peer sent and nobody read makes it learn that (`LossReason.UNREAD`).

        Cancelled, it aborts the session.

        Raises:
            CloseIncomplete: if the attached peer acknowledged nothing for ``linger`` seconds.
            SessionLost: if the session was lost with messages that the peer has not acknowledged.
        """
        if self._closing or self._state is State.NEW:
            await anyio.lowlevel.checkpoint()
            return
        try:
            self._closing = True
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
                await self._change()
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

    def _say_farewell(self) -> None:
        """Everything of ours has arrived, and nobody here reads any more."""
        if self.core.inbox:
            self.leave()
        elif not self._state.is_over and self._farewell_at is None:
            self._farewell_at = self.scope.clock() + self.linger
            self.scope.timers.update(self)

    def abort(self, code: AbortCode = AbortCode.CANCELLED) -> None:
        """End the session at once, on both sides: what is not delivered is dropped. Never waits."""
        self._closing = True
        if not self._state.is_over:
            self._abort_peer(code)
        self._wake_waiters()

    def _abort_peer(self, code: AbortCode, reason: LossReason = LossReason.LOCAL_ABORT, detail: str = "") -> None:
        """End the session here, and tell the peer: now if attached, else when it comes back, or is found again."""
        self._tell(code)
        self.lose(self.loss(reason, detail=detail))

    def _tell(self, code: AbortCode) -> None:
        attachment = self.attachment
        if attachment is not None:
            attachment.goodbye = Abort(code, self.core.consumed_upto).encode()
        else:
            self._untold = code

    async def wait_closed(self) -> None:
        """Wait until the session is over and its last link has taken the last word, or was given up."""
        while not self._state.is_over or self.attachment is not None:
            await self._change()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        if exc_type is not None:
            self.abort()
        await self.aclose()

    # --- time ------------------------------------------------------------------------------------------------------

    @property
    def deadline(self) -> float | None:
        """When this session wants to be told the time."""
        return self._farewell_at

    def on_time(self, now: float) -> None:
        """The farewell is over: the peer must know that nobody reads."""
        if self._farewell_at is not None and self._farewell_at <= now:
            self._farewell_at = None
            self.leave()

    def leave(self) -> None:
        """Closed here, and everything of ours has arrived: do not wait for the peer's own end any longer."""
        if self._state.is_over:
            return
        if not self.core.is_complete or self.core.inbox:
            self._tell(AbortCode.UNREAD)
        self.finish()

    def key_expired(self) -> None:
        """The keys of the link are too old: a client replaces the link."""

    # --- attachments -----------------------------------------------------------------------------------------------

    def attach(self, attachment: Attachment, *, replayed: int | None) -> None:
        """Make this attachment the current one. One synchronous step: whatever was before is fenced by it."""
        resumed = replayed is not None
        self._state = step(self._state, Input.ATTACH)
        self.attachment = attachment
        if resumed:
            self.statistics.resumes += 1
            self.statistics.replayed += replayed or 0
            self.log.add(Resumed(self.epoch, replayed or 0))
        else:
            self.log.add(Connected())
        logger.debug("%r: attached", self)
        self._signal()

    def detach(self, attachment: Attachment, reason: Exception) -> bool:
        """The link of this attachment is gone. False if it was not the current one."""
        if self.attachment is not attachment:
            return False
        self.attachment = None
        if not self._state.is_over:
            self._state = step(self._state, Input.DETACH)
            self.log.add(Detached(reason))
            logger.info("%r: detached: %s", self, reason)
            self._judge(reason)
        self._signal()
        return True

    def _judge(self, reason: Exception) -> None:
        """A link that ended by a protocol error and carried nothing, once too often, ends the session."""
        violated = isinstance(reason.__cause__, ProtocolViolation) and not self.core.progress
        self._violations = self._violations + 1 if violated else 0
        if self._violations >= VIOLATIONS:
            self._abort_peer(AbortCode.PROTOCOL, LossReason.STATE_MISMATCH, str(reason))

    def pulled(self, attachment: Attachment) -> Units:
        """What the core has to say, and the controls of the session."""
        units: Units = [] if self._state.is_over else self.core.pull()
        if self.controls:
            units += [Batch([note]) for note in self.controls.values()]
            self.controls.clear()
        return units

    def receive_note(self, note: bytes) -> None:
        """A control frame from the current link."""
        message = decode(note)
        core = self.core
        try:
            match message:
                case BatchHead():
                    core.receive_head(message)
                case Ack():
                    core.receive_ack(message)
                case Fin():
                    core.receive_fin(message)
                case Abort():
                    self._aborted(message)
                case GoAway():
                    self.log.add(Draining(message.deadline_ms / 1000))
                case Closed():
                    self.peer_closed(message)
                case Superseded():
                    self.superseded(message)
                case _:
                    raise ProtocolViolation(f"{type(message).__name__} after the handshake")
        except AckBeyondSent as error:  # the two ends can never agree again
            self._abort_peer(AbortCode.ACK_BEYOND_SENT, LossReason.STATE_MISMATCH, str(error))

    def received(self) -> None:
        """After each read: wake whoever waited for what it brought."""
        core = self.core
        self.statistics.duplicates = core.duplicates
        if self._closing and core.inbox and core.fin_acked:
            self.leave()
            return
        if core.is_complete:
            self.completed()
        if self._arrival is not None and (core.inbox or core.peer_fin is not None):
            self._arrival.set()
        if self._senders:
            self._wake_sender()
        if self._changed is not None:
            self._signal()

    def completed(self) -> None:
        """Both directions have ended and arrived; what follows is the client's or the server's."""

    def peer_closed(self, message: Closed) -> None:
        """Only a server says so."""
        raise ProtocolViolation("CLOSED from a client")

    def superseded(self, message: Superseded) -> None:
        """Only a server says so."""
        raise ProtocolViolation("SUPERSEDED from a client")

    def _aborted(self, message: Abort) -> None:
        core, upto = self.core, message.consumed_upto
        last = core.replay.next - 1
        if message.code is AbortCode.UNREAD and core.replay.sent_upto == last and upto is not None and upto >= last:
            # It read all that was ever sent, and left: nothing is lost, only nothing more can be said.
            core.trim(last)
            self._error = self.loss(LossReason.UNREAD, delivered_upto=last)
            self.finish()
        else:
            self.lose(self.loss(_ABORT_REASONS[message.code], delivered_upto=upto))

    # --- over ------------------------------------------------------------------------------------------------------

    def loss(self, reason: LossReason, *, delivered_upto: int | None = None, detail: str = "") -> SessionLost:
        """What this session can say of a loss. ``delivered_upto`` may count the FIN; messages are meant."""
        replay = self.core.replay
        if delivered_upto is not None:
            delivered_upto = max(replay.base - 1, min(delivered_upto, replay.sent_upto))
        if reason is LossReason.TAKEN_OVER:
            return SessionTakenOver(delivered_upto=delivered_upto, sent_upto=replay.sent_upto, unacked=replay.unacked())
        return SessionLost(
            reason,
            delivered_upto=delivered_upto,
            sent_upto=replay.sent_upto,
            unacked=replay.unacked(),
            detail=detail,
        )

    def lose(self, error: SessionLost) -> None:
        """The session is over, and every call that waits for it raises this."""
        if self._state.is_over:
            return
        self._state = step(self._state, Input.LOSE)
        self._error = error
        self.log.add(Lost(error))
        logger.info("%r: %s", self, error.reason)
        self._over()

    def finish(self) -> None:
        """The session is over, and both ends have everything."""
        if self._state.is_over:
            return
        self._state = step(self._state, Input.FINISH)
        self.log.add(ClosedEvent())
        logger.debug("%r: closed", self)
        self._over()

    def _over(self) -> None:
        self._farewell_at = None
        attachment = self.attachment
        if attachment is not None:
            attachment.link.finish(GOODBYE_TIMEOUT)
        self._wake_waiters()

    def _fresh_error(self) -> SessionLost:
        """A copy for each raise: several tasks may raise it, and each adds its own traceback."""
        error = self._error
        assert error is not None
        self._told = True
        fresh = copy.copy(error)
        fresh.__cause__ = error.__cause__
        return fresh

    # --- waking ----------------------------------------------------------------------------------------------------

    def _wake_link(self) -> None:
        if self.attachment is not None:
            self.attachment.link.wake()

    def _wake_all_senders(self) -> None:
        self._budget = -1
        for sender in self._senders:
            sender.event.set()

    def _wake_waiters(self) -> None:
        if self._arrival is not None:
            self._arrival.set()
        self._wake_all_senders()
        self._signal()

    def _signal(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    async def _change(self) -> None:
        """Wait for the next ack, change of state, attachment or detachment."""
        if self._changed is None:
            self._changed = anyio.Event()
        await self._changed.wait()

    def drop_link(self, error: LinkLost) -> None:
        """Abort the current link; the session is detached by that."""
        if self.attachment is not None:
            self.attachment.link.abort(error)
