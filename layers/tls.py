"""TLS, in the same place of a stack as Encryption, for those who have certificates (X.509).

The protocol is Python's `ssl`, used without I/O: bytes go through two memory buffers. Which versions, which
authorities and whether a client must show a certificate are matters of the ``ssl.SSLContext`` that you bring.

What `Encryption` has and this cannot have: Python's `ssl` exports no keying material, so a session above proves
itself by two more messages (D20); and who knocks is answered by an alert that says why.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Final

import anyio

from towline.errors import (
    HandshakeFailed,
    HandshakeRefused,
    HandshakeTimeout,
    KeyFileError,
    LinkLost,
    ProtocolViolation,
    StackError,
    TowlineError,
)
from towline.link import Link
from towline.service import Kind, Side, Upgrade
from towline.stage import CLEAN, Ended, Stage, Units
from towline.streams import LinkByteStream
from towline.text import differing
from towline.units import FilePath, Seconds

__all__ = ["PeerCertificate", "Tls", "TlsClient", "TlsServer", "TlsStage"]

_READ_SIZE: Final = 16384
"""The most data in one TLS record, and so the most that one read gives."""


@dataclass(frozen=True, slots=True)
class PeerCertificate:
    """The other end, proven: the certificate that it showed, and that our context accepted.

    Attributes:
        der: the certificate, in DER.
        names: its DNS names, addresses and URIs; else its common name.

    >>> PeerCertificate(b"...", ("example.org",))
    PeerCertificate('example.org', 'SHA256:ab5df625bc76dbd4e163bed2dd888df828f90159bb93556525c31821b6541d46')
    """

    der: bytes
    names: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """The certificate as people compare it, ``SHA256:...``."""
        return f"SHA256:{hashlib.sha256(self.der).hexdigest()}"

    def __repr__(self) -> str:
        return f"PeerCertificate({', '.join(map(repr, (*self.names, self.fingerprint)))})"


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsClient:
    """How to dial, by files: whom to trust, and what to show.

    It stands for the ``ssl.SSLContext`` that `context` makes, and unlike one it can be compared and written down. For
    anything that it has no word for, give `Tls` a context.

    Args:
        ca: the authorities to trust, in PEM; by default the system's.
        certificate: a certificate to show, in PEM, with those that lead to its authority.
        key: its private key, in PEM, not encrypted; by default in the same file.

    >>> TlsClient().context().verify_mode
    <VerifyMode.CERT_REQUIRED: 2>
    """

    ca: FilePath | None = None
    certificate: FilePath | None = None
    key: FilePath | None = None

    __repr__ = differing

    def context(self) -> ssl.SSLContext:
        """Read the files.

        Raises:
            KeyFileError: if one cannot be read, or the key is not the certificate's.
        """
        context = ssl.create_default_context()
        if self.ca is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            _load_authorities(context, self.ca)
        if self.certificate is not None:
            _load_certificate(context, self.certificate, self.key)
        elif self.key is not None:
            raise KeyFileError(f"{os.fspath(self.key)}: a key is of no use without its certificate")
        return context


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsServer:
    """How to listen, by files: what to show, and perhaps whom to ask for theirs. As `TlsClient`.

    Args:
        certificate: the certificate to show, in PEM, with those that lead to its authority.
        key: its private key, in PEM, not encrypted; by default in the same file.
        client_ca: ask clients for certificates of these authorities, in PEM, and refuse who has none; by default
            clients are not asked.
    """

    certificate: FilePath
    key: FilePath | None = None
    client_ca: FilePath | None = None

    __repr__ = differing

    def context(self) -> ssl.SSLContext:
        """Read the files.

        Raises:
            KeyFileError: if one cannot be read, or the key is not the certificate's.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        _load_certificate(context, self.certificate, self.key)
        if self.client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            _load_authorities(context, self.client_ca)
        return context


def _load_authorities(context: ssl.SSLContext, ca: FilePath) -> None:
    try:
        context.load_verify_locations(cafile=Path(ca).expanduser())
    except ssl.SSLError:
        raise KeyFileError(f"{os.fspath(ca)}: holds no certificates in PEM") from None
    except OSError as error:
        raise KeyFileError(f"{os.fspath(ca)}: cannot be read: {error.strerror}") from error


