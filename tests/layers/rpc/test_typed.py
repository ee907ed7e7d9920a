"""Typed calls: codecs, one method as a layer, and a class of methods as a client and a router."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import pickle
import typing
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from types import NoneType
from typing import Annotated, Any, Protocol

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, computed_field
from typing_extensions import TypedDict

from towline import Framing, Memory, MisuseError, Service, Stack, Timeout
from towline.errors import CallFailed, StatusCode
from towline.layers.map import map_request
from towline.layers.resume import Resume
from towline.layers.rpc import (
    Coder,
    DecodeError,
    JsonCodec,
    Problem,
    Request,
    Response,
    Router,
    Rpc,
    Typed,
    client,
    current_request,
    method,
    router,
    service,
)
from towline.layers.rpc._codec import MAX_DEPTH, MAX_PROBLEMS, MAX_REPORT, MAX_TEXT
from towline.service import Wrapper, load

SECRET = "hunter2-and-more"


class GetUser(BaseModel):
    number: int
    password: str = ""


class User(BaseModel):
    number: int
    name: str


@dataclass
class Point:
    x: int
    y: int = 0


class Named(TypedDict):
    name: str


class Everything(BaseModel):
    model_config = ConfigDict(extra="forbid")

    text: str = Field(alias="theText")
    when: datetime
    where: list[Point]
    named: Named | None
    either: int | str
    counts: dict[str, Annotated[int, Field(ge=0)]]

    @computed_field
    def length(self) -> int:
        return len(self.text)


@contextlib.asynccontextmanager
async def connected(
    answering: Service[Request, Response], /, **settings: Any
) -> AsyncGenerator[Service[Request, Response]]:
    """A call over a whole stack to a handler."""
    stack: Any = Stack(Rpc(**settings), Resume(), Framing(), transports=(Memory(),))
    async with stack.serve("memory://typed", answering) as server, stack.connect(server.endpoint) as call:
        yield call


async def settled() -> None:
    """Let whatever is under way arrive."""
    await anyio.sleep(1)


def report_of(error: CallFailed) -> list[Problem]:
    report: list[Problem] = json.loads(error.details["errors"])
    return report


# --- codecs ---------------------------------------------------------------------------------------------------------

JSON = JsonCodec()
texts = st.text(st.characters(exclude_categories=["Cs"]))
numbers = st.integers(-(2**70), 2**70)
points = st.builds(Point, numbers, numbers)
models = st.builds(
    Everything,
    theText=texts,
    when=st.datetimes(timezones=st.just(UTC)),
    where=st.lists(points),
    named=st.none() | st.fixed_dictionaries({"name": texts}),
    either=numbers | texts,
    counts=st.dictionaries(texts, st.integers(0)),
)
VALUES: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (Everything, models),
    (Point, points),
    (list[Point], st.lists(points)),
    (Named, st.fixed_dictionaries({"name": texts})),
    (int | None, st.none() | numbers),
    (dict[str, list[float]], st.dictionaries(texts, st.lists(st.floats(allow_nan=False, allow_infinity=False)))),
    (datetime, st.datetimes()),
]
KINDS = [kind for kind, _ in VALUES]


@pytest.mark.parametrize(("kind", "values"), VALUES, ids=map(str, KINDS))
@given(data=st.data())
def test_a_value_comes_back_as_it_was(kind: Any, values: st.SearchStrategy[Any], data: st.DataObject) -> None:
    coder = JSON.coder(kind)
    value = data.draw(values)
    assert coder.decode(coder.encode(value)) == value


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | numbers | st.floats() | texts,
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["x", "name", "theText"]) | texts, inner),
)
bodies = st.binary() | json_values.map(lambda value: json.dumps(value).encode())


@pytest.mark.parametrize("kind", KINDS, ids=str)
@given(body=bodies)
def test_a_body_is_a_value_or_a_decode_error_and_never_another_one(kind: Any, body: bytes) -> None:
    with contextlib.suppress(DecodeError):
        JSON.coder(kind).decode(body)


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 100_000, b'"\\ud800"', b"\xff", b""])
@pytest.mark.parametrize("kind", [Any, int, list[Any], Everything], ids=str)
def test_a_hostile_body_is_a_value_or_a_decode_error(kind: Any, body: bytes) -> None:
    with contextlib.suppress(DecodeError):
        JSON.coder(kind).decode(body)


@pytest.mark.parametrize("kind", [Everything, int | None], ids=str)
@given(body=bodies)
async def test_a_body_that_a_handler_does_not_take_is_an_invalid_argument(kind: Any, body: bytes) -> None:
    async def never(value: Any, /) -> None:
        return None

    answer = Typed("never", kind, NoneType).answered_by(never)
    failed: CallFailed | None = None
    try:
        await answer(Request("never", body))
    except CallFailed as error:
        failed = error
    if failed is not None:
        assert (failed.code, failed.refused) == (StatusCode.INVALID_ARGUMENT, True)
        assert report_of(failed)


def test_a_report_says_where_and_what_is_expected_and_never_what_was_found() -> None:
    with pytest.raises(DecodeError) as caught:
        JSON.coder(list[GetUser]).decode(json.dumps([{"number": SECRET, "password": [SECRET]}]).encode())
    error = caught.value
    assert [(each["loc"], each["type"]) for each in error.problems] == [
        ([0, "number"], "int_parsing"),
        ([0, "password"], "string_type"),
    ]
    assert str(error) == (
        "0.number: Input should be a valid integer, unable to parse string as an integer (and 1 more)"
    )
    assert json.loads(error.report()) == list(error.problems)
    assert SECRET not in f"{error} {error!r} {error.report()!r}"
    assert error.__suppress_context__  # pydantic's own would show it


def test_a_report_is_bounded_whatever_was_sent() -> None:
    keys = {f"{number}" * 1_000: "x" for number in range(900)}
    with pytest.raises(DecodeError) as caught:
        JSON.coder(dict[str, int]).decode(json.dumps(keys).encode())
    error = caught.value
    assert error.total == 900
    assert 0 < len(json.loads(error.report())) < 900
    assert len(error.report()) <= MAX_REPORT
    assert len(str(error)) < 3 * MAX_TEXT

    class Tree(BaseModel):
        inside: dict[str, Any] | list[Tree] = []

    deep = b'{"inside":[' * 60 + b"1" + b"]}" * 60
    with pytest.raises(DecodeError) as caught:
        JSON.coder(Tree).decode(deep)
    assert max(len(each["loc"]) for each in caught.value.problems) == MAX_DEPTH


def test_too_many_problems_are_counted_and_not_listed() -> None:
    with pytest.raises(DecodeError) as caught:
        JSON.coder(list[str]).decode(json.dumps([1] * (MAX_PROBLEMS + 1)).encode())
    assert caught.value.problems == ()
    assert str(caught.value) == "1,001 problems"
    assert caught.value.report() == b"[]"


def test_a_decode_error_without_problems_says_that_it_cannot_be_read() -> None:
    assert str(DecodeError()) == "it cannot be read"
    assert str(DecodeError([Problem(loc=[], msg="not even close", type="malformed")])) == "not even close"


def test_a_decode_error_can_be_pickled() -> None:
    error = DecodeError([Problem(loc=["a"], msg="b", type="c")], 7)
    copied = pickle.loads(pickle.dumps(error))
    assert (copied.problems, copied.total, str(copied)) == (error.problems, 7, str(error))


def test_what_is_written_is_what_the_other_end_reads() -> None:
    value = Everything(
        theText="abc", when=datetime(2026, 1, 1, tzinfo=UTC), where=[], named=None, either="1", counts={}
    )
    written = json.loads(JSON.coder(Everything).encode(value))
    assert written["theText"] == "abc"  # by its alias
    assert "length" not in written  # which is computed, and extra fields are forbidden


@pytest.mark.parametrize("kind", [object(), list[Router], "Missing"])
def test_a_type_that_json_cannot_carry_is_found_when_its_coder_is_made(kind: Any) -> None:
    with pytest.raises(TypeError, match="pydantic makes no JSON of"):
        JSON.coder(kind)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (int, "1"),
        (User, {"number": 1, "name": "Ada"}),
        (User, GetUser(number=1)),
        (User, User.model_construct(number="x")),  # pyright: ignore[reportArgumentType]
        (list[int], ["1"]),
        (Point | None, 3),
        (str, "\ud800"),
    ],
    ids=str,
)
def test_a_value_of_another_type_is_not_written(kind: Any, value: Any) -> None:
    with pytest.raises(MisuseError, match=f"a value of type {type(value).__name__}, where .* is to be sent"):
        JSON.coder(kind).encode(value)


# --- one method -----------------------------------------------------------------------------------------------------

get_user: Typed[GetUser, User] = Typed("users.get", GetUser, User)


async def find(request: GetUser, /) -> User:
    return User(number=request.number, name=f"user {request.number}")


USERS = Router({get_user.method: get_user.answered_by(find)})


async def test_a_method_has_types_on_both_sides() -> None:
    assert await get_user(USERS)(GetUser(number=7)) == User(number=7, name="user 7")


async def test_what_is_on_the_wire_is_the_method_and_the_bodies() -> None:
    asked: list[Request] = []

    async def call(request: Request, /) -> Response:
        asked.append(request)
        return await USERS(request)

    await get_user(call)(GetUser(number=7))
    assert asked == [Request("users.get", b'{"number":7,"password":""}')]
    assert await USERS(asked[0]) == Response(b'{"number":7,"name":"user 7"}')


async def test_a_bad_body_is_an_invalid_argument_with_a_report_and_nothing_is_called() -> None:
    async def never(request: GetUser, /) -> User:
        raise AssertionError

    answer = get_user.answered_by(never)
    with pytest.raises(CallFailed) as caught:
        await answer(Request("users.get", json.dumps({"number": SECRET}).encode()))
    error = caught.value
    assert (error.code, error.refused, error.sent, error.retryable) == (StatusCode.INVALID_ARGUMENT, True, False, False)
    assert error.message == (
        "'users.get' was sent what it does not take: "
        "number: Input should be a valid integer, unable to parse string as an integer"
    )
    assert report_of(error) == [
        {
            "loc": ["number"],
            "msg": "Input should be a valid integer, unable to parse string as an integer",
            "type": "int_parsing",
        }
    ]
    assert SECRET not in f"{error} {error!r}"


async def test_a_bad_answer_is_an_internal_error_that_is_not_worth_another_attempt() -> None:
    async def call(request: Request, /) -> Response:
        return Response(b'{"number":7}')

    with pytest.raises(CallFailed) as caught:
        await get_user(call)(GetUser(number=7))
    error = caught.value
    assert (error.code, error.refused, error.sent, error.retryable) == (StatusCode.INTERNAL, False, True, False)
    assert error.message == "'users.get' answered what it does not give: name: Field required"
    assert report_of(error) == [{"loc": ["name"], "msg": "Field required", "type": "missing"}]


async def test_a_request_of_another_type_is_not_sent() -> None:
    async def never(request: Request, /) -> Response:
        raise AssertionError

    wrong: Any = User(number=7, name="x")
    with pytest.raises(MisuseError, match="a value of type User, where GetUser is to be sent"):
        await get_user(never)(wrong)


async def test_an_answer_of_another_type_is_an_internal_error_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def mistaken(request: GetUser, /) -> Any:
        return {"number": 7, "name": "x"}

    async with connected(get_user.answered_by(mistaken)) as call:
        with caplog.at_level(logging.ERROR), pytest.raises(CallFailed) as caught:
            await get_user(call)(GetUser(number=7))
    assert caught.value.code is StatusCode.INTERNAL
    assert "where User is to be sent" in caplog.text


async def test_none_is_no_bytes_and_bytes_are_what_they_are() -> None:
    async def double(data: bytes, /) -> bytes:
        return data * 2

    async def nothing(request: None, /) -> None:
        return None

    doubled: Typed[bytes, bytes] = Typed("double", bytes, bytes)
    assert await doubled.answered_by(double)(Request("double", b"\xff")) == Response(b"\xff\xff")
    assert await doubled(doubled.answered_by(double))(b"\x00\xff") == b"\x00\xff\x00\xff"
    ping: Typed[None, None] = Typed("ping", NoneType, NoneType)
    assert await ping.answered_by(nothing)(Request("ping")) == Response(b"")
    wrong: Any = "x"
    with pytest.raises(MisuseError, match="a value of type str, where bytes is to be sent"):
        await doubled(doubled.answered_by(double))(wrong)
    with pytest.raises(MisuseError, match="a value of type str, where NoneType is to be sent"):
        await ping(ping.answered_by(nothing))(wrong)


class Latin:
    """A codec of somebody else's, whose errors tell what they found."""

    def coder(self, kind: Any, /) -> Coder[Any]:
        return Coder(lambda value: str(value).encode("latin-1"), lambda data: kind(data.decode("latin-1")))


