"""Unix sockets: who may connect, and whose file is removed."""

from __future__ import annotations

import os
import socket
import stat
import sys
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from towline.endpoint import Endpoint
from towline.errors import ConnectFailed, EndpointError, LinkLost
from towline.link import Link
from towline.service import Dial
from towline.testing import check_transport
from towline.transports import unix
from towline.transports.unix import Unix

pytestmark = [
    pytest.mark.real_time,
    pytest.mark.skipif(sys.platform == "win32", reason="Python has no Unix sockets on Windows"),
]


@pytest.fixture
def endpoint(tmp_path: Path) -> Endpoint:
    return at(tmp_path / "s")


def at(path: Path) -> Endpoint:
    return Endpoint("unix", path=str(path))


def exists(endpoint: Endpoint) -> bool:
    return os.path.lexists(endpoint.path)


def put(kind: str, path: Path) -> None:
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(path.parent / "elsewhere")


def mode_of(endpoint: Endpoint) -> int:
    return stat.S_IMODE(os.lstat(endpoint.path).st_mode)


async def test_unix_keeps_the_contract_of_a_transport(endpoint: Endpoint) -> None:
    await check_transport(Unix(), endpoint)


# --- the file -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0, 0o022, 0o777])
@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
async def test_the_mode_is_right_before_anybody_can_connect_whatever_the_umask(
    endpoint: Endpoint, mode: int, umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    class Watched(socket.socket):
        def listen(self, backlog: int = 0, /) -> None:
            seen.append(mode_of(endpoint))
            super().listen(backlog)

    monkeypatch.setattr(socket, "socket", Watched)
    before = os.umask(umask)
    try:
        listener = await Unix(mode=mode).listen(endpoint)
    finally:
        os.umask(before)
    assert seen == [mode]
    await listener.aclose()


@pytest.mark.skipif(sys.platform != "linux", reason="a Linux property")
async def test_on_linux_the_file_is_private_from_its_first_moment(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    class Watched(socket.socket):
        def bind(self, address: object, /) -> None:
            super().bind(address)  # type: ignore[arg-type]
            seen.append(mode_of(endpoint))

    monkeypatch.setattr(socket, "socket", Watched)
    before = os.umask(0)
    try:
        listener = await Unix().listen(endpoint)
    finally:
        os.umask(before)
    assert seen == [0o600]
    await listener.aclose()


async def test_the_file_is_removed_with_the_listener(endpoint: Endpoint) -> None:
    listener = await Unix().listen(endpoint)
    assert exists(endpoint)
    await listener.aclose()
    await listener.aclose()
    assert not exists(endpoint)


async def test_a_file_that_took_our_files_place_is_left_alone(endpoint: Endpoint) -> None:
    first = await Unix().listen(endpoint)
    os.unlink(endpoint.path)
    second = await Unix().listen(endpoint)
    await first.aclose()
    link = await Unix()(Dial(endpoint))
    link.abort(LinkLost("done"))
    await second.aclose()


async def test_a_stale_socket_file_is_replaced(endpoint: Endpoint) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(endpoint.path)
    listener = await Unix().listen(endpoint)
    link = await Unix()(Dial(endpoint))
    link.abort(LinkLost("done"))
    await listener.aclose()


async def test_a_socket_that_starts_to_listen_at_the_second_look_is_not_stale(endpoint: Endpoint) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(endpoint.path)
        async with anyio.create_task_group() as tasks:

            async def start() -> None:
                with pytest.raises(ConnectFailed, match="in use"):
                    await Unix().listen(endpoint)

            tasks.start_soon(start)
            await anyio.wait_all_tasks_blocked()
            other.listen()
    os.unlink(endpoint.path)


async def test_a_live_socket_is_in_use(endpoint: Endpoint) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(endpoint.path)
        other.listen()
        with pytest.raises(ConnectFailed, match=f"^{endpoint} is in use: another listener has it$"):
            await Unix().listen(endpoint)
    assert exists(endpoint)


async def test_a_live_socket_with_a_full_backlog_is_in_use(endpoint: Endpoint) -> None:
    with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as caller:
        other.bind(endpoint.path)
        other.listen(0)
        caller.connect(endpoint.path)
        with pytest.raises(ConnectFailed, match="in use"):
            await Unix().listen(endpoint)


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
async def test_what_is_no_socket_is_never_removed(endpoint: Endpoint, kind: str) -> None:
    put(kind, Path(endpoint.path))
    with pytest.raises(ConnectFailed, match="no socket"):
        await Unix().listen(endpoint)
    assert exists(endpoint)


# --- where it may be ----------------------------------------------------------------------------------------


async def test_a_path_that_is_too_long_is_refused_with_both_numbers(tmp_path: Path) -> None:
    endpoint = at(Path("/tmp") / ("x" * 200))
    for use in (lambda: Unix()(Dial(endpoint)), lambda: Unix().listen(endpoint)):
        with pytest.raises(EndpointError, match=rf"205 bytes, where a socket's may have {unix._MAX_PATH}"):
            await use()


async def test_the_longest_path_works(tmp_path: Path) -> None:
    room = unix._MAX_PATH - len(os.fsencode(tmp_path)) - 1
    if room < 1:
        pytest.skip("the temporary directory has too long a name")
    endpoint = at(tmp_path / ("x" * room))
    listener = await Unix().listen(endpoint)
    link = await Unix()(Dial(endpoint))
    link.abort(LinkLost("done"))
    await listener.aclose()


async def test_case_57_a_directory_in_which_anybody_may_replace_the_file_is_refused(tmp_path: Path) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with pytest.raises(EndpointError, match=r"anybody may replace files in .*/open \(mode 0777\)"):
        await Unix().listen(at(open_to_all / "s"))
    open_to_all.chmod(0o1777)
    listener = await Unix().listen(at(open_to_all / "s"))
    await listener.aclose()


async def test_a_directory_that_is_missing_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConnectFailed, match=r"its directory cannot be used: no such file"):
        await Unix().listen(at(tmp_path / "none" / "s"))


# --- who may connect ----------------------------------------------------------------------------------------


async def first_read(transport: Unix, endpoint: Endpoint) -> bytes:
    """What a dialler reads first, from a listener that says hello to whomever it admits."""
    listener = await transport.listen(endpoint)

    def hello(link: Link) -> None:
        link.driver.write_now(b"hello")
        links.append(link)

    links: list[Link] = []
    got = b""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, hello)
        ours = await transport(Dial(endpoint))
        got = await ours.driver.read()
        links.append(ours)
        for link in links:
            link.abort(LinkLost("done"))
        await listener.aclose()
    return got


