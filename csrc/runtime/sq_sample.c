/* SPDX-License-Identifier: Apache-2.0 */
/* The next token from logits: softmax, top_k, top_p and a draw.
 *
 * All three look for a place in the tokens by descending weight, the lower index first among
 * equals: where so many tokens, or so much mass, is reached. Sorting a vocabulary would cost more
 * than a small model's step. So the place is found digit by digit, in the bits of the weights: a
 * positive double compares as its bits do. One pass sums the tokens of each digit, the digit that
 * the place lies in is kept, and only what is left at the end is sorted. */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "core/sq_internal.h"
#include "core/sq_threads.h"

enum {
    EXPONENT = 52,       /* the first digit is the exponent: 0 (with 0 itself) .. 1023 (1.0) */
    OCTAVES = 1024,      /* of weights in 0 .. 1 */
    DIGIT = 11,          /* bits of each digit behind it */
    DIGITS = 1 << DIGIT, /* 52 bits are four of them and one of 8 */
    FEW = 32,            /* tokens that are sorted */
    TURNS = 4,
    LANES = 16 /* maxima side by side, for the compiler to vectorize */
};

struct bin {
    double mass;
    int64_t count;
};

/* What is drawn from. */
struct weights {
    const double *w; /* [v] exp((logit - largest) / temperature), in 0 .. 1 */
    int64_t v, positive;
    double total;
    struct bin octaves[OCTAVES];
    int64_t *tokens; /* [v] scratch: those that a place may be among */
};

/* A place in the descending order: the mass and the number of tokens up to it, itself included. */
struct place {
    double mass;
    int64_t count, token;
};

/* Where a search stops: at the first token that brings count or mass there. */
struct goal {
    int64_t count;
    double mass;
};

static int
is_reached(const struct goal *goal, int64_t count, double mass)
{
    return count >= goal->count || mass >= goal->mass;
}

static uint64_t
bits_of(double weight)
{
    uint64_t bits;
    memcpy(&bits, &weight, sizeof bits);
    return bits;
}

/* The bin, from the last one down, that the goal is reached in; what lies above it is added to
 * `at`. The last one with tokens, if rounding leaves the goal unreached. */
static int64_t
find_bin(const struct bin *bins, int64_t count, const struct goal *goal, struct place *at)
{
    int64_t found = -1;
    struct place above = *at;
    for (int64_t b = count; b-- > 0;) {
        if (!bins[b].count) {
            continue;
        }
        found = b;
        *at = above;
        above.count += bins[b].count;
        above.mass += bins[b].mass;
        if (is_reached(goal, above.count, above.mass)) {
            break;
        }
    }
    return found;
}

/* Of the tokens, those whose weight has this digit, in order. Returns how many. */
static int64_t
keep_digit(const double *w, int64_t *tokens, int64_t count, int shift, uint64_t mask,
           uint64_t digit)
{
    int64_t kept = 0;
    for (int64_t i = 0; i < count; i++) {
        const int64_t token = tokens[i];
        tokens[kept] = token;
        kept += (bits_of(w[token]) >> shift & mask) == digit;
    }
    return kept;
}

/* Sorts few tokens by weight, the largest first; equal ones stay in order. */
static void
sort_tokens(const double *w, int64_t *tokens, int64_t count)
{
    for (int64_t i = 1; i < count; i++) {
        const int64_t token = tokens[i];
        int64_t j = i;
        for (; j > 0 && w[tokens[j - 1]] < w[token]; j--) {
            tokens[j] = tokens[j - 1];
        }
        tokens[j] = token;
    }
}

/* The tokens of one octave, narrowed digit by digit to few, or to equal ones. */
static int64_t
narrow(const struct weights *s, int64_t octave, const struct goal *goal, struct place *at)
{
    int64_t count = 0;
    for (int64_t i = 0; i < s->v; i++) {
        s->tokens[count] = i;
        count += (int64_t)(bits_of(s->w[i]) >> EXPONENT) == octave;
    }
    for (int left = EXPONENT; left > 0 && count > FEW;) {
        const int width = (int)sq_min_i64(DIGIT, left);
        const uint64_t mask = ((uint64_t)1 << width) - 1;
        struct bin bins[DIGITS] = {{0}};
        left -= width;
        for (int64_t i = 0; i < count; i++) {
            const double weight = s->w[s->tokens[i]];
            struct bin *bin = &bins[bits_of(weight) >> left & mask];
            bin->mass += weight;
            bin->count++;
        }
        const int64_t digit = find_bin(bins, (int64_t)1 << width, goal, at);
        count = keep_digit(s->w, s->tokens, count, left, mask, (uint64_t)digit);
    }
    if (count <= FEW) {
        sort_tokens(s->w, s->tokens, count);
    }
    return count;
}

static struct place
find_place(const struct weights *s, struct goal goal)
{
    struct place at = {.token = -1};
    const int64_t octave = find_bin(s->octaves, OCTAVES, &goal, &at);
    const int64_t count = narrow(s, octave, &goal, &at);
    for (int64_t i = 0; i < count; i++) {
        at.token = s->tokens[i];
        at.mass += s->w[at.token];
        at.count++;
        if (is_reached(&goal, at.count, at.mass)) {
            break;
        }
    }
    return at;
}

