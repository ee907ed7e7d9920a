"""Noise, as far as no vector says it: sizes, failures, limits, and what must never happen to a key."""

from __future__ import annotations

import copy
import hmac
import os
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from towline.errors import HandshakeFailed, MessageTooLarge, MisuseError, NonceExhausted, ProtocolViolation
from towline.layers.encryption import _cipher_state, _dh
from towline.layers.encryption._ciphers import CIPHERS
from towline.layers.encryption._hashes import HASHES
from towline.layers.encryption._patterns import PATTERNS, find_pattern
from towline.layers.encryption.noise import (
    MAX_MESSAGE,
    MAX_NONCE,
    TAGLEN,
    CipherState,
    HandshakeState,
    SymmetricState,
)

PSK = bytes(range(32))
PRIVATE = {True: bytes(range(1, 33)), False: bytes(range(101, 133))}
X25519 = _dh.DH_FUNCTIONS["25519"]
PUBLIC = {side: X25519.load(private).public_key for side, private in PRIVATE.items()}
LOW_ORDER = bytes(32)
GENERIC = "^the handshake failed: the other end has another key or another protocol, or was tampered with$"


def handshake(
    pattern: str,
    initiator: bool,
    *,
    suite: str = "ChaChaPoly_SHA256",
    psk: bytes = PSK,
    prologue: bytes = b"",
    **keys: bytes,
) -> HandshakeState:
    found = find_pattern(pattern)
    knows_rs = found.initiator_knows_s if initiator else found.responder_knows_s
    return HandshakeState(
        f"Noise_{pattern}_25519_{suite}",
        initiator,
        prologue=prologue,
        s=PRIVATE[initiator] if found.has_static(initiator=initiator) else None,
        rs=PUBLIC[not initiator] if knows_rs else None,
        psks=[psk] * found.psk_count,
        **keys,
    )


def pair(pattern: str, *, suite: str = "ChaChaPoly_SHA256") -> tuple[HandshakeState, HandshakeState]:
    return handshake(pattern, True, suite=suite), handshake(pattern, False, suite=suite)


def finish(client: HandshakeState, server: HandshakeState) -> None:
    while not client.complete:
        writer, reader = (client, server) if client.is_my_turn else (server, client)
        reader.read_message(writer.write_message())


def cipher_pair(cipher: str = "ChaChaPoly") -> tuple[CipherState, CipherState]:
    return CipherState(CIPHERS[cipher], PSK), CipherState(CIPHERS[cipher], PSK)


class CountingDH:
    """X25519 that counts what it is asked to do."""

    def __init__(self) -> None:
        self.generated = self.exchanged = 0
        self.function = _dh.DHFunction("25519", 32, 32, self._generate, self._load)

    def _generate(self) -> _dh.KeyPair:
        self.generated += 1
        return self._counted(X25519.generate())

    def _load(self, private: bytes) -> _dh.KeyPair:
        return self._counted(X25519.load(private))

    def _counted(self, inner: _dh.KeyPair) -> _dh.KeyPair:
        counter = self

        class Counted:
            public_key = inner.public_key

            def exchange(self, public_key: bytes, /) -> bytes:
                counter.exchanged += 1
                return inner.exchange(public_key)

        return Counted()


@pytest.fixture
def counting_dh(monkeypatch: pytest.MonkeyPatch) -> CountingDH:
    counting = CountingDH()
    monkeypatch.setitem(_dh.DH_FUNCTIONS, "25519", counting.function)
    return counting


# --- handshakes ---


@pytest.mark.smoke
@pytest.mark.parametrize("suite", ["ChaChaPoly_SHA256", "AESGCM_SHA256", "XChaChaPoly_SHA256"])
@pytest.mark.parametrize("pattern", ["NN", "NNpsk0", "XX", "XXpsk3"])
def test_the_patterns_that_towline_uses_connect_in_every_suite(pattern: str, suite: str) -> None:
    client, server = pair(pattern, suite=suite)
    finish(client, server)
    assert client.handshake_hash == server.handshake_hash
    assert client.exporter(b"label", 32) == server.exporter(b"label", 32)
    for sealing, opening in zip(client.split(), server.split(), strict=True):
        assert opening.decrypt_with_ad(b"ad", sealing.encrypt_with_ad(b"ad", b"hello")) == b"hello"


