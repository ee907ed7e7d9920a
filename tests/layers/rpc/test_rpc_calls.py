"""Calls over real stacks: what a caller gets, what a handler sees, and what becomes of both when things end."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import anyio
import pytest
from anyio import wait_all_tasks_blocked

from towline import (
    Backoff,
    Balance,
    CallFailed,
    ConcurrencyLimit,
    ConnectionLost,
    DeadlineExceeded,
    Dial,
    Endpoint,
    Failover,
    Framing,
    Overloaded,
    Psk,
    Reconnect,
    Request,
    Response,
    Resume,
    Retry,
    Router,
    Rpc,
    Service,
    ServiceClosed,
    SessionLost,
    Stack,
    StackError,
    StandardPolicy,
    StatusCode,
    Timeout,
    open_stream,
)
from towline.errors import CircuitOpen, Elapsed, Filtered, ProtocolViolation, RateLimited, ServiceUnavailable
from towline.hooks import StateChanged
from towline.layers import ConnectionState, Encryption, Heartbeat, Peer, Session, Stream
from towline.layers.rpc import Plain
from towline.layers.rpc import _wire as wire
from towline.layers.rpc._core import INITIAL_CREDIT, OVERHEAD, PIECE, OutgoingCall
from towline.layers.rpc._peer import HALVED, TURN

names = itertools.count()

Handler = Service[Request, Response]
Make = Callable[[Rpc], Stack[Any, Peer, Any, Any]]


def with_sessions(rpc: Rpc) -> Stack[Any, Peer, Any, Any]:
    return Stack(rpc, Resume(), Framing())


def with_frames(rpc: Rpc) -> Stack[Any, Peer, Any, Any]:
    return Stack(rpc, Framing())


@pytest.fixture(params=[with_sessions, with_frames])
def over(request: pytest.FixtureRequest) -> Make:
    made: Make = request.param
    return made


@asynccontextmanager
async def pair(handler: Handler, make: Make = with_sessions, rpc: Rpc | None = None) -> AsyncGenerator[Peer]:
    """A peer whose calls ``handler`` answers."""
    stack = make(rpc or Rpc())
    async with stack.serve(f"memory://calls-{next(names)}", handler) as server, stack.connect(server.endpoint) as peer:
        yield peer


async def echo(request: Request, /) -> Response:
    return Response(request.payload, request.metadata)


@dataclass
class Slow:
    """A handler that waits, and says what became of that."""

    takes: float = math.inf
    began: list[str] = field(default_factory=list[str])
    ended: list[str] = field(default_factory=list[str])

    async def __call__(self, request: Request, /) -> Response:
        name = request.payload.decode()
        self.began.append(name)
        try:
            await anyio.sleep(self.takes)
        except BaseException:
            self.ended.append(f"{name} cancelled")
            raise
        self.ended.append(name)
        return Response(request.payload)


def cut(session: Any) -> None:
    """Break the link of a session, if it has one."""
    if session.attachment is not None:
        session.attachment.link.driver.abort()


async def outcome(call: Awaitable[Response]) -> Response | Exception:
    try:
        return await call
    except Exception as error:
        return error


# --- one call -------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
async def test_a_call_is_answered(over: Make) -> None:
    async with pair(echo, over) as call:
        answer = await call(Request("echo", b"hello", {"trace": b"\x00\xff"}))
        assert (answer.payload, dict(answer.metadata)) == (b"hello", {"trace": b"\x00\xff"})


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, 1_000_000, 4 << 20])
async def test_a_body_of_any_size_arrives_whole(over: Make, size: int) -> None:
    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    async with pair(echo, over) as call:
        assert (await call(Request("echo", body))).payload == body


async def test_a_large_body_does_not_hold_up_small_calls() -> None:
    """The link below carries a fixed number of bytes a second: a call that came last is answered long before."""
    order: list[str] = []
    async with pair(echo) as call, anyio.create_task_group() as tasks:

        async def one(name: str, size: int) -> None:
            await call(Request("echo", bytes(size)))
            order.append(name)

        tasks.start_soon(one, "large", 4 << 20)
        await anyio.lowlevel.checkpoint()
        for n in range(3):
            tasks.start_soon(one, f"small {n}", 10)
    assert order[-1] == "large"


async def test_a_hundred_calls_at_once_get_their_own_answers(over: Make) -> None:
    async def later(request: Request, /) -> Response:
        n = int(request.payload)
        await anyio.sleep(100 - n)
        return Response(b"%d" % -n)

    answers: dict[int, bytes] = {}
    async with pair(later, over) as call, anyio.create_task_group() as tasks:

        async def one(n: int) -> None:
            answers[n] = (await call(Request("later", b"%d" % n))).payload

        for n in range(100):
            tasks.start_soon(one, n)
    assert answers == {n: b"%d" % -n for n in range(100)}


async def test_both_ends_may_call_over_one_connection(over: Make) -> None:
    async def ask_back(request: Request, /) -> Response:
        assert request.peer is not None
        answer = await request.peer(Request("name", request.payload))
        return Response(b"hello " + answer.payload)

    async def name(request: Request, /) -> Response:
        return Response(request.payload.title())

    async with pair(ask_back, over, Rpc(handler=name)) as call:
        assert (await call(Request("greet", b"ada"))).payload == b"hello Ada"


async def test_an_end_that_answers_no_calls_refuses_them() -> None:
    async def ask_back(request: Request, /) -> Response:
        assert request.peer is not None
        return await request.peer(Request("name"))

    async with pair(ask_back) as call:
        with pytest.raises(CallFailed) as raised:
            await call(Request("greet"))
        assert raised.value.code is StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    "request_",
    [Request(""), Request("x" * 256), Request("a", metadata={"": b""}), Request("a", metadata={"k": bytes(70_000)})],
    ids=["no name", "a long name", "no key", "large metadata"],
)
async def test_what_does_not_fit_a_frame_is_refused_before_it_is_sent(request_: Request) -> None:
    async with pair(echo) as call:
        with pytest.raises(ValueError, match=r"expected|allowed|may have"):
            await call(request_)
        assert (await call(Request("echo"))).payload == b""


# --- errors ---------------------------------------------------------------------------------------------------------


async def test_what_a_handler_raises_for_its_caller_arrives_as_it_is() -> None:
    async def fail(request: Request, /) -> Response:
        raise CallFailed(StatusCode.NOT_FOUND, "no user 7", details={"user": b"7"}, retry_after=1.5)

    async with pair(fail) as call:
        with pytest.raises(CallFailed) as raised:
            await call(Request("get"))
    error = raised.value
    assert (error.code, error.message, dict(error.details)) == (StatusCode.NOT_FOUND, "no user 7", {"user": b"7"})
    assert (error.retry_after, error.sent, error.refused, error.retryable) == (1.5, True, False, False)


async def test_an_exception_that_is_not_meant_for_the_caller_tells_it_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(request: Request, /) -> Response:
        raise KeyError("the password")

    async with pair(fail) as call:
        with pytest.raises(CallFailed) as raised:
            await call(Request("get"))
        assert (raised.value.code, raised.value.message) == (StatusCode.INTERNAL, "")
        assert "the password" in caplog.text
        with pytest.raises(CallFailed):
            await call(Request("get"))  # and the connection goes on


async def test_unless_it_is_told_to() -> None:
    async def fail(request: Request, /) -> Response:
        raise KeyError("user")

    async with pair(fail, rpc=Rpc(reveals_errors=True)) as call:
        with pytest.raises(CallFailed, match="INTERNAL: KeyError: 'user'"):
            await call(Request("get"))


async def test_a_handler_that_answers_something_else_has_failed(caplog: pytest.LogCaptureFixture) -> None:
    async def wrong(request: Request, /) -> Any:
        return b"bytes"

    async with pair(wrong) as call:
        with pytest.raises(CallFailed, match="INTERNAL"):
            await call(Request("get"))
    assert "answered b'bytes', where a Response is expected" in caplog.text


@pytest.mark.parametrize(
    ("error", "code", "refused"),
    [
        (Overloaded("no room"), StatusCode.RESOURCE_EXHAUSTED, True),
        (RateLimited("too many", 2.5), StatusCode.RESOURCE_EXHAUSTED, True),
        (CircuitOpen("it failed too often", 3.0), StatusCode.UNAVAILABLE, True),
        (ServiceUnavailable("nobody there"), StatusCode.UNAVAILABLE, True),
        (Filtered("not you"), StatusCode.PERMISSION_DENIED, True),
        (Elapsed(5), StatusCode.DEADLINE_EXCEEDED, False),
        (DeadlineExceeded(5, sent=False), StatusCode.DEADLINE_EXCEEDED, True),
        (ExceptionGroup("a task group's", [CallFailed(StatusCode.ABORTED)]), StatusCode.ABORTED, False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
async def test_what_layers_around_a_handler_raise_has_a_code(error: Exception, code: StatusCode, refused: bool) -> None:
    def layer(inner: Service[Any, Any]) -> Service[Any, Any]:
        async def fail(request: Any, /) -> Any:
            if isinstance(request, Dial):
                return await inner(request)
            raise error

        return fail

    async with pair(echo, lambda rpc: Stack(layer, rpc, Resume(), Framing())) as call:
        with pytest.raises(CallFailed) as raised:
            await call(Request("get"))
    assert (raised.value.code, raised.value.refused, raised.value.sent) == (code, refused, not refused)
    assert raised.value.retry_after == getattr(error, "retry_after", None)


@pytest.mark.parametrize("error", [Overloaded("no room"), DeadlineExceeded(1, sent=False), Filtered("no")], ids=repr)
async def test_what_a_handler_met_on_its_way_does_not_say_that_it_has_not_begun(error: Exception) -> None:
    async def meets(request: Request, /) -> Response:
        raise error

    async with pair(meets) as call:
        with pytest.raises(CallFailed) as raised:
            await call(Request("get"))
    assert (raised.value.refused, raised.value.sent) == (False, True)


async def test_nor_does_the_refusal_of_a_call_that_it_made_itself() -> None:
    async def nested(request: Request, /) -> Response:
        assert request.peer is not None
        return await request.peer(Request("nobody answers this"))

    async with pair(nested) as call:
        with pytest.raises(CallFailed) as raised:
            await call(Request("get"))
    assert raised.value.code is StatusCode.UNIMPLEMENTED
    assert (raised.value.refused, raised.value.sent) == (False, True)


@pytest.mark.parametrize(
    ("raised", "arrives"),
    [
        (CallFailed(StatusCode.NOT_FOUND, "é" * 40_000), CallFailed(StatusCode.NOT_FOUND, "é" * 32_767)),
        (CallFailed(StatusCode.NOT_FOUND, "a\ud800b"), CallFailed(StatusCode.NOT_FOUND, "a?b")),
        (CallFailed(StatusCode.NOT_FOUND, details={"k": bytes(70_000)}), CallFailed(StatusCode.NOT_FOUND)),
        (CallFailed(StatusCode.NOT_FOUND, retry_after=-1), CallFailed(StatusCode.NOT_FOUND)),
        (CallFailed(StatusCode.NOT_FOUND, retry_after=math.inf), CallFailed(StatusCode.NOT_FOUND)),
        (CallFailed(StatusCode.NOT_FOUND, retry_after=math.nan), CallFailed(StatusCode.NOT_FOUND)),
        (CallFailed(StatusCode.NOT_FOUND, retry_after=1e30), CallFailed(StatusCode.NOT_FOUND, retry_after=4294967.294)),
        (CallFailed(StatusCode.OK, "fine"), CallFailed(StatusCode.UNKNOWN, "fine")),
    ],
    ids=["long", "surrogate", "details", "negative", "infinite", "not a number", "far", "ok"],
)
async def test_whatever_a_handler_puts_into_an_error_something_arrives(raised: CallFailed, arrives: CallFailed) -> None:
    async def fail(request: Request, /) -> Response:
        if request.method == "fail":
            raise raised
        return Response(b"the connection goes on")

    async with pair(fail) as call:
        error = await outcome(call(Request("fail")))
        assert isinstance(error, CallFailed)
        assert (error.code, error.message, error.retry_after) == (arrives.code, arrives.message, arrives.retry_after)
        assert (await call(Request("go on"))).payload == b"the connection goes on"


async def test_an_error_after_messages_does_not_say_that_the_call_had_not_begun() -> None:
    async def begins(request: Request, /) -> Response:
        assert request.stream is not None
        await request.stream.send(b"one")
        raise CallFailed(StatusCode.UNAVAILABLE, refused=True)

    async with pair(begins) as call, open_stream(call, Request("begins")) as stream:
        with pytest.raises(CallFailed) as raised:
            await stream.response()
        assert (raised.value.refused, raised.value.sent) == (False, True)


async def test_a_long_response_comes_though_nobody_took_the_messages_before_it() -> None:
    async def answers(request: Request, /) -> Response:
        assert request.stream is not None
        for _ in range(7):
            await request.stream.send(bytes(PIECE))
        return Response(bytes(1_000_000))

    async with pair(answers) as call, open_stream(call, Request("answers")) as stream:
        with anyio.fail_after(10):
            assert len((await stream.response()).payload) == 1_000_000


async def test_the_deadline_of_a_call_in_pieces_counts_from_its_first() -> None:
    left: list[float] = []

    async def look(request: Request, /) -> Response:
        left.append(anyio.current_effective_deadline() - anyio.current_time())
        return Response()

    async with pair(look) as call:
        channel: Any = call._channel
        send, pieces = channel.send, 0

        async def slowly(frame: bytes) -> None:
            nonlocal pieces
            pieces += 1
            if pieces == 3:
                await anyio.sleep(4)
            await send(frame)

        channel.send = slowly
        with anyio.fail_after(10):
            await call(Request("look", bytes(200_000)))
    assert left == [pytest.approx(6, abs=0.1)]


async def test_layers_outside_rpc_stand_around_the_handler_when_serving() -> None:
    slow = Slow(takes=100)
    async with pair(
        slow, lambda rpc: Stack(Timeout(5), ConcurrencyLimit(1, on_full="shed"), rpc, Resume(), Framing())
    ) as call:
        outcomes: list[Response | Exception] = []
        async with anyio.create_task_group() as tasks:

            async def one(name: bytes) -> None:
                outcomes.append(await outcome(call(Request("slow", name))))

            tasks.start_soon(one, b"a")
            await wait_all_tasks_blocked()
            await one(b"b")
    codes = [each.code for each in outcomes if isinstance(each, CallFailed)]
    assert codes == [StatusCode.RESOURCE_EXHAUSTED, StatusCode.DEADLINE_EXCEEDED]
    assert slow.ended == ["a cancelled"]


async def test_a_router_answers_by_method_and_says_what_was_meant() -> None:
    router = Router({"users.get": echo})
    async with pair(router) as call:
        assert (await call(Request("users.get", b"7"))).payload == b"7"
        with pytest.raises(CallFailed, match=r"did you mean 'users\.get'") as raised:
            await call(Request("user.get"))
        assert (raised.value.code, raised.value.sent) == (StatusCode.UNIMPLEMENTED, False)


# --- cancellation and deadlines -------------------------------------------------------------------------------------


async def test_cancelling_the_caller_cancels_the_handler_and_nothing_else(
    over: Make,
) -> None:
    slow = Slow(takes=60)
    async with pair(slow, over) as call, anyio.create_task_group() as tasks:
        tasks.start_soon(call, Request("slow", b"other"))
        with anyio.move_on_after(5):
            await call(Request("slow", b"mine"))
        await anyio.sleep(1)
        assert slow.ended == ["mine cancelled"]
        await anyio.sleep(60)
        assert slow.ended == ["mine cancelled", "other"]


@pytest.mark.parametrize("which", ["the answer first", "the cancellation first"])
async def test_a_caller_that_is_cancelled_in_the_step_in_which_its_answer_comes_harms_nobody(
    over: Make, which: str
) -> None:
    async with pair(echo, over) as call, anyio.create_task_group() as tasks:
        scope = anyio.CancelScope()
        wake = call._wake

        def wake_and_cancel(waiter: Any) -> None:
            if which == "the cancellation first":
                scope.cancel()
            wake(waiter)
            scope.cancel()

        async def one() -> None:
            with scope:
                await call(Request("echo", b"a"))
                await anyio.sleep_forever()

        tasks.start_soon(one)
        call._wake = wake_and_cancel
        await wait_all_tasks_blocked()
        assert scope.cancelled_caught
        call._wake = wake
        assert not call._core.outgoing
        assert (await call(Request("echo", b"b"))).payload == b"b"


async def test_a_call_that_is_cancelled_before_a_worker_has_it_never_begins() -> None:
    slow = Slow(takes=60)
    async with pair(slow, rpc=Rpc(max_running=1)) as call, anyio.create_task_group() as tasks:
        tasks.start_soon(call, Request("slow", b"first"))
        await wait_all_tasks_blocked()
        with anyio.move_on_after(5):
            await call(Request("slow", b"second"))
        await anyio.sleep(100)
        assert slow.began == ["first"]


async def test_the_callers_deadline_travels_with_the_call() -> None:
    left: list[float] = []

    async def look(request: Request, /) -> Response:
        left.append(anyio.current_effective_deadline() - anyio.current_time())
        return Response()

    async with pair(look) as call:
        with anyio.fail_after(5):
            await call(Request("look"))
        await call(Request("look"))
        with anyio.fail_after(7):
            await call(Request("look"))
    assert left == [pytest.approx(5, abs=0.01), math.inf, pytest.approx(7, abs=0.01)]


async def test_a_handler_is_cancelled_at_the_callers_deadline_even_if_the_caller_is_gone() -> None:
    slow = Slow()
    async with pair(slow) as call:
        with anyio.move_on_after(5):
            await call(Request("slow", b"a"))
        await anyio.sleep(0.1)
        assert slow.ended == ["a cancelled"]


async def test_a_deadline_that_passes_on_the_other_side_first_is_answered_as_such() -> None:
    """The clocks of the two ends differ a little: here the handler's is ahead."""
    slow = Slow()
    async with pair(slow) as call:
        ahead = call._core  # the caller waits on, though it has told the other end a deadline
        assert ahead.can_call
        deadline = call._deadline
        call._deadline = lambda: anyio.current_time() + 5
        with pytest.raises(CallFailed) as raised:
            await call(Request("slow", b"a"))
        call._deadline = deadline
        assert (raised.value.code, raised.value.refused) == (StatusCode.DEADLINE_EXCEEDED, False)
        assert slow.ended == ["a cancelled"]
        slow.takes = 0
        assert (await call(Request("slow", b"b"))).payload == b"b"  # by a worker that is not cancelled


