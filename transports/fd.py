"""Sockets that were handed over: who started this process has bound them, and listens already (socket activation)."""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass, field
from typing import ClassVar

import anyio.lowlevel

from towline.endpoint import Endpoint
from towline.errors import ConnectFailed, EndpointError
from towline.link import Link
from towline.service import Dial
from towline.text import differing
from towline.transport import Listener, Transport

from ._poll import reason
from .tcp import Tcp
from .unix import Unix

__all__ = ["Fd"]


@dataclass(frozen=True, kw_only=True)
class Fd(Transport):
    """Transport for ``fd://3``: listens on a socket that the process was started with. systemd's are numbered from 3.

    Connections wait in the kernel while this process is restarted, and a port below 1024 needs no privilege here. The
    listener says what the socket is really bound to, ``tcp://`` or ``unix://``, and owns the descriptor from now on. A
    Unix socket keeps its file, and the mode of it, since both belong to whoever made them.

    Args:
        tcp: how TCP connections are configured.
        unix: whose connections are accepted on a Unix socket.

    >>> Fd(tcp=Tcp(keepalive=30))
    Fd(tcp=Tcp(keepalive=30))
    """

    schemes: ClassVar[tuple[str, ...]] = ("fd",)

    tcp: Tcp = field(default_factory=Tcp)
    unix: Unix = field(default_factory=Unix)

    __repr__ = differing

    async def __call__(self, dial: Dial, /) -> Link:
        raise EndpointError(f"{dial.endpoint} can be listened on, but not connected to")

    async def listen(self, endpoint: Endpoint) -> Listener:
        if endpoint.scheme != "fd":
            raise EndpointError(f"Fd serves fd://NUMBER, not {endpoint}")
        await anyio.lowlevel.checkpoint()
        sock = _listening_socket(endpoint)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            return self.tcp.adopt(sock)
        return self.unix.adopt(sock)


def _listening_socket(endpoint: Endpoint) -> socket.socket:
    try:
        sock = socket.socket(fileno=int(endpoint.name))
    except OSError as error:
        what = "is not open here" if error.errno == errno.EBADF else reason(error)
        raise ConnectFailed(f"{endpoint} cannot be used: it {what}") from error
    try:
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError:
        listens = 0
    known = (socket.AF_INET, socket.AF_INET6, getattr(socket, "AF_UNIX", None))
    if sock.family not in known or sock.type != socket.SOCK_STREAM or not listens:
        sock.detach()  # it is somebody else's
        raise ConnectFailed(f"{endpoint} cannot be used: it is not a listening TCP or Unix socket")
    sock.set_inheritable(False)
    sock.setblocking(False)
    return sock
