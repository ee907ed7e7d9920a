"""Typed calls with msgspec: structs, and its codec. Skipped where msgspec is not installed."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from typing_extensions import TypedDict

from towline import MisuseError
from towline.errors import CallFailed, StatusCode
from towline.layers.rpc import (
    DecodeError,
    JsonCodec,
    MsgspecCodec,
    Problem,
    Request,
    Response,
    Router,
    Typed,
    client,
    router,
    service,
)

pytest.importorskip("msgspec")

import msgspec


def name(value: object) -> str:
    """A test's name: without addresses, which differ from one process to the next."""
    return re.sub(r" at 0x\w+", "", str(value))


T = TypeVar("T")
SECRET = "hunter2-and-more"


class User(msgspec.Struct):
    number: int
    name: str = ""


class Page(msgspec.Struct, Generic[T]):
    items: list[T]


@dataclass
class Point:
    x: int
    y: int = 0


class Named(TypedDict):
    name: str


class Model(BaseModel):
    number: int


CODECS = [MsgspecCodec(), MsgspecCodec("msgpack")]
texts = st.text(st.characters(exclude_categories=["Cs"]))
numbers = st.integers(-(2**63), 2**63 - 1)
users = st.builds(User, numbers, texts)
VALUES: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (User, users),
    (Page[User], st.builds(Page[User], st.lists(users))),
    (Point, st.builds(Point, numbers, numbers)),
    (Named, st.fixed_dictionaries({"name": texts})),
    (User | None, st.none() | users),
    (dict[str, list[float]], st.dictionaries(texts, st.lists(st.floats(allow_nan=False, allow_infinity=False)))),
]
KINDS = [kind for kind, _ in VALUES]


@pytest.mark.parametrize("codec", CODECS, ids=name)
@pytest.mark.parametrize(("kind", "values"), VALUES, ids=map(name, KINDS))
@given(data=st.data())
def test_a_value_comes_back_as_it_was(
    codec: MsgspecCodec, kind: Any, values: st.SearchStrategy[Any], data: st.DataObject
) -> None:
    coder = codec.coder(kind)
    value = data.draw(values)
    assert coder.decode(coder.encode(value)) == value


bodies = st.binary() | st.recursive(
    st.none() | st.booleans() | numbers | st.floats() | texts | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["x", "name", "items"]) | texts, inner),
).map(msgspec.msgpack.encode)


@pytest.mark.parametrize("codec", CODECS, ids=name)
@pytest.mark.parametrize("kind", [*KINDS, Any], ids=name)
@given(body=bodies)
def test_a_body_is_a_value_or_a_decode_error_and_never_another_one(codec: MsgspecCodec, kind: Any, body: bytes) -> None:
    with contextlib.suppress(DecodeError):
        codec.coder(kind).decode(body)


@pytest.mark.parametrize("codec", CODECS, ids=name)
@pytest.mark.parametrize("kind", [Any, int, User, list[Any]], ids=name)
@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b"\x91" * 100_000,
        b'{"a":' * 100_000,
        b"9" * 100_000,
        b'"\\ud800"',
        b'"\xff"',
        b"\xa1\xff",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"",
    ],
    ids=lambda body: repr(body[:6]),
)
def test_a_hostile_body_is_a_value_or_a_decode_error(codec: MsgspecCodec, kind: Any, body: bytes) -> None:
    with contextlib.suppress(DecodeError):
        codec.coder(kind).decode(body)


def test_a_report_says_where_and_what_is_expected_and_never_what_was_found() -> None:
    with pytest.raises(DecodeError) as caught:
        MsgspecCodec().coder(list[User]).decode(b'[{"number":"%s"}]' % SECRET.encode())
    problem: Problem = {"loc": [], "msg": "Expected `int`, got `str` - at `$[0].number`", "type": "invalid"}
    assert caught.value.problems == (problem,)
    with pytest.raises(DecodeError) as caught:
        MsgspecCodec().coder(User).decode(SECRET.encode())
    assert [each["type"] for each in caught.value.problems] == ["malformed"]
    assert SECRET not in str(caught.value)


