"""Case 48, whole: the bytes of a key, in any form, are looked for in all that the programs say and serve."""

from __future__ import annotations

import base64
import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from towline import Psk

pytestmark = pytest.mark.real_time

PATIENCE = 30.0

Found: TypeAlias = Callable[[list[bytes], bytes], list[bytes]]

FILE = """
endpoint = "unix://{folder}/link"
listen = {{ to = "tcp://127.0.0.1:{port}", admin = "listen.sock" }}
forward = {{ local = "unix://{folder}/local", admin = "forward.sock" }}
layers = [
    {{ kind = "resume", ttl = "20s" }},
    {{ kind = "retry", policy = {{ kind = "exponential", cap = "100ms" }} }},
    {{ kind = "heartbeat", interval = "100ms", timeout = "300ms" }},
    "framing",
    {{ kind = "encryption", psk = "{key}" }},
]
"""


def run(*arguments: str, patience: float = PATIENCE) -> bytes:
    """What a command says, however it ends."""
    command = [sys.executable, "-m", "towline.cli", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            return process.communicate(timeout=patience)[0]
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            return process.communicate(timeout=PATIENCE)[0]


@pytest.mark.parametrize("form", ["base64", "hex"])
def test_case_48_nothing_that_the_programs_say_or_serve_holds_the_key(
    form: str, found: Found, tmp_path: Path, free_tcp_port_factory: Callable[[], int]
) -> None:
    secret = Psk.generate().secret
    key = secret.hex() if form == "hex" else base64.b64encode(secret).decode()
    target = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_echo, args=(target,), daemon=True).start()
    good = tmp_path / "good.toml"
    good.write_text(FILE.format(folder=tmp_path, port=target.getsockname()[1], key=key))
    good.chmod(0o600)
    wrong, broken = tmp_path / "wrong.toml", tmp_path / "broken.toml"
    wrong.write_text(good.read_text().replace(key, Psk.generate().secret.hex()).replace("/local", "/wrong"))
    broken.write_text(good.read_text().replace('"20s"', f'"{key}"').replace("psk =", f'suite = "{key}", psk ='))
    web = free_tcp_port_factory()
    options = ("-vv", "--log-format", "json")
    said: list[bytes] = []
    programs = [
        subprocess.Popen(
            [sys.executable, "-X", "dev", "-m", "towline.cli", command, "--config", str(good), *options, *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for command, more in (("listen", ("--metrics", str(web))), ("forward", ()))
    ]
    try:
        until(lambda: (tmp_path / "local").exists() and (tmp_path / "listen.sock").exists())
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE)
            connection.connect(str(tmp_path / "local"))
            for word in (b"one", b"two"):
                connection.sendall(word)
                assert connection.recv(10) == word
                said.append(run("reconnect", str(tmp_path / "forward.sock")))
            for path in ("/", "/metrics", "/livez", "/readyz"):
                said.append(urllib.request.urlopen(f"http://127.0.0.1:{web}{path}", timeout=10).read())
            with urllib.request.urlopen(f"http://127.0.0.1:{web}/events", timeout=10) as events:
                said.append(b"".join(events.readline() for _ in range(6)))
            for name in ("listen.sock", "forward.sock"):
                said += [run("sessions", str(tmp_path / name), "--json"), run("sessions", str(tmp_path / name))]
                said.append(run("top", str(tmp_path / name), patience=2))
            programs[0].send_signal(signal.SIGHUP)
            programs[1].send_signal(signal.SIGHUP)
            said += [run("check", str(good)), run("check", str(broken)), run("listen", "--config", str(broken))]
            said.append(run("forward", "--config", str(wrong), "-vv"))
            said.append(run("ping", "--config", str(good), "--count", "1", "-vv"))
            said.append(run("ping", "--config", str(wrong), "--count", "1", "-vv"))
    finally:
        for program in reversed(programs):
            program.send_signal(signal.SIGTERM)
            said.append(program.communicate(timeout=PATIENCE)[0])
        target.close()
    assert b"session.attached" in said[-1]
    assert b"**********" in b"".join(said), "the mask of the broken file"
    for text in said:
        assert text
        assert found([secret], text) == [], text.decode(errors="replace")
    assert all(json.loads(line) for text in said[-2:] for line in text.splitlines() if line.startswith(b"{"))


def _echo(server: socket.socket) -> None:
    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(65536):
                connection.sendall(data)

    with contextlib.suppress(OSError):
        while True:
            threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.02)
