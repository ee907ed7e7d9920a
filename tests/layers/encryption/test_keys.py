"""Keys in files and in memory, and who is trusted (security cases 14, 15, 16, 48 and 49)."""

from __future__ import annotations

import base64
import copy
import logging
import os
import pickle
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa, x25519
from hypothesis import given
from hypothesis import strategies as st

from towline.errors import HandshakeFailed, KeyFileError, MisuseError
from towline.layers.encryption import _files
from towline.layers.encryption.keys import (
    AllowList,
    KnownHosts,
    PeerIdentity,
    Psk,
    StaticKey,
    StaticKeys,
    Trust,
)

SECRET = bytes(range(100, 132))
ENDPOINT = "tcp://db.example:7000"
posix = pytest.mark.skipif(sys.platform == "win32", reason="modes of files mean nothing on Windows")


async def check(trust: Trust | StaticKeys, key: bytes, endpoint: str = ENDPOINT) -> PeerIdentity:
    return await trust.check(key, endpoint=endpoint, handshake_hash=b"h" * 32, payload=b"")


def private_file(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(0o600)
    return path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def shows(secret: bytes, text: str) -> bool:
    """Whether any common way to write ``secret`` is in ``text``."""
    forms = (secret.hex(), base64.b64encode(secret).decode(), repr(secret)[2:-1])
    return any(form[:12] in text for form in forms)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- pre-shared keys ---


@pytest.mark.smoke
def test_a_psk_written_to_a_file_is_read_back(tmp_path: Path) -> None:
    psk = Psk.generate()
    path = tmp_path / "psk"
    psk.write(path)
    assert Psk.from_file(path) == Psk.from_file(str(path)) == psk
    assert len(psk.secret) == 32


@given(secret=st.binary(min_size=32, max_size=32).filter(lambda secret: not secret.isascii()))
def test_any_random_key_is_read_from_base64_and_from_hex(secret: bytes) -> None:
    for text in (base64.b64encode(secret).decode(), secret.hex(), secret.hex().upper()):
        assert Psk.from_base64(f" {text}\n").secret == secret


@given(text=st.text(max_size=100))
def test_any_other_text_is_refused_with_the_way_to_make_a_key(text: str) -> None:
    with pytest.raises(KeyFileError, match="towline keygen"):
        Psk.from_base64(text)


@pytest.mark.parametrize(
    "text",
    [
        "correct horse battery staple",
        "hunter2",
        "",
        "**********",
        base64.b64encode(bytes(32)).decode(),
        "00" * 32,
        base64.b64encode(SECRET[:31]).decode(),
        base64.b64encode(SECRET + b"x").decode(),
        SECRET.hex()[:-2],
        SECRET.hex() + "00",
        base64.b64encode(b"correct horse battery staple 1234"[:32]).decode(),
        "pässword",
    ],
)
def test_case_49_passphrases_zeros_and_wrong_lengths_are_no_psk(text: str, tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="run towline keygen") as caught:
        Psk.from_base64(text)
    with pytest.raises(KeyFileError, match=r"psk: .*run towline keygen") as caught_file:
        Psk.from_file(private_file(tmp_path / "psk", text))
    for error in (caught.value, caught_file.value):
        assert not text or text not in str(error)


@pytest.mark.parametrize("secret", [b"", b"short", bytes(32), SECRET + b"x", b"a sentence of thirty-two letters"])
def test_bytes_that_cannot_be_a_random_key_are_refused(secret: bytes) -> None:
    with pytest.raises(KeyFileError, match="towline keygen"):
        Psk(secret)


def test_psks_compare_by_their_secret_and_only_with_psks() -> None:
    assert Psk(SECRET) == Psk(SECRET)
    assert Psk(SECRET) != Psk.generate()
    assert Psk(SECRET) != SECRET
    assert Psk(SECRET) != StaticKey(SECRET)
    assert len({Psk(SECRET), Psk(SECRET)}) == 1


# --- key pairs ---


@pytest.mark.parametrize("password", [None, "hunter2", b"hunter2"])
def test_a_static_key_written_to_a_file_is_read_back(password: str | bytes | None, tmp_path: Path) -> None:
    key = StaticKey.generate()
    key.write(tmp_path / "key.pem", password)
    again = StaticKey.from_file(tmp_path / "key.pem", password)
    assert again == key
    assert again.public_key == key.public_key
    assert b"PRIVATE KEY-----" in (tmp_path / "key.pem").read_bytes()


def test_a_fingerprint_is_of_the_public_key_as_ssh_writes_it() -> None:
    key = StaticKey(SECRET)
    public = x25519.X25519PrivateKey.from_private_bytes(SECRET).public_key().public_bytes_raw()
    assert key.public_key == public
    assert key.fingerprint == PeerIdentity(public).fingerprint
    assert key.fingerprint.startswith("SHA256:")
    assert len(key.fingerprint) == len("SHA256:") + 43


def test_the_public_line_is_a_line_of_an_allow_list() -> None:
    key = StaticKey(SECRET)
    (peer,) = AllowList([key.public_line("anna's laptop")])
    assert peer == PeerIdentity(key.public_key, "anna's laptop")
    assert repr(peer) == f"PeerIdentity(\"anna's laptop\", '{key.fingerprint}')"
    assert key.public_line() == key.public_line(" ")
    with pytest.raises(MisuseError, match="one line"):
        key.public_line("two\nlines")


@pytest.mark.parametrize("secret", [b"", bytes(32), SECRET[:31]])
def test_a_private_key_of_zeros_or_of_a_wrong_length_is_refused(secret: bytes) -> None:
    with pytest.raises(KeyFileError, match="towline keygen"):
        StaticKey(secret)


# --- files ---


def pem(key: Any, password: bytes | None = None) -> bytes:
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    result: bytes = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    return result


WRITERS: list[Callable[[Path], None]] = [Psk(SECRET).write, StaticKey(SECRET).write]
READERS: list[Callable[[Path], object]] = [Psk.from_file, StaticKey.from_file]


@posix
@pytest.mark.parametrize("write", WRITERS)
def test_case_49_key_files_are_written_for_their_owner_alone(write: Callable[[Path], None], tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write(tmp_path / "key")
    finally:
        os.umask(before)
    assert mode(tmp_path / "key") == 0o600


@pytest.mark.parametrize("write", WRITERS)
def test_case_49_a_key_file_is_never_overwritten(write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("precious")
    with pytest.raises(KeyFileError, match="not overwritten"):
        write(path)
    assert path.read_text() == "precious"
    with pytest.raises(KeyFileError, match="cannot be written"):
        write(tmp_path / "missing" / "key")


class FullDisk:
    """An open file that has no room."""

    def __init__(self, descriptor: int, *args: object, **kwargs: object) -> None:
        self._descriptor = descriptor

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *args: object) -> None:
        os.close(self._descriptor)

    def write(self, data: object) -> None:
        raise OSError(28, "No space left on device")


def test_half_a_key_file_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fdopen", FullDisk)
    with pytest.raises(KeyFileError, match="No space left"):
        Psk(SECRET).write(tmp_path / "key")
    assert list(tmp_path.iterdir()) == []


@posix
@pytest.mark.parametrize("bits", [0o644, 0o640, 0o620, 0o604, 0o601, 0o666])
@pytest.mark.parametrize("read", READERS)
def test_case_49_a_key_file_that_others_have_access_to_is_refused(
    read: Callable[[Path], object], bits: int, tmp_path: Path
) -> None:
    path = private_file(tmp_path / "key", SECRET.hex())
    path.chmod(bits)
    with pytest.raises(KeyFileError, match=f"mode {bits:04o}.*chmod 600") as caught:
        read(path)
    assert not shows(SECRET, str(caught.value))


@pytest.mark.parametrize("read", READERS)
def test_case_49_a_key_file_that_is_missing_or_a_folder_or_endless_is_refused(
    read: Callable[[Path], object], tmp_path: Path
) -> None:
    with pytest.raises(KeyFileError, match="nowhere: cannot be read"):
        read(tmp_path / "nowhere")
    with pytest.raises(KeyFileError, match="cannot be read"):
        read(tmp_path)
    with pytest.raises(KeyFileError, match="longer than"):
        read(private_file(tmp_path / "long", bytes(_files.MAX_KEY_FILE + 1)))


X25519_PEM = pem(x25519.X25519PrivateKey.from_private_bytes(SECRET))
SHORT_DER = bytes.fromhex("302d020100300506032b656e0421041f") + SECRET[:31]
SHORT_PEM = b"-----BEGIN PRIVATE KEY-----\n%s\n-----END PRIVATE KEY-----\n" % base64.b64encode(SHORT_DER)


@pytest.mark.parametrize(
    ("content", "password", "match"),
    [
        pytest.param(
            pem(rsa.generate_private_key(public_exponent=65537, key_size=2048)),
            None,
            "another kind of key than X25519",
            id="RSA",
        ),
        pytest.param(pem(ed25519.Ed25519PrivateKey.generate()), None, "another kind of key than X25519", id="Ed25519"),
        pytest.param(SHORT_PEM, None, "not a private key", id="wrong-length"),
        pytest.param(X25519_PEM[:60], None, "not a private key", id="cut"),
        pytest.param(SECRET, None, "not a private key", id="raw-bytes"),
        pytest.param(b"", None, "not a private key", id="empty"),
        pytest.param(StaticKey(SECRET).public_line().encode(), None, "not a private key", id="the-public-line"),
        pytest.param(X25519_PEM, "hunter2", "is not encrypted, and takes no password", id="needless-password"),
        pytest.param(pem(x25519.X25519PrivateKey.generate(), b"hunter2"), None, "needs a password", id="no-password"),
        pytest.param(
            pem(x25519.X25519PrivateKey.generate(), b"hunter2"),
            "hunter3",
            "the password is wrong",
            id="wrong-password",
        ),
    ],
)
def test_case_49_a_file_that_is_no_x25519_key_is_refused_without_its_content(
    content: bytes, password: str | None, match: str, tmp_path: Path
) -> None:
    path = private_file(tmp_path / "key.pem", content)
    with pytest.raises(KeyFileError, match=match) as caught:
        StaticKey.from_file(path, password)
    shown = f"{caught.value} {caught.value.args!r} {caught.value.__cause__!r}"
    assert str(path) in shown
    assert "hunter" not in shown
    assert not shows(SECRET, shown)


def test_an_empty_password_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="empty password"):
        StaticKey(SECRET).write(tmp_path / "key", "")
    assert list(tmp_path.iterdir()) == []


def test_case_49_a_binary_file_is_no_psk(tmp_path: Path) -> None:
    path = private_file(tmp_path / "psk", SECRET + b"\xff")
    with pytest.raises(KeyFileError, match="towline keygen") as caught:
        Psk.from_file(path)
    assert not shows(SECRET, str(caught.value))


# --- secrets ---


@pytest.mark.smoke
def test_case_48_no_repr_log_or_pickle_holds_a_key(caplog: pytest.LogCaptureFixture) -> None:
    keys = StaticKeys(StaticKey(SECRET), trust=AllowList(), psk=Psk(SECRET))
    with caplog.at_level(logging.DEBUG):
        for holder in (Psk(SECRET), StaticKey(SECRET), keys):
            logging.getLogger("test").debug("%s %r", holder, holder)
            shown = f"{holder} {holder!r} {caplog.text}"
            assert not shows(SECRET, shown)
            assert "fingerprint='SHA256:" in shown
            for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
                with pytest.raises(TypeError, match="cannot be pickled"):
                    pickle.dumps(holder, protocol)
    for secret in (Psk(SECRET), StaticKey(SECRET)):
        assert copy.copy(secret) is secret
        assert copy.deepcopy([secret])[0] is secret


def test_the_fingerprint_of_a_psk_is_not_the_hash_of_its_bytes() -> None:
    assert Psk(SECRET).fingerprint != PeerIdentity(SECRET).fingerprint


# --- allow-lists ---

ANNA, BERT = StaticKey(SECRET), StaticKey(bytes(range(1, 33)))


def test_an_allow_list_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "peers"
    path.write_text(f"# who may come in\n\n{ANNA.public_line('anna, at home')}\r\n  {BERT.public_line()}  \n")
    peers = AllowList.from_file(path)
    assert [peer.name for peer in peers] == ["anna, at home", ""]
    assert len(peers) == 2
    assert ANNA.public_key in peers
    assert StaticKey.generate().public_key not in peers
    assert repr(peers) == f"<AllowList of 2 from {path}>"
    assert repr(AllowList([ANNA.public_key])) == "<AllowList of 1>"


@pytest.mark.smoke
async def test_case_14_only_a_key_on_the_allow_list_is_let_in() -> None:
    keys = StaticKeys(BERT, trust=AllowList([ANNA.public_line("anna")]))
    assert await check(keys, ANNA.public_key) == PeerIdentity(ANNA.public_key, "anna")
    with pytest.raises(HandshakeFailed, match="not on the allow-list") as caught:
        await check(keys, BERT.public_key)
    assert BERT.fingerprint in str(caught.value)
    assert not caught.value.retryable


BROKEN_LINES = [
    ("ssh-ed25519 AAAA anna", "must be 'x25519 <base64> comment'"),
    ("x25519", "0 bytes, where 32 are needed"),
    ("x25519 not!base64 anna", "not base64"),
    ("x25519 AAAA anna", "3 bytes, where 32 are needed"),
    (ANNA.public_line("anna again"), "the key of line 1 again"),
    (base64.b64encode(BERT.public_key).decode(), "must be 'x25519 <base64> comment'"),
]


@pytest.mark.parametrize(("line", "match"), BROKEN_LINES)
def test_a_broken_allow_list_names_file_and_line_and_the_old_list_stays(line: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "peers"
    path.write_text(ANNA.public_line("anna"))
    peers = AllowList.from_file(path)
    path.write_text(f"{ANNA.public_line('anna')}\n# comment\n{line}\n")
    with pytest.raises(KeyFileError, match=f"peers, line 3: .*{match}"):
        peers.reload()
    assert ANNA.public_key in peers
    with pytest.raises(KeyFileError, match="line 3"):
        AllowList.from_file(path)
    path.unlink()
    with pytest.raises(KeyFileError, match="cannot be read"):
        peers.reload()
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(KeyFileError, match="not a text file"):
        peers.reload()
    assert ANNA.public_key in peers


def test_reloading_an_allow_list_says_which_keys_are_gone(tmp_path: Path) -> None:
    path = tmp_path / "peers"
    path.write_text(f"{ANNA.public_line('anna')}\n{BERT.public_line('bert')}\n")
    peers = AllowList.from_file(str(path))
    path.write_bytes(b"\xef\xbb\xbf" + ANNA.public_line("anna, renamed").encode())
    assert peers.reload() == {BERT.public_key}
    assert [peer.name for peer in peers] == ["anna, renamed"]
    path.write_text("")
    assert peers.reload() == {ANNA.public_key}
    assert len(peers) == 0


def test_keys_given_directly_are_checked_as_those_of_a_file() -> None:
    with pytest.raises(KeyFileError, match="key 2: has 31 bytes"):
        AllowList([ANNA.public_key, bytes(31)])
    with pytest.raises(KeyFileError, match="key 2: is there twice"):
        AllowList([ANNA.public_key, ANNA.public_line("again")])
    with pytest.raises(MisuseError, match="not read from a file"):
        AllowList([ANNA.public_key]).reload()


@given(line=st.text())
def test_any_text_is_a_line_or_a_key_file_error(line: str) -> None:
    with pytest.raises(KeyFileError):
        AllowList([line])


# --- trust on first use ---


@pytest.mark.smoke
async def test_case_15_the_first_key_is_kept_and_another_is_refused_naming_both(tmp_path: Path) -> None:
    path = tmp_path / "known"
    hosts = KnownHosts(path, allow_first_use=True)
    assert await check(hosts, ANNA.public_key) == PeerIdentity(ANNA.public_key, ENDPOINT)
    if sys.platform != "win32":
        assert mode(path) == 0o600
    stored = path.read_bytes()
    assert stored.decode() == f"{ENDPOINT} {ANNA.public_line()}\n"
    assert await check(hosts, ANNA.public_key) == PeerIdentity(ANNA.public_key, ENDPOINT)
    for trust in (hosts, KnownHosts(path)):
        with pytest.raises(HandshakeFailed, match="its key was changed") as caught:
            await check(trust, BERT.public_key)
        assert ANNA.fingerprint in str(caught.value)
        assert BERT.fingerprint in str(caught.value)
    assert path.read_bytes() == stored
    assert names_in(tmp_path) == [path.name]


async def test_case_15_first_use_must_be_opted_in(tmp_path: Path) -> None:
    path = tmp_path / "known"
    hosts = KnownHosts(str(path))
    with pytest.raises(HandshakeFailed, match="is not in") as caught:
        await check(hosts, ANNA.public_key)
    assert ANNA.fingerprint in str(caught.value)
    assert names_in(tmp_path) == []
    assert "allow_first_use=False" in repr(hosts)


async def test_known_hosts_keeps_what_is_in_its_file_and_keys_by_endpoint(tmp_path: Path) -> None:
    path = tmp_path / "known"
    path.write_text("# mine\n" + f"{ENDPOINT} {ANNA.public_line('by hand')}")  # no line break at the end
    hosts = KnownHosts(path, allow_first_use=True)
    await check(hosts, ANNA.public_key)
    endpoints = [
        "tcp://db.example:7001",
        "unix:///run/a b/#sock",
        "unix:///run/a%20b/#sock",
        "tcp://[::1]:7000",
    ]
    for endpoint in endpoints:
        await check(hosts, BERT.public_key, endpoint)
        with pytest.raises(HandshakeFailed):
            await check(hosts, ANNA.public_key, endpoint)
    lines = path.read_text().splitlines()
    assert lines[:2] == ["# mine", f"{ENDPOINT} {ANNA.public_line('by hand')}"]
    assert len(lines) == 2 + len(endpoints)
    with pytest.raises(MisuseError, match="by endpoint"):
        await check(hosts, ANNA.public_key, "")


async def test_a_broken_known_hosts_file_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "known"
    hosts = KnownHosts(path, allow_first_use=True)
    for broken, match in (
        ("something else\n", "line 1: must be"),
        (f"{ENDPOINT} {ANNA.public_line()}\n{ENDPOINT} {BERT.public_line()}\n", "line 2: .* is there twice"),
    ):
        path.write_text(broken)
        with pytest.raises(KeyFileError, match=match):
            await check(hosts, ANNA.public_key)
        assert path.read_text() == broken


async def test_a_known_hosts_file_that_cannot_be_written_stays_and_nobody_is_let_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyFileError, match="cannot be written"):
        await check(KnownHosts(tmp_path / "missing" / "known", allow_first_use=True), ANNA.public_key)
    path = tmp_path / "known"
    path.write_text("# mine\n")

    def refuse(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(KeyFileError, match="No space left"):
        await check(KnownHosts(path, allow_first_use=True), ANNA.public_key)
    assert path.read_text() == "# mine\n"
    assert names_in(tmp_path) == [path.name]


@posix
async def test_a_known_hosts_file_behind_a_link_is_written_through_it(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "known"
    os.symlink(real, link)
    await check(KnownHosts(link, allow_first_use=True), ANNA.public_key)
    assert os.readlink(link) == str(real)
    assert ENDPOINT in real.read_text()


# --- your own rule ---


async def test_a_callback_says_who_the_peer_is() -> None:
    asked: list[tuple[bytes, bytes, bytes]] = []

    async def ask(peer_key: bytes, handshake_hash: bytes, payload: bytes) -> PeerIdentity | None:
        asked.append((peer_key, handshake_hash, payload))
        return PeerIdentity(peer_key, "anna") if peer_key == ANNA.public_key else None

    keys = StaticKeys(BERT, trust=ask, psk=Psk(SECRET))
    assert (await check(keys, ANNA.public_key)).name == "anna"
    assert asked == [(ANNA.public_key, b"h" * 32, b"")]
    with pytest.raises(HandshakeFailed, match="callback refused"):
        await check(keys, BERT.public_key)
    assert "ask" in repr(keys)


async def test_case_16_a_callback_that_raises_has_not_said_yes() -> None:
    async def broken(peer_key: bytes, handshake_hash: bytes, payload: bytes) -> PeerIdentity | None:
        raise RuntimeError("the directory is down")

    async def refusing(peer_key: bytes, handshake_hash: bytes, payload: bytes) -> PeerIdentity | None:
        raise HandshakeFailed("not on Sundays")

    with pytest.raises(HandshakeFailed, match="callback failed: RuntimeError") as caught:
        await check(StaticKeys(BERT, trust=broken), ANNA.public_key)
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(HandshakeFailed, match="not on Sundays"):
        await check(StaticKeys(BERT, trust=refusing), ANNA.public_key)


async def test_a_callback_that_vouches_for_another_key_has_not_said_yes() -> None:
    async def confused(peer_key: bytes, handshake_hash: bytes, payload: bytes) -> PeerIdentity | None:
        return PeerIdentity(BERT.public_key, "bert")

    with pytest.raises(HandshakeFailed, match="another key"):
        await check(StaticKeys(BERT, trust=confused), ANNA.public_key)


async def test_a_trust_of_ones_own_is_asked_as_it_is() -> None:
    class Everyone(Trust):
        async def check(self, peer_key: bytes, *, endpoint: str, handshake_hash: bytes, payload: bytes) -> PeerIdentity:
            return PeerIdentity(peer_key, endpoint)

    trust = Everyone()
    keys = StaticKeys(BERT, trust=trust)
    assert keys.trust is trust
    assert (await check(keys, ANNA.public_key)).name == ENDPOINT


# --- where a key is from, and what is equal --------------------------------------------------------------------------


def test_a_key_says_where_it_can_be_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    psk, key = Psk.generate(), StaticKey.generate()
    psk.write(tmp_path / "psk")
    key.write(tmp_path / "key")
    key.write(tmp_path / "encrypted", "secret")
    monkeypatch.setenv("TUNNEL_KEY", base64.b64encode(psk.secret).decode())
    assert psk.source is None
    assert Psk.from_file(tmp_path / "psk").source == {"file": str(tmp_path / "psk")}
    assert Psk.from_env("TUNNEL_KEY") == psk
    assert Psk.from_env("TUNNEL_KEY").source == {"env": "TUNNEL_KEY"}
    assert StaticKey.from_file(tmp_path / "key").source == {"file": str(tmp_path / "key")}
    assert StaticKey.from_file(tmp_path / "encrypted", "secret").source is None  # the password is nowhere


@pytest.mark.parametrize("value", [None, "correct horse battery staple", "00" * 32])
def test_case_49_a_variable_that_holds_no_key_is_refused_without_its_value(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TUNNEL_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("TUNNEL_KEY", value)
    with pytest.raises(KeyFileError, match="TUNNEL_KEY") as caught:
        Psk.from_env("TUNNEL_KEY")
    assert value is None or value not in str(caught.value)


def test_keys_and_trusts_that_are_made_alike_are_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, psk, line = StaticKey.generate(), Psk.generate(), StaticKey.generate().public_line("anna")

    async def ask(peer_key: bytes, handshake_hash: bytes, payload: bytes, /) -> PeerIdentity | None:
        return None

    monkeypatch.chdir(tmp_path)
    made: list[Callable[[], object]] = [
        lambda: AllowList([line]),
        lambda: AllowList(),
        lambda: KnownHosts("known_hosts"),
        lambda: KnownHosts(tmp_path / "known_hosts", allow_first_use=True),
        lambda: StaticKeys(key, trust=AllowList([line])),
        lambda: StaticKeys(key, trust=AllowList([line]), psk=psk),
        lambda: StaticKeys(key, trust=ask),
        lambda: StaticKeys(StaticKey.generate(), trust=ask),
    ]
    for i, one in enumerate(made[:-1]):
        assert one() == one()
        assert hash(one()) == hash(one())
        for other in made[i + 1 :]:
            assert one() != other()
    assert KnownHosts("known_hosts") == KnownHosts(tmp_path / "known_hosts")
    assert AllowList() != []
    assert StaticKeys(key, trust=ask) != key
    assert KnownHosts("a") != "a"
