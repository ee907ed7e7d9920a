"""Which errors something applies to: said once, and in the same way everywhere."""

from __future__ import annotations

from typing import Any

import pytest

from towline.errors import LinkLost, Overloaded
from towline.policies.classify import excluder, matcher, says_retryable

BOTH = ExceptionGroup("both", [EOFError(), ExceptionGroup("inner", [ConnectionResetError()])])
MIXED = ExceptionGroup("mixed", [EOFError(), ExceptionGroup("inner", [ValueError()])])


def is_lost(error: Exception) -> bool:
    return isinstance(error, (EOFError, OSError))


def is_eof(error: Exception) -> bool:
    return isinstance(error, EOFError)


@pytest.mark.parametrize(
    "errors", [(EOFError, OSError), is_lost, (is_eof, OSError)], ids=["classes", "function", "both"]
)
def test_a_group_matches_when_all_its_leaves_do(errors: Any) -> None:
    matches = matcher(errors)
    assert matches(EOFError())
    assert matches(BOTH)
    assert not matches(MIXED)
    assert not matches(ValueError())


def is_value_error(error: Exception) -> bool:
    return isinstance(error, ValueError)


@pytest.mark.parametrize("errors", [ValueError, is_value_error], ids=["class", "function"])
def test_one_leaf_is_enough_to_exclude(errors: Any) -> None:
    excludes = excluder(errors)
    assert excludes(MIXED)
    assert not excludes(BOTH)


def test_a_function_is_asked_about_leaves_and_never_about_a_group() -> None:
    asked: list[Exception] = []

    def never(error: Exception) -> bool:
        asked.append(error)
        return not isinstance(error, OSError)  # said in the negative, it would take any group

    assert not matcher(never)(ExceptionGroup("group", [OSError()]))
    assert [type(each) for each in asked] == [OSError]


def test_a_group_can_be_named_itself() -> None:
    assert matcher(ExceptionGroup)(MIXED)


def test_those_that_say_so_themselves_can_be_named_beside_others() -> None:
    matches = matcher((ConnectionError, says_retryable))
    assert matches(ConnectionResetError())
    assert matches(Overloaded("full"))
    assert not matches(ValueError())


def test_nothing_matches_no_classes() -> None:
    assert not matcher(())(ValueError())
    assert not matcher(())(MIXED)


def test_an_error_says_of_itself_whether_it_is_retryable() -> None:
    class Truthy(Exception):
        retryable = "yes"

    assert says_retryable(LinkLost("cut"))
    assert not says_retryable(OSError())
    assert not says_retryable(Truthy())
    assert says_retryable(ExceptionGroup("group", [LinkLost("cut")]))
    assert not says_retryable(ExceptionGroup("group", [LinkLost("cut"), OSError()]))


@pytest.mark.parametrize("nonsense", [KeyboardInterrupt, BaseException, int, (OSError, "x"), "OSError", None, 7])
def test_what_names_no_exceptions_is_refused(nonsense: Any) -> None:
    for make in (matcher, excluder):
        with pytest.raises(TypeError):
            make(nonsense)
