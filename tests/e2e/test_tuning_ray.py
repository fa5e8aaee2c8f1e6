"""Measuring on a Ray cluster: a head that searches and two nodes that measure, all processes of this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ray_runner import HOST, LOG, FakeRunner, identify
from tilewright.costmodel.cluster import ClusterError, RayRunner
from tilewright.costmodel.workload import Measurement, Workload

ray = pytest.importorskip("ray", reason="pip install ray")

ROOT = Path(__file__).parents[2]
MEMORY = 80 << 20  # of the object store of a node, the least that Ray takes
WORKLOAD = Workload("linear", "module {}", (("S", 1),), "cpu{arch=znver4}", 3, "AMD EPYC")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ray") / "measured"


@pytest.fixture(scope="module")
def cluster(log: Path) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(ROOT))  # nodes import tests.ray_runner
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv(LOG, str(log))
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **node(), "include_dashboard": False})
    try:
        found.first = found.add_node(num_cpus=1, **node(RAY_NODE="first"))
        found.add_node(num_cpus=1, **node(RAY_NODE="second"))
        yield found
    finally:
        ray.shutdown()
        found.shutdown()
        patch.undo()


def node(**env: str) -> dict[str, Any]:
    return {"object_store_memory": MEMORY, "env_vars": {**os.environ, **env}}


@pytest.fixture
def runner(cluster: Any, log: Path) -> Iterator[RayRunner]:
    log.write_text("")
    with RayRunner(cluster.address, FakeRunner, identify, timeout=5, batch=2, start_timeout=60) as found:
        yield found


def right(schedule: str) -> Measurement:
    return Measurement(schedule, "ok", len(schedule) * 1e-3, 0.0, 3, 4e-3)


def places(log: Path) -> dict[str, list[str]]:
    """Nodes that measured, by schedule."""
    found: dict[str, list[str]] = {}
    for text in log.read_text().splitlines():
        name, schedule = text.split()
        found.setdefault(schedule, []).append(name)
    return found


def test_both_nodes_measure_and_the_order_stays(runner: RayRunner, log: Path) -> None:
    schedules = [f"s{'x' * k}" for k in range(17)]
    assert runner.measure(WORKLOAD, "base", schedules) == [right(s) for s in schedules]
    assert {name for names in places(log).values() for name in names} == {"first", "second"}
    assert runner.measure(WORKLOAD, "base", []) == []
    assert runner.refused == {}


def test_what_dies_is_tried_once_more(runner: RayRunner, log: Path) -> None:
    found = runner.measure(WORKLOAD, "base", ["a", "die", "b", "c", "d", "e"])
    assert found == [right(s) for s in ("a", "die", "b", "c", "d", "e")]
    assert len(places(log)["die"]) == 2
    found = runner.measure(WORKLOAD, "base", ["dead"])
    assert [(m.status, m.seconds) for m in found] == [("crashed", None)]
    assert len(places(log)["dead"]) == 2
    assert runner.measure(WORKLOAD, "base", ["after"]) == [right("after")]


def test_what_hangs_is_given_up(runner: RayRunner) -> None:
    runner.timeout = 1
    found = runner.measure(WORKLOAD, "base", ["a", "b", "hang", "c", "d"])
    assert [m.status for m in found] == ["ok", "ok", "timeout", "timeout", "ok"]
    assert "no answer for 2 s" in found[2].error


def test_an_error_is_told(runner: RayRunner) -> None:
    with pytest.raises(ClusterError, match=r"node .* cannot measure: ValueError: no such kernel"):
        runner.measure(WORKLOAD, "base", ["bug"])


def test_other_machines_are_refused_by_name(runner: RayRunner, cluster: Any) -> None:
    other = cluster.add_node(num_cpus=1, **node(RAY_NODE="other", **{HOST: "Intel Xeon"}))
    assert runner.measure(WORKLOAD, "base", ["a"]) == [right("a")]
    ((name, reason),) = runner.refused.items()
    assert other.node_id[:8] in name
    assert reason == "its host is 'Intel Xeon', not 'AMD EPYC'"
    cluster.remove_node(other)


def test_a_node_may_go(runner: RayRunner, cluster: Any) -> None:
    runner.measure(WORKLOAD, "base", ["a", "b"])
    cluster.remove_node(cluster.first, allow_graceful=False)
    assert runner.measure(WORKLOAD, "base", ["a", "b", "c"]) == [right(s) for s in "abc"]


def test_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "1")
    with pytest.raises(ClusterError, match="no Ray cluster at nowhere"):
        RayRunner("nowhere", FakeRunner, identify)
