"""Both ends of a stack in one process, over a network that fails as told: for tests in virtual time.

    async with Simulation(Resume(), Retry(Backoff.exponential()), Framing(), cuts=[Cut(sent=100)]) as sim:
        client, server = await sim.connect()
        await exchange(client, server, [b"there"], [b"back"])

What a session promises is checked by `exchange`: everything arrives, once and in order, and both ends close.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self

import anyio
import anyio.lowlevel
from anyio.abc import TaskStatus

from towline.endpoint import Endpoint
from towline.errors import ConnectFailed
from towline.layers.resume import ClientSession, ServerSession, Session
from towline.link import Link
from towline.server import Server
from towline.service import Dial
from towline.stack import OpenStack, Stack
from towline.transport import Listener, Transport
from towline.transports.memory import Memory

from ._chaos import Chaos, ChaosDriver, Cut, How

__all__ = ["Network", "Simulation", "exchange", "gather", "until"]


class Network(Transport):
    """A transport that can be down, or fail to connect as told.

    Attributes:
        is_down: while true, nobody gets through.
        errors: what the next dials raise, one each.
        dials: the moments at which somebody dialled.
    """

    def __init__(self, inner: Transport) -> None:
        self.inner = inner
        self.is_down = False
        self.errors: list[Exception] = []
        self.dials: list[float] = []

    @property
    def schemes(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of the transport inside."""
        return self.inner.schemes

    async def __call__(self, dial: Dial, /) -> Link:
        self.dials.append(anyio.current_time())
        await anyio.lowlevel.checkpoint()
        if self.errors:
            raise self.errors.pop(0)
        if self.is_down:
            raise ConnectFailed("the network is down")
        return await self.inner(dial)

    async def listen(self, endpoint: Endpoint) -> Listener:
        return await self.inner.listen(endpoint)


class Simulation:
    """A server, as many clients as asked for, and the network between them.

    Args:
        layers: the stack of both ends, outermost first.
        cuts: how the first, the second, … link fails, whoever dials it; links after the last one live.
        seed: instead: every link fails at a random byte, until `calm`.
        mean: with a seed: how many bytes a link carries on average.
        how: with a seed: the ways to fail, one at random.
        capacity: bytes that each direction of a link holds.
        chunk: the most bytes that one read gives; None for all there are.
        handler: what the server runs for a session; by default it hands the session to `connect` and `accepted`, and
            waits for the end of the simulation.
        limit: seconds after which it counts as stuck: in virtual time waiting for ever is an endless loop.

    Attributes:
        network: what clients dial through.
        chaos: what cuts their links.
        server: the running server.
    """

    endpoint = "memory://simulation"

    def __init__(
        self,
        *layers: Any,
        cuts: Iterable[Cut] = (),
        seed: int | None = None,
        mean: int = 10_000,
        how: tuple[How, ...] = ("reset", "close"),
        capacity: int = 65536,
        chunk: int | None = None,
        handler: Callable[[Any], Awaitable[None]] | None = None,
        limit: float = 20_000.0,
    ) -> None:
        self.limit = limit
        self.memory = Memory(capacity=capacity, chunk=chunk)
        self.chaos = Chaos(self.memory, cuts=cuts, seed=seed, mean=mean, how=how)
        self.network = Network(self.chaos)
        self.stack = Stack(*layers, transports=(self.network,))
        self.server: Server
        self.handler: Callable[[Any], Awaitable[None]] = handler or self._handle
        self.over = anyio.Event()
        self._serving: OpenStack
        self._dialling: OpenStack
        self._give, self._take = anyio.create_memory_object_stream[ServerSession](1000)
        self._stop: anyio.Event | None = None
        self._stopped = anyio.Event()
        self._group = anyio.create_task_group()

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        self._group.start_soon(self._limit)
        await self._group.start(self._run_clients)
        await self.start_server()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        self._give.close()
        self._take.close()
        self.over.set()
        self._group.cancel_scope.cancel()
        # What the block raised passes beside the group, not as an ExceptionGroup out of it.
        try:
            await self._group.__aexit__(None, None, None)
        except BaseExceptionGroup as group:
            raise _first(group) from None

    async def _limit(self) -> None:
        await anyio.sleep(self.limit)
        raise TimeoutError(f"the simulation has run for {self.limit:g} s")

    # --- the server ------------------------------------------------------------------------------------------------

    async def start_server(self) -> None:
        """Start it, or start it anew after `kill_server`; a new one knows no session of the old one."""
        await self._group.start(self._run_server)

    async def kill_server(self) -> None:
        """End the server as a crash of its process would: no last word, all links reset, all sessions gone."""
        assert self._stop is not None
        self._stop.set()
        await self._stopped.wait()

    async def _run_server(self, *, task_status: TaskStatus[None]) -> None:
        self._stop = stop = anyio.Event()
        self._stopped = stopped = anyio.Event()
        try:
            async with self.stack.open() as self._serving:
                self.server = await self._serving.serve(self.endpoint, self.handler)
                task_status.started()
                await stop.wait()
        finally:
            self.memory._listeners.pop("simulation", None)
            stopped.set()

    async def _handle(self, session: Any) -> None:
        self._give.send_nowait(session)
        await self.over.wait()

    async def accepted(self) -> ServerSession:
        """The next session whose handler has started."""
        return await self._take.receive()

    # --- the clients -----------------------------------------------------------------------------------------------

    async def _run_clients(self, *, task_status: TaskStatus[None]) -> None:
        async with self.stack.open() as self._dialling:
            task_status.started()
            await anyio.sleep_forever()

    async def dial(self) -> ClientSession:
        """A new session, the client's side only."""
        session: ClientSession = await self._dialling.connect(self.endpoint)
        return session

    async def connect(self) -> tuple[ClientSession, ServerSession]:
        """A new session, both ends of it."""
        client = await self.dial()
        while True:
            server = await self.accepted()
            if server.session_id == client.session_id:
                return client, server

    # --- the network -----------------------------------------------------------------------------------------------

    def cut(self, how: How = "reset") -> None:
        """Cut the newest link now."""
        driver = self.chaos.drivers[-1]
        driver._cut = Cut(how=how)
        driver.cut_now()

    def cut_next(self, cut: Cut, *, links: int = 1) -> None:
        """Let the newest link fail after so many *more* bytes, and the next ``links`` links after so many."""
        driver = self.chaos.drivers[-1]
        if not driver.is_cut and not _is_due(driver):
            driver._cut = Cut(
                None if cut.sent is None else driver._sent + cut.sent,
                None if cut.received is None else driver._received + cut.received,
                how=cut.how,
            )
        self.chaos._cuts = iter([cut] * links)

    def calm(self) -> None:
        """No link fails any more, those that exist included."""
        self.chaos.is_calm = True
        for driver in self.chaos.drivers:
            if not driver.is_cut and not _is_due(driver):
                driver._cut = Cut()


