"""Spans of connections: one for each link of a session, linked to the one before, at both ends."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from towline import (
    Backoff,
    ConnectFailed,
    Encryption,
    Framing,
    HandshakeFailed,
    HandshakeRefused,
    Heartbeat,
    Hooks,
    LinkLost,
    Psk,
    Resume,
    Retry,
    Session,
    SessionLost,
    Stack,
    StandardPolicy,
)
from towline.hooks import LinkAttached, LinkDetached, RetryScheduled

KEY = Psk(bytes(range(32)))


async def echo(session: Session) -> None:
    async for message in session:
        await session.send(message)


async def silent(session: Session) -> None:
    await anyio.sleep_forever()


def links_of(span: Any) -> list[tuple[int, dict[str, Any]]]:
    return [(link.context.span_id, dict(link.attributes)) for link in span.links]


def connections(recorder: Any, side: str) -> list[Any]:
    return [span for span in recorder.named("towline.connection") if span.attributes["towline.side"] == side]


@pytest.mark.smoke
async def test_each_link_of_a_session_is_a_span_linked_to_the_one_before(recorder: Any) -> None:
    stack = recorder.telemetry.instrument(Stack(Resume(), Retry(Backoff.constant(1)), Framing(), Encryption(psk=KEY)))
    with recorder.tracer.start_as_current_span("user"):
        async with stack.serve("memory://calls", echo) as server, stack.connect("memory://calls") as session:
            for _ in range(2):
                await session.send(b"hello")
                await session.receive()
                server.sessions[0].drop_link(LinkLost("cut"))
                await anyio.sleep(5)
                assert server.sessions[0].state.value == "attached"
    line = [
        "towline.dial INTERNAL",
        "  towline.handshake INTERNAL Encryption",
        "towline.handshake INTERNAL Resume",
    ]
    handshakes = ["towline.handshake INTERNAL Encryption", "towline.handshake INTERNAL Resume"]
    lost = " towline.errors.LinkLost"
    tree = recorder.tree()
    dialled = [f"towline.connection INTERNAL dialling{end}" for end in (lost, lost, "")]
    accepted = [f"towline.connection INTERNAL listening{end}" for end in (lost, lost, "")]
    assert tree[:13] == [
        "user INTERNAL",
        *(f"  {text}" for top in dialled for text in [top, *(f"  {each}" for each in line)]),
    ]
    assert tree[13:] == [text for top in accepted for text in [top, *(f"  {each}" for each in handshakes)]]
    for side in ("dialling", "listening"):
        one, two, three = connections(recorder, side)
        assert links_of(one) == []
        assert links_of(two) == [(one.context.span_id, {"towline.epoch": 1})]
        assert links_of(three) == [(two.context.span_id, {"towline.epoch": 2})]
        assert [span.attributes["towline.epoch"] for span in (one, two, three)] == [1, 2, 3]
        assert [[event.name for event in span.events] for span in (one, two, three)] == [
            ["towline.established"],
            ["towline.resumed"],
            ["towline.resumed"],
        ]
        assert one.end_time <= three.start_time
        assert recorder.count("towline.resumes", side=side) == 2
        assert recorder.count("towline.outage.duration", side=side) == 2
        assert recorder.count("towline.cuts", side=side) == 2
    assert recorder.count("towline.attempts", operation="dial") == 3
    assert recorder.count("towline.handshake.failures") == 0
    # A peer's connection is not caused by whoever happened to start the server.
    assert all(span.parent is None for span in connections(recorder, "listening"))


async def test_what_is_sent_again_is_counted(recorder: Any) -> None:
    stack = recorder.telemetry.instrument(Stack(Resume(), Framing()))
    async with stack.serve("memory://calls", silent) as server, stack.connect("memory://calls") as session:
        await session.flush(acked=True)
        for _ in range(3):
            await session.send(b"12345")
        # Both ends lose the link with these on their way.
        session.drop_link(LinkLost("cut"))
        server.sessions[0].drop_link(LinkLost("cut"))
        await anyio.sleep(5)
        session.abort()
    (_, resumed) = connections(recorder, "dialling")
    (event,) = resumed.events
    count = event.attributes["towline.replayed.messages"]
    assert event.attributes["towline.replayed.size"] == 5 * count
    assert recorder.count("towline.replayed.messages", side="dialling") == count
    assert recorder.count("towline.replayed.size", side="dialling") == 5 * count


async def test_nothing_is_told_of_messages(recorder: Any) -> None:
    class Counted(Hooks):
        def __init__(self) -> None:
            self.count = 0

        def __getattribute__(self, name: str) -> Any:
            if name.startswith("on_"):
                self.count += 1
            return super().__getattribute__(name)

    counted = Counted()
    stack = recorder.telemetry.instrument(
        Stack(Resume(hooks=counted), Heartbeat(hooks=counted), Framing(), Encryption(psk=KEY, hooks=counted))
    )
    async with stack.serve("memory://calls", echo), stack.connect("memory://calls") as session:
        await session.send(b"x")
        await session.receive()
        told, spans = counted.count, len(recorder.spans)
        assert told > 0
        for _ in range(1000):
            await session.send(b"x")
            await session.receive()
        assert (counted.count, len(recorder.spans)) == (told, spans)


async def test_dials_that_fail_are_children_of_the_connection_that_came_of_them(recorder: Any) -> None:
    own: list[object] = []

    class Kept(Hooks):
        def on_attach(self, event: LinkAttached, /) -> None:
            own.append(event.session.epoch)

        def on_detach(self, event: LinkDetached, /) -> None:
            own.append(event.is_lost)

    late = anyio.Event()

    class Late(Hooks):
        def on_retry_scheduled(self, event: RetryScheduled, /) -> None:
            if event.attempt == 3:
                late.set()

    policy = StandardPolicy(Backoff.constant(1), max_attempts=None, budget=None)
    stack = recorder.telemetry.instrument(Stack(Resume(hooks=Kept()), Retry(policy, hooks=Late()), Framing()))
    async with anyio.create_task_group() as tasks:

        async def serve() -> None:
            await late.wait()
            async with Stack(Resume(), Framing()).serve("memory://late", echo):
                await anyio.sleep(5)

        tasks.start_soon(serve)
        async with stack.connect("memory://late") as session:
            await session.send(b"hello")
            await session.receive()
    failed = "  towline.dial INTERNAL towline.errors.ConnectFailed"
    assert recorder.tree() == [
        "towline.connection INTERNAL dialling",
        failed,
        f"{failed} #1",
        "  towline.dial INTERNAL #2",
        "  towline.handshake INTERNAL Resume",
    ]
    retries = [event for event in connections(recorder, "dialling")[0].events if event.name == "towline.retry"]
    assert [event.attributes["towline.resend_count"] for event in retries] == [1, 2]
    assert recorder.count("towline.retries", operation="dial") == 2
    assert own == [1, False]


async def test_a_connection_that_never_comes_about_ends_with_why(recorder: Any) -> None:
    stack = recorder.telemetry.instrument(
        Stack(Resume(), Retry(StandardPolicy(Backoff.constant(1), max_attempts=2)), Framing())
    )
    with pytest.raises(ConnectFailed):
        async with stack.connect("memory://nobody"):
            pass
    failed = "towline.errors.ConnectFailed"
    assert recorder.tree() == [
        f"towline.connection INTERNAL dialling {failed}",
        f"  towline.dial INTERNAL {failed}",
        f"  towline.dial INTERNAL {failed} #1",
    ]
    assert recorder.count("towline.give_ups", operation="dial", reason="attempts") == 1


async def test_a_dial_that_is_cancelled_ends_its_spans(recorder: Any) -> None:
    stack = recorder.telemetry.instrument(Stack(Resume(), Retry(Backoff.constant(9)), Framing()))
    async with stack.open() as opened, anyio.create_task_group() as tasks:
        tasks.start_soon(opened.connect, "memory://nobody")
        await anyio.sleep(20)
        tasks.cancel_scope.cancel()
    failed = "  towline.dial INTERNAL towline.errors.ConnectFailed"
    assert recorder.tree()[:3] == ["towline.connection INTERNAL dialling CANCELLED", failed, f"{failed} #1"]


async def test_a_link_that_is_replaced_is_no_cut(recorder: Any) -> None:
    stack = recorder.telemetry.instrument(Stack(Resume(), Framing()))
    async with stack.serve("memory://calls", echo), stack.connect("memory://calls") as session:
        await session.send(b"hello")
        await session.receive()
        session.reconnect()
        await anyio.sleep(5)
        assert session.epoch == 2
    for side in ("dialling", "listening"):
        one, two = connections(recorder, side)
        assert links_of(two) == [(one.context.span_id, {"towline.epoch": 1})]
        assert recorder.count("towline.resumes", side=side) == 1
    # Whether the other end hears first of the new link or of the end of the old one is a matter of luck.
    one, _ = connections(recorder, "dialling")
    assert "error.type" not in one.attributes
    assert recorder.count("towline.cuts", side="dialling") == 0


async def test_a_search_that_ends_with_its_session_says_why(recorder: Any) -> None:
    stack = recorder.telemetry.instrument(Stack(Resume(ttl=1), Framing()))
    async with Stack(Resume(ttl=1), Framing()).serve("memory://calls", echo) as server, stack.open() as opened:
        session = await opened.connect("memory://calls")
        await session.send(b"hello")
        await session.receive()
        await server._listener.aclose()
        server.sessions[0].drop_link(LinkLost("cut"))
        with pytest.raises(SessionLost):
            await session.receive()
        await session.wait_closed()
        assert recorder.count("towline.sessions") == 0
    lost = "towline.errors.LinkLost"
    tops = [line for line in recorder.tree() if not line.startswith(" ")]
    assert tops == [
        f"towline.connection INTERNAL dialling {lost}",
        "towline.connection INTERNAL dialling towline.errors.ConnectFailed",
    ]
    assert recorder.count("towline.cuts", side="dialling") == 1


@pytest.mark.parametrize("keys", [(KEY, Psk(bytes([7] * 32)))])
async def test_a_stranger_makes_a_measurement_and_no_span(recorder: Any, keys: tuple[Psk, Psk]) -> None:
    server, client = (Stack(Resume(), Framing(), Encryption(psk=key)) for key in keys)
    server = recorder.telemetry.instrument(server)
    async with server.serve("memory://calls", echo):
        with pytest.raises(HandshakeRefused):
            async with client.connect("memory://calls"):
                pass
        await anyio.sleep(1)
    assert recorder.spans == []
    assert recorder.count("towline.handshake.failures", layer="Encryption", side="listening") == 1


async def test_a_handshake_that_is_refused_says_why_at_both_ends(recorder: Any) -> None:
    stack = recorder.telemetry.instrument(Stack(Resume(authorize=lambda peer: False), Framing()))
    async with stack.serve("memory://calls", echo):
        with pytest.raises(HandshakeFailed):
            async with stack.connect("memory://calls"):
                pass
    about = {"layer": "Resume", "type": "towline.errors.HandshakeRefused", "reason": "auth_failed"}
    for side in ("dialling", "listening"):
        assert recorder.count("towline.handshake.failures", side=side, **about) == 1
    assert "  towline.handshake INTERNAL Resume towline.errors.HandshakeRefused" in recorder.tree()


async def test_sessions_are_looked_at_as_they_are(recorder: Any) -> None:
    stack = recorder.telemetry.instrument(Stack(Resume(), Heartbeat(), Framing()))
    async with stack.serve("memory://calls", silent) as server:
        async with stack.connect("memory://calls") as session, stack.connect("memory://calls") as other:
            await session.send(b"x" * 872)  # and 128
            await other.flush(acked=True)
            assert recorder.count("towline.replay.buffer", side="dialling") == 1000
            credit = recorder.count("towline.replay.credit", side="dialling")
            assert 16 << 20 >= credit > 15 << 20
            await anyio.sleep(20)
            assert recorder.count("towline.round_trip.duration", side="dialling") >= 2
            for side in ("dialling", "listening"):
                assert recorder.count("towline.sessions", side=side, state="attached") == 2
            server.sessions[0].drop_link(LinkLost("cut"))
            assert recorder.count("towline.sessions", side="listening", state="attached") == 2  # not yet
            await anyio.sleep(0.05)
            assert recorder.count("towline.sessions", side="listening") == 2
            session.abort()
            other.abort()
        await server.drain(0)
    assert recorder.count("towline.sessions") == 0
    assert recorder.count("towline.replay.buffer") == 0


async def test_a_probe_is_no_connection(recorder: Any) -> None:
    stack = recorder.telemetry.instrument(Stack(Resume(), Framing()))
    async with Stack(Resume(), Framing()).serve("memory://calls", echo), stack.open() as opened:
        await opened.probe("memory://calls")
    assert recorder.spans == []
