"""Candidates measured on this machine: those that go wrong, in every way there is, and kernels of each family."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tilewright import measuring_sampled
from tilewright.codegen.emitters import choose
from tilewright.codegen.facts import facts, registers
from tilewright.codegen.kernel import KernelCode
from tilewright.codegen.link import compiler
from tilewright.codegen.target import parse_target
from tilewright.costmodel.measurement import Effort
from tilewright.costmodel.workload import Measurement, Workload
from tilewright.ir import parse_dim
from tilewright.measuring import LocalRunner, MeasuringError
from tilewright.measuring_compile import Compilers, Made
from tilewright.measuring_inputs import Subject, make_inputs
from tilewright.measuring_reference import expected

QUICK = Effort(budget=0.01, least=2)
TARGET = parse_target("x86-64-v3")


def workload(body: str, threads: int = 2, **sizes: int) -> Workload:
    """The workload of a kernel given by its signature and operations."""
    dims = "".join(f"  dim {name} : 1..4096\n" for name in sizes)
    text = f"module @k {{\n{dims}  kernel @k{body}\n}}"
    subject = Subject.parse(text, sizes, TARGET)
    return Workload(choose(subject.kernel, TARGET).name, text, tuple(sizes.items()), TARGET.text, threads, "")


# --- candidates that go wrong -----------------------------------------------------------------------------------------

ADD = workload("""(%x: tensor<Bx64xf32>, %y: tensor<64xf32>) {
  %0 = core.add(%x, %y) : tensor<Bx64xf32>
  return([%0])
}""", B=40)  # fmt: skip
ROW = "for (long i = begin * 64; i < end * 64; i++) z[i] = x[i] + y[i % 64];"
HEAD = "#include <stdint.h>\n#include <stdlib.h>\n#include <unistd.h>\n"


class FromC:
    """A compiler of candidates whose schedules are the bodies of C functions; "refused" is refused."""

    def __init__(self) -> None:
        self.compiled: list[str] = []

    def compile(self, workload: Workload, schedules: Sequence[str]) -> list[Made]:
        self.compiled += schedules
        return [self.one(schedule) for schedule in schedules]

    def one(self, body: str) -> Made:
        if body == "refused":
            return Made(error="no such schedule")
        name = "tw_trial00000000000"
        source = f"{HEAD}void {name}(int64_t begin, int64_t end, int64_t B, float *x, float *y, float *z) {{ {body}\n}}"
        with tempfile.NamedTemporaryFile(suffix=".o") as file:
            command = [compiler(), "-x", "c", "-", "-O1", "-w", "-fPIC", "-c", "-o", file.name]
            subprocess.run(command, input=source.encode(), capture_output=True, check=True)
            code = Path(file.name).read_bytes()
        return Made(KernelCode(name, code, ("B",), parse_dim("B"), 4), facts(code))

    def close(self) -> None:
        pass


def measure(*bodies: str, timeout: float = 60.0, baseline: str = ROW) -> list[Measurement]:
    with LocalRunner(QUICK, timeout, FromC()) as runner:
        return runner.measure(ADD, baseline, list(bodies))


def test_each_ends_in_its_own_way() -> None:
    bodies = {
        ROW + " /* right */ asm volatile(\"nop\");": ("ok", ""),
        "*(volatile int *)0 = 1;": ("crashed", "SIGSEGV"),
        "abort();": ("crashed", "SIGABRT"),
        "_exit(0);": ("crashed", "without an answer"),
        "refused": ("refused", "no such schedule"),
        "extern void missing(void); missing();": ("refused", "missing"),
        "": ("wrong", "result 0"),
        ROW + " if (begin == 0) z[5] += 0.01f;": ("wrong", "largest magnitude"),
        ROW + " for (long i = begin * 64; i < end * 64; i++) z[i] *= 1.00005f;": ("wrong", "mean square"),
        ROW + " if (end == B) z[end * 64] = 0;": ("wrong", "written to"),
        "static int calls; " + ROW + " if (begin == 0 && calls++) z[0] += 1;": ("wrong", "not always"),
    }  # fmt: skip
    for body, found in zip(bodies, measure(*bodies)):
        status, said = bodies[body]
        assert (found.schedule, found.status) == (body, status), found
        assert said in found.error
        assert (found.seconds is not None) == (status == "ok")
        assert (found.ratio is not None) == (status == "ok")


def test_a_hang_is_ended() -> None:
    (found,) = measure("for (;;) pause();", timeout=1.0)
    assert (found.status, found.error, found.ratio) == ("timeout", "not through after 1 s", None)


def test_what_is_measured() -> None:
    one, other = measure(ROW, ROW + " // said otherwise")
    assert one.status == "ok"
    assert (other.seconds, other.baseline) == (one.seconds, one.baseline)  # equal code is timed once
    assert other.schedule.endswith("otherwise")
    assert one.repeats > 0
    assert one.metrics["bytes_moved"] == 40 * 64 * 4 * 2 + 64 * 4
    assert 20 < one.metrics["code_bytes"] < 2000


def test_in_the_order_asked_for() -> None:
    bodies = [ROW + f" asm volatile(\"nop\" : : \"r\"({i}));" for i in range(4)]
    assert [m.schedule for m in measure(*bodies, *bodies[:2])] == [*bodies, *bodies[:2]]
    assert measure() == []


def test_a_schedule_asked_for_again_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with LocalRunner(QUICK, 60.0, FromC()) as runner:
        asked, ask = [], runner.ask
        monkeypatch.setattr(runner, "ask", lambda *a: (asked.append(a[1].name), ask(*a))[1])
        runner.measure(ADD, ROW, [ROW])
        count = len(asked)
        runner.measure(ADD, ROW, [ROW + " // the same"])
        assert len(asked) == count
        runner.measure(ADD, ROW, [ROW])
        assert len(asked) == count + 1


@pytest.mark.parametrize("baseline", ["refused", "abort();", ""])
def test_a_bad_baseline_leaves_no_ratio(baseline: str) -> None:
    (found,) = measure(ROW, baseline=baseline)
    assert (found.status, found.ratio) == ("ok", None)


def test_the_measuring_process_may_die() -> None:
    with LocalRunner(QUICK, 60.0, FromC()) as runner:
        assert runner.measure(ADD, ROW, [ROW])[0].status == "ok"
        assert runner.server.process is not None
        runner.server.process.kill()
        (lost,) = runner.measure(ADD, ROW, [ROW])
        assert (lost.status, lost.ratio) == ("crashed", None)
        assert runner.measure(ADD, ROW, [ROW])[0].status == "ok"


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked for in /proc")
def test_nothing_is_left_when_the_caller_is_killed(tmp_path: Path) -> None:
    """The caller is killed while a candidate hangs: no process of it, or of that candidate, is left."""
    mark = tmp_path / "running"
    hang = f'FILE *f = fopen("{mark}", "w"); fprintf(f, "%d", getpid()); fclose(f); for (;;) pause();'
    program = f"""
