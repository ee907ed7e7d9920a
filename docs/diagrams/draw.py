"""Draw the diagrams of these pages from the tables in the code: ``python docs/diagrams/draw.py``.

A table says which steps there are; only where a state stands on the page is said here. A state that has no place fails,
and ``tests/test_diagrams.py`` fails when a table was changed and the pictures were not drawn again.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, TypeVar

from drawing import Arrow, Drawing, Node

from towline import Encryption, Framing, Heartbeat, Psk, Reconnect, Resume, Retry, Rpc, Stack, Timeout
from towline.layers import reconnect
from towline.layers.resume import _state
from towline.policies import Backoff, breaker
from towline.service import TwoSided

S = TypeVar("S", bound=enum.Enum)
In = TypeVar("In", bound=enum.Enum)


def _steps(table: Mapping[S, Mapping[In, S]]) -> dict[tuple[S, S], str]:
    """What leads from one state to another, in the words of the table."""
    found: dict[tuple[S, S], list[str]] = {}
    for state, inputs in table.items():
        for input_, target in inputs.items():
            found.setdefault((state, target), []).append(input_.name.lower())
    return {pair: ", ".join(names) for pair, names in found.items()}


def session() -> str:
    """The life of a session (Resume)."""
    State = _state.State
    nodes = {
        State.NEW: Node(90, 190, "new"),
        State.ATTACHED: Node(310, 190, "attached", "good"),
        State.DETACHED: Node(590, 190, "detached"),
        State.CLOSED: Node(450, 60, "closed", "faint"),
        State.LOST: Node(310, 330, "lost", "bad"),
    }
    bends = {
        (State.ATTACHED, State.DETACHED): 26.0,
        (State.DETACHED, State.ATTACHED): 26.0,
        (State.ATTACHED, State.ATTACHED): 46.0,
        (State.ATTACHED, State.CLOSED): 0.0,
        (State.NEW, State.LOST): -20.0,
        (State.DETACHED, State.LOST): 20.0,
    }
    picture = Drawing(
        690,
        380,
        "The life of a session",
        "new, attached, detached, closed and lost, and what leads from one to another",
    )
    arrows = [
        Arrow(nodes[a], nodes[b], text, bends.get((a, b), 0.0)) for (a, b), text in _steps(_state.TRANSITIONS).items()
    ]
    picture.states(nodes.values(), arrows)
    return picture.svg()


def circuit_breaker() -> str:
    """What a circuit breaker does with calls (CircuitBreaker)."""
    State = breaker.BreakerState
    nodes = {
        State.CLOSED: Node(250, 190, "closed", "good"),
        State.OPEN: Node(570, 90, "open", "bad"),
        State.HALF_OPEN: Node(570, 290, "half open"),
        State.ISOLATED: Node(250, 350, "isolated", "faint"),
    }
    every = Node(80, 270, "every state", "faint")
    bends = {
        (State.OPEN, State.HALF_OPEN): 30.0,
        (State.HALF_OPEN, State.OPEN): 30.0,
    }
    steps = _steps_but(breaker.TRANSITIONS, (breaker.BreakerInput.ISOLATE, breaker.BreakerInput.CLOSE))
    arrows = [Arrow(nodes[a], nodes[b], text, bends.get((a, b), 0.0)) for (a, b), text in steps.items()]
    arrows += [
        Arrow(every, nodes[target], f"{input_.name.lower()} (by hand)", bend, 0.5)
        for input_, target, bend in (
            (breaker.BreakerInput.ISOLATE, State.ISOLATED, -16.0),
            (breaker.BreakerInput.CLOSE, State.CLOSED, 16.0),
        )
        if all(table[input_] is target for table in breaker.TRANSITIONS.values())
    ]
    picture = Drawing(
        680, 400, "The states of a circuit breaker", "closed, open, half open and isolated, and what leads to each"
    )
    picture.states([*nodes.values(), every], arrows)
    return picture.svg()


def _steps_but(
    table: Mapping[S, Mapping[breaker.BreakerInput, S]], left_out: tuple[breaker.BreakerInput, ...]
) -> dict[tuple[S, S], str]:
    """The steps without those that lead from every state to the same one, and so are drawn once."""
    for input_ in left_out:
        assert len({inputs[input_] for inputs in table.values()}) == 1, input_
    return _steps({state: {i: to for i, to in inputs.items() if i not in left_out} for state, inputs in table.items()})


def reconnecting() -> str:
    """What becomes of the connection that Reconnect holds."""
    State = reconnect.ConnectionState
    nodes = {
        State.CLOSED: Node(90, 200, "closed", "faint"),
        State.IDLE: Node(330, 200, "idle"),
        State.CONNECTING: Node(730, 200, "connecting"),
        State.WAITING: Node(330, 420, "waiting"),
        State.CONNECTED: Node(530, 50, "connected", "good"),
    }
    every = Node(90, 60, "every other state", "faint")
    bends = {
        (State.IDLE, State.CONNECTING): 30.0,
        (State.CONNECTING, State.IDLE): 30.0,
        (State.IDLE, State.WAITING): 110.0,
        (State.WAITING, State.IDLE): 80.0,
        (State.WAITING, State.CONNECTING): -60.0,
    }
    places = {(State.IDLE, State.WAITING): 0.36, (State.WAITING, State.IDLE): 0.4}
    table = reconnect.TRANSITIONS
    left = {inputs[State.CLOSED] for state, inputs in table.items() if state is not State.CLOSED}
    assert len(left) == 1, left
    arrows = [
        Arrow(nodes[old], nodes[new], reason, bends.get((old, new), 0.0), places.get((old, new), 0.5))
        for old, steps in table.items()
        for new, reason in steps.items()
        if new is not State.CLOSED
    ]
    arrows.append(Arrow(every, nodes[State.CLOSED], left.pop()))
    picture = Drawing(
        810,
        460,
        "The states of Reconnect's connection",
        "closed, idle, connecting, connected and waiting, and what leads to each",
    )
    picture.states([*nodes.values(), every], arrows)
    return picture.svg()


def stack() -> str:
    """The layers of a stack: which of them both ends have, and what passes between two."""
    layers = Stack(
        Timeout(5),
        Reconnect("tcp://server:7000"),
        Rpc(),
        Resume(),
        Retry(Backoff.exponential()),
        Heartbeat(),
        Framing(),
        Encryption(psk=Psk(bytes(range(32)))),
    ).layers
    width, height, gap, top = 150, 34, 22, 70
    left, right = 150, 480
    bottom = top + len(layers) * (height + gap)
    picture = Drawing(
        780,
        bottom + 70,
        "The layers of a stack",
        "the layers of both ends, outermost first",
    )
    picture.text(left + width / 2, 20, "the end that dials", weight="600")
    picture.text(right + width / 2, 20, "the end that listens", weight="600")
    picture.box(left, 34, width, 26, "application", "faint")
    picture.box(right, 34, width, 26, "handler", "faint")
    last: dict[float, float] = {left: 60.0, right: 60.0}
    for number, layer in enumerate(layers):
        y = top + number * (height + gap) + gap / 2
        both = isinstance(layer, TwoSided)
        name = type(layer).__name__
        for x in (left, right) if both or number == 0 else (left,):
            picture.line(x + width / 2, last[x], x + width / 2, y)
            picture.box(x, y, width, height, name, "good" if both else "plain")
            last[x] = y + height
        if both:
            picture.line(left + width, y + height / 2, right, y + height / 2, dashed=True)
            picture.label((left + width + right) / 2, y + height / 2, layer.wire)
            picture.text(left - 14, y + height / 2, f"gives {layer.gives.value}", anchor="end", size=12)
    for x in (left, right):
        picture.line(x + width / 2, last[x], x + width / 2, bottom + 16)
        picture.box(x, bottom + 16, width, 30, "Tcp", "plain")
    picture.line(left + width, bottom + 31, right, bottom + 31)
    picture.label((left + width + right) / 2, bottom + 31, "a link")
    picture.text(left - 14, bottom + 31, "bytes", anchor="end", size=12)
    return picture.svg()


DIAGRAMS: Final[Mapping[str, Callable[[], str]]] = {
    "session": session,
    "circuit-breaker": circuit_breaker,
    "reconnect": reconnecting,
    "stack": stack,
}


def main(folder: Path) -> None:
    for name, draw in DIAGRAMS.items():
        (folder / f"{name}.svg").write_text(draw())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