PSK_PATTERNS = st.sampled_from(sorted(PATTERNS)).flatmap(
    lambda name: st.sets(st.integers(0, len(PATTERNS[name].messages))).map(
        lambda places: name + "+".join(f"psk{place}" for place in sorted(places))
    )
)


@given(
    pattern=PSK_PATTERNS,
    cipher=st.sampled_from(sorted(CIPHERS)),
    hash_name=st.sampled_from(sorted(HASHES)),
    payload=st.binary(max_size=100),
)
def test_every_pattern_with_any_psks_connects_and_knows_its_sizes(
    pattern: str, cipher: str, hash_name: str, payload: bytes
) -> None:
    client, server = pair(pattern, suite=f"{cipher}_{hash_name}")
    while not client.complete:
        writer, reader = (client, server) if client.is_my_turn else (server, client)
        assert writer.next_message_overhead == reader.next_message_overhead
        size = writer.next_message_overhead + len(payload)
        message = writer.write_message(payload)
        assert len(message) == size
        assert reader.read_message(message) == payload
    assert server.complete
    assert client.handshake_hash == server.handshake_hash
    assert len(client.handshake_hash) == HASHES[hash_name].hashlen
    assert client.remote_static == (PUBLIC[False] if find_pattern(pattern).has_static(initiator=False) else None)


@pytest.mark.parametrize(
    ("pattern", "sizes"),
    [
        ("NN", [32, 48]),
        ("NNpsk0", [48, 48]),
        ("XX", [32, 96, 64]),
        ("XXpsk3", [48, 96, 64]),
        ("IK", [96, 48]),
        ("KKpsk0", [48, 48]),
    ],
)
def test_message_sizes_are_known_beforehand(pattern: str, sizes: list[int]) -> None:
    client, server = pair(pattern)
    seen: list[int] = []
    while not client.complete:
        seen.append(client.next_message_overhead)
        writer, reader = (client, server) if client.is_my_turn else (server, client)
        reader.read_message(writer.write_message())
    assert seen == sizes
    with pytest.raises(MisuseError, match="no next message"):
        _ = client.next_message_overhead


def test_case_12_a_wrong_psk_fails_at_message_1_before_any_diffie_hellman(counting_dh: CountingDH) -> None:
    message = handshake("NNpsk0", True, psk=bytes(range(1, 33))).write_message()
    counting_dh.generated = 0
    server = handshake("NNpsk0", False)
    with pytest.raises(HandshakeFailed, match=GENERIC):
        server.read_message(message)
    assert (counting_dh.generated, counting_dh.exchanged) == (0, 0)
    with pytest.raises(HandshakeFailed, match=GENERIC):
        server.write_message()


@pytest.mark.parametrize("pattern", ["NNpsk0", "NN", "XX"])
def test_case_13_another_prologue_fails(pattern: str) -> None:
    client, server = handshake(pattern, True, prologue=b"one"), handshake(pattern, False, prologue=b"two")
    with pytest.raises(HandshakeFailed, match=GENERIC):
        finish(client, server)


@pytest.mark.parametrize("pattern", ["NK", "IK", "KK", "XK"])
def test_a_server_with_another_key_than_the_pinned_one_fails(pattern: str) -> None:
    found = find_pattern(pattern)
    client = HandshakeState(
        f"Noise_{pattern}_25519_ChaChaPoly_SHA256",
        True,
        s=PRIVATE[True] if found.has_static(initiator=True) else None,
        rs=X25519.generate().public_key,
    )
    with pytest.raises(HandshakeFailed, match=GENERIC):
        finish(client, handshake(pattern, False))


def test_case_17_a_low_order_static_key_fails() -> None:
    client, server = pair("XX")
    server.read_message(client.write_message())

    class Posing:
        public_key = LOW_ORDER

        def exchange(self, public_key: bytes, /) -> bytes:
            return X25519.load(PRIVATE[False]).exchange(public_key)

    server._s = Posing()
    with pytest.raises(HandshakeFailed, match=GENERIC):
        client.read_message(server.write_message())


