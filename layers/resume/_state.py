"""The life of a session, as a table.

Rule 1: a change of state happens here and nowhere else.
Rule 2: this file does no I/O, reads no clock and draws no random number.

That an end is closing is no state of its own: a session that waits for the acknowledgement of its FIN may be attached
or detached like any other.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

__all__ = ["TRANSITIONS", "Input", "State", "step"]


class State(enum.Enum):
    """Where a session stands, seen from one side."""

    NEW = "new"  # the server offered it, and the client has not confirmed it
    ATTACHED = "attached"
    DETACHED = "detached"  # the link is lost, the session is not
    CLOSED = "closed"  # both ends have everything
    LOST = "lost"  # it cannot go on, and says so to whoever asks

    @property
    def is_over(self) -> bool:
        """Nothing can happen to it any more."""
        return self in (State.CLOSED, State.LOST)


class Input(enum.Enum):
    """What can happen to it."""

    ATTACH = enum.auto()
    DETACH = enum.auto()
    FINISH = enum.auto()
    LOSE = enum.auto()


TRANSITIONS: Final[Mapping[State, Mapping[Input, State]]] = {
    State.NEW: {Input.ATTACH: State.ATTACHED, Input.LOSE: State.LOST},
    State.ATTACHED: {
        Input.ATTACH: State.ATTACHED,  # a newer connection takes over
        Input.DETACH: State.DETACHED,
        Input.FINISH: State.CLOSED,
        Input.LOSE: State.LOST,
    },
    State.DETACHED: {
        Input.ATTACH: State.ATTACHED,
        Input.FINISH: State.CLOSED,  # a tombstone said that the peer had everything
        Input.LOSE: State.LOST,
    },
    State.CLOSED: {},
    State.LOST: {},
}
"""Every allowed step. A pair that is not here is a fault of this program, since no peer can bring it about."""


def step(state: State, input_: Input) -> State:
    """Return the state after ``input_``.

    Raises:
        RuntimeError: if the session may not see ``input_`` in ``state``.

    >>> step(State.ATTACHED, Input.DETACH)
    <State.DETACHED: 'detached'>
    """
    try:
        return TRANSITIONS[state][input_]
    except KeyError:
        raise RuntimeError(f"{input_.name} is not allowed in {state.name}") from None
