"""One behaviour each: the layers that a stack is made of."""

from towline.layers.encryption import AllowList as AllowList
from towline.layers.encryption import Encryption as Encryption
from towline.layers.encryption import KnownHosts as KnownHosts
from towline.layers.encryption import Psk as Psk
from towline.layers.encryption import StaticKey as StaticKey
from towline.layers.encryption import StaticKeys as StaticKeys
from towline.layers.framing import Framing as Framing
from towline.layers.heartbeat import Heartbeat as Heartbeat
from towline.layers.lines import Lines as Lines
from towline.layers.resume import Resume as Resume
from towline.layers.resume import Session as Session
from towline.layers.retry import Retry as Retry
from towline.layers.timeout import Timeout as Timeout
from towline.layers.tls import Tls as Tls

__all__ = [
    "AllowList",
    "Encryption",
    "Framing",
    "Heartbeat",
    "KnownHosts",
    "Lines",
    "Psk",
    "Resume",
    "Retry",
    "Session",
    "StaticKey",
    "StaticKeys",
    "Timeout",
    "Tls",
]
