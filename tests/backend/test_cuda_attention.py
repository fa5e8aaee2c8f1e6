"""CUDA kernels of attention and of caches, on an emulated device, against the interpreter."""

from collections.abc import Sequence

import numpy as np
import pytest

from tests.backend.attention_cases import CACHED, MASKS, ROPES, Case, attend, attention, compare, expected, operands
from tests.cuda.standalone import DeviceCache, EmulatedKernel
from tilewright.codegen.cuda.attention import CudaAttentionEmitter, heads_of
from tilewright.codegen.cuda.attention_schedule import CudaAttentionSchedule, Tiling
from tilewright.codegen.cuda.cache import CudaCacheLayout
from tilewright.codegen.schedule import parse_schedule
from tilewright.codegen.target import parse_target
from tilewright.ir import CodegenError, DType, Function, KVType, Paged, Return, Ring, TensorType, eval_dim, ops

TARGET = "cuda{arch=sm_80}"
EMITTER = CudaAttentionEmitter()
LIMIT = {"f32": 1e-5, "bf16": 1e-2, "f16": 2e-3}
DTYPES = tuple(LIMIT)


def kernel_of(function: Function, schedule: str = "") -> EmulatedKernel:
    """A kernel that runs as on a device where races are lost."""
    return EmulatedKernel(function, EMITTER, TARGET, parse_schedule(schedule) if schedule else None, late=True)


def check(kernel: EmulatedKernel, dims: dict[str, int], starts: Sequence[int] = (), limit: float = 0.0) -> None:
    given = operands(kernel.kernel, dims, starts)
    (got,), (want,) = kernel(given, dims), expected(kernel.kernel, given)
    compare(got, want, limit or LIMIT[kernel.kernel.returns[0].dtype.value])


def kv(heads: int, dim: int, vdim: int, length: int) -> KVType:
    return KVType(heads, dim, vdim, length, DType.f32)


# --- as fusion cuts them ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ROPES)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_attend_of_a_projection(what: str, dtype: str) -> None:
    case = Case(dtype, 6, 2, 32, ROPES[what], "S")
    case.attend(window=50)
    case.check(kernel_of(case.kernel), [0, 61], 21, LIMIT[dtype])


@pytest.mark.parametrize("what", ROPES)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_decode_of_a_projection(what: str, dtype: str) -> None:
    case = Case(dtype, 9, 3, 32, ROPES[what], 1)
    case.attend()
    case.check(kernel_of(case.kernel), [0, 64, 95], 1, LIMIT[dtype])


@pytest.mark.parametrize("what", ROPES)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_append(what: str, dtype: str) -> None:
    for s, starts, tokens in (("S", [3, 20], 70), (1, [0, 95], 1)):
        case = Case(dtype, 4, 2, 32, ROPES[what], s)
        case.append()
        case.check(kernel_of(case.kernel), starts, tokens, LIMIT[dtype])


def test_append_to_heads_of_odd_size_in_another_type() -> None:
    function = Function("k", kind="kernel")
    cache = function.arg("cache", KVType(3, 33, 20, 70, DType.f16))
    k, v = (function.arg(name, TensorType(("B", "S", 3, n), DType.f32)) for name, n in (("k", 33), ("v", 20)))
    start = function.arg("start", TensorType(("B",), DType.i64))
    function.append(Return(function.append(ops.Append(cache, k, v, start)).results))
    given = operands(function, {"B": 2, "S": 17}, [0, 53])
    (got,), (want,) = kernel_of(function)(given, {"B": 2, "S": 17}), expected(function, given)
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(got, want))


def test_tokens_beyond_the_cache_are_not_written() -> None:
    case = Case("f32", 2, 1, 32, None, "S")
    case.append()
    cache, qkv, _ = (operands(case.kernel, {"B": 1, "S": 4})[i] for i in (1, 0, 2))
    ((k, _),) = kernel_of(case.kernel)([qkv, cache, np.array([94])], {"B": 1, "S": 4})
    assert np.array_equal(k[:, :94], cache[0][:, :94])
    assert np.array_equal(k[0, 94:, 0], qkv[0, :2, 64:96])


# --- what a score may meet --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", MASKS)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_masks(what: str, dtype: str) -> None:
    kernel = kernel_of(attention(dtype, 4, 2, 16, 16, **MASKS[what]))
    check(kernel, {"B": 2, "S": 40, "T": 40})
    check(kernel, {"B": 1, "S": 5, "T": 70})
    check(kernel, {"B": 1, "S": 9, "T": 3})


