"""`features load`, `get` and `check` on real Kafka and Redis, with a features worker as an operator starts it."""

import asyncio
import re
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pyarrow
import pytest
import yaml
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient
from pyarrow import parquet
from redis.asyncio import Redis

from app.adapters.feast_codec import row_key
from app.adapters.redis_feast import RedisFeatureStore
from app.adapters.topic_reader import ends_of
from app.adapters.topics import TopicAdmin, read_documents, wanted_topics
from app.commands.stored_rows import StoredRows
from app.domain.feature_updates import FeatureRow
from app.domain.features import EntityKey
from tests.support.features_world import FeaturesWorld, feature_view, features_world, model
from tests.support.markdown import ROOT, blocks_of
from tests.support.stack import ServiceStack

PAGE = ROOT / "docs" / "features-writing.md"
ISO_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
TODAY = ("--event-time-value", f"{datetime.now(UTC):%F}")
CREDIT = ROOT / "examples" / "credit" / "data" / "german_credit.csv"


@pytest.fixture(scope="module")
def world(stack: ServiceStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FeaturesWorld]:
    """A running worker, three views, and two model versions that need features of them."""
    prefix = f"t{uuid.uuid4().hex[:10]}."
    with features_world(stack, tmp_path_factory.mktemp("features"), prefix) as made:
        person = {"age_years": "INT64", "income": "DOUBLE", "history": "STRING", "owner": "BOOL"}
        made.publish(
            [
                feature_view("applicant", made.project, person),
                feature_view("credit", made.project, {"housing": "STRING", "job": "STRING", "age": "INT64"}),
                feature_view("short", made.project, {"mood": "STRING"}, ttl="1h"),
                feature_view("scans", made.project, {"pages": "BYTES_LIST", "days": "UNIX_TIMESTAMP_LIST"}),
                feature_view(
                    "bureau",
                    made.project,
                    {"score": "INT64"},
                    source={
                        "type": "http",
                        "endpoints": ["http://127.0.0.1:1"],
                        "writeBack": {"project": made.project, "maxAge": "1d"},
                    },
                ),
                feature_view(
                    "payments",
                    made.project,
                    {"amount": "DOUBLE"},
                    aggregate=[
                        {"of": "amount", "op": "sum", "windows": ["24h", "30d"]},
                        {"op": "count", "windows": ["24h"]},
                    ],
                    lateness="1h",
                ),
                *model("pd", [{"ref": "applicant.age_years", "required": True}, {"ref": "applicant.income"}]),
                view_of("spare_id", feature_view("spare", made.project, {"mood": "STRING"})),
                view_of("wanted_id", feature_view("wanted", made.project, {"trust": "STRING"})),
                *model("wants", [{"ref": "spare.mood"}, {"ref": "wanted.trust", "required": True}]),
                *model("scored", [{"ref": "bureau.score", "required": True}]),
                *model("strict", [{"ref": "applicant.history", "required": True, "maxAge": "1h"}]),
            ]
        )
        made.worker.start()
        yield made


def view_of(entity: str, view: dict[str, Any]) -> dict[str, Any]:
    """The same view, of another entity."""
    return {**view, "spec": {**view["spec"], "entities": [{"name": entity, "type": "INT64"}]}}


def test_a_file_is_loaded_and_seen(world: FeaturesWorld, tmp_path: Path) -> None:
    """CSV, JSON lines and Parquet become the same rows; empty cells are null; what is unknown is named and left."""
    csv = tmp_path / "people.csv"
    csv.write_text("id,age_years,income,history,owner,shoe\n1,41,52000.5,good,true,44\n2,17,,,false,39\n")
    shown = world.run_json("features", "load", csv, "--view", "applicant", "--map", "id=applicant_id", *TODAY)
    assert {name: shown[name] for name in ("rows", "published", "stored", "ignored_columns")} == {
        "rows": 2,
        "published": 2,
        "stored": True,
        "ignored_columns": ["shoe"],
    }
    assert world.features("applicant", "applicant_id=1") == {
        "age_years": ("PRESENT", 41),
        "income": ("PRESENT", 52000.5),
        "history": ("PRESENT", "good"),
        "owner": ("PRESENT", True),
    }
    assert world.features("applicant", "applicant_id=2")["income"] == ("NULL", None)

    lines = tmp_path / "people.jsonl"
    lines.write_bytes(b"".join(orjson.dumps({"applicant_id": n, "age_years": 50 + n}) + b"\n" for n in (3, 4)))
    world.run("features", "load", lines, "--view", "applicant", *TODAY)
    table = tmp_path / "people.parquet"
    parquet.write_table(pyarrow.table({"applicant_id": [5, 6], "income": [1.5, None], "age_years": [55, 56]}), table)
    world.run("features", "load", table, "--view", "applicant", *TODAY)
    assert [world.features("applicant", f"applicant_id={n}")["age_years"][1] for n in (3, 4, 5, 6)] == [53, 54, 55, 56]
    assert world.features("applicant", "applicant_id=6")["income"] == ("NULL", None)
    assert world.features("applicant", "applicant_id=3")["income"] == ("MISSING", None)


