"""The benchmark beside peers: plans, results that resume, ratios, tables. Nothing is measured, no peer is needed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.peers import cli, gguf_file, runner, worker
from benchmarks.peers.checkpoints import tokens
from benchmarks.peers.figures import Series, Spread, best, series
from benchmarks.peers.own import weight_bytes
from benchmarks.peers.peer import Engine, Peer, Variant, prompt
from benchmarks.peers.plan import Job, jobs, rounds
from benchmarks.peers.results import Results, ResultsError, key
from benchmarks.peers.runner import Runner, is_beaten
from benchmarks.peers.shapes import SHAPES
from benchmarks.peers.systems import OWN, PEERS
from benchmarks.peers.table import goal_rows, markdown, text_table
from benchmarks.peers.tasks import TASKS
from benchmarks.peers.workplace import StepError, Workplace
from benchmarks.peers.works import WORKS

LIMITS = {"read": 50e9, "f32": 2e11, "bf16": 4e11, "int8": 8e11}


def sample(system: str, variant: str, number: int = 0, model: str = "S", **seconds: float) -> dict[str, Any]:
    facts = {"step_bytes": 10**9, "cache_bytes": 10**8, "capacity": 1000}
    what = {"model": model, "system": system, "variant": variant, "family": variant, "round": number, "limits": LIMITS}
    others = dict.fromkeys(seconds, 0.0)
    return {**what, "seconds": seconds, "others": others, "facts": facts, "load_seconds": 0.1, "peak_bytes": 10**8}


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


def test_rounds_interleave_systems() -> None:
    few = Variant("few", "f32", rounds=1)
    all_jobs = [
        Job("S", "a", Variant("x", "f32"), ("decode",)),
        Job("S", "b", few, ("decode",)),
        Job("L", "a", Variant("x", "f32"), ("decode",)),
    ]
    order = [(number, job.model, job.system) for number, job in rounds(all_jobs, 2)]
    [long, once] = rounds([Job("L", "a", Variant("x", "f32"), ("decode", "decode-4k"))], 3), TASKS["decode-4k"].rounds
    assert once == 2
    assert [job.tasks for _, job in long] == [("decode", "decode-4k")] * 2 + [("decode",)]
    assert order == [(0, "S", "a"), (0, "S", "b"), (1, "S", "a"), (0, "L", "a"), (1, "L", "a")]


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
    first.append(sample("a", "v", decode=1.0))
    again = Results(path)
    again.begin({"threads": 2}, {"cpu": "x"})
    assert again.samples == first.samples
    assert again.missing(("S", "a", "v", 0), ["prefill", "decode"]) == ["prefill"]
    assert again.missing(("S", "a", "v", 1), ["decode"]) == ["decode"]
    assert [file.name for file in path.parent.iterdir()] == ["peers.json"], "nothing half written is left"
    assert len(path.read_text().splitlines()) < 15, "a line a sample"


def test_results_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    results = Results(tmp_path / "peers.json")
    results.begin({"threads": 2}, {})
    results.append(sample("a", "v", decode=1.0))
    with pytest.raises(ResultsError, match="'threads': 2"):
        Results(results.path).begin({"threads": 1}, {})
    results.drop(lambda s: s["system"] == "a")
    results.begin({"threads": 1}, {})


def test_a_failure_is_tried_again_and_replaced(tmp_path: Path) -> None:
    results = Results(tmp_path / "peers.json")
    failed = {**sample("a", "v"), "error": "out of memory"}
    del failed["seconds"]
    results.append(failed)
    assert results.missing(key(failed), ["decode"]) == ["decode"]
    results.append(sample("a", "v", decode=1.0))
    assert [s.get("error") for s in results.samples] == [None]
    results.append(sample("a", "v", prefill=1.0))
    assert {one.task for one in series(results.samples)} == {"decode", "prefill"}


def test_spread_and_ratios() -> None:
    spread = Spread((4.0, 1.0, 2.0, 3.0, 10.0))
    assert (spread.median, spread.low, spread.high, spread.iqr) == (3, 1, 10, 2)
    assert Spread((5.0,)).iqr == 0
    a = Series("S", "a", "v", "decode", {0: 10.0, 1: 30.0, 2: 20.0})
    b = Series("S", "b", "v", "decode", {0: 5.0, 1: 10.0})
    assert a.ratios(b).values == (2.0, 3.0), "of equal rounds"
    assert a.ratios(Series("S", "c", "v", "decode", {7: 10.0})).values == (2.0,)
    assert best([b, a]) is a
    assert best([]) is None


def test_disturbed_figures_count_when_there_are_no_others() -> None:
    samples = [sample("a", "v", number, decode=seconds) for number, seconds in enumerate((1.0, 2.0, 2.0))]
    samples[0]["others"]["decode"] = 0.5
    [one] = series(samples)
    assert one.by_round == {1: 32.0, 2: 32.0}
    [one] = series(samples[:1])
    assert one.by_round == {0: 64.0}


def test_of_latencies_the_smaller_is_the_better() -> None:
    rows = [sample("a", "v", **{"encode-1": 0.004}), sample("b", "v", **{"encode-1": 0.003})]
    chosen = best(series(rows))
    assert chosen is not None
    assert (chosen.system, chosen.spread.median) == ("b", 3.0)


def test_a_setting_that_loses_everything_is_not_measured_again() -> None:
    def of(name: str, **seconds: float) -> dict[str, Any]:
        return {**sample("openvino", name, **seconds), "family": "int8"}

    def job(name: str) -> Job:
        return Job("S", "openvino", PEERS["openvino"].variant(name), ("prefill", "decode"))

    slower, faster = of("int8-pa", prefill=2.0, decode=2.0), of("int8-sdpa", prefill=1.0, decode=1.0)
    assert is_beaten(job("int8-pa"), [slower, faster])
    assert not is_beaten(job("int8-sdpa"), [slower, faster])
    assert not is_beaten(job("int8-pa"), [of("int8-pa", prefill=2.0, decode=1.0), faster])
    assert not is_beaten(job("int8-pa"), [faster]), "not measured yet"


class Machine:
    """Stands for the process that measures limits."""

    def __init__(self, *_: object) -> None:
        self.closed = False

    def __call__(self) -> dict[str, float]:
        return LIMITS

    def close(self) -> None:
        self.closed = True


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, tuple[str, ...]]] = []

    def worker_of(self: Runner, job: Job, tasks: list[str]) -> dict[str, Any]:
        asked.append((job.system, tuple(tasks)))
        if len(asked) == 2:
            raise RuntimeError("Traceback\nValueError: no")
        if len(asked) == 3:
            raise KeyboardInterrupt
        return {key: value for key, value in sample(job.system, "x", **dict.fromkeys(tasks, 1.0)).items() if key != "round"}

    monkeypatch.setattr(runner, "Limits", Machine)
    monkeypatch.setattr(Runner, "_worker", worker_of)
    all_jobs = [Job("S", system, Variant("x", "f32"), ("prefill", "decode")) for system in "abc"]
    said: list[str] = []
    running = Runner(Workplace(tmp_path), {}, threads=2, say=said.append)
    with pytest.raises(KeyboardInterrupt):
        running.run(all_jobs, 1, Results(tmp_path / "r.json"))
    assert said[1] == "S b x: failed: ValueError: no"
    results = Results(tmp_path / "r.json")
    running.run(all_jobs, 1, results)
    both = ("prefill", "decode")
    assert asked == [("a", both), ("b", both), ("c", both), ("b", both), ("c", both)], "a is not measured again"
    assert [s["system"] for s in results.samples if "error" not in s] == ["a", "b", "c"]


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
        sample(OWN, "w4a8", decode=1.0),
        sample("llama.cpp", "q4_0", decode=1.6),
        sample("onnxruntime", "int4", decode=1.5),
        sample("llama.cpp", "q8_0", decode=0.1),
        sample("llama.cpp", "q4_0-avx2", decode=0.1),
    ]
    [row] = goal_rows(samples, [work("decode-int4")])
    assert (row.peer.system, row.verdict) == ("onnxruntime", "hit")
    assert row.ratio.median == pytest.approx(1.5)
    assert row.share is None, "the limit counts on L alone"
    samples[2] = sample("onnxruntime", "int4", decode=1.3)
    assert [row.verdict for row in goal_rows(samples, [work("decode-int4")])] == ["miss"]


def test_the_share_of_a_limit_counts_the_bytes_of_a_step() -> None:
    tokens = TASKS["decode"].work
    cache = 10**5 * (128 + tokens / 2)
    samples = [sample(OWN, "bf16", model="L", decode=tokens * (10**9 + cache) / LIMITS["read"] / 0.9)]
    [row] = goal_rows(samples, [work("decode-bf16")])
    assert row.share == pytest.approx(0.9)
    assert (row.peer, row.verdict, row.goal) == (None, "hit", ">= 1.2x, >= 85% of read")


def test_a_latency_goal_is_met_from_below() -> None:
    figures = {OWN: 0.8, "openvino": 1.0}
    samples = [sample(system, "f32", model="E", **{"encode-1": value}) for system, value in figures.items()]
    [row] = goal_rows(samples, [work("encoder-f32")])
    assert (row.goal, row.verdict, row.ratio.median) == ("<= 0.9x", "hit", 0.8)


def test_the_page_has_all_parts(tmp_path: Path) -> None:
    results = Results(tmp_path / "peers.json")
    results.begin({"threads": 2, "prefix": "chrt -f 1"}, {"cpu": "A CPU", "versions": {"torch": ["torch==2"]}})
    results.append(sample(OWN, "f32", prefill=0.5))
    results.append({**sample("torch", "f32"), "error": "Traceback\nValueError: no"})
    page = markdown(results)
    row = "| S | tilewright | f32 | prefill | 1024 |"
    for part in ("A CPU", "`chrt -f 1`", "read 50 GB/s", row, "ValueError: no", "torch==2", "S llama.cpp q4_0, "):
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
    [((0.0,), 9), ((0.9, 0.9, 0.0), 3), ((0.9, 0.5, 0.9), 3)],
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


def test_a_request_is_what_a_worker_reads(tmp_path: Path) -> None:
    text = worker.request("measure", Workplace(tmp_path), "torch", "S", "f32", tasks=["decode"], threads=2)
    assert json.loads(text) == {"do": "measure", "cache": str(tmp_path), "system": "torch", "model": "S", "variant": "f32",
                                "tasks": ["decode"], "threads": 2}  # fmt: skip


# Models


def test_prompts_differ_by_seed_and_are_in_the_vocabulary() -> None:
    a, b = (prompt(SHAPES["S"], 512, seed) for seed in (0, 1))
    assert a[0] != b[0], "systems remember prompts with the same start"
    assert a == prompt(SHAPES["S"], 512)
    assert all(300 <= token < SHAPES["S"].vocabulary for token in a + b)


def test_tokens_are_all_different() -> None:
    made = tokens(1000)
    assert len(set(made)) == len(made) == 1000
    assert made.index("<|end|>") == 257


def test_gguf_names() -> None:
    assert gguf_file.gguf_name("model.layers.3.mlp.up_proj.weight") == "blk.3.ffn_up.weight"
    assert gguf_file.gguf_name("model.layers.0.self_attn.q_proj.bias") == "blk.0.attn_q.bias"
    assert gguf_file.gguf_name("model.embed_tokens.weight") == "token_embd.weight"
    assert gguf_file.gguf_name("lm_head.weight") == "output.weight"


def test_bytes_of_a_step_leave_tables_out() -> None:
    header = {
        "__metadata__": {},
        "model.embed_tokens.weight": {"data_offsets": [0, 100]},
        "model.embed_tokens.weight|panels{n=4}": {"data_offsets": [100, 180]},
        "position_table": {"data_offsets": [180, 190]},
        "model.norm.weight": {"data_offsets": [192, 196]},
    }
    assert weight_bytes(header) == {"weight_bytes": 194, "step_bytes": 84}


def test_peers_are_pinned() -> None:
    for peer in PEERS.values():
        assert isinstance(peer, Peer)
        assert all("==" in item for item in peer.requirements)
