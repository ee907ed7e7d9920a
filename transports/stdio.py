"""A process's standard streams as a link: ours (``stdio://``), or those of a program that we start
(``exec:///...``).

The typical use is ssh as the carrier, with ``stdio://`` at its far end::

    exec:///usr/bin/ssh?arg=host&arg=towline&arg=listen&arg=stdio://

Pipes have no reset: the peer of an aborted link sees an end. No shell is involved anywhere.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Final

import anyio
import anyio.lowlevel

from towline.endpoint import Endpoint
from towline.errors import ConnectFailed, EndpointError
from towline.link import Link
from towline.service import Dial, Side
from towline.text import differing
from towline.transport import Listener, Transport
from towline.units import Seconds

from ._poll import PollDriver, Waitable, reason

__all__ = ["PipeFds", "Stdio"]

_REAP_EVERY: Final = 0.01  # seconds between two looks at whether a child that we closed has exited


class PipeFds(PollDriver):
    """Moves bytes through two descriptors, which it owns from now on: pipes, sockets or terminals.

    Args:
        incoming: what to read from.
        outgoing: what to write to; another number than ``incoming``.
        name: what this is, for log lines.
        linger: see `PollDriver`.
        closed: called once, when both are closed.
    """

    def __init__(
        self,
        incoming: int,
        outgoing: int,
        *,
        name: str = "a pair of pipes",
        linger: float = 1.0,
        closed: Callable[[], None] | None = None,
    ) -> None:
        # Blocking or not is a property of what is open, and not of the number: a terminal's is the shell's as
        # well. So it is put back. Both are asked before either is changed, as both may be one terminal.
        self._were_blocking = {fd: os.get_blocking(fd) for fd in (incoming, outgoing)}
        self._is_one = os.path.samestat(os.fstat(incoming), os.fstat(outgoing))
        self._incoming = incoming
        self._outgoing = outgoing
        self._name = name
        self._closed = closed
        super().__init__(
            Waitable(incoming, lambda: self._close(incoming)),
            Waitable(outgoing, lambda: self._close(outgoing)),
            linger=linger,
        )
        self._open = 2
        for fd in self._were_blocking:
            os.set_blocking(fd, False)

    def _close(self, fd: int) -> None:
        self._open -= 1
        if not self._is_one:
            self._put_back(fd)
        elif not self._open:  # while one number is in use, what is open must not block
            self._put_back(self._incoming)
            self._put_back(self._outgoing)
        if not self._open and self._closed is not None:
            self._closed()

    def _put_back(self, fd: int) -> None:
        with contextlib.suppress(OSError):
            os.set_blocking(fd, self._were_blocking[fd])
        with contextlib.suppress(OSError):
            os.close(fd)

    def _recv_into(self, buffer: memoryview) -> int:
        return os.readv(self._incoming, [buffer])

    def _try_send(self, data: bytes | bytearray | memoryview) -> int:
        return os.write(self._outgoing, data)

    def _shutdown(self) -> None:
        if stat.S_ISSOCK(os.fstat(self._outgoing).st_mode):
            # One socket is both of our streams, perhaps (inetd, and other parents): closing one number ends
            # nothing.
            with socket.socket(fileno=os.dup(self._outgoing)) as sock:
                sock.shutdown(socket.SHUT_WR)
        self._writer.close()

    @property
    def description(self) -> str:
        return self._name


class _Child(PipeFds):
    """The standard streams of a program that we started. Ends it when closed, and leaves no zombie.

    Args:
        process: the program; its stdin and stdout are ours.
        patience: seconds that it has to exit by itself, and again after it was asked to terminate.
        linger: see `PollDriver`.
    """

    def __init__(self, process: subprocess.Popen[bytes], *, name: str, patience: float, linger: float) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        incoming, outgoing = os.dup(process.stdout.fileno()), os.dup(process.stdin.fileno())
        process.stdout.close()
        process.stdin.close()
        super().__init__(incoming, outgoing, name=name, linger=linger)
        self._process = process
        self._patience = patience
        self._ending = False

    def abort(self) -> None:
        super().abort()
        if self._ending:
            return
        self._ending = True
        if self._process.poll() is None:
            self._process.terminate()
            if self._process.poll() is None:
                # A thread, since nobody may be left to await anything: the loop itself may be ending.
                threading.Thread(target=self._reap, name="towline reaper", daemon=True).start()

    def _reap(self) -> None:
        try:
            self._process.wait(self._patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    async def aclose(self) -> None:
        """Close its stdin after everything written, give it time to exit, then end it."""
        if self._ending:
            await super().aclose()
            return
        try:
            await super().aclose()
            for end in (None, self._process.terminate, self._process.kill):
                if end is not None:
                    end()
                if await self._exited(self._patience):
                    break
        finally:
            self.abort()  # when cancelled; else there is nothing left to end

    async def _exited(self, timeout: float) -> bool:
        with anyio.move_on_after(timeout):
            while self._process.poll() is None:  # noqa: ASYNC110 -- no event for it on every system and backend
                await anyio.sleep(_REAP_EVERY)
        return self._process.returncode is not None


@dataclass(frozen=True, kw_only=True)
class Stdio(Transport):
    """Transport for ``stdio://`` and ``exec:///path/to/program?arg=one&arg=two``. POSIX only.

    ``stdio://`` gives exactly one link, dialled or listened for. From then on the process's own stdin is
    empty and its stdout goes to stderr, so that a stray ``print`` cannot get into the link. `Listener.serve`
    returns when that link was closed.

    ``exec`` can only be dialled. The program's stderr, its terminal and its environment are ours, so that ssh
    can ask for a password. It ends with the link: its stdin is closed, then it is terminated, then killed.

    Args:
        patience: seconds that a program has to exit after its stdin was closed, and again after it was asked
            to terminate; 2, since Retry may be waiting to start the next one.
        linger: seconds that a clean close waits for the peer to end, as ``PipeFds`` says.
        stdin, stdout: the descriptors that ``stdio://`` means.

    >>> Stdio()
    Stdio()
    """

    schemes: ClassVar[tuple[str, ...]] = ("stdio", "exec")

    patience: Seconds = 2.0
    linger: Seconds = 1.0
    stdin: int = 0
    stdout: int = 1

    _is_taken: bool = field(default=False, init=False, repr=False, compare=False)

    __repr__ = differing

    async def __call__(self, dial: Dial, /) -> Link:
        endpoint = _checked(dial.endpoint)
        await anyio.lowlevel.checkpoint()
        driver = self._start(endpoint) if endpoint.scheme == "exec" else self._take(endpoint)
        return Link(driver, side=Side.DIALLING, endpoint=endpoint)

    async def listen(self, endpoint: Endpoint) -> Listener:
        _checked(endpoint)
        await anyio.lowlevel.checkpoint()
        if endpoint.scheme == "exec":
            raise EndpointError(f"{endpoint} can be connected to, but not listened on")
        listener = _StdioListener(endpoint)
        listener.driver = self._take(endpoint, listener.done)
        return listener

    def _start(self, endpoint: Endpoint) -> PipeFds:
        command = [endpoint.path, *endpoint.args]
        try:
            # Starting blocks until the program is loaded, which is a few milliseconds, and cannot be
            # cancelled halfway.
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        except (OSError, ValueError) as error:
            missing = isinstance(error, FileNotFoundError)
            why = "there is no such program" if missing else reason(error)
            raise ConnectFailed(f"{endpoint.path} cannot be started: {why}") from error
        name = f"the program {endpoint.path}"
        return _Child(process, name=name, patience=self.patience, linger=self.linger)

    def _take(self, endpoint: Endpoint, closed: Callable[[], None] | None = None) -> PipeFds:
        """Move our own stdin and stdout to other numbers, and put harmless things in their place."""
        if self._is_taken:
            failed = ConnectFailed(f"{endpoint} is in use, or was: stdin and stdout make one link, once")
            failed.retryable = False
            raise failed
        with contextlib.suppress(OSError, ValueError, AttributeError):  # stdout may be closed, or None
            sys.stdout.flush()
        taken: list[int] = []
        try:
            taken.append(os.dup(self.stdin))
            taken.append(os.dup(self.stdout))
            driver = PipeFds(*taken, name="stdin and stdout", linger=self.linger, closed=closed)
        except OSError as error:
            for fd in taken:
                os.close(fd)
            raise ConnectFailed(f"{endpoint} cannot be used: {reason(error)}") from error
        object.__setattr__(self, "_is_taken", True)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, self.stdin)
        try:
            os.dup2(2, self.stdout)
        except OSError:  # there is no stderr
            os.dup2(null, self.stdout)
        os.close(null)
        return driver


class _StdioListener(Listener):
    driver: PipeFds

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._is_served = False
        self._done = anyio.Event()

    def __repr__(self) -> str:
        return "<the listener on stdin and stdout>"

    def done(self) -> None:
        self._done.set()

    async def serve(self, accepted: Callable[[Link], None]) -> None:
        if not self._is_served and not self._done.is_set():
            self._is_served = True
            accepted(Link(self.driver, side=Side.LISTENING, endpoint=self.endpoint))
        await self._done.wait()

    async def aclose(self) -> None:
        if not self._is_served:
            self.driver.abort()
        self._done.set()
        await anyio.lowlevel.checkpoint()


def _checked(endpoint: Endpoint) -> Endpoint:
    if endpoint.scheme not in Stdio.schemes:
        raise EndpointError(f"Stdio serves stdio:// and exec:///program, not {endpoint}")
    if sys.platform == "win32":
        raise EndpointError(f"{endpoint}: pipes of a process cannot be waited for on Windows")
    return endpoint
