"""SQLite files as tuning databases: made whole, recognised before they are opened, shared by processes, checked."""

from __future__ import annotations

import os
import sqlite3
import threading
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tilewright.costmodel.database_rows import DatabaseError
from tilewright.costmodel.database_tables import SALVAGE

_APPLICATION = 0x5457_4442  # "TWDB", at byte 68 of the file
_WAIT = 60.0  # seconds that a writer waits for the others
_WRITING = "tilewright_writing"


def engine_of(path: Path) -> sa.Engine:
    """An engine whose transactions begin as SQLAlchemy says, those of :func:`writing` as the only one that writes."""
    # no pool: forked processes must not inherit connections, and the last one that closes tidies the file up
    url = sa.URL.create("sqlite", database=str(path))
    engine = sa.create_engine(url, poolclass=sa.NullPool, connect_args={"timeout": _WAIT})

    @sa.event.listens_for(engine, "connect")
    def manual(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # sqlite3 would begin transactions on its own, and late
        connection.execute("PRAGMA foreign_keys = ON")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        writes = connection.get_execution_options().get(_WRITING)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def writing(engine: sa.Engine) -> sa.Engine:
    """The engine whose transactions wait for other writers at their beginning, not midway."""
    return engine.execution_options(**{_WRITING: True})


def recognise(path: Path) -> None:
    """Raise DatabaseError unless the file is one of ours; it is read only."""
    try:
        with path.open("rb") as file:
            head = file.read(100)
    except OSError as error:
        raise DatabaseError(f"{path}: cannot be read: {error.strerror}") from None
    left = "it was left as it is; name another file, or move this one away"
    if not head:
        raise DatabaseError(f"{path}: empty, which no tuning database is; if it was one, restore it, otherwise remove it")
    if len(head) < 100 or not head.startswith(b"SQLite format 3\0"):
        raise DatabaseError(f"{path}: not a SQLite database; {left}")
    if int.from_bytes(head[68:72], "big") != _APPLICATION:
        raise DatabaseError(f"{path}: a SQLite database, but no tuning database of tilewright; {left}")


def create(path: Path, metadata: sa.MetaData, version: sa.Insert) -> None:
    """Make an empty database, whole or not at all; when another process makes it at the same time, that one stays."""
    for name in (f"{path.name}-wal", f"{path.name}-journal"):
        if path.with_name(name).exists():
            there = path.with_name(name)
            raise DatabaseError(f"{path}: missing, but {there} holds a part of it; restore {path.name}, or remove {name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        with writing(engine_of(part)).begin() as connection:
            connection.exec_driver_sql(f"PRAGMA application_id = {_APPLICATION}")
            metadata.create_all(connection)
            connection.execute(version)
        done = sqlite3.connect(part)
        done.execute("PRAGMA journal_mode = WAL")  # readers and a writer at once; the file remembers it
        done.close()
        os.link(part, path)
    except FileExistsError:
        recognise(path)
    finally:
        part.unlink(missing_ok=True)


def check(connection: sa.Connection, path: Path) -> None:
    """Raise DatabaseError unless every page and index of the file is sound."""
    found = list(connection.exec_driver_sql("PRAGMA integrity_check(3)").scalars())
    if found != ["ok"]:
        raise DatabaseError(f"{path}: damaged ({'; '.join(map(str, found))}); {SALVAGE}")
