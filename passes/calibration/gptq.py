"""``method=gptq`` (Frantar et al., arXiv:2210.17323): each column is rounded, and what is left makes up for its error.

With ``H = x^T x`` over the calibration inputs the error of a row w of the weight is ``(w - q) H (w - q)^T``. Columns are
rounded one after the other; the rounding error of column j goes into the later columns in proportion to row j of the upper
Cholesky factor of ``inv(H)``. Later columns of a block of 128 are corrected at once, those beyond it by one product.

With ``order`` columns go by falling ``H[j, j]`` (act-order), while groups stay neighbours along K: their scales are fitted
beforehand (static groups). Without it a group is fitted when its first column comes, to what the errors so far made of it.
Columns that no input reached are rounded to the nearest. Weights that are exactly 0 stay 0, whatever earlier columns ask
of them: later columns make up for that too, as in SparseGPT (arXiv:2301.00774) with a given mask.

Memory: H, and what factoring it takes, in f64: 40 K^2 bytes at most. Of the weight a block of rows is in work: rows do not
know of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from tilewright.ir import PassError
from tilewright.passes.calibration.clip import search
from tilewright.passes.calibration.data import Array
from tilewright.passes.formats import Format, Params, check_finite
from tilewright.passes.formats.base import check_params

BLOCK = 128  # columns that are corrected one by one
_AT_ONCE = 1 << 22  # elements of the weight in work at a time


@dataclass(frozen=True)
class Prepared:
    """The factor of the inverse of H in the order of columns, f32; the order; the diagonal of H as it was, f32."""

    factor: Array
    order: Array
    importance: Array


def factored(hessian: Array, damping: float, by_size: bool, name: str) -> Prepared:
    """Factor ``hessian`` f64 ``[K, K]`` with ``damping``; ``by_size`` takes columns by falling diagonal.

    Raises PassError that names the weight ``name`` when numbers are not finite, or it cannot be factored.
    """
    if not np.isfinite(hessian).all():
        raise PassError(f"the inputs of the layer with @{name} became NaN or infinite during calibration")
    diagonal = np.diag(hessian).copy()
    order = np.argsort(-diagonal, kind="stable") if by_size else np.arange(len(diagonal))
    h = hessian[np.ix_(order, order)]
    h[np.diag_indices_from(h)] += added(diagonal, damping)[order]
    return Prepared(inverse_factor(h, name), order, diagonal.astype(np.float32))


def compensate(left: Array, factor: Array, bounds: Sequence[int], column: Callable[[int], Array]) -> None:
    """Settle the columns of a weight one by one: ``left`` f32 ``[K, R]`` holds them in order and takes the corrections.

    ``column(i)`` settles the i-th as ``left[i]`` is by then and gives what it lost, ``[R]``. Columns between two of the
    ``bounds`` are corrected at once, those beyond by one product.
    """
    for start, stop in pairwise(bounds):
        errors = np.empty((stop - start, left.shape[1]), np.float32)
        for i in range(start, stop):
            errors[i - start] = column(i) / factor[i, i]
            left[i + 1 : stop] -= factor[i, i + 1 : stop, None] * errors[i - start]
        left[stop:] -= factor[start:stop, stop:].T @ errors


@dataclass(frozen=True)
class Gptq:
    """The method with its settings, for weights of any format.

    ``damping`` is added to the diagonal of H as a fraction of its mean; ``clip`` searches the ranges of groups first.
    """

    format: Format
    damping: float = 0.01
    order: bool = True
    clip: bool = False

    def prepare(self, hessian: Array, name: str = "weight") -> Prepared:
        """What weights that share their inputs need of ``hessian`` f64 ``[K, K]``.

        Raises PassError that names the weight when it has numbers that are not finite, or cannot be factored.
        """
        return factored(hessian, self.damping, self.order, name)

    def round(self, weight: Array, prepared: Prepared, name: str = "weight") -> tuple[tuple[Array, ...], Array]:
        """The arrays of ``format.parts`` for ``weight`` ``[N, K]``, and the weight that they mean, f32.

        Raises PassError that names the weight when it has numbers that are not finite.
        """
        decoded = np.empty(weight.shape, np.float32)
        parts = list(self.blocks(weight, prepared, decoded, name))
        codes = np.concatenate([c for c, _ in parts])
        params = {key: np.concatenate([p[key] for _, p in parts]) for key in parts[0][1]}
        return self.format.store(codes, params), decoded

    def blocks(
        self, weight: Array, prepared: Prepared, decoded: Array, name: str
    ) -> Iterator[tuple[Array, Params]]:
        """Codes ``[R, K]`` and params of some rows after the other; fills ``decoded``."""
        n, k = weight.shape
        step = max(1, _AT_ONCE // k)
        for start in range(0, n, step):
            rows = weight[start : start + step].astype(np.float32)
            check_finite(rows, name, start)
            work = _Rows(self, rows, prepared)
            work.run()
            decoded[start : start + step] = work.decoded.T
            params = work.params()
            check_params(params, rows, name)
            yield np.ascontiguousarray(work.codes.T), params


class _Rows:
    """Some rows of a weight in work, transposed: ``[K, R]``, so that a column is contiguous."""

    def __init__(self, method: Gptq, rows: Array, prepared: Prepared) -> None:
        self.method, self.format = method, method.format
        self.factor, order = prepared.factor, prepared.order
        self.groups = self.format.groups(rows.shape[1])
        self.size = rows.shape[1] // self.groups
        grouped = rows.reshape(len(rows), self.groups, self.size)
        self.importance = prepared.importance.reshape(self.groups, self.size)
        self.shared = self.format.shared(grouped, self.importance)
        self.order, self.left = order, np.ascontiguousarray(rows.T[order])
        self.zeros = self.left == 0
        self.decoded = np.empty_like(rows.T, order="C")
        self.codes: Array = np.empty(0)
        self.fitted: list[Params | None] = [None] * self.groups
        if method.order:
            whole = self.fit(grouped, self.importance)
            self.fitted = [_group(whole, g) for g in range(self.groups)]

    def fit(self, w: Array, importance: Array) -> Params:
        fit = search if self.method.clip else _plain
        return fit(self.format, w, importance, self.shared)

    def params(self) -> Params:
        """Of all groups."""
        found = [p for p in self.fitted if p is not None]
        joined = {key: np.concatenate([p[key] for p in found], 1) for key in found[0] if key not in self.shared}
        return joined | {key: found[0][key] for key in found[0].keys() & self.shared.keys()}

    def run(self) -> None:
        compensate(self.left, self.factor, self.bounds(), self.column)

    def bounds(self) -> list[int]:
        """Where blocks begin, and the end. A group that a block holds the first column of is either all in the block or
        begins with it, so that the group is up to date when it is fitted."""
        k = len(self.left)
        if self.size <= BLOCK:
            return [*range(0, k, BLOCK // self.size * self.size), k]
        return [*(i for g in range(0, k, self.size) for i in range(g, g + self.size, BLOCK)), k]

    def column(self, i: int) -> Array:
        """Round the ``i``-th column in order; gives its error ``[R]``."""
        j = int(self.order[i])
        params = self.group(j // self.size)
        column = np.where(self.zeros[i], 0, self.left[i])
        codes = self.format.encode(column[:, None, None], params)
        if not self.codes.size:
            self.codes = np.empty(self.left.shape, codes.dtype)
        self.codes[j] = codes[:, 0, 0]
        self.decoded[j] = self.format.decode(codes, params)[:, 0, 0]
        error: Array = self.left[i] - self.decoded[j]
        return error

    def group(self, g: int) -> Params:
        """The params of a group; without act-order fitted to what its columns are by now."""
        params = self.fitted[g]
        if params is None:
            here = slice(g * self.size, (g + 1) * self.size)
            rows = np.where(self.zeros[here], 0, self.left[here]).T
            params = self.fit(np.ascontiguousarray(rows)[:, None], self.importance[g : g + 1])
            self.fitted[g] = params
        return params


def _plain(format: Format, w: Array, importance: Array, shared: Params) -> Params:
    return format.fit(w, 1.0, importance, shared)


def _group(params: Params, g: int) -> Params:
    return {key: array[:, g : g + 1] if array.shape[1] > 1 else array for key, array in params.items()}


def added(diagonal: Array, damping: float) -> Array:
    """What the diagonal of H gets: a fraction of its mean; a channel that was always 0 stands for itself."""
    mean = diagonal.mean() or 1.0
    return np.where(diagonal == 0, mean, damping * mean)


def inverse_factor(hessian: Array, name: str) -> Array:
    """The upper U, f32, with ``inv(H) = U^T U``: with H reversed ``L L^T``, it is ``inv(L)`` reversed."""
    try:
        lower = np.linalg.cholesky(hessian[::-1, ::-1])
    except np.linalg.LinAlgError:
        raise PassError(f"@{name}: the Hessian of its inputs is not positive definite; raise damping, or give more "
                        "calibration data") from None  # fmt: skip
    return np.ascontiguousarray(inverse_lower(lower)[::-1, ::-1], np.float32)


def inverse_lower(lower: Array) -> Array:
    """The inverse of a lower triangular matrix, by halves."""
    k = len(lower)
    if k <= 64:
        return np.tril(np.linalg.inv(lower))
    h = k // 2
    out = np.zeros_like(lower)
    out[:h, :h], out[h:, h:] = inverse_lower(lower[:h, :h]), inverse_lower(lower[h:, h:])
    out[h:, :h] = -out[h:, h:] @ lower[h:, :h] @ out[:h, :h]
    return out
