"""Creation, reduction, ordering, movement."""

import torch
import torch.nn.functional as F

from tests.ir_cases.case import INTS, Case, distinct, fixed, flags, integers, normal
from tilewright.ir import DType
from tilewright.ir import ops as o

ALL = (DType.f32, DType.bf16, DType.i64)
NAN = fixed([1.0, float("nan"), -2.0, 3.0, float("-inf"), float("inf")])


def indices(*shape: int, high: int) -> object:
    return integers(*shape, low=0, high=high, dtype=DType.i64)


def _index_put(accumulate: bool):
    def put(x, i, updates):
        return x.index_put(tuple(i), updates, accumulate=accumulate)

    return put


_REDUCE = [
    ("sum", lambda x, d, k: x.sum(d, keepdim=k)),
    ("mean", lambda x, d, k: x.mean(d, keepdim=k)),
    ("max", lambda x, d, k: x.amax(d, keepdim=k)),
    ("min", lambda x, d, k: x.amin(d, keepdim=k)),
]

CASES = [
    Case(o.Full, [], lambda: torch.full((2, 3), 1.5), {"shape": (2, 3), "value": 1.5, "dtype": DType.f32}, ALL[:1]),
    Case(o.Full, [], lambda: torch.tensor(True), {"shape": (), "value": True, "dtype": DType.bool}, ALL[:1], "scalar"),
    Case(o.Iota, [], lambda: torch.arange(5), {"length": 5, "dtype": DType.i64}, ALL[:1]),
    Case(
        o.Iota,
        [],
        lambda: torch.arange(3, -6, -2.0),
        {"length": 5, "dtype": DType.f32, "start": 3, "step": -2},
        ALL[:1],
        "step",
    ),
    Case(o.SizeOf, [], lambda: torch.tensor(7), {"value": 7}, ALL[:1]),
    *(
        Case(
            o.Reduce,
            [normal(3, 5, 7)],
            lambda x, f=f, a=a, k=k: f(x, a, k),
            {"fn": fn, "axes": a, "keepdim": k},
            note=f"{fn}-{a}-{k}",
        )
        for fn, f in _REDUCE
        for a, k in [((2,), False), ((0, 2), True), ((0, 1, 2), False)]
    ),
    Case(o.Reduce, [normal(3, 5)], lambda x: x.prod(1), {"fn": "prod", "axes": (1,)}, note="prod"),
    Case(o.Reduce, [integers(3, 5)], lambda x: x.sum(1, dtype=x.dtype), {"fn": "sum", "axes": (1,)}, INTS, "ints"),
    Case(o.Reduce, [flags(3, 2)], lambda x: x.any(1), {"fn": "any", "axes": (1,)}, (DType.bool,), "any"),
    Case(o.Reduce, [flags(3, 2)], lambda x: x.all(0), {"fn": "all", "axes": (0,)}, (DType.bool,), "all"),
    Case(o.Reduce, [NAN], lambda x: x.max(), {"fn": "max", "axes": (0,)}, note="nan"),
    Case(o.ArgMax, [distinct(3, 7)], lambda x: x.argmax(1), {"axis": 1}, ALL),
    Case(o.ArgMax, [distinct(3, 7)], lambda x: x.argmax(0, keepdim=True), {"axis": 0, "keepdim": True}, ALL, "keepdim"),
    Case(o.ArgMax, [fixed([1, 3, 3, 2])], lambda x: torch.tensor(1), {"axis": 0}, ALL, "first"),
    Case(o.CumSum, [normal(3, 9)], lambda x: x.cumsum(1), {"axis": 1}),
    Case(o.CumSum, [integers(3, 9)], lambda x: x.cumsum(0, dtype=x.dtype), {"axis": 0}, INTS, "ints"),
    *(
        Case(
            o.Sort,
            [x],
            lambda x, d=d: x.sort(dim=0, descending=d, stable=True),
            {"axis": 0, "descending": d},
            ALL,
            f"{n}-{d}",
        )
        for n, x in [("distinct", distinct(5, 3)), ("ties", integers(20, 2, low=0, high=4))]
        for d in (False, True)
    ),
    Case(
        o.Sort,
        [NAN],
        lambda x: x.sort(dim=0, descending=True, stable=True),
        {"axis": 0, "descending": True},
        note="nan",
    ),
    Case(
        o.Sort,
        [integers(9, low=0, high=256)],
        lambda x: x.sort(dim=0, descending=True, stable=True),
        {"axis": 0, "descending": True},
        (DType.u8,),
        "u8",
    ),
    Case(o.TopK, [distinct(4, 11)], lambda x: x.topk(3, 1), {"k": 3, "axis": 1}, ALL),
    Case(
        o.TopK,
        [distinct(4, 11)],
        lambda x: x.topk(2, 0, largest=False),
        {"k": 2, "axis": 0, "largest": False},
        ALL,
        "smallest",
    ),
    Case(o.TopK, [NAN], lambda x: x.topk(3), {"k": 3, "axis": 0}, note="nan"),
    Case(o.Reshape, [normal(3, 4, 5)], lambda x: x.reshape(5, 12), {"shape": (5, 12)}, ALL),
    Case(o.Transpose, [normal(3, 4, 5)], lambda x: x.permute(2, 0, 1), {"perm": (2, 0, 1)}, ALL),
    Case(o.Broadcast, [normal(3, 1)], lambda x: x.expand(2, 3, 4), {"shape": (2, 3, 4)}, ALL),
    Case(o.Slice, [normal(7, 5)], lambda x: x[1:6:2, 3:], {"starts": (1, 3), "stops": (6, 5), "steps": (2, 1)}, ALL),
    Case(o.Slice, [normal(7, 5)], lambda x: x[2:2], {"starts": (2, 0), "stops": (2, 5), "steps": (1, 1)}, ALL, "empty"),
    Case(o.Concat, [[normal(2, 3), normal(2, 1), normal(2, 4)]], lambda xs: torch.cat(xs, 1), {"axis": 1}, ALL),
    Case(
        o.Pad,
        [normal(3, 4)],
        lambda x: F.pad(x, (2, 0, 0, 1), value=-3),
        {"low": (0, 2), "high": (1, 0), "value": -3},
        ALL,
    ),
    Case(o.Gather, [normal(5, 3, 2), indices(4, 2, high=3)], lambda x, i: x[:, i], {"axis": 1}, ALL),
    Case(o.Gather, [normal(5), indices(high=5)], lambda x, i: x[i], {"axis": 0}, ALL, "scalar"),
    Case(o.TakeAlong, [normal(4, 6), indices(3, 8, high=6)], lambda x, i: x.gather(1, i), {"axis": 1}, ALL),
    Case(o.GatherND, [normal(4, 5, 3), [indices(2, 1, high=4), indices(6, high=5)]], lambda x, i: x[tuple(i)], {}, ALL),
    Case(o.GatherND, [normal(4), [indices(high=4)]], lambda x, i: x[tuple(i)], {}, ALL, "scalar"),
    Case(
        o.ScatterND,
        [normal(6, 4, 3), [fixed([0, 2, 5], DType.i64), fixed([1, 1, 3], DType.i64)], normal(3, 3)],
        _index_put(False),
        {},
        ALL,
    ),
    Case(
        o.ScatterND,
        [normal(5, 3), [indices(40, high=5)], normal(40, 3)],
        _index_put(True),
        {"accumulate": True},
        ALL,
        "accumulate",
    ),
    Case(
        o.ScatterAlong,
        [normal(4, 6), fixed([[0, 2], [5, 1], [3, 3]][:2], DType.i64), normal(3, 4)],
        lambda x, i, s: x.scatter(1, i, s),
        {"axis": 1},
        ALL,
    ),
]
