"""The life of a session: every state, every input."""

from __future__ import annotations

import pytest

from towline.layers.resume._state import TRANSITIONS, Input, State, step


@pytest.mark.smoke
@pytest.mark.parametrize("input_", Input)
@pytest.mark.parametrize("state", State)
def test_a_step_is_in_the_table_or_is_refused(state: State, input_: Input) -> None:
    if input_ in TRANSITIONS[state]:
        assert step(state, input_) is TRANSITIONS[state][input_]
    else:
        with pytest.raises(RuntimeError, match=f"{input_.name} is not allowed in {state.name}"):
            step(state, input_)


def test_the_table_is_what_was_decided() -> None:
    assert {(state, input_): after for state, row in TRANSITIONS.items() for input_, after in row.items()} == {
        (State.NEW, Input.ATTACH): State.ATTACHED,
        (State.NEW, Input.LOSE): State.LOST,
        (State.ATTACHED, Input.ATTACH): State.ATTACHED,
        (State.ATTACHED, Input.DETACH): State.DETACHED,
        (State.ATTACHED, Input.FINISH): State.CLOSED,
        (State.ATTACHED, Input.LOSE): State.LOST,
        (State.DETACHED, Input.ATTACH): State.ATTACHED,
        (State.DETACHED, Input.FINISH): State.CLOSED,
        (State.DETACHED, Input.LOSE): State.LOST,
    }


def test_every_state_has_a_row_so_that_nothing_allowed_was_decided_and_not_forgotten() -> None:
    assert set(TRANSITIONS) == set(State)


def test_what_is_over_stays_over() -> None:
    for state in State:
        assert state.is_over == (state in (State.CLOSED, State.LOST))
        if state.is_over:
            assert TRANSITIONS[state] == {}


def test_every_state_is_reached_from_new() -> None:
    reached, waiting = {State.NEW}, [State.NEW]
    while waiting:
        for after in TRANSITIONS[waiting.pop()].values():
            if after not in reached:
                reached.add(after)
                waiting.append(after)
    assert reached == set(State)
