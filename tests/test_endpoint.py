"""Endpoints: one value, read from one string; what is not exactly one of the forms is an error that names the form."""

from __future__ import annotations

import copy
import pickle
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from towline.endpoint import FORMS, Endpoint
from towline.errors import EndpointError, MisuseError


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("tcp://localhost:7000", Endpoint("tcp", host="localhost", port=7000)),
        ("tcp://127.0.0.1:0", Endpoint("tcp", host="127.0.0.1", port=0)),
        ("tcp://[::1]:7000", Endpoint("tcp", host="::1", port=7000)),
        ("tcp://[fe80::1%eth0]:65535", Endpoint("tcp", host="fe80::1%eth0", port=65535)),
        ("tcp://my-host.example.com:1", Endpoint("tcp", host="my-host.example.com", port=1)),
        ("tcp://*:7000", Endpoint("tcp", host="*", port=7000)),
        ("unix:///run/app.sock", Endpoint("unix", path="/run/app.sock")),
        ("unix:///run/with%20blank", Endpoint("unix", path="/run/with blank")),
        ("unix:///run/with blank", Endpoint("unix", path="/run/with blank")),
        ("pipe://my-app.v1", Endpoint("pipe", name="my-app.v1")),
        ("memory://test_1", Endpoint("memory", name="test_1")),
        ("stdio://", Endpoint("stdio")),
        ("exec:///usr/bin/ssh?arg=host&arg=a%20b", Endpoint("exec", path="/usr/bin/ssh", args=("host", "a b"))),
        ("exec:///bin/cat", Endpoint("exec", path="/bin/cat")),
        ("exec:///bin/echo?arg=", Endpoint("exec", path="/bin/echo", args=("",))),
    ],
)
def test_every_form_is_read(text: str, endpoint: Endpoint) -> None:
    assert Endpoint.parse(text) == endpoint
    assert Endpoint.parse(endpoint) is endpoint
    assert Endpoint.parse(str(endpoint)) == endpoint
    assert repr(endpoint) == f"Endpoint({str(endpoint)!r})"


def test_every_scheme_has_a_form_that_a_message_can_show() -> None:
    with pytest.raises(EndpointError) as caught:
        Endpoint.parse("http://localhost")
    for form in FORMS.values():
        assert form in str(caught.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is not an endpoint: expected one of"),
        ("localhost:7000", "is not an endpoint: expected one of"),
        ("http://localhost:80", "is not an endpoint: expected one of"),
        ("TCP://localhost:7000", "is not an endpoint: expected one of"),
        ("tcp:/localhost:7000", "is not an endpoint: expected one of"),
        (" tcp://localhost:7000", "is not an endpoint: expected one of"),
        ("tcp://", "has no host: expected tcp://host:port"),
        ("tcp://:7000", "has no host: expected tcp://host:port"),
        ("tcp://localhost", "has no port: write tcp://localhost:PORT"),
        ("tcp://localhost:", "has no port: write tcp://localhost:PORT"),
        ("tcp://localhost:port", "is not tcp://host:port"),
        ("tcp://localhost:65536", "is not tcp://host:port"),
        ("tcp://localhost:-1", "is not tcp://host:port"),
        ("tcp://localhost:7000/path", "has more than a host and a port"),
        ("tcp://localhost:7000?x=1", "has more than a host and a port"),
        ("tcp://localhost:7000#x", "has more than a host and a port"),
        ("tcp://user@localhost:7000", "has more than a host and a port"),
        ("tcp://::1:7000", "put the IPv6 address in brackets"),
        ("tcp://[::1:7000", "is not tcp://host:port"),
        ("tcp://a b:7000", "blanks or control characters"),
        ("tcp://localhost:7000\n", "blanks or control characters"),
        ("tcp://local\thost:7000", "blanks or control characters"),
        ("tcp://a,b:7000", "'a,b' is not the name or address of a host"),
        ("unix://relative/path", "must be absolute, with three slashes"),
        ("unix://", "must be absolute, with three slashes"),
        ("unix:///run/", "does not name a socket file"),
        ("unix:///run/%00", "does not name a socket file"),
        ("pipe://", "expected pipe://name"),
        ("pipe://a/b", "expected pipe://name"),
        ("pipe://a\\b", "expected pipe://name"),
        ("memory://", "expected memory://name"),
        ("memory://a:b", "expected memory://name"),
        ("stdio://x", "takes nothing after it"),
        ("exec://ssh", "needs an absolute path"),
        ("exec:///usr/bin/", "needs an absolute path"),
        ("exec:///bin/cat?args=x", "unknown parameter 'args'"),
        ("exec:///bin/cat?x", "bad query field"),
    ],
)
def test_anything_else_is_an_error_that_says_what_was_expected(text: str, complaint: str) -> None:
    with pytest.raises(EndpointError) as caught:
        Endpoint.parse(text)
    assert complaint in str(caught.value)
    assert repr(text) in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, MisuseError)


def test_the_port_that_was_bound_replaces_the_one_that_was_asked_for() -> None:
    assert str(Endpoint.parse("tcp://[::1]:0").with_port(7000)) == "tcp://[::1]:7000"


def test_an_endpoint_is_a_value() -> None:
    endpoint = Endpoint.parse("exec:///bin/cat?arg=-u")
    assert copy.copy(endpoint) == endpoint
    assert pickle.loads(pickle.dumps(endpoint)) == endpoint
    assert len({endpoint, Endpoint.parse(str(endpoint))}) == 1
    with pytest.raises(AttributeError):
        endpoint.port = 1  # type: ignore[misc]


_HOSTS = st.one_of(
    st.text(string.ascii_lowercase + string.digits + ".-_", min_size=1, max_size=30),
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(str),
)
_NAMES = st.text(string.ascii_letters + string.digits + "._-", min_size=1, max_size=30)
_PATHS = (
    st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1, max_size=30)
    .filter(lambda text: not text.endswith("/"))
    .map("/{}".format)
)
_PRINTABLE = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=20)
ENDPOINTS = st.one_of(
    st.builds(Endpoint, st.just("tcp"), host=_HOSTS, port=st.integers(0, 65535)),
    st.builds(Endpoint, st.just("unix"), path=_PATHS),
    st.builds(Endpoint, st.just("pipe"), name=_NAMES),
    st.builds(Endpoint, st.just("memory"), name=_NAMES),
    st.just(Endpoint("stdio")),
    st.builds(
        Endpoint,
        st.just("exec"),
        path=_PATHS,
        args=st.lists(
            st.text(max_size=10).filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text)), max_size=4
        ).map(tuple),
    ),
)


@given(ENDPOINTS)
def test_what_an_endpoint_prints_is_read_as_the_same_endpoint(endpoint: Endpoint) -> None:
    assert Endpoint.parse(str(endpoint)) == endpoint


@given(
    st.text(max_size=40)
    | st.sampled_from(sorted(FORMS)).flatmap(lambda s: st.text(max_size=30).map((s + "://").__add__))
)
def test_any_text_is_an_endpoint_or_an_endpoint_error(text: str) -> None:
    try:
        endpoint = Endpoint.parse(text)
    except EndpointError:
        return
    assert Endpoint.parse(str(endpoint)) == endpoint
