"""What happens to a session, on either side: links come and go, the peer speaks, and at last it is over.

It decides nothing about numbers (that is the core's), and nothing about how to get a link (that is the client's and the
server's). Its law is the fence: only the *current* attachment may touch the session.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections import deque
from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING, Any, Final, cast

import anyio

from towline.endpoint import Endpoint
from towline.errors import (
    HandshakeTimeout,
    LinkLost,
    LossReason,
    ProtocolViolation,
    SessionLost,
    SessionTakenOver,
)
from towline.events import EventLog
from towline.hooks import Hooks, LinkAttached, LinkDetached, SessionEnded, tell
from towline.scope import Scope
from towline.stage import Batch, Units

from ._attachment import Attachment
from ._core import AckBeyondSent, Core
from ._events import Closed as ClosedEvent
from ._events import Connected, Detached, Draining, Event, Lost, Resumed
from ._state import Input, State, step
from ._wire import Abort, AbortCode, Ack, BatchHead, Closed, Fin, GoAway, Superseded, Type, decode

if TYPE_CHECKING:
    from towline.layers.resume import Session
    from towline.link import Link

__all__ = ["GOODBYE_TIMEOUT", "VIOLATIONS", "Life", "Sender", "Statistics", "handshake_bound"]

logger = logging.getLogger(__name__)

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
def handshake_bound(seconds: float) -> Generator[None]:
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
        cuts: how often it lost its link, or had it replaced.
        resumes: how often it went on over a new link.
        replayed: messages that were sent again.
        duplicates: messages that came again and were dropped.
    """

    __slots__ = ("cuts", "duplicates", "replayed", "resumes")

    def __init__(self) -> None:
        self.cuts = 0
        self.resumes = 0
        self.replayed = 0
        self.duplicates = 0

    def __repr__(self) -> str:
        return (
            f"Statistics(cuts={self.cuts}, resumes={self.resumes}, replayed={self.replayed}, "
            f"duplicates={self.duplicates})"
        )


class Sender:
    """One task that waits for room in the replay buffer; first come, first served."""

    __slots__ = ("event",)

    def __init__(self) -> None:
        self.event = anyio.Event()


