"""The Diffie-Hellman functions of Noise (revision 34, sections 4.1 and 12). One is built in: X25519.

`DH_FUNCTIONS` is the registry that protocol names are looked up in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from ._secret import Unpicklable

__all__ = ["DH_FUNCTIONS", "DHFunction", "KeyPair"]


class KeyPair(Protocol):
    """A private key and its public key."""

    @property
    def public_key(self) -> bytes:
        """The public key as it stands in messages."""
        ...

    def exchange(self, public_key: bytes, /) -> bytes:
        """DH(this, public_key).

        Raises:
            ValueError: if that is no public key, or one that gives a known secret whatever ours is.
        """
        ...


@dataclass(frozen=True, slots=True)
class DHFunction:
    """A group to agree on secrets in.

    Attributes:
        name: as in a protocol name.
        public_length: bytes in a public key.
        private_length: bytes in a private key.
        generate: makes a new key pair.
        load: makes the key pair of a private key.
    """

    name: str
    public_length: int
    private_length: int
    generate: Callable[[], KeyPair]
    load: Callable[[bytes], KeyPair]


class _X25519KeyPair(Unpicklable):
    __slots__ = ("_private", "public_key")

    def __init__(self, private: X25519PrivateKey) -> None:
        self._private = private
        self.public_key = private.public_key().public_bytes_raw()

    def exchange(self, public_key: bytes, /) -> bytes:
        # OpenSSL refuses the all-zero secret that a low-order point gives; revision 34 leaves that to us.
        return self._private.exchange(X25519PublicKey.from_public_bytes(public_key))


DH_FUNCTIONS: Final[dict[str, DHFunction]] = {
    "25519": DHFunction(
        name="25519",
        public_length=32,
        private_length=32,
        generate=lambda: _X25519KeyPair(X25519PrivateKey.generate()),
        load=lambda private: _X25519KeyPair(X25519PrivateKey.from_private_bytes(private)),
    )
}
"""Every group by its name in a protocol name. A test may add one."""
