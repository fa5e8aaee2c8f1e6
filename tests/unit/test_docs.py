"""The documentation is true: what it names exists, what it lists is complete, what it shows is what runs.

`python -m pytest tests/unit/test_docs.py --bless` rewrites the outputs in the pages. Review the difference.
"""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.filetests.runner import OUTPUT, Case
from tests.unit.test_layering import OURS
from tilewright.codegen.emitters import FAMILIES
from tilewright.codegen.target import ARCHS
from tilewright.ir import errors as ir_errors
from tilewright.passes import find, print_pass
from tilewright.passes.named import NAMED
from tilewright.passes.registry import PASSES
from tilewright.report import CompileReport
from tilewright.runtime import errors as runtime_errors

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
REFERENCE = re.compile(r"`([a-z_0-9]+(?:\.[a-z_0-9]+)*):([A-Za-z_]+(?:\.[A-Za-z_]+)*)`")
LINK = re.compile(r"\[[^]]+\]\(([^)#\s]+)?(#[^)\s]+)?\)")
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
RUN = re.compile(r"(<!-- run -->\n```console\n)(.*?)(```)", re.DOTALL)
ROW = re.compile(r"^\| `([^`]+)` \|(.*)\|$", re.MULTILINE)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def section(text: str, title: str) -> str:
    """What stands under a heading, up to the next one of its level or above."""
    match = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,6}} |\Z)", text, re.DOTALL | re.MULTILINE)
    assert match, f"there is no section {title}"
    return match[2]


def rows(text: str) -> dict[str, list[str]]:
    """A table's cells by its first one, which is code."""
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in ROW.findall(text)}


# ---- names -------------------------------------------------------------------------------------------------------


def defined(module: str) -> set[str]:
    """Functions, classes, methods and constants of a file, ``Class.method`` for what is in a class."""
    path = ROOT.joinpath(*module.split("."))
    file = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
    assert file.is_file(), f"there is no file {file.relative_to(ROOT)}"
    return set(_names(ast.parse(file.read_text()).body, ""))


def _names(body: list[ast.stmt], prefix: str) -> Iterator[str]:
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from _names(node.body, f"{prefix}{node.name}.")
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield prefix + node.target.id
        if isinstance(node, ast.Assign):
            yield from (prefix + t.id for t in node.targets if isinstance(t, ast.Name))


@each_page
def test_every_function_named_exists(page: Path) -> None:
    found = REFERENCE.findall(page.read_text())
    assert [f"{module}:{name}" for module, name in found if name not in defined(module)] == []


def test_the_tour_names_functions_of_every_layer() -> None:
    layers = {module.split(".")[0] for module, _ in REFERENCE.findall(page("architecture.md"))}
    assert layers >= set(OURS) - {"costmodel"}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for path, anchor in LINK.findall(page.read_text()):
        if path.startswith("https:"):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {path}"
        if anchor and target.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor[1:] in [re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles], anchor


def test_the_overview_leads_to_every_page() -> None:
    linked = {path for path, _ in LINK.findall(page("index.md"))}
    assert {p.name for p in (ROOT / "docs").glob("*.md")} - {"index.md"} <= linked


@pytest.mark.parametrize("file", [*PAGES, *EXAMPLES], ids=lambda p: p.name)
def test_no_page_knows_the_machine_it_was_written_on(file: Path) -> None:
    assert re.findall(r"(?<![\w.~])/(?:root|home|work|tmp|opt|mnt|Users)/\S*", file.read_text()) == []


# ---- lists -------------------------------------------------------------------------------------------------------


def test_passes_are_listed_with_their_options() -> None:
    text = page("passes.md")
    assert sorted(re.findall(r"^### (\S+)$", text, re.MULTILINE)) == sorted(PASSES)
    for name in PASSES:
        cls = find(name)
        want = {}
        for f in dataclasses.fields(cls):
            default = f.default if f.default != () else "[]"
            want[f.name] = str(default).lower() if default is None or isinstance(default, bool) else str(default)
        found = {option: cells[0].strip("`") for option, cells in rows(section(text, name)).items()}
        assert found == want, f"options of {name} and their defaults"
        assert print_pass(cls()) == name, "every option has a default"


def test_named_pipelines_are_listed() -> None:
    found = rows(section(page("passes.md"), "Named pipelines"))
    assert {name: cells[0].strip("`") for name, cells in found.items()} == NAMED


def test_errors_are_listed() -> None:
    text = page("runtime.md")
    runtime = {n for n, v in vars(runtime_errors).items() if isinstance(v, type)}
    compiler = {n for n, v in vars(ir_errors).items() if isinstance(v, type)} - {"LocatedError"}
    assert set(rows(section(text, "Errors"))) == runtime
    assert set(rows(section(page("debugging.md"), "Errors of the compiler"))) == compiler | {"TargetError"}


def test_targets_and_kernel_families_are_listed() -> None:
    assert set(rows(section(page("targets.md"), "Architectures"))) == set(ARCHS)
    assert list(rows(section(page("architecture.md"), "Kernel families"))) == list(FAMILIES)


