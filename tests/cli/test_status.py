"""How a tunnel stands, as values, and the socket over which it is asked and steered, on both backends."""

from __future__ import annotations

import os
import socket
import stat
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import anyio
import pytest

from towline import Framing, Heartbeat, Resume, Retry, Rpc, Stack
from towline.cli import _top
from towline.cli._admin import (
    DrainRequest,
    Orders,
    ReconnectRequest,
    named_errors,
    open_admin,
    serve_admin,
    socket_at,
)
from towline.cli._failure import FAILED, GAVE_UP, REFUSED, USAGE, Failure
from towline.cli._operate import Operating
from towline.cli._status import Snapshot, Watch, summary
from towline.cli._top import changes
from towline.endpoint import Endpoint
from towline.errors import LinkLost
from towline.layers.encryption import Encryption
from towline.layers.encryption.keys import Psk
from towline.layers.rpc import router, service
from towline.link import Link
from towline.policies import Backoff
from towline.scope import plain_task_group
from towline.service import Dial
from towline.stage import Driver
from towline.testing import ChaosProxy
from towline.transports import Tcp, Unix
from towline.tunnel import Entrance, Exit, forward, listen

pytestmark = pytest.mark.real_time

LOOPBACK = "tcp://127.0.0.1:0"
A_CUT = 1.0
"""Within so many seconds a cut must be seen."""


def make_stack() -> Stack:
    return Stack(
        Resume(buffer=1 << 20, max_message=1 << 16),
        Retry(Backoff.exponential(initial=0.02, cap=0.1)),
        Heartbeat(interval=0.1, timeout=0.4),
        Framing(),
        Encryption(psk=Psk(bytes(range(32)))),
    )


@dataclass
class Tunnel:
    exit: Exit
    entrance: Entrance
    proxy: ChaosProxy

    async def connect(self) -> Driver:
        """A program's connection, when both ends carry it."""
        count = len(self.exit.carried)
        link = await Tcp()(Dial(self.entrance.endpoint))
        await until(lambda: len(self.exit.carried) == len(self.entrance.carried) == count + 1)
        return link.driver


@asynccontextmanager
async def open_tunnel() -> AsyncGenerator[Tunnel]:
    """A tunnel to a server that sends back what it gets."""
    listener = await Tcp().listen(Endpoint.parse(LOOPBACK))

    async def echo(driver: Driver) -> None:
        try:
            while data := await driver.read():
                await driver.write(data)
            await driver.aclose()
        except LinkLost:
            pass
        finally:
            driver.abort()

    async with plain_task_group() as tasks:

        def accepted(link: Link) -> None:
            tasks.start_soon(echo, link.driver)

        tasks.start_soon(listener.serve, accepted)
        stack = make_stack()
        try:
            async with (
                listen(stack, LOOPBACK, listener.endpoint) as exit_,
                ChaosProxy(exit_.endpoint) as proxy,
                forward(stack, LOOPBACK, proxy.endpoint) as entrance,
            ):
                yield Tunnel(exit_, entrance, proxy)
        finally:
            tasks.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await listener.aclose()


async def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    with anyio.fail_after(seconds):
        while not true():  # noqa: ASYNC110 -- what counts has no event
            await anyio.sleep(0.01)


async def ask(driver: Driver, data: bytes) -> None:
    await driver.write(data)
    got = b""
    with anyio.fail_after(20):
        while len(got) < len(data):
            got += await driver.read()
    assert got == data


# --- the values ----------------------------------------------------------------------------------------------------


async def test_a_snapshot_says_what_both_ends_carry() -> None:
    async with open_tunnel() as tunnel:
        far, near = Watch(tunnel.exit), Watch(tunnel.entrance)
        assert (near.snapshot.attached, near.snapshot.sessions, summary(near.snapshot)) == (0, [], "0 sessions")
        driver = await tunnel.connect()
        await ask(driver, b"x" * 5000)
        await ask(driver, b"y" * 3000)
        at_exit, at_entrance = far.refresh(), near.refresh()
        assert (at_exit.role, at_exit.target) == ("listen", str(tunnel.exit.to))
        assert (at_entrance.role, at_entrance.target) == ("forward", str(tunnel.proxy.endpoint))
        assert at_entrance.endpoint == str(tunnel.entrance.endpoint)
        (there,), (here,) = at_exit.sessions, at_entrance.sessions
        assert there.id == here.id
        assert len(here.id) == 8
        for session in (there, here):
            assert (session.state, session.sent, session.received) == ("attached", 8000, 8000)
            assert (session.cuts, session.last_error, session.detached_for) == (0, "", None)
            assert session.buffer == 1 << 20
            assert 0 < session.credit <= 8 << 20
            assert session.peer == "127.0.0.1"
        assert at_entrance.send_rate > 0
        assert here.send_rate > 0
        await until(lambda: near.refresh().sessions[0].rtt is not None)
        driver.abort()