def test_case_17_a_pinned_key_of_low_order_fails_when_it_is_used() -> None:
    client = HandshakeState("Noise_NK_25519_ChaChaPoly_SHA256", True, rs=LOW_ORDER)
    with pytest.raises(HandshakeFailed, match=GENERIC):
        client.write_message()


@pytest.mark.parametrize("pattern", ["NNpsk0", "XX"])
def test_case_19_a_message_2_of_another_handshake_fails(pattern: str) -> None:
    client, server = pair(pattern)
    server.read_message(client.write_message())
    recorded = server.write_message()
    again = handshake(pattern, True)
    again.write_message()
    with pytest.raises(HandshakeFailed, match=GENERIC):
        again.read_message(recorded)


def messages_of(pattern: str, count: int) -> tuple[HandshakeState, bytes]:
    """The reader of message ``count``, and that message."""
    client, server = pair(pattern)
    while True:
        writer, reader = (client, server) if client.is_my_turn else (server, client)
        message = writer.write_message()
        count -= 1
        if count == 0:
            return reader, message
        reader.read_message(message)


@pytest.mark.parametrize(("pattern", "number"), [("NNpsk0", 1), ("NNpsk0", 2), ("XX", 1), ("XX", 2), ("XX", 3)])
def test_case_20_a_message_cut_anywhere_fails_by_its_size_before_any_cryptography(
    pattern: str, number: int, counting_dh: CountingDH
) -> None:
    size = len(messages_of(pattern, number)[1])
    for kept in range(size):
        reader, message = messages_of(pattern, number)
        counting_dh.exchanged, before = 0, reader.handshake_hash
        with pytest.raises(HandshakeFailed, match=GENERIC):
            reader.read_message(message[:kept])
        assert counting_dh.exchanged == 0
        assert reader.handshake_hash == before


@pytest.mark.parametrize(("pattern", "number"), [("NNpsk0", 1), ("NNpsk0", 2), ("XX", 2), ("XX", 3)])
def test_case_20_a_message_one_byte_longer_fails(pattern: str, number: int) -> None:
    reader, message = messages_of(pattern, number)
    with pytest.raises(HandshakeFailed, match=GENERIC):
        reader.read_message(message + b"\0")


@pytest.mark.parametrize(("pattern", "number"), [("NNpsk0", 1), ("NNpsk0", 2), ("XX", 2), ("XX", 3)])
def test_case_21_a_message_with_any_byte_changed_or_its_ephemeral_swapped_fails(pattern: str, number: int) -> None:
    for place in range(len(messages_of(pattern, number)[1])):
        reader, message = messages_of(pattern, number)
        changed = bytearray(message)
        changed[place] ^= 1
        with pytest.raises(HandshakeFailed, match=GENERIC):
            reader.read_message(changed)
    reader, message = messages_of(pattern, number)
    with pytest.raises(HandshakeFailed, match=GENERIC):
        reader.read_message(X25519.generate().public_key + message[32:])


def test_case_21_a_swapped_ephemeral_in_the_open_first_message_of_xx_fails_at_the_second() -> None:
    client, server = pair("XX")
    client.write_message()
    server.read_message(X25519.generate().public_key)
    with pytest.raises(HandshakeFailed, match=GENERIC):
        client.read_message(server.write_message())


def test_case_45_a_message_above_the_limit_of_noise_fails_by_its_size(counting_dh: CountingDH) -> None:
    reader, message = messages_of("XX", 1)
    with pytest.raises(HandshakeFailed, match=GENERIC):
        reader.read_message(message + bytes(MAX_MESSAGE))
    assert counting_dh.exchanged == 0


def test_a_payload_fills_a_message_and_no_more() -> None:
    client, server = pair("NNpsk0")
    limit = MAX_MESSAGE - 48
    with pytest.raises(MessageTooLarge) as caught:
        client.write_message(bytes(limit + 1))
    assert (caught.value.size, caught.value.limit) == (limit + 1, limit)
    assert server.read_message(client.write_message(bytes(limit))) == bytes(limit)


