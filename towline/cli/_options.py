"""From what people type to values: an endpoint, and the configuration that a file and the options make together.

Options override the environment and the file, and the environment overrides the file. Without a file, the options stand
alone: they fill in the stack that a tunnel has by default.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final

from towline.config import TunnelConfig, parse_duration, parse_size
from towline.config._shapes import is_list, is_table
from towline.config._sources import Document, Place, read_file
from towline.endpoint import Endpoint
from towline.errors import KeyFileError
from towline.hooks import Hooks
from towline.layers.encryption import Encryption
from towline.layers.encryption.keys import AllowList
from towline.layers.resume import Resume
from towline.layers.tls import Tls
from towline.link import Link
from towline.service import Kind, Side, Upgrade
from towline.stack import Stack

from ._failure import Failure

__all__ = ["FileKeys", "Options", "Tunnel", "chosen", "dialled", "positive", "seconds", "size"]

SMALLEST_BUFFER: Final = 64 << 10
LARGEST_BUFFER: Final = 1 << 34
MAX_MESSAGE: Final = 4 << 20
OVERHEAD: Final = 128  # of a message in the buffer
FIRST_ATTACH: Final = 30.0
"""A first connect may take so long, whatever ``--retry-for`` says: a program waits for it."""

PATIENCE: Final = 300.0
"""How long a forward looks for a way back if nothing else says so; it then finds that its stack has no sessions."""

DEFAULT: Final[Mapping[str, Any]] = {
    "layers": ["resume", {"kind": "retry", "policy": "exponential"}, "heartbeat", "framing", "encryption"]
}
"""The stack of a tunnel; keys come with the options."""


# --- values ---------------------------------------------------------------------------------------------------------


def seconds(option: str, text: str | None) -> float | None:
    """A length of time above zero: a duration such as ``5m``, or a number of seconds.

    Raises:
        Failure: if it is neither.

    >>> seconds("--heartbeat", "500ms"), seconds("--heartbeat", "5")
    (0.5, 5.0)
    """
    if text is None:
        return None
    try:
        value = parse_duration(text if text.strip()[-1:].isalpha() else f"{text.strip()}s")
    except ValueError as error:
        raise Failure(f"{option}: {error}") from None
    return positive(option, value)


def positive(option: str, value: float) -> float:
    """A number of seconds above zero.

    Raises:
        Failure: if it is not.
    """
    if not 0 < value < 1e9:
        raise Failure(f"{option}: {value:g} s, where more than 0 is needed")
    return value


def size(option: str, text: str | None) -> int | None:
    """A size such as ``8MiB``.

    Raises:
        Failure: if it is none.
    """
    if text is None:
        return None
    try:
        return parse_size(text)
    except ValueError as error:
        raise Failure(f"{option}: {error}") from None


def parse_endpoint(option: str, text: str) -> Endpoint:
    """An endpoint, from an argument that the message names.

    Raises:
        Failure: if it is none.
    """
    try:
        return Endpoint.parse(text)
    except ValueError as error:
        raise Failure(f"{option}: {error}") from None


def chosen(option: str, text: str | None, *others: Endpoint | None) -> Endpoint:
    """An endpoint that was typed, or else the first that the file has.

    Raises:
        Failure: if there is none, or it cannot be read.
    """
    if text is not None:
        return parse_endpoint(option, text)
    for other in others:
        if other is not None:
            return other
    raise Failure(f"{option} is missing: give it, or --config FILE that says so")


def dialled(option: str, endpoint: Endpoint) -> Endpoint:
    """An endpoint that is connected to.

    Raises:
        Failure: if it can only be listened on.
    """
    only_listened = endpoint.scheme == "tcp" and (endpoint.port == 0 or endpoint.host == "*")
    if only_listened or endpoint.scheme == "fd":
        raise Failure(f"{option}: {endpoint} can be listened on, but not connected to")
    return endpoint


# --- keys -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class FileKeys(Upgrade):
    """Layer: `Encryption` or `Tls` with keys from files, which can be read again while it is in use.

    New connections have the new keys; those that exist keep theirs (D21: sessions live through a change of keys).

    Args:
        read: reads the files and makes the layer.
        hooks: told of every handshake, where the layer has hooks.

    Raises:
        MisuseError: if a file cannot be read.
    """

    needs: ClassVar[tuple[Kind, ...]] = Encryption.needs
    gives: ClassVar[Kind] = Encryption.gives

    read: Callable[[], Encryption | Tls]
    hooks: Hooks | None = None
    _holds: list[Encryption | Tls] = field(default_factory=list[Encryption | Tls])
    """The layer that is in use, for all copies with other hooks as well."""

    def __post_init__(self) -> None:
        if not self._holds:
            self._holds.append(self.read())

    @property
    def current(self) -> Encryption | Tls:
        """The layer that is in use."""
        return self._holds[0]

    @property
    def wire(self) -> str:  # type: ignore[override]
        return self.current.wire

    def __repr__(self) -> str:
        return repr(self.current)

    def reload(self) -> frozenset[bytes]:
        """Read the files again; while one is broken, everything stays as it was.

        Returns:
            The public keys that were on the allow-list and are no longer.

        Raises:
            MisuseError: if a file cannot be read.
        """
        before = _allowed(self.current)
        self._holds[0] = self.read()
        return before - _allowed(self.current)

    async def upgrade(self, link: Link, side: Side) -> None:
        layer = self.current
        await (replace(layer, hooks=self.hooks) if isinstance(layer, Encryption) else layer).upgrade(link, side)


def _allowed(layer: Encryption | Tls) -> frozenset[bytes]:
    if isinstance(layer, Encryption) and layer.keys is not None and isinstance(layer.keys.trust, AllowList):
        return frozenset(peer.public_key for peer in layer.keys.trust)
    return frozenset()


# --- a file and options ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tunnel:
    """What a command works with.

    Attributes:
        stack: its encryption reads its files again when told to.
        keys: that layer; None if nothing is encrypted.
        config: all the rest.
    """

    stack: Stack
    keys: FileKeys | None
    config: TunnelConfig


@dataclass
class Options:
    """What was typed, on top of a file.

    Attributes:
        file: the file, if there is one.
        keys: which options give keys, for the message to who gave none.
    """

    file: str | None
    keys: str
    _given: list[tuple[str, str, Mapping[str, Any]]] = field(default_factory=list[tuple[str, str, Mapping[str, Any]]])

    def heartbeat(self, option: str, interval: float | None) -> None:
        """``--heartbeat``."""
        if interval is not None:
            self._given.append((option, "heartbeat", {"interval": interval, "timeout": 3 * interval}))

    def retry_for(self, option: str, ttl: float | None) -> None:
        """``--retry-for``."""
        if ttl is not None:
            self._given.append((option, "resume", {"ttl": ttl}))

    def buffer(self, option: str, buffer: int | None) -> None:
        """``--buffer``.

        Raises:
            Failure: if it is too small to be of use, or larger than memories are.
        """
        if buffer is None:
            return
        if not SMALLEST_BUFFER <= buffer <= LARGEST_BUFFER:
            raise Failure(f"{option}: {buffer:,} bytes, where {SMALLEST_BUFFER:,} to {LARGEST_BUFFER:,} will do")
        self._given.append((option, "resume", {"buffer": buffer}))

    def secrets(
        self, psk_file: str | None, keys: str | None, *, allow: str | None = None, peer: str | None = None
    ) -> None:
        """``--psk-file``, or ``--keys`` with ``--allow`` or ``--peer``.

        Raises:
            Failure: if they do not make one way.
        """
        trust, whose = (allow, "--allow") if peer is None else (peer, "--peer")
        is_shared = psk_file is not None and keys is None and trust is None
        is_own = psk_file is None and (keys is not None and trust is not None)
        is_change = self.file is not None and psk_file is None
        if not (is_shared or is_own or is_change):
            raise Failure(f"give either --psk-file FILE, or --keys FILE and {self.keys}, or --config FILE")
        if psk_file is not None:
            self._given.append(("--psk-file", "encryption", {"psk": {"file": os.path.abspath(psk_file)}}))
        if keys is not None:
            self._given.append(("--keys", "encryption", {"keys.key": {"file": os.path.abspath(keys)}}))
        if allow is not None:
            file = os.path.abspath(allow)
            self._given.append((whose, "encryption", {"keys.trust": {"kind": "allow-list", "file": file}}))
        if peer is not None:
            line = peer.strip() if len(peer.split()) > 1 else f"x25519 {peer.strip()}"
            try:
                AllowList([line])
            except KeyFileError as error:
                raise Failure(
                    f"--peer: not the server's public key, as towline keygen --static prints it ({error})"
                ) from None
            self._given.append((whose, "encryption", {"keys.trust": {"kind": "allow-list", "keys": [line]}}))

    def patience(self, tunnel: Tunnel) -> float:
        """How long a forward looks for a way back: as it says, or as long as its sessions live."""
        end = tunnel.config.forward
        is_typed = any("ttl" in options for _, _, options in self._given)
        if end is not None and end.retry_for is not None and not is_typed:
            return end.retry_for
        return next((layer.ttl for layer in tunnel.config.layers if isinstance(layer, Resume)), PATIENCE)

    def read(self) -> Tunnel:
        """Read it all. Each reload reads it again, for the keys.

        Raises:
            ConfigError: if the file, a variable or an option is wrong.
        """
        config = self._config()
        keys: list[FileKeys] = []

        def reloaded(layer: Any) -> Any:
            if not isinstance(layer, (Encryption, Tls)):
                return layer
            read = iter([layer])
            keys.append(FileKeys(lambda: next(read, None) or self._secured()))
            return keys[-1]

        layers = tuple(map(reloaded, config.layers))
        plain = config.build()
        return Tunnel(Stack(*layers, transports=plain.transports), keys[0] if keys else None, config)

    def _secured(self) -> Encryption | Tls:
        layer = next((each for each in self._config().layers if isinstance(each, (Encryption, Tls))), None)
        if layer is None:
            raise Failure(f"{self.file}: there is no encryption any more")
        return layer

    def _config(self) -> TunnelConfig:
        document = Document(DEFAULT) if self.file is None else read_file(self.file).with_environ(os.environ)
        values: list[tuple[Place, Any, str]] = []
        for option, kind, options in self._given:
            start: Place = ("layers", self._number(document, option, kind))
            if option == "--psk-file":
                values.append(((*start, "keys"), None, option))
            elif option == "--keys":
                values.append(((*start, "psk"), None, option))
            values += [((*start, *place.split(".")), value, option) for place, value in options.items()]
            values += [((*start, name), value, option) for name, value in _following(document, start, options)]
        return TunnelConfig.from_document(document.with_values(values))

    def _number(self, document: Document, option: str, kind: str) -> int:
        layers = document.data.get("layers")
        for number, layer in enumerate(layers if is_list(layers) else ()):
            if kind == (layer.get("kind") if is_table(layer) else layer):
                return number
        raise Failure(f"{option}: the stack of {self.file} has no {kind}")


def _following(document: Document, place: Place, options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What has to follow from an option of `Resume`, unless the file says it itself and it fits."""
    layer = document.data["layers"][place[1]]
    said: Mapping[str, Any] = layer if is_table(layer) else {}
    if "ttl" in options and "attach_timeout" not in said and options["ttl"] < FIRST_ATTACH:
        yield "attach_timeout", options["ttl"]
    if "buffer" in options and "max_message" not in said and options["buffer"] - OVERHEAD < MAX_MESSAGE:
        yield "max_message", options["buffer"] - OVERHEAD
