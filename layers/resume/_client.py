"""The client's side: get a link, prove the session, and find the way back whenever the link is lost.

One supervisor task per session owns that; each link is pumped by a task of its own. The order in a resume: dial first,
while an old link may still carry data; then, in one synchronous step, take the next epoch, fence the old link and
compose HELLO (D23); from then on only the new link may touch the session.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Generator
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import anyio

from towline.errors import (
    HandshakeFailed,
    HandshakeRefused,
    HandshakeTimeout,
    LinkLost,
    LossReason,
    MisuseError,
    ProtocolViolation,
    TowlineError,
)
from towline.hooks import ConnectBegan, ConnectEnded, Hooks, tell, tell_handshake
from towline.link import Link
from towline.scope import Scope
from towline.service import Dial, Service
from towline.stage import Batch

from ._attachment import Attachment
from ._core import Core, StateMismatch
from ._events import Attempt
from ._life import handshake_bound
from ._proof import binding, client_proof, refusal_proof, same, server_proof
from ._session import Session
from ._wire import (
    Abort,
    AbortCode,
    Challenge,
    Closed,
    Hello,
    NewSession,
    Proof,
    Reject,
    RejectCode,
    Resumed,
    Superseded,
    decode,
)

if TYPE_CHECKING:
    from . import Resume

__all__ = ["ClientSession", "Rejected", "open_session", "probe"]

logger = logging.getLogger(__name__)

REDIAL_PAUSE: Final = 0.1
"""The least time from one failed dial to the next: a floor for a stack that has no Retry below."""

GIVE_UP_SLACK: Final = 15.0
"""How long after the server must have expired the session its client still asks (D4)."""

_FINAL: Final = {
    RejectCode.UNKNOWN_SESSION: LossReason.UNKNOWN_SESSION,
    RejectCode.SESSION_EXPIRED: LossReason.EXPIRED,
    RejectCode.SESSION_CLOSED: LossReason.CLOSED,
    RejectCode.SESSION_ABORTED: LossReason.ABORTED,
    RejectCode.SESSION_EVICTED: LossReason.EVICTED,
    RejectCode.SESSION_REVOKED: LossReason.REVOKED,
    RejectCode.AUTH_FAILED: LossReason.REVOKED,
    RejectCode.STALE_EPOCH: LossReason.TAKEN_OVER,
    RejectCode.STATE_MISMATCH: LossReason.STATE_MISMATCH,
    RejectCode.UNSUPPORTED_VERSION: LossReason.UNSUPPORTED,
}
"""Refusals that end a session, when they are authentic."""

_WORDS: Final = {
    RejectCode.UNSUPPORTED_VERSION: "it speaks no common version of RSM",
    RejectCode.AUTH_FAILED: "it does not let this client in",
    RejectCode.RETRY_LATER: "it asks to come back later",
    RejectCode.LIMIT: "it has as many sessions as it may",
}


class Rejected(HandshakeRefused):
    """The server answered HELLO with REJECT.

    Attributes:
        code: its reason.
        recv_final: the number of the last message that the session had received, when it says so.
        authentic: it is the session's own server that says so: by the session's MAC, or on an authenticated channel.
    """

    def __init__(self, reject: Reject, *, authentic: bool) -> None:
        words = _WORDS.get(reject.code, reject.code.name.lower().replace("_", " "))
        super().__init__(f"the server refused the session: {words}")
        self.code = reject.code
        self.recv_final = reject.recv_final
        self.authentic = authentic
        self.retryable = reject.code in (RejectCode.RETRY_LATER, RejectCode.LIMIT)
        if self.retryable and reject.retry_after_ms:
            self.retry_after = reject.retry_after_ms / 1000


async def open_session(resume: Resume, inner: Service[Dial, Link], scope: Scope, dial: Dial) -> ClientSession:
    """Dial until a new session is attached, for at most ``resume.attach_timeout`` seconds.

    What the connector raises is final: the Retry in it has decided so. Only the session's own handshake is tried again
    here, on a new link.

    Raises:
        HandshakeFailed, ConnectFailed: the last error, when it is final or time is up.
    """
    with _looking(resume.hooks, None):
        return await _open_session(resume, inner, scope, dial)


@contextlib.contextmanager
def _looking(hooks: Hooks | None, session: ClientSession | None) -> Generator[None]:
    """Tell hooks that the block looks for a link."""
    if hooks is None:
        yield
        return
    told = None if session is None else session._itself
    tell(hooks.on_connect_begin, ConnectBegan(told))
    before = None if session is None else session.attachment
    error: BaseException | None = None
    try:
        yield
        if session is not None and session.attachment in (None, before):
            error = session._cause
    except BaseException as raised:
        error = raised
        raise
    finally:
        tell(hooks.on_connect_end, ConnectEnded(told, error))
        del error  # or it would hold this frame, and this frame the error


async def _open_session(resume: Resume, inner: Service[Dial, Link], scope: Scope, dial: Dial) -> ClientSession:
    last: Exception | None = None

    def attempting(number: int, delay: float, cause: Exception | None) -> None:
        nonlocal last
        last = cause or last
        if dial.on_attempt is not None:
            dial.on_attempt(number, delay, cause)

    failures, cause = dial.failures, dial.cause
    ended = 0
    with anyio.move_on_after(resume.attach_timeout):
        while True:
            started = scope.clock()
            session = ClientSession(resume, inner, scope, dial)
            link = await inner(replace(dial, failures=failures, cause=cause, on_attempt=attempting))
            try:
                with link.closing_on_error():
                    await session.begin(link)
                return session
            except (TowlineError, OSError) as error:
                ended += isinstance(error, HandshakeFailed) and error.ended
                if not getattr(error, "retryable", True) or ended >= 3:
                    raise  # three ends without a word: it is no server of ours that is just starting (D9)
                failures, cause, last = failures + 1, error, error
            await _pace(scope, started)
    if last is not None:
        raise last
    raise HandshakeTimeout(f"no session with {dial.endpoint} within {resume.attach_timeout:g} s")


async def probe(resume: Resume, inner: Service[Dial, Link], scope: Scope, dial: Dial) -> None:
    """Go all the way to a server, be let in, and leave without a trace: no handler runs.

    Raises:
        HandshakeFailed, ConnectFailed: if it does not let us in.
    """
    link = await inner(dial)
    try:
        await ClientSession(resume, inner, scope, dial).ask(link)
    finally:
        link.abort(LinkLost("it was a probe"))


async def _pace(scope: Scope, started: float) -> None:
    await anyio.sleep(max(0.0, started + REDIAL_PAUSE - scope.clock()))


class ClientSession(Session):
    """A session seen from the side that dials."""

    def __init__(self, resume: Resume, inner: Service[Dial, Link], scope: Scope, dial: Dial) -> None:
        super().__init__(Core(resume.limits), scope, linger=resume.linger, hooks=resume.hooks)
        self._resume = resume
        self._inner = inner
        self._dial = dial
        self._instance = os.urandom(16)
        self._key = b""
        self._ttl = 0.0
        self._failures = 0
        self._cause: Exception | None = None
        self._replace_due = False
        self._attempt: anyio.CancelScope | None = None  # the dial that is under way

    # --- the first link --------------------------------------------------------------------------------------------

    async def begin(self, link: Link) -> None:
        """Ask for a new session over this link, and attach to it."""
        with tell_handshake(self.hooks, "Resume", link):
            answer = await self.ask(link)
        self.session_id, self._key, self._ttl = answer.session_id, answer.key, answer.ttl_ms / 1000
        self.core.start(answer.credit, answer.max_message)
        self.epoch = 1
        self._peer_identity = link.peer_identity
        self._dial = replace(self._dial, endpoint=link.endpoint)  # a policy may have failed over to another (D8)
        self._adopt(link, None)
        self.scope.task_group.start_soon(self._supervise)

    async def ask(self, link: Link) -> NewSession:
        """Ask for a new session over this link. One that is never confirmed runs no handler (D22).

        Raises:
            Rejected: if the server says no.
        """
        core = self.core
        hello = Hello(
            instance=self._instance,
            nonce=os.urandom(16),
            credit=core.credit,
            max_message=core.limits.max_message,
        )
        with handshake_bound(self._resume.handshake_timeout):
            await link.send([Batch([hello.encode()])])
            answer = decode(await link.receive_note())
        match answer:
            case NewSession():
                return answer
            case Reject():
                raise Rejected(answer, authentic=True)
            case _:
                raise ProtocolViolation(f"{type(answer).__name__} in answer to HELLO")

    def _adopt(self, link: Link, replayed: int | None) -> None:
        link.established()
        attachment = Attachment(self, link)
        self.attach(attachment, replayed=replayed)
        self.scope.task_group.start_soon(self._pump, attachment)

    async def _pump(self, attachment: Attachment) -> None:
        error: Exception = LinkLost("the session ended")
        is_lost = False
        try:
            await attachment.link.run(attachment)
        except LinkLost as lost:
            error, is_lost = lost, True
        finally:
            if self.detach(attachment, error, is_lost=is_lost):
                self._link_ended(error)

    def _link_ended(self, error: Exception) -> None:
        self._cause = error
        self._failures = 0 if self.core.progress else self._failures + 1

    # --- the way back ----------------------------------------------------------------------------------------------

    def reconnect(self) -> None:
        """Get a new link now: while detached, the next attempt starts at once; while attached, the old link serves
        until the new one is ready.
        """
        self._failures = 0
        self._replace_due = self.attachment is not None
        if self._attempt is not None and self.attachment is None:
            self._attempt.cancel()
        self._signal()

    def key_expired(self) -> None:
        self.reconnect()

    async def _supervise(self) -> None:
        try:
            while True:
                if self.attachment is None and (not self.state.is_over or self._untold is not None):
                    with _looking(self.hooks, self):
                        await self._find_way_back()
                elif self._replace_due and not self.state.is_over:
                    self._replace_due = False
                    with _looking(self.hooks, self):
                        await self._find_way_back()
                elif self.state.is_over and self.attachment is None:
                    return
                else:
                    await self._change()
        finally:
            if not self.state.is_over:
                self.lose(self.loss(LossReason.LOCAL_ABORT, detail="its scope was closed"))

    async def _find_way_back(self) -> None:
        """Dial until attached again, or until the session cannot be there any more."""
        replacing = self.attachment
        while not self.state.is_over or self._untold is not None:
            started = self.scope.clock()
            patience = self.detached_at + self._ttl + GIVE_UP_SLACK - started
            if replacing is None and patience <= 0:
                return self._give_up()
            # While the old link serves, an attempt is bounded like a first one: that link may die under it.
            bound = patience if replacing is None else self._resume.attach_timeout
            with anyio.move_on_after(bound) as self._attempt:
                try:
                    await self._resume_once()
                    return
                except Rejected as error:
                    if self._final(error):
                        return
                    self._failed(error)
                except MisuseError as error:
                    self._cause = error
                    return self._give_up()
                except (TowlineError, OSError) as error:
                    self._failed(error)
            self._attempt = None
            if replacing is not None and self.attachment is replacing:
                logger.info(
                    "%r: no new link, so the old one stays: %s",
                    self,
                    self._cause,
                    extra=self.log_fields("session.not_replaced", reason=str(self._cause)),
                )
                return
            replacing = None
            await _pace(self.scope, started)

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        self._cause = error

    def _attempting(self, number: int, delay: float, cause: Exception | None) -> None:
        self.log.add(Attempt(number, delay, cause))
        logger.debug(  # quiet: what comes of it is told once, by the end of all attempts
            "%r: attempt %d in %.3g s: %s",
            self,
            number,
            delay,
            cause,
            extra=self.log_fields("session.attempt", attempt=number, pause=delay, reason=str(cause or "")),
        )

    async def _resume_once(self) -> None:
        dial = replace(self._dial, failures=self._failures, cause=self._cause, pinned=True, on_attempt=self._attempting)
        link = await self._inner(dial)
        if self.state.is_over and self._untold is None:  # it ended meanwhile, and its link is taking the last word
            link.abort(LinkLost("the session is over"))
            return
        with (
            link.closing_on_error(),
            tell_handshake(self.hooks, "Resume", link),
            handshake_bound(self._resume.handshake_timeout),
        ):
            old = self.attachment
            hello, context = self._compose(link)
            if old is not None:
                error = LinkLost("a newer connection replaces it")
                self.detach(old, error)
                old.link.abort(error)
            resumed = await self._prove(link, hello, context)
            if self.state.is_over:
                return await self._tell_abort(link)
            try:
                self.core.check_peer(resumed.recv, resumed.next)
            except StateMismatch as error:
                self._abort_peer(AbortCode.STATE_MISMATCH, LossReason.STATE_MISMATCH, str(error))
                return await self._tell_abort(link)
            self._ttl = resumed.ttl_ms / 1000
            replayed = self.core.attach(resumed.recv, resumed.credit, resumed.max_message)
            self._adopt(link, replayed)

    def _compose(self, link: Link) -> tuple[Hello, bytes | None]:
        self.epoch += 1
        core = self.core
        hello = Hello(
            instance=self._instance,
            nonce=os.urandom(16),
            credit=core.credit,
            max_message=core.limits.max_message,
            session_id=self.session_id,
            epoch=self.epoch,
            recv=core.recv,
            next=core.next,
        )
        context = binding(link)
        if context is not None:
            hello = replace(hello, mac=bytes(32))  # the flag that says "with a proof" is under the proof
            hello = replace(hello, mac=client_proof(self._key, context, hello.body()))
        return hello, context

    async def _prove(self, link: Link, hello: Hello, context: bytes | None) -> Resumed:
        await link.send([Batch([hello.encode()])])
        answer = decode(await link.receive_note())
        if context is None and isinstance(answer, Challenge):
            context = hello.nonce + answer.nonce
            proof = Proof(client_proof(self._key, context, hello.body()))
            await link.send([Batch([proof.encode()])])
            answer = decode(await link.receive_note())
        match answer:
            case Resumed():
                expected = server_proof(self._key, context or b"", hello.body(), answer.body())
                if not same(expected, answer.mac) or answer.epoch != hello.epoch:
                    raise HandshakeFailed("the server did not prove that it holds the session")
                return answer
            case Reject():
                expected = refusal_proof(self._key, context or b"", hello.body(), answer.body())
                raise Rejected(answer, authentic=same(expected, answer.mac) or link.exporter is not None)
            case _:
                raise ProtocolViolation(f"{type(answer).__name__} in answer to HELLO")

    async def _tell_abort(self, link: Link) -> None:
        code, self._untold = self._untold, None
        if code is not None:  # else it was closed meanwhile, with everything
            await link.send([Batch([Abort(code, self.core.consumed_upto).encode()])])
        await link.aclose()

    def _final(self, error: Rejected) -> bool:
        """Whether this refusal ends the session; if so, it has."""
        core = self.core
        reason = _FINAL.get(error.code)
        if self.state.is_over:  # only an abort was left to tell, and the session is gone there
            if reason is None:
                return False
            self._untold = None
            return True
        unknown = error.code is RejectCode.UNKNOWN_SESSION
        if core.fin_acked and core.peer_fin is not None and (unknown or error.code is RejectCode.SESSION_CLOSED):
            self.finish()  # it had told us so, on a link that died meanwhile (D24)
            return True
        if reason is None or not error.authentic:
            return False
        if (
            error.code is RejectCode.SESSION_CLOSED
            and core.fin is not None
            and error.recv_final is not None
            and error.recv_final >= core.fin
        ):
            self.finish()
            return True
        lost = self.loss(reason, delivered_upto=error.recv_final)
        lost.__cause__ = error
        self.lose(lost)
        return True

    def _give_up(self) -> None:
        self._untold = None
        if self.state.is_over:
            return
        if self.core.is_complete:
            self.finish()  # everything arrived; only the server's last word did not
            return
        lost = self.loss(LossReason.GAVE_UP, detail=str(self._cause or ""))
        lost.__cause__ = self._cause
        self.lose(lost)

    # --- what only a server says -----------------------------------------------------------------------------------

    def peer_closed(self, message: Closed) -> None:
        fin = self.core.fin
        if fin is None or message.recv_final < fin or self.core.peer_fin is None:
            raise ProtocolViolation("CLOSED before both directions have ended")
        self.core.fin_acked = True
        self.finish()

    def superseded(self, message: Superseded) -> None:
        if message.instance != self._instance:
            self.lose(self.loss(LossReason.TAKEN_OVER))
        else:
            self.drop_link(LinkLost("a newer connection of this session replaced it"))
