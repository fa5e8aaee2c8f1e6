"""The benchmark on a GPU: prepared for a tiny shape, run on the emulated device; its peer; its arithmetic."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import running
from benchmarks.gpu.__main__ import main, parser
from benchmarks.gpu.plan import CACHES, FORMATS, Heads, Model, Plan, Sizes, attention_bytes, decode_bytes, prefill_flops
from benchmarks.gpu.prepare import SOURCE, attention, prepare, product, sparse_checkpoint
from benchmarks.gpu.results import goals, page, rows_of
from benchmarks.gpu.torch_peer import layer_products, made
from benchmarks.peers.shapes import GPU_SHAPES, SHAPES, Shape
from tests.cuda.driver import library
from tilewright.ir import parse_module, verify
from tilewright.passes.pipeline import Pipeline
from tilewright.runtime.artifact import read_table

TARGET = "cuda{arch=sm_90a}"
CONFIG = SHAPES["L"].config | {
    "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
    "vocab_size": 80,
}  # fmt: skip
TINY = Shape("8B", "a tiny one", "LlamaForCausalLM", "bfloat16", CONFIG)
SIZES = Sizes(prompt=6, context=3, steps=2, attention=20, caches=2, product=16, bandwidth=1 << 14)
MODEL = Model("8B", "a tiny one", CONFIG, TINY.layer_parameters, {"bf16": 1000})
PLAN = Plan(TARGET, "c0ffee", SIZES, Heads(4, 2, 16), (MODEL,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("gpu") / "prepared"
    size = prepare(out, [TINY], ["bf16"], TARGET, SIZES, None)
    assert size < 4 << 20
    return out


@pytest.fixture(scope="module")
def driver(folder, tmp_path_factory) -> str:
    """For the kernels of all artifacts, equal ones once, and the tools."""
    sources = {"tools": SOURCE.read_text()}
    functions = [("tools", f"tools_{name}") for name in ("f32", "f16", "bf16", "bytes", "read")]
    for i, path in enumerate(sorted(folder.glob("*/device.json"))):
        for function in json.loads(path.read_text())["functions"]:
            if function["symbol"] not in {symbol for _, symbol in functions}:
                name = f"of{i}_{function['kernel']}"
                sources[name] = (path.parent / f"{function['kernel']}.cu").read_text()
                functions.append((name, function["symbol"]))
    return str(library(sources, functions, tmp_path_factory.mktemp("driver")))


# ---- what is prepared ----------------------------------------------------------------------------------------------------


def test_nothing_that_is_prepared_has_weights(folder) -> None:
    plan = Plan.read(folder)
    assert (plan.sizes, plan.heads, plan.target) == (SIZES, Heads(4, 2, 16), TARGET)
    for path in folder.glob("*/weights.safetensors"):
        table = read_table(path)
        assert all(at >= path.stat().st_size for _, _, at in table.values())
    weights = 2 * (TINY.layer_parameters + 64 * 80 + 3 * 64)  # the layer, the head, the norms
    turns = 2 * 4 * SIZES.capacity * 8 * 2
    assert weights <= plan.models[0].formats["bf16"] <= weights + 2 * turns


def test_a_sparse_checkpoint_takes_no_room(tmp_path) -> None:
    sparse_checkpoint(replace(TINY, config=CONFIG | {"vocab_size": 200_000}), tmp_path)
    file = tmp_path / "model.safetensors"
    assert file.stat().st_size > 50e6
    assert file.stat().st_blocks * 512 < 1 << 20


def test_the_modules_are_well_formed() -> None:
    for text in (*(attention(PLAN.heads, Sizes(), cache) for cache in CACHES.values()), product(8192)):
        verify(parse_module(text))
    for passes in FORMATS.values():
        Pipeline.parse(passes)


def test_shapes_and_the_command_line() -> None:
    assert GPU_SHAPES["8B"].layer_parameters == 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    given = parser().parse_args(["prepare", "out"])
    assert (given.shapes, given.formats, given.target) == ("1B,8B", "bf16,w8a16,w4a16", TARGET)


# ---- a run ---------------------------------------------------------------------------------------------------------------


def test_a_run_on_the_emulated_device(folder, driver, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(running, "has_torch", lambda: False)
    out = tmp_path / "gpu.json"
    assert main(["run", str(folder), "--out", str(out), "--driver", driver]) == 0
    found = json.loads(out.read_text())
    assert found["about"]["device"] == "emulated GPU"
    assert found["notes"] == ["PyTorch with CUDA is not installed here: no peers"]
    assert len(found["samples"]["limits"]["read"]) == 14, "before and after"
    assert found["rows"].keys() >= {
        "memory, copied", "memory, read", "bf16 product of 16, tilewright", "8B bf16 decode", "8B bf16 prefill",
        "8B bf16 decode, of the bandwidth", "8B bf16 prefill, of the time by cuBLAS", "attention",
        "attention, of the bandwidth", *(f"attention{cache}" for cache in CACHES),
        "attention i4 paged, times that of contiguous bf16",
    }  # fmt: skip
    assert all(row["least"] <= row["median"] <= row["greatest"] for row in found["rows"].values())
    text = out.with_suffix(".md").read_text()
    assert capsys.readouterr().out == text + "\n"
    assert "| 8B bf16 decode, times torch.compile | 1.3 |  | not measured |" in text


def test_what_fails_is_noted_and_the_rest_goes_on(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(running, "has_torch", lambda: False)
    monkeypatch.setattr(running, "parts", lambda plan: [p for p in PARTS(plan) if p.at in ("limits", "attention")])
    running.run(folder, tmp_path / "gpu.json", 300.0, driver="no-driver.so")
    notes = json.loads((tmp_path / "gpu.json").read_text())["notes"]
    assert [note.split(":")[0] for note in notes[1:]] == ["limits", "attention", "limits"]
    assert all("no CUDA driver" in note for note in notes[1:])
    running.run(folder, tmp_path / "gpu.json", 0.0)
    assert "the time was over" in (tmp_path / "gpu.md").read_text()


PARTS = running.parts


def test_a_part_that_takes_too_long_is_ended_with_its_own_processes(tmp_path, monkeypatch) -> None:
    (tmp_path / "slow.py").write_text("""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print('{"child": %d}' % child.pid, flush=True)
