"""A tuning job as a file: one YAML file says what is tuned and how, and its results are written beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    model_validator,
)

from tilewright.costmodel.sealed import write_beside
from tilewright.ir import TilewrightError
from tilewright.runtime.measuring import duration


class JobError(TilewrightError):
    """A job file, or a duration, that cannot be used: names the file, the key and what to write."""


def parse_duration(text: str | float) -> float:
    """Seconds of ``20m``, ``1h30m``, ``2d``, ``90s``, ``90`` or an ISO 8601 duration. Raises JobError."""
    try:
        return duration(text)
    except ValueError as error:
        raise JobError(str(error)) from None


Duration = Annotated[float, BeforeValidator(duration)]
Count = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Job(_Strict):
    """What is tuned, for how long, where and into which database. Paths are relative to the job file's folder."""

    model: str
    passes: str = "O2"
    target: str = "native"
    dtype: str | None = None
    max_length: Count | None = None
    sizes: dict[str, Count] = {}
    budget: Duration | None = None
    trials: Count | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    db: str | None = None
    threads: Count | None = None
    runner: Literal["local", "ray"] = "local"
    address: str | None = None

    @model_validator(mode="after")
    def _fits(self) -> Job:
        if self.budget is None and self.trials is None:
            raise ValueError("says neither budget nor trials: give one, or both")
        if self.address is not None and self.runner != "ray":
            raise ValueError("address is for runner: ray")
        return self


class KernelResult(_Strict):
    """What tuning did for one kernel: times in seconds of one call, None where no measurement succeeded."""

    name: str
    workload: str
    family: str
    default: str
    default_seconds: FiniteFloat | None
    best: str
    best_seconds: FiniteFloat | None
    trials: Annotated[int, Field(ge=0)]


class Results(_Strict):
    """What a job did."""

    job: Job
    compiler: str
    host: str
    kernels: tuple[KernelResult, ...]
    trials: int
    seconds: FiniteFloat


def read_job(path: str | Path) -> Job:
    """The job of a file, its paths made absolute. Raises JobError."""
    try:
        text = Path(path).read_text()
        found = yaml.load(text, Loader=_Loader)  # a SafeLoader: makes plain data only
    except OSError as error:
        raise JobError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: not well-formed YAML: {error}") from None
    if not isinstance(found, dict):
        raise JobError(f"{path}: a job is a mapping, `model: FOLDER` and so on, got {found!r}")
    try:
        job = Job.model_validate(found)
    except ValidationError as error:
        raise JobError("\n".join(f"{path}: {_explain(e)}" for e in error.errors(include_url=False))) from None
    return _absolute(job, Path(path).absolute().parent)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Refuses a key that is given twice, of which YAML readers take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"{key} is given twice{node.start_mark}")
        return dict(super().construct_mapping(node, deep))


def _explain(error: Any) -> str:
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown; a job has {', '.join(Job.model_fields)}"
    message = error["msg"].removeprefix("Value error, ")
    if not key or error["type"] == "missing":
        return f"{key}: missing" if key else message
    return f"{key}: {message}" if error["type"] == "value_error" else f"{key}: {message}, got {error['input']!r}"


def _absolute(job: Job, folder: Path) -> Job:
    """The job with paths that mean the same from every folder."""
    changes = {"model": str(folder / job.model)}
    if job.db is not None and "://" not in job.db:
        changes["db"] = str(folder / job.db)
    return job.model_copy(update=changes)


def results_path(path: str | Path) -> Path:
    """Where the results of a job file are: ``NAME.results.json`` for ``NAME.yaml``."""
    return Path(path).with_suffix(".results.json")


def write_results(
    path: str | Path,
    job: Job,
    *,
    compiler: str,
    host: str,
    kernels: Sequence[Mapping[str, Any]],
    trials: int,
    seconds: float,
) -> Path:
    """Write the results of the job file ``path`` beside it; ``kernels`` have the fields of :class:`KernelResult`.

    Gives the file. Raises JobError when it cannot be written, ValueError when a field is missing or of another type.
    """
    found = [KernelResult.model_validate(dict(kernel)) for kernel in kernels]
    results = Results(job=job, compiler=compiler, host=host, kernels=tuple(found), trials=trials, seconds=seconds)
    target = results_path(path)
    try:
        write_beside(target, results.model_dump_json(indent=2).encode() + b"\n")
    except OSError as error:
        raise JobError(f"{target}: cannot be written: {error.strerror}") from None
    return target


def read_results(path: str | Path) -> Results:
    """The results of the job file ``path``. Raises JobError."""
    target = results_path(path)
    try:
        return Results.model_validate_json(target.read_bytes())
    except OSError as error:
        raise JobError(f"{target}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise JobError(f"{target}: {_explain(error.errors(include_url=False)[0])}; run the job again") from None
