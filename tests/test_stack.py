"""Stack: the order of layers, and what connecting and serving make of it."""

from __future__ import annotations

import base64
import contextlib
import itertools
import logging
import random
from typing import Any, ClassVar

import anyio
import pytest
from anyio.abc import ByteStream, ObjectStream, ObjectStreamConnectable

from towline.endpoint import Endpoint
from towline.errors import (
    ConnectFailed,
    ConnectionLost,
    EndpointError,
    HandshakeFailed,
    HandshakeTimeout,
    LossReason,
    SessionLost,
    StackError,
)
from towline.layers.encryption import Encryption
from towline.layers.encryption.keys import Psk
from towline.layers.framing import Framing
from towline.layers.heartbeat import Heartbeat
from towline.layers.lines import Lines
from towline.layers.resume import Resume, Session
from towline.layers.retry import Retry
from towline.layers.timeout import Timeout
from towline.link import Link
from towline.policies import Backoff
from towline.service import Dial, Kind, Service, TwoSided
from towline.stack import Stack
from towline.streams import FrameStream, LinkByteStream
from towline.testing import Chaos, Cut
from towline.transports import Memory

PSK = Psk.generate()
HERE = "memory://here"


def stack(*layers: Any, transport: Memory | Chaos | None = None) -> Stack:
    return Stack(*layers, transports=(transport or Memory(),))


async def echo(stream: Any) -> None:
    async for item in stream:
        await stream.send(item)


# --- order -----------------------------------------------------------------------------------------------------------

WRONG: list[tuple[tuple[Any, ...], str]] = [
    (
        (Resume(),),
        "Resume needs frames from the layer inside it, but the transport gives bytes: put Framing between them",
    ),
    (
        (Heartbeat(), Retry()),
        "Heartbeat needs frames from the layer inside it, but the transport gives bytes: put Framing between them",
    ),
    (
        (Resume(), Timeout(5), Encryption(psk=PSK)),
        "Resume needs frames from the layer inside it, but Encryption gives bytes: put Framing between them",
    ),
    (
        (Heartbeat(), Lines()),
        "Heartbeat needs frames from the layer inside it, but Lines gives lines: "
        "use Framing in place of Lines, which only an application can take",
    ),
    (
        (Heartbeat(), Resume(), Framing()),
        "Heartbeat needs frames from the layer inside it, but Resume gives messages: put Heartbeat inside Resume",
    ),
    (
        (Encryption(psk=PSK), Framing()),
        "Encryption needs bytes from the layer inside it, but Framing gives frames: put Encryption inside Framing",
    ),
    (
        (Framing(), Heartbeat(), Encryption(psk=PSK)),
        "Heartbeat needs frames from the layer inside it, but Encryption gives bytes: put Framing between them",
    ),
    (
        (Lines(), Framing()),
        "Lines needs bytes from the layer inside it, but Framing gives frames: put Lines inside Framing",
    ),
    (
        (Framing(), Lines()),
        "Framing needs bytes from the layer inside it, but Lines gives lines: put Framing inside Lines",
    ),
    (
        (Encryption(psk=PSK), Resume(), Framing()),
        "Encryption needs bytes from the layer inside it, but Resume gives messages: "
        "put Encryption inside Resume, and inside Framing",
    ),
    ((Framing(), Framing()), "Framing stands twice in this stack: leave one out"),
    ((Resume(), Resume(), Framing()), "Resume stands twice in this stack: leave one out"),
    ((Resume(), Framing), "Framing is a class: write Framing(...)"),
    ((Resume(), 5, Framing()), "5 is not a layer: it wraps no service"),
    (
        (Resume(), Framing(max_frame_size=1 << 20)),
        "Resume has max_message 4,194,304, but Framing's max_frame_size leaves 1,048,512: "
        "raise the one or lower the other",
    ),
]


@pytest.mark.smoke
@pytest.mark.parametrize(("layers", "message"), WRONG)
def test_a_wrong_order_names_both_layers_and_the_fix(layers: tuple[Any, ...], message: str) -> None:
    with pytest.raises(StackError) as caught:
        Stack(*layers)
    assert str(caught.value) == message
    assert isinstance(caught.value, ValueError)


