"""The real program, as a process: what it prints, how it ends, and what it does at a signal."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Generator
from pathlib import Path

import anyio.from_thread
import pytest

from towline.layers.encryption.keys import Psk, StaticKey
from towline.testing import ChaosProxy

pytestmark = pytest.mark.real_time

LOOPBACK = "tcp://127.0.0.1:0"
PATIENCE = 30.0
"""Seconds for what takes one on an idle machine."""

COMMAND = (sys.executable, "-m", "towline.cli")
ENVIRONMENT = {**os.environ, "NO_COLOR": "1"}


def towline(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run to the end, and expect an exit code."""
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done


class Program:
    """A program that runs until it is told to end."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
        )
        self.log = ""

    @property
    def endpoint(self) -> str:
        """What it says that it listens on, once it is ready."""
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], PATIENCE)[0], self.stderr()
        line = self.process.stdout.readline().decode()
        assert line.startswith("listening on "), (line, self.end(signal.SIGKILL))
        return line.split()[-1]

    @property
    def port(self) -> int:
        return int(self.endpoint.rpartition(":")[2])

    def send_signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stderr(self) -> str:
        """What it has logged so far."""
        assert self.process.stderr is not None
        os.set_blocking(self.process.stderr.fileno(), False)
        with contextlib.suppress(BlockingIOError, ValueError):
            self.log += (self.process.stderr.read() or b"").decode()
        return self.log

    def logs(self, text: str) -> None:
        """Wait until it has logged this."""
        until(lambda: text in self.stderr())

    def end(self, number: int = signal.SIGTERM) -> int:
        """Stop it and give its exit code. It has printed nothing more on stdout."""
        if self.process.poll() is None:
            self.send_signal(number)
        code = self.process.wait(PATIENCE)
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        if number != signal.SIGKILL:
            assert self.process.stdout.read() == b""
        self.stderr()
        self.process.stdout.close()
        self.process.stderr.close()
        return code

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


Start = Callable[..., Program]


@pytest.fixture
def start() -> Generator[Start]:
    programs: list[Program] = []

    def start(*arguments: str) -> Program:
        programs.append(Program(*arguments))
        return programs[-1]

    yield start
    for program in reversed(programs):
        program.kill()


@pytest.fixture
def psk(tmp_path: Path) -> str:
    path = tmp_path / "psk"
    Psk.generate().write(path)
    return str(path)


class Echo:
    """A server program: sends back what it gets, and ends when its client does."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._socket.getsockname()[1]}"
        self.accepted = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self.accepted += 1
                threading.Thread(target=self._echo, args=[connection], daemon=True).start()

    def _echo(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(65536):
                connection.sendall(data)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@pytest.fixture
def echo() -> Generator[Echo]:
    server = Echo()
    yield server
    server.close()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)


def ask(connection: socket.socket, text: bytes) -> bytes:
    connection.sendall(text)
    return connection.recv(len(text), socket.MSG_WAITALL)


def nobody_listens() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"tcp://127.0.0.1:{server.getsockname()[1]}"


# --- the demo ------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_the_demo_proves_that_nothing_is_lost() -> None:
    done = towline("demo", "--json", "--messages", "20000", "--seed", "3")
    result = json.loads(done.stdout)
    assert list(result) == [
        "sent", "received", "lost", "duplicated", "reordered", "corrupted", "cuts", "resumes", "replayed", "seconds",
    ]  # fmt: skip
    assert result["sent"] == result["received"] == 40_000
    assert {result[name] for name in ("lost", "duplicated", "reordered", "corrupted")} == {0}
    assert result["cuts"] >= 15, "20 on a machine that has nothing else to do"
    assert result["resumes"] >= 15
    assert result["replayed"] > 0
    assert 9 < result["seconds"] < 30
    assert "Every message arrived once, in order and as it was sent." in done.stderr


def test_the_demo_ends_at_once_when_interrupted(start: Start) -> None:
    program = start("demo")
    assert program.process.stdout is not None
    program.process.stdout.readline()  # it runs
    program.send_signal(signal.SIGINT)
    assert program.process.wait(PATIENCE) == 130
    assert program.stderr() == ""


