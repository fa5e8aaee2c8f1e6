"""Running pipelines: order, reports, printing, stopping, and what a failing pass says."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest

from tilewright.ir import Module, PassError, UnsupportedError, ops, parse_module, verify
from tilewright.passes import Pass, PassContext, Pipeline

TEXT = """
module @m {
  dim B : 1..8
  weight @unused : tensor<3xf32>
  func @forward(%x: tensor<Bx3xf32>) {
    %0 = core.exp(%x) : tensor<Bx3xf32>
    %1 = core.full() {shape=[] value=0.0 dtype=f32} : tensor<f32>
    %2 = core.add(%x, %1) : tensor<Bx3xf32> loc("model.layer")
    return([%2])
  }
}
"""


@dataclass(frozen=True)
class Do(Pass):
    """Runs a function on the module."""

    name: ClassVar[str] = "do"
    what: Callable[[Module], None] = verify

    def run(self, module: Module, ctx: PassContext) -> bool:
        self.what(module)
        ctx.note("done")
        return True


@dataclass(frozen=True)
class Never(Pass):
    """Applies to nothing."""

    name: ClassVar[str] = "never"

    def inapplicable(self, module: Module) -> str | None:
        return "it is never needed"

    def run(self, module: Module, ctx: PassContext) -> bool:
        raise AssertionError


def sample() -> Module:
    return parse_module(TEXT)


def pipeline(*passes: Pass) -> Pipeline:
    return Pipeline((*Pipeline.parse("dce").passes, *passes))


def test_report_counts_operations() -> None:
    module, seen = sample(), []
    report = Pipeline.parse("dce,canonicalize,cse").run(module, on_pass=lambda p, m: seen.append((p.name, m is module)))
    assert seen == [("dce", True), ("canonicalize", True), ("cse", True)]
    assert [(r.text, r.ops_before, r.ops_after, r.changed) for r in report.rows] == [
        ("dce", 4, 3, True),
        ("canonicalize", 3, 1, True),
        ("cse", 1, 1, False),
    ]
    assert all(r.seconds >= 0 and r.peak_bytes >= 0 for r in report.rows)
    assert not module.weights
    assert "canonicalize" in report.table()


def test_a_pass_that_does_not_apply_is_skipped_with_its_reason() -> None:
    report = pipeline(Never()).run(sample())
    assert report.rows[-1].skipped == "it is never needed"
    assert report.ctx.notes == [("never", "skipped: it is never needed")]
    assert "it is never needed" in report.table()


def test_notes_know_their_pass() -> None:
    ctx = PassContext({"level": 3})
    assert pipeline(Do()).run(sample(), ctx=ctx).ctx is ctx
    assert [line for _, line in ctx.notes] == ["done"]


def test_printing_around_passes() -> None:
    out = io.StringIO()
    Pipeline.parse("dce,canonicalize").run(sample(), print_before=["canonicalize"], print_after=["all"], out=out)
    heads = [line for line in out.getvalue().splitlines() if line.startswith("//")]
    assert heads == ["// after dce", "// before canonicalize", "// after canonicalize"]
    assert "core.exp" not in out.getvalue()


def test_stopping() -> None:
    module = sample()
    assert len(Pipeline.parse("canonicalize,dce,cse").run(module, stop_after="canonicalize").rows) == 1
    assert "unused" in module.weights
    with pytest.raises(PassError, match="the pipeline has no pass fold; it is dce"):
        Pipeline.parse("dce").run(sample(), stop_after="fold")


def break_types(module: Module) -> None:
    for op in module.ops(ops.Add):
        op.results[0].type = op.result.tensor.with_shape((7,))


def test_a_broken_module_names_the_pass_and_those_before() -> None:
    with pytest.raises(PassError) as info:
        pipeline(Do(what=break_types)).run(sample())
    assert "number 2, after dce) broke the module: in @forward: core.add: expected result types" in info.value.message
    assert info.value.loc is not None
    assert info.value.loc.module == "model.layer"
    pipeline(Do(what=break_types)).run(sample(), verify=False)


def divide(module: Module) -> None:
    raise ZeroDivisionError("by zero")


def refuse(module: Module) -> None:
    raise UnsupportedError("this model is too odd")


def test_a_crash_names_the_pass() -> None:
    with pytest.raises(PassError, match=r"after dce\) failed: ZeroDivisionError: by zero") as info:
        pipeline(Do(what=divide)).run(sample())
    assert isinstance(info.value.__cause__, ZeroDivisionError)


def test_a_refusal_keeps_its_class() -> None:
    with pytest.raises(UnsupportedError, match="too odd") as info:
        pipeline(Do(what=refuse)).run(sample())
    assert "raised by pass do" in info.value.__notes__[0]