def test_the_sides_take_turns() -> None:
    client, server = pair("NN")
    with pytest.raises(MisuseError, match="own side"):
        client.read_message(bytes(32))
    with pytest.raises(MisuseError, match="other side"):
        server.write_message()
    with pytest.raises(MisuseError, match="not complete"):
        client.split()
    with pytest.raises(MisuseError, match="not complete"):
        client.exporter(b"label", 32)
    finish(client, server)
    calls: list[Callable[[], bytes]] = [
        client.write_message,
        server.write_message,
        lambda: client.read_message(b""),
    ]
    for call in calls:
        with pytest.raises(MisuseError, match="no next message"):
            call()


def test_cipher_states_are_given_out_once() -> None:
    client, server = pair("NN")
    finish(client, server)
    client.split()
    with pytest.raises(MisuseError, match="given out already"):
        client.split()
    assert client.exporter(b"label", 32) == server.exporter(b"label", 32)


def test_a_failed_handshake_stays_failed_and_lets_go_of_its_keys() -> None:
    client = handshake("XX", True)
    client.write_message()
    for _ in range(2):
        with pytest.raises(HandshakeFailed, match=GENERIC):
            client.read_message(bytes(96))
    assert not client.complete
    assert client._e is None
    assert client._s is None


def test_a_complete_handshake_lets_go_of_its_keys() -> None:
    client, server = pair("XXpsk3")
    finish(client, server)
    for side in (client, server):
        assert (side._e, side._s, side._psks) == (None, None, [])


def test_two_handshakes_never_give_the_same_keys() -> None:
    hashes: set[bytes] = set()
    for _ in range(20):
        client, server = pair("NNpsk0")
        finish(client, server)
        hashes |= {client.handshake_hash, client.exporter(b"label", 32)}
    assert len(hashes) == 40


def test_the_exporter_is_hkdf_expand_of_the_third_output_over_label_and_hash() -> None:
    symmetric = SymmetricState(b"Noise_NN_25519_ChaChaPoly_SHA256", CIPHERS["ChaChaPoly"], HASHES["SHA256"])
    symmetric.mix_key(b"secret")
    temp_key = hmac.digest(symmetric._ck, b"", "sha256")
    outputs = [b""]
    for number in (1, 2, 3):
        outputs.append(hmac.digest(temp_key, outputs[-1] + bytes((number,)), "sha256"))
    with pytest.raises(MisuseError, match="before the handshake is complete"):
        symmetric.exporter(b"label", 32)
    sending, _ = symmetric.split()
    assert CipherState(CIPHERS["ChaChaPoly"], outputs[1]).decrypt_with_ad(b"", sending.encrypt_with_ad(b"", b"x"))
    assert symmetric.exporter(b"label", 32) == hmac.digest(outputs[3], b"label" + symmetric.h + b"\x01", "sha256")
    assert symmetric.exporter(b"other", 32) != symmetric.exporter(b"label", 32)
    assert len(symmetric.exporter(b"label", 100)) == 100
    with pytest.raises(MisuseError, match="8161 bytes"):
        symmetric.exporter(b"label", 255 * 32 + 1)


# --- names and keys that are refused ---


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("", "no protocol name"),
        ("Noise_XX_25519_ChaChaPoly", "no protocol name"),
        ("NoisePSK_XX_25519_ChaChaPoly_SHA256", "no protocol name"),
        ("Noise_XX_25519_ChaChaPoly_SHA256_", "no protocol name"),
        ("Noise_XX" + "X" * 300 + "_25519_ChaChaPoly_SHA256", "no protocol name"),
        ("Noise_XX_448_ChaChaPoly_SHA256", "no Diffie-Hellman function '448'; there are 25519"),
        ("Noise_XX_25519_Plain_SHA256", "no cipher 'Plain'; there are ChaChaPoly"),
        ("Noise_XX_25519_ChaChaPoly_MD5", "no hash 'MD5'; there are SHA256"),
        ("Noise_ZZ_25519_ChaChaPoly_SHA256", "no handshake pattern 'ZZ'"),
        ("Noise__25519_ChaChaPoly_SHA256", "no handshake pattern ''"),
        ("Noise_XXfallback_25519_ChaChaPoly_SHA256", "fallback modifier is not supported"),
        ("Noise_XXfoo_25519_ChaChaPoly_SHA256", "'foo' is not a modifier"),
        ("Noise_XXpsk_25519_ChaChaPoly_SHA256", "'psk' is not a modifier"),
        ("Noise_XXpsk00_25519_ChaChaPoly_SHA256", "'psk00' is not a modifier"),
        ("Noise_XXpsk4_25519_ChaChaPoly_SHA256", "psk4 in a pattern of 3 messages"),
        ("Noise_XXpsk3+psk0_25519_ChaChaPoly_SHA256", "rising order"),
        ("Noise_XXpsk1+psk1_25519_ChaChaPoly_SHA256", "rising order"),
    ],
)
def test_a_name_that_means_nothing_is_refused(name: str, match: str) -> None:
    with pytest.raises(MisuseError, match=match):
        HandshakeState(name, True)


