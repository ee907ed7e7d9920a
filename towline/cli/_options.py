"""From what people type to values: sizes, key files, and the stack that both ends of a tunnel have."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import ClassVar, Final

from towline.endpoint import Endpoint
from towline.errors import KeyFileError
from towline.layers.encryption import Encryption
from towline.layers.encryption.keys import AllowList, Psk, StaticKey, StaticKeys
from towline.layers.framing import Framing
from towline.layers.heartbeat import Heartbeat
from towline.layers.resume import Resume
from towline.layers.retry import Retry
from towline.link import Link
from towline.policies import Backoff
from towline.service import Kind, Side, Upgrade
from towline.stack import Stack

from ._failure import Failure

__all__ = ["FileKeys", "client_keys", "parse_endpoint", "parse_size", "positive", "server_keys", "tunnel_stack"]

_SIZE = re.compile(r"(\d+)\s*([kmg]?)(i?b)?", re.IGNORECASE)
_UNITS: Final = {"": 0, "k": 10, "m": 20, "g": 30}

SMALLEST_BUFFER: Final = 64 << 10
MAX_MESSAGE: Final = 4 << 20
OVERHEAD: Final = 128  # of a message in the buffer
FIRST_ATTACH: Final = 30.0
"""A first connect may take so long, whatever ``--retry-for`` says: a program waits for it."""


def parse_size(option: str, text: str) -> int:
    """A size such as ``8M``, ``512 KiB`` or ``65536``; the units are powers of 1024.

    Raises:
        Failure: if it is none.

    >>> parse_size("--buffer", "8M")
    8388608
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise Failure(f"{option}: {text!r} is not a size: write 8M, 512K or 65536")
    return int(match[1]) << _UNITS[match[2].lower()]


def positive(option: str, value: float) -> float:
    """A number of seconds above zero.

    Raises:
        Failure: if it is not.
    """
    if not 0 < value < 1e9:
        raise Failure(f"{option}: {value:g} s, where more than 0 is needed")
    return value


def parse_endpoint(option: str, text: str, *, dialled: bool = False) -> Endpoint:
    """An endpoint, from an argument that the message names.

    Raises:
        Failure: if it is none, or is to be connected to and cannot be.
    """
    try:
        endpoint = Endpoint.parse(text)
    except ValueError as error:
        raise Failure(f"{option}: {error}") from None
    only_listened = endpoint.scheme == "tcp" and (endpoint.port == 0 or endpoint.host == "*")
    if dialled and (only_listened or endpoint.scheme == "fd"):
        raise Failure(f"{option}: {endpoint} can be listened on, but not connected to")
    return endpoint


class FileKeys(Upgrade):
    """Layer: `Encryption` with keys from files, which can be read again while it is in use.

    New connections have the new keys; those that exist keep theirs (D21: sessions live through a change of keys).

    Raises:
        KeyFileError: if a file cannot be read.
    """

    needs: ClassVar[tuple[Kind, ...]] = Encryption.needs
    gives: ClassVar[Kind] = Encryption.gives
    wire: ClassVar[str] = Encryption.wire

    def __init__(self, read: Callable[[], Encryption]) -> None:
        self._read = read
        self._current = read()

    def __repr__(self) -> str:
        return repr(self._current)

    def reload(self) -> frozenset[bytes]:
        """Read the files again; while one is broken, everything stays as it was.

        Returns:
            The public keys that were on the allow-list and are no longer.

        Raises:
            KeyFileError: if a file cannot be read.
        """
        before = _allowed(self._current)
        self._current = self._read()
        return before - _allowed(self._current)

    async def upgrade(self, link: Link, side: Side) -> None:
        await self._current.upgrade(link, side)


def _allowed(encryption: Encryption) -> frozenset[bytes]:
    keys = encryption.keys
    if keys is None or not isinstance(keys.trust, AllowList):
        return frozenset()
    return frozenset(peer.public_key for peer in keys.trust)


def server_keys(psk_file: str | None, keys: str | None, allow: str | None) -> FileKeys:
    """The keys of a listening end.

    Raises:
        Failure: if the options do not make one way.
        KeyFileError: if a file cannot be read.
    """
    if psk_file is not None and keys is None and allow is None:
        return FileKeys(lambda: Encryption(psk=Psk.from_file(psk_file)))
    if psk_file is None and keys is not None and allow is not None:
        return FileKeys(
            lambda: Encryption(keys=StaticKeys(StaticKey.from_file(keys), trust=AllowList.from_file(allow)))
        )
    raise Failure("give either --psk-file FILE, or --keys FILE and --allow FILE")


def client_keys(psk_file: str | None, keys: str | None, peer: str | None) -> FileKeys:
    """The keys of a dialling end.

    Raises:
        Failure: if the options do not make one way.
        KeyFileError: if a file or the peer's key cannot be read.
    """
    if psk_file is not None and keys is None and peer is None:
        return FileKeys(lambda: Encryption(psk=Psk.from_file(psk_file)))
    if psk_file is None and keys is not None and peer is not None:
        line = peer.strip()
        if len(line.split()) == 1:
            line = f"x25519 {line}"
        try:
            trust = AllowList([line])
        except KeyFileError as error:
            raise Failure(
                f"--peer: not the server's public key, as towline keygen --static prints it ({error})"
            ) from None
        return FileKeys(lambda: Encryption(keys=StaticKeys(StaticKey.from_file(keys), trust=trust)))
    raise Failure("give either --psk-file FILE, or --keys FILE and --peer KEY")


def tunnel_stack(keys: FileKeys, *, retry_for: float = 300.0, buffer: int = 8 << 20, heartbeat: float = 5.0) -> Stack:
    """The stack of both ends of a tunnel, and of ping.

    Raises:
        Failure: if a number makes no sense.
    """
    positive("--retry-for", retry_for)
    positive("--heartbeat", heartbeat)
    if not SMALLEST_BUFFER <= buffer <= 1 << 34:
        raise Failure(f"--buffer: {buffer:,} bytes, where {SMALLEST_BUFFER:,} to {1 << 34:,} will do")
    return Stack(
        Resume(
            buffer=buffer,
            max_message=min(MAX_MESSAGE, buffer - OVERHEAD),
            ttl=retry_for,
            attach_timeout=min(FIRST_ATTACH, retry_for),
        ),
        Retry(Backoff.exponential()),
        Heartbeat(interval=heartbeat, timeout=3 * heartbeat),
        Framing(),
        keys,
    )
