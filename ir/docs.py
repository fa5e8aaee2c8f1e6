"""Writes the reference page of the IR: ``python -m tilewright.ir.docs > docs/ir.md``."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator

from tilewright.ir.core import Field, Op
from tilewright.ir.printer import attr_text

EXAMPLE = """\
module @tiny {
  dim B : 1..64
  dim S : 1..2048
  meta "task" = "generate"
  weight @embed : tensor<32000x64xbf16>
  weight @norm : tensor<64xbf16>
  state @kv.0 : kv<heads=2, dim=16, vdim=16, length=2048, dtype=bf16, layout=contiguous>
  func @prefill(%ids: tensor<BxSxi64>, %q: tensor<BxSx4x16xbf16>, %start: tensor<Bxi64>) {
    %0 = nn.embedding(%ids, @embed) : tensor<BxSx64xbf16> loc("model.embed_tokens" "modeling.py":381)
    %1 = nn.rms_norm(%0, @norm) {eps=1e-05} : tensor<BxSx64xbf16> loc("model.norm")
    %2 = core.reshape(%1) {shape=["B*S", 64]} : tensor<(B*S)x64xbf16>
    %3, %4 = core.topk(%2) {k=2 axis=1} : tensor<(B*S)x2xbf16>, tensor<(B*S)x2xi64>
    %5 = kv.attend(%q, @kv.0, %start) {scale=0.25} : tensor<BxSx4x16xbf16>
    return([%4, %5])
  }
}
"""

_HEAD = """\
# The graph IR

<!-- Written by `python -m tilewright.ir.docs`; change the docstrings of the operations, or ir/docs.py. -->

A module holds functions, weights, states (KV caches) and the ranges of symbolic sizes. A function is a list of operations
in SSA form that ends in `return`. Values are immutable and row-major without strides; a view is `core.reshape` or
`core.transpose`. Every operation carries the module path in the model and the user's file and line it came from.

What an operation means is its NumPy `evaluate`; the interpreter (`tilewright.ir.interpret`) runs it. bf16 and f16 are
widened to f32 inside an operation and rounded once, at its result.

## Types

- `tensor<BxSx64xbf16>`: sizes, then the element type, one of
  {dtypes}.
  A size is a number, a symbol (upper case, a positive integer declared by `dim`) or an expression in parentheses over
  `+ - * // % max min`, such as `(S//2+1)`.
- `kv<heads=2, dim=16, vdim=16, length=2048, dtype=bf16, layout=contiguous>`: the cache of one attention layer for
  sequences of up to `length` tokens. Layouts are `contiguous`, `paged<32>` (pages of 16, 32 or 64 tokens from a pool that
  sequences share), `ring<1024, 512, 4>` (the last 1024 positions and the first 4, calls of up to 512 tokens) and
  `kept<1024, 512>` (1024 tokens that `kv.retain` chooses, calls of up to 512). Besides f32, f16 and bf16 the `dtype` may
  be that of codes, i8, i4 or i2, then with `keys=token` or `keys=channel`, `group=32`, `recent=128`, `scales=f16`,
  `full=bf16`, `rank=2`, `outliers=1`, left out at their defaults ([kv.md](kv.md)). Pages that `kv.select` may choose among
  have `summary=minmax`.
  A cache is changed in place: after `kv.append`, `kv.retain`, or a `kernel.call` that gives it, the operand is gone and
  only the result may be used.

## Text form

`parse_module(print_module(m)) == m` for every module, numbers of weights apart.

    {example}
- `%name` is an argument or result, `@name` a function, weight or state; an odd name is quoted: `@"two words"`.
- An operation is `results = name(operands) {{attributes}} : types loc("module path" "file":line)`. `none` stands for an
  absent operand (left out at the end of the list), `[...]` for a list of operands. Attributes at their default and the
  location are left out when there is nothing to say.
- Attributes: numbers, `true` and `false`, strings, element types, lists in `[ ]`, sizes (an expression is a string).
- `meta` holds what later stages ask about the model. `kernel` instead of `func` is a region that fusion cut out; only
  `kernel.call` runs it, and it calls no other.
- `// ...` is a comment.

In the tables an operand with `?` may be absent, one in `[ ]` is a list; an attribute without `=` must be given.
"""

_TITLES = {
    "core.elementwise": "core: elementwise",
    "core": "core: creating, reducing, ordering and moving",
    "nn": "nn: layers",
    "quant": "quant: integers with scales",
    "sparse": "sparse: few weights and where they belong, few inputs",
    "moe": "moe: mixtures of experts",
    "kv": "kv: caches",
    "kernel": "kernel: fused regions",
}


def reference() -> str:
    """The whole page."""
    from tilewright.ir.types import DType

    dtypes = " ".join(f"`{d.value}`" for d in DType)
    parts = [_HEAD.format(dtypes=dtypes, example=EXAMPLE.replace("\n", "\n    ").rstrip(" ")).replace("    \n", "\n")]
    for family, title in _TITLES.items():
        rows = "\n".join(_row(op) for op in Op.registry.values() if _family(op) == family)
        parts.append(f"## {title}\n\n| operation | operands | attributes | meaning |\n|---|---|---|---|\n{rows}\n")
    return "\n".join(parts)


def _family(op: type[Op]) -> str:
    if op.__module__.endswith(".elementwise"):
        return "core.elementwise"
    return op.name.split(".")[0]


def _row(op: type[Op]) -> str:
    operands = ", ".join(_operand(f) for f in op.fields if f.is_operand)
    attributes = "<br>".join(_attribute(f) for f in op.fields if not f.is_operand and f.kind != "tuple[Type, ...]")
    return f"| `{op.name}`<br>`{op.__name__}` | {operands} | {attributes} | {_meaning(op)} |"


def _operand(field: Field) -> str:
    return {"optional": f"`{field.name}`?", "variadic": f"`[{field.name}]`"}.get(field.kind, f"`{field.name}`")


def _attribute(field: Field) -> str:
    kind = re.sub(r"tuple\[(.*), \.\.\.\]", r"[\1]", field.kind).replace("|", "\\|")
    return f"`{field.name}: {kind}{''.join(_default(field))}`"


def _default(field: Field) -> Iterator[str]:
    if not field.is_required:
        yield f" = {attr_text(field.default)}"


def _meaning(op: type[Op]) -> str:
    text = inspect.cleandoc(op.__doc__ or "")
    text = re.sub(r":\w+:`(\w+)`", r"`\1`", text).replace("``", "`").replace("|", "\\|")
    return "<br>".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def main() -> None:
    """Print the page."""
    import tilewright.ir.ops  # noqa: F401  (fills the registry)

    sys.stdout.write(reference())


if __name__ == "__main__":
    main()
