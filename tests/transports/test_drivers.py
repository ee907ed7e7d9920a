"""Every driver keeps one contract, whatever moves its bytes; and what is special about the socket's."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import errno
import gc
import math
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import pytest
import sniffio
import trio.lowlevel
from anyio.streams.buffered import BufferedByteStream
from anyio.streams.stapled import StapledObjectStream
from typing_extensions import override

from towline.endpoint import Endpoint
from towline.errors import LinkLost
from towline.link import Link
from towline.scope import Scope
from towline.service import Side
from towline.stage import Stage, Units
from towline.streams import LinkByteStream
from towline.testing import DriverPair, check_driver, open_scope
from towline.transports._socket import SocketDriver
from towline.transports._stream import StreamDriver
from towline.transports.memory import MemoryDriver, _Direction, memory_drivers

pytestmark = pytest.mark.real_time


async def memory() -> DriverPair:
    return memory_drivers()


async def memory_in_single_bytes() -> DriverPair:
    return memory_drivers(chunk=997)


async def socketpair() -> DriverPair:
    a, b = socket.socketpair()
    return SocketDriver(a), SocketDriver(b)


async def tcp_pair() -> tuple[SocketDriver, SocketDriver]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        a = socket.create_connection(listener.getsockname())
        return SocketDriver(a), SocketDriver(listener.accept()[0])


async def anyio_tcp_streams() -> DriverPair:
    a, b = await joined_anyio_streams()
    return StreamDriver(a), StreamDriver(b)


async def joined_anyio_streams() -> tuple[anyio.abc.SocketStream, anyio.abc.SocketStream]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        a = socket.create_connection(listener.getsockname())
        b, _ = listener.accept()
    return await anyio.abc.SocketStream.from_socket(a), await anyio.abc.SocketStream.from_socket(b)


async def anyio_unix_streams() -> DriverPair:
    a, b = socket.socketpair()
    return (
        StreamDriver(await anyio.abc.UNIXSocketStream.from_socket(a)),
        StreamDriver(await anyio.abc.UNIXSocketStream.from_socket(b)),
    )


async def anyio_object_streams() -> DriverPair:
    send, receive = anyio.create_memory_object_stream[bytes](3)
    send_back, receive_back = anyio.create_memory_object_stream[bytes](3)
    return (
        StreamDriver(StapledObjectStream(send, receive_back)),
        StreamDriver(StapledObjectStream(send_back, receive)),
    )


async def anyio_byte_streams() -> DriverPair:
    send, receive = anyio.create_memory_object_stream[bytes](3)
    send_back, receive_back = anyio.create_memory_object_stream[bytes](3)
    return (
        StreamDriver(BufferedByteStream(StapledObjectStream(send, receive_back))),
        StreamDriver(BufferedByteStream(StapledObjectStream(send_back, receive))),
    )


DRIVERS = [
    memory,
    memory_in_single_bytes,
    socketpair,
    tcp_pair,
    anyio_tcp_streams,
    anyio_unix_streams,
    anyio_object_streams,
    anyio_byte_streams,
]


@pytest.mark.parametrize("make_pair", DRIVERS)
async def test_a_driver_keeps_the_contract(make_pair: Callable[[], Awaitable[DriverPair]]) -> None:
    # D13: on asyncio, anyio never pauses a TCP stream that has not been read yet.
    bounded = make_pair is not anyio_tcp_streams or sniffio.current_async_library() == "trio"
    await check_driver(make_pair, bounded=bounded)


def taking(got: list[bytes], at_most: float = math.inf) -> Callable[[bytes], bool]:
    """A ``take`` that keeps what comes, and says no when it has enough."""

    def take(data: bytes) -> bool:
        got.append(data)
        return len(got) < at_most

    return take


def more(_: bytes) -> bool:
    return True


# --- the socket's driver ---------------------------------------------------------------------------------------


class Troubled(socket.socket):
    """A socket whose calls do, one after the other, what a script says: an error, or how many bytes they take."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sends: list[int | OSError] = []
        self.receives: list[OSError] = []
        self.shutdowns: list[OSError] = []

    def send(self, data: Any, flags: int = 0, /) -> int:
        step = self.sends.pop(0) if self.sends else None
        if isinstance(step, OSError):
            raise step
        return super().send(data if step is None else memoryview(data)[:step], flags)

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        if self.receives:
            raise self.receives.pop(0)
        return super().recv_into(*args, **kwargs)

    def shutdown(self, how: int, /) -> None:
        if self.shutdowns:
            raise self.shutdowns.pop(0)
        super().shutdown(how)