async def test_a_codec_is_an_argument_and_its_value_errors_are_bad_bodies() -> None:
    double: Typed[int, int] = Typed("double", int, int, codec=Latin())

    async def doubled(value: int, /) -> int:
        return 2 * value

    answer = double.answered_by(doubled)
    assert await double(answer)(21) == 42
    with pytest.raises(CallFailed) as caught:
        await answer(Request("double", SECRET.encode()))
    assert str(caught.value) == "INVALID_ARGUMENT: 'double' was sent what it does not take"
    assert caught.value.details == {}


def test_a_type_that_the_codec_cannot_carry_is_found_when_the_method_is_made() -> None:
    with pytest.raises(TypeError, match="pydantic makes no JSON of"):
        Typed("x", Router, int)


async def test_a_method_is_a_layer_in_a_stack() -> None:
    stack = Stack.of(GetUser, User).layer(Timeout(5)).layer(get_user)
    assert await stack(USERS)(GetUser(number=1)) == User(number=1, name="user 1")
    served = Stack.of(Request, Response).layer(get_user.answered_by)
    assert await stack(served(find))(GetUser(number=1)) == User(number=1, name="user 1")


def test_hints_are_those_of_the_service_inside() -> None:
    class Busy(Wrapper[Any, Any]):
        async def __call__(self, request: Any, /) -> Any: ...

        def load(self) -> float:
            return 7

    busy = Busy(find)
    assert load(get_user(busy)) == load(get_user.answered_by(busy)) == 7


