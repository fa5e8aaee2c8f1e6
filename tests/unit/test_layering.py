"""Who may import whom. Heavy packages are each imported by one folder only, so that the rest works without them."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {  # folder: what it may import of ours, besides itself
    "ir": (),
    "runtime": (),
    "frontend": ("ir",),
    "passes": ("ir",),
    "costmodel": ("ir", "runtime.measuring"),
    "codegen": ("ir", "runtime.artifact", "runtime.coded"),
    "tilewright": ("ir", "runtime", "frontend", "passes", "costmodel", "codegen"),
}
HEAVY = {  # package: who may import it
    "torch": ("frontend/", "tilewright/dynamo.py", "tilewright/compiler.py"),  # the last gives tensors for tensors
    "transformers": ("frontend/",),
    "torch_mlir": ("codegen/",),
    "llvmlite": ("codegen/",),
    "tvm": ("codegen/",),
    "tvm_ffi": ("codegen/",),
    "xgboost": ("costmodel/",),
}
CORE = {"numpy", "ml_dtypes", "xxhash", "tilewright"}  # what an installation without extras has
FILES = [path for folder in OURS for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a module imports anywhere, ``from a import b`` as ``a.b``."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), level=0, names=names):
                yield from (f"{module}.{alias.name}" for alias in names)
            case ast.ImportFrom():
                yield "relative import"
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
                yield name


def found(path: Path) -> list[str]:
    return list(imports(ast.parse(path.read_text())))


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_what_its_folder_may(path: Path) -> None:
    inside = str(path.relative_to(ROOT))
    folder = inside.split("/")[0]
    own = "tilewright" if folder == "tilewright" else f"tilewright.{folder}"
    allowed = [own, *(f"tilewright.{name}" for name in OURS[folder])]
    for name in found(path):
        assert name != "relative import", "imports are absolute: from tilewright.ir import ..."
        if within(name, "tilewright"):
            assert any(within(name, package) for package in allowed), f"{folder}/ may not import {name}"
        places = HEAVY.get(name.split(".")[0])
        assert places is None or inside.startswith(places), f"{name} is for {', '.join(places or ())} only"


@pytest.mark.parametrize("path", sorted((ROOT / "runtime").rglob("*.py")), ids=lambda p: p.name)
def test_runtime_needs_the_core_installation_only(path: Path) -> None:
    """At the top of its files; a function may ask for an extra (tokenizers) and say what is missing."""
    body = ast.parse(path.read_text()).body
    top = {name.split(".")[0] for node in body if isinstance(node, (ast.Import, ast.ImportFrom)) for name in imports(node)}
    assert top - set(sys.stdlib_module_names) <= CORE


def loaded(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after ``code``."""
    program = f"import sys\n{code}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


def test_importing_the_package_is_light() -> None:
    assert not loaded("import tilewright") & {*HEAVY, "sympy", "lark", "networkx", "numpy"}
    assert not loaded("import tilewright.runtime") & {*HEAVY, "sympy", "lark", "networkx"}


def test_passes_and_ir_do_without_torch() -> None:
    assert not loaded("import tilewright.passes.pipeline, tilewright.ir") & set(HEAVY)
