"""Every entry of the ATen table: traced with varying sizes, interpreted, compared with torch."""

from inspect import signature

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tilewright.frontend import trace
from tilewright.ir import interpret


class Call(nn.Module):
    """A module of functions: all their results, so that one trace serves many."""

    def __init__(self, *fns):
        super().__init__()
        self.fns = fns

    def forward(self, *args):
        return [leaf for fn in self.fns for leaf in leaves(fn(*args))]


def leaves(value):
    return list(value) if isinstance(value, (tuple, list)) else [value]


def in_groups(fns, size=12):
    return [fns[i : i + size] for i in range(0, len(fns), size)]


def compare(fns, *shapes, sizes=({"B": 3, "S": 5}, {"B": 2, "S": 7}, {"B": 1, "S": 4}), ints=False, tolerance=1e-5):
    """Trace at the first sizes and compare at all of them; ``shapes`` of the inputs use the sizes' names."""
    module = fns if isinstance(fns, nn.Module) else Call(*(fns if isinstance(fns, list) else [fns]))
    first = [make(s, sizes[0], ints, i) for i, s in enumerate(shapes)]
    axes = [{a: d for a, d in enumerate(s) if isinstance(d, str)} for s in shapes]
    names = {"args": axes} if isinstance(module, Call) else {"input": axes[0]}
    traced = trace(module.eval(), tuple(first), dynamic=names)
    assert all(op.loc.module for op in traced.ops())
    for at in sizes:
        inputs = [make(s, at, ints, i) for i, s in enumerate(shapes)]
        with torch.no_grad():
            want = leaves(module(*inputs))
        got = interpret(traced, "forward", [x.numpy() for x in inputs])
        assert len(want) == len(got)
        for i, (w, g) in enumerate(zip(want, got)):
            assert tuple(w.shape) == g.shape, f"result {i}"
            assert str(w.dtype).split(".")[1] == str(g.dtype), f"result {i}"
            np.testing.assert_allclose(g, w.numpy(), rtol=tolerance, atol=tolerance, err_msg=f"result {i}")
    return traced


def make(shape, at, ints, seed):
    rng = torch.Generator().manual_seed(seed)
    dims = [at.get(d, d) for d in shape]
    return torch.randint(-5, 6, dims, generator=rng) if ints else torch.randn(dims, generator=rng)


UNARY = [
    torch.neg, torch.abs, torch.sign, torch.exp, torch.sqrt, torch.rsqrt, torch.reciprocal, torch.sin, torch.cos,
    torch.tanh, torch.sigmoid, torch.erf, torch.floor, torch.ceil, torch.round, torch.trunc, torch.square, torch.expm1,
    torch.log1p, torch.tan, torch.sinh, torch.cosh, torch.exp2, torch.isnan, torch.logical_not, torch.nan_to_num,
    F.relu, F.silu, F.gelu, F.softplus, F.hardtanh, F.leaky_relu, F.elu, F.selu, F.celu, F.mish, F.relu6, F.hardswish,
    F.hardsigmoid, F.softsign, F.tanhshrink, F.logsigmoid,
    lambda x: F.gelu(x, approximate="tanh"), lambda x: F.softplus(x, beta=2.0), lambda x: torch.log(x.abs() + 1),
    lambda x: torch.log2(x.abs() + 1), lambda x: torch.log10(x.abs() + 1), lambda x: torch.isinf(1 / x.round()),
    lambda x: x.clamp(-0.5), lambda x: x.clamp(max=0.5), lambda x: x.clamp(-0.5, 0.5),
    lambda x: x**2, lambda x: x**3, lambda x: x.abs() ** 0.5, lambda x: x.abs() ** -0.5, lambda x: x.abs() ** 1.7,
    lambda x: x**-1, lambda x: x**1, lambda x: 2**x, lambda x: x.pow(x.round().abs()),
    lambda x: x.to(torch.float64), lambda x: (x * 3).to(torch.int32), lambda x: x.bool(),
    lambda x: x.double().type_as(x),
    lambda x: F.glu(x), lambda x: F.dropout(x, 0.5, False), lambda x: F.normalize(x, dim=-1),
    lambda x: x.clone().detach(),
]  # fmt: skip


@pytest.mark.parametrize("fns", in_groups(UNARY))
def test_one_operand(fns):
    compare(fns, ("B", "S", 4))


