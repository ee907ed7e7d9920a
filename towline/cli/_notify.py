"""What a service manager is told: that the program is ready, reloads, stops, lives. (systemd's ``sd_notify``.)

Without ``NOTIFY_SOCKET`` in the environment nobody asks, and nothing is sent. A message that cannot be sent is dropped:
a manager that does not listen must not harm the service.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from typing import Final

__all__ = ["Notifier"]

MAX_STATUS: Final = 200
"""The most characters of a status: it is one line of ``systemctl status``."""


class Notifier:
    """Tells the service manager that started this process.

    Args:
        environment: what says whom to tell, and how often.

    Attributes:
        watchdog: seconds within which the manager wants to hear that the program lives; None if it does not.

    >>> Notifier({}).is_heard
    False
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog = _watchdog(environment) if self.is_heard else None

    @property
    def is_heard(self) -> bool:
        """Whether there is anybody to tell."""
        return self._address[:1] in ("/", "\0")

    def ready(self) -> None:
        """It serves: after its start, and after each reload."""
        self._send("READY=1")

    def reloading(self) -> None:
        """It reads its files again, until the next `ready`."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """It is about to end."""
        self._send("STOPPING=1")

    def alive(self) -> None:
        """It still runs."""
        self._send("WATCHDOG=1")

    def status(self, text: str) -> None:
        """One line for people."""
        self._send(f"STATUS={' '.join(text.split())[:MAX_STATUS]}")

    def _send(self, message: str) -> None:
        if not self.is_heard:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(message.encode(), self._address)


def _watchdog(environment: Mapping[str, str]) -> float | None:
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None  # it is about another process
    try:
        microseconds = int(environment.get("WATCHDOG_USEC", ""))
    except ValueError:
        return None
    return microseconds / 1e6 if microseconds > 0 else None
