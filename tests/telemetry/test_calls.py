"""Spans of calls: one for each, whatever becomes of it, at both ends, in each other."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

import anyio
import pytest
from opentelemetry import baggage, context, trace

from towline import (
    Backoff,
    BreakerPolicy,
    CallFailed,
    CircuitBreaker,
    Elapsed,
    Framing,
    Hooks,
    LinkLost,
    MisuseError,
    Reconnect,
    Request,
    Response,
    Resume,
    Retry,
    Router,
    Rpc,
    SessionLost,
    Stack,
    StandardPolicy,
    StatusCode,
    Timeout,
    open_stream,
)
from towline.hooks import AttemptEnded, StateChanged
from towline.layers.rpc import Peer, Plain
from towline.policies import Breaker
from towline.service import Service

INSIDE = (Rpc(), Resume(), Framing())


async def echo(request: Request, /) -> Response:
    return Response(request.payload)


def stack_of(recorder: Any, *layers: Any) -> Stack[Any, Peer, Any, Any]:
    instrumented: Stack[Any, Peer, Any, Any] = recorder.telemetry.instrument(Stack(*layers))
    return instrumented


def calls_only(recorder: Any) -> list[str]:
    return [line for line in recorder.tree() if "towline." not in line.split()[0]]


@pytest.mark.smoke
async def test_a_call_is_a_span_at_both_ends_each_within_the_other(recorder: Any) -> None:
    async def handler(request: Request, /) -> Response:
        with recorder.tracer.start_as_current_span("work"):
            await anyio.sleep(1)
        return Response()

    stack = stack_of(recorder, *INSIDE)
    async with stack.serve("memory://calls", handler), stack.connect("memory://calls") as call:
        with recorder.tracer.start_as_current_span("user") as user:
            await call(Request("get", b"secret", {"token": b"secret"}))
            assert trace.get_current_span() is user
    assert calls_only(recorder)[-4:] == ["user INTERNAL", "  get CLIENT", "    get SERVER", "      work INTERNAL"]
    (client,), (server,) = recorder.named("get", "CLIENT"), recorder.named("get", "SERVER")
    expected = {
        "rpc.system.name": "towline",
        "rpc.method": "get",
        "rpc.status_code": "OK",
        "server.address": "calls",
    }
    assert dict(client.attributes) == dict(server.attributes) == expected
    assert client.status.status_code.name == server.status.status_code.name == "UNSET"
    assert recorder.count("rpc.client.call.duration", method="get", status_code="OK") == 1
    assert recorder.count("rpc.server.call.duration", method="get", status_code="OK") == 1
    assert not any("secret" in span.to_json() for span in recorder.spans)


async def test_a_handler_sees_only_its_own_caller_and_leaves_nothing_behind(recorder: Any) -> None:
    seen: list[int] = []

    async def handler(request: Request, /) -> Response:
        seen.append(trace.get_current_span().get_span_context().trace_id)
        await anyio.sleep(0.1)
        seen.append(trace.get_current_span().get_span_context().trace_id)
        return Response()

    stack = stack_of(recorder, *INSIDE)
    traces: list[int] = []

    async def one(call: Peer) -> None:
        with recorder.tracer.start_as_current_span("user") as user:
            traces.append(user.get_span_context().trace_id)
            await call(Request("get"))

    async with stack.serve("memory://calls", handler), stack.connect("memory://calls") as call:
        for _ in range(2):
            async with anyio.create_task_group() as tasks:
                for _ in range(3):
                    tasks.start_soon(one, call)
    assert sorted(seen) == sorted(traces * 2)


class Attempted(Hooks):
    def __init__(self) -> None:
        self.attempts: list[int] = []

    def on_attempt(self, event: AttemptEnded, /) -> None:
        self.attempts.append(event.attempt)


async def test_a_call_with_retries_is_one_span_with_one_for_each_attempt(recorder: Any) -> None:
    failures = iter([StatusCode.UNAVAILABLE, StatusCode.ABORTED])

    async def handler(request: Request, /) -> Response:
        for code in failures:
            raise CallFailed(code, "secret")
        return Response()

    own = Attempted()
    policy = StandardPolicy(Backoff.constant(1), on=CallFailed, idempotent=True)
    server = stack_of(recorder, *INSIDE)
    client = stack_of(recorder, Timeout(60), Retry(policy, hooks=own), Reconnect("memory://calls"), *INSIDE)
    async with server.serve("memory://calls", handler), client.open() as call:
        await call(Request("get"))
    assert calls_only(recorder) == [
        "get CLIENT",
        "  get CLIENT UNAVAILABLE",
        "    get SERVER UNAVAILABLE",
        "  get CLIENT ABORTED #1",
        "    get SERVER ABORTED",
        "  get CLIENT #2",
        "    get SERVER",
    ]
    whole = recorder.named("get", "CLIENT")[0]
    assert [(event.name, dict(event.attributes)) for event in whole.events] == [
        ("towline.retry", {"error.type": "UNAVAILABLE", "towline.resend_count": 1}),
        ("towline.retry", {"error.type": "ABORTED", "towline.resend_count": 2}),
    ]
    assert recorder.count("rpc.client.call.duration") == 1  # not once more for each attempt
    assert recorder.count("rpc.server.call.duration") == 3
    assert recorder.count("towline.attempts", operation="call") == 3
    assert recorder.count("towline.retries", operation="call") == 2
    assert recorder.count("towline.give_ups") == 0
    assert own.attempts == [1, 2, 3]  # the user's own hooks are told, too
    assert not any("secret" in span.to_json() for span in recorder.spans)


async def test_giving_up_is_counted_by_its_reason_and_a_breaker_shows_its_state(recorder: Any) -> None:
    async def handler(request: Request, /) -> Response:
        raise CallFailed(StatusCode.UNAVAILABLE)

    policy = StandardPolicy(Backoff.constant(1), on=CallFailed, idempotent=True, max_attempts=2)
    server = stack_of(recorder, *INSIDE)
    breaker = CircuitBreaker(name="db")
    client = stack_of(recorder, Retry(policy), breaker, Reconnect("memory://calls"), *INSIDE)
    async with server.serve("memory://calls", handler), client.open() as call:
        for _ in range(2):
            with pytest.raises(CallFailed):
                await call(Request("get"))
        assert recorder.count("towline.breaker.state") == 0  # it is closed, and was never anything else
        for _ in range(20):
            with contextlib.suppress(CallFailed, Exception):
                await call(Request("get"))
    assert recorder.count("towline.give_ups", operation="call", reason="attempts") >= 2
    assert recorder.count("towline.give_ups", operation="call", reason="breaker") >= 1
    assert recorder.count("towline.breaker.state", name="db", state="open") == 1
    assert recorder.count("towline.breaker.state", name="db") == 1
    refused = [line for line in recorder.tree() if "towline.errors.CircuitOpen" in line]
    assert refused
    assert not any("SERVER" in line for line in refused)


async def test_a_breaker_that_stacks_share_tells_the_users_own_hooks_once(recorder: Any) -> None:
    changes: list[StateChanged] = []

    class Changes(Hooks):
        def on_state_change(self, event: StateChanged, /) -> None:
            changes.append(event)

    async def broken(request: str, /) -> str:
        raise ConnectionResetError

    breaker, own = Breaker(BreakerPolicy(consecutive=1), name="db", random=Random(0)), Changes()
    one, _ = [recorder.telemetry.instrument(Stack(CircuitBreaker(breaker, hooks=own)))(broken) for _ in range(2)]
    with pytest.raises(ConnectionResetError):
        await one("hello")
    assert [(change.old, change.new) for change in changes] == [("closed", "open")]
    assert recorder.count("towline.breaker.state", name="db", state="open") == 1


async def test_layers_around_a_connection_belong_to_its_calls(recorder: Any) -> None:
    async def handler(request: Request, /) -> Response:
        raise CallFailed(StatusCode.UNAVAILABLE)

    stack = stack_of(recorder, *INSIDE)
    policy = StandardPolicy(Backoff.constant(1), on=CallFailed, idempotent=True, max_attempts=2)
    around = recorder.telemetry.instrument(Stack(Timeout(9), Retry(policy)))
    async with stack.serve("memory://calls", handler), stack.connect("memory://calls") as call:
        with pytest.raises(CallFailed):
            await around(call)(Request("get"))
    assert calls_only(recorder) == [
        "get CLIENT UNAVAILABLE",
        "  get CLIENT UNAVAILABLE",
        "    get SERVER UNAVAILABLE",
        "  get CLIENT UNAVAILABLE #1",
        "    get SERVER UNAVAILABLE",
    ]


async def test_what_is_no_call_has_no_span_and_goes_through(recorder: Any) -> None:
    async def double(number: int, /) -> int:
        return 2 * number

    assert await recorder.telemetry.instrument(Stack(Retry(), CircuitBreaker()))(double)(21) == 42
    assert recorder.spans == []
    assert recorder.count("towline.attempts", operation="call") == 1


async def test_another_call_that_a_layer_makes_on_the_way_is_one_of_its_own(recorder: Any) -> None:
    stack = stack_of(recorder, *INSIDE)
    async with stack.serve("memory://calls", echo), stack.connect("memory://calls") as call:

        def with_token(inner: Service[Request, Response]) -> Service[Request, Response]:
            async def authorised(request: Request, /) -> Response:
                await call(Request("token"))
                return await inner(request)

            return authorised

        await recorder.telemetry.instrument(Stack(with_token))(call)(Request("get"))
    assert calls_only(recorder) == ["get CLIENT", "  token CLIENT", "    token SERVER", "  get SERVER"]


async def test_a_server_that_calls_back_does_so_within_the_call_it_answers(recorder: Any) -> None:
    async def handler(request: Request, /) -> Response:
        assert request.peer is not None
        return await request.peer(Request("back"))

    stack = stack_of(recorder, Rpc(handler=echo), Resume(), Framing())
    async with stack.serve("memory://calls", handler), stack.connect("memory://calls") as call:
        await call(Request("get"))
    assert calls_only(recorder) == ["get CLIENT", "  get SERVER", "    back CLIENT", "      back SERVER"]


async def test_a_handler_that_passes_a_call_on_makes_one_of_its_own(recorder: Any) -> None:
    stack = stack_of(recorder, *INSIDE)
    async with stack.serve("memory://behind", echo), stack.connect("memory://behind") as behind:

        async def pass_on(request: Request, /) -> Response:
            return await behind(Request(request.method, request.payload, request.metadata))

        async with stack.serve("memory://front", pass_on), stack.connect("memory://front") as call:
            await call(Request("get"))
    assert calls_only(recorder) == ["get CLIENT", "  get SERVER", "    get CLIENT", "      get SERVER"]


# --- what becomes of a call ----------------------------------------------------------------------------------------


async def hangs(request: Request, /) -> Response:
    await anyio.sleep_forever()
    raise AssertionError


async def not_found(request: Request, /) -> Response:
    raise CallFailed(StatusCode.NOT_FOUND, "secret")


async def broken(request: Request, /) -> Response:
    raise ZeroDivisionError("secret")


async def mistaken(request: Request, /) -> Response:
    return b"no response"  # type: ignore[return-value]  # pyright: ignore[reportReturnType]


async def slow_below(request: Request, /) -> Response:
    raise Elapsed(5)


async def normally(call: Peer, server: Any) -> None:
    with contextlib.suppress(CallFailed):
        await call(Request("get"))


async def cancelled(call: Peer, server: Any) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call, Request("get"))
        await anyio.sleep(1)
        tasks.cancel_scope.cancel()


async def in_time(call: Peer, server: Any) -> None:
    with anyio.move_on_after(2):
        await call(Request("get"))


async def session_lost(call: Peer, server: Any) -> None:
    async def lose() -> None:
        await anyio.sleep(1)
        server.sessions[0].abort()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lose)
        with pytest.raises(SessionLost):
            await call(Request("get"))


async def closed(call: Peer, server: Any) -> None:
    async with anyio.create_task_group() as tasks:

        async def one() -> None:
            with pytest.raises(anyio.ClosedResourceError):
                await call(Request("get"))

        tasks.start_soon(one)
        await anyio.sleep(1)
        await call.aclose()


Way = Callable[[Peer, Any], Awaitable[None]]


@pytest.mark.parametrize(
    ("handler", "way", "client", "server"),
    [
        (echo, normally, ("OK", None, "UNSET"), ("OK", None, "UNSET")),
        (not_found, normally, ("NOT_FOUND", "NOT_FOUND", "ERROR"), ("NOT_FOUND", "NOT_FOUND", "UNSET")),
        (broken, normally, ("INTERNAL", "INTERNAL", "ERROR"), ("INTERNAL", "ZeroDivisionError", "ERROR")),
        (mistaken, normally, ("INTERNAL", "INTERNAL", "ERROR"), ("INTERNAL", "TypeError", "ERROR")),
        (
            slow_below,
            normally,
            ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", "ERROR"),
            ("DEADLINE_EXCEEDED", "towline.errors.Elapsed", "ERROR"),
        ),
        (hangs, cancelled, ("CANCELLED", "CANCELLED", "ERROR"), ("CANCELLED", "CANCELLED", "UNSET")),
        (
            hangs,
            in_time,
            ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", "ERROR"),
            None,  # the caller's cancellation comes at the moment of the deadline, and either may be first
        ),
        (hangs, session_lost, (None, "towline.errors.SessionLost", "ERROR"), ("CANCELLED", "CANCELLED", "UNSET")),
        (hangs, closed, (None, "towline.errors.ServiceClosed", "ERROR"), ("CANCELLED", "CANCELLED", "UNSET")),
    ],
)
async def test_however_a_call_ends_each_of_its_spans_ends_once_and_says_how(
    recorder: Any,
    handler: Service[Request, Response],
    way: Way,
    client: tuple[str | None, str | None, str] | None,
    server: tuple[str | None, str | None, str] | None,
) -> None:
    stack = stack_of(recorder, *INSIDE)
    async with stack.serve("memory://calls", handler) as listening:
        with contextlib.suppress(SessionLost):
            async with stack.connect("memory://calls") as call:
                await way(call, listening)
        await anyio.sleep(5)
    for kind, expected in (("CLIENT", client), ("SERVER", server)):
        (span,) = recorder.named("get", kind)
        about = dict(span.attributes)
        found = (about.get("rpc.status_code"), about.get("error.type"), span.status.status_code.name)
        assert found == expected or (expected is None and found[0] in ("CANCELLED", "DEADLINE_EXCEEDED"))
        assert span.status.description is None
        assert span.events == ()
        assert recorder.count(f"rpc.{kind.lower()}.call.duration") == 1
    assert not any("secret" in span.to_json() for span in recorder.spans)


async def test_a_deadline_that_ends_a_handler_is_told_as_one(recorder: Any) -> None:
    stack = stack_of(recorder, *INSIDE)
    async with stack.serve("memory://calls", hangs) as server, stack.connect("memory://calls") as call:

        async def one() -> None:
            with anyio.move_on_after(2):
                await call(Request("get"))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one)
            await anyio.sleep(1)
            # From here on nothing that the caller says arrives.
            await server._listener.aclose()
            server.sessions[0].drop_link(LinkLost("cut"))
            await anyio.sleep(5)
            (span,) = recorder.named("get", "SERVER")
            assert span.attributes["error.type"] == "DEADLINE_EXCEEDED"
            assert span.status.status_code.name == "ERROR"
            server.sessions[0].abort()
            call.abort()


# --- streams -------------------------------------------------------------------------------------------------------


async def count(request: Request, /) -> Response:
    assert request.stream is not None
    async for message in request.stream:
        await request.stream.send(message)
    if request.payload:
        raise CallFailed(StatusCode.DATA_LOSS)
    return Response(b"the end")


@pytest.mark.parametrize(
    ("payload", "leaves", "client"), [(b"", False, "OK"), (b"x", False, "DATA_LOSS"), (b"", True, "CANCELLED")]
)
async def test_the_span_of_a_stream_ends_with_its_call_once(
    recorder: Any, payload: bytes, leaves: bool, client: str
) -> None:
    stack = stack_of(recorder, *INSIDE)
    async with stack.serve("memory://calls", count), stack.connect("memory://calls") as call:
        with recorder.tracer.start_as_current_span("user") as user, contextlib.suppress(CallFailed):
            async with open_stream(call, Request("count", payload)) as stream:
                assert trace.get_current_span() is user
                for n in range(100):
                    await stream.send(b"%d" % n)
                    await stream.receive()
                assert recorder.named("count") == []  # it is still open
                if not leaves:
                    await stream.send_eof()
                    assert [message async for message in stream] == []
                    await stream.response()
        await anyio.sleep(1)
    (span,) = recorder.named("count", "CLIENT")
    assert span.attributes["rpc.status_code"] == client
    assert len(recorder.named("count", "SERVER")) == 1
    assert recorder.count("rpc.client.call.duration") == recorder.count("rpc.server.call.duration") == 1


async def test_attempts_of_a_stream_end_with_it_and_a_lost_connection_ends_both(recorder: Any) -> None:
    server = stack_of(recorder, *INSIDE)
    client = stack_of(recorder, Retry(), Reconnect("memory://calls"), *INSIDE)
    async with (
        server.serve("memory://calls", count) as listening,
        client.open() as call,
        open_stream(call, Request("count")) as stream,
    ):
        await stream.send(b"1")
        await stream.receive()
        listening.sessions[0].abort()
        with pytest.raises(SessionLost):
            await stream.receive()
    lost = "towline.errors.SessionLost"
    assert calls_only(recorder) == [f"count CLIENT {lost}", f"  count CLIENT {lost}", "    count SERVER CANCELLED"]


async def test_who_waits_for_the_end_of_a_stream_is_told_once_however_late_it_asks(
    caplog: pytest.LogCaptureFixture,
) -> None:
    told: list[Any] = []

    def fails(end: Any) -> None:
        raise RuntimeError("a bug")

    async def handler(request: Request, /) -> Response:
        assert request.stream is not None
        with pytest.raises(MisuseError):
            request.stream.when_over(told.append)
        return Response(b"the end")

    stack = Stack(*INSIDE)
    async with stack.serve("memory://calls", handler), stack.connect("memory://calls") as call:
        async with open_stream(call, Request("count")) as stream:
            stream.when_over(fails)
            stream.when_over(told.append)
            await stream.response()
            assert told == [Response(b"the end")]
            stream.when_over(told.append)
        assert told == [Response(b"the end")] * 2
    assert "a bug" in caplog.text


# --- what travels --------------------------------------------------------------------------------------------------


async def carried(recorder: Any, request: Request, handler: Service[Request, Response] = echo) -> None:
    stack = stack_of(recorder, *INSIDE)
    async with stack.serve("memory://calls", handler), stack.connect("memory://calls") as call:
        await call(request)


async def test_a_peer_names_no_methods_here(recorder: Any) -> None:
    with pytest.raises(CallFailed):
        await carried(recorder, Request("no such method"), Router({"get": echo}))
    (span,) = recorder.named("towline", "SERVER")
    assert span.attributes["rpc.method"] == "_OTHER"
    assert span.attributes["rpc.method_original"] == "no such method"
    assert recorder.count("rpc.server.call.duration", method="_OTHER", status_code="UNIMPLEMENTED") == 1


async def test_whoever_is_turned_away_takes_no_name_from_others(recorder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("towline.telemetry._calls.MAX_METHODS", 3)

    def only_good(inner: Service[Any, Any], /) -> Service[Any, Any]:
        async def guarded(request: Any, /) -> Any:
            if request.method != "good":
                raise CallFailed(StatusCode.UNAUTHENTICATED, "who are you?")
            return await inner(request)

        return guarded

    server = stack_of(recorder, Rpc(incoming=only_good), *INSIDE[1:])
    async with server.serve("memory://x", echo), Stack(*INSIDE).connect("memory://x") as call:
        for number in range(5):
            with pytest.raises(CallFailed):
                await call(Request(f"junk{number}"))
        await call(Request("good"))
    assert [span.name for span in recorder.spans if span.kind.name == "SERVER"][-1] == "good"


async def test_a_task_that_outlives_the_call_it_was_started_in_makes_calls_of_its_own(recorder: Any) -> None:
    async with anyio.create_task_group() as tasks:

        def refreshing(inner: Service[Any, Any], /) -> Service[Any, Any]:
            async def later(request: Request) -> None:
                await anyio.sleep(1)
                await inner(request)

            async def answered(request: Request, /) -> Response:
                tasks.start_soon(later, request)
                return Response(b"from before")

            return answered

        client = stack_of(recorder, *INSIDE)
        async with Stack(*INSIDE).serve("memory://x", echo), client.connect("memory://x") as connection:
            call = recorder.telemetry.instrument(Stack(refreshing))(connection)
            assert (await call(Request("get"))).payload == b"from before"
            await anyio.sleep(2)
    assert calls_only(recorder) == ["get CLIENT", "  get CLIENT"]  # within what it was started in, which has ended


async def test_names_of_methods_are_bounded(recorder: Any) -> None:
    stack = stack_of(recorder, *INSIDE)
    async with stack.serve("memory://calls", echo), stack.connect("memory://calls") as call:
        for n in range(1_010):
            await call(Request(f"method {n}"))
    assert recorder.count("rpc.server.call.duration", method="_OTHER") == 10


@pytest.mark.parametrize(("fixture", "expected"), [("recorder", {}), ("trusting", {"tenant": "acme"})])
async def test_baggage_is_taken_only_if_asked_for(
    request: pytest.FixtureRequest, fixture: str, expected: dict[str, str]
) -> None:
    seen: list[object] = []

    async def handler(call: Request, /) -> Response:
        seen.append(dict(baggage.get_all()))
        return Response()

    token = context.attach(baggage.set_baggage("tenant", "acme"))
    try:
        await carried(request.getfixturevalue(fixture), Request("get"), handler)
    finally:
        context.detach(token)
    assert seen == [expected]


@pytest.mark.parametrize("size", [100, 65_000, 65_400, 65_520])
async def test_metadata_of_the_callers_own_goes_before_the_context(recorder: Any, size: int) -> None:
    seen: list[Any] = []

    async def handler(request: Request, /) -> Response:
        seen.append(request.metadata)
        return Response()

    await carried(recorder, Request("get", b"", {"mine": b"x" * size}), handler)
    assert len(seen[0]["mine"]) == size
    parent = recorder.named("get", "SERVER")[0].parent
    assert (parent is not None) is ("traceparent" in seen[0]) is (size < 65_460)


async def test_a_context_that_is_too_long_or_no_context_at_all_is_not_taken(recorder: Any) -> None:
    plain, stack = Stack(*INSIDE), stack_of(recorder, *INSIDE)
    good = b"00-" + b"1" * 32 + b"-" + b"2" * 16 + b"-01"
    async with stack.serve("memory://calls", echo), plain.connect("memory://calls") as call:
        for value in (b"\xff\x00", b"00-zz", good + b" " * 9_000, b""):
            await call(Request("get", b"", {"traceparent": value}))
        await call(Request("get", b"", {"traceparent": good}))
    parents = [span.parent for span in recorder.named("get", "SERVER")]
    assert parents[:4] == [None] * 4
    assert parents[4] is not None
    assert parents[4].trace_id == int("1" * 32, 16)


async def test_a_layer_of_the_users_own_around_a_connection_stays(recorder: Any) -> None:
    seen: list[str] = []

    def outgoing(plain: Plain) -> Service[Request, Response]:
        async def call(request: Request, /) -> Response:
            seen.append(f"out to {plain.peer.endpoint}, traced: {'traceparent' in request.metadata}")
            return await plain(request)

        return call

    def incoming(inner: Service[Any, Any], /) -> Service[Any, Any]:
        async def handle(request: Request, /) -> Response:
            seen.append(f"in, traced: {trace.get_current_span().is_recording()}")
            response: Response = await inner(request)
            return response

        return handle

    stack = stack_of(recorder, Rpc(outgoing=outgoing, incoming=incoming), Resume(), Framing())
    async with stack.serve("memory://calls", echo), stack.connect("memory://calls") as call:
        await call(Request("get"))
    assert seen == ["out to memory://calls, traced: True", "in, traced: True"]


async def test_cuts_of_the_link_below_change_nothing_in_a_call(recorder: Any) -> None:
    async def handler(request: Request, /) -> Response:
        await anyio.sleep(10)
        return Response()

    stack = stack_of(recorder, *INSIDE)
    async with (
        stack.serve("memory://calls", handler) as server,
        stack.connect("memory://calls") as call,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(call, Request("get"))
        for _ in range(2):
            await anyio.sleep(2)
            server.sessions[0].drop_link(LinkLost("cut"))
    assert calls_only(recorder) == ["get CLIENT", "  get SERVER"]