@pytest.mark.parametrize(
    ("pattern", "keys", "match"),
    [
        ("XX", {}, "initiator needs s"),
        ("NK", {}, "initiator needs rs"),
        ("NN", {"s": PSK}, "has no place for s"),
        ("XX", {"s": PSK, "rs": PSK}, "has no place for rs"),
        ("NN", {"re": PSK}, "has no place for re"),
        ("XX", {"s": PSK[:31]}, "s has 31 bytes, where 32 are needed"),
        ("NK", {"rs": PSK + b"x"}, "rs has 33 bytes, where 32 are needed"),
        ("NN", {"e": b""}, "e has 0 bytes, where 32 are needed"),
        ("NNpsk0", {}, "0 psks, where 1 are needed"),
        ("NN", {"psks": [PSK]}, "1 psks, where 0 are needed"),
        ("NNpsk0", {"psks": [b"secret"]}, "a psk has 6 bytes, where 32 are needed"),
    ],
)
def test_a_key_that_is_missing_or_too_many_or_of_a_wrong_length_is_refused(
    pattern: str, keys: dict[str, Any], match: str
) -> None:
    with pytest.raises(MisuseError, match=match):
        HandshakeState(f"Noise_{pattern}_25519_ChaChaPoly_SHA256", True, **keys)


# --- records ---


@given(
    cipher=st.sampled_from(sorted(CIPHERS)),
    records=st.lists(st.tuples(st.binary(max_size=50), st.binary(max_size=200)), max_size=5),
)
def test_what_one_end_seals_the_other_opens(cipher: str, records: list[tuple[bytes, bytes]]) -> None:
    sealing, opening = cipher_pair(cipher)
    for ad, plaintext in records:
        sealed = sealing.encrypt_with_ad(ad, memoryview(plaintext))
        assert len(sealed) == len(plaintext) + TAGLEN
        assert opening.decrypt_with_ad(bytearray(ad), memoryview(sealed)) == plaintext
    assert sealing.nonce == opening.nonce == len(records)


def test_a_record_with_any_bit_changed_is_refused_and_the_right_one_still_opens() -> None:
    sealing, opening = cipher_pair()
    sealed = sealing.encrypt_with_ad(b"ad", b"hello")
    for bit in range(len(sealed) * 8):
        changed = bytearray(sealed)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ProtocolViolation):
            opening.decrypt_with_ad(b"ad", changed)
    for kept in range(len(sealed)):
        with pytest.raises(ProtocolViolation):
            opening.decrypt_with_ad(b"ad", sealed[:kept])
    with pytest.raises(ProtocolViolation):
        opening.decrypt_with_ad(b"other ad", sealed)
    assert opening.decrypt_with_ad(b"ad", sealed) == b"hello"


def test_records_replayed_reordered_dropped_or_reflected_are_refused() -> None:
    client, server = pair("NN")
    finish(client, server)
    sending, client_receiving = client.split()
    receiving, _ = server.split()
    records = [sending.encrypt_with_ad(b"", b"record") for _ in range(3)]
    with pytest.raises(ProtocolViolation):
        receiving.decrypt_with_ad(b"", records[1])
    assert receiving.decrypt_with_ad(b"", records[0]) == b"record"
    for wrong in (records[0], records[2]):
        with pytest.raises(ProtocolViolation):
            receiving.decrypt_with_ad(b"", wrong)
    with pytest.raises(ProtocolViolation):
        client_receiving.decrypt_with_ad(b"", records[0])