def test_a_method_is_a_value() -> None:
    same: Typed[GetUser, User] = Typed("users.get", GetUser, User)
    assert same == get_user
    assert hash(same) == hash(get_user)
    assert replace(get_user, method="other") != get_user
    assert repr(Typed("length", str, int)) == (
        "Typed(method='length', request=<class 'str'>, response=<class 'int'>, codec=JsonCodec())"
    )


# --- the call that is answered --------------------------------------------------------------------------------------


async def test_a_handler_sees_the_call_that_it_answers_and_nobody_else_does() -> None:
    seen: list[Request] = []

    async def look(number: int, /) -> int:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(note)
        if number == 0:
            raise CallFailed(StatusCode.NOT_FOUND)
        return number

    async def note() -> None:
        seen.append(current_request())

    looked: Typed[int, int] = Typed("look", int, int)
    answer = looked.answered_by(look)
    await answer(Request("look", b"1", {"who": b"ada"}))
    assert seen == [Request("look", b"1", {"who": b"ada"})]
    with pytest.raises(CallFailed):
        await answer(Request("look", b"0"))
    with pytest.raises(MisuseError, match="no call is being answered here"):
        current_request()


async def test_the_next_call_of_a_worker_sees_its_own_request() -> None:
    seen: list[str] = []

    async def typed(number: int, /) -> int:
        seen.append(current_request().metadata["who"].decode())
        return number

    async def plain(request: Request, /) -> Response:
        with pytest.raises(MisuseError):
            current_request()
        return Response()

    look: Typed[int, int] = Typed("look", int, int)
    async with connected(Router({"look": look.answered_by(typed), "plain": plain})) as call:
        for who in (b"ada", b"bob"):
            await call(Request("look", b"1", {"who": who}))
            await call(Request("plain"))
    assert seen == ["ada", "bob"]