@pytest.mark.parametrize("payload", [b"a", bytes(100_000)])
async def test_with_no_time_left_nothing_is_sent(payload: bytes) -> None:
    slow = Slow(takes=0)
    async with pair(slow) as call:
        call._deadline = lambda: anyio.current_time() - 1  # of a scope that has not noticed yet
        with pytest.raises(DeadlineExceeded) as raised:
            await call(Request("slow", payload))
        assert raised.value.sent is False
        assert slow.began == []


@pytest.mark.parametrize("ends", ["by its deadline", "by cancel"])
async def test_a_scope_that_has_ended_cancels_the_call_in_it_as_any_other_wait(ends: str) -> None:
    slow = Slow(takes=0)
    async with pair(slow) as call:
        deadline = anyio.current_time() - 1 if ends == "by its deadline" else math.inf
        with anyio.CancelScope(deadline=deadline) as scope:
            if ends == "by cancel":
                scope.cancel()
            await call(Request("slow", b"a"))
            pytest.fail("it was not cancelled")
        assert scope.cancelled_caught
        assert slow.began == []


async def test_a_call_that_waited_too_long_for_a_worker_is_refused() -> None:
    slow = Slow(takes=60)
    async with pair(slow, rpc=Rpc(max_running=1)) as call, anyio.create_task_group() as tasks:
        tasks.start_soon(call, Request("slow", b"first"))
        await wait_all_tasks_blocked()
        call._deadline = lambda: anyio.current_time() + 5
        with pytest.raises(CallFailed) as raised:
            await call(Request("slow", b"second"))
        assert (raised.value.code, raised.value.sent) == (StatusCode.DEADLINE_EXCEEDED, False)
        assert slow.began == ["first"]