BINARY = [
    lambda x, y: x + y, lambda x, y: x - y, lambda x, y: x * y, lambda x, y: x / y, torch.maximum, torch.minimum,
    lambda x, y: torch.add(x, y, alpha=2), lambda x, y: torch.sub(x, y, alpha=0.5), lambda x, y: torch.rsub(x, y),
    lambda x, y: torch.div(x, y, rounding_mode="floor"), lambda x, y: torch.div(x, y, rounding_mode="trunc"),
    torch.remainder, torch.fmod, lambda x, y: x // y, lambda x, y: 2 - x + y, lambda x, y: (1 / x) * y,
    lambda x, y: (x < y) & (x > -1) | (y == x), lambda x, y: (x <= y) ^ (x >= 0), lambda x, y: x != y,
    lambda x, y: torch.logical_and(x, y > 0), lambda x, y: torch.logical_or(x > 0, y > 0),
    lambda x, y: torch.where(x > 0, x, y), lambda x, y: torch.where(x > 0, x, 0.0),
    lambda x, y: torch.where(x > 0, 1, y),
    lambda x, y: x.masked_fill(y > 0, -1.5), lambda x, y: torch.addcmul(x, x, y), lambda x, y: torch.lerp(x, y, 0.3),
    lambda x, y: x.clamp(min=y), lambda x, y: F.mse_loss(x, x + y), lambda x, y: x + y.long(), lambda x, y: x > 0.5,
]  # fmt: skip


@pytest.mark.parametrize("fns", in_groups(BINARY))
def test_two_operands(fns):
    compare(fns, ("B", "S", 4), ("B", 1, 4))


INTEGER = [
    lambda x: x + 1, lambda x: x * 2.5, lambda x: x / 2, lambda x: x // 3, lambda x: x % 3, lambda x: -x,
    lambda x: x > 0,
    lambda x: x.sum(), lambda x: x.float().mean(), lambda x: (x > 0).sum(-1), lambda x: x.cumsum(0), lambda x: x & 3,
    lambda x: (x > 0).cumsum(-1), lambda x: torch.div(x, 2, rounding_mode="trunc"), lambda x: x.max(), lambda x: ~x,
    lambda x: x.clamp(0, 3), lambda x: torch.exp(x), lambda x: F.one_hot(x.abs(), 6), lambda x: x | 1,
    lambda x: x > 0.5,
    lambda x: torch.arange(10)[x.abs()], lambda x: x * True, lambda x: x.bool() + x.bool(), lambda x: x.abs() ** 2,
]  # fmt: skip


@pytest.mark.parametrize("fns", in_groups(INTEGER))
def test_integers(fns):
    compare(fns, ("B", 4), ints=True)


REDUCE = [
    lambda x: x.sum(), lambda x: x.sum(-1), lambda x: x.sum((0, 2), keepdim=True), lambda x: x.mean(1),
    lambda x: x.mean(),
    lambda x: x.prod(), lambda x: x.prod(2), lambda x: x.amax(-1), lambda x: x.amin((0, 1)), lambda x: x.max(),
    lambda x: x.max(1), lambda x: x.min(2, keepdim=True), lambda x: x.argmax(-1), lambda x: x.argmax(),
    lambda x: x.argmin(1),
    lambda x: (x > 0).any(), lambda x: (x > -9).all(-1), lambda x: x.var(-1), lambda x: x.std(2, keepdim=True),
    lambda x: x.var(2, unbiased=False), lambda x: torch.var_mean(x, 2), lambda x: x.norm(dim=-1),
    lambda x: x.norm(p=1, dim=2),
    lambda x: torch.linalg.vector_norm(x, ord=3, dim=-1),
    lambda x: torch.linalg.vector_norm(x, ord=float("inf"), dim=2),
    lambda x: x.cumsum(1), lambda x: x.sort(-1), lambda x: x.sort(1, descending=True), lambda x: x.argsort(2),
    lambda x: x.topk(2), lambda x: x.topk(2, dim=1, largest=False), lambda x: torch.logsumexp(x, -1),
    lambda x: x.aminmax(dim=2),
    lambda x: F.softmax(x, 1), lambda x: F.log_softmax(x, -1), lambda x: F.softmin(x, 2),
    lambda x: torch.diff(x, dim=1),
    lambda x: F.softmax(x, -1, dtype=torch.float64), lambda x: x.mean((1, 2)),
]  # fmt: skip


