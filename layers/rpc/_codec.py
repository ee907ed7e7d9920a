"""Values as bytes: how the bodies of typed calls are written and read. No I/O here.

A codec makes a `Coder` for each type once, so that a type which it cannot carry is found when a client or a router is
made, and not by a call.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from importlib import import_module
from types import NoneType
from typing import Any, Final, Generic, Literal, Protocol, TypedDict, TypeVar, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUndefinedAnnotation, PydanticUserError

from towline.errors import MisuseError

__all__ = ["JSON", "Codec", "Coder", "DecodeError", "JsonCodec", "MsgspecCodec", "Problem", "coder_of"]

T = TypeVar("T")

MAX_PROBLEMS: Final = 1_000
"""Of a body with more problems none is listed: 4 MiB can have two million, and their list takes a gigabyte."""

MAX_REPORT: Final = 16 << 10
"""The most bytes in a report. The details of an error are 64 KiB at most."""

MAX_TEXT: Final = 200
"""The most characters in one text of a report, and `MAX_DEPTH` the most parts of a path: a body may choose its keys."""

MAX_DEPTH: Final = 16


class Problem(TypedDict):
    """What is wrong at one place of a body. It says what is expected there, never what was found."""

    loc: list[str | int]
    """The way to the place, from the outside in."""

    msg: str
    """For people."""

    type: str
    """For programs, in the words of pydantic or msgspec."""


class DecodeError(ValueError):
    """Bytes that are no value of the type that is expected. It holds nothing of the bytes themselves.

    Attributes:
        problems: what is wrong with them; none where there are too many to list.
        total: how many problems there are.

    >>> print(DecodeError([{"loc": ["users", 0, "age"], "msg": "Field required", "type": "missing"}], 3))
    users.0.age: Field required (and 2 more)
    """

    def __init__(self, problems: Sequence[Problem] = (), total: int | None = None) -> None:
        self.problems = tuple(problems)
        self.total = len(self.problems) if total is None else total
        super().__init__(self.problems, self.total)

    def __str__(self) -> str:
        if not self.problems:
            return f"{self.total:,} problems" if self.total else "it cannot be read"
        first = self.problems[0]
        place = ".".join(map(str, first["loc"]))
        more = f" (and {self.total - 1:,} more)" if self.total > 1 else ""
        return f"{place}{': ' if place else ''}{first['msg']}{more}"

    def report(self) -> bytes:
        """The problems as a JSON array, as many as 16 KiB hold."""
        shown: list[str] = []
        room = MAX_REPORT
        for problem in self.problems:
            text = json.dumps(problem)
            room -= len(text) + 2
            if room < 0:
                break
            shown.append(text)
        return f"[{', '.join(shown)}]".encode()


@dataclass(frozen=True, slots=True)
class Coder(Generic[T]):
    """Writes and reads the values of one type.

    Attributes:
        encode: gives the bytes of a value. Raises MisuseError if it is of another type.
        decode: gives the value of the bytes. Raises `DecodeError`, or another ValueError, if there is none: whatever
            else it raises counts as a mistake of this side's.
    """

    encode: Callable[[T], bytes]
    decode: Callable[[bytes], T]


class Codec(Protocol):
    """How values travel. Both ends must use the same.

    It is hashable, since what it makes is kept.

    >>> class Text:
    ...     def coder(self, kind: object, /) -> Coder[str]:
    ...         return Coder(str.encode, bytes.decode)
    >>> from towline.layers.rpc import Typed
    >>> Typed("shout", str, str, codec=Text()).method
    'shout'
    """

    # Any: what may stand behind a parameter (``list[int] | None``), for which checkers have no word yet.
    def coder(self, kind: Any, /) -> Coder[Any]:
        """What writes and reads the values of a type.

        Raises:
            TypeError: if this codec cannot carry them.
        """
        ...


@dataclass(frozen=True, slots=True)
class JsonCodec:
    """Codec: JSON, written and checked by pydantic; by msgspec where a type has one of its structs.

    Pydantic knows its models, dataclasses, TypedDicts, unions, collections and much of the standard library. Aliases
    are used in both directions, and a model's own settings count.

    >>> coder = JsonCodec().coder(dict[str, int])
    >>> coder.encode({"a": 1})
    b'{"a":1}'
    >>> coder.decode(b'{"a":"x"}')
    Traceback (most recent call last):
    ...
    towline.layers.rpc._codec.DecodeError: a: Input should be a valid integer, unable to parse string as an integer
    """

    def coder(self, kind: Any, /) -> Coder[Any]:
        """What writes and reads the values of a type.

        Raises:
            TypeError: if pydantic cannot carry them.
        """
        return MsgspecCodec().coder(kind) if _has_struct(kind) else _pydantic_coder(kind)


@dataclass(frozen=True, slots=True)
class MsgspecCodec:
    """Codec: JSON or MessagePack, written and checked by msgspec, which is to be installed beside Towline.

    It knows its structs, dataclasses, attrs classes, TypedDicts, unions, collections and much of the standard library.
    It is faster than `JsonCodec`, and a bad body is reported up to its first problem only.

    Args:
        format: what is on the wire.
    """

    format: Literal["json", "msgpack"] = "json"

    def coder(self, kind: Any, /) -> Coder[Any]:
        """What writes and reads the values of a type.

        Raises:
            TypeError: if msgspec cannot carry them.
            ImportError: if it is not installed.
        """
        return _msgspec_coder(kind, self.format)


JSON: Final = JsonCodec()


def coder_of(codec: Codec, kind: Any) -> Coder[Any]:
    """What writes and reads the values of a type in a call: nothing is no bytes, and bytes are what they are.

    Raises:
        TypeError: if ``codec`` cannot carry them.
    """
    if kind is None or kind is NoneType:
        return Coder(_checked(NoneType, lambda value: b""), lambda data: None)
    if kind is bytes:
        return Coder(_checked(bytes, bytes), bytes)
    return codec.coder(kind)


def _checked(kind: type, encode: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    def encode_checked(value: Any) -> bytes:
        if not isinstance(value, kind):
            raise _misfit(value, kind)
        return encode(value)

    return encode_checked


def _misfit(value: object, kind: Any) -> MisuseError:
    expected = getattr(kind, "__name__", None) if isinstance(kind, type) else None
    return MisuseError(f"a value of type {type(value).__name__}, where {expected or kind} is to be sent")


def _record(kind: Any) -> type:
    """What a value must be an instance of, for a type that is a class of records; object for any other.

    Neither pydantic nor msgspec looks at the class of what it writes, if only it has the fields.
    """
    generic: dict[str, Any] = getattr(kind, "__pydantic_generic_metadata__", {})
    origin: Any = generic.get("origin") or get_origin(kind) or kind  # a Page() is a Page[User], too
    if isinstance(origin, type) and (
        hasattr(origin, "__pydantic_fields__") or is_dataclass(origin) or _has_struct(origin)
    ):
        return origin  # pyright: ignore[reportUnknownVariableType]
    return object


def _short(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "..."


# --- pydantic ------------------------------------------------------------------------------------------------------


def _pydantic_coder(kind: Any) -> Coder[Any]:
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(kind)
        adapter.rebuild()  # now, if a name in it was not known
    except (PydanticUserError, PydanticUndefinedAnnotation) as error:
        raise TypeError(f"pydantic makes no JSON of {kind}: {error.message}") from error
    # Not the adapter's own methods, which cost a fifth of a typed call.
    write, read = adapter.serializer.to_json, adapter.validator.validate_json
    record = _record(kind)

    def encode(value: Any) -> bytes:
        if not isinstance(value, record):
            raise _misfit(value, kind)
        try:
            # What is written must be what the other end reads: so by alias, and without what is computed from the rest.
            return write(value, by_alias=True, round_trip=True, warnings="error")
        except ValueError as error:  # pydantic's own is one, and has no public name
            raise _misfit(value, kind) from error

    def decode(data: bytes) -> Any:
        try:
            return read(data)
        except ValidationError as error:
            raise DecodeError([*_problems(error)], error.error_count()) from None  # it holds the bytes

    return Coder(encode, decode)


def _problems(error: ValidationError) -> Iterator[Problem]:
    if error.error_count() > MAX_PROBLEMS:
        return
    for each in error.errors(include_url=False, include_context=False, include_input=False):
        loc = [_short(part) if isinstance(part, str) else part for part in each["loc"][:MAX_DEPTH]]
        yield Problem(loc=loc, msg=_short(each["msg"]), type=each["type"])


# --- msgspec -------------------------------------------------------------------------------------------------------


def _has_struct(kind: Any) -> bool:
    """Whether a type is a struct of msgspec's, or one is named in it. Then msgspec has been imported."""
    msgspec: Any = sys.modules.get("msgspec")
    if msgspec is None:
        return False
    return (isinstance(kind, type) and issubclass(kind, msgspec.Struct)) or any(map(_has_struct, get_args(kind)))