async def test_a_cut_is_counted_with_its_reason_and_nothing_is_counted_twice() -> None:
    async with open_tunnel() as tunnel:
        watch = Watch(tunnel.entrance)
        driver = await tunnel.connect()
        await ask(driver, b"x" * 1000)
        tunnel.proxy.is_open = False
        tunnel.proxy.cut_now("reset")
        await until(lambda: watch.refresh().detached == 1)
        (session,) = watch.snapshot.sessions
        assert (session.state, session.cuts, session.rtt) == ("detached", 1, None)
        assert session.detached_for is not None
        assert session.last_error
        assert summary(watch.snapshot) == "1 session, 1 without a link"
        await driver.write(b"y" * 1000)
        await until(lambda: watch.refresh().sessions[0].buffered > 1000)
        tunnel.proxy.is_open = True
        got = b""
        while len(got) < 1000:
            got += await driver.read()
        await until(lambda: watch.refresh().attached == 1)
        (session,) = watch.snapshot.sessions
        assert (session.sent, session.received) == (2000, 2000), "what is sent again counts once"
        assert session.resumes == 1
        assert session.detached_for is None
        driver.abort()


async def test_totals_never_sink_and_keep_what_is_over() -> None:
    async with open_tunnel() as tunnel:
        watch = Watch(tunnel.exit)
        seen: list[tuple[int, int, int]] = []

        async def look() -> None:
            while True:
                now = watch.refresh()
                seen.append((now.sessions_begun, now.sent, now.cuts))
                await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(look)
            for number in range(3):
                driver = await tunnel.connect()
                await ask(driver, b"x" * 100)
                tunnel.proxy.cut_now("reset")
                cuts = number + 1
                await until(lambda cuts=cuts: watch.snapshot.cuts == cuts)  # type: ignore[misc]
                await driver.send_eof()
                assert await driver.read() == b""
                driver.abort()
                await until(lambda: not tunnel.exit.carried)
            tasks.cancel_scope.cancel()
        for counts in zip(*seen, strict=True):
            assert list(counts) == sorted(counts)
        assert seen[-1] == (3, 300, 3)


async def test_connections_without_a_session_are_counted() -> None:
    async with open_tunnel() as tunnel:
        tunnel.proxy.is_open = False
        link = await Tcp()(Dial(tunnel.entrance.endpoint))
        watch = Watch(tunnel.entrance)
        await until(lambda: watch.refresh().waiting == 1)
        assert summary(watch.snapshot) == "0 sessions, 1 waiting"
        link.driver.abort()


async def test_a_snapshot_has_a_bounded_number_of_sessions_those_without_a_link_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("towline.cli._status.MAX_SHOWN", 2)
    async with open_tunnel() as tunnel:
        drivers = [await tunnel.connect() for _ in range(3)]
        oldest, _, newest = (each.short_id for each in tunnel.exit.carried)
        watch = Watch(tunnel.exit)
        tunnel.exit.carried[2].drop_link(LinkLost("gone"))
        tunnel.proxy.is_open = False
        await until(lambda: watch.refresh().detached == 1)
        assert [each.id for each in watch.snapshot.sessions] == [newest, oldest]
        assert (watch.snapshot.attached, watch.snapshot.detached) == (2, 1)
        for driver in drivers:
            driver.abort()