def troubled_pair() -> tuple[Troubled, SocketDriver, SocketDriver]:
    a, b = socket.socketpair()
    sock = Troubled(fileno=a.detach())
    return sock, SocketDriver(sock), SocketDriver(b)


ODD = [
    getattr(errno, name)
    for name in (
        *("ENETDOWN", "EHOSTUNREACH", "ETIMEDOUT", "ECONNABORTED", "ECONNRESET", "EPROTOTYPE", "EBADF", "EPIPE"),
        *("ENOTCONN", "EIO", "EINVAL", "ENOBUFS"),
    )
]


@pytest.mark.parametrize("code", [*ODD, 10053, 10054, 121, 109, 232])
async def test_f46_odd_errors_are_a_lost_link_and_nothing_else(code: int) -> None:
    sock, driver, peer = troubled_pair()
    error = OSError(code, "odd")
    sock.receives, sock.sends, sock.shutdowns = [error], [error] * 2, [error] * 2
    uses: list[Callable[[], Awaitable[object]]] = [
        driver.read,
        lambda: driver.write(b"x"),
        driver.send_eof,
    ]
    for use in uses:
        with pytest.raises(LinkLost, match=r"^the link broke: odd$") as caught:
            await use()
        assert caught.value.__cause__ is error
    await driver.aclose()
    peer.abort()


@pytest.mark.parametrize("code", ODD)
async def test_f46_odd_errors_of_write_now_are_a_lost_link(code: int) -> None:
    sock, driver, peer = troubled_pair()
    sock.sends = [OSError(code, "odd")]
    with pytest.raises(LinkLost):
        driver.write_now(b"x")
    driver.abort()
    peer.abort()


@pytest.mark.parametrize("waiting", [anyio.wait_readable, anyio.wait_writable])
async def test_f46_errors_of_waiting_are_a_lost_link(waiting: object, monkeypatch: pytest.MonkeyPatch) -> None:
    async def wait(sock: object) -> None:
        await anyio.lowlevel.checkpoint()
        raise OSError(errno.EBADF, "bad file descriptor")

    monkeypatch.setattr(anyio, "wait_readable", wait)
    monkeypatch.setattr(anyio, "wait_writable", wait)
    sock, driver, peer = troubled_pair()
    sock.sends = [BlockingIOError(errno.EAGAIN, "later")]
    with pytest.raises(LinkLost, match="bad file descriptor"):
        await (driver.read() if waiting is anyio.wait_readable else driver.write(b"x"))
    driver.abort()
    peer.abort()


async def test_f51_partial_writes_of_one_byte_and_eagain_duplicate_no_byte() -> None:
    sock, driver, peer = troubled_pair()
    sent = bytes(range(256)) * 2
    again = BlockingIOError(errno.EAGAIN, "later")
    sock.sends = [step for _ in range(400) for step in (1, again, InterruptedError(errno.EINTR, "signal"))]
    driver.write_now(sent[:5])
    assert driver.accepted == 1
    assert driver.unsent
    driver.write_now(sent[5:9])
    got = bytearray()

    async def write() -> None:
        await driver.write(sent[9:])
        assert driver.accepted == len(sent)
        assert not driver.unsent
        await driver.send_eof()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(write)
        while more := await peer.read():  # beside it: for the kernel, a byte alone is as large as hundreds
            got += more
    assert got == sent
    driver.abort()
    peer.abort()


async def test_f51_interrupted_reads_are_tried_again() -> None:
    sock, driver, peer = troubled_pair()
    sock.receives = [InterruptedError(errno.EINTR, "signal"), BlockingIOError(errno.EAGAIN, "later")]
    await peer.write(b"x")
    assert await driver.read() == b"x"
    driver.abort()
    peer.abort()


