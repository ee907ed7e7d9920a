"""Any order of sends, reads, cuts, waits, reconnects, stale attempts, closes and aborts keeps what a session promises.

Hypothesis chooses the steps; the event loop stands still between them, so that virtual time passes only when a step
says so. The numbers I1 to I8 are the protocol's invariants:

I1 what is delivered is a prefix of what was sent          I5 what waits to be read fits the window
I2 acked <= received < next                                I6 nothing changes before a proof
I3 one link has the session, with the session's epoch      I7 at the end no call still waits
I4 what waits to be acknowledged fits the buffer           I8 at the end no task and no link is left
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any, TypeVar

import anyio
import anyio.lowlevel
import pytest
import trio._core._run as trio_run
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from towline.errors import BufferFull, CloseIncomplete, SessionLost
from towline.layers.framing import Framing
from towline.layers.heartbeat import Heartbeat
from towline.layers.resume import ClientSession, Resume, ServerSession, Session, State
from towline.layers.resume._wire import Reject, RejectCode
from towline.layers.retry import Retry
from towline.policies import Backoff
from towline.testing import virtual_time_backend
from towline.testing._chaos import Cut, How
from towline.testing._raw import RawPeer, RawSession
from towline.testing._simulation import Simulation, until

T = TypeVar("T")
BUFFER, WINDOW = 60_000, 30_000
WHO = st.sampled_from(["client", "server"])
HOW: st.SearchStrategy[How] = st.sampled_from(["reset", "close", "blackhole"])


class Lockstep:
    """An event loop in a thread that stands still, virtual time included, while nobody calls."""

    def __init__(self, backend: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], Awaitable[Any]] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        name, options = virtual_time_backend(backend)
        run = lambda: anyio.run(self._serve, backend=name, backend_options=options)  # noqa: E731
        self._thread = threading.Thread(target=run)
        self._thread.start()

    async def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                self._results.put((await call(), None))
            except BaseException as error:
                self._results.put((None, error))

    def call(self, call: Callable[[], Awaitable[T]]) -> T:
        self._calls.put(call)
        result, error = self._results.get(timeout=20)
        if error is not None:
            raise error
        answer: T = result
        return answer

    def close(self) -> None:
        self._calls.put(None)
        self._thread.join(20)


async def settle() -> None:
    """Let everybody run who can, without time passing."""
    for _ in range(12):
        await anyio.lowlevel.checkpoint()


class SessionMachine(RuleBasedStateMachine):
    """One session, both ends of it, and the network between them."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        trio_run._r.seed(0)
        self.loop = Lockstep(backend)
        self.sim: Simulation
        self.sessions: dict[str, Session] = {}
        self.sent: dict[str, list[bytes]] = {"client": [], "server": []}
        self.got: dict[str, list[bytes]] = {"client": [], "server": []}
        self.closing: set[str] = set()
        self.ended: set[str] = set()
        self.aborted = False
        self.calls = 0
        self.tasks = 0

    # --- the ends --------------------------------------------------------------------------------------------------

    @initialize(chunk=st.sampled_from([None, None, 1, 100]), capacity=st.sampled_from([65536, 500]))
    def connect(self, chunk: int | None, capacity: int) -> None:
        async def enter() -> None:
            resume = Resume(buffer=BUFFER, window=WINDOW, max_message=20_000, ttl=7200)
            retry = Retry(Backoff.exponential(), random=Random(0))
            self.sim = Simulation(resume, retry, Heartbeat(), Framing(), chunk=chunk, capacity=capacity)
            await self.sim.__aenter__()
            self.tasks = len(anyio.get_running_tasks())
            client, server = await self.sim.connect()
            self.sessions = {"client": client, "server": server}

        self.loop.call(enter)

    @property
    def client(self) -> ClientSession:
        client = self.sessions["client"]
        assert isinstance(client, ClientSession)
        return client

    @property
    def server(self) -> ServerSession:
        server = self.sessions["server"]
        assert isinstance(server, ServerSession)
        return server

    def is_open(self, who: str) -> bool:
        return not self.sessions[who].state.is_over and who not in self.closing

    # --- steps -----------------------------------------------------------------------------------------------------

    @rule(count=st.integers(1, 12), how=HOW, cut_first=st.booleans(), outage=st.sampled_from([0.0, 0.2, 3.0, 20.0]))
    def burst_over_a_cut(self, count: int, how: How, cut_first: bool, outage: float) -> None:
        """Both ends send while a link dies, and the next ones perhaps not long after."""
        if cut_first:
            self.cut(how)
        for who in ("client", "server"):
            self.send(who, 500, count)
        if not cut_first:
            self.cut(how)
        self.network(True)
        self.loop.call(lambda: anyio.sleep(outage))
        self.network(False)
        self.loop.call(lambda: anyio.sleep(0.11))

    @rule(who=WHO, size=st.sampled_from([0, 1, 100, 1000, 9000]), count=st.integers(1, 5))
    def send(self, who: str, size: int, count: int) -> None:
        async def step() -> None:
            for _ in range(count):
                message = b"%d " % len(self.sent[who]) + bytes(size)
                try:
                    self.sessions[who].send_nowait(message)
                except BufferFull:
                    break
                self.sent[who].append(message)
            await settle()

        if self.is_open(who) and who not in self.ended:
            self.loop.call(step)

    @rule(who=WHO, limit=st.sampled_from([1, 3, None]))
    def consume(self, who: str, limit: int | None) -> None:
        async def step() -> None:
            if self.sessions[who].core.inbox:
                self.got[who] += await self.sessions[who].receive_many(limit)
            await settle()

        if who not in self.closing and not self.aborted:
            self.loop.call(step)

    @rule(how=HOW)
    def cut(self, how: How) -> None:
        async def step() -> None:
            self.sim.cut(how)
            await settle()

        self.loop.call(step)

    @rule(how=HOW, count=st.integers(0, 400), of_client=st.booleans(), links=st.integers(1, 3))
    def cut_after_bytes(self, how: How, count: int, of_client: bool, links: int) -> None:
        """This link, and the next ones too."""
        cut = Cut(sent=count, how=how) if of_client else Cut(received=count, how=how)
        self.sim.cut_next(cut, links=links)

    @rule(seconds=st.sampled_from([0.001, 0.05, 0.2, 1.0, 6.0, 16.0]))
    def advance(self, seconds: float) -> None:
        self.loop.call(lambda: anyio.sleep(seconds))

    @rule(is_down=st.booleans())
    def network(self, is_down: bool) -> None:
        self.sim.network.is_down = is_down

    @rule()
    def reconnect(self) -> None:
        async def step() -> None:
            self.client.reconnect()
            await settle()

        self.loop.call(step)

    @rule(older=st.integers(0, 3), forged=st.booleans())
    def stale_attempt(self, older: int, forged: bool) -> None:
        """One that is older than the link that has the session, or that does not know its secret (I6)."""

        async def step() -> None:
            peer = await RawPeer.dial(self.sim.memory, self.sim.endpoint)
            server = self.server
            epoch = server.epoch + 5 if forged else max(0, server.epoch - older)
            raw = RawSession(server.session_id, bytes(32) if forged else server.key, epoch=epoch)
            before = (server.epoch, server.attachment, server.core.recv, server.core.acked, server.state)
            was_over = server.state.is_over
            answer = await peer.resume(raw)
            assert isinstance(answer, Reject)
            if forged:
                assert answer.code is RejectCode.UNKNOWN_SESSION
            elif not was_over and not server.state.is_over:
                assert answer.code is RejectCode.STALE_EPOCH
            if before[0] == server.epoch and not server.state.is_over:  # no honest attempt came in between
                after = (server.epoch, server.attachment, server.core.recv, server.core.acked, server.state)
                assert after[0] == before[0]

        self.loop.call(step)

    @rule(who=WHO)
    def end(self, who: str) -> None:
        async def step() -> None:
            await self.sessions[who].send_eof()
            await settle()

        if self.is_open(who):
            self.ended.add(who)
            self.loop.call(step)

    @precondition(lambda self: len(self.sent["client"]) + len(self.sent["server"]) > 8)
    @rule(who=WHO)
    def close(self, who: str) -> None:
        async def closing() -> None:
            try:
                await self.sessions[who].aclose()
            except (CloseIncomplete, SessionLost):
                assert self.closing == {"client", "server"} or self.unread()
            finally:
                self.calls -= 1

        async def step() -> None:
            self.sim._group.start_soon(closing)
            await settle()

        if self.is_open(who):
            self.closing.add(who)
            self.calls += 1
            self.loop.call(step)

    def unread(self) -> bool:
        """Whether somebody closed with messages for it under way, which ends the session with a loss."""
        return any(
            self.sent["server" if who == "client" else "client"] != self.got[who] for who in self.closing
        ) or bool(self.closing)

    @precondition(lambda self: len(self.sent["client"]) > 5)
    @rule(who=WHO)
    def abort(self, who: str) -> None:
        async def step() -> None:
            self.sessions[who].abort()
            await settle()

        if self.is_open(who):
            self.aborted = True
            self.loop.call(step)

    # --- invariants ------------------------------------------------------------------------------------------------

    @invariant()
    def keeps_its_promises(self) -> None:
        if not self.sessions:
            return
        for who, other in (("client", "server"), ("server", "client")):
            session, peer = self.sessions[who], self.sessions[other]
            arrived = self.got[who] + list(session.core.inbox)
            assert arrived == self.sent[other][: len(arrived)], "I1"
            assert session.core.acked <= peer.core.recv <= session.core.next - 1, "I2"
            assert session.buffered <= BUFFER, "I4"
            assert session.core.inbox_cost <= WINDOW, "I5"
            if not self.aborted and not self.closing:
                assert session.state is not State.LOST, f"{session!r}: {session._error}"
        assert self.server.epoch <= self.client.epoch, "I3"
        attachment = self.server.attachment
        if attachment is not None and not self.server.state.is_over:
            assert not attachment.link.is_aborted or self.server.state is State.ATTACHED, "I3"

    def teardown(self) -> None:
        try:
            if self.sessions:
                self.loop.call(self.finish)
                self.keeps_its_promises()
        finally:
            if self.sessions:
                self.loop.call(lambda: self.sim.__aexit__(None, None, None))
            self.loop.close()

    async def finish(self) -> None:
        """Heal the network: all that was sent arrives, both ends close, and nothing is left."""
        self.sim.network.is_down = False
        self.sim.chaos._cuts = iter(())
        self.sim.calm()
        with anyio.fail_after(9000):  # an abort whose last word fell into a black hole costs the other end its ttl
            if not self.aborted and not self.closing:
                for who, other in (("client", "server"), ("server", "client")):
                    while len(self.got[who]) < len(self.sent[other]):
                        self.got[who] += await self.sessions[who].receive_many()
                for session in self.sessions.values():
                    await session.send_eof()
                await until(lambda: all(session.core.peer_fin for session in self.sessions.values()))
            for session in self.sessions.values():
                try:
                    await session.aclose()
                except (SessionLost, CloseIncomplete):
                    assert self.aborted or self.closing
            await until(lambda: not self.calls, within=3600)  # I7
            for session in self.sessions.values():
                session.leave()
            for session in self.sessions.values():
                await session.wait_closed()
        self.sim.over.set()
        await anyio.sleep(40)
        assert self.sim.server.sessions == []
        assert len(self.sim.server._links) == 0, "I8"
        assert len(anyio.get_running_tasks()) == self.tasks, "I8"
        if not self.aborted and not self.closing:
            assert {session.state for session in self.sessions.values()} == {State.CLOSED}


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_any_order_of_events_keeps_what_a_session_promises(backend: str) -> None:
    make: Any = lambda: SessionMachine(backend)  # noqa: E731 - any callable will do, says its documentation
    run_state_machine_as_test(
        make,
        settings=settings(
            max_examples=100,
            stateful_step_count=40,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
        ),
    )
