/* Native thread pool of an artifact, and the error codes of its programs. Compiled into every kernels.so. */
#ifndef TILEWRIGHT_POOL_H
#define TILEWRIGHT_POOL_H

#include <stdint.h>

#define TW_EXPORT __attribute__((visibility("default")))

/* What a program returns; runtime/errors.py explains each to the user. */
enum {
    TW_OK = 0,
    TW_ERROR_INDEX = 1,    /* an index (token id, gather index) is outside its table */
    TW_ERROR_CAPACITY = 2, /* start + tokens goes past the capacity of a KV state */
    TW_ERROR_MEMORY = 3    /* an allocation failed */
};

typedef struct tw_pool tw_pool;
typedef void (*tw_task)(int64_t begin, int64_t end, void *arg);

/* A pool of `threads` threads in all: the caller of tw_pool_run is one of them. NULL when a thread cannot be made. */
TW_EXPORT tw_pool *tw_pool_create(int threads);

/* Ends and joins the threads. No region may be running. NULL is allowed. */
TW_EXPORT void tw_pool_destroy(tw_pool *pool);

TW_EXPORT int tw_pool_threads(const tw_pool *pool);

/* Runs fn over [0, tasks) in disjoint chunks and returns when all are done. Chunks begin at multiples of `grain` tasks,
 * and all but the last have a multiple of it (grain <= 0: 1). One region at a time on a pool, and fn must not start
 * another on the same pool. At most `grain` tasks, a pool of one thread and a NULL pool run inline: fn(0, tasks, arg). */
TW_EXPORT void tw_pool_run(tw_pool *pool, tw_task fn, void *arg, int64_t tasks, int64_t grain);

#endif
