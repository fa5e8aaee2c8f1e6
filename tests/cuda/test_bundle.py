"""Bundles: written without a GPU, run on one (here the emulated device, through its driver), imported, and used."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import tilewright
from tests.cuda.driver import bundle_driver
from tests.unit.test_layering import CORE
from tilewright.bundling import draw, shares
from tilewright.bundling_kernel import beginning, traffic
from tilewright.codegen.cuda.target import CudaTarget
from tilewright.codegen.store import compiler_version
from tilewright.codegen.workers import Job
from tilewright.costmodel.database import Database
from tilewright.ir import CodegenError, TilewrightError, parse_module
from tilewright.measuring_inputs import PERIOD, Subject, make_inputs
from tilewright.runtime.artifact import ArtifactWriter, WeightSpec, plan_weights
from tilewright.runtime.bundle.__main__ import main
from tilewright.runtime.bundle.arrays import Arrays, open_bundle
from tilewright.runtime.bundle.format import BUNDLE, ArraySpec, Bundle
from tilewright.runtime.bundle.run import Run
from tilewright.tune_cli import app
from tilewright.tuning import module_of
from tilewright.workloads import kernel_tasks

TARGET = "cuda{arch=sm_90a}"
GPU = CudaTarget("sm_90a")
ROWS = 30
SIZES = {"B": ROWS}
UNWANTED = "cuda_loops{threads=128 elements=8}"
"""The compiler of these tests refuses it."""


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = torch.nn.Parameter(torch.randn(48))

    def forward(self, x):
        return torch.softmax(x * self.scale, -1), torch.sin(x).t() + self.scale[0]


X = np.linspace(-2, 3, ROWS * 48, dtype=np.float32).reshape(ROWS, 48)
MODEL = {"args": (torch.from_numpy(X[:2]),), "dynamic": {"x": {0: "B"}}, "target": TARGET}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """Two kernels under 18 schedules, one of which the compiler refuses."""
    out, compile = tmp_path_factory.mktemp("bundle") / "net", Job.compile

    def refuse(job: Job, target):
        if job.schedule.text == UNWANTED:
            raise CodegenError("too many elements")
        return compile(job, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(out.parent))
        patch.setattr(Job, "compile", refuse)
        done = tilewright.emit_bundle(Net(), **MODEL, out=out, sizes=SIZES, trials=28)
    assert (done.kernels, done.schedules, done.refused) == (2, 28, 1)
    assert done.bytes > 10_000
    return out


@pytest.fixture(scope="module")
def driver(bundle, tmp_path_factory) -> str:
    return str(bundle_driver(bundle, tmp_path_factory.mktemp("driver")))


def run(bundle: Path, driver: str, out: Path, *options: str) -> int:
    return main(["run", str(bundle), "--driver", driver, "--out", str(out), "--budget", "2m", *options])


def read(bundle: Path) -> Bundle:
    return Bundle.from_text((bundle / "manifest.json").read_text(), str(bundle))


def measured(path: Path) -> dict[str, dict]:
    """The measurements of a file by schedule, of the elementwise kernel."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    of = {r["workload"]["key"]: r["workload"]["kernel"] for r in rows if "workload" in r}
    found = [r["measurement"] for r in rows if "measurement" in r]
    return {m["schedule"]: m for m in found if "sin" in of[m["workload"]]}


def elementwise(bundle: Path) -> int:
    return next(i for i, w in enumerate(read(bundle).workloads) if "sin" in w.record["kernel"])


# ---- what is written ---------------------------------------------------------------------------------------------------


def test_every_kernel_is_there_and_its_default_comes_first(bundle) -> None:
    found = open_bundle(bundle)
    module = module_of(Net(), MODEL["args"], None, MODEL["dynamic"], "O2", None, None, None, GPU)
    kernels = kernel_tasks(module, GPU, SIZES)
    assert [w.record["kernel"] for w in found.workloads] == [k.text for k in kernels]
    for workload, kernel in zip(found.workloads, kernels):
        assert workload.record["key"] == kernel.workload(GPU, 7).key
        assert (workload.record["host"], workload.record["threads"]) == (TARGET, 1)
        assert workload.candidates[0].schedule == kernel.space(GPU).default.text
        assert len({c.schedule for c in workload.candidates}) == len(workload.candidates)
    assert found.compiler == compiler_version()


