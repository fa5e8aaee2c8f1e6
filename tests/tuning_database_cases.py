"""What every tuning database does, whichever server keeps it: a test class, to be given a fixture ``url``."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import permutations
from pathlib import Path

import pytest

from tilewright.costmodel import database_tables as tables
from tilewright.costmodel.database import Database, DatabaseError, Merged, Row
from tilewright.costmodel.workload import Measurement, Status, Workload

ROOT = Path(__file__).parents[1]
START = datetime(2026, 1, 1, tzinfo=UTC)
STATUSES: list[Status] = ["ok", "ok", "ok", "wrong", "crashed", "timeout", "refused"]


def workload(k: int) -> Workload:
    sizes = (("S", k + 1), ("B", 2))
    return Workload(f"family{k % 2}", f"module {{\n  π {k}\n}}", sizes, "cpu{arch=znver4}", 2, "AMD EPYC")


def measurement(k: int, schedule: str, repeats: int = 30) -> Measurement:
    seconds = 1e-3 / (k + 3)
    return Measurement(schedule, "ok", seconds, 0.012, repeats, 1e-3, metrics={"spills": 0.0, "code_bytes": 1234.0})


def random_rows(seed: int, count: int) -> list[Row]:
    """Rows that often have the same key, of all kinds."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        status = rng.choice(STATUSES)
        tried = Measurement(f"s{{a={rng.randrange(6)}}}", status, error="" if status == "ok" else "reason")
        if status == "ok":
            tried = measurement(rng.randrange(1000), tried.schedule, rng.randrange(1, 4))
        at = START + timedelta(microseconds=rng.randrange(10**12))
        found.append(Row(workload(rng.randrange(4)), rng.choice("ab"), tried, at))
    return found


def kept(rows: list[Row]) -> list[Row]:
    """What a database keeps of rows, written without one."""
    best: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        have = best.get(row.order)
        if have is None or rank(row) > rank(have):
            best[row.order] = row
    return [best[order] for order in sorted(best)]


def rank(row: Row) -> tuple[bool, int, datetime]:
    return (row.measurement.status == "wrong", row.measurement.repeats, row.at)


def content(database: Database) -> list[Row]:
    return list(database.rows())


def start(call: str) -> subprocess.Popen[str]:
    """Another process that calls a function of this file."""
    code = f"from tests.tuning_database_cases import *; {call}"
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def write_batches(url: str, seed: int, count: int) -> None:
    for k in range(count):
        Database(url).write(random_rows(seed + k, 20))


def add_forever(url: str) -> None:
    database = Database(url)
    for k in range(10**6):
        database.add(workload(0), "c", [measurement(k, f"batch {k}, {i}") for i in range(5)])
        print(k, flush=True)


