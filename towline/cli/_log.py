"""What the program logs, to stderr: a line of text for people, or one JSON object a line for programs.

The library gives each record its fields by ``extra=``: ``event`` says what happened, the others to what. Text has only
the message; JSON has all of it.
"""

from __future__ import annotations

import enum
import json
import logging
import sys
import threading
from datetime import UTC, datetime
from typing import Final

from towline.text import printable, without_keys

__all__ = ["JsonFormatter", "LogFormat", "TextFormatter", "complain", "set_up_log"]

logger = logging.getLogger(__name__)

_OWN: Final = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "color_message"}
"""What every record has. The rest was given by ``extra=``."""

_RENAMED: Final = {"time", "level", "logger", "exception"}
"""Names that the object has already: a field of such a name is written with an underscore behind it."""

MAX_TEXT: Final = 16 << 10
"""The most characters of one text in a JSON record: what reads logs often drops a line of more than 64 KiB."""


class LogFormat(enum.StrEnum):
    """How a record is written."""

    TEXT = "text"
    JSON = "json"


class TextFormatter(logging.Formatter):
    """A record as text, whose message is one line, whatever a peer or a file has put into it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


class JsonFormatter(logging.Formatter):
    """A record as one line with one JSON object: time, level, logger, message, then its fields.

    Bytes are never shown, only counted: nothing that is logged has a use for them, and keys are bytes.

    >>> record = logging.makeLogRecord({"name": "towline", "levelname": "INFO", "msg": "it is %s", "args": ("cut",)})
    >>> record.created, record.event = 0.0, "session.detached"
    >>> print(JsonFormatter().format(record))
    {"time": "1970-01-01T00:00:00.000Z", "level": "info", "logger": "towline", "message": "it is cut", \
"event": "session.detached"}
    """

    def format(self, record: logging.LogRecord) -> str:
        try:
            return self._formatted(record)
        except Exception as error:  # arguments that do not fit the message, say: better half a record than no object
            broken = {"level": record.levelname.lower(), "logger": record.name, "message": str(record.msg)[:MAX_TEXT]}
            return json.dumps({**broken, "event": "log.failed", "reason": type(error).__name__})

    def _formatted(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC)
        fields: dict[str, object] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _bounded(record.getMessage()),
        }
        for name, value in vars(record).items():
            if name not in _OWN:
                fields[f"{name}_" if name in _RENAMED else name] = _plain(value)
        if record.exc_info and record.exc_info[1] is not None:
            fields["exception"] = _bounded(self.formatException(record.exc_info))
        return json.dumps(fields)  # in ASCII: whatever the stream's encoding is, and whatever a terminal understands


def _plain(value: object) -> object:
    match value:
        case None | bool() | int():
            return value
        case float():
            return value if abs(value) < float("inf") else str(value)  # JSON has no infinity, and no NaN
        case bytes() | bytearray():
            return f"<{len(value)} bytes>"
        case _:
            return _bounded(str(value))


def _bounded(text: str) -> str:
    # A lone surrogate, as in a file name that is no text, cannot be written to a stream of UTF-8.
    text = text.encode(errors="replace").decode()
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}... ({len(text):,} characters)"


def set_up_log(verbose: int, log_format: LogFormat = LogFormat.TEXT) -> None:
    """Log to stderr: what went wrong, or with -v what happens; below 0 only what is wrong with the program itself."""
    handler = logging.StreamHandler(sys.stderr)
    if log_format is LogFormat.JSON:
        handler.setFormatter(JsonFormatter())
        _log_all_else()
    else:
        style = "%(asctime)s %(levelname)s %(name)s: %(message)s" if verbose else "towline: %(message)s"
        handler.setFormatter(TextFormatter(style))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("towline").setLevel(logging.WARNING - 10 * min(verbose, 2))


def _log_all_else() -> None:
    """What Python itself writes to stderr becomes records, too: warnings, and what nobody has caught."""
    logging.captureWarnings(True)
    sys.excepthook = lambda kind, error, trace: _uncaught(error, "the program")
    threading.excepthook = lambda args: _uncaught(args.exc_value, "a thread")
    sys.unraisablehook = lambda args: _uncaught(args.exc_value, "what was being deleted")


def _uncaught(error: BaseException | None, where: str) -> None:
    logger.critical("%s failed: %s", where, error, exc_info=error, extra={"event": "program.uncaught"})


def complain(text: str) -> None:
    """The one line that says why the program ends, in the format that its log has.

    What was typed, or stands in a file, may be in it: so no key, and nothing that moves a terminal's cursor.
    """
    text = printable(without_keys(text))
    if any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers):
        logger.error("%s", text, extra={"event": "program.failed"})
    else:
        print(f"towline: {text}", file=sys.stderr)
