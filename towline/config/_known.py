"""What a configuration knows by name: layers, policies, transports, stores, keys and errors.

A kind is called as its class is, in lower case with hyphens. Add a class to the tables here when you add it to the
library; a test compares them with what `towline.layers`, `towline.policies` and `towline.transports` export.
"""

from __future__ import annotations

import builtins
import inspect
import math
import operator
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import partial, reduce
from pathlib import Path
from typing import Annotated, Any, Final, Optional, TypeVar, cast

import anyio
from pydantic import GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue

import towline.errors
from towline import layers, policies, transports
from towline.endpoint import Endpoint
from towline.errors import EndpointError, KeyFileError
from towline.layers.encryption._files import expand
from towline.layers.encryption.keys import AllowList, KnownHosts, Psk, StaticKey, StaticKeys, Trust
from towline.layers.resume import MemoryStore
from towline.policies import (
    Backoff,
    BreakerPolicy,
    Budget,
    Errors,
    Failover,
    Jitter,
    PeakEwma,
    Percentile,
    Policy,
    Rate,
    StandardPolicy,
)
from towline.policies.jitter import JITTERS
from towline.text import MASK
from towline.transport import Transport
from towline.units import FilePath, Seconds, Unit

from ._kinds import NONE, TYPES, Choice, CodeOnly, Kind, Record, Text, did_you_mean, refuse, schema_of
from ._shapes import is_list, is_table
from ._text import Duration, EndpointText, Size, shown

__all__ = ["LAYERS", "POLICIES", "TRANSPORTS", "PathText", "PortText"]

K = TypeVar("K")


def _kinds(*classes: type, **more: Kind) -> dict[str, Kind]:
    found = {_name(each): Kind(_name(each), each, each) for each in classes}
    return {**found, **{kind.name: kind for kind in more.values()}}


def _name(cls: type) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", cls.__name__).lower()


# --- plain values ---------------------------------------------------------------------------------------------------


def _read_whole(value: Any, folder: str | None) -> int:
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,18}", value.strip()):
        value = int(value)  # as the environment has it
    if isinstance(value, bool) or not isinstance(value, int):
        refuse("int", "expected a whole number")
    return value


def _read_flag(value: Any, folder: str | None) -> bool:
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        value = value.strip().lower() == "true"  # as the environment has it
    if not isinstance(value, bool):
        refuse("flag", "expected true or false")
    return value


def _read_number(value: Any, folder: str | None) -> float:
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,18}(\.[0-9]{1,18})?", value.strip()):
        value = float(value)  # as the environment has it
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        refuse("number", "expected a number")
    return value


def _write_flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError("a function, say, which says it of each request")
    return value


def _read_mode(value: Any, folder: str | None) -> int:
    match = re.fullmatch(r"(0o?)?[0-7]{3}", value) if isinstance(value, str) else None
    if match is None:
        refuse("file_mode", "expected permissions such as '0600', as text")  # the number 600 is 0o1130
    return int(match[0].removeprefix("0o"), 8)


def _read_path(value: Any, folder: str | None) -> str:
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(cast("str", value)):
        refuse("path", "expected the path of a file")
    try:
        path = expand(cast("str", value))
    except KeyFileError as error:
        refuse("path", str(error))
    return str(path if folder is None else Path(folder, path))


def _read_uids(value: Any, folder: str | None) -> Any:
    if value == "any":
        return value
    if value is None or value == NONE:
        return None
    if not isinstance(value, (list, tuple, set, frozenset)):
        refuse("uids", "expected a list of the numbers of users, or 'any'")
    return frozenset(_read_whole(each, folder) for each in cast("Iterable[Any]", value))


def _read_port(value: Any, folder: str | None) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        refuse("port", "expected a port, or an address and a port")
    return str(value)


def _write_uids(uids: Any) -> Any:
    if uids is None:
        return NONE
    return uids if isinstance(uids, str) else sorted(uids)


def _plain(schema: JsonSchemaValue) -> Callable[[GetJsonSchemaHandler], JsonSchemaValue]:
    return lambda handler: dict(schema)


_WHOLE = Annotated[int, Text(_read_whole, int, _plain({"type": "integer"}))]

_FLAG = Annotated[bool, Text(_read_flag, _write_flag, _plain({"type": "boolean"}))]

_NUMBER = Annotated[float, Text(_read_number, float, _plain({"type": "number"}))]

_MODE = Annotated[
    int, Text(_read_mode, lambda mode: f"{mode:04o}", _plain({"type": "string", "pattern": "^(0o?)?[0-7]{3}$"}))
]

PathText = Annotated[str, Text(_read_path, os.fspath, _plain({"type": "string", "description": "The path of a file."}))]

