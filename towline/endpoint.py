"""Where to connect or listen, as one value that is read from one string.

A string that is not exactly one of the known forms is an `EndpointError`; nothing is ever guessed.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from towline.errors import EndpointError

__all__ = ["Endpoint", "is_loopback"]

FORMS: Final = {
    "tcp": "tcp://host:port, tcp://[::1]:port",
    "unix": "unix:///path/to/socket",
    "fd": "fd://3",
    "pipe": "pipe://name",
    "memory": "memory://name",
    "stdio": "stdio://",
    "exec": "exec:///usr/bin/program?arg=one&arg=two",
}
"""Every scheme, with the form it takes."""

_HOST = re.compile(r"[A-Za-z0-9_.*-]+")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
_NAME = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One place to connect to or to listen on.

    Build it with `Endpoint.parse`. Which fields are set depends on the scheme: ``tcp`` has ``host`` and ``port``;
    ``unix`` and ``exec`` a ``path``; ``pipe``, ``memory`` and ``fd`` a ``name``; ``exec`` also ``args``.

    >>> Endpoint.parse("tcp://[::1]:7000")
    Endpoint('tcp://[::1]:7000')
    >>> Endpoint.parse("tcp://localhost").port
    Traceback (most recent call last):
    ...
    towline.errors.EndpointError: 'tcp://localhost' has no port: write tcp://localhost:PORT
    """

    scheme: str
    host: str = ""
    port: int = 0
    path: str = ""
    name: str = ""
    args: tuple[str, ...] = ()

    @classmethod
    def parse(cls, value: str | Endpoint) -> Endpoint:
        """Read an endpoint.

        Args:
            value: the text, or an endpoint, which is returned as it is.

        Raises:
            EndpointError: with the expected form, if ``value`` is anything else.
        """
        if isinstance(value, Endpoint):
            return value
        scheme, colon, rest = value.partition("://")
        if not colon or scheme not in FORMS:
            known = "; ".join(FORMS.values())
            raise EndpointError(f"{value!r} is not an endpoint: expected one of {known}")
        if any(c.isspace() or not c.isprintable() for c in value.strip(" ")) and scheme != "unix":
            raise EndpointError(f"{value!r} has blanks or control characters in it")
        read = {
            "tcp": _tcp,
            "unix": _unix,
            "fd": _fd,
            "pipe": _named,
            "memory": _named,
            "stdio": _stdio,
            "exec": _exec,
        }[scheme]
        return read(value, scheme, rest)

    def with_port(self, port: int) -> Endpoint:
        """The same endpoint with the port that was really bound."""
        return Endpoint(self.scheme, self.host, port)

    def __str__(self) -> str:
        match self.scheme:
            case "tcp":
                host = f"[{self.host}]" if ":" in self.host else self.host
                return f"tcp://{host}:{self.port}"
            case "unix":
                return f"unix://{quote(self.path)}"
            case "exec":
                query = "&".join(f"arg={quote(arg, safe='')}" for arg in self.args)
                return f"exec://{quote(self.path)}" + (f"?{query}" if query else "")
            case _:
                return f"{self.scheme}://{self.name}"

    def __repr__(self) -> str:
        return f"Endpoint({str(self)!r})"


def _tcp(value: str, scheme: str, rest: str) -> Endpoint:
    if rest.count(":") > 1 and not rest.startswith("[") and "@" not in rest:
        raise EndpointError(f"{value!r}: put the IPv6 address in brackets: tcp://[::1]:port")
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        raise EndpointError(f"{value!r} is not {FORMS['tcp']}: its port is no number from 0 to 65535") from None
    host = parts.hostname or ""
    if parts.path or parts.query or parts.fragment or "@" in rest or "#" in rest or "?" in rest:
        raise EndpointError(f"{value!r} has more than a host and a port: expected {FORMS['tcp']}")
    if not host:
        raise EndpointError(f"{value!r} has no host: expected {FORMS['tcp']}")
    if not rest.startswith("[") and not _HOST.fullmatch(host):
        raise EndpointError(f"{value!r}: {rest.rpartition(':')[0]!r} is not the name or address of a host")
    if port is None:
        raise EndpointError(f"{value!r} has no port: write tcp://{rest.rstrip(':')}:PORT")
    return Endpoint(scheme, host=host, port=port)


def _unix(value: str, scheme: str, rest: str) -> Endpoint:
    path = unquote(rest)
    if not path.startswith("/"):
        raise EndpointError(f"{value!r}: the path must be absolute, with three slashes: {FORMS['unix']}")
    if path.endswith("/") or "\0" in path:
        raise EndpointError(f"{value!r} does not name a socket file: expected {FORMS['unix']}")
    return Endpoint(scheme, path=path)


def _fd(value: str, scheme: str, rest: str) -> Endpoint:
    if not _NUMBER.fullmatch(rest):
        raise EndpointError(f"{value!r}: expected {FORMS['fd']}, with the number of a descriptor of this process")
    return Endpoint(scheme, name=rest)


def _named(value: str, scheme: str, rest: str) -> Endpoint:
    if not _NAME.fullmatch(rest):
        raise EndpointError(
            f"{value!r}: expected {FORMS[scheme]}, where the name has letters, digits, '.', '_' and '-'"
        )
    return Endpoint(scheme, name=rest)


def _stdio(value: str, scheme: str, rest: str) -> Endpoint:
    if rest:
        raise EndpointError(f"{value!r}: stdio:// takes nothing after it")
    return Endpoint(scheme)


def _exec(value: str, scheme: str, rest: str) -> Endpoint:
    path, _, query = rest.partition("?")
    path = unquote(path)
    if not path.startswith("/") or path.endswith("/"):
        raise EndpointError(f"{value!r}: the program needs an absolute path: {FORMS['exec']}")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise EndpointError(f"{value!r}: {error}: expected {FORMS['exec']}") from None
    if unknown := [key for key, _ in pairs if key != "arg"]:
        raise EndpointError(f"{value!r}: unknown parameter {unknown[0]!r}: expected {FORMS['exec']}")
    return Endpoint(scheme, path=path, args=tuple(text for _, text in pairs))


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, and reached by nobody else.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