async def test_a_write_that_was_cancelled_goes_on_with_the_next_and_keeps_its_own_copy() -> None:
    _, driver, peer = troubled_pair()
    block = bytearray(range(256)) * 8192
    with anyio.move_on_after(0.02) as scope:
        await driver.write(block)
    assert scope.cancelled_caught
    assert driver.unsent
    expected = bytes(block) + b"the rest"
    block[:] = bytes(len(block))
    got = bytearray()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(driver.write, b"the rest")
        while len(got) < len(expected):
            got += await peer.read()
    assert got == expected
    driver.abort()
    peer.abort()


async def test_the_peer_of_an_aborted_tcp_connection_sees_a_reset() -> None:
    a, b = await tcp_pair()
    a.abort()
    with pytest.raises(LinkLost, match="reset"):
        await b.read()
    b.abort()


async def test_a_peer_that_took_not_everything_by_the_end_of_linger_sees_a_reset_not_an_end() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        a = SocketDriver(socket.create_connection(listener.getsockname()), linger=0.02)
        b = SocketDriver(listener.accept()[0])
    while not a.unsent:
        a.write_now(bytes(65536))
    await a.aclose()
    with pytest.raises(LinkLost, match="reset"):
        await read_all(b)
    b.abort()


async def read_all(driver: SocketDriver) -> None:
    while await driver.read():
        pass


async def test_a_close_waits_for_its_peer_no_longer_than_linger() -> None:
    a, b = socket.socketpair()
    driver = SocketDriver(a, linger=0.02)
    with b, anyio.fail_after(1):
        await driver.aclose()
    assert a.fileno() == -1


async def test_a_close_that_is_cancelled_closes_at_once() -> None:
    a, b = socket.socketpair()
    driver = SocketDriver(a, linger=1000)
    with b:
        with anyio.move_on_after(0.01) as scope:
            await driver.aclose()
        assert scope.cancelled_caught
        assert a.fileno() == -1


async def test_an_abort_ends_a_close_that_lingers() -> None:
    a, b = socket.socketpair()
    driver = SocketDriver(a, linger=1000)
    with b, anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(driver.aclose)
            await anyio.wait_all_tasks_blocked()
            driver.abort()
    assert a.fileno() == -1


@pytest.mark.parametrize("each", [False, True])
async def test_a_descriptor_is_not_reused_while_anybody_still_waits_for_it(each: bool) -> None:
    """Without `Waitable` the second reader sleeps for ever on asyncio: the first takes its registration away."""
    a, a_peer = socket.socketpair()
    first = SocketDriver(a)
    number = a.fileno()
    got: list[bytes] = []

    async def read_first() -> None:
        with pytest.raises(LinkLost):
            await (first.read_each(more) if each else first.read())

    async def read_second(driver: SocketDriver, peer: SocketDriver) -> None:
        if each:
            await driver.read_each(taking(got, 1))
        else:
            got.append(await driver.read())
        driver.abort()
        peer.abort()

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read_first)
            await anyio.wait_all_tasks_blocked()
            first.abort()
            pair = socket.socketpair()
            assert number not in (sock.fileno() for sock in pair)
            second, peer = (SocketDriver(sock) for sock in pair)
            tasks.start_soon(read_second, second, peer)
            await anyio.wait_all_tasks_blocked()
            peer.write_now(b"awake")
    assert got == [b"awake"]
    assert a.fileno() == -1
    a_peer.close()


@pytest.mark.parametrize("each", [False, True])
async def test_an_abort_from_outside_any_task_wakes_the_reader(each: bool) -> None:
    a, b = socket.socketpair()
    driver = SocketDriver(a)
    with b, anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:

            async def read() -> None:
                with pytest.raises(LinkLost):
                    await (driver.read_each(more) if each else driver.read())

            tasks.start_soon(read)
            await anyio.wait_all_tasks_blocked()
            if sniffio.current_async_library() == "asyncio":
                # An empty context, as a signal handler's: there anyio does not know what loop it is in.
                asyncio.get_running_loop().call_soon(driver.abort, context=contextvars.Context())
            else:
                trio.lowlevel.current_trio_token().run_sync_soon(driver.abort)
    assert a.fileno() == -1


