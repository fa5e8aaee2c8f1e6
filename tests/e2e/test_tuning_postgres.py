"""The tuning database on a PostgreSQL server, which is started here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import psycopg
import pytest

from tests.postgres_server import USER, postgres_server
from tests.tuning_database_cases import DatabaseCases, content, random_rows
from tilewright.costmodel.database import Database, DatabaseError


@pytest.fixture(scope="module")
def make_url() -> Iterator[Callable[[], str]]:
    """Makes an empty database of a server that runs as long as this file's tests."""
    with postgres_server() as folder:
        numbers = count()

        def make() -> str:
            name = f"tuning{next(numbers)}"
            with psycopg.connect(host=folder, user=USER, dbname="postgres", autocommit=True) as connection:
                connection.execute(f"CREATE DATABASE {name}".encode())
            return f"postgresql://{USER}@/{name}?host={folder}"

        yield make


class TestPostgres(DatabaseCases):
    @pytest.fixture
    def url(self, make_url: Callable[[], str]) -> str:
        return make_url()


def test_tables_of_others_may_be_there(make_url: Callable[[], str]) -> None:
    url = make_url()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE TABLE measurements (text text)")
        Database(url).write(random_rows(0, 10))
        assert connection.execute("SELECT count(*) FROM measurements").fetchone() == (0,)


def test_merging_with_a_file_and_back(make_url: Callable[[], str], tmp_path: Path) -> None:
    server, file = Database(make_url()), Database(tmp_path / "tuning.db")
    file.write(random_rows(1, 40))
    server.write(random_rows(2, 40))
    server.merge(file)
    file.merge(server)
    assert content(server) == content(file)


def test_a_server_that_is_not_there_is_named_without_the_password() -> None:
    with pytest.raises(DatabaseError, match="refused") as caught:
        Database("postgresql://me:secret@127.0.0.1:1/tuning")
    assert "me:***@127.0.0.1:1/tuning" in str(caught.value)
    assert "secret" not in str(caught.value)
