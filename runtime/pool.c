/* Thread pool: each thread has a range of a region's tasks, and helps the others when it is through; workers spin
 * briefly, then park.
 *
 * A range is taken from the front in chunks that get smaller, so that a thread reads its weights as one stream; what is
 * left at the back is for threads that come to help. With a common counter neighbouring chunks go to different threads,
 * and products with one row read memory at half the speed.
 *
 * `state` says whether a region is open and how many workers are inside it. The caller opens a region, works on its
 * chunks, closes it and waits only for the workers that came in. A worker that is parked or descheduled is never
 * waited for, so a region costs little on a busy machine, and in a forked child (where no worker lives) it still runs.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* clock_gettime, sigset_t under -std=c11 */
#endif

#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__) || defined(__i386__)
#define PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE() ((void)0)
#endif

#define CACHE_LINE 64
#define MAX_THREADS 1024
#define STACK_BYTES (8u << 20)
#define SPIN_NS 1000000       /* longer than the gap between two decode steps, short enough to leave an idle host alone */
#define PURE_SPIN_NS 20000    /* after this each clock read yields: a woken worker may share the caller's processor */
#define SPINS_A_CLOCK_READ 64
#define CALLER_SPINS 1024
#define LEFT 4                /* a chunk leaves one part in so many of a range to helpers */
#define MOST_UNITS (1u << 30)

/* state: | stop 1 | epoch 14 | open 1 | workers inside 16 |. The epoch only keeps a worker from entering one region
 * twice: when it wraps, the worst is that a worker sits out one region. */
#define INSIDE 0x0000ffffu
#define OPEN 0x00010000u
#define EPOCH_ONE 0x00020000u
#define EPOCH 0x7ffe0000u
#define STOP 0x80000000u

/* A thread, and its part of the region: units [span >> 32, span & 0xffffffff) are still to be done. All that is known
 * about a range is in `span`, so a compare-and-swap that succeeds is right whatever happened in between. */
typedef struct {
    _Alignas(CACHE_LINE) _Atomic uint64_t span;
    tw_pool *pool;
    pthread_t thread;
} member;

struct tw_pool {
    _Alignas(CACHE_LINE) atomic_uint state; /* with what a worker reads on entry: one line moves */
    tw_task fn;
    void *arg;
    int64_t tasks, unit; /* a unit is `unit` tasks */
    _Alignas(CACHE_LINE) atomic_uint sleepers; /* may count too many, never too few: then a wake is wasted */
    int threads, spawned;
    int64_t spin_ns;
    pid_t owner;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    member members[]; /* the first is the caller */
};

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int ready(unsigned state, unsigned seen) {
    return (state & STOP) || ((state & OPEN) && (state & EPOCH) != seen);
}

static uint64_t span_of(uint64_t begin, uint64_t end) {
    return begin << 32 | end;
}

/* The next chunk of one's own range; 0 when it is empty. */
static int take(member *own, uint32_t *begin, uint32_t *end) {
    uint64_t span = atomic_load_explicit(&own->span, memory_order_relaxed);
    for (;;) {
        const uint32_t first = (uint32_t)(span >> 32), last = (uint32_t)span;
        if (first >= last) return 0;
        *begin = first;
        *end = last - (last - first) / LEFT;
        if (atomic_compare_exchange_weak_explicit(&own->span, &span, span_of(*end, last), memory_order_relaxed,
                                                  memory_order_relaxed))
            return 1;
    }
}

/* Moves the back half of another's range to the own one, which is empty; 0 when there is nothing. */
static int help(member *own, member *other) {
    uint64_t span = atomic_load_explicit(&other->span, memory_order_relaxed);
    for (;;) {
        const uint32_t first = (uint32_t)(span >> 32), last = (uint32_t)span;
        if (first >= last) return 0;
        const uint32_t middle = first + (last - first) / 2;
        if (!atomic_compare_exchange_weak_explicit(&other->span, &span, span_of(first, middle), memory_order_relaxed,
                                                   memory_order_relaxed))
            continue;
        atomic_store_explicit(&own->span, span_of(middle, last), memory_order_relaxed);
        return 1;
    }
}

static int help_someone(tw_pool *pool, int self) {
    for (int i = 1; i < pool->threads; i++)
        if (help(&pool->members[self], &pool->members[(self + i) % pool->threads])) return 1;
    return 0;
}

static void work(tw_pool *pool, int self) {
    const int64_t tasks = pool->tasks, unit = pool->unit;
    uint32_t begin, end;
    do {
        while (take(&pool->members[self], &begin, &end)) {
            const int64_t last = (int64_t)end * unit;
            pool->fn((int64_t)begin * unit, last < tasks ? last : tasks, pool->arg);
        }
    } while (help_someone(pool, self));
}

/* Sleeps until the next wake. The order matters: `sleepers` is raised before `state` is read, and the caller writes
 * `state` before it reads `sleepers`; both sequentially consistent, so one of the two sees the other. */
static void park(tw_pool *pool, unsigned seen) {
    pthread_mutex_lock(&pool->lock);
    atomic_fetch_add(&pool->sleepers, 1);
    if (!ready(atomic_load(&pool->state), seen)) pthread_cond_wait(&pool->wake, &pool->lock);
    pthread_mutex_unlock(&pool->lock);
}

static int forked(const tw_pool *pool) {
    return pool->owner != getpid();
}