/* Draws among the first tokens that top_k and top_p leave. */
static int64_t
draw(const struct weights *s, int64_t top_k, double top_p, double uniform)
{
    struct place kept = {.mass = s->total, .count = s->positive};
    if (top_k > 0 && top_k < kept.count) {
        kept = find_place(s, (struct goal){.count = top_k, .mass = INFINITY});
    }
    if (top_p < 1) {
        kept = find_place(s, (struct goal){.count = kept.count, .mass = top_p * kept.mass});
    }
    /* the first beyond the uniform's share; the last one kept, if rounding leaves all below it */
    const double beyond = nextafter(uniform * kept.mass, INFINITY);
    return find_place(s, (struct goal){.count = kept.count, .mass = beyond}).token;
}

/* Fills the weights and the sums of octaves. Neighbours are often of one octave, whose sum would
 * then wait for the one before: they take turns in TURNS sums. */
static void
weigh(struct weights *s, double *w, const float *logits, double top, double temperature)
{
    struct bin turns[TURNS][OCTAVES];
    memset(turns, 0, sizeof turns);
    for (int64_t i = 0; i < s->v; i++) {
        w[i] = exp(((double)logits[i] - top) / temperature);
        struct bin *bin = &turns[i % TURNS][bits_of(w[i]) >> EXPONENT];
        bin->mass += w[i];
        bin->count++;
        s->positive += w[i] > 0;
    }
    for (int64_t b = 0; b < OCTAVES; b++) {
        for (int turn = 0; turn < TURNS; turn++) {
            s->octaves[b].mass += turns[turn][b].mass;
            s->octaves[b].count += turns[turn][b].count;
        }
        s->total += s->octaves[b].mass;
    }
}

/* The lowest index of the largest logit, or -1 if one is NaN or +Inf or all are -Inf. */
static int64_t
largest(const float *logits, int64_t v)
{
    float top[LANES], best = -INFINITY;
    int bad[LANES] = {0};
    int64_t i = 0, any = 0;
    for (int lane = 0; lane < LANES; lane++) {
        top[lane] = -INFINITY;
    }
    for (; i + LANES <= v; i += LANES) {
        for (int lane = 0; lane < LANES; lane++) {
            const float x = logits[i + lane];
            bad[lane] |= !(x < INFINITY);
            top[lane] = x > top[lane] ? x : top[lane];
        }
    }
    for (; i < v; i++) {
        any |= !(logits[i] < INFINITY);
        best = logits[i] > best ? logits[i] : best;
    }
    for (int lane = 0; lane < LANES; lane++) {
        any |= bad[lane];
        best = top[lane] > best ? top[lane] : best;
    }
    if (any || best == -INFINITY) {
        return -1;
    }
    for (i = 0; logits[i] != best; i++) {
    }
    return i;
}

sq_status
sq_sample(const float *logits, int64_t v, float temperature, int64_t top_k, float top_p,
          double uniform, void *workspace, int64_t *token)
{
    if (!logits || !workspace || !token) {
        return SQ_ERR_NULL;
    }
    if (v < 1) {
        return SQ_ERR_SHAPE;
    }
    if (!(temperature >= 0 && temperature < INFINITY) || top_k < 0 || !(top_p > 0 && top_p <= 1) ||
        !(uniform >= 0 && uniform < 1)) {
        return SQ_ERR_RANGE;
    }
    const int64_t best = largest(logits, v);
    if (best < 0) {
        return SQ_ERR_NONFINITE;
    }
    if (temperature == 0) {
        *token = best;
        return SQ_OK;
    }
    double *w = workspace;
    struct weights s = {.w = w, .v = v, .tokens = (int64_t *)(w + v)};
    weigh(&s, w, logits, (double)logits[best], (double)temperature);
    *token = draw(&s, top_k, (double)top_p, uniform);
    return SQ_OK;
}

struct sample_job {
    const float *logits;
    int64_t m, v, top_k, workers;
    float temperature, top_p;
    const double *uniform;
    char *workspace;
    int64_t *token;
    _Atomic int status; /* of a row that failed */
};

/* Items are workers: worker w takes rows w, w + workers, ... */
static void
sample_range(void *context, int64_t begin, int64_t end, int thread)
{
    struct sample_job *j = context;
    (void)thread;
    for (int64_t worker = begin; worker < end; worker++) {
        for (int64_t row = worker; row < j->m; row += j->workers) {
            const sq_status status = sq_sample(
                j->logits + row * j->v, j->v, j->temperature, j->top_k, j->top_p, j->uniform[row],
                j->workspace + worker * j->v * SQ_SAMPLE_BYTES, j->token + row);
            if (status != SQ_OK) {
                atomic_store(&j->status, (int)status);
            }
        }
    }
}

sq_status
sq_sample_rows(const float *logits, int64_t m, int64_t v, float temperature, int64_t top_k,
               float top_p, const double *uniform, int64_t workers, void *workspace, int64_t *token)
{
    int64_t elements;
    if (!logits || !uniform || !workspace || !token) {
        return SQ_ERR_NULL;
    }
    if (m < 0 || v < 1 || workers < 1) {
        return SQ_ERR_SHAPE;
    }
    if (!sq_product(m, v, &elements)) {
        return SQ_ERR_RANGE;
    }
    struct sample_job j = {.logits = logits,
                           .m = m,
                           .v = v,
                           .top_k = top_k,
                           .workers = workers,
                           .temperature = temperature,
                           .top_p = top_p,
                           .uniform = uniform,
                           .workspace = workspace,
                           .token = token,
                           .status = SQ_OK};
    sq_parallel_for(workers, 1, sample_range, &j);
    return (sq_status)atomic_load(&j.status);
}
