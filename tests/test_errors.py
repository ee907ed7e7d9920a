"""The errors: the tree that their module draws, what a policy reads from them, and what a message must show."""

from __future__ import annotations

import builtins
import copy
import inspect
import pickle
import re

import anyio
import pytest

from towline import errors
from towline.errors import (
    BufferFull,
    CallFailed,
    CallRejected,
    CircuitOpen,
    CloseIncomplete,
    ConfigError,
    ConnectFailed,
    ConnectionLost,
    DeadlineExceeded,
    Elapsed,
    Fault,
    Filtered,
    FrameTooLarge,
    HandshakeFailed,
    HandshakeRefused,
    HandshakeTimeout,
    LinkLost,
    LossReason,
    MessageTooLarge,
    Overloaded,
    ProtocolViolation,
    RateLimited,
    ServiceClosed,
    ServiceUnavailable,
    SessionLost,
    SessionTakenOver,
    StatusCode,
    TowlineError,
    UnknownHost,
)
from towline.layers.resume._client import Rejected
from towline.layers.resume._core import AckBeyondSent, StateMismatch
from towline.layers.resume._wire import Reject, RejectCode

CLASSES: dict[str, type[TowlineError]] = {
    name: value for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, TowlineError)
}

EXAMPLES: list[TowlineError] = [
    MessageTooLarge(5000, 4096),
    BufferFull(8_000_000, 8 << 20),
    ConfigError([Fault("expected a duration", "layers.0.ttl", "tunnel.toml", 6)]),
    FrameTooLarge(1 << 31, 16 << 20),
    HandshakeFailed("no", ended=True),
    HandshakeRefused("no"),
    HandshakeTimeout("not within 5 s"),
    SessionLost(
        LossReason.EXPIRED, delivered_upto=7, sent_upto=9, unacked=[b"eight", b"nine"], detail="after a long night"
    ),
    SessionTakenOver(delivered_upto=None, sent_upto=3, unacked=[b"x"]),
    CloseIncomplete(3),
    CallFailed(StatusCode.NOT_FOUND, "no user 7", details={"user": b"7"}, refused=True, retry_after=2.5),
    CallRejected("no"),
    Overloaded("10 calls of 10 are under way"),
    RateLimited("10 calls in 1 s", 0.25),
    CircuitOpen("5 failures of 10", 4.5),
    Filtered("not this one"),
    ServiceUnavailable("no endpoint"),
    Elapsed(2.5),
    DeadlineExceeded(0.0, sent=False),
    ServiceClosed("closed"),
    ConnectFailed("nothing listens"),
    UnknownHost("no such host"),
    LinkLost("cut"),
    Rejected(Reject(RejectCode.RETRY_LATER, 1500), authentic=True),
    Rejected(Reject(RejectCode.SESSION_CLOSED, recv_final=9), authentic=False),
    AckBeyondSent("9 of 8"),
    StateMismatch("they disagree"),
    *(CLASSES[name]("a message") for name in ("TowlineError", "MisuseError", "StackError", "EndpointError")),
    *(CLASSES[name]("a message") for name in ("KeyFileError", "ProtocolViolation", "NonceExhausted", "ConnectionLost")),
]


def drawn_tree() -> dict[str, str | None]:
    """Each class that the docstring draws, with the class it hangs from."""
    parents: dict[str, str | None] = {}
    stack: list[tuple[int, str]] = []
    for line in inspect.getdoc(errors).splitlines():  # type: ignore[union-attr]
        found = re.match(r"(?P<indent>[ │├└─]*)(?P<name>[A-Z]\w+)(?=\s{2,}|$)", line)
        if found is None or not (parents or found["name"] == "TowlineError"):
            continue
        depth = len(found["indent"])
        while stack and stack[-1][0] >= depth:
            stack.pop()
        parents[found["name"]] = stack[-1][1] if stack else None
        stack.append((depth, found["name"]))
    return parents


@pytest.mark.smoke
def test_the_tree_that_is_drawn_is_the_tree_of_the_classes() -> None:
    tree = drawn_tree()
    assert set(tree) == set(CLASSES)
    for name, parent in tree.items():
        bases = [base for base in CLASSES[name].__mro__[1:] if issubclass(base, TowlineError)]
        assert (bases[0].__name__ if bases else None) == parent, name


