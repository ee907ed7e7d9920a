"""Who the peer is: from the public key that it proved to hold, to a `PeerIdentity`, or no connection.

One question, `Trust.check`, and three who can answer: a list of keys, what was seen before, or your own code.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias
from urllib.parse import quote

from towline.errors import HandshakeFailed, KeyFileError, MisuseError
from towline.units import FilePath

from ._files import expand, read_public, replace_file

__all__ = ["AllowList", "KnownHosts", "PeerIdentity", "Trust", "TrustCallback", "fingerprint", "public_line"]

PUBLIC_LENGTH: Final = 32


def fingerprint(public_key: bytes) -> str:
    """What people compare: SHA-256 in base64, as SSH writes it.

    >>> fingerprint(bytes(32))
    'SHA256:Zmh6rfhivXdsj8GLjp+OIAiXFIVu4jOzkCpZHQ1fKSU'
    """
    return "SHA256:" + base64.b64encode(hashlib.sha256(public_key).digest()).decode().rstrip("=")


@dataclass(frozen=True, slots=True)
class PeerIdentity:
    """The other end, proven: it holds the private key of ``public_key``, and somebody here vouches for it.

    Attributes:
        public_key: 32 bytes.
        name: what the list, or whoever vouched, calls it; for people, not unique.

    >>> PeerIdentity(bytes(32), "backup server")
    PeerIdentity('backup server', 'SHA256:Zmh6rfhivXdsj8GLjp+OIAiXFIVu4jOzkCpZHQ1fKSU')
    """

    public_key: bytes
    name: str = ""

    @property
    def fingerprint(self) -> str:
        """The key as people compare it, ``SHA256:...``."""
        return fingerprint(self.public_key)

    def __repr__(self) -> str:
        return f"PeerIdentity({self.name!r}, {self.fingerprint!r})"


def public_line(public_key: bytes, comment: str = "") -> str:
    """A key as a line of an allow-list: ``x25519 <base64> comment``.

    Raises:
        MisuseError: if ``comment`` has a line break in it.
    """
    if len(comment.splitlines()) > 1:
        raise MisuseError("a comment must be one line")
    return f"x25519 {base64.b64encode(public_key).decode()} {comment}".strip()


def _parse_line(line: str, where: str) -> PeerIdentity:
    kind, _, rest = line.strip().partition(" ")
    encoded, _, comment = rest.strip().partition(" ")
    if kind != "x25519":
        raise KeyFileError(f"{where}: must be 'x25519 <base64> comment'")
    try:
        key = base64.b64decode(encoded, validate=True)
    except binascii.Error:
        raise KeyFileError(f"{where}: the key is not base64") from None
    if len(key) != PUBLIC_LENGTH:
        raise KeyFileError(f"{where}: the key has {len(key)} bytes, where {PUBLIC_LENGTH} are needed")
    return PeerIdentity(key, comment.strip())


def _lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, line


class Trust(ABC):
    """Says who a peer is. Write a subclass, or an ``async def`` (see `TrustCallback`), for your own rule."""

    @abstractmethod
    async def check(self, peer_key: bytes, *, endpoint: str, handshake_hash: bytes, payload: bytes) -> PeerIdentity:
        """Vouch for the peer.

        Args:
            peer_key: the static public key that the peer proved to hold.
            endpoint: where we connected to, or listen.
            handshake_hash: what both ends have said so far, hashed.
            payload: what the peer sent along with its key; nothing in version 1.

        Raises:
            HandshakeFailed: if this peer is not trusted.
            KeyFileError: if that cannot be told, since a file cannot be read.
        """


TrustCallback: TypeAlias = Callable[[bytes, bytes, bytes], Awaitable[PeerIdentity | None]]
"""Your own rule: of the peer's key, the handshake hash and the payload; None refuses, and so does raising."""


