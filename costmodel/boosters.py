"""XGBoost, as far as it is used here: boosted trees trained the same every time, and kept as plain tables.

The file of a model holds the tables of its trees and nothing else of XGBoost's own format. They are checked before
XGBoost sees them, since it trusts what it loads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tilewright.costmodel.features import Floats

Matrix = NDArray[np.float32]
Objective = Literal["reg:squarederror", "rank:pairwise"]
_NAMES = {
    "left": "left_children",
    "right": "right_children",
    "feature": "split_indices",
    "value": "split_conditions",
    "missing_left": "default_left",
}
_ROOT = 2147483647  # XGBoost's parent of a root


@dataclass(frozen=True)
class Growth:
    """How trees are grown: how many, how deep, how much each corrects, and what share of rows and columns it sees."""

    rounds: int = 200
    depth: int = 6
    rate: float = 0.1
    rows: float = 0.8
    columns: float = 0.6
    least: float = 2.0  # rows in a leaf
    shrink: float = 1.0  # L2 on leaves
    bins: int = 128


def train(
    growth: Growth,
    matrix: Matrix,
    target: Floats,
    *,
    seed: int = 0,
    objective: Objective = "reg:squarederror",
    weights: Floats | None = None,
    groups: Sequence[int] | None = None,
    margin: Floats | None = None,
) -> Trees:
    """Trees for ``target``, or for what ``margin`` leaves of it; ``groups`` are lengths, for ranking only."""
    import xgboost

    data = xgboost.DMatrix(matrix, label=target, weight=weights, base_margin=margin, nthread=1)
    if groups is not None:
        data.set_group(groups)
    params = {
        "objective": objective,
        "base_score": 0.0,
        "tree_method": "hist",
        "max_bin": growth.bins,
        "max_depth": growth.depth,
        "eta": growth.rate,
        "subsample": growth.rows,
        "colsample_bynode": growth.columns,
        "min_child_weight": growth.least if objective == "reg:squarederror" else 0.0,
        "lambda": growth.shrink,
        "seed": seed,
        "nthread": 1,
        "verbosity": 0,
    }
    if objective == "rank:pairwise":
        params |= {"lambdarank_pair_method": "mean", "lambdarank_num_pair_per_sample": 4}
    return Trees.of(xgboost.train(params, data, growth.rounds), matrix.shape[1])


@dataclass(frozen=True)
class Trees:
    """Trained trees over ``width`` features.

    ``table`` has a line for each node of each tree, and ``sizes``, the lines of the trees. Children are counted within
    their tree, -1 at leaves; ``value`` is what a leaf adds, or where a split is.
    """

    table: Mapping[str, list[Any]]
    width: int

    @classmethod
    def of(cls, booster: Any, width: int) -> Trees:
        """What a booster learned."""
        trees = json.loads(booster.save_raw("json"))["learner"]["gradient_booster"]["model"]["trees"]
        columns = {name: [entry for tree in trees for entry in tree[theirs]] for name, theirs in _NAMES.items()}
        return cls({"sizes": [len(tree["left_children"]) for tree in trees], **columns}, width)

    @classmethod
    def checked(cls, table: Mapping[str, Any], width: int) -> Trees:
        """Trees of a table from a file. Raises KeyError, TypeError or ValueError for one that is none."""
        _parents(table, width)
        return cls({name: list(table[name]) for name in ("sizes", *_NAMES)}, width)

    def predict(self, matrix: Matrix) -> Floats:
        """The sum of the trees, one value a row."""
        if not len(matrix):
            return np.zeros(0)
        return np.asarray(self._booster.inplace_predict(matrix, predict_type="margin"), dtype=np.float64)

    @cached_property
    def _booster(self) -> Any:
        import xgboost

        booster = xgboost.Booster({"nthread": 1})
        booster.load_model(bytearray(json.dumps(_model(self.table, self.width)).encode()))
        return booster


def _model(table: Mapping[str, list[Any]], width: int) -> dict[str, Any]:
    """A model as XGBoost writes it."""
    count = len(table["sizes"])
    forest = {
        "cats": {"enc": [], "feature_segments": [], "sorted_idx": []},
        "gbtree_model_param": {"num_parallel_tree": "1", "num_trees": str(count)},
        "iteration_indptr": list(range(count + 1)),
        "tree_info": [0] * count,
        "trees": list(_trees({**table, "value": [float(v) for v in table["value"]]}, _parents(table, width), width)),
    }
    parameters = {
        "base_score": "[0E0]",
        "boost_from_average": "0",
        "num_class": "0",
        "num_feature": str(width),
        "num_target": "1",
    }
    learner = {
        "attributes": {},
        "feature_names": [],
        "feature_types": [],
        "gradient_booster": {"name": "gbtree", "model": forest},
        "learner_model_param": parameters,
        "objective": {"name": "reg:squarederror", "reg_loss_param": {"scale_pos_weight": "1"}},
    }
    return {"version": [3, 2, 0], "learner": learner}


def _trees(table: Mapping[str, Any], parents: list[int], width: int) -> Iterator[dict[str, Any]]:
    """The trees as XGBoost writes them; what plays no part in predicting is 0."""
    begin = 0
    for index, size in enumerate(table["sizes"]):
        part = slice(begin, begin + size)
        begin += size
        zeros, nothing = [0] * size, [0.0] * size
        yield {
            "id": index,
            **{theirs: table[name][part] for name, theirs in _NAMES.items()},
            "parents": parents[part],
            "split_type": zeros,
            "base_weights": nothing,
            "loss_changes": nothing,
            "sum_hessian": nothing,
            "categories": [],
            "categories_nodes": [],
            "categories_segments": [],
            "categories_sizes": [],
            "tree_param": {"num_deleted": "0", "num_feature": str(width), "num_nodes": str(size), "size_leaf_vector": "1"},
        }


def _parents(table: Mapping[str, Any], width: int) -> list[int]:
    """The parent of each node. Every node but a root must be the child of one before it: no cycles, nothing outside."""
    sizes = _whole(table["sizes"])
    left, right, feature, missing = columns = [_whole(table[n]) for n in ("left", "right", "feature", "missing_left")]
    value = np.array(table["value"], dtype=np.float32)
    if np.any(sizes < 1) or {value.shape, *(column.shape for column in columns)} != {(int(sizes.sum()),)}:
        raise ValueError("columns of different lengths")
    begin = np.repeat(np.cumsum(sizes) - sizes, sizes)
    end = begin + np.repeat(sizes, sizes)
    nodes = np.flatnonzero(left >= 0)
    children = np.concatenate([left[nodes] + begin[nodes], right[nodes] + begin[nodes]])
    outside = np.any(children <= np.tile(nodes, 2)) or np.any(children >= np.tile(end[nodes], 2))
    others = np.flatnonzero(np.arange(len(left)) != begin)
    if outside or np.any((right >= 0) != (left >= 0)) or not np.array_equal(np.sort(children), others):
        raise ValueError("nodes that form no tree")
    if np.any(feature < 0) or np.any(feature >= width) or not np.all(np.isin(missing, (0, 1))):
        raise ValueError("a split on a feature that there is not")
    if not np.all(np.isfinite(value)):
        raise ValueError("values that are no numbers")
    parents = np.full(len(left), _ROOT)
    parents[children] = np.tile(nodes, 2)
    parents[others] -= begin[others]
    return [int(parent) for parent in parents]


def _whole(entries: Any) -> NDArray[np.int64]:
    array = np.array(entries)
    if array.ndim != 1 or array.dtype != np.int64:
        raise ValueError("a column of something other than whole numbers")
    return array