def test_an_abort_after_the_loop_has_ended_closes() -> None:
    a, b = socket.socketpair()
    with b:
        SocketDriver(a).abort()
        assert a.fileno() == -1


# --- reads that the event loop calls for -----------------------------------------------------------------------


def is_registered(sock: socket.socket) -> bool:
    """Whether asyncio's loop still looks at a descriptor. uvloop does not say; trio never does between two waits."""
    if sock.fileno() == -1 or sniffio.current_async_library() != "asyncio":
        return False
    loop = asyncio.get_running_loop()
    return isinstance(loop, asyncio.SelectorEventLoop) and loop.remove_reader(sock)


class Refusal(Exception):
    pass


class Fatal(BaseException):
    pass


def raiser(error: BaseException) -> Callable[[bytes], bool]:
    def take(_: bytes) -> bool:
        raise error

    return take


@pytest.mark.parametrize("end", ["no", "error", "end", "cancelled", "abort", "aclose"])
async def test_read_each_leaves_no_registration_behind(end: str) -> None:
    a, b = socket.socketpair()
    driver, peer = SocketDriver(a), SocketDriver(b)
    seen: list[bytes] = []

    async def read() -> None:
        take: dict[str, Callable[[bytes], bool]] = {"no": lambda _: False, "error": raiser(Refusal())}
        with contextlib.suppress(Refusal, LinkLost):
            await driver.read_each(take.get(end, more))
        seen.append(b"" if is_registered(a) else b"ended")

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            await anyio.wait_all_tasks_blocked()
            if end in ("no", "error"):
                peer.write_now(b"x")
            elif end == "end":
                await peer.send_eof()
            elif end == "cancelled":
                tasks.cancel_scope.cancel()
            elif end == "abort":
                driver.abort()
                assert a.fileno() != -1  # somebody waits for it still
                assert not is_registered(a)
            else:
                tasks.start_soon(driver.aclose)
                await peer.read()
                await peer.aclose()
    if end == "cancelled":
        assert seen == []
        assert not is_registered(a)
    else:
        assert seen == [b"ended"]
    driver.abort()
    peer.abort()
    assert a.fileno() == -1


@pytest.mark.parametrize("kind", [Refusal, Fatal, asyncio.CancelledError])
async def test_what_take_raises_comes_out_of_read_each_once_with_its_traceback(kind: type[BaseException]) -> None:
    _, driver, peer = troubled_pair()
    complaints: list[object] = []
    is_asyncio = sniffio.current_async_library() == "asyncio"
    if is_asyncio:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    error = kind("refused")
    peer.write_now(b"one")
    with pytest.raises(kind) as caught:
        await driver.read_each(raiser(error))
    assert caught.value is error
    assert caught.traceback[-1].name == "take"
    peer.write_now(b"two")
    assert await driver.read() == b"two"
    driver.abort()
    peer.abort()
    del error, caught
    gc.collect()
    await anyio.lowlevel.checkpoint()
    assert complaints == []
    if is_asyncio:
        asyncio.get_running_loop().set_exception_handler(None)


@pytest.mark.parametrize("end", ["cancelled", "aborted"])
async def test_what_take_raises_counts_although_its_task_was_told_to_end_in_the_same_step(end: str) -> None:
    """An error, a KeyboardInterrupt above all, that nobody gets would be one that was swallowed."""
    _, driver, peer = troubled_pair()
    raised: list[Fatal] = []

    async def read() -> None:
        def take(_: bytes) -> bool:
            if end == "cancelled":
                scope.cancel()
            else:
                driver.abort()
            raise Fatal

        try:
            with anyio.CancelScope() as scope:
                await driver.read_each(take)
        except Fatal as error:
            raised.append(error)

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            await anyio.wait_all_tasks_blocked()
            peer.write_now(b"x")
    assert len(raised) == 1
    driver.abort()
    peer.abort()


