"""The server's side: let connections in, attach them to sessions, and run the handler of each session once.

Nothing about a session changes before the connection has proved that it holds the session's secret; then taking it over
is one synchronous step, which never waits for the old connection.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NoReturn

import anyio

from towline.errors import HandshakeRefused, LinkLost, LossReason, ProtocolViolation, SessionLost
from towline.hooks import tell_handshake
from towline.link import Link
from towline.scope import Scope
from towline.service import Service
from towline.stage import Batch

from ._attachment import Attachment
from ._core import Core, StateMismatch
from ._life import GOODBYE_TIMEOUT, handshake_bound
from ._proof import binding, client_proof, refusal_proof, same, server_proof
from ._replay import cost
from ._session import FAIR_SIZE, Session
from ._store import Tombstone
from ._wire import (
    VERSION,
    AbortCode,
    Challenge,
    Closed,
    GoAway,
    Hello,
    NewSession,
    Proof,
    Reject,
    RejectCode,
    Resumed,
    Superseded,
    Type,
    decode,
)

if TYPE_CHECKING:
    from . import Resume

__all__ = ["ResumeServer", "ServerSession"]

logger = logging.getLogger(__name__)

UNCONFIRMED_TIMEOUT: Final = 10.0
"""A session whose client has never said a word is kept so long after its link, and then forgotten without a trace
(D22). Not from its beginning: a client whose first word falls into a black hole learns that from Heartbeat, in 15 s."""

ROOM_DELAY: Final = 0.05
"""A server looks for sessions to give up so long after one was detached: a whole fleet may be, in one moment."""

RETRY_LATER: Final = 1.0
"""When a client that is turned away for lack of room may ask again, in seconds."""

_CODES: Final = {
    LossReason.EXPIRED: RejectCode.SESSION_EXPIRED,
    LossReason.EVICTED: RejectCode.SESSION_EVICTED,
    LossReason.REVOKED: RejectCode.SESSION_REVOKED,
}


_OURS: Final = frozenset({LossReason.EXPIRED, LossReason.EVICTED})
"""Losses that this side decides after waiting; all others the client brings about, or the application."""


class Refused(HandshakeRefused):
    """This server has refused a session.

    Attributes:
        code: its reason.
    """

    def __init__(self, code: RejectCode) -> None:
        super().__init__(f"refused: {code.name}")
        self.code = code


class ServerSession(Session):
    """A session seen from the side that listens.

    Attributes:
        principal: who may resume it.
    """

    def __init__(self, server: ResumeServer, hello: Hello, link: Link) -> None:
        resume = server.resume
        super().__init__(Core(resume.limits), server.scope, linger=resume.linger)  # hooks: once it is confirmed
        self.session_id = os.urandom(16)
        self.key = os.urandom(32)
        self.principal = link.principal
        self.client_instance = hello.instance
        self._server = server
        self._unseen = 0  # cost that was added since the store was last asked for room
        self._expires_at: float | None = None
        self._gone_at: float | None = None  # when the server, which drains, cuts off who is still here
        self._peer_identity = link.peer_identity
        self._confirmed = False
        self.core.start(hello.credit, hello.max_message)

    @property
    def held(self) -> int:
        """Bytes of cost in both queues."""
        return self.core.replay.cost + self.core.inbox_cost

    async def _admit(self, item: bytes, price: int) -> int:
        budget = await super()._admit(item, price)
        self._hold(price + max(0, budget))
        return budget

    def _refill(self, item: bytes, price: int) -> int:
        budget = super()._refill(item, price)
        if budget >= 0:
            self._hold(price + budget)
        return budget

    def send_nowait(self, item: bytes) -> None:
        if self.attachment is None:
            self._hold(cost(item))
        super().send_nowait(item)

    def _hold(self, price: int) -> None:
        """What is kept for clients that are away is bounded in all: look again after every 128 KiB or so."""
        self._unseen += price
        if self.attachment is None and self._unseen >= FAIR_SIZE:
            self._unseen = 0
            self._server.make_room()

    def forget(self) -> None:
        """Its client never confirmed it: no handler runs, and no trace is left (D22)."""
        self.lose(self.loss(LossReason.UNKNOWN_SESSION, detail="its client never confirmed it"))

    @property
    def is_abandoned(self) -> bool:
        """Whether its client went away before it confirmed the session, which happens to a probe."""
        return not self._confirmed and self.attachment is None

    def is_stale(self, epoch: int) -> bool:
        """Whether an attempt with this epoch comes too late: a newer one, or one as new, has the session."""
        return epoch <= self.epoch

    def receive_note(self, note: bytes) -> None:
        super().receive_note(note)
        self.confirm()

    def confirm(self) -> None:
        """The client knows of the session: from here on it is one, and its handler may run."""
        if self._confirmed or self.state.is_over:
            return
        self._confirmed = True
        self.hooks = self._server.resume.hooks
        if self.attachment is not None:
            self._expires_at = None
            self._tell_attached(self.attachment.link, None)
        self.scope.task_group.start_soon(self._server.handle, self)

    @property
    def deadline(self) -> float | None:
        moments = [at for at in (self._farewell_at, self._expires_at) if at is not None]
        return min(moments, default=None)

    def on_time(self, now: float) -> None:
        super().on_time(now)
        if self._expires_at is not None and self._expires_at <= now:
            self._expires_at = None
            if self._confirmed:
                self.lose(self.loss(LossReason.EXPIRED))
            else:
                self.forget()

    def attach(self, attachment: Attachment, *, replayed: int | None) -> None:
        self._expires_at = None
        super().attach(attachment, replayed=replayed)
        if self._gone_at is not None:  # the link before may have died with the word in it
            self.go_away(max(0.0, self._gone_at - self.scope.clock()))

    def detach(self, attachment: Attachment, reason: Exception, *, is_lost: bool = False) -> bool:
        if not super().detach(attachment, reason, is_lost=is_lost):
            return False
        if not self.state.is_over:
            kept = self._server.resume.ttl if self._confirmed else UNCONFIRMED_TIMEOUT
            self._expires_at = self.detached_at + kept
            self.scope.timers.update(self)
            self._server.make_room()
        return True

    def completed(self) -> None:
        if self._closing and self.core.inbox:
            self.leave()
            return
        self.controls[Type.CLOSED] = Closed(self.core.recv).encode()
        self._wake_link()
        self.finish()

    def go_away(self, deadline: float) -> None:
        """Tell the client that the server shuts down, now and whenever it comes back meanwhile."""
        self._gone_at = self.scope.clock() + deadline
        self.controls[Type.GOAWAY] = GoAway(round(deadline * 1000)).encode()
        self._wake_link()

    def cut_off(self) -> None:
        """The server has shut down, and this session was not done in time."""
        if not self.state.is_over:
            self._abort_peer(AbortCode.GOING_AWAY, LossReason.GOING_AWAY)

    def revoke(self) -> None:
        """The server no longer accepts this client's key."""
        if not self.state.is_over:
            self._abort_peer(AbortCode.REVOKED, LossReason.REVOKED)

    def evict(self) -> None:
        """Make room: this session is given up while it is detached."""
        self.lose(self.loss(LossReason.EVICTED))

    def lose(self, error: SessionLost) -> None:
        if self.state.is_over:
            return
        super().lose(error)
        code = _CODES.get(error.reason, RejectCode.SESSION_ABORTED)
        self._server.over(self, code if self._confirmed else None)
        if error.reason is LossReason.EXPIRED:
            self._server.expired(self)

    def finish(self) -> None:
        if self.state.is_over:
            return
        super().finish()
        whole = self.core.is_complete and not (self._closing and self.core.inbox)
        self._server.over(self, RejectCode.SESSION_CLOSED if whole else RejectCode.SESSION_ABORTED)


