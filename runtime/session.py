"""A session: the memory and threads to run the entries of a program, and the state (KV caches) between the calls."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tilewright.runtime.binding import bind, check_batch, check_positions, check_table, check_values, resolve
from tilewright.runtime.caches import SPARE, CacheSizes
from tilewright.runtime.errors import InputError, ProgramError, SessionError, program_failure
from tilewright.runtime.host import default_threads
from tilewright.runtime.manifest import DTYPES, EntrySpec
from tilewright.runtime.memory import Arena, address, aligned
from tilewright.runtime.pages import PagePool
from tilewright.runtime.sampling import Sampler, Sampling
from tilewright.runtime.states import States

if TYPE_CHECKING:
    from tilewright.runtime.generation import Step
    from tilewright.runtime.loader import Program

Array = np.ndarray[Any, Any]
_Plan = tuple[Any, int, list[tuple[int, ...]]]
"""The dims as the program takes them, the bytes of its arena and the shapes of its outputs."""


class Session:
    """Runs the entries of a program: ``session("forward", x=array) -> {"y": array}``.

    ``threads``: in all, the caller's included; default: the physical cores this process may use. ``batch``: the most
    sequences at a time. Calls from several threads run one after another. Memory: the arena of the largest call so far, and
    what is touched of the KV states: those of ``batch`` sequences or, where they are pages, ``pages`` of them or as many as
    fit into ``memory`` bytes; default: enough for ``batch`` sequences at full length. Close it, or use it in ``with``.

    ``pages``: the pool, of which sequences take theirs; None where the states have no pages.
    """

    def __init__(self, program: Program, threads: int | None = None, batch: int = 1, pages: int | None = None,
                 memory: int | None = None) -> None:  # fmt: skip
        for name, value in (("threads", threads), ("batch", batch), ("pages", pages), ("memory", memory)):
            _check_positive(name, value, optional=name != "batch")
        _check_batch(program, batch)
        self.program = program
        self.threads = threads or program.threads or default_threads()
        self.batch = batch
        self.sizes = CacheSizes.of(program.manifest.states)
        self.capacity = self.sizes.capacity
        count = self.sizes.pool(batch, pages, memory)
        self.pages = self._page_pool(count)
        self._library = program.library
        self._lock = threading.Lock()
        self._arena = Arena()
        self._plans: dict[str, tuple[tuple[int, ...], _Plan]] = {}
        self._lease = threading.Lock()
        self._lease_thread: int | None = None
        self._open()
        self._states = self._make_states(count)

    def _open(self) -> None:
        """Get what runs the program: threads."""
        pool = self._library.pool_create(self.threads)
        if not pool:
            raise MemoryError(f"cannot start {self.threads} threads; make the session with fewer")
        self._pool: int | None = pool
        self._finalizer = weakref.finalize(self, self._library.pool_destroy, pool)
        self._finalizer.atexit = False  # a daemon thread may still be running a region then

    def __call__(self, entry: str, /, **inputs: Any) -> dict[str, Array]:
        """Runs ``entry`` and returns its outputs by name, in arrays of their own.

        Inputs are arrays of the exact dtype, or numbers and nested lists. Raises InputError before anything runs,
        ProgramError when the program fails, SessionError after ``close``.
        """
        return self._bind(entry, inputs)()

    def bind(self, entry: str, /, **inputs: Any) -> Call:
        """``entry`` with copies of its inputs, to be run as often as wanted. Raises InputError."""
        return self._bind(entry, {name: copy.copy(value) for name, value in inputs.items()})

    def _bind(self, entry: str, inputs: Mapping[str, Any]) -> Call:
        spec = self.entry(entry)
        arrays, dims = bind(spec, inputs, entry)
        if spec.batch is not None:
            check_batch(spec, dims, self.batch, entry)
        return self._call(entry, spec, arrays, tuple(dims[dim.name] for dim in spec.dims))

    def _call(self, entry: str, spec: EntrySpec, arrays: Sequence[Array], sizes: tuple[int, ...]) -> Call:
        return Call(self, entry, spec, arrays, sizes)

    def entry(self, name: str) -> EntrySpec:
        """The signature of an entry. Raises InputError, listing those that exist."""
        entries = self.program.manifest.entries
        if name not in entries:
            raise InputError("entry", f"one of {list(entries)}", repr(name))
        return entries[name]

    def _run(self, call: Call) -> None:
        with self._lock:
            if self._pool is None:
                raise SessionError("the session is closed; make another one from its program")
            dims, arena_bytes, _ = call.plan
            code = self._library.run[call.entry](
                self._pool,
                dims,
                call.input_addresses,
                call.output_addresses,
                self._states.pointers(call.first) if call.spec.batch is not None else None,
                self.program.weights.address,
                self._arena.reserve(arena_bytes),
            )
        if code:
            raise program_failure(call.entry, code)

    def plan(self, entry: str, spec: EntrySpec, sizes: tuple[int, ...]) -> _Plan:
        """What the program needs for these sizes; the last answer for each entry is kept."""
        known = self._plans.get(entry)
        if known is None or known[0] != sizes:
            dims = (ctypes.c_int64 * max(1, len(sizes)))(*sizes)
            arena_bytes, shapes = self._ask_sizes(entry, spec, dims)
            _check_shapes(entry, spec, shapes, sizes)
            known = self._plans[entry] = sizes, (dims, arena_bytes, shapes)
        return known[1]

    def _ask_sizes(self, entry: str, spec: EntrySpec, dims: Any) -> tuple[int, list[tuple[int, ...]]]:
        ranks = [len(tensor.shape) for tensor in spec.outputs]
        answer = (ctypes.c_int64 * (1 + sum(ranks)))()
        self._library.sizes[entry](dims, answer)
        values = iter(answer)
        arena_bytes = next(values)
        return arena_bytes, [tuple(next(values) for _ in range(rank)) for rank in ranks]

    def _page_pool(self, count: int) -> PagePool | None:
        return PagePool(count, self.sizes.page, SPARE) if self.sizes.page else None

    def _make_states(self, pages: int) -> States:
        return States(self.program.manifest.states, self.batch, pages)

    def copy(self, index: int, to: int, paged: bool) -> None:
        """Copies a page of the KV states, or else what a sequence has of its own in them."""
        with self._lock:
            self._states.copy(index, to, paged)

    def sampler(self, sampling: Sampling) -> Sampler:
        """Chooses tokens as ``sampling`` says, by the program's native code."""
        return Sampler(self._library, sampling)

    def generate(
        self, prompts: Sequence[Sequence[int]] | Array, max_new_tokens: int, *,
        callback: Callable[[int, list[int | None]], object] | None = None, **options: Any,
    ) -> list[list[int]]:  # fmt: skip
        """The new tokens of each prompt: see ``tilewright.runtime.generation.generate``."""
        from tilewright.runtime.generation import generate

        return generate(self, prompts, max_new_tokens, callback=callback, **options)

    def stream(
        self, prompts: Sequence[Sequence[int]] | Array, max_new_tokens: int, **options: Any
    ) -> Generator[Step, None, None]:
        """Tokens as they come: see ``tilewright.runtime.generation.stream``."""
        from tilewright.runtime.generation import stream

        return stream(self, prompts, max_new_tokens, **options)

    @contextlib.contextmanager
    def lease(self) -> Iterator[None]:
        """Keeps the states for one generation. Others wait; a second one in the same thread raises SessionError."""
        thread = threading.get_ident()
        if self._lease_thread == thread and self._lease.locked():
            raise SessionError("another generation of this thread has not ended on this session; close its iterator "
                               "first, or make a second session from the program")
        with self._lease:
            self._lease_thread = thread
            try:
                yield
            finally:
                self._lease_thread = None

    @property
    def memory(self) -> dict[str, int]:
        """Bytes held: ``arena``, and ``states`` (reserved; only touched pages are resident)."""
        return {"arena": self._arena.bytes, "states": self._states.bytes}

    def reset(self) -> None:
        """Forgets the states and gives all memory back; the next call starts from zeros."""
        with self._lock:
            self._arena.release()
            self._states.release()
            self.pages = self._page_pool(self.pages.count) if self.pages else None

    def close(self) -> None:
        """Ends the threads and gives the memory back. Waits for a running call; safe to repeat."""
        with self._lock:
            self._pool = None
            self._finalizer()
            self._arena.release()
            self._states.release()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Call:
    """An entry of a session with its inputs in place: ``call()`` runs it and returns its outputs by name.

    ``inputs`` by name are the arrays that it reads: new values are written into them before the next call, which
    checks them. ``outputs`` are written by every call, so copy what is to outlive the next one.
    """

    def __init__(
        self, session: Session, entry: str, spec: EntrySpec, arrays: Sequence[Array], sizes: tuple[int, ...]
    ) -> None:
        self.session, self.entry, self.spec = session, entry, spec
        self.plan = session.plan(entry, spec, sizes)
        # Not zeroed. The allocator hands the same pages back once they are dropped.
        found = [self._array(shape, tensor.dtype) for tensor, shape in zip(spec.outputs, self.plan[2])]
        self.inputs = {tensor.name: array for tensor, array in zip(spec.inputs, arrays)}
        self.outputs = {tensor.name: output for tensor, output in zip(spec.outputs, found)}
        self.first = 0
        """The sequence, of those that the states hold, that the first row is."""
        self.readable = self.inputs
        """Inputs whose values can be looked at."""
        self._place(arrays, found)

    def _place(self, arrays: Sequence[Any], outputs: Sequence[Array]) -> None:
        """Find out where inputs and outputs are for the program."""
        self.input_addresses, self.output_addresses = _addresses(arrays), _addresses(outputs)

    def _array(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Memory for an output, with any contents."""
        return aligned(shape, DTYPES[dtype])

    def __call__(self) -> dict[str, Array]:
        """Runs the entry. Raises InputError before anything runs, ProgramError and SessionError as a session does."""
        check_values(self.spec, self.readable, self.entry)
        if self.spec.batch is not None:
            check_positions(self.readable, self.session.capacity, self.entry)
            if self.session.pages is not None:
                check_table(self.readable, self.session.pages.tokens, self.session.pages.end, self.entry)
        self.session._run(self)
        return self.outputs


def _addresses(arrays: Sequence[Array]) -> Any:
    return (ctypes.c_void_p * max(1, len(arrays)))(*map(address, arrays))


def _check_positive(name: str, value: int | None, optional: bool) -> None:
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(name, "an integer >= 1", repr(value))


def _check_batch(program: Program, batch: int) -> None:
    for name, entry in program.manifest.entries.items():
        limits = {dim.name: dim.max for dim in entry.dims}
        limit = resolve(entry.batch, limits)
        if limit is not None and batch > limit:
            raise InputError("batch", f"at most {limit}, what entry {name!r} was compiled for", str(batch),
                             "compile with a larger range of the dim, or use several sessions")


def _check_shapes(entry: str, spec: EntrySpec, shapes: Sequence[tuple[int, ...]], sizes: Sequence[int]) -> None:
    """The program must agree with its manifest about the outputs: the runtime allocates by the one, callers read the
    other."""
    dims = {dim.name: size for dim, size in zip(spec.dims, sizes)}
    for tensor, shape in zip(spec.outputs, shapes):
        known = [resolve(extent, dims) for extent in tensor.shape]
        if any(size < 0 or (want is not None and size != want) for want, size in zip(known, shape)):
            raise ProgramError(f"entry {entry!r} announces the shape {list(shape)} for its output {tensor.name!r}, "
                               f"the manifest says {list(tensor.shape)}; compile the artifact again")