def test_candidates_say_what_they_use_or_why_they_are_not_there(bundle) -> None:
    candidates = [c for w in read(bundle).workloads for c in w.candidates]
    refused = [c for c in candidates if c.refused]
    assert [(c.schedule, c.refused) for c in refused] == [(UNWANTED, "too many elements")]
    for candidate in (c for c in candidates if not c.refused):
        assert candidate.metrics["registers"] > 0
        assert candidate.metrics["code_bytes"] > 100
        assert (bundle / candidate.cubin).read_bytes()[:4] == b"\x7fELF"
        assert candidate.numbers == (ROWS,)
        assert len(candidate.launches) == 1
    whole = {launch.grid[0] * launch.block for c in candidates for launch in c.launches if "elements=1}" in c.schedule}
    assert min(whole) >= ROWS


def test_equal_arrays_are_there_once(bundle) -> None:
    found = read(bundle)
    assert len({w.arguments[0] for w in found.workloads}) == 1
    assert len({array.file for array in found.arrays.values()}) == 2


def test_equal_seeds_draw_equal_schedules_and_small_spaces_leave_theirs_to_others() -> None:
    module = module_of(Net(), MODEL["args"], None, MODEL["dynamic"], "O2", None, None, None, GPU)
    kernels = kernel_tasks(module, GPU, SIZES)
    texts = [[[s.text for s in own] for own in draw(kernels, GPU, 20, seed)] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert sum(map(len, texts[0])) == 20
    assert sorted(len(own) for own in draw(kernels, GPU, 1000, 0)) == [6, 24]
    assert [len(own) for own in draw(kernels, GPU, 1, 0)] == [1, 1]


def test_shares_are_whole_numbers_by_weight() -> None:
    assert shares({0: 1.0, 1: 3.0, 2: 0.1}, 10) == {0: 3, 1: 7, 2: 0}
    assert sum(shares({i: 1.0 for i in range(7)}, 24).values()) == 24


def test_large_arrays_are_stored_as_long_as_they_do_not_repeat(tmp_path) -> None:
    block = np.arange(PERIOD, dtype=np.float32)
    whole = np.resize(block, (3, PERIOD // 2))
    assert beginning(whole.reshape(-1)).size == PERIOD
    other = whole.copy()
    other[-1, -1] += 1
    assert beginning(other.reshape(-1)).size == whole.size
    name, spec = "0" * 32, ArraySpec("a.safetensors", "f32", whole.shape, PERIOD)
    with ArtifactWriter(tmp_path / "b", BUNDLE) as writer:
        with writer.weights(plan_weights([WeightSpec(name, "f32", (PERIOD,))]), "a.safetensors") as stream:
            stream.write(name, block)
        writer.commit(Bundle(TARGET, "c", {name: spec}, ()))
    np.testing.assert_array_equal(Arrays(tmp_path / "b", open_bundle(tmp_path / "b"))[name], whole)


TEXT = """module @m {
  dim S : 1..64
  kernel @k%s
}"""
KV = "kv<heads=2, dim=16, vdim=8, length=64, dtype=f32, layout=contiguous>"
SLOT = 2 * (16 + 8) * 4


@pytest.mark.parametrize(
    ("kernel", "wanted"),
    [
        ("""(%i: tensor<2xSxi32>, %t: tensor<1000x8xf32>) {
    %0 = nn.embedding(%i, %t) : tensor<2xSx8xf32>
    return([%0]) }""", 2 * 3 * 4 + 2 * 3 * 8 * 4),
        (f"""(%k: tensor<2xSx2x16xf32>, %v: tensor<2xSx2x8xf32>, %c: {KV}, %at: tensor<2xi64>) {{
    %0 = kv.append(%c, %k, %v, %at) : {KV}
    return([%0]) }}""", 2 * (2 * 3 * SLOT) + 2 * 8),
        (f"""(%q: tensor<2xSx4x16xf32>, %c: {KV}, %at: tensor<2xi64>) {{
    %0 = kv.attend(%q, %c, %at) {{scale=0.25}} : tensor<2xSx4x8xf32>
    return([%0]) }}""", None),
    ],
)  # fmt: skip
def test_traffic_is_what_a_call_must_move(kernel, wanted) -> None:
    subject = Subject.parse(TEXT % kernel, {"S": 3}, GPU)
    inputs = make_inputs(subject)
    if wanted is None:
        filled = int(inputs[2].max()) + 3
        assert filled < 64
        wanted = 2 * filled * SLOT + 2 * 3 * 4 * (16 + 8) * 4 + 2 * 8
    assert traffic(subject, inputs) == wanted


def test_what_is_no_gpu_is_refused(tmp_path) -> None:
    with pytest.raises(TilewrightError, match="a bundle is for a GPU"):
        tilewright.emit_bundle(Net(), **{**MODEL, "target": "x86-64-v3"}, out=tmp_path / "b")
    with pytest.raises(TilewrightError, match=r"is not measured here; .*--emit-bundle"):
        tilewright.tune(Net(), **MODEL, db=tmp_path / "t.db")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(Exception, match="exists and is not a bundle"):
        tilewright.emit_bundle(Net(), **MODEL, out=tmp_path / "other")


def test_the_command_takes_an_artifact(bundle, tmp_path) -> None:
    tilewright.compile(Net(), **MODEL, out=tmp_path / "net")
    command = ["model", str(tmp_path / "net"), "--target", TARGET, "--emit-bundle", str(tmp_path / "b")]
    done = CliRunner().invoke(app, [*command, "--size", f"B={ROWS}", "--trials", "3"], catch_exceptions=False)
    assert "wrote 2 kernels under 3 schedules" in done.output
    assert "python -m tilewright.runtime.bundle run" in done.output
    assert [w.key for w in read(tmp_path / "b").workloads] == [w.key for w in read(bundle).workloads]
    assert "measures nothing" in CliRunner().invoke(app, [*command, "--budget", "5m"]).output


# ---- the whole way -----------------------------------------------------------------------------------------------------


def test_measured_imported_and_chosen(bundle, driver, tmp_path, capsys) -> None:
    out = tmp_path / "results.jsonl"
    assert run(bundle, driver, out) == 0
    printed = capsys.readouterr().out
    assert "device: emulated GPU" in printed
    assert "2 kernels: 27 right, 1 refused" in printed
    assert "- the best schedules take 0.868 of the default's time" in printed, "(31 + 2) of (31 + 7) us"
    assert printed.startswith((tmp_path / "results.md").read_text())
    rows = measured(out)
    assert rows[UNWANTED]["status"] == "refused"
    default = rows["cuda_loops{threads=256 elements=1}"]
    assert default["seconds"] == default["baseline"] == pytest.approx(1e-6 * (1 + -(-ROWS * 48 // 256)))
    assert default["repeats"] >= 10
    assert default["metrics"].keys() == {"registers", "spills", "shared_bytes", "code_bytes", "drift"}
    with Database(str(tmp_path / "t.db")) as database:
        assert database.import_(out).new == 28
    compiled = tilewright.compile(Net(), **MODEL, sizes=SIZES, db=tmp_path / "t.db", out=tmp_path / "net")
    kernels = {k["operations"]: k for k in compiled.report.kernels}
    chosen = next(k for names, k in kernels.items() if "sin" in names)
    fewest = min(r["seconds"] for r in rows.values() if r["seconds"])
    assert rows[chosen["schedule"]]["seconds"] == fewest < 0.5 * default["seconds"]
    assert chosen["chosen"].startswith("tuning, 0.")
    assert all(k["chosen"].startswith("tuning") for k in kernels.values())
    assert "were not tuned" not in " ".join(compiled.report.notes)


def test_checked_only(bundle, driver, tmp_path, capsys) -> None:
    out = tmp_path / "results.jsonl"
    assert run(bundle, driver, out, "--check-only") == 0
    assert "27 right, 1 refused" in capsys.readouterr().out
    assert measured(out).keys() == {UNWANTED}


def test_what_fails_is_named_and_does_not_stop_the_rest(bundle, tmp_path, monkeypatch, capsys) -> None:
    index = elementwise(bundle)
    candidates = [c for c in read(bundle).workloads[index].candidates if not c.refused][1:7]
    count, plants = ROWS * 48, {}
    for candidate, code in zip(candidates, [
        "if (blockIdx.x == 0) return;",
        "static long calls; if (++calls > 5 * (long)gridDim.x * blockDim.x) { r0[7] = 100; return; }",
        f"r0[{count}] = 0;",
        "*(volatile int *)0 = 1;",
        "for (volatile int i = 0;; i++);",
    ]):  # fmt: skip
        plants[Path(candidate.cubin).stem] = code
    broken = candidates[5].launches[0].symbol
    monkeypatch.setenv("FAKE_GPU", f"9.0 {broken}")
    out = tmp_path / "results.jsonl"
    assert run(bundle, str(bundle_driver(bundle, tmp_path, plants)), out, "--timeout", "3s") == 1
    rows = measured(out)
    found = [(rows[c.schedule]["status"], rows[c.schedule]["error"]) for c in candidates]
    assert [status for status, _ in found] == ["wrong", "wrong", "wrong", "crashed", "timeout", "crashed"]
    for (_, error), text in zip(found, ["result 0 differs by nan", "not always: result 0 differs",
                                        "is followed by memory that was written to", "the process ended",
                                        "not through after 3 s", "CUDA_ERROR_LAUNCH_FAILED"]):  # fmt: skip
        assert text in error
    assert all(rows[c.schedule]["seconds"] is None for c in candidates)
    right = [r for r in rows.values() if r["status"] == "ok"]
    assert len(right) == len(rows) - 7
    assert all(r["baseline"] for r in right)
    printed = capsys.readouterr().out
    assert "2 kernels: 21 right, 3 wrong, 2 crashed, 1 timeout, 1 refused" in printed
    assert all(c.schedule in printed for c in candidates)


def test_a_default_that_fails_leaves_the_others_without_a_baseline(bundle, tmp_path) -> None:
    workload = read(bundle).workloads[elementwise(bundle)]
    plant = {Path(workload.candidates[0].cubin).stem: "*(volatile int *)0 = 1;"}
    out = tmp_path / "results.jsonl"
    assert run(bundle, str(bundle_driver(bundle, tmp_path, plant)), out) == 1
    rows = measured(out)
    assert rows[workload.candidates[0].schedule]["status"] == "crashed"
    others = [r for r in rows.values() if r["status"] == "ok"]
    assert len(others) == len(workload.candidates) - 2
    assert all(r["seconds"] and r["baseline"] is None for r in others)


def test_an_argument_in_a_layout_of_its_own_takes_the_place_of_the_plain_one(bundle, driver, tmp_path) -> None:
    index = next(i for i in range(2) if i != elementwise(bundle))
    copy = shutil.copytree(bundle, tmp_path / "copy")
    x, scale = (names[0] for names in read(bundle).workloads[index].arguments)
    assert x != scale
    sealed(lambda d: d["workloads"][index]["candidates"][1].update(packed={"1": x}))(copy)
    assert run(copy, driver, tmp_path / "r.jsonl") == 1
    rows = [json.loads(line).get("measurement") for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [m["status"] for m in rows if m and m["status"] not in ("ok", "refused")] == ["wrong"]


CACHE = "kv<heads=1, dim=16, vdim=16, length=32, dtype=bf16, layout=contiguous>"
CACHED = f"""module @cached {{
  dim B : 1..4
  dim S : 1..8
  weight @w : tensor<48x24xbf16>
  state @kv : {CACHE}
  func @main(%x: tensor<BxSx24xbf16>, %start: tensor<Bxi64>) {{
    %0 = nn.linear(%x, @w) : tensor<BxSx48xbf16>
    %1 = core.slice(%0) {{starts=[0, 0, 0] stops=[B, S, 16] steps=[1, 1, 1]}} : tensor<BxSx16xbf16>
    %2 = core.reshape(%1) {{shape=[B, S, 1, 16]}} : tensor<BxSx1x16xbf16>
    %3 = core.slice(%0) {{starts=[0, 0, 16] stops=[B, S, 32] steps=[1, 1, 1]}} : tensor<BxSx16xbf16>
    %4 = core.reshape(%3) {{shape=[B, S, 1, 16]}} : tensor<BxSx1x16xbf16>
    %5 = kv.append(@kv, %2, %4, %start) : {CACHE}
    %6 = kv.attend(%2, %5, %start) {{scale=0.25}} : tensor<BxSx1x16xbf16>
    return([%6])
  }}
}}"""


def test_tensor_cores_and_caches(tmp_path) -> None:
    """Caches are changed in place and restored: every candidate finds them as they were."""
    done = tilewright.emit_bundle(parse_module(CACHED), target=TARGET, sizes={"B": 2, "S": 5}, trials=4, out=tmp_path / "b")
    families = [w.record["family"] for w in read(done.path).workloads]
    assert sorted(families) == ["cuda.attention", "cuda.attention", "cuda.linear"]
    changed = [r.argument is not None for w in read(done.path).workloads for r in w.results]
    assert sorted(changed) == [False, False, True]
    assert run(done.path, str(bundle_driver(done.path, tmp_path)), tmp_path / "r.jsonl") == 0


CACHES = ("dtype=bf16, layout=paged<16>", "dtype=i8, layout=contiguous", "dtype=i4, layout=paged<32>")


def over_caches() -> str:
    """A module that appends to caches of several types, and attends to each."""
    lines = []
    for i, what in enumerate(CACHES):
        kind = f"kv<heads=1, dim=16, vdim=16, length=64, {what}>"
        table = f", %pages{what[-3:-1]}" if "paged" in what else ""
        lines += [f"    %{2 * i} = kv.append(@kv.{i}, %k, %v, %start{table}) : {kind}",
                  f"    %{2 * i + 1} = kv.attend(%q, %{2 * i}, %start{', none, none' * bool(table)}{table}) {{scale=0.25}}"
                  " : tensor<BxSx2x16xbf16>"]  # fmt: skip
    states = [f"  state @kv.{i} : kv<heads=1, dim=16, vdim=16, length=64, {what}>" for i, what in enumerate(CACHES)]
    arguments = "%q: tensor<BxSx2x16xbf16>, %k: tensor<BxSx1x16xbf16>, %v: tensor<BxSx1x16xbf16>, %start: tensor<Bxi64>"
    arguments += ", %pages16: tensor<BxTxi32>, %pages32: tensor<BxUxi32>"
    dims = ["  dim B : 1..4", "  dim S : 1..8", "  dim T : 1..4", "  dim U : 1..2"]
    return "\n".join(["module @caches {", *dims, *states, f"  func @main({arguments}) {{", *lines,
                      "    return([%1, %3, %5])", "  }", "}"])  # fmt: skip


def test_caches_in_pages_and_of_codes_are_in_a_bundle(tmp_path, capsys) -> None:
    """Each is appended to and attended to; what is not right is found."""
    sizes = {"B": 2, "S": 5, "T": 4, "U": 2}
    done = tilewright.emit_bundle(parse_module(over_caches()), target=TARGET, sizes=sizes, trials=6, out=tmp_path / "b")
    workloads = read(done.path).workloads
    assert done.refused == 0
    for cache in CACHES:
        found = [w.record["kernel"] for w in workloads if cache in w.record["kernel"]]
        assert sorted("kv.append" in text for text in found) == [False, True]
    appended = {w.record["kernel"]: w for w in workloads if w.results[0].argument is not None}
    coded = [e.coded and e.coded.bits for w in appended.values() for e in w.results[0].expected]
    assert sorted(coded, key=str) == [4, 4, 8, 8, None, None]
    [wrong] = [w for text, w in appended.items() if "dtype=i8" in text]
    cubins = [Path(w.candidates[0].cubin).stem for w in workloads]
    out = tmp_path / "r.jsonl"
    assert run(done.path, str(bundle_driver(done.path, tmp_path)), out, "--check-only") == 0
    assert f"{len(set(cubins))} right" in capsys.readouterr().out
    plant = {Path(wrong.candidates[0].cubin).stem: "if (blockIdx.x == 1) return;"}
    (tmp_path / "other").mkdir()
    assert run(done.path, str(bundle_driver(done.path, tmp_path / "other", plant)), out, "--check-only") == 1
    assert "% of the integers differ" in out.read_text()


def test_an_interrupted_run_keeps_what_it_has(bundle, driver, tmp_path, monkeypatch, capsys) -> None:
    workload = Run.workload

    def interrupted(self, results, index):
        if index == 1:
            raise KeyboardInterrupt
        workload(self, results, index)

    monkeypatch.setattr(Run, "workload", interrupted)
    out = tmp_path / "results.jsonl"
    assert run(bundle, driver, out) == 130
    assert "not tried" in capsys.readouterr().out
    with Database(str(tmp_path / "t.db")) as database:
        assert database.import_(out).new == len(read(bundle).workloads[0].candidates) + 1, "and what was refused"


# ---- refusals ----------------------------------------------------------------------------------------------------------


def edited(text: str, other: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "manifest.json"
        assert text in path.read_text()
        path.write_text(path.read_text().replace(text, other, 1))

    return edit


def sealed(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """A manifest with a right checksum and wrong content."""

    def edit(folder: Path) -> None:
        data = json.loads((folder / "manifest.json").read_text())
        del data["checksum"]
        change(data)
        (folder / "manifest.json").write_text(BUNDLE.seal(data))

    return edit


def flipped(pattern: str) -> Callable[[Path], None]:
    def flip(folder: Path) -> None:
        path = sorted(folder.glob(pattern))[0]
        data = bytearray(path.read_bytes())
        data[-1] ^= 4
        path.write_bytes(data)

    return flip


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a byte of a cubin": (flipped("kernels/*.cubin"), "its checksum is"),
    "a byte of an array": (flipped("*.safetensors"), "its checksum is"),
    "no cubin": (lambda f: sorted(f.glob("kernels/*.cubin"))[0].unlink(), "the bundle is incomplete. Emit or copy"),
    "an edited manifest": (edited('"block": ', '"block": 1'), "checksum that it states"),
    "another format": (edited("tilewright-bundle", "tilewright-artifact"), "this is not a bundle made by tilewright"),
    "a later version": (edited('"version": 2', '"version": 3'), "has version 3 .* use a newer tilewright"),
    "an unknown field": (sealed(lambda d: d.update(more=1)), "the fields .*more.* are unknown"),
    "a block that is too large": (sealed(lambda d: d["workloads"][0]["candidates"][0]["launches"][0].update(block=4096)),
                                  "block: expected an integer"),
    "a path that leads out": (sealed(lambda d: d["files"].update({"../x": {"bytes": 1, "xxh3_128": "0" * 32}})),
                              "is not a relative path"),
    "an array that is not there": (sealed(lambda d: d["arrays"].popitem()), "the arrays .* are not listed"),
    "a time that is no number": (sealed(lambda d: d["workloads"][0].update(weight=True)), "expected a number"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_bundle_that_is_no_good_is_refused(bundle, tmp_path, capsys, what) -> None:
    damage, message = REFUSED[what]
    copy = shutil.copytree(bundle, tmp_path / "copy")
    damage(copy)
    assert run(copy, "no-driver-is-asked.so", tmp_path / "r.jsonl") == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.search(message, printed.err), printed.err
    assert not (tmp_path / "r.jsonl").exists()


def test_machines_that_cannot_run_it(bundle, driver, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "r.jsonl"
    assert run(bundle, "libcuda-that-is-not-there.so", out) == 1
    assert "no CUDA driver" in capsys.readouterr().err
    assert run(bundle, driver, out, "--device", "2") == 1
    assert "there is no GPU 2" in capsys.readouterr().err
    monkeypatch.setenv("FAKE_GPU", "8.0")
    assert run(bundle, driver, out) == 1
    assert "compiled for sm_90a, and this GPU, emulated GPU, has compute capability 8.0" in capsys.readouterr().err


def test_running_needs_the_runtime_alone(bundle, driver, tmp_path) -> None:
    """Both processes import nothing but it, and what the core installation has."""
    code = """
import json, sys
from tilewright.runtime.bundle import worker
from tilewright.runtime.bundle.__main__ import main
main(["run", sys.argv[1], "--driver", sys.argv[2], "--out", sys.argv[3], "--check-only"])
worker.serve(worker.Request(sys.argv[1], 0, sys.argv[2], 0, (0,), True, 0.01), lambda said: None)
found = {name for name in sys.modules if name.startswith("tilewright.")}
tops = {name.split(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
print(json.dumps([sorted(found), sorted(tops)]))
"""
    command = [sys.executable, "-c", code, str(bundle), driver, str(tmp_path / "r.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=os.getcwd())
    ours, tops = json.loads(done.stdout.splitlines()[-1])
    assert {name.split(".")[1] for name in ours} == {"runtime"}
    assert {top for top in tops if not top.startswith("_")} <= CORE