class AllowList(Trust):
    """The peers that may connect, by their public keys.

    Args:
        keys: public keys of 32 bytes, or lines ``x25519 <base64> comment``.

    Raises:
        KeyFileError: if a key or line cannot be read, or is there twice.

    >>> line = "x25519 AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE= anna's laptop"
    >>> AllowList([line]).get(bytes([1] * 32)).name
    "anna's laptop"
    """

    def __init__(self, keys: Iterable[bytes | str] = ()) -> None:
        self._path: Path | None = None
        self._peers: dict[bytes, PeerIdentity] = {}
        for number, key in enumerate(keys, start=1):
            where = f"key {number}"
            if isinstance(key, str):
                peer = _parse_line(key, where)
            elif len(key) == PUBLIC_LENGTH:
                peer = PeerIdentity(bytes(key))
            else:
                raise KeyFileError(f"{where}: has {len(key)} bytes, where {PUBLIC_LENGTH} are needed")
            if peer.public_key in self._peers:
                raise KeyFileError(f"{where}: is there twice")
            self._peers[peer.public_key] = peer

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> AllowList:
        """Read a file of one ``x25519 <base64> comment`` per line; blank lines and ``#`` lines are skipped.

        Raises:
            KeyFileError: if it cannot be read; the message names file and line.
        """
        new = cls()
        new._path = expand(path)
        new.reload()
        return new

    def reload(self) -> frozenset[bytes]:
        """Read the file again. While it is broken, the list stays what it was.

        Returns:
            The keys that are no longer on the list, so that their connections can be ended.

        Raises:
            KeyFileError: if it cannot be read; the message names file and line.
            MisuseError: if this list was not read from a file.
        """
        if self._path is None:
            raise MisuseError("this list was not read from a file")
        path = self._path
        peers: dict[bytes, PeerIdentity] = {}
        seen: dict[bytes, int] = {}
        for number, line in _lines(read_public(path)):
            peer = _parse_line(line, f"{path}, line {number}")
            if peer.public_key in peers:
                raise KeyFileError(f"{path}, line {number}: the key of line {seen[peer.public_key]} again")
            peers[peer.public_key] = peer
            seen[peer.public_key] = number
        removed = frozenset(self._peers.keys() - peers.keys())
        self._peers = peers
        return removed

    def get(self, peer_key: bytes) -> PeerIdentity | None:
        """The peer of that key, or None."""
        # Not in constant time, on purpose: public keys are no secret, and the peer has proved to hold it.
        return self._peers.get(peer_key)

    @property
    def path(self) -> Path | None:
        """The file that it was read from."""
        return self._path

    def __contains__(self, peer_key: object) -> bool:
        return peer_key in self._peers

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AllowList):
            return NotImplemented
        return self._peers == other._peers

    def __hash__(self) -> int:
        return hash(AllowList)  # `reload` changes all the rest

    def __iter__(self) -> Iterator[PeerIdentity]:
        return iter(self._peers.values())

    def __len__(self) -> int:
        return len(self._peers)

    def __repr__(self) -> str:
        source = "" if self._path is None else f" from {self._path}"
        return f"<AllowList of {len(self)}{source}>"

    async def check(self, peer_key: bytes, *, endpoint: str, handshake_hash: bytes, payload: bytes) -> PeerIdentity:
        peer = self.get(peer_key)
        if peer is None:
            raise HandshakeFailed(f"the peer's key {fingerprint(peer_key)} is not on the allow-list")
        return peer


class KnownHosts(Trust):
    """Trust what was seen before: each endpoint must show the key that it showed the first time.

    The file has a line ``endpoint x25519 <base64>`` for each. Two processes that both meet something new at
    the same moment may lose one of the two lines.

    Args:
        path: the file; it need not exist.
        allow_first_use: accept, and keep, the key of an endpoint never seen. Whoever answers that first time
            is believed, so compare the fingerprint by another way. Left out, it must be in the file.
    """

    def __init__(self, path: FilePath, *, allow_first_use: bool = False) -> None:
        self._path = expand(path)
        self._allow_first_use = allow_first_use

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    @property
    def allow_first_use(self) -> bool:
        """Whether an endpoint never seen is accepted."""
        return self._allow_first_use

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, KnownHosts):
            return NotImplemented
        return (self._path.absolute(), self._allow_first_use) == (other._path.absolute(), other._allow_first_use)

    def __hash__(self) -> int:
        return hash((self._path.absolute(), self._allow_first_use))

    def __repr__(self) -> str:
        return f"KnownHosts({str(self._path)!r}, allow_first_use={self._allow_first_use})"

    async def check(self, peer_key: bytes, *, endpoint: str, handshake_hash: bytes, payload: bytes) -> PeerIdentity:
        # No await from here to the end: within one event loop, reading and writing the file are one step.
        self._check(peer_key, endpoint)
        return PeerIdentity(peer_key, endpoint)

    def _check(self, peer_key: bytes, endpoint: str) -> None:
        if not endpoint:
            raise MisuseError("known hosts are kept by endpoint, and there is none here; use an AllowList")
        # One word, whatever is in a path; and no word begins like a comment.
        word = quote(endpoint, safe="/:@[]~!$&'()*+,;=?")
        text = read_public(self._path) if os.path.exists(self._path) else ""
        known = None
        for number, line in _lines(text):
            name, _, rest = line.strip().partition(" ")
            entry = _parse_line(rest, f"{self._path}, line {number}")
            if name == word:
                if known is not None:
                    raise KeyFileError(f"{self._path}, line {number}: {endpoint} is there twice")
                known = entry.public_key
        if known is None:
            if not self._allow_first_use:
                raise HandshakeFailed(f"{endpoint} shows the key {fingerprint(peer_key)}, and is not in {self._path}")
            if text and not text.endswith("\n"):
                text += "\n"
            replace_file(self._path, f"{text}{word} {public_line(peer_key)}\n")
        elif known != peer_key:
            raise HandshakeFailed(
                f"{endpoint} shows {fingerprint(peer_key)}, and {self._path} has {fingerprint(known)}: "
                "its key was changed, or this is somebody else"
            )


class Asked(Trust):
    """A `TrustCallback` as a `Trust`."""

    def __init__(self, callback: TrustCallback) -> None:
        self._callback = callback

    def __eq__(self, other: object) -> bool:
        return self._callback == other._callback if isinstance(other, Asked) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._callback)

    def __repr__(self) -> str:
        return f"<Asked {getattr(self._callback, '__qualname__', type(self._callback).__qualname__)}>"

    async def check(self, peer_key: bytes, *, endpoint: str, handshake_hash: bytes, payload: bytes) -> PeerIdentity:
        try:
            peer = await self._callback(peer_key, handshake_hash, payload)
        except HandshakeFailed:
            raise
        except Exception as error:
            # Code that fails has not said yes.
            raise HandshakeFailed(f"the trust callback failed: {type(error).__name__}") from error
        if peer is None:
            raise HandshakeFailed(f"the trust callback refused the key {fingerprint(peer_key)}")
        if peer.public_key != peer_key:
            raise HandshakeFailed("the trust callback vouched for another key than the peer's")
        return peer