async def test_a_handler_calls_its_caller_back() -> None:
    number: Typed[None, int] = Typed("number", NoneType, int)
    double: Typed[None, int] = Typed("double", NoneType, int)

    async def seven(request: None, /) -> int:
        return 7

    async def doubled(request: None, /) -> int:
        peer = current_request().peer
        assert peer is not None
        return 2 * await number(peer)(None)

    caller = Router({"number": number.answered_by(seven)})
    async with connected(double.answered_by(doubled), handler=caller) as call:
        assert await double(call)(None) == 14


# --- a class of methods ---------------------------------------------------------------------------------------------


@service
class Users(Protocol):
    """What the tests call."""

    async def get(self, request: GetUser) -> User:
        """The user of a number."""
        ...

    async def move(self, point: Point, /) -> Point: ...
    async def total(self, numbers: Annotated[list[int], []] = [1, 2, 3]) -> int: ...  # noqa: B006 -- a default that is sent
    async def ping(self) -> None: ...


@dataclass
class Database:
    """What answers it."""

    asked: list[object] = field(default_factory=list[object])

    async def get(self, request: GetUser) -> User:
        self.asked.append(request)
        if request.number < 0:
            raise CallFailed(StatusCode.NOT_FOUND, "no such user", details={"number": b"-1"})
        return User(number=request.number, name="Ada")

    async def move(self, point: Point, /) -> Point:
        return Point(point.y, point.x)

    async def total(self, numbers: list[int] = []) -> int:  # noqa: B006
        return sum(numbers)

    async def ping(self) -> None:
        self.asked.append("ping")


async def test_a_client_calls_what_a_router_answers() -> None:
    database = Database()
    users = client(Users, router(Users)(database))
    assert await users.get(GetUser(number=7)) == User(number=7, name="Ada")
    assert await users.move(Point(1, 2)) == Point(2, 1)
    await users.ping()
    assert database.asked == [GetUser(number=7), "ping"]


async def test_a_client_calls_over_a_connection() -> None:
    async with connected(router(Users)(Database())) as call:
        users = client(Users, call)
        assert await users.get(GetUser(number=7)) == User(number=7, name="Ada")
        assert await users.total(list(range(100_000))) == 4_999_950_000


async def test_arguments_are_given_as_for_any_function() -> None:
    users: Any = client(Users, router(Users)(Database()))
    assert await users.get(request=GetUser(number=7)) == User(number=7, name="Ada")
    assert await users.total() == 6  # by the default of the service's class, not by that of the implementation
    assert await users.total(numbers=[1]) == 1
    for function, args, kwargs in (
        (users.get, (), {}),
        (users.get, (1, 2), {}),
        (users.get, (), {"number": 7}),
        (users.move, (), {"point": Point(1)}),
        (users.ping, (1,), {}),
    ):
        with pytest.raises(TypeError, match=r"argument|positional"):
            await function(*args, **kwargs)


async def test_an_error_that_an_implementation_raises_arrives_as_itself() -> None:
    async with connected(router(Users)(Database())) as call:
        with pytest.raises(CallFailed) as caught:
            await client(Users, call).get(GetUser(number=-1))
    error = caught.value
    assert (error.code, error.message, error.refused) == (StatusCode.NOT_FOUND, "no such user", False)
    assert error.details == {"number": b"-1"}


async def test_a_router_says_invalid_argument_of_a_bad_body_over_a_connection() -> None:
    async with connected(router(Users)(Database())) as call:
        with pytest.raises(CallFailed) as caught:
            await call(Request("Users.get", b"\xff" * 100_000))
        assert (caught.value.code, caught.value.refused) == (StatusCode.INVALID_ARGUMENT, True)
        assert report_of(caught.value)[0]["type"] == "json_invalid"
        with pytest.raises(CallFailed) as caught:
            await call(Request("Users.total", json.dumps(["x"] * MAX_PROBLEMS).encode()))
        assert 10 < len(report_of(caught.value)) < MAX_PROBLEMS
        assert caught.value.message.endswith("(and 999 more)")
        await client(Users, call).ping()


