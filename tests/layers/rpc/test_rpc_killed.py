"""A server that is killed and started again, while calls are under way."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from towline import (
    Backoff,
    ConnectionLost,
    Encryption,
    Framing,
    Heartbeat,
    Psk,
    Reconnect,
    Request,
    Resume,
    Retry,
    Rpc,
    Stack,
    StandardPolicy,
)

pytestmark = [
    pytest.mark.real_time,
    pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL"),
]

KEY = bytes(range(32))
LIVES = 4
CALLERS = 40

SERVER = """
import os, sys, anyio
from towline import *

life, endpoint, log = sys.argv[1], sys.argv[2], os.open(sys.argv[3], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
stack = Stack(Rpc(), Resume(), Heartbeat(), Framing(), Encryption(psk=Psk(bytes(range(32)))))

async def answer(request):
    os.write(log, f"{life} {request.payload.decode()}\\n".encode())
    await anyio.sleep(0.01)
    return Response(request.payload)

async def main():
    async with stack.serve(endpoint, answer):
        print("up", flush=True)
        await anyio.sleep_forever()

anyio.run(main)
"""


@asynccontextmanager
async def server(life: int, endpoint: str, log: Path) -> AsyncGenerator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", SERVER, str(life), endpoint, str(log)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220 - killed even when cancelled
    try:
        assert process.stdout is not None
        assert await anyio.to_thread.run_sync(process.stdout.readline) == "up\n"
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


@pytest.mark.timeout(120)
async def test_when_the_server_is_killed_reads_are_repeated_writes_fail_once_and_nothing_hangs(tmp_path: Path) -> None:
    endpoint, log = f"unix://{tmp_path / 's'}", tmp_path / "log"
    client = Stack(
        Retry(
            StandardPolicy(
                Backoff.constant(0.05),
                on=ConnectionLost,
                idempotent=lambda request: request.method == "read",
                max_attempts=20,
                budget=None,
            )
        ),
        Reconnect(endpoint, backoff=Backoff.constant(0.05)),
        Rpc(),
        Resume(),
        Retry(StandardPolicy(Backoff.constant(0.05), max_elapsed=0.5)),
        Heartbeat(),
        Framing(),
        Encryption(psk=Psk(KEY)),
    )
    answered: Counter[str] = Counter()
    failed: dict[str, Exception] = {}
    made: list[str] = []
    is_over = False
    running, all_over = CALLERS, anyio.Event()

    async def caller(number: int) -> None:
        nonlocal running
        count = 0
        while not is_over:
            method = ("read", "write")[count % 2]
            name = f"{method}-{number}-{count}"
            count += 1
            made.append(name)
            try:
                answer = await call(Request(method, name.encode()))
            except ConnectionLost as error:
                failed[name] = error
            else:
                assert answer.payload == name.encode()
                answered[name] += 1
        running -= 1
        if not running:
            all_over.set()

    with anyio.fail_after(60):
        async with client.open() as call, anyio.create_task_group() as tasks:
            for number in range(CALLERS):
                tasks.start_soon(caller, number)
            for life in range(LIVES):
                async with server(life, endpoint, log):
                    await anyio.sleep(0.7)
                    if life == LIVES - 1:
                        is_over = True
                        await all_over.wait()

    assert len(made) > 1000
    assert set(answered) | set(failed) == set(made)
    assert set(answered) & set(failed) == set()
    assert {name.partition("-")[0] for name in failed} == {"write"}
    assert {getattr(error, "sent", None) for error in failed.values()} == {True}
    runs = Counter(line.partition(" ")[2] for line in log.read_text().splitlines())
    in_one_life = Counter(log.read_text().splitlines())
    assert set(in_one_life.values()) == {1}
    writes = {name: count for name, count in runs.items() if name.startswith("write")}
    assert set(writes.values()) == {1}  # in all lives together
    assert set(answered) <= set(runs)
