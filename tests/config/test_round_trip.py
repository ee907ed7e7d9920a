"""Everything that the library exports can be written down and read again, or says why not.

A layer, a policy or a transport that is new, and that nobody told `towline.config` of, fails here.
"""

from __future__ import annotations

import inspect
import json
import math
import random
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import anyio
import pytest
from pydantic import ValidationError

from towline import layers, policies, transports
from towline.chance import SystemRandom
from towline.clock import now
from towline.config import StackConfig
from towline.config._kinds import Choice, CodeOnly, Kind
from towline.config._known import BACKOFFS, BUDGETS, LAYERS, POLICIES, RATES, STORES, TRANSPORTS, TRUSTS
from towline.endpoint import Endpoint
from towline.errors import ConfigError, ConnectionLost, LinkLost
from towline.hooks import Hooks
from towline.layers import (
    AllowList,
    Buffer,
    CircuitBreaker,
    ConcurrencyLimit,
    Deadline,
    Either,
    Encryption,
    Fallback,
    Filter,
    Framing,
    Heartbeat,
    Hedge,
    KnownHosts,
    Limiter,
    Lines,
    LoadShed,
    Psk,
    RateLimit,
    Reconnect,
    Resume,
    Retry,
    Rpc,
    StaticKey,
    StaticKeys,
    Timeout,
    Tls,
    TlsClient,
    speaks_of_target,
)
from towline.layers.resume import MemoryStore
from towline.policies import (
    Backoff,
    BreakerPolicy,
    ConcurrencyBudget,
    Empty,
    Failover,
    FixedWindow,
    Gcra,
    Jitter,
    Percentile,
    StandardPolicy,
    TokenRatioBudget,
    TpsBudget,
    Unlimited,
    is_transient,
    says_retryable,
)
from towline.stack import Stack
from towline.transports import Fd, Memory, Pipe, Stdio, Tcp, Unix


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    Psk.generate().write(folder / "psk")
    StaticKey.generate().write(folder / "key")
    (folder / "allow").write_text(StaticKey.generate().public_line("anna") + "\n")
    return folder


def through_text(choice: Choice, value: Any) -> Any:
    """As a file would have it: written, made JSON, and read again."""
    return choice.read(json.loads(json.dumps(choice.write(value))), None)


# --- every class has its place --------------------------------------------------------------------------------------

ELSEWHERE = {
    # what is no layer, policy or transport, or is made by one
    "towline.layers": {
        "AttemptBlock",
        "Balance",
        "ByKey",
        "Call",
        "CallAll",
        "ConnectionState",
        "GivenUp",
        "Insert",
        "Limiter",
        "Optional",
        "Peer",
        "Reconnecting",
        "Remove",
        "Request",
        "RequestLayer",
        "Response",
        "ResponseLayer",
        "Router",
        "Session",
        "Shared",
        "Steer",
        "Stream",
    },
    "towline.policies": {
        "Admitted",
        "Attempt",
        "Breaker",
        "BreakerChange",
        "BreakerCounts",
        "BreakerState",
        "Budget",
        "GiveUp",
        "Meter",
        "NotCloneable",
        "Policy",
        "PolicySession",
        "Rate",
        "RotatingHistogram",
        "RoundTrips",
        # of Balance, which code makes around services
        "PeakEwma",
    },
    "towline.transports": {"StreamDriver"},
}

WITHIN = {
    # said as tables within a layer's or a policy's
    "towline.layers": {"AllowList", "KnownHosts", "Psk", "StaticKey", "StaticKeys", "TlsClient", "TlsServer"},
    "towline.policies": {"BreakerPolicy", "Jitter", "Percentile"},
}


@pytest.mark.parametrize("module", [layers, policies, transports])
def test_every_class_that_is_exported_has_a_kind_or_a_reason(module: ModuleType) -> None:
    classes = {name for name in module.__all__ if inspect.isclass(getattr(module, name))}
    choices = (LAYERS, POLICIES, BACKOFFS, BUDGETS, RATES, TRANSPORTS, STORES, TRUSTS)
    known = {kind.of.__name__ for choice in choices for kind in choice.own.values()} & classes
    known |= WITHIN.get(module.__name__, set())
    elsewhere = ELSEWHERE[module.__name__]
    assert classes - known - elsewhere == set(), "tell towline.config of it: in towline/config/_known.py"
    assert elsewhere & known == set()
    assert elsewhere | known >= classes >= elsewhere