@pytest.mark.parametrize(("dtype", "stored", "what"), [
    ("f32", "f32", "plain"), ("f32", "f32", "all"), ("bf16", "bf16", "plain"), ("bf16", "bf16", "chunk"),
    ("bf16", "bf16", "all"), ("f32", "bf16", "window"), ("f32", "f16", "plain"), ("bf16", "f32", "all"),
    ("f16", "f16", "all"),
])
def test_attend(dtype: str, stored: str, what: str) -> None:
    """Decode and chunks of a prompt, ragged; the cache holds tokens beyond what a query may see."""
    for s, starts in ((1, [0, 139]), ("S", [0, 100])):
        kernel = kernel_of(attend(dtype, stored, 6, kv(2, 40, 24, 140), s, **CACHED[what]))
        check(kernel, {"B": 2, "S": 37}, starts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_few_tokens_at_once(dtype: str) -> None:
    check(kernel_of(attend(dtype, dtype, 6, kv(2, 40, 24, 140), 3, **CACHED["all"])), {"B": 2}, [137, 63])


@pytest.mark.parametrize(("dtype", "s"), [("f32", 1), ("f32", "S"), ("bf16", 1), ("bf16", "S")])
def test_slots_that_were_never_written_do_not_matter(dtype: str, s: str | int) -> None:
    function, starts = attend(dtype, dtype, 4, kv(2, 32, 32, 140), s), [0, 77]
    given = operands(function, {"B": 2, "S": 21}, starts)
    (want,) = expected(function, given)
    for part in given[1]:
        for b, start in enumerate(starts):
            part[b, start + given[0].shape[1]:] = np.nan
    (got,) = kernel_of(function)(given, {"B": 2, "S": 21})
    compare(got, want, LIMIT[dtype])


def test_a_bias_of_the_lowest_number_counts() -> None:
    """A row whose keys all have it weighs them equally, as one whose keys all have 0."""
    for dtype in ("f32", "bf16"):
        function = attention(dtype, 2, 1, 16, 16, bias="st", bias_dtype=dtype)
        given = operands(function, {"B": 1, "S": 3, "T": 40})
        given[3][0, 0, 0] = np.finfo(np.float32).min if dtype == "f32" else DType.bf16.np.type(-3.38e38)
        given[3][0, 0, 1, :20] = -np.inf
        given[3][0, 0, 2] = -np.inf
        (got,), (want,) = kernel_of(function)(given, {"B": 1, "S": 3, "T": 40}), expected(function, given)
        compare(got, want, LIMIT[dtype])
        assert not got[0, 2].any()


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scales_that_do_not_order_products(scale: float) -> None:
    check(kernel_of(attention("bf16", 2, 1, 16, 16, scale=scale)), {"B": 1, "S": 5, "T": 40})


def test_top_scores_that_rise_by_much_and_by_little() -> None:
    """Keys grow: each tile's scores are above those of the one before."""
    function = attend("bf16", "bf16", 4, kv(2, 32, 32, 600), "S", scale=1.0)
    given = operands(function, {"B": 1, "S": 64}, [530])
    for growth in (0.002, 0.02, 0.2):
        grown = given[1][0] * np.exp(growth * np.arange(600) - growth * 600)[None, :, None, None]
        given[1] = grown.astype(DType.bf16.np) * 4, given[1][1]
        (got,), (want,) = kernel_of(function)(given, {"B": 1, "S": 64}), expected(function, given)
        compare(got, want, LIMIT["bf16"])


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths(dtype: str) -> None:
    kernel = kernel_of(attention(dtype, 4, 2, 32, 32, scale=0.2, causal=True))
    for b, s, t in ((2, 1, 1), (1, 1, 17), (2, 2, 2), (1, 15, 15), (2, 16, 127), (1, 130, 130), (1, 7, 3)):
        check(kernel, {"B": b, "S": s, "T": t})


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "vdim"),
    [(1, 1, 1, 1), (3, 1, 7, 65), (6, 2, 33, 20), (71, 1, 16, 16), (2, 2, 128, 80), (2, 1, 192, 128), (1, 1, 256, 256),
     (2, 1, 264, 512)],
)
def test_sizes_of_heads(dtype: str, heads: int, kv_heads: int, dim: int, vdim: int) -> None:
    check(kernel_of(attention(dtype, heads, kv_heads, dim, vdim)), {"B": 2, "S": 9, "T": 70})


