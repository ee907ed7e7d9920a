"""Standard streams as links: ours, and those of a program that is started for it."""

from __future__ import annotations

import asyncio
import contextvars
import os
import shutil
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import pytest
import sniffio

from towline.endpoint import Endpoint
from towline.errors import ConnectFailed, EndpointError, LinkLost
from towline.link import Link
from towline.service import Dial, Side
from towline.testing import DriverPair, check_driver
from towline.transports.stdio import PipeFds, Stdio, _Child

pytestmark = [
    pytest.mark.real_time,
    pytest.mark.skipif(sys.platform == "win32", reason="POSIX only"),
]

STDIO = Endpoint.parse("stdio://")
CAT = Endpoint("exec", path=shutil.which("cat") or "/bin/cat")


def python(code: str) -> Endpoint:
    return Endpoint("exec", path=sys.executable, args=("-u", "-c", code))


async def pipes() -> DriverPair:
    there, back = os.pipe(), os.pipe()
    return PipeFds(back[0], there[1]), PipeFds(there[0], back[1])


async def sockets() -> DriverPair:
    """Each end has one socket under two numbers, as inetd gives it."""
    ends = socket.socketpair()
    a, b = (PipeFds(os.dup(end.fileno()), os.dup(end.fileno())) for end in ends)
    for end in ends:
        end.close()
    return a, b


@pytest.mark.parametrize("make_pair", [pipes, sockets])
async def test_descriptors_keep_the_contract_of_a_driver(
    make_pair: Callable[[], Awaitable[DriverPair]],
) -> None:
    await check_driver(make_pair)


async def test_a_file_can_be_read_to_its_end(tmp_path: Path) -> None:
    await anyio.Path(tmp_path / "in").write_bytes(b"from a file")
    driver = PipeFds(os.open(tmp_path / "in", os.O_RDONLY), os.open(tmp_path / "out", os.O_CREAT | os.O_WRONLY))
    assert await driver.read() == b"from a file"
    assert await driver.read() == b""
    await driver.write(b"to a file")
    await driver.aclose()
    assert await anyio.Path(tmp_path / "out").read_bytes() == b"to a file"


async def test_a_file_that_no_event_loop_can_wait_for_is_read_each_all_the_same(tmp_path: Path) -> None:
    await anyio.Path(tmp_path / "in").write_bytes(b"from a file")
    driver = PipeFds(os.open(tmp_path / "in", os.O_RDONLY), os.open(tmp_path / "out", os.O_CREAT | os.O_WRONLY))
    got: list[bytes] = []

    def take(data: bytes) -> bool:
        got.append(data)
        return True

    await driver.read_each(take)
    assert got == [b"from a file", b""]
    await driver.aclose()


async def test_an_abort_from_outside_any_task_wakes_who_reads_a_pipe() -> None:
    """A pipe cannot be shut down, so the loop has to be told."""
    if sniffio.current_async_library() != "asyncio":
        pytest.skip("trio knows its loop from anywhere in the thread")
    driver, peer = await pipes()

    async def read() -> None:
        with pytest.raises(LinkLost):
            await driver.read_each(lambda _: True)

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            await anyio.wait_all_tasks_blocked()
            asyncio.get_running_loop().call_soon(driver.abort, context=contextvars.Context())
    peer.abort()


@pytest.mark.parametrize("clean", [False, True])
async def test_what_was_blocking_is_blocking_again(clean: bool) -> None:
    there, back = os.pipe(), os.pipe()
    kept = os.dup(there[0])
    driver = PipeFds(there[0], back[1])
    assert not os.get_blocking(kept)
    os.close(there[1])
    if clean:
        await driver.aclose()
    else:
        driver.abort()
    assert os.get_blocking(kept)
    for fd in (kept, back[0]):
        os.close(fd)


async def test_one_terminal_that_is_both_streams_is_put_back_too() -> None:
    a, b = socket.socketpair()
    with a, b:
        PipeFds(os.dup(a.fileno()), os.dup(a.fileno())).abort()
        assert os.get_blocking(a.fileno())


# --- stdio:// -----------------------------------------------------------------------------------------------


class Streams:
    """Stand-ins for descriptors 0 and 1, and their other ends."""

    def __init__(self) -> None:
        self.stdin, into = os.pipe()
        out, self.stdout = os.pipe()
        self.peer = PipeFds(out, into)

    def __enter__(self) -> Streams:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.peer.abort()
        os.close(self.stdin)
        os.close(self.stdout)


async def test_our_own_streams_make_one_link_and_no_second() -> None:
    with Streams() as streams:
        stdio = Stdio(stdin=streams.stdin, stdout=streams.stdout)
        link = await stdio(Dial(STDIO))
        assert link.side is Side.DIALLING
        for again in (lambda: stdio(Dial(STDIO)), lambda: stdio.listen(STDIO)):
            with pytest.raises(ConnectFailed, match="one link, once") as caught:
                await again()
            assert not caught.value.retryable
        await streams.peer.write(b"in")
        assert await link.driver.read() == b"in"
        link.driver.write_now(b"out")
        assert await streams.peer.read() == b"out"
        link.abort(LinkLost("done"))
        assert await streams.peer.read() == b""


async def test_a_stray_print_cannot_get_into_the_link() -> None:
    with Streams() as streams:
        link = await Stdio(stdin=streams.stdin, stdout=streams.stdout)(Dial(STDIO))
        os.write(streams.stdout, b"stray\n")  # goes to stderr
        assert os.read(streams.stdin, 10) == b""
        link.driver.write_now(b"link")
        assert await streams.peer.read() == b"link"
        link.abort(LinkLost("done"))


