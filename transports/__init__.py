"""The outside world: TCP, Unix sockets, sockets handed over, Windows named pipes, a process's own streams, memory."""

from __future__ import annotations

from ._stream import StreamDriver
from .fd import Fd
from .memory import Memory
from .pipe import Pipe
from .stdio import Stdio
from .tcp import Tcp
from .unix import Unix

__all__ = ["Fd", "Memory", "Pipe", "Stdio", "StreamDriver", "Tcp", "Unix"]
