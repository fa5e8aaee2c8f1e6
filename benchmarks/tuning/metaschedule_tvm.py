"""TVM's MetaSchedule in a process of its own: it tunes a matrix product, then times the best that it found.

It searches its default space for LLVM, with its own builder, runner and cost model. The layout of the weight is marked as
free: packing it is no part of what is timed. ``tvm.s_tir.tensor_intrin`` is left out: an f32 product has no use for it, and
each process that compiles would spend twenty seconds reading it.

Requests: ``tune`` (rows, features, k, trials, batch, seed, threads), then ``load`` (copies) and ``sample`` (seconds).
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.costmodel.measurement import Probe
from tilewright.measuring_helper import serve
from tilewright.runtime.memory import parts_of_pages

_TOLERANCE = 1e-4


def without_intrinsics() -> None:
    """For this process and for those of builder and runner; pickled, so that it must bring its own imports."""
    import sys
    import types

    sys.modules["tvm.s_tir.tensor_intrin"] = types.ModuleType("tvm.s_tir.tensor_intrin")


@dataclass(frozen=True)
class Product:
    """y[rows, features] = x[rows, k] w[features, k]^T"""

    rows: int
    features: int
    k: int

    def function(self) -> Any:
        """In TIR; the attribute ``layout_free_buffers`` names the weight."""
        from tvm import te, topi

        x = te.placeholder((self.rows, self.k), "float32", name="x")
        w = te.placeholder((self.features, self.k), "float32", name="w")
        return te.create_prim_func([x, w, topi.nn.dense(x, w)])


class Tuned:
    """The best schedule of a product."""

    def __init__(self, product: Product, schedule: Any, target: Any) -> None:
        from tvm import compile as build
        from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock

        self.product = product
        packed = RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(schedule.mod)
        function = packed["main"]
        self.weight_shape = tuple(int(d) for d in function.params[1].shape)
        self.is_packed = self.weight_shape != (product.features, product.k)
        self.run = build(packed, target=target)["main"]
        self.packs_itself = build(schedule.mod, target=target)["main"]  # the same with packing as a part of it

    def check(self) -> None:
        """Raises ValueError for wrong numbers."""
        rng, p = np.random.default_rng(0), self.product
        x, w = rng.standard_normal((p.rows, p.k), np.float32), rng.standard_normal((p.features, p.k), np.float32)
        same = np.full(self.weight_shape, 0.5, np.float32)  # alike in every layout
        for run, given, want in ((self.packs_itself, w, x @ w.T), (self.run, same, x @ np.full_like(w, 0.5).T)):
            y = tensor(np.zeros((p.rows, p.features), np.float32))
            run(tensor(x), tensor(given), y)
            error = np.abs(y.numpy() - want).max() / np.abs(want).max()
            if not error < _TOLERANCE:
                raise ValueError(f"MetaSchedule's best kernel differs by {error:.2g} of the largest magnitude")

    def probe(self, copies: int, seconds: float) -> Probe:
        """Samples of calls, each with the next of many copies of the weight, all in large pages."""
        p = self.product
        parts = parts_of_pages([4 * p.features * p.k] * copies)
        for part in parts:
            part.view(np.float32)[...] = 0.5
        weights = [tensor(part.view(np.float32).reshape(self.weight_shape)) for part in parts]
        x, y = (tensor(np.full(shape, 0.5, np.float32)) for shape in ((p.rows, p.k), (p.rows, p.features)))
        order = itertools.cycle(weights)

        def run(count: int) -> None:
            for weight in itertools.islice(order, count):
                self.run(x, weight, y)

        return Probe(run, time.perf_counter, seconds)


def tensor(array: np.ndarray) -> Any:
    """A tensor of TVM: ``array`` itself if it is aligned as TVM wants it."""
    import tvm

    if array.ctypes.data % 64:
        return tvm.runtime.tensor(array)
    return tvm.runtime.from_dlpack(array)


def tune(product: Product, trials: int, batch: int, seed: int, threads: int) -> tuple[Tuned, dict[str, Any]]:
    """MetaSchedule's best of ``trials``, and what that took."""
    from tvm.s_tir import meta_schedule
    from tvm.target import Target

    target = Target({"kind": "llvm", "mcpu": cpu_name(), "num-cores": threads})
    function = product.function()
    own = {"sch_rules": "llvm", "postprocs": "llvm", "mutator_probs": "llvm"}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        database = meta_schedule.tir_integration.tune_tir(
            function, target, folder, trials, num_trials_per_iter=batch, num_tuning_cores=threads, seed=seed,
            space=meta_schedule.space_generator.PostOrderApply(**own),
            builder=meta_schedule.builder.LocalBuilder(max_workers=threads, initializer=without_intrinsics),
            runner=meta_schedule.runner.LocalRunner(initializer=without_intrinsics),
        )  # fmt: skip
        seconds = time.perf_counter() - start
        records = [[float(s) for s in record.run_secs or ()] for record in database.get_all_tuning_records()]
        schedule = meta_schedule.tir_integration.compile_tir(database, function, target)
    times = [min(own) for own in records if own and min(own) < 1e6]  # failures have a time beyond all
    tuned = Tuned(product, schedule, target)
    said = {"wall": seconds, "trials": len(records), "timed": len(times), "best": min(times), "packed": tuned.is_packed}
    return tuned, said


def cpu_name() -> str:
    from llvmlite import binding

    return str(binding.get_host_cpu_name())


class Server:
    """Answers requests, in the order that they are listed in above."""

    tuned: Tuned | None = None
    timer: Probe | None = None

    def answer(self, request: Mapping[str, Any], _: bytes = b"") -> tuple[Mapping[str, Any], bytes]:
        try:
            return getattr(self, request["do"])(**request["with"]), b""
        except Exception:
            return {"error": traceback.format_exc()}, b""

    def tune(self, rows: int, features: int, k: int, threads: int, **how: int) -> dict[str, Any]:
        os.environ["TVM_NUM_THREADS"] = str(threads)
        without_intrinsics()
        self.tuned, said = tune(Product(rows, features, k), threads=threads, **how)
        return said

    def load(self, copies: int, seconds: float) -> dict[str, Any]:
        assert self.tuned is not None
        self.tuned.check()
        self.timer = self.tuned.probe(copies, seconds)
        self.timer.warm(float("inf"))
        return {}

    def sample(self, name: str = "") -> dict[str, float]:
        assert self.timer is not None
        self.timer.take()
        return {"seconds": self.timer.seconds[-1]}


if __name__ == "__main__":
    serve(Server().answer)
