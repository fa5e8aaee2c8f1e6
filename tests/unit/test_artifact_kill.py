"""kill -9 at many moments of a save: the target holds the old or the new artifact, whole; the next save tidies up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.toy_artifact import save
from tilewright.runtime.artifact import read_manifest, verify_files

KILLER = r"""
import os, shutil, signal, sys
from tests.toy_artifact import kernels, save
from tilewright.runtime import artifact, weights

target, moments, exchange = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "exchange"
kernels(2), kernels(3)
calls, deadline = 0, None

def count(function):
    def counted(*args, **kwargs):
        global calls
        calls += 1
        if calls == deadline:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return counted

for name in ("mkdir", "open", "fsync", "rename", "unlink", "rmdir", "write", "close", "scandir"):
    setattr(os, name, count(getattr(os, name)))
if not exchange:
    artifact._exchange = lambda first, second: False
artifact._exchange = count(artifact._exchange)
weights.WeightsWriter._put = count(weights.WeightsWriter._put)

def prepare():
    shutil.rmtree(os.path.dirname(target), ignore_errors=True)
    os.makedirs(os.path.dirname(target))
    save(target, 2)

prepare()
calls = 0
save(target, 3)
total = calls
for moment in range(moments):
    prepare()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        calls, deadline = 0, 1 + moment * (total - 1) // (moments - 1)
        save(target, 3)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    print(moment, flush=True)
    assert sys.stdin.readline() == "next\n"
"""


@pytest.mark.parametrize("way", ["exchange", "two renames"])
def test_killed_save(tmp_path, way):
    moments = 24
    target = tmp_path / "work" / "toy"
    script = tmp_path / "killer.py"
    script.write_text(KILLER)
    command = [sys.executable, str(script), str(target), str(moments), way]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    left = []
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root, env=environment
    ) as killer:
        for moment in range(moments):
            assert killer.stdout.readline() == f"{moment}\n"
            left.append(inspect(target, way))
            save(target, 2)
            assert os.listdir(target.parent) == ["toy"], f"litter after moment {moment}"
            killer.stdin.write("next\n")
            killer.stdin.flush()
    assert killer.returncode == 0
    assert left[0] == "old"
    assert left[-1] == "new"
    assert left.index("new") == len([state for state in left if state != "new"])


def inspect(target, way):
    """What a save that was killed left at the target; fails on anything but a whole artifact (or none)."""
    if way != "exchange" and not target.exists():
        return "none"
    manifest = read_manifest(target)
    verify_files(target, manifest)
    return {2: "old", 3: "new"}[factor(manifest)]


def factor(manifest):
    return 2 if manifest.files["kernels.so"] == FILES[2] else 3


@pytest.fixture(autouse=True)
def _known_files(tmp_path_factory):
    for number in (2, 3):
        path = save(tmp_path_factory.mktemp("known") / "toy", number)
        FILES[number] = read_manifest(path).files["kernels.so"]
    assert FILES[2] != FILES[3]


FILES = {}
