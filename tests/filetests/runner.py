"""Reads and runs the files described in README.md."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tilewright.ir import (
    ArraySource,
    DType,
    Module,
    ParseError,
    TensorType,
    TilewrightError,
    VerifyError,
    empty_states,
    eval_dim,
    interpret,
    parse_module,
    print_module,
    verify,
)

CASES, OUTPUT = "// ====\n", "// ----\n"
_HEADER = re.compile(r"// (run|show|check|calibrate): (.*)")
_EXPECT = re.compile(r"// expect: (.*)")


@dataclass
class Case:
    """One case of a file of passes."""

    input: str
    expected: str

    @classmethod
    def read(cls, text: str) -> "Case":
        head, _, tail = text.partition(OUTPUT)
        return cls(head, tail)

    def header(self, key: str) -> str | None:
        return next((value for k, value in _HEADER.findall(self.input) if k == key), None)

    def options(self, module: Module) -> dict[str, object]:
        """What the compilation is given: ``// calibrate: B=4 S=32`` is random data of those sizes."""
        sizes = self.header("calibrate")
        if sizes is None:
            return {}
        dims = {name: int(size) for name, _, size in (item.partition("=") for item in sizes.split())}
        rng = np.random.default_rng(1)
        return {"calibration": [{a.name: numbers(a.tensor, dims, rng) for a in module.functions["forward"].args}]}

    def actual(self) -> str:
        """What the pipeline makes of the input: the module's text, or the error's as a comment."""
        from tilewright.passes.base import PassContext
        from tilewright.passes.pipeline import Pipeline

        pipeline = self.header("run")
        assert pipeline, "a case starts with // run: PIPELINE"
        module = with_data(parse_module(self.input))
        verify(module)
        before = sample_runs(module) if self.header("check") else []
        try:
            report = Pipeline.parse(pipeline).run(module, ctx=PassContext(self.options(module)))
        except TilewrightError as error:
            return "".join(f"// error: {line}\n" for line in str(error).splitlines())
        text = print_module(module)
        assert parse_module(text) == module
        for (name, want), (_, got) in zip(before, sample_runs(module) if before else []):
            assert_close(name, want, got)
        skips = "".join(f"// skip: {s}\n" for s in report.ctx.skips) if self.header("show") else ""
        return skips + text


def with_data(module: Module) -> Module:
    """Fill every weight with numbers that depend on its name alone."""
    for w in module.weights.values():
        seed = int.from_bytes(hashlib.sha256(w.name.encode()).digest()[:4], "little")
        w.source = ArraySource(numbers(w.tensor, {}, np.random.default_rng(seed)))
    return module


def numbers(type: TensorType, dims: dict[str, int], rng: np.random.Generator) -> np.ndarray:
    """Random numbers: normal floats, integers 0 or 1 (safe as indices)."""
    shape = [eval_dim(d, dims) for d in type.shape]
    if type.dtype.is_float:
        return rng.standard_normal(shape).astype(type.dtype.np)
    return rng.integers(-127 if type.dtype is DType.i8 else 0, 2, shape).astype(type.dtype.np)


def sample_runs(module: Module) -> list[tuple[str, list[np.ndarray]]]:
    """Results of every entry on random inputs, each dim at its least size plus two (or its largest)."""
    dims = {name: min(low + 2, high) for name, (low, high) in module.dims.items()}
    found = []
    for function in module.entries():
        rng = np.random.default_rng(0)
        inputs = [numbers(a.tensor, dims, rng) for a in function.args]
        states = empty_states(module, dims.get("B", 1))
        found.append((function.name, interpret(module, function.name, inputs, states)))
    return found


def assert_close(name: str, want: list[np.ndarray], got: list[np.ndarray]) -> None:
    for a, b in zip(want, got, strict=True):
        assert a.dtype == b.dtype, f"@{name}"
        rough = a.dtype in (DType.bf16.np, DType.f16.np)
        tolerance = 2e-2 if rough else 2e-5
        a, b = (x.astype(np.float32) if rough else x for x in (a, b))
        np.testing.assert_allclose(b, a, rtol=tolerance, atol=tolerance, err_msg=f"@{name} changed")


def read_cases(path: Path) -> list[str]:
    return path.read_text().split(CASES)


def expectations(text: str) -> Iterator[tuple[int, str]]:
    """The line number and the expected part of the message of each ``// expect:``."""
    for number, line in enumerate(text.split("\n"), 1):
        match = _EXPECT.search(line)
        if match:
            yield number, match[1].strip()


def diagnose(text: str) -> tuple[int, str]:
    """The line and message of the error that parsing and verifying ``text`` gives."""
    try:
        module = parse_module(text)
    except ParseError as error:
        return error.line, error.message
    try:
        verify(module)
    except VerifyError as error:
        return _line_of(text, str(error)), str(error)
    raise AssertionError("the module has no error")


def _line_of(text: str, message: str) -> int:
    """The line of ``text`` that the arrow of a verifier message marks; 1 when none is marked."""
    arrow = re.search(r"-> (.*?\()", message)
    if arrow is None:
        return 1
    found = [n for n, line in enumerate(text.split("\n"), 1) if line.strip().startswith(arrow[1])]
    assert len(found) == 1, f"{arrow[1]!r} does not mark one line"
    return found[0]
