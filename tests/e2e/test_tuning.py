"""Tuning from end to end: a model, a database, a faster or equal artifact; on the command line, killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tilewright
from tilewright.codegen.store import compiler_version
from tilewright.codegen.target import parse_target
from tilewright.costmodel.database import Database, DatabaseError
from tilewright.costmodel.features import Sample, Trials
from tilewright.costmodel.picks import pick
from tilewright.costmodel.training import train
from tilewright.costmodel.workload import Measurement, Workload
from tilewright.ir import Module
from tilewright.schedules import choose_schedules
from tilewright.tuning import module_of, tunable
from tilewright.workloads import kernel_tasks, sizes_of, task_of

CPU = parse_target("native")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.norm = nn.Linear(192, 320), nn.Linear(320, 192), nn.LayerNorm(192)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.down(torch.nn.functional.gelu(self.up(x))))


SIZES = {"x": {0: "S"}}
X = np.random.default_rng(0).standard_normal((40, 192)).astype(np.float32)


def inputs() -> tuple[torch.Tensor]:
    return (torch.from_numpy(X),)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("tuned") / "tuning.db"
    result = tilewright.tune(Net(), inputs(), dynamic=SIZES, db=path, trials=24, threads=1, sizes={"S": 40})
    return path, result


def test_a_tuned_model_computes_the_same_and_the_report_says_how(tuned) -> None:
    path, result = tuned
    assert result.trials == 24
    assert all(row.ratio <= 1 and row.seconds > 0 for row in result.rows)
    assert not any(row.failures for row in result.rows)
    made = choose_schedules(lowered(), CPU, db=path, threads=1, sizes={"S": 40})
    assert {name: str(s) for name, s in made.chosen.items()} == {r.task.name.split()[0]: r.schedule for r in result.rows}
    assert all(origin.startswith("tuning") for origin in made.origins.values())
    assert made.notes == []
    compiled = tilewright.compile(Net(), inputs(), dynamic=SIZES, db=path, sizes={"S": 40})
    with torch.no_grad():
        want = Net()(*inputs()).numpy()
    np.testing.assert_allclose(compiled(X), want, atol=1e-4)


def lowered() -> Module:
    return module_of(Net(), inputs(), {}, SIZES, "O2", None, None, None, CPU)


def test_all_measurements_are_kept_and_are_right(tuned) -> None:
    path, result = tuned
    with Database(path, create=False) as database:
        rows = list(database.rows(compiler_version()))
    assert len(rows) == 24
    assert {row.measurement.status for row in rows} == {"ok"}
    assert {task_of(row.workload).workload.key for row in rows} == {row.task.workload.key for row in result.rows}


def test_what_a_database_does_not_know_is_said(tuned, tmp_path: Path) -> None:
    path, _ = tuned
    made = choose_schedules(lowered(), CPU, db=path, cost_model=None, threads=1, sizes={"S": 8})
    assert not made.chosen
    assert "kernels were not tuned" in made.notes[0]
    with pytest.raises(DatabaseError, match="no such database"):
        tilewright.compile(Net(), inputs(), dynamic=SIZES, db=tmp_path / "none.db")


def test_a_damaged_database_stops_a_compilation(tuned, tmp_path: Path) -> None:
    path, _ = tuned
    damaged = tmp_path / "damaged.db"
    damaged.write_bytes(path.read_bytes()[:-4096] + b"\0" * 4096)
    before = damaged.read_bytes()
    with pytest.raises(DatabaseError):
        tilewright.compile(Net(), inputs(), dynamic=SIZES, db=damaged, sizes={"S": 40})
    assert damaged.read_bytes() == before


class Formula:
    """Measures by a formula of the schedule's text."""

    def __init__(self) -> None:
        self.calls = 0

    def measure(
        self, workload: Workload, baseline: str, schedules: Sequence[str], effort: float = 1.0
    ) -> list[Measurement]:
        self.calls += len(schedules)
        return [Measurement(s, "ok", 1.0 + sum(map(ord, s)) % 97 / 97, 0.01, 9, 1.5) for s in schedules]


