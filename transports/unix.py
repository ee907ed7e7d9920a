"""Unix sockets: private by default, on both sides of the file's permissions.

Who may connect is decided twice: by the mode of the socket file, which is right from the moment the file
exists (no umask is trusted, and none is changed: it belongs to the whole process), and by the kernel's word
on who the peer is, which no permission set by mistake can widen. Abstract sockets are not offered: they have
no permissions at all.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat
import struct
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import anyio
import anyio.lowlevel

from towline.endpoint import Endpoint
from towline.errors import ConnectFailed, EndpointError
from towline.link import Link
from towline.service import Dial, Side
from towline.text import differing
from towline.transport import Listener, Transport
from towline.units import FileMode, Seconds

from ._poll import reason
from ._socket import SocketDriver, SocketListener, connect_socket

__all__ = ["Unix"]

logger = logging.getLogger(__name__)

_MAX_PATH: Final = 107 if sys.platform == "linux" else 103  # sun_path without its final zero byte

_SECOND_LOOK: Final = 0.05
"""Seconds after which a socket file that refused is asked again: whoever starts beside us binds first and
listens a few microseconds later, and its file must not be taken for a stale one."""

_BACKLOG_FULL_PAUSE: Final = 0.02  # seconds between two tries to connect while the listener's backlog is full


@dataclass(frozen=True, kw_only=True)
class Unix(Transport):
    """Transport for ``unix:///path/to/socket``.

    Listening refuses a directory in which anybody may replace the file (world-writable, no sticky bit). A
    socket file that nobody listens on is removed, one that is in use is not, and anything that is no socket
    is never touched.

    Dialling does not check who listens: encryption above does, and the directory's owner decides who can.

    Args:
        mode: permissions of the socket file: 0600, its owner only.
        allow_uids: users whose connections are accepted, beside what ``mode`` says. None is the user that
            this process runs as, and root, who could read our memory anyway. ``"any"`` leaves it to ``mode``
            alone: for a tunnel's entrance that programs of other users share. Where the system cannot say
            who the peer is, only ``mode`` counts; Linux and macOS can.
        listener_uids: users whose sockets are connected to: ``"any"``, as encryption above proves who it is. Without
            encryption, None is the user that this process runs as, and root.
        backlog: connections that the kernel holds until they are accepted: 128, since callers are local and
            wait.
        connect_timeout: seconds that a dial waits while the listener's backlog is full.
        linger: seconds that a clean close waits for the peer, as ``SocketDriver`` says.

    >>> Unix(mode=0o660)
    Unix(mode=0o660)
    """

    schemes: ClassVar[tuple[str, ...]] = ("unix",)

    mode: FileMode = 0o600
    allow_uids: Collection[int] | Literal["any"] | None = None
    listener_uids: Collection[int] | Literal["any"] | None = "any"
    backlog: int = 128
    connect_timeout: Seconds = 10.0
    linger: Seconds = 1.0

    def __post_init__(self) -> None:
        for name in ("allow_uids", "listener_uids"):
            uids = getattr(self, name)
            if uids is not None and not isinstance(uids, str):
                object.__setattr__(self, name, frozenset(uids))

    __repr__ = differing

    # --- dialling -------------------------------------------------------------------------------------------

    async def __call__(self, dial: Dial, /) -> Link:
        endpoint = _checked(dial.endpoint)
        await anyio.lowlevel.checkpoint()
        try:
            sock = await self._connect(endpoint)
        except OSError as error:
            why = _WHY.get(error.errno or 0) or reason(error)
            raise ConnectFailed(f"{endpoint} cannot be reached: {why}") from error
        if sock is None:
            raise ConnectFailed(
                f"{endpoint} cannot be reached within {self.connect_timeout:g} s: its listener accepts nothing"
            )
        uid, allowed = peer_uid(sock), _users(self.listener_uids)
        if allowed is not None and uid is not None and uid not in allowed:
            sock.close()
            why = f"it is listened on by another user (uid {uid})"
            raise ConnectFailed(f"{endpoint} is not connected to: {why}") from PermissionError(why)
        return Link(SocketDriver(sock, linger=self.linger), side=Side.DIALLING, endpoint=endpoint)

    async def _connect(self, endpoint: Endpoint) -> socket.socket | None:
        sock = _unix_socket()
        connected = False
        try:
            with anyio.move_on_after(self.connect_timeout):
                while not connected:
                    try:
                        await connect_socket(sock, endpoint.path)
                        connected = True
                    except BlockingIOError:
                        # A full backlog. The kernel has no event for room in it: only another try tells.
                        await anyio.sleep(_BACKLOG_FULL_PAUSE)
            return sock if connected else None
        finally:
            if not connected:
                sock.close()

    # --- listening ------------------------------------------------------------------------------------------

    async def listen(self, endpoint: Endpoint) -> Listener:
        _checked(endpoint)
        _check_directory(endpoint)
        await self._remove_stale(endpoint)
        sock = _unix_socket()
        try:
            mine = self._bind(sock, endpoint.path)
        except OSError as error:
            sock.close()
            why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be bound: {reason(error)}"
            raise ConnectFailed(f"{endpoint} {why}") from error
        except BaseException:
            sock.close()
            raise

        def remove() -> None:
            with contextlib.suppress(OSError):
                if _identity(endpoint.path) == mine:
                    os.unlink(endpoint.path)

        return SocketListener(endpoint, [sock], self._admitting(endpoint), linger=self.linger, closed=remove)

    def adopt(self, sock: socket.socket) -> Listener:
        """Listen on a socket that listens already, and own it. Its file stays: it is of whoever made it."""
        name = sock.getsockname()
        path = os.fsdecode(name) if name and not os.fsencode(name).startswith(b"\0") else ""
        endpoint = Endpoint("unix", path=path) if path else Endpoint("fd", name=str(sock.fileno()))
        return SocketListener(endpoint, [sock], self._admitting(endpoint), linger=self.linger)

    def _admitting(self, endpoint: Endpoint) -> Callable[[socket.socket, Any], str | None]:
        allowed = _users(self.allow_uids)
        told: set[int] = set()

        def admit(new: socket.socket, address: Any) -> str | None:
            uid = peer_uid(new)
            if allowed is None or uid is None or uid in allowed:
                return ""  # no source: limits per source mean nothing on one machine
            if uid not in told and len(told) < 100:  # once for each, so that nobody can fill the log
                told.add(uid)
                logger.warning(
                    "%s: refused a connection of uid %d",
                    endpoint,
                    uid,
                    extra={"event": "listener.refused", "endpoint": str(endpoint), "uid": uid},
                )
            return None

        return admit

    def _bind(self, sock: socket.socket, path: str) -> _Identity:
        """Bind and listen. The file has its mode before anybody can connect."""
        with contextlib.suppress(OSError):
            # Linux gives the file the mode of the socket itself, less the umask. Elsewhere this is refused.
            os.fchmod(sock.fileno(), self.mode)
        sock.bind(path)
        try:
            if stat.S_IMODE(os.lstat(path).st_mode) != self.mode:
                os.chmod(path, self.mode)  # not listening yet: whoever was quicker than this is refused
            mine = _identity(path)
            sock.listen(self.backlog)
        except BaseException:
            os.unlink(path)
            raise
        return mine

    async def _remove_stale(self, endpoint: Endpoint) -> None:
        """Remove a socket file that nobody listens on.

        Raises:
            ConnectFailed: if somebody does, or if it is no socket.
        """
        seen: _Identity | None = None
        while True:
            try:
                info = os.lstat(endpoint.path)
            except OSError:  # nothing there; or bind() will say what is wrong
                await anyio.lowlevel.checkpoint()
                return
            if not stat.S_ISSOCK(info.st_mode):
                raise ConnectFailed(f"{endpoint} is in use: there is a file that is no socket")
            with _unix_socket() as probe:
                try:
                    probe.connect(endpoint.path)
                except ConnectionRefusedError:
                    pass
                except OSError as error:
                    if error.errno == errno.ENOENT:
                        continue
                    raise ConnectFailed(f"{endpoint} is in use: {reason(error)}") from error
                else:
                    raise ConnectFailed(f"{endpoint} is in use: another listener has it")
            identity = _identity_of(info)
            if seen == identity:
                with contextlib.suppress(OSError):
                    if _identity(endpoint.path) == identity:
                        os.unlink(endpoint.path)
                return
            seen = identity
            await anyio.sleep(_SECOND_LOOK)


def _users(uids: Collection[int] | Literal["any"] | None) -> Collection[int] | None:
    """None for all of them."""
    if uids is None:
        return {os.geteuid(), 0}
    return None if isinstance(uids, str) else uids


_WHY: Final = {
    errno.ENOENT: "there is no such socket file",
    errno.ECONNREFUSED: "nobody listens on it",
    errno.EPROTOTYPE: "it is not a stream socket",
}

_Identity = tuple[int, int, int]
"""Device, inode and time of birth: inode numbers alone come back within microseconds."""


def _identity_of(info: os.stat_result) -> _Identity:
    return info.st_dev, info.st_ino, info.st_mtime_ns


def _identity(path: str) -> _Identity:
    return _identity_of(os.lstat(path))


def _unix_socket() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    return sock


def _checked(endpoint: Endpoint) -> Endpoint:
    if endpoint.scheme != "unix":
        raise EndpointError(f"Unix serves unix:///path, not {endpoint}")
    if not hasattr(socket, "AF_UNIX"):
        raise EndpointError(f"{endpoint}: Python has no Unix sockets on this system; pipe://name is for Windows")
    length = len(os.fsencode(endpoint.path))
    if length > _MAX_PATH:
        raise EndpointError(f"{endpoint}: the path has {length} bytes, where a socket's may have {_MAX_PATH}")
    return endpoint


def _check_directory(endpoint: Endpoint) -> None:
    directory = os.path.dirname(endpoint.path)
    try:
        mode = os.stat(directory).st_mode
    except OSError as error:
        raise ConnectFailed(f"{endpoint}: its directory cannot be used: {reason(error)}") from error
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise EndpointError(
            f"{endpoint}: anybody may replace files in {directory} (mode 0{stat.S_IMODE(mode):o}): "
            "use a directory of your own, or set its sticky bit"
        )


def peer_uid(sock: socket.socket) -> int | None:
    """The user at the other end, as the kernel knows it; None where this system cannot tell."""
    if sys.platform == "linux":
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return int(struct.unpack("iII", credentials)[1])
    if sys.platform == "darwin":
        # struct xucred: version, uid, groups; by LOCAL_PEERCRED (1) at SOL_LOCAL (0), which Python does not
        # name.
        return int(struct.unpack_from("II", sock.getsockopt(0, 1, 76))[1])
    return None