async def test_the_deadline_of_a_caller_goes_with_a_typed_call() -> None:
    left: list[float] = []

    class Slow(Database):
        async def ping(self) -> None:
            left.append(anyio.current_effective_deadline() - anyio.current_time())
            try:
                await anyio.sleep_forever()
            finally:
                left.append(0)

    async with connected(router(Users)(Slow())) as call:
        with pytest.raises((TimeoutError, CallFailed)), anyio.fail_after(5):
            await client(Users, call).ping()
        await settled()
        assert left == [pytest.approx(5, abs=0.1), 0]
        with anyio.CancelScope(deadline=anyio.current_time()) as scope:
            await client(Users, call).ping()
        assert scope.cancelled_caught
        assert len(left) == 2  # that one was not sent


async def test_metadata_is_added_by_a_layer_around_the_call() -> None:
    seen: list[bytes] = []

    class Curious(Database):
        async def ping(self) -> None:
            seen.append(current_request().metadata["who"])

    def as_ada(request: Request) -> Request:
        return replace(request, metadata={**request.metadata, "who": b"ada"})

    await client(Users, map_request(as_ada)(router(Users)(Curious()))).ping()
    assert seen == [b"ada"]


def test_names_on_the_wire_are_those_of_the_class_and_the_method_or_as_asked_for() -> None:
    @service(name="users.v1")
    class Renamed(Protocol):
        @method(name="get")
        async def find(self, number: int) -> str: ...
        async def other(self, number: int) -> str: ...

    class Nobody:
        async def find(self, number: int) -> str:
            return ""

        async def other(self, number: int) -> str:
            return ""

    assert repr(router(Users)(Database())) == "Router(Users.get, Users.move, Users.ping, Users.total)"
    assert repr(router(Renamed)(Nobody())) == "Router(users.v1.get, users.v1.other)"


async def test_a_client_is_an_object_of_the_services_class_which_its_init_does_not_make() -> None:
    @service
    class Base(ABC):
        def __init__(self, needed: int) -> None:
            self.needed = needed

        @abstractmethod
        async def get(self, number: int) -> str: ...

        async def other(self) -> None:
            raise NotImplementedError

    @service
    class Derived(Base):
        @abstractmethod
        async def more(self) -> int: ...

    async def call(request: Request, /) -> Response:
        return Response(b'"yes"' if request.method == "Derived.get" else b"1")

    derived = client(Derived, call)
    assert isinstance(derived, Derived)
    assert await derived.get(1) == "yes"
    assert await derived.more() == 1
    assert repr(derived).startswith("<client of Derived over <function")
    assert type(client(Derived, call)) is type(derived)
    assert client(Users, call).get.__doc__ == "The user of a number."


async def test_a_client_can_be_served_in_turn() -> None:
    behind = client(Users, router(Users)(Database()))
    before = client(Users, router(Users)(behind))
    assert await before.move(Point(1, 2)) == Point(2, 1)


def test_what_is_no_method_is_left_alone() -> None:
    @service
    class Plain:
        VERSION = 1

        class Nested: ...

        async def get(self) -> int:
            raise NotImplementedError

        def _private(self, what: Any) -> None: ...

    class Implementation(Plain):
        async def get(self) -> int:
            return 1

    assert router(Plain)(Implementation()).methods.keys() == {"Plain.get"}


# --- what is refused ------------------------------------------------------------------------------------------------


class NotAsync:
    def get(self, number: int) -> int: ...  # type: ignore[empty-body]


class Bare:
    async def get(self, number): ...  # type: ignore[no-untyped-def]


class NoReturn:
    async def get(self, number: int): ...  # type: ignore[no-untyped-def]