@pytest.mark.parametrize(("dtype", "group", "dim", "vdim"), [
    ("bf16", 1, 128, 128), ("bf16", 4, 128, 128), ("f16", 7, 64, 80), ("bf16", 16, 16, 200), ("bf16", 24, 64, 64),
    ("f16", 71, 8, 8), ("f32", 1, 64, 64), ("f32", 4, 128, 128), ("f32", 7, 64, 80), ("f32", 71, 8, 8),
])
def test_groups(dtype: str, group: int, dim: int, vdim: int) -> None:
    check(kernel_of(attend(dtype, dtype, 2 * group, kv(2, dim, vdim, 400), 1)), {"B": 3}, [0, 64, 399])


# --- schedules --------------------------------------------------------------------------------------------------------

FEW = [
    "form=mma share=rows rows=16 keys=16 warps=1 stages=2",
    "form=mma share=rows rows=16 keys=32 warps=4 stages=3 parts=4",
    "form=mma share=rows rows=32 keys=16 warps=2 stages=6 parts=3",
    "form=mma share=keys rows=64 keys=64 warps=4 stages=2 parts=2",
    "form=plain rows=4 keys=32 warps=4 stages=3 parts=8",
    "form=plain rows=1 keys=16 warps=1 stages=2",
    "form=plain rows=16 keys=128 warps=2 stages=2 parts=2",
]
MANY = [
    "form=mma share=keys rows=16 keys=16 warps=1 stages=2",
    "form=mma share=keys rows=32 keys=128 warps=1 stages=3",
    "form=mma share=keys rows=128 keys=32 warps=8 stages=4",
    "form=mma share=keys rows=256 keys=64 warps=8 stages=2 parts=2",
    "form=mma share=rows rows=32 keys=16 warps=8 stages=2 parts=3",
    "form=plain rows=32 keys=64 warps=1 stages=2",
    "form=plain rows=64 keys=16 warps=8 stages=3 parts=2",
]


@pytest.mark.parametrize("schedule", FEW)
def test_schedules_of_decoding(schedule: str) -> None:
    function = attend("bf16", "bf16", 6, kv(2, 48, 32, 700), 1, window=600, sinks="f32")
    kernel = kernel_of(function, f"cuda_attention{{{schedule}}}")
    for kernel.run.late in (False, True):
        check(kernel, {"B": 3}, [0, 330, 699])


@pytest.mark.parametrize("schedule", MANY)
def test_schedules_of_prompts(schedule: str) -> None:
    kernel = kernel_of(attend("bf16", "bf16", 6, kv(2, 48, 32, 300), "S", chunk=128), f"cuda_attention{{{schedule}}}")
    for kernel.run.late in (False, True):
        check(kernel, {"B": 2, "S": 70}, [0, 230])


def test_many_sequences_have_fewer_parts() -> None:
    kernel = kernel_of(attend("f32", "f32", 2, kv(2, 8, 8, 600), 1), "cuda_attention{form=plain rows=1 keys=32 parts=16}")
    grid = kernel.code.device.launches[0].grid
    assert [eval_dim(grid[2], {"B": b}) for b in (1, 27, 100, 1000)] == [16, 8, 2, 1]
    check(kernel, {"B": 100}, list(range(100, 600, 5)))


def space(function: Function, target: str = TARGET, length: int = 4096):
    return EMITTER.space(function, parse_target(target), {"B": 1, "S": 64, "T": length})


@pytest.mark.parametrize("target", [TARGET, "cuda{arch=sm_89}", "cuda{arch=sm_90a}"])
def test_spaces_hold_the_default_and_only_what_fits(target: str) -> None:
    for function in (attend("bf16", "bf16", 32, kv(8, 128, 128, 4096), 1), attention("f32", 4, 2, 64, 64)):
        found, rng = space(function, target), np.random.default_rng(0)
        assert found.default in found
        heads = heads_of(function.body[0])
        for _ in range(20):
            schedule = found.sample(rng)
            assert Tiling(schedule, heads).shared_bytes <= parse_target(target).shared_bytes
            facts = EMITTER.features(function, parse_target(target), {"B": 1, "S": 64, "T": 4096})(schedule)
            assert facts["tasks"] >= schedule.parts >= 1
    assert {s.form for s in space(attention("f32", 4, 2, 64, 64), target)} == {"plain"}


