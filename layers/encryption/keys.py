"""The keys of an encrypted connection: a secret that both ends share, or a key pair for each.

`Psk` is the one, `StaticKeys` the other. No repr, message or pickle holds a secret. Make keys with
``towline keygen``, or `Psk.generate` and `StaticKey.generate`.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import os
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from towline.errors import KeyFileError

from ._files import expand, read_secret, write_new
from ._secret import Unpicklable
from .trust import (
    AllowList,
    Asked,
    KnownHosts,
    PeerIdentity,
    Trust,
    TrustCallback,
    fingerprint,
    public_line,
)

__all__ = [
    "AllowList",
    "KnownHosts",
    "PeerIdentity",
    "Psk",
    "StaticKey",
    "StaticKeys",
    "Trust",
    "TrustCallback",
]

KEY_LENGTH: Final = 32

_HEX = re.compile(r"[0-9A-Fa-f]{64}")
_MAKE_ONE = "run towline keygen"


class _Secret(Unpicklable, ABC):
    """32 bytes that nobody may see. Compared in constant time; a copy is the same object.

    Attributes:
        source: where it was read from, as a configuration says it: ``{"file": path}`` or ``{"env": name}``. None if
            that was nowhere, or nowhere to read it again.
    """

    __slots__ = ("_secret", "source")

    source: Mapping[str, str] | None

    def __init__(self, secret: bytes) -> None:
        if len(secret) != KEY_LENGTH:
            raise KeyFileError(f"a key has {KEY_LENGTH} bytes, and this has {len(secret)}; {_MAKE_ONE}")
        if not any(secret):
            raise KeyFileError(f"a key of zeros is none; {_MAKE_ONE}")
        self._secret = bytes(secret)
        self.source = None

    @property
    def secret(self) -> bytes:
        """The 32 bytes, for a handshake. Do not print, log or store them."""
        return self._secret

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """What people may compare, ``SHA256:...``."""

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        assert isinstance(other, _Secret)
        return hmac.compare_digest(self._secret, other._secret)

    def __hash__(self) -> int:
        return hash((type(self), self.fingerprint))

    def __copy__(self) -> _Secret:
        return self

    def __deepcopy__(self, memo: object) -> _Secret:
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}(fingerprint={self.fingerprint!r})"


class Psk(_Secret):
    """A pre-shared key: 32 random bytes that both ends have. Whoever has it can be either end.

    It must be random: one recorded handshake is enough to try passwords on, as many as a machine can. So what
    looks like one is refused.

    Args:
        secret: 32 random bytes.

    Raises:
        KeyFileError: if it is anything else.

    >>> Psk.generate() == Psk.generate()
    False
    >>> Psk.from_base64("correct horse battery staple")
    Traceback (most recent call last):
    ...
    towline.errors.KeyFileError: a pre-shared key is 32 random bytes, no passphrase; run towline keygen
    """

    __slots__ = ()

    def __init__(self, secret: bytes) -> None:
        super().__init__(secret)
        # Random bytes are all printable once in 2**45 keys; a sentence of 32 letters always is.
        if all(0x20 <= byte < 0x7F for byte in secret):
            raise KeyFileError(_PASSPHRASE)

    @classmethod
    def generate(cls) -> Psk:
        """A new one, from the system's random numbers."""
        return cls(secrets.token_bytes(KEY_LENGTH))

    @classmethod
    def from_base64(cls, text: str) -> Psk:
        """Read one from text: base64, or 64 hexadecimal digits.

        Raises:
            KeyFileError: if it is anything else. The message does not show the text.
        """
        text = text.strip()
        if _HEX.fullmatch(text):
            return cls(bytes.fromhex(text))
        try:
            secret = base64.b64decode(text.encode("ascii"), validate=True)
        except (binascii.Error, UnicodeEncodeError):
            raise KeyFileError(_PASSPHRASE) from None
        return cls(secret)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Psk:
        """Read one from a file that only its owner may read, and that holds what `from_base64` reads.

        Raises:
            KeyFileError: if the file is missing, readable by others, or holds anything else.
        """
        path = expand(path)
        data = read_secret(path)
        try:
            key = cls.from_base64(data.decode("ascii"))
        except UnicodeDecodeError:
            raise KeyFileError(f"{path}: {_PASSPHRASE}") from None
        except KeyFileError as error:
            raise KeyFileError(f"{path}: {error}") from None
        key.source = {"file": str(path)}
        return key

    @classmethod
    def from_env(cls, name: str) -> Psk:
        """Read one from a variable of the environment that holds what `from_base64` reads.

        A file is better where there is one: a process's environment can be read by all processes of its user.

        Raises:
            KeyFileError: if there is no such variable, or it holds anything else.
        """
        text = os.environ.get(name)
        if text is None:
            raise KeyFileError(f"the environment has no variable {name}")
        try:
            key = cls.from_base64(text)
        except KeyFileError as error:
            raise KeyFileError(f"{name} in the environment: {error}") from None
        key.source = {"env": name}
        return key

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write it to a new file, in base64, that only its owner may read.

        Raises:
            KeyFileError: if the file is there already, or cannot be written.
        """
        write_new(expand(path), base64.b64encode(self._secret) + b"\n")

    @property
    def fingerprint(self) -> str:
        """What people may compare, ``SHA256:...``. It tells nothing of a key that is random."""
        return fingerprint(b"towline psk fingerprint" + self._secret)


_PASSPHRASE: Final = f"a pre-shared key is 32 random bytes, no passphrase; {_MAKE_ONE}"


class StaticKey(_Secret):
    """A key pair that says who this end is (X25519).

    Args:
        secret: the private key, 32 random bytes.

    Raises:
        KeyFileError: if it is of another length, or zero.

    >>> key = StaticKey.generate()
    >>> key.public_line("anna's laptop").split()[0]
    'x25519'
    """

    __slots__ = ("_private", "_public_key")

    def __init__(self, secret: bytes) -> None:
        super().__init__(secret)
        self._private = X25519PrivateKey.from_private_bytes(self._secret)
        self._public_key = self._private.public_key().public_bytes_raw()

    @classmethod
    def generate(cls) -> StaticKey:
        """A new one, from the system's random numbers."""
        return cls(X25519PrivateKey.generate().private_bytes_raw())

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], password: str | bytes | None = None) -> StaticKey:
        """Read one from a PEM file (PKCS#8, "BEGIN PRIVATE KEY") that only its owner may read.

        Args:
            path: the file.
            password: what the file is encrypted with, if it is.

        Raises:
            KeyFileError: if the file is missing, readable by others, or holds anything else; or if the
                password is wrong, missing, or not wanted. The message shows nothing of the file.
        """
        path = expand(path)
        data = read_secret(path)
        encrypted = b"ENCRYPTED" in data
        if encrypted != (password is not None):
            raise KeyFileError(f"{path}: {'needs a' if encrypted else 'is not encrypted, and takes no'} password")
        try:
            private = serialization.load_pem_private_key(data, _password(password))
        except Exception:
            # Of any kind: a key of 31 bytes is an InternalError of `cryptography`, which is no ValueError.
            # Without the cause, since it may quote what it could not read.
            reason = "the password is wrong, or it is" if encrypted else "is"
            raise KeyFileError(f"{path}: {reason} not a private key in PEM (PKCS#8)") from None
        if not isinstance(private, X25519PrivateKey):
            raise KeyFileError(f"{path}: holds another kind of key than X25519; {_MAKE_ONE}")
        key = cls(private.private_bytes_raw())
        if not encrypted:  # or a password would be needed as well
            key.source = {"file": str(path)}
        return key

    def write(self, path: str | os.PathLike[str], password: str | bytes | None = None) -> None:
        """Write it to a new PEM file that only its owner may read, encrypted if there is a ``password``.

        Raises:
            KeyFileError: if the file is there already, or cannot be written; or if the password is empty.
        """
        password = _password(password)
        if password is not None and not password:
            raise KeyFileError("an empty password protects nothing")
        encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
        if password is not None:
            encryption = serialization.BestAvailableEncryption(password)
        pem = self._private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
        write_new(expand(path), pem)

    @property
    def public_key(self) -> bytes:
        """The public key, 32 bytes."""
        return self._public_key

    @property
    def fingerprint(self) -> str:
        """The public key as people compare it, ``SHA256:...``."""
        return fingerprint(self._public_key)

    def public_line(self, comment: str = "") -> str:
        """The line for the other end's allow-list.

        Raises:
            MisuseError: if ``comment`` has a line break in it.
        """
        return public_line(self._public_key, comment)


