/* Choosing a token from a row of logits. Compiled into every kernels.so. */
#ifndef TILEWRIGHT_SAMPLING_H
#define TILEWRIGHT_SAMPLING_H

#include "pool.h"

/* Element types of logits. */
enum { TW_F32 = 0, TW_BF16 = 1, TW_F16 = 2 };

/* What tw_sample returns besides a token. */
enum {
    TW_SAMPLE_NONE = -1,  /* the logits hold NaN, or all are -inf */
    TW_SAMPLE_MEMORY = -2 /* an allocation failed */
};

/* A token of logits [count], 1 <= count < 2^31; the smaller id wins a tie.
 *
 * `temperature` 0 takes the largest. Otherwise the `top_k` largest are kept (0: all), of these the fewest largest whose
 * probabilities reach `top_p` (1: all), and a token is drawn: the first, in the order of ids, where the cumulative
 * probability exceeds `number`, which is in [0, 1). */
TW_EXPORT int64_t tw_sample(const void *logits, int32_t dtype, int64_t count, double temperature, int64_t top_k,
                            double top_p, double number);

#endif
