"""The text form: what is printed parses back to the same; what is garbled gives a ParseError with a place."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.property.modules import SYMBOLS, expressions, modules
from tilewright.ir import (
    Module,
    ParseError,
    as_dim,
    difference,
    dim_text,
    eval_dim,
    parse_dim,
    parse_module,
    print_module,
    same_dim,
    verify,
)


@settings(max_examples=120)
@given(modules())
def test_print_parse(module: Module) -> None:
    verify(module)
    text = print_module(module)
    again = parse_module(text)
    assert difference(again, module) is None
    assert print_module(again) == text
    verify(again)


@settings(max_examples=300)
@given(expressions, st.lists(st.integers(1, 40), min_size=len(SYMBOLS), max_size=len(SYMBOLS)))
def test_dimension_text_keeps_the_value(expression: object, values: list[int]) -> None:
    dim, env = as_dim(expression), dict(zip(SYMBOLS, values))
    again = parse_dim(dim_text(dim))
    assert eval_dim(again, env) == eval_dim(dim, env)
    assert same_dim(parse_dim(dim_text(again)), again)


SAMPLE = """module @qwen {
  dim B : 1..64
  dim S : 1..4096
  dim T : 1..2
  meta "task" = "generate"
  weight @layers.0.up : tensor<64x32xbf16>
  weight @"odd name" : tensor<32xbf16>
  state @kv.0 : kv<heads=2, dim=16, vdim=16, length=64, dtype=bf16, layout=paged<32>>
  kernel @k0(%a: tensor<BxSx64xbf16>) {
    %0 = core.reduce(%a) {fn="max" axes=[2] keepdim=true} : tensor<BxSx1xbf16>
    return([%0])
  }
  func @forward(%x: tensor<BxSx32xbf16>, %q: tensor<BxSx4x16xbf16>, %at: tensor<Bxi64>,
      %pages: tensor<BxTxi32>) {
    %0 = nn.rms_norm(%x, @"odd name") {eps=1e-05} : tensor<BxSx32xbf16> loc("model.norm" "model.py":12)
    %1 = nn.linear(%0, @layers.0.up, none) : tensor<BxSx64xbf16>
    %2, %3 = core.topk(%1) {k=2 axis=2} : tensor<BxSx2xbf16>, tensor<BxSx2xi64>
    %4 = core.iota() {length="max(S, 2) + 2*B" dtype=i64} : tensor<(2*B+max(2, S))xi64>
    %5 = core.reshape(%1) {shape=["B*S", 64]} : tensor<(B*S)x64xbf16>
    %6 = kernel.call([%1]) {callee="k0"} : tensor<BxSx1xbf16>
    %7 = kv.attend(%q, @kv.0, %at, none, none, %pages) {scale=0.25 window=8} : tensor<BxSx4x16xbf16>
    return([%2, %3, %4, %5, %6, %7])
  }
}
"""
_TOKENS = re.compile(r'"[^"]*"|[\w.]+|\s+|.')


def garbled(seed: int) -> str:
    """The sample after one to three small accidents."""
    rng = random.Random(seed)
    tokens = _TOKENS.findall(SAMPLE)
    for _ in range(rng.randint(1, 3)):
        i, j = rng.randrange(len(tokens)), rng.randrange(len(tokens))
        match rng.randrange(6):
            case 0:
                del tokens[i]
            case 1:
                tokens.insert(i, tokens[j])
            case 2:
                tokens[i], tokens[j] = tokens[j], tokens[i]
            case 3:
                tokens = tokens[: max(i, 1)]
            case 4:
                at = rng.randrange(len(tokens[i]))
                tokens[i] = tokens[i][:at] + chr(rng.choice([*range(128), 0xE9, 0x2028, 0x1F600])) + tokens[i][at + 1 :]
            case 5:
                tokens[i] = rng.choice(["-1", "0", "9" * 30, "1e999", "nan", "none", "[]", "{}", "true", "@", "%0"])
    return "".join(tokens)


def check(text: str) -> bool:
    """False for a ParseError that says what and where, true when ``text`` parses."""
    try:
        parse_module(text)
    except ParseError as error:
        return not (error.line >= 1 and error.column >= 1 and error.message)
    return True


def test_sample_is_valid() -> None:
    module = parse_module(SAMPLE)
    verify(module)
    assert parse_module(print_module(module)) == module


def test_garbled_texts() -> None:
    parsed = sum(check(garbled(seed)) for seed in range(300))
    assert 0 < parsed < 150  # both ends are reached


def _in_function(op: str) -> str:
    return f"module @m {{\n dim B : 1..4\n func @f(%x: tensor<Bxf32>) {{\n{op}\nreturn([%x])\n}} }}"


NASTY = {
    "empty": "",
    "blank": " \n\n\t",
    "nul": "\0",
    "nul in a type": "module @m { weight @w : tensor<\0xf32> }",
    "only a comment": "// nothing",
    "byte order mark": "\ufeffmodule @m { }",
    "long number": f"module @m {{ weight @w : tensor<{'9' * 5000}xf32> }}",
    "long bound": f"module @m {{ dim B : 1..{'9' * 5000} }}",
    "long line number": _in_function(f'%0 = core.exp(%x) : tensor<Bxf32> loc("m" "f":{"9" * 5000})'),
    "long attribute": _in_function(f"%0 = nn.softmax(%x) {{axis={'9' * 5000}}} : tensor<Bxf32>"),
    "power": "module @m { weight @w : tensor<(10**1000000000)xf32> }",
    "exponent": _in_function("%0 = core.full() {shape=[] value=1e1000000000 dtype=f32} : tensor<i32>"),
    "deep parentheses": f"module @m {{ weight @w : tensor<{'(' * 100000}1{')' * 100000}xf32> }}",
    "deep minus": f"module @m {{ weight @w : tensor<({'-' * 100000}B)xf32> }}",
    "deep lists": _in_function(f"%0 = core.concat({'[' * 20000}%x{']' * 20000}) {{axis=0}} : tensor<Bxf32>"),
    "deep attribute": _in_function(f"%0 = core.full() {{shape={'[' * 20000}1{']' * 20000}}} : tensor<f32>"),
    "deep types": f"module @m {{ weight @w : {'tensor<' * 20000}",
    "long sum": f"module @m {{ weight @w : tensor<({'B+' * 50000}B)xf32> }}",
    "modulo chain": f"module @m {{ weight @w : tensor<({'%'.join(['B', 'S', 'T'] * 30)})xf32> }}",
    "division chain": f"module @m {{ weight @w : tensor<({'//'.join(['B', 'S', 'T'] * 30)})xf32> }}",
    "nested maxima": f"module @m {{ weight @w : tensor<({'max(B,min(S,' * 15}1{'))' * 15})xf32> }}",
    "bad escape": 'module @"\\q" { }',
    "control character": 'module @"\x01" { }',
    "lone surrogate": 'module @"\\ud800" { }',
    "code": "module @m { weight @w : tensor<(__import__('os').getpid())xf32> }",
    "division by zero": "module @m { weight @w : tensor<(B//(B-B))xf32> }",
    "infinite size": _in_function('%0 = core.iota() {length="1//0" dtype=i64} : tensor<4xi64>'),
    "no numbers": "module @m { state @s : kv<heads=a, dim=1, vdim=1, length=1, dtype=f32, layout=x> }",
    "no keys": "module @m { state @s : kv<heads, dim> }",
    "unknown key": "module @m { state @s : kv<foo=1, dtype=f32, layout=x> }",
    "empty types": "module @m { weight @w : tensor<> state @s : kv<> }",
    "list of none": _in_function("%0 = core.concat([none]) {axis=0} : tensor<Bxf32>"),
    "cache as tensor": "module @m { state @s : kv<heads=1, dim=1, vdim=1, length=1, dtype=f32, layout=x> "
    "func @f() { %0 = core.exp(@s) : tensor<f32> return([]) } }",
    "rank 0 softmax": "module @m { func @f(%x: tensor<f32>) { %0 = nn.linear(%x, %x) : tensor<f32> return([]) } }",
}


@pytest.mark.parametrize("name", NASTY)
def test_nasty_texts(name: str) -> None:
    assert check(NASTY[name]) == (name in ("lone surrogate", "nested maxima", "modulo chain", "division chain"))
