"""The service manager: what it is told, over a real socket, and the listening socket that it hands over."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from towline.cli._notify import Notifier
from towline.layers.encryption.keys import Psk

pytestmark = [
    pytest.mark.real_time,
    pytest.mark.skipif(sys.platform == "win32", reason="needs Unix sockets and signals"),
]

COMMAND = (sys.executable, "-m", "towline.cli")

Start = Callable[..., Any]
"""Starts a program whose log is JSON: ``Logged`` of the folder's fixtures."""


class Manager:
    """A service manager's end of the socket."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.socket.settimeout(30.0)
        self.address = address

    def receive(self) -> str:
        return self.socket.recv(4096).decode()

    def wait_for(self, beginning: str) -> str:
        """The next message that begins so; what comes before is passed over."""
        while not (message := self.receive()).startswith(beginning):
            pass
        return message


@pytest.fixture(params=["file", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[Manager]:
    if request.param == "abstract" and sys.platform != "linux":
        pytest.skip("only Linux has abstract sockets")
    made = Manager(str(tmp_path / "notify") if request.param == "file" else f"@towline-{os.getpid()}-{time.time()}")
    yield made
    made.socket.close()


def test_each_message_is_as_systemd_reads_it(manager: Manager) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager.address})
    notifier.ready()
    assert manager.receive() == "READY=1"
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notifier.reloading()
    match = re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=(\d+)", manager.receive())
    assert match is not None
    assert before <= int(match[1]) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notifier.stopping()
    assert manager.receive() == "STOPPING=1"
    notifier.alive()
    assert manager.receive() == "WATCHDOG=1"
    notifier.status("3 sessions\nREADY=1  " + "x" * 999)
    message = manager.receive()
    assert message.startswith("STATUS=3 sessions READY=1 x"), "what is text stays text"
    assert len(message) < 250


def test_nobody_to_tell_is_no_error(tmp_path: Path) -> None:
    for environment in ({}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1"}):
        notifier = Notifier(environment)
        assert not notifier.is_heard
        notifier.ready()
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready()


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({"WATCHDOG_USEC": "3000000"}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "nonsense"}, None),
        ({}, None),
    ],
)
def test_the_watchdog(environment: dict[str, str], seconds: float | None) -> None:
    assert Notifier({"NOTIFY_SOCKET": "/x", **environment}).watchdog == seconds


# --- the program ---------------------------------------------------------------------------------------------------


@pytest.fixture
def psk(tmp_path: Path) -> str:
    path = tmp_path / "psk"
    Psk.generate().write(path)
    return str(path)


def test_a_program_tells_how_it_fares(manager: Manager, start_logged: Start, psk: str) -> None:
    program = start_logged(
        "listen",
        "tcp://127.0.0.1:0",
        "--to",
        "tcp://127.0.0.1:9",
        "--psk-file",
        psk,
        environment={"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "200000"},
    )
    program.ready()
    manager.wait_for("READY=1")
    assert manager.wait_for("STATUS=") == "STATUS=0 sessions"
    began = time.monotonic()
    for _ in range(3):
        manager.wait_for("WATCHDOG=1")
    assert time.monotonic() - began < 10, "a tenth of a second each, on an idle machine"
    program.process.send_signal(signal.SIGHUP)
    assert "MONOTONIC_USEC=" in manager.wait_for("RELOADING=1")
    assert manager.wait_for("READY=1") == "READY=1"
    program.process.send_signal(signal.SIGTERM)
    manager.wait_for("STOPPING=1")
    assert program.process.wait(30) == 0


@pytest.mark.parametrize("family", ["tcp", "unix"])
def test_a_program_serves_on_a_socket_that_it_was_started_with(
    family: str, start_logged: Start, psk: str, tmp_path: Path
) -> None:
    """As under systemd: the socket listens before the program runs, and after it has ended, and nothing is refused."""
    if family == "tcp":
        listening = socket.create_server(("127.0.0.1", 0))
        bound = f"tcp://127.0.0.1:{listening.getsockname()[1]}"
    else:
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(tmp_path / "listening"))
        listening.listen()
        bound = f"unix://{tmp_path}/listening"
    with listening, socket.create_server(("127.0.0.1", 0)) as target:
        for _ in range(2):  # it is restarted, and the socket stays
            number = listening.fileno()
            program = start_logged(
                "listen",
                f"fd://{number}",
                "--to",
                f"tcp://127.0.0.1:{target.getsockname()[1]}",
                "--psk-file",
                psk,
                pass_fds=[number],
                environment={"LISTEN_FDS": "1"},
            )
            assert program.ready() == bound
            ping = start_logged("ping", bound, "--psk-file", psk, "--count", "1", "--interval", "0.05")
            assert ping.process.wait(30) == 0, ping.records()
            assert program.end() == 0
    if family == "unix":
        assert (tmp_path / "listening").exists(), "it belongs to whoever made it"


def test_a_forward_takes_connections_on_a_socket_that_was_handed_over(start_logged: Start, psk: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as target, socket.create_server(("127.0.0.1", 0)) as entrance:
        listen = start_logged(
            "listen", "tcp://127.0.0.1:0", "--to", f"tcp://127.0.0.1:{target.getsockname()[1]}", "--psk-file", psk
        )
        via = listen.ready()
        early = socket.create_connection(entrance.getsockname())  # before anybody accepts
        number = entrance.fileno()
        forward = start_logged("forward", f"fd://{number}", "--via", via, "--psk-file", psk, pass_fds=[number])
        forward.ready()
        target.settimeout(30)
        with early, target.accept()[0] as connection:
            early.sendall(b"hello")
            assert connection.recv(5, socket.MSG_WAITALL) == b"hello"


@pytest.mark.parametrize("what", ["closed", "a file", "not listening", "datagrams"])
def test_what_is_no_listening_socket_is_one_line(what: str, start_logged: Start, psk: str, tmp_path: Path) -> None:
    makers: dict[str, Callable[[], Any]] = {
        "closed": lambda: None,
        "a file": lambda: (tmp_path / "x").open("w"),
        "not listening": socket.socket,
        "datagrams": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    }
    made = makers[what]()
    number = 9 if made is None else made.fileno()
    done = subprocess.run(
        [*COMMAND, "listen", f"fd://{number}", "--to", "tcp://127.0.0.1:9", "--psk-file", psk],
        capture_output=True,
        text=True,
        timeout=60,
        pass_fds=[] if made is None else [number],
    )
    if made is not None:
        made.close()
    assert done.returncode == 1
    assert done.stderr.startswith(f"towline: fd://{number} cannot be used: it ")
    assert done.stderr.count("\n") == 1
