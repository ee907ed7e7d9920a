"""What Resume tells hooks: when a link is looked for, is attached, is lost, and when the session is over."""

from __future__ import annotations

import anyio
import pytest

from towline import Backoff, ConnectFailed, Encryption, Framing, Heartbeat, LinkLost, Psk, Resume, Retry, Session, Stack
from towline.hooks import (
    ConnectBegan,
    ConnectEnded,
    HandshakeEnded,
    Hooks,
    LinkAttached,
    LinkDetached,
    RoundTripMeasured,
    SessionEnded,
)


class Told(Hooks):
    """Everything, in short."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def _add(self, *words: object) -> None:
        self.lines.append(" ".join(str(word) for word in words if word != ""))

    def on_connect_begin(self, event: ConnectBegan, /) -> None:
        self._add("looks", "first" if event.session is None else f"after {event.session.epoch}")

    def on_connect_end(self, event: ConnectEnded, /) -> None:
        self._add("looked", "" if event.error is None else type(event.error).__name__)

    def on_handshake(self, event: HandshakeEnded, /) -> None:
        self._add(event.layer, "" if event.error is None else type(event.error).__name__)

    def on_attach(self, event: LinkAttached, /) -> None:
        self._add("attached", event.session.epoch, event.link.side.value, "again" if event.is_resumed else "")

    def on_detach(self, event: LinkDetached, /) -> None:
        self._add("lost" if event.is_lost else "left", event.session.epoch, event.session.state.value)

    def on_session_end(self, event: SessionEnded, /) -> None:
        self._add("over", "" if event.error is None else type(event.error).__name__)

    def on_round_trip(self, event: RoundTripMeasured, /) -> None:
        self._add("rtt", event.link.side.value)


async def echo(session: Session) -> None:
    async for message in session:
        await session.send(message)


@pytest.mark.smoke
async def test_both_ends_tell_of_their_links_in_order() -> None:
    ours, theirs = Told(), Told()
    key = Psk(bytes(range(32)))
    client, server = (Stack(Resume(hooks=told), Framing(), Encryption(psk=key, hooks=told)) for told in (ours, theirs))
    async with server.serve("memory://calls", echo) as listening, client.connect("memory://calls") as session:
        await session.send(b"hello")
        await session.receive()
        listening.sessions[0].drop_link(LinkLost("cut"))
        await anyio.sleep(5)
    assert ours.lines == [
        *("looks first", "Encryption", "Resume", "attached 1 dialling", "looked"),
        "lost 1 detached",
        *("looks after 1", "Encryption", "attached 2 dialling again", "Resume", "looked"),
        *("over", "left 2 closed"),
    ]
    assert theirs.lines == [
        *("Encryption", "Resume", "attached 1 listening"),
        "lost 1 detached",
        *("Encryption", "attached 2 listening again", "Resume"),
        *("over", "left 2 closed"),
    ]


async def test_a_probe_is_no_session_to_tell_of() -> None:
    told = Told()
    server = Stack(Resume(hooks=told), Framing())
    async with server.serve("memory://calls", echo), Stack(Resume(), Framing()).open() as opened:
        await opened.probe("memory://calls")
        await anyio.sleep(60)
    assert told.lines == ["Resume"]


async def test_the_end_of_a_search_is_told_however_it_ends() -> None:
    told = Told()
    with pytest.raises(ConnectFailed):
        async with Stack(Resume(hooks=told), Framing()).connect("memory://nobody"):
            pass
    stack = Stack(Resume(hooks=told), Retry(Backoff.constant(9)), Framing())
    async with stack.open() as opened, anyio.create_task_group() as tasks:
        tasks.start_soon(opened.connect, "memory://nobody")
        await anyio.sleep(1)
        tasks.cancel_scope.cancel()
    cancelled = anyio.get_cancelled_exc_class().__name__
    assert told.lines == ["looks first", "looked ConnectFailed", "looks first", f"looked {cancelled}"]


async def test_of_a_session_that_is_lost_its_error_is_told() -> None:
    told = Told()
    stack = Stack(Resume(hooks=told), Framing())
    async with Stack(Resume(), Framing()).serve("memory://calls", echo), stack.open() as opened:
        session = await opened.connect("memory://calls")
        session.abort()
        await session.wait_closed()
    assert told.lines[-2:] == ["over SessionLost", "left 1 lost"]


async def test_heartbeats_tell_of_their_round_trips() -> None:
    ours, theirs = Told(), Told()
    client, server = (Stack(Resume(), Heartbeat(hooks=told), Framing()) for told in (ours, theirs))
    async with server.serve("memory://calls", echo), client.connect("memory://calls") as session:
        await anyio.sleep(12)
        assert session.rtt is not None
    assert ours.lines == ["rtt dialling"] * 2
    assert theirs.lines == ["rtt listening"] * 2