def test_json_carries_structs_wherever_they_are_named() -> None:
    json = JsonCodec()
    assert json.coder(User).encode(User(7)) == b'{"number":7,"name":""}'
    assert json.coder(dict[str, list[User] | None]).decode(b'{"a":[{"number":7}],"b":null}') == {
        "a": [User(7)],
        "b": None,
    }


def test_json_needs_no_msgspec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "msgspec")
    assert JsonCodec().coder(list[int]).encode([1]) == b"[1]"
    monkeypatch.setitem(sys.modules, "msgspec", None)  # as if it were not installed
    with pytest.raises(ImportError):
        MsgspecCodec().coder(int)


@pytest.mark.parametrize("codec", CODECS, ids=name)
@pytest.mark.parametrize("kind", [Model, object(), dict[str, int] | dict[str, str]], ids=name)
def test_a_type_that_msgspec_cannot_carry_is_found_when_its_coder_is_made(codec: MsgspecCodec, kind: Any) -> None:
    with pytest.raises(TypeError, match="msgspec cannot carry"):
        codec.coder(kind)


@pytest.mark.parametrize("codec", CODECS, ids=name)
@pytest.mark.parametrize(
    ("kind", "value"),
    [(User, Point(1)), (Point, User(1)), (Page[User], [User(1)]), (list[Any], [object()]), (str, "\ud800")],
    ids=name,
)
def test_a_value_of_another_type_is_not_written(codec: MsgspecCodec, kind: Any, value: Any) -> None:
    with pytest.raises(MisuseError, match=f"a value of type {type(value).__name__}, where .* is to be sent"):
        codec.coder(kind).encode(value)


def test_messagepack_has_no_longer_integers() -> None:
    with pytest.raises(MisuseError):
        MsgspecCodec("msgpack").coder(int).encode(2**64)


@service
class Users(Protocol):
    async def get(self, user: User) -> User: ...
    def all(self, user: User) -> AsyncIterator[User]: ...


class Database:
    async def get(self, user: User) -> User:
        return User(user.number, "Ada")

    async def all(self, user: User) -> AsyncIterator[User]:
        yield user


@pytest.mark.parametrize("codec", [JsonCodec(), *CODECS], ids=name)
async def test_a_service_speaks_in_structs(codec: JsonCodec | MsgspecCodec) -> None:
    answer = router(Users, codec=codec)(Database())
    assert await client(Users, answer, codec=codec).get(User(7)) == User(7, "Ada")


@pytest.mark.parametrize("format", ["json", "msgpack"])
async def test_a_bad_body_is_an_invalid_argument_with_a_report(format: Literal["json", "msgpack"]) -> None:
    async def never(user: User, /) -> User:
        raise AssertionError

    get: Typed[User, User] = Typed("get", User, User, codec=MsgspecCodec(format))
    with pytest.raises(CallFailed) as caught:
        await get.answered_by(never)(Request("get", b"\xc1"))
    assert (caught.value.code, caught.value.refused) == (StatusCode.INVALID_ARGUMENT, True)
    assert b"malformed" in caught.value.details["errors"]


async def test_both_ends_must_use_the_same_codec() -> None:
    async def same(user: User, /) -> User:
        return user

    json: Typed[User, User] = Typed("get", User, User)
    msgpack: Typed[User, User] = Typed("get", User, User, codec=MsgspecCodec("msgpack"))
    answer = Router({"get": json.answered_by(same)})
    with pytest.raises(CallFailed, match="INVALID_ARGUMENT"):
        await msgpack(answer)(User(1))

    async def call(request: Request, /) -> Response:
        return await answer(Request("get", b'{"number":1}'))

    with pytest.raises(CallFailed, match="INTERNAL"):
        await msgpack(call)(User(1))
