"""An artifact runs on the core installation alone, wherever it lies; damaged it is refused; it is saved whole or not."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tilewright
from tests.zoo import ZOO
from tilewright.cli import main
from tilewright.runtime.artifact import Manifest, TargetSpec, read_manifest, verify_files

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "models" / "small-lm"
PROMPT, NEW = [335, 53, 263, 7, 4000], 16
ABSENT = ("torch", "torch_mlir", "tvm", "tvm_ffi", "llvmlite", "sympy", "lark", "transformers", "networkx", "xgboost",
          "typer", "rich", "tokenizers", "safetensors")  # fmt: skip


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small language model in f32; not to be changed."""
    path = tmp_path_factory.mktemp("artifact") / "small-lm"
    return tilewright.compile(FOLDER, dtype="f32", max_length=64, out=path).path


# ---- a fresh environment -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment: the project's wheel and the packages that it asks for, nothing else."""
    home = tmp_path_factory.mktemp("bare")
    venv.create(home / "venv", with_pip=False, symlinks=True)
    (site,) = (home / "venv" / "lib").glob("python*/site-packages")
    zipfile.ZipFile(build_wheel(home / "source")).extractall(site)
    (metadata,) = site.glob("tilewright-*.dist-info/METADATA")
    for requirement in re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata.read_text(), re.MULTILINE):
        link_package(requirement, site)
    return home / "venv" / "bin" / "python"


def build_wheel(source: Path) -> Path:
    """The wheel of a copy of the project: building writes into the tree."""
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"].values()
    for folder in (f for f in folders if "/" not in f):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True, timeout=300)
    (wheel,) = (source / "dist").glob("*.whl")
    return wheel


def link_package(name: str, site: Path) -> None:
    """Put the package that is installed here into ``site``; a download would need a network."""
    distribution = importlib.metadata.distribution(name)
    tops = {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}
    for top in tops:
        (site / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())


def run_alone(python: Path, code: str, *arguments: object, cwd: Path | None = None) -> Any:
    """What ``code`` prints, as JSON; without environment variables, so without compilers as well."""
    command = [python, "-I", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={}, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


GENERATE = f"""
import importlib.util, json, sys
found = [name for name in {ABSENT!r} if importlib.util.find_spec(name)]
import tilewright
program = tilewright.load(sys.argv[1])
with program.session(threads=2) as session:
    made = session.generate([{PROMPT!r}], {NEW})[0]
place = tilewright.__file__
print(json.dumps({{"found": found, "made": made, "place": place, "modules": sorted(sys.modules)}}))
"""


@torch.no_grad()
def test_core_installation_generates(artifact: Path, python: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    ids = torch.tensor([PROMPT])
    want = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, eos_token_id=None)
    moved = tmp_path / "elsewhere" / "other name"
    shutil.copytree(artifact, tmp_path / "copy")
    moved.parent.mkdir()
    (tmp_path / "copy").rename(moved)
    for path, cwd in ((artifact, None), (moved, None), (Path("other name"), moved.parent)):
        result = run_alone(python, GENERATE, path, cwd=cwd)
        assert result["made"] == want[0, len(PROMPT) :].tolist()
    assert result["found"] == []
    assert not Path(result["place"]).is_relative_to(ROOT)
    ours = {name for name in result["modules"] if name.startswith("tilewright.")}
    assert {name.split(".")[1] for name in ours} == {"runtime"}


def test_what_needs_an_extra_says_which(artifact: Path, python: Path) -> None:
    code = """
import json, sys, tilewright
from tilewright.runtime.errors import MissingExtraError
texts = []
for call in (lambda: tilewright.Tokenizer(sys.argv[1]), lambda: tilewright.compile(sys.argv[1])):
    try:
        call()
    except MissingExtraError as error:
        texts.append(str(error))
print(json.dumps(texts))
"""
    text, compiler = run_alone(python, code, artifact)
    assert "tilewright[text]" in text
    assert "tilewright[compile]" in compiler
    done = subprocess.run([python, "-I", "-m", "tilewright.cli"], capture_output=True, text=True, env={}, check=False)
    assert done.returncode == 1
    assert "tilewright[cli]" in done.stderr
    assert "Traceback" not in done.stderr


def test_library_needs_the_c_library_alone(artifact: Path) -> None:
    command = ["readelf", "--dynamic", "--wide", artifact / "kernels.so"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*?)\]", text))
    assert "libc.so.6" in needed
    assert needed <= {"libc.so.6", "libm.so.6", "libpthread.so.0", "ld-linux-x86-64.so.2"}
    assert "RPATH" not in text
    assert "RUNPATH" not in text


def test_nothing_names_the_build(artifact: Path) -> None:
    """No path of the machine that compiled is in the artifact."""
    for path in artifact.rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        for secret in (str(ROOT), str(artifact), sys.prefix):
            assert secret.encode() not in data, path.name


# ---- refusals ----------------------------------------------------------------------------------------------------


def flip(name: str, place: float = 0.5) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[int(place * (len(data) - 1))] ^= 4
        (folder / name).write_bytes(data)

    return damage


def cut(name: str, count: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - count)


def edit_manifest(**fields: Any) -> Callable[[Path], None]:
    """The manifest with other top-level fields, as another version of the program might have written it."""

    def edit(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(manifest | fields))

    return edit


