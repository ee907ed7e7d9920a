"""The records of an encrypted link: bytes to sealed bytes and back.

    u16 length of what follows, 17 to 65535 | sealed( type u8, data ) | tag 16          big-endian

The two bytes of the length are authenticated with the rest. Types are DATA and CLOSE. A nonce is never sent: each
direction has its own key and counts its records, so none can be replayed, reordered, left out or sent back to who
sealed it. After every ``rekey_after`` records a direction replaces its key, without a word: both ends count.

The end is a CLOSE record. Without one the link was cut, whatever the transport says: that is `LinkLost`, never a
clean end.

Rule 1: what goes wrong is one error with one text, and ends the link. The good records of the same read are
delivered before (D11), nothing of the bad one or after it ever is.
Rule 2: a record is opened into new memory, never in place: a failed attempt leaves nothing to be read.
"""

from __future__ import annotations

import struct
from typing import Final

from towline.errors import HandshakeRefused, LinkLost, NonceExhausted, ProtocolViolation
from towline.stage import CLEAN, Ended, Stage, Units

from .noise import TAGLEN, CipherState

__all__ = ["CLOSE", "DATA", "MAX_RECORD_SIZE", "OVERHEAD", "RecordStage"]

DATA: Final = b"\x01"
CLOSE: Final = b"\x02"

_LENGTH: Final = struct.Struct(">H")
_LEAST: Final = 1 + TAGLEN
"""A type and a tag."""

OVERHEAD: Final = _LENGTH.size + _LEAST
"""Bytes that a record has beside its data."""

MAX_RECORD_SIZE: Final = 65535 - _LEAST
"""The most data in one record: a Noise message, its tag and type included, has at most 65535 bytes."""

_VIOLATION: Final = "a record is not what the other end sealed: the link was tampered with, or damaged"
_TRUNCATED: Final = "the link ended without its close record: it was cut"


class RecordStage(Stage):
    """Seals what goes out and opens what comes in. Any split of the bytes gives the same data.

    Args:
        send: the key and counter of our direction.
        receive: those of the other.
        rekey_after: records in each direction after which its key is replaced.
        max_record_size: the most data to put into one record. What the other end chose does not matter.
        refused: what to end with when a `REFUSAL` comes in place of the first record. A server that looks at our
            key last has no other moment to say so.
    """

    def __init__(
        self,
        send: CipherState,
        receive: CipherState,
        *,
        rekey_after: int,
        max_record_size: int = MAX_RECORD_SIZE,
        refused: HandshakeRefused | None = None,
    ) -> None:
        self._send: CipherState | None = send
        self._receive: CipherState | None = receive
        self._rekey_after = rekey_after
        self._max_record_size = max_record_size
        self._refused = refused
        self._closed = False
        self._parts: list[bytes] = []
        self._have = 0
        self._need = _LENGTH.size

    # --- out ---

    def outgoing(self, units: Units, now: float) -> Units:
        if self._closed:
            return []  # the other end stopped reading at our close record
        step = self._max_record_size
        if sum(map(len, units)) <= step:
            return self._seal(DATA + units[0] if len(units) == 1 else b"".join([DATA, *units]))
        data = b"".join(units)
        records: Units = []
        for start in range(0, len(data), step):
            records += self._seal(DATA + data[start : start + step])
        return records

    def _seal(self, plaintext: bytes) -> Units:
        """One record, in two pieces: the link joins all of a flush at once, which is the only copy."""
        cipher = self._send
        if cipher is None:
            assert isinstance(self.ended, Exception)  # it is what took the key away
            raise self.ended
        header = _LENGTH.pack(len(plaintext) + TAGLEN)
        sealed = cipher.encrypt_with_ad(header, plaintext)
        if not cipher.nonce % self._rekey_after:
            cipher.rekey()
        return [header, sealed]

    def confirm(self) -> Units:
        """A record without data: it shows the other end that we have the keys, and nothing else."""
        return self._seal(DATA)

    def close(self) -> Units:
        if self._closed or self._send is None:
            return []
        self._closed = True
        return self._seal(CLOSE)

    # --- in ---

    @property
    def is_confirmed(self) -> bool:
        """Whether the other end has shown that it has the keys: a record of its was opened."""
        return self._receive is not None and self._receive.nonce > 0

    def incoming(self, units: Units, now: float) -> Units:
        if self.ended is not None:
            return []
        for unit in units:
            self._parts.append(unit)
            self._have += len(unit)
        if self._have < self._need:
            return []
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        opened: Units = []
        position = self._open(data, opened)
        rest = data[position:] if self.ended is None else b""
        self._parts = [rest] if rest else []
        self._have = len(rest)
        return opened

    def _open(self, data: bytes, opened: Units) -> int:
        """Open all complete records of ``data`` into ``opened``; return where the first incomplete one begins."""
        cipher = self._receive
        assert cipher is not None  # gone only when ended
        view, end, position = memoryview(data), len(data), 0
        self._need = _LENGTH.size
        while end - position >= 2:
            length: int = _LENGTH.unpack_from(data, position)[0]
            if length < _LEAST:
                self._fail(self._refused if self._refused and length == 0 else ProtocolViolation(_VIOLATION))
                break
            start = position + 2
            stop = start + length
            if stop > end:
                self._need = 2 + length
                break
            try:
                plaintext = cipher.decrypt_with_ad(data[position:start], view[start:stop])
            except NonceExhausted as error:
                self._fail(NonceExhausted(str(error)))  # a new one: the frames of the old one hold the key
                break
            except ProtocolViolation:
                self._fail(ProtocolViolation(_VIOLATION))
                break
            self._refused = None
            if not cipher.nonce % self._rekey_after:
                cipher.rekey()
            if plaintext[0] == DATA[0]:
                if length > _LEAST:
                    opened.append(plaintext[1:])
            elif plaintext == CLOSE:
                self.ended = CLEAN
                self._receive = None
                break
            else:
                self._fail(ProtocolViolation(_VIOLATION))
                break
            position = stop
        return position

    def _fail(self, error: Exception) -> None:
        self.ended = error
        self._send = self._receive = None

    def receive_eof(self, ended: Ended) -> None:
        if self.ended is None:
            self.ended = LinkLost(_TRUNCATED) if ended is CLEAN else ended
