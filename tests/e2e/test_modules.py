"""Modules as people write them, compiled, give what eager PyTorch gives: values, types, shapes, structure."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tilewright

TOLERANCE = {torch.float16: 2e-3, torch.float32: 1e-5, torch.float64: 1e-12}


class Function(nn.Module):
    """``fn`` of two tensors at the most, as a module."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        return self.fn(x) if y is None else self.fn(x, y)


@dataclass(frozen=True)
class Case:
    """A module, shapes of its inputs (the first one is traced), and which axes vary."""

    module: Callable[[], nn.Module]
    shapes: tuple[tuple[tuple[int, ...], ...], ...]
    dynamic: dict[str, dict[int, str]] = field(default_factory=dict)
    draw: Callable[[tuple[int, ...]], Tensor] = torch.randn


def fn(function: Callable[..., Any], *shapes: Any, draw: Any = torch.randn, **dynamic: dict[int, str]) -> Case:
    """Shapes: of one call, or lists of the shapes of several."""
    calls = tuple(tuple(s) for s in shapes) if isinstance(shapes[0], list) else (shapes,)
    return Case(lambda: Function(function), calls, dynamic, draw)


def module(make: Callable[[], nn.Module], *shapes: tuple[int, ...], draw: Any = torch.randn, **dynamic: Any) -> Case:
    """Shapes: of the one input, call by call."""
    return Case(make, tuple((s,) for s in shapes), dynamic, draw)


def integers(low: int, high: int, dtype: torch.dtype = torch.int64) -> Callable[[tuple[int, ...]], Tensor]:
    return lambda shape: torch.randint(low, high, shape, dtype=dtype)


