"""``docs/protocol.md`` says what the code does: its bytes are decoded by it, its numbers and tables are those of it.

An example is a fenced block below a comment ``<!-- bytes: kind value -->``: lines of bytes in hexadecimal, and what
each field is. What the kinds mean is in `CHECKS`; a value is written as Python.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from towline.errors import StatusCode
from towline.layers.encryption import _preamble as preamble
from towline.layers.encryption import _records as records
from towline.layers.encryption._layer import Encryption
from towline.layers.encryption.keys import Psk
from towline.layers.encryption.noise import HandshakeState
from towline.layers.framing import HEADER, STRANGER_LIMIT, Framing, FramingStage
from towline.layers.heartbeat import PING, PONG, Heartbeat, HeartbeatStage
from towline.layers.resume import Resume, _client, _core, _life, _replay, _server, _state
from towline.layers.resume import _wire as rsm
from towline.layers.resume._proof import client_proof, server_proof
from towline.layers.rpc import _core as rpc_core
from towline.layers.rpc import _wire as rpc
from towline.stage import Batch

PAGE = Path(__file__).parents[1] / "docs" / "protocol.md"
if not PAGE.is_file():
    pytest.skip("needs the checkout", allow_module_level=True)

TEXT: Final = PAGE.read_text()

_EXAMPLE: Final = re.compile(r"<!-- bytes: (?P<kind>\w+) (?P<value>.*) -->\n```text\n(?P<lines>(?:.*\n)*?)```")
_LINE: Final = re.compile(r"(?P<data>[0-9a-f]{2}(?: [0-9a-f]{2})*)(?: {2,}(?P<field>\S.*))?")


class Example(NamedTuple):
    kind: str
    value: str
    fields: tuple[tuple[str, bytes], ...]

    @property
    def data(self) -> bytes:
        return b"".join(data for _, data in self.fields)


def examples() -> Iterator[Example]:
    for match in _EXAMPLE.finditer(TEXT):
        fields: list[tuple[str, bytes]] = []
        for line in match["lines"].splitlines():
            parsed = _LINE.fullmatch(line)
            assert parsed is not None, f"no bytes: {line!r}"
            data = bytes.fromhex(parsed["data"])
            if parsed["field"] is None:  # goes on with the field above
                name, before = fields.pop()
                fields.append((name, before + data))
            else:
                fields.append((parsed["field"], data))
        yield Example(match["kind"], match["value"], tuple(fields))


EXAMPLES: Final = list(examples())


# --- what the bytes of each kind must be ----------------------------------------------------------------------------


def widths(*layouts: struct.Struct | int) -> list[int]:
    """The sizes of all fields."""
    sizes: list[int] = []
    for layout in layouts:
        if isinstance(layout, int):
            sizes.append(layout)
            continue
        for count, code in re.findall(r"(\d*)([sBHIQ])", layout.format):
            size = struct.calcsize(f">{count}{code}")
            sizes += [size] if code == "s" else [struct.calcsize(f">{code}")] * int(count or 1)
    return sizes


def resume_layout(message: rsm.Message) -> list[int]:
    match message:
        case rsm.Hello():
            resuming = () if message.session_id is None else (rsm._RESUME,)
            return widths(1, rsm._HELLO, *resuming, *([rsm.MAC_SIZE] if message.mac else []))
        case rsm.Challenge():
            return widths(1, rsm._CHALLENGE)
        case rsm.Proof():
            return widths(1, rsm.MAC_SIZE)
        case rsm.NewSession():
            return widths(1, rsm._NEW_SESSION)
        case rsm.Resumed():
            extensions = [len(message.extensions)] if message.extensions else []
            return widths(1, rsm._RESUMED, *extensions, rsm.MAC_SIZE)
        case rsm.Reject():
            return widths(1, rsm._REJECT, *([rsm.MAC_SIZE] if message.mac else []))
        case rsm.BatchHead():
            return widths(rsm._BATCH)
        case rsm.Ack():
            return widths(rsm._ACK)
        case rsm.Fin():
            return widths(rsm._FIN)
        case rsm.Closed():
            return widths(rsm._CLOSED)
        case rsm.GoAway():
            return widths(rsm._GOAWAY)
        case rsm.Superseded():
            return widths(1, rsm.ID_SIZE)
        case rsm.Abort():
            return widths(rsm._ABORT)


def check_resume(example: Example) -> None:
    message: rsm.Message = eval(example.value, dict(vars(rsm)))
    assert rsm.decode(example.data) == message
    assert message.encode() == example.data
    assert [len(data) for _, data in example.fields] == resume_layout(message)
    assert example.fields[0] == (f"type: {message.type.name}", bytes([message.type]))


RPC_HEADS: Final[Mapping[rpc.Type, struct.Struct]] = {
    rpc.Type.HELLO: rpc._HELLO,
    rpc.Type.CALL: rpc._CALL,
    rpc.Type.REPLY: rpc._REPLY,
    rpc.Type.ERROR: rpc._ERROR,
    rpc.Type.DATA: rpc._DATA,
    rpc.Type.END: rpc._ID,
    rpc.Type.CANCEL: rpc._ID,
    rpc.Type.CREDIT: rpc._CREDIT,
    rpc.Type.GOAWAY: rpc._ID,
}


def check_rpc(example: Example) -> None:
    name, _, fields = example.value.partition(" ")
    kind = rpc.Type[name]

    def keep(*read: object) -> tuple[object, ...]:
        return read

    assert rpc.read(example.data, {kind: keep}) == eval(fields)
    head = widths(RPC_HEADS[kind])
    assert [len(data) for _, data in example.fields][: len(head)] == head
    assert example.fields[0] == (f"type: {name}", bytes([kind]))


def check_framing(example: Example) -> None:
    notes, frames = eval(example.value, dict(vars(rsm)))
    stage = FramingStage(16 << 20)
    (batch,) = stage.incoming([example.data], 0.0)
    assert (batch.notes, batch.frames) == (notes, frames)
    assert stage.outgoing([Batch(notes, frames)], 0.0) == [example.data]
    assert {len(data) for field, data in example.fields if "frame of" in field} == {HEADER.size}


def check_heartbeat(example: Example) -> None:
    measured: list[float] = []
    stage = HeartbeatStage(5.0, 15.0, 0.0, measured.append)
    stage.on_time(5.0)
    ((batch,)) = stage.pending(5.0)
    (ping,) = batch.notes
    assert stage.incoming([Batch([example.data])], 6.0) == []
    if example.value == "PING":
        assert ping == example.data
        (answer,) = stage.pending(6.0)
        assert [note[0] for note in answer.notes] == [PONG]
        assert answer.notes[0][1:] == example.data[1:]
    else:
        assert example.data[0] == PONG
        assert measured == [1.0]


@cache
def transcript() -> dict[str, bytes]:
    """The handshake of the page, by the code."""
    layers = ("resume/1", "heartbeat/1", "framing/1")
    pattern = preamble.PATTERNS["NNpsk0"]
    suite = "25519_ChaChaPoly_SHA256"
    said = preamble.Preamble(
        preamble.SUITES[suite], pattern.number, pattern.first_message, preamble.hash_layers(layers)
    ).pack()
    rekey_after = Encryption(psk=Psk(bytes(range(32)))).rekey_after
    ends = [
        HandshakeState(
            f"Noise_{pattern.name}_{suite}",
            initiator,
            preamble.prologue(said, rekey_after),
            e=bytes(range(first, first + 32)),
            psks=[bytes(range(32))],
        )
        for initiator, first in ((True, 32), (False, 64))
    ]
    client, server = ends
    first = client.write_message()
    server.read_message(first)
    second = server.write_message()
    client.read_message(second)
    binding = client.exporter(b"rsm1 binding", 32)
    assert binding == server.exporter(b"rsm1 binding", 32)
    sends, receives = client.split()
    near = records.RecordStage(sends, receives, rekey_after=rekey_after)
    receives, sends = server.split()
    far = records.RecordStage(sends, receives, rekey_after=rekey_after)
    found = {
        "preamble": said,
        "message_1": first,
        "message_2": len(second).to_bytes(2) + second,
        "handshake_hash": client.handshake_hash,
        "binding": binding,
        "confirmation": b"".join(near.confirm()),
        "hello": b"".join(far.outgoing([b"hello"], 0.0)),
        "close": b"".join(near.close()),
    }
    assert far.incoming([found["confirmation"]], 0.0) == []
    assert near.incoming([found["hello"]], 0.0) == [b"hello"]
    return found


def check_noise(example: Example) -> None:
    assert example.data == transcript()[example.value]


def check_proof(example: Example) -> None:
    key, binding = bytes(range(64, 96)), transcript()["binding"]
    hello = rsm.Hello(
        bytes(range(16)), bytes(range(16, 32)), 8 << 20, 4 << 20, bytes(range(32, 48)), 2, 1000, 2001, mac=bytes(32)
    )
    assert any(eval(each.value, dict(vars(rsm))).encode()[:-32] == hello.body() for each in of_kind("resume"))
    resumed = rsm.Resumed(2, 1000, 2001, 300_000, 8 << 20, 4 << 20)
    proofs = {
        "client": client_proof(key, binding, hello.body()),
        "server": server_proof(key, binding, hello.body(), resumed.body()),
    }
    assert example.data == proofs[example.value]


CHECKS: Final[Mapping[str, Callable[[Example], None]]] = {
    "resume": check_resume,
    "rpc": check_rpc,
    "framing": check_framing,
    "heartbeat": check_heartbeat,
    "noise": check_noise,
    "proof": check_proof,
}


def of_kind(kind: str) -> list[Example]:
    return [example for example in EXAMPLES if example.kind == kind]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: f"{example.kind} {example.value}"[:60])
def test_an_example_is_what_the_code_says(example: Example) -> None:
    CHECKS[example.kind](example)


def test_there_is_an_example_of_every_frame() -> None:
    assert {example.data[0] for example in of_kind("resume")} == set(rsm.Type)
    assert {example.data[0] for example in of_kind("rpc")} == set(rpc.Type)
    assert {example.data[0] for example in of_kind("heartbeat")} == {PING, PONG}
    assert {example.value for example in of_kind("noise")} == set(transcript())
    assert {example.kind for example in EXAMPLES} == set(CHECKS)


# --- tables ---------------------------------------------------------------------------------------------------------


def table(*heading: str) -> list[list[str]]:
    """The rows of the table that has this heading."""
    lines = [line.strip() for line in TEXT.splitlines()]
    start = lines.index(f"| {' | '.join(heading)} |")
    rows: list[list[str]] = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def numbers(text: str) -> list[int]:
    return [int(number.replace(" ", "")) for number in re.findall(r"\d+(?: \d{3})*", text)]


def test_the_frames_of_resume_have_the_types_and_sizes_of_the_table() -> None:
    rows = table("type", "frame", "from", "bytes", "fields")
    assert {(int(kind.strip("`"), 16), name) for kind, name, *_ in rows} == {(each, each.name) for each in rsm.Type}
    for _, name, _, size, fields in rows:
        least = min(len(each.data) for each in of_kind("resume") if each.data[0] == rsm.Type[name])
        base, *more = numbers(size.replace("mode 1", "").replace("mode 2", "").replace("flag 2", ""))
        extras = {0, *more, sum(more), 5}  # of the example with an extension, too
        assert least - base in extras, name
        said = 1 + sum(_size(word) for word in re.findall(r"u8|u32|u64|\b16\b|\b32\b|`RSM`", fields))
        assert said in {base, base + sum(more)}, name


def _size(word: str) -> int:
    return {"u8": 1, "u32": 4, "u64": 8, "`RSM`": 3}.get(word) or int(word)


def test_the_codes_of_reject_and_what_becomes_of_a_session_are_those_of_the_code() -> None:
    rows = table("REJECT", "code", "to a new session", "to one that is resumed")
    assert {(name, int(code)) for name, code, *_ in rows} == {(each.name, each) for each in rsm.RejectCode}
    lost = {rsm.RejectCode[name] for name, _, _, resumed in rows if "lost" in resumed}
    assert lost == set(_client._FINAL)
    for name, code, new, _ in rows:
        rejected = _client.Rejected(rsm.Reject(rsm.RejectCode(int(code)), 1), authentic=True)
        assert rejected.retryable == new.startswith("tried again"), name


def test_the_codes_of_abort_are_those_of_the_code() -> None:
    rows = table("ABORT", "code", "means")
    assert {(name, int(code)) for name, code, _ in rows} == {(each.name, each) for each in rsm.AbortCode}


def test_the_life_of_a_session_is_that_of_the_code() -> None:
    inputs = [each.name.lower() for each in _state.Input]
    rows = table("state", *inputs)
    said = {
        _state.State(state): {
            _state.Input[name.upper()]: _state.State(cell) for name, cell in zip(inputs, cells, strict=True) if cell
        }
        for state, *cells in rows
    }
    assert said == _state.TRANSITIONS


def test_the_times_of_resume_are_those_of_the_code() -> None:
    resume, psk = Resume(), Psk(bytes(range(32)))
    assert [float(seconds) for _, seconds, _ in table("time", "seconds", "of")] == [
        resume.handshake_timeout,
        resume.attach_timeout,
        resume.ttl,
        _server.UNCONFIRMED_TIMEOUT,
        _client.GIVE_UP_SLACK,
        resume.tombstone_ttl,
        _core.ACK_DELAY,
        resume.linger,
        _life.GOODBYE_TIMEOUT,
        Encryption(psk=psk).max_age,
    ]


def test_the_messages_of_the_handshakes_have_the_sizes_of_the_table() -> None:
    rows = table("pattern", "key material", "message 1", "message 2", "message 3")
    assert {row[0] for row in rows} == set(preamble.PATTERNS)
    for name, _, *sizes in rows:
        key = bytes(range(1, 33))
        has_static, has_psk = name.startswith("XX"), name.endswith(("psk0", "psk3"))
        ends = [
            HandshakeState(
                f"Noise_{name}_25519_ChaChaPoly_SHA256",
                initiator,
                s=key if has_static else None,
                psks=[key] if has_psk else [],
            )
            for initiator in (True, False)
        ]
        found: list[str] = []
        while not ends[0].complete:
            message = ends[0].write_message()
            ends[1].read_message(message)
            found.append(str(len(message)))
            ends.reverse()
        assert found == [size for size in sizes if size], name
        assert found[0] == str(preamble.PATTERNS[name].first_message)


def test_the_preamble_names_what_the_code_knows() -> None:
    rows = table("bytes", "field")
    sizes = [int(size) for size, _ in rows if size.isdecimal()]
    assert sizes[:7] == widths(preamble._FIELDS)
    assert _named(_row(rows, "suite")) == preamble.SUITES
    assert _named(_row(rows, "pattern")) == {name: each.number for name, each in preamble.PATTERNS.items()}


def _named(text: str) -> dict[str, int]:
    return {name: int(number) for number, name in re.findall(r"(\d) `([^`]+)`", text)}


def _row(rows: list[list[str]], name: str) -> str:
    return next(field for _, field in rows if field.startswith(name))


def test_the_frames_and_codes_of_calls_are_those_of_the_code() -> None:
    assert {(name, int(kind)) for name, kind, _ in table("frame", "type", "then")} == {
        (each.name, each) for each in rpc.Type
    }
    codes = TEXT.partition("**Codes**")[2]
    found = {(name, int(code)) for code, name in re.findall(r"(\d+)\s+([A-Z_]+)", codes)}
    assert found == {(each.name, each) for each in StatusCode if each}
    flags = re.search(r"Flags: MORE (\d+),\s+STREAM (\d+), END (\d+), REFUSED (\d+)", TEXT)
    assert flags is not None
    assert [int(flag) for flag in flags.groups()] == [
        rpc.Flag.MORE,
        rpc.Flag.STREAM,
        rpc.Flag.END,
        rpc.Flag.REFUSED,
    ]


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (r"0 to 65 518 \| data, sealed", records.MAX_RECORD_SIZE == 65_518),
        (r"After every 65 536 records", Encryption(psk=Psk(bytes(range(32)))).rekey_after == 65_536),
        (r"A frame above 16 MiB", Framing().max_frame_size == 16 << 20),
        (r"no frame may exceed 4 096 bytes", STRANGER_LIMIT == 4_096),
        (r"for its interval \(5 s\)", Heartbeat().interval == 5),
        (r"timeout \(15 s\)", Heartbeat().timeout == 15),
        (r"\*\*costs\*\* its length and 128", _replay.OVERHEAD == 128),
        (r"a window \(8 MiB\)", Resume().window == 8 << 20),
        (r"messages of 256 KiB of cost", _core.ACK_COST == 256 << 10),
        (r"three links in a row", _life.VIOLATIONS == 3),
        (r"has more than 64 KiB", rpc_core.MAX_PIECE == 64 << 10),
        (r"room for 32 KiB", rpc_core.PIECE == 32 << 10),
        (r"costs its payload and 64", rpc_core.OVERHEAD == 64),
        (r"64 KiB before it has heard of any", rpc_core.INITIAL_CREDIT == 64 << 10),
        (r"4 294 967 294 is the last", rpc_core.LAST_ID == 4_294_967_294),
        (r"all ones for none", rpc.NO_LIMIT == 0xFFFFFFFF),
    ],
)
def test_a_number_in_the_text_is_that_of_the_code(words: str, value: Any) -> None:
    assert re.search(words, " ".join(TEXT.split())), words
    assert value, words
