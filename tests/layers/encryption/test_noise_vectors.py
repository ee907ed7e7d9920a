"""Every published vector that applies: Noise, Wycheproof, the XChaCha draft (security cases 17 and 53).

One test runs one file: thousands of items would cost more than what they check. A failure names its vector.
"""

from __future__ import annotations

import hmac
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from towline.errors import HandshakeFailed
from towline.layers.encryption import _ciphers, _dh
from towline.layers.encryption._hashes import HASHES
from towline.layers.encryption._patterns import PATTERNS, find_pattern
from towline.layers.encryption.noise import HandshakeState

VECTORS = Path(__file__).parents[2] / "vectors"


def load(name: str) -> Any:  # JSON of a dozen shapes
    return json.loads((VECTORS / name).read_text(encoding="utf-8"))


class P256KeyPair:
    """P-256 as the extended vectors have it: points uncompressed, the secret is the x coordinate."""

    def __init__(self, private: ec.EllipticCurvePrivateKey) -> None:
        self._private = private
        self.public_key = private.public_key().public_bytes(
            serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
        )

    def exchange(self, public_key: bytes, /) -> bytes:
        point = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), public_key)
        return self._private.exchange(ec.ECDH(), point)


P256 = _dh.DHFunction(
    name="P256",
    public_length=65,
    private_length=32,
    generate=lambda: P256KeyPair(ec.generate_private_key(ec.SECP256R1())),
    load=lambda private: P256KeyPair(ec.derive_private_key(int.from_bytes(private), ec.SECP256R1())),
)


def handshake_of(vector: dict[str, Any], *, initiator: bool) -> HandshakeState:
    name: str = vector.get("protocol_name") or vector["name"]
    pattern = find_pattern(name.split("_")[1])
    side = "init" if initiator else "resp"
    knows_rs = pattern.initiator_knows_s if initiator else pattern.responder_knows_s

    def key(field: str, used: bool) -> bytes | None:
        # Some files give keys for patterns that have no use for them; those must not be passed on.
        return bytes.fromhex(vector[f"{side}_{field}"]) if used else None

    return HandshakeState(
        name,
        initiator,
        prologue=bytes.fromhex(vector[f"{side}_prologue"]),
        s=key("static", pattern.has_static(initiator=initiator)),
        e=key("ephemeral", f"{side}_ephemeral" in vector),
        rs=key("remote_static", knows_rs),
        psks=[bytes.fromhex(psk) for psk in vector.get(f"{side}_psks", ())] if pattern.psk_count else (),
    )


def run(vector: dict[str, Any]) -> None:
    initiator, responder = (handshake_of(vector, initiator=first) for first in (True, False))
    one_way = find_pattern(initiator.protocol_name.split("_")[1]).is_one_way
    ciphers = None
    for index, message in enumerate(vector["messages"]):
        payload, ciphertext = bytes.fromhex(message["payload"]), bytes.fromhex(message["ciphertext"])
        if not initiator.complete:
            writer, reader = (initiator, responder) if index % 2 == 0 else (responder, initiator)
            assert writer.is_my_turn
            assert not reader.is_my_turn
            overhead = writer.next_message_overhead
            assert reader.next_message_overhead == overhead
            assert overhead == len(ciphertext) - len(payload)
            assert writer.write_message(payload) == ciphertext
            assert reader.read_message(ciphertext) == payload
        else:
            # One pair seals, the other opens. After a one-way handshake only the initiator sends.
            ciphers = ciphers or (initiator.split(), responder.split())
            direction = 0 if one_way else index % 2
            assert ciphers[index % 2][direction].encrypt_with_ad(b"", payload) == ciphertext
            assert ciphers[1 - index % 2][direction].decrypt_with_ad(b"", ciphertext) == payload
    assert initiator.complete
    assert responder.complete
    assert initiator.handshake_hash == responder.handshake_hash
    assert initiator.exporter(b"label", 32) == responder.exporter(b"label", 32)
    if "handshake_hash" in vector:
        assert initiator.handshake_hash.hex() == vector["handshake_hash"]