print('{"cut', end="", flush=True)
time.sleep(60)
""")
    monkeypatch.setattr(running, "ROOT", tmp_path)
    said, failed = running.ended("slow", {}, 1.0)
    assert failed == "not through after 1 s"
    pid = json.loads(said)["child"]
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and is_running(pid):
        time.sleep(0.01)
    assert not is_running(pid)


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_our_part_imports_the_runtime_alone() -> None:
    code = "import sys, benchmarks.gpu.own; print(*(n for n in sys.modules if n.startswith('tilewright.') or n == 'torch'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=running.ROOT)
    assert {name.split(".")[1] for name in done.stdout.split()} == {"runtime"}


# ---- the peer and the arithmetic ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_peer_decodes_what_it_would_prefill() -> None:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    try:
        net = made(MODEL, 12, "cpu").float()
    finally:
        torch.set_default_dtype(before)
    net.turns.copy_(torch.stack([torch.cos(torch.rand(12, 8)), torch.sin(torch.rand(12, 8))], -1))
    ids, places = torch.randint(0, 80, (1, 9)), torch.arange(9)
    want = net(ids, places, True)
    net(ids[:, :5], places[:5], True)
    for i in range(5, 9):
        got = net(ids[:, i : i + 1], places[i : i + 1], False)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    whole = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(ids[:, 8:], places[8:], False), want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(whole(ids, places, True), want, rtol=1e-4, atol=1e-6)
    other = net(ids[:, 8:], places[7:8], False)
    assert not torch.allclose(other, want, rtol=1e-3)


def test_ratios() -> None:
    samples = {
        "limits": {"read": [1e9, 2e9, 3e9], "copy": [4e9]},
        "8B bf16": {"decode": [1e-6, 2e-6, 4e-6], "prefill": [2e-3]},
        "8B torch eager": {"decode": [8e-6]},
        "8B torch.compile": {"decode": [3e-6], "prefill": [1e-3]},
        "torch products": {"product": [5e12], "8B products": [1e-3]},
        "attention": {"attention": [1e-6]},
        "torch attention": {"attention": [3e-6]},
    }
    rows = rows_of(PLAN, samples)
    read = decode_bytes(MODEL, "bf16", SIZES)
    assert read == 1000 + attention_bytes(PLAN.heads, 4) == 1000 + 2 * 2 * 2 * 16 * 4
    assert rows["8B bf16 decode, of the bandwidth"].median == pytest.approx(read / 2e-6 / 2e9)
    assert rows["8B bf16 decode, times torch eager"].median == pytest.approx(4)
    assert (rows["8B bf16 decode"].least, rows["8B bf16 decode"].greatest) == (pytest.approx(2.5e5), pytest.approx(1e6))
    assert rows["8B bf16 prefill"].median == pytest.approx(6 / 2e-3)
    assert rows["8B bf16 prefill, of the time by cuBLAS"].median == pytest.approx(0.5)
    assert rows["attention, of the bandwidth"].median == pytest.approx(attention_bytes(PLAN.heads, 20) / 1e-6 / 2e9)
    assert rows["attention, times PyTorch"].median == pytest.approx(3)
    assert "8B bf16 decode, times torch.compile | 1.3 | 1.5 | met" in list(goals(rows))
    assert "8B bf16 prefill, of the time by cuBLAS | 0.6 | 0.5 | missed" in list(goals(rows))
    assert "| memory, read | 2 GB/s | 1 .. 3 |" in page({"device": "x"}, PLAN, rows, ["a note"])
    del samples["torch products"]
    samples["product"] = {"product": [prefill_flops(MODEL, 6) / 1e-3]}
    assert rows_of(PLAN, samples)["8B bf16 prefill, of the time by cuBLAS"].median == pytest.approx(0.5)


def test_the_products_of_a_prompt_are_those_of_its_layers() -> None:
    flops = sum(2 * m * n * k for m, n, k in layer_products(MODEL, 6)) * CONFIG["num_hidden_layers"]
    assert flops == 2 * TINY.layer_parameters * 6
