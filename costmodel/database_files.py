"""Measurements as lines of JSON, plain (``.jsonl``) or packed (``.jsonl.xz``), and what is left of a damaged SQLite file.

``runtime/measuring.py`` says how a file is built.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from tilewright.costmodel import database_tables as tables
from tilewright.costmodel.database_rows import (
    DatabaseError,
    Row,
    measurement_record,
    read_measurement,
    read_workload,
    workload_record,
)
from tilewright.costmodel.sealed import write_beside
from tilewright.costmodel.workload import Workload
from tilewright.runtime.measuring import HEAD, document, end_of, line


def write_rows(path: str | Path, rows: Iterable[Row]) -> int:
    """Write rows that are in order; gives how many. Raises DatabaseError."""
    xz = _is_xz(path)
    groups = ((w, list(own)) for w, own in groupby(rows, key=lambda row: row.workload))
    content, count = document((workload_record(w), [measurement_record(row) for row in own]) for w, own in groups)
    try:
        write_beside(path, lzma.compress(content) if xz else content)
    except OSError as error:
        raise DatabaseError(f"{path}: cannot be written: {error.strerror}") from None
    return count


def read_rows(path: str | Path) -> Iterator[Row]:
    """The rows of a file. Raises DatabaseError, with the number of the line, before or after some of them."""
    xz = _is_xz(path)
    number = 0
    try:
        with lzma.open(path, "rb") if xz else open(path, "rb") as file:
            reader = _Reader()
            for number, text in enumerate(file, 1):
                if row := reader.take(text, f"{path}, line {number}"):
                    yield row
    except (lzma.LZMAError, EOFError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DatabaseError(f"{path}, line {number}: damaged: {error}; get the file again") from None
    except OSError as error:
        raise DatabaseError(f"{path}: cannot be read: {error.strerror}") from None
    if not reader.ended:
        raise DatabaseError(f"{path}: incomplete: it ends after line {number}; get the file again")


def _is_xz(path: str | Path) -> bool:
    if not str(path).endswith((".jsonl", ".jsonl.xz")):
        raise DatabaseError(f"{path}: a file of measurements is called NAME.jsonl or NAME.jsonl.xz")
    return str(path).endswith(".xz")


class _Reader:
    """Reads one line after the other."""

    def __init__(self) -> None:
        self.seen = hashlib.sha256()
        self.workloads: dict[str, Workload] = {}
        self.rows = 0
        self.begun = self.ended = False

    def take(self, text: bytes, where: str) -> Row | None:
        """The row of a line, None when the line is something else."""
        found = json.loads(text)
        if not self.begun:
            self.begin(found, where)
            return None
        if self.ended or not isinstance(found, dict) or len(found) != 1:
            raise DatabaseError(f"{where}: neither a workload nor a measurement")
        ((kind, record),) = found.items()
        if kind == "end":
            self.end(record, where)
            return None
        self.seen.update(text)
        if not isinstance(record, dict) or kind not in ("workload", "measurement"):
            raise DatabaseError(f"{where}: neither a workload nor a measurement")
        if kind == "workload":
            self.workloads[str(record.get("key"))] = read_workload(record, where)
            return None
        workload = self.workloads.get(str(record.get("workload")))
        if workload is None:
            raise DatabaseError(f"{where}: of workload {record.get('workload')}, which no line before describes")
        self.rows += 1
        return read_measurement(record, workload, where)

    def begin(self, head: Any, where: str) -> None:
        if not isinstance(head, dict) or head.get("format") != HEAD["format"]:
            raise DatabaseError(f"{where}: not the head of a file of measurements; `tilewright tune db export` writes one")
        if head != HEAD:
            raise DatabaseError(f"{where}: version {head.get('version')!r}, this tilewright reads {HEAD['version']} alone")
        self.begun = True
        self.seen.update(line(HEAD).encode() + b"\n")

    def end(self, record: Any, where: str) -> None:
        want = end_of(len(self.workloads), self.rows, self.seen)
        if record != want:
            raise DatabaseError(f"{where}: lines before were changed or lost: {record} expected, {want} found")
        self.ended = True


# ---- salvage ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Salvaged:
    """How many measurements of a damaged database were written, and what was lost, in words."""

    rows: int
    lost: list[str]


def salvage(source: str | Path, path: str | Path) -> Salvaged:
    """Write what can be read of a SQLite file, which is opened for reading only; export and report in one."""
    lost: list[str] = []
    try:
        with closing(sqlite3.connect(f"{Path(source).absolute().as_uri()}?mode=ro", uri=True)) as connection:
            connection.row_factory = sqlite3.Row
            connection.text_factory = lambda text: text.decode(errors="replace")
            workloads = dict(_workloads(connection, lost))
            rows = list(_rows(connection, workloads, lost))
    except sqlite3.Error as error:
        raise DatabaseError(f"{source}: nothing can be read: {error}") from None
    return Salvaged(write_rows(path, sorted(rows, key=lambda row: row.order)), lost)


def _workloads(connection: sqlite3.Connection, lost: list[str]) -> Iterator[tuple[str, Workload]]:
    for record in _scan(connection, tables.WORKLOADS.name, lost):
        try:
            found = read_workload({**record, "sizes": tables.plain(record["sizes"])}, "lost")
            yield found.key, found
        except DatabaseError as error:
            lost.append(str(error))


def _rows(connection: sqlite3.Connection, workloads: dict[str, Workload], lost: list[str]) -> Iterator[Row]:
    for record in _scan(connection, tables.MEASUREMENTS.name, lost):
        workload = workloads.get(record["workload"])
        if workload is None:
            lost.append(f"lost: measurement of {record['schedule']}: workload {record['workload']} is damaged or missing")
            continue
        try:
            yield tables.read_columns(record, workload, "lost")
        except DatabaseError as error:
            lost.append(str(error))


def _scan(connection: sqlite3.Connection, table: str, lost: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of a table from its beginning to the first damaged page, then from its end to the last one."""
    found: dict[int, dict[str, Any]] = {}
    for direction in ("ASC", "DESC"):
        try:
            for row in connection.execute(f"SELECT rowid AS rowid_, * FROM {table} NOT INDEXED ORDER BY rowid {direction}"):
                record = dict(row)
                found[record.pop("rowid_")] = record
        except sqlite3.DatabaseError as error:
            lost.append(f"lost: rows of {table} between damaged pages, if any, read {direction}: {error}")
            continue
        break
    yield from found.values()
