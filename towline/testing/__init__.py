"""Tools for tests of anything that is built on Towline. Public: as stable as any other module."""

from __future__ import annotations

from ._cancel import cancel_at_every_await
from ._chaos import Chaos, ChaosDriver, Cut
from ._clock import MockClock, VirtualTimeLoop, virtual_time_backend
from ._layers import StagePair, check_layer, check_stage
from ._mock import MockCall, MockHandle, MockService, mock_pair
from ._pairs import (
    CloggedDriver,
    LockstepDriver,
    clogged_driver_pair,
    link_pair,
    lockstep_driver_pair,
    memory_link_pair,
    memory_stream_pair,
    open_scope,
)
from ._proxy import ChaosProxy
from ._raw import RawPeer, RawSession, raw_listener
from ._services import check_transparent_layer
from ._simulation import Network, Simulation, exchange
from ._transport import DriverPair, check_driver, check_transport

__all__ = [
    "Chaos",
    "ChaosDriver",
    "ChaosProxy",
    "CloggedDriver",
    "Cut",
    "DriverPair",
    "LockstepDriver",
    "MockCall",
    "MockClock",
    "MockHandle",
    "MockService",
    "Network",
    "RawPeer",
    "RawSession",
    "Simulation",
    "StagePair",
    "VirtualTimeLoop",
    "cancel_at_every_await",
    "check_driver",
    "check_layer",
    "check_stage",
    "check_transparent_layer",
    "check_transport",
    "clogged_driver_pair",
    "exchange",
    "link_pair",
    "lockstep_driver_pair",
    "memory_link_pair",
    "memory_stream_pair",
    "mock_pair",
    "open_scope",
    "raw_listener",
    "virtual_time_backend",
]