import tests.backend.test_measuring as t
t.HEAD += "#include <stdio.h>\\n"
t.measure({hang!r}, timeout=300.0)
"""
    root = Path(__file__).parents[2]
    caller = subprocess.Popen([sys.executable, "-c", program], cwd=root, env=os.environ | {"PYTHONPATH": str(root)})
    while not mark.exists() or not mark.read_text():
        assert caller.poll() is None
        time.sleep(0.05)
    child = int(mark.read_text())
    server = int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1])
    caller.kill()
    caller.wait()
    deadline = time.monotonic() + 20
    while alive(child) or alive(server):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# --- compiling --------------------------------------------------------------------------------------------------------

LINEAR = workload("""(%x: tensor<Bx96xf32>, %w: tensor<80x96xf32>) {
  %0 = nn.linear(%x, %w) : tensor<Bx80xf32>
  return([%0])
}""", B=3)  # fmt: skip
GOOD = "linear{tile_m=4 tile_v=2 block_m=24 block_k=128 unroll=1 prefetch=0 first=panel}"


def test_what_the_compiler_refuses() -> None:
    compilers = Compilers(1)
    good, unknown, domain, large = compilers.compile(
        LINEAR, [GOOD, "linear{tiles=3}", "linear{tile_m=3}", GOOD.replace("tile_m=4 tile_v=2", "tile_m=14 tile_v=6")]
    )
    compilers.close()
    assert good.code is not None
    assert good.facts["code_bytes"] > 100
    assert unknown.code is domain.code is large.code is None
    assert "no knob" in unknown.error
    assert "not one of" in domain.error
    assert "vector registers" in large.error


@pytest.mark.parametrize(("program", "said"), [
    ("import time; time.sleep(300)", "no answer after 1 s"),
    ("import os; os.abort()", "ended with -6"),
    ("print('hello')", "ended with"),
])  # fmt: skip
def test_a_compiler_that_hangs_or_dies(program: str, said: str) -> None:
    compilers = Compilers(2, seconds=1.0, command=[sys.executable, "-c", program])
    made = compilers.compile(LINEAR, [GOOD, GOOD, GOOD])
    compilers.close()
    assert all(said in m.error and m.code is None for m in made)


def test_a_processor_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tilewright.measuring.host_target", lambda: parse_target("x86-64-v3"))
    there = Workload(LINEAR.family, LINEAR.kernel, LINEAR.sizes, parse_target("x86-64-v4").text, 1, "")
    with LocalRunner(QUICK) as runner, pytest.raises(MeasuringError, match="lacks avx512bw"):
        runner.measure(there, GOOD, [GOOD])


# --- kernels of each family -------------------------------------------------------------------------------------------

KV = "kv<heads=2, dim=16, vdim=16, length=96, dtype={}, layout=contiguous>"
CODES = "kv<heads=2, dim=16, vdim=16, length=96, dtype=i4, layout=contiguous, keys=channel>"
PAGES = CODES.replace("contiguous", "paged<32>")
FAMILIES = {
    "linear": LINEAR,
    "linear bf16": workload("""(%x: tensor<Bx1x96xbf16>, %w: tensor<80x96xbf16>, %b: tensor<80xbf16>,
        %r: tensor<Bx1x80xbf16>) {
      %0 = nn.linear(%x, %w, %b) : tensor<Bx1x80xbf16>
      %1 = core.add(%r, %0) : tensor<Bx1x80xbf16>
      return([%1])
    }""", B=5),
    "linear i4": workload("""(%x: tensor<Bx64xi8>, %s: tensor<Bx1xf32>, %c: tensor<48x64xi4>, %t: tensor<48x2xf16>) {
      %0 = quant.dequantize(%x, %s) : tensor<Bx64xf32>
      %1 = quant.dequantize(%c, %t) : tensor<48x64xf32>
      %2 = nn.linear(%0, %1) : tensor<Bx48xf32>
      return([%2])
    }""", B=2),
    "gated u4": workload("""(%x: tensor<Bx64xf32>, %g: tensor<48x64xu4>, %gs: tensor<48x2xf16>, %gz: tensor<48x2xu8>,
        %u: tensor<48x64xu4>, %us: tensor<48x2xf16>, %uz: tensor<48x2xu8>) {
      %0 = quant.dequantize(%g, %gs, %gz) : tensor<48x64xf32>
      %1 = quant.dequantize(%u, %us, %uz) : tensor<48x64xf32>
      %2 = nn.gated_linear(%x, %0, %1) : tensor<Bx48xf32>
      return([%2])
    }""", B=2),
    "table": workload("""(%x: tensor<Bx64xf32>, %c: tensor<48x64xu4>, %t: tensor<48x16xf16>) {
      %0 = quant.lookup(%c, %t) : tensor<48x64xf32>
      %1 = nn.linear(%x, %0) : tensor<Bx48xf32>
      return([%1])
    }""", B=2),
    "two levels": workload("""(%x: tensor<Bx64xi8>, %s: tensor<Bx1xf32>, %c: tensor<48x64xu4>, %g: tensor<48x2xu8>,
        %z: tensor<48x2xu8>, %t: tensor<48x1xf32>) {
      %0 = quant.dequantize(%x, %s) : tensor<Bx64xf32>
      %1 = quant.expand(%c, %g, %z) : tensor<48x64xi8>
      %2 = quant.dequantize(%1, %t) : tensor<48x64xf32>
      %3 = nn.linear(%0, %2) : tensor<Bx48xf32>
      return([%3])
    }""", B=2),
    "mxfp4": workload("""(%x: tensor<Bx64xf32>, %c: tensor<48x64xf4e2m1>, %t: tensor<48x2xf8e8m0>) {
      %0 = quant.dequantize(%c, %t) : tensor<48x64xf32>
      %1 = nn.linear(%x, %0) : tensor<Bx48xf32>
      return([%1])
    }""", B=2),
    "sparse": workload("""(%x: tensor<Bx64xi8>, %s: tensor<Bx1xf32>, %v: tensor<2000xu8>, %m: tensor<3x16xi64>,
        %a: tensor<3x1xi32>, %t: tensor<40x1xf32>) {
      %0 = quant.dequantize(%x, %s) : tensor<Bx64xf32>
      %1 = sparse.expand(%v, %m, %a) {rows=40 columns=64 dtype=i8} : tensor<40x64xi8>
      %2 = quant.dequantize(%1, %t) : tensor<40x64xf32>
      %3 = nn.linear(%0, %2) : tensor<Bx40xf32>
      return([%3])
    }""", B=2),
    "sparse i4": workload("""(%x: tensor<Bx64xf32>, %v: tensor<1000xu8>, %m: tensor<3x16xi64>, %a: tensor<3x1xi32>,
        %t: tensor<40x2xf16>) {
      %0 = sparse.expand(%v, %m, %a) {rows=40 columns=64 dtype=i4 split=true} : tensor<40x64xi4>
      %1 = quant.dequantize(%0, %t) : tensor<40x64xf32>
      %2 = nn.linear(%x, %1) : tensor<Bx40xf32>
      return([%2])
    }""", B=2),
    "append": workload(f"""(%k: tensor<BxSx2x16xf32>, %v: tensor<BxSx2x16xf32>, %c: {KV.format("f32")},
        %at: tensor<Bxi64>) {{
      %0 = kv.append(%c, %k, %v, %at) : {KV.format("f32")}
      return([%0])
    }}""", B=2, S=5),
    "attend": workload(f"""(%q: tensor<BxSx4x16xbf16>, %c: {KV.format("bf16")}, %at: tensor<Bxi64>) {{
      %0 = kv.attend(%q, %c, %at) {{scale=0.25}} : tensor<BxSx4x16xbf16>
      return([%0])
    }}""", B=2, S=3),
    "decode in parts": workload(f"""(%q: tensor<Bx1x4x16xf32>, %c: {KV.format("f32")}, %at: tensor<Bxi64>) {{
      %0 = kv.attend(%q, %c, %at) {{scale=0.25}} : tensor<Bx1x4x16xf32>
      return([%0])
    }}""", B=1),
    "append codes": workload(f"""(%k: tensor<BxSx2x16xf32>, %v: tensor<BxSx2x16xf32>, %c: {CODES}, %at: tensor<Bxi64>) {{
      %0 = kv.append(%c, %k, %v, %at) : {CODES}
      return([%0])
    }}""", B=2, S=40),
    "attend to codes": workload(f"""(%q: tensor<BxSx4x16xbf16>, %c: {CODES}, %at: tensor<Bxi64>) {{
      %0 = kv.attend(%q, %c, %at) {{scale=0.25}} : tensor<BxSx4x16xbf16>
      return([%0])
    }}""", B=2, S=3),
    "attend to i8": workload(f"""(%q: tensor<Bx1x4x16xf32>, %c: {KV.format("i8")}, %at: tensor<Bxi64>) {{
      %0 = kv.attend(%q, %c, %at) {{scale=0.25}} : tensor<Bx1x4x16xf32>
      return([%0])
    }}""", B=2),
    "append to pages": workload(f"""(%k: tensor<BxSx2x16xf32>, %v: tensor<BxSx2x16xf32>, %c: {PAGES}, %at: tensor<Bxi64>,
        %t: tensor<BxTxi32>) {{
      %0 = kv.append(%c, %k, %v, %at, %t) : {PAGES}
      return([%0])
    }}""", B=2, S=40, T=3),
    "attend to pages": workload(f"""(%q: tensor<BxSx4x16xbf16>, %c: {PAGES}, %at: tensor<Bxi64>, %t: tensor<BxTxi32>) {{
      %0 = kv.attend(%q, %c, %at, none, none, %t) {{scale=0.25}} : tensor<BxSx4x16xbf16>
      return([%0])
    }}""", B=2, S=3, T=3),
    "norm and codes": workload("""(%x: tensor<BxSx48xbf16>, %w: tensor<48xbf16>) {
      %0 = nn.rms_norm(%x, %w) : tensor<BxSx48xbf16>
      %1, %2 = quant.quantize(%0) : tensor<BxSx48xi8>, tensor<BxSx1xf32>
      return([%1, %2])
    }""", B=2, S=7),
    "embedding": workload("""(%i: tensor<Bx7xi64>, %c: tensor<5000x48xi8>, %s: tensor<5000x1xf32>) {
      %0 = quant.dequantize(%c, %s) {dtype=bf16} : tensor<5000x48xbf16>
      %1 = nn.embedding(%i, %0) : tensor<Bx7x48xbf16>
      return([%1])
    }""", B=2),
    "positions": workload("""(%at: tensor<Bx1xi64>) {
      %0 = core.iota() {length=S dtype=i64} : tensor<Sxi64>
      %1 = core.add(%at, %0) : tensor<BxSxi64>
      return([%1])
    }""", B=2, S=9),
    "conv": workload("""(%x: tensor<1x3x12x12xf32>, %w: tensor<4x3x3x3xf32>) {
      %0 = nn.conv(%x, %w) {stride=[1, 1] padding=[0, 0] dilation=[1, 1]} : tensor<1x4x10x10xf32>
      return([%0])
    }"""),
    "topk": workload("""(%x: tensor<Bx40xf32>) {
      %0, %1 = core.topk(%x) {k=5 axis=1 largest=true} : tensor<Bx5xf32>, tensor<Bx5xi64>
      return([%0, %1])
    }""", B=3),
    "experts": workload("""(%x: tensor<Bx16xf32>, %i: tensor<Bx2xi64>, %p: tensor<Bx2xf32>, %u: tensor<4x24x16xf32>,
        %d: tensor<4x16x12xf32>) {
      %0 = moe.experts(%x, %i, %p, %u, %d) : tensor<Bx16xf32>
      return([%0])
    }""", B=3),
}  # fmt: skip


@pytest.fixture(scope="module")
def runner():
    with LocalRunner(QUICK, 60.0) as made:
        yield made


@pytest.mark.parametrize("name", FAMILIES)
def test_kernels_are_right(name: str, runner: LocalRunner) -> None:
    """The default and some schedules of the space give what the interpreter gives."""
    given, rng = FAMILIES[name], np.random.default_rng(0)
    subject = Subject.parse(given.kernel, dict(given.sizes), TARGET)
    emitter = choose(subject.kernel, TARGET)
    space = emitter.space(subject.kernel, TARGET, dict(given.sizes))
    schedules = [space.default.text, *(space.sample(rng).text for _ in range(3))]
    for found in runner.measure(given, schedules[0], schedules):
        assert (found.status, found.error) == ("ok", ""), found
        assert found.ratio is not None


def test_families_are_all_there() -> None:
    assert {w.family for w in FAMILIES.values()} == {"mlir.linear", "mlir.attention", "mlir.loops", "tvm"}


# --- inputs and facts -------------------------------------------------------------------------------------------------


def inputs(name: str) -> tuple[Subject, list]:
    given = FAMILIES[name]
    subject = Subject.parse(given.kernel, dict(given.sizes), TARGET)
    return subject, make_inputs(subject)


def test_inputs_fit_their_roles() -> None:
    _, (indices, codes, scale) = inputs("embedding")
    assert 1000 < indices.max() < 5000
    assert (codes.min(), codes.max()) == (-127, 127)
    assert scale.min() > 0
    _, (_, codes, scale, zero, *_) = inputs("gated u4")
    assert (codes.astype(int).min(), codes.astype(int).max(), zero.max()) == (0, 15, 15)
    _, (_, _, _, at) = inputs("append")
    assert ((at > 20) & (at < 96 - 5)).all()
    _, (_, experts, *_) = inputs("experts")
    assert set(experts.reshape(-1).tolist()) <= {0, 1, 2, 3}


def test_inputs_are_the_same_each_time() -> None:
    for name in FAMILIES:
        for a, b in zip(inputs(name)[1], inputs(name)[1]):
            pairs = zip(a, b) if isinstance(a, tuple) else [(a, b)]
            assert all(np.array_equal(x, y) for x, y in pairs)


def test_which_arguments_are_weights() -> None:
    assert [inputs("linear bf16")[0].is_constant(i) for i in range(4)] == [False, True, True, False]
    assert [inputs("gated u4")[0].is_constant(i) for i in range(7)] == [False] + [True] * 6
    assert [inputs("attend")[0].is_constant(i) for i in range(3)] == [False, False, False]
    assert [inputs("conv")[0].is_constant(i) for i in range(2)] == [False, True]  # nothing symbolic: by its name


def test_registers_and_spills() -> None:
    listing = """
