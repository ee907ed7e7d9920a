"""The demo's books, which must find whatever went wrong; and what it shows."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
from collections.abc import Generator
from pathlib import Path

import pytest

from towline.cli import _demo, main
from towline.cli._demo import Ledger, Payloads

pytestmark = pytest.mark.real_time

TOTAL = 100


@pytest.fixture
def payloads() -> Payloads:
    return Payloads(b">", 64, seed=1)


@pytest.fixture
def ledger(payloads: Payloads) -> Ledger:
    return Ledger(payloads, TOTAL)


def books(ledger: Ledger) -> tuple[int, int, int, int]:
    return ledger.lost, ledger.duplicated, ledger.reordered, ledger.corrupted


# --- the books -----------------------------------------------------------------------------------------------------


def test_messages_have_their_size_and_follow_from_the_seed(payloads: Payloads) -> None:
    assert len(payloads(7)) == 64
    assert payloads(7) == Payloads(b">", 64, seed=1)(7)
    assert len({payloads(number) for number in range(70_000)}) == 70_000
    assert payloads(7) != Payloads(b"<", 64, seed=1)(7)
    assert payloads(7) != Payloads(b">", 64, seed=2)(7)
    assert len(Payloads(b">", 16, seed=1)(TOTAL)) == 16


def test_all_in_order_is_clean(ledger: Ledger, payloads: Payloads) -> None:
    ledger.receive([payloads(number) for number in range(60)])
    ledger.receive([payloads(number) for number in range(60, TOTAL)])
    assert books(ledger) == (0, 0, 0, 0)
    assert ledger.received == TOTAL


def test_what_is_missing_is_lost(ledger: Ledger, payloads: Payloads) -> None:
    ledger.receive([payloads(number) for number in range(TOTAL) if number not in (3, 50, 99)])
    assert books(ledger) == (3, 0, 0, 0)


def test_what_comes_twice_is_duplicated(ledger: Ledger, payloads: Payloads) -> None:
    ledger.receive([payloads(number) for number in (*range(TOTAL), 0, 50, 99)])
    assert books(ledger) == (0, 3, 0, 0)
    assert ledger.received == TOTAL + 3


def test_what_comes_late_is_reordered(ledger: Ledger, payloads: Payloads) -> None:
    order = [number for number in range(TOTAL) if number != 10]
    ledger.receive([payloads(number) for number in [*order[:20], 10, *order[20:]]])
    assert books(ledger) == (0, 0, 1, 0)


def test_a_changed_bit_is_corrupted_wherever_it_is(payloads: Payloads) -> None:
    for place in range(64):
        ledger = Ledger(payloads, TOTAL)
        changed = bytearray(payloads(5))
        changed[place] ^= 1
        ledger.receive([payloads(number) for number in range(5)])
        ledger.receive([bytes(changed), *(payloads(number) for number in range(6, TOTAL))])
        assert books(ledger) == (1, 0, 0, 1), place


@pytest.mark.parametrize("message", [b"", b"short", bytes(64), bytes(65)])
def test_what_nobody_sent_is_corrupted(message: bytes, ledger: Ledger) -> None:
    ledger.receive([message])
    assert ledger.corrupted == 1


def test_what_the_other_direction_sent_or_comes_after_the_end_is_corrupted(ledger: Ledger, payloads: Payloads) -> None:
    ledger.receive([Payloads(b"<", 64, seed=1)(0), payloads(TOTAL)])
    assert ledger.corrupted == 2


# --- what it shows -------------------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """A demo of two seconds. It sets the log's level, which must not stay."""
    monkeypatch.setattr(_demo, "DURATION", 2.0)
    level = logging.getLogger("towline").level
    yield
    logging.getLogger("towline").setLevel(level)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("endpoint", ["unix", "unix://{path}/demo"])
def test_it_runs_over_unix_sockets(endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["demo", "--json", "--messages", "5000", "--endpoint", endpoint.format(path=tmp_path)]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["received"] == 10_000
    assert result["cuts"] > 0


@pytest.mark.usefixtures("short")
def test_it_writes_plain_lines_when_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--messages", "20", "--size", "1000000", "--cut-every", "0"]) == 0
    out, err = capsys.readouterr()
    assert "\x1b" not in out
    assert "round trip" in out.splitlines()[0]
    assert "The link was cut 0 times" in out
    assert err == ""


@pytest.mark.usefixtures("short")
def test_it_shows_a_picture_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    shown = bytearray()

    def look() -> None:
        with contextlib.suppress(OSError):  # raised when the other side is closed
            while part := os.read(master, 65536):
                shown.extend(part)

    looking = threading.Thread(target=look)
    looking.start()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    with open(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        code = main(["demo", "--messages", "50"])
        monkeypatch.undo()
    looking.join(10)
    os.close(master)
    assert code == 0
    assert b"\x1b[" in shown
    assert b"throughput" in shown
    assert b"Every message arrived once" in shown


@pytest.mark.usefixtures("short")
def test_a_broken_promise_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    honest = Ledger.receive

    def lossy(self: Ledger, messages: list[bytes]) -> None:
        honest(self, messages[:-1])

    monkeypatch.setattr(Ledger, "receive", lossy)
    assert main(["demo", "--json", "--messages", "1000"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["lost"] > 0
    assert "THE PROMISE WAS BROKEN." in err
