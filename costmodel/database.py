"""Measurements of schedules, kept: by workload, schedule and compiler version.

SQLite files and servers that SQLAlchemy reaches hold the same tables (``database_tables``). Values are checked on their
way in and out (``database_rows``), and each row carries a hash of itself: a damaged database is reported, never emptied.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import groupby
from pathlib import Path

import sqlalchemy as sa

from tilewright.costmodel import database_sqlite
from tilewright.costmodel import database_tables as tables
from tilewright.costmodel.database_files import read_rows, write_rows
from tilewright.costmodel.database_rows import DatabaseError, Row
from tilewright.costmodel.database_tables import SALVAGE
from tilewright.costmodel.workload import Measurement, Workload

__all__ = ["Database", "DatabaseError", "Merged", "Row", "default_url"]


def default_url() -> str:
    """``$XDG_DATA_HOME/tilewright/tuning.db``, by default below ``~/.local/share``."""
    root = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return str(Path(root) / "tilewright" / "tuning.db")


@dataclass(frozen=True)
class Merged:
    """What became of rows: ``new`` ones, those that ``replaced`` a worse founded one, and those that were not needed."""

    new: int = 0
    replaced: int = 0
    kept: int = 0

    def __add__(self, other: Merged) -> Merged:
        return Merged(self.new + other.new, self.replaced + other.replaced, self.kept + other.kept)


class Database:
    """A tuning database, made when it is missing unless ``create`` is false.

    ``url`` is a path of a SQLite file or any URL of SQLAlchemy, ``postgresql://user@host/name`` for example. Several
    processes and machines may use one at once; every write is one transaction. All methods raise DatabaseError.
    """

    def __init__(self, url: str | Path, create: bool = True) -> None:
        parsed = _parse(str(url))
        self.path = Path(parsed.database or "") if parsed.get_backend_name() == "sqlite" else None
        self.name = str(self.path or parsed.render_as_string(hide_password=True))
        if self.path:
            self._engine = self._open_file(self.path, create)
        else:
            self._engine = self._open_server(parsed, create)
        self._check_version()

    def close(self) -> None:
        """Let go of the database; nothing is kept open between calls, so that forgetting it does no harm."""
        self._engine.dispose()

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- opening -----------------------------------------------------------------------------------------------

    def _open_file(self, path: Path, create: bool) -> sa.Engine:
        version = tables.VERSION.insert().values(version=tables.SCHEMA)
        with self._explained():
            if not path.exists() and not path.is_symlink():
                if not create:
                    raise DatabaseError(f"{path}: there is no such database")
                database_sqlite.create(path, tables.METADATA, version)
            database_sqlite.recognise(path)
            engine = database_sqlite.engine_of(path)
            with engine.connect() as connection:
                database_sqlite.check(connection, path)
        return engine

    def _open_server(self, url: sa.URL, create: bool) -> sa.Engine:
        with self._explained():
            engine = sa.create_engine(url, poolclass=sa.NullPool)  # forked processes must not inherit connections
            if sa.inspect(engine).has_table(tables.VERSION.name):
                return engine
            if not create:
                raise DatabaseError(f"{self.name}: no tuning database there")
            try:
                with engine.begin() as connection:
                    tables.METADATA.create_all(connection)
                    connection.execute(tables.VERSION.insert().values(version=tables.SCHEMA))
            except sa.exc.DBAPIError:
                if not sa.inspect(engine).has_table(tables.VERSION.name):  # otherwise another process was first
                    raise
        return engine

    def _check_version(self) -> None:
        with self._explained(), self._engine.connect() as connection:
            found = list(connection.scalars(sa.select(tables.VERSION.c.version)))
        if len(found) != 1:
            raise DatabaseError(f"{self.name}: damaged: says {len(found)} versions of its tables, not one; {SALVAGE}")
        if found[0] != tables.SCHEMA:
            known = f"this tilewright knows {tables.SCHEMA} alone"
            raise DatabaseError(f"{self.name}: version {found[0]} of the tables, {known}; use the tilewright that made it")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Errors of the database as DatabaseError."""
        try:
            yield
        except ModuleNotFoundError as error:
            extra = "pip install 'tilewright[postgres]'" if error.name == "psycopg" else f"install {error.name}"
            raise DatabaseError(f"{self.name}: its driver is missing: {extra}") from None
        except sa.exc.SQLAlchemyError as error:
            reason = str(getattr(error, "orig", None) or error).strip()
            raise DatabaseError(f"{self.name}: {reason}{self._remedy(reason)}") from error
        except OSError as error:
            raise DatabaseError(f"{self.name}: {error.strerror}") from error

    def _remedy(self, reason: str) -> str:
        if self.path is None:
            return ""
        if "locked" in reason:
            return "; another process has been writing for a minute: wait for it, or end it"
        return f"; {SALVAGE}" if "malformed" in reason or "not a database" in reason else ""

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        with self._explained(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        engine = database_sqlite.writing(self._engine) if self.path else self._engine
        with self._explained(), engine.begin() as connection:
            yield connection

    # ---- measurements ------------------------------------------------------------------------------------------

    def add(self, workload: Workload, compiler: str, measurements: Sequence[Measurement]) -> None:
        """Store what was measured just now, in one transaction; of two with the same key the better founded stays."""
        now = datetime.now(UTC)
        self.write(Row(workload, compiler, measurement, now) for measurement in measurements)

    def write(self, rows: Iterable[Row]) -> Merged:
        """Store rows with their times, in one transaction."""
        ordered = sorted(rows, key=lambda row: row.order)  # in an order that all writers share, none waits for another
        done = Merged()
        with self._writing() as connection:
            for _, group in groupby(ordered, key=lambda row: row.workload.key):
                done += self._write_workload(connection, list(group))
        return done

    def _write_workload(self, connection: sa.Connection, rows: list[Row]) -> Merged:
        key = rows[0].workload.key
        tables.put_workload(connection, rows[0].workload)
        before = tables.digests(connection, key)
        tables.put_measurements(connection, rows)
        after = tables.digests(connection, key)
        replaced = sum(after[name] != value for name, value in before.items())
        new = len(after) - len(before)
        return Merged(new, replaced, len(rows) - new - replaced)

    def find(self, workload: Workload, compiler: str) -> dict[str, Measurement]:
        """What is known of a workload, by schedule, sorted."""
        with self._reading() as connection:
            rows = tables.rows_of(connection, workload, self.name, compiler)
            return {row.measurement.schedule: row.measurement for row in rows}

    def best(self, workload: Workload, compiler: str) -> Measurement | None:
        """The fastest relative to the baseline of what is right, None when there is nothing."""
        found = self.find(workload, compiler).values()
        return min((m for m in found if m.status == "ok" and m.ratio), key=_place, default=None)

    def rows(self, compiler: str | None = None) -> Iterator[Row]:
        """Everything, or what one compiler version measured, in the order of :attr:`Row.order`."""
        with self._reading() as connection:
            for key in tables.keys(connection):
                workload = tables.workload_of(connection, key, self.name)
                yield from tables.rows_of(connection, workload, self.name, compiler)

    # ---- the whole ---------------------------------------------------------------------------------------------

    def merge(self, other: Database) -> Merged:
        """Take over what ``other`` holds, in one transaction: as if all had been measured into this one."""
        return self.write(other.rows())

    def export(self, path: str | Path) -> int:
        """Write everything as lines of JSON (``.jsonl``, or ``.jsonl.xz``); equal content gives equal files."""
        return write_rows(path, self.rows())

    def import_(self, path: str | Path) -> Merged:
        """Take over what :meth:`export` wrote, all of it or nothing."""
        return self.write(read_rows(path))

    def top(self, n: int = 1, family: str | None = None, compiler: str | None = None) -> list[Row]:
        """The best ``n`` schedules of each workload, by family and workload, the best first."""
        found: list[Row] = []
        for _, group in groupby(self.rows(compiler), key=lambda row: row.workload.key):
            right = [row for row in group if row.measurement.status == "ok" and row.measurement.ratio]
            found += sorted(right, key=lambda row: _place(row.measurement))[:n]
        chosen = [row for row in found if family in (None, row.workload.family)]
        return sorted(chosen, key=lambda row: (row.workload.family, row.workload.key))

    def prune(self, keep: int | None = None, compiler: str | None = None, older: timedelta | None = None) -> int:
        """Remove measurements; gives how many.

        ``keep`` leaves the best of each workload and compiler, and what failed, so that it is not tried again.
        ``compiler`` leaves what this version measured; ``older`` removes what was measured longer ago than that.
        """
        now = datetime.now(UTC)
        with self._writing() as connection:
            gone = []
            for key in tables.keys(connection):
                workload = tables.workload_of(connection, key, self.name)
                rows = list(tables.rows_of(connection, workload, self.name))
                left = set() if keep is None else {row.order for row in _best_each(rows, keep)}
                for row in rows:
                    superfluous = keep is not None and row.measurement.status == "ok" and row.order not in left
                    stale = older is not None and now - row.at > older
                    if superfluous or stale or compiler not in (None, row.compiler):
                        gone.append(row)
            tables.remove(connection, gone)
        return len(gone)


def _parse(text: str) -> sa.URL:
    if "://" not in text:
        return sa.URL.create("sqlite", database=text)
    try:
        url = sa.make_url(text)
        name = url.get_backend_name()
    except (sa.exc.ArgumentError, ValueError) as error:
        raise DatabaseError(f"no database URL: {error}; a path, sqlite:///PATH or postgresql://USER@HOST/NAME") from None
    if name == "sqlite" and (not url.database or url.database.startswith((":memory:", "file:"))):
        raise DatabaseError(f"{text}: a database is a file: sqlite:///PATH, or the path alone")
    return url.set(drivername="postgresql+psycopg") if url.drivername == "postgresql" else url


def _place(measurement: Measurement) -> tuple[float, str]:
    """The order of what is right, the best first."""
    return (measurement.ratio or float("inf"), measurement.schedule)


def _best_each(rows: Iterable[Row], count: int) -> Iterator[Row]:
    """The best ``count`` of each compiler."""
    for _, group in groupby(rows, key=lambda row: row.compiler):
        right = [row for row in group if row.measurement.status == "ok"]
        yield from sorted(right, key=lambda row: _place(row.measurement))[:count]
