"""Tables of a tuning database, and the statements that write and read them: the same for SQLite and servers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from tilewright.costmodel.database_rows import (
    DatabaseError,
    Row,
    digest,
    measurement_record,
    read_measurement,
    read_workload,
    workload_record,
)
from tilewright.costmodel.workload import Workload
from tilewright.runtime.measuring import line

SALVAGE = "`tilewright tune db export --salvage` writes what can be read; a new database can import that"
SCHEMA = 1  # a change of the tables below counts it up, and brings code that migrates from the one before

METADATA = sa.MetaData()
VERSION = sa.Table("tilewright_schema", METADATA, sa.Column("version", sa.Integer, primary_key=True, autoincrement=False))
WORKLOADS = sa.Table(
    "tilewright_workloads",
    METADATA,
    sa.Column("key", sa.String(32), primary_key=True),
    sa.Column("family", sa.String(200), nullable=False),
    sa.Column("kernel", sa.Text, nullable=False),
    sa.Column("sizes", sa.Text, nullable=False),
    sa.Column("target", sa.Text, nullable=False),
    sa.Column("threads", sa.Integer, nullable=False),
    sa.Column("host", sa.Text, nullable=False),
)
MEASUREMENTS = sa.Table(
    "tilewright_measurements",
    METADATA,
    sa.Column("workload", sa.String(32), sa.ForeignKey(WORKLOADS.c.key), primary_key=True),
    sa.Column("compiler", sa.String(200), primary_key=True),
    sa.Column("schedule", sa.String(1000), primary_key=True),
    sa.Column("status", sa.String(20), nullable=False),
    sa.Column("seconds", sa.Double),
    sa.Column("spread", sa.Double),
    sa.Column("repeats", sa.Integer, nullable=False),
    sa.Column("baseline", sa.Double),
    sa.Column("error", sa.Text, nullable=False),
    sa.Column("metrics", sa.Text, nullable=False),
    sa.Column("at", sa.String(32), nullable=False),
    sa.Column("digest", sa.String(32), nullable=False),
)
_KEY = ("workload", "compiler", "schedule")


def put_workload(connection: sa.Connection, workload: Workload) -> None:
    """Store a workload that is perhaps there already."""
    record = workload_record(workload)
    record["sizes"] = line(record["sizes"])
    insert = _insert(connection, WORKLOADS)
    if insert is not None:
        connection.execute(insert.on_conflict_do_nothing(), record)
    elif connection.scalar(sa.select(WORKLOADS.c.key).filter_by(key=workload.key)) is None:
        connection.execute(WORKLOADS.insert(), record)


def put_measurements(connection: sa.Connection, rows: Sequence[Row]) -> None:
    """Store measurements; of two with the same key the better founded stays."""
    records = [_columns(measurement_record(row)) for row in rows]
    insert = _insert(connection, MEASUREMENTS)
    if insert is not None:
        rest = [c.name for c in MEASUREMENTS.c if c.name not in _KEY]
        changes = {name: insert.excluded[name] for name in rest}
        condition = _better_founded(insert.excluded)
        connection.execute(insert.on_conflict_do_update(index_elements=_KEY, set_=changes, where=condition), records)
        return
    for record in records:
        try:
            with connection.begin_nested():
                connection.execute(MEASUREMENTS.insert(), record)
        except sa.exc.IntegrityError:
            same = [MEASUREMENTS.c[name] == record[name] for name in _KEY]
            better = _better_founded({name: sa.literal(value) for name, value in record.items()})
            connection.execute(MEASUREMENTS.update().where(*same, better).values(record))


def _insert(connection: sa.Connection, table: sa.Table) -> Any:
    """An INSERT that can say ON CONFLICT, None where the database has none."""
    dialects: dict[str, Any] = {"sqlite": sqlite, "postgresql": postgresql}
    found = dialects.get(connection.dialect.name)
    return found.insert(table) if found else None


def _better_founded(new: Any) -> sa.ColumnElement[bool]:
    """Whether a row replaces that which has its key.

    Wrong numbers, once seen, are not forgotten; then more repeats, then the later one. The digest makes it an order of
    all rows: what remains does not depend on which came first.
    """
    old = MEASUREMENTS.c
    rank = [sa.tuple_(row["status"] == "wrong", row["repeats"], row["at"], row["digest"]) for row in (new, old)]
    return rank[0] > rank[1]


def _columns(record: Mapping[str, Any]) -> dict[str, Any]:
    return {**record, "metrics": line(record["metrics"]), "digest": digest(record)}


def keys(connection: sa.Connection) -> list[str]:
    """Keys of all workloads, and of measurements without one, sorted."""
    found = connection.scalars(sa.union(sa.select(WORKLOADS.c.key), sa.select(MEASUREMENTS.c.workload)))
    return sorted(found, key=str)


def workload_of(connection: sa.Connection, key: str, where: str) -> Workload:
    """The workload with a key. Raises DatabaseError when there is none, or when it is damaged."""
    found = connection.execute(sa.select(WORKLOADS).filter_by(key=key)).mappings().first()
    if found is None:
        raise _noted(DatabaseError(f"{where}: workload {key} is missing, but there are measurements of it"))
    try:
        return read_workload({**found, "sizes": plain(found["sizes"])}, where)
    except DatabaseError as error:
        raise _noted(error) from None


def rows_of(connection: sa.Connection, workload: Workload, where: str, compiler: str | None = None) -> Iterator[Row]:
    """The measurements of a workload, in order. Raises DatabaseError at one that is damaged."""
    query = sa.select(MEASUREMENTS).filter_by(workload=workload.key)
    if compiler is not None:
        query = query.filter_by(compiler=compiler)
    found = [dict(record) for record in connection.execute(query).mappings()]
    # sorted here: a server's order of texts depends on its locale
    for record in sorted(found, key=lambda r: (str(r["compiler"]), str(r["schedule"]))):
        try:
            row = read_columns(record, workload, where)
        except DatabaseError as error:
            raise _noted(error) from None
        yield row


def _noted(error: DatabaseError) -> DatabaseError:
    error.add_note("in a SQLite file: " + SALVAGE)
    return error


def read_columns(columns: Mapping[str, Any], workload: Workload, where: str) -> Row:
    """The row that columns hold. Raises DatabaseError when they are damaged."""
    record = {name: value for name, value in columns.items() if name != "digest"}
    record["metrics"] = plain(record["metrics"])
    row = read_measurement(record, workload, where)
    if digest(record) != columns["digest"]:
        name = f"{row.measurement.schedule} of workload {workload.key} by compiler {row.compiler}"
        raise DatabaseError(f"{where}: measurement of {name}: not what was stored (its digest differs)")
    return row


def plain(text: Any) -> Any:
    """What a JSON text holds; anything else comes back as it is, and is refused by the check that follows."""
    try:
        return json.loads(text)
    except (ValueError, TypeError):
        return text


def digests(connection: sa.Connection, key: str) -> dict[tuple[str, str], str]:
    """Digests of a workload's measurements by compiler and schedule."""
    columns = (MEASUREMENTS.c.compiler, MEASUREMENTS.c.schedule, MEASUREMENTS.c.digest)
    found = connection.execute(sa.select(*columns).where(MEASUREMENTS.c.workload == key))
    return {(compiler, schedule): value for compiler, schedule, value in found}


def remove(connection: sa.Connection, rows: Sequence[Row]) -> None:
    """Delete measurements, then the workloads that have none left."""
    if connection.dialect.name == "postgresql":  # nobody may add to a workload that is about to go
        connection.exec_driver_sql(f"LOCK TABLE {WORKLOADS.name}, {MEASUREMENTS.name} IN EXCLUSIVE MODE")
    match = sa.and_(*(MEASUREMENTS.c[name] == sa.bindparam(f"at_{name}") for name in _KEY))
    if rows:
        names = [dict(zip((f"at_{name}" for name in _KEY), row.order)) for row in rows]
        connection.execute(MEASUREMENTS.delete().where(match), names)
    used = sa.select(MEASUREMENTS.c.workload).where(MEASUREMENTS.c.workload == WORKLOADS.c.key)
    connection.execute(WORKLOADS.delete().where(~used.exists()))
