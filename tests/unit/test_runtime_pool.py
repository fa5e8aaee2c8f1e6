"""The native thread pool: every task once, whatever the threads, tasks and grain; idle when there is nothing to do."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import threading
import time

import pytest

from tests.toy_artifact import compile_c

SOURCE = r"""
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>
#include "pool.h"
typedef struct { _Atomic unsigned char *hits; int64_t tasks; atomic_long wrong; } args;
static void task(int64_t begin, int64_t end, void *arg) {
    args *a = arg;
    if (begin < 0 || begin >= end || end > a->tasks) { atomic_fetch_add(&a->wrong, 1); return; }
    for (int64_t i = begin; i < end; i++) atomic_fetch_add_explicit(&a->hits[i], 1, memory_order_relaxed);
}
/* Regions over [0, tasks); the number of tasks that did not run exactly once in each. */
TW_EXPORT int64_t check(tw_pool *pool, int64_t regions, int64_t tasks, int64_t grain) {
    args a = {calloc(tasks + 1, 1), tasks, 0};
    for (int64_t r = 0; r < regions; r++) {
        tw_pool_run(pool, task, &a, tasks, grain);
        for (int64_t i = 0; i < tasks; i++) a.wrong += atomic_exchange(&a.hits[i], 0) != 1;
    }
    free((void *)a.hits);
    return a.wrong;
}
typedef struct { atomic_int inside, most; } meeting;
static void meet(int64_t begin, int64_t end, void *arg) {
    meeting *m = arg;
    (void)begin; (void)end;
    int now = atomic_fetch_add(&m->inside, 1) + 1;
    for (int most = m->most; now > most && !atomic_compare_exchange_weak(&m->most, &most, now);) {}
    usleep(20000);
    atomic_fetch_sub(&m->inside, 1);
}
/* The most tasks that were running at once. */
TW_EXPORT int together(tw_pool *pool, int64_t tasks) {
    meeting m = {0, 0};
    tw_pool_run(pool, meet, &m, tasks, 1);
    return m.most;
}
typedef struct { atomic_llong sum; atomic_int uneven; int64_t tasks, grain; } tally;
static void count(int64_t begin, int64_t end, void *arg) {
    tally *t = arg;
    atomic_fetch_add(&t->sum, end - begin);
    if (begin % t->grain || (end % t->grain && end != t->tasks)) atomic_fetch_add(&t->uneven, 1);
}
/* How many tasks ran in one region; -1 when a chunk was not made of whole grains. */
TW_EXPORT int64_t tasks_run(tw_pool *pool, int64_t tasks, int64_t grain) {
    tally t = {0, 0, tasks, grain};
    tw_pool_run(pool, count, &t, tasks, grain);
    return t.uneven ? -1 : t.sum;
}
typedef struct { pthread_t slow; atomic_int by_slow; } race;
static void first_is_slow(int64_t begin, int64_t end, void *arg) {
    race *r = arg;
    for (int64_t i = begin; i < end; i++) {
        if (i == 0) r->slow = pthread_self();
        usleep(i == 0 ? 100000 : 100);
    }
    if (begin == 0 || pthread_equal(r->slow, pthread_self())) atomic_fetch_add(&r->by_slow, (int)(end - begin));
}
/* How many of 64 tasks were done by the thread that has the first one, which takes long. */
TW_EXPORT int tasks_of_the_slow(tw_pool *pool) {
    race r = {pthread_self(), 0};
    tw_pool_run(pool, first_is_slow, &r, 64, 1);
    return r.by_slow;
}
typedef struct { int calls; int64_t begin, end; } record;
static void note(int64_t begin, int64_t end, void *arg) {
    record *r = arg;
    *r = (record){r->calls + 1, begin, end};
}
TW_EXPORT int inline_calls(tw_pool *pool, int64_t tasks, int64_t grain) {
    record r = {0, 0, 0};
    tw_pool_run(pool, note, &r, tasks, grain);
    return r.calls == 1 && (r.begin != 0 || r.end != tasks) ? -1 : r.calls;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("pool") / "pool.so"
    path.write_bytes(compile_c(SOURCE, "-std=c11", "-D_DEFAULT_SOURCE"))
    library = ctypes.CDLL(str(path))
    library.tw_pool_create.restype = ctypes.c_void_p
    library.tw_pool_destroy.argtypes = [ctypes.c_void_p]
    library.tw_pool_threads.argtypes = [ctypes.c_void_p]
    library.check.restype = ctypes.c_int64
    library.check.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64]
    library.together.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.tasks_run.restype = ctypes.c_int64
    library.tasks_run.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    library.tasks_of_the_slow.argtypes = [ctypes.c_void_p]
    library.inline_calls.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    return library