async def test_a_handler_may_refuse_to_be_cancelled_for_a_while_and_harms_nobody() -> None:
    done: list[str] = []

    async def stubborn(request: Request, /) -> Response:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(10)
            done.append(request.payload.decode())
        raise AssertionError

    async with pair(stubborn) as call:
        with anyio.move_on_after(1):
            await call(Request("x", b"a"))
        await anyio.sleep(5)
        with anyio.move_on_after(1):
            await call(Request("x", b"b"))
        await anyio.sleep(20)
        assert done == ["a", "b"]


# --- workers --------------------------------------------------------------------------------------------------------


async def test_a_context_variable_of_one_call_is_not_seen_by_the_next() -> None:
    user: ContextVar[str] = ContextVar("user", default="nobody")
    seen: list[str] = []

    async def set_it(request: Request, /) -> Response:
        seen.append(user.get())
        user.set(request.payload.decode())
        if request.method == "raise":
            raise CallFailed(StatusCode.ABORTED)
        if request.method == "hang":
            await anyio.sleep_forever()
        return Response()

    async with pair(set_it) as call:
        for method in ("plain", "raise", "hang", "plain"):
            with anyio.move_on_after(1):
                await outcome(call(Request(method, b"ada")))
            await anyio.sleep(1)
    assert seen == ["nobody"] * 4