def test_schedules_from_the_space_run() -> None:
    rng, function = np.random.default_rng(1), attend("f16", "f16", 8, kv(2, 64, 64, 300), 2, softcap=9.0)
    found = space(function)
    for _ in range(3):
        check(kernel_of(function, found.sample(rng).text), {"B": 2}, [5, 298])


def test_a_cache_has_nothing_to_tune() -> None:
    case = Case("f32", 4, 2, 32, None, 1)
    case.append()
    assert list(space(case.kernel)) == [CudaAttentionSchedule()]


# --- operands ---------------------------------------------------------------------------------------------------------


def test_operands_come_through_other_operations() -> None:
    """Keys with heads first lie in rows; values that are computed do not."""
    function = Function("k", kind="kernel")
    q = function.arg("q", TensorType(("B", "S", 4, 16), DType.bf16))
    k = function.arg("k", TensorType(("B", 2, "T", 16), DType.bf16))
    v, w = (function.arg(name, TensorType(("B", "T", 2, 16), DType.bf16)) for name in "vw")
    keys = function.append(ops.Transpose(k, perm=(0, 2, 1, 3))).result
    values = function.append(ops.Mul(v, function.append(ops.Tanh(w)).result)).result
    function.append(Return(function.append(ops.Attention(q, keys, values, scale=0.25)).results))
    kernel = kernel_of(function)
    assert "KEY_PIECE = 8" in kernel.code.device.source
    assert "VALUE_PIECE = 1" in kernel.code.device.source
    check(kernel, {"B": 2, "S": 19, "T": 33}, limit=2e-2)


def test_rotated_keys_of_a_tensor() -> None:
    function = Function("k", kind="kernel")
    q, k = (function.arg(name, TensorType(("B", "S", 2, 32), DType.f32)) for name in "qk")
    table = function.arg("cos", TensorType((1, "S", 32), DType.f32))
    rope = function.append(ops.Rope(k, table, table)).result
    function.append(Return(function.append(ops.Attention(q, rope, k, causal=True)).results))
    check(kernel_of(function), {"B": 2, "S": 21})


def test_a_prompt_and_what_follows_in_one_cache() -> None:
    """Chunks of a ragged prompt, then single tokens: each call appends to the cache, and attends to it."""
    kinds = {s: (Case("bf16", 4, 2, 32, ROPES["half"], s), Case("bf16", 4, 2, 32, ROPES["half"], s)) for s in ("S", 1)}
    for append, attending in kinds.values():
        append.append()
        attending.attend()
    kernels = {s: [kernel_of(case.kernel) for case in pair] for s, pair in kinds.items()}
    rng, start = np.random.default_rng(0), np.array([0, 5])
    held = tuple(rng.standard_normal((2, 96, 2, 32)).astype(DType.bf16.np) for _ in "kv")
    cache = DeviceCache.of(kinds[1][0].cache.type, TARGET, held)
    for tokens, s in ((40, "S"), (17, "S"), (1, 1), (1, 1), (1, 1)):
        qkv = rng.standard_normal((2, tokens, 256)).astype(DType.bf16.np)
        angles = rng.standard_normal((1, tokens, 32)).astype(np.float32)
        more = [start, np.cos(angles), np.sin(angles)]
        kernels[s][0]([qkv, cache, *more], {"B": 2, "S": tokens})
        (got,) = kernels[s][1]([qkv, cache, *more], {"B": 2, "S": tokens})
        (held,) = expected(kinds[s][0].kernel, [qkv, held, *more])
        (want,) = expected(kinds[s][1].kernel, [qkv, held, *more])
        compare(got, want, LIMIT["bf16"])
        start = start + tokens
    for mine, theirs in zip(cache.read(), held):
        compare(mine, theirs, LIMIT["bf16"])


# --- code -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [TARGET, "cuda{arch=sm_90a}"])
def test_kernels_of_an_8b_model_keep_to_registers(target: str) -> None:
    """32 heads of 128 in 8 groups: nothing spills, and two blocks fit a multiprocessor."""
    device = parse_target(target)
    for s in (1, "S"):
        case = Case("bf16", 32, 8, 128, (128, "half", 1), s)
        case.attend()
        code = EMITTER.emit(case.kernel, EMITTER.default_schedule(case.kernel, device), device, "k")
        for launch in code.device.launches:
            used = code.device.resources[launch.symbol]
            assert used["spills"] == 0
            assert 2 * launch.block * used["registers"] <= 65536
            assert 2 * launch.shared <= device.shared_bytes
            assert f" {launch.symbol}(" in code.device.source