class Unresolved:
    async def get(self, number: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821


class TwoParameters:
    async def get(self, number: int, other: int) -> None: ...


class KeywordOnly:
    async def get(self, *, number: int) -> None: ...


class Variable:
    async def get(self, *numbers: int) -> None: ...


class StaticMethod:
    @staticmethod
    async def get(number: int) -> None: ...


class ClassMethod:
    @classmethod
    async def get(cls, number: int) -> None: ...


class Property:
    @property
    def get(self) -> int: ...  # type: ignore[empty-body]


class AwaitedStream:
    async def get(self) -> AsyncIterator[int]: ...  # type: ignore[empty-body]


class BareStream:
    def get(self) -> typing.AsyncIterator: ...  # type: ignore[type-arg, empty-body]


class StreamOfNothing:
    def get(self) -> AsyncIterator: ...  # type: ignore[type-arg, empty-body]


class TakesStreamOfNothing:
    async def get(self, items: AsyncIterable) -> None: ...  # type: ignore[type-arg]


class TwoNames:
    async def get(self) -> None: ...
    @method(name="get")
    async def other(self) -> None: ...


class Empty: ...


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (NotAsync, "NotAsync.get is not async"),
        (Bare, "Bare.get has no annotation for number, return"),
        (NoReturn, "NoReturn.get has no annotation for return"),
        (Unresolved, "the annotations of Unresolved.get cannot be resolved at run time: name 'Nowhere' is not defined"),
        (TwoParameters, r"TwoParameters.get takes number: .*int.*, other: .*int.*, where one request by position is"),
        (KeywordOnly, "KeywordOnly.get takes number: .*int.*, where one request by position is expected"),
        (Variable, r"Variable.get takes \*numbers: .*int.*, where one request by position is expected"),
        (StaticMethod, "StaticMethod.get is a staticmethod, where a method is expected"),
        (ClassMethod, "ClassMethod.get is a classmethod, where a method is expected"),
        (Property, "Property.get is a property, where a method is expected"),
        (AwaitedStream, "AwaitedStream.get gives a stream, so write it as def, not async def"),
        (StreamOfNothing, "StreamOfNothing.get has a stream that does not say of what"),
        (BareStream, "BareStream.get has a stream that does not say of what"),
        (TakesStreamOfNothing, "TakesStreamOfNothing.get has a stream that does not say of what"),
        (TwoNames, "TwoNames has two methods by the name of 'TwoNames.get': get, other"),
        (Empty, "Empty has no methods"),
        (print, "service decorates a class, not <built-in function print>"),
    ],
    ids=lambda each: getattr(each, "__name__", None),
)
def test_a_class_whose_methods_do_not_say_what_they_take_and_give_is_no_service(cls: Any, why: str) -> None:
    with pytest.raises(TypeError, match=why):
        service(cls)


def test_a_class_that_is_no_service_has_no_client_and_no_router() -> None:
    class Derived(Users, Protocol): ...

    no_class: Any = 3
    for cls in (Database, Derived, no_class):
        with pytest.raises(TypeError, match=r"is no service: decorate its class with @service"):
            client(cls, router(Users)(Database()))
        with pytest.raises(TypeError, match=r"is no service: decorate its class with @service"):
            router(cls)


def test_an_implementation_without_one_of_the_methods_is_refused() -> None:
    class Misspelt:
        async def got(self, request: GetUser) -> User:
            return User(number=1, name="")

        move = total = ping = None

    class Heir(Users):
        move = total = ping = Database.ping  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]

    wrong: Any = Misspelt()
    heir: Any = Heir
    with pytest.raises(TypeError, match=r"does not implement Users.get: did you mean 'got'\?"):
        router(Users)(wrong)
    with pytest.raises(TypeError, match=r"does not implement Users\.get$"):
        router(Users)(heir())  # what it inherits is the protocol's, and does nothing
    no_object: Any = Database
    with pytest.raises(TypeError, match="Database is a class: give router an object of it"):
        router(Users)(no_object)


def test_a_service_whose_types_the_codec_cannot_carry_is_refused_when_it_is_used() -> None:
    @service
    class Odd(Protocol):
        async def get(self) -> Router: ...

    with pytest.raises(TypeError, match=r"Odd\.get: pydantic makes no JSON of"):
        router(Odd)


# --- streams --------------------------------------------------------------------------------------------------------


@service
class Feed(Protocol):
    def count(self, upto: int) -> AsyncIterator[Point]: ...
    def tick(self) -> AsyncGenerator[bytes, None]: ...
    async def add(self, points: AsyncIterator[Point]) -> int: ...
    def echo(self, points: AsyncIterable[Point], /) -> AsyncIterator[Point]: ...


@dataclass
class Points:
    """What answers it, and notes what becomes of the calls."""

    notes: list[str] = field(default_factory=list[str])

    async def count(self, upto: int) -> AsyncIterator[Point]:
        try:
            for number in range(upto):
                yield Point(number)
            if upto > 3:
                await anyio.sleep_forever()
            if upto == 3:
                raise CallFailed(StatusCode.OUT_OF_RANGE, "three is too many")
        finally:
            self.notes.append("count is over")

    async def tick(self) -> AsyncGenerator[bytes, None]:
        while True:
            yield b"\xff"
            await anyio.sleep(1)

    async def add(self, points: AsyncIterator[Point]) -> int:
        total = 0
        async for point in points:
            if point.x < 0:
                break
            total += point.x
        self.notes.append("add is over")
        return total

    async def echo(self, points: AsyncIterable[Point], /) -> AsyncIterator[Point]:
        self.notes.append(current_request().method)
        try:
            async for point in points:
                if point.x < 0:
                    raise CallFailed(StatusCode.OUT_OF_RANGE)
                yield point
        finally:
            self.notes.append("echo is over")


@contextlib.asynccontextmanager
async def feed(points: Points, **settings: Any) -> AsyncGenerator[Feed]:
    async with anyio.create_task_group() as tasks, connected(router(Feed)(points), **settings) as call:
        yield client(Feed, call, tasks=tasks)