@pytest.mark.parametrize(
    ("transport", "uid", "admitted"),
    [
        (Unix(), os.geteuid(), True),
        (Unix(), 0, True),
        (Unix(), 4242, False),
        (Unix(allow_uids=[4242]), 4242, True),
        (Unix(allow_uids=[4242]), 4243, False),
        (Unix(allow_uids=[]), os.geteuid(), False),
        (Unix(allow_uids="any"), 4242, True),
        (Unix(), None, True),
    ],
)
async def test_case_57_only_the_users_that_are_allowed_get_in(
    endpoint: Endpoint, transport: Unix, uid: int | None, admitted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unix, "peer_uid", lambda sock: uid)  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
    assert await first_read(transport, endpoint) == (b"hello" if admitted else b"")


@pytest.mark.parametrize(
    ("transport", "uid", "is_asked"),
    [
        (Unix(), 4242, True),
        (Unix(listener_uids=None), os.geteuid(), True),
        (Unix(listener_uids=None), 0, True),
        (Unix(listener_uids=None), 4242, False),
        (Unix(listener_uids=[4242]), 4242, True),
        (Unix(listener_uids=None), None, True),
    ],
)
async def test_nobody_else_is_asked_in_the_place_of_the_listener(
    endpoint: Endpoint, transport: Unix, uid: int | None, is_asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = await Unix().listen(endpoint)
    monkeypatch.setattr(unix, "peer_uid", lambda sock: uid)  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
    if is_asked:
        (await transport(Dial(endpoint))).abort(LinkLost("done"))
    else:
        with pytest.raises(ConnectFailed, match=r"it is listened on by another user \(uid 4242\)"):
            await transport(Dial(endpoint))
    await listener.aclose()


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="who the peer is cannot be known here")
def test_the_kernel_says_who_the_peer_is() -> None:
    a, b = socket.socketpair()
    with a, b:
        assert unix.peer_uid(a) == os.geteuid()


async def test_a_refused_user_is_logged_once(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(unix, "peer_uid", lambda sock: 4242)  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
    listener = await Unix().listen(endpoint)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, list[Link]().append)
        for _ in range(3):
            link = await Unix()(Dial(endpoint))
            assert await link.driver.read() == b""
            link.abort(LinkLost("done"))
        await listener.aclose()
    assert [record.getMessage() for record in caplog.records] == [f"{endpoint}: refused a connection of uid 4242"]


async def test_a_link_over_a_unix_socket_has_no_source(endpoint: Endpoint) -> None:
    listener = await Unix().listen(endpoint)
    links = [await Unix()(Dial(endpoint))]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, links.append)
        while len(links) < 2:
            await anyio.lowlevel.checkpoint()
        await listener.aclose()
    assert [link.source for link in links] == ["", ""]
    for link in links:
        link.abort(LinkLost("done"))


# --- dialling -----------------------------------------------------------------------------------------------


async def test_a_dial_says_why_it_failed(endpoint: Endpoint) -> None:
    with pytest.raises(ConnectFailed, match=f"^{endpoint} cannot be reached: there is no such socket file$"):
        await Unix()(Dial(endpoint))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(endpoint.path)
    with pytest.raises(ConnectFailed, match="nobody listens on it"):
        await Unix()(Dial(endpoint))
    os.unlink(endpoint.path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(endpoint.path)
        with pytest.raises(ConnectFailed, match="not a stream socket"):
            await Unix()(Dial(endpoint))


async def test_a_dial_waits_for_room_in_a_full_backlog_within_its_timeout(endpoint: Endpoint) -> None:
    with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as caller:
        other.bind(endpoint.path)
        other.listen(0)
        caller.connect(endpoint.path)
        with pytest.raises(ConnectFailed, match=r"within 0\.05 s: its listener accepts nothing"):
            await Unix(connect_timeout=0.05)(Dial(endpoint))
        async with anyio.create_task_group() as tasks:

            async def dial() -> None:
                (await Unix()(Dial(endpoint))).abort(LinkLost("done"))

            tasks.start_soon(dial)
            await anyio.wait_all_tasks_blocked()
            other.accept()[0].close()
