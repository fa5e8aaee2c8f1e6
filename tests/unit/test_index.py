"""Index arithmetic of loop kernels: what ranges resolve, and that it agrees with integers."""

import itertools

import numpy as np
import pytest

from tilewright.codegen.index import Floor, Mod, Poly, Size, Var, divisor, floor_div, modulo


def var(name: str, low: int, high: int) -> Var:
    return Var(name, Poly.of(low), Poly.of(high))


def evaluate(poly: Poly, values: dict[str, int]) -> int:
    total = 0
    for atoms, factor in poly.terms:
        for atom in atoms:
            if isinstance(atom, (Floor, Mod)):
                num, den = evaluate(atom.num, values), evaluate(atom.den, values)
                factor *= num // den if isinstance(atom, Floor) else num % den
            else:
                factor *= values[atom.key]
        total += factor
    return total


def test_the_other_half_of_a_head_needs_no_division():
    """Rope of a slice: (h * 64 + d - 32) is within 576 columns for d >= 32."""
    s, h, d = var("s", 0, 511), var("h", 0, 8), var("d", 32, 63)
    column = Poly.of(h) * 64 + Poly.of(d) - 32
    place = Poly.of(s) * 576 + column
    assert modulo(place, 576) == column
    assert floor_div(place, 576) == Poly.of(s)


@pytest.mark.parametrize("den", [1, 3, 8, 12])
def test_agrees_with_integers(den):
    rng = np.random.default_rng(den)
    for _ in range(40):
        ranges = [sorted(rng.integers(0, 9, 2)) for _ in range(2)]
        x, y = (var(n, int(a), int(b)) for n, (a, b) in zip("xy", ranges))
        a, b, c = (int(i) for i in rng.integers(0, 14, 3))
        num = Poly.of(x) * a + Poly.of(y) * b + (c - a * int(ranges[0][0]))
        for i, j in itertools.product(*(range(int(low), int(high) + 1) for low, high in ranges)):
            values, number = {"x": i, "y": j}, a * i + b * j + c - a * int(ranges[0][0])
            assert evaluate(floor_div(num, den), values) == number // den
            assert evaluate(modulo(num, den), values) == number % den


def test_divisor():
    n, even = Poly.of(Size("N")), Var("v", Poly(), Poly.of(9), multiple=2)
    assert divisor(n * 2 + Poly.of(even) * n + 4) == 2
    assert divisor(n + Poly.of(even)) == 1
    assert divisor(Poly.of(even) + 1) == 1
    assert divisor(n * 12 + Poly.of(even) * 4) == 4
    assert divisor(Poly.of(48)) == divisor(Poly()) == 8
