"""The command line: what each command prints, exit codes, and refusals without a traceback."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tilewright
from tests.unit.test_bisect import Halve
from tests.unit.test_layering import HEAVY
from tests.zoo import ZOO
from tilewright import CompileReport, Tokenizer, frontend
from tilewright.cli import main
from tilewright.codegen.standalone import StandaloneKernel
from tilewright.ir import parse_module, print_module
from tilewright.passes import Pipeline, registry
from tilewright.runtime.artifact import read_manifest

ROOT = Path(__file__).parents[2]
SMALL_LM = ROOT / "tests" / "models" / "small-lm"
MODULE = """module @m {
  dim B : 1..8
  weight @up : tensor<8x4xf32>
  weight @down : tensor<4x8xf32>
  func @forward(%x: tensor<Bx4xf32>) {
    %0 = nn.linear(%x, @up) : tensor<Bx8xf32> loc("mlp.up" "mlp.py":3)
    %1 = core.sigmoid(%0) : tensor<Bx8xf32> loc("mlp.act" "mlp.py":4)
    %2 = core.mul(%0, %1) : tensor<Bx8xf32> loc("mlp.act" "mlp.py":4)
    %3 = nn.linear(%2, @down) : tensor<Bx4xf32> loc("mlp.down" "mlp.py":5)
    return([%3])
  }
}
"""


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs ``tilewright ARGUMENTS`` in this process: ``cli("opt", "-", stdin="...")``."""

    def run(*arguments: object, stdin: str = "") -> Done:
        monkeypatch.setattr(sys, "argv", ["tilewright", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            main()
        return Done(int(exit.value.code or 0), *capfd.readouterr())

    return run


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small language model, as ``tilewright compile`` makes it in another process; not to be changed."""
    path = tmp_path_factory.mktemp("cli") / "small-lm"
    options = ["--out", path, "--dtype", "f32", "--max-length", "64", "--target", "x86-64-v3"]
    command = [sys.executable, "-m", "tilewright.cli", "compile", SMALL_LM, *options]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("llamaforcausallm for cpu{arch=x86-64-v3}\n")
    assert done.stdout.endswith(f"\nwrote {path}\n")
    assert done.stderr == ""  # no progress bar where nobody sees it
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of two random layers."""
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    ZOO["llama"].model().save_pretrained(folder)
    return folder


# ---- compile and run ---------------------------------------------------------------------------------------------


def test_compile_did_what_it_was_asked(artifact: Path) -> None:
    manifest = tilewright.load(artifact).manifest
    assert manifest.target.text == "cpu{arch=x86-64-v3}"
    assert {s.length for s in manifest.states} == {64}
    assert {s.dtype for s in manifest.states} == {"f32"}
    assert (artifact / "tokenizer.json").read_bytes() == (SMALL_LM / "tokenizer.json").read_bytes()


def test_run_continues_ids(cli: Run, artifact: Path) -> None:
    with tilewright.load(artifact).session() as session:
        want = session.generate([[5, 6, 7]], 12)[0]
        drawn = session.generate([[5, 6, 7]], 12, temperature=1.5, top_k=40, top_p=0.9, seed=3)[0]
    done = cli("run", artifact, "--ids", "5,6,7", "-n", 12)
    assert (done.code, done.out) == (0, ",".join(map(str, want)) + "\n")
    assert re.fullmatch(r"3 prompt tokens, first token after \d+\.\d ms, 12 new tokens at \d+\.\d tokens/s\n", done.err)
    sampling = ("--temperature", 1.5, "--top-k", 40, "--top-p", 0.9, "--seed", 3, "--threads", 2)
    assert cli("run", artifact, "--ids", "5, 6,7", "-n", 12, *sampling).out == ",".join(map(str, drawn)) + "\n"
    assert drawn != want


def test_run_continues_a_text(cli: Run, artifact: Path) -> None:
    prompt, tokenizer = "for i in range(", Tokenizer(SMALL_LM)
    with tilewright.load(artifact).session() as session:
        made = session.generate([tokenizer.encode(prompt)], 16, stop_tokens=tokenizer.stop_tokens)[0]
    want = prompt + tokenizer.decode(made) + "\n"
    assert cli("run", artifact, "--prompt", prompt, "-n", 16).out == want
    assert cli("run", artifact, "--prompt", "-", "-n", 16, stdin=prompt).out == want


def test_run_compiles_a_folder_first(cli: Run, tiny: Path, tmp_path: Path) -> None:
    assert cli("compile", tiny, "--out", tmp_path / "a", "--max-length", 32).code == 0
    options = ("--ids", "9,8,7", "-n", 8)
    direct = cli("run", tiny, "--max-length", 32, *options)
    assert direct.code == 0
    assert direct.out == cli("run", tmp_path / "a", *options).out
    assert "kernels" in direct.err


# ---- opt ---------------------------------------------------------------------------------------------------------


def test_opt_gives_back_what_it_reads(cli: Run, tmp_path: Path) -> None:
    source = tmp_path / "m.twir"
    source.write_text(MODULE)
    assert cli("opt", source) == Done(0, MODULE, "")
    assert cli("opt", "-", stdin=MODULE) == Done(0, MODULE, "")
    assert cli("opt", source, "--out", tmp_path / "out.twir") == Done(0, "", "")
    assert (tmp_path / "out.twir").read_text() == MODULE


def test_opt_runs_passes(cli: Run) -> None:
    module = parse_module(MODULE)
    Pipeline.parse("clean,fuse{mode=single}").run(module)
    done = cli("opt", "-", "--passes", "clean,fuse{mode=single}", stdin=MODULE)
    assert (done.code, done.out, done.err) == (0, print_module(module), "")
    assert "kernel.call" in done.out
    again = cli("opt", "-", stdin=done.out)
    assert again == done


def test_opt_through_a_pipe() -> None:
    command = f"{sys.executable} -m tilewright.cli"
    line = f"{command} opt - -p canonicalize | {command} opt - -p cse,dce"
    done = subprocess.run(["sh", "-c", line], input=MODULE, capture_output=True, text=True, timeout=120, check=True)
    module = parse_module(MODULE)
    Pipeline.parse("canonicalize,cse,dce").run(module)
    assert done.stdout == print_module(module)


def test_opt_prints_around_passes(cli: Run) -> None:
    passes = ("--passes", "canonicalize,dce,fuse", "--print-before", "canonicalize", "--print-after", "fuse")
    done = cli("opt", "-", *passes, stdin=MODULE)
    heads = re.findall(r"^// .*", done.err, re.MULTILINE)
    assert heads == ["// before canonicalize", "// after fuse"]
    before, after = (text for text in re.split(r"// .*\n", done.err) if text)
    assert before == MODULE
    assert after == done.out
    done = cli("opt", "-", "--passes", "canonicalize,dce", "--print-after", "all", stdin=MODULE)
    assert re.findall(r"^// .*", done.err, re.MULTILINE) == ["// after canonicalize", "// after dce"]


def test_opt_stops_after_a_pass(cli: Run) -> None:
    stopped = cli("opt", "-", "--passes", "canonicalize,fuse,plan-memory", "--stop-after", "canonicalize", stdin=MODULE)
    assert stopped == cli("opt", "-", "--passes", "canonicalize", stdin=MODULE)
    assert "kernel.call" not in stopped.out
    done = cli("opt", "-", "--passes", "canonicalize", "--stop-after", "fuse", stdin=MODULE)
    assert (done.code, done.out) == (1, "")
    assert "the pipeline has no pass fuse; it is canonicalize" in done.err


def test_opt_times_and_explains(cli: Run) -> None:
    done = cli("opt", "-", "--passes", "canonicalize,fuse", "--time", stdin=MODULE)
    rows = done.err.splitlines()
    assert [row.split()[0] for row in rows] == ["pass", "canonicalize", "fuse"]
    assert re.fullmatch(r"fuse +\d+\.\d +-?\d+\.\d +\d+ -> \d+", rows[2])
    passes = ("--passes", "quantize{skip=[*up*]}")
    done = cli("opt", "-", *passes, "--explain", stdin=MODULE)
    assert re.fullmatch(r".*mlp\.up, mlp\.py:3.*the option skip names @up\n", done.err), done.err
    assert cli("opt", "-", *passes, stdin=MODULE).err == ""


def test_opt_traces_a_folder(cli: Run, tiny: Path) -> None:
    done = cli("opt", tiny, "--passes", "clean,fusions")
    module = parse_module(done.out)
    assert module.meta["task"] == "causal-lm"
    assert "nn.attention" in done.out


# ---- inspect and bench -------------------------------------------------------------------------------------------


def test_inspect_describes(cli: Run, artifact: Path) -> None:
    done = cli("inspect", artifact)
    assert done.code == 0
    assert "  prefill(ids: i64[B, S], start: i64[B], last: i64[B]) -> logits: f32[B, 4096]\n" in done.out
    assert "  decode(ids: i64[B, 1], start: i64[B]) -> logits: f32[B, 4096]\n" in done.out
    size = (artifact / "kernels.so").stat().st_size
    assert re.search(rf"^  kernels\.so +{size:,} bytes$", done.out, re.MULTILINE)


def test_inspect_says_what_caches_take(cli: Run, artifact: Path) -> None:
    of_one = sum(state.k_bytes + state.v_bytes for state in read_manifest(artifact).states)
    done = cli("inspect", artifact, "--tokens", 60, "--sequences", 3)
    assert f"\n60 tokens x 3 sequences need {3 * of_one:,} bytes of KV caches\n" in done.out
    assert "\nkv caches\n  6 x contiguous of " in done.out
    with tilewright.load(artifact).session(batch=3) as session:
        session.generate([[1, 2, 3]] * 3, 1)
        assert session.memory["states"] == 3 * of_one
    assert "tokens: expected at most 64, the positions" in cli("inspect", artifact, "--tokens", 65).err


def test_inspect_lists_kernels_and_passes(cli: Run, artifact: Path) -> None:
    report, head = CompileReport.read(artifact), cli("inspect", artifact).out
    kernels = cli("inspect", artifact, "--kernels").out.removeprefix(head).splitlines()
    assert [line.split()[0] for line in kernels[1:]] == [k["name"] for k in report.kernels]
    assert any("kv.attend" in line and "mlir.attention" in line for line in kernels)
    passes = cli("inspect", artifact, "--passes").out.removeprefix(head).splitlines()
    assert [line.split()[0] for line in passes[1:]] == [p["text"] for p in report.passes]
    assert "kv-layout{length=64}" in [p["text"] for p in report.passes]
    assert "compile with --errors" in cli("inspect", artifact, "--layers").out


def test_inspect_prints_ir_and_program(cli: Run, artifact: Path) -> None:
    head = cli("inspect", artifact).out
    text = cli("inspect", artifact, "--ir").out.removeprefix(head)
    assert sorted(f.name for f in parse_module(text).entries()) == ["decode", "prefill"]
    program = cli("inspect", artifact, "--program").out.removeprefix(head)
    assert program.rstrip() == (artifact / "program.c").read_text().rstrip()
    assert "tw_decode(" in program


def test_inspect_gives_json(cli: Run, artifact: Path) -> None:
    done = cli("inspect", artifact, "--json")
    assert CompileReport(**json.loads(done.out)) == CompileReport.read(artifact)


def test_errors_of_layers(cli: Run, tiny: Path, tmp_path: Path) -> None:
    assert cli("compile", tiny, "--out", tmp_path / "a", "--errors", "--passes", "w8a16").code == 0
    done = cli("inspect", tmp_path / "a", "--layers")
    rows = re.findall(r"^ *(\S+) +(\S+)  model\.layers\.1\.mlp\S*; (.*)$", done.out, re.MULTILINE)
    assert rows, done.out
    assert all(float(kernel) < 1e-4 for _, kernel, _ in rows)
    assert any(error != "-" and float(error) > 1e-4 for error, _, _ in rows), "eight bits must show"


def test_bench_measures(cli: Run, artifact: Path) -> None:
    done = cli("bench", artifact, "--prompt-tokens", 8, "--new-tokens", 4, "--repeats", 3)
    assert done.code == 0
    rows = re.findall(r"^(\w+) +(\d+) +(\S+) +(\S+) +(\S+)$", done.out, re.MULTILINE)
    assert [row[:2] for row in rows] == [("prefill", "8"), ("decode", "4")]
    for row in rows:
        median, low, high = map(float, row[2:])
        assert 0 < low <= median <= high


def test_bench_refuses_what_does_not_fit(cli: Run, artifact: Path) -> None:
    done = cli("bench", artifact, "--prompt-tokens", 60, "--new-tokens", 6)
    assert (done.code, done.out) == (1, "")
    assert "capacity" in done.err


# ---- bisect ------------------------------------------------------------------------------------------------------


def test_bisect_finds_nothing_in_a_sound_compiler(cli: Run, tiny: Path) -> None:
    done = cli("bisect", tiny, "--tokens", 6)
    assert done == Done(0, "no pass and no kernel leaves the tolerance\n", "")


def test_bisect_names_a_broken_pass(cli: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._known, "halve", Halve)
    done = cli("bisect", tiny, "--passes", "clean,halve,fusions", "--tokens", 6)
    assert done.code == 3
    first, second = done.out.splitlines()
    assert re.match(r"pass halve \(after canonicalize,.* dce\): the result differs by 0\.\d+, allowed 0\.001", first)
    assert re.match(r"  first at core\.mul, module model\.layers\.0\.mlp.*: differs by 0\.5", second)
    assert cli("bisect", tiny, "--passes", "clean,halve", "--tokens", 6, "--tolerance", 10).code == 0


def test_bisect_names_a_broken_kernel(cli: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = StandaloneKernel.__call__

    def wrong(self: StandaloneKernel, *args: Any) -> Any:
        results = run(self, *args)
        for result in results if any(op.name == "nn.gated_linear" for op in self.kernel.body) else ():
            result *= 1.01
        return results

    monkeypatch.setattr(StandaloneKernel, "__call__", wrong)
    done = cli("bisect", tiny, "--tokens", 6)
    assert done.code == 3
    assert re.match(r"kernel k\d+: the result differs by 0\.0\d+, allowed 0\.001", done.out)
    assert re.search(r"first at .*nn\.gated_linear.*model\.layers\.0\.mlp", done.out)


# ---- usage, refusals, interruption -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], r"No such command 'frobnicate'"),
        (["compile", SMALL_LM], r"Missing option '--out'"),
        (["compile"], r"(?i)Missing argument 'model'"),
        (["run", SMALL_LM], r"give --prompt or --ids"),
        (["run", SMALL_LM, "--ids", "1", "--prompt", "a"], r"give --prompt or --ids"),
        (["run", SMALL_LM, "--ids", "1,x"], r"--ids takes numbers separated by commas"),
        (["run", SMALL_LM, "--ids", "1", "-n", "few"], r"valid integer"),
        (["opt", "--nonsense", "-"], r"No such option"),
        (["bench", SMALL_LM, "extra"], r"unexpected extra argument"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_wrong_usage(cli: Run, arguments: list[object], message: str) -> None:
    done = cli(*arguments)
    assert (done.code, done.out) == (2, "")
    plain = re.sub(r"[│╭╮╰╯─\s]+", " ", done.err)
    assert re.search(message, plain), done.err


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["compile", "MISSING", "--out", "OUT"], ["nowhere", "not a folder"]),
        (["compile", SMALL_LM, "--out", "OUT", "--target", "z80"], ["z80", "known: native, x86-64-v3"]),
        (["compile", SMALL_LM, "--out", "OUT", "--passes", "clean,fuze"], ["no pass named 'fuze'", "fuse, fuse-attention"]),
        (["compile", SMALL_LM, "--out", "OUT", "--passes", "fuse{size=3}"], ["column 6", "fuse has no option 'size'"]),
        (["compile", SMALL_LM, "--out", "OUT", "--passes", "clean,("], ["column 7", "no pass named '('"]),
        (["compile", SMALL_LM, "--out", "OUT", "--dtype", "f33"], ["f33", "bf16"]),
        (["compile", SMALL_LM, "--out", "OUT", "--max-length", "0"], ["max_length", "positive", "got 0"]),
        (["compile", SMALL_LM, "--out", "FULL"], ["exists and is not an artifact"]),
        (["run", "MISSING", "--ids", "1"], ["nowhere", "not a folder"]),
        (["run", "ARTIFACT", "--ids", "4096"], ["prompts[0]", "token ids from 0 to 4095", "got 4096"]),
        (["run", "ARTIFACT", "--ids", "1", "-n", "65"], ["64 positions", "larger capacity"]),
        (["run", "ARTIFACT", "--ids", "1", "-n", "0"], ["max_new_tokens", ">= 1"]),
        (["run", "ARTIFACT", "--ids", "1", "--temperature", "-1"], ["temperature", ">= 0"]),
        (["run", "ARTIFACT", "--ids", "1", "--top-p", "2"], ["top_p", "(0, 1]"]),
        (["run", "ARTIFACT", "--ids", "1", "--threads", "0"], ["threads", ">= 1"]),
        (["inspect", "MISSING"], ["nowhere", "not a folder"]),
        (["inspect", SMALL_LM], ["manifest.json"]),
        (["bisect", "MISSING"], ["nowhere", "not a folder"]),
        (["opt", "MISSING"], ["nowhere"]),
    ],
    ids=lambda value: " ".join(Path(str(v)).name for v in value) if isinstance(value, list) else "",
)  # fmt: skip
def test_refusals(cli: Run, artifact: Path, tmp_path: Path, arguments: list[object], messages: list[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    places = {"MISSING": tmp_path / "nowhere", "OUT": tmp_path / "out", "ARTIFACT": artifact, "FULL": tmp_path / "full"}
    done = cli(*(places.get(str(a), a) for a in arguments))
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: ")
    for message in messages:
        assert message in done.err
    assert "Traceback" not in done.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"], "a refused compilation leaves nothing"
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["compile", "nowhere", "--out", "out"],
        ["compile", SMALL_LM, "--out", SMALL_LM],
        ["compile", SMALL_LM, "--out", "out", "--target", "z80"],
        ["compile", SMALL_LM, "--out", "out", "--passes", "fuze"],
        ["run", SMALL_LM, "--ids", "1,x"],
    ],
    ids=lambda value: " ".join(Path(str(v)).name for v in value),
)
def test_what_is_wrong_is_said_before_the_work(
    cli: Run, arguments: list[object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def trace(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was traced first")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(frontend, "trace_folder", trace)
    assert cli(*arguments).code in (1, 2)


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("module @m {\n  func oops\n}\n", ["line 2, column 8", "  func oops\n", "^"]),
        ("", ["line 1"]),
        (MODULE.replace("%x, @up", "%x, @down"), ["line 6", "nn.linear: weight, axis 1: expected 4, got 8", "@down"]),
        (MODULE.replace("core.sigmoid", "core.sigmod"), ["core.sigmod", "line 7"]),
        (MODULE.replace("core.mul(%0, %1)", "core.mul(%0, %9)"), ["%9", "line 8"]),
    ],
    ids=["syntax", "empty", "types", "operation", "value"],
)
def test_opt_refuses_text_that_is_wrong(cli: Run, text: str, messages: list[str]) -> None:
    done = cli("opt", "-", stdin=text)
    assert (done.code, done.out) == (1, "")
    for message in messages:
        assert message in done.err, done.err
    assert "Traceback" not in done.err


def test_inspect_refuses_a_damaged_report(cli: Run, artifact: Path, tmp_path: Path) -> None:
    for name, text in (("cut", (artifact / "report.json").read_text()[:-9]), ("other", '{"model": 1}')):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "manifest.json").write_bytes((artifact / "manifest.json").read_bytes())
        (folder / "report.json").write_text(text)
        done = cli("inspect", folder)
        assert (done.code, done.out) == (1, "")
        assert "report.json" in done.err
        assert "Traceback" not in done.err


def test_a_fault_of_ours_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hiding it would hide where to look."""

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(tilewright, "load", broken)
    monkeypatch.setattr(sys, "argv", ["tilewright", "run", str(ROOT), "--ids", "1"])
    monkeypatch.setattr(tilewright, "compile", broken)
    with pytest.raises(ZeroDivisionError, match="ours"):
        main()


def test_interruption(cli: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tilewright, "compile", interrupted)
    done = cli("compile", tiny, "--out", tmp_path / "out")
    assert done.code == 130
    assert "Traceback" not in done.err


# ---- the program as installed ------------------------------------------------------------------------------------


def test_help(cli: Run) -> None:
    done = cli("--help")
    assert done.code == 0
    for command in ("compile", "run", "opt", "inspect", "bench", "bisect"):
        assert re.search(rf"^\W*{command} ", done.out, re.MULTILINE)
        page = cli(command, "--help")
        assert page.code == 0
        assert f"tilewright {command}" in page.out


def test_help_is_light() -> None:
    code = "import sys\nfrom tilewright.cli import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, timeout=60, check=True)
    loaded = {name.split(".")[0] for name in done.stderr.split()}
    assert "typer" in loaded
    assert not loaded & {*HEAVY, "numpy", "sympy", "lark", "networkx"}


def test_the_installed_program_runs() -> None:
    program = Path(sys.executable).with_name("tilewright")
    command = [program, "run", "nowhere", "--ids", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: nowhere")
