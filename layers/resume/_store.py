"""The server's sessions, and what is remembered of those that are over.

Nothing here grows without bound: detached sessions and tombstones are capped, and the oldest detached session of the
principal with most of them goes first. A session that is attached is never evicted.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from towline.units import Bytes

from ._wire import RejectCode

if TYPE_CHECKING:
    from ._server import ServerSession

__all__ = ["MemoryStore", "SessionStore", "Tombstone"]


@dataclass(frozen=True, slots=True)
class Tombstone:
    """What is known of a session that is over: enough to tell its client what became of it."""

    code: RejectCode
    recv_final: int
    key: bytes
    principal: bytes | None
    until: float

    def __repr__(self) -> str:  # the key is a secret
        return f"Tombstone({self.code.name}, recv_final={self.recv_final})"


class SessionStore(Protocol):
    """Where a server keeps its sessions. All calls are synchronous: taking a session over must be one step."""

    def add(self, session: ServerSession) -> None:
        """Keep a new session."""

    def get(self, session_id: bytes) -> ServerSession | None:
        """The session of this id, if it lives."""
        ...

    def bury(self, session: ServerSession, tombstone: Tombstone | None) -> None:
        """Forget the session, and remember the tombstone instead."""

    def tombstone(self, session_id: bytes, now: float) -> Tombstone | None:
        """What is remembered of a session that is over."""
        ...

    def __iter__(self) -> Iterator[ServerSession]: ...

    def __len__(self) -> int: ...

    def count(self, principal: bytes | None) -> int:
        """How many sessions this principal has."""
        ...

    def to_evict(self) -> Sequence[ServerSession]:
        """The detached sessions to give up, so that the limits hold. Called a few times a second at most."""
        ...


class MemoryStore(SessionStore):
    """Sessions in this process's memory: they survive any loss of a link, and end with the process.

    Args:
        max_detached: sessions without a link that are kept, 10 000.
        max_bytes: bytes of cost in all queues of all sessions above which detached ones are given up, 1 GiB.
        max_tombstones: sessions that are over and remembered, 10 000.
    """

    def __init__(self, *, max_detached: int = 10_000, max_bytes: Bytes = 1 << 30, max_tombstones: int = 10_000) -> None:
        self.max_detached = max_detached
        self.max_bytes = max_bytes
        self.max_tombstones = max_tombstones
        self._sessions: dict[bytes, ServerSession] = {}
        self._principals: Counter[bytes | None] = Counter()
        self._tombstones: OrderedDict[bytes, Tombstone] = OrderedDict()

    def __repr__(self) -> str:
        return f"MemoryStore({len(self._sessions)} sessions, {len(self._tombstones)} tombstones)"

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[ServerSession]:
        return iter(list(self._sessions.values()))

    def add(self, session: ServerSession) -> None:
        self._sessions[session.session_id] = session
        self._principals[session.principal] += 1

    def get(self, session_id: bytes) -> ServerSession | None:
        return self._sessions.get(session_id)

    def count(self, principal: bytes | None) -> int:
        return self._principals[principal]

    def bury(self, session: ServerSession, tombstone: Tombstone | None) -> None:
        if self._sessions.pop(session.session_id, None) is None:
            return
        self._principals[session.principal] -= 1
        if not self._principals[session.principal]:
            del self._principals[session.principal]
        if tombstone is not None:
            self._tombstones[session.session_id] = tombstone
            while len(self._tombstones) > self.max_tombstones:
                self._tombstones.popitem(last=False)

    def tombstone(self, session_id: bytes, now: float) -> Tombstone | None:
        while self._tombstones and next(iter(self._tombstones.values())).until <= now:
            self._tombstones.popitem(last=False)
        return self._tombstones.get(session_id)

    def to_evict(self) -> Sequence[ServerSession]:
        detached = [session for session in self._sessions.values() if session.attachment is None]
        if not detached:
            return []
        too_many = len(detached) - self.max_detached
        too_much = sum(session.held for session in self._sessions.values()) - self.max_bytes
        if too_many <= 0 and too_much <= 0:
            return []
        detached.sort(key=lambda session: session.detached_at)
        queues: dict[bytes | None, deque[ServerSession]] = {}
        for session in detached:
            queues.setdefault(session.principal, deque()).append(session)
        # The longest queue first; among equal ones, the one whose oldest session is oldest.
        heap = [(-len(queue), queue[0].detached_at, number, queue) for number, queue in enumerate(queues.values())]
        heapq.heapify(heap)
        victims: list[ServerSession] = []
        while heap and (too_many > 0 or too_much > 0):
            *_, number, queue = heapq.heappop(heap)
            victims.append(victim := queue.popleft())
            too_many -= 1
            too_much -= victim.held
            if queue:
                heapq.heappush(heap, (-len(queue), queue[0].detached_at, number, queue))
        return victims