class ResumeServer:
    """All sessions of one listening stack."""

    def __init__(self, resume: Resume, handler: Service[Session, None], scope: Scope) -> None:
        self.resume = resume
        self.scope = scope
        self.store = resume.new_store()
        self._handler = handler
        self._instance = os.urandom(16)
        self._draining = False
        self._emptied = anyio.Event()
        self.timer_at: float | None = None  # owned by Timers
        self.deadline: float | None = None  # when to make room
        scope.servers.append(self)

    # --- connections -----------------------------------------------------------------------------------------------

    async def accept(self, link: Link, /) -> None:
        """Serve one connection until it ends. Returns when the link is gone; its session may live on."""
        resume = self.resume
        with (
            link.closing_on_error(),
            tell_handshake(resume.hooks, "Resume", link),
            handshake_bound(resume.handshake_timeout),
        ):
            session, attachment = await self._handshake(link)
        error: Exception = LinkLost("the session ended")
        is_lost = False
        try:
            await link.run(attachment)
        except LinkLost as lost:
            error, is_lost = lost, True
        finally:
            session.detach(attachment, error, is_lost=is_lost)

    async def _handshake(self, link: Link) -> tuple[ServerSession, Attachment]:
        hello = decode(await link.receive_note())
        if not isinstance(hello, Hello):
            raise ProtocolViolation(f"{type(hello).__name__} where HELLO was expected")
        if not hello.ver_min <= VERSION <= hello.ver_max:
            await self._refuse(link, Reject(RejectCode.UNSUPPORTED_VERSION))
        if hello.session_id is None:
            return await self._new(link, hello)
        return await self._resume(link, hello)

    async def _refuse(self, link: Link, reject: Reject) -> NoReturn:
        await link.send([Batch([reject.encode()])])
        await link.aclose()
        raise Refused(reject.code)

    async def _new(self, link: Link, hello: Hello) -> tuple[ServerSession, Attachment]:
        resume = self.resume
        later = round(RETRY_LATER * 1000)
        if self._draining:
            await self._refuse(link, Reject(RejectCode.RETRY_LATER, later))
        if self.store.count(link.principal) >= resume.max_sessions:
            await self._refuse(link, Reject(RejectCode.LIMIT, later))
        if resume.authorize is not None and not resume.authorize(link.peer_identity):
            await self._refuse(link, Reject(RejectCode.AUTH_FAILED))
        session = ServerSession(self, hello, link)
        session.epoch = 1
        answer = NewSession(
            instance=self._instance,
            session_id=session.session_id,
            key=session.key,
            ttl_ms=round(resume.ttl * 1000),
            credit=session.core.credit,
            max_message=resume.limits.max_message,
        )
        await link.send([Batch([answer.encode()])])
        link.established()
        self.store.add(session)
        attachment = Attachment(session, link)
        session.attach(attachment, replayed=None)
        return session, attachment

    async def _resume(self, link: Link, hello: Hello) -> tuple[ServerSession, Attachment]:
        context, proof = await self._collect_proof(link, hello)
        assert hello.session_id is not None
        session = self.store.get(hello.session_id)
        tombstone = self.store.tombstone(hello.session_id, self.scope.clock())
        known = session or tombstone
        # Without a valid proof every answer is the same, and takes about the same time (D21).
        key = known.key if known is not None else bytes(32)
        valid = same(client_proof(key, context, hello.body()), proof)
        if known is None or not valid or known.principal != link.principal:
            await self._refuse(link, Reject(RejectCode.UNKNOWN_SESSION))
        if session is None or session.state.is_over:
            assert tombstone is not None
            await self._refuse_proved(link, hello, context, key, tombstone.code, tombstone.recv_final)
        assert session is not None
        if session.is_stale(hello.epoch):
            await self._refuse_proved(link, hello, context, key, RejectCode.STALE_EPOCH, None)
        return await self._take_over(link, hello, context, session)

    async def _collect_proof(self, link: Link, hello: Hello) -> tuple[bytes, bytes]:
        context = binding(link)
        if context is not None:
            return context, hello.mac
        challenge = Challenge(self._instance, os.urandom(16))
        await link.send([Batch([challenge.encode()])])
        answer = decode(await link.receive_note())
        if not isinstance(answer, Proof):
            raise ProtocolViolation(f"{type(answer).__name__} where PROOF was expected")
        return hello.nonce + challenge.nonce, answer.mac

    async def _refuse_proved(
        self,
        link: Link,
        hello: Hello,
        context: bytes,
        key: bytes,
        code: RejectCode,
        recv_final: int | None,
    ) -> NoReturn:
        reject = Reject(code, recv_final=recv_final, mac=bytes(32))
        mac = refusal_proof(key, context, hello.body(), reject.body())
        await self._refuse(link, replace(reject, mac=mac))

    async def _take_over(
        self, link: Link, hello: Hello, context: bytes, session: ServerSession
    ) -> tuple[ServerSession, Attachment]:
        core = session.core
        try:
            core.check_peer(hello.recv, hello.next)
        except StateMismatch as error:
            recv_final = core.recv
            session.lose(session.loss(LossReason.STATE_MISMATCH, detail=str(error)))
            await self._refuse_proved(link, hello, context, session.key, RejectCode.STATE_MISMATCH, recv_final)
        # From here to the attachment nothing waits: either the old connection has the session, or the new one.
        session.epoch = hello.epoch
        old = session.attachment
        instance_before, session.client_instance = session.client_instance, hello.instance
        if old is not None:
            session.detach(old, LinkLost("a newer connection took the session over"))
            if instance_before != hello.instance:
                logger.info("%r: taken over by another client", session, extra=session.log_fields("session.taken_over"))
            old.goodbye = Superseded(hello.instance).encode()
            old.link.finish(GOODBYE_TIMEOUT)
        replayed = core.attach(hello.recv, hello.credit, hello.max_message)
        attachment = Attachment(session, link)
        answer = Resumed(
            epoch=hello.epoch,
            recv=core.recv,
            next=core.next,
            ttl_ms=round(self.resume.ttl * 1000),
            credit=core.credit,
            max_message=core.limits.max_message,
        )
        mac = server_proof(session.key, context, hello.body(), answer.body())
        session.attach(attachment, replayed=replayed)
        session.received()
        session.confirm()
        try:
            await link.send([Batch([replace(answer, mac=mac).encode()])])
        except BaseException:
            session.detach(attachment, LinkLost("the link was lost in the handshake"), is_lost=True)
            raise
        link.established()
        return session, attachment

    # --- sessions --------------------------------------------------------------------------------------------------

    async def handle(self, session: ServerSession) -> None:
        """Run the application's handler for a session, once, whatever becomes of its connections."""
        try:
            await self._handler(session)
        except Exception as error:
            if not isinstance(error, SessionLost):
                logger.exception("%r: its handler failed", session, extra=session.log_fields("session.handler_failed"))
            elif error.reason in _OURS:  # the end of all waiting, and nobody else says so
                logger.warning(
                    "%r: given up: %s",
                    session,
                    error.reason,
                    extra=session.log_fields("session.given_up", reason=error.reason.name.lower()),
                )
            session.abort(AbortCode.INTERNAL)
            return
        try:
            await session.aclose()
        except Exception as error:
            logger.info(
                "%r: not closed cleanly: %s",
                session,
                error,
                extra=session.log_fields("session.not_closed", reason=str(error)),
            )

    @property
    def sessions(self) -> Sequence[ServerSession]:
        """All sessions that live, attached or not."""
        return list(self.store)

    def over(self, session: ServerSession, code: RejectCode | None) -> None:
        """A session has ended: remember what its client may ask."""
        tombstone = None
        if code is not None:
            until = self.scope.clock() + self.resume.tombstone_ttl
            tombstone = Tombstone(code, session.core.recv, session.key, session.principal, until)
        self.store.bury(session, tombstone)
        if not len(self.store):
            self._emptied.set()

    def expired(self, session: ServerSession) -> None:
        callback: Callable[[Any], None] | None = self.resume.on_expired
        if callback is not None:
            try:
                callback(session)
            except Exception:
                logger.exception("on_expired failed", extra=session.log_fields("session.callback_failed"))

    def make_room(self) -> None:
        """Give up detached sessions until the limits hold; soon, once for all that are detached together."""
        if self.deadline is None:
            self.deadline = self.scope.clock() + ROOM_DELAY
            self.scope.timers.update(self)

    def on_time(self, now: float) -> None:
        """It is time to make room."""
        self.deadline = None
        for victim in self.store.to_evict():
            victim.evict()

    async def drain(self, deadline: float) -> int:
        """Start nothing new, tell every client, and wait until all sessions are over or the deadline has come.

        Returns:
            How many sessions were cut off at the deadline.
        """
        self._draining = True
        for session in self.store:
            if session.is_abandoned:
                session.forget()
            else:
                session.go_away(deadline)
        with anyio.move_on_after(deadline):
            while len(self.store):
                self._emptied = anyio.Event()
                await self._emptied.wait()
        rest = list(self.store)
        for session in rest:
            unacked = len(session.core.replay.messages)
            logger.warning(
                "%r: cut off, %d messages not acknowledged",
                session,
                unacked,
                extra=session.log_fields("session.cut_off", unacked=unacked),
            )
            session.cut_off()
        return len(rest)