@pytest.mark.parametrize(
    ("file", "count"),
    [
        ("cacophony.json", 308),
        ("snow.json", 258),
        ("snow-extended.json", 142),
        pytest.param("noise-c-basic.json", 81, marks=pytest.mark.smoke),
    ],
)
def test_case_53_every_noise_vector_passes(file: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_dh.DH_FUNCTIONS, "P256", P256)
    ran = 0
    for vector in load(f"noise/{file}")["vectors"]:
        name: str = vector.get("protocol_name") or vector["name"]
        if "_448_" in name or name.startswith("NoisePSK_"):
            continue  # not a suite of ours; the name of a revision before 32
        try:
            run(vector)
        except Exception as error:
            raise AssertionError(f"{file}: {name}: {error!r}") from error
        ran += 1
    assert ran == count


def test_case_53_the_noise_vectors_cover_every_pattern() -> None:
    names = {
        (vector.get("protocol_name") or vector["name"]).split("_")[1]
        for file in (VECTORS / "noise").glob("*.json")
        for vector in json.loads(file.read_text())["vectors"]
    }
    assert len(PATTERNS) == 38
    assert PATTERNS.keys() <= names


def refuses(function: Callable[..., bytes], *args: bytes) -> bool:
    try:
        function(*args)
    except (InvalidTag, ValueError):
        return True
    return False


AEADS: dict[str, Callable[[bytes], _ciphers.AEAD | _ciphers.XChaCha20Poly1305]] = {
    "chacha20_poly1305": _ciphers.CIPHERS["ChaChaPoly"].new,
    "aes_gcm": _ciphers.CIPHERS["AESGCM"].new,
    "xchacha20_poly1305": _ciphers.XChaCha20Poly1305,
}


@pytest.mark.parametrize(
    ("file", "valid", "invalid"),
    [("chacha20_poly1305", 168, 44), ("aes_gcm", 156, 51), ("xchacha20_poly1305", 151, 45)],
)
def test_case_53_aeads_seal_and_open_the_valid_and_refuse_the_invalid(file: str, valid: int, invalid: int) -> None:
    ran: Counter[str] = Counter()
    for group in load(f"wycheproof/{file}.json")["testGroups"]:
        for test in group["tests"]:
            key, nonce, ad, plaintext, ciphertext, tag = (
                bytes.fromhex(test[field]) for field in ("key", "iv", "aad", "msg", "ct", "tag")
            )
            where = f"{file} {test['tcId']}: {test['comment']}"
            aead = AEADS[file](key)
            if test["result"] == "valid" and (file != "aes_gcm" or 8 <= len(nonce) <= 128):
                assert aead.encrypt(nonce, plaintext, ad) == ciphertext + tag, where
                assert aead.decrypt(nonce, ciphertext + tag, ad) == plaintext, where
            else:
                # AES-GCM nonces that `cryptography` does not take are refused too; Noise has 12 bytes always.
                assert refuses(aead.decrypt, nonce, ciphertext + tag, ad), where
            ran[test["result"]] += 1
    assert ran == {"valid": valid, "invalid": invalid}


def test_case_53_x25519_agrees_and_case_17_refuses_the_all_zero_secret() -> None:
    ran = refused = 0
    for group in load("wycheproof/x25519.json")["testGroups"]:
        for test in group["tests"]:
            private, public, shared = (bytes.fromhex(test[field]) for field in ("private", "public", "shared"))
            pair = _dh.DH_FUNCTIONS["25519"].load(private)
            where = f"x25519 {test['tcId']}: {test['comment']}"
            if any(shared):
                assert pair.exchange(public) == shared, where
            else:
                refused += 1
                assert refuses(pair.exchange, public), where
            ran += 1
    assert ran == 362
    assert refused > 0


def test_case_17_a_low_order_point_in_a_handshake_is_a_handshake_failure() -> None:
    points = {
        bytes.fromhex(test["public"])
        for group in load("wycheproof/x25519.json")["testGroups"]
        for test in group["tests"]
        if not any(bytes.fromhex(test["shared"]))
    }
    assert len(points) > 5
    for point in points:
        server = HandshakeState("Noise_NN_25519_ChaChaPoly_SHA256", False)
        server.read_message(point)
        with pytest.raises(HandshakeFailed):
            server.write_message()
        client = HandshakeState("Noise_NN_25519_ChaChaPoly_SHA256", True)
        client.write_message()
        with pytest.raises(HandshakeFailed):
            client.read_message(point + bytes(16))


