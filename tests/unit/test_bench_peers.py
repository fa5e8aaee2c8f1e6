"""The benchmark beside peers: plans, results that resume, ratios, tables. Nothing is measured, no peer is needed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.peers import cli, runner, worker
from benchmarks.peers.figures import Chosen, Series, Spread, best, series
from benchmarks.peers.peer import Engine, Variant
from benchmarks.peers.plan import Job, groups, jobs, turns
from benchmarks.peers.process import Process, ProcessError
from benchmarks.peers.results import Results, ResultsError, key
from benchmarks.peers.runner import Runner, is_beaten
from benchmarks.peers.shapes import SHAPES
from benchmarks.peers.systems import OWN, PEERS
from benchmarks.peers.table import goal_rows, markdown, ranged, text_table
from benchmarks.peers.tasks import TASKS
from benchmarks.peers.workplace import StepError, Workplace
from benchmarks.peers.works import WORKS

LIMITS = {"read": 50.0, "f32": 200.0, "bf16": 400.0, "int8": 800.0}


def sample(system: str, variant: str, task: str, seconds: float, number: int = 0, model: str = "S") -> dict[str, Any]:
    facts = {"step_bytes": 10**9, "cache_bytes": 10**8, "capacity": 1000}
    limits = {name: [value, value] for name, value in LIMITS.items()}
    what = {"model": model, "system": system, "variant": variant, "task": task, "round": number, "limits": limits}
    return {**what, "seconds": seconds, "others": 0.0, "facts": facts, "load_seconds": 0.1, "peak_bytes": 10**8}


def rounds_of(system: str, *seconds: float, read: tuple[float, ...] = ()) -> list[dict[str, Any]]:
    """Samples of decoding; ``read``: the limit in each round."""
    made = [sample(system, "v", "decode", value, number) for number, value in enumerate(seconds)]
    for one, limit in zip(made, read):
        one["limits"]["read"] = [limit, limit]
    return made


def work(name: str) -> Any:
    return next(one for one in WORKS if one.name == name)


# Plans


def test_jobs_join_works_and_stand_beside_what_they_are_compared_with() -> None:
    made = jobs([work("decode-int4"), work("prefill-int8")], ["S"], PEERS, OWN)
    assert [job.variant.width for job in made] == sorted(
        (job.variant.width for job in made), key=["int4", "int8", "bf16", "f32"].index
    )
    [q4] = [job for job in made if job.variant.name == "q4_0"]
    assert q4.tasks == ("prefill", "decode")
    [w4a16] = [job for job in made if (job.system, job.variant.name) == (OWN, "w4a16")]
    assert w4a16.tasks == ("decode",), "the prefill of w4a16 is in no work that was asked for"
    assert not any(job.variant.isa == "avx2" for job in made)


def test_every_work_has_somebody_to_measure() -> None:
    for one in WORKS:
        for model in one.models:
            systems = {job.system for job in jobs([one], [model], PEERS, OWN)}
            assert OWN in systems, f"{one.name} on {model}"
            assert one.goal is None or len(systems) > 1, f"{one.name} on {model} has a goal and no peer"


def test_jobs_of_a_group_take_turns() -> None:
    both, few = ("prefill", "decode"), Variant("few", "int8", rounds=1)
    all_jobs = [
        Job("S", "a", Variant("x", "int4"), ("decode",)),
        Job("S", "b", few, both),
        Job("S", "a", Variant("y", "bf16"), both),
        Job("S", "a", Variant("z", "int4", isa="avx2"), both),
        Job("L", "a", Variant("x", "int4"), ("decode", "decode-4k")),
    ]
    quantized, *others = groups(all_jobs)
    assert quantized == all_jobs[:2], "int4 and int8 together"
    assert others == [[job] for job in all_jobs[2:]]
    order = [(number, task, job.system) for number, task, job in turns(quantized, 2)]
    assert order == [(0, "prefill", "b"), (0, "decode", "a"), (0, "decode", "b"), (1, "decode", "a")]
    assert TASKS["decode-4k"].rounds == 2
    assert [task for _, task, _ in turns(others[-1], 3)] == ["decode", "decode-4k"] * 2 + ["decode"]


def test_variants_have_names_of_their_own_and_known_widths() -> None:
    for peer in PEERS.values():
        for model in SHAPES:
            names = [variant.name for variant in peer.variants if model in variant.models]
            assert len(names) == len(set(names))
        assert {variant.width for variant in peer.variants} <= {"f32", "bf16", "int8", "int4"}
    with pytest.raises(KeyError, match=r"llama\.cpp has no variant q2; it has f32, bf16"):
        PEERS["llama.cpp"].variant("q2")


# Results


def test_results_resume_where_they_stopped(tmp_path: Path) -> None:
    path = tmp_path / "results" / "peers.json"
    first = Results(path)
    first.begin({"threads": 2}, {"cpu": "x"})
    first.append(sample("a", "v", "decode", 1.0))
    again = Results(path)
    again.begin({"threads": 2}, {"cpu": "x"})
    assert again.samples == first.samples
    assert again.has(("S", "a", "v", "decode", 0))
    assert not again.has(("S", "a", "v", "prefill", 0))
    assert not again.has(("S", "a", "v", "decode", 1))
    assert [file.name for file in path.parent.iterdir()] == ["peers.json"], "nothing half written is left"
    assert len(path.read_text().splitlines()) < 15, "a line a sample"


def test_results_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    results = Results(tmp_path / "peers.json")
    results.begin({"threads": 2}, {})
    results.append(sample("a", "v", "decode", 1.0))
    with pytest.raises(ResultsError, match="'threads': 2"):
        Results(results.path).begin({"threads": 1}, {})
    results.drop(lambda s: s["system"] == "a")
    results.begin({"threads": 1}, {})


def test_a_failure_is_tried_again_and_replaced(tmp_path: Path) -> None:
    results = Results(tmp_path / "peers.json")
    failed = {**sample("a", "v", "decode", 1.0), "error": "out of memory"}
    results.append(failed)
    assert not results.has(key(failed))
    assert series(results.samples) == []
    results.append(sample("a", "v", "decode", 1.0))
    assert [s.get("error") for s in results.samples] == [None]


def test_spread() -> None:
    spread = Spread((4.0, 1.0, 2.0, 3.0, 10.0))
    assert (spread.median, spread.low, spread.high, spread.iqr) == (3, 1, 10, 2)
    assert Spread((5.0,)).iqr == 0


def test_ratios_are_of_equal_rounds() -> None:
    a, b = series([*rounds_of("a", 1.0, 1.0, 1.0), *rounds_of("b", 2.0, 3.0)])
    assert a.ratios(b) == Chosen(((2.0, 50.0), (3.0, 50.0)), of=2)
    later = Series("S", "c", "v", "decode", {7: sample("c", "v", "decode", 1.0)})
    assert a.ratios(later) is None
    assert best([b, a]) is a
    assert best([]) is None


def test_decoding_is_compared_while_memory_is_the_same() -> None:
    a, b = series([
        *rounds_of("a", 1.0, 1.0, 1.0, 1.0, 1.0, read=(60, 60, 34, 34, 50)),
        *rounds_of("b", 2.0, 9.0, 2.0, 4.0, 3.0, read=(60, 34, 34, 36, 60)),
    ])  # fmt: skip
    ratios = a.ratios(b)
    assert ratios == Chosen(((2.0, 60.0), (2.0, 34.0), (4.0, 35.0)), of=5)
    assert ratios.states() == [(34.5, Spread((2.0, 4.0))), (60.0, Spread((2.0,)))]
    assert ranged(ratios, ".1f") == "2.0 (2.0-4.0), 3/5; 3.0 at 34 GB/s; 2.0 at 60 GB/s"
    del b.by_round[0]
    mixed = a.ratios(b)
    assert mixed.spread.values == (9.0, 2.0, 4.0, 3.0), "two comparable rounds are too few"
    assert ranged(mixed, ".1f") == "3.5 (2.0-9.0), all 4"
    b.by_round[4]["limits"]["read"] = [50.0, 50.0]
    assert a.ratios(b).spread.values == (2.0, 4.0, 3.0)
    b.by_round[4]["limits"]["read"] = [50.0, 34.0]
    assert a.ratios(b).spread.values == (9.0, 2.0, 4.0, 3.0), "it changed during the sample"


def test_arithmetic_is_compared_in_all_rounds() -> None:
    fast, slow = (rounds_of(system, 1.0, 1.0, 1.0, read=read) for system, read in (("a", (60,) * 3), ("b", (34,) * 3)))
    a, b = series({**one, "task": "prefill"} for one in fast + slow)
    ratios = a.ratios(b)
    assert ranged(ratios, ".1f") == "1.0 (1.0-1.0), 3/3"


def test_disturbed_samples_count_when_there_are_no_others() -> None:
    samples = rounds_of("a", 1.0, 2.0, 2.0)
    samples[0]["others"] = 0.5
    [one] = series(samples)
    assert list(one.by_round) == [1, 2]
    assert one.spread.values == (32.0, 32.0)
    [one] = series(samples[:1])
    assert one.spread.values == (64.0,)


def test_of_latencies_the_smaller_is_the_better() -> None:
    rows = [sample("a", "v", "encode-1", 0.004), sample("b", "v", "encode-1", 0.003)]
    chosen = best(series(rows))
    assert chosen is not None
    assert (chosen.system, chosen.spread.median) == ("b", 3.0)


def test_a_peer_that_loses_is_not_measured_again() -> None:
    def of(system: str, name: str, prefill: float, decode: float) -> list[dict[str, Any]]:
        return [sample(system, name, "prefill", prefill), sample(system, name, "decode", decode)]

    def job(system: str, name: str) -> Job:
        return Job("S", system, PEERS[system].variant(name), ("prefill", "decode"))

    paged, plain = job("openvino", "int8-pa"), job("openvino", "int8-sdpa")
    llama, wide, own = job("llama.cpp", "q8_0"), job("llama.cpp", "bf16"), job(OWN, "w8a8")
    group = [own, llama, paged, plain, wide]
    slower, faster = of("openvino", "int8-pa", 2.0, 2.0), of("openvino", "int8-sdpa", 1.0, 1.9)
    assert is_beaten(paged, "decode", group, slower + faster)
    assert not is_beaten(plain, "decode", group, slower + faster)
    assert not is_beaten(paged, "decode", group, of("openvino", "int8-pa", 2.0, 1.0) + faster), "faster in one task"
    assert not is_beaten(paged, "decode", group, faster), "not measured yet"
    assert not is_beaten(paged, "decode", group, slower + faster[:1]), "its sibling is not through"
    beside = of("llama.cpp", "q8_0", 4.1, 3.0)
    assert is_beaten(llama, "prefill", group, slower + beside)
    assert not is_beaten(llama, "decode", group, slower + beside)
    assert not is_beaten(wide, "prefill", group, slower + of("llama.cpp", "bf16", 9.0, 9.0)), "weights of another width"
    assert not is_beaten(own, "prefill", group, slower + of(OWN, "w8a8", 9.0, 9.0)), "own ones always are"


class Machine:
    """Stands for the process that measures limits."""

    def __init__(self, *_: object) -> None:
        pass

    def __call__(self) -> dict[str, float]:
        return LIMITS

    def close(self) -> None:
        pass


class Loaded:
    """Stands for a worker: notes what is asked, fails as ``failures`` says."""

    asked: list[tuple[str, str]] = []
    closed: list[str] = []
    failures: dict[tuple[str, str], BaseException] = {}

    def __init__(self, runner: Runner, job: Job) -> None:
        self.job = job

    def measure(self, task: str) -> dict[str, Any]:
        at = (self.job.system, task)
        self.asked.append(at)
        if at in self.failures:
            raise self.failures[at]
        return {"seconds": 1.0, "others": 0.0, "facts": {}, "load_seconds": 0.1, "peak_bytes": 1}

    def close(self) -> None:
        self.closed.append(self.job.system)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> type[Loaded]:
    class Fresh(Loaded):
        asked, closed, failures = [], [], {}

    monkeypatch.setattr(runner, "Limits", Machine)
    monkeypatch.setattr(runner, "Worker", Fresh)
    monkeypatch.setattr(runner, "size", lambda path: 2**30)
    return Fresh


def running(tmp_path: Path, say: Callable[[str], None] = print) -> tuple[Runner, list[Job]]:
    all_jobs = [Job("S", system, Variant("x", "f32"), ("prefill", "decode")) for system in "abc"]
    return Runner(Workplace(tmp_path), dict.fromkeys("abc", PEERS[OWN]), threads=2, say=say), all_jobs


def test_an_interrupted_run_goes_on(tmp_path: Path, loaded: type[Loaded]) -> None:
    said: list[str] = []
    one, all_jobs = running(tmp_path, said.append)
    loaded.failures |= {("b", "prefill"): ProcessError("Traceback\nValueError: no"), ("a", "decode"): KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        one.run(all_jobs, 1, Results(tmp_path / "r.json"))
    assert loaded.asked == [("a", "prefill"), ("b", "prefill"), ("c", "prefill"), ("a", "decode")]
    assert said[1] == "S b x prefill: failed: ValueError: no"
    assert loaded.closed == ["c"], "a and b ended by themselves"
    loaded.asked.clear()
    loaded.failures.clear()
    results = Results(tmp_path / "r.json")
    one.run(all_jobs, 1, results)
    assert loaded.asked == [("b", "prefill"), ("a", "decode"), ("b", "decode"), ("c", "decode")], "what was not there"
    assert not any("error" in s for s in results.samples)


def test_what_failed_does_not_stop_others(tmp_path: Path, loaded: type[Loaded]) -> None:
    one, all_jobs = running(tmp_path)
    loaded.failures["b", "decode"] = ProcessError("no answer in 300 s")
    results = Results(tmp_path / "r.json")
    one.run(all_jobs, 3, results)
    assert loaded.asked.count(("b", "decode")) == 1
    assert all(loaded.asked.count(at) == 3 for at in {*loaded.asked} - {("b", "decode")})
    assert [s["error"] for s in results.samples if "error" in s] == ["no answer in 300 s"]


def test_workers_make_room_for_others(tmp_path: Path, loaded: type[Loaded], monkeypatch: pytest.MonkeyPatch) -> None:
    one, all_jobs = running(tmp_path)
    monkeypatch.setattr(runner, "free_memory", lambda: (5 - 2 * len(one.workers)) * 2**30)
    one.run(all_jobs, 1, Results(tmp_path / "r.json"))
    assert loaded.closed[:2] == ["a", "b"], "those that waited longest"
    assert not one.workers
    assert len(loaded.asked) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--only", "nothing"], "no work 'nothing'; there are decode-int4"),
        (["run", "--models", "X"], "no model 'X'; there are S, M, L, E"),
        (["setup", "--systems", "tvm"], "no system 'tvm'; there are tilewright, llama.cpp"),
    ],
)
def test_the_command_line_says_what_exists(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, [*arguments, "--cache", str(tmp_path)])
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


def test_what_is_not_there_is_left_out_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "Limits", Machine)
    options = ["--cache", str(tmp_path), "--out", str(tmp_path / "r.json"), "--models", "S", "--systems", "openvino"]
    done = CliRunner().invoke(cli.app, ["run", *options, "--only", "decode-int4"])
    assert done.exit_code == 0, done.output
    assert "S openvino int4-pa: left out, not there (run setup and models)" in done.output
    assert not (tmp_path / "r.json").exists()


# Tables


def test_goals_compare_with_the_fastest_peer() -> None:
    samples = [
        sample(OWN, "w4a8", "decode", 1.0),
        sample("llama.cpp", "q4_0", "decode", 1.6),
        sample("onnxruntime", "int4", "decode", 1.5),
        sample("llama.cpp", "q8_0", "decode", 0.1),
        sample("llama.cpp", "q4_0-avx2", "decode", 0.1),
    ]
    [row] = goal_rows(samples, [work("decode-int4")])
    assert (row.peer.system, row.verdict) == ("onnxruntime", "hit")
    assert row.ratio.spread.median == pytest.approx(1.5)
    assert row.share is None, "the limit counts on L alone"
    assert row.cells()[5:7] == ["1.50 (1.50-1.50), 1/1", ""]
    samples[2] = sample("onnxruntime", "int4", "decode", 1.3)
    assert [row.verdict for row in goal_rows(samples, [work("decode-int4")])] == ["miss"]


def test_the_share_of_a_limit_counts_the_bytes_of_a_step() -> None:
    tokens = TASKS["decode"].work
    used = tokens * (10**9 + 10**5 * (128 + tokens / 2))
    samples = [sample(OWN, "bf16", "decode", used / 50e9 / 0.9, number, "L") for number in range(4)]
    samples[0]["limits"]["read"] = [90.0, 10.0]
    samples[1]["limits"]["read"] = [52.0, 48.0]
    [row] = goal_rows(samples, [work("decode-bf16")])
    assert row.share.spread.values == pytest.approx((0.9, 0.9, 0.9))
    assert (row.peer, row.verdict, row.goal) == (None, "hit", ">= 1.2x, >= 85% of read")
    assert row.cells()[6] == "90% (90%-90%), 3/4"


def test_a_latency_goal_is_met_from_below() -> None:
    figures = {OWN: 0.8, "openvino": 1.0}
    samples = [sample(system, "f32", "encode-1", value, model="E") for system, value in figures.items()]
    [row] = goal_rows(samples, [work("encoder-f32")])
    assert (row.goal, row.verdict, row.ratio.spread.median) == ("<= 0.9x", "hit", 0.8)


def test_the_page_has_all_parts(tmp_path: Path) -> None:
    results = Results(tmp_path / "peers.json")
    results.begin({"threads": 2, "prefix": "chrt -f 1"}, {"cpu": "A CPU", "versions": {"torch": ["torch==2"]}})
    results.append(sample(OWN, "f32", "prefill", 0.5))
    results.append({**sample("torch", "f32", "decode", 1.0), "error": "Traceback\nValueError: no"})
    page = markdown(results)
    row, failure = "| S | tilewright | f32 | prefill | 1024 |", "f32 decode: ValueError: no"
    for part in ("A CPU", "`chrt -f 1`", "read 50 GB/s", row, failure, "torch==2", "S llama.cpp q4_0, "):
        assert part in page
    assert text_table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


# Steps and workers


def test_a_step_is_done_once_for_what_it_was_made_from(tmp_path: Path) -> None:
    place, done = Workplace(tmp_path, say=lambda text: None), []
    for made_from in ("1", "1", "2"):
        place.step("x", made_from, lambda made_from=made_from: done.append(made_from))
    assert done == ["1", "2"]

    def fails() -> None:
        place.run(["sh", "-c", "echo the reason; exit 3"], "failing")

    for _ in range(2):  # no stamp: it is tried again
        with pytest.raises(StepError, match="exit code 3 of sh: the reason"):
            place.step("y", "1", fails)


def test_workers_see_the_benchmarks_and_nothing_else_of_the_project(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    folder = Path(place.worker_environment["PYTHONPATH"])
    assert [path.name for path in folder.iterdir()] == ["benchmarks"]
    assert (folder / "benchmarks" / "peers" / "worker.py").is_file()


class Waiting(Engine):
    """Takes 0.1 s a prefill, on a clock of its own."""

    now = 0.0

    def prefill(self, tokens: int) -> float:
        self.now += 0.1
        return 0.1


@pytest.mark.parametrize(
    ("others", "values"),
    [((0.0,), 6), ((0.9, 0.9, 0.0), 3), ((0.9, 0.5, 0.9), 3)],
    ids=["quiet", "quiet in the end", "never quiet"],
)
def test_a_worker_waits_for_quiet(others: tuple[float, ...], values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, shares = Waiting(), iter(others)
    monkeypatch.setattr(worker, "time", SimpleNamespace(perf_counter=lambda: engine.now))
    monkeypatch.setattr(worker.Watch, "__call__", lambda self: next(shares, others[-1]))
    block = worker.measure(engine, "prefill")
    assert block.others == min(others)
    assert len(block.values) == values
    assert engine.now < worker.PATIENCE + 1


ANSWERS = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    if asked["say"] == "hang":
        import time; time.sleep(60)
    if asked["say"] == "die":
        raise ValueError("no")
    print(json.dumps(asked), flush=True)
"""


def test_a_process_answers_until_it_ends(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    one = Process(place, [sys.executable, "-c", ANSWERS])
    assert [one.ask({"say": word}) for word in ("a", "b")] == [{"say": "a"}, {"say": "b"}]
    with pytest.raises(ProcessError, match=r"ValueError: no$"):
        one.ask({"say": "die"})
    one = Process(place, [sys.executable, "-c", ANSWERS])
    with pytest.raises(ProcessError, match=r"no answer in 0\.1 s$"):
        one.ask({"say": "hang"}, patience=0.1)
    one = Process(place, [sys.executable, "-c", ANSWERS])
    one.close()
    assert one.process.returncode == 0


def test_the_error_of_a_worker_is_told(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    one = Process(place, [sys.executable, "-m", "benchmarks.peers.worker"])
    with pytest.raises(ProcessError, match="openvino has no variant f33; it has f32-pa"):
        one.ask(worker.request("load", place, "openvino", "S", "f33", threads=2))