# --- the tunnel ----------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_a_program_is_carried(start: Start, psk: str, echo: Echo) -> None:
    listen = start("listen", LOOPBACK, "--to", echo.endpoint, "--psk-file", psk)
    forward = start("forward", LOOPBACK, "--via", listen.endpoint, "--psk-file", psk)
    with connect(forward.port) as connection:
        assert ask(connection, b"hello") == b"hello"
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
    for program in (forward, listen):
        assert program.end() == 0
        assert program.log == "", "nothing went wrong, so nothing is said"


def test_a_program_is_carried_through_cuts_by_key_pairs_over_unix_sockets(
    start: Start, echo: Echo, tmp_path: Path
) -> None:
    server_line = towline("keygen", "--static", str(tmp_path / "server")).stdout
    (tmp_path / "allow").write_text(towline("keygen", "--static", str(tmp_path / "client")).stdout)
    listen = start(
        "listen", f"unix://{tmp_path}/link", "--to", echo.endpoint,
        "--keys", str(tmp_path / "server"), "--allow", str(tmp_path / "allow"), "--heartbeat", "0.1",
    )  # fmt: skip
    with (
        anyio.from_thread.start_blocking_portal() as portal,
        portal.wrap_async_context_manager(ChaosProxy(listen.endpoint, seed=5, cut_every=0.1)) as proxy,
    ):
        forward = start(
            "forward", f"unix://{tmp_path}/local", "--via", str(proxy.endpoint),
            "--keys", str(tmp_path / "client"), "--peer", server_line.split()[1], "--heartbeat", "0.1",
        )  # fmt: skip
        assert forward.endpoint == f"unix://{tmp_path}/local"
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE)
            connection.connect(str(tmp_path / "local"))
            end = time.monotonic() + 1.5
            while time.monotonic() < end:
                assert ask(connection, b"hello" * 100) == b"hello" * 100
        assert proxy.cuts > 2
        assert forward.end() == 0


TUNNEL = """
endpoint = "unix://link"
listen = {{ to = "{echo}" }}
forward = {{ local = "unix://local" }}

layers = [
    {{ kind = "resume", ttl = "1m" }},
    {{ kind = "retry", policy = "exponential" }},
    {{ kind = "heartbeat", interval = "100ms", timeout = "300ms" }},
    "framing",
    {{ kind = "encryption", psk = {{ file = "psk" }} }},
]
"""


def test_one_file_gives_both_ends_of_a_tunnel(
    start: Start, psk: str, echo: Echo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tunnel.toml"
    text = TUNNEL.format(echo=echo.endpoint).replace("unix://", f"unix://{tmp_path}/")
    file.write_text(text)
    assert "nothing is wrong" in towline("check", str(file)).stdout
    monkeypatch.chdir("/")  # where it runs makes no difference to what is in the file
    listen = start("listen", "--config", str(file))
    assert listen.endpoint == f"unix://{tmp_path}/link"
    forward = start("forward", "--config", str(file), "-v")
    assert forward.endpoint == f"unix://{tmp_path}/local"
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE)
        connection.connect(str(tmp_path / "local"))
        assert ask(connection, b"hello") == b"hello"
        os.unlink(psk)
        Psk.generate().write(psk)
        for broken in ("nonsense", text.replace('"psk"', '"~nosuchuser/psk"')):
            before = listen.stderr().count("the keys stay what they were")
            file.write_text(broken)
            listen.send_signal(signal.SIGHUP)
            until(lambda: listen.stderr().count("the keys stay what they were") > before)  # noqa: B023
        file.write_text(text)
        for program in (listen, forward):
            program.send_signal(signal.SIGHUP)
        forward.logs("1 sessions reconnect")
        assert ask(connection, b"with the new key") == b"with the new key"
    assert "connected to" in towline("ping", "--config", str(file), "--count", "1").stdout
    for program in (forward, listen):
        assert program.end() == 0


