"""Job files: durations, what is refused and how it is said, results beside the job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tilewright.costmodel.jobs import Job, JobError, parse_duration, read_job, read_results, write_results

KERNEL = {
    "name": "k3", "workload": "0" * 32, "family": "mlir.linear", "default": "linear{tile_m=4}", "default_seconds": 2e-5,
    "best": "linear{tile_m=6}", "best_seconds": 1.5e-5, "trials": 64,
}  # fmt: skip


def written(folder: Path, text: str) -> Path:
    path = folder / "small.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("20m", 1200),
        ("1h 30m", 5400),
        ("1h30m5", 5405),
        ("90s", 90),
        ("90", 90),
        (1.5, 1.5),
        ("2d", 172800),
        ("1d12h", 129600),
    ],
)
def test_durations(text: str | float, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "0", "-5m", "1x", "20 minutes", "inf", "nan", True, "99999999999d", -1])
def test_what_is_no_duration(text: str | float) -> None:
    with pytest.raises(JobError, match="is no duration; write 20m, 1h30m, 2d or a number of seconds"):
        parse_duration(text)


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    job = read_job(written(tmp_path, "model: models/s\nbudget: 1h30m\ntrials: 100\ndb: t.db\nsizes: {B: 1, S: 512}\n"))
    assert job == Job(
        model=str(tmp_path / "models/s"), budget=5400, trials=100, db=str(tmp_path / "t.db"), sizes={"B": 1, "S": 512}
    )
    assert (job.passes, job.target, job.seed, job.runner) == ("O2", "native", 0, "local")
    server = read_job(written(tmp_path, "model: /m\ntrials: 1\ndb: postgresql://u@h/n\nrunner: ray\naddress: h:6379\n"))
    assert (server.model, server.db, server.address) == ("/m", "postgresql://u@h/n", "h:6379")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\nbudgt: 20m\n", r"small.yaml: budgt: unknown; a job has model, passes, .*budget"),
        ("trials: 3\n", r"small.yaml: model: missing"),
        ("model: m\n", r"small.yaml: says neither budget nor trials"),
        ("model: m\nbudget: soon\n", r"small.yaml: budget.*'soon' is no duration; write 20m"),
        ("model: m\ntrials: many\n", r"small.yaml: trials: .*integer.*'many'"),
        ("model: m\ntrials: 0\n", r"small.yaml: trials: .*greater than or equal to 1, got 0"),
        ("model: m\ntrials: yes\n", r"small.yaml: trials: .*got True"),
        ("model: m\ntrials: 1\nsizes: {B: one}\n", r"small.yaml: sizes.B: .*'one'"),
        ("model: m\ntrials: 1\nrunner: slurm\n", r"small.yaml: runner: .*'local' or 'ray', got 'slurm'"),
        ("model: m\ntrials: 1\naddress: h:1\n", r"small.yaml: address is for runner: ray"),
        ("model: m\ntrials: 1\ntrials: 2\n", r"small.yaml: not well-formed YAML: trials is given twice"),
        ("model: [\n", r"small.yaml: not well-formed YAML"),
        ("!!python/object/apply:os.getcwd []\n", r"small.yaml: not well-formed YAML"),
        ("- model\n", r"small.yaml: a job is a mapping"),
        ("", r"small.yaml: a job is a mapping"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(JobError, match=message):
        read_job(written(tmp_path, text))


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(JobError) as caught:
        read_job(written(tmp_path, "seed: -1\nthreads: 0\nwhat: 1\n"))
    assert [text.split(": ")[1] for text in str(caught.value).splitlines()] == ["model", "seed", "threads", "what"]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"none.yaml: cannot be read: No such file"):
        read_job(tmp_path / "none.yaml")


def test_results_are_beside_the_job(tmp_path: Path) -> None:
    path = written(tmp_path, "model: m\nbudget: 20m\n")
    job = read_job(path)
    with pytest.raises(JobError, match=r"small.results.json: cannot be read"):
        read_results(path)
    facts = {"compiler": "c" * 64, "host": "AMD EPYC", "trials": 64, "seconds": 12.5}
    there = write_results(path, job, kernels=[KERNEL, {**KERNEL, "best_seconds": None}], **facts)
    assert there == tmp_path / "small.results.json"
    found = read_results(path)
    assert (found.job, found.host, found.kernels[0].best) == (job, "AMD EPYC", "linear{tile_m=6}")
    assert json.loads(there.read_text())["kernels"][0] == KERNEL
    with pytest.raises(ValueError, match="best_seconds"):
        write_results(path, job, kernels=[{k: v for k, v in KERNEL.items() if k != "best_seconds"}], **facts)
    there.write_text(there.read_text().replace("1.5e-05", '"fast"').replace("0.000015", '"fast"'))
    with pytest.raises(JobError, match=r"kernels.0.best_seconds: .*; run the job again"):
        read_results(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small.results.json", "small.yaml"]
