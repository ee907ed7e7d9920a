"""How one end of a tunnel stands, as values: what the admin socket tells, and what the web page and the metrics show.

`Watch` looks at the tunnel a few times a second, whoever follows and however many they are. It asks sessions for what
they count anyway, so nothing on the way of a message knows of it.
"""

from __future__ import annotations

import collections
import os
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Final

import anyio

from towline.layers.encryption import PeerIdentity
from towline.layers.resume import Session, State
from towline.tunnel import Entrance, Exit, Totals

__all__ = ["SessionStatus", "Snapshot", "Watch", "summary"]

LOOK_EVERY: Final = 0.25
"""Seconds between two looks while somebody follows: a cut is seen within that. Faster than this nobody reads."""

LOOK_IDLE: Final = 1.0
"""Seconds between two looks while nobody does: rates need to know how it was a second ago."""

RATE_OVER: Final = 4
"""Rates are over so many looks, a second: over one alone they would jump with every burst."""

MAX_SHOWN: Final = 1_000
"""Sessions in a snapshot, 0.4 MB of JSON. Those without a link come first, so they are not what is left out."""

MAX_ERROR: Final = 200
"""Characters of an error in a snapshot."""


@dataclass(frozen=True, slots=True)
class SessionStatus:
    """How a session stands.

    Attributes:
        id: what logs call it, the same at both ends; no secret.
        state: attached, or detached while it has no link.
        peer: who is at the other end: the name or the fingerprint of its key, else an address.
        age: seconds since it began.
        detached_for: seconds without a link; None while it has one.
        rtt: the last round trip in seconds; None before one was measured, and without a link.
        sent: bytes that went out, each counted once.
        received: bytes that arrived.
        send_rate: bytes a second, over the last second.
        receive_rate: the same for what arrives.
        buffered: what was sent and is not acknowledged, and what waits, in bytes of cost.
        buffer: the most that may be buffered.
        credit: what the other end takes before its program has to read, in bytes of cost.
        cuts: how often it lost its link.
        resumes: how often it went on over a new one.
        replayed: messages that were sent again.
        last_error: what the last link was lost by; empty if none was.
    """

    id: str
    state: str
    peer: str
    age: float
    detached_for: float | None
    rtt: float | None
    sent: int
    received: int
    send_rate: float
    receive_rate: float
    buffered: int
    buffer: int
    credit: int
    cuts: int
    resumes: int
    replayed: int
    last_error: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """How one end of a tunnel stands.

    Attributes:
        role: listen or forward.
        endpoint: what is bound.
        target: where it leads: the server program, or the far end.
        version: of towline.
        pid: of the process.
        uptime: seconds since it began to serve.
        is_draining: whether it accepts nothing new any more.
        attached: sessions that have a link.
        detached: sessions that have none.
        waiting: connections of programs that have no session yet.
        sessions_begun: sessions that there ever were; all that follow count those that are over, too.
        cuts: how often they lost a link.
        resumes: how often they went on over a new one.
        replayed: messages that were sent again.
        sent: bytes that went out.
        received: bytes that arrived.
        send_rate: bytes a second, over the last second.
        receive_rate: the same for what arrives.
        sessions: those without a link first, then the oldest first; 1 000 at most.
    """

    role: str
    endpoint: str
    target: str
    version: str
    pid: int
    uptime: float
    is_draining: bool
    attached: int
    detached: int
    waiting: int
    sessions_begun: int
    cuts: int
    resumes: int
    replayed: int
    sent: int
    received: int
    send_rate: float
    receive_rate: float
    sessions: list[SessionStatus] = field(default_factory=list[SessionStatus])


def summary(snapshot: Snapshot) -> str:
    """A snapshot in a few words.

    It says nothing of rates, so it changes only when something happens.
    """
    count = snapshot.attached + snapshot.detached
    words = f"{count} session{'' if count == 1 else 's'}"
    if snapshot.detached:
        words += f", {snapshot.detached} without a link"
    if snapshot.waiting:
        words += f", {snapshot.waiting} waiting"
    return f"draining, {words}" if snapshot.is_draining else words


@dataclass(frozen=True, slots=True)
class _Counted:
    """What was counted at one look, to tell rates by."""

    at: float
    totals: Totals
    sessions: dict[Session, tuple[int, int]]