def _password(password: str | bytes | None) -> bytes | None:
    return password.encode() if isinstance(password, str) else password


class StaticKeys:
    """This end's key pair, and who is trusted at the other.

    Args:
        key: our key pair.
        trust: an `AllowList`, `KnownHosts`, another `Trust`, or an ``async def`` (see `TrustCallback`).
        psk: a pre-shared key on top, for a door that strangers cannot even knock at.

    >>> StaticKeys(StaticKey.generate(), trust=AllowList()).psk is None
    True
    """

    __slots__ = ("key", "psk", "trust")

    def __init__(self, key: StaticKey, *, trust: Trust | TrustCallback, psk: Psk | None = None) -> None:
        self.key = key
        self.trust = trust if isinstance(trust, Trust) else Asked(trust)
        self.psk = psk

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, StaticKeys):
            return NotImplemented
        return (self.key, self.trust, self.psk) == (other.key, other.trust, other.psk)

    def __hash__(self) -> int:
        return hash((self.key, self.trust, self.psk))

    def __repr__(self) -> str:
        return f"StaticKeys({self.key!r}, trust={self.trust!r}, psk={self.psk!r})"

    async def check(self, peer_key: bytes, *, endpoint: str, handshake_hash: bytes, payload: bytes) -> PeerIdentity:
        """Ask ``trust`` who the peer is; see `Trust.check`.

        Raises:
            HandshakeFailed: if this peer is not trusted.
            KeyFileError: if that cannot be told, since a file cannot be read.
        """
        return await self.trust.check(peer_key, endpoint=endpoint, handshake_hash=handshake_hash, payload=payload)
