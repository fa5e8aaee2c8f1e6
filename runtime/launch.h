/* How a program for a GPU runs its kernels: by functions of the CUDA driver that the caller passes, so that nothing is linked. */
#ifndef TILEWRIGHT_LAUNCH_H
#define TILEWRIGHT_LAUNCH_H

#include <stddef.h>
#include <stdint.h>

enum { TW_LAUNCH_FAILED = 100 };

typedef struct {
    int (*launch)(void *function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned shared, void *stream,
                  void **params, void **extra);           /* cuLaunchKernel */
    int (*copy)(uint64_t to, uint64_t from, size_t bytes, void *stream); /* cuMemcpyDtoDAsync */
    int (*wait)(void *stream);                            /* cuStreamSynchronize after each kernel, to find one that fails */
    void *stream;
    void *const *functions;
    int32_t failed, error;                                /* the function that could not run, and the driver's error */
} tw_device;

static inline int32_t tw_launch(tw_device *d, int32_t function, int64_t x, int64_t y, int64_t z, unsigned threads,
                                unsigned shared, void **params) {
    if (x <= 0 || y <= 0 || z <= 0) return 0;
    d->failed = function;
    d->error = d->launch(d->functions[function], (unsigned)x, (unsigned)y, (unsigned)z, threads, 1, 1, shared, d->stream, params, 0);
    if (!d->error && d->wait) d->error = d->wait(d->stream);
    return d->error ? TW_LAUNCH_FAILED : 0;
}

#endif