def test_every_order_of_two_sided_layers_is_either_right_or_refused_when_it_is_built() -> None:
    layers = (Resume(), Heartbeat(), Framing(), Encryption(psk=PSK), Lines())
    right: set[tuple[str, ...]] = set()
    for count in range(len(layers) + 1):
        for order in itertools.permutations(layers, count):
            try:
                Stack(*order)
            except StackError:
                continue
            right.add(tuple(type(layer).__name__ for layer in order))
    assert right == {
        (),
        ("Framing",),
        ("Lines",),
        ("Encryption",),
        ("Framing", "Encryption"),
        ("Lines", "Encryption"),
        ("Heartbeat", "Framing"),
        ("Heartbeat", "Framing", "Encryption"),
        ("Resume", "Framing"),
        ("Resume", "Framing", "Encryption"),
        ("Resume", "Heartbeat", "Framing"),
        ("Resume", "Heartbeat", "Framing", "Encryption"),
    }


def test_transparent_layers_may_stand_anywhere() -> None:
    for position in range(4):
        layers: list[Any] = [Resume(), Heartbeat(), Framing()]
        layers.insert(position, Timeout(5))
        Stack(*layers)


# --- a value ---------------------------------------------------------------------------------------------------------


def test_the_fluent_form_is_the_same_stack() -> None:
    assert Stack().layer(Framing()).layer(Encryption(psk=PSK)) == Stack(Framing(), Encryption(psk=PSK))
    assert hash(Stack(Framing()).layer(Timeout(1))) == hash(Stack(Framing(), Timeout(1)))


def test_stacks_are_equal_when_their_layers_are() -> None:
    assert Stack(Framing()) != Stack(Framing(max_frame_size=1 << 20))
    assert Stack(Framing()) != Stack(Lines())
    assert Stack(Framing()) != (Framing(),)
    assert list(Stack(Timeout(5), Framing())) == [Timeout(5), Framing()]
    assert Stack(Resume(), Framing(), Encryption(psk=PSK)).wire == ("resume/1", "framing/1", Encryption.wire)


def test_describe_shows_both_ends_from_the_application_to_the_wire() -> None:
    layers = (Timeout(60), Resume(), Retry(), Timeout(10), Heartbeat(interval=1, timeout=3), Framing())
    assert Stack(*layers).describe() == (
        "application                         messages\n"
        "  Timeout(seconds=60)               dialling end, and around the handler\n"
        "  Resume()                          both ends: needs frames, gives messages\n"
        "  Retry()                           dialling end\n"
        "  Timeout(seconds=10)               dialling end\n"
        "  Heartbeat(interval=1, timeout=3)  both ends: needs frames, gives frames\n"
        "  Framing()                         both ends: needs bytes, gives frames\n"
        "transport                           bytes"
    )
    assert Stack().describe() == "application  bytes\ntransport    bytes"


def test_no_key_is_shown_by_a_stack() -> None:
    secret = bytes(range(100, 132))
    ours = Stack.resilient(psk=Psk(secret))
    shown = repr(ours) + ours.describe()
    assert "Encryption(" in shown
    for form in (secret.hex(), base64.b64encode(secret).decode(), repr(secret)[2:-1]):
        assert form not in shown


def test_the_resilient_stack_is_the_recommended_one_and_wants_a_key() -> None:
    assert [type(layer).__name__ for layer in Stack.resilient(psk=PSK)] == [
        "Resume",
        "Retry",
        "Heartbeat",
        "Framing",
        "Encryption",
    ]
    with pytest.raises(StackError, match=r"needs psk=Psk.from_file\(...\) or keys=StaticKeys"):
        Stack.resilient()


