"""What must type-check, and what must not: `retryable` and `attempts`. Never run; mypy and pyright read it.

A line that must be refused carries a ``type: ignore``, which both checkers heed, and complain about where it is not
needed.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar, assert_type

from towline.layers.attempt_loop import AttemptBlock, attempts
from towline.layers.by_key import ByKey
from towline.layers.decorator import Call, retryable
from towline.policies import Backoff, PolicySession, StandardPolicy, TpsBudget

T = TypeVar("T")


# --- signatures stay what they were ---


@retryable(on=OSError)
async def fetch(url: str, *, timeout: float = 1.0) -> bytes:
    return b""


@retryable(policy=StandardPolicy(max_attempts=2))
async def twins(value: T) -> list[T]:
    return [value, value]


class Client:
    @retryable(on=(OSError, EOFError), not_on=TimeoutError, max_attempts=5, max_elapsed=30.0)
    async def get(self, key: str) -> int:
        return 1

    @classmethod
    @retryable(on=lambda error: error.errno == 11 if isinstance(error, OSError) else False)
    async def make(cls, url: str) -> Client:
        return cls()

    @staticmethod
    @retryable(on=OSError, backoff=Backoff.constant(1), budget=TpsBudget(), idempotent=True)
    async def ping(url: str) -> float:
        return 0.0


class Pool:
    async def __call__(self, size: int) -> str:
        return ""


async def signatures(client: Client) -> None:
    assert_type(await fetch("a", timeout=2.0), bytes)
    assert_type(await twins("a"), list[str])
    assert_type(await client.get("a"), int)
    assert_type(await Client.make("a"), Client)
    assert_type(await Client.ping("a"), float)
    assert_type(await client.ping("a"), float)
    assert_type(await retryable(on=OSError)(Pool())(3), str)
    assert_type(await retryable(on=OSError)(functools.partial(fetch, timeout=1.0))("a"), bytes)
    assert_type(await retryable(on=OSError)(client.get)("a"), int)

    await fetch(1)  # type: ignore[arg-type]
    await fetch("a", retries=1)  # type: ignore[call-arg]
    await client.get()  # type: ignore[call-arg]


service: Callable[[str], Coroutine[Any, Any, bytes]] = fetch
wrong: Callable[[int], Coroutine[Any, Any, bytes]] = fetch  # type: ignore[assignment]


# --- async generators stay what they were ---


@retryable(on=OSError)
async def rows(table: str) -> AsyncIterator[int]:
    yield 1


@retryable(on=OSError)
async def chat(name: str) -> AsyncGenerator[str, int]:
    yield ""


async def sources() -> None:
    assert_type(rows("a"), AsyncIterator[int])
    assert_type(chat("a"), AsyncGenerator[str, int])
    async for row in rows("a"):
        assert_type(row, int)
    rows(1)  # type: ignore[arg-type]


# --- what recovers adds its own type, if that is another ---


def length(url: str) -> int:
    return len(url)


async def empty(error: Exception, url: str) -> bytes:
    return b""


def nothing(error: Exception, url: str) -> None:
    return None


@retryable(on=OSError, recover=empty)
async def read(url: str) -> bytes:
    return b""


@retryable(on=OSError, recover=nothing)
async def find(url: str) -> bytes:
    return b""


@retryable(on=OSError, recover={OSError: empty, ValueError: empty})
async def look(url: str) -> bytes:
    return b""


@retryable(on=OSError, recover={OSError: nothing}, state=length)
async def peek(url: str) -> bytes | None:
    return b""


async def recovered() -> bytes:
    assert_type(await read("a"), bytes)
    assert_type(await find("a"), bytes | None)
    assert_type(await look("a"), bytes)
    assert_type(await peek("a"), bytes | None)
    await read(1)  # type: ignore[arg-type]
    return await find("a")  # type: ignore[return-value]


# --- what is not async, and settings that do not exist ---


def plain(url: str) -> bytes:
    return b""


retryable(on=OSError)(plain)  # type: ignore[arg-type]
retryable(on=OSError)(lambda: 1)  # type: ignore[arg-type, return-value]
retryable(on=OSError, recover=nothing)(plain)  # type: ignore[arg-type]
retryable(on=OSError, recover=nothing)(rows)  # type: ignore[arg-type]
retryable(fetch)  # type: ignore[call-overload]
retryable(on=KeyboardInterrupt)  # type: ignore[arg-type]
retryable(on=OSError, attempts=3)  # type: ignore[call-overload]
retryable(on=OSError, state=1)  # type: ignore[call-overload]
retryable(on=OSError, state=ByKey(length, limit=10, ttl=60))
assert_type(Call(("a",), {}).args, tuple[Any, ...])


# --- blocks ---


async def blocks(session: PolicySession[Any, Any]) -> None:
    assert_type(attempts(StandardPolicy()), AsyncIterator[AttemptBlock])
    assert_type(attempts(on=OSError), AsyncIterator[AttemptBlock])
    async for attempt in attempts(Backoff.constant(1)):
        assert_type(attempt, AttemptBlock)
        with attempt as same:
            assert_type(same, AttemptBlock)
            assert_type(attempt.number, int)
            attempt.result = 1
        with attempt:
            return
        print("reached: a block may swallow what it holds")

    attempts()  # type: ignore[call-overload]
    attempts(StandardPolicy(), on=OSError)  # type: ignore[call-overload]
    attempts(session)  # type: ignore[call-overload]
    attempts(on=KeyboardInterrupt)  # type: ignore[arg-type]