def _load_certificate(context: ssl.SSLContext, certificate: FilePath, key: FilePath | None) -> None:
    for path in (certificate, key):
        if path is not None:
            try:
                Path(path).expanduser().open("rb").close()  # `ssl` does not say which of the two it cannot read
            except OSError as error:
                raise KeyFileError(f"{os.fspath(path)}: cannot be read: {error.strerror}") from error

    def no_password() -> str:
        # Called for a key that is encrypted; without it, OpenSSL asks at the terminal, and waits.
        raise KeyFileError(f"{os.fspath(key or certificate)}: the key is encrypted: give Tls an ssl.SSLContext")

    try:
        context.load_cert_chain(
            Path(certificate).expanduser(), None if key is None else Path(key).expanduser(), password=no_password
        )
    except ssl.SSLError as error:
        what = os.fspath(certificate) if key is None else f"{os.fspath(certificate)} and {os.fspath(key)}"
        raise KeyFileError(f"{what}: are no certificate and its private key in PEM: {_reason(error)}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls(Upgrade[LinkByteStream]):
    """Layer: TLS over a link, by certificates.

    Needs bytes from the layer inside it, and gives bytes. Put it directly outside the transport, inside `Framing`, in
    the place of `Encryption`. One value describes both ends; a program that is only one needs only one context.

    Args:
        client: how to dial: whom to trust, and perhaps a certificate to show. A context, or a `TlsClient` with the
            files to make one of.
        server: how to listen: the certificate to show, and perhaps whom to ask for theirs. A context, or a `TlsServer`.
        server_hostname: the name that the server's certificate must have; by default the endpoint's host.
        handshake_timeout: seconds for the whole handshake, whatever arrives in the meantime.

    Raises:
        StackError: if there is neither context.
        ValueError: if a context is for the other side, or the time makes no sense.
        KeyFileError: if a file of a `TlsClient` or a `TlsServer` cannot be read.

    >>> Tls(client=ssl.create_default_context()).handshake_timeout
    5.0
    """

    needs: ClassVar[tuple[Kind, ...]] = (Kind.BYTES,)
    gives: ClassVar[Kind] = Kind.BYTES
    wire: ClassVar[str] = "tls/1"

    client: ssl.SSLContext | TlsClient | None = None
    server: ssl.SSLContext | TlsServer | None = None
    server_hostname: str | None = None
    handshake_timeout: Seconds = 5.0

    _contexts: dict[Side, ssl.SSLContext] = field(init=False, repr=False, compare=False)

    __repr__ = differing

    def __post_init__(self) -> None:
        if self.client is None and self.server is None:
            raise StackError("Tls needs client=ssl.create_default_context() to dial, or server=... to listen")
        contexts: dict[Side, ssl.SSLContext] = {}
        for side, given, wrong in (
            (Side.DIALLING, self.client, ssl.PROTOCOL_TLS_SERVER),
            (Side.LISTENING, self.server, ssl.PROTOCOL_TLS_CLIENT),
        ):
            if given is not None:
                contexts[side] = given if isinstance(given, ssl.SSLContext) else given.context()
                if contexts[side].protocol == wrong:
                    raise ValueError(f"Tls has a context in {_context_of(side)} that is for the other side")
        object.__setattr__(self, "_contexts", contexts)
        if not self.handshake_timeout > 0:
            raise ValueError(f"handshake_timeout is {self.handshake_timeout:g} s, where more than 0 is needed")

    async def upgrade(self, link: Link, side: Side) -> None:
        """Do the handshake and put a ``TlsStage`` on ``link``.

        Raises:
            HandshakeTimeout: if it took longer than ``handshake_timeout``.
            HandshakeFailed: if the two ends come to no agreement, or a certificate is not accepted; or if the other
                end went away, with ``ended`` set.
            StackError: if there is no context for this side, or no name for the server.
        """
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = self._wrap(link, side, incoming, outgoing)
        with anyio.move_on_after(self.handshake_timeout):
            try:
                await _handshake(link, tls, incoming, outgoing)
            except LinkLost as error:
                raise HandshakeFailed(f"the link was lost during the handshake: {error}", ended=True) from error
            peer = _peer_certificate(tls)
            link.peer_identity = peer
            link.principal = None if peer is None else hashlib.sha256(peer.der).digest()
            link.push(TlsStage(tls, incoming, outgoing))
            return
        raise HandshakeTimeout(f"the handshake was not complete after {self.handshake_timeout:g} s")

    def _wrap(self, link: Link, side: Side, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO) -> ssl.SSLObject:
        context = self._contexts.get(side)
        if context is None:
            raise StackError(f"Tls has no context for the {side.value} side: give it {_context_of(side)}=...")
        if not side.is_dialling:
            return context.wrap_bio(incoming, outgoing, server_side=True)
        hostname = self.server_hostname or link.endpoint.host or None
        if hostname is None and context.check_hostname:
            raise StackError(f"{link.endpoint} has no host whose certificate to expect: give Tls a server_hostname")
        return context.wrap_bio(incoming, outgoing, server_hostname=hostname)


def _context_of(side: Side) -> str:
    return "client" if side.is_dialling else "server"


async def _handshake(link: Link, tls: ssl.SSLObject, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO) -> None:
    while True:
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            await link.send([outgoing.read()])
            incoming.write(await link.receive_some())
        except ssl.SSLError as error:
            with contextlib.suppress(TowlineError):
                await link.send([outgoing.read()])  # the alert
                await link.aclose()  # not aborted: a reset could overtake it
            raise HandshakeFailed(f"the TLS handshake failed: {_reason(error)}") from error
        else:
            await link.send([outgoing.read()])
            return


def _reason(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate is not accepted: {error.verify_message}"
    return (error.reason or str(error)).replace("_", " ").lower()


def _peer_certificate(tls: ssl.SSLObject) -> PeerCertificate | None:
    der = tls.getpeercert(binary_form=True)
    # An empty dictionary stands for a certificate that nobody has verified: that is no identity.
    parsed = tls.getpeercert()
    if der is None or not parsed:
        return None
    names = [str(entry[1]) for entry in parsed.get("subjectAltName", ())]
    if not names:
        # Typed as anything at all: a tuple of tuples of pairs.
        subject: tuple[tuple[tuple[str, str], ...], ...] = parsed.get("subject", ())  # type: ignore[assignment]
        names = [value for part in subject for key, value in part if key == "commonName"]
    return PeerCertificate(der, tuple(names))


class TlsStage(Stage):
    """Bytes to TLS records and back.

    An end without close_notify is a cut, whatever the transport says.
    """

    def __init__(self, tls: ssl.SSLObject, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO) -> None:
        self._tls = tls
        self._incoming = incoming
        self._outgoing = outgoing
        self._closed = False
        self._received = False

    @property
    def wants(self) -> bool:  # type: ignore[override]
        # Answers that nobody asked us for: key updates, alerts.
        return self._outgoing.pending > 0

    def pending(self, now: float) -> Units:
        return [self._outgoing.read()]

    def outgoing(self, units: Units, now: float) -> Units:
        if self._closed:
            return []  # the other end stopped reading at our close_notify
        if isinstance(self.ended, Exception):
            raise self.ended
        rest = memoryview(units[0] if len(units) == 1 else b"".join(units))
        try:
            while rest:
                rest = rest[self._tls.write(rest) :]
        except ssl.SSLError as error:
            raise ProtocolViolation(f"TLS failed: {_reason(error)}") from error
        return [self._outgoing.read()]

    def incoming(self, units: Units, now: float) -> Units:
        if self.ended is not None:
            return []
        for unit in units:
            self._incoming.write(unit)
        opened: Units = []
        try:
            while data := self._tls.read(_READ_SIZE):
                opened.append(data)
            self.ended = CLEAN
        except ssl.SSLZeroReturnError:  # the same, when our own direction was closed before
            self.ended = CLEAN
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            self.ended = self._failure(error, received=self._received or bool(opened))
        self._received = self._received or bool(opened)
        return opened

    def _failure(self, error: ssl.SSLError, *, received: bool) -> TowlineError:
        # In TLS 1.3 a client is done before the server has looked at its certificate. What that comes to is an alert
        # in place of the first data.
        if not received and not self._tls.server_side and "ALERT" in (error.reason or ""):
            return HandshakeRefused(f"the server refused: {_reason(error)}")
        return ProtocolViolation(f"TLS failed: {_reason(error)}")

    def receive_eof(self, ended: Ended) -> None:
        if self.ended is None:
            self.ended = LinkLost("the link ended without close_notify: it was cut") if ended is CLEAN else ended

    def close(self) -> Units:
        if self._closed or isinstance(self.ended, Exception):
            return []
        self._closed = True
        # SSLWantReadError says that the other end has not closed its direction yet. It need not.
        with contextlib.suppress(ssl.SSLError):
            self._tls.unwrap()
        return [self._outgoing.read()]