def test_layout_reads_what_it_wrote() -> None:
    rng = np.random.default_rng(0)
    layout = CudaCacheLayout.of(KVType(2, 33, 20, 70, DType.bf16))
    keys, values = (rng.standard_normal((3, 40, 2, n)).astype(DType.bf16.np) for n in (33, 20))
    k, v = layout.write(keys, values)
    assert k.shape == (3, 2, 70, 33)
    assert (k[0].nbytes, v[0].nbytes) == (layout.k_bytes, layout.v_bytes)
    read_k, read_v = layout.read(k, v)
    assert np.array_equal(read_k[:, :40], keys)
    assert np.array_equal(read_v[:, :40], values)
    assert not read_k[:, 40:].astype(bool).any()


def test_refusals() -> None:
    device = parse_target(TARGET)

    def reason(function: Function) -> str | None:
        return EMITTER.match(function, device)

    def matched(kind: KVType) -> str | None:
        function = Function("k", kind="kernel")
        q = function.arg("q", TensorType((1, 1, kind.heads, kind.dim), DType.f32))
        cache, start = function.arg("cache", kind), function.arg("start", TensorType((1,), DType.i64))
        table = function.arg("table", TensorType((1, "T"), DType.i32)) if kind.page else None
        window = 2 if isinstance(kind.layout, Ring) else -1
        function.append(Return(function.append(ops.Attend(q, cache, start, table=table, window=window)).results))
        return reason(function)

    assert matched(KVType(1, 8, 8, 8, DType.f32)) is None
    assert matched(KVType(1, 8, 8, 8, DType.i4, Paged(32))) is None
    for more, why in (
        ({"dtype": DType.f32, "layout": Ring(4, 4)}, "on a GPU caches are contiguous or paged, not ring<4, 4>"),
        ({"dtype": DType.i2}, "on a GPU codes are i8 or i4, not i2"),
        ({"dtype": DType.i4, "keys": "channel"}, "on a GPU codes have scales by token; give keys=token"),
        ({"dtype": DType.i8, "layout": Paged(16), "summary": "minmax"}, "on a GPU caches have no summary"),
        ({"dtype": DType.i8, "recent": 8}, "on a GPU all tokens of a cache of codes are codes; give recent=0"),
    ):
        assert matched(KVType(1, 8, 8, 8, **more)).endswith(f">: {why}")
    assert reason(attention("f64", 1, 1, 8, 8)) == "no attention of f64"
    function = Function("k", kind="kernel")
    q = function.arg("q", TensorType((1, 9, 1, 8), DType.f32))
    function.append(Return(function.append(ops.Attention(q, q, q, causal=True, window=4, first=2)).results))
    assert reason(function) == "no kernel for the first 2 tokens beside a window"
    assert "bytes of shared memory" in reason(attention("f32", 1, 1, 4096, 512))
    function = attention("f32", 1, 1, 8, 8)
    function.body.pop()
    function.append(Return(function.append(ops.Exp(function.body[-1].result)).results))
    assert reason(function) == "the attention's result is used in the kernel"


@pytest.mark.parametrize(("function", "schedule", "reason"), [
    (attention("f32", 1, 1, 64, 64), "form=mma", "tensor cores multiply 16-bit floats of one type, not f32, f32, f32"),
    (attention("bf16", 1, 1, 264, 64), "form=mma", "heads too large for the registers"),
    (attention("bf16", 1, 1, 256, 256), "form=mma rows=128", "272 accumulators|320 accumulators"),
    (attention("f32", 1, 1, 256, 256), "form=plain rows=16 keys=128", "bytes of shared memory"),
    (attention("bf16", 1, 1, 64, 64), "form=mma rows=8", "not 2 rows"),
    (attention("bf16", 1, 1, 64, 64), "form=plain rows=64 warps=1", "64 rows for 32 threads"),
])
def test_schedules_that_do_not_suit_are_refused(function: Function, schedule: str, reason: str) -> None:
    with pytest.raises(CodegenError, match=reason):
        EMITTER.emit(function, parse_schedule(f"cuda_attention{{{schedule}}}"), parse_target(TARGET), "k")
