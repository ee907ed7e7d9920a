"""A tunnel made of the real programs, ``towline listen`` and ``towline forward``, with a link between that is cut."""

from __future__ import annotations

import importlib.util
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import anyio.from_thread
import pytest

from towline.layers.encryption.keys import Psk
from towline.testing import ChaosProxy

CUT_EVERY = 0.5
"""Seconds that a link lives: what issue and README promise."""

READY = 30.0


@contextmanager
def running(*arguments: str, log: Path) -> Generator[str]:
    """Run towline, and give the endpoint that it listens on."""
    with (
        open(log, "w") as stderr,
        subprocess.Popen(
            [sys.executable, "-m", "towline.cli", *arguments],
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={**os.environ, "NO_COLOR": "1"},
        ) as process,
    ):
        try:
            assert process.stdout is not None
            assert select.select([process.stdout], [], [], READY)[0], log.read_text()
            line = process.stdout.readline().decode()
            assert line.startswith("listening on "), (line, log.read_text())
            yield line.split()[-1]
        finally:
            process.send_signal(signal.SIGKILL)


@pytest.fixture
def tunnel_to(tmp_path: Path) -> Generator[Callable[..., tuple[str, ChaosProxy]]]:
    """Call it with the endpoint of a server program, and get where its clients connect, and the proxy between."""
    key = str(tmp_path / "tunnel-psk")
    Psk.generate().write(key)
    with ExitStack() as stack:
        uvloop = importlib.util.find_spec("uvloop") is not None  # the proxy should not be what takes the time
        portal = stack.enter_context(
            anyio.from_thread.start_blocking_portal(backend_options={"use_uvloop": True} if uvloop else {})
        )

        def tunnel_to(target: str, local: str = "tcp://127.0.0.1:0") -> tuple[str, ChaosProxy]:
            # A black hole is found after three heartbeats, so that these do not eat up the time of a test.
            options = ("--psk-file", key, "--heartbeat", "0.1", "-v")
            far = stack.enter_context(
                running("listen", "tcp://127.0.0.1:0", "--to", target, *options, log=tmp_path / "listen.log")
            )
            proxy = stack.enter_context(
                portal.wrap_async_context_manager(ChaosProxy(far, seed=11, cut_every=CUT_EVERY))
            )
            near = stack.enter_context(
                running("forward", local, "--via", str(proxy.endpoint), *options, log=tmp_path / "forward.log")
            )
            return near, proxy

        yield tunnel_to
