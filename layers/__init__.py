"""One behaviour each: the layers that a stack is made of."""

from towline.layers.all_calls import CallAll as CallAll
from towline.layers.all_calls import call_all as call_all
from towline.layers.attempt_loop import AttemptBlock as AttemptBlock
from towline.layers.attempt_loop import attempts as attempts
from towline.layers.balance import Balance as Balance
from towline.layers.balance import Change as Change
from towline.layers.balance import Insert as Insert
from towline.layers.balance import Remove as Remove
from towline.layers.breaker import CircuitBreaker as CircuitBreaker
from towline.layers.breaker import speaks_of_target as speaks_of_target
from towline.layers.buffer import Buffer as Buffer
from towline.layers.by_key import ByKey as ByKey
from towline.layers.choice import Either as Either
from towline.layers.choice import Optional as Optional
from towline.layers.choice import Shared as Shared
from towline.layers.choice import identity as identity
from towline.layers.choice import optional_layer as optional_layer
from towline.layers.deadline import Deadline as Deadline
from towline.layers.decorator import Call as Call
from towline.layers.decorator import retryable as retryable
from towline.layers.encryption import AllowList as AllowList
from towline.layers.encryption import Encryption as Encryption
from towline.layers.encryption import KnownHosts as KnownHosts
from towline.layers.encryption import Psk as Psk
from towline.layers.encryption import StaticKey as StaticKey
from towline.layers.encryption import StaticKeys as StaticKeys
from towline.layers.fallback import Fallback as Fallback
from towline.layers.filter import Filter as Filter
from towline.layers.framing import Framing as Framing
from towline.layers.heartbeat import Heartbeat as Heartbeat
from towline.layers.hedge import Hedge as Hedge
from towline.layers.limit import ConcurrencyLimit as ConcurrencyLimit
from towline.layers.limit import Limiter as Limiter
from towline.layers.limit import RateLimit as RateLimit
from towline.layers.lines import Lines as Lines
from towline.layers.map import RequestLayer as RequestLayer
from towline.layers.map import ResponseLayer as ResponseLayer
from towline.layers.map import map_error as map_error
from towline.layers.map import map_request as map_request
from towline.layers.map import map_response as map_response
from towline.layers.map import then as then
from towline.layers.reconnect import CONNECTION_OVER as CONNECTION_OVER
from towline.layers.reconnect import ConnectionState as ConnectionState
from towline.layers.reconnect import Reconnect as Reconnect
from towline.layers.reconnect import Reconnecting as Reconnecting
from towline.layers.resume import Resume as Resume
from towline.layers.resume import Session as Session
from towline.layers.retry import GivenUp as GivenUp
from towline.layers.retry import Retry as Retry
from towline.layers.retry import given_up as given_up
from towline.layers.rpc import Peer as Peer
from towline.layers.rpc import Request as Request
from towline.layers.rpc import Response as Response
from towline.layers.rpc import Router as Router
from towline.layers.rpc import Rpc as Rpc
from towline.layers.rpc import Stream as Stream
from towline.layers.rpc import open_stream as open_stream
from towline.layers.shed import LoadShed as LoadShed
from towline.layers.steer import Steer as Steer
from towline.layers.timeout import Timeout as Timeout
from towline.layers.tls import Tls as Tls
from towline.layers.tls import TlsClient as TlsClient
from towline.layers.tls import TlsServer as TlsServer

__all__ = [
    "CONNECTION_OVER",
    "AllowList",
    "AttemptBlock",
    "Balance",
    "Buffer",
    "ByKey",
    "Call",
    "CallAll",
    "Change",
    "CircuitBreaker",
    "ConcurrencyLimit",
    "ConnectionState",
    "Deadline",
    "Either",
    "Encryption",
    "Fallback",
    "Filter",
    "Framing",
    "GivenUp",
    "Heartbeat",
    "Hedge",
    "Insert",
    "KnownHosts",
    "Limiter",
    "Lines",
    "LoadShed",
    "Optional",
    "Peer",
    "Psk",
    "RateLimit",
    "Reconnect",
    "Reconnecting",
    "Remove",
    "Request",
    "RequestLayer",
    "Response",
    "ResponseLayer",
    "Resume",
    "Retry",
    "Router",
    "Rpc",
    "Session",
    "Shared",
    "StaticKey",
    "StaticKeys",
    "Steer",
    "Stream",
    "Timeout",
    "Tls",
    "TlsClient",
    "TlsServer",
    "attempts",
    "call_all",
    "given_up",
    "identity",
    "map_error",
    "map_request",
    "map_response",
    "open_stream",
    "optional_layer",
    "retryable",
    "speaks_of_target",
    "then",
]