CODE_ONLY = {
    "buffer": {"hooks"},
    "circuit-breaker": {"is_failure_result", "clock", "random", "hooks"},
    "concurrency-limit": {"hooks"},
    "deadline": {"attach", "of"},
    "either": {"when", "left", "right"},
    "fallback": {"answer"},
    "filter": {"accept", "hooks"},
    "encryption": {"hooks"},
    "heartbeat": {"hooks"},
    "hedge": {"when", "clone", "clock", "hooks"},
    "load-shed": {"hooks"},
    "rate-limit": {"clock", "sleep", "hooks"},
    "reconnect": {"clock", "random", "hooks"},
    "resume": {"authorize", "on_expired", "hooks"},
    "retry": {"clock", "sleep", "random", "hooks"},
    "rpc": {"handler", "outgoing", "incoming"},
    "standard-policy": {"on_result", "result_error", "delay_from", "clone"},
    "failover": {"where", "change"},
    "tps-budget": {"clock"},
    "tcp": {"resolver"},
    "pipe": {"api"},
}


@pytest.mark.parametrize("choice", [LAYERS, POLICIES, BUDGETS, RATES, TRANSPORTS, STORES, TRUSTS], ids=lambda c: c.what)
def test_what_is_for_code_only_is_so_on_purpose(choice: Choice) -> None:
    """An option whose annotation is not understood would be refused in every file, and nobody would notice."""
    found = {
        name: {option.name for option in kind.options.values() if option.type is None}
        for name, kind in choice.own.items()
        if any(option.type is None for option in kind.options.values())
    }
    assert found == {name: CODE_ONLY[name] for name in found}


# --- every option survives ------------------------------------------------------------------------------------------

FULL = StandardPolicy(
    Backoff.of(0.1, 0.5, hold=True, jitter="none").cap(3).until(60),
    on=(ConnectionError, says_retryable),
    not_on=KeyError,
    max_attempts=4,
    max_elapsed=30,
    max_retry_after=10,
    idempotent=True,
    budget=TokenRatioBudget(20, 0.25),
    deposit="request",
    wait_when_open=True,
)

EVERY_SERIES = [
    Backoff.constant(1),
    Backoff.of(1, 2, hold=True),
    Backoff.linear(initial=1, step=2),
    Backoff.polynomial(initial=1, degree=3),
    Backoff.exponential(initial=1, factor=3, first=0.5),
    Backoff.fibonacci(initial=1, second=2),
    Backoff.random(1, 2),
    Backoff.decorrelated(initial=1),
    Backoff.smooth(initial=1),
    Backoff.constant(1).take(1) + Backoff.constant(2),
]

