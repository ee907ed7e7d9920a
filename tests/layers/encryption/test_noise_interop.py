"""Both roles against another implementation, `noiseprotocol` (security case 54)."""

from __future__ import annotations

from typing import Any

import pytest

from towline.layers.encryption._dh import DH_FUNCTIONS
from towline.layers.encryption._patterns import find_pattern
from towline.layers.encryption.noise import HandshakeState

other = pytest.importorskip("noise.connection")

PROLOGUE = b"agreed beforehand"
PSK = bytes(range(32))
PRIVATE = {True: bytes(range(1, 33)), False: bytes(range(101, 133))}
PUBLIC = {side: DH_FUNCTIONS["25519"].load(private).public_key for side, private in PRIVATE.items()}


def ours(name: str, initiator: bool) -> HandshakeState:
    pattern = find_pattern(name.split("_")[1])
    knows_rs = pattern.initiator_knows_s if initiator else pattern.responder_knows_s
    return HandshakeState(
        name,
        initiator,
        prologue=PROLOGUE,
        s=PRIVATE[initiator] if pattern.has_static(initiator=initiator) else None,
        rs=PUBLIC[not initiator] if knows_rs else None,
        psks=[PSK] * pattern.psk_count,
    )


def theirs(name: str, initiator: bool) -> Any:  # the package has no types
    pattern = find_pattern(name.split("_")[1])
    knows_rs = pattern.initiator_knows_s if initiator else pattern.responder_knows_s
    connection = other.NoiseConnection.from_name(name.encode())
    if initiator:
        connection.set_as_initiator()
    else:
        connection.set_as_responder()
    connection.set_prologue(PROLOGUE)
    if pattern.psk_count:
        connection.set_psks(psks=[PSK] * pattern.psk_count)
    if pattern.has_static(initiator=initiator):
        connection.set_keypair_from_private_bytes(other.Keypair.STATIC, PRIVATE[initiator])
    if knows_rs:
        connection.set_keypair_from_public_bytes(other.Keypair.REMOTE_STATIC, PUBLIC[not initiator])
    connection.start_handshake()
    return connection


@pytest.mark.parametrize("initiator", [True, False], ids=["initiator", "responder"])
@pytest.mark.parametrize("suite", ["ChaChaPoly_SHA256", "AESGCM_SHA256", "ChaChaPoly_BLAKE2s"])
@pytest.mark.parametrize("pattern", ["NN", "NNpsk0", "XX", "XXpsk3", "IK", "KKpsk0"])
def test_case_54_we_and_another_implementation_understand_each_other(pattern: str, suite: str, initiator: bool) -> None:
    name = f"Noise_{pattern}_25519_{suite}"
    we, they = ours(name, initiator), theirs(name, not initiator)
    turn = 0
    while not we.complete:
        payload = b"payload %d" % turn
        if we.is_my_turn:
            assert bytes(they.read_message(we.write_message(payload))) == payload
        else:
            assert we.read_message(bytes(they.write_message(payload))) == payload
        turn += 1
    assert they.handshake_finished
    assert we.handshake_hash == they.get_handshake_hash()
    if find_pattern(pattern).has_static(initiator=not initiator):
        assert we.remote_static == PUBLIC[not initiator]
    first, second = we.split()
    sending, receiving = (first, second) if initiator else (second, first)
    for record in (b"", b"one", b"two" * 1000):
        assert bytes(they.decrypt(sending.encrypt_with_ad(b"", record))) == record
        assert receiving.decrypt_with_ad(b"", bytes(they.encrypt(record))) == record
