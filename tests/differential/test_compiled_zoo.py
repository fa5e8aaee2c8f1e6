"""Every model of the zoo, compiled, computes what eager PyTorch does; language models decode its greedy tokens."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tilewright
from tests.zoo import ZOO, ZooModel
from tilewright import Compiled, Session
from tilewright.frontend import trace
from tilewright.ir import Module, parse_module, print_module
from tilewright.runtime.host import cpu_features

TOLERANCE = 1e-4  # of the largest value
NEW, LENGTH, CHUNK = 32, 160, 7  # LENGTH: capacity of the caches; CHUNK: short, so that prompts take several calls
RAGGED = (13, 1, 29, 100, 5)  # lengths of the prompts of one batch
SMALL_TARGET = ("llama", "bert", "resnet")
BEYOND_AVX2 = re.compile(r"%(zmm\d+|[xy]mm(1[6-9]|2\d|3[01])|k[0-7]\b)")  # registers that only AVX-512 has


def compiled(entry: ZooModel, model: torch.nn.Module, target: str) -> tuple[Module, Compiled]:
    """The module as it was compiled, and the artifact."""
    dynamic = {name: {axis: (dim, *entry.dims[dim]) for axis, dim in axes.items()} for name, axes in entry.axes.items()}
    module = trace(model, (), entry.example(), dynamic)
    task = "causal-lm" if entry.is_causal else None
    return module, tilewright.compile(module, target=target, max_length=LENGTH, task=task)


def relative_error(got: np.ndarray[Any, Any], want: torch.Tensor) -> float:
    assert got.shape == tuple(want.shape)
    assert got.dtype == np.float32
    return float(np.abs(got - want.numpy()).max() / want.abs().max())


def check_forward(entry: ZooModel, model: torch.nn.Module, run: Compiled) -> None:
    for shape in entry.shapes:
        outputs = run.default_session("forward", **{k: v.numpy() for k, v in entry.inputs(shape).items()})
        got = next(iter(outputs.values()))
        assert relative_error(got, entry.reference(model, shape)) <= TOLERANCE, shape


def check_decoder(entry: ZooModel, model: torch.nn.Module, run: Compiled) -> None:
    assert run.program.entries == ["prefill", "decode"]
    with run.session(threads=2, batch=len(RAGGED)) as session:
        for shape in entry.shapes:
            ids = entry.inputs(shape)["input_ids"].numpy()
            got = session("prefill", ids=ids, start=np.zeros(len(ids), np.int64), last=np.full(len(ids), shape[1] - 1))
            assert relative_error(got["logits"], entry.reference(model, shape)[:, -1]) <= TOLERANCE, shape
        check_greedy(entry, model, session)


def check_greedy(entry: ZooModel, model: torch.nn.Module, session: Session) -> None:
    prompts = [entry.inputs((1, length), seed=length)["input_ids"] for length in RAGGED]
    want = [greedy(entry, model, prompt) for prompt in prompts]
    assert len({token for row in want for token in row}) > 8, "the tokens say nothing"
    rows = [prompt[0].tolist() for prompt in prompts]
    assert session.generate(rows, NEW) == want
    assert session.generate(rows, NEW, chunk=CHUNK) == want
    assert session.generate(rows[2:3], NEW) == want[2:3]


@torch.no_grad()
def greedy(entry: ZooModel, model: torch.nn.Module, ids: torch.Tensor) -> list[int]:
    """What eager PyTorch says after ``ids`` [1, S], computed anew for each token."""
    length = ids.shape[1]
    for _ in range(NEW):
        ids = torch.cat([ids, entry.output(model(input_ids=ids))[:, -1:].argmax(-1)], 1)
    return ids[0, length:].tolist()


def registers(path: Path) -> set[str]:
    """The registers of AVX-512 that the code of a library names."""
    command = ["objdump", "--disassemble", "--no-show-raw-insn", path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "%ymm" in text, "the library has no vector code, or the disassembly failed"
    return {match[0] for match in BEYOND_AVX2.finditer(text)}


def check(entry: ZooModel, target: str) -> Compiled:
    model = entry.model()
    module, run = compiled(entry, model, target)
    assert parse_module(print_module(module)) == module
    assert parse_module((run.path / "ir.twir").read_text()) == module
    (check_decoder if entry.is_causal else check_forward)(entry, model, run)
    return run


@pytest.mark.parametrize("name", ZOO)
def test_native(name: str) -> None:
    run = check(ZOO[name], "native")
    if name == "llama" and "avx512f" in cpu_features():
        assert registers(run.path / "kernels.so"), "the check of the other target would find nothing"


@pytest.mark.parametrize("name", SMALL_TARGET)
def test_avx2_alone(name: str) -> None:
    run = check(ZOO[name], "x86-64-v3")
    assert "avx512f" not in run.program.manifest.target.features
    assert registers(run.path / "kernels.so") == set()