@pytest.mark.parametrize("fns", in_groups(REDUCE))
def test_reductions(fns):
    compare(fns, ("B", "S", 4))


MOVE = [
    lambda x: x.view(x.shape[0], -1), lambda x: x.reshape(-1, 4), lambda x: x.flatten(1),
    lambda x: x.unflatten(2, (2, 2)),
    lambda x: x.unsqueeze(1).squeeze(1), lambda x: x[:, :, None].expand(-1, -1, 3, -1), lambda x: x.transpose(0, 1),
    lambda x: x.permute(2, 0, 1), lambda x: x.movedim(2, 0), lambda x: x.mT, lambda x: x.swapaxes(0, 2),
    lambda x: x[0],
    lambda x: x[:, -1], lambda x: x[..., 1:3], lambda x: x[..., ::2], lambda x: x[:, 1:], lambda x: x[:, :-1],
    lambda x: x[:, -2:],
    lambda x: x[:, :2], lambda x: x[..., -100:2], lambda x: x.narrow(2, 1, 2), lambda x: x.split(2, -1),
    lambda x: x.chunk(3, -1),
    lambda x: x.split([1, 3], 2), lambda x: x.unbind(2), lambda x: torch.cat([x, x * 2], 1),
    lambda x: torch.stack([x, -x], 1),
    lambda x: x.repeat(2, 1, 3), lambda x: x.repeat(2, 1, 1, 1), lambda x: x.tile((2,)),
    lambda x: x.repeat_interleave(2, 1),
    lambda x: x.repeat_interleave(3), lambda x: x.flip(1), lambda x: x.flip((0, 2)), lambda x: x.roll(1, 1),
    lambda x: x.roll(-1, 2),
    lambda x: F.pad(x, (1, 2)), lambda x: F.pad(x, (1, 2, 0, 1), value=3.0), lambda x: F.pad(x, (-1, 1)),
    lambda x: F.pad(x, (2, 1), mode="reflect"), lambda x: F.pad(x, (2, 1), mode="replicate"),
    lambda x: F.pad(x, (2, 1), mode="circular"),
    lambda x: torch.tril(x), lambda x: torch.triu(x, 1), lambda x: torch.tril(x, -1),
    lambda x: x.expand_as(torch.cat([x])),
    lambda x: torch.atleast_3d(x), lambda x: x.index_select(2, torch.tensor([3, 0])), lambda x: x[:, :, [0, -1]],
    lambda x: x[torch.arange(x.shape[0])[:, None], torch.arange(2)],
    lambda x: x[:, torch.tensor([0, 1]), torch.tensor([[1], [-1]])],
    lambda x: x[torch.tensor([0, 0]), :, torch.tensor([1, 2])], lambda x: x.gather(2, (x > 0).long()),
    lambda x: x.scatter(2, (x[..., :1] > 0).long(), 9.0),
    lambda x: x.scatter(2, (x[..., :1] > 0).long(), x[..., :1] + 1),
    lambda x: x.scatter_add(2, (x > 0).long(), x),
    lambda x: x.index_add(0, torch.tensor([0, 0]), torch.ones(2, *x.shape[1:])),
    lambda x: x.index_put((torch.tensor([0]),), torch.tensor(5.0)), lambda x: x.new_zeros(x.shape),
    lambda x: torch.ones_like(x),
    lambda x: x.new_full((2, x.shape[1]), 3), lambda x: torch.full((x.shape[0],), 2.0),
    lambda x: torch.eye(3) + x.new_ones(3, 1),
    lambda x: torch.arange(x.shape[1]), lambda x: torch.arange(1, x.shape[1] + 1, 2),
    lambda x: torch.arange(0, 1, 0.25) * x,
    lambda x: torch.linspace(0, 1, 4) + x, lambda x: x * x.shape[1], lambda x: x / x.shape[0],
    lambda x: F.pixel_shuffle(x[:, None, :, :4].repeat(1, 4, 1, 1), 2),
    lambda x: torch.meshgrid(torch.arange(x.shape[0]), torch.arange(2), indexing="ij")[0],
   
]  # fmt: skip


@pytest.mark.parametrize("fns", in_groups(MOVE))
def test_moves(fns):
    compare(fns, ("B", "S", 4))


def test_take_along_dim():
    compare(lambda x: torch.take_along_dim(x, x.argsort(2)[:1], 2), (3, 5, 4), sizes=({},))


