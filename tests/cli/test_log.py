"""What is logged: one JSON object a line with fields that programs can use, the loud at the end, and never a secret."""

from __future__ import annotations

import ast
import base64
import json
import logging
import re
import socket
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

import towline
from towline import Framing, Heartbeat, Resume, Retry, Stack
from towline.cli._log import MAX_TEXT, JsonFormatter, TextFormatter, complain
from towline.layers.encryption import Encryption
from towline.layers.encryption.keys import Psk
from towline.layers.resume import ServerSession, Session
from towline.policies import Backoff
from towline.testing import ChaosProxy

pytestmark = pytest.mark.real_time


def formatted(**record: object) -> dict[str, object]:
    made = logging.makeLogRecord({"name": "towline.x", "levelname": "WARNING", "levelno": 30, "msg": "m", **record})
    line = JsonFormatter().format(made)
    assert "\n" not in line
    fields: dict[str, object] = json.loads(line)
    return fields


def test_a_record_is_one_object_with_its_fields() -> None:
    fields = formatted(
        created=86_400.25, msg="cut after %d\n%s", args=(3, "ü\u2028"), event="x", count=7, ratio=0.5, no=None
    )
    assert list(fields) == ["time", "level", "logger", "message", "event", "count", "ratio", "no"]
    assert fields == {
        "time": "1970-01-02T00:00:00.250Z",
        "level": "warning",
        "logger": "towline.x",
        "message": "cut after 3\nü\u2028",
        "event": "x",
        "count": 7,
        "ratio": 0.5,
        "no": None,
    }


def test_an_exception_is_text() -> None:
    try:
        raise ZeroDivisionError("oh")
    except ZeroDivisionError:
        fields = formatted(exc_info=sys.exc_info())
    assert str(fields["exception"]).startswith("Traceback (most recent call last):\n")
    assert str(fields["exception"]).endswith("ZeroDivisionError: oh")


def test_what_json_does_not_know_is_text_and_bytes_are_only_counted() -> None:
    fields = formatted(
        key=b"secret", way=Path("/x"), wait=float("inf"), level="loud", name_="\udcff", long="x" * 99_999
    )
    assert (fields["key"], fields["way"], fields["wait"]) == ("<6 bytes>", "/x", "inf")
    assert (fields["level"], fields["level_"], fields["name_"]) == ("warning", "loud", "?")
    assert len(str(fields["long"])) < MAX_TEXT + 50


def test_why_the_program_ends_is_a_record_too(tmp_path: Path) -> None:
    Psk.generate().write(tmp_path / "psk")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "towline.cli", "listen", f"tcp://127.0.0.1:{port}", "--to", "tcp://127.0.0.1:9",
             "--psk-file", str(tmp_path / "psk"), "--log-format", "json"],
            capture_output=True,
            text=True,
            timeout=60,
        )  # fmt: skip
    assert done.returncode == 1
    fields = json.loads(done.stderr)
    assert (fields["level"], fields["event"]) == ("error", "program.failed")
    assert fields["message"] == f"tcp://127.0.0.1:{port} is in use"


# --- every record --------------------------------------------------------------------------------------------------

LEVELS = {"debug", "info", "warning", "error", "exception", "critical", "log"}


def log_calls() -> list[tuple[str, ast.Call]]:
    root = Path(towline.__file__).parent
    folders = [root, *(root.parent / name for name in ("layers", "policies", "transports"))]
    if not all(folder.is_dir() for folder in folders):  # from the wheel
        folders = [root]
    found: list[tuple[str, ast.Call]] = []
    for path in {path.resolve() for folder in folders for path in folder.rglob("*.py")}:
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="logger"), attr=attr)) if attr in LEVELS:
                    found.append((f"{path.name}:{node.lineno}", node))
                case _:
                    pass
    return found


def test_every_record_has_an_event() -> None:
    calls = log_calls()
    assert len(calls) > 40
    for place, call in calls:
        extra = [keyword.value for keyword in call.keywords if keyword.arg == "extra"]
        assert extra, f"{place} has no fields"
        source = ast.unparse(extra[0])
        assert "'event'" in source or re.search(r"log_fields|fields", source), f"{place} names no event: {source}"


