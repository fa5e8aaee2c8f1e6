"""The list of packages and data files in pyproject.toml is the tree: editable installs would hide a missing one."""

import tomllib
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = CONFIG["tool"]["setuptools"]
TOP = ("tilewright", "frontend", "ir", "passes", "codegen", "costmodel", "runtime")


def dotted(folder: Path) -> str:
    name = ".".join(folder.relative_to(ROOT).parts)
    return name if name.split(".")[0] == "tilewright" else f"tilewright.{name}"


def test_every_package_is_listed() -> None:
    tree = {dotted(init.parent) for top in TOP for init in (ROOT / top).rglob("__init__.py")}
    assert set(SETUPTOOLS["packages"]) == tree


def test_every_package_has_its_folder() -> None:
    assert set(SETUPTOOLS["package-dir"]) == set(SETUPTOOLS["packages"])
    for package, folder in SETUPTOOLS["package-dir"].items():
        assert dotted(ROOT / folder) == package
        assert (ROOT / folder / "__init__.py").is_file()


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {path.parent for top in TOP for path in (ROOT / top).rglob("*.py")}
    assert [str(f) for f in folders if not (f / "__init__.py").is_file()] == []


def test_every_data_file_is_packaged() -> None:
    data = SETUPTOOLS["package-data"]
    files = [f for top in TOP for f in (ROOT / top).rglob("*") if f.is_file() and f.suffix not in (".py", ".pyc", ".so")]
    assert files
    missing = [f for f in files if not any(fnmatch(f.name, pattern) for pattern in data.get(dotted(f.parent), []))]
    assert [str(f.relative_to(ROOT)) for f in missing] == []


def test_type_checkers_see_every_package() -> None:
    linked = {link.name: link.resolve() for link in (ROOT / ".typing" / "tilewright").iterdir()}
    assert {name: ROOT / name for name in TOP[1:]}.items() <= linked.items()


def test_extras_name_released_packages_only() -> None:
    """A requirement by address would keep the package off the index."""
    extras = CONFIG["project"]["optional-dependencies"].values()
    assert [r for extra in extras for r in extra if "@" in r] == []
