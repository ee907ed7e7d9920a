"""The server's store: nothing in it grows without bound, and who is attached is never given up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import pytest

from towline.layers.resume._server import ServerSession
from towline.layers.resume._store import MemoryStore, Tombstone
from towline.layers.resume._wire import RejectCode


@dataclass(eq=False)
class Stub:
    """What a store looks at in a session."""

    session_id: bytes
    principal: bytes | None = None
    attachment: object | None = None
    detached_at: float = 0.0
    held: int = 0


def detached(number: int, principal: bytes | None = None, held: int = 0) -> ServerSession:
    return cast(ServerSession, Stub(b"%016d" % number, principal, None, float(number), held))


def attached(number: int, principal: bytes | None = None, held: int = 0) -> ServerSession:
    return cast(ServerSession, Stub(b"%016d" % number, principal, object(), 0.0, held))


def tombstone(until: float = 600.0) -> Tombstone:
    return Tombstone(RejectCode.SESSION_EXPIRED, 7, b"secret" * 5, None, until)


def give_up_all(store: MemoryStore) -> list[bytes]:
    """What a server does when it makes room."""
    given_up: list[bytes] = []
    for victim in store.to_evict():
        store.bury(victim, tombstone())
        given_up.append(victim.session_id)
    assert not store.to_evict(), "the limits hold after it"
    return given_up


@pytest.mark.smoke
def test_sessions_are_found_by_their_id_until_they_are_buried() -> None:
    store = MemoryStore()
    session = detached(1, b"alice")
    store.add(session)
    assert store.get(session.session_id) is session
    assert list(store) == [session]
    assert len(store) == store.count(b"alice") == 1
    store.bury(session, None)
    store.bury(session, tombstone())  # once is enough
    assert store.get(session.session_id) is None
    assert store.tombstone(session.session_id, 0.0) is None
    assert len(store) == store.count(b"alice") == 0


def test_sessions_are_counted_for_each_principal() -> None:
    store = MemoryStore()
    for number in range(5):
        store.add(detached(number, b"alice" if number < 3 else None))
    assert (store.count(b"alice"), store.count(None), store.count(b"bob")) == (3, 2, 0)


def test_f48_with_too_many_detached_the_oldest_of_the_principal_with_most_of_them_goes() -> None:
    store = MemoryStore(max_detached=5)
    for number, principal in enumerate([b"a", b"b", b"b", b"b", b"a", b"b", b"c", b"b"]):
        store.add(detached(number, principal))
    assert give_up_all(store) == [b"%016d" % number for number in (1, 2, 3)]
    assert len(store) == 5


def test_f48_who_is_attached_is_never_given_up() -> None:
    store = MemoryStore(max_detached=0, max_bytes=0)
    for number in range(10):
        store.add(attached(number, held=1 << 30))
    assert give_up_all(store) == []
    store.add(detached(10))
    assert give_up_all(store) == [b"%016d" % 10]
    assert len(store) == 10


def test_f48_bytes_in_all_queues_count_also_of_those_who_are_attached() -> None:
    store = MemoryStore(max_bytes=1000)
    store.add(attached(0, held=600))
    store.add(detached(1, held=200))
    store.add(detached(2, held=200))
    assert give_up_all(store) == []
    store.add(detached(3, held=1))
    assert give_up_all(store) == [b"%016d" % 1]


def test_a_session_that_was_given_up_is_remembered() -> None:
    store = MemoryStore(max_detached=0)
    store.add(detached(1))
    (session_id,) = give_up_all(store)
    assert store.tombstone(session_id, 0.0) == tombstone()


def test_tombstones_are_forgotten_in_time_and_when_there_are_too_many() -> None:
    store = MemoryStore(max_tombstones=3)
    for number in range(5):
        session = detached(number)
        store.add(session)
        store.bury(session, tombstone(until=100.0 + number))
    known = [number for number in range(5) if store.tombstone(b"%016d" % number, 0.0)]
    assert known == [2, 3, 4]
    assert store.tombstone(b"%016d" % 3, 102.0) is not None
    assert store.tombstone(b"%016d" % 3, 103.0) is None
    assert store.tombstone(b"%016d" % 4, 103.0) is not None
    assert repr(store) == "MemoryStore(0 sessions, 1 tombstones)"


def test_no_repr_shows_the_secret_of_a_session() -> None:
    assert "secret" not in repr(tombstone())
    assert repr(tombstone()) == "Tombstone(SESSION_EXPIRED, recv_final=7)"
