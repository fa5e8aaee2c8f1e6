"""The tuning database in a SQLite file, and its command line."""

from __future__ import annotations

import random
import sqlite3
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.tuning_database_cases import (
    DatabaseCases,
    content,
    files,
    json_lines,
    kept,
    measurement,
    random_rows,
    start,
    workload,
)
from tilewright.costmodel import database_files
from tilewright.costmodel import database_tables as tables
from tilewright.costmodel.database import Database, DatabaseError, default_url
from tilewright.tune_db_cli import app


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tuning.db"


class TestSqlite(DatabaseCases):
    @pytest.fixture
    def url(self, path: Path) -> str:
        return f"sqlite:///{path}"


def test_plain_sql_does_where_on_conflict_is_unknown(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_insert", lambda connection, table: None)
    rows = random_rows(5, 60)
    database = Database(path)
    database.write(rows[:30])
    database.write(rows[30:])
    assert content(database) == kept(rows)


# ---- files that are something else -----------------------------------------------------------------------------------


def refused(path: Path, message: str) -> None:
    before = path.read_bytes()
    with pytest.raises(DatabaseError, match=message):
        Database(path)
    assert path.read_bytes() == before
    assert files(path.parent) == [path.name]


def test_a_file_that_is_no_database_is_left_alone(path: Path) -> None:
    for data in (b"hello", b"x" * 10_000, b"SQLite format 3\0"):
        path.write_bytes(data)
        refused(path, "not a SQLite database; it was left as it is")
    path.write_bytes(b"")
    refused(path, "empty, which no tuning database is")


def test_a_database_of_another_application_is_left_alone(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE notes (text TEXT)")
    connection.close()
    refused(path, "no tuning database of tilewright")


def test_places_where_no_file_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for url, message in {
        str(tmp_path): "cannot be read: Is a directory",
        str(tmp_path / "file" / "x.db"): "File exists|Not a directory",
        "sqlite://": "a database is a file",
        "sqlite:///:memory:": "a database is a file",
        "://": "no database URL",
        "nosuch://host/name": "nosuch",
    }.items():
        with pytest.raises(DatabaseError, match=message):
            Database(url)


def test_a_log_without_its_database_is_not_thrown_away(path: Path) -> None:
    log = path.with_name(f"{path.name}-wal")
    log.write_bytes(b"committed")
    with pytest.raises(DatabaseError, match=r"missing, but .*tuning.db-wal holds a part of it"):
        Database(path)
    assert files(path.parent) == [log.name]


def test_processes_may_make_it_at_once(path: Path) -> None:
    processes = [start(f"Database({str(path)!r})") for _ in range(4)]
    assert [process.wait(120) for process in processes] == [0] * 4
    assert files(path.parent) == [path.name]
    assert content(Database(path)) == []


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def filled(path: Path) -> Path:
    """Some hundred rows, on about 30 pages of 4 KiB."""
    database = Database(path)
    for k in range(4):
        database.add(workload(k), "v", [measurement(i, f"s{{a={i}}}") for i in range(100)])
    assert files(path.parent) == [path.name], "nothing is left open"
    return path


def test_damage_anywhere_is_reported_or_harmless(filled: Path) -> None:
    good, want = filled.read_bytes(), content(Database(filled))
    rng = random.Random(0)
    reported: list[str] = []
    untouched = True
    for _ in range(60):
        data = bytearray(good)
        at = rng.choice([rng.randrange(len(data)), rng.randrange(200)])
        length = rng.choice([1, 1, 16, 4096])
        data[at : at + length] = rng.randbytes(min(length, len(data) - at))
        filled.write_bytes(data)
        try:
            found = content(Database(filled))
        except DatabaseError as error:
            reported.append(str(error))
            untouched &= filled.read_bytes() == data
        else:
            assert found == want
    assert untouched
    assert len(reported) > 20
    assert [message for message in reported if str(filled) not in message] == []


def test_a_file_that_was_cut_is_reported(filled: Path) -> None:
    good = filled.read_bytes()
    for size in (50, 4096, len(good) // 2, len(good) - 1):
        filled.write_bytes(good[:size])
        with pytest.raises(DatabaseError, match=filled.name):
            content(Database(filled))


def test_salvage_gives_what_is_sound(filled: Path, tmp_path: Path) -> None:
    want, data = content(Database(filled)), bytearray(filled.read_bytes())
    middle = data.index(b"s{a=50}", len(data) // 2) // 4096 * 4096
    data[middle : middle + 4096] = bytes(4096)
    with filled.open("wb") as file:
        file.write(data)
    with pytest.raises(DatabaseError, match="tune db export --salvage"):
        content(Database(filled))
    done = database_files.salvage(filled, tmp_path / "rest.jsonl")
    fresh = Database(tmp_path / "fresh.db")
    fresh.import_(tmp_path / "rest.jsonl")
    saved = content(fresh)
    assert len(saved) == done.rows
    assert [row for row in want if row in saved] == saved
    assert len(want) // 2 < done.rows < len(want)
    assert any("damaged pages" in what for what in done.lost)
    assert filled.read_bytes() == data


def test_salvage_names_bad_rows(filled: Path, tmp_path: Path) -> None:
    with sqlite3.connect(filled) as connection:
        connection.execute("UPDATE tilewright_measurements SET seconds = 'soon' WHERE schedule = 's{a=7}'")
        connection.execute("UPDATE tilewright_workloads SET host = 'other' WHERE key = ?", (workload(1).key,))
    connection.close()
    done = database_files.salvage(filled, tmp_path / "rest.jsonl.xz")
    assert done.rows == 3 * 99
    assert sum("s{a=7} of workload" in what and "seconds" in what for what in done.lost) == 3
    assert sum(f"workload {workload(1).key} is damaged" in what for what in done.lost) == 100


# ---- command line ----------------------------------------------------------------------------------------------------


def run(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


def test_the_default_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert default_url() == str(tmp_path / "data" / "tilewright" / "tuning.db")
    with pytest.raises(DatabaseError, match="there is no such database"):
        run("top")
    Database(default_url()).add(workload(0), "v", [measurement(1, "s{a=1}")])
    assert "s{a=1}" in run("top")


def test_commands(tmp_path: Path) -> None:
    a, b, c, file = (tmp_path / name for name in ("a.db", "b.db", "c.db", "all.jsonl"))
    Database(a).write(random_rows(1, 40))
    Database(b).write(random_rows(2, 40))
    assert "new" in run("merge", a, f"sqlite:///{b}", "--db", c)
    count = len(content(Database(c)))
    assert run("export", file, "--db", c) == f"wrote {count} measurements to {file}\n"
    assert run("export", tmp_path / "again.jsonl", "--db", c, "--salvage").endswith("0 losses, listed above\n")
    assert json_lines(file) == json_lines(tmp_path / "again.jsonl")
    assert f"{count} new" in run("import", file, "--db", tmp_path / "d.db")
    shown = run("top", "--count", 2, "--db", c)
    assert shown.count("cpu{arch=znver4}") == len(Database(c).top(2))
    assert "S=1 B=2" in shown
    assert "no schedule is measured" in run("top", "--compiler", "current", "--db", c)
    assert "give --keep, --compiler or --older" in run("prune", "--db", c)
    assert "removed 0 measurements" in run("prune", "--db", c, "--older", "2000000d")
    run("prune", "--db", c, "--keep", "1", "--compiler", "a")
    assert {row.compiler for row in Database(c).rows()} == {"a"}