async def test_a_handler_sees_the_context_variables_of_what_serves_and_of_no_caller(over: Make) -> None:
    """Nor those of another connection: workers are started by whichever brings a call, and serve all of them."""
    task: ContextVar[str] = ContextVar("task", default="nobody")
    seen: list[str] = []

    async def look(request: Request, /) -> Response:
        seen.append(task.get())
        await wait_all_tasks_blocked()
        return Response()

    async def ask_back(request: Request, /) -> Response:
        await look(request)
        assert request.peer is not None
        return await request.peer(Request("back"))

    task.set("serves")
    async with over(Rpc()).serve(f"memory://calls-{next(names)}", ask_back) as server:
        task.set("opens")
        async with over(Rpc(handler=look)).open() as opened, anyio.create_task_group() as tasks:

            async def connects(n: int) -> None:
                task.set(f"connects {n}")
                call = await opened.connect(server.endpoint)
                async with anyio.create_task_group() as calls:
                    for k in range(3):
                        task.set(f"calls {n}.{k}")
                        calls.start_soon(call, Request("look"))

            for n in range(3):
                tasks.start_soon(connects, n)
            task.set("waits")
    assert sorted(seen) == ["opens"] * 9 + ["serves"] * 9


@pytest.mark.parametrize("most", [1, 3, 40])
async def test_no_more_handlers_run_at_once_than_may(most: int) -> None:
    running = peak = 0

    async def count(request: Request, /) -> Response:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await anyio.sleep(1)
        running -= 1
        return Response()

    began = anyio.current_time()
    async with pair(count, rpc=Rpc(max_running=most)) as call, anyio.create_task_group() as tasks:
        for _ in range(100):
            tasks.start_soon(call, Request("count"))
    assert peak == most
    assert math.ceil(100 / most) <= anyio.current_time() - began < math.ceil(100 / most) + 1


async def test_more_calls_than_may_wait_are_refused() -> None:
    slow = Slow(takes=10)
    outcomes: list[Response | Exception] = []
    async with pair(slow, rpc=Rpc(max_running=1, max_waiting=3)) as call, anyio.create_task_group() as tasks:

        async def one(n: int) -> None:
            outcomes.append(await outcome(call(Request("slow", b"%d" % n))))

        for n in range(10):
            tasks.start_soon(one, n)
            await wait_all_tasks_blocked()
    refused = [each for each in outcomes if isinstance(each, CallFailed)]
    assert [each.code for each in refused] == [StatusCode.RESOURCE_EXHAUSTED] * 6
    assert all(each.refused and each.retryable for each in refused)
    assert slow.ended == ["0", "1", "2", "3"]


async def test_more_calls_than_may_be_open_over_one_connection_are_refused() -> None:
    slow = Slow(takes=10)
    outcomes: list[Response | Exception] = []
    async with pair(slow, rpc=Rpc(max_calls=3)) as call, anyio.create_task_group() as tasks:

        async def one(n: int) -> None:
            outcomes.append(await outcome(call(Request("slow", b"%d" % n))))

        for n in range(5):
            tasks.start_soon(one, n)
        await anyio.sleep(20)
        assert sum(isinstance(each, CallFailed) and each.refused for each in outcomes) == 2
        await one(9)
        assert isinstance(outcomes[-1], Response)


# --- streams --------------------------------------------------------------------------------------------------------


async def double(request: Request, /) -> Response:
    """Sends every message twice, and answers how many there were."""
    assert request.stream is not None
    count = 0
    async for message in request.stream:
        count += 1
        await request.stream.send(message)
        await request.stream.send(message)
    return Response(b"%d" % count)


async def test_messages_go_in_both_directions_within_a_call(over: Make) -> None:
    async with pair(double, over) as call, open_stream(call, Request("double")) as stream:
        await stream.send(b"a")
        assert [await stream.receive(), await stream.receive()] == [b"a", b"a"]
        await stream.send(b"")
        await stream.send_eof()
        assert [message async for message in stream] == [b"", b""]
        assert (await stream.response()).payload == b"2"


async def test_one_side_may_send_and_the_other_only_answer(over: Make) -> None:
    async def total(request: Request, /) -> Response:
        assert request.stream is not None
        return Response(b"%d" % sum([len(message) async for message in request.stream]))

    async with pair(total, over) as call, open_stream(call, Request("total")) as stream:
        for _ in range(100):
            await stream.send(bytes(50_000))
        await stream.send_eof()
        assert (await stream.response()).payload == b"5000000"


async def test_one_side_may_only_ask_and_the_other_send(over: Make) -> None:
    async def count(request: Request, /) -> Response:
        assert request.stream is not None
        for n in range(int(request.payload)):
            await request.stream.send(b"%d" % n)
        return Response(b"done", {"last": b"yes"})

    async with pair(count, over) as call, open_stream(call, Request("count", b"1000")) as stream:
        assert [int(message) async for message in stream] == list(range(1000))
        answer = await stream.response()
        assert (answer.payload, dict(answer.metadata)) == (b"done", {"last": b"yes"})


@pytest.mark.parametrize("size", [0, PIECE, PIECE + 1, 1_000_000])
async def test_messages_of_any_size_keep_their_bounds(size: int) -> None:
    async with pair(double) as call, open_stream(call, Request("double")) as stream:
        for fill in (b"a", b"b"):
            await stream.send(fill * size)
        await stream.send_eof()
        assert [message async for message in stream] == [b"a" * size] * 2 + [b"b" * size] * 2


async def test_leaving_a_stream_cancels_its_handler() -> None:
    ended: list[str] = []

    async def endless(request: Request, /) -> Response:
        assert request.stream is not None
        try:
            while True:
                await request.stream.send(b"again")
        finally:
            ended.append("yes")

    async with pair(endless) as call:
        async with open_stream(call, Request("endless")) as stream:
            assert await stream.receive() == b"again"
        await anyio.sleep(0.1)
        assert ended == ["yes"]
        with pytest.raises(anyio.ClosedResourceError):
            await stream.send(b"x")


async def test_an_error_of_the_handler_comes_after_what_it_has_sent() -> None:
    async def breaks(request: Request, /) -> Response:
        assert request.stream is not None
        await request.stream.send(b"one")
        raise CallFailed(StatusCode.DATA_LOSS, "it broke")

    async with pair(breaks) as call, open_stream(call, Request("breaks")) as stream:
        await anyio.sleep(1)
        assert await stream.receive() == b"one"
        for _ in range(2):
            with pytest.raises(CallFailed, match="DATA_LOSS: it broke"):
                await stream.receive()
        with pytest.raises(CallFailed, match="DATA_LOSS: it broke"):
            await stream.send(b"x")
        with pytest.raises(CallFailed, match="DATA_LOSS: it broke"):
            await stream.response()


async def test_a_slow_consumer_holds_its_producer_and_what_waits_is_bounded() -> None:
    window = 100_000
    sent = 0

    async def produce(request: Request, /) -> Response:
        nonlocal sent
        assert request.stream is not None
        for _ in range(1000):
            await request.stream.send(bytes(1000))
            sent += 1
        return Response()

    async with pair(produce, rpc=Rpc(window=window)) as call, open_stream(call, Request("produce")) as stream:
        await anyio.sleep(10)
        assert sent * (1000 + OVERHEAD) <= max(window, INITIAL_CREDIT)
        before = sent
        for _ in range(100):
            assert len(await stream.receive()) == 1000
        await anyio.sleep(10)
        assert before < sent <= before + 200
        assert sum([1 async for _ in stream]) == 900


