"""What a tuning database holds: rows, and their plain form (a record) for tables and files, checked in both directions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, StringConstraints, ValidationError

from tilewright.costmodel.workload import Measurement, Status, Workload
from tilewright.ir import TilewrightError
from tilewright.runtime.measuring import line


class DatabaseError(TilewrightError):
    """A tuning database, or a file of measurements, that cannot be used: says which, what is wrong, and the remedy."""


@dataclass(frozen=True)
class Row:
    """A measurement, of what, by which compiler (``codegen.store.compiler_version``), and when (UTC)."""

    workload: Workload
    compiler: str
    measurement: Measurement
    at: datetime

    @property
    def order(self) -> tuple[str, str, str]:
        """Rows are listed in this order; it is also what identifies one."""
        return (self.workload.key, self.compiler, self.measurement.schedule)


def _moment(text: str) -> str:
    if datetime.fromisoformat(text).isoformat(timespec="microseconds") != text:
        raise ValueError("not the form in which times are stored")
    return text


# PostgreSQL takes neither NUL in a text nor long texts in a key
Text = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$")]
Short = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00]*$")]
Schedule = Annotated[str, StringConstraints(min_length=1, max_length=1000, pattern=r"^[^\x00]*$")]
Key = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Moment = Annotated[str, StringConstraints(pattern=r"^\d{4}-.*\+00:00$"), AfterValidator(_moment)]
Seconds = Annotated[FiniteFloat, Field(gt=0)]
Size = tuple[str, int]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class WorkloadRecord(_Record):
    """A workload, with its key."""

    key: Key
    family: Short
    kernel: Text
    sizes: Annotated[tuple[Annotated[Size, Field(strict=False)], ...], Field(strict=False)]
    target: Text
    threads: Annotated[int, Field(ge=1)]
    host: Text

    def workload(self) -> Workload:
        """What the record is of. Raises ValueError when its key is another's."""
        found = Workload(self.family, self.kernel, self.sizes, self.target, self.threads, self.host)
        if found.key != self.key:
            raise ValueError(f"its content is not that of its key, which would be {found.key}")
        return found


class MeasurementRecord(_Record):
    """A measurement, of the workload that has the key ``workload``."""

    workload: Key
    compiler: Short
    schedule: Schedule
    status: Status
    seconds: Seconds | None
    spread: Annotated[FiniteFloat, Field(ge=0), AfterValidator(abs)] | None  # SQLite has no -0.0
    repeats: Annotated[int, Field(ge=0)]
    baseline: Seconds | None
    error: Text
    metrics: dict[str, FiniteFloat]
    at: Moment

    def row(self, workload: Workload) -> Row:
        """The row, of ``workload``. Raises ValueError for a success without a time."""
        if self.status == "ok" and self.seconds is None:
            raise ValueError("seconds: missing, although the status is ok")
        fields = self.model_dump(exclude={"workload", "compiler", "at"})
        return Row(workload, self.compiler, Measurement(**fields), datetime.fromisoformat(self.at))


def workload_record(workload: Workload) -> dict[str, Any]:
    """The record of a workload. Raises DatabaseError when it is not one."""
    record = {"key": workload.key, **asdict(workload)}
    read_workload(record, "to be stored")
    return record


def measurement_record(row: Row) -> dict[str, Any]:
    """The record of a row. Raises DatabaseError when a value cannot be right."""
    measured = asdict(row.measurement)
    # what a compiler or a crashed process prints may be no text that a database takes
    measured["error"] = measured["error"].replace("\0", "\ufffd").encode(errors="replace").decode()
    at = row.at.astimezone(UTC).isoformat(timespec="microseconds")
    record = {"workload": row.workload.key, "compiler": row.compiler, **measured, "at": at}
    read_measurement(record, row.workload, "to be stored")
    return MeasurementRecord.model_validate(record).model_dump()


def read_workload(record: Mapping[str, Any], where: str) -> Workload:
    """The workload of a record. Raises DatabaseError, which begins with ``where``."""
    try:
        return WorkloadRecord.model_validate(record).workload()
    except ValueError as error:
        raise DatabaseError(f"{where}: workload {record.get('key')}: {reason(error)}") from None


def read_measurement(record: Mapping[str, Any], workload: Workload, where: str) -> Row:
    """The row of a record. Raises DatabaseError, which begins with ``where``."""
    try:
        return MeasurementRecord.model_validate(record).row(workload)
    except ValueError as error:
        name = f"{record.get('schedule')} of workload {record.get('workload')} by compiler {record.get('compiler')}"
        raise DatabaseError(f"{where}: measurement of {name}: {reason(error)}") from None


def reason(error: ValueError) -> str:
    """What is wrong, in one line."""
    if not isinstance(error, ValidationError):
        return str(error)
    found = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, found['loc']))}: {found['msg']}, got {found['input']!r}"


def digest(record: Mapping[str, Any]) -> str:
    """A hash of a record, 32 hexadecimal digits: what a damaged file gives back is noticed."""
    return hashlib.sha256(line(record).encode()).hexdigest()[:32]
