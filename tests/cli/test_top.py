"""What a person sees of a tunnel that runs: in a real terminal, in lines, in a browser, and by single commands."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pyte
import pytest

pytestmark = [
    pytest.mark.real_time,
    pytest.mark.skipif(sys.platform == "win32", reason="needs terminals, signals and Unix sockets"),
]

COMMAND = (sys.executable, "-m", "towline.cli")
PATIENCE = 30.0

SEEN_WITHIN = 1.0
"""Seconds from a cut to its being seen."""


class Terminal:
    """A program in a terminal: what it draws, as a person would see it."""

    def __init__(self, *arguments: str, columns: int = 120, lines: int = 30, **environment: str) -> None:
        self._screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self._screen)
        leader, follower = pty.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env={**kept, "TERM": "xterm-256color", **environment},
            start_new_session=True,
        )
        os.close(follower)
        self._leader = leader
        self.raw = b""

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self._screen.display]

    @property
    def text(self) -> str:
        return "\n".join(self.lines).rstrip()

    def color_of(self, text: str) -> str:
        """The colour of the first letter of this text."""
        for number, line in enumerate(self._screen.display):
            if text in line:
                return str(self._screen.buffer[number][line.index(text)].fg)
        raise AssertionError(f"{text!r} is not to be seen:\n{self.text}")

    def look(self, seconds: float) -> None:
        """Draw what comes within this time at most."""
        if select.select([self._leader], [], [], seconds)[0]:
            with contextlib.suppress(OSError):  # the program has ended
                data = os.read(self._leader, 65536)
                self.raw += data
                self._stream.feed(data)

    def wait_for(self, text: str, seconds: float = PATIENCE) -> float:
        """Look until this is to be seen; gives how long that took."""
        began = time.monotonic()
        while text not in self.text:
            assert time.monotonic() < began + seconds, f"no {text!r} within {seconds:g} s:\n{self.text}"
            self.look(0.02)
        return time.monotonic() - began

    def press(self, keys: bytes) -> None:
        os.write(self._leader, keys)

    def end(self) -> int:
        """Wait until it ends; gives its exit code."""
        end = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            assert time.monotonic() < end, self.text
            self.look(0.02)
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE)
        os.close(self._leader)


@pytest.fixture
def terminals() -> Generator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def open_top(terminals: contextlib.ExitStack, socket: str, **options: Any) -> Terminal:
    terminal = Terminal("top", socket, **options)
    terminals.callback(terminal.close)
    return terminal


def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done


# --- in a terminal -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["listen", "forward"])
def test_a_cut_is_seen_within_a_second(end: str, tunnel: Any, terminals: contextlib.ExitStack) -> None:
    tunnel.connect()
    terminal = open_top(terminals, getattr(tunnel, f"{end}_socket"))
    terminal.wait_for("attached")
    assert terminal.lines[0].startswith(f"towline {end} tcp://127.0.0.1:")
    assert "1 session " in terminal.lines[1]
    assert terminal.color_of("attached") == "green"
    times: list[float] = []
    for number in (1, 2):
        tunnel.cut()
        times.append(terminal.wait_for("no link"))
        assert "1 session, 1 without a link" in terminal.text
        assert terminal.color_of("no link") == "red"
        terminal.wait_for("lost its link: ")
        tunnel.mend()
        terminal.wait_for("attached")
        terminal.wait_for(f"{number} cuts, {number} resumed")
    assert min(times) < SEEN_WITHIN, "of two, one on a machine that had time for it"
    assert "goes on over a new link" in terminal.text
    terminal.press(b"q")
    assert terminal.end() == 0


def test_it_outlives_the_program_that_it_watches(tunnel: Any, terminals: contextlib.ExitStack) -> None:
    terminal = open_top(terminals, tunnel.listen_socket)
    terminal.wait_for("0 sessions")
    tunnel.listen.process.kill()
    tunnel.listen.process.wait(PATIENCE)
    terminal.wait_for("no connection, trying again")
    tunnel.start_listen(tunnel.endpoint).ready()
    terminal.wait_for("the program was restarted: its sessions are new")
    tunnel.connect()
    terminal.wait_for("attached")
    assert "no connection" not in terminal.lines[1]


def test_a_drain_is_shown(tunnel: Any, terminals: contextlib.ExitStack) -> None:
    connection = tunnel.connect()
    terminal = open_top(terminals, tunnel.forward_socket)
    terminal.wait_for("1 session ")
    tunnel.forward.process.send_signal(signal.SIGTERM)
    terminal.wait_for("draining, 1 session")
    connection.close()
    terminal.wait_for("no connection, trying again")


@pytest.mark.parametrize("keys", [b"q", b"Q", b"\x03"])
def test_it_ends_by_a_key_and_leaves_the_terminal_as_it_was(
    keys: bytes, tunnel: Any, terminals: contextlib.ExitStack
) -> None:
    terminal = open_top(terminals, tunnel.listen_socket)
    terminal.wait_for("q quits")
    if keys == b"\x03":  # it is not the terminal's own group, so the key alone would tell nobody
        terminal.process.send_signal(signal.SIGINT)
    else:
        terminal.press(b"x" + keys)
    assert terminal.end() == 0
    terminal.look(0.1)
    assert terminal.raw.count(b"\x1b[?1049h") == terminal.raw.count(b"\x1b[?1049l") == 1
    assert terminal.raw.rfind(b"\x1b[?25h") > terminal.raw.rfind(b"\x1b[?25l"), "the cursor is back"
    assert b"Traceback" not in terminal.raw


def test_no_color_is_honoured(tunnel: Any, terminals: contextlib.ExitStack) -> None:
    tunnel.connect()
    terminal = open_top(terminals, tunnel.listen_socket, NO_COLOR="1")
    terminal.wait_for("attached")
    assert terminal.color_of("attached") == "default"
    assert not re.search(rb"\x1b\[[\d;]*3[0-7]m", terminal.raw)


@pytest.mark.parametrize(("columns", "lines"), [(40, 12), (60, 16), (80, 24), (200, 50)])
def test_it_fits_the_terminal(columns: int, lines: int, tunnel: Any, terminals: contextlib.ExitStack) -> None:
    for _ in range(lines - 4 if lines < 20 else 3):  # more than fit, where the terminal is small
        tunnel.connect()
    terminal = open_top(terminals, tunnel.forward_socket, columns=columns, lines=lines)
    terminal.wait_for("attached")
    terminal.wait_for("q quits")
    assert terminal.lines[0].startswith("towline forward")
    assert terminal.lines[3].startswith("session")
    assert ("more" in terminal.text) == (lines < 20)
    assert ("credit" in terminal.lines[3]) == (columns >= 120)


# --- in lines ------------------------------------------------------------------------------------------------------


def test_without_a_terminal_it_prints_lines(tunnel: Any) -> None:
    tunnel.connect()
    top = subprocess.Popen([*COMMAND, "top", tunnel.forward_socket], stdout=subprocess.PIPE, text=True)
    assert top.stdout is not None

    def line() -> str:
        assert top.stdout is not None
        return top.stdout.readline().rstrip("\n")

    try:
        assert re.fullmatch(r"\d\d:\d\d:\d\d  watching forward tcp://127.0.0.1:\d+", line())
        assert re.fullmatch(r"\S+  1 session; sent [\d.]+ \w+/s, received [\d.]+ \w+/s; 0 cuts", line())
        tunnel.cut()
        while "lost its link: " not in (seen := line()):
            assert "session" in seen
        top.send_signal(signal.SIGINT)
        rest = top.stdout.read()
        assert "\x1b" not in rest
        assert top.wait(PATIENCE) == 0
    finally:
        top.kill()
        top.wait()
        top.stdout.close()


def test_a_pipe_that_is_closed_ends_it_quietly(tunnel: Any) -> None:
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {' '.join(COMMAND)} top {tunnel.listen_socket} | head -n 1"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


# --- questions and orders ------------------------------------------------------------------------------------------


def test_sessions_are_listed(tunnel: Any) -> None:
    assert run("sessions", tunnel.listen_socket).stdout.endswith(": 0 sessions\n")
    tunnel.connect()
    first, header, row = run("sessions", tunnel.listen_socket).stdout.splitlines()
    assert re.fullmatch(r"listen tcp://127.0.0.1:\d+ to tcp://127.0.0.1:\d+: 1 session", first)
    assert header.split()[:3] == ["SESSION", "STATE", "PEER"]
    name = row.split()[0]
    assert row.split()[1:3] == ["attached", "127.0.0.1"]
    snapshot = json.loads(run("sessions", tunnel.forward_socket, "--json").stdout)
    assert snapshot["role"] == "forward"
    assert [session["id"] for session in snapshot["sessions"]] == [name], "the same at both ends"
    assert snapshot["sessions"][0]["sent"] == 5


def test_reconnect_and_the_log_agree(tunnel: Any) -> None:
    tunnel.connect()
    name = json.loads(run("sessions", tunnel.forward_socket, "--json").stdout)["sessions"][0]["id"]
    assert run("reconnect", tunnel.listen_socket, name).stdout == "1 session reconnects\n"
    detached = tunnel.listen.record("session.detached")
    while detached["session"] != name:  # a probe was before it
        detached = next(each for each in tunnel.listen.records("session.detached") if each["session"] == name)
    assert detached["reason"] == "the operator asked for a new one"
    assert detached["level"] == "info"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", detached["time"])
    assert detached["logger"] == "towline.layers.resume._life"
    assert run("reconnect", tunnel.forward_socket).stdout == "1 session reconnects\n"
    done = run("reconnect", tunnel.forward_socket, "nonsense", code=1)
    assert done.stderr == "towline: there is no session nonsense\n"


def test_drain_waits_and_says_how_it_went(tunnel: Any) -> None:
    tunnel.connect()
    done = run("drain", tunnel.forward_socket, "--timeout", "0.3", code=1)
    assert done.stdout == "it has ended; connections that were cut off: 1\n"
    assert tunnel.forward.process.wait(PATIENCE) == 1
    done = run("drain", tunnel.listen_socket)
    assert done.stdout == "it has ended, and every connection had finished\n"
    assert tunnel.listen.process.wait(PATIENCE) == 0
    assert not Path(tunnel.listen_socket).exists()


@pytest.mark.parametrize("command", ["top", "sessions", "reconnect", "drain"])
def test_nobody_there_is_one_line_and_exit_code_4(command: str, tmp_path: Path) -> None:
    done = run(command, str(tmp_path / "nothing"), code=4)
    assert done.stderr.startswith("towline: no towline answers there: ")
    assert done.stderr.count("\n") == 1


def test_an_admin_socket_in_use_is_one_line_and_exit_code_1(tunnel: Any) -> None:
    done = run(
        "listen", "tcp://127.0.0.1:0", "--to", "tcp://127.0.0.1:9",
        "--psk-file", tunnel.psk, "--admin", tunnel.listen_socket, code=1,
    )  # fmt: skip
    assert "is in use: another listener has it" in done.stderr
    assert done.stderr.count("\n") == 1


# --- in a browser --------------------------------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture
def page() -> Generator[Any]:
    """A page of a headless browser that is installed here, which complains of nothing."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("needs Chromium")
    complaints: list[str] = []
    with api.sync_playwright() as playwright:
        # As root, which CI may be, Chromium has no sandbox.
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        page = browser.new_page(viewport={"width": 1280, "height": 800})

        def complained(message: Any) -> None:
            if getattr(message, "type", "error") == "error":  # of what is written to the console, errors
                complaints.append(str(getattr(message, "text", message)))

        page.on("pageerror", complained)
        page.on("console", complained)
        page.complaints = complaints
        yield page
        browser.close()