def test_lists_of_bytes_and_times_are_loaded_and_seen(world: FeaturesWorld, tmp_path: Path) -> None:
    """From Parquet's own types into the store, and out as JSON and as text: bytes in hexadecimal digits."""
    table = tmp_path / "scans.parquet"
    days = [datetime(2026, 1, 31, tzinfo=UTC)]
    parquet.write_table(pyarrow.table({"applicant_id": [910], "pages": [[b"\x00\xff", b""]], "days": [days]}), table)
    world.run("features", "load", table, "--view", "scans", *TODAY)
    assert world.features("scans", "applicant_id=910") == {
        "pages": ("PRESENT", ["00ff", ""]),
        "days": ("PRESENT", [1_769_817_600]),
    }
    assert "['00ff', '']" in world.run("features", "get", "scans", "applicant_id=910").stdout


def test_the_example_s_data_can_be_loaded(world: FeaturesWorld) -> None:
    """Columns are mapped, and the row's number stands for the entity that the file does not name."""
    shown = world.run_json(
        "features", "load", CREDIT, "--view", "credit", "--map", "@row=applicant_id", "--map", "age_in_years=age",
        "--event-time-value", "2026-01-31T00:00:00Z",
    )  # fmt: skip
    assert (shown["rows"], shown["published"]) == (1_000, 1_000)
    assert world.features("credit", "applicant_id=1") == {
        "housing": ("PRESENT", "own"),
        "job": ("PRESENT", "skilled employee / official"),
        "age": ("PRESENT", 67),
    }


def test_what_is_shown_fits_a_terminal(world: FeaturesWorld, tmp_path: Path) -> None:
    """Tables are 80 columns wide at most, and say value, type, status and age."""
    file = tmp_path / "one.csv"
    file.write_text("applicant_id,age_years\n900,41\n")
    told = world.run("features", "load", file, "--view", "applicant", *TODAY).stdout
    shown = world.run("features", "get", "applicant", "applicant_id=900").stdout
    checked = world.run("features", "check", "--view", "applicant", code=1).stdout
    assert max(len(line) for line in (told + shown + checked).splitlines()) <= 80
    assert "1 rows of one.csv are stored in view applicant" in told
    assert all(word in shown for word in ("age_years", "41", "INT64", "PRESENT", "MISSING"))


def test_bad_rows_are_listed_and_nothing_is_published(world: FeaturesWorld, tmp_path: Path) -> None:
    """Each fault says its line and column; nothing of the file is stored, with or without --dry-run."""
    file = tmp_path / "bad.csv"
    file.write_text("applicant_id,age_years,owner\n700,41,true\n701,old,true\n702,1,perhaps\n,1,true\n704,1\n")
    for more in ((), ("--dry-run",)):
        told = world.run("features", "load", file, "--view", "applicant", *TODAY, *more, code=1).stderr
        assert "4 of 5 rows" in told
        assert "line 3: column age_years: 'old' is not INT64" in told
        assert "line 4: column owner: 'perhaps' is not BOOL" in told
        assert "line 5: column applicant_id" in told
        assert "line 6: 2 cells, and the header has 3" in told
    assert world.features("applicant", "applicant_id=700", code=1)["age_years"] == ("MISSING", None)
    file.write_text("applicant_id,age_years\n700,41\n")
    assert (
        "Nothing was published"
        in world.run("features", "load", file, "--view", "applicant", *TODAY, "--dry-run").stdout
    )
    assert world.features("applicant", "applicant_id=700", code=1)["age_years"] == ("MISSING", None)