def test_numbers_computed_from_sizes():
    compare(
        [
            lambda x: x * x.shape[1] ** -0.5,
            lambda x: x / torch.sym_sqrt(x.shape[1]),
            lambda x: x * (x.shape[0] / x.shape[1] + 0.5),
            lambda x: x.sum(1) * (1.0 / (x.shape[1] + 1)),
            lambda x: torch.full((2,), x.shape[1] / 2) + x.mean() * 0,
            lambda x: x + x.shape[0] * x.shape[1],
        ],
        ("B", "S", 4),
    )


def test_in_place():
    def fn(x):
        y = x * 2
        y[:, 0] = 1.0
        y[:, 1:3] += 3
        y[..., 2].mul_(2)
        y[y > 4] = 0.5
        return y.add_(1).relu_()

    compare(fn, ("B", "S", 4))


PRODUCTS = [
    (lambda x, y: x @ y, ("B", "S", 4), (4, 6)), (lambda x, y: x @ y, ("B", "S", 4), ("B", 4, 6)),
    (lambda x, y: x @ y.mT, ("B", "S", 4), ("B", 1, 4)), (lambda x, y: torch.bmm(x, y), ("B", "S", 4), ("B", 4, 6)),
    (lambda x, y: x @ y, ("B", "S", 4), (4,)), (lambda x, y: x @ y, (4,), (4, 3)), (lambda x, y: x @ y, (4,), (4,)),
    (lambda x, y: torch.mv(x, y), ("B", 4), (4,)), (lambda x, y: torch.outer(x, y), ("B",), ("S",)),
    (lambda x, y: torch.einsum("bsd,dk->bsk", x, y), ("B", "S", 4), (4, 6)),
    (lambda x, y: torch.einsum("bsd,btd->bst", x, y), ("B", "S", 4), ("B", "S", 4)),
    (lambda x, y: torch.einsum("bhqd,bhkd->bhqk", x, y), ("B", 2, "S", 4), ("B", 2, "S", 4)),
    (lambda x, y: torch.tensordot(x, y, 1), ("B", "S", 4), (4, 6)),
    (lambda x, y: torch.baddbmm(y, x, x.mT, alpha=0.5), ("B", "S", 4), ("B", "S", "S")),
    (lambda x, y: torch.addmm(y, x, x.t(), beta=2), ("B", 4), ("B", "B")),
    (lambda x, y: F.cosine_similarity(x, y), ("B", 4), ("B", 4)),
    (lambda x, y: F.linear(x, y), ("B", "S", 4), (6, 4)),
    (lambda x, y: F.scaled_dot_product_attention(x, y, y), ("B", 2, "S", 4), ("B", 2, 3, 4)),
    (lambda x, y: F.scaled_dot_product_attention(x, x, y, is_causal=True), ("B", 2, "S", 4), ("B", 2, "S", 4)),
    (lambda x, y: F.scaled_dot_product_attention(x, y, y, is_causal=True), ("B", 2, "S", 4), ("B", 2, 3, 4)),
    (lambda x, y: F.scaled_dot_product_attention(x, y, y, y.mean(-1)[:, :, None] > 0), ("B", 2, "S", 4), ("B", 2, 3, 4)),
    (lambda x, y: F.scaled_dot_product_attention(x, y, y, y.mean(-1)[:, None]), ("B", "S", 4), ("B", 3, 4)),
    (lambda x, y: F.scaled_dot_product_attention(x, y, y, enable_gqa=True), ("B", 4, "S", 4), ("B", 2, 3, 4)),
]  # fmt: skip


@pytest.mark.parametrize(("fn", "x", "y"), PRODUCTS, ids=range(len(PRODUCTS)))
def test_products(fn, x, y):
    compare(fn, x, y, sizes=({"B": 3, "S": 5}, {"B": 2, "S": 7}))


IMAGE = [
    nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), nn.Conv2d(4, 8, 3, groups=4, dilation=2),
    nn.Conv2d(4, 6, 2, padding="same"), nn.Conv2d(4, 6, 3, padding="valid"), nn.ConvTranspose2d(4, 6, 3, 2, 1, 1),
    nn.BatchNorm2d(4),
    nn.BatchNorm2d(4, affine=False), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True), nn.MaxPool2d(2),
    nn.MaxPool2d(3, 2, 1),
    nn.AvgPool2d(2), nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.AdaptiveAvgPool2d(1),
    nn.AdaptiveAvgPool2d((3, 2)),
    nn.PReLU(4), nn.ReflectionPad2d(1), nn.ReplicationPad2d(2), nn.ZeroPad2d(1), nn.LocalResponseNorm(2),
    nn.Softmax2d(),
    nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), nn.PixelUnshuffle(2), nn.ChannelShuffle(2),
    nn.LPPool2d(2, 2),
]  # fmt: skip


