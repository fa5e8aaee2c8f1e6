"""Measuring: processes that crash or hang, and times on a machine whose speed changes. The clock is made up."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tilewright.costmodel.measurement import AbandonedError, Effort, compare, inliers, isolated, spread
from tilewright.measuring_helper import Helper

# --- isolation --------------------------------------------------------------------------------------------------------


def gone(pid: int) -> bool:
    """Whether a process has ended, within some seconds; one that nobody waits for counts."""
    for _ in range(500):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state in "ZX":
            return True
        time.sleep(0.02)
    return False


def test_work_gives_its_value() -> None:
    outcome = isolated(lambda: {"seconds": 0.1 + 0.2, "names": ["a"]}, 30)
    assert (outcome.status, outcome.value, outcome.error) == ("ok", {"seconds": 0.1 + 0.2, "names": ["a"]}, "")


def test_more_than_a_pipe_holds() -> None:
    assert isolated(lambda: "x" * 1_000_000, 30).value == "x" * 1_000_000


def test_what_is_changed_stays_there() -> None:
    memory = np.zeros(4)

    def work() -> list[float]:
        memory[:] = 1
        return memory.tolist()

    assert isolated(work, 30).value == [1, 1, 1, 1]
    assert not memory.any()


@pytest.mark.parametrize(("work", "said"), [
    (lambda: ctypes.string_at(0), "SIGSEGV"),
    (lambda: os.kill(os.getpid(), signal.SIGILL), "SIGILL"),
    (lambda: os._exit(3), "without an answer"),
    (lambda: [][0], "IndexError"),
    (lambda: object(), "without an answer"),
], ids=["segfault", "illegal", "exit", "raises", "no json"])  # fmt: skip
def test_a_crash_is_told(work: Callable[[], object], said: str) -> None:
    outcome = isolated(work, 30)
    assert outcome.status == "crashed"
    assert said in outcome.error


def test_a_hang_is_ended_with_all_it_started(tmp_path: Path) -> None:
    def work() -> None:
        child = subprocess.Popen(["sleep", "300"])
        (tmp_path / "pids").write_text(f"{os.getpid()} {child.pid}")
        while True:
            time.sleep(10)

    assert isolated(work, 1.0).status == "timeout"
    assert all(gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def test_nobody_waits() -> None:
    reader, writer = os.pipe()
    os.close(writer)
    with pytest.raises(AbandonedError):
        isolated(lambda: time.sleep(300), 60, reader)
    os.close(reader)


@pytest.mark.skipif(sys.platform != "linux", reason="the system's help is Linux's")
def test_children_do_not_outlive_their_parent(tmp_path: Path) -> None:
    program = f"""
import os, time
from pathlib import Path
from tilewright.costmodel.measurement import isolated
def work():
    Path({str(tmp_path / "pid")!r} + ".part").write_text(str(os.getpid()))
    os.rename({str(tmp_path / "pid")!r} + ".part", {str(tmp_path / "pid")!r})
    time.sleep(300)
isolated(work, 200)
"""
    parent = subprocess.Popen([sys.executable, "-c", program])
    while not (tmp_path / "pid").exists():
        assert parent.poll() is None
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    assert gone(int((tmp_path / "pid").read_text()))


# --- times ------------------------------------------------------------------------------------------------------------


class Machine:
    """A machine on which a call takes ``cost * speed(now)`` seconds, and a clock that shows it."""

    def __init__(self, speed: Callable[[float], float] = lambda now: 1.0) -> None:
        self.now, self.speed, self.calls = 100.0, speed, 0

    def clock(self) -> float:
        return self.now

    def calling(self, cost: float) -> Callable[[int], None]:
        def run(count: int) -> None:
            self.calls += count
            self.now += count * cost * self.speed(self.now - 100)

        return run

    def compare(self, candidate: float, baseline: float, **effort: float):
        return compare(self.calling(candidate), self.calling(baseline), Effort(**effort), self.clock)


@pytest.mark.parametrize("cost", [3e-8, 5e-6, 2e-3, 0.3])
def test_a_steady_machine(cost: float) -> None:
    timing = Machine().compare(cost, 2 * cost)
    assert timing.seconds == pytest.approx(cost, rel=1e-6)
    assert timing.baseline == pytest.approx(2 * cost, rel=1e-6)
    assert timing.spread == pytest.approx(0, abs=1e-6)
    assert timing.drift == pytest.approx(0, abs=1e-6)
    assert timing.repeats >= 1


def test_the_ratio_does_not_drift() -> None:
    """The machine gets twice as slow in a second: the ratio stays, though each time alone is off."""
    timing = Machine(lambda now: 1 + now).compare(0.006, 0.004, budget=0.5, precision=0.0)
    assert timing.seconds / timing.baseline == pytest.approx(1.5, rel=0.01)
    assert timing.seconds > 0.007


def test_two_speeds() -> None:
    """A machine that is three times as slow every other while, as when its processor is shared."""
    timing = Machine(lambda now: 3.0 if int(now / 0.05) % 2 else 1.0).compare(0.0011, 0.001, budget=1.0, precision=0.0)
    assert timing.seconds / timing.baseline == pytest.approx(1.1, rel=0.02)


def test_outliers_count_for_nothing() -> None:
    seen = iter(range(10_000))
    timing = Machine(lambda now: 20.0 if next(seen) % 7 == 6 else 1.0).compare(0.003, 0.003, budget=0.5, precision=0.0)
    assert timing.seconds / timing.baseline == pytest.approx(1, rel=1e-6)
    assert timing.spread < 1e-6


def test_what_is_clear_is_not_measured_for_long() -> None:
    quick, noise = Machine(), np.random.default_rng(0)
    quick.compare(0.001, 0.001, budget=2.0)
    noisy = Machine(lambda now: 1 + 0.4 * noise.random())
    noisy.compare(0.001, 0.001, budget=2.0)
    assert quick.now - 100 < 0.1
    assert 1.9 < noisy.now - 100 < 4.5


def test_what_is_hopeless_is_not_measured_for_long() -> None:
    machine = Machine()
    timing = machine.compare(0.5, 0.01)
    assert timing.seconds / timing.baseline == pytest.approx(50)
    assert machine.now - 100 < 2


def test_what_takes_long_is_called_once() -> None:
    machine = Machine()
    timing = machine.compare(1.5, 1.2)
    assert (timing.repeats, machine.calls, timing.seconds / timing.baseline) == (1, 2, pytest.approx(1.25))


def test_a_restless_machine_is_measured_again() -> None:
    noise = np.random.default_rng(1)
    calm = Machine(lambda now: 1 + (0.5 * noise.random() if now < 0.35 else 0.0))
    timing = calm.compare(0.003, 0.002, budget=0.3, precision=0.0)
    assert timing.drift < 0.01
    assert timing.seconds / timing.baseline == pytest.approx(1.5, rel=0.01)


def test_inliers_and_spread() -> None:
    values = [1.0, 1.1, 0.9, 1.05, 5.0]
    assert inliers(values).tolist() == [True, True, True, True, False]
    assert inliers([2.0, 2.0, 2.0]).all()
    assert spread(np.array([1.0, 2.0, 3.0])) == pytest.approx(0.5)


def test_a_helper_takes_its_temporary_files_along() -> None:
    script = ("import sys, tempfile; from tilewright.measuring_helper import serve; "
              "serve(lambda head, data: ({'folder': tempfile.mkdtemp()}, b''))")  # fmt: skip
    helper = Helper("", command=[sys.executable, "-c", script])
    folder = Path(helper.ask({})[0]["folder"])
    assert folder.is_dir()
    helper.close()
    assert not folder.exists()