@pytest.fixture(params=[1, 2, 3, 8])
def pool(request, library):
    pool = library.tw_pool_create(request.param)
    assert library.tw_pool_threads(pool) == request.param
    yield pool
    library.tw_pool_destroy(pool)


@pytest.mark.parametrize("tasks", [0, 1, 2, 3, 7, 64, 1000])
@pytest.mark.parametrize("grain", [-1, 0, 1, 3, 64, 10**12])
def test_every_task_runs_once(library, pool, tasks, grain):
    assert library.check(pool, 20, tasks, grain) == 0


@pytest.mark.parametrize(("tasks", "grain"), [(10**6, 1), (10**6 + 7, 64), (2**40 + 1, 1), (2**62, 3), (100, 99)])
def test_chunks_are_of_whole_grains(library, pool, tasks, grain):
    assert library.tasks_run(pool, tasks, grain) == tasks


def test_others_take_over_what_a_slow_thread_has_not_begun(library):
    pool = library.tw_pool_create(2)
    assert library.tasks_of_the_slow(pool) < 32  # half of them were its own
    library.tw_pool_destroy(pool)


def test_ten_thousand_regions(library, pool):
    assert library.check(pool, 10_000, 16, 1) == 0


def test_regions_with_pauses_between_them(library, pool):
    for _ in range(30):
        time.sleep(0.002)  # around the time at which workers park
        assert library.check(pool, 3, 100, 1) == 0


def test_workers_take_part_after_parking(library):
    pool = library.tw_pool_create(4)
    for _ in range(2):
        time.sleep(0.02)
        assert library.together(pool, 8) > 1
    library.tw_pool_destroy(pool)


def test_small_regions_run_inline(library, pool):
    assert library.inline_calls(pool, 0, 1) == 0
    assert library.inline_calls(pool, -5, 1) == 0
    assert library.inline_calls(pool, 1, 1) == 1
    assert library.inline_calls(pool, 7, 7) == 1
    assert library.inline_calls(None, 1000, 1) == 1


def test_one_thread_makes_one_call(library):
    pool = library.tw_pool_create(1)
    assert library.inline_calls(pool, 1000, 1) == 1
    library.tw_pool_destroy(pool)


def test_pools_in_different_threads(library):
    wrong = []

    def run():
        pool = library.tw_pool_create(3)
        wrong.append(library.check(pool, 2000, 50, 2))
        library.tw_pool_destroy(pool)

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [0] * 6


def test_idle_pool_uses_no_processor(library):
    pool = library.tw_pool_create(2)
    library.check(pool, 100, 100, 1)
    before = _cpu_seconds()
    time.sleep(0.3)
    used = _cpu_seconds() - before
    library.tw_pool_destroy(pool)
    assert used < 0.1  # of 0.3 that a spinning worker would use


def _cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def test_destroy_ends_the_threads(library):
    before = len(os.listdir("/proc/self/task"))
    for _ in range(50):
        pool = library.tw_pool_create(4)
        library.check(pool, 3, 10, 1)
        library.tw_pool_destroy(pool)
    assert len(os.listdir("/proc/self/task")) == before
    library.tw_pool_destroy(None)


def test_region_runs_in_a_forked_child(library):
    """Forked at any moment: a worker may be about to park, with the pool's lock in its hand."""
    pool = library.tw_pool_create(3)
    for _ in range(40):
        library.check(pool, 3, 100, 1)
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # a hang would be a failure, and end
            wrong = library.check(pool, 3, 100, 1)
            library.tw_pool_destroy(pool)
            os._exit(0 if wrong == 0 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    library.tw_pool_destroy(pool)


def test_threads_are_at_least_one_and_bounded(library):
    for asked, got in [(0, 1), (-3, 1)]:
        pool = library.tw_pool_create(asked)
        assert library.tw_pool_threads(pool) == got
        library.tw_pool_destroy(pool)