def _msgspec_coder(kind: Any, format: str) -> Coder[Any]:
    # Any, and not imported in the ordinary way: types are checked where msgspec is not installed, too.
    msgspec: Any = import_module("msgspec")
    module: Any = import_module(f"msgspec.{format}")
    write: Callable[[Any], bytes] = module.Encoder().encode
    try:
        read: Callable[[bytes], Any] = module.Decoder(kind).decode
        is_unknown = isinstance(msgspec.inspect.type_info(kind), msgspec.inspect.CustomType)
    except (TypeError, RuntimeError) as error:  # RuntimeError: RecursionError
        raise TypeError(f"msgspec cannot carry {kind}: {error}") from error
    if is_unknown:
        raise TypeError(f"msgspec cannot carry {kind}: it is of none of the kinds that msgspec knows")

    record = _record(kind)

    def encode(value: Any) -> bytes:
        if not isinstance(value, record):
            raise _misfit(value, kind)
        try:
            return write(value)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise _misfit(value, kind) from error

    def decode(data: bytes) -> Any:
        try:
            return read(data)
        except msgspec.ValidationError as error:
            raise DecodeError([Problem(loc=[], msg=_short(str(error)), type="invalid")]) from None
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            # Here a text may name what was found.
            raise DecodeError([Problem(loc=[], msg=_short(str(error)), type="malformed")]) from None

    return Coder(encode, decode)