@pytest.mark.smoke
@pytest.mark.parametrize("cipher", sorted(CIPHERS))
def test_case_26_the_last_nonce_works_and_the_next_is_refused_without_a_wrap(cipher: str) -> None:
    sealing, opening = cipher_pair(cipher)
    sealing.nonce = opening.nonce = 2**64 - 2
    sealed = sealing.encrypt_with_ad(b"", b"last")
    assert opening.decrypt_with_ad(b"", sealed) == b"last"
    buffer = bytearray(4 + TAGLEN)
    calls: list[Callable[[], object]] = [
        lambda: sealing.encrypt_with_ad(b"", b"more"),
        lambda: sealing.encrypt_with_ad_into(b"", b"more", buffer),
        lambda: opening.decrypt_with_ad(b"", sealed),
    ]
    for call in calls * 2:
        with pytest.raises(NonceExhausted):
            call()
    assert sealing.nonce == opening.nonce == MAX_NONCE
    assert not any(buffer)


def test_sealing_into_a_buffer_gives_the_same_record() -> None:
    one, other = cipher_pair()
    record = bytearray(2 + 5 + TAGLEN)
    assert one.encrypt_with_ad_into(b"ad", b"hello", memoryview(record)[2:]) == 5 + TAGLEN
    assert bytes(record[2:]) == other.encrypt_with_ad(b"ad", b"hello")
    assert one.nonce == 1


@pytest.mark.parametrize("cipher", sorted(CIPHERS))
def test_rekey_is_what_the_last_nonce_seals_and_the_counter_runs_on(cipher: str) -> None:
    one, other = cipher_pair(cipher)
    for _ in range(3):
        one.encrypt_with_ad(b"", b"")
    one.rekey()
    assert one.nonce == 3
    function = CIPHERS[cipher]
    key = function.new(PSK).encrypt(function.pack_nonce(MAX_NONCE), bytes(32), b"")[:32]
    assert one.encrypt_with_ad(b"", b"x") == function.new(key).encrypt(function.pack_nonce(3), b"x", b"")
    with pytest.raises(MisuseError, match="no key to replace"):
        CipherState(function).rekey()
    with pytest.raises(MisuseError, match="no key to seal"):
        CipherState(function).encrypt_with_ad_into(b"", b"", bytearray(16))
    with pytest.raises(MisuseError, match="31 bytes"):
        CipherState(function, bytes(31))
    other.initialize_key(key)
    assert other.nonce == 0


def test_case_27_records_around_a_rekey_arrive_in_each_direction_and_the_old_key_is_refused() -> None:
    client, server = pair("NN")
    finish(client, server)
    every = 4
    ends = client.split(), server.split()
    for direction in (0, 1):
        sealing, opening = ends[direction][direction], ends[1 - direction][direction]
        for number in range(every + 2):
            if number == every:
                sealing.rekey()
                sealed = sealing.encrypt_with_ad(b"", b"new key")
                with pytest.raises(ProtocolViolation):
                    opening.decrypt_with_ad(b"", sealed)
                opening.rekey()
                assert opening.decrypt_with_ad(b"", sealed) == b"new key"
            else:
                sealed = sealing.encrypt_with_ad(b"", b"%d" % number)
                assert opening.decrypt_with_ad(b"", sealed) == b"%d" % number
        # The other direction has its own key and counter, and did not notice.
        assert ends[direction][1 - direction].nonce == (0 if direction == 0 else every + 2)


def test_case_50_a_hundred_thousand_equal_records_are_all_sealed_differently() -> None:
    sealing, _ = cipher_pair()
    seen: set[bytes] = set()
    for _ in range(100_000):
        if sealing.nonce % 2**16 == 0:
            sealing.rekey()
        seen.add(sealing.encrypt_with_ad(b"", b"")[:TAGLEN])
    assert len(seen) == 100_000