def test_equal_seeds_and_databases_make_equal_choices(tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        options = {"db": tmp_path / name, "trials": 30, "runner": Formula(), "seed": 5}
        result = tilewright.tune(Net(), inputs(), dynamic=SIZES, **options)
        found.append([(row.task.workload.key, row.schedule) for row in result.rows])
    assert found[0] == found[1]
    with Database(tmp_path / "a") as a, Database(tmp_path / "b") as b:
        assert {r.measurement.schedule for r in a.rows()} == {r.measurement.schedule for r in b.rows()}
    again = Formula()
    tilewright.tune(Net(), inputs(), dynamic=SIZES, db=tmp_path / "a", trials=30, runner=again, seed=5, resume=True)
    assert again.calls == 0, "all of it is known"


def test_the_cost_model_chooses_what_was_not_measured() -> None:
    """A model that learned that small blocks of K are fast chooses these, for the family it knows."""
    module = lowered()
    tasks = [kernel.task(CPU, 1) for kernel in kernel_tasks(module, CPU, {"S": 40})]
    rng = np.random.default_rng(0)
    data = []
    for n in (1, 2, 3, 4):
        for task in (t for t in tasks if t.workload.family == "mlir.linear"):
            workload = Workload("mlir.linear", f"{task.workload.key} {n}", (), CPU.text, 1, "made up")
            choices = {c.text: c for c in (task.space.sample(rng) for _ in range(60))}.values()
            samples = [Sample(task.features(c), Measurement(c.text, "ok", c.block_k * 1e-6, 0.0, 9, 1e-3)) for c in choices]  # type: ignore[attr-defined]
            data.append(Trials(workload, tuple(samples)))
    picked = pick(tasks, train(data))
    for task, found in zip(tasks, picked):
        if task.workload.family != "mlir.linear":
            assert found is None, "the rule stays for what the model does not know"
            continue
        assert found is not None
        smallest = min(c.block_k for c in task.space)  # type: ignore[attr-defined]
        assert found.choice.block_k == smallest  # type: ignore[attr-defined]
        assert found.ratio < 1


def test_a_model_of_another_target_is_not_asked(tmp_path: Path) -> None:
    tasks = tunable(lowered(), CPU, 1, {"S": 40})
    [linear, *_] = [t for t in tasks if t.workload.family == "mlir.linear"]
    choices = list(linear.space)[:30]
    measured = [Measurement(c.text, "ok", 1e-3 + i * 1e-5, 0.0, 9, 1e-3) for i, c in enumerate(choices)]
    samples = tuple(Sample(linear.features(c), m) for c, m in zip(choices, measured))
    elsewhere = [Workload("mlir.linear", str(n), (), "cpu{arch=other}", 1, "made up") for n in range(4)]
    data = [Trials(workload, samples) for workload in elsewhere]
    path = tmp_path / "other.model"
    train(data).save(path)
    made = choose_schedules(lowered(), CPU, cost_model=path)
    assert not made.chosen
    assert "has not learned" in made.notes[0]
    assert CPU.text in made.notes[0]


def test_sizes_are_checked() -> None:
    module = lowered()
    assert sizes_of(module, {"S": 7}) == {"S": 7}
    with pytest.raises(tilewright.TilewrightError, match="no dim 'T'; it has S"):
        sizes_of(module, {"T": 1})
    with pytest.raises(tilewright.TilewrightError, match="S=0 is not in the model's range"):
        sizes_of(module, {"S": 0})


COMMAND = [sys.executable, "-m", "tilewright.cli", "tune"]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was compiled can be tuned without tracing the model again."""
    path = tmp_path_factory.mktemp("net") / "net"
    tilewright.compile(Net(), inputs(), dynamic=SIZES, out=path)
    return path


def test_the_command_goes_on_after_kill_9(artifact: Path, tmp_path: Path) -> None:
    db = tmp_path / "tuning.db"
    options = ["--trials", "120", "--size", "S=32", "--threads", "1", "--db", str(db)]
    process = subprocess.Popen([*COMMAND, str(artifact), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)  # fmt: skip
    deadline = time.monotonic() + 200
    while count(db) < 20:
        assert time.monotonic() < deadline
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = count(db)
    assert kept >= 20
    more = ["--resume", "--report", str(tmp_path / "page.html")]
    short = ["--trials", "40", *options[2:]]
    done = subprocess.run([*COMMAND, str(artifact), *short, *more], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "40 schedules tried" in " ".join(done.stdout.split())
    assert count(db) >= 40
    assert "plotly" in (tmp_path / "page.html").read_text().lower()


def count(db: Path) -> int:
    """Rows of a database that another process writes."""
    if not db.exists():
        return 0
    try:
        with Database(db, create=False) as database:
            return sum(1 for _ in database.rows())
    except DatabaseError:
        return 0  # it is being made


def test_a_job_file_leaves_its_results_beside_it(artifact: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    model = os.path.relpath(artifact, tmp_path)
    job.write_text(f"model: {model}\ntrials: 30\nseed: 3\ndb: tuning.db\nthreads: 1\nsizes: {{S: 32}}\n")
    done = subprocess.run([*COMMAND, str(job)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "job.results.json").read_text())
    assert results["trials"] == 30
    assert results["job"]["seed"] == 3
    assert results["compiler"] == compiler_version()
    assert all(k["best_seconds"] <= k["default_seconds"] for k in results["kernels"] if k["default_seconds"])
    assert (tmp_path / "job.html").exists()