async def test_changes_say_what_happened() -> None:
    async with open_tunnel() as tunnel:
        watch = Watch(tunnel.entrance)
        before = watch.snapshot
        assert [change.text for change in changes(None, before)] == [f"watching forward {tunnel.entrance.endpoint}"]
        driver = await tunnel.connect()
        begun = watch.refresh()
        name = begun.sessions[0].id
        assert [change.text for change in changes(before, begun)] == [f"{name} began (127.0.0.1)"]
        assert changes(begun, begun) == []
        tunnel.proxy.cut_now("reset")
        await until(lambda: watch.refresh().resumes == 1)
        lost, found = changes(begun, watch.snapshot)
        assert lost.text.startswith(f"{name} lost its link: ")
        assert found.text == f"{name} goes on over a new link, 0 messages were sent again"
        driver.abort()
        resumed = watch.snapshot
        await until(lambda: not watch.refresh().sessions)
        assert [change.text for change in changes(resumed, watch.snapshot)] == [f"{name} is over"]


# --- the socket ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def open_socket(tmp_path: Path, end: Exit | Entrance) -> AsyncGenerator[tuple[Endpoint, Orders]]:
    endpoint = Endpoint("unix", path=str(tmp_path / "admin"))
    watch, orders = Watch(end), Orders()
    async with anyio.create_task_group() as tasks, serve_admin(endpoint, watch, orders):
        tasks.start_soon(watch.run)
        yield endpoint, orders
        tasks.cancel_scope.cancel()


async def test_the_socket_is_its_owners_alone(tmp_path: Path) -> None:
    async with open_tunnel() as tunnel:
        async with open_socket(tmp_path, tunnel.exit):
            assert stat.S_IMODE((tmp_path / "admin").stat().st_mode) == 0o600
        assert not (tmp_path / "admin").exists()


async def test_a_stale_socket_file_is_replaced_and_one_in_use_is_not(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(tmp_path / "admin"))
    async with open_tunnel() as tunnel, open_socket(tmp_path, tunnel.exit) as (endpoint, _):
        async with open_admin(endpoint) as admin:
            assert (await admin.snapshot()).role == "listen"
        with pytest.raises(Exception, match="is in use: another listener has it"):
            async with serve_admin(endpoint, Watch(tunnel.exit), Orders()):
                pass


async def test_who_follows_sees_a_cut_within_a_second(tmp_path: Path) -> None:
    async with open_tunnel() as tunnel, open_socket(tmp_path, tunnel.entrance) as (endpoint, _):
        driver = await tunnel.connect()
        async with open_admin(endpoint) as admin:
            snapshots = admin.follow()
            await anext(snapshots)
            tunnel.proxy.is_open = False
            tunnel.proxy.cut_now("reset")
            with anyio.fail_after(A_CUT * 5):  # a busy machine
                cut_at = anyio.current_time()
                while (await anext(snapshots)).detached == 0:
                    pass
            print(f"seen after {anyio.current_time() - cut_at:.3f} s")
            tunnel.proxy.is_open = True
            while (await anext(snapshots)).attached == 0:
                pass
        driver.abort()


@pytest.mark.parametrize("end", ["exit", "entrance"])
async def test_reconnect_gives_one_session_or_all_a_new_link(end: str, tmp_path: Path) -> None:
    async with open_tunnel() as tunnel:
        drivers = [await tunnel.connect() for _ in range(2)]
        async with open_socket(tmp_path, getattr(tunnel, end)) as (endpoint, _), open_admin(endpoint) as admin:
            first, second = tunnel.entrance.carried
            assert await admin.reconnect(ReconnectRequest(first.short_id)) == 1
            await until(lambda: first.epoch == 2 and first.attachment is not None)
            assert second.epoch == 1
            assert await admin.reconnect(ReconnectRequest()) == 2
            await until(lambda: (first.epoch, second.epoch) == (3, 2))
            with pytest.raises(Failure, match="there is no session 00000000") as failure, named_errors(endpoint):
                await admin.reconnect(ReconnectRequest("00000000"))
            assert failure.value.code == FAILED
        for driver in drivers:
            await ask(driver, b"still here")
            driver.abort()


async def test_drain_is_asked_for_once_and_everybody_hears_how_it_went(tmp_path: Path) -> None:
    async with open_tunnel() as tunnel:
        answers: list[int] = []
        async with open_socket(tmp_path, tunnel.exit) as (endpoint, orders):

            async def ask_for_it(timeout: float) -> None:
                async with open_admin(endpoint) as admin:
                    answers.append(await admin.drain(DrainRequest(timeout)))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(ask_for_it, 7.0)
                with anyio.fail_after(20):
                    await orders.asked.wait()
                assert orders.timeout == 7.0
                tasks.start_soon(ask_for_it, 9.0)
                await anyio.sleep(0.1)
                assert answers == []
                orders.drained(3)
        assert answers == [3, 3]
        assert orders.timeout == 7.0