ROWS = {"input": {0: "B"}}
CASES: dict[str, Case] = {
    # recurrences, attention
    "lstm": module(lambda: First(nn.LSTM(8, 16, batch_first=True)), (3, 7, 8), (2, 7, 8), x={0: "B"}),
    "gru": module(lambda: First(nn.GRU(8, 16, batch_first=True)), (3, 7, 8)),
    "encoder layer": module(lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), (3, 7, 32), (2, 9, 32),
                            src={0: "B", 1: "S"}),
    "multihead attention": module(lambda: Attend(), (3, 7, 32), (2, 9, 32), x={0: "B", 1: "S"}),
    # images
    "group norm": module(lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.SiLU()), (2, 4, 9, 9),
                         (5, 4, 9, 9), **ROWS),
    "transposed conv": module(lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1), (2, 4, 5, 6)),
    "depthwise conv": module(lambda: nn.Conv2d(8, 8, 3, groups=8, padding=1), (2, 8, 7, 7)),
    "dilated conv": module(lambda: nn.Conv1d(8, 6, 5, stride=2, dilation=2), (2, 8, 33)),
    "conv3d": module(lambda: nn.Conv3d(3, 6, 3), (2, 3, 6, 7, 8)),
    "bilinear": module(lambda: nn.Upsample(scale_factor=2, mode="bilinear"), (2, 3, 5, 6)),
    "adaptive pool": module(lambda: nn.AdaptiveAvgPool2d((3, 2)), (2, 3, 7, 6)),
    "pixel shuffle": module(lambda: nn.PixelShuffle(2), (2, 8, 3, 5)),
    # linear algebra, sizes that divide by nothing
    "odd linear": module(lambda: nn.Linear(33, 17), (2, 33), (1, 33), (7, 33), (1000, 33), **ROWS),
    "wide linear": module(lambda: nn.Linear(3000, 700), (2, 3000), (1, 3000), (129, 3000), **ROWS),
    "batched product": fn(lambda x, y: x @ y, [(3, 4, 5), (3, 5, 6)], [(3, 9, 5), (3, 5, 2)], x={1: "S"}, y={2: "T"}),
    "einsum": fn(lambda x, y: torch.einsum("bij,bkj->bik", x, y), (2, 3, 4), (2, 5, 4)),
    "matrix vector": fn(lambda x, y: x @ y, (4, 5), (5,)),
    # moves and sizes
    "merged axes": fn(lambda x: x.reshape(x.shape[0] * x.shape[1], -1), [(5, 6, 3)], [(2, 9, 3)], x={0: "A", 1: "B"}),
    "concatenation": fn(lambda x, y: torch.cat([x, y], 1), [(2, 6, 3), (2, 4, 3)], [(2, 1, 3), (2, 9, 3)],
                        x={1: "A"}, y={1: "B"}),
    "roll and flip": fn(lambda x: x.roll(2, 1).flip(0), (2, 8, 5)),
    "reflection": fn(lambda x: F.pad(x, (1, 2), mode="reflect"), (2, 8, 5)),
    # reductions, orders
    "running sum": fn(lambda x: x.cumsum(1), [(4, 9, 3)], [(2, 17, 3)], x={0: "B", 1: "S"}),
    "largest": fn(lambda x: x.topk(3, dim=-1), [(4, 9)], [(2, 9)], x={0: "B"}),
    "sorted": fn(lambda x: x.sort(dim=1, descending=True), (4, 9)),
    "variance": fn(lambda x: (x.var(-1), x.logsumexp(-1), x.log_softmax(1), F.normalize(x, dim=-1)), (2, 8, 5)),
    "one number": fn(lambda x: x.sum(), (5, 6)),
    # element types
    "integers": fn(lambda x: (x // 3) * 2 - (x % 5), (17,), draw=integers(-40, 40)),
    "32-bit integers": fn(lambda x: x + x, (9,), draw=integers(-9, 9, torch.int32)),
    "bytes": fn(lambda x: x.float() / 255, (250,), draw=integers(0, 256, torch.uint8)),
    "flags": fn(lambda x: (x > 0) & (x < 1), (50,)),
    "doubles": fn(lambda x: (x @ x.T).softmax(-1), (5, 6), draw=lambda s: torch.randn(s).double()),
    "halves": module(lambda: nn.Linear(8, 8).half(), (5, 8), draw=lambda s: torch.randn(s).half()),
    "rounding": fn(lambda x: ((x * 5).round(), x.floor(), x.ceil(), x.trunc()), (30, 4)),
    "powers": fn(lambda x: (x.abs() ** 1.7, x**2, x**3, 2**x), (3, 4)),
    # what is returned
    "identity": fn(lambda x: x, (5, 6)),
    "a constant": fn(lambda x: (x, torch.ones(2, 2)), (5, 6)),
    "one value twice": fn(lambda x: (x * 2, x * 2, x), (3, 4)),
    "a dict": fn(lambda x: {"a b": x + 1, "loss-1": x - 1, "2": x}, (3, 4)),
    "nested": fn(lambda x: (x.argmax(-1), x.max(1), [x, (x + 1,)]), (4, 8, 5)),
    "names that meet": fn(lambda x: {"a.b": x, "a_b": x + 1, "a": {"b": x + 2}}, (3, 4)),
}  # fmt: skip


class First(nn.Module):
    """The first result of a recurrent layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x)[0]


def flat(value: Any) -> list[Tensor]:
    """The tensors of nested results, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [t for v in (value.values() if isinstance(value, dict) else value) for t in flat(v)]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_module(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    model = case.module().eval()
    calls = [[case.draw(shape) for shape in shapes] for shapes in case.shapes]
    compiled = tilewright.compile(model, calls[0], dynamic=case.dynamic or None)
    assert compiled.report.fallbacks == []
    for inputs in calls:
        kept = [x.clone() for x in inputs]
        got, want = flat(compiled(*inputs)), flat(model(*inputs))
        assert len(got) == len(want)
        for a, b in zip(got, want):
            tolerance = TOLERANCE.get(b.dtype, 0)
            scale = float(b.abs().max()) if b.dtype.is_floating_point else 1
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(scale, 1))
        assert all(map(torch.equal, inputs, kept)), "the inputs are the caller's"


def test_inputs_may_be_nested() -> None:
    class Nested(nn.Module):
        def forward(self, pair: tuple[Tensor, Tensor], more: dict[str, Tensor]) -> Tensor:
            return pair[0] * more["k"] + pair[1]

    pair, more = (torch.randn(2, 3), torch.randn(3)), {"k": torch.randn(2, 3)}
    compiled = tilewright.compile(Nested(), (pair, more))
    torch.testing.assert_close(compiled(*pair, more["k"]), Nested()(pair, more))


def test_arrays_of_any_memory_order() -> None:
    layer = nn.Linear(4, 3).requires_grad_(False)
    compiled = tilewright.compile(layer, (torch.ones(2, 4),), dynamic=ROWS)
    base = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    read_only = base.T.copy()
    read_only.setflags(write=False)
    for array in (base.T, base.T[::-1], np.asfortranarray(base.T), base.T[::2], read_only, base.T.tolist()):
        want = layer(torch.tensor(np.array(array, np.float32))).numpy()
        np.testing.assert_allclose(compiled(array), want, rtol=0, atol=1e-6)
    tensor = torch.from_numpy(base).T
    assert isinstance(compiled(tensor), Tensor)
    torch.testing.assert_close(compiled(input=tensor), layer(tensor))


def test_an_input_is_given_once() -> None:
    compiled = tilewright.compile(nn.Identity(), (torch.ones(2),))
    with pytest.raises(tilewright.TilewrightError, match="forward got input twice"):
        compiled(torch.ones(2), input=torch.ones(2))


def test_dropout_is_off_and_the_model_stays_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    compiled = tilewright.compile(model, (torch.ones(2, 4),))
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    x = torch.randn(2, 4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model.eval()(x))


def test_one_compiled_model_in_many_threads() -> None:
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128)).requires_grad_(False)
    compiled = tilewright.compile(model, (torch.randn(4, 128),), dynamic=ROWS)
    wrong: list[int] = []

    def work(seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        for i in range(20):
            x = torch.randn(1 + (seed * 7 + i) % 9, 128, generator=rng)
            if not torch.allclose(compiled(x), model(x), atol=1e-4):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_saved_artifact_outlives_what_it_was_saved_from(tmp_path: Any) -> None:
    layer, x = nn.Linear(4, 3).requires_grad_(False), torch.randn(2, 4)
    compiled = tilewright.compile(layer, (x,))
    home = compiled.path
    assert compiled.save(tmp_path / "a") == tmp_path / "a"
    program = tilewright.load(tmp_path / "a")
    compiled.save(tmp_path / "a")  # over itself, while it is loaded
    del compiled
    assert not home.exists(), "the temporary folder goes with its owner"
    with program.session() as session:
        (got,) = session("forward", input=x.numpy()).values()
    np.testing.assert_allclose(got, layer(x).numpy(), rtol=0, atol=1e-6)
