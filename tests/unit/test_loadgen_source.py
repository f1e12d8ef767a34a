"""What is sent: messages of a type that only its name is known of, and recorded ones."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from loadgen.driver import plan_of
from loadgen.pacer import Evenly, Poisson, Profile, Stage
from loadgen.replay import Replay, scan
from loadgen.source import filled, made, make_type
from loadgen.spec import LoadError, LoadSpec, Payload, Recording, Template
from loadgen.workload import Sizes, Stretch
from shardbus import Bus, Command, Event

SECOND = 1_000_000_000


def travelled(message: Any) -> Any:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(message))


def test_a_made_type_travels_as_its_application_would_declare_it() -> None:
    class OrderPlaced(Event, key="order_id"):
        order_id: str
        amount: float = 0.0

    made_type = make_type("OrderPlaced", "order_id", ["amount", "order_id"])
    message = made_type(f0=9.5, f1="42")
    body = msgspec.msgpack.encode(message)
    assert msgspec.msgpack.decode(body, type=OrderPlaced) == OrderPlaced(order_id="42", amount=9.5)
    assert made_type.__shardbus_name__ == "OrderPlaced"
    assert isinstance(message, Event)
    assert isinstance(make_type("GetTotal", "order_id", ["order_id"], kind="command")(f0="42"), Command)


def test_fields_may_have_any_spelling_and_may_be_missing() -> None:
    made_type = make_type("A", "order-id", ["order-id", "class", "f0"])
    assert travelled(made_type(f0="1")) == {"order-id": "1"}
    assert travelled(made_type(f0="1", f1=2, f2=[3])) == {"order-id": "1", "class": 2, "f0": [3]}


@pytest.mark.parametrize(("name", "said"), [("", "name= must not be empty"), ("n" * 200, "128 bytes")])
def test_a_type_that_cannot_be_is_refused(name: str, said: str) -> None:
    with pytest.raises(Exception, match=said) as raised:
        make_type(name, "key", ["key"])
    assert raised.type.__name__ in ("LoadError", "RegistrationError")


def test_a_template_is_filled_wherever_it_has_holes() -> None:
    deep = {"list": [1, "{key}", {"same": 2}]}
    body = {"n": "{n}", "text": "{key}/{n}!", "deep": deep, "same": [1, 2], "fill": "{payload}"}
    make = filled(Template(type="A", key="id", body=body), "event", Sizes(Payload(low=3), 1), "xxxxx")
    first, second = (travelled(message) for message in make(Stretch(7, ["k1", "k2"], [1, 1])))
    deep = {"list": [1, "k1", {"same": 2}]}
    assert first == {"id": "k1", "n": 7, "text": "k1/7!", "deep": deep, "same": [1, 2], "fill": "xxx"}
    assert (second["id"], second["n"], second["text"]) == ("k2", 8, "k2/8!")


def test_keys_may_be_numbers_and_may_stand_within_a_text() -> None:
    numbers = filled(Template(type="A", key="id", key_type="int"), "event", Sizes(Payload(), 1), "")
    assert [travelled(message) for message in numbers(Stretch(0, ["k17"], [1]))] == [{"id": 17}]
    texts = filled(Template(type="A", key="id", body={"id": "user:{key}"}), "event", Sizes(Payload(), 1), "")
    assert [travelled(message) for message in texts(Stretch(0, ["k17"], [1]))] == [{"id": "user:k17"}]


async def test_an_application_handles_what_a_template_makes() -> None:
    class OrderPlaced(Event, key="order_id"):
        order_id: str
        amount: float

    application = Bus("shop")
    seen: list[OrderPlaced] = []

    @application.on(OrderPlaced)
    async def note(event: OrderPlaced) -> None:
        seen.append(event)

    spec = LoadSpec(rate=None, keys=3, template=Template(type="OrderPlaced", key="order_id", body={"amount": 9.5}))
    async with application.local() as client:
        load = made(spec, 0).take(5)
        await client.publish_many(load.messages, ordinals=load.ordinals)
        await client.flush(10.0)
    assert [event.amount for event in seen] == [9.5] * 5


# -- recordings

EVENTS = [
    {"path": f"file{at % 7}", "revision": at // 7 + 1, "time": 1_000_000 + at * at, "added": at} for at in range(100)
]


def written(path: Path, events: list[Any] = EVENTS) -> Recording:
    lines = "".join(json.dumps(event) + "\n" for event in events).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return Recording(path=str(path), type="Changed", key="path")


def replayed(recording: Recording, driver: int = 0, drivers: int = 1) -> list[tuple[Any, int]]:
    replay = Replay(
        recording, scan(recording, None, driver=driver, drivers=drivers), driver=driver, drivers=drivers
    )
    found: list[tuple[Any, int]] = []
    while (load := replay.take(9)).messages:
        found += zip(map(travelled, load.messages), load.ordinals, strict=True)
    return found


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_recording_is_sent_whole_in_order_and_once(tmp_path: Path, name: str) -> None:
    found = replayed(written(tmp_path / name))
    assert [event for event, _ in found] == EVENTS
    assert [ordinal for _, ordinal in found] == [event["revision"] for event in EVENTS]


def test_several_drivers_send_each_key_from_one_of_them_and_nothing_twice(tmp_path: Path) -> None:
    recording = written(tmp_path / "a.jsonl")
    parts = [replayed(recording, driver, 3) for driver in range(3)]
    keys = [{event["path"] for event, _ in part} for part in parts]
    assert sum(map(len, parts)) == 100
    assert len(set().union(*keys)) == sum(map(len, keys)) == 7
    for part in parts:
        assert all(event["revision"] == ordinal for event, ordinal in part)


@pytest.mark.parametrize("arrivals", ["even", "poisson"])
def test_drivers_of_a_recording_keep_the_schedule_of_the_whole(tmp_path: Path, arrivals: str) -> None:
    recording = written(tmp_path / "a.jsonl")

    def coming() -> Evenly | Poisson:
        profile = Profile([Stage(50.0, 1000.0)])
        return Evenly(0, profile) if arrivals == "even" else Poisson(0, profile, random.Random(1))

    whole = scan(recording, coming())
    parts = [scan(recording, coming(), driver=driver, drivers=2) for driver in range(2)]
    assert sorted([*parts[0].offsets_ns, *parts[1].offsets_ns]) == list(whole.offsets_ns)
    assert {part.total for part in parts} == {100}
    assert {part.length_ns for part in parts} == {whole.length_ns}


@pytest.mark.parametrize(
    ("seconds", "until_s", "takes_s"), [(1e3, None, 2.0), (2.0, 2.0, 2.0), (1.5, 1.5, 1.5), (1.505, 1.505, 1.505)]
)
def test_a_recording_at_a_rate_takes_as_long_as_so_many_events_do_or_as_is_asked(
    tmp_path: Path, seconds: float, until_s: float | None, takes_s: float
) -> None:
    coming = Evenly(0, Profile([Stage(50.0, seconds)]))
    until_ns = None if until_s is None else int(until_s * 1e9)
    found = scan(written(tmp_path / "a.jsonl"), coming, until_ns=until_ns)
    assert found.length_ns == int(takes_s * 1e9)


def test_a_recording_goes_at_its_own_times_so_many_times_as_fast(tmp_path: Path) -> None:
    recording = msgspec.structs.replace(written(tmp_path / "a.jsonl"), speed=10.0)
    offsets_ns = scan(recording, None).offsets_ns
    assert list(offsets_ns) == [at * at * SECOND // 10 for at in range(100)]


def test_long_pauses_are_cut_and_time_never_runs_backwards(tmp_path: Path) -> None:
    events = [{"path": "a", "time": time} for time in (100, 101, 5000, 4000, 5001, 5002)]
    recording = msgspec.structs.replace(written(tmp_path / "a.jsonl", events), speed=1.0, gap_s=10.0)
    seconds = [offset // SECOND for offset in scan(recording, None).offsets_ns]
    assert seconds == [0, 1, 11, 11, 12, 13]


TIMES = [
    ("seconds", [1_700_000_000, 1_700_000_002]),
    ("fractions", [1_700_000_000.5, 1_700_000_002.5]),
    ("milliseconds", [1_700_000_000_000, 1_700_000_002_000]),
    ("microseconds", [1_700_000_000_000_000, 1_700_000_002_000_000]),
    ("nanoseconds", [1_700_000_000_000_000_000, 1_700_000_002_000_000_000]),
    ("text", ["2024-01-31T23:59:59Z", "2024-02-01T00:00:01Z"]),
    ("text with a zone", ["2024-01-31T23:59:59+00:00", "2024-02-01T02:00:01+02:00"]),
]


@pytest.mark.parametrize("times", [row[1] for row in TIMES], ids=[row[0] for row in TIMES])
def test_times_are_understood_as_they_are_usually_written(tmp_path: Path, times: list[Any]) -> None:
    events = [{"path": "a", "at": time} for time in times]
    recording = msgspec.structs.replace(written(tmp_path / "a.jsonl", events), speed=1.0, time="at")
    assert scan(recording, None).offsets_ns[1] == pytest.approx(2 * SECOND, abs=1000)


FAULTS = [
    (b'{"path": "a"}\nnonsense\n', {}, "line 2 is no JSON object"),
    (b"[1]\n", {}, "line 1 is no JSON object"),
    (b'{"file": "a"}\n', {}, "line 1 has no field 'path'"),
    (b'\n\n{"path": 1.5}\n', {}, "line 3 has the key 1.5"),
    (b'{"path": true}\n', {}, "line 1 has the key True"),
    (b"", {}, "has no events to send"),
    (b'{"path": "a"}\n', {"speed": 1.0}, "line 1 has no time in its field 'time'"),
    (b'{"path": "a", "time": "soon"}\n', {"speed": 1.0}, "line 1 has no time"),
]


@pytest.mark.parametrize(("content", "changes", "said"), FAULTS, ids=[row[2] for row in FAULTS])
def test_a_line_that_is_no_event_is_named_before_the_run(
    tmp_path: Path, content: bytes, changes: dict[str, Any], said: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    recording = Recording(path=str(path), type="Changed", key="path", **changes)
    with pytest.raises(LoadError, match=said):
        scan(recording, None)


@pytest.mark.parametrize("name", ["none.jsonl", "none.jsonl.gz"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(LoadError, match=r"none\.jsonl(\.gz)? cannot be read"):
        scan(Recording(path=str(tmp_path / name), type="A", key="b"), None)


def test_a_file_cut_off_in_the_middle_of_its_compression_is_no_short_recording(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    recording = written(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(LoadError, match="cannot be read"):
        scan(recording, None)


def test_a_duration_ends_a_recording_early(tmp_path: Path) -> None:
    recording = written(tmp_path / "a.jsonl")
    plan = plan_of(LoadSpec(rate=50.0, recording=recording, warmup_s=0.0, duration_s=1.0))
    assert plan.planned == 50
    whole = plan_of(LoadSpec(rate=50.0, recording=recording, warmup_s=0.0, duration_s=None))
    assert whole.planned == 100