async def test_the_last_answers_arrive_and_who_follows_is_let_go(tmp_path: Path) -> None:
    async with open_tunnel() as tunnel:
        ended: list[str] = []
        async with anyio.create_task_group() as tasks, anyio.create_task_group() as clients:
            endpoint = Endpoint("unix", path=str(tmp_path / "admin"))
            watch, orders = Watch(tunnel.exit), Orders()

            async def follow() -> None:
                async with open_admin(endpoint) as admin:
                    async for _ in admin.follow():
                        pass
                ended.append("follow")

            async def drain() -> None:
                async with open_admin(endpoint) as admin:
                    ended.append(f"drain {await admin.drain(DrainRequest(1.0))}")

            async with serve_admin(endpoint, watch, orders):
                tasks.start_soon(watch.run)
                clients.start_soon(follow)
                clients.start_soon(drain)
                with anyio.fail_after(20):
                    await orders.asked.wait()
                orders.drained(0)
            tasks.cancel_scope.cancel()
        assert sorted(ended) == ["drain 0", "follow"]


async def test_top_bounds_each_answer_and_not_the_whole_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_top, "ANSWER_TIMEOUT", 0.6)
    seen: list[float] = []
    gone: list[str] = []

    class View:
        def show(self, snapshot: Snapshot) -> None:
            seen.append(snapshot.uptime)

        def gone(self, why: str) -> None:
            gone.append(why)

    async with open_tunnel() as tunnel, anyio.create_task_group() as tasks:
        endpoint = Endpoint("unix", path=str(tmp_path / "admin"))
        watch = Watch(tunnel.exit)
        async with serve_admin(endpoint, watch, Orders()), anyio.create_task_group() as looks:
            looks.start_soon(watch.run)
            tasks.start_soon(_top._watch, endpoint, View())
            await until(lambda: seen != [] and seen[-1] > 1.5)
            assert gone == []
            looks.cancel_scope.cancel()  # it hangs
            await until(lambda: gone != [])
            assert "it does not answer" in gone[0]
        tasks.cancel_scope.cancel()


# --- what is not there, not ours, or not like us -------------------------------------------------------------------


@asynccontextmanager
async def failing(code: int, match: str, endpoint: Endpoint) -> AsyncGenerator[None]:
    with pytest.raises(Failure, match=match) as failure, named_errors(endpoint), anyio.fail_after(1.0):
        yield
    assert failure.value.code == code
    assert "\n" not in str(failure.value)


async def test_no_such_socket_and_nobody_behind_it(tmp_path: Path) -> None:
    endpoint = socket_at("SOCKET", str(tmp_path / "nothing"))
    async with failing(GAVE_UP, "no towline answers there: .*no such socket file", endpoint), open_admin(endpoint):
        pass
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(endpoint.path)
    async with failing(GAVE_UP, "no towline answers there: .*nobody listens", endpoint), open_admin(endpoint):
        pass


@pytest.mark.parametrize("answer", ["silence", "the end", "HTTP"])
async def test_what_is_no_towline(answer: str, tmp_path: Path) -> None:
    endpoint = socket_at("SOCKET", str(tmp_path / "other"))
    listener = await Unix().listen(endpoint)

    async def talk(driver: Driver) -> None:
        try:
            if answer == "HTTP":
                await driver.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            if answer == "silence":
                await anyio.sleep_forever()
        finally:
            driver.abort()

    async with anyio.create_task_group() as tasks:

        def accepted(link: Link) -> None:
            tasks.start_soon(talk, link.driver)

        tasks.start_soon(listener.serve, accepted)
        async with failing(REFUSED, "is not the admin socket of a towline", endpoint), open_admin(endpoint) as admin:
            await admin.snapshot()
        tasks.cancel_scope.cancel()
    await listener.aclose()