async def test_a_slow_producer_lets_its_consumer_wait_and_other_calls_pass() -> None:
    async def produce(request: Request, /) -> Response:
        if request.stream is not None:
            for n in range(3):
                await anyio.sleep(100)
                await request.stream.send(b"%d" % n)
        return Response(request.payload)

    async with pair(produce) as call, open_stream(call, Request("produce")) as stream:
        for n in range(3):
            assert (await call(Request("quick", b"x"))).payload == b"x"
            assert int(await stream.receive()) == n


async def test_a_handler_that_never_reads_holds_its_caller() -> None:
    sent = 0
    async with (
        pair(Slow(), rpc=Rpc(window=100_000)) as call,
        open_stream(call, Request("slow", b"a")) as stream,
    ):
        with anyio.move_on_after(10) as scope:
            for _ in range(1000):
                await stream.send(bytes(1000))
                sent += 1
        assert scope.cancelled_caught
        assert sent * (1000 + OVERHEAD) <= 100_000


async def test_two_tasks_may_send_in_one_stream_and_their_large_messages_do_not_mix() -> None:
    received: list[bytes] = []
    async with pair(double) as call, open_stream(call, Request("double")) as stream:

        async def send(fill: bytes) -> None:
            for _ in range(5):
                await stream.send(fill * 200_000)

        async def receive() -> None:
            for _ in range(20):
                received.append(await stream.receive())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send, b"a")
            tasks.start_soon(send, b"b")
            tasks.start_soon(receive)
    assert sorted(received) == [b"a" * 200_000] * 10 + [b"b" * 200_000] * 10


async def test_the_end_of_a_stream_does_not_come_within_a_message_of_another_task() -> None:
    received: list[bytes] = []

    async def take(request: Request, /) -> Response:
        assert request.stream is not None
        await anyio.sleep(10)
        received.extend([message async for message in request.stream])
        return Response(b"all")

    async with pair(take, rpc=Rpc(window=100_000)) as call, open_stream(call, Request("take")) as stream:
        async with anyio.create_task_group() as tasks:
            for fill in (b"a", b"b"):
                tasks.start_soon(stream.send, fill * 300_000)
            await wait_all_tasks_blocked()
            with anyio.move_on_after(1):
                await stream.send_eof()  # not ended: and so it can be, later
            tasks.start_soon(stream.send, b"c")
            await wait_all_tasks_blocked()
        await stream.send_eof()
        assert (await stream.response()).payload == b"all"
    assert sorted(received[:2]) == [b"a" * 300_000, b"b" * 300_000]
    assert received[2:] == [b"c"]


async def test_a_handler_that_returns_while_its_task_is_sending_fails_its_call_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with anyio.create_task_group() as others:
        closed: list[str] = []

        async def send(stream: Stream) -> None:
            try:
                await stream.send(bytes(1_000_000))
                await stream.send(bytes(1_000_000))
            except anyio.ClosedResourceError:
                closed.append("closed")

        async def leaves(request: Request, /) -> Response:
            if request.stream is not None:
                others.start_soon(send, request.stream)
                await anyio.sleep(1)
            return Response()

        async with pair(leaves, rpc=Rpc(window=300_000)) as call:
            async with open_stream(call, Request("leaves")) as stream:
                await anyio.sleep(5)
                with pytest.raises(CallFailed, match="INTERNAL"):
                    await stream.response()
            await call(Request("leaves"))
        await anyio.sleep(1)
        assert closed == ["closed"]
    assert "returned while a task of its was sending" in caplog.text