def test_metrics_tell_of_sessions_handshakes_and_cuts(start: Start, psk: str, echo: Echo, free_tcp_port: int) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    listen = start(
        "listen", LOOPBACK, "--to", echo.endpoint, "--psk-file", psk, "--heartbeat", "0.05",
        "--metrics", str(free_tcp_port),
    )  # fmt: skip

    def measured(name: str) -> float:
        """What there is of a name, over all attributes."""
        with urllib.request.urlopen(f"http://127.0.0.1:{free_tcp_port}/metrics") as answer:
            families = text_string_to_metric_families(answer.read().decode())
        return sum(sample.value for family in families for sample in family.samples if sample.name == name)

    with (
        anyio.from_thread.start_blocking_portal() as portal,
        portal.wrap_async_context_manager(ChaosProxy(listen.endpoint)) as proxy,
    ):
        forward = start("forward", LOOPBACK, "--via", str(proxy.endpoint), "--psk-file", psk, "--heartbeat", "0.05")
        with connect(forward.port) as connection:
            assert ask(connection, b"hello") == b"hello"
            assert measured("towline_sessions") == 1
            portal.call(proxy.cut_now)
            until(lambda: measured("towline_resumes_total") == 1)
            assert measured("towline_cuts_total") == 1
            until(lambda: measured("towline_round_trip_duration_seconds_count") > 0)
            assert measured("towline_handshake_failures_total") == 0
            Psk.generate().write(f"{psk}.other")
            towline("forward", LOOPBACK, "--via", str(proxy.endpoint), "--psk-file", f"{psk}.other", code=3)
            assert measured("towline_handshake_failures_total") > 0


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_standard_streams_that_are_closed_harm_nothing(
    closed: tuple[int, ...], psk: str, echo: Echo, tmp_path: Path, free_tcp_port: int
) -> None:
    endpoint, admin = f"tcp://127.0.0.1:{free_tcp_port}", tmp_path / "admin"
    options = ("--to", echo.endpoint, "--psk-file", psk, "--admin", str(admin))
    script = "exec " + " ".join(
        [shlex.join([*COMMAND, "listen", endpoint, *options]), *(f"{each}>&-" for each in closed)]
    )
    with subprocess.Popen(["sh", "-c", script], env=ENVIRONMENT) as process:
        try:
            until(admin.exists)
            assert "listen" in towline("sessions", str(admin)).stdout
            towline("ping", endpoint, "--psk-file", psk, "--count", "1", "--interval", "0.1")
            assert process.poll() is None
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("towline li", "listen"),
        ("towline listen --ps", "--psk-file"),
        ("towline init tunnel-", "tunnel-keys"),
        ("towline sess", "sessions"),
    ],
)
def test_a_shell_completes_commands_options_and_cases(typed: str, completed: str) -> None:
    words = typed.split()
    environment = {"_TOWLINE_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=60, env={**ENVIRONMENT, **environment})
    assert done.stdout.split() == [completed], done.stderr


def test_hangup_reconnects_now(start: Start, psk: str, echo: Echo) -> None:
    listen = start("listen", LOOPBACK, "--to", echo.endpoint, "--psk-file", psk)
    with (
        anyio.from_thread.start_blocking_portal() as portal,
        portal.wrap_async_context_manager(ChaosProxy(listen.endpoint)) as proxy,
    ):
        forward = start("forward", LOOPBACK, "--via", str(proxy.endpoint), "--psk-file", psk)
        with connect(forward.port) as connection:
            assert ask(connection, b"before") == b"before"
            links = proxy.connections
            forward.send_signal(signal.SIGHUP)
            until(lambda: proxy.connections == links + 1)
            assert ask(connection, b"after") == b"after"


def test_hangup_ends_the_sessions_of_keys_that_were_removed(start: Start, echo: Echo, tmp_path: Path) -> None:
    anna, bert, server = (StaticKey.generate() for _ in range(3))
    for name, key in (("anna", anna), ("bert", bert), ("server", server)):
        key.write(tmp_path / name)
    allow = tmp_path / "allow"
    allow.write_text(f"{anna.public_line('anna')}\n{bert.public_line('bert')}\n")
    listen = start("listen", LOOPBACK, "--to", echo.endpoint, "--keys", str(tmp_path / "server"), "--allow", str(allow))
    via = listen.endpoint

    def forward(name: str) -> Program:
        options = ("--keys", str(tmp_path / name), "--peer", server.public_line())
        return start("forward", LOOPBACK, "--via", via, *options)

    with connect(forward("anna").port) as annas, connect(forward("bert").port) as berts:
        assert ask(annas, b"hello") == ask(berts, b"hello") == b"hello"
        allow.write_text("nonsense\n")
        listen.send_signal(signal.SIGHUP)
        listen.logs("the keys stay what they were")
        allow.write_text(f"{bert.public_line('bert')}\n")
        listen.send_signal(signal.SIGHUP)
        with pytest.raises(ConnectionResetError):
            annas.recv(1)
        assert ask(berts, b"still here") == b"still here"


def test_a_shared_key_is_changed_under_living_sessions(start: Start, psk: str, echo: Echo) -> None:
    listen = start("listen", LOOPBACK, "--to", echo.endpoint, "--psk-file", psk)
    forward = start("forward", LOOPBACK, "--via", listen.endpoint, "--psk-file", psk, "-v")
    with connect(forward.port) as connection:
        assert ask(connection, b"hello") == b"hello"
        os.unlink(psk)
        Psk.generate().write(psk)
        listen.send_signal(signal.SIGHUP)
        time.sleep(0.5)  # nothing is logged of it without -v
        forward.send_signal(signal.SIGHUP)
        forward.logs("1 sessions reconnect")
        assert ask(connection, b"again") == b"again"


def test_terminate_drains(start: Start, psk: str, echo: Echo) -> None:
    listen = start("listen", LOOPBACK, "--to", echo.endpoint, "--psk-file", psk)
    forward = start("forward", LOOPBACK, "--via", listen.endpoint, "--psk-file", psk, "-v")
    port = forward.port
    with connect(port) as connection:
        assert ask(connection, b"hello") == b"hello"
        forward.send_signal(signal.SIGTERM)
        forward.logs("draining")
        with pytest.raises(ConnectionRefusedError):
            connect(port)
        assert ask(connection, b"still here") == b"still here"
        assert forward.process.poll() is None
    assert forward.process.wait(PATIENCE) == 0


@pytest.mark.parametrize("which", ["forward", "listen"])
def test_a_second_signal_ends_all_at_once(which: str, start: Start, psk: str, echo: Echo) -> None:
    listen = start("listen", LOOPBACK, "--to", echo.endpoint, "--psk-file", psk, "-v")
    forward = start("forward", LOOPBACK, "--via", listen.endpoint, "--psk-file", psk, "-v")
    program = {"forward": forward, "listen": listen}[which]
    with connect(forward.port) as connection:
        assert ask(connection, b"hello") == b"hello"
        program.send_signal(signal.SIGTERM)
        program.logs("draining")
        program.send_signal(signal.SIGTERM)
        assert program.process.wait(PATIENCE) == 128 + signal.SIGTERM
        with pytest.raises(ConnectionResetError):
            connection.recv(1)


def test_a_session_that_finds_no_way_back_is_a_reset(start: Start, psk: str, echo: Echo) -> None:
    listen = start("listen", LOOPBACK, "--to", echo.endpoint, "--psk-file", psk)
    forward = start(
        "forward", LOOPBACK, "--via", listen.endpoint, "--psk-file", psk, "--retry-for", "0.5", "--heartbeat", "0.1"
    )
    with connect(forward.port) as connection:
        assert ask(connection, b"hello") == b"hello"
        listen.kill()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    forward.logs("the program's connection is reset: no way back was found within 0.5 s")
    assert forward.stderr().count("\n") == 1


# --- what goes wrong -----------------------------------------------------------------------------------------------


def one_line(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.stderr.startswith("towline: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr
    assert done.stdout == ""


def test_a_port_in_use_is_one_line_and_exit_code_1(psk: str, echo: Echo) -> None:
    in_use = re.compile("in use|cannot be bound")
    for arguments in (
        ("listen", echo.endpoint, "--to", echo.endpoint),
        ("forward", echo.endpoint, "--via", LOOPBACK[:-1] + "1"),
    ):
        done = towline(*arguments, "--psk-file", psk, code=1)
        one_line(done, echo.endpoint)
        assert in_use.search(done.stderr)


def test_an_unknown_host_is_one_line_and_exit_code_1(psk: str) -> None:
    for arguments in (("forward", LOOPBACK, "--via"), ("ping",)):
        done = towline(*arguments, "tcp://no-such-host.invalid:7000", "--psk-file", psk, code=1)
        one_line(done, "no-such-host.invalid")


def test_a_wrong_key_is_one_line_and_exit_code_3(start: Start, psk: str, echo: Echo, tmp_path: Path) -> None:
    listen = start("listen", LOOPBACK, "--to", echo.endpoint, "--psk-file", psk)
    via = listen.endpoint
    other = tmp_path / "other"
    Psk.generate().write(other)
    for arguments in (("forward", LOOPBACK, "--via"), ("ping",)):
        done = towline(*arguments, via, "--psk-file", str(other), code=3)
        one_line(done, "refused")
    assert echo.accepted == 0


def test_a_server_with_another_key_is_one_line_and_exit_code_3(start: Start, echo: Echo, tmp_path: Path) -> None:
    for name in ("server", "client"):
        StaticKey.generate().write(tmp_path / name)
    client = StaticKey.from_file(tmp_path / "client")
    (tmp_path / "allow").write_text(client.public_line())
    listen = start(
        "listen", LOOPBACK, "--to", echo.endpoint,
        "--keys", str(tmp_path / "server"), "--allow", str(tmp_path / "allow"),
    )  # fmt: skip
    impostor = StaticKey.generate().public_line()
    done = towline("ping", listen.endpoint, "--keys", str(tmp_path / "client"), "--peer", impostor, code=3)
    one_line(done, "is not on the allow-list")


def test_what_is_no_towline_is_one_line_and_exit_code_3(psk: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.recv(4096)
                        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        done = towline("ping", f"tcp://127.0.0.1:{server.getsockname()[1]}", "--psk-file", psk, code=3)
        one_line(done, "is not a Towline server", "HTTP")
        server.shutdown(socket.SHUT_RDWR)


def test_a_far_end_that_is_down_ends_nothing(start: Start, psk: str) -> None:
    forward = start("forward", LOOPBACK, "--via", nobody_listens(), "--psk-file", psk, "--retry-for", "0.3")
    port = forward.port
    forward.logs("it is tried again for each connection")
    with connect(port) as connection, pytest.raises(ConnectionResetError):
        connection.recv(1)
    forward.logs("no session for a connection")
    assert forward.end() == 0


# --- ping ----------------------------------------------------------------------------------------------------------


def test_ping_measures_round_trips(start: Start, psk: str, echo: Echo) -> None:
    listen = start("listen", LOOPBACK, "--to", echo.endpoint, "--psk-file", psk)
    via = listen.endpoint
    done = towline("ping", via, "--psk-file", psk, "--count", "3", "--interval", "0.05")
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith(f"connected to {via} in ")
    for number, line in enumerate(lines[1:4], 1):
        assert re.fullmatch(rf"{via}: {number}: [\d.e-]+ ms", line)
    assert re.fullmatch(r"3 round trips: min [\d.e-]+ ms, median [\d.e-]+ ms, max [\d.e-]+ ms", lines[4])
    assert done.stderr == ""
    until(lambda: echo.accepted == 1)
    assert listen.end() == 0, "the session is over, so there is nothing to drain"


def test_ping_sums_up_when_interrupted(start: Start, psk: str, echo: Echo) -> None:
    listen = start("listen", LOOPBACK, "--to", echo.endpoint, "--psk-file", psk)
    ping = start("ping", listen.endpoint, "--psk-file", psk, "--count", "0", "--interval", "0.05")
    assert ping.process.stdout is not None
    for _ in range(4):
        ping.process.stdout.readline()
    ping.send_signal(signal.SIGINT)
    out = ping.process.stdout.read().decode()
    assert ping.process.wait(PATIENCE) == 0
    assert "round trips: min" in out.splitlines()[-1]


def test_ping_gives_up_with_exit_code_4(psk: str) -> None:
    done = towline("ping", nobody_listens(), "--psk-file", psk, code=4)
    one_line(done, "gave up", "cannot be reached")


def test_ping_says_when_only_the_target_is_down(start: Start, psk: str) -> None:
    listen = start("listen", LOOPBACK, "--to", nobody_listens(), "--psk-file", psk)
    ping = start("ping", listen.endpoint, "--psk-file", psk)
    assert ping.process.wait(PATIENCE) == 1
    assert ping.stderr() == "towline: the far end was reached, but cannot reach its own target\n"