def _is_due(driver: ChaosDriver) -> bool:
    """Whether bytes may be gone already that came after the cut: then it must come."""
    limit = driver._cut.received
    return limit is not None and driver._received >= limit


async def until(condition: Callable[[], object], *, within: float = 60.0, every: float = 0.01) -> None:
    """Wait until something is so, looking every so often: in virtual time that costs nothing.

    Raises:
        TimeoutError: if it is not so in time.
    """
    with anyio.fail_after(within):
        while not condition():  # noqa: ASYNC110 - whatever can be looked at, and not only what tells of itself
            await anyio.sleep(every)


async def gather(*calls: Callable[[], Awaitable[object]]) -> None:
    """Run all at once and wait for all. What one raises is raised as it is, and ends the others."""
    try:
        async with anyio.create_task_group() as tasks:
            for call in calls:
                tasks.start_soon(_run, call)
    except BaseExceptionGroup as group:
        raise _first(group) from None


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    error: BaseException = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error  # pyright: ignore[reportUnknownArgumentType]


async def _run(call: Callable[[], Awaitable[object]]) -> None:
    await call()


async def exchange(
    client: Session, server: Session, there: Sequence[bytes], back: Sequence[bytes], *, within: float = 600.0
) -> None:
    """Send both ways at once, receive all, end both directions and close both ends.

    Args:
        client: one end of a session.
        server: its other end.
        there: what the client sends.
        back: what the server sends.
        within: seconds in which it must be done.

    Raises:
        AssertionError: if anything is lost, doubled or out of order, or an end does not close.
        TimeoutError: if it does not come to an end.
    """

    async def send(session: Session, messages: Sequence[bytes]) -> None:
        for message in messages:
            await session.send(message)
        await session.send_eof()

    async def receive(session: Session, expected: Sequence[bytes]) -> None:
        received = [message async for message in session]
        assert len(received) == len(expected), f"{len(received)} of {len(expected)} messages"
        assert received == list(expected)
        await anyio.lowlevel.checkpoint()

    with anyio.fail_after(within):
        await gather(
            lambda: send(client, there),
            lambda: send(server, back),
            lambda: receive(client, back),
            lambda: receive(server, there),
        )
        await gather(client.aclose, server.aclose)
        await gather(client.wait_closed, server.wait_closed)
    assert client.state.value == server.state.value == "closed", f"{client!r}, {server!r}"