# --- connecting and serving ------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("layers", "kind"),
    [
        ((), LinkByteStream),
        ((Encryption(psk=PSK),), LinkByteStream),
        ((Framing(),), FrameStream),
        ((Lines(),), FrameStream),
        ((Heartbeat(), Framing(), Encryption(psk=PSK)), FrameStream),
        ((Resume(), Framing()), Session),
        (tuple(Stack.resilient(psk=PSK)), Session),
    ],
)
async def test_what_connect_gives_is_what_the_outermost_layer_gives(layers: tuple[Any, ...], kind: type) -> None:
    ours = stack(*layers)
    async with ours.serve(HERE, echo) as server, ours.connect(server.endpoint) as stream:
        assert {kind, ByteStream if kind is LinkByteStream else ObjectStream} <= set(type(stream).__mro__)
        await stream.send(b"hello")
        assert await stream.receive() == b"hello"


class Recording:
    """A transparent layer that writes down what passes it."""

    client_only: ClassVar[bool] = False

    def __init__(self, name: str, log: list[str], *, client_only: bool = False) -> None:
        self.name = name
        self.log = log
        self.client_only = client_only  # type: ignore[misc]

    def __call__(self, inner: Service[Any, Any], /) -> Service[Any, Any]:
        async def recording(request: Any, /) -> Any:
            what = "dial" if isinstance(request, Dial) else type(request).__name__
            self.log.append(f"{self.name}: {what}")
            return await inner(request)

        return recording


async def test_each_end_has_the_layers_that_mean_something_there() -> None:
    log: list[str] = []
    transport = Memory()
    ours = stack(
        Recording("outside", log),
        Recording("client", log, client_only=True),
        Resume(),
        Recording("inside", log),
        Framing(),
        transport=transport,
    )
    async with ours.serve(HERE, echo), ours.connect(HERE) as session:
        await session.send(b"x")
        await session.receive()
        assert log == ["outside: dial", "client: dial", "inside: dial", "outside: ServerSession"]


async def test_a_timeout_outside_bounds_connecting_and_the_handler() -> None:
    ended: list[str] = []

    async def slow(session: Session) -> None:
        try:
            await anyio.sleep(100)
        finally:
            ended.append("handler")

    ours = stack(Timeout(20), Resume(), Framing())
    async with ours.serve(HERE, slow), ours.connect(HERE) as session:
        await session.send(b"x")
        start = anyio.current_time()
        with pytest.raises(SessionLost) as lost:
            await session.receive()
        assert lost.value.reason is LossReason.INTERNAL
        assert ended == ["handler"]
        assert anyio.current_time() - start == pytest.approx(20, abs=1)
        session.abort()


async def test_a_timeout_inside_bounds_one_attempt() -> None:
    class Mute(Memory):
        async def __call__(self, dial: Dial, /) -> Link:
            await anyio.sleep_forever()
            raise AssertionError

    with pytest.raises(HandshakeTimeout, match="within 3 s"):
        async with stack(Timeout(3), Framing(), transport=Mute()).connect(HERE):
            pass


async def test_a_mute_peer_does_not_hang_a_stack_without_any_timeout() -> None:
    transport = Memory()
    async with stack(transport=transport).serve(HERE, lambda stream: anyio.sleep(1000)):
        start = anyio.current_time()
        with pytest.raises((HandshakeFailed, ConnectFailed)):
            async with stack(Resume(), Heartbeat(), Framing(), transport=transport).connect(HERE):
                pass
        assert anyio.current_time() - start < 60


async def test_a_first_connect_that_fails_raises_the_last_error_itself() -> None:
    for layers in ((), (Framing(),), (Resume(), Framing())):
        with pytest.raises(ConnectFailed, match="nothing listens on memory://here"):
            async with stack(*layers).connect(HERE):
                pass


async def test_an_endpoint_without_a_transport_is_an_error_before_anything_is_done() -> None:
    ours = stack(Resume(), Framing())
    message = r"no transport of this stack serves tcp://localhost:7000: it has memory://"
    for use in (ours.connect("tcp://localhost:7000"), ours.serve("tcp://localhost:7000", echo)):
        with pytest.raises(EndpointError, match=message):
            async with use:
                pass
    async with ours.open() as opened:
        with pytest.raises(EndpointError, match=message):
            opened.connectable("tcp://localhost:7000")