class Source:
    """Points to send, which notes how far it came and that it was closed."""

    def __init__(self) -> None:
        self.sent = 0
        self.is_closed = False

    async def points(self, *xs: int, then: Exception | None = None) -> AsyncIterator[Point]:
        try:
            for x in xs:
                self.sent += 1
                yield Point(x)
            if then is not None:
                await anyio.sleep(1)
                raise then
        finally:
            self.is_closed = True

    async def endless(self) -> AsyncIterator[Point]:
        try:
            while True:
                self.sent += 1
                yield Point(1)
                await anyio.sleep(1)
        finally:
            self.is_closed = True


async def test_a_method_gives_a_stream() -> None:
    points = Points()
    async with feed(points) as feeding:
        answers = feeding.count(2)
        assert repr(answers) == "<answers of 'Feed.count'>"
        assert [each async for each in answers] == [Point(0), Point(1)]
        assert [each async for each in answers] == []
        assert [each async for each in feeding.count(0)] == []
    assert points.notes == ["count is over"] * 2


async def test_an_error_comes_after_the_messages_before_it() -> None:
    async with feed(Points()) as feeding:
        seen: list[Point] = []
        with pytest.raises(CallFailed) as caught:  # noqa: PT012
            async for each in feeding.count(3):
                seen.append(each)
    assert seen == [Point(0), Point(1), Point(2)]
    assert (caught.value.code, caught.value.message) == (StatusCode.OUT_OF_RANGE, "three is too many")


async def test_leaving_a_stream_cancels_its_call() -> None:
    points = Points()
    async with feed(points) as feeding:
        async for each in feeding.count(4):
            if each == Point(1):
                break
        await settled()
        assert points.notes == ["count is over"]

        with pytest.raises(ZeroDivisionError):  # noqa: PT012
            async for _ in feeding.count(4):
                raise ZeroDivisionError
        await settled()
        assert points.notes == ["count is over"] * 2

        with anyio.move_on_after(1):
            async for _ in feeding.count(4):
                pass
        await settled()
        assert points.notes == ["count is over"] * 3


async def test_a_stream_can_be_closed() -> None:
    async with feed(Points()) as feeding:
        async with contextlib.aclosing(feeding.tick()) as ticks:
            assert await anext(ticks) == b"\xff"
        with pytest.raises(StopAsyncIteration):
            await anext(ticks)
        never_begun = feeding.tick()
        await never_begun.aclose()
        with pytest.raises(ZeroDivisionError):
            await feeding.tick().athrow(ZeroDivisionError())
        with pytest.raises(ZeroDivisionError):
            await feeding.tick().athrow(ZeroDivisionError)


async def test_a_stream_ends_with_its_first_message_that_is_not_of_its_type() -> None:
    points = Points()

    async def bad(request: Request, /) -> Response:
        assert request.stream is not None
        await request.stream.send(b'{"x":1}')
        await request.stream.send(b'{"x":"y"}')
        try:
            await anyio.sleep_forever()
        finally:
            points.notes.append("cancelled")
        return Response()

    async with connected(bad) as call:
        answers = client(Feed, call).count(2)
        assert await anext(answers) == Point(1)
        with pytest.raises(CallFailed) as caught:
            await anext(answers)
        assert (caught.value.code, caught.value.sent) == (StatusCode.INTERNAL, True)
        await settled()
    assert points.notes == ["cancelled"]


async def test_an_answer_of_another_type_ends_a_stream_with_an_internal_error() -> None:
    class Mistaken(Points):
        async def count(self, upto: int) -> AsyncIterator[Any]:
            yield Point(1)
            yield "two"

    async with feed(Mistaken()) as feeding:
        answers = feeding.count(2)
        assert await anext(answers) == Point(1)
        with pytest.raises(CallFailed, match="INTERNAL"):
            await anext(answers)


async def test_a_bad_request_for_a_stream_is_an_invalid_argument() -> None:
    async with connected(router(Feed)(Points())) as call:

        def spoil(request: Request) -> Request:
            return replace(request, payload=b"x")

        with pytest.raises(CallFailed) as caught:
            await anext(client(Feed, map_request(spoil)(call)).count(1))
    assert (caught.value.code, caught.value.refused) == (StatusCode.INVALID_ARGUMENT, True)


async def test_a_method_takes_a_stream() -> None:
    source = Source()
    async with feed(Points()) as feeding:
        assert await feeding.add(source.points(1, 2, 3)) == 6
        assert source.is_closed
        assert await feeding.add(source.points()) == 0
        send, receive = anyio.create_memory_object_stream[Point](10)
        for x in range(4):
            send.send_nowait(Point(x))
        send.close()
        assert await feeding.add(aiter(receive)) == 6
        receive.close()


async def test_what_comes_after_the_answer_is_not_sent() -> None:
    source = Source()
    points = Points()
    async with feed(points, window=64 << 10) as feeding:
        assert await feeding.add(source.points(1, 2, -1, *range(100_000))) == 3
        assert source.is_closed
        assert source.sent < 50_000
        endless = Source()
        with pytest.raises(TimeoutError), anyio.fail_after(5):
            await feeding.add(endless.endless())
        assert endless.is_closed


