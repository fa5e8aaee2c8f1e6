"""Imports the installed package: ``check_wheel.py runtime|all CHECKOUT``.

``runtime`` imports what an installation without extras must have, ``all`` every module of every listed package and
compares the installed files with those of the checkout. Run it outside of the checkout.
"""

import importlib
import pkgutil
import sys
import tomllib
from pathlib import Path


def modules(package: str) -> list[str]:
    """The package and its modules."""
    loaded = importlib.import_module(package)
    return [package, *(f"{package}.{m.name}" for m in pkgutil.iter_modules(loaded.__path__) if m.name != "__main__")]


def missing_files(checkout: Path, packages: dict[str, str]) -> list[str]:
    """Files of the checkout's packages that the installation lacks."""
    found = []
    for package, folder in packages.items():
        installed = Path(importlib.import_module(package).__path__[0])
        files = [f for f in (checkout / folder).iterdir() if f.is_file() and f.suffix not in (".pyc", ".so")]
        found += [f"{folder}/{f.name}" for f in files if not (installed / f.name).is_file()]
    return found


def main() -> int:
    what, checkout = sys.argv[1], Path(sys.argv[2])
    packages: dict[str, str] = tomllib.loads((checkout / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    wanted = ["tilewright.runtime"] if what == "runtime" else list(packages)
    names = ["tilewright", *(name for package in wanted for name in modules(package))]
    for name in names:
        place = importlib.import_module(name).__file__
        if place is None or Path(place).is_relative_to(checkout):
            print(f"{name} comes from {place}, not from the wheel")
            return 1
    missing = missing_files(checkout, packages) if what == "all" else []
    print(f"{len(names)} modules imported; missing files: {missing or 'none'}")
    return len(missing) > 0


if __name__ == "__main__":
    sys.exit(main())