PortText = Annotated[
    str,
    Text(_read_port, str, _plain({"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 0, "maximum": 65535}]})),
]

_UIDS = Annotated[
    Any,
    Text(
        _read_uids,
        _write_uids,
        _plain({"anyOf": [{"enum": ["any", NONE]}, {"type": "array", "items": {"type": "integer"}}]}),
    ),
]

# --- errors ---------------------------------------------------------------------------------------------------------

ERRORS: Final[Mapping[str, Any]] = {
    **{
        name: each
        for module in (builtins, anyio, towline.errors)
        for name, each in vars(module).items()
        if isinstance(each, type) and issubclass(each, Exception) and not issubclass(each, Warning)
    },
    "says_retryable": policies.says_retryable,
    "is_transient": policies.is_transient,
    "speaks_of_target": layers.speaks_of_target,
}
"""Those of Python, of anyio and of this library, and the functions that say so of an error."""


def _read_errors(value: Any, folder: str | None) -> Any:
    if isinstance(value, str):
        return _read_error(value)
    if is_list(value):
        return tuple(map(_read_error, value))
    return _read_error(value)


def _read_error(value: Any) -> Any:
    if isinstance(value, str):
        if value not in ERRORS:
            refuse("error", f"there is no error {shown(value)}: {did_you_mean(value, ERRORS)}")
        return ERRORS[value]
    if value not in ERRORS.values():
        refuse("error", "expected the name of an error, or a list of such")
    return value


def _write_errors(errors: Any) -> Any:
    if is_list(errors):
        return [_write_errors(each) for each in errors]
    for name, each in ERRORS.items():
        if each is errors:
            return name
    raise CodeOnly(f"{getattr(errors, '__name__', errors)!r} is no error that a configuration knows")


_ONE_ERROR: Final = {"enum": sorted(ERRORS)}
_ERRORS = Annotated[
    Any,
    Text(_read_errors, _write_errors, _plain({"anyOf": [_ONE_ERROR, {"type": "array", "items": _ONE_ERROR}]})),
]

# --- keys -----------------------------------------------------------------------------------------------------------

_A_KEY: Final = 'a key: { file = "PATH" } or { env = "NAME" }'


def _source(value: Any, what: str) -> tuple[str, str]:
    """The one entry of a table that says where a key is."""
    if is_table(value) and len(value) == 1:
        [(name, where)] = value.items()
        if name in ("file", "env") and isinstance(where, str) and where:
            return name, where
    refuse("key", f"expected {what}")


def _read_psk(value: Any, folder: str | None) -> Psk:
    if isinstance(value, Psk):
        return value
    if isinstance(value, str):
        if value and not value.strip("*"):
            refuse("key", "that is a mask, as it stands in what was printed; the key itself is needed")
        return _key(lambda: Psk.from_base64(value))
    source, where = _source(value, f"{_A_KEY}, or the key itself, in base64 or hexadecimal")
    return _key(lambda: Psk.from_env(where) if source == "env" else Psk.from_file(_read_path(where, folder)))


def _read_static(value: Any, folder: str | None) -> StaticKey:
    if isinstance(value, StaticKey):
        return value
    source, where = _source(value, '{ file = "PATH" }, a key pair as towline keygen --static writes it')
    if source != "file":
        refuse("key", "a key pair is read from a file")
    return _key(lambda: StaticKey.from_file(_read_path(where, folder)))


def _key(read: Callable[[], K]) -> K:
    try:
        return read()
    except KeyFileError as error:
        refuse("key", str(error))


def _write_key(key: Psk | StaticKey) -> Any:
    """Where it is from; a key that is from nowhere cannot be written, and what was printed cannot be read again."""
    return MASK if key.source is None else dict(key.source)


def _key_schema(*sources: str, is_itself: bool) -> Callable[[GetJsonSchemaHandler], JsonSchemaValue]:
    tables: list[JsonSchemaValue] = [
        {"type": "object", "properties": {each: {"type": "string"}}, "required": [each], "additionalProperties": False}
        for each in sources
    ]
    return _plain({"anyOf": [*tables, {"type": "string", "writeOnly": True}] if is_itself else tables})


_PSK = Annotated[Psk, Text(_read_psk, _write_key, _key_schema("file", "env", is_itself=True))]
_STATIC_KEY = Annotated[StaticKey, Text(_read_static, _write_key, _key_schema("file", is_itself=False))]


def _allow_list(*, file: FilePath | None = None, keys: tuple[str, ...] | None = None) -> AllowList:
    """The peers that may connect: a file of their public keys, or these."""
    if (file is None) == (keys is None):
        raise ValueError("an allow-list has a file, or keys")
    return AllowList(keys or ()) if file is None else AllowList.from_file(file)


def _read_allow_list(trust: AllowList) -> dict[str, Any]:
    if trust.path is not None:
        return {"file": str(trust.path)}
    from towline.layers.encryption.trust import public_line

    return {"keys": tuple(public_line(peer.public_key, peer.name) for peer in trust)}


TRUSTS: Final = Choice(
    "trust",
    lambda cls: issubclass(cls, Trust),
    _kinds(KnownHosts, allow_list=Kind("allow-list", AllowList, _allow_list, _read_allow_list)),
)

# --- policies -------------------------------------------------------------------------------------------------------


def _backoff(name: str) -> Kind:
    """A series of delays, by the name of its constructor; what can be done to any backoff are further options."""
    constructor: Callable[..., Backoff] = getattr(Backoff, name)
    own = inspect.signature(constructor)

    def make(*delays: float, take: int | None = None, until: float | None = None, **options: Any) -> Backoff:
        cap = options.pop("cap", own.parameters["cap"].default if "cap" in own.parameters else None)
        if "cap" in own.parameters:
            options["cap"] = math.inf
        backoff = constructor(*delays, **options)
        return _ended(backoff if cap is None else backoff.cap(cap), take, until)

    parameters = dict(own.parameters)
    seconds_or_none: Any = Optional[Seconds]  # noqa: UP045 -- the other way of writing it makes pyright doubt
    further: tuple[tuple[str, Any, Any], ...] = (
        ("cap", seconds_or_none, own.parameters["cap"].default if "cap" in own.parameters else None),
        ("take", int | None, None),
        ("until", seconds_or_none, None),
    )
    for each, annotation, default in further:
        parameters[each] = inspect.Parameter(
            each, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
        )
    signed = _signed(make, constructor, own.replace(parameters=list(parameters.values())))
    return Kind(name, Backoff, signed, _read_backoff, matches=lambda value: _series(value) == name)


def _signed(make: Callable[..., Any], like: Callable[..., Any], signature: inspect.Signature) -> Callable[..., Any]:
    make.__module__ = like.__module__  # where the names in its annotations mean something
    make.__signature__ = signature  # type: ignore[attr-defined]
    return make


def _series(value: object) -> str | None:
    if not isinstance(value, Backoff):
        return None
    return "chain" if isinstance(value._source, tuple) else value._source.series.name


def _chain(*, parts: tuple[Backoff, ...], take: int | None = None, until: Seconds | None = None) -> Backoff:
    """One backoff after another."""
    if len(parts) < 2:
        raise ValueError("parts are two backoffs or more, one after the other")
    return _ended(reduce(operator.add, parts), take, until)


def _ended(backoff: Backoff, take: int | None, until: float | None) -> Backoff:
    if take is not None:
        backoff = backoff.take(take)
    return backoff if until is None else backoff.until(until)


def _read_backoff(backoff: Backoff) -> dict[str, Any]:
    ends = {"take": backoff._count, "until": None if backoff._total == math.inf else backoff._total}
    leaf = backoff._source
    if isinstance(leaf, tuple):
        return {"parts": leaf, **ends}
    names = {"values": "delays", "increment": "step"}
    law: Any = leaf.series  # a dataclass, each of them
    series = {names.get(each.name, each.name): getattr(law, each.name) for each in fields(law)}
    jitter = next((name for name, each in JITTERS.items() if each == leaf.jitter), leaf.jitter)
    return {**series, "cap": None if leaf.cap == math.inf else leaf.cap, "jitter": jitter, **ends}


_SERIES: Final = (
    "constant",
    "of",
    "linear",
    "polynomial",
    "exponential",
    "fibonacci",
    "random",
    "decorrelated",
    "smooth",
)

BACKOFFS: Final = Choice(
    "backoff",
    lambda cls: issubclass(cls, Backoff),
    {
        **{name: _backoff(name) for name in _SERIES},
        "chain": Kind("chain", Backoff, _chain, _read_backoff, matches=lambda value: _series(value) == "chain"),
    },
)

BUDGETS: Final = Choice(
    "budget",
    lambda cls: issubclass(cls, Budget),
    _kinds(
        policies.TpsBudget, policies.TokenRatioBudget, policies.ConcurrencyBudget, policies.Unlimited, policies.Empty
    ),
    "towline.policies",
)

RATES: Final = Choice(
    "rate", lambda cls: issubclass(cls, Rate), _kinds(policies.Gcra, policies.FixedWindow), "towline.policies"
)


def _read_failover(failover: Failover) -> dict[str, Any]:
    plain = Failover(["tcp://localhost:1"])
    code = {name: getattr(failover, name) for name in ("where", "change")}
    return {
        "endpoints": failover.endpoints,
        "policy": failover.policy if failover.policy != plain.policy else None,
        "cluster": failover.cluster,
        **{name: None if each is getattr(plain, name) else each for name, each in code.items()},
    }


POLICIES: Final = Choice(
    "policy",
    lambda cls: callable(getattr(cls, "session", None)),
    {
        **_kinds(StandardPolicy),
        "failover": Kind("failover", Failover, Failover, _read_failover, types={"endpoints": tuple[EndpointText, ...]}),
        **BACKOFFS.own,
    },
    "towline.policies",
)

# --- stores ---------------------------------------------------------------------------------------------------------


def _store(name: str, cls: type) -> Kind:
    """A store is made by its server, so what is configured is how."""

    def make(**options: Any) -> Callable[[], Any]:
        cls(**options)  # so that what is wrong with them is found now
        return partial(cls, **options) if options else cls

    def read(value: Any) -> Mapping[str, Any]:
        return value.keywords if isinstance(value, partial) else {}

    def matches(value: object) -> bool:
        return value is cls or (isinstance(value, partial) and value.func is cls and not value.args)

    return Kind(name, cls, _signed(make, cls, inspect.signature(cls)), read, matches=matches)


STORES: Final = Choice(
    "store",
    lambda cls: all(callable(getattr(cls, each, None)) for each in ("add", "get", "bury", "to_evict")),
    {"memory": _store("memory", MemoryStore)},
    "towline.stores",
    _store,
)

_A_STORE = Annotated[Any, STORES]

# --- layers and transports ------------------------------------------------------------------------------------------


def _record(cls: type, **types: Any) -> Any:
    return Annotated[cls, Record(Kind("", cls, cls, types=types))]


_OF_UNIX: Final[Mapping[str, Any]] = {"allow_uids": _UIDS, "listener_uids": _UIDS}

TRANSPORTS: Final = Choice(
    "transport",
    lambda cls: issubclass(cls, Transport),
    {
        **_kinds(transports.Tcp, transports.Stdio, transports.Pipe, transports.Memory),
        "unix": Kind("unix", transports.Unix, transports.Unix, types=_OF_UNIX),
        "fd": Kind(
            "fd",
            transports.Fd,
            transports.Fd,
            types={
                "tcp": _record(transports.Tcp),
                "unix": _record(transports.Unix, allow_uids=_UIDS, listener_uids=_UIDS),
            },
        ),
    },
    "towline.transports",
)


def _read_target(value: Any, folder: str | None) -> str:
    try:
        return str(Endpoint.parse(value))
    except (EndpointError, TypeError, AttributeError) as error:
        refuse("endpoint", str(error))


_TARGET = Annotated[str, Text(_read_target, str, lambda handler: schema_of(EndpointText, handler))]

LAYERS: Final = Choice(
    "layer",
    lambda cls: callable(getattr(cls, "connector", None)) or "__call__" in vars(cls),
    {
        **_kinds(
            layers.Buffer,
            layers.CircuitBreaker,
            layers.ConcurrencyLimit,
            layers.Deadline,
            layers.Either,
            layers.Encryption,
            layers.Fallback,
            layers.Filter,
            layers.Framing,
            layers.Heartbeat,
            layers.Hedge,
            layers.Lines,
            layers.LoadShed,
            layers.RateLimit,
            layers.Retry,
            layers.Rpc,
            layers.Timeout,
            layers.Tls,
        ),
        "reconnect": Kind(
            "reconnect", layers.Reconnect, layers.Reconnect, types={"target": _TARGET}, filled=("target",)
        ),
        "resume": Kind("resume", layers.Resume, layers.Resume, types={"new_store": _A_STORE}),
    },
    "towline.layers",
)


# How a type in an annotation of the library is said in text. What is not here is for code only.
TYPES.update(
    {
        int: _WHOLE,
        bool: _FLAG,
        float: _NUMBER,
        Unit.SECONDS: Duration,
        Unit.BYTES: Size,
        Unit.FILE_MODE: _MODE,
        Unit.FILE_PATH: PathText,
        Errors: _ERRORS,
        type[Exception]: _ERRORS,  # what is left of Errors in a union
        Psk: _PSK,
        StaticKey: _STATIC_KEY,
        Trust: Annotated[Trust, TRUSTS],
        StaticKeys: _record(StaticKeys),
        layers.TlsClient: _record(layers.TlsClient),
        layers.TlsServer: _record(layers.TlsServer),
        Backoff: Annotated[Backoff, BACKOFFS],
        Policy: Annotated[Any, POLICIES],
        Policy | Backoff: Annotated[Any, POLICIES],
        Budget: Annotated[Budget, BUDGETS],
        Rate: Annotated[Rate, RATES],
        Jitter: _record(Jitter),
        BreakerPolicy: _record(BreakerPolicy),
        Percentile: _record(Percentile),
        PeakEwma: _record(PeakEwma),
    }
)
