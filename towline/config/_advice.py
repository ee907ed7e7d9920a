"""What is legal and yet unwise: a table of rules, each with its advice.

A rule looks at a configuration that can be built, and gives the places that it dislikes. What it says of them, and what
to do instead, stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, TypeVar

from towline.endpoint import Endpoint, is_loopback
from towline.layers import (
    Buffer,
    CircuitBreaker,
    Encryption,
    Framing,
    Heartbeat,
    KnownHosts,
    Reconnect,
    Resume,
    Retry,
    Rpc,
    Timeout,
    Tls,
)
from towline.policies import Failover, StandardPolicy, Unlimited

from ._sources import Place
from ._stack import StackConfig
from ._text import format_duration, format_size
from ._tunnel import TunnelConfig

__all__ = ["Advice", "advise"]

L = TypeVar("L")

Found: TypeAlias = Iterator[tuple[Place, dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Advice:
    """What would be better.

    Attributes:
        place: where in the configuration.
        text: what is unwise, why, and what to do.
    """

    place: Place
    text: str


def advise(config: StackConfig) -> list[Advice]:
    """What is unwise about a configuration, in the order of its layers.

    >>> [advice] = advise(StackConfig.from_toml('layers = ["resume", "retry", "framing"]'))
    >>> print(advice.place, advice.text[:40])
    ('layers', 0) without a heartbeat, a link that dies si
    """
    given = [Advice(place, text.format(**words)) for rule, text in RULES for place, words in rule(config)]
    return sorted(given, key=lambda advice: [(isinstance(part, str), part) for part in advice.place])


def _all(config: StackConfig, cls: type[L]) -> Iterator[tuple[int, L]]:
    return ((number, layer) for number, layer in enumerate(config.layers) if isinstance(layer, cls))


def _one(config: StackConfig, cls: type[L]) -> tuple[int, L] | None:
    return next(_all(config, cls), None)


def _is_plain(config: StackConfig) -> bool:
    return not any(isinstance(layer, (Encryption, Tls)) for layer in config.layers)


def _crosses_machines(endpoint: Endpoint) -> bool:
    return endpoint.scheme == "tcp" and not is_loopback(endpoint.host)


# --- rules ----------------------------------------------------------------------------------------------------------


def _no_layers(config: StackConfig) -> Found:
    if not config.layers:
        yield (), {}


def _no_encryption(config: StackConfig) -> Found:
    if not _is_plain(config):
        return
    if config.endpoint is not None and _crosses_machines(config.endpoint):
        yield ("endpoint",), {"endpoint": config.endpoint}
    any_reconnect: type[Any] = Reconnect
    for number, layer in _all(config, any_reconnect):
        target = Endpoint.parse(layer.target)
        if target != config.endpoint and _crosses_machines(target):
            yield ("layers", number, "target"), {"endpoint": target}
    for number, retry in _all(config, Retry):
        if isinstance(retry.policy, Failover):
            for entry, endpoint in enumerate(retry.policy.endpoints):
                if _crosses_machines(endpoint):
                    yield ("layers", number, "policy", "endpoints", entry), {"endpoint": endpoint}


def _no_heartbeat(config: StackConfig) -> Found:
    found = _one(config, Resume)
    if found is not None and _one(config, Heartbeat) is None:
        yield ("layers", found[0]), {"ttl": format_duration(found[1].ttl)}


def _slow_heartbeat(config: StackConfig) -> Found:
    resume, heartbeat = _one(config, Resume), _one(config, Heartbeat)
    if resume is not None and heartbeat is not None and heartbeat[1].timeout >= resume[1].ttl:
        yield (
            ("layers", heartbeat[0], "timeout"),
            {"timeout": format_duration(heartbeat[1].timeout), "ttl": format_duration(resume[1].ttl)},
        )


def _one_lost_beat(config: StackConfig) -> Found:
    for number, layer in _all(config, Heartbeat):
        if layer.timeout < 2 * layer.interval:
            yield (
                ("layers", number, "timeout"),
                {"timeout": format_duration(layer.timeout), "interval": format_duration(layer.interval)},
            )


def _no_retry(config: StackConfig) -> Found:
    resume = _one(config, Resume)
    if resume is not None and not any(number > resume[0] for number, _ in _all(config, Retry)):
        yield ("layers", resume[0]), {}


def _retry_without_budget(config: StackConfig) -> Found:
    # Retry of calls: connecting is paced by the backoff, and one client has one connection.
    rpc = _one(config, Rpc)
    for number, layer in _all(config, Retry):
        policy = layer.policy.policy if isinstance(layer.policy, Failover) else layer.policy
        if (
            isinstance(policy, StandardPolicy)
            and (policy.budget is None or isinstance(policy.budget, Unlimited))
            and (rpc is None or number < rpc[0])
        ):
            yield ("layers", number, "policy"), {}


def _retry_without_end(config: StackConfig) -> Found:
    rpc = _one(config, Rpc)
    timeouts = [number for number, _ in _all(config, Timeout)]
    for number, layer in _all(config, Retry):
        policy = layer.policy
        if (
            rpc is not None
            and number < rpc[0]
            and isinstance(policy, StandardPolicy)
            and policy.max_attempts is None
            and policy.max_elapsed is None
            and policy.budget is None
            and not any(outside < number for outside in timeouts)
        ):
            yield ("layers", number, "policy"), {}


def _breaker_outside_retry(config: StackConfig) -> Found:
    breakers = [number for number, _ in _all(config, CircuitBreaker)]
    for number, _ in _all(config, Retry):
        outside = [breaker for breaker in breakers if breaker < number]
        rpc = _one(config, Rpc)
        if outside and (rpc is None or number < rpc[0]):
            yield ("layers", outside[-1]), {"retry": f"layers.{number}"}


def _large_frames(config: StackConfig) -> Found:
    resume, framing = _one(config, Resume), _one(config, Framing)
    if (
        resume is not None
        and framing is not None
        and framing[1].max_frame_size > 64 * max(resume[1].max_message, 1 << 20)
    ):
        yield (
            ("layers", framing[0], "max_frame_size"),
            {"size": format_size(framing[1].max_frame_size), "message": format_size(resume[1].max_message)},
        )


def _trust_on_first_use(config: StackConfig) -> Found:
    for number, layer in _all(config, Encryption):
        if layer.keys is not None and isinstance(layer.keys.trust, KnownHosts) and layer.keys.trust.allow_first_use:
            yield ("layers", number, "keys", "trust", "allow_first_use"), {}


def _key_in_the_file(config: StackConfig) -> Found:
    for number, layer in _all(config, Encryption):
        if layer.psk is not None and layer.psk.source is None:
            yield ("layers", number, "psk"), {}
        elif layer.keys is not None and layer.keys.psk is not None and layer.keys.psk.source is None:
            yield ("layers", number, "keys", "psk"), {}


def _session_that_outlives_nothing(config: StackConfig) -> Found:
    for number, layer in _all(config, Resume):
        if layer.ttl < 10:
            yield ("layers", number, "ttl"), {"ttl": format_duration(layer.ttl)}


def _tombstone_before_ttl(config: StackConfig) -> Found:
    for number, layer in _all(config, Resume):
        if layer.tombstone_ttl < layer.ttl:
            yield (
                ("layers", number, "tombstone_ttl"),
                {"tombstone": format_duration(layer.tombstone_ttl), "ttl": format_duration(layer.ttl)},
            )


def _much_memory(config: StackConfig) -> Found:
    for number, layer in _all(config, Resume):
        if layer.buffer + layer.window > 1 << 30:
            yield ("layers", number, "buffer"), {"each": format_size(layer.buffer + layer.window)}


def _large_queue(config: StackConfig) -> Found:
    for number, layer in _all(config, Buffer):
        if layer.bound > 10_000 and layer.on_full == "wait":
            yield ("layers", number, "bound"), {"bound": f"{layer.bound:,}"}


def _listens_everywhere(config: StackConfig) -> Found:
    if isinstance(config, TunnelConfig) and config.listen is not None:
        endpoint = config.listen.endpoint or config.endpoint
        if _is_plain(config) and endpoint is not None and _crosses_machines(endpoint):
            yield ("listen",), {"endpoint": endpoint, "to": config.listen.to}


def _open_entrance(config: StackConfig) -> Found:
    if isinstance(config, TunnelConfig) and config.forward is not None:
        local = config.forward.local
        if _crosses_machines(local):
            yield ("forward", "local"), {"local": local}


def _patience_beyond_ttl(config: StackConfig) -> Found:
    if isinstance(config, TunnelConfig) and config.forward is not None and config.forward.retry_for is not None:
        resume = _one(config, Resume)
        if resume is not None and config.forward.retry_for > resume[1].ttl:
            yield (
                ("forward", "retry_for"),
                {"retry_for": format_duration(config.forward.retry_for), "ttl": format_duration(resume[1].ttl)},
            )


RULES: Final[tuple[tuple[Callable[[StackConfig], Found], str], ...]] = (
    (
        _no_layers,
        "there is no layer, so what is connected is the bare transport: one link, that ends when it is cut",
    ),
    (
        _no_encryption,
        "nothing protects what goes over {endpoint}: anybody between the two ends can read it, and take sessions over; "
        "add encryption, innermost",
    ),
    (
        _no_heartbeat,
        "without a heartbeat, a link that dies silently goes unnoticed until the system gives it up, which takes a "
        "quarter of an hour, and by then the session is gone (ttl {ttl}); add heartbeat, outside framing",
    ),
    (
        _slow_heartbeat,
        "a dead link is noticed after {timeout}, when the session ({ttl}) is already over; lower timeout, or raise "
        "resume's ttl",
    ),
    (
        _one_lost_beat,
        "with {timeout} of patience and a beat each {interval}, one that comes late ends a healthy link; make timeout "
        "three times the interval",
    ),
    (
        _no_retry,
        "without a retry inside resume, a lost link is dialled again ten times a second, and by all clients at once; "
        "add retry with an exponential backoff, inside resume",
    ),
    (
        _retry_without_budget,
        "calls are retried without a budget: when a server is overloaded, retries are what keeps it so; leave budget "
        "out, which gives it the default",
    ),
    (
        _retry_without_end,
        "nothing ends these retries but the caller: set max_attempts or max_elapsed, or put a timeout outside",
    ),
    (
        _breaker_outside_retry,
        "the breaker stands outside the retry ({retry}), so it sees one failure for all attempts of a call, late; put "
        "it inside",
    ),
    (
        _large_frames,
        "a peer may announce frames of {size}, and no message is longer than {message}; lower max_frame_size",
    ),
    (
        _trust_on_first_use,
        "whoever answers the first time is believed; after the first connection, take allow_first_use out",
    ),
    (
        _key_in_the_file,
        "the key itself stands here, and goes wherever this goes; put it into a file of its own (towline "
        'keygen), and write {{ file = "PATH" }}',
    ),
    (
        _session_that_outlives_nothing,
        "a session without a link lives {ttl}, less than most interruptions; the default is 5m",
    ),
    (
        _tombstone_before_ttl,
        "a session that is over is remembered for {tombstone}, less than its client may look for it ({ttl}), who is "
        "then told that it is unknown rather than what became of it; make tombstone_ttl longer than ttl",
    ),
    (
        _much_memory,
        "one session may hold {each} of memory at each end, and one client may have many; lower buffer and window",
    ),
    (
        _large_queue,
        "{bound} calls may wait, and the last of them answers long after its caller has gone; use a small bound, or "
        'on_full = "shed"',
    ),
    (
        _listens_everywhere,
        "anybody who reaches {endpoint} reaches {to}; add encryption, or listen on 127.0.0.1",
    ),
    (
        _open_entrance,
        "other machines can use the entrance at {local} as well, without a key; use 127.0.0.1 unless that is meant",
    ),
    (
        _patience_beyond_ttl,
        "a way back is looked for during {retry_for}, and the session lives {ttl} (resume's ttl); raise that, too",
    ),
)
"""Each rule with its advice."""