class Life:
    """A session without what an application does with it.

    Attributes:
        core: the numbers.
        attachment: the current link's hold on it; None while detached.
        epoch: which connection of the session this is, counted from 1.
        session_id: an index, not a secret; the same at both ends. Empty until a client has been given it.
        began_at: when it began here (monotonic seconds).
        detached_at: when its last link was lost.
        last_cut: what that link was lost by; None if none was.
        source: who is at the other end of its last link, as the transport says; "" where that is meaningless.
        controls: what must be said once more, at most one of each kind (D10).
    """

    def __init__(self, core: Core, scope: Scope, *, linger: float, hooks: Hooks | None = None) -> None:
        self.core = core
        self.hooks = hooks
        self._replay = core.replay
        self.scope = scope
        self.linger = linger
        self.attachment: Attachment | None = None
        self.epoch = 0
        self.session_id = b""
        self.began_at = self.detached_at = scope.clock()
        self.last_cut: Exception | None = None
        self.source = ""
        self.statistics = Statistics()
        self.controls: dict[Type, bytes] = {}
        self.log: EventLog[Event] = EventLog()
        self.timer_at: float | None = None  # owned by Timers
        self._state = State.NEW
        self._error: SessionLost | None = None
        self._told = False  # the application has seen the error
        self._closing = False  # the application reads no more
        self._untold: AbortCode | None = None  # aborted here, and the peer does not know yet
        self._last_word: AbortCode | None = None
        self._hand_over: Callable[[], None] | None = None
        self._arrival: anyio.Event | None = None
        self._senders: deque[Sender] = deque()
        self._changed: anyio.Event | None = None  # states and links: for whoever waits for the session itself
        self._news: anyio.Event | None = None  # acks, too: they come with every read, so only while somebody asks
        self._budget = -1  # what may be appended before `_admit` looks again; below 0: it looks now
        self._farewell_at: float | None = None
        self._violations = 0
        self._peer_identity: Any = None
        self._endpoint: Endpoint | None = None

    @property
    def short_id(self) -> str:
        """What logs and status views call the session: 8 hexadecimal digits, the same at both ends, and no secret."""
        return self.session_id[:4].hex() or "new"

    def log_fields(self, event: str, **more: object) -> dict[str, object]:
        """The fields of a record in the log that is about this session."""
        return {
            "event": event,
            "session": self.short_id,
            "state": self._state.value,
            "epoch": self.epoch,
            "source": self.source,
            **more,
        }

    @property
    def state(self) -> State:
        """Where the session stands: attached, detached, closed or lost."""
        return self._state

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
        self._last_word = code
        attachment = self.attachment
        if attachment is not None:
            attachment.goodbye = Abort(code, self.core.consumed_upto).encode()
        else:
            self._untold = code

    async def wait_closed(self) -> None:
        """Wait until the session is over and its last link has taken the last word, or was given up."""
        while not self._state.is_over or self.attachment is not None:
            await self._change()

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
        self.source = attachment.link.source
        self._endpoint = attachment.link.endpoint
        if resumed:
            self.statistics.resumes += 1
            self.statistics.replayed += replayed or 0
            self.log.add(Resumed(self.epoch, replayed or 0))
        else:
            self.log.add(Connected())
        self._tell_attached(attachment.link, replayed)
        logger.debug("%r: attached", self, extra=self.log_fields("session.attached", replayed=replayed))
        self._signal()

    def _tell_attached(self, link: Link, replayed: int | None) -> None:
        if self.hooks is not None:
            again = self._replay.messages[: replayed or 0]
            event = LinkAttached(self._itself, link, replayed is not None, len(again), sum(map(len, again)))
            tell(self.hooks.on_attach, event)

    @property
    def _itself(self) -> Session:
        return cast("Session", self)  # whose base this is, and of nothing else

    def detach(self, attachment: Attachment, reason: Exception, *, is_lost: bool = False) -> bool:
        """The link of this attachment is gone. False if it was not the current one."""
        if self.attachment is not attachment:
            return False
        self.attachment = None
        self.detached_at = self.scope.clock()
        if not self._state.is_over:
            self._state = step(self._state, Input.DETACH)
            self.statistics.cuts += 1
            self.last_cut = reason
            self.log.add(Detached(reason))
            logger.info("%r: detached: %s", self, reason, extra=self.log_fields("session.detached", reason=str(reason)))
            self._judge(reason)
        elif attachment.goodbye is not None:  # its link did not take it any more
            self._untold = self._last_word
        if self.hooks is not None:
            tell(self.hooks.on_detach, LinkDetached(self._itself, attachment.link, reason, is_lost))
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
        if self._hand_over is not None and core.inbox and not self._closing:
            self._hand_over()
        if self._arrival is not None and (core.inbox or core.peer_fin is not None):
            self._arrival.set()
        if self._senders:
            self._wake_sender()
        if self._news is not None:
            self._news.set()
            self._news = None

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
        self.log.add(Lost(error), is_last=True)
        # Quiet, since its user is told by an error, and decides how loud that is.
        logger.info(
            "%r: %s", self, error.reason, extra=self.log_fields("session.lost", reason=error.reason.name.lower())
        )
        self._over()

    def finish(self) -> None:
        """The session is over, and both ends have everything."""
        if self._state.is_over:
            return
        self._state = step(self._state, Input.FINISH)
        self.log.add(ClosedEvent(), is_last=True)
        logger.debug("%r: closed", self, extra=self.log_fields("session.closed"))
        self._over()

    def _over(self) -> None:
        self._farewell_at = None
        if self.hooks is not None:
            error = self._error if self._state is State.LOST else None
            tell(self.hooks.on_session_end, SessionEnded(self._itself, error))
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

    def _wake_sender(self) -> None:
        if self._senders:
            self._senders[0].event.set()

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
        for event in (self._changed, self._news):
            if event is not None:
                event.set()
        self._changed = self._news = None

    async def _change(self) -> None:
        """Wait for the next change of state, attachment or detachment."""
        if self._changed is None:
            self._changed = anyio.Event()
        await self._changed.wait()

    async def _next_news(self) -> None:
        """Wait for the next ack, or for what `_change` waits for."""
        if self._news is None:
            self._news = anyio.Event()
        await self._news.wait()

    def drop_link(self, error: LinkLost) -> None:
        """Abort the current link; the session is detached by that."""
        if self.attachment is not None:
            self.attachment.link.abort(error)
