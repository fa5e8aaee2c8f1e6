"""From a built kernel to machine code.

vector/scf/memref dialects -> LLVM dialect -> LLVM IR text -> llvmlite with an explicit CPU -> object bytes or assembly.
Text carries the IR between the two LLVMs because the MLIR wheel can only target the host it runs on.
"""

import ctypes
import functools
import os
import re
import struct
from typing import Any

from tilewright.codegen.mlir.builder import Kernel
from tilewright.codegen.target import CpuTarget

_PIPELINE = """builtin.module(canonicalize,cse,loop-invariant-code-motion,convert-scf-to-cf,
convert-vector-to-llvm{enable-x86=true reassociate-fp-reductions=true},convert-math-to-llvm,finalize-memref-to-llvm,
convert-func-to-llvm{use-bare-ptr-memref-call-conv=1},convert-arith-to-llvm,convert-cf-to-llvm,convert-ub-to-llvm,
reconcile-unrealized-casts,cse)""".replace("\n", "")
_TRIPLE = "x86_64-unknown-linux-gnu"


class LoweringError(RuntimeError):
    """The kernel could not be turned into machine code: a bug in an emitter."""


def compile_kernel(kernel: Kernel) -> bytes:
    """A position-independent ELF object with the kernel's function. The same kernel always gives the same bytes."""
    module, machine = _optimised(llvm_ir(kernel), kernel.target)
    return machine.emit_object(module)


def assembly(kernel: Kernel) -> str:
    """The kernel's machine code as assembly text, for reading and for tests."""
    module, machine = _optimised(llvm_ir(kernel), kernel.target)
    return machine.emit_assembly(module)


def llvm_ir(kernel: Kernel) -> str:
    """The kernel as LLVM IR text, before LLVM's own optimisations."""
    from torch_mlir import ir
    from torch_mlir.passmanager import PassManager

    with kernel.module.context, ir.Location.unknown():
        try:
            # The kernel may be lowered more than once: work on a copy. Parsing it back also verifies it.
            module = ir.Module.parse(kernel.module.operation.get_asm(print_generic_op_form=True))
            passes = PassManager.parse(_PIPELINE)
            passes.enable_verifier(False)  # the translation verifies once more
            passes.run(module.operation)
        except ir.MLIRError as error:
            raise LoweringError(f"kernel {kernel.name}: {error}") from None
        for operation in module.body.operations:
            _set_code_attributes(operation, kernel)
        return _downgrade(_translate(module, kernel.name))


def _set_code_attributes(function: Any, kernel: Kernel) -> None:
    """Name what the function may use and is tuned for; inner functions stay functions."""
    from torch_mlir import ir

    target = kernel.target
    pairs = {
        "target-cpu": "x86-64",
        "tune-cpu": target.arch,
        "target-features": ",".join(f"+{feature}" for feature in target.required_features),
        "prefer-vector-width": str(target.vector_bits),
    }
    items = [ir.ArrayAttr.get([ir.StringAttr.get(key), ir.StringAttr.get(value)]) for key, value in pairs.items()]
    if ir.StringAttr(function.attributes["sym_name"]).value != kernel.name:
        items.append(ir.StringAttr.get("noinline"))
    function.attributes["passthrough"] = ir.ArrayAttr.get(items)


# --- LLVM, through llvmlite ---------------------------------------------------------------------------------------


@functools.cache
def _llvm() -> Any:
    from llvmlite import binding

    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    return binding


def _optimised(text: str, target: CpuTarget) -> tuple[Any, Any]:
    """The parsed module after LLVM's passes, and the machine that emits it.

    Kernels say exactly what they vectorise and unroll, so LLVM's own vectorisers and unroller stay off: they would only
    blow up remainders. The CPU and its features stand in the function's attributes (see `Kernel`).
    """
    llvm = _llvm()
    module = llvm.parse_assembly(text)
    module.verify()
    features = ",".join(f"+{feature}" for feature in target.required_features)
    machine = llvm.Target.from_triple(_TRIPLE).create_target_machine(
        cpu="x86-64", features=features, opt=3, reloc="pic", codemodel="default"
    )
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = options.loop_interleaving = False
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return module, machine