VALUES: list[tuple[Choice, Any]] = [
    *((BACKOFFS, each.cap(3).jitter("equal").take(5).until(9)) for each in EVERY_SERIES),
    (LAYERS, Buffer(8, on_full="shed", on_close="fail")),
    (LAYERS, CircuitBreaker()),
    (
        LAYERS,
        CircuitBreaker(
            BreakerPolicy(
                failure_ratio=None,
                min_calls=3,
                window=10.5,
                consecutive=5,
                slow_call=0.25,
                slow_ratio=0.5,
                break_for=Backoff.constant(1),
                half_open_max=2,
                half_open_successes=2,
            ),
            is_failure=(LinkLost, speaks_of_target),
            name="db",
        ),
    ),
    (LAYERS, CircuitBreaker(BreakerPolicy(count=50))),
    (LAYERS, ConcurrencyLimit(5, on_full="shed")),
    (LAYERS, Deadline(2.5)),
    (LAYERS, Deadline()),
    (LAYERS, Framing(max_frame_size=1 << 20)),
    (LAYERS, Heartbeat(interval=1, timeout=3)),
    (LAYERS, Hedge(0.25, max_attempts=3, on=ConnectionLost, budget=None)),
    (LAYERS, Hedge(Percentile(0.99, min_points=5, window=60, at_least=0.01), budget=Unlimited())),
    (LAYERS, Lines(max_line_size=100)),
    (LAYERS, LoadShed()),
    (LAYERS, RateLimit(10, per=1)),
    (LAYERS, RateLimit(FixedWindow(10, 60), on_full="shed")),
    (LAYERS, Reconnect("tcp://localhost:7000")),
    (
        LAYERS,
        Reconnect(
            "unix:///run/db",
            backoff=Backoff.constant(1),
            on=anyio.BrokenResourceError,
            transient=is_transient,
            fail_fast=True,
            eager=True,
            healthy_after=1,
            budget=TpsBudget(ttl=5, min_per_sec=1, ratio=0.1),
            name="db",
        ),
    ),
    (LAYERS, Resume()),
    (
        LAYERS,
        Resume(
            buffer=1 << 20,
            window=3 << 20,
            max_message=1000,
            ttl=60,
            tombstone_ttl=61,
            linger=1,
            handshake_timeout=2,
            attach_timeout=3,
            max_sessions=4,
        ),
    ),
    (LAYERS, Retry()),
    (LAYERS, Retry(Backoff.exponential())),
    (LAYERS, Retry(FULL)),
    (LAYERS, Retry(Failover(["tcp://a.example:1", "tcp://b.example:2"], FULL, cluster=True))),
    (LAYERS, Rpc()),
    (
        LAYERS,
        Rpc(max_calls=1, max_message=1 << 16, window=1 << 16, max_running=3, max_waiting=4, reveals_errors=True),
    ),
    (LAYERS, Timeout(0.5)),
    (LAYERS, Tls(client=TlsClient())),
    (LAYERS, Tls(client=TlsClient(), server_hostname="db.example", handshake_timeout=1)),
    (POLICIES, StandardPolicy()),
    (POLICIES, StandardPolicy(budget=None, idempotent=False, on=())),
    (POLICIES, FULL),
    (POLICIES, Failover(["tcp://a.example:1"])),
    (POLICIES, Failover(["tcp://a.example:1"], FULL, cluster=True)),
    (BUDGETS, TpsBudget()),
    (BUDGETS, TpsBudget(ttl=1, min_per_sec=0, ratio=0.5)),
    (BUDGETS, TokenRatioBudget(5, 0.7)),
    (BUDGETS, ConcurrencyBudget(0.1, 5)),
    (BUDGETS, Unlimited()),
    (BUDGETS, Empty()),
    (RATES, Gcra(10, 1, burst=3)),
    (RATES, FixedWindow(100, 60)),
    (BACKOFFS, Backoff.constant(1)),
    (BACKOFFS, Backoff.constant(0).take(1) + Backoff.linear(initial=1, step=0.5).cap(3)),
    (BACKOFFS, (Backoff.constant(0).take(1) + Backoff.constant(2).take(3) + Backoff.constant(9)).take(7).until(60)),
    (BACKOFFS, Backoff.of(1, 2, 3)),
    (BACKOFFS, Backoff.polynomial(initial=0.1, degree=3, jitter=Jitter.proportional(0.2))),
    (BACKOFFS, Backoff.exponential()),
    (BACKOFFS, Backoff.exponential(initial=1, factor=3, cap=math.inf, first=None, jitter=Jitter.additive(0.5))),
    (BACKOFFS, Backoff.fibonacci(initial=1)),
    (BACKOFFS, Backoff.fibonacci(initial=1, second=3).take(0)),
    (BACKOFFS, Backoff.random(1, 2)),
    (BACKOFFS, Backoff.decorrelated(initial=1, cap=math.inf)),
    (BACKOFFS, Backoff.smooth(initial=0.1, cap=5, jitter="full").until(0.5)),
    (TRANSPORTS, Tcp()),
    (
        TRANSPORTS,
        Tcp(connect_timeout=1, happy_eyeballs_delay=0.1, nodelay=False, keepalive=None, backlog=5, linger=2),
    ),
    (TRANSPORTS, Unix(mode=0o660, allow_uids="any", listener_uids=None, backlog=1, connect_timeout=2, linger=3)),
    (TRANSPORTS, Unix(allow_uids=[1000, 33])),
    (TRANSPORTS, Pipe(connect_timeout=1, max_links=3)),
    (TRANSPORTS, Stdio(patience=1, linger=2, stdin=3, stdout=4)),
    (TRANSPORTS, Memory(capacity=1024, chunk=7)),
    (TRANSPORTS, Fd(tcp=Tcp(nodelay=False), unix=Unix(allow_uids=[1], mode=0o666))),
    (TRUSTS, AllowList([StaticKey.generate().public_line("anna's laptop"), StaticKey.generate().public_line()])),
    (TRUSTS, KnownHosts("/etc/towline/known_hosts", allow_first_use=True)),
]


@pytest.mark.parametrize(("choice", "value"), VALUES, ids=[f"{value!r:.60}" for _, value in VALUES])
def test_it_is_the_same_through_text(choice: Choice, value: Any) -> None:
    assert through_text(choice, value) == value


