"""Debian's redis-server, killed and started again, behind a client made of layers around a connection of our own."""

from __future__ import annotations

import itertools
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import anyio
import pytest
from anyio.abc import SocketStream
from anyio.streams.buffered import BufferedByteReceiveStream

from towline import Backoff, Elapsed, Hooks, Reconnect, Retry, Stack, StandardPolicy, Timeout, running
from towline.hooks import StateChanged
from towline.layers import CONNECTION_OVER

pytestmark = [
    pytest.mark.program,
    pytest.mark.real_time,
    pytest.mark.skipif(
        sys.platform == "win32" or shutil.which("redis-server") is None,
        reason="redis-server is not installed (apt-get install redis-server)",
    ),
]

LIVES = 4


class Redis:
    """One connection to Redis: a command a line, an answer a line. What is cancelled in between closes it."""

    def __init__(self, stream: SocketStream) -> None:
        self._stream = stream
        self._received = BufferedByteReceiveStream(stream)
        self._one_at_a_time = anyio.Lock()

    async def __call__(self, command: str, /) -> str:
        async with self._one_at_a_time:
            try:
                await self._stream.send(f"{command}\r\n".encode())
                return (await self._received.receive_until(b"\r\n", 1000)).decode()
            except BaseException:
                await anyio.aclose_forcefully(self._stream)
                raise

    async def __aenter__(self) -> Redis:
        return self

    async def __aexit__(self, *ignored: object) -> None:
        await self._stream.aclose()


async def connect(port: int, /) -> Redis:
    return Redis(await anyio.connect_tcp("127.0.0.1", port))


@contextmanager
def redis(port: int, directory: Path) -> Generator[None]:
    """A server that writes nothing, so that each life begins at zero."""
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(directory)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.send_signal(signal.SIGKILL)


class States(Hooks):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_state_change(self, event: StateChanged, /) -> None:
        self.seen.append(event.new)


@pytest.mark.timeout(120)
async def test_while_redis_is_killed_and_started_again_reads_are_answered_and_no_increment_is_made_twice(
    tmp_path: Path,
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    states = States()
    policy = StandardPolicy(
        Backoff.constant(0.05),
        on=(*CONNECTION_OVER, Elapsed),
        idempotent=lambda command: command == "PING",
        max_attempts=100,
        budget=None,
    )
    client = Stack(
        Retry(policy),
        Timeout(5),
        Reconnect(port, backoff=Backoff.constant(0.05), hooks=states, on=CONNECTION_OVER),
        Timeout(1),
    )
    pings = increments = wanted = 0
    reached = anyio.Event()
    answers: list[int] = []
    is_over = False

    async def reader() -> None:
        nonlocal pings
        while not is_over:
            assert await call("PING") == "+PONG"
            pings += 1
            if pings >= wanted:
                reached.set()

    async def writer() -> None:
        nonlocal increments
        while not is_over:
            increments += 1
            with suppress(*CONNECTION_OVER):  # nobody knows whether it was made; it is not made again
                answers.append(int((await call("INCR n")).removeprefix(":")))

    async with running(client(connect)) as call, anyio.create_task_group() as tasks:
        for _ in range(10):
            tasks.start_soon(reader)
        tasks.start_soon(writer)
        for life in range(LIVES):
            with redis(port, tmp_path):
                await anyio.sleep(0.7)
                wanted, reached = pings + 100, anyio.Event()
                with anyio.fail_after(30):
                    await reached.wait()
                if life == LIVES - 1:
                    is_over = True
                    await anyio.sleep(0.2)
    assert states.seen.count("connected") >= LIVES
    assert len(answers) <= increments
    lives = [n for n, value in enumerate(answers) if not n or value < answers[n - 1]]
    assert len(lives) == LIVES
    # Within a life each answer is one above the last: nothing came between that was made twice.
    assert all(after == before + 1 or after == 1 for before, after in itertools.pairwise(answers))
