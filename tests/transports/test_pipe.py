"""Windows named pipes: all of ours runs on a stand-in for Windows; on Windows, on the real thing as well."""

from __future__ import annotations

import logging
import random
import sys
import threading
from dataclasses import dataclass, field

import anyio
import anyio.lowlevel
import pytest

from towline.endpoint import Endpoint
from towline.errors import ConnectFailed, EndpointError, LinkLost
from towline.link import Link
from towline.service import Dial
from towline.testing import check_transport
from towline.transports import _winpipe as win
from towline.transports import pipe as pipe_module
from towline.transports._winpipe import Operation, describe
from towline.transports.pipe import Pipe, PipeDriver, _PipeListener

pytestmark = pytest.mark.real_time

ENDPOINT = Endpoint.parse("pipe://towline-test")
PATH = r"\\.\pipe\towline-test"


# --- a stand-in for Windows ---------------------------------------------------------------------------------


@dataclass
class Instance:
    """One instance of a pipe. Side 0 is the server's, side 1 the client's."""

    path: str
    size: int
    open: list[bool] = field(default_factory=lambda: [True, False])
    disconnected: bool = False
    incoming: list[bytearray] = field(default_factory=lambda: [bytearray(), bytearray()])  # by who reads


@dataclass
class Started:
    """An operation, as the system sees it."""

    kind: str
    handle: int
    operation: Operation
    code: int | None = None
    n: int = 0


class MockWindows:
    """Behaves as Windows does with named pipes, and checks what Windows would only punish.

    Args:
        seed: decides which operations that could be complete at once are said to be pending.
    """

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._changed = threading.Condition()
        self._next = 100
        self.handles: dict[int, tuple[Instance, int]] = {}
        self._pending: list[Started] = []
        self.prepared = 0
        self.fail: dict[str, list[int]] = {}  # by the name of a call, the codes that it gives next

    def _scripted(self, call: str) -> int:
        codes = self.fail.get(call)
        return codes.pop(0) if codes else 0

    def _new_handle(self, instance: Instance, side: int) -> int:
        self._next += 4
        self.handles[self._next] = (instance, side)
        return self._next

    def _instances(self, path: str) -> list[Instance]:
        return [instance for instance, side in self.handles.values() if side == 0 and instance.path == path]

    def create_named_pipe(self, path: str, *, first: bool, instances: int, size: int) -> tuple[int, int]:
        with self._changed:
            if code := self._scripted("create_named_pipe"):
                return 0, code
            there = self._instances(path)
            if first and there:
                return 0, win.ACCESS_DENIED
            if len(there) >= instances:
                return 0, win.PIPE_BUSY
            return self._new_handle(Instance(path, size), 0), 0

    def create_file(self, path: str) -> tuple[int, int]:
        with self._changed:
            if code := self._scripted("create_file"):
                return 0, code
            there = self._instances(path)
            if not there:
                return 0, win.FILE_NOT_FOUND
            for instance in there:
                if not instance.open[1] and not instance.disconnected and not instance.incoming[0]:
                    instance.open[1] = True
                    handle = self._new_handle(instance, 1)
                    self._progress()
                    return handle, 0
            return 0, win.PIPE_BUSY

    def prepare(self, operation: Operation) -> int:
        with self._changed:
            if code := self._scripted("prepare"):
                return code
            self.prepared += 1
            return 0

    def connect_named_pipe(self, handle: int, operation: Operation) -> int:
        return self._start("connect", handle, operation)

    def read_file(self, handle: int, operation: Operation) -> int:
        return self._start("read", handle, operation)

    def write_file(self, handle: int, operation: Operation) -> int:
        return self._start("write", handle, operation)

    def _start(self, kind: str, handle: int, operation: Operation) -> int:
        with self._changed:
            if code := self._scripted(kind):
                return code
            instance, _ = self.handles[handle]
            if kind == "connect":
                if instance.disconnected:
                    instance.disconnected = False
                elif instance.open[1]:
                    return win.PIPE_CONNECTED
            started = Started(kind, handle, operation)
            operation.native = started
            self._advance(started)
            if started.code is None:
                self._pending.append(started)
                self._progress()
                return win.IO_PENDING
            self._progress()
            if started.code:
                operation.native = None
                return started.code  # it failed at once: no operation ever was
            return win.IO_PENDING if self._random.random() < 0.3 else 0

    def _advance(self, started: Started) -> bool:
        """Do what can be done; whether that was anything."""
        instance, side = self.handles[started.handle]
        buffer = started.operation.buffer
        if started.kind == "connect":
            started.code = 0 if instance.open[1] else None
        elif instance.disconnected:
            started.code = win.PIPE_NOT_CONNECTED
        elif started.kind == "read":
            incoming = instance.incoming[side]
            if incoming:
                started.n = min(len(incoming), len(buffer))
                buffer[: started.n] = incoming[: started.n]
                del incoming[: started.n]
                started.code = 0
            elif not instance.open[1 - side]:
                started.code = win.BROKEN_PIPE
        else:
            outgoing = instance.incoming[1 - side]
            if not instance.open[1 - side]:
                started.code = win.NO_DATA
                return True
            room = instance.size - len(outgoing)
            part = buffer[started.n : started.n + room]
            outgoing += part
            started.n += len(part)
            if started.n == len(buffer):
                started.code = 0
            return bool(part)
        return started.code is not None

    def _progress(self) -> None:
        while [started for started in self._pending if self._advance(started)]:
            self._pending = [started for started in self._pending if started.code is None]
        self._changed.notify_all()

    def result(self, handle: int, operation: Operation) -> tuple[int, int]:
        started: Started = operation.native
        with self._changed:
            assert self._changed.wait_for(lambda: started.code is not None, timeout=20), "it never ends"
            assert started.code is not None
            if code := self._scripted(f"{started.kind} completes"):
                return code, 0
            return started.code, started.n if started.code == 0 else 0

    def cancel(self, handle: int, operation: Operation | None) -> None:
        with self._changed:
            for started in self._pending:
                if started.handle == handle and operation in (None, started.operation):
                    started.code = win.OPERATION_ABORTED
            self._pending = [started for started in self._pending if started.code is None]
            self._changed.notify_all()

    def release(self, operation: Operation) -> None:
        with self._changed:
            self.prepared -= 1
            started: Started | None = operation.native
            assert started is None or started.code is not None, "the system still writes into this buffer"
            operation.native = None

    def disconnect_named_pipe(self, handle: int) -> None:
        with self._changed:
            instance, side = self.handles[handle]
            assert side == 0, "a client cannot disconnect"
            instance.disconnected = True
            instance.open[1] = False
            for incoming in instance.incoming:
                incoming.clear()
            self._progress()

    def close_handle(self, handle: int) -> None:
        with self._changed:
            assert not any(started.handle == handle for started in self._pending), "closed while in use"
            instance, side = self.handles.pop(handle)
            instance.open[side] = False
            self._progress()