def set_somewhere(kind: Kind) -> set[str]:
    return {
        name
        for choice, value in VALUES
        for name in (kind.to_text(value) if choice.own.get(kind.name) is kind and kind.has(value) else ())
    }


@pytest.mark.parametrize(
    "choice", [LAYERS, POLICIES, BACKOFFS, BUDGETS, RATES, TRANSPORTS, TRUSTS], ids=lambda choice: choice.what
)
def test_every_option_was_among_those(choice: Choice) -> None:
    elsewhere = {
        ("encryption", name) for name in ("psk", "keys", "suite", "allowed_suites", "rekey_after", "max_age")
    } | {("encryption", "handshake_timeout"), ("encryption", "max_record_size")}  # with keys, below
    elsewhere |= {("tls", "server"), ("resume", "new_store"), ("allow-list", "file")}
    elsewhere |= {("rate-limit", "per")}  # becomes a part of the rate
    forgotten = set[tuple[str, str]]()
    for name, kind in choice.own.items():
        try:
            forgotten |= {(name, option) for option in kind.sayable.keys() - set_somewhere(kind)}
        except CodeOnly:
            continue
    assert forgotten - elsewhere == set()


def test_keys_are_written_as_where_they_are_from(folder: Path) -> None:
    stack = Stack(
        Framing(),
        Encryption(
            keys=StaticKeys(
                StaticKey.from_file(folder / "key"),
                trust=AllowList.from_file(folder / "allow"),
                psk=Psk.from_file(folder / "psk"),
            ),
            suite="25519_AESGCM_SHA256",
            allowed_suites=("25519_ChaChaPoly_SHA256",),
            rekey_after=100,
            max_age=None,
            handshake_timeout=1,
            max_record_size=1024,
        ),
    )
    text = stack.to_config().model_dump_json()
    assert StackConfig.from_json(text).build() == stack
    assert json.loads(text)["layers"][1] == {
        "kind": "encryption",
        "keys": {
            "key": {"file": str(folder / "key")},
            "trust": {"kind": "allow-list", "file": str(folder / "allow")},
            "psk": {"file": str(folder / "psk")},
        },
        "suite": "25519_AESGCM_SHA256",
        "allowed_suites": ["25519_ChaChaPoly_SHA256"],
        "rekey_after": 100,
        "max_age": "none",
        "handshake_timeout": "1s",
        "max_record_size": "1KiB",
    }


def test_a_store_is_written_as_how_it_is_made() -> None:
    made = Resume(new_store=partial(MemoryStore, max_detached=5, max_bytes=1 << 20))
    text = LAYERS.write(made)
    assert text == {"kind": "resume", "new_store": {"kind": "memory", "max_detached": 5, "max_bytes": "1MiB"}}
    store = LAYERS.read(text, None).new_store()
    assert isinstance(store, MemoryStore)
    assert (store.max_detached, store.max_bytes, store.max_tombstones) == (5, 1 << 20, 10_000)
    with pytest.raises(ConfigError, match=r"layers\.0\.new_store\.max_byte: there is no such option: did you mean"):
        StackConfig.from_dict({"layers": [{"kind": "resume", "new_store": {"kind": "memory", "max_byte": 5}}]})


# --- what only code can say -----------------------------------------------------------------------------------------


def own_store() -> MemoryStore:
    return MemoryStore()


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Filter(bool), "Filter needs accept, which only code can say"),
        (Fallback(lambda request, error: 1, on=KeyError), "Fallback needs answer, which only code can say"),
        (Either(bool, Timeout(1)), "Either needs when, which only code can say"),
        (Retry(hooks=Hooks()), "Retry.hooks is for code only"),
        (Retry(random=random.Random(1)), "Retry.random is for code only"),
        (Retry(clock=lambda: 1.0), "Retry.clock is for code only"),
        (Retry(StandardPolicy(idempotent=lambda request: True)), "StandardPolicy.idempotent is for code only"),
        (Retry(StandardPolicy(on=lambda error: True)), "StandardPolicy.on: '<lambda>' is no error that a config"),
        (ConcurrencyLimit(Limiter(5)), "ConcurrencyLimit.limit is for code only"),
        (Resume(authorize=bool), "Resume.authorize is for code only"),
        (Resume(new_store=own_store), "Resume.new_store: a function is no store that a configuration knows"),
        (Rpc(layers.Router()), "Rpc.handler is for code only"),
        (layers.map_request(str), "is no layer that a configuration knows"),
    ],
)
def test_it_is_said_by_name(layer: Any, message: str) -> None:
    below = (Framing(),) if isinstance(layer, (Resume, Rpc)) else ()
    with pytest.raises(ConfigError) as caught:
        Stack(layer, *below).to_config()
    assert message in str(caught.value)
    assert caught.value.faults[0].path == "layers.0"


