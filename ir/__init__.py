"""The graph IR: types, operations, modules, text form, verifier, interpreter, rewriter."""

from tilewright.ir import ops
from tilewright.ir.builder import Builder
from tilewright.ir.compare import difference, same_type
from tilewright.ir.core import (
    UNKNOWN,
    Argument,
    Env,
    Function,
    Loc,
    Module,
    Op,
    Result,
    Return,
    State,
    Value,
    Weight,
)
from tilewright.ir.errors import (
    CheckpointError,
    CodegenError,
    InterpreterError,
    ParseError,
    PassError,
    TilewrightError,
    TraceError,
    UnsupportedError,
    VerifyError,
)
from tilewright.ir.interpreter import empty_states, interpret
from tilewright.ir.kv_kept import Kept
from tilewright.ir.kv_layouts import CONTIGUOUS, Contiguous, Layout, Paged, Ring
from tilewright.ir.kv_type import KVType
from tilewright.ir.parser import parse_module
from tilewright.ir.printer import canonical, print_function, print_module
from tilewright.ir.rewriter import Pattern, Rewriter, Skip, rewrite
from tilewright.ir.sources import ArraySource, Computation, ComputedSource, PartSource, WeightSource
from tilewright.ir.types import (
    Dim,
    DType,
    Shape,
    TensorType,
    Type,
    as_dim,
    dim_symbols,
    dim_text,
    eval_dim,
    parse_dim,
    product,
    same_dim,
    sym,
)
from tilewright.ir.verifier import verify

__all__ = [
    "CONTIGUOUS",
    "UNKNOWN",
    "Argument",
    "ArraySource",
    "Builder",
    "CheckpointError",
    "CodegenError",
    "Computation",
    "ComputedSource",
    "Contiguous",
    "DType",
    "Dim",
    "Env",
    "Function",
    "InterpreterError",
    "KVType",
    "Kept",
    "Layout",
    "Loc",
    "Module",
    "Op",
    "Paged",
    "ParseError",
    "PartSource",
    "PassError",
    "Pattern",
    "Result",
    "Return",
    "Rewriter",
    "Ring",
    "Shape",
    "Skip",
    "State",
    "TensorType",
    "TilewrightError",
    "TraceError",
    "Type",
    "UnsupportedError",
    "Value",
    "VerifyError",
    "Weight",
    "WeightSource",
    "as_dim",
    "canonical",
    "difference",
    "dim_symbols",
    "dim_text",
    "empty_states",
    "eval_dim",
    "interpret",
    "ops",
    "parse_dim",
    "parse_module",
    "print_function",
    "print_module",
    "product",
    "rewrite",
    "same_dim",
    "same_type",
    "sym",
    "verify",
]