async def test_an_error_in_the_block_leaves_it_as_it_is_and_aborts_the_session() -> None:
    reasons: list[Any] = []

    async def handler(session: Session) -> None:
        try:
            while True:
                await session.receive()
        except SessionLost as lost:
            reasons.append(lost.reason)
            raise

    ours = stack(Resume(), Framing())
    async with ours.serve(HERE, handler):
        with pytest.raises(KeyError, match="mine"):  # noqa: PT012 - the loop or block is what is tested
            async with ours.connect(HERE) as session:
                await session.send(b"the server knows of the session")
                await session.flush()
                raise KeyError("mine")
        await anyio.wait_all_tasks_blocked()
    assert reasons == [LossReason.ABORTED]


async def test_an_error_in_the_block_of_a_stream_leaves_it_as_it_is() -> None:
    ours = stack(Framing())
    with pytest.raises(KeyError, match="mine"):  # noqa: PT012 - the loop or block is what is tested
        async with ours.serve(HERE, echo), ours.connect(HERE) as stream:
            await stream.send(b"x")
            raise KeyError("mine")


async def test_cancelling_the_block_ends_it_and_what_it_started() -> None:
    ours = stack(*Stack.resilient(psk=PSK))
    with anyio.move_on_after(5) as cancelled:
        async with ours.serve(HERE, echo), ours.connect(HERE) as session:
            await session.receive()
    assert cancelled.cancelled_caught


async def test_the_end_of_the_block_delivers_what_was_sent() -> None:
    got: list[bytes] = []

    async def handler(stream: Any) -> None:
        got.extend([item async for item in stream])

    for layers in ((Framing(),), (Resume(), Framing()), tuple(Stack.resilient(psk=PSK))):
        got.clear()
        ours = stack(*layers)
        async with ours.serve(HERE, handler):
            async with ours.connect(HERE) as stream:
                for n in range(100):
                    await stream.send(b"%d" % n)
            await anyio.sleep(1)
            assert got == [b"%d" % n for n in range(100)]


async def test_one_open_stack_connects_and_serves_as_often_as_asked() -> None:
    async with stack(Resume(), Framing()).open(rng=random.Random(1)) as opened:
        await opened.serve(HERE, echo)
        await opened.serve("memory://there", echo)
        for endpoint in (HERE, "memory://there", Endpoint.parse(HERE)):
            session = await opened.connect(endpoint)
            await session.send(b"hello")
            assert await session.receive() == b"hello"
            await session.aclose()
        assert repr(opened) == "<OpenStack Stack(Resume(), Framing())>"


@pytest.mark.parametrize("layers", [(Resume(), Framing()), (Framing(),), ()])
async def test_a_connectable_is_anyios(layers: tuple[Any, ...]) -> None:
    async with stack(*layers).open() as opened:
        await opened.serve(HERE, echo)
        connectable = opened.connectable(HERE)
        if layers:  # anyio's own as_connectable takes no object streams
            assert isinstance(connectable, ObjectStreamConnectable)
        else:
            assert anyio.as_connectable(connectable) is connectable  # type: ignore[arg-type]
        async with await connectable.connect() as stream:
            await stream.send(b"hello")
            assert await stream.receive() == b"hello"


async def test_a_handler_that_loses_its_link_is_no_failure_of_the_server(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)

    async def handler(stream: Any) -> None:
        await stream.receive()

    for layers in ((), (Framing(),)):
        ours = stack(*layers)
        async with ours.serve(HERE, handler), ours.open() as opened:
            stream = await opened.connect(HERE)
            await anyio.wait_all_tasks_blocked()
            stream.abort()
            await anyio.sleep(1)
    assert caplog.records == []


async def test_two_ends_with_different_stacks_find_that_out() -> None:
    transport = Memory()
    async with stack(Framing(), Encryption(psk=PSK), transport=transport).serve(HERE, echo):
        with pytest.raises(HandshakeFailed):
            async with stack(Heartbeat(), Framing(), Encryption(psk=PSK), transport=transport).connect(HERE):
                pass


# --- one session after another ---------------------------------------------------------------------------------------


async def greet(session: Session) -> None:
    await session.send(b"hello")