def test_layers_are_listed() -> None:
    found = rows(section(page("architecture.md"), "Layers"))
    assert {name.rstrip("/") for name in found} == set(OURS)
    for name, cells in found.items():
        assert set(re.findall(r"`([a-z.]+)`", cells[0])) == set(OURS[name.rstrip("/")]), name


def test_arguments_of_compile_are_listed_with_their_defaults() -> None:
    tree = ast.parse((ROOT / "tilewright" / "compiler.py").read_text())
    function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "compile")
    defaults = dict(zip([a.arg for a in function.args.kwonlyargs], function.args.kw_defaults, strict=True))
    want = {name: ast.unparse(d) for name, d in defaults.items() if d}
    found = {name: cells[0].strip("`") for name, cells in rows(section(page("compiling.md"), "Arguments")).items()}
    known = {name: {"none": "None"}.get(d, d.replace('"', "'")) for name, d in found.items()}
    assert known == want


def test_the_report_is_described() -> None:
    found = rows(section(page("debugging.md"), "The compile report"))
    assert set(found) == set(CompileReport.__dataclass_fields__)


@each_page
def test_commands_and_their_options_exist(page: Path) -> None:
    import typer

    from tilewright.cli import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for kind, text in BLOCK.findall(page.read_text()):
        if kind not in ("console", "sh"):
            continue
        for line in text.replace("\\\n", " ").splitlines():
            match = re.match(r"(?:.*[ $/])?tilewright (\w+)(.*)", line)
            if match is None or not (kind == "sh" or line.startswith(("$", ">"))):
                continue
            command, words = commands[match[1]], match[2].split()
            while hasattr(command, "commands"):  # a group: the next word is one of its commands, or `model` is meant
                command = command.commands[words.pop(0) if words[0] in command.commands else "model"]
            known = {opt for p in command.params for opt in (*p.opts, *p.secondary_opts)}
            given = {word for word in re.findall(r"(?<=\s)--?[a-z][a-z-]*", match[2].split("|")[0])}
            assert given <= known, f"{line}: {given - known}"


def test_set_up_commands_agree_with_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras, script = project["optional-dependencies"], (ROOT / ".ci" / "run").read_text()
    pins = {r for extra in extras.values() for r in extra}
    for text in [p.read_text() for p in PAGES]:
        assert set(re.findall(r"\.\[(\w+)\]", text)) <= set(extras)
        assert set(re.findall(r"torch==[\d.]+\d", text)) <= pins
    setup = section((ROOT / "README.md").read_text(), "tilewright").replace("\\\n", "")
    for command in re.findall(r"pip install (\S.*?)(?: *&&|$)", setup, re.MULTILINE):
        words = set(command.replace("'", "").replace("[compile]", "[test]").split())
        assert any(words <= set(line.replace("'", "").split()) for line in script.splitlines()), command


# ---- outputs -----------------------------------------------------------------------------------------------------


def rewritten(path: Path, pattern: re.Pattern[str], make: Callable[[str], str]) -> tuple[str, str]:
    """The page, and the page with the second group of each match made anew."""
    text = path.read_text()
    return text, pattern.sub(lambda m: m[1] + make(m[2]) + m[3], text)


def check(path: Path, before: str, after: str, bless: bool) -> None:
    if bless:
        path.write_text(after)
        return
    assert before == after, f"{path.name}; --bless rewrites it"


def test_the_pass_that_is_explained_is_the_example() -> None:
    shown = next(code for kind, code in BLOCK.findall(page("writing-a-pass.md")) if kind == "python")
    assert shown in (ROOT / "examples" / "custom_pass.py").read_text()


IR_CASE = re.compile(r"(```twir\n)(// run: .*?)(```)", re.DOTALL)


@pytest.mark.parametrize("name", ["passes.md", "writing-a-pass.md"])
def test_before_and_after_is_what_passes_do(name: str, bless: bool) -> None:
    def made(text: str) -> str:
        case = Case.read(text)
        return case.input + OUTPUT + case.actual()

    path = ROOT / "docs" / name
    check(path, *rewritten(path, IR_CASE, made), bless)


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Runs a command line at the root of the project; gives what it printed, errors too."""
    folder = tmp_path_factory.mktemp("bin")
    for name, module in (("tilewright", " -m tilewright.cli"), ("python", "")):
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable}{module} "$@"\n')
        script.chmod(0o755)
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "COLUMNS": "120"}

    def run(command: str) -> str:
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.run(["sh", "-c", command], cwd=ROOT, env=env, check=False, timeout=300, **pipe).stdout

    return run


@pytest.mark.parametrize("path", [p for p in PAGES if "<!-- run -->" in p.read_text()], ids=lambda p: p.name)
def test_consoles_show_what_commands_print(path: Path, shell: Callable[[str], str], bless: bool) -> None:
    def made(text: str) -> str:
        commands = re.findall(r"^\$ (.*(?:\n> .*)*)", text, re.MULTILINE)
        return "".join(f"$ {c}\n{shell(re.sub('^> ', '', c, flags=re.MULTILINE))}" for c in commands)

    check(path, *rewritten(path, RUN, made), bless)
