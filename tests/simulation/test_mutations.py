"""The tests themselves are tested: with one rule of the protocol switched off, a test that guards it must fail.

Each rule is one function, replaced here by one that does nothing. The scenarios are the real tests of the neighbouring
files, run as they are.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from towline.errors import TowlineError
from towline.layers.resume import ServerSession, _server
from towline.layers.resume._attachment import Attachment
from towline.layers.resume._core import Core
from towline.layers.resume._replay import ReplayBuffer

HERE = Path(__file__).parent
RESUME = HERE.parent / "layers" / "resume"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"mutated_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cuts, flow = load(HERE / "test_cuts.py"), load(HERE / "test_flow.py")
peers, takeover = load(RESUME / "test_scenarios_peers.py"), load(RESUME / "test_scenarios_takeover.py")

Scenario = Callable[[], Awaitable[None]]


def with_arguments(test: Callable[..., Awaitable[None]], **arguments: Any) -> Scenario:
    return lambda: test(**arguments)


def some_cuts() -> Any:
    """A part of F1: three messages each way, over a link that is cut here and there."""

    async def run() -> None:
        for at in range(200, 400, 25):
            await cuts.three_messages(cuts.Cut(sent=at))
            await cuts.three_messages(cuts.Cut(received=at, how="close"))

    return run


SCENARIOS: Mapping[str, Scenario] = {
    "f1": some_cuts(),
    "f2": cuts.test_f2_the_messages_of_a_flush_that_arrived_before_a_cut_are_not_sent_again,
    "f5": with_arguments(cuts.replayed_under_cuts, k=3, repeats=10),
    "f7 ack lost": cuts.test_f7_an_acknowledgement_that_is_lost_costs_no_message,
    "f7 overlap": with_arguments(peers.test_f7_a_peer_that_replays_too_much_has_nothing_delivered_twice, first=2),
    "f7 doubled": peers.test_f7_a_whole_batch_that_comes_twice_on_one_link_is_dropped,
    "f8": peers.test_f8_acknowledgements_that_are_doubled_old_or_out_of_order_change_nothing,
    "f9": with_arguments(
        peers.test_f9_an_acknowledgement_of_what_was_never_sent_ends_that_session_and_no_other, recv=2
    ),
    "f10": peers.test_f10_a_gap_ends_the_link_and_a_resume_heals_it,
    "f11": takeover.test_f11_an_older_attempt_that_arrives_after_a_newer_one_is_refused_and_touches_nothing,
    "f12": takeover.test_f12_of_two_attempts_with_one_epoch_the_second_is_refused,
    "f14": takeover.test_f14_a_takeover_waits_for_nothing_that_the_old_link_is_stuck_in,
    "f17": takeover.test_f17_without_the_key_a_session_id_is_worth_nothing,
    "f18": takeover.test_f18_a_hello_and_its_proof_are_good_for_one_connection,
    "f19": with_arguments(
        takeover.test_f19_absurd_numbers_change_nothing_before_the_proof_and_end_only_that_session_after_it,
        recv=2,
        next_=1,
    ),
    "f24": flow.test_f24_a_buffer_that_is_full_while_detached_makes_send_wait_and_drains_after_the_resume,
}

rewind = ReplayBuffer.rewind


def nothing(*_: object, **__: object) -> None: ...


def always(*_: object) -> bool:
    return True


def never(*_: object) -> bool:
    return False


def keep_seen(_: Core, frames: list[bytes], first: int) -> list[bytes]:
    return frames


def drop_overlap(core: Core, frames: list[bytes], first: int) -> list[bytes]:
    return frames if first > core.recv else []


def do_not_rewind(core: Core, recv: int) -> int:
    return 0


def rewind_too_little(core: Core, recv: int) -> int:
    return rewind(core.replay, recv + 2)


def is_older(session: ServerSession, epoch: int) -> bool:
    return epoch < session.epoch


@dataclass(frozen=True)
class Mutation:
    """What is replaced by what, and the scenarios that must fail then."""

    owner: object
    name: str
    replacement: object
    scenarios: tuple[str, ...]


MUTATIONS = {
    "what comes twice is not dropped": Mutation(Core, "drop_seen", keep_seen, ("f7 overlap", "f7 doubled")),
    "a batch that overlaps is dropped as a whole": Mutation(Core, "drop_seen", drop_overlap, ("f7 overlap",)),
    "nothing is sent again": Mutation(Core, "rewind", do_not_rewind, ("f1", "f2", "f5")),
    "a replay begins one too late": Mutation(Core, "rewind", rewind_too_little, ("f1", "f2", "f5")),
    "acknowledged messages are kept": Mutation(Core, "trim", nothing, ("f7 ack lost", "f8", "f24")),
    "a stale epoch is accepted": Mutation(ServerSession, "is_stale", never, ("f11", "f12")),
    "an epoch is accepted twice": Mutation(ServerSession, "is_stale", is_older, ("f11", "f12")),
    "an old link still touches the session": Mutation(Attachment, "is_live", True, ("f14",)),
    "any proof is good": Mutation(_server, "same", always, ("f17", "f18")),
    "any state of the peer is good": Mutation(Core, "check_peer", nothing, ("f19",)),
}


@pytest.mark.parametrize("scenario", list(SCENARIOS))
async def test_every_scenario_passes_when_nothing_is_switched_off(scenario: str) -> None:
    await SCENARIOS[scenario]()


@pytest.mark.parametrize(
    ("mutation", "scenario"),
    [(name, scenario) for name, mutation in MUTATIONS.items() for scenario in mutation.scenarios],
)
async def test_a_rule_that_is_switched_off_fails_the_scenarios_that_guard_it(
    mutation: str, scenario: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutated = MUTATIONS[mutation]
    monkeypatch.setattr(mutated.owner, mutated.name, mutated.replacement)
    with pytest.raises((AssertionError, TimeoutError, TowlineError, ExceptionGroup, pytest.fail.Exception)):
        await SCENARIOS[scenario]()
