"""What a client says before any cryptography: who it is, and which handshake it wants.

    magic 8 | version u8 | reserved u8 = 0 | suite u16 | pattern u16 | length of its first message u16 | layers 8

Big-endian, 24 bytes. ``layers`` is a hash of the two-sided layers above, in order, with their wire versions; no
options and no transparent layers, since those need not be equal (D7). The whole preamble goes into the prologue
of the handshake, so nobody on the way can change a byte of it unnoticed.

A server answers with a length (u16) and its message, or with `REFUSAL`: one answer for every cause (D9).

Rule: no I/O and no key in this file.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

__all__ = [
    "MAGIC",
    "PATTERNS",
    "PREAMBLE_SIZE",
    "REFUSAL",
    "SUITES",
    "VERSION",
    "Pattern",
    "Preamble",
    "hash_layers",
    "layers_above",
    "prologue",
]

MAGIC: Final = b"\xd7TOWLINE"
"""No text, no TLS and no SSH begins with its first byte, so all that strays here dies at once."""

VERSION: Final = 1
REFUSAL: Final = b"\0\0"
"""The length of no message."""

WIRE: Final = "encryption/1"

SUITES: Final[Mapping[str, int]] = {
    "25519_ChaChaPoly_SHA256": 1,
    "25519_AESGCM_SHA256": 2,
    "25519_XChaChaPoly_SHA256": 3,
}
"""Every suite and its number on the wire. There is no list to choose from: a client names one, and that is it."""

_FIELDS: Final = struct.Struct(">8sBBHHH8s")
PREAMBLE_SIZE: Final = _FIELDS.size


@dataclass(frozen=True, slots=True)
class Pattern:
    """A handshake pattern that is spoken here.

    Attributes:
        name: as in a protocol name.
        number: what stands for it on the wire.
        first_message: bytes in its first message, which is known before any state is made for it.
    """

    name: str
    number: int
    first_message: int


PATTERNS: Final[Mapping[str, Pattern]] = {
    pattern.name: pattern for pattern in (Pattern("NNpsk0", 1, 48), Pattern("XX", 2, 32), Pattern("XXpsk3", 3, 48))
}


@dataclass(frozen=True, slots=True)
class Preamble:
    """The fields of a preamble, the magic and the reserved byte aside.

    >>> preamble = Preamble(suite=1, pattern=2, message_length=32, layers=bytes(8))
    >>> Preamble.parse(preamble.pack()) == preamble
    True
    """

    suite: int
    pattern: int
    message_length: int
    layers: bytes
    version: int = VERSION
    reserved: int = 0

    def pack(self) -> bytes:
        """The 24 bytes."""
        return _FIELDS.pack(
            MAGIC, self.version, self.reserved, self.suite, self.pattern, self.message_length, self.layers
        )

    @classmethod
    def parse(cls, data: bytes) -> Preamble:
        """Read 24 bytes, whose magic was checked as it came. Judges nothing."""
        _, version, reserved, suite, pattern, message_length, layers = _FIELDS.unpack(data)
        return cls(suite, pattern, message_length, layers, version, reserved)


def layers_above(wire: tuple[str, ...]) -> tuple[str, ...]:
    """The two-sided layers outside of encryption, of all those in a stack.

    >>> layers_above(("resume/1", "framing/1", "encryption/1"))
    ('resume/1', 'framing/1')
    """
    return wire[: wire.index(WIRE)] if WIRE in wire else wire


def hash_layers(layers: Iterable[str]) -> bytes:
    """The eight bytes that stand for ``layers``. They find a mistake; who cheats fails at the prologue."""
    return hashlib.sha256("\n".join(layers).encode()).digest()[:8]


def prologue(preamble: bytes, rekey_after: int) -> bytes:
    """What both ends must agree on: the preamble as sent, and after how many records the keys change."""
    return preamble + struct.pack(">Q", rekey_after)