@pytest.fixture
def windows() -> MockWindows:
    return MockWindows()


def pipe(windows: MockWindows, *, connect_timeout: float = 10, max_links: int = 64) -> Pipe:
    return Pipe(api=windows, connect_timeout=connect_timeout, max_links=max_links)


async def joined(windows: MockWindows) -> tuple[PipeDriver, PipeDriver]:
    """The client's driver and the server's."""
    transport = pipe(windows)
    listener = await transport.listen(ENDPOINT)
    links = [await transport(Dial(ENDPOINT))]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, links.append)
        while len(links) < 2:
            await anyio.lowlevel.checkpoint()
        await listener.aclose()
    a, b = (link.driver for link in links)
    assert isinstance(a, PipeDriver)
    assert isinstance(b, PipeDriver)
    return a, b


@pytest.mark.parametrize("seed", range(3))
async def test_pipes_keep_the_contract_of_a_transport(seed: int) -> None:
    windows = MockWindows(seed)
    await check_transport(pipe(windows), ENDPOINT, half_close=False)
    assert windows.handles == {}, "a handle was left open"
    assert windows.prepared == 0, "an operation was not released"


# --- listening ----------------------------------------------------------------------------------------------


async def test_a_name_that_exists_is_in_use(windows: MockWindows) -> None:
    listener = await pipe(windows).listen(ENDPOINT)
    with pytest.raises(ConnectFailed, match=f"^{ENDPOINT} is in use$"):
        await pipe(windows).listen(ENDPOINT)
    await listener.aclose()


async def test_a_pipe_that_cannot_be_made_says_why(windows: MockWindows) -> None:
    windows.fail["create_named_pipe"] = [1314]
    with pytest.raises(ConnectFailed, match=r"cannot be made: the system refuses \(Windows error 1314\)"):
        await pipe(windows).listen(ENDPOINT)


