"""Kernels compiled by several processes: the same code, the same errors, whoever compiles."""

from __future__ import annotations

import sys

import pytest

from tilewright.codegen import workers
from tilewright.codegen.emitters import choose
from tilewright.codegen.kernel import KernelCode
from tilewright.codegen.target import parse_target
from tilewright.codegen.workers import Compilation, Helper, Job
from tilewright.ir import CodegenError, parse_module

TARGET = parse_target("x86-64-v3")
TEXT = """module @many {
  dim B : 1..64
  kernel @add(%x: tensor<Bx8xf32>, %y: tensor<Bx8xf32>) {
    %0 = core.add(%x, %y) : tensor<Bx8xf32> loc("model.add" "user.py":3)
    return([%0])
  }
  kernel @norm(%x: tensor<Bx32xf32>, %w: tensor<32xf32>) {
    %0 = nn.rms_norm(%x, %w) {eps=1e-05} : tensor<Bx32xf32> loc("model.norm")
    return([%0])
  }
  kernel @linear(%x: tensor<Bx16xf32>, %w: tensor<24x16xf32>) {
    %0 = nn.linear(%x, %w, none) : tensor<Bx24xf32> loc("model.linear")
    return([%0])
  }
}
"""


def jobs(copies: int = 1) -> tuple[list[Job], dict[str, tuple[int, int]]]:
    module = parse_module(TEXT)
    made = []
    for i in range(copies):
        for kernel in module.kernels():
            emitter = choose(kernel, TARGET)
            key = f"{i:02}{kernel.name}".ljust(64, "0")
            made.append(Job(kernel, emitter.name, emitter.default_schedule(kernel, TARGET), key))
    return made, module.dims


def test_helpers_make_the_same_code():
    some, dims = jobs(2)
    alone = Compilation(some, TARGET, dims, workers=0)
    expected = alone.run()
    assert sorted(alone.seconds) == list(range(6))
    # All of it in other processes: the caller finds nothing left to do.
    apart = Compilation(some, TARGET, dims, workers=0)
    apart.left.extend(range(len(some)))
    for helper in [Helper(apart), Helper(apart)]:
        helper.thread.join()
        helper.finish()
    assert [apart.codes[i] for i in range(len(some))] == expected


def test_together():
    some, dims = jobs(2)
    seen: list[int] = []
    assert Compilation(some, TARGET, dims, workers=2).run(seen.append) == Compilation(some, TARGET, dims, workers=0).run()
    assert seen == sorted(seen)
    assert max(seen, default=0) < len(some)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_error_is_raised_with_its_location(monkeypatch, workers):
    some, dims = jobs(2)
    done = Job.compile

    def compile(job: Job, target: object) -> KernelCode:
        if job.kernel.name == "norm":
            raise CodegenError(f"cannot compile {job.key[:6]}", job.kernel.body[0].loc)
        return done(job, target)

    monkeypatch.setattr(Job, "compile", compile)
    # A helper that is asked for a family that does not exist ends without an answer.
    monkeypatch.setattr(Helper, "request", lambda helper, job: {"family": "none", "module": TEXT})
    with pytest.raises(CodegenError, match=r"cannot compile 00norm") as caught:
        Compilation(some, TARGET, dims, workers=workers).run()
    assert "model.norm" in str(caught.value)


@pytest.mark.parametrize("python", ["/does/not/exist", "/bin/false", "/bin/cat"])
def test_processes_that_do_not_work_change_nothing(monkeypatch, python):
    some, dims = jobs()
    expected = Compilation(some, TARGET, dims, workers=0).run()
    monkeypatch.setattr(sys, "executable", python)
    assert Compilation(some, TARGET, dims, workers=2).run() == expected


def test_few_kernels_are_compiled_here(monkeypatch):
    monkeypatch.setattr(workers, "_JOBS_A_WORKER", 16)
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda pid: set(range(8)))
    some, dims = jobs()
    assert [Compilation(some * n, TARGET, dims).helpers() for n in (1, 5, 6, 11, 100)] == [0, 0, 1, 2, 7]
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda pid: {3})
    assert Compilation(some * 100, TARGET, dims).helpers() == 0