async def test_a_task_of_asyncio_that_is_cancelled_by_itself_loses_nothing() -> None:
    if sniffio.current_async_library() != "asyncio":
        pytest.skip("trio has no such tasks")
    _, driver, peer = troubled_pair()
    got: list[bytes] = []
    for turns in range(5):
        task = asyncio.create_task(driver.read_each(taking(got)))
        for _ in range(turns):
            await asyncio.sleep(0)
        peer.write_now(b"%d" % turns)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    if len(got) < 5:
        got.append(await driver.read())
    assert b"".join(got) == b"01234"
    driver.abort()
    peer.abort()


async def test_who_reads_next_is_not_made_deaf_by_who_read_before() -> None:
    """The task that `take` wakes may run, and wait for the same descriptor, before the one that waited until now."""
    _, driver, peer = troubled_pair()
    is_over = anyio.Event()
    got: list[bytes] = []

    def take(_: bytes) -> bool:
        is_over.set()
        return False

    async def read_next() -> None:
        await is_over.wait()
        got.append(await driver.read())

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read_next)
            tasks.start_soon(driver.read_each, take)
            await anyio.wait_all_tasks_blocked()
            peer.write_now(b"first")
            await is_over.wait()
            await anyio.wait_all_tasks_blocked()
            peer.write_now(b"second")
    assert got == [b"second"]
    driver.abort()
    peer.abort()


async def test_a_reset_behind_data_is_seen() -> None:
    """uvloop calls for a descriptor that is in an error, and then for as long as it lives no more."""
    a, b = await tcp_pair()
    got: list[bytes] = []

    async def read() -> None:
        with pytest.raises(LinkLost, match="reset"):
            await b.read_each(taking(got))

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            await anyio.wait_all_tasks_blocked()
            a.write_now(b"and then")
            a.abort()
    assert got == [b"and then"]
    b.abort()


async def test_two_tasks_cannot_read_each_at_once() -> None:
    if sniffio.current_async_library() != "asyncio":
        pytest.skip("there it is read() that says so")
    _, driver, peer = troubled_pair()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(driver.read_each, more)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(anyio.BusyResourceError):
            await driver.read_each(more)
        tasks.cancel_scope.cancel()
    driver.abort()
    peer.abort()


