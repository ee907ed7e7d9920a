"""Encryption: Noise handshakes, the records they protect, and the keys they need.

From the application's side to the wire:

    _layer.py          the layer: one handshake per link, in time, or no connection
    trust.py           who the peer is: a list of keys, what was seen before, or your own code
    keys.py            the secrets: shared (`Psk`), or a key pair for each end (`StaticKeys`)
    _files.py          reading and writing files of keys
    _records.py        the stage that is left behind: bytes to records and back
    _preamble.py       what a client says before any cryptography
    noise.py           the Noise Protocol Framework: the handshake
    _cipher_state.py   one key, one direction, one counter
    _patterns.py  _dh.py  _ciphers.py  _hashes.py  _secret.py      what Noise is made of
"""

from __future__ import annotations

from ._layer import Encryption
from .keys import Psk, StaticKey, StaticKeys
from .trust import AllowList, KnownHosts, PeerIdentity

__all__ = [
    "AllowList",
    "Encryption",
    "KnownHosts",
    "PeerIdentity",
    "Psk",
    "StaticKey",
    "StaticKeys",
]
