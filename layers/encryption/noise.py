"""The Noise Protocol Framework, revision 34: handshakes, and the two cipher states that come out of each.

Names and order are the paper's, so that this file can be read beside its section 5. Whole, but for the
fallback modifier and curve 448. On top of the paper a handshake also gives an exporter, and a pair of cipher
states is handed out once.

Rule 1: nothing here does I/O or reads a clock; the only randomness is a new ephemeral key.
Rule 2: a message is judged by its size before any cryptography is spent on it.
Rule 3: what goes wrong in a handshake is one error with one text. Which check failed is nobody's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from towline.errors import HandshakeFailed, MessageTooLarge, MisuseError, ProtocolViolation

from ._cipher_state import MAX_NONCE, CipherState, check_process, this_process
from ._ciphers import CIPHERS, KEYLEN, TAGLEN, Buffer, CipherFunction
from ._dh import DH_FUNCTIONS, DHFunction, KeyPair
from ._hashes import HASHES, HashFunction
from ._patterns import HandshakePattern, Token, find_pattern
from ._secret import Unpicklable

__all__ = ["MAX_MESSAGE", "MAX_NONCE", "TAGLEN", "CipherState", "HandshakeState", "SymmetricState"]

MAX_MESSAGE: Final = 65535
"""Bytes in the longest Noise message, tag included (section 3)."""

HANDSHAKE_FAILED: Final = (
    "the handshake failed: the other end has another key or another protocol, or was tampered with"
)


class SymmetricState(Unpicklable):
    """The chaining key and the hash of all that was said (section 5.2).

    Attributes:
        cipher_state: seals what the handshake sends, once there is a key.
        h: the hash of the handshake so far.
    """

    __slots__ = ("_cipher", "_ck", "_exporter_key", "_hash", "cipher_state", "h")

    def __init__(self, protocol_name: bytes, cipher: CipherFunction, hash_function: HashFunction) -> None:
        self._cipher = cipher
        self._hash = hash_function
        short = len(protocol_name) <= hash_function.hashlen
        self.h = protocol_name.ljust(hash_function.hashlen, b"\0") if short else hash_function.hash(protocol_name)
        self._ck = self.h
        self._exporter_key: bytes | None = None
        self.cipher_state = CipherState(cipher)

    def mix_key(self, input_key_material: bytes) -> None:
        """MixKey: from here on the key depends on this too."""
        self._ck, temp_k, _ = self._hash.hkdf(self._ck, input_key_material)
        self.cipher_state.initialize_key(temp_k[:KEYLEN])

    def mix_hash(self, data: bytes) -> None:
        """MixHash: both ends must have seen this."""
        self.h = self._hash.hash(self.h + data)

    def mix_key_and_hash(self, input_key_material: bytes) -> None:
        """MixKeyAndHash, for pre-shared keys."""
        self._ck, temp_h, temp_k = self._hash.hkdf(self._ck, input_key_material)
        self.mix_hash(temp_h)
        self.cipher_state.initialize_key(temp_k[:KEYLEN])

    def encrypt_and_hash(self, plaintext: bytes) -> bytes:
        """EncryptAndHash: seal with what was said so far, and say it."""
        ciphertext = self.cipher_state.encrypt_with_ad(self.h, plaintext)
        self.mix_hash(ciphertext)
        return ciphertext

    def decrypt_and_hash(self, ciphertext: bytes) -> bytes:
        """DecryptAndHash.

        Raises:
            ProtocolViolation: if the other end did not seal this.
        """
        plaintext = self.cipher_state.decrypt_with_ad(self.h, ciphertext)
        self.mix_hash(ciphertext)
        return plaintext

    def split(self) -> tuple[CipherState, CipherState]:
        """Split: the initiator's cipher state, the responder's. Once; after it the chaining key is gone."""
        temp_k1, temp_k2, self._exporter_key = self._hash.hkdf(self._ck, b"")
        self._ck = b""
        self.cipher_state.initialize_key(None)
        return CipherState(self._cipher, temp_k1[:KEYLEN]), CipherState(self._cipher, temp_k2[:KEYLEN])

    def exporter(self, label: bytes, length: int) -> bytes:
        """``length`` bytes for ``label``, bound to all that was said; see `HandshakeState.exporter`."""
        if self._exporter_key is None:
            raise MisuseError("there is nothing to export before the handshake is complete")
        try:
            # The hash has one length, so no two labels can give one input.
            return self._hash.hkdf_expand(self._exporter_key, label + self.h, length)
        except ValueError as error:
            raise MisuseError(str(error)) from None


def _parse_name(protocol_name: str) -> tuple[HandshakePattern, DHFunction, CipherFunction, HashFunction]:
    parts = protocol_name.split("_")
    if len(parts) != 5 or parts[0] != "Noise" or len(protocol_name) > 255:
        raise MisuseError(f"{protocol_name!r} is no protocol name; one is Noise_XX_25519_ChaChaPoly_SHA256")
    _, pattern, dh, cipher, hash_name = parts
    for kind, name, known in (
        ("Diffie-Hellman function", dh, DH_FUNCTIONS),
        ("cipher", cipher, CIPHERS),
        ("hash", hash_name, HASHES),
    ):
        if name not in known:
            raise MisuseError(f"{protocol_name!r}: there is no {kind} {name!r}; there are {', '.join(known)}")
    return find_pattern(pattern), DH_FUNCTIONS[dh], CIPHERS[cipher], HASHES[hash_name]


class HandshakeState(Unpicklable):
    """One handshake, seen from one side (section 5.3).

    Call `write_message` and `read_message` in turn, the initiator writing first, until `complete`; then
    `split`. Any failure is final.

    Args:
        protocol_name: such as ``"Noise_XX_25519_ChaChaPoly_SHA256"``.
        initiator: whether this side speaks first.
        prologue: what both ends must agree on beforehand; a difference fails the handshake.
        s: this side's static private key, if the pattern has one.
        e: this side's ephemeral private key, for test vectors only: left out, it is new, as it must be.
        rs: the other side's static public key, if the pattern knows it beforehand.
        re: the other side's ephemeral public key; no pattern supported here has one beforehand.
        psks: pre-shared keys of 32 bytes, as many as the pattern has, in order.

    Raises:
        MisuseError: if the name is unknown, or a key is missing, too many, or of a wrong length.

    >>> client, server = (
    ...     HandshakeState("Noise_NNpsk0_25519_ChaChaPoly_SHA256", initiator, psks=[bytes(range(32))])
    ...     for initiator in (True, False)
    ... )
    >>> server.read_message(client.write_message())
    b''
    >>> client.read_message(server.write_message())
    b''
    >>> client.complete and client.handshake_hash == server.handshake_hash
    True
    >>> sealed = client.split()[0].encrypt_with_ad(b"", b"hello")
    >>> server.split()[0].decrypt_with_ad(b"", sealed)
    b'hello'
    """

    __slots__ = (
        "_ciphers",
        "_dh",
        "_e",
        "_failed",
        "_index",
        "_pattern",
        "_process",
        "_psks",
        "_re",
        "_rs",
        "_s",
        "_symmetric",
        "initiator",
        "protocol_name",
    )

    def __init__(
        self,
        protocol_name: str,
        initiator: bool,
        prologue: bytes = b"",
        s: bytes | None = None,
        e: bytes | None = None,
        rs: bytes | None = None,
        re: bytes | None = None,
        psks: Sequence[bytes] = (),
    ) -> None:
        pattern, dh, cipher, hash_function = _parse_name(protocol_name)
        knows_rs = pattern.initiator_knows_s if initiator else pattern.responder_knows_s
        # A key that the pattern has no use for is refused: whoever gives an `rs` means it to be checked.
        for name, key, wanted, length in (
            ("s", s, pattern.has_static(initiator=initiator), dh.private_length),
            ("rs", rs, knows_rs, dh.public_length),
            ("re", re, False, dh.public_length),
        ):
            if (key is not None) != wanted:
                side = "initiator" if initiator else "responder"
                needs = "needs" if wanted else "has no place for"
                raise MisuseError(f"{protocol_name}: the {side} {needs} {name}")
            if key is not None and len(key) != length:
                raise MisuseError(f"{protocol_name}: {name} has {len(key)} bytes, where {length} are needed")
        if e is not None and len(e) != dh.private_length:
            raise MisuseError(f"{protocol_name}: e has {len(e)} bytes, where {dh.private_length} are needed")
        if len(psks) != pattern.psk_count:
            raise MisuseError(f"{protocol_name}: {len(psks)} psks, where {pattern.psk_count} are needed")
        for psk in psks:
            if len(psk) != KEYLEN:
                raise MisuseError(f"{protocol_name}: a psk has {len(psk)} bytes, where {KEYLEN} are needed")

        self.protocol_name = protocol_name
        self.initiator = initiator
        self._pattern = pattern
        self._dh = dh
        self._index = 0
        self._failed = False
        self._process = this_process()
        self._psks = list(psks)
        self._s = None if s is None else dh.load(s)
        self._e = None if e is None else dh.load(e)
        self._rs = rs
        self._re: bytes | None = None
        self._ciphers: tuple[CipherState, CipherState] | None = None
        self._symmetric = SymmetricState(protocol_name.encode("ascii"), cipher, hash_function)
        self._symmetric.mix_hash(prologue)
        own = None if self._s is None else self._s.public_key
        known = [pattern.responder_knows_s, pattern.initiator_knows_s]
        for is_known, key in zip(known, (own, rs) if initiator else (rs, own), strict=True):
            if is_known:
                assert key is not None  # checked above
                self._symmetric.mix_hash(key)

    def __repr__(self) -> str:
        role = "initiator" if self.initiator else "responder"
        return f"<HandshakeState {self.protocol_name} {role} message={self._index}>"

    @property
    def complete(self) -> bool:
        """Whether all messages have passed."""
        return self._index == len(self._pattern.messages) and not self._failed

    @property
    def is_my_turn(self) -> bool:
        """Whether this side writes the next message; false when there is none."""
        return self._index < len(self._pattern.messages) and (self._index % 2 == 0) == self.initiator

    @property
    def handshake_hash(self) -> bytes:
        """The hash of all that both ends said, the same at both: what an application binds itself to.

        Final when the handshake is complete; before, it covers what was said so far.
        """
        return self._symmetric.h

    @property
    def remote_static(self) -> bytes | None:
        """The other side's static public key, once it is known. Whose it is, is for the caller to judge."""
        return self._rs

    @property
    def next_message_overhead(self) -> int:
        """Bytes of the next message when its payload is empty; it is as much longer as its payload.

        Raises:
            MisuseError: if there is no next message.
        """
        if self._index >= len(self._pattern.messages):
            raise MisuseError("the handshake is complete: there is no next message")
        size = 0
        has_key = self._symmetric.cipher_state.has_key
        for token in self._pattern.messages[self._index]:
            if token is Token.S:
                size += self._dh.public_length + (TAGLEN if has_key else 0)
            elif token is Token.E:
                size += self._dh.public_length
                has_key = has_key or self._pattern.psk_count > 0
            else:
                has_key = True
        return size + (TAGLEN if has_key else 0)

    def write_message(self, payload: bytes = b"") -> bytes:
        """The next message, with ``payload`` in it, protected as far as the pattern can at this point.

        Raises:
            MisuseError: if it is not this side's turn, or in a process forked from the one that began.
            MessageTooLarge: if the message would pass 65535 bytes.
            HandshakeFailed: if the other side's keys are not acceptable, or the handshake has failed before.
        """
        self._check_turn(mine=True)
        limit = MAX_MESSAGE - self.next_message_overhead
        if len(payload) > limit:
            raise MessageTooLarge(len(payload), limit)
        message = bytearray()
        try:
            for token in self._pattern.messages[self._index]:
                if token is Token.E:
                    self._e = self._e or self._dh.generate()
                    message += self._e.public_key
                    self._mix_ephemeral(self._e.public_key)
                elif token is Token.S:
                    message += self._symmetric.encrypt_and_hash(_own(self._s).public_key)
                else:
                    self._mix_secret(token)
            message += self._symmetric.encrypt_and_hash(payload)
        except (ProtocolViolation, ValueError):
            raise self._fail() from None
        self._advance()
        return bytes(message)

    def read_message(self, message: Buffer) -> bytes:
        """Read the other side's message and return its payload.

        Raises:
            MisuseError: if it is this side's turn, or in a process forked from the one that began.
            HandshakeFailed: if the message is not what it must be, or the handshake has failed before.
        """
        self._check_turn(mine=False)
        if not self.next_message_overhead <= len(message) <= MAX_MESSAGE:
            raise self._fail()
        message = bytes(message)
        try:
            for token in self._pattern.messages[self._index]:
                if token is Token.E:
                    self._re, message = self._cut(message, self._dh.public_length)
                    self._mix_ephemeral(self._re)
                elif token is Token.S:
                    tag = TAGLEN if self._symmetric.cipher_state.has_key else 0
                    sealed, message = self._cut(message, self._dh.public_length + tag)
                    self._rs = self._symmetric.decrypt_and_hash(sealed)
                else:
                    self._mix_secret(token)
            payload = self._symmetric.decrypt_and_hash(message)
        except (ProtocolViolation, ValueError):
            raise self._fail() from None
        self._advance()
        return payload

    def split(self) -> tuple[CipherState, CipherState]:
        """The cipher states of the connection: the one the initiator sends with, then the responder's.

        They are given out once, or two holders would use one nonce twice. Of a one-way pattern the second is
        never used.

        Raises:
            MisuseError: if the handshake is not complete, or they were given out already.
        """
        if self._ciphers is None:
            raise MisuseError("the cipher states were given out already" if self.complete else _INCOMPLETE)
        ciphers, self._ciphers = self._ciphers, None
        return ciphers

    def exporter(self, label: bytes, length: int) -> bytes:
        """A secret that both ends know and nobody else, for ``label``; the same call gives the same bytes.

        Raises:
            MisuseError: if the handshake is not complete, or ``length`` is above 255 digests.
        """
        if not self.complete:
            raise MisuseError(_INCOMPLETE)
        return self._symmetric.exporter(label, length)

    # --- what both directions share ---

    def _check_turn(self, *, mine: bool) -> None:
        check_process(self._process)
        if self._failed:
            raise HandshakeFailed(HANDSHAKE_FAILED)
        if self._index >= len(self._pattern.messages):
            raise MisuseError("the handshake is complete: there is no next message")
        if self.is_my_turn != mine:
            raise MisuseError(f"it is the {'other' if mine else 'own'} side's turn to write")

    def _mix_ephemeral(self, public_key: bytes) -> None:
        self._symmetric.mix_hash(public_key)
        if self._pattern.psk_count:
            # Section 9.2: a psk alone would give both ends of all connections the same keys.
            self._symmetric.mix_key(public_key)

    def _mix_secret(self, token: Token) -> None:
        if token is Token.PSK:
            self._symmetric.mix_key_and_hash(self._psks.pop(0))
            return
        # The initiator's key is named first; which of the two is ours depends on who we are.
        initiators, responders = token.value
        ours, theirs = (initiators, responders) if self.initiator else (responders, initiators)
        key_pair = _own(self._e if ours == "e" else self._s)
        public_key = self._re if theirs == "e" else self._rs
        assert public_key is not None  # the pattern's order sees to it
        self._symmetric.mix_key(key_pair.exchange(public_key))

    @staticmethod
    def _cut(message: bytes, size: int) -> tuple[bytes, bytes]:
        return message[:size], message[size:]

    def _advance(self) -> None:
        self._index += 1
        if self._index == len(self._pattern.messages):
            self._ciphers = self._symmetric.split()
            self._forget()

    def _fail(self) -> HandshakeFailed:
        self._failed = True
        self._forget()
        return HandshakeFailed(HANDSHAKE_FAILED)

    def _forget(self) -> None:
        # Forward secrecy begins when the ephemeral key is gone. Python cannot wipe it; it can let go of it.
        self._s = self._e = None
        self._psks.clear()


_INCOMPLETE: Final = "the handshake is not complete"


def _own(key_pair: KeyPair | None) -> KeyPair:
    assert key_pair is not None  # the constructor and the pattern's order see to it
    return key_pair