@pytest.mark.parametrize("error", [NotImplementedError(), PermissionError(errno.EPERM, "not this one")])
async def test_where_the_loop_cannot_call_it_is_read_in_the_task(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows' default loop cannot for sockets, and epoll cannot for files."""
    if sniffio.current_async_library() != "asyncio":
        pytest.skip("trio is never asked")
    _, driver, peer = troubled_pair()
    got: list[bytes] = []

    def refuse(*_: object) -> None:
        raise error

    peer.write_now(b"one")
    with monkeypatch.context() as patch:
        patch.setattr(asyncio.get_running_loop(), "add_reader", refuse)
        await driver.read_each(taking(got, 1))
    assert got == [b"one"]
    driver.abort()
    peer.abort()


def link_over(driver: SocketDriver, scope: Scope) -> Link:
    link = Link(driver, side=Side.DIALLING, endpoint=Endpoint.parse("unix:///nowhere"))
    link.bind(scope)
    return link


async def test_a_link_that_pauses_does_not_look_at_its_socket_and_goes_on_where_it_was() -> None:
    a, b = socket.socketpair()
    peer = SocketDriver(b)
    with anyio.fail_after(5):
        async with open_scope() as scope:
            stream = LinkByteStream(link_over(SocketDriver(a), scope))
            scope.task_group.start_soon(stream.run)
            sent = bytes(range(256)) * 4096

            async def write() -> None:
                await peer.write(sent)
                await peer.send_eof()

            scope.task_group.start_soon(write)
            while not stream.full:
                await anyio.lowlevel.checkpoint()
            await anyio.wait_all_tasks_blocked()
            assert not is_registered(a)
            assert b"".join([part async for part in stream]) == sent
            assert not is_registered(a)
            stream.abort()
    peer.abort()
    assert a.fileno() == -1


async def test_a_fault_in_what_a_link_reads_is_logged_once_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    class Faulty(Stage):
        @override
        def incoming(self, units: Units, now: float) -> Units:
            return [unit[1000] for unit in units]

    a, b = socket.socketpair()
    peer = SocketDriver(b)
    async with open_scope() as scope:
        link = link_over(SocketDriver(a), scope)
        link.push(Faulty())
        peer.write_now(b"x")
        with pytest.raises(LinkLost, match="index out of range"):
            await link.run(LinkByteStream(link))
    assert [record.message.split(": ")[-1] for record in caplog.records] == ["a stage failed"]
    assert "in incoming" in caplog.text
    peer.abort()
    assert a.fileno() == -1


# --- the driver of a foreign stream ----------------------------------------------------------------------------


class Recording(anyio.abc.ObjectStream[bytes]):
    """A stream that says what was done with it."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.closed = anyio.Event()
        self.sent: list[bytes] = []

    async def receive(self) -> bytes:
        if self.error is not None:
            raise self.error
        await anyio.sleep_forever()
        raise AssertionError

    async def send(self, item: bytes) -> None:
        if self.error is not None:
            raise self.error
        self.sent.append(item)

    async def send_eof(self) -> None:
        raise NotImplementedError

    async def aclose(self) -> None:
        self.closed.set()
        if self.error is not None:
            raise self.error


async def test_an_aborted_stream_is_closed_by_the_read_that_it_ended_even_when_that_is_cancelled() -> None:
    stream = Recording()
    driver = StreamDriver(stream)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(driver.read)
        await anyio.wait_all_tasks_blocked()
        driver.abort()
        tasks.cancel_scope.cancel()
    assert stream.closed.is_set()


async def test_an_aborted_stream_that_nobody_reads_is_closed_all_the_same() -> None:
    stream = Recording()
    StreamDriver(stream).abort()
    with anyio.fail_after(1):
        await stream.closed.wait()


@pytest.mark.parametrize(
    "error",
    [anyio.BrokenResourceError(), anyio.ClosedResourceError(), ConnectionResetError(errno.ECONNRESET, "odd")],
)
async def test_f46_errors_of_a_stream_are_a_lost_link(error: Exception) -> None:
    driver = StreamDriver(Recording(error))
    uses: list[Callable[[], Awaitable[object]]] = [driver.read, lambda: driver.write(b"x")]
    for use in uses:
        with pytest.raises(LinkLost) as caught:
            await use()
        assert caught.value.__cause__ is error
    await driver.aclose()


async def test_a_stream_gets_bytes_in_pieces_so_that_progress_shows() -> None:
    stream = Recording()
    driver = StreamDriver(stream)
    await driver.write(bytearray(150_000))
    assert [(type(part), len(part)) for part in stream.sent] == [(bytes, 65536), (bytes, 65536), (bytes, 18928)]
    assert driver.accepted == 150_000
    await driver.send_eof()  # it has no half-close, which is nothing to complain about
    with pytest.raises(TypeError):
        driver.write_now(b"x")
    await driver.aclose()
    assert stream.closed.is_set()


async def test_the_peer_of_an_aborted_stream_sees_a_reset() -> None:
    a, b = await anyio_tcp_streams()
    a.abort()
    with pytest.raises(LinkLost):
        await b.read()
    b.abort()
    await anyio.wait_all_tasks_blocked()


async def test_guard_reaches_the_socket_of_a_stream() -> None:
    a, b = await joined_anyio_streams()
    StreamDriver(a).guard(1.5)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        raw = a.extra(anyio.abc.SocketAttribute.raw_socket)
        assert raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1500
    await a.aclose()
    await b.aclose()


async def test_descriptions_say_what_it_is() -> None:
    a, b = await tcp_pair()
    assert a.description.startswith("a TCP connection with 127.0.0.1 port ")
    c, d = await socketpair()
    assert c.description == "a Unix socket"
    stream = StreamDriver(Recording())
    assert stream.description == "a stream of Recording"
    for driver in (a, b, c, d, stream):
        driver.abort()
    assert a.description == "a TCP connection that is gone"


# --- the checker itself ----------------------------------------------------------------------------------------


class Rotten(MemoryDriver):
    """Keeps the contract, but for one point."""

    fault = ""

    async def read(self) -> bytes:
        if self.fault == "loses what a cancelled reader had":
            data = await super().read()
            await anyio.lowlevel.checkpoint()
            return data
        if self.fault == "starves others" and self._incoming.parts:
            return self._incoming.get()
        return await super().read()

    async def read_each(self, take: Callable[[bytes], bool]) -> None:
        if self.fault == "goes on after a no":
            await super().read_each(take)
            if self._incoming.parts:
                take(self._incoming.get())
        elif self.fault == "stops before a no":
            take(await self.read())
        elif self.fault == "goes on after the end":
            while take(await self.read()):
                pass
        elif self.fault == "keeps the end to itself":
            while (data := await self.read()) and take(data):
                pass
        elif self.fault == "swallows what is raised":
            with contextlib.suppress(BaseException):
                await super().read_each(take)
        elif self.fault == "reads ahead":
            data = await self.read()
            ahead = self._incoming.get() if self._incoming.parts else b""
            if take(data) and (not data or not ahead or take(ahead)):
                await super().read_each(take)
        elif self.fault == "loses what a cancelled read_each had":
            while True:
                data = await self.read()
                await anyio.lowlevel.checkpoint()
                if not take(data) or not data:
                    return
        elif self.fault == "starves others in read_each" and self._incoming.parts:
            take(self._incoming.get())
        elif self.fault == "returns from an abort as if nothing was":
            with contextlib.suppress(LinkLost):
                await super().read_each(take)
        else:
            await super().read_each(take)

    async def write(self, data: bytes | bytearray) -> None:
        if self.fault == "does not count":
            before = self.accepted
            await super().write(data)
            self.accepted = before
            return
        if self.fault == "swaps bytes" and len(data) > 1000:
            data = bytes(data[::-1])
        if self.fault == "loses the rest of write_now":
            self._left = b""
        await super().write(data)

    async def send_eof(self) -> None:
        if self.fault != "cannot end":
            await super().send_eof()

    async def aclose(self) -> None:
        if self.fault == "aborts where it should close":
            self.abort()
        await super().aclose()

    def abort(self) -> None:
        if self.fault == "sleeps through an abort":
            self._incoming.broken = self._outgoing.broken = True
            return
        super().abort()


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("", ""),
        ("does not count", "accepted is"),
        ("swaps bytes", "bytes in order"),
        ("loses the rest of write_now", ""),
        ("loses what a cancelled reader had", ""),
        ("starves others", "another task had"),
        ("goes on after a no", "after take has said no"),
        ("stops before a no", "before take has said no"),
        ("goes on after the end", "an end twice"),
        ("keeps the end to itself", "before the end"),
        ("swallows what is raised", "did not raise what take raised"),
        ("reads ahead", ""),
        ("loses what a cancelled read_each had", ""),
        ("starves others in read_each", "in 50 times read_each another task had"),
        ("returns from an abort as if nothing was", "without a word|did not wake read_each"),
        ("cannot end", ""),
        ("aborts where it should close", "reset"),
        ("sleeps through an abort", ""),
    ],
)
async def test_the_checker_finds_every_broken_promise(fault: str, says: str) -> None:
    async def make_pair() -> DriverPair:
        there, back = _Direction(65536, 4096), _Direction(65536, 4096)
        a, b = Rotten(back, there), Rotten(there, back)
        a.fault = b.fault = fault
        return a, b

    if not fault:
        await check_driver(make_pair)
        return
    with pytest.raises((AssertionError, TimeoutError, LinkLost), match=says or None):
        # What says nothing hangs, and need not do so for long; what says something must have the time to.
        await check_driver(make_pair, timeout=30 if says else 0.15, stall=0.001)


async def test_the_checker_finds_memory_without_bound() -> None:
    async def make_pair() -> DriverPair:
        return memory_drivers(capacity=1 << 40)

    with pytest.raises(AssertionError, match="bytes were taken for a peer that reads none"):
        await check_driver(make_pair, flood_limit=1 << 20)
