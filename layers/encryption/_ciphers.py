"""The ciphers of Noise (revision 34, section 12), XChaCha20 added, over `cryptography`.

An AEAD object is made once per key and kept: making one costs as much as sealing a small record.

XChaCha20-Poly1305 is built here from its parts (draft-irtf-cfrg-xchacha), since OpenSSL has none. In a
session its first 16 nonce bytes are always zero, so the subkey is derived once, and a record then costs what
ChaCha20-Poly1305 costs.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from ._secret import Unpicklable

__all__ = [
    "AEAD",
    "CIPHERS",
    "KEYLEN",
    "TAGLEN",
    "Buffer",
    "CipherFunction",
    "XChaCha20Poly1305",
    "hchacha20",
]

Buffer: TypeAlias = bytes | bytearray | memoryview

KEYLEN: Final = 32
TAGLEN: Final = 16


class AEAD(Protocol):
    """What `cryptography` calls an AEAD, as far as it is needed here."""

    def encrypt(self, nonce: Buffer, data: Buffer, associated_data: Buffer | None, /) -> bytes: ...

    def decrypt(self, nonce: Buffer, data: Buffer, associated_data: Buffer | None, /) -> bytes: ...

    def encrypt_into(self, nonce: Buffer, data: Buffer, associated_data: Buffer | None, buf: Buffer, /) -> int: ...


_CONSTANTS: Final = struct.unpack("<4I", b"expand 32-byte k")
_MASK: Final = 0xFFFFFFFF


def hchacha20(key: bytes, nonce: bytes) -> bytes:
    """HChaCha20 of draft-irtf-cfrg-xchacha, section 2.2: a subkey from a key and 16 bytes of nonce.

    A ChaCha20 block is the rounds *plus* the state before them; HChaCha20 wants words 0-3 and 12-15 of the
    rounds alone. Those words of the state are known (the constants, the nonce), so they are subtracted again.

    Raises:
        ValueError: if ``key`` is not 32 or ``nonce`` not 16 bytes.
    """
    if len(key) != KEYLEN or len(nonce) != 16:
        raise ValueError(f"HChaCha20 takes 32 and 16 bytes of key and nonce, not {len(key)} and {len(nonce)}")
    block = Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor().update(bytes(64))
    words = struct.unpack("<16I", block)
    tail = struct.unpack("<4I", nonce)
    return struct.pack(
        "<8I",
        *((words[i] - _CONSTANTS[i]) & _MASK for i in range(4)),
        *((words[12 + i] - tail[i]) & _MASK for i in range(4)),
    )


class XChaCha20Poly1305(Unpicklable):
    """XChaCha20-Poly1305 with a nonce of 24 bytes, long enough to be drawn at random.

    The same calls as the AEADs of `cryptography`. A session does not use this class: its nonces count.

    >>> box = XChaCha20Poly1305(bytes(range(32)))
    >>> box.decrypt(bytes(24), box.encrypt(bytes(24), b"hello", b""), b"")
    b'hello'
    """

    __slots__ = ("_key",)

    def __init__(self, key: bytes) -> None:
        if len(key) != KEYLEN:
            raise ValueError(f"XChaCha20-Poly1305 takes a key of 32 bytes, not {len(key)}")
        self._key = bytes(key)

    def _inner(self, nonce: Buffer) -> tuple[ChaCha20Poly1305, bytes]:
        # Without this check a wrong length would be cut to the right one, and pass.
        if len(nonce) != 24:
            raise ValueError(f"XChaCha20-Poly1305 takes a nonce of 24 bytes, not {len(nonce)}")
        nonce = bytes(nonce)
        return ChaCha20Poly1305(hchacha20(self._key, nonce[:16])), bytes(4) + nonce[16:]

    def encrypt(self, nonce: Buffer, data: Buffer, associated_data: Buffer | None) -> bytes:
        """Seal ``data``; the tag stands at the end.

        Raises:
            ValueError: if ``nonce`` is not 24 bytes.
        """
        aead, inner_nonce = self._inner(nonce)
        return aead.encrypt(inner_nonce, data, associated_data)

    def decrypt(self, nonce: Buffer, data: Buffer, associated_data: Buffer | None) -> bytes:
        """Open what `encrypt` sealed.

        Raises:
            ValueError: if ``nonce`` is not 24 bytes.
            cryptography.exceptions.InvalidTag: if anything at all was changed.
        """
        aead, inner_nonce = self._inner(nonce)
        return aead.decrypt(inner_nonce, data, associated_data)


@dataclass(frozen=True, slots=True)
class CipherFunction:
    """A cipher of Noise.

    Attributes:
        name: as in a protocol name.
        new: makes the AEAD for a key of 32 bytes.
        pack_nonce: lays a counter out as the nonce of that AEAD.
    """

    name: str
    new: Callable[[bytes], AEAD]
    pack_nonce: Callable[[int], bytes]


def _new_xchacha(key: bytes) -> AEAD:
    return ChaCha20Poly1305(hchacha20(key, bytes(16)))


_LITTLE: Final = struct.Struct("<4xQ").pack
_BIG: Final = struct.Struct(">4xQ").pack

CIPHERS: Final[Mapping[str, CipherFunction]] = {
    function.name: function
    for function in (
        CipherFunction("ChaChaPoly", ChaCha20Poly1305, _LITTLE),
        CipherFunction("AESGCM", AESGCM, _BIG),
        # The nonce is 16 zeros and the counter; HChaCha20 takes the 16, and four zeros stand in for them.
        CipherFunction("XChaChaPoly", _new_xchacha, _LITTLE),
    )
}
"""Every cipher by its name in a protocol name."""