async def test_a_client_that_came_and_went_is_no_link(windows: MockWindows) -> None:
    transport = pipe(windows)
    listener = await transport.listen(ENDPOINT)
    windows.fail["connect"] = [win.NO_DATA]
    links: list[Link] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, links.append)
        await anyio.wait_all_tasks_blocked()
        assert links == []
        (await transport(Dial(ENDPOINT))).abort(LinkLost("done"))
        while not links:
            await anyio.lowlevel.checkpoint()
        await listener.aclose()
    links[0].abort(LinkLost("done"))
    assert windows.handles == {}


async def test_f46_accepting_goes_on_after_any_error_and_says_so_once(
    windows: MockWindows, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pipe_module, "_ACCEPT_PAUSE", 0.001)
    transport = pipe(windows)
    listener = await transport.listen(ENDPOINT)
    assert isinstance(listener, _PipeListener)
    first = listener._waiting
    windows.fail = {"connect": [win.SEM_TIMEOUT], "create_named_pipe": [8], "prepare": [8]}
    links: list[Link] = []
    with caplog.at_level(logging.ERROR):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, links.append)
            with anyio.fail_after(5):
                while listener._waiting is first:  # noqa: ASYNC110 -- a stand-in has no events
                    await anyio.sleep(0.001)
            assert not any(windows.fail.values())
            links.append(await transport(Dial(ENDPOINT)))
            while len(links) < 2:
                await anyio.lowlevel.checkpoint()
            await listener.aclose()
    assert len(caplog.records) == 1
    for link in links:
        link.abort(LinkLost("done"))
    assert windows.handles == {}


async def test_a_listener_takes_no_more_than_max_links_and_goes_on_when_one_ends(
    windows: MockWindows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe_module, "_ACCEPT_PAUSE", 0.001)
    transport = pipe(windows, max_links=2)
    listener = await transport.listen(ENDPOINT)
    ours: list[Link] = []
    links: list[Link] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, links.append)
        ours += [await transport(Dial(ENDPOINT)) for _ in range(2)]
        with pytest.raises(ConnectFailed, match=r"within 0\.03 s: all instances of the pipe are in use"):
            await pipe(windows, connect_timeout=0.03)(Dial(ENDPOINT))
        links[0].abort(LinkLost("one ends"))
        ours.append(await transport(Dial(ENDPOINT)))
        while len(links) < 3:
            await anyio.lowlevel.checkpoint()
        await listener.aclose()
    for link in (*ours, *links):
        link.abort(LinkLost("done"))
    assert windows.handles == {}


@pytest.mark.parametrize("after", range(8))
async def test_a_serve_that_is_cancelled_loses_no_client(windows: MockWindows, after: int) -> None:
    transport = pipe(windows)
    listener = await transport.listen(ENDPOINT)
    ours: list[Link] = []
    links: list[Link] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, links.append)
        await anyio.wait_all_tasks_blocked()
        ours.append(await transport(Dial(ENDPOINT)))
        for _ in range(after):
            await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, links.append)
        while not links:
            await anyio.lowlevel.checkpoint()
        await listener.aclose()
    assert len(links) == 1
    for link in (*ours, *links):
        link.abort(LinkLost("done"))
    assert windows.handles == {}


# --- dialling -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "why"),
    [(win.FILE_NOT_FOUND, "nobody listens on it"), (win.ACCESS_DENIED, "access denied"), (53, "the system refuses")],
)
async def test_a_dial_says_why_it_failed(windows: MockWindows, code: int, why: str) -> None:
    windows.fail["create_file"] = [code]
    with pytest.raises(
        ConnectFailed, match=rf"^pipe://towline-test cannot be reached: {why} \(Windows error {code}\)$"
    ):
        await pipe(windows)(Dial(ENDPOINT))


async def test_a_busy_pipe_is_tried_again(windows: MockWindows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe_module, "_BUSY_PAUSE", 0.001)
    listener = await pipe(windows).listen(ENDPOINT)
    windows.fail["create_file"] = [win.PIPE_BUSY] * 3
    link = await pipe(windows)(Dial(ENDPOINT))
    assert windows.fail["create_file"] == []
    link.abort(LinkLost("done"))
    await listener.aclose()