def other_cpu(folder: Path) -> None:
    manifest = read_manifest(folder)
    target = TargetSpec("cpu{arch=znver9}", (*manifest.target.features, "avx1024f", "avx1024bw"))
    (folder / "manifest.json").write_text(replace(manifest, target=target).to_text())


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a byte of the code": (flip("kernels.so"), r"kernels\.so: its checksum is \w{32} and was \w{32}.*damaged"),
    "the first byte of the weights": (flip("weights.safetensors", 0), r"weights\.safetensors: its checksum.*damaged"),
    "the last byte of the weights": (flip("weights.safetensors", 1), r"weights\.safetensors: its checksum.*damaged"),
    "a byte of the tokenizer": (flip("tokenizer.json"), r"tokenizer\.json: its checksum.*damaged"),
    "a byte of the manifest": (flip("manifest.json"), r"manifest\.json: .*(checksum|JSON)"),
    "one byte short": (cut("weights.safetensors", 1), r"weights\.safetensors: has \d+ bytes and was saved with \d+;.*cut"),
    "code cut short": (cut("kernels.so", 5000), r"kernels\.so: has \d+ bytes and was saved with"),
    "manifest cut short": (cut("manifest.json", 10), r"manifest\.json: "),
    "no code": (lambda folder: (folder / "kernels.so").unlink(), r"kernels\.so: cannot be opened.*incomplete"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), r"manifest\.json: cannot be opened.*incomplete"),
    "a later version": (edit_manifest(version=3), r"version 3\b.*\b2\b"),
    "another format": (edit_manifest(format="other"), r"format.*not an artifact made by tilewright"),
    "another processor": (other_cpu, r"compiled for cpu\{arch=znver9\}.*lacks the CPU features avx1024f, avx1024bw.*"
                                     r"x86-64-v3"),
}  # fmt: skip


@pytest.fixture
def damaged(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "damaged"))


def command_line(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of ``tilewright ARGUMENTS``, run in this process."""
    monkeypatch.setattr(sys, "argv", ["tilewright", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        main()
    return int(exit.value.code or 0)


@pytest.mark.parametrize("what", REFUSED)
def test_run_refuses_and_says_why(
    damaged: Path, what: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    damage, message = REFUSED[what]
    damage(damaged)
    assert command_line(monkeypatch, "run", damaged, "--ids", "1,2,3", "-n", 2) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert re.search(message, err.replace("\n", " ")), err
    assert "Traceback" not in err


def test_run_takes_what_is_whole(
    damaged: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command_line(monkeypatch, "run", damaged, "--ids", "1,2,3", "-n", 2) == 0
    assert re.fullmatch(r"\d+,\d+\n", capfd.readouterr().out)


# ---- kill -9 while saving ----------------------------------------------------------------------------------------

SAVER = r"""
import os, shutil, signal, sys
import tilewright
from tilewright.report import CompileReport
from tilewright.runtime import artifact

old, new, target, moments = *sys.argv[1:4], int(sys.argv[4])
calls, deadline = 0, None

def count(function):
    def counted(*args, **kwargs):
        global calls
        calls += 1
        if calls == deadline:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return counted

def save(source):
    tilewright.Compiled(artifact.Path(source), CompileReport.read(source)).save(target)

for name in ("mkdir", "open", "fsync", "rename", "unlink", "rmdir", "sendfile", "close", "scandir"):
    setattr(os, name, count(getattr(os, name)))
artifact._exchange = count(artifact._exchange)

def prepare():
    shutil.rmtree(os.path.dirname(target), ignore_errors=True)
    os.makedirs(os.path.dirname(target))
    if old:
        save(old)

prepare()
calls = 0
save(new)
total = calls
for moment in range(moments):
    prepare()
    child = os.fork()
    if child == 0:
        calls, deadline = 0, 1 + moment * (total - 1) // (moments - 1)
        save(new)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    print(moment, flush=True)
    assert sys.stdin.readline() == "next\n"
"""


@pytest.mark.parametrize("before", ["an older artifact", "nothing"])
def test_killed_save(artifact: Path, tmp_path: Path, before: str) -> None:
    moments, old, target = 10, tmp_path / "old", tmp_path / "work" / "saved"
    entry = ZOO["mlp"]
    earlier = tilewright.compile(entry.model(), (), entry.example(), out=old)
    whole = {"old": read_manifest(old).files, "new": read_manifest(artifact).files}
    arguments = [old if before == "an older artifact" else "", artifact, target, moments]
    command = [sys.executable, "-c", SAVER, *map(str, arguments)]
    left = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as saver:
        assert saver.stdin is not None
        assert saver.stdout is not None
        for moment in range(moments):
            assert saver.stdout.readline() == f"{moment}\n"
            left.append(state_of(target, whole))
            earlier.save(target)
            assert os.listdir(target.parent) == ["saved"], f"litter after moment {moment}"
            assert state_of(target, whole) == "old"
            saver.stdin.write("next\n")
            saver.stdin.flush()
    assert saver.returncode == 0
    first = "old" if before == "an older artifact" else "none"
    assert left[0] == first
    assert left[-1] == "new"
    assert set(left) == {first, "new"}
    assert left == sorted(left, key="new".__eq__), "once there it stays"


def state_of(target: Path, whole: dict[str, Any]) -> str:
    """Which artifact is at the target; fails on anything but a whole one or none."""
    if not target.exists():
        return "none"
    manifest: Manifest = read_manifest(target)
    verify_files(target, manifest)
    (name,) = (name for name, files in whole.items() if files == manifest.files)
    return name
