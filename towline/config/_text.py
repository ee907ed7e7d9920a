"""Durations, sizes and endpoints as text: for each one grammar, one error and one JSON Schema."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Annotated, Any, Final, LiteralString, TypeAlias, TypeVar

from pydantic import PlainSerializer, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from towline.endpoint import FORMS, Endpoint
from towline.errors import EndpointError

__all__ = [
    "Duration",
    "EndpointText",
    "Size",
    "format_duration",
    "format_size",
    "parse_duration",
    "parse_size",
    "shown",
]

T = TypeVar("T")

SHOWN: Final = 24
"""The longest text that is shown where it is wrong."""

_NUMBER: Final = r"[0-9]{1,30}(?:\.[0-9]{1,400})?"
"""As many digits as any number in range has, whatever was written: more would take a while to read."""

# --- durations ------------------------------------------------------------------------------------------------------

MAX_DURATION: Final = 100 * 365 * 86_400
"""A hundred years, in seconds. What is longer is a slip, and more than some event loops can wait."""

_LENGTHS: Final[Mapping[str, Fraction]] = {
    "d": Fraction(86_400),
    "h": Fraction(3_600),
    "m": Fraction(60),
    "s": Fraction(1),
    "ms": Fraction(1, 1_000),
    "us": Fraction(1, 1_000_000),
}
"""In seconds; longest first, as they follow one another."""

_DURATION: Final = "".join(rf"(?:({_NUMBER}){unit})?" for unit in _LENGTHS)

_A_DURATION: Final = "a duration such as '250ms', '5s', '1m30s' or '2h'"


def parse_duration(value: object) -> float:
    """Seconds, from text or from a number of seconds.

    Raises:
        ValueError: if it is anything else, below zero, or above a hundred years.

    >>> parse_duration("250ms"), parse_duration("1m30s"), parse_duration(5)
    (0.25, 90.0, 5)
    >>> parse_duration("5")
    Traceback (most recent call last):
    ...
    ValueError: expected a duration such as '250ms', '5s', '1m30s' or '2h', got '5': is it '5s'?
    """
    seconds = value
    if isinstance(value, str):
        text = value.strip()
        match = re.fullmatch(_DURATION, text)
        if not text or match is None:
            hint = f": is it '{text}s'?" if re.fullmatch(_NUMBER, text) else ""
            raise ValueError(f"expected {_A_DURATION}, got {shown(value)}{hint}")
        parts = zip(match.groups(), _LENGTHS.values(), strict=True)
        # Exact until the end: so 250ms is the same number as 0.25s.
        seconds = float(sum(Fraction(count) * length for count, length in parts if count is not None))
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise ValueError(f"expected {_A_DURATION}, or a number of seconds, got {shown(value)}")
    if not 0 <= seconds <= MAX_DURATION:
        raise ValueError(f"expected {_A_DURATION}, from 0 s to a hundred years, got {shown(value)}")
    return seconds


def format_duration(seconds: float) -> str:
    """Text that `parse_duration` reads as exactly this, in the units that people use.

    >>> [format_duration(seconds) for seconds in (0.25, 90, 7200, 1.5, 0)]
    ['250ms', '1m30s', '2h', '1.5s', '0s']
    """
    if not 0 <= seconds <= MAX_DURATION:
        raise ValueError(f"{seconds} s is no duration that can be written: from 0 s to a hundred years")
    exact = Decimal(repr(float(seconds)))  # the shortest decimal that means this number
    if seconds < 1 and exact:
        for unit, scale in (("ms", 1_000), ("us", 1_000_000)):
            scaled = exact * scale
            if scaled == scaled.to_integral_value():
                return f"{int(scaled)}{unit}"
    if exact != exact.to_integral_value() or not exact:
        return f"{exact.normalize():f}s"
    left, text = int(exact), ""
    for unit, length in _LENGTHS.items():
        if length >= 1:
            count, left = divmod(left, int(length))
            text += f"{count}{unit}" if count else ""
    return text


# --- sizes ----------------------------------------------------------------------------------------------------------

MAX_SIZE: Final = (1 << 63) - 1
"""What fits a number of 64 bits with a sign, as counts of bytes do everywhere."""

_BYTES: Final[Mapping[str, int]] = {
    "TiB": 1 << 40,
    "GiB": 1 << 30,
    "MiB": 1 << 20,
    "KiB": 1 << 10,
    "TB": 10**12,
    "GB": 10**9,
    "MB": 10**6,
    "kB": 10**3,
    "B": 1,
}

_A_SIZE: Final = "a size such as '64KiB', '16MiB' or '1GB', or a number of bytes"


def parse_size(value: object) -> int:
    """Bytes, from text or from a number of bytes. KiB, MiB, GiB are powers of 1,024; kB, MB, GB of 1,000.

    Raises:
        ValueError: if it is anything else, no whole number of bytes, or more than 64 bits hold; or could mean two
            things, as ``64k`` does.

    >>> parse_size("64KiB"), parse_size("1.5 MiB"), parse_size("4096"), parse_size("64kB")
    (65536, 1572864, 4096, 64000)
    >>> parse_size("64k")
    Traceback (most recent call last):
    ...
    ValueError: expected a size such as '64KiB', '16MiB' or '1GB', or a number of bytes, got '64k': is it '64KiB' (of \
1,024 bytes) or '64kB' (of 1,000)?
    """
    size: object = value
    if isinstance(value, str):
        match = re.fullmatch(rf"({_NUMBER}) *([A-Za-z]*)", value.strip())
        length = None if match is None else _BYTES.get(match[2] or "B")
        if match is None or length is None:
            raise ValueError(f"expected {_A_SIZE}, got {shown(value)}{_units_hint(match)}")
        exact = Fraction(match[1]) * length
        if exact.denominator != 1:
            raise ValueError(f"expected {_A_SIZE}, got {shown(value)}: which is no whole number of bytes")
        size = int(exact)
    if isinstance(size, bool) or not isinstance(size, int):
        raise ValueError(f"expected {_A_SIZE}, got {shown(value)}")
    if not 0 <= size <= MAX_SIZE:
        raise ValueError(f"expected {_A_SIZE}, from 0 to 8 EiB, got {shown(value)}")
    return size


def _units_hint(match: re.Match[str] | None) -> str:
    if match is None:
        return ""
    letter = match[2][0].upper()
    if match[2].upper() not in (letter, letter + "B", letter + "IB") or letter not in "KMGT":
        return ""
    decimal = "kB" if letter == "K" else f"{letter}B"
    one, other = (f"{base ** ('KMGT'.index(letter) + 1):,}" for base in (1024, 1000))
    return f": is it '{match[1]}{letter}iB' (of {one} bytes) or '{match[1]}{decimal}' (of {other})?"


def format_size(size: int) -> str:
    """Text that `parse_size` reads as exactly this, in the largest unit of 1,024 that goes.

    >>> format_size(64 << 10), format_size(1_000_000), format_size(0)
    ('64KiB', '1000000B', '0B')
    """
    for unit, length in _BYTES.items():
        if unit.endswith("iB") and size and size % length == 0:
            return f"{size // length}{unit}"
    return f"{size}B"


# --- endpoints ------------------------------------------------------------------------------------------------------


def _parse_endpoint(value: object) -> Endpoint:
    if not isinstance(value, (str, Endpoint)):
        raise ValueError(f"expected an endpoint such as {FORMS['tcp']}, got {shown(value)}")
    return Endpoint.parse(value)


# --- as types -------------------------------------------------------------------------------------------------------


def shown(value: object) -> str:
    """What is wrong, for a message. A long text is not shown: it is no slip, and may be a key."""
    if isinstance(value, str) and len(value) > SHOWN:
        return f"a text of {len(value):,} characters"
    if value is None or isinstance(value, (str, int, float)):
        text = repr(value)
        return text if len(text) <= SHOWN + 2 else f"{text[:SHOWN]}..."
    return f"a {type(value).__name__}"


def _reads(parse: Callable[[object], T], kind: LiteralString) -> Any:
    def read(value: Any) -> T:
        try:
            return parse(value)
        except (ValueError, EndpointError) as error:
            # The text goes in as a value: braces in it are nobody's placeholders.
            raise PydanticCustomError(kind, "{problem}", {"problem": str(error)}) from None

    return PlainValidator(read)


Duration: TypeAlias = Annotated[
    float,
    _reads(parse_duration, "duration"),
    PlainSerializer(format_duration, return_type=str, when_used="json"),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": f"^{_DURATION}$", "minLength": 1},
                {"type": "number", "minimum": 0, "maximum": MAX_DURATION},
            ],
            "description": f"{_A_DURATION[0].upper()}{_A_DURATION[1:]}, or a number of seconds.",
            "examples": ["250ms", "5s", "1m30s", "2h"],
        }
    ),
]
"""Seconds. Reads what `parse_duration` does.

