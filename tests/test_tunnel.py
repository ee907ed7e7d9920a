"""The tunnel, over real sockets and a real link that is cut: what programs do with their connections is carried."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest

from towline.endpoint import Endpoint
from towline.errors import ConnectFailed, EndpointError, HandshakeRefused, LinkLost, StackError
from towline.layers.encryption import Encryption
from towline.layers.encryption.keys import AllowList, Psk, StaticKey, StaticKeys
from towline.layers.framing import Framing
from towline.layers.heartbeat import Heartbeat
from towline.layers.resume import Resume, State
from towline.layers.retry import Retry
from towline.link import Link
from towline.policies import Backoff
from towline.service import Dial
from towline.stack import Stack
from towline.stage import Driver
from towline.testing import ChaosProxy
from towline.transport import Listener
from towline.transports import Tcp, Unix
from towline.tunnel import Entrance, Exit, check, forward, listen

pytestmark = pytest.mark.real_time

LOOPBACK = "tcp://127.0.0.1:0"
PSK = Psk(bytes(range(200, 232)))


def make_stack(**resume: Any) -> Stack:
    return Stack(
        Resume(**resume),
        Retry(Backoff.exponential(initial=0.02, cap=0.1)),
        Heartbeat(interval=0.1, timeout=0.4),
        Framing(),
        Encryption(psk=PSK),
    )


class Target:
    """A server program: accepts connections and gives them one by one."""

    def __init__(self, listener: Listener) -> None:
        self.endpoint = listener.endpoint
        self.drivers: list[Driver] = []
        self._give, self._take = anyio.create_memory_object_stream[Driver](1000)

    def accept(self, link: Link) -> None:
        self.drivers.append(link.driver)
        self._give.send_nowait(link.driver)

    async def connection(self) -> Driver:
        with anyio.fail_after(10):
            return await self._take.receive()

    def close(self) -> None:
        for driver in self.drivers:
            driver.abort()
        self._give.close()
        self._take.close()


@asynccontextmanager
async def open_target(endpoint: str | Endpoint = LOOPBACK) -> AsyncGenerator[Target]:
    parsed = Endpoint.parse(endpoint)
    listener = await (Unix() if parsed.scheme == "unix" else Tcp()).listen(parsed)
    target = Target(listener)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, target.accept)
        try:
            yield target
        finally:
            await listener.aclose()
            target.close()
            tasks.cancel_scope.cancel()


@dataclass
class Tunnel:
    target: Target
    exit: Exit
    proxy: ChaosProxy
    entrance: Entrance
    programs: list[Driver]

    async def connect(self) -> Driver:
        """A program connects."""
        endpoint = self.entrance.endpoint
        link = await (Unix() if endpoint.scheme == "unix" else Tcp())(Dial(endpoint))
        self.programs.append(link.driver)
        return link.driver

    async def pair(self) -> tuple[Driver, Driver]:
        """A program's end, and the server program's end."""
        return await self.connect(), await self.target.connection()


@asynccontextmanager
async def open_tunnel(
    *,
    cut_every: float | None = None,
    local: str = LOOPBACK,
    target_at: str | Endpoint = LOOPBACK,
    resume: dict[str, Any] | None = None,
    **options: Any,
) -> AsyncGenerator[Tunnel]:
    stack = make_stack(**(resume or {}))
    async with (
        open_target(target_at) as target,
        listen(stack, LOOPBACK, target.endpoint) as exit_,
        ChaosProxy(exit_.endpoint, seed=7, cut_every=cut_every) as proxy,
        forward(stack, local, proxy.endpoint, **options) as entrance,
    ):
        tunnel = Tunnel(target, exit_, proxy, entrance, [])
        try:
            yield tunnel
        finally:
            for driver in tunnel.programs:
                driver.abort()


async def read_all(driver: Driver) -> bytes:
    data = bytearray()
    with anyio.fail_after(20):
        while part := await driver.read():
            data += part
    return bytes(data)


async def assert_reset(driver: Driver) -> None:
    """Whatever was still under way may come; the end is a reset, and never clean."""
    with anyio.fail_after(10), pytest.raises(LinkLost):
        await read_all(driver)
    driver.abort()  # a broken socket, too, must be closed


async def eventually(true: Callable[[], bool]) -> None:
    with anyio.fail_after(10):
        while not true():  # noqa: ASYNC110 -- of what has no event to wait for
            await anyio.sleep(0.01)


# --- both directions, and their ends -------------------------------------------------------------------------------


@pytest.mark.smoke
async def test_bytes_go_both_ways() -> None:
    async with open_tunnel() as tunnel:
        program, server = await tunnel.pair()
        await program.write(b"question")
        assert await server.read() == b"question"
        await server.write(b"answer")
        assert await program.read() == b"answer"


@pytest.mark.parametrize("cut_every", [None, 0.05])
async def test_a_half_closed_connection_still_delivers(cut_every: float | None) -> None:
    question = random.Random(1).randbytes(3_000_000)
    async with open_tunnel(cut_every=cut_every) as tunnel:
        program, server = await tunnel.pair()
        async with anyio.create_task_group() as tasks:

            async def ask() -> None:
                await program.write(question)
                await program.send_eof()

            async def answer() -> None:
                received = await read_all(server)
                await anyio.sleep(0.2)  # with one direction ended, the other one lives on through cuts
                await server.write(hashlib.sha256(received).digest() + received)
                await server.send_eof()

            tasks.start_soon(ask)
            tasks.start_soon(answer)
            assert await read_all(program) == hashlib.sha256(question).digest() + question
        await eventually(lambda: not tunnel.exit.sessions)
        await eventually(lambda: tunnel.entrance.connections == 0)
        assert (tunnel.proxy.cuts > 0) == (cut_every is not None)


async def test_a_server_that_ends_first_still_receives() -> None:
    async with open_tunnel() as tunnel:
        program, server = await tunnel.pair()
        await server.write(b"welcome and goodbye")
        await server.send_eof()
        assert await read_all(program) == b"welcome and goodbye"
        await program.write(b"one more thing")
        await program.send_eof()
        assert await read_all(server) == b"one more thing"


async def test_a_reset_by_the_program_is_a_reset_at_the_server() -> None:
    async with open_tunnel() as tunnel:
        program, server = await tunnel.pair()
        await program.write(b"x")
        assert await server.read() == b"x"
        program.abort()
        await assert_reset(server)
        await eventually(lambda: not tunnel.exit.sessions)


async def test_a_reset_by_the_server_is_a_reset_at_the_program() -> None:
    async with open_tunnel() as tunnel:
        program, server = await tunnel.pair()
        await server.write(b"x")
        assert await program.read() == b"x"
        server.abort()
        await assert_reset(program)
        await eventually(lambda: tunnel.entrance.connections == 0)


async def test_a_reset_while_the_link_is_down_is_carried_when_it_is_back() -> None:
    async with open_tunnel() as tunnel:
        program, server = await tunnel.pair()
        tunnel.proxy.is_open = False
        tunnel.proxy.cut_now("reset")
        await eventually(lambda: tunnel.exit.sessions[0].state is State.DETACHED)
        program.abort()
        await eventually(lambda: tunnel.entrance.connections == 0)
        tunnel.proxy.is_open = True
        await assert_reset(server)


# --- losses --------------------------------------------------------------------------------------------------------


async def test_a_lost_session_resets_both_connections(caplog: pytest.LogCaptureFixture) -> None:
    async with open_tunnel(resume={"ttl": 0.3}, retry_for=0.3) as tunnel:
        program, server = await tunnel.pair()
        await program.write(b"hello")
        assert await server.read() == b"hello"
        tunnel.proxy.is_open = False
        tunnel.proxy.cut_now("reset")
        await assert_reset(program)
        await assert_reset(server)
    assert "the program's connection is reset: no way back was found within 0.3 s" in caplog.text


async def test_a_lost_session_on_a_unix_socket_is_said_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    local = Endpoint("unix", path=str(tmp_path / "local"))
    async with open_tunnel(local=str(local), retry_for=0.3) as tunnel:
        program, _ = await tunnel.pair()
        tunnel.proxy.is_open = False
        tunnel.proxy.cut_now("reset")
        with contextlib.suppress(LinkLost):
            assert await read_all(program) == b""
    assert "has no reset, so the program sees the end of its stream" in caplog.text


async def test_both_ends_may_be_unix_sockets(tmp_path: Path) -> None:
    local, target = (Endpoint("unix", path=str(tmp_path / name)) for name in ("local", "target"))
    async with open_tunnel(local=str(local), target_at=target, cut_every=0.1) as tunnel:
        program, server = await tunnel.pair()
        await program.write(b"over a socket file")
        await program.send_eof()
        assert await read_all(server) == b"over a socket file"
        await server.write(b"and back")
        await server.aclose()
        assert await read_all(program) == b"and back"


async def test_a_target_that_cannot_be_reached_is_a_reset_and_one_line(caplog: pytest.LogCaptureFixture) -> None:
    async with open_target() as gone:
        pass
    stack = make_stack()
    async with (
        listen(stack, LOOPBACK, gone.endpoint) as exit_,
        forward(stack, LOOPBACK, exit_.endpoint) as entrance,
    ):
        program = (await Tcp()(Dial(entrance.endpoint))).driver
        await assert_reset(program)
        await eventually(lambda: entrance.connections == 0 and not exit_.sessions)
        lines = [each for each in caplog.records if each.levelno >= logging.WARNING]
        assert len(lines) == 2, caplog.text  # one at each end
        assert f"its target cannot be reached: {gone.endpoint} cannot be reached" in caplog.text
        async with open_target(gone.endpoint) as target:
            program = (await Tcp()(Dial(entrance.endpoint))).driver
            await target.connection()  # both ends live on
            program.abort()


async def test_an_unreachable_far_end_is_a_reset_and_the_entrance_lives_on(caplog: pytest.LogCaptureFixture) -> None:
    async with open_tunnel(resume={"attach_timeout": 0.3}) as tunnel:
        tunnel.proxy.is_open = False
        program = await tunnel.connect()
        await assert_reset(program)
        assert sum(each.levelno >= logging.WARNING for each in caplog.records) == 1, caplog.text
        tunnel.proxy.is_open = True
        program, server = await tunnel.pair()
        await program.write(b"again")
        assert await server.read() == b"again"


# --- limits --------------------------------------------------------------------------------------------------------


async def test_a_server_that_does_not_read_makes_the_program_wait() -> None:
    limit = 1 << 20
    async with open_tunnel(resume={"buffer": limit, "window": limit, "max_message": limit // 4}) as tunnel:
        program, server = await tunnel.pair()
        block = random.Random(3).randbytes(1 << 20)
        sent = hashlib.sha256()
        async with anyio.create_task_group() as tasks:
            with anyio.move_on_after(30) as patience:
                while True:
                    with anyio.move_on_after(0.5) as stalled:
                        await program.write(block)
                    sent.update(block)
                    if stalled.cancelled_caught:  # the rest of the block is still in the driver
                        break
            assert not patience.cancelled_caught, "the program never had to wait"
            (near,), (far,) = tunnel.entrance.sessions, tunnel.exit.sessions
            assert near.buffered <= limit
            assert far.held <= 2 * limit
            stalled_at = program.accepted
            await anyio.sleep(0.3)
            assert program.accepted == stalled_at

            async def finish() -> None:
                await program.write(b"")
                await program.send_eof()

            tasks.start_soon(finish)
            received = hashlib.sha256()
            with anyio.fail_after(20):
                while data := await server.read():
                    received.update(data)
            assert received.digest() == sent.digest()


async def test_many_connections_at_once_through_cuts() -> None:
    async with open_tunnel(cut_every=0.15) as tunnel:

        async def serve() -> None:
            while True:
                connection = await tunnel.target.connection()
                tasks.start_soon(echo, connection)

        async def echo(connection: Driver) -> None:
            while data := await connection.read():
                await connection.write(data)
            await connection.send_eof()
            await connection.aclose()

        async def use(number: int) -> None:
            program = await tunnel.connect()
            content = random.Random(number).randbytes(5_000 * number)
            async with anyio.create_task_group() as both:

                async def send() -> None:
                    for start in range(0, len(content), 4_096):
                        await program.write(content[start : start + 4_096])
                    await program.send_eof()

                both.start_soon(send)
                assert await read_all(program) == content
            done.append(number)

        done: list[int] = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(serve)
            async with anyio.create_task_group() as programs:
                for number in range(60):
                    programs.start_soon(use, number)
            tasks.cancel_scope.cancel()
        assert sorted(done) == list(range(60))
        await eventually(lambda: tunnel.entrance.connections == 0)


async def test_connections_above_the_limit_are_reset(caplog: pytest.LogCaptureFixture) -> None:
    async with open_tunnel(max_connections=1) as tunnel:
        program, server = await tunnel.pair()
        for _ in range(3):
            with contextlib.suppress(ConnectFailed):  # reset before we even know that we are connected
                await assert_reset(await tunnel.connect())
        await program.write(b"still here")
        assert await server.read() == b"still here"
    assert caplog.text.count("those above are reset") == 1


# --- what an operator does -----------------------------------------------------------------------------------------


async def test_reconnect_moves_every_session_to_a_new_link() -> None:
    async with open_tunnel() as tunnel:
        program, server = await tunnel.pair()
        assert tunnel.proxy.connections == 1
        assert tunnel.entrance.reconnect() == 1
        await eventually(lambda: tunnel.proxy.connections == 2 and tunnel.exit.sessions[0].statistics.resumes == 1)
        await program.write(b"over the new link")
        assert await server.read() == b"over the new link"


async def test_drain_lets_connections_finish() -> None:
    async with open_tunnel() as tunnel:
        program, server = await tunnel.pair()
        cut_off: list[int] = []

        async def drain() -> None:
            cut_off.append(await tunnel.entrance.drain(10))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(drain)
            # It stops listening at once. (Not wait_all_tasks_blocked: with heartbeats there may be no such moment.)
            await anyio.sleep(0.05)
            with pytest.raises(ConnectFailed):
                await tunnel.connect()
            await program.write(b"last words")
            await program.send_eof()
            assert await read_all(server) == b"last words"
            await server.aclose()
            assert await read_all(program) == b""
        assert cut_off == [0]


async def test_drain_cuts_off_what_does_not_finish(caplog: pytest.LogCaptureFixture) -> None:
    async with open_tunnel() as tunnel:
        program, server = await tunnel.pair()
        assert await tunnel.entrance.drain(0.1) == 1
        await assert_reset(program)
        await assert_reset(server)
    assert "connections that were cut off: 1" in caplog.text


async def test_draining_the_exit_cuts_off_what_does_not_finish() -> None:
    async with open_tunnel() as tunnel:
        program, server = await tunnel.pair()
        assert await tunnel.exit.drain(0.1) == 1
        await assert_reset(program)
        await assert_reset(server)


async def test_leaving_the_blocks_resets_what_is_connected() -> None:
    async with open_target() as target:
        stack = make_stack()
        async with listen(stack, LOOPBACK, target.endpoint) as exit_:
            async with forward(stack, LOOPBACK, exit_.endpoint) as entrance:
                program = (await Tcp()(Dial(entrance.endpoint))).driver
                server = await target.connection()
            await assert_reset(program)
            await assert_reset(server)


async def test_a_revoked_key_ends_its_sessions_only() -> None:
    anna, bert, host = StaticKey.generate(), StaticKey.generate(), StaticKey.generate()

    def stack(key: StaticKey, *allowed: StaticKey) -> Stack:
        trust = AllowList([each.public_key for each in allowed])
        return Stack(Resume(), Retry(), Heartbeat(), Framing(), Encryption(keys=StaticKeys(key, trust=trust)))

    async with (
        open_target() as target,
        listen(stack(host, anna, bert), LOOPBACK, target.endpoint) as exit_,
        forward(stack(anna, host), LOOPBACK, exit_.endpoint) as annas,
        forward(stack(bert, host), LOOPBACK, exit_.endpoint) as berts,
    ):
        first = (await Tcp()(Dial(annas.endpoint))).driver
        await target.connection()
        second = (await Tcp()(Dial(berts.endpoint))).driver
        server = await target.connection()
        assert exit_.revoke([anna.public_key]) == 1
        await assert_reset(first)
        await second.write(b"still welcome")
        assert await server.read() == b"still welcome"
        second.abort()


# --- the way, and what is wrong from the start ---------------------------------------------------------------------


async def test_check_is_let_in_and_connects_to_no_target() -> None:
    async with open_tunnel() as tunnel:
        await check(make_stack(), tunnel.exit.endpoint)
        await anyio.sleep(0.1)
        assert not tunnel.target.drivers


async def test_check_says_that_the_key_is_wrong() -> None:
    async with open_tunnel() as tunnel:
        other = Stack(
            Resume(), Retry(), Heartbeat(interval=0.1, timeout=0.4), Framing(), Encryption(psk=Psk.generate())
        )
        with pytest.raises(HandshakeRefused):
            await check(other, tunnel.exit.endpoint)


async def test_a_tunnel_needs_sessions() -> None:
    with pytest.raises(StackError, match="put Resume into it"):
        async with listen(Stack(Framing()), LOOPBACK, "tcp://127.0.0.1:1"):
            pass
    with pytest.raises(StackError, match="put Resume into it"):
        async with forward(Stack(Framing()), LOOPBACK, "tcp://127.0.0.1:1"):
            pass


@pytest.mark.parametrize("target", ["memory://there", "tcp://127.0.0.1:0", "tcp://*:80", "nonsense"])
async def test_a_target_that_nobody_can_connect_to_is_an_error_at_once(target: str) -> None:
    with pytest.raises(EndpointError):
        async with listen(make_stack(), LOOPBACK, target):
            pass


async def test_a_port_in_use_is_an_error_at_once() -> None:
    async with open_target() as target:
        with pytest.raises(ConnectFailed):
            async with forward(make_stack(), target.endpoint, "tcp://127.0.0.1:1"):
                pass