async def test_a_handler_that_is_cancelled_by_itself_has_failed(
    anyio_backend_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    if anyio_backend_name == "trio":
        pytest.skip("asyncio alone cancels by itself")

    async def waits(request: Request, /) -> Response:
        future: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        future.cancel()
        return await future

    async with pair(waits, rpc=Rpc(max_running=1)) as call, anyio.create_task_group() as tasks:
        for _ in range(3):
            with pytest.raises(CallFailed, match="INTERNAL"):
                await call(Request("waits"))
        tasks.cancel_scope.cancel()
    assert "was cancelled by itself" in caplog.text


async def test_a_large_message_that_is_cut_short_by_a_cancellation_ends_the_call() -> None:
    async with pair(Slow(), rpc=Rpc(window=300_000)) as call, open_stream(call, Request("slow", b"a")) as stream:
        await stream.send(bytes(1_000_000))  # which arrives whole, though nobody takes it
        with anyio.move_on_after(1) as scope:
            await stream.send(bytes(1_000_000))
        assert scope.cancelled_caught
        with pytest.raises(anyio.ClosedResourceError):
            await stream.send(b"x")


async def test_a_peer_that_asks_on_and_on_and_takes_no_answer_is_cut_off() -> None:
    """Its calls are refused, which costs an answer each; these may pass the limit of the buffer, but not for ever."""
    resume = Resume(buffer=1 << 20, window=1 << 20, max_message=256 << 10)
    server_side: Stack[Any, Peer, Any, Any] = Stack(Rpc(max_calls=1), resume, Framing())
    slow = Slow()
    sent = 0

    async def flood(session: Session) -> None:
        nonlocal sent
        await session.send(wire.encode_hello())
        for number in range(1, 1_000_000, 2):
            await session.send(wire.encode_call(number, 0, wire.NO_LIMIT, b"slow", b"", b"x"))
            sent += 1

    async with (
        server_side.serve(f"memory://calls-{next(names)}", slow) as server,
        Stack(resume, Framing()).open() as opened,
    ):
        session = await opened.connect(server.endpoint)
        with pytest.raises(SessionLost):
            await flood(session)
    assert slow.began == ["x"]
    assert sent < 60_000  # three buffers of a megabyte, at 150 or so for each refusal


async def test_one_that_speaks_something_else_is_cut_off_and_the_server_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stack = with_sessions(Rpc())
    async with stack.serve(f"memory://calls-{next(names)}", echo) as server:
        async with Stack(Resume(), Framing()).open() as opened:
            session = await opened.connect(server.endpoint)
            await session.send(b"GET / HTTP/1.1")
            assert await session.receive() == wire.encode_hello()
            with pytest.raises(SessionLost):
                await session.receive()
        assert "the peer broke the protocol: a frame of the unknown type 71" in caplog.text
        async with stack.connect(server.endpoint) as call:
            assert (await call(Request("echo", b"x"))).payload == b"x"


async def test_a_peer_that_breaks_the_protocol_fails_every_call_by_a_lost_connection_that_says_so(over: Make) -> None:
    """In the middle of what arrives together: the answer before it counts, and nothing that comes after."""
    outcomes: list[Response | Exception] = []

    async def breaks(connection: Any) -> None:
        for _ in range(4):  # HELLO, and three calls
            await connection.receive()
        connection.cork()
        for frame in (wire.encode_hello(), wire.encode_reply(1, 0, b"", b"an answer"), b"\x03", b"\x7f"):
            assert connection.try_send(frame)
        assert connection.try_send(wire.encode_reply(3, 0, b"", b"too late"))
        await anyio.sleep_forever()

    below = over(Rpc()).layers[1:]
    async with Stack(*below).serve(f"memory://calls-{next(names)}", breaks) as server, over(Rpc()).open() as opened:
        call = await opened.connect(server.endpoint)
        async with anyio.create_task_group() as tasks:

            async def one() -> None:
                outcomes.append(await outcome(call(Request("x"))))

            for _ in range(3):
                tasks.start_soon(one)
        answers = [each.payload for each in outcomes if isinstance(each, Response)]
        losses = [each for each in outcomes if isinstance(each, ConnectionLost)]
        assert (answers, len(losses)) == ([b"an answer"], 2)
        for lost in losses:
            assert "the peer broke the protocol: a REPLY frame of 1 bytes is too short" in str(lost)
            assert isinstance(lost.__cause__, ProtocolViolation)
            assert lost.sent is True
        late = await outcome(call(Request("x")))
        assert isinstance(late, ConnectionLost)
        assert late.sent is False
        await call.wait_closed()


class Bug(Exception):
    """What only a fault of this program's own raises."""


def with_a_bug(peer: Peer) -> None:
    """From now on what it takes finds one."""

    def receive(frames: list[bytes]) -> Any:
        raise Bug

    peer._core.receive = receive  # type: ignore[method-assign, assignment]


async def test_a_bug_in_what_takes_the_frames_ends_the_connection_and_its_scope(over: Make) -> None:
    outcomes: list[Response | Exception] = []
    slow = Slow(takes=10)

    async with anyio.create_task_group() as tasks:

        async def one(n: int) -> None:
            outcomes.append(await outcome(call(Request("slow", b"%d" % n))))

        with pytest.raises(Bug):  # noqa: PT012 -- the end of the block is what raises it
            async with pair(slow, over) as call:
                for n in range(3):
                    tasks.start_soon(one, n)
                await wait_all_tasks_blocked()
                with_a_bug(call)
                await anyio.sleep_forever()
    assert [type(each) for each in outcomes] == [ConnectionLost] * 3  # which may be repeated; nobody has closed it
    assert {getattr(each, "sent", None) for each in outcomes} == {True}
    assert all(isinstance(each, ConnectionLost) and isinstance(each.__cause__, Bug) for each in outcomes)


async def test_on_the_side_that_serves_such_a_bug_ends_one_connection(
    over: Make, caplog: pytest.LogCaptureFixture
) -> None:
    async def breaks(request: Request, /) -> Response:
        if request.method == "break":
            assert isinstance(request.peer, Peer)
            with_a_bug(request.peer)
        return Response()

    async with over(Rpc()).serve(f"memory://calls-{next(names)}", breaks) as server, over(Rpc()).open() as opened:
        good, bad = await opened.connect(server.endpoint), await opened.connect(server.endpoint)
        await bad(Request("break"))
        lost = await outcome(bad(Request("x")))
        assert isinstance(lost, ConnectionLost)
        assert lost.sent is True
        assert (await good(Request("x"))).payload == b""
    assert "Bug" in caplog.text


async def test_a_server_that_takes_only_the_shortest_messages_harms_no_client() -> None:
    """What this end must answer at once is longer than they may be: that ends the connection, and not the program."""

    async def calls(session: Session) -> None:
        await session.receive()
        await session.send(wire.encode_hello())
        await session.receive()
        await session.send(wire.encode_call(2, 0, wire.NO_LIMIT, b"x", b"", b""))
        await anyio.sleep_forever()

    tiny = Stack(Resume(max_message=30), Framing())
    async with tiny.serve(f"memory://calls-{next(names)}", calls) as server, with_sessions(Rpc()).open() as opened:
        call = await opened.connect(server.endpoint)
        error = await outcome(call(Request("x")))
        assert isinstance(error, ConnectionLost)
        assert "30" in str(error)


async def test_a_message_above_the_limit_is_refused_at_the_other_end_and_the_connection_goes_on() -> None:
    async with pair(echo, rpc=Rpc(max_message=100_000)) as call:
        with pytest.raises(CallFailed, match="where max_message is 100,000") as raised:
            await call(Request("echo", bytes(200_000)))
        assert (raised.value.code, raised.value.sent) == (StatusCode.RESOURCE_EXHAUSTED, False)
        assert (await call(Request("echo", b"x"))).payload == b"x"


async def test_an_answer_above_the_limit_fails_its_call_and_the_connection_goes_on() -> None:
    async def large(request: Request, /) -> Response:
        return Response(bytes(int(request.payload)))

    async with pair(large, rpc=Rpc(max_message=100_000)) as call:
        with pytest.raises(CallFailed, match="where max_message is 100,000") as raised:
            await call(Request("large", b"200000"))
        assert (raised.value.code, raised.value.sent) == (StatusCode.RESOURCE_EXHAUSTED, True)
        assert len((await call(Request("large", b"99999"))).payload) == 99_999


async def test_ten_thousand_streams_at_once() -> None:
    rpc = Rpc(max_calls=10_000, max_running=10_000)
    answers: list[bytes] = []
    async with pair(double, rpc=rpc) as call, anyio.create_task_group() as tasks:
        all_open = anyio.Event()
        count = 0

        async def one(n: int) -> None:
            nonlocal count
            async with open_stream(call, Request("double")) as stream:
                await stream.send(b"%d" % n)
                assert await stream.receive() == b"%d" % n
                count += 1
                if count == 10_000:
                    all_open.set()
                await all_open.wait()
                await stream.send_eof()
                answers.append((await stream.response()).payload)

        for n in range(10_000):
            tasks.start_soon(one, n)
    assert answers == [b"1"] * 10_000


# --- turns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calling", [0, 1, 7, 8, 9, 15, 16, 100, 127, 128, 129, 255, 256, 257, 1000])
async def test_a_turn_takes_something_and_not_too_much_whatever_waits(calling: int) -> None:
    """And all of it is taken in as few turns as it may."""
    async with pair(echo) as call:
        call._core.outgoing.update(dict.fromkeys(range(calling), OutgoingCall(0, 0)))
        for count in range(1, 1200):
            taken = call._turn(count)
            assert 1 <= taken <= min(count, TURN)
            left, turns = count, 0
            while left:
                left -= call._turn(left)
                turns += 1
                assert left >= 0
            assert turns <= -(-count // TURN) + count.bit_length()
        call._core.outgoing.clear()


async def test_the_answers_to_most_calls_that_wait_are_taken_in_two_turns_and_those_to_few_in_one() -> None:
    async with pair(echo) as call:

        def turn(count: int, *, calling: int) -> int:
            call._core.outgoing.update(dict.fromkeys(range(calling), OutgoingCall(0, 0)))
            taken = call._turn(count)
            call._core.outgoing.clear()
            return taken

        assert turn(HALVED - 1, calling=HALVED - 1) == HALVED - 1
        assert turn(HALVED, calling=HALVED) == HALVED // 2
        assert turn(100, calling=100) == 50
        assert turn(100, calling=199) == 50
        assert turn(100, calling=200) == 100  # others have something to work on
        assert turn(100, calling=99) == 100  # calls of the peer's are among them
        assert turn(TURN, calling=0) == TURN
        assert turn(TURN + 1, calling=0) == (TURN + 2) // 2
        assert turn(1000, calling=0) == 125


@pytest.mark.parametrize("most", [1, 3, 1000])
async def test_answers_go_to_their_own_calls_in_whatever_turns_they_are_taken(over: Make, most: int) -> None:
    async with pair(echo, over) as call:
        turns: list[int] = []

        def turn(count: int) -> int:
            turns.append(min(count, most))
            return turns[-1]

        async with anyio.create_task_group() as tasks:

            async def one(n: int) -> None:
                for k in range(5):
                    payload = b"%d.%d" % (n, k)
                    assert (await call(Request("echo", payload))).payload == payload

            call._turn = turn  # type: ignore[method-assign]
            for n in range(200):
                tasks.start_soon(one, n)
        assert not call._core.outgoing


# --- the end of a connection ----------------------------------------------------------------------------------------


async def test_when_this_end_closes_every_pending_call_ends_at_once(
    over: Make,
) -> None:
    slow = Slow()
    outcomes: list[Response | Exception] = []
    began = anyio.current_time()
    async with anyio.create_task_group() as tasks:

        async def one(n: int) -> None:
            outcomes.append(await outcome(call(Request("slow", b"%d" % n))))

        async with pair(slow, over) as call:
            for n in range(20):
                tasks.start_soon(one, n)
            await wait_all_tasks_blocked()
    assert anyio.current_time() - began < 1
    assert [type(each) for each in outcomes] == [ServiceClosed] * 20
    assert all(isinstance(each, ServiceClosed) and each.sent is True for each in outcomes)
    assert len(slow.ended) == 20


async def test_closing_does_not_wait_for_a_server_that_is_gone() -> None:
    stack = with_sessions(Rpc())
    async with stack.serve(f"memory://calls-{next(names)}", echo) as server, stack.open() as opened:
        call = await opened.connect(server.endpoint)
        await call(Request("echo"))
        await server._listener.aclose()
        cut(server.sessions[0])
        await anyio.sleep(1)
        began = anyio.current_time()
        await call.aclose()
        assert anyio.current_time() == began


async def test_a_closed_end_takes_no_calls() -> None:
    async with pair(echo) as call:
        pass
    with pytest.raises(ServiceClosed) as raised:
        await call(Request("echo"))
    assert raised.value.sent is False


async def test_when_the_other_end_aborts_each_pending_call_fails_once_with_what_is_known() -> None:
    stack = with_sessions(Rpc())
    outcomes: list[Response | Exception] = []
    async with stack.serve(f"memory://calls-{next(names)}", Slow()) as server, stack.open() as opened:
        call = await opened.connect(server.endpoint)
        async with anyio.create_task_group() as tasks:

            async def one(n: int) -> None:
                outcomes.append(await outcome(call(Request("slow", b"%d" % n))))

            for n in range(20):
                tasks.start_soon(one, n)
            await wait_all_tasks_blocked()
            for session in server.sessions:
                session.abort()
        assert [type(each) for each in outcomes] == [SessionLost] * 20
        assert {getattr(each, "sent", None) for each in outcomes} == {True}
        assert len(set(map(id, outcomes))) == 20
        late = await outcome(call(Request("slow")))
        assert isinstance(late, ConnectionLost)
        assert late.sent is False


async def test_a_call_that_the_peer_never_received_is_known_not_to_be_carried_out() -> None:
    """Sent into a link that carries nothing any more; then the server gives the session up."""
    slow = Slow()
    stack = with_sessions(Rpc())
    outcomes: dict[str, Response | Exception] = {}
    async with stack.serve(f"memory://calls-{next(names)}", slow) as server, stack.open() as opened:
        call = await opened.connect(server.endpoint)
        session: Any = call._channel._session  # type: ignore[attr-defined]
        async with anyio.create_task_group() as tasks:

            async def one(name: str) -> None:
                outcomes[name] = await outcome(call(Request("slow", name.encode())))

            tasks.start_soon(one, "arrived")
            await anyio.sleep(1)
            assert slow.began == ["arrived"]
            cut(session)  # and no way back, as the server listens no more
            await server._listener.aclose()
            tasks.start_soon(one, "on its way")
            await anyio.sleep(1)
            server.sessions[0].abort()
            await anyio.sleep(400)
    assert {name: getattr(each, "sent", None) for name, each in outcomes.items()} == {
        "arrived": True,
        "on its way": False,
    }
    assert slow.began == ["arrived"]


async def test_over_a_session_a_cut_link_fails_no_call() -> None:
    answered = 0

    async def count(request: Request, /) -> Response:
        await anyio.sleep(0.01)
        return Response(request.payload)

    stack: Stack[Any, Peer, Any, Any] = Stack(Rpc(), Resume(), Retry(Backoff.constant(0.01)), Framing())
    async with stack.serve(f"memory://calls-{next(names)}", count) as server, stack.connect(server.endpoint) as call:
        async with anyio.create_task_group() as tasks:

            async def one(start: int) -> None:
                nonlocal answered
                for n in range(start, 1000, 10):
                    assert (await call(Request("count", b"%d" % n))).payload == b"%d" % n
                    answered += 1
                if answered == 1000:
                    tasks.cancel_scope.cancel()

            async def keep_cutting() -> None:
                while True:
                    await anyio.sleep(0.05)
                    for session in server.sessions:
                        cut(session)

            tasks.start_soon(keep_cutting)
            for start in range(10):
                tasks.start_soon(one, start)
        assert answered == 1000


async def test_draining_finishes_what_runs_and_refuses_what_comes() -> None:
    slow = Slow(takes=10)
    outcomes: dict[str, Response | Exception] = {}
    drained: list[float] = []
    stack = with_sessions(Rpc())
    async with stack.serve(f"memory://calls-{next(names)}", slow) as server, stack.open() as opened:
        call = await opened.connect(server.endpoint)
        async with anyio.create_task_group() as tasks:

            async def one(name: str) -> None:
                outcomes[name] = await outcome(call(Request("slow", name.encode())))

            async def drain() -> None:
                await server.drain(30)
                drained.append(anyio.current_time() - began)

            tasks.start_soon(one, "before")
            await anyio.sleep(1)
            began = anyio.current_time()
            tasks.start_soon(drain)
            await anyio.sleep(1)
            assert call.is_draining
            await one("after")
            await anyio.sleep(20)
            await call.aclose()
    assert isinstance(outcomes["before"], Response)
    after = outcomes["after"]
    assert isinstance(after, ConnectionLost)
    assert (after.sent, after.retryable) == (False, True)
    assert slow.ended == ["before"]
    assert 20 <= drained[0] <= 30


# --- over Reconnect -------------------------------------------------------------------------------------------------


async def test_a_stack_with_reconnect_is_a_client_that_is_called() -> None:
    endpoint = f"memory://calls-{next(names)}"
    stack: Stack[Any, Any, Any, Any] = Stack(
        Retry(StandardPolicy(on=(ConnectionLost, CallFailed), idempotent=True, backoff=Backoff.constant(0.1))),
        Timeout(60),
        Reconnect(endpoint, backoff=Backoff.constant(0.1)),
        Rpc(),
        Resume(),
        Retry(StandardPolicy(Backoff.constant(0.1), max_elapsed=1)),
        Heartbeat(),
        Framing(),
        Encryption(psk=Psk(bytes(range(32)))),
    )
    lives: list[int] = []

    def handler(life: int) -> Handler:
        async def answer(request: Request, /) -> Response:
            lives.append(life)
            return Response(request.payload)

        return answer

    async with stack.open() as call:
        for life in (1, 2, 3):
            async with stack.serve(endpoint, handler(life)) as server:
                for n in range(5):
                    assert (await call(Request("echo", b"%d" % n))).payload == b"%d" % n
                for session in server.sessions:
                    session.abort()
        assert lives == [1] * 5 + [2] * 5 + [3] * 5


async def test_what_happens_to_the_session_and_to_the_connection_above_is_one_stream() -> None:
    endpoint = f"memory://calls-{next(names)}"
    stack: Stack[Any, Any, Any, Any] = Stack(
        Reconnect(endpoint, backoff=Backoff.constant(0.1)),
        Rpc(),
        Resume(),
        Retry(StandardPolicy(Backoff.constant(0.1), max_elapsed=1)),
        Framing(),
    )
    seen: list[str] = []
    async with stack.open() as call, anyio.create_task_group() as tasks:

        async def follow() -> None:
            async for event in call.events():
                seen.append(event.new if isinstance(event, StateChanged) else type(event).__name__)

        tasks.start_soon(follow)
        async with stack.serve(endpoint, echo) as server:
            await call(Request("echo"))
            assert call.state is ConnectionState.CONNECTED
            cut(server.sessions[0])
            await anyio.sleep(1)
            await call(Request("echo"))
            server.sessions[0].abort()
            await anyio.sleep(1)
            await call(Request("echo"))
        tasks.cancel_scope.cancel()
    seen = [each for each in seen if each != "Attempt"]  # as many as chance made
    assert seen[: seen.index("Lost")] == ["idle", "connecting", "connected", "Connected", "Detached", "Resumed"]
    assert seen.count("Connected") == seen.count("connected") == 2
    holds_none = with_sessions(Rpc())
    async with holds_none.open() as opened:
        with pytest.raises(StackError, match="put Reconnect"):
            opened.events()
        with pytest.raises(StackError, match="put Reconnect"):
            print(opened.state)


async def test_failover_and_balance_work_over_reconnect() -> None:
    endpoints = [f"memory://calls-{next(names)}" for _ in range(3)]

    def says(name: str) -> Handler:
        async def answer(request: Request, /) -> Response:
            return Response(name.encode())

        return answer

    def client(endpoint: str) -> Reconnect[Dial]:
        return Reconnect(Dial(Endpoint.parse(endpoint)), backoff=Backoff.constant(0.1), fail_fast=True, eager=True)

    stack = with_sessions(Rpc())
    failing_over = Stack(
        Reconnect(endpoints[0], backoff=Backoff.constant(0.1)),
        Rpc(),
        Resume(),
        Retry(Failover(endpoints, StandardPolicy(Backoff.constant(0.01)))),
        Framing(),
    )
    async with stack.serve(endpoints[1], says("one")), stack.serve(endpoints[2], says("two")):
        async with failing_over.open() as call:
            assert (await call(Request("who"))).payload == b"one"  # the first is down
        async with stack.open() as opened:

            async def connect(dial: Dial, /) -> Peer:
                return await opened.dial(dial)

            policy = StandardPolicy(Backoff.constant(0.01), idempotent=True, max_attempts=10, budget=None)
            balanced = Retry(policy)(Balance([client(each)(connect) for each in endpoints]))
            async with balanced:
                await anyio.sleep(1)
                seen = {(await balanced(Request("who"))).payload for _ in range(100)}
            assert seen == {b"one", b"two"}


async def test_reconnect_goes_to_a_new_connection_when_the_old_one_drains_and_lets_it_finish() -> None:
    slow = Slow(takes=10)
    first, second = f"memory://calls-{next(names)}", f"memory://calls-{next(names)}"
    target = [first]
    stack = with_sessions(Rpc())
    async with stack.serve(first, slow) as draining, stack.serve(second, echo), stack.open() as opened:

        async def connect(name: str, /) -> Peer:
            return await opened.connect(target[0])

        outcomes: dict[str, Response | Exception] = {}
        async with Reconnect("either", eager=True)(connect) as call, anyio.create_task_group() as tasks:

            async def one(name: str) -> None:
                outcomes[name] = await outcome(call(Request("x", name.encode())))

            tasks.start_soon(one, "old")
            await anyio.sleep(1)
            target[0] = second
            tasks.start_soon(draining.drain, 30)
            await anyio.sleep(1)
            await one("new")
            assert isinstance(outcomes["new"], Response)
            await anyio.sleep(20)
    assert isinstance(outcomes["old"], Response)
    assert slow.ended == ["old"]


async def test_stacks_that_cannot_work_say_why() -> None:
    for layers, text in [
        ((Rpc(), Encryption(psk=Psk(bytes(range(32))))), "Rpc needs messages or frames"),
        ((Resume(), Rpc(), Framing()), "put Resume inside Rpc"),
        ((Reconnect("tcp://x:1"), Resume(), Framing()), "Reconnect needs calls .* put Rpc inside it"),
        ((Rpc(), Resume(max_message=1000), Framing()), "Rpc needs messages of up to"),
    ]:
        with pytest.raises(StackError, match=text):
            Stack(*layers)
    stack = with_sessions(Rpc())
    async with stack.open() as opened:
        with pytest.raises(StackError, match="put Reconnect"):
            await opened(Request("x"))
    holding: Stack[Any, Any, Any, Any] = Stack(Reconnect("memory://x"), Rpc(), Framing())
    async with holding.open() as opened:
        with pytest.raises(StackError, match="connects by itself"):
            await opened.connect("memory://x")


@pytest.mark.parametrize("name", ["max_calls", "max_message", "max_running", "max_waiting", "window"])
def test_limits_that_make_no_sense_are_refused(name: str) -> None:
    arguments: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0"):
        Rpc(**arguments)


async def test_it_shows_itself(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        async with pair(echo) as call:
            assert repr(call) == "<Peer open calling=0 answering=0>"
            async with open_stream(call, Request("x")) as stream:
                assert isinstance(stream, Stream)
                assert repr(stream) == "<Stream of call 1>"
    assert repr(call) == "<Peer closed calling=0 answering=0>"


# --- layers around a connection -------------------------------------------------------------------------------------


async def test_layers_around_a_connection_see_every_call_in_both_directions() -> None:
    seen: list[str] = []

    def outgoing(plain: Plain) -> Service[Request, Response]:
        async def call(request: Request, /) -> Response:
            seen.append(f"out {request.method} {plain.peer.endpoint.scheme}")
            return await plain(request)

        return call

    def incoming(inner: Service[Any, Any], /) -> Service[Any, Any]:
        async def handle(request: Request, /) -> Response:
            seen.append(f"in {request.method}")
            response: Response = await inner(request)
            return response

        return handle

    async def back(request: Request, /) -> Response:
        return Response(b"back")

    async def handler(request: Request, /) -> Response:
        assert request.peer is not None
        return await request.peer(Request("back"))

    stack = Stack(Rpc(handler=back, outgoing=outgoing, incoming=incoming), Framing())
    async with stack.serve("memory://calls", handler), stack.connect("memory://calls") as call:
        assert (await call(Request("there"))).payload == b"back"
    assert seen == ["out there memory", "in there", "out back memory", "in back"]