def test_what_the_tree_says_an_error_also_is_it_is() -> None:
    for line in inspect.getdoc(errors).splitlines():  # type: ignore[union-attr]
        for name, other in re.findall(r"([A-Z]\w+)  .*\(also (?:an? )?([\w.]+)\)", line):
            also = getattr(anyio, other.removeprefix("anyio."), None) or getattr(builtins, other)
            assert issubclass(CLASSES[name], also), line


def test_every_error_is_exported_and_says_what_it_means() -> None:
    assert set(errors.__all__) == {*CLASSES, "Fault", "LossReason", "StatusCode"}
    for cls in CLASSES.values():
        assert cls.__doc__, cls


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_a_copy_of_an_error_is_the_same_error(error: TowlineError) -> None:
    for fresh in (copy.copy(error), copy.deepcopy(error), pickle.loads(pickle.dumps(error))):
        assert type(fresh) is type(error)
        assert str(fresh) == str(error)
        assert fresh.retryable == error.retryable
        assert fresh.retry_after == error.retry_after
        assert vars(fresh) == vars(error)


def test_every_class_has_an_example_here() -> None:
    assert {type(error) for error in EXAMPLES} >= set(CLASSES.values())


@pytest.mark.parametrize(
    ("error", "numbers"),
    [
        (MessageTooLarge(5_000_000, 4_194_304), ["5,000,000", "4,194,304"]),
        (BufferFull(8_000_000, 8_388_608), ["8,000,000", "8,388,608"]),
        (FrameTooLarge(2_147_483_647, 4096), ["2,147,483,647", "4,096"]),
        (CloseIncomplete(3), ["3"]),
        (SessionLost(LossReason.EXPIRED, delivered_upto=7, sent_upto=9, unacked=[b"a", b"b"]), ["7", "9", "2"]),
    ],
)
def test_a_message_gives_both_numbers(error: TowlineError, numbers: list[str]) -> None:
    for number in numbers:
        assert number in str(error)


def test_no_message_or_repr_holds_what_was_sent() -> None:
    lost = SessionLost(LossReason.ABORTED, sent_upto=1, unacked=[b"a secret of the application"])
    assert b"secret".decode() not in str(lost) + repr(lost)
    assert lost.unacked == (b"a secret of the application",)


def test_a_loss_says_why_and_what_nobody_can_say() -> None:
    assert str(SessionLost(LossReason.UNKNOWN_SESSION, sent_upto=2, unacked=[b"x"], detail="restarted")) == (
        "the session is lost: the peer does not know it: it was restarted, or forgot it (restarted); "
        "sent up to message 2, delivered: nobody can say what was, not acknowledged: 1"
    )
    assert SessionTakenOver().reason is LossReason.TAKEN_OVER
    assert len({str(reason) for reason in LossReason}) == len(LossReason)


@pytest.mark.parametrize(
    ("error", "retryable", "retry_after"),
    [
        (LinkLost("cut"), True, None),
        (ConnectFailed("refused"), True, None),
        (UnknownHost("no such host"), False, None),
        (HandshakeFailed("a captive portal"), False, None),
        (HandshakeFailed("closed", ended=True), True, None),
        (HandshakeRefused("a wrong key"), False, None),
        (HandshakeTimeout("5 s"), True, None),
        (ProtocolViolation("a gap"), True, None),
        (MessageTooLarge(2, 1), False, None),
        (BufferFull(2, 1), True, None),
        (SessionLost(LossReason.EXPIRED), False, None),
        (Rejected(Reject(RejectCode.RETRY_LATER, 1500), authentic=True), True, 1.5),
        (Rejected(Reject(RejectCode.LIMIT), authentic=True), True, None),
        (Rejected(Reject(RejectCode.SESSION_EXPIRED, 1500), authentic=True), False, None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whether_trying_again_makes_sense_is_an_attribute(
    error: TowlineError, retryable: bool, retry_after: float | None
) -> None:
    assert error.retryable is retryable
    assert error.retry_after == retry_after


def test_an_anyio_users_except_clauses_work() -> None:
    assert issubclass(SessionLost, anyio.BrokenResourceError)
    assert issubclass(LinkLost, anyio.BrokenResourceError)
    assert issubclass(HandshakeFailed, anyio.ConnectionFailed)
    assert issubclass(ConnectFailed, OSError)  # by anyio.ConnectionFailed: decide by .retryable, never by this (D9)
    assert issubclass(BufferFull, anyio.WouldBlock)
    assert issubclass(ConnectionLost, TowlineError)