@pytest.mark.browser
def test_the_page_shows_a_cut_within_a_second(tunnel: Any, page: Any, tmp_path: Path) -> None:
    tunnel.connect()
    page.goto(f"{tunnel.forward.site}/")
    page.wait_for_selector("tr[data-state=attached]")
    page.locator("#live", has_text=re.compile("^live$")).wait_for()
    assert page.title() == "towline forward"
    times: list[float] = []
    for number in (1, 2):
        began = time.monotonic()
        tunnel.cut()
        page.wait_for_selector("tr[data-state=detached]")
        times.append(time.monotonic() - began)
        assert page.inner_text("#detached") == "1"
        assert page.inner_text("#cuts") == str(number)
        assert "lost its link: " in page.inner_text("#events li:first-child")
        assert page.title() == "(1) towline forward"
        if number == 1:
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                picture = page.screenshot(path=tmp_path / f"{scheme}.png")
                assert picture.startswith(b"\x89PNG")
        tunnel.mend()
        page.wait_for_selector("tr[data-state=attached]")
        assert "goes on over a new link" in page.inner_text("#events li:first-child")
    assert min(times) < SEEN_WITHIN, "of two, one on a machine that had time for it"
    assert page.complaints == []


@pytest.mark.browser
def test_the_page_outlives_the_program_and_shows_what_peers_say_as_text(tunnel: Any, page: Any) -> None:
    site = tunnel.listen.site
    page.goto(f"{site}/")
    page.locator("#live", has_text=re.compile("^live$")).wait_for()
    page.evaluate(
        "show({...before, sessions: [{id: '<b>x</b>', state: 'detached', peer: '<img src=x onerror=alert(1)>', age: 1,"
        "detached_for: 1, rtt: null, sent: 0, received: 0, send_rate: 0, receive_rate: 0, buffered: 0, buffer: 1,"
        "credit: 0, cuts: 1, resumes: 0, replayed: 0, last_error: '<script>alert(1)</script>'}]})"
    )
    assert page.evaluate("document.querySelectorAll('#rows img, #rows b, #rows script, #events b').length") == 0
    tunnel.listen.process.kill()
    tunnel.listen.process.wait(PATIENCE)
    page.locator("#live", has_text=re.compile("^no connection")).wait_for()
    assert "stale" in page.get_attribute("body", "class")
