/* Sampling: a few vector passes over the logits, and a bounded selection of the most likely ones; nothing is sorted.
 *
 * A logit is compared through its key, an integer with the order of the number; key and id together are its rank, one
 * integer that orders all logits of a row without ties. What is kept are the ranks from some `cut` up.
 *
 * Loops of constant length over integers or single elements: compilers vectorise them for any target.
 */
#include "sampling.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 256
#define GROUP 32
#define KEY_INFINITY 0x7f800000
#define KEY_MINUS_INFINITY (-0x7f800001)
#define LEAST_EXPONENT (-708.0) /* below, exp leaves the normal doubles; such a token is never drawn */
#define LEAST_TEMPERATURE 1e-300 /* keeps the reciprocal finite */

typedef struct {
    const void *logits;
    int32_t dtype;
    int64_t count;
} row;

typedef struct {
    int64_t rank;
    double weight;
} candidate;

/* How logits become weights: exp((x - highest) / temperature). */
typedef struct {
    double highest, inverse;
} scale;

static inline int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* ---- numbers --------------------------------------------------------------------------------------------------- */

static inline int32_t key_of(float x) {
    int32_t bits;
    x += 0.0f; /* -0 becomes +0: they are a tie */
    memcpy(&bits, &x, 4);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

static inline float value_of(int32_t key) {
    float x;
    key ^= (key >> 31) & 0x7fffffff;
    memcpy(&x, &key, 4);
    return x;
}

static inline int64_t rank_of(int32_t key, int64_t id) {
    return (int64_t)key * ((int64_t)1 << 32) + (0x7fffffff - id);
}

static inline int32_t rank_key(int64_t rank) {
    return (int32_t)(rank >> 32);
}

static inline float from_bf16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline float from_f16(uint16_t half) {
    uint32_t bits = (uint32_t)(half & 0x7fff) << 13;
    const uint32_t special = bits >= 0x0f800000u ? 0x7f800000u : 0u, sign = (uint32_t)(half & 0x8000) << 16;
    float x;
    memcpy(&x, &bits, 4);
    x *= 0x1p112f; /* the exponent's other bias; subnormals come out right */
    memcpy(&bits, &x, 4);
    bits |= special | sign;
    memcpy(&x, &bits, 4);
    return x;
}

/* exp(x) for x <= 0 within 2 ulp; 0 below LEAST_EXPONENT. Written to be vectorised: no call, no branch, no table. */
static inline double exponential(double x) {
    const double round = 0x1.8p52;
    const uint64_t possible = -(uint64_t)(x > LEAST_EXPONENT);
    uint64_t bits;
    double t;
    memcpy(&bits, &x, 8);
    bits &= possible;
    memcpy(&t, &bits, 8);
    const double shifted = t * 1.4426950408889634 + round;
    const double n = shifted - round;
    const double r = (t - n * 0x1.62e42fefa3800p-1) - n * 0x1.ef35793c76730p-45; /* ln 2, high and low bits */
    double p = 1.0 / 479001600;
    p = p * r + 1.0 / 39916800;
    p = p * r + 1.0 / 3628800;
    p = p * r + 1.0 / 362880;
    p = p * r + 1.0 / 40320;
    p = p * r + 1.0 / 5040;
    p = p * r + 1.0 / 720;
    p = p * r + 1.0 / 120;
    p = p * r + 1.0 / 24;
    p = p * r + 1.0 / 6;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    memcpy(&bits, &shifted, 8); /* its low bits are n */
    bits = ((bits + 1023) << 52) & possible;
    double power;
    memcpy(&power, &bits, 8);
    return p * power;
}

static inline double weight_of(scale s, float x) {
    return exponential(((double)x - s.highest) * s.inverse);
}

/* ---- passes over a row ----------------------------------------------------------------------------------------- */

/* The values [begin, begin + n) of the row as f32, n <= BLOCK: in place, or converted into `buffer`. */
static const float *values(const row *r, int64_t begin, int64_t n, float *buffer) {
    if (r->dtype == TW_F32) return (const float *)r->logits + begin;
    const uint16_t *halves = (const uint16_t *)r->logits + begin;
    if (r->dtype == TW_BF16) {
        for (int64_t i = 0; i < n; i++) buffer[i] = from_bf16(halves[i]);
    } else {
        for (int64_t i = 0; i < n; i++) buffer[i] = from_f16(halves[i]);
    }
    return buffer;
}

static int32_t largest_key(const float *x, int64_t n) {
    int32_t most = INT32_MIN;
    for (int64_t i = 0; i < n; i++) {
        int32_t key = key_of(x[i]);
        most = key > most ? key : most;
    }
    return most;
}

/* The rank of the best logit, the first of equal ones; or -1 in `*id` where none can be chosen. */
static int32_t best(const row *r, int64_t *id) {
    float buffer[BLOCK];
    int32_t most = INT32_MIN, least = INT32_MAX;
    int64_t at = 0;
    for (int64_t begin = 0; begin < r->count; begin += BLOCK) {
        const int64_t n = smaller(BLOCK, r->count - begin);
        const float *x = values(r, begin, n, buffer);
        int32_t high = INT32_MIN, low = INT32_MAX;
        for (int64_t i = 0; i < n; i++) {
            int32_t key = key_of(x[i]);
            high = key > high ? key : high;
            low = key < low ? key : low;
        }
        if (high > most) most = high, at = begin;
        least = low < least ? low : least;
    }
    *id = -1;
    /* NaN lies beyond the infinities, on the side of its sign. */
    if (most > KEY_INFINITY || least < KEY_MINUS_INFINITY || most == KEY_MINUS_INFINITY) return most;
    const float *x = values(r, at, smaller(BLOCK, r->count - at), buffer);
    int64_t i = 0;
    while (key_of(x[i]) != most) i++;
    *id = at + i;
    return most;
}

static double block_weights(scale s, const float *x, int64_t n, double *weights) {
    for (int64_t i = 0; i < n; i++) weights[i] = weight_of(s, x[i]);
    for (int64_t i = n; i < BLOCK; i++) weights[i] = 0;
    double sums[BLOCK / 2];
    for (int i = 0; i < BLOCK / 2; i++) sums[i] = weights[i] + weights[i + BLOCK / 2];
    for (int half = BLOCK / 4; half; half /= 2)
        for (int i = 0; i < half; i++) sums[i] += sums[i + half];
    return sums[0];
}

static double total_weight(const row *r, scale s) {
    float buffer[BLOCK];
    double weights[BLOCK], total = 0;
    for (int64_t begin = 0; begin < r->count; begin += BLOCK) {
        const int64_t n = smaller(BLOCK, r->count - begin);
        total += block_weights(s, values(r, begin, n, buffer), n, weights);
    }
    return total;
}

/* ---- selection ------------------------------------------------------------------------------------------------- */

static inline void swap(candidate *a, candidate *b) {
    candidate c = *a;
    *a = *b;
    *b = c;
}

/* Puts the ranks above some middle one of c[0, n) to the front, then that one; returns its index. */
static int64_t partition(candidate *c, int64_t n) {
    candidate *middle = c + n / 2, *last = c + n - 1;
    if (c->rank < middle->rank) swap(c, middle);
    if (c->rank < last->rank) swap(c, last);
    if (last->rank < middle->rank) swap(middle, last); /* now the median of three is the last */
    int64_t front = 0;
    for (int64_t i = 0; i < n - 1; i++)
        if (c[i].rank > last->rank) swap(c + front++, c + i);
    swap(c + front, last);
    return front;
}

/* The k-th largest rank of c[0, n), 1 <= k <= n; the k largest come to the front. */
static int64_t select_count(candidate *c, int64_t n, int64_t k) {
    for (;;) {
        int64_t at = partition(c, n);
        if (at + 1 == k) return c[at].rank;
        if (at >= k) {
            n = at;
        } else {
            c += at + 1, n -= at + 1, k -= at + 1;
        }
    }
}

/* The smallest rank of the fewest largest of c[0, n) whose weights reach `mass`; `*sum` is set to their weight. */
static int64_t select_mass(candidate *c, int64_t n, double mass, double *sum) {
    double before = 0;
    for (;;) {
        int64_t at = partition(c, n);
        double above = 0;
        for (int64_t i = 0; i < at; i++) above += c[i].weight;
        if (at && before + above >= mass) {
            n = at;
            continue;
        }
        before += above + c[at].weight;
        if (before >= mass || at + 1 == n) { /* rounding may leave the last one short */
            *sum = before;
            return c[at].rank;
        }
        c += at + 1, n -= at + 1;
    }
}

/* Appends to c what ranks above `cut` in the block, which begins at id `begin`. */
static int64_t append(candidate *c, int64_t used, const float *x, int64_t begin, int64_t n, int64_t cut) {
    for (int64_t first = 0; first < n; first += GROUP) {
        const int64_t end = smaller(first + GROUP, n);
        if (largest_key(x + first, end - first) < rank_key(cut)) continue;
        for (int64_t i = first; i < end; i++) {
            c[used].rank = rank_of(key_of(x[i]), begin + i);
            used += c[used].rank > cut;
        }
    }
    return used;
}

/* The k largest of the row, in c[0, k); c has room for 2 k + BLOCK + 1. Returns the smallest of their ranks. */
static int64_t top(const row *r, candidate *c, int64_t k) {
    float buffer[BLOCK];
    int64_t used = 0, cut = INT64_MIN;
    for (int64_t begin = 0; begin < r->count; begin += BLOCK) {
        const int64_t n = smaller(BLOCK, r->count - begin);
        const float *x = values(r, begin, n, buffer);
        if (largest_key(x, n) < rank_key(cut)) continue;
        used = append(c, used, x, begin, n, cut);
        if (used < 2 * k) continue;
        cut = select_count(c, used, k);
        used = k;
    }
    return select_count(c, used, k);
}

/* What may be in the nucleus of the whole row; `*used` of them. NULL when there is no memory.
 *
 * Tokens below total * (1 - top_p) / count hold less than 1 - top_p in all, so the others reach top_p. */
static candidate *likely(const row *r, scale s, double least, int64_t *used) {
    float buffer[BLOCK];
    const double bound = s.highest + log(least) / s.inverse;
    const float nearest = bound > -3.4e38 ? (float)bound : -3.4e38f;
    const int32_t lowest = key_of(nextafterf(nearest, -INFINITY));
    int64_t count = 0;
    for (int64_t begin = 0; begin < r->count; begin += BLOCK) {
        const int64_t n = smaller(BLOCK, r->count - begin);
        const float *x = values(r, begin, n, buffer);
        int32_t more = 0;
        for (int64_t i = 0; i < n; i++) more += key_of(x[i]) >= lowest;
        count += more;
    }
    candidate *c = malloc((size_t)(count + BLOCK + 1) * sizeof(candidate));
    if (!c) return NULL;
    *used = 0;
    for (int64_t begin = 0; begin < r->count; begin += BLOCK) {
        const int64_t n = smaller(BLOCK, r->count - begin);
        const float *x = values(r, begin, n, buffer);
        if (largest_key(x, n) >= lowest) *used = append(c, *used, x, begin, n, rank_of(lowest, r->count));
    }
    return c;
}

static double weigh(candidate *c, int64_t n, scale s) {
    double total = 0;
    for (int64_t i = 0; i < n; i++) total += c[i].weight = weight_of(s, value_of(rank_key(c[i].rank)));
    return total;
}

/* The smallest rank that is kept; `*total` is the weight of all that are. 0 when there is no memory. */
static int keep(const row *r, scale s, int64_t top_k, double top_p, int64_t *cut, double *total) {
    candidate *c;
    int64_t used = top_k;
    *cut = INT64_MIN;
    if (top_k > 0 && top_k < r->count) {
        c = malloc((size_t)(2 * top_k + BLOCK + 1) * sizeof(candidate));
        if (!c) return 0;
        *cut = top(r, c, top_k);
        *total = weigh(c, used, s);
    } else {
        *total = total_weight(r, s);
        if (top_p >= 1) return 1;
        c = likely(r, s, *total * (1 - top_p) / (double)r->count, &used);
        if (!c) return 0;
        weigh(c, used, s);
    }
    if (top_p < 1) *cut = select_mass(c, used, top_p * *total, total);
    free(c);
    return 1;
}

/* The first id, of ranks from `cut` up, where the sum of the weights exceeds `target`. */
static int64_t draw(const row *r, scale s, int64_t cut, double target) {
    float buffer[BLOCK];
    double weights[BLOCK], reached = 0;
    int64_t last = 0;
    for (int64_t begin = 0; begin < r->count; begin += BLOCK) {
        const int64_t n = smaller(BLOCK, r->count - begin);
        const float *x = values(r, begin, n, buffer);
        if (largest_key(x, n) < rank_key(cut)) continue;
        const double sum = block_weights(s, x, n, weights);
        if (cut == INT64_MIN && reached + sum <= target && begin + n < r->count) { /* beyond this block */
            reached += sum;
            continue;
        }
        for (int64_t i = 0; i < n; i++) {
            if (weights[i] == 0 || rank_of(key_of(x[i]), begin + i) < cut) continue;
            reached += weights[i];
            last = begin + i;
            if (reached > target) return last;
        }
    }
    return last; /* rounding left the sum short: the last one that is possible */
}

int64_t tw_sample(const void *logits, int32_t dtype, int64_t count, double temperature, int64_t top_k, double top_p,
                  double number) {
    const row r = {logits, dtype, count};
    int64_t id;
    const int32_t key = best(&r, &id);
    if (id < 0) return TW_SAMPLE_NONE;
    if (temperature == 0 || top_k == 1 || key == KEY_INFINITY) return id;
    const double t = temperature < LEAST_TEMPERATURE ? LEAST_TEMPERATURE : temperature;
    const scale s = {(double)value_of(key), 1 / t};
    int64_t cut;
    double total;
    if (!keep(&r, s, top_k, top_p, &cut, &total)) return TW_SAMPLE_MEMORY;
    return draw(&r, s, cut, number * total);
}
