"""Towline: connections that outlive the network.

Stack layers over a transport and get a reconnecting client, or a server, whose messages arrive exactly once and in
order while the link below is cut, stalls or moves. When a promise cannot be kept, a typed error says so.

    from towline import Psk, Stack

    stack = Stack.resilient(psk=Psk.from_file("key"))
    async with stack.connect("tcp://example.org:7000") as session:
        await session.send(b"hello")
        print(await session.receive())
"""

# towline.endpoint, towline.errors
from towline.endpoint import Endpoint as Endpoint
from towline.errors import BufferFull as BufferFull
from towline.errors import CallFailed as CallFailed
from towline.errors import CallRejected as CallRejected
from towline.errors import CircuitOpen as CircuitOpen
from towline.errors import CloseIncomplete as CloseIncomplete
from towline.errors import ConfigError as ConfigError
from towline.errors import ConnectFailed as ConnectFailed
from towline.errors import ConnectionLost as ConnectionLost
from towline.errors import DeadlineExceeded as DeadlineExceeded
from towline.errors import Elapsed as Elapsed
from towline.errors import EndpointError as EndpointError
from towline.errors import Fault as Fault
from towline.errors import Filtered as Filtered
from towline.errors import FrameTooLarge as FrameTooLarge
from towline.errors import HandshakeFailed as HandshakeFailed
from towline.errors import HandshakeRefused as HandshakeRefused
from towline.errors import HandshakeTimeout as HandshakeTimeout
from towline.errors import KeyFileError as KeyFileError
from towline.errors import LinkLost as LinkLost
from towline.errors import LossReason as LossReason
from towline.errors import MessageTooLarge as MessageTooLarge
from towline.errors import MisuseError as MisuseError
from towline.errors import Overloaded as Overloaded
from towline.errors import ProtocolViolation as ProtocolViolation
from towline.errors import RateLimited as RateLimited
from towline.errors import ServiceClosed as ServiceClosed
from towline.errors import ServiceUnavailable as ServiceUnavailable
from towline.errors import SessionLost as SessionLost
from towline.errors import SessionTakenOver as SessionTakenOver
from towline.errors import StackError as StackError
from towline.errors import StatusCode as StatusCode
from towline.errors import TowlineError as TowlineError
from towline.errors import UnknownHost as UnknownHost

# towline.hooks
from towline.hooks import Hooks as Hooks

# towline.layers
from towline.layers import Balance as Balance
from towline.layers import Buffer as Buffer
from towline.layers import CircuitBreaker as CircuitBreaker
from towline.layers import ConcurrencyLimit as ConcurrencyLimit
from towline.layers import Deadline as Deadline
from towline.layers import Encryption as Encryption
from towline.layers import Fallback as Fallback
from towline.layers import Filter as Filter
from towline.layers import Framing as Framing
from towline.layers import Heartbeat as Heartbeat
from towline.layers import Hedge as Hedge
from towline.layers import Lines as Lines
from towline.layers import LoadShed as LoadShed
from towline.layers import Psk as Psk
from towline.layers import RateLimit as RateLimit
from towline.layers import Reconnect as Reconnect
from towline.layers import Request as Request
from towline.layers import Response as Response
from towline.layers import Resume as Resume
from towline.layers import Retry as Retry
from towline.layers import Router as Router
from towline.layers import Rpc as Rpc
from towline.layers import Session as Session
from towline.layers import StaticKey as StaticKey
from towline.layers import StaticKeys as StaticKeys
from towline.layers import Steer as Steer
from towline.layers import Timeout as Timeout
from towline.layers import Tls as Tls
from towline.layers import TlsClient as TlsClient
from towline.layers import TlsServer as TlsServer
from towline.layers import attempts as attempts
from towline.layers import call_all as call_all
from towline.layers import open_stream as open_stream
from towline.layers import retryable as retryable

# towline.policies
from towline.policies import Backoff as Backoff
from towline.policies import BreakerPolicy as BreakerPolicy
from towline.policies import Failover as Failover
from towline.policies import StandardPolicy as StandardPolicy
from towline.policies import TpsBudget as TpsBudget

# towline.server, towline.service, towline.stack
from towline.server import Server as Server
from towline.service import Dial as Dial
from towline.service import Layer as Layer
from towline.service import Service as Service
from towline.service import running as running
from towline.stack import OpenStack as OpenStack
from towline.stack import Stack as Stack

# towline.transports
from towline.transports import Memory as Memory
from towline.transports import Pipe as Pipe
from towline.transports import Stdio as Stdio
from towline.transports import Tcp as Tcp
from towline.transports import Unix as Unix

__all__ = [
    "Backoff",
    "Balance",
    "BreakerPolicy",
    "Buffer",
    "BufferFull",
    "CallFailed",
    "CallRejected",
    "CircuitBreaker",
    "CircuitOpen",
    "CloseIncomplete",
    "ConcurrencyLimit",
    "ConfigError",
    "ConnectFailed",
    "ConnectionLost",
    "Deadline",
    "DeadlineExceeded",
    "Dial",
    "Elapsed",
    "Encryption",
    "Endpoint",
    "EndpointError",
    "Failover",
    "Fallback",
    "Fault",
    "Filter",
    "Filtered",
    "FrameTooLarge",
    "Framing",
    "HandshakeFailed",
    "HandshakeRefused",
    "HandshakeTimeout",
    "Heartbeat",
    "Hedge",
    "Hooks",
    "KeyFileError",
    "Layer",
    "Lines",
    "LinkLost",
    "LoadShed",
    "LossReason",
    "Memory",
    "MessageTooLarge",
    "MisuseError",
    "OpenStack",
    "Overloaded",
    "Pipe",
    "ProtocolViolation",
    "Psk",
    "RateLimit",
    "RateLimited",
    "Reconnect",
    "Request",
    "Response",
    "Resume",
    "Retry",
    "Router",
    "Rpc",
    "Server",
    "Service",
    "ServiceClosed",
    "ServiceUnavailable",
    "Session",
    "SessionLost",
    "SessionTakenOver",
    "Stack",
    "StackError",
    "StandardPolicy",
    "StaticKey",
    "StaticKeys",
    "StatusCode",
    "Stdio",
    "Steer",
    "Tcp",
    "Timeout",
    "Tls",
    "TlsClient",
    "TlsServer",
    "TowlineError",
    "TpsBudget",
    "Unix",
    "UnknownHost",
    "attempts",
    "call_all",
    "open_stream",
    "retryable",
    "running",
]