async def test_the_endpoint_of_the_tunnel_itself_is_not_its_admin_socket(tmp_path: Path) -> None:
    endpoint = Endpoint("unix", path=str(tmp_path / "link"))
    async with (
        listen(make_stack(), endpoint, "tcp://127.0.0.1:9"),
        failing(REFUSED, "is not the admin socket of a towline", endpoint),
        open_admin(endpoint) as admin,
    ):
        await admin.snapshot()


@service(name="towline.admin.v2")
class AdminOfTomorrow(Protocol):
    async def snapshot(self) -> str: ...


class _Tomorrow:
    async def snapshot(self) -> str:
        return "all is well"


async def test_another_version_says_so(tmp_path: Path) -> None:
    endpoint = Endpoint("unix", path=str(tmp_path / "admin"))
    async with (
        Stack(Rpc(), Framing()).serve(endpoint, router(AdminOfTomorrow)(_Tomorrow())),
        failing(REFUSED, "another version of this protocol", endpoint),
        open_admin(endpoint) as admin,
    ):
        await admin.snapshot()


async def test_a_field_more_is_no_other_version(tmp_path: Path) -> None:
    fields: dict[str, object] = dict.fromkeys(Snapshot.__dataclass_fields__, 0)
    fields |= {"is_draining": False, "sessions": [], "new": "x"}
    texts = dict.fromkeys(("role", "endpoint", "target", "version"), "x")

    @service(name="towline.admin.v1")
    class Newer(Protocol):
        async def snapshot(self) -> dict[str, object]: ...

    class Implemented:
        async def snapshot(self) -> dict[str, object]:
            return {**fields, **texts}

    endpoint = Endpoint("unix", path=str(tmp_path / "admin"))
    async with Stack(Rpc(), Framing()).serve(endpoint, router(Newer)(Implemented())), open_admin(endpoint) as admin:
        assert (await admin.snapshot()).role == "x"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, to become somebody else")
async def test_another_user_is_not_let_in(tmp_path: Path) -> None:
    """Neither by the file's mode, nor, where somebody has widened that, by who it is."""
    directory = Path("/tmp") / f"towline-test-{os.getpid()}"
    directory.mkdir(mode=0o755)
    try:
        async with open_tunnel() as tunnel, open_socket(directory, tunnel.exit) as (endpoint, _):

            async def try_as_nobody() -> tuple[int, str]:
                code = (  # once as who may, which imports all that somebody else may not be able to read
                    "import os, sys, rich; from towline.cli import main; ask = ['sessions', sys.argv[1]];"
                    "assert main(ask) == 0; os.setgid(65534); os.setuid(65534); sys.exit(main(ask))"
                )
                done = await anyio.run_process([sys.executable, "-c", code, endpoint.path], check=False)
                return done.returncode, done.stderr.decode().splitlines()[-1]

            code, text = await try_as_nobody()
            assert code == REFUSED, text
            assert "belongs to another user" in text
            (directory / "admin").chmod(0o666)
            code, text = await try_as_nobody()
            assert code == REFUSED, text
            assert "does not let this user in" in text
    finally:
        directory.rmdir()


# --- what is typed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "/x/", "tcp://127.0.0.1:1", "unix://relative", "nonsense://x"])
def test_what_names_no_socket_is_refused(text: str) -> None:
    with pytest.raises(Failure, match="SOCKET: ") as failure:
        socket_at("SOCKET", text)
    assert failure.value.code == USAGE


def test_a_path_is_relative_to_where_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert socket_at("SOCKET", "admin").path == str(tmp_path / "admin")
    assert socket_at("SOCKET", f"unix://{tmp_path}/x").path == f"{tmp_path}/x"


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("9090", "tcp://127.0.0.1:9090"),
        ("0", "tcp://127.0.0.1:0"),
        ("localhost:9090", "tcp://localhost:9090"),
        ("[::1]:9090", "tcp://[::1]:9090"),
        ("tcp://0.0.0.0:1", "tcp://0.0.0.0:1"),
        ("*:1", "tcp://*:1"),
    ],
)
def test_where_http_is_answered(text: str, endpoint: str) -> None:
    assert str(Operating.checked(None, text).metrics) == endpoint


@pytest.mark.parametrize("text", ["", "x", "localhost", "99999", "unix:///x", "127.0.0.1:x", "a b:1"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(Failure, match=r"--metrics: .* is not an address: write HOST:PORT, or PORT for 127\.0\.0\.1"):
        Operating.checked(None, text)