def test_a_value_that_no_decision_could_use_is_found_first(world: FeaturesWorld, tmp_path: Path) -> None:
    """It is a fault of its row as others are, with and without --dry-run, and nothing is published."""
    file = tmp_path / "long.jsonl"
    texts = ["good", "x" * 100_000, "bad"]
    file.write_bytes(
        b"".join(orjson.dumps({"applicant_id": 710 + n, "history": t}) + b"\n" for n, t in enumerate(texts))
    )
    for more in ((), ("--dry-run",)):
        told = world.run("features", "load", file, "--view", "applicant", *TODAY, *more, code=1).stderr
        assert "1 of 3 rows" in told
        assert "line 2: column history: values.history has 100004 bytes, and 65536 are allowed" in told
    assert world.features("applicant", "applicant_id=710", code=1)["history"] == ("MISSING", None)


def test_a_row_that_kafka_does_not_take_is_found_first(
    world: FeaturesWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One byte too many is a fault of that line, and rows before it stay unpublished; without it, it goes through.

    The worker, whose bound on values is lower, refuses it, and its letter is known in spite of its size.
    """
    monkeypatch.setenv("BROKER_FEATURE_VALUE_BYTES_MAX", "2000000")
    most, file = world.settings.record_bytes_max, tmp_path / "wide.jsonl"
    load = ["features", "load", file, "--view", "applicant", *TODAY]

    def write(length: int) -> None:
        rows = ({"applicant_id": 715, "history": "good"}, {"applicant_id": 716, "history": "x" * length})
        file.write_bytes(b"\n".join(map(orjson.dumps, rows)))

    write(1_500_000)
    told = re.search(
        r"line 2: its update has (\d+) bytes, and BROKER_RECORD_BYTES_MAX", world.run(*load, code=1).stderr
    )
    assert told is not None
    fits = 1_500_000 - (int(told[1]) - most)
    write(fits + 1)
    assert "so nothing was published" in world.run(*load, "--dry-run", code=1).stderr
    assert world.features("applicant", "applicant_id=715", code=1)["history"] == ("MISSING", None)
    write(fits)
    shown = world.run_json(*load, code=1)
    assert (shown["refused_rows"], shown["refused"][0]["place"]) == (1, "line 2")
    assert world.features("applicant", "applicant_id=715")["history"] == ("PRESENT", "good")


def test_rows_that_the_workers_refuse_are_told(world: FeaturesWorld, tmp_path: Path) -> None:
    """What went to the dead-letter topic in this load is not stored: its rows, the reason, and exit code 1."""
    file = tmp_path / "barred.csv"
    file.write_text("applicant_id,age_years\n720,41\n721,42\n722,43\n")
    key = row_key(EntityKey(world.project, ("applicant_id",), (721,), ("INT64",)))
    load = ["features", "load", file, "--view", "applicant", *TODAY]

    async def with_redis(do: Callable[[Redis], Awaitable[object]]) -> None:
        client = Redis.from_url(world.env["BROKER_REDIS_URL"])
        await do(client)
        await client.aclose()

    asyncio.run(with_redis(lambda client: client.set(key, b"text")))
    shown = world.run_json(*load, code=1)
    assert (shown["stored"], shown["refused_rows"], shown["refused"][0]["place"]) == (False, 1, "line 3")
    assert "is no row of features" in shown["refused"][0]["reason"]
    again = world.run(*load, code=1)
    assert "2 rows of barred.csv are stored in view applicant" in again.stdout
    assert f"1 of 3 rows of {file} are not stored" in again.stderr
    assert f"they lie in {world.settings.topic('features.updates-dlt')}" in again.stderr
    assert "\n  line 3: view applicant: what Redis holds under the entity's key is no row of features" in again.stderr
    assert world.features("applicant", "applicant_id=722")["age_years"] == ("PRESENT", 43)
    asyncio.run(with_redis(lambda client: client.delete(key)))
    shown = world.run_json(*load)
    assert (shown["stored"], shown["refused_rows"], shown["refused"]) == (True, 0, [])
    assert world.features("applicant", "applicant_id=721")["age_years"] == ("PRESENT", 42)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--view", "loan"], "there is no FeatureView loan"),
        (["--view", "applicant"], "no column applicant_id"),
        (["--view", "applicant", "--map", "id=applicant_id", "--map", "x=age_years"], "the file has no column x"),
        (["--view", "applicant", "--map", "id=applicant_id", "--map", "age_years=age"], "has no age to load"),
        (["--view", "applicant", "--map", "id"], "write COLUMN=FEATURE"),
        (["--view", "applicant", "--map", "id=applicant_id", "--event-time", "asof"], "no such column"),
        (["--view", "applicant", "--map", "id=applicant_id", "--event-time-value", "soon"], "write ISO 8601"),
        (["--view", "applicant", "--map", "id=applicant_id", "--timeout", "soon"], "--timeout"),
        (["--view", "applicant", "--map", "id=applicant_id", "--format", "xlsx"], "--format"),
        (["--view", "short", "--map", "id=applicant_id"], "no column of the file is a feature"),
    ],
)
def test_a_wrong_command_is_told(world: FeaturesWorld, tmp_path: Path, arguments: list[str], said: str) -> None:
    """Exit code 2, and a line that says what to do."""
    file = tmp_path / "people.csv"
    file.write_text("id,age_years\n1,41\n")
    times = () if any(each.startswith("--event-time") for each in arguments) else TODAY
    assert said in world.run("features", "load", file, *arguments, *times, code=2).stderr


def test_aggregates_of_a_load_that_is_run_twice(world: FeaturesWorld, tmp_path: Path) -> None:
    """Event times come from a column; the second run changes nothing, for each row has an id of its own."""
    now_ms = time.time_ns() // 1_000_000
    file = tmp_path / "payments.csv"
    times = [now_ms - 40 * 3_600_000, now_ms - 1_800_000, now_ms - 1_800_000, now_ms - 60_000]
    file.write_text("applicant_id,amount,at\n" + "".join(f"800,10.5,{at}\n" for at in times))
    for _ in range(2):
        world.run("features", "load", file, "--view", "payments", "--event-time", "at")
        assert world.features("payments", "applicant_id=800") == {
            "amount": ("PRESENT", 10.5),
            "amount_sum_24h": ("PRESENT", 31.5),
            "amount_sum_30d": ("PRESENT", 42.0),
            "count_24h": ("PRESENT", 3),
        }


def test_aggregates_count_rows_once_in_whatever_arrangement(world: FeaturesWorld, tmp_path: Path) -> None:
    """Another format, columns and rows in another order, a row less: no event is new."""
    now_ms = time.time_ns() // 1_000_000
    rows = [(801, 1.5, now_ms - 30_000), *[(801, 2.0, now_ms - 20_000)] * 2, (801, 0.5, now_ms - 10_000)]
    load = ("--view", "payments", "--event-time", "at")
    counted = {"amount_sum_24h": ("PRESENT", 6.0), "amount_sum_30d": ("PRESENT", 6.0), "count_24h": ("PRESENT", 4)}
    csv = tmp_path / "first.csv"
    csv.write_text("applicant_id,amount,at\n" + "".join(f"{who},{amount},{at}\n" for who, amount, at in rows))
    assert world.run_json("features", "load", csv, *load)["stored_before"] == 0
    turned, lines = tmp_path / "turned.csv", tmp_path / "lines.jsonl"
    turned.write_text("at,amount,applicant_id\n" + "".join(f"{at},{amount},{who}\n" for who, amount, at in rows[::-1]))
    lines.write_bytes(
        b"\n".join(orjson.dumps({"at": at, "amount": amount, "applicant_id": who}) for who, amount, at in rows)
    )
    less = tmp_path / "less.csv"
    less.write_text("applicant_id,amount,at\n" + "".join(f"{who},{amount},{at}\n" for who, amount, at in rows[1:]))
    for file in (turned, lines, less):
        told = world.run("features", "load", file, *load).stderr
        assert "note: the store has at least 1 of" in told
        found = world.features("payments", "applicant_id=801")
        assert {name: found[name] for name in counted} == counted, file.name
    more = tmp_path / "more.csv"
    more.write_text(f"{turned.read_text()}{rows[-1][2]},0.25,801\n")
    world.run("features", "load", more, *load)
    assert world.features("payments", "applicant_id=801")["count_24h"] == ("PRESENT", 5)


def test_rows_that_change_nothing_are_told(world: FeaturesWorld, tmp_path: Path) -> None:
    """Before and beside the load: what is there, what is older, and what corrects nothing for want of a later time."""
    file = tmp_path / "news.csv"
    load = ["features", "load", file, "--view", "applicant", "--event-time", "at"]
    head, at = "applicant_id,age_years,at\n", "2026-01-31T00:00:00Z"
    file.write_text(f"{head}830,41,{at}\n830,42,{at}\n831,50,{at}\n")
    told = world.run(*load)
    assert "warning: 1 of 3 rows change nothing: 1 is of the very event time" in told.stderr
    assert "change nothing" not in told.stdout
    assert world.features("applicant", "applicant_id=830")["age_years"] == ("PRESENT", 41)
    file.write_text(f"{head}830,43,{at}\n831,50,{at}\n831,49,2026-01-30\n832,1,{at}\n")
    for more in (["--dry-run"], []):
        shown = world.run_json(*load, *more)
        assert (shown["outdated_rows"], shown["outdated"]) == (3, {"same": 1, "older": 1, "conflicting": 1})
    file.write_text(f"{head}830,43,2026-02-01\n832,1,{at}\n")
    told = world.run(*load)
    assert told.stderr == ""
    assert "1 of 2 rows change nothing: 1 is there already, with the same event time and values." in " ".join(
        told.stdout.split()
    )
    assert world.features("applicant", "applicant_id=830")["age_years"] == ("PRESENT", 43)


def test_events_older_than_what_the_store_has_are_told(world: FeaturesWorld, tmp_path: Path) -> None:
    """A backfill after newer events: the time of the last event is known, though aggregates are computed ever anew."""
    now_ms, hour = time.time_ns() // 1_000_000, 3_600_000
    file = tmp_path / "backfill.csv"
    load = ["features", "load", file, "--view", "payments", "--event-time", "at"]

    def write(*hours: float) -> None:
        file.write_text("applicant_id,amount,at\n" + "".join(f"840,1,{now_ms - round(ago * hour)}\n" for ago in hours))

    write(2)
    assert world.run_json(*load)["late_rows"] == 0
    # In time by the last event, and long before the moment of the aggregates' computation.
    write(2.9)
    assert world.run_json(*load)["late_rows"] == 0
    assert world.features("payments", "applicant_id=840")["count_24h"] == ("PRESENT", 2)
    write(20, 10, 1.9)
    told = world.run(*load, "--dry-run").stderr
    assert (
        "warning: at least 2 of 3 rows are more than the lateness of view payments (1h) behind what the store" in told
    )
    shown = world.run_json(*load)
    assert (shown["late_rows"], shown["outdated_rows"]) == (2, 2)
    assert world.features("payments", "applicant_id=840")["count_24h"] == ("PRESENT", 3)
    again = world.run(*load)
    assert "note: at least 2 of 3 rows" in again.stderr
    assert "an earlier load may have counted these" in again.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["load", "FILE", "--view", "applicant", *TODAY],
        ["load", "FILE", "--view", "applicant", *TODAY, "--dry-run"],
        ["get", "applicant", "applicant_id=1"],
        ["check", "--view", "applicant"],
        ["check", "--view", "applicant", "--keys", "FILE"],
    ],
)
def test_a_redis_that_does_not_answer_is_told(
    world: FeaturesWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    """Exit code 2, the variable's name, and nothing is published: what the store has is not known."""
    file = tmp_path / "away.csv"
    file.write_text("applicant_id,age_years\n850,41\n")
    world.redirect(monkeypatch, "BROKER_REDIS_URL", "redis://127.0.0.1:1/0")
    told = world.run("features", *(str(file) if each == "FILE" else each for each in command), code=2).stderr
    assert "is BROKER_REDIS_URL right?" in told
    assert len(told.splitlines()) == 1


def test_rows_out_of_order_are_told(world: FeaturesWorld, tmp_path: Path) -> None:
    """Aggregates do not count what is later than the lateness, and the load says how much that is."""
    now_ms = time.time_ns() // 1_000_000
    file = tmp_path / "disorder.csv"
    times = [now_ms - 60_000, now_ms - 8 * 3_600_000, now_ms - 90_000]
    file.write_text("applicant_id,amount,at\n" + "".join(f"810,1,{at}\n" for at in times))
    load = ["features", "load", file, "--view", "payments", "--event-time", "at"]
    assert "at least 1 of 3 rows" in world.run(*load, "--dry-run").stderr
    assert world.run_json(*load)["late_rows"] == 1
    assert world.features("payments", "applicant_id=810")["count_24h"] == ("PRESENT", 2)


def test_a_load_that_is_killed_goes_on(world: FeaturesWorld, tmp_path: Path) -> None:
    """What was acknowledged before the kill is not sent again, and in the end all rows are there, with one time."""
    file, rows = tmp_path / "many.csv", 20_000
    file.write_text("applicant_id,age_years\n" + "".join(f"{10_000 + n},{n}\n" for n in range(rows)))
    command = [sys.executable, "-m", "app.cli", "features", "load", str(file), "--view", "applicant", *TODAY]
    journals = Path(world.env["BROKER_DATA_DIR"]) / "loads"
    before = set(journals.glob("*.json"))
    with subprocess.Popen(command, env=world.env, cwd=ROOT, stderr=subprocess.DEVNULL) as load:
        while not set(journals.glob("*.json")) - before:
            assert load.poll() is None
            time.sleep(0.01)
        load.kill()
    [journal] = set(journals.glob("*.json")) - before
    begun = orjson.loads(journal.read_bytes())
    shown = world.run_json("features", "load", file, "--view", "applicant", "--timeout", "120s", *TODAY)
    assert shown["resumed_after"] == begun["rows"] > 0
    assert shown["published"] == rows - begun["rows"]
    for number in (0, begun["rows"] - 1, min(begun["rows"], rows - 1), rows - 1):
        found = world.run_json("features", "get", "applicant", f"applicant_id={10_000 + number}")["features"][0]
        assert found["value"] == number
        assert found["event_time"] is not None
    assert not journal.exists()


def test_a_load_that_is_interrupted_says_what_to_do(world: FeaturesWorld, tmp_path: Path) -> None:
    """Ctrl-C: one line, exit code 130, and the next run goes on."""
    file = tmp_path / "broken_off.csv"
    file.write_text("applicant_id,age_years\n955,41\n")
    command = [sys.executable, "-m", "app.cli", "features", "load", str(file), "--view", "applicant", *TODAY]
    journals = Path(world.env["BROKER_DATA_DIR"]) / "loads"
    before = set(journals.glob("*.json"))
    world.worker.stop()
    try:
        with subprocess.Popen(command, env=world.env, cwd=ROOT, stderr=subprocess.PIPE, text=True) as load:
            while not set(journals.glob("*.json")) - before:
                assert load.poll() is None
                time.sleep(0.01)
            time.sleep(0.5)
            load.send_signal(signal.SIGINT)
            said = load.communicate(timeout=30)[1]
        assert (load.returncode, said.splitlines()) == (
            130,
            ["interrupted: run the same command again, and it goes on where it was"],
        )
    finally:
        world.worker.start()
    assert world.run_json("features", "load", file, "--view", "applicant", *TODAY)["published"] == 0
    assert world.features("applicant", "applicant_id=955")["age_years"] == ("PRESENT", 41)


def test_a_check_that_is_interrupted_has_published_nothing(
    world: FeaturesWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says so, for what else would the next run go on from."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    file = tmp_path / "unchecked.csv"
    file.write_text("applicant_id,age_years\n956,41\n")
    monkeypatch.setattr(StoredRows, "of", interrupt)
    told = world.run("features", "load", file, "--view", "applicant", *TODAY, code=130).stderr
    assert told == "interrupted: nothing was published by this run; run the same command again\n"


def test_without_a_worker_the_wait_ends(world: FeaturesWorld, tmp_path: Path) -> None:
    """What is published and not stored in time is told, and the next run only waits for it."""
    file = tmp_path / "late.csv"
    file.write_text("applicant_id,age_years\n950,41\n")
    world.worker.stop()
    try:
        told = world.run("features", "load", file, "--view", "applicant", "--timeout", "500ms", *TODAY, code=1).stderr
        assert "does `model-broker worker features` run?" in told
    finally:
        world.worker.start()
    assert world.run_json("features", "load", file, "--view", "applicant", *TODAY)["published"] == 0
    assert world.features("applicant", "applicant_id=950")["age_years"] == ("PRESENT", 41)


def test_a_journal_of_records_that_are_gone_is_void(stack: ServiceStack, tmp_path: Path) -> None:
    """A topic that was made anew, or of which Kafka has deleted records: what was left is published again, and told."""
    with features_world(stack, tmp_path, f"t{uuid.uuid4().hex[:10]}.") as world:
        world.publish([feature_view("applicant", world.project, {"age_years": "INT64"})])
        topic = world.settings.topic("features.updates")
        admin = AdminClient({"bootstrap.servers": world.settings.kafka_bootstrap})

        def written(name: str, first: int, rows: int) -> Path:
            file = tmp_path / name
            file.write_text("applicant_id,age_years\n" + "".join(f"{first + n},41\n" for n in range(rows)))
            return file

        def load(file: Path, *more: str) -> Any:
            return world.run_json("features", "load", file, "--view", "applicant", *TODAY, *more)

        def leave(file: Path) -> None:
            more = ("--view", "applicant", "--timeout", "300ms", *TODAY)
            assert (
                "does `model-broker worker features` run?" in world.run("features", "load", file, *more, code=1).stderr
            )

        first, other, second = written("a.csv", 1, 50), written("b.csv", 1_000, 200), written("c.csv", 2_000, 50)
        leave(first)
        admin.delete_topics([topic], operation_timeout=30)[topic].result()
        while topic in TopicAdmin(world.settings).partition_counts():
            time.sleep(0.05)
        TopicAdmin(world.settings).apply(wanted_topics(read_documents(), world.settings, []))
        told = world.run("features", "load", first, "--view", "applicant", "--dry-run", *TODAY).stderr
        assert f"note: this load begins anew, from the first row: topic {topic} was created anew" in told
        world.worker.start()
        assert load(other)["published"] == 200
        found = load(first)
        assert (found["published"], found["resumed_after"], found["stored"]) == (50, 0, True)
        assert world.features("applicant", "applicant_id=7")["age_years"] == ("PRESENT", 41)

        world.worker.stop()
        leave(second)
        ends = ends_of(world.settings, topic)
        for future in admin.delete_records([TopicPartition(topic, *each) for each in ends.items()]).values():
            future.result()
        world.worker.start()
        assert load(other)["published"] == 200
        found = load(second)
        assert (found["published"], found["resumed_after"], found["stored"]) == (50, 0, True)
        assert world.features("applicant", "applicant_id=2007")["age_years"] == ("PRESENT", 41)


def test_needs_are_held_against_the_store(world: FeaturesWorld, tmp_path: Path) -> None:
    """Shares by status, the versions that would reject, and an exit code that a pipeline can use."""
    file, keys = tmp_path / "some.csv", tmp_path / "keys.csv"
    file.write_text("applicant_id,age_years,history\n" + "".join(f"{600 + n},{n},good\n" for n in range(10)))
    world.run("features", "load", file, "--view", "applicant", "--event-time-value", "2026-01-31T00:00:00Z")
    keys.write_text("applicant_id\n" + "".join(f"{600 + n}\n" for n in range(12)))
    asked = ["features", "check", "--view", "applicant", "--keys", keys]
    shown = world.run_json(*asked, "--tolerate", "20", code=1)
    found = {(each["ref"], each["max_age_ms"]): each for each in shown["features"]}
    age = found["applicant.age_years", None]
    assert (age["statuses"]["PRESENT"], age["statuses"]["MISSING"], age["would_reject"]) == (10, 2, [])
    assert found["applicant.income", None]["optional_for"] == ["pd/1"]
    history = found["applicant.history", 3_600_000]
    assert (history["statuses"]["STALE"], history["would_reject"]) == (10, ["strict/1"])
    assert not shown["sound"]
    assert "strict/1 would reject" in world.run(*asked, "--tolerate", "20", code=1).stdout
    of_one = world.run_json("features", "check", "--view", "credit")
    assert (of_one["features"], of_one["views_not_checked"]) == ([], [])
    assert world.run_json("features", "check", code=1)["views_not_checked"] == ["bureau"]
    assert "View bureau was not checked" in world.run("features", "check", code=1).stdout
    sampled = world.run_json("features", "check", "--view", "applicant", "--sample", "7", code=1)
    assert {each["entities"] for each in sampled["features"]} == {7}


def test_a_store_that_knows_no_entity(world: FeaturesWorld) -> None:
    """It fails the check where a version cannot do without; where all can, it is told, and all is sound."""
    shown = world.run_json("features", "check", "--view", "spare")
    assert (shown["views_without_entities"], shown["sound"]) == (["spare"], True)
    told = world.run("features", "check", "--view", "spare").stdout
    assert "View spare: the store knows no entity of it." in told
    shown = world.run_json("features", "check", "--view", "wanted", code=1)
    assert (shown["views_without_entities"], shown["sound"]) == (["wanted"], False)
    assert shown["features"][0]["would_reject"] == ["wants/1"]
    told = world.run("features", "check", "--view", "wanted", code=1).stdout
    assert "wants/1 would reject requests for want of wanted.trust" in told


def test_a_value_past_its_view_s_ttl_is_stale(world: FeaturesWorld, tmp_path: Path) -> None:
    """A row that another view keeps alive shows the value with its status and reason."""
    file = tmp_path / "mood.csv"
    file.write_text("applicant_id,mood,age_years\n960,fine,30\n")
    world.run("features", "load", file, "--view", "applicant", *TODAY)
    world.run("features", "load", file, "--view", "short", "--event-time-value", "2026-01-31T00:00:00Z")
    [mood] = world.run_json("features", "get", "short", "applicant_id=960")["features"]
    assert (mood["status"], mood["value"], mood["reason"]) == ("STALE", "fine", "is past its view's ttl")


def test_what_is_kept_of_a_feature_server_is_shown(world: FeaturesWorld) -> None:
    """A view with writeBack has rows in Redis, and can be looked at; it is still the server's to fill."""
    key = EntityKey(world.project, ("applicant_id",), (970,), ("INT64",))

    async def keep() -> None:
        store = RedisFeatureStore(world.env["BROKER_REDIS_URL"])
        await store.write([FeatureRow("bureau", key, ("score",), (7,), ("INT64",), 1_700_000_000_000)])
        await store.close()

    asyncio.run(keep())
    assert world.features("bureau", "applicant_id=970") == {"score": ("PRESENT", 7)}
    assert "view bureau is a feature server's" in world.run("features", "check", "--view", "bureau", code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["get", "loan", "applicant_id=1"], "there is no FeatureView loan"),
        (["get", "applicant", "17"], "write NAME=VALUE"),
        (["get", "applicant", "name=x"], "applicant_id is missing"),
        (["get", "applicant", "applicant_id=x"], "send applicant_id as INT64"),
        (["check", "--keys", __file__], "say which by --view"),
        (["check", "--view", "loan"], "there is no FeatureView loan"),
    ],
)
def test_a_wrong_question_is_told(world: FeaturesWorld, arguments: list[str], said: str) -> None:
    """Exit code 2, and a line that says what to do."""
    assert said in world.run("features", *arguments, code=2).stderr


def test_the_page_s_example_does_what_it_says(
    world: FeaturesWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/features-writing.md: its documents, its file moved to today, its commands, and what they show."""
    blocks = {block.mark: block.text for block in blocks_of(PAGE)}
    world.publish(list(yaml.safe_load_all(blocks["registry"])))
    times = [datetime.fromisoformat(text) for text in ISO_TIME.findall(blocks["payments"])]
    shift = datetime.now(UTC) - timedelta(minutes=1) - max(times)
    moved = ISO_TIME.sub(lambda found: (datetime.fromisoformat(found[0]) + shift).isoformat(), blocks["payments"])
    monkeypatch.chdir(tmp_path)
    Path("payments.csv").write_text(moved)
    for line in blocks["load"].splitlines():
        world.run(*shlex.split(line)[1:])
    shown = world.run_json("features", "get", "payments", "customer_id=17")["features"]
    assert {each["feature"]: str(each["value"]) for each in shown} == dict(
        line.split() for line in blocks["shown"].splitlines()
    )