async def test_an_error_of_what_is_to_be_sent_cancels_the_call_and_is_the_callers() -> None:
    source = Source()
    points = Points()
    async with feed(points) as feeding:
        with pytest.raises(ZeroDivisionError):
            await feeding.add(source.points(1, 2, then=ZeroDivisionError()))
        wrong: Any = source.points
        with pytest.raises(TypeError):
            await feeding.add(wrong)

        async def mistaken() -> AsyncIterator[Any]:
            yield "not a point"

        with pytest.raises(MisuseError):
            await feeding.add(mistaken())
        await settled()
    assert points.notes == []


async def test_a_bad_message_in_a_stream_is_an_invalid_argument_of_a_call_that_had_begun() -> None:
    @service(name="Feed")
    class Other(Protocol):
        async def add(self, points: AsyncIterator[str]) -> int: ...

    async def words() -> AsyncIterator[str]:
        yield "point"

    async with connected(router(Feed)(Points())) as call:
        with pytest.raises(CallFailed) as caught:
            await client(Other, call).add(words())
    assert (caught.value.code, caught.value.refused) == (StatusCode.INVALID_ARGUMENT, False)
    assert report_of(caught.value)


async def test_a_method_takes_and_gives_a_stream_at_the_same_time() -> None:
    points = Points()
    to_send, sent = anyio.create_memory_object_stream[Point]()
    async with feed(points) as feeding, to_send, sent:
        answers = feeding.echo(sent)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(to_send.send, Point(0))
            assert await anext(answers) == Point(0)
        for x in range(1, 10):
            await to_send.send(Point(x))
            assert await anext(answers) == Point(x)
        to_send.close()
        with pytest.raises(StopAsyncIteration):
            await anext(answers)
        assert points.notes == ["Feed.echo", "echo is over"]


async def test_leaving_a_stream_ends_what_is_sent_in_it() -> None:
    source, points = Source(), Points()
    async with feed(points) as feeding:
        async for _ in feeding.echo(source.endless()):
            break
        await settled()
        assert source.is_closed
        assert points.notes == ["Feed.echo", "echo is over"]


async def test_an_error_of_what_is_sent_beside_ends_the_stream_and_is_raised_there() -> None:
    points = Points()
    async with feed(points) as feeding:
        with pytest.raises(ZeroDivisionError):
            async for _ in feeding.echo(Source().points(1, then=ZeroDivisionError())):
                pass
        await settled()
        assert points.notes == ["Feed.echo", "echo is over"]
        with pytest.raises(CallFailed, match="OUT_OF_RANGE"):
            async for _ in feeding.echo(Source().points(1, -1)):
                pass


async def test_a_stream_ends_with_the_tasks_that_send_in_it() -> None:
    async with connected(router(Feed)(Points())) as call:
        tasks = anyio.create_task_group()
        answers = client(Feed, call, tasks=tasks).echo(Source().endless())
        async with tasks:
            await anext(answers)
            tasks.cancel_scope.cancel()
        with pytest.raises(anyio.ClosedResourceError):  # noqa: PT012
            while True:
                await anext(answers)


async def test_a_stream_whose_task_group_is_not_open_is_given_up() -> None:
    points = Points()
    async with connected(router(Feed)(points)) as call:
        answers = client(Feed, call, tasks=anyio.create_task_group()).echo(Source().points())
        with pytest.raises(RuntimeError):
            await anext(answers)
        await settled()
        assert points.notes in ([], ["Feed.echo", "echo is over"])
        assert repr(call).endswith("calling=0 answering=0>")


async def test_to_send_and_receive_at_once_needs_a_task_group() -> None:
    async def never(request: Request, /) -> Response:
        raise AssertionError

    with pytest.raises(MisuseError, match=r"'Feed\.echo' sends while it receives: give its client a task group"):
        client(Feed, never).echo(Source().points())


async def test_a_stream_that_is_called_like_a_plain_method_is_unimplemented() -> None:
    with pytest.raises(CallFailed) as caught:
        await router(Feed)(Points())(Request("Feed.count", b"1"))
    assert (caught.value.code, caught.value.refused) == (StatusCode.UNIMPLEMENTED, True)


async def test_a_stream_needs_a_call_that_gives_one() -> None:
    async def plain(request: Request, /) -> Response:
        return Response()

    feeding = client(Feed, plain)
    with pytest.raises(MisuseError, match="a layer has answered it itself"):
        await anext(feeding.count(1))
    with pytest.raises(MisuseError, match="a layer has answered it itself"):
        await feeding.add(Source().points())


async def test_a_stream_that_nobody_holds_is_given_up() -> None:
    points = Points()
    async with feed(points) as feeding:
        answers = feeding.count(4)
        await anext(answers)
        del answers
        gc.collect()
        await settled()
        assert points.notes == ["count is over"]