class Watch:
    """Looks at one end of a tunnel, and tells all who follow.

    Args:
        tunnel: the end of a tunnel.
    """

    def __init__(self, tunnel: Exit | Entrance) -> None:
        self.tunnel = tunnel
        self._began = anyio.current_time()
        self._version = version("towline")
        self._counted: collections.deque[_Counted] = collections.deque(maxlen=RATE_OVER)
        self._changed = anyio.Event()
        self._followers = 0
        self._is_over = False
        self.snapshot = self._look()

    async def run(self) -> None:
        """Look until cancelled."""
        looked_at = anyio.current_time()
        while True:
            await anyio.sleep(LOOK_EVERY)
            if self._followers or anyio.current_time() - looked_at >= LOOK_IDLE:
                looked_at = anyio.current_time()
                self.refresh()

    def refresh(self) -> Snapshot:
        """Look now."""
        self.snapshot = self._look()
        self._tell()
        return self.snapshot

    def close(self) -> None:
        """End all who follow."""
        self._is_over = True
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    def follow(self) -> AsyncIterator[Snapshot]:
        """How it stands, now and after each look. Who is slow misses some, and none waits for another."""
        return _Follower(self)

    async def next(self, seen: Snapshot | None) -> Snapshot | None:
        """The first snapshot that is not this one; None when no more come."""
        while self.snapshot is seen and not self._is_over:
            self._followers += 1
            try:
                await self._changed.wait()
            finally:
                self._followers -= 1
        return None if self._is_over else self.snapshot

    def find(self, short_id: str) -> list[Session]:
        """The sessions of this id. More than one only if 32 random bits were the same twice."""
        return [session for session in self.tunnel.carried if session.short_id == short_id]

    def _look(self) -> Snapshot:
        tunnel, now = self.tunnel, anyio.current_time()
        sessions, totals = tunnel.carried, tunnel.totals
        then = self._counted[0] if self._counted else _Counted(now, totals, {})
        if not self._counted or now - self._counted[-1].at > LOOK_EVERY / 2:  # who asks often must not shorten the time
            counted = {each: (each.sent_bytes, each.received_bytes) for each in sessions}
            self._counted.append(_Counted(now, totals, counted))
        passed = now - then.at
        detached = [each for each in sessions if each.state is State.DETACHED]
        attached = [each for each in sessions if each.state is not State.DETACHED]
        if isinstance(tunnel, Exit):
            role, target, waiting = "listen", tunnel.to, 0
        else:
            role, target, waiting = "forward", tunnel.via, tunnel.connections - len(sessions)
        return Snapshot(
            role=role,
            endpoint=str(tunnel.endpoint),
            target=str(target),
            version=self._version,
            pid=os.getpid(),
            uptime=now - self._began,
            is_draining=tunnel.is_draining,
            attached=len(attached),
            detached=len(detached),
            waiting=waiting,
            sessions_begun=totals.sessions,
            cuts=totals.cuts,
            resumes=totals.resumes,
            replayed=totals.replayed,
            sent=totals.sent,
            received=totals.received,
            send_rate=_rate(totals.sent, then.totals.sent, passed),
            receive_rate=_rate(totals.received, then.totals.received, passed),
            sessions=[self._session(each, then, now) for each in _first(MAX_SHOWN, detached, attached)],
        )

    def _session(self, session: Session, then: _Counted, now: float) -> SessionStatus:
        sent, received = session.sent_bytes, session.received_bytes
        # One that began since then has moved all that it has since then.
        sent_then, received_then = then.sessions.get(session, (0, 0))
        passed = min(now - then.at, now - session.began_at)
        is_detached = session.state is State.DETACHED
        core, statistics, error = session.core, session.statistics, session.last_cut
        return SessionStatus(
            id=session.short_id,
            state=session.state.value,
            peer=_peer(session),
            age=now - session.began_at,
            detached_for=now - session.detached_at if is_detached else None,
            rtt=session.rtt,
            sent=sent,
            received=received,
            send_rate=_rate(sent, sent_then, passed),
            receive_rate=_rate(received, received_then, passed),
            buffered=session.buffered,
            buffer=core.limits.buffer,
            credit=session.credit,
            cuts=statistics.cuts,
            resumes=statistics.resumes,
            replayed=statistics.replayed,
            last_error="" if error is None else " ".join(str(error).split())[:MAX_ERROR],
        )


class _Follower(AsyncIterator[Snapshot]):
    """One who follows a watch. No generator: one that is left by ``break`` would have to be closed."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._seen: Snapshot | None = None

    async def __anext__(self) -> Snapshot:
        self._seen = await self._watch.next(self._seen)
        if self._seen is None:
            raise StopAsyncIteration
        return self._seen


def _first(count: int, *groups: Iterable[Session]) -> Iterable[Session]:
    for group in groups:
        for session in group:
            if count == 0:
                return
            count -= 1
            yield session


def _rate(now: int, then: int, seconds: float) -> float:
    return max(0, now - then) / seconds if seconds > 0 else 0.0


def _peer(session: Session) -> str:
    identity = session.peer_identity
    if isinstance(identity, PeerIdentity):
        return identity.name or identity.fingerprint
    return session.source
