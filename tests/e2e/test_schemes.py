"""Every scheme through the whole compiler: results are the interpreter's, bytes in the artifact those of the format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import tilewright
from tilewright.compiler import compile
from tilewright.ir import Builder, DType, Function, Module, Return, TensorType, interpret, ops, sym
from tilewright.passes.formats import SCHEMES
from tilewright.passes.pipeline import Pipeline

N, K = 128, 512  # whole panels, whole rows of units of every layout, and whole groups of every format


def layers() -> Module:
    """One linear layer a scheme, all of the same input."""
    rng = np.random.default_rng(0)
    module = Module("m", dims={"B": (1, 64)})
    function = module.add(Function("forward"))
    x = function.arg("x", TensorType((sym("B"), K), DType.f32))
    b = Builder(function)
    weights = [module.constant(rng.standard_normal((N, K)).astype(np.float32), name) for name in SCHEMES]
    b.insert(Return(tuple(b(ops.Linear, x, weight) for weight in weights)))
    return module


PASSES = ",".join(f"quantize{{scheme={name} only=[{name}]}}" for name in SCHEMES)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("schemes") / "artifact"
    compile(layers(), passes=f"{PASSES},cse,dce,kernels", out=out)
    return out


def test_results_are_those_of_the_interpreter(artifact: Path) -> None:
    module = layers()
    Pipeline.parse(PASSES).run(module)
    for rows in (1, 5):
        x = np.random.default_rng(rows).standard_normal((rows, K)).astype(np.float32)
        with tilewright.load(artifact).session() as session:
            got = list(session("forward", x=x).values())
        for name, a, b in zip(SCHEMES, interpret(module, "forward", [x]), got, strict=True):
            assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a), name


@pytest.mark.parametrize("name", SCHEMES)
def test_bytes_are_the_arithmetic_of_the_format(artifact: Path, name: str) -> None:
    format = SCHEMES[name].format
    with safe_open(artifact / "weights.safetensors", "np") as file:
        stored = {key: file.get_tensor(key).nbytes for key in file.keys() if key.split(".")[0] == name}  # noqa: SIM118
    assert sum(stored.values()) == format.size.bytes(N, K, format.groups(K)), stored