@pytest.mark.parametrize("layer", IMAGE, ids=lambda m: type(m).__name__)
def test_image_layers(layer):
    torch.manual_seed(0)
    for buffer in layer.buffers():
        buffer.add_(torch.rand(buffer.shape).to(buffer.dtype))
    compare(layer, ("B", 4, 8, 12), sizes=({"B": 3}, {"B": 1}), tolerance=1e-4)


def test_image_layers_of_varying_size():
    layers = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.MaxPool2d(3, 2, 1), nn.Conv2d(6, 6, 3, padding=1), nn.Flatten(2))
    compare(layers, ("B", 4, "H", "W"), sizes=({"B": 3, "H": 16, "W": 12}, {"B": 1, "H": 9, "W": 21}))


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_upsample(mode):
    compare(lambda x: F.interpolate(x, size=(9, 7), mode=mode), ("B", 2, 4, 5), sizes=({"B": 3}, {"B": 1}))
    compare(lambda x: F.interpolate(x, scale_factor=2, mode=mode), ("B", 2, 4, 5), sizes=({"B": 3}, {"B": 1}))


SEQUENCE = [
    nn.LayerNorm(4), nn.LayerNorm(4, elementwise_affine=False), nn.RMSNorm(4), nn.Linear(4, 3), nn.Conv1d(5, 2, 3),
    nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.TransformerEncoderLayer(4, 2, 8, norm_first=True),
    nn.Dropout(),
    nn.LSTM(4, 3, batch_first=True), nn.GRU(4, 3, num_layers=2, batch_first=True), nn.AvgPool1d(2), nn.MaxPool1d(2),
    nn.Identity(),
    nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2), nn.Unflatten(2, (2, 2)),
    nn.AdaptiveAvgPool1d(1),
]  # fmt: skip


@pytest.mark.parametrize("layer", SEQUENCE, ids=lambda m: type(m).__name__)
def test_sequence_layers(layer):
    name = next(iter(signature(layer.forward).parameters))
    x = torch.randn(3, 5, 4)
    traced = trace(layer, (x,), dynamic={name: {0: "B"}})
    for batch in (3, 1, 4):
        x = torch.randn(batch, 5, 4)
        with torch.no_grad():
            want = layer.eval()(x)
        want = want[0] if isinstance(want, tuple) else want
        np.testing.assert_allclose(interpret(traced, "forward", [x.numpy()])[0], want.numpy(), atol=1e-5)


def test_attention_module():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0], self.attention(x, x, x)[1]

    model = Model()
    traced = trace(model, (torch.randn(3, 5, 8),), dynamic={"x": {0: "B", 1: "S"}})
    x = torch.randn(2, 7, 8)
    for got, want in zip(interpret(traced, "forward", [x.numpy()]), model.eval()(x)):
        np.testing.assert_allclose(got, want.detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types(dtype):
    """Constants are not rounded to a narrow type before use, as torch does not."""
    from tilewright.frontend.table import numpy_of

    model = Call(lambda x: (x * 0.1 + 1.3) / 3.7)
    x = torch.randn(4, 8).to(dtype)
    got = interpret(trace(model, (x,)), "forward", [numpy_of(x)])[0]
    want = model(x)[0]
    np.testing.assert_array_equal(got, numpy_of(want))


def test_conv1d_layer_of_gpt2_becomes_a_linear_layer():
    from tilewright.ir import ops

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6))

        def forward(self, x):
            return torch.addmm(self.bias, x, self.weight) + x @ self.weight

    model = Model()
    traced = trace(model, (torch.randn(3, 4),))
    assert len(list(traced.ops(ops.Linear))) == 2
    assert list(traced.weights) == ["bias", "weight.T"]
    x = torch.randn(3, 4)
    np.testing.assert_allclose(interpret(traced, "forward", [x.numpy()])[0], model(x).detach().numpy(), atol=1e-5)
