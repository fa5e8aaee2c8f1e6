"""Measuring on a Ray cluster: one worker a node, so that timings do not disturb each other.

A worker takes all CPUs that Ray knows of its node, also from other jobs. A head node that searches should therefore be
started with ``--num-cpus=0``: it is then left out.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tilewright.costmodel.workload import Measurement, Runner, Workload
from tilewright.ir import TilewrightError


class ClusterError(TilewrightError):
    """A Ray cluster that is not there, or on which nothing can be measured: says which nodes were refused, and why."""


@dataclass
class _Batch:
    """Schedules that one worker measures in one go; ``first`` is the place of the first among all."""

    first: int
    schedules: Sequence[str]
    tries: int = 0
    deadline: float = 0.0


_Asked = tuple[dict[str, Any], str, float]
"""What all batches of a call have in common: the fields of the workload, the baseline, the effort."""


class _Worker:
    """What runs on a node."""

    def __init__(self, make: Callable[[], Runner], identify: Callable[[], Mapping[str, str]]) -> None:
        self.make, self.identify = make, identify
        self.runner: Runner | None = None

    def identity(self) -> dict[str, str]:
        return dict(self.identify())

    def measure(self, asked: _Asked, schedules: Sequence[str]) -> list[dict[str, Any]]:
        self.runner = self.runner or self.make()
        workload, baseline, effort = asked
        return [asdict(found) for found in self.runner.measure(Workload(**workload), baseline, schedules, effort)]


class RayRunner:
    """A ``Runner`` that measures on the nodes of a Ray cluster, several batches at once.

    ``make`` makes the runner of a node. ``identify`` says what must be the same on a node as here for its times to count:
    the CPU's name and the compiler's version, by name; nodes that differ are listed in ``refused``. Both are functions of
    modules that nodes can import too. ``timeout`` is in seconds a schedule. All methods raise ClusterError.
    """

    def __init__(
        self,
        address: str | None,
        make: Callable[[], Runner],
        identify: Callable[[], Mapping[str, str]],
        timeout: float = 60.0,
        batch: int = 8,
        start_timeout: float = 120.0,
    ) -> None:
        self.address, self.make, self.identify = address or "auto", make, identify
        self.timeout, self.batch, self.start_timeout = timeout, batch, start_timeout
        self.refused: dict[str, str] = {}
        self._workers: dict[str, Any] = {}  # actors by node
        self._names: dict[str, str] = {}
        self._ray = _ray()
        self._joined = not self._ray.is_initialized()
        if self._joined:
            self._join()

    def _join(self) -> None:
        try:
            self._ray.init(address=self.address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            reason = str(error).strip() or type(error).__name__
            raise ClusterError(f"no Ray cluster at {self.address}: {reason}; `ray start --head` starts one") from None

    def close(self) -> None:
        """Stop the workers, and leave the cluster unless it was joined before."""
        for node in list(self._workers):
            self._dismiss(node)
        if self._joined and self._ray.is_initialized():
            self._ray.shutdown()

    def __enter__(self) -> RayRunner:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def measure(
        self, workload: Workload, baseline: str, schedules: Sequence[str], effort: float = 1.0
    ) -> list[Measurement]:
        """One measurement for each of ``schedules``, in order.

        A batch whose node dies is tried once more; after that its schedules count as crashed, as those of a batch
        that is not back in time count as timed out.
        """
        self._recruit()
        size = max(1, min(self.batch, -(-len(schedules) // max(1, len(self._workers)))))
        waiting = deque(_Batch(k, schedules[k : k + size]) for k in range(0, len(schedules), size))
        running: dict[Any, tuple[str, _Batch]] = {}
        found: dict[int, Measurement] = {}
        try:
            while waiting or running:
                self._hand_out(waiting, running, (asdict(workload), baseline, effort))
                self._take_back(waiting, running, found)
        except BaseException:  # Ctrl-C too: what runs would disturb what is measured next
            for node in {node for node, _ in running.values()}:
                self._dismiss(node)
            raise
        return [found[k] for k in range(len(schedules))]

    def _hand_out(self, waiting: deque[_Batch], running: dict[Any, Any], asked: _Asked) -> None:
        """Give each worker that has none a batch."""
        if not self._workers:
            self._recruit()
        busy = {node for node, _ in running.values()}
        for node in [node for node in self._workers if node not in busy][: len(waiting)]:
            batch = waiting.popleft()
            batch.deadline = time.monotonic() + self.timeout * len(batch.schedules)
            batch.tries += 1
            answer = self._workers[node].measure.remote(asked, list(batch.schedules))
            running[answer] = (node, batch)

    def _take_back(self, waiting: deque[_Batch], running: dict[Any, Any], found: dict[int, Measurement]) -> None:
        """Wait for one answer, or the first deadline."""
        first = min(batch.deadline for _, batch in running.values())
        done, _ = self._ray.wait(list(running), num_returns=1, timeout=max(0.0, first - time.monotonic()))
        late = [answer for answer, (_, batch) in running.items() if batch.deadline < time.monotonic()]
        for answer in done or late:
            node, batch = running.pop(answer)
            measured = self._answer(answer, node, batch) if done else self._too_late(node, batch)
            if measured is None:
                waiting.appendleft(batch)
            else:
                found |= enumerate(measured, batch.first)

    def _answer(self, answer: Any, node: str, batch: _Batch) -> list[Measurement] | None:
        """What a worker measured, None when it died and another may try."""
        try:
            measured = [Measurement(**fields) for fields in self._ray.get(answer)]
        except self._ray.exceptions.RayTaskError as error:
            raise ClusterError(f"node {self._names[node]} cannot measure: {_cause(error)}") from None
        except self._ray.exceptions.RayError as error:
            self._dismiss(node)
            if batch.tries < 2:
                return None
            return _failed(batch, "crashed", f"node {self._names[node]} died, and one before: {_cause(error)}")
        if [m.schedule for m in measured] != list(batch.schedules):
            raise ClusterError(f"node {self._names[node]} measured other schedules than it was asked for")
        return measured

    def _too_late(self, node: str, batch: _Batch) -> list[Measurement]:
        self._dismiss(node)
        seconds = self.timeout * len(batch.schedules)
        return _failed(batch, "timeout", f"node {self._names[node]} gave no answer for {seconds:g} s")

    # ---- workers -----------------------------------------------------------------------------------------------

    def _recruit(self) -> None:
        """Have a worker on each node that may measure. Raises ClusterError when there is none."""
        asked = {}
        for node in self._ray.nodes():
            name, cpus = node["NodeID"], node["Resources"].get("CPU", 0)
            self._names[name] = f"{node['NodeName']} ({name[:8]})"
            if node["Alive"] and cpus and name not in self._workers and self._names[name] not in self.refused:
                self._workers[name] = self._start(name, cpus)
                asked[self._workers[name].identity.remote()] = name
        deadline = time.monotonic() + self.start_timeout
        problems = {}
        for answer, name in asked.items():
            reason = self._objection(answer, max(0.1, deadline - time.monotonic()))
            if reason:
                problems[self._names[name]] = reason
                self._dismiss(name)
        if not self._workers:
            reasons = [f"\n  {name}: {reason}" for name, reason in {**self.refused, **problems}.items()]
            listed = "".join(reasons) or ": no node is alive that has CPUs; `ray start --address=...` adds one"
            raise ClusterError(f"nothing can be measured on the Ray cluster at {self.address}{listed}")
        self.refused |= problems

    def _start(self, node: str, cpus: float) -> Any:
        here = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
        worker = self._ray.remote(_Worker).options(num_cpus=cpus, scheduling_strategy=here, max_restarts=0)
        return worker.remote(self.make, self.identify)

    def _objection(self, answer: Any, timeout: float) -> str:
        """Why a worker may not measure, "" when it may."""
        try:
            found = self._ray.get(answer, timeout=timeout)
        except self._ray.exceptions.GetTimeoutError:
            return f"did not start within {self.start_timeout:g} s; its CPUs may be taken by another job"
        except self._ray.exceptions.RayError as error:
            return f"does not start: {_cause(error)}"
        wrong = {name: (found.get(name), want) for name, want in self.identify().items() if found.get(name) != want}
        return "; ".join(f"its {name} is {other!r}, not {want!r}" for name, (other, want) in wrong.items())

    def _dismiss(self, node: str) -> None:
        worker = self._workers.pop(node, None)
        if worker is not None and self._ray.is_initialized():
            self._ray.kill(worker)


def _ray() -> Any:
    try:
        import ray
        import ray.util.scheduling_strategies
    except ModuleNotFoundError:
        raise ClusterError(
            "measuring on a cluster needs Ray: pip install 'tilewright[ray]', here and on all nodes"
        ) from None
    return ray


def _failed(batch: _Batch, status: Any, error: str) -> list[Measurement]:
    return [Measurement(schedule, status, error=error) for schedule in batch.schedules]


def _cause(error: BaseException) -> str:
    """The last line that says something: Ray's messages hold tracebacks and hints."""
    cause = getattr(error, "cause", None) or error
    lines = [text.strip() for text in str(cause).splitlines() if text.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else ''}"
