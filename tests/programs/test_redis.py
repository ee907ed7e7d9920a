"""Debian's redis-server through the tunnel, while its link is cut every half second."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from towline.testing import ChaosProxy

pytestmark = [
    pytest.mark.real_time,
    pytest.mark.program,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        shutil.which("redis-server") is None or shutil.which("redis-benchmark") is None,
        reason="redis-server and redis-benchmark are not installed (apt-get install redis-server redis-tools)",
    ),
]

READY = 30.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def redis(tmp_path: Path) -> Generator[str]:
    """A redis-server of our own, without files; gives its endpoint."""
    port = free_port()
    with (
        open(tmp_path / "redis.log", "w") as log,
        subprocess.Popen(
            ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)],
            stdout=log,
            stderr=log,
        ) as process,
    ):
        try:
            end = time.monotonic() + READY
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except OSError:
                    assert time.monotonic() < end, (tmp_path / "redis.log").read_text()
                    time.sleep(0.05)
            yield f"tcp://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)


def test_redis_benchmark_finishes_without_an_error(
    redis: str, tunnel_to: Callable[[str], tuple[str, ChaosProxy]]
) -> None:
    near, proxy = tunnel_to(redis)
    port = near.rpartition(":")[2]
    # The benchmark has twenty parts, and runs for many minutes: one with small answers, in full, and one with large.
    # All of them: TOWLINE_FULL=1 (see `test_all_of_redis_benchmark_finishes_without_an_error`).
    for part, count in (("SET", 100_000), ("LRANGE_100", 10_000)):
        done = subprocess.run(
            ["redis-benchmark", "-h", "127.0.0.1", "-p", port, "-q", "-n", str(count), "-c", "20", "-t", part.lower()],
            capture_output=True,
            text=True,
            timeout=240,
        )
        output = (done.stdout + done.stderr).replace("\r", "\n")
        assert done.returncode == 0, output
        assert "rror" not in output, output
        assert any(line.startswith(part) and "requests per second" in line for line in output.splitlines()), output
    assert proxy.cuts > 20


@pytest.mark.timeout(3600)
@pytest.mark.skipif("TOWLINE_FULL" not in os.environ, reason="runs for many minutes: set TOWLINE_FULL=1")
def test_all_of_redis_benchmark_finishes_without_an_error(
    redis: str, tunnel_to: Callable[[str], tuple[str, ChaosProxy]]
) -> None:
    near, proxy = tunnel_to(redis)
    command = ["redis-benchmark", "-h", "127.0.0.1", "-p", near.rpartition(":")[2], "-q", "-n", "100000", "-c", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3500)
    lines = (done.stdout + done.stderr).replace("\r", "\n").splitlines()
    parts = [line for line in lines if "requests per second" in line]
    print(*parts, f"{proxy.cuts} cuts", sep="\n")
    assert done.returncode == 0, lines[-5:]
    assert not [line for line in lines if "rror" in line]
    assert len(parts) >= 15
    assert proxy.cuts > 50
