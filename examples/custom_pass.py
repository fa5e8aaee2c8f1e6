"""A pass of your own: text options, a pipeline, the IR before and after.

    python examples/custom_pass.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tilewright.ir import Module, Rewriter, ops, parse_module, print_module, rewrite
from tilewright.passes import Pass, PassContext, Pipeline, register

MODULE = """\
module @example {
  dim N : 1..1024
  func @forward(%x: tensor<Nxf32>) {
    %0 = core.full() {shape=[] value=3.0 dtype=f32} : tensor<f32>
    %1 = core.pow(%x, %0) : tensor<Nxf32> loc("cube")
    %2 = core.full() {shape=[] value=9.0 dtype=f32} : tensor<f32>
    %3 = core.pow(%x, %2) : tensor<Nxf32> loc("ninth")
    return([%1, %3])
  }
}
"""


@register
@dataclass(frozen=True)
class ExpandPow(Pass):
    """``pow(x, 3)`` -> ``mul(mul(x, x), x)``, up to the exponent ``largest``."""

    name: ClassVar[str] = "expand-pow"
    largest: int = 4

    def run(self, module: Module, ctx: PassContext) -> bool:
        return ctx.take(rewrite(module, self.expand, functions=module.entries()))

    def expand(self, op: ops.Pow, rw: Rewriter) -> None:
        number = op.b.owner.value if isinstance(op.b.owner, ops.Full) else None
        if number is None or number < 1 or number != int(number) or op.b.shape:
            return rw.skip(op, "the exponent is not one positive whole number")
        if number > self.largest:
            return rw.skip(op, f"the exponent {number:g} is more than {self.largest}")
        power, build = op.a, rw.before(op)
        for _ in range(int(number) - 1):
            power = build(ops.Mul, power, op.a)
        return rw.replace(op, power)


def main() -> None:
    module = parse_module(MODULE)
    print(f"before\n{print_module(module)}")
    report = Pipeline.parse("expand-pow{largest=8},dce").run(module)
    print(f"after\n{print_module(module)}")
    print(*(f"{text}: {skip}" for skip, text in report.ctx.skips.items()), sep="\n")


if __name__ == "__main__":
    main()