0000000000000000 <tw_k>:
   0:	vmovups (%rdi),%zmm0
   6:	vmovups %zmm17,0x40(%rsp)
   c:	vfmadd231ps 0x80(%rsp,%rax,1),%zmm0,%zmm3
  10:	mov    %rdi,0x8(%rsp)
  14:	vmovups (%rbp),%ymm3
0000000000000080 <tw_k.tail>:
  80:	push   %rbp
  81:	mov    %rsp,%rbp
  84:	vmovups %xmm5,-0x40(%rbp)
"""
    assert registers(listing) == {"vector_registers": 4.0, "spills": 3.0}


# --- large layers -----------------------------------------------------------------------------------------------------

HEAD_LAYER = workload("""(%x: tensor<Bx64xbf16>, %c: tensor<9000x64xi8>, %s: tensor<9000x2xf32>, %b: tensor<9000xbf16>,
    %r: tensor<Bx9000xbf16>) {
  %0 = quant.dequantize(%c, %s) : tensor<9000x64xf32>
  %1 = nn.linear(%x, %0, %b) : tensor<Bx9000xbf16>
  %2 = core.mul(%1, %r) : tensor<Bx9000xbf16>
  return([%2])
}""", B=3)  # fmt: skip


def test_of_a_large_layer_some_features_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject.parse(HEAD_LAYER.kernel, {"B": 3}, TARGET)
    inputs = make_inputs(subject)
    ((whole,),) = expected(subject, inputs)
    monkeypatch.setattr(measuring_sampled, "_LARGE", 1 << 18)
    ((part,),) = expected(subject, inputs)
    assert whole.features is None
    assert part.features is not None
    assert {0, 255, 8744, 8999} <= set(part.features.tolist())
    assert part.shape == whole.shape == (3, 9000)
    np.testing.assert_array_equal(part.array, whole.array[:, part.features])
    right = whole.array.copy()
    assert part.complaint(right) is None
    right[2, part.features[700]] += 1
    assert "largest magnitude" in (part.complaint(right) or "")
    right[...] = whole.array
    right[1, np.setdiff1d(np.arange(9000), part.features)[5]] = np.nan
    assert "everywhere" in (part.complaint(right) or "")


@pytest.mark.parametrize("body", [
    """(%x: tensor<Bx64xf32>, %w: tensor<9000x64xf32>) {
      %0 = nn.linear(%x, %w) : tensor<Bx9000xf32>
      %1 = nn.softmax(%0) {axis=1} : tensor<Bx9000xf32>
      return([%1])
    }""",
    """(%x: tensor<Bx64xf32>, %w: tensor<9000x64xf32>) {
      %0 = nn.linear(%x, %w) : tensor<Bx9000xf32>
      %1 = core.reshape(%0) {shape=[B, 90, 100]} : tensor<Bx90x100xf32>
      return([%1])
    }""",
    """(%x: tensor<Bx9000xf32>, %w: tensor<9000x9000xf32>) {
      %0 = nn.linear(%x, %w) : tensor<Bx9000xf32>
      %1 = core.add(%0, %x) : tensor<Bx9000xf32>
      return([%1])
    }""",
])  # fmt: skip
def test_what_cannot_be_cut_is_not(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    monkeypatch.setattr(measuring_sampled, "_LARGE", 1 << 18)
    text = f"module @k {{\n  dim B : 1..8\n  kernel @k{body}\n}}"
    assert measuring_sampled.sample(Subject.parse(text, {"B": 2}, TARGET)) is None
