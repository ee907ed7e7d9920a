"""Failover: each retry goes to the next endpoint, and a session stays where it is known."""

from __future__ import annotations

from random import Random
from typing import Any

import anyio
import pytest

from towline import Backoff, Framing, Resume, Retry, Stack, StandardPolicy
from towline.endpoint import Endpoint
from towline.errors import ConnectFailed, EndpointError, LinkLost, MisuseError
from towline.layers.resume import ServerSession, Session
from towline.policies import Answer, Attempt, Failover
from towline.service import Dial
from towline.testing import Chaos, Cut, MockClock
from towline.transports import Memory

A, B, C = (Endpoint.parse(f"tcp://{host}.example:7000") for host in "abc")
STEADY = StandardPolicy(Backoff.constant(5, jitter="none"))
REFUSED = ConnectFailed("refused")


class Route:
    """Where a policy sends one dial after another, when all fail."""

    def __init__(self, policy: Failover, request: Any, error: Exception = REFUSED) -> None:
        self.error = error
        self.session = policy.session(request, clock=MockClock(), random=Random(0))
        self.attempt: Attempt[Any, Any] = Attempt(request, error=error)

    def next(self) -> tuple[Any, Answer]:
        answer = self.session.retry(self.attempt)
        request = self.attempt.request
        self.attempt = Attempt(request, number=self.attempt.number + 1, error=self.error)
        return request, answer


def test_each_retry_goes_to_the_next_endpoint_and_only_a_full_round_waits() -> None:
    route = Route(Failover([A, B, C], STEADY), Dial(A))
    assert [route.next() for _ in range(5)] == [
        (Dial(B), 0.0),
        (Dial(C), 0.0),
        (Dial(A), 5),
        (Dial(B), 0.0),
        (Dial(C), 0.0),
    ]


def test_a_dial_to_one_in_the_middle_goes_on_from_there() -> None:
    route = Route(Failover([A, B, C], STEADY), Dial(B))
    assert [route.next()[0].endpoint for _ in range(3)] == [C, A, B]


def test_a_dial_elsewhere_begins_with_the_first() -> None:
    route = Route(Failover(["tcp://b.example:7000", C], STEADY), Dial(A))
    assert [route.next() for _ in range(4)] == [(Dial(B), 0.0), (Dial(C), 0.0), (Dial(B), 5), (Dial(C), 0.0)]


def test_the_other_policy_decides_whether_there_is_a_retry_at_all() -> None:
    limited = Failover([A, B], StandardPolicy(Backoff.constant(5, jitter="none"), max_attempts=2))
    route = Route(limited, Dial(A))
    assert route.next() == (Dial(B), 0.0)
    assert route.next() == (Dial(B), None)
    assert Route(limited, Dial(A), MisuseError("wrong")).next() == (Dial(A), None)


def test_a_session_stays_with_the_endpoint_that_knows_it_unless_they_are_one_cluster() -> None:
    back = Dial(A, cause=LinkLost("cut"), pinned=True)
    assert Route(Failover([A, B], STEADY), back).next() == (back, 5)
    assert Route(Failover([A, B], STEADY, cluster=True), back).next()[0].endpoint == B


def host(request: tuple[str, str]) -> str:
    return request[0]


def to(request: tuple[str, str], host: str) -> tuple[str, str]:
    return host, request[1]


def test_requests_of_ones_own_are_read_and_changed_by_functions_of_ones_own() -> None:
    calls = StandardPolicy(Backoff.constant(5, jitter="none"), budget=None, on=LinkLost, max_attempts=9)
    policy = Failover(["one", "two"], calls, where=host, change=to)
    route = Route(policy, ("one", "get"), LinkLost("cut"))
    assert [route.next() for _ in range(3)] == [(("two", "get"), 0.0), (("one", "get"), 5), (("two", "get"), 0.0)]


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="there are no endpoints to fail over to"):
        Failover([])
    with pytest.raises(EndpointError):
        Failover(["nonsense"])
    with pytest.raises(TypeError, match="both where= and change="):
        Failover(["one"], change=to)


def test_alike_means_equal() -> None:
    assert Failover([A, B], STEADY) == Failover(["tcp://a.example:7000", B], STEADY)
    assert Failover([A, B], STEADY) != Failover([A, B], STEADY, cluster=True)


async def test_a_client_fails_over_to_the_server_that_lives_and_comes_back_to_it_after_a_cut() -> None:
    memory = Chaos(Memory(), cuts=[Cut(seconds=1), Cut(seconds=1)])
    steady = Backoff.constant(0.1, jitter="none")
    stack = Stack(
        Resume(),
        Retry(Failover(["memory://dead", "memory://alive"], StandardPolicy(steady))),
        Framing(),
        transports=(memory,),
    )
    sessions: list[Session] = []

    async def echo(session: ServerSession) -> None:
        sessions.append(session)
        async for message in session:
            await session.send(message)

    async with stack.serve("memory://alive", echo), stack.connect("memory://dead") as session:
        for number in range(3):
            await session.send(b"%d" % number)
            assert await session.receive() == b"%d" % number
            await anyio.sleep(1)  # and the link is cut
    assert len(sessions) == 1
    assert session.epoch == 3