class DatabaseCases:
    @pytest.fixture
    def database(self, url: str) -> Iterator[Database]:
        with Database(url) as found:
            yield found

    def test_what_is_added_is_found(self, database: Database, url: str) -> None:
        tried = [measurement(2, "s{a=2}"), measurement(1, "s{a=1}"), Measurement("s{a=3}", "crashed", error="signal 11")]
        database.add(workload(0), "v1", tried)
        database.add(workload(1), "v1", [measurement(3, "s{a=2}")])
        database.add(workload(0), "v2", [measurement(4, "s{a=2}")])
        database.add(workload(2), "v1", [])
        again = Database(url)
        assert again.find(workload(0), "v1") == {m.schedule: m for m in tried}
        assert list(again.find(workload(0), "v1")) == ["s{a=1}", "s{a=2}", "s{a=3}"]
        assert again.find(workload(5), "v1") == {} == again.find(workload(2), "v1")
        assert [row.compiler for row in again.rows()].count("v1") == 4
        assert [row.measurement for row in again.rows("v2")] == [measurement(4, "s{a=2}")]
        assert all(abs(datetime.now(UTC) - row.at) < timedelta(hours=1) for row in again.rows())

    def test_best_is_relative_to_the_baseline_and_right(self, database: Database) -> None:
        slow_host = Measurement("slow host", "ok", 3e-3, 0.0, 9, 6e-3)
        database.add(workload(0), "v", [Measurement("quick host", "ok", 2e-3, 0.0, 9, 3e-3), slow_host])
        database.add(workload(0), "v", [Measurement("wrong", "wrong", 1e-9, 0.0, 9, 3e-3), Measurement("bad", "crashed")])
        assert database.best(workload(0), "v") == slow_host
        assert database.best(workload(1), "v") is None

    def test_the_better_founded_stays_whatever_came_first(self, database: Database) -> None:
        ways = [Measurement("s", "crashed"), measurement(1, "s", 5), measurement(2, "s", 9), Measurement("s", "wrong")]
        for k, order in enumerate(permutations(ways[:3])):
            for one in order:
                database.add(workload(k), "v", [one])
            assert database.find(workload(k), "v") == {"s": ways[2]}
        database.add(workload(0), "v", [ways[3]])
        database.add(workload(0), "v", [measurement(3, "s", 1000)])
        assert database.find(workload(0), "v") == {"s": ways[3]}, "wrong once is wrong"

    def test_a_batch_may_hold_a_schedule_twice(self, database: Database) -> None:
        database.add(workload(0), "v", [measurement(1, "s", 9), measurement(2, "s", 5)])
        assert database.find(workload(0), "v") == {"s": measurement(1, "s", 9)}

    def test_what_is_no_measurement_is_refused_whole(self, database: Database) -> None:
        bad = [replace(measurement(0, "s"), seconds=float("nan")), Measurement("s", "ok"), replace(measurement(0, ""))]
        for one in bad:
            with pytest.raises(DatabaseError, match="to be stored: measurement of "):
                database.add(workload(0), "v", [measurement(1, "fine"), one])
        assert content(database) == []

    def test_texts_come_back(self, database: Database) -> None:
        database.add(workload(0), "v", [Measurement("s", "refused", error="'\"\\\n\t ü 漢 \0 \ud800 %s :x")])
        assert database.find(workload(0), "v")["s"].error == "'\"\\\n\t ü 漢 \ufffd ? %s :x"

    def test_merging_equals_measuring_into_one(self, url: str, tmp_path: Path) -> None:
        rows = [random_rows(seed, 40) for seed in (1, 2)]
        want = kept(rows[0] + rows[1])
        a, b, one = Database(url), Database(tmp_path / "b.db"), Database(tmp_path / "one.db")
        a.write(rows[0]), b.write(rows[1]), one.write(rows[0] + rows[1])
        before = content(a)
        done = a.merge(b)
        assert content(a) == content(one) == want
        assert done == Merged(len(want) - len(before), done.replaced, len(kept(rows[1])) - done.new - done.replaced)
        assert done.replaced == sum(row not in want for row in before)
        b.write(rows[0])
        assert content(b) == want, "in either order"
        assert a.merge(b) == a.merge(a) == Merged(kept=len(want))

    @pytest.mark.parametrize("name", ["all.jsonl", "all.jsonl.xz"])
    def test_an_export_is_the_whole(self, database: Database, tmp_path: Path, name: str) -> None:
        database.write(random_rows(3, 40))
        assert database.export(tmp_path / name) == len(content(database))
        other = Database(tmp_path / "other.db")
        assert other.import_(tmp_path / name) == Merged(new=len(content(database)))
        assert content(other) == content(database)
        other.export(tmp_path / f"again-{name}")
        assert (tmp_path / name).read_bytes() == (tmp_path / f"again-{name}").read_bytes()

    def test_a_bad_file_is_imported_not_at_all(self, database: Database, tmp_path: Path) -> None:
        source = Database(tmp_path / "source.db")
        source.write(random_rows(4, 40))
        path = tmp_path / "x.jsonl"
        source.export(path)
        good = path.read_text().splitlines(keepends=True)
        first = next(k for k, text in enumerate(good) if '"ok"' in text)
        bad = good[first].replace('"seconds":', '"seconds":-')
        for damage, message in {
            "".join(good[:-1]): "incomplete",
            "".join(good[:5] + good[6:]): f"line {len(good) - 1}: lines before were changed or lost",
            "".join(good[1:]): "line 1: not the head",
            "".join([good[0].replace("1}", "7}"), *good[1:]]): "line 1: version 7",
            "".join(good) + good[3]: f"line {len(good) + 1}: neither",
            "".join([*good[:7], "{\n", *good[7:]]): "line 8: damaged",
            "".join([*good[:first], bad, *good[first + 1 :]]): f"line {first + 1}: measurement of",
            "".join(good).replace("0.012", "0.013", 1): "changed or lost",
            "": "incomplete",
        }.items():
            path.write_text(damage)
            with pytest.raises(DatabaseError, match=message):
                database.import_(path)
            assert content(database) == []

    def test_top_lists_the_best_of_each_workload(self, database: Database) -> None:
        for k in range(3):
            database.add(workload(k), "v", [measurement(i, f"s{i}") for i in range(4)])
            database.add(workload(k), "w", [Measurement("s9", "wrong"), Measurement("s8", "timeout")])
        found = database.top(2)
        assert [row.measurement.schedule for row in found] == ["s3", "s2"] * 3
        assert [row.workload.family for row in found] == ["family0"] * 4 + ["family1"] * 2
        assert {row.workload for row in database.top(1, family="family1")} == {workload(1)}
        assert database.top(1, compiler="w") == []

    def test_prune_leaves_what_it_says(self, database: Database) -> None:
        for k in range(3):
            old = [Row(workload(0), "v1", measurement(i, f"s{i}"), START + timedelta(days=i)) for i in range(4)]
            new = [Row(workload(k), "v2", measurement(i, f"s{i}"), datetime.now(UTC)) for i in range(3)]
            database.write([*old, *new, Row(workload(k), "v2", Measurement("bad", "crashed"), datetime.now(UTC))])
        assert len(content(database)) == 16
        assert database.prune(keep=2) == 2 + 3
        assert sorted(row.measurement.schedule for row in database.rows("v1")) == ["s2", "s3"]
        assert [row.measurement.schedule for row in database.rows("v2")] == ["bad", "s1", "s2"] * 3
        assert database.prune(older=timedelta(days=1)) == 2
        assert database.prune(compiler="v2") == 0
        assert database.prune(compiler="v3") == 9
        with database._engine.connect() as connection:
            assert tables.keys(connection) == [], "workloads without measurements go too"

    def test_a_newer_version_is_refused(self, database: Database, url: str) -> None:
        with database._writing() as connection:
            connection.execute(tables.VERSION.update().values(version=2))
        with pytest.raises(DatabaseError, match=r"version 2 of the tables, this tilewright knows 1 alone; use the"):
            Database(url)

    @pytest.mark.parametrize(
        ("column", "value", "message"),
        [
            ("seconds", -1.0, r"s\{a=1\} of workload .* by compiler v: seconds: .*greater than 0, got -1"),
            ("status", "splendid", "status: "),
            ("repeats", -3, "repeats: "),
            ("metrics", '{"spills": "many"}', "metrics.spills: "),
            ("metrics", "{", "metrics: "),
            ("at", "yesterday", "at: "),
            ("spread", 0.013, "not what was stored"),
            ("schedule", "s{a=7}", r"s\{a=7\} of workload .*not what was stored"),
        ],
    )
    def test_a_bad_measurement_is_named(self, database: Database, column: str, value: object, message: str) -> None:
        database.add(workload(0), "v", [measurement(1, "s{a=1}"), measurement(1, "s{a=2}")])
        with database._writing() as connection:
            first = tables.MEASUREMENTS.c.schedule == "s{a=1}"
            connection.execute(tables.MEASUREMENTS.update().where(first).values({column: value}))
        for use in (lambda: database.find(workload(0), "v"), lambda: content(database), lambda: database.top()):
            with pytest.raises(DatabaseError, match=message):
                use()

    @pytest.mark.parametrize(("column", "value"), [("host", "other"), ("threads", 3), ("sizes", "[]"), ("kernel", "")])
    def test_a_bad_workload_is_named(self, database: Database, column: str, value: object) -> None:
        database.add(workload(0), "v", [measurement(1, "s")])
        with database._writing() as connection:
            connection.execute(tables.WORKLOADS.update().values({column: value}))
        with pytest.raises(DatabaseError, match=f"workload {workload(0).key}: .*"):
            content(database)

    def test_processes_may_open_and_write_at_once(self, url: str) -> None:
        processes = [start(f"write_batches({url!r}, {seed}, 6)") for seed in (0, 100, 200)]
        assert [process.wait(300) for process in processes] == [0, 0, 0]
        want = kept([row for seed in (0, 100, 200) for k in range(6) for row in random_rows(seed + k, 20)])
        assert content(Database(url, create=False)) == want

    def test_a_killed_process_loses_its_open_transaction_at_most(self, url: str) -> None:
        process = start(f"add_forever({url!r})")
        assert process.stdout
        for text in process.stdout:
            if int(text) == 3:
                break
        time.sleep(random.Random(0).random() / 50)
        process.kill()
        said = max([3, *(int(text) for text in process.stdout if text.endswith("\n"))])
        process.wait()
        found = set(Database(url).find(workload(0), "c"))
        last = max(int(name.split(",")[0].removeprefix("batch ")) for name in found)
        assert last in (said, said + 1)
        assert found == {f"batch {k}, {i}" for k in range(last + 1) for i in range(5)}

    def test_without_create_nothing_is_made(self, url: str) -> None:
        with pytest.raises(DatabaseError, match=r"no such database|no tuning database there"):
            Database(url, create=False)
        Database(url).close()
        Database(url, create=False).close()


def json_lines(path: Path) -> list[object]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def files(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))
