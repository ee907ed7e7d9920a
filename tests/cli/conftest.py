"""A tunnel that runs, as two programs with a link between them that can be cut, for the tests of what watches it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import anyio.from_thread
import pytest
from anyio.from_thread import BlockingPortal

from towline.layers.encryption.keys import Psk
from towline.testing import ChaosProxy

PATIENCE = 30.0
"""Seconds for what takes one on an idle machine."""

COMMAND = (sys.executable, "-m", "towline.cli")


def wait_until(true: Callable[[], bool], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


class Logged:
    """A program whose log is JSON, in a file."""

    def __init__(self, log: Path, *arguments: str, environment: dict[str, str] | None = None, **options: Any) -> None:
        self._log = log
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [*COMMAND, *arguments, "--log-format", "json", "-v"],
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, **(environment or {})},
                **options,
            )

    def ready(self) -> str:
        """Wait until it serves; gives its endpoint."""
        assert self.process.stdout is not None
        line: str = self.process.stdout.readline().decode()
        assert line.startswith("listening on "), self._log.read_text()
        return line.split()[-1]

    def records(self, event: str = "") -> list[dict[str, Any]]:
        """What it has logged, each line parsed."""
        lines = self._log.read_text().splitlines(keepends=True)
        found = [json.loads(line) for line in lines if line.endswith("\n")]
        return [each for each in found if event in ("", each.get("event"))]

    def record(self, event: str) -> dict[str, Any]:
        """Wait for an event in the log."""
        wait_until(lambda: bool(self.records(event)))
        found: dict[str, Any] = self.records(event)[0]
        return found

    @property
    def site(self) -> str:
        """Where it answers HTTP."""
        return str(self.record("web.listening")["endpoint"]).replace("tcp://", "http://")

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE)
        assert self.process.stdout is not None
        self.process.stdout.close()


class RunningTunnel:
    """``towline listen`` and ``towline forward``, a link between them that can be cut, and an echo behind them.

    Attributes:
        listen_socket: the admin socket of the one.
        forward_socket: the admin socket of the other.
    """

    def __init__(self, directory: Path, portal: BlockingPortal, stack: contextlib.ExitStack) -> None:
        self._directory = directory
        self._portal = portal
        self._stack = stack
        self.psk = str(directory / "psk")
        Psk.generate().write(self.psk)
        self.listen_socket = str(directory / "listen.sock")
        self.forward_socket = str(directory / "forward.sock")
        self.target = _echo_server(stack)
        self.listen = self.start_listen("tcp://127.0.0.1:0")
        self.endpoint = self.listen.ready()
        self.proxy = stack.enter_context(portal.wrap_async_context_manager(ChaosProxy(self.endpoint)))
        self.forward = self._start(
            "forward", "tcp://127.0.0.1:0", "--via", str(self.proxy.endpoint), admin=self.forward_socket
        )
        self.port = int(self.forward.ready().rpartition(":")[2])

    def start_listen(self, endpoint: str) -> Logged:
        return self._start("listen", endpoint, "--to", self.target, admin=self.listen_socket)

    def _start(self, command: str, *arguments: str, admin: str) -> Logged:
        options = ("--psk-file", self.psk, "--heartbeat", "0.3", "--admin", admin, "--metrics", "127.0.0.1:0")
        log = self._directory / f"{command}.{time.monotonic_ns()}.log"
        program = Logged(log, command, *arguments, *options, environment={"NO_COLOR": "1"})
        self._stack.callback(program.close)
        return program

    def connect(self) -> socket.socket:
        """A program's connection, which has been through the whole tunnel and back."""
        connection = self._stack.enter_context(socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE))
        connection.sendall(b"hello")
        assert connection.recv(5, socket.MSG_WAITALL) == b"hello"
        return connection

    def cut(self) -> None:
        """Cut every link, and let none through until `mend`."""
        self.proxy.is_open = False
        self._portal.call(self.proxy.cut_now, "reset")

    def mend(self) -> None:
        self.proxy.is_open = True


def _echo_server(stack: contextlib.ExitStack) -> str:
    server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

    def echo(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(65536):
                connection.sendall(data)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=echo, args=[server.accept()[0]], daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    stack.callback(_wake, server)
    return f"tcp://127.0.0.1:{server.getsockname()[1]}"


def _wake(server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        server.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def tunnel(tmp_path: Path) -> Generator[RunningTunnel]:
    with anyio.from_thread.start_blocking_portal() as portal, contextlib.ExitStack() as stack:
        yield RunningTunnel(tmp_path, portal, stack)


@pytest.fixture
def start_logged(tmp_path: Path) -> Generator[Callable[..., Logged]]:
    with contextlib.ExitStack() as stack:

        def start(*arguments: str, **options: Any) -> Logged:
            program = Logged(tmp_path / f"{time.monotonic_ns()}.log", *arguments, **options)
            stack.callback(program.close)
            return program

        yield start
