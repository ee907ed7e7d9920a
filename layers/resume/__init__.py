"""Resume: a session that outlives the link below it. The protocol is RSM/1 (``docs/protocol.md``).

_wire    the control frames           _state    the life of a session, as a table
_replay  the replay buffer            _proof    who may resume
_core    the numbers and their rules  _session  what an application holds
_client  _server  _store  _events     the shells
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from towline.hooks import Hooks
from towline.link import Link
from towline.scope import Scope
from towline.service import Dial, Kind, Service, TwoSided
from towline.text import differing
from towline.units import Bytes, Seconds

from ._client import ClientSession, open_session, probe
from ._core import Limits
from ._events import Attempt, Closed, Connected, Detached, Draining, Event, Lost, Missed, Resumed
from ._life import Statistics
from ._replay import cost
from ._server import ResumeServer, ServerSession
from ._session import Session
from ._state import State
from ._store import MemoryStore, SessionStore
from ._wire import AbortCode

__all__ = [
    "AbortCode",
    "Attempt",
    "ClientSession",
    "Closed",
    "Connected",
    "Detached",
    "Draining",
    "Event",
    "Lost",
    "MemoryStore",
    "Missed",
    "Resume",
    "Resumed",
    "ServerSession",
    "Session",
    "SessionStore",
    "State",
    "Statistics",
    "cost",
]


@dataclass(frozen=True)
class Resume(TwoSided[ClientSession]):
    """Layer: messages that arrive exactly once and in order although the link below is lost again and again.

    While both ends of a session live, nothing is lost, doubled or reordered. If one end's process dies, what is not
    acknowledged is unknown, and the other end's next call says so with `SessionLost`. *Delivered* means: placed in the
    peer's receive queue.

    Needs frames from the layer inside it; gives messages. Put `Retry` directly inside it, or a lost link is redialled
    without any backoff, and `Heartbeat` inside that, or a dead link is noticed only by the kernel.

    Args:
        buffer: what may be sent and not acknowledged, in bytes of cost (length and 128 for each message), 8 MiB. A full
            buffer makes ``send`` wait. It bounds throughput to ``buffer / (round trip + 0.2 s)`` at worst.
        window: what the peer may send before this application takes it, in bytes of cost, 8 MiB.
        max_message: the most bytes in a message, 4 MiB; its cost must fit the window, the buffer and Framing's limit.
        ttl: how long a server keeps a session without a link, in seconds, 300. The server's setting counts.
        tombstone_ttl: how long a server remembers what became of a session that is over, in seconds, 600.
        linger: how long ``aclose`` waits for an attached peer that acknowledges nothing, in seconds, 10.
        handshake_timeout: how long an answer to HELLO may take, in seconds, 5.
        attach_timeout: how long the first connect may take in all, in seconds, 30.
        max_sessions: sessions that one principal may have at a server, 1 000.
        authorize: server: called with the peer's identity before a new session; False refuses it.
        on_expired: server: called with a session that was detached for too long.
        new_store: server: makes the store that holds the sessions.
        hooks: told when a link is looked for, is attached and is lost, of every handshake, and when a session is over.

    Raises:
        ValueError: if max_message does not fit.

    >>> Resume(ttl=60).ttl
    60
    """

    needs: ClassVar[tuple[Kind, ...]] = (Kind.FRAMES,)
    gives: ClassVar[Kind] = Kind.MESSAGES
    wire: ClassVar[str] = "resume/1"

    buffer: Bytes = 8 << 20
    window: Bytes = 8 << 20
    max_message: Bytes = 4 << 20
    ttl: Seconds = 300.0
    tombstone_ttl: Seconds = 600.0
    linger: Seconds = 10.0
    handshake_timeout: Seconds = 5.0
    attach_timeout: Seconds = 30.0
    max_sessions: int = 1_000
    authorize: Callable[[Any], bool] | None = field(default=None, compare=False)
    on_expired: Callable[[Session], None] | None = field(default=None, compare=False)
    new_store: Callable[[], SessionStore] = field(default=MemoryStore, compare=False, repr=False)
    hooks: Hooks | None = field(default=None, kw_only=True)

    __repr__ = differing

    def __post_init__(self) -> None:
        for name in ("buffer", "window"):
            if self.max_message + 128 > getattr(self, name):
                raise ValueError(
                    f"max_message is {self.max_message:,}, which costs {self.max_message + 128:,}, "
                    f"and {name} is {getattr(self, name):,}"
                )
        if self.max_message < 1:
            raise ValueError(f"max_message is {self.max_message}, where at least 1 is needed")

    @property
    def limits(self) -> Limits:
        """What one side holds at most."""
        return Limits(buffer=self.buffer, window=self.window, max_message=self.max_message)

    def connector(self, inner: Service[Dial, Link], scope: Scope) -> Service[Dial, Session]:
        async def connect(dial: Dial, /) -> Session:
            return await open_session(self, inner, scope, dial)

        return connect

    def prober(self, inner: Service[Dial, Link], scope: Scope) -> Service[Dial, None]:
        """Like the connector, but only finds out whether the server lets us in."""

        async def look(dial: Dial, /) -> None:
            await probe(self, inner, scope, dial)

        return look

    def acceptor(self, inner: Service[Session, None], scope: Scope) -> Service[Link, None]:
        return ResumeServer(self, inner, scope).accept
