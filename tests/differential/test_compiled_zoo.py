"""Every model of the zoo, compiled, computes what eager PyTorch does; language models decode its greedy tokens."""

from __future__ import annotations

import copy
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tilewright
from tests.traced_zoo import cast, traced
from tests.zoo import ZOO, ZooModel
from tilewright import Compiled, Session
from tilewright.dynamo import to_torch
from tilewright.ir import Module, empty_states, interpret, parse_module, print_module
from tilewright.runtime.host import cpu_features

TOLERANCE = 1e-4  # of the largest value
NEW, LENGTH, CHUNK = 32, 160, 7  # LENGTH: capacity of the caches; CHUNK: short, so that prompts take several calls
RAGGED = (13, 1, 29, 100, 5)  # lengths of the prompts of one batch
SMALL_TARGET = ("llama", "bert", "resnet")
PLAIN = ("llama", "t5", "resnet")  # with a kernel for each operation
WEIGHT_ONLY = (("gpt2", "w8a16"), ("mixtral", "w8a16"), ("bert", "w8a16"), ("phi3", "w4a16"), ("bert", "w4a16"))
INTEGERS = (("llama", "w8a8"), ("llama", "w4a8"), ("bert", "w8a8"))
HALF = ("gemma2", "mixtral", "t5", "resnet")
Array = np.ndarray[Any, Any]
BEYOND_AVX2 = re.compile(r"%(zmm\d+|[xy]mm(1[6-9]|2\d|3[01])|k[0-7]\b)")  # registers that only AVX-512 has


def compiled(entry: ZooModel, target: str, passes: str = "O2", dtype: torch.dtype = torch.float32
             ) -> tuple[Module, Compiled]:  # fmt: skip
    """The module as it was compiled, and the artifact."""
    module = traced(entry.name, dtype)
    task = "causal-lm" if entry.is_causal else None
    run = tilewright.compile(module, target=target, max_length=LENGTH, task=task, passes=passes)
    assert run.report.fallbacks == []
    return module, run


def relative_error(got: Array, want: torch.Tensor) -> float:
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
        check_greedy(entry.name, session)


def check_greedy(name: str, session: Session) -> None:
    want = wanted(name)
    assert len({token for row in want for token in row}) > 8, "the tokens say nothing"
    rows = [prompt[0].tolist() for prompt in prompts(name)]
    assert session.generate(rows, NEW) == want
    assert session.generate(rows, NEW, chunk=CHUNK) == want
    assert session.generate(rows[2:3], NEW) == want[2:3]


def prompts(name: str) -> list[torch.Tensor]:
    return [ZOO[name].inputs((1, length), seed=length)["input_ids"] for length in RAGGED]


@cache
def wanted(name: str) -> list[list[int]]:
    entry = ZOO[name]
    model = entry.model()
    return [greedy(entry, model, prompt) for prompt in prompts(name)]


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


def check(entry: ZooModel, target: str, passes: str = "O2") -> Compiled:
    model = entry.model()
    module, run = compiled(entry, target, passes)
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


@pytest.mark.parametrize("name", PLAIN)
def test_every_op_its_own_kernel(name: str) -> None:
    check(ZOO[name], "native", passes="O0")


@pytest.mark.parametrize(("name", "recipe"), WEIGHT_ONLY)
def test_integer_weights_mean_what_the_interpreter_says(name: str, recipe: str) -> None:
    entry = ZOO[name]
    module, run = compiled(entry, "native", recipe)
    assert any(w.dtype.value == f"i{recipe[1]}" for w in module.weights.values())
    for shape in entry.shapes[:3]:
        inputs = {k: v.numpy() for k, v in entry.inputs(shape).items()}
        want, got = first_result(module, run, inputs)
        assert relative_error(got, torch.from_numpy(want)) <= TOLERANCE, shape


@pytest.mark.parametrize("target", ["native", "x86-64-v3"])
@pytest.mark.parametrize(("name", "recipe"), INTEGERS)
def test_integer_activations_lose_what_the_interpreter_loses(name: str, recipe: str, target: str) -> None:
    """A code that rounds the other way changes all that follows, so results differ, but are as good: from the same
    model in f32, no farther than the interpreter's."""
    entry = ZOO[name]
    module, run = compiled(entry, target, recipe)
    inputs = {k: v.numpy() for k, v in entry.inputs(entry.shapes[0]).items()}
    exact = entry.reference(entry.model(), entry.shapes[0]).numpy()
    exact = exact[:, -1] if entry.is_causal else exact
    want, got = first_result(module, run, inputs)
    lost = np.linalg.norm(want - exact)
    assert 0 < lost < 0.6 * np.linalg.norm(exact)  # random weights, rows of 64: four bits lose a lot
    assert np.linalg.norm(got - exact) <= 1.25 * lost
    assert np.linalg.norm(got - want) <= lost


def first_result(module: Module, run: Compiled, inputs: dict[str, Array]) -> tuple[Array, Array]:
    """What the interpreter says and what the compiled code says: of a decoder, the logits after the last token."""
    if "forward" in run.program.entries:
        got = run.default_session("forward", **inputs)
        return interpret(module, "forward", inputs)[0], next(iter(got.values()))
    ids = inputs["input_ids"]
    count, length = ids.shape
    given = {"ids": ids, "start": np.zeros(count, np.int64), "last": np.full(count, length - 1)}
    with run.session(batch=count) as session:
        got = session("prefill", **given)
    return interpret(module, "prefill", list(given.values()), empty_states(module, count))[0], got["logits"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", HALF)
@torch.no_grad()
def test_half_precision_is_as_good_as_torch(name: str, dtype: torch.dtype) -> None:
    """Measured against f32 arithmetic on the same rounded weights."""
    entry = ZOO[name]
    model = entry.model().to(dtype)
    exact = copy.deepcopy(model).float()
    _, run = compiled(entry, "native", dtype=dtype)
    ours, theirs = [], []
    for shape in entry.shapes[:3]:
        inputs = cast(entry.inputs(shape), dtype)
        want = entry.output(exact(**cast(inputs, torch.float32)))
        eager = entry.output(model(**inputs))
        if entry.is_causal:
            want, eager = want[:, -1], eager[:, -1]
        got = compiled_result(run, inputs)
        assert got.dtype == eager.dtype
        ours.append(typical_error(got, want))
        theirs.append(typical_error(eager, want))
    assert sum(ours) <= 1.2 * sum(theirs), (ours, theirs)


def compiled_result(run: Compiled, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    if "forward" in run.program.entries:
        outputs = run(**inputs)
        return outputs[0] if isinstance(outputs, tuple) else outputs
    count, length = inputs["input_ids"].shape
    zero, last = np.zeros(count, np.int64), np.full(count, length - 1)
    with run.session(batch=count) as session:
        array = session("prefill", ids=inputs["input_ids"].numpy(), start=zero, last=last)["logits"]
    return to_torch(array)


def typical_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want).square().mean().sqrt() / want.abs().max())
