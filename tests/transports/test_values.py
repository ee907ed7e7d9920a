"""Transports are values: made alike they are equal, and they show what was set."""

from __future__ import annotations

import pytest

from towline.endpoint import Endpoint
from towline.stack import Stack
from towline.transport import Transport
from towline.transports import Fd, Memory, Pipe, Stdio, Tcp, Unix


@pytest.mark.parametrize(
    ("made", "alike", "other", "shown"),
    [
        (Tcp(), Tcp(connect_timeout=10), Tcp(nodelay=False), "Tcp()"),
        (Tcp(keepalive=None), Tcp(keepalive=None), Tcp(), "Tcp(keepalive=None)"),
        (Unix(), Unix(mode=0o600), Unix(mode=0o660), "Unix()"),
        (Unix(mode=0o640), Unix(mode=0o640), Unix(mode=0o604), "Unix(mode=0o640)"),
        (Unix(allow_uids=[1, 2]), Unix(allow_uids=(2, 1)), Unix(allow_uids=[1]), "Unix(allow_uids=frozenset({1, 2}))"),
        (Pipe(), Pipe(max_links=64), Pipe(max_links=1), "Pipe()"),
        (Stdio(), Stdio(linger=1), Stdio(stdin=3), "Stdio()"),
        (Fd(), Fd(tcp=Tcp()), Fd(unix=Unix(backlog=1)), "Fd()"),
        (Memory(), Memory(capacity=65536), Memory(chunk=1), "Memory()"),
    ],
)
def test_they_are_equal_when_made_alike(made: Transport, alike: Transport, other: Transport, shown: str) -> None:
    assert made == alike
    assert hash(made) == hash(alike)
    assert made != other
    assert repr(made) == repr(alike) == shown
    assert Stack(transports=(made,)) == Stack(transports=(alike,)) != Stack(transports=(other,))


async def test_what_listens_makes_no_difference() -> None:
    memory = Memory()
    listener = await memory.listen(Endpoint.parse("memory://here"))
    assert memory == Memory()
    assert repr(memory) == "Memory()"
    await listener.aclose()
