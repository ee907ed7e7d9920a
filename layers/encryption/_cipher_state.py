"""The cipher state of Noise (revision 34, section 5.1): one key, one direction, one counter.

This is the path of every record, so it is lean: the methods of one AEAD object are kept, nothing is copied.

Rule: no nonce is ever used twice under one key. So the counter never wraps, nothing here can be pickled or
copied, and a forked child, which holds the keys *and the counters* of its parent, cannot use them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Final

from cryptography.exceptions import InvalidTag

from towline.errors import MisuseError, NonceExhausted, ProtocolViolation

from ._ciphers import KEYLEN, Buffer, CipherFunction
from ._secret import Unpicklable

__all__ = ["MAX_NONCE", "CipherState", "check_process", "this_process"]

MAX_NONCE: Final = 2**64 - 1
"""Reserved: what it seals becomes the new key in a rekey (section 11.3). No record ever has it."""

_process = 0
"""Counts forks. To compare it costs a record nothing; to ask the system for the process id would."""


def _count_fork() -> None:
    global _process
    _process += 1


if sys.platform != "win32":  # pragma: no branch -- there is no fork there
    os.register_at_fork(after_in_child=_count_fork)


def this_process() -> int:
    """A mark of this process, for `check_process` later."""
    return _process


def check_process(process: int) -> None:
    """Refuse what began in the process that this one was forked from.

    Raises:
        MisuseError: if ``process`` is not the mark of this process.
    """
    if process != _process:
        raise MisuseError("these keys belong to the process that this one was forked from; connect anew")


class CipherState(Unpicklable):
    """One key, one direction, one counter (section 5.1).

    Not for two tasks at once in two threads: records have an order.

    Attributes:
        nonce: the counter of the next record. Setting it is the paper's SetNonce.

    >>> from towline.layers.encryption._ciphers import CIPHERS
    >>> one, other = (CipherState(CIPHERS["ChaChaPoly"], bytes(32)) for _ in range(2))
    >>> other.decrypt_with_ad(b"header", one.encrypt_with_ad(b"header", b"hello"))
    b'hello'
    >>> one.nonce, other.nonce
    (1, 1)
    """

    __slots__ = ("_cipher", "_decrypt", "_encrypt", "_encrypt_into", "_pack_nonce", "_process", "nonce")

    _encrypt: Callable[[bytes, Buffer, Buffer | None], bytes] | None
    _decrypt: Callable[[bytes, Buffer, Buffer | None], bytes] | None
    _encrypt_into: Callable[[bytes, Buffer, Buffer | None, Buffer], int] | None

    def __init__(self, cipher: CipherFunction, key: bytes | None = None) -> None:
        self._cipher = cipher
        self._pack_nonce = cipher.pack_nonce
        self.initialize_key(key)

    def __repr__(self) -> str:
        return f"<CipherState {self._cipher.name} nonce={self.nonce}>"

    def initialize_key(self, key: bytes | None) -> None:
        """Install a key, or none, and count from 0 again."""
        self.nonce = 0
        self._process = _process
        self._install(key)

    def _install(self, key: bytes | None) -> None:
        # Bound methods of one AEAD, so that a record costs no look-up. The key itself is kept nowhere else.
        if key is None:
            self._encrypt = self._decrypt = self._encrypt_into = None
            return
        if len(key) != KEYLEN:
            raise MisuseError(f"a key of {len(key)} bytes, where {KEYLEN} are needed")
        aead = self._cipher.new(key)
        self._encrypt, self._decrypt, self._encrypt_into = aead.encrypt, aead.decrypt, aead.encrypt_into

    @property
    def has_key(self) -> bool:
        """Whether what passes is encrypted at all; before the first key of a handshake it is not."""
        return self._encrypt is not None

    def encrypt_with_ad(self, ad: Buffer, plaintext: Buffer) -> bytes:
        """Seal ``plaintext``, 16 bytes longer, with ``ad`` authenticated beside it.

        Raises:
            NonceExhausted: if the key has sealed as many records as it ever may. Nothing was sealed.
            MisuseError: in a process forked from the one that made the key.
        """
        if self._process != _process:
            check_process(self._process)
        encrypt = self._encrypt
        if encrypt is None:
            return bytes(plaintext)
        nonce = self.nonce
        if nonce >= MAX_NONCE:
            raise NonceExhausted("this key has sealed all the records it may")
        # Counted up first: whatever interrupts the next line, this nonce is spent.
        self.nonce = nonce + 1
        return encrypt(self._pack_nonce(nonce), plaintext, ad)

    def encrypt_with_ad_into(self, ad: Buffer, plaintext: Buffer, buffer: Buffer) -> int:
        """Seal ``plaintext`` into ``buffer``, which is exactly 16 bytes longer and must not overlap it.

        Saves a copy of each record when ``buffer`` is a slice of what goes to the wire.

        Returns:
            The number of bytes written.

        Raises:
            NonceExhausted: if the key has sealed as many records as it ever may. Nothing was sealed.
            MisuseError: in a process forked from the one that made the key, or without a key.
        """
        if self._process != _process:
            check_process(self._process)
        encrypt_into = self._encrypt_into
        if encrypt_into is None:
            raise MisuseError("there is no key to seal with")
        nonce = self.nonce
        if nonce >= MAX_NONCE:
            raise NonceExhausted("this key has sealed all the records it may")
        self.nonce = nonce + 1
        return encrypt_into(self._pack_nonce(nonce), plaintext, ad, buffer)

    def decrypt_with_ad(self, ad: Buffer, ciphertext: Buffer) -> bytes:
        """Open what the other end's `encrypt_with_ad` sealed with the same ``ad``.

        Raises:
            ProtocolViolation: if anything was changed, replayed, left out or reordered. Nothing of it can be
                had, and the counter stands where it stood.
            NonceExhausted: if the key has opened as many records as it ever may.
            MisuseError: in a process forked from the one that made the key.
        """
        if self._process != _process:
            check_process(self._process)
        decrypt = self._decrypt
        if decrypt is None:
            return bytes(ciphertext)
        nonce = self.nonce
        if nonce >= MAX_NONCE:
            raise NonceExhausted("this key has opened all the records it may")
        # Never decrypt_into: on a bad tag that leaves the plaintext, which nobody vouches for, in the buffer.
        try:
            plaintext = decrypt(self._pack_nonce(nonce), ciphertext, ad)
        except InvalidTag:
            raise ProtocolViolation("a record is not what the other end sealed") from None
        self.nonce = nonce + 1
        return plaintext

    def rekey(self) -> None:
        """Replace the key by one that is computed from it (section 4.2); the counter runs on.

        Raises:
            MisuseError: without a key, or in a process forked from the one that made it.
        """
        check_process(self._process)
        if self._encrypt is None:
            raise MisuseError("there is no key to replace")
        self._install(self._encrypt(self._pack_nonce(MAX_NONCE), bytes(KEYLEN), b"")[:KEYLEN])