async def test_foreign_endpoints_are_refused(windows: MockWindows) -> None:
    with pytest.raises(EndpointError, match="Pipe serves pipe://name"):
        await pipe(windows)(Dial(Endpoint.parse("tcp://localhost:1")))


@pytest.mark.skipif(sys.platform == "win32", reason="there they exist")
async def test_elsewhere_than_on_windows_there_are_no_pipes() -> None:
    with pytest.raises(EndpointError, match="named pipes exist on Windows only"):
        await Pipe().listen(ENDPOINT)


@pytest.mark.parametrize("links", [0, 255])
def test_windows_has_its_own_limit_of_instances(links: int) -> None:
    with pytest.raises(ValueError, match=f"max_links is {links}, where Windows takes 1 to 254"):
        Pipe(max_links=links)


# --- moving bytes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("code", [win.PIPE_NOT_CONNECTED, win.NO_DATA, win.SEM_TIMEOUT, 995, 64, 10053])
async def test_f46_odd_errors_are_a_lost_link(windows: MockWindows, code: int, at_once: bool) -> None:
    a, b = await joined(windows)
    await b.write(b"x")
    suffix = "" if at_once else " completes"
    windows.fail = {f"read{suffix}": [code], f"write{suffix}": [code]}
    with pytest.raises(LinkLost, match=rf"Windows error {code}"):
        await a.read()
    with pytest.raises(LinkLost, match=rf"Windows error {code}"):
        await a.write(b"x")
    a.abort()
    b.abort()
    assert windows.handles == {}


@pytest.mark.parametrize("code", [win.BROKEN_PIPE, win.HANDLE_EOF])
async def test_the_other_ends_close_is_an_end(windows: MockWindows, code: int) -> None:
    a, b = await joined(windows)
    windows.fail = {"read": [code]}
    assert await a.read() == b""
    a.abort()
    b.abort()


async def test_f46_no_resources_for_an_operation_are_a_lost_link(windows: MockWindows) -> None:
    a, b = await joined(windows)
    windows.fail = {"prepare": [1450]}
    with pytest.raises(LinkLost, match="1450"):
        await a.read()
    a.abort()
    b.abort()


async def test_f51_a_write_goes_on_where_a_partial_one_ended(windows: MockWindows) -> None:
    a, b = await joined(windows)
    sent = bytes(range(256)) * 1024
    real = windows.result

    def one_byte_less(handle: int, operation: Operation) -> tuple[int, int]:
        code, n = real(handle, operation)
        started = windows.handles[handle]
        if started == windows.handles[a._handle._handle] and n == 65536:
            del started[0].incoming[0][-1:]  # the last byte was not taken after all
            n -= 1
        return code, n

    got = bytearray()
    windows.result = one_byte_less  # type: ignore[method-assign]
    for at in range(0, len(sent), 65536):
        await a.write(sent[at : at + 65536])
        while len(got) < at + 65536:
            got += await b.read()
    assert bytes(got) == sent
    assert a.accepted == len(sent)
    a.abort()
    b.abort()


async def test_a_write_that_was_cancelled_in_the_middle_ends_the_link(windows: MockWindows) -> None:
    a, b = await joined(windows)
    with anyio.move_on_after(0.02) as scope:
        await a.write(bytes(200_000))
    assert scope.cancelled_caught
    with pytest.raises(LinkLost, match="cancelled in the middle"):
        await a.write(b"more")
    a.abort()
    b.abort()


async def test_a_client_sees_that_the_server_aborted(windows: MockWindows) -> None:
    client, server = await joined(windows)
    await server.write(b"never read")
    server.abort()
    with pytest.raises(LinkLost, match="disconnected"):
        await client.read()
    client.abort()


def test_codes_are_described_in_words() -> None:
    assert describe(win.PIPE_BUSY) == "all instances of the pipe are in use (Windows error 231)"
    assert describe(4711) == "the system refuses (Windows error 4711)"


@pytest.mark.skipif(sys.platform == "win32", reason="there it is one")
def test_kernel32_says_when_there_is_none() -> None:
    with pytest.raises(OSError, match="no kernel32"):
        win.Kernel32()


@pytest.mark.skipif(sys.platform != "win32", reason="needs Windows")
async def test_real_pipes_keep_the_contract_of_a_transport() -> None:
    await check_transport(Pipe(), Endpoint.parse(f"pipe://towline-test-{random.getrandbits(64):x}"), half_close=False)