# --- LLVM IR text out of the MLIR wheel ---------------------------------------------------------------------------


class _Handle(ctypes.Structure):
    _fields_ = [("pointer", ctypes.c_void_p)]


@functools.cache
def _c_api() -> ctypes.CDLL:
    import torch_mlir._mlir_libs as libraries

    api = ctypes.CDLL(os.path.join(os.path.dirname(libraries.__file__), "libTorchMLIRAggregateCAPI.so"))
    api.LLVMContextCreate.restype = ctypes.c_void_p
    api.mlirTranslateModuleToLLVMIR.restype = ctypes.c_void_p
    api.mlirTranslateModuleToLLVMIR.argtypes = [_Handle, ctypes.c_void_p]
    api.LLVMPrintModuleToString.restype = ctypes.c_void_p
    for name in ("LLVMPrintModuleToString", "LLVMDisposeMessage", "LLVMDisposeModule", "LLVMContextDispose"):
        getattr(api, name).argtypes = [ctypes.c_void_p]
    return api


def _handle(operation: Any) -> _Handle:
    python = ctypes.pythonapi
    python.PyCapsule_GetName.restype = ctypes.c_char_p
    python.PyCapsule_GetName.argtypes = [ctypes.py_object]
    python.PyCapsule_GetPointer.restype = ctypes.c_void_p
    python.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    capsule = operation._CAPIPtr
    return _Handle(python.PyCapsule_GetPointer(capsule, python.PyCapsule_GetName(capsule)))


def _translate(module: Any, name: str) -> str:
    api = _c_api()
    context = api.LLVMContextCreate()
    try:
        translated = api.mlirTranslateModuleToLLVMIR(_handle(module.operation), context)
        if not translated:
            raise LoweringError(f"kernel {name}: no translation to LLVM IR")
        text = api.LLVMPrintModuleToString(translated)
        try:
            return ctypes.string_at(text).decode()
        finally:
            api.LLVMDisposeMessage(text)
            api.LLVMDisposeModule(translated)
    finally:
        api.LLVMContextDispose(context)


_NEW_FLOAT = re.compile(r"\b(float|double|half|bfloat) (f0x[0-9A-Fa-f]+|[-+]?\d+\.\d+e[-+]\d+|[-+]?(?:inf|qnan)\b)")

_SECOND_FLOAT = re.compile(r"\b(float|double|half|bfloat) ([^\s,]+), ([-+]?\d+\.\d+e[-+]\d+)")

_BARE_FLOAT = re.compile(r"(?<=[ \[])(f0x(?:[0-9A-Fa-f]{8}){1,2}|[-+](?:inf|qnan))(?=[,\s])")


def _downgrade(text: str) -> str:
    """Write float literals the way the older LLVM parses them: as the hex digits of a double."""
    text = _NEW_FLOAT.sub(lambda match: f"{match[1]} {_old_float(match[1], match[2])}", text)
    text = _SECOND_FLOAT.sub(lambda match: f"{match[1]} {match[2]}, {_old_float(match[1], match[3])}", text)
    # A second operand stands without its type: the digits tell float from double, and an infinity is the same in both.
    return _BARE_FLOAT.sub(lambda match: _old_float("float", match[1]), text)


def _old_float(kind: str, literal: str) -> str:
    if literal.startswith("f0x"):
        digits = literal[3:]
        if kind in ("half", "bfloat"):
            return f"0x{'H' if kind == 'half' else 'R'}{digits.upper()}"
        layout = {8: ("<I", "<f"), 16: ("<Q", "<d")}[len(digits)]
        number = struct.unpack(layout[1], struct.pack(layout[0], int(digits, 16)))[0]
    else:
        number = float(literal.replace("qnan", "nan"))
        if kind == "float":
            number = struct.unpack("<f", struct.pack("<f", number))[0]
    if kind == "half":
        return f"0xH{struct.unpack('<H', struct.pack('<e', number))[0]:04X}"
    if kind == "bfloat":
        raise LoweringError(f"cannot write the {kind} constant {literal}")
    return f"0x{struct.unpack('<Q', struct.pack('<d', number))[0]:016X}"