async def test_a_session_is_told_of_by_name_early_failures_are_quiet_and_no_secret_is_in_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, logger="towline")
    psk = Psk.generate()
    stack = Stack(
        Resume(ttl=1.0),
        Retry(Backoff.exponential(initial=0.02, cap=0.1)),
        Heartbeat(interval=0.1, timeout=0.4),
        Framing(),
        Encryption(psk=psk),
    )
    at_server: list[ServerSession] = []

    async def read_on(session: ServerSession) -> None:
        at_server.append(session)
        async for _ in session:
            pass

    async with (
        stack.serve("tcp://127.0.0.1:0", read_on) as server,
        ChaosProxy(server.endpoint) as proxy,
        stack.open() as opened,
    ):
        session: Session = await opened.connect(proxy.endpoint)
        await session.send(b"the message of the application")
        while not at_server or not session.statistics.resumes:
            proxy.cut_now("reset")
            await anyio.sleep(0.05)
        proxy.is_open = False
        proxy.cut_now("reset")
        while all(record.levelno < logging.WARNING for record in caplog.records):  # noqa: ASYNC110 -- a log
            await anyio.sleep(0.05)  # until the server gives it up, after a second
        secrets = [at_server[0].key, psk.secret, b"the message of the application"]
    events = {getattr(record, "event", None) for record in caplog.records}
    assert {"session.attached", "session.detached", "session.attempt", "session.lost"} <= events
    loud = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [vars(record)["event"] for record in loud] == ["session.given_up"]
    assert vars(loud[0])["reason"] == "expired"
    about = [record for record in caplog.records if str(getattr(record, "event", "")).startswith("session.")]
    assert {vars(record)["session"] for record in about} <= {session.short_id, "new"}
    text = "\n".join(JsonFormatter().format(record) for record in caplog.records)
    for secret in secrets:
        for shown in (secret.hex(), base64.b64encode(secret).decode().rstrip("="), repr(secret)[2:-1]):
            assert shown not in text


# --- what others have put into it -----------------------------------------------------------------------------------


def test_a_message_moves_no_cursor_and_makes_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    record = logging.makeLogRecord({"msg": "the peer %s is here", "args": ("x\x1b[2J\nfake: line\x9b",)})
    assert TextFormatter("%(message)s").format(record) == "the peer x\ufffd[2J\ufffdfake: line\ufffd is here"
    complain("a \x1b]0;title\x07 and a key: " + "ab" * 32)
    assert capsys.readouterr().err == "towline: a \ufffd]0;title\ufffd and a key: **********\n"
    shown = JsonFormatter().format(logging.makeLogRecord({"msg": "\x1b\x9b\u2028\u202e\xe9"}))
    assert shown.isascii()
    assert json.loads(shown)["message"] == "\x1b\x9b\u2028\u202e\xe9"


class Broken:
    def __str__(self) -> str:
        raise ValueError("no text")


@pytest.mark.parametrize(("message", "args"), [("%d of %d", (1,)), ("%s", (Broken(),))], ids=["count", "text"])
def test_a_record_that_cannot_be_written_is_one_object_all_the_same(message: object, args: tuple[object, ...]) -> None:
    record = logging.makeLogRecord({"msg": message, "args": args, "levelname": "ERROR", "name": "app"})
    assert json.loads(JsonFormatter().format(record))["event"] == "log.failed"


def test_what_python_itself_says_is_an_object_too() -> None:
    code = """
import gc, sys, threading, warnings
from towline.cli._log import LogFormat, set_up_log
set_up_log(0, LogFormat.JSON)
warnings.warn("this is old")
async def never(): pass
never()
class Bad:
    def __del__(self): raise ValueError("while it was deleted")
Bad()
gc.collect()
def fails(): raise KeyError("in a thread")
thread = threading.Thread(target=fails)
thread.start()
thread.join()
raise RuntimeError("at the end")
"""
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, timeout=60)
    told = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.returncode == 1
    texts = " ".join(each["message"] for each in told)
    for part in ("this is old", "never awaited", "while it was deleted", "in a thread", "at the end"):
        assert part in texts, texts