@pytest.mark.smoke
@pytest.mark.parametrize("layers", [(Resume(), Retry(Backoff.constant(0.1)), Framing()), (Retry(), Framing())])
async def test_sessions_gives_a_new_one_when_the_last_is_over(layers: tuple[Any, ...]) -> None:
    ours = stack(*layers)
    seen: list[Any] = []
    async with ours.serve(HERE, greet):
        async for session in ours.sessions(HERE):
            seen.append(session)
            assert await session.receive() == b"hello"
            if len(seen) == 3:
                break
        await anyio.sleep(1)
    assert len(set(map(id, seen))) == 3


async def test_sessions_goes_on_after_a_loss() -> None:
    ours = stack(Resume(), Retry(Backoff.constant(0.1)), Framing())
    losses: list[LossReason] = []

    async def fail(session: Session) -> None:
        await session.receive()
        raise RuntimeError("a handler's fault")

    async with ours.serve(HERE, fail):
        async for session in ours.sessions(HERE):
            await session.send(b"x")
            try:
                await session.receive()
            except SessionLost as lost:
                losses.append(lost.reason)
            if len(losses) == 2:
                break
    assert losses == [LossReason.INTERNAL, LossReason.INTERNAL]


async def test_the_first_failure_of_sessions_is_raised() -> None:
    ours = stack(Framing())
    with pytest.raises(ConnectFailed):  # noqa: PT012 - the loop or block is what is tested
        async for _ in ours.sessions(HERE):
            raise AssertionError("nobody listens")
    with pytest.raises(EndpointError):  # noqa: PT012 - the loop or block is what is tested
        async for _ in ours.sessions("nowhere"):
            raise AssertionError("it is no endpoint")


async def test_an_error_in_the_loop_leaves_it_and_aborts_the_session() -> None:
    ours = stack(Resume(), Framing())
    kept: list[Session] = []
    async with ours.serve(HERE, echo):
        with pytest.raises(KeyError):  # noqa: PT012 - the loop or block is what is tested
            async for session in ours.sessions(HERE):
                kept.append(session)
                raise KeyError("mine")
        await anyio.sleep(5)
    assert kept[0].state.is_over


async def test_sessions_waits_between_attempts_while_the_server_is_away() -> None:
    transport = Memory()
    ours = stack(Framing(), transport=transport)
    dials = before = 0

    class Counting(Memory):
        async def __call__(self, dial: Dial, /) -> Link:
            nonlocal dials
            dials += 1
            return await transport(dial)

    theirs = stack(Framing(), transport=Counting())
    async with anyio.create_task_group() as tasks:

        async def use() -> None:
            async for stream in theirs.sessions(HERE):
                with contextlib.suppress(anyio.EndOfStream, ConnectionLost):
                    await stream.receive()

        async with ours.serve(HERE, echo):
            tasks.start_soon(use)
            await anyio.sleep(0.5)
        before = dials
        await anyio.sleep(10)
        tasks.cancel_scope.cancel()
    assert before >= 1
    assert dials - before <= 10 / 0.1 + 2


async def test_a_session_of_the_loop_survives_the_loss_of_its_link() -> None:
    chaos = Chaos(Memory(), cuts=[Cut(sent=200), Cut(received=300)])
    ours = stack(Resume(), Retry(Backoff.constant(0.1)), Framing(), transport=chaos)
    async with ours.serve(HERE, echo):
        async for session in ours.sessions(HERE):
            for n in range(50):
                await session.send(b"%d" % n)
            assert [await session.receive() for _ in range(50)] == [b"%d" % n for n in range(50)]
            assert session.statistics.resumes == 2
            break


def test_a_layer_of_ones_own_says_what_it_needs_and_gives() -> None:
    class Mine(TwoSided):
        needs = (Kind.MESSAGES,)
        gives = Kind.CALLS
        wire = "mine/1"

        def connector(self, inner: Service[Dial, Any], scope: Any) -> Service[Dial, Any]:
            return inner

        def acceptor(self, inner: Service[Any, None], scope: Any) -> Service[Any, None]:
            return inner

    assert Stack(Mine(), Resume(), Framing()).wire == ("mine/1", "resume/1", "framing/1")
    with pytest.raises(StackError, match="Mine needs messages from the layer inside it, but Framing gives frames"):
        Stack(Mine(), Framing())