>>> from pydantic import TypeAdapter
>>> TypeAdapter(Duration).validate_python("1m30s")
90.0
>>> TypeAdapter(Duration).dump_json(0.25)
b'"250ms"'
"""

Size: TypeAlias = Annotated[
    int,
    _reads(parse_size, "size"),
    PlainSerializer(format_size, return_type=str, when_used="json"),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": f"^{_NUMBER} *({'|'.join(_BYTES)})?$"},
                {"type": "integer", "minimum": 0, "maximum": MAX_SIZE},
            ],
            "description": f"{_A_SIZE[0].upper()}{_A_SIZE[1:]}.",
            "examples": ["64KiB", "16MiB", "1GB"],
        }
    ),
]
"""Bytes. Reads what `parse_size` does."""

EndpointText: TypeAlias = Annotated[
    Endpoint,
    _reads(_parse_endpoint, "endpoint"),
    PlainSerializer(str, return_type=str),  # always: a dataclass would become a table, which is nobody's text
    WithJsonSchema(
        {
            "type": "string",
            "pattern": f"^({'|'.join(FORMS)})://",
            "description": f"One of {'; '.join(FORMS.values())}.",
            "examples": ["tcp://localhost:7000", "unix:///run/towline.sock"],
        }
    ),
]
"""An `Endpoint`, as `Endpoint.parse` reads it."""