async def test_listening_serves_one_link_and_ends_with_it() -> None:
    with Streams() as streams:
        listener = await Stdio(stdin=streams.stdin, stdout=streams.stdout).listen(STDIO)
        links: list[Link] = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, links.append)
            await streams.peer.write(b"hello")
            await anyio.wait_all_tasks_blocked()
            (link,) = links
            assert link.side is Side.LISTENING
            assert await link.driver.read() == b"hello"
            link.abort(LinkLost("done"))
        await listener.aclose()


async def test_a_listener_that_is_closed_before_it_serves_leaves_nothing_open() -> None:
    with Streams() as streams:
        listener = await Stdio(stdin=streams.stdin, stdout=streams.stdout).listen(STDIO)
        await listener.aclose()
        assert await streams.peer.read() == b""
        await listener.serve(list[Link]().append)


async def test_streams_that_are_closed_are_one_clear_line() -> None:
    with Streams() as streams:
        stdio = Stdio(stdin=streams.stdin, stdout=9999)
        with pytest.raises(ConnectFailed, match=r"^stdio:// cannot be used: bad file descriptor$"):
            await stdio(Dial(STDIO))


async def test_foreign_endpoints_are_refused() -> None:
    with pytest.raises(EndpointError, match="Stdio serves"):
        await Stdio()(Dial(Endpoint.parse("tcp://localhost:1")))
    with pytest.raises(EndpointError, match="not listened on"):
        await Stdio().listen(CAT)


# --- exec:// ------------------------------------------------------------------------------------------------


def is_a_process(pid: int) -> bool:
    """Whether there is one, a zombie included."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def started(endpoint: Endpoint, *, patience: float = 5) -> _Child:
    driver = (await Stdio(patience=patience)(Dial(endpoint))).driver
    assert isinstance(driver, _Child)
    return driver


async def wait_for_exit(child: _Child) -> int:
    with anyio.fail_after(5):
        while child._process.poll() is None:  # noqa: ASYNC110 -- a thread reaps it
            await anyio.sleep(0.005)
    return child._process.returncode


async def test_a_program_is_a_link_and_exits_by_itself_when_the_link_is_closed() -> None:
    child = await started(CAT)
    await child.write(b"echo")
    assert await child.read() == b"echo"
    await child.send_eof()
    assert await child.read() == b""
    await child.aclose()
    assert child._process.returncode == 0
    await child.aclose()
    child.abort()


async def test_arguments_reach_the_program_as_they_are() -> None:
    code = "import sys; sys.stdout.write('|'.join(sys.argv[1:]))"
    child = await started(Endpoint("exec", path=sys.executable, args=("-c", code, "a b", "$HOME", "*", "")))
    assert await child.read() == b"a b|$HOME|*|"
    await child.aclose()


async def test_an_aborted_link_ends_its_program_and_leaves_no_zombie() -> None:
    child = await started(CAT)
    child.abort()
    child.abort()
    await wait_for_exit(child)
    assert not is_a_process(child._process.pid)


STUBBORN = python(
    "import signal, sys, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "sys.stdout.write('ready')\n"
    "time.sleep(60)\n"
)


async def test_a_program_that_does_not_want_to_end_is_killed_after_an_abort() -> None:
    child = await started(STUBBORN, patience=0.02)
    assert await child.read() == b"ready"
    child.abort()
    assert await wait_for_exit(child) == -9


async def test_a_program_that_does_not_want_to_end_is_killed_by_aclose() -> None:
    child = await started(STUBBORN, patience=0.02)
    child._linger = 0.02
    assert await child.read() == b"ready"
    await child.aclose()
    assert child._process.returncode == -9


async def test_a_close_that_is_cancelled_still_ends_the_program() -> None:
    child = await started(STUBBORN, patience=0.02)
    assert await child.read() == b"ready"
    with anyio.move_on_after(0.01):
        await child.aclose()
    assert await wait_for_exit(child) == -9


async def test_a_program_that_exits_is_the_end_of_the_link() -> None:
    child = await started(python("pass"))
    assert await child.read() == b""
    await wait_for_exit(child)
    with pytest.raises(LinkLost, match="broken pipe"):
        await child.write(b"x")
    await child.aclose()
    assert child._process.returncode == 0


@pytest.mark.parametrize(
    ("path", "why"), [("/no/such/program", "there is no such program"), ("/etc/passwd", "permission denied")]
)
async def test_a_program_that_cannot_be_started_is_one_clear_line(path: str, why: str) -> None:
    with pytest.raises(ConnectFailed, match=f"^{path} cannot be started: {why}$"):
        await Stdio()(Dial(Endpoint("exec", path=path)))


async def test_a_program_that_listens_on_stdio_answers_over_the_link() -> None:
    code = (
        "import anyio\n"
        "from towline.endpoint import Endpoint\n"
        "from towline.transports.stdio import Stdio\n"
        "async def main():\n"
        "    listener = await Stdio().listen(Endpoint.parse('stdio://'))\n"
        "    links = []\n"
        "    async with anyio.create_task_group() as tasks:\n"
        "        tasks.start_soon(listener.serve, links.append)\n"
        "        await anyio.wait_all_tasks_blocked()\n"
        "        driver = links[0].driver\n"
        "        while data := await driver.read():\n"
        "            await driver.write(data.upper())\n"
        "        await driver.aclose()\n"
        "anyio.run(main)\n"
    )
    child = await started(python(code))
    await child.write(b"hello")
    assert await child.read() == b"HELLO"
    await child.aclose()
    assert child._process.returncode == 0