def test_default_clocks_and_generators_are_not_taken_for_yours() -> None:
    stack = Stack(Retry(clock=now, sleep=anyio.sleep), CircuitBreaker(random=SystemRandom()))
    assert stack.to_config().model_dump()["layers"] == ("retry", "circuit-breaker")


# --- whole stacks ---------------------------------------------------------------------------------------------------


def resilient(folder: Path) -> Stack:
    return Stack.resilient(psk=Psk.from_file(folder / "psk"))


def calls(folder: Path) -> Stack:
    return Stack(
        Timeout(5),
        Retry(StandardPolicy(max_attempts=3)),
        Reconnect("tcp://localhost:7000"),
        Rpc(),
        Resume(),
        Heartbeat(),
        Framing(),
        Encryption(psk=Psk.from_file(folder / "psk")),
        transports=(Tcp(nodelay=False), Unix()),
    )


@pytest.mark.parametrize("make", [resilient, calls])
def test_a_stack_from_code_and_from_its_text_are_equal(make: Callable[[Path], Stack], folder: Path) -> None:
    stack = make(folder)
    config = stack.to_config("tcp://localhost:7000")
    assert config.endpoint == Endpoint.parse("tcp://localhost:7000")
    assert config.build() == stack
    again = StackConfig.from_json(config.model_dump_json())
    assert again == config
    assert again.build() == stack == make(folder)
    assert hash(again.build()) == hash(stack)
    assert StackConfig.model_validate(config.model_dump()) == config
    assert again.build().transports == stack.transports


def test_it_is_equal_only_to_the_same(folder: Path) -> None:
    other = Stack.resilient(psk=Psk.generate())
    assert resilient(folder) != other
    assert resilient(folder).to_config() != other.to_config()
    assert Stack(Timeout(5)).to_config("tcp://a:1") != Stack(Timeout(5)).to_config("tcp://b:1")


def test_every_field_of_every_layer_is_a_parameter_of_its_constructor() -> None:
    """What `Kind` reads back are attributes of the same names."""
    for kind in LAYERS.own.values():
        assert is_dataclass(kind.of)
        own = {each.name for each in fields(kind.of) if each.init}
        assert own <= set(kind.options), kind.name


# --- classes of any shape, as other packages have them --------------------------------------------------------------


class Positional:
    def __init__(self, depth: int, /, *names: str, mode: str = "a") -> None:
        self.depth, self.names, self.mode = depth, names, mode


class Forgetful:
    def __init__(self, n: int = 3) -> None:
        self._n = n


class AnyOptions:
    def __init__(self, **options: Any) -> None:
        self.options = options


class Named:
    def __init__(self, kind: str = "x") -> None:
        self.kind = kind


class Raising:
    def __init__(self, n: int = 3) -> None:
        raise KeyError("n")


def kind_of(cls: type) -> Kind:
    return Kind("it", cls, cls)


def test_a_constructor_of_any_shape_is_called_as_it_wants_to_be() -> None:
    kind = kind_of(Positional)
    made = kind.from_text({"kind": "it", "depth": 2, "names": ["a", "b"]}, None)
    assert (made.depth, made.names, made.mode) == (2, ("a", "b"), "a")
    assert kind.to_text(made) == {"kind": "it", "depth": 2, "names": ["a", "b"]}
    assert kind.from_text({"kind": "it", "depth": 1}, None).names == ()


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (Forgetful(7), "does not keep its n, so it cannot be written"),
        (AnyOptions(a=1), r"takes options of any name \(\*\*options\)"),
        (Named(), "has an option called kind, which is what names it"),
    ],
)
def test_what_cannot_be_read_back_is_not_written_as_something_else(value: object, why: str) -> None:
    with pytest.raises(CodeOnly, match=why):
        kind_of(type(value)).to_text(value)


def test_whatever_a_foreign_class_raises_is_a_fault_like_any_other() -> None:
    with pytest.raises(ValidationError, match="'n'"):
        kind_of(Raising).from_text({"kind": "it"}, None)