static void wake_all(tw_pool *pool) {
    if (forked(pool)) return; /* nobody to wake, and a worker may have held the lock at the moment of the fork */
    pthread_mutex_lock(&pool->lock);
    atomic_store(&pool->sleepers, 0);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
}

static unsigned await_region(tw_pool *pool, unsigned seen) {
    for (;;) {
        int64_t start = now_ns(), spun;
        do {
            for (int i = 0; i < SPINS_A_CLOCK_READ; i++) {
                unsigned state = atomic_load_explicit(&pool->state, memory_order_relaxed);
                if (ready(state, seen)) return state;
                PAUSE();
            }
            spun = now_ns() - start;
            if (spun > PURE_SPIN_NS) sched_yield();
        } while (spun < pool->spin_ns);
        park(pool, seen);
    }
}

static void *worker(void *argument) {
    member *own = argument;
    tw_pool *pool = own->pool;
    const int self = (int)(own - pool->members);
    unsigned seen = 0;
    for (;;) {
        unsigned state = await_region(pool, seen);
        if (state & STOP) return NULL;
        if (!atomic_compare_exchange_weak_explicit(&pool->state, &state, state + 1, memory_order_acquire,
                                                   memory_order_relaxed))
            continue;
        work(pool, self);
        seen = state & EPOCH;
        atomic_fetch_sub_explicit(&pool->state, 1, memory_order_release);
    }
}

static void spawn(tw_pool *pool) {
    pthread_attr_t attributes;
    sigset_t blocked, before;
    /* Signals belong to the host program's threads; faults stay deliverable, for its crash handlers. */
    sigfillset(&blocked);
    sigdelset(&blocked, SIGSEGV);
    sigdelset(&blocked, SIGBUS);
    sigdelset(&blocked, SIGFPE);
    sigdelset(&blocked, SIGILL);
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    while (pool->spawned < pool->threads - 1) {
        member *next = &pool->members[pool->spawned + 1];
        if (pthread_create(&next->thread, &attributes, worker, next)) break;
        pool->spawned++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
}

tw_pool *tw_pool_create(int threads) {
    if (threads < 1) threads = 1;
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    size_t bytes = sizeof(tw_pool) + (size_t)threads * sizeof(member);
    tw_pool *pool = aligned_alloc(CACHE_LINE, bytes); /* both are multiples of the line */
    if (!pool) return NULL;
    atomic_init(&pool->state, 0);
    for (int i = 0; i < threads; i++) {
        atomic_init(&pool->members[i].span, 0);
        pool->members[i].pool = pool;
    }
    atomic_init(&pool->sleepers, 0);
    pool->threads = threads;
    pool->spawned = 0;
    /* More threads than processors: a spinning worker would take the processor from one that works. */
    pool->spin_ns = threads <= sysconf(_SC_NPROCESSORS_ONLN) ? SPIN_NS : 0;
    pool->owner = getpid();
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    spawn(pool);
    if (pool->spawned == threads - 1) return pool;
    tw_pool_destroy(pool);
    return NULL;
}

void tw_pool_destroy(tw_pool *pool) {
    if (!pool || forked(pool)) return; /* a forked child has the memory but not the threads */
    atomic_fetch_or(&pool->state, STOP);
    wake_all(pool);
    for (int i = 0; i < pool->spawned; i++) pthread_join(pool->members[i + 1].thread, NULL);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}

int tw_pool_threads(const tw_pool *pool) {
    return pool ? pool->threads : 1;
}

/* Cuts the region into units, and the units into a range for each thread, the first ones a unit longer. */
static void share(tw_pool *pool, int64_t tasks, int64_t grain) {
    const int64_t grains = (tasks - 1) / grain + 1;
    pool->tasks = tasks;
    pool->unit = ((grains - 1) / MOST_UNITS + 1) * grain;
    const uint32_t units = (uint32_t)((tasks - 1) / pool->unit + 1), threads = (uint32_t)pool->threads;
    uint32_t begin = 0;
    for (uint32_t i = 0; begin < units; i++) { /* the ranges of the other threads are empty since the last region */
        const uint32_t end = begin + units / threads + (i < units % threads);
        atomic_store_explicit(&pool->members[i].span, span_of(begin, end), memory_order_relaxed);
        begin = end;
    }
}

void tw_pool_run(tw_pool *pool, tw_task fn, void *arg, int64_t tasks, int64_t grain) {
    if (tasks <= 0) return;
    if (grain <= 0) grain = 1;
    if (!pool || pool->threads == 1 || tasks <= grain) {
        fn(0, tasks, arg);
        return;
    }
    pool->fn = fn;
    pool->arg = arg;
    share(pool, tasks, grain);
    unsigned state = atomic_load_explicit(&pool->state, memory_order_relaxed);
    atomic_store(&pool->state, ((state + EPOCH_ONE) & EPOCH) | OPEN);
    if (atomic_load(&pool->sleepers)) wake_all(pool);
    work(pool, 0);
    atomic_fetch_and_explicit(&pool->state, ~OPEN, memory_order_acq_rel);
    for (unsigned spins = 1; atomic_load_explicit(&pool->state, memory_order_acquire) & INSIDE; spins++) {
        PAUSE();
        if (spins > CALLER_SPINS && spins % SPINS_A_CLOCK_READ == 0) sched_yield(); /* that worker lost its processor */
    }
}