def test_case_53_hmac_agrees_and_refuses_every_changed_tag() -> None:
    ran = 0
    for group in load("wycheproof/hmac_sha256.json")["testGroups"]:
        for test in group["tests"]:
            key, message, tag = (bytes.fromhex(test[field]) for field in ("key", "msg", "tag"))
            computed = HASHES["SHA256"].hmac(key, message)[: group["tagSize"] // 8]
            assert hmac.compare_digest(computed, tag) == (test["result"] == "valid"), test["tcId"]
            ran += 1
    assert ran == 113


def test_case_53_hkdf_agrees_and_refuses_too_much_output() -> None:
    sha256, ran = HASHES["SHA256"], 0
    for group in load("wycheproof/hkdf_sha256.json")["testGroups"]:
        for test in group["tests"]:
            ikm, salt, info, okm = (bytes.fromhex(test[field]) for field in ("ikm", "salt", "info", "okm"))
            key = sha256.hmac(salt or bytes(32), ikm)  # HKDF-Extract
            if test["result"] == "valid":
                assert sha256.hkdf_expand(key, info, test["size"]) == okm, test["tcId"]
            else:
                with pytest.raises(ValueError, match="bytes of key"):
                    sha256.hkdf_expand(key, info, test["size"])
            ran += 1
    assert ran == 59


def test_case_53_the_xchacha_draft_agrees() -> None:
    draft = load("xchacha/draft-irtf-cfrg-xchacha.json")
    assert {name: len(draft[name]) for name in ("hchacha20", "aead", "stream")} == {
        "hchacha20": 1,
        "aead": 1,
        "stream": 1,
    }

    def fields(name: str, *wanted: str) -> tuple[bytes, ...]:
        return tuple(bytes.fromhex(draft[name][0][field]) for field in wanted)

    key, nonce, subkey = fields("hchacha20", "key", "nonce", "subkey")
    assert _ciphers.hchacha20(key, nonce) == subkey

    key, nonce, ad, plaintext, ciphertext, tag = fields("aead", "key", "nonce", "aad", "plaintext", "ciphertext", "tag")
    aead = _ciphers.XChaCha20Poly1305(key)
    assert aead.encrypt(nonce, plaintext, ad) == ciphertext + tag
    assert aead.decrypt(nonce, ciphertext + tag, ad) == plaintext

    key, nonce, plaintext, ciphertext = fields("stream", "key", "nonce", "plaintext", "ciphertext")
    counter = draft["stream"][0]["initial_counter"].to_bytes(4, "little")
    stream = algorithms.ChaCha20(_ciphers.hchacha20(key, nonce[:16]), counter + bytes(4) + nonce[16:])
    assert Cipher(stream, mode=None).encryptor().update(plaintext) == ciphertext


@pytest.mark.parametrize(("key", "nonce"), [(31, 16), (33, 16), (32, 15), (32, 17), (32, 24), (0, 0)])
def test_hchacha20_refuses_wrong_lengths(key: int, nonce: int) -> None:
    with pytest.raises(ValueError, match=f"not {key} and {nonce}"):
        _ciphers.hchacha20(bytes(key), bytes(nonce))


@pytest.mark.parametrize("size", [0, 12, 16, 23, 25, 32])
def test_xchacha_refuses_nonces_and_keys_of_wrong_lengths(size: int) -> None:
    box = _ciphers.XChaCha20Poly1305(bytes(range(32)))
    with pytest.raises(ValueError, match="24 bytes"):
        box.encrypt(bytes(size), b"x", b"")
    with pytest.raises(ValueError, match="24 bytes"):
        box.decrypt(bytes(size), bytes(17), b"")
    if size != 32:
        with pytest.raises(ValueError, match="32 bytes"):
            _ciphers.XChaCha20Poly1305(bytes(size))


def test_xchacha_in_a_session_is_xchacha_with_a_counted_nonce() -> None:
    key = bytes(range(32))
    cipher = _ciphers.CIPHERS["XChaChaPoly"]
    for counter in (0, 1, 2**32, 2**64 - 1):
        sealed = cipher.new(key).encrypt(cipher.pack_nonce(counter), b"hello", b"ad")
        nonce = bytes(16) + counter.to_bytes(8, "little")
        assert _ciphers.XChaCha20Poly1305(key).decrypt(nonce, sealed, b"ad") == b"hello"
