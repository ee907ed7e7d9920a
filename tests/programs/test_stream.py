"""One long stream through a tunnel whose link is cut every half second: 1 GiB has the right SHA-256."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from collections.abc import Callable

import pytest

from towline.testing import ChaosProxy

pytestmark = [pytest.mark.real_time, pytest.mark.timeout(300)]

SIZE = int(os.environ.get("TOWLINE_STREAM_SIZE", 1 << 30))
"""Bytes; ten seconds on two cores. A smaller number, for a machine that is slow or busy."""

CHUNK = 1 << 20


def digest(connection: socket.socket) -> hashlib._Hash:
    """Read to the end."""
    sha = hashlib.sha256()
    while data := connection.recv(CHUNK):
        sha.update(data)
    return sha


def test_a_long_stream_has_the_right_digest(tunnel_to: Callable[[str], tuple[str, ChaosProxy]]) -> None:
    arrived: list[str] = []

    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            connection.settimeout(60)
            arrived.append(digest(connection).hexdigest())
            # The program has half-closed its connection; this still reaches it.
            connection.sendall(arrived[0].encode())

    with socket.create_server(("127.0.0.1", 0)) as server:
        serving = threading.Thread(target=serve)
        serving.start()
        near, proxy = tunnel_to(f"tcp://127.0.0.1:{server.getsockname()[1]}")
        block = os.urandom(CHUNK + 4096)
        sent = hashlib.sha256()
        with socket.create_connection(("127.0.0.1", int(near.rpartition(":")[2])), timeout=60) as connection:
            for number in range(-(-SIZE // CHUNK)):
                size = min(CHUNK, SIZE - number * CHUNK)
                data = memoryview(block)[number % 4096 : number % 4096 + size]
                connection.sendall(data)
                sent.update(data)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.makefile("rb").read().decode()
        serving.join(60)
    assert arrived == [sent.hexdigest()]
    assert answer == sent.hexdigest()
    assert SIZE < 1 << 28 or proxy.cuts > 3