def test_without_a_key_what_passes_is_what_it_was() -> None:
    cipher = CipherState(CIPHERS["ChaChaPoly"])
    assert not cipher.has_key
    assert cipher.encrypt_with_ad(b"", b"open") == cipher.decrypt_with_ad(b"", b"open") == b"open"
    assert cipher.nonce == 0


# --- secrets ---


def secrets_and_holders() -> list[tuple[object, list[bytes]]]:
    client, server = pair("XXpsk3")
    client.write_message()
    done_client, done_server = pair("NNpsk0")
    finish(done_client, done_server)
    exported = done_client.exporter(b"label", 32)
    return [
        (client, [PSK, PRIVATE[True]]),
        (server, [PSK, PRIVATE[False]]),
        (done_client, [PSK, exported]),
        (client._symmetric, [client._symmetric._ck]),
        *((cipher, [PSK]) for cipher in done_server.split()),
        (CipherState(CIPHERS["XChaChaPoly"], PSK), [PSK]),
        (X25519.load(PRIVATE[True]), [PRIVATE[True]]),
    ]


def test_case_48_no_repr_holds_a_secret() -> None:
    for holder, secrets in secrets_and_holders():
        for secret in secrets:
            for shown in (repr(holder), str(holder), f"{holder}"):
                assert secret.hex()[:8] not in shown
                assert repr(secret)[2:10] not in shown


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
def test_case_48_pickling_and_copying_raise_type_error(duplicate: Callable[[object], object]) -> None:
    for holder, _ in secrets_and_holders():
        with pytest.raises(TypeError, match="cannot be pickled or copied"):
            duplicate(holder)


def test_case_52_a_record_that_fails_leaves_no_plaintext_anywhere_in_the_error() -> None:
    sealing, opening = cipher_pair()
    sealed = bytearray(sealing.encrypt_with_ad(b"", b"attack at dawn"))
    sealed[-1] ^= 1
    with pytest.raises(ProtocolViolation) as caught:
        opening.decrypt_with_ad(b"", sealed)
    shown = "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format(chain=True))
    own_frames = shown[shown.index("_cipher_state.py") :]
    assert "dawn" not in own_frames
    assert caught.value.__cause__ is None
    assert caught.value.args == ("a record is not what the other end sealed",)


def uses_of(sealing: CipherState, opening: CipherState, half_way: HandshakeState) -> list[Callable[[], object]]:
    return [
        lambda: sealing.encrypt_with_ad(b"", b"child"),
        lambda: sealing.encrypt_with_ad_into(b"", b"child", bytearray(5 + TAGLEN)),
        lambda: opening.decrypt_with_ad(b"", bytes(20)),
        sealing.rekey,
        half_way.write_message,
    ]


def test_case_51_after_a_fork_every_use_of_a_key_from_before_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sealing, opening = cipher_pair()
    calls = uses_of(sealing, opening, handshake("XX", True))
    monkeypatch.setattr(_cipher_state, "_process", _cipher_state.this_process())  # put back afterwards
    _cipher_state._count_fork()
    for call in calls:
        with pytest.raises(MisuseError, match="forked"):
            call()
    assert sealing.nonce == opening.nonce == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
# From Python 3.12 on forking next to threads of the test runner warns; the child only looks and leaves.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_case_51_a_forked_child_cannot_use_its_parents_keys_and_the_parent_goes_on() -> None:
    sealing, opening = cipher_pair()
    half_way = handshake("XX", True)
    calls = uses_of(sealing, opening, half_way)
    child = os.fork()
    if child == 0:
        refused = 0
        try:
            for call in calls:
                try:
                    call()
                except MisuseError:
                    refused += 1
            # Its own keys work.
            one, other = cipher_pair()
            assert other.decrypt_with_ad(b"", one.encrypt_with_ad(b"", b"x")) == b"x"
            finish(*pair("NN"))
        except BaseException:
            refused = 99
        finally:
            os._exit(refused)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == len(calls)
    assert opening.decrypt_with_ad(b"", sealing.encrypt_with_ad(b"", b"parent")) == b"parent"
    assert len(half_way.write_message()) == 32
