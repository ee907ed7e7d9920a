"""What must type-check, and what must not: typed calls. Never run; mypy and pyright read it.

A line that must be refused carries a ``type: ignore``, which both checkers heed, and complain about where it is not
needed.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from types import NoneType
from typing import Protocol, assert_type

from anyio.abc import TaskGroup
from pydantic import BaseModel

from towline import Service, Stack, Timeout
from towline.layers.rpc import (
    MsgspecCodec,
    Request,
    Response,
    Router,
    Typed,
    client,
    current_request,
    method,
    router,
    service,
)
from towline.service import Wrapper


class GetUser(BaseModel):
    number: int


@dataclass
class User:
    number: int
    name: str


async def call(request: Request, /) -> Response:
    return Response()


async def find(request: GetUser, /) -> User:
    return User(request.number, "")


# --- one method: a layer on either side ---

get_user = Typed("users.get", GetUser, User)
assert_type(get_user, Typed[GetUser, User])
assert_type(get_user(call), Wrapper[GetUser, User])
assert_type(get_user.answered_by(find), Wrapper[Request, Response])
assert_type(Typed("all", NoneType, list[User])(call), Wrapper[None, list[User]])
assert_type(Typed("all", bytes, int, codec=MsgspecCodec("msgpack")), Typed[bytes, int])

get_user(find)  # type: ignore[arg-type]
get_user.answered_by(call)  # type: ignore[arg-type]
Typed("users.get", GetUser, User, codec=int)  # type: ignore[arg-type]
MsgspecCodec("yaml")  # type: ignore[arg-type]

stack = Stack.of(GetUser, User).layer(Timeout(5)).layer(get_user)
assert_type(stack, Stack[GetUser, User, Request, Response])
assert_type(stack(call), Service[GetUser, User])
stack(find)  # type: ignore[arg-type]
Stack.of(User, User).layer(get_user)  # type: ignore[arg-type]


async def calls() -> None:
    assert_type(await get_user(call)(GetUser(number=7)), User)
    await get_user(call)(User(7, ""))  # type: ignore[arg-type]
    assert_type(current_request().metadata["who"], bytes)


# --- a class of methods ---


@service
class Users(Protocol):
    async def get(self, request: GetUser) -> User: ...
    @method(name="everybody")
    def all(self) -> AsyncIterator[User]: ...
    async def load(self, users: AsyncIterator[User]) -> int: ...


@service(name="abstract.v1")
class Abstract(ABC):
    @abstractmethod
    async def get(self, number: int) -> str: ...


class Database:
    async def get(self, request: GetUser) -> User:
        return User(request.number, "")

    async def all(self) -> AsyncIterator[User]:
        yield User(1, "")

    async def load(self, users: AsyncIterator[User]) -> int:
        return len([user async for user in users])


class TakesAnother(Database):
    async def get(self, request: User) -> User:  # type: ignore[override]
        return request


class GivesAnother(Database):
    async def get(self, request: GetUser) -> str:  # type: ignore[override]
        return ""


class LacksOne:
    async def get(self, request: GetUser) -> User:
        return User(request.number, "")


class Concrete(Abstract):
    async def get(self, number: int) -> str:
        return ""


assert_type(client(Users, call), Users)
assert_type(client(Abstract, call, codec=MsgspecCodec()), Abstract)
assert_type(router(Users), Callable[[Users], Router])
assert_type(router(Users)(Database()), Router)
assert_type(router(Abstract)(Concrete()), Router)
assert_type(router(Users)(client(Users, call)), Router)

router(Users)(TakesAnother())  # type: ignore[arg-type]
router(Users)(GivesAnother())  # type: ignore[arg-type]
router(Users)(LacksOne())  # type: ignore[arg-type]
router(Users)(Database)  # type: ignore[arg-type]
router(Abstract)(Database())  # type: ignore[arg-type]
client(Users, find)  # type: ignore[arg-type]
client(Users)  # type: ignore[call-arg]
client(Users, call, tasks=1)  # type: ignore[arg-type]
service(name=1)  # type: ignore[call-overload]
method("everybody")  # type: ignore[call-arg]


async def methods(tasks: TaskGroup, source: AsyncIterator[User]) -> None:
    users = client(Users, call, tasks=tasks)
    assert_type(await users.get(GetUser(number=7)), User)
    assert_type(await users.load(source), int)
    async for user in users.all():
        assert_type(user, User)
    await users.get(7)  # type: ignore[arg-type]
    await users.load([User(1, "")])  # type: ignore[arg-type]
    await users.find(GetUser(number=7))  # type: ignore[attr-defined]
