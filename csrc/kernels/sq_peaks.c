/* SPDX-License-Identifier: Apache-2.0 */
/* Register-only loops of each instruction set's multiply step, and the read loop: the bounds that
 * the packed kernels are measured against.
 *
 * The functions carry their instruction set as an attribute, are all static and are called only
 * after runs_here, so that no instruction leaks into code that runs anywhere. */
#include "kernels/sq_peaks.h"

#include <stdatomic.h>
#include <string.h>
#include <time.h>

#include "core/sq_cpu.h"
#include "core/sq_internal.h"
#include "core/sq_threads.h"

/* Independent chains of a loop: two a cycle of five cycles' latency, which leaves registers for the
 * operands. */
enum { CHAINS = 10 };

/* A loop of `step` on acc[c], c = 0 .. CHAINS - 1. HOLD makes a value opaque, so that the compiler
 * neither hoists the step nor drops its result. */
#define HOLD(reg, x) __asm__ volatile("" : "+" reg(x))
#define ISA(names) __attribute__((target(names)))
#define PEAK_LOOP(name, isa, type, reg, first, second, zero, step) \
    static isa void name(int64_t rounds)                           \
    {                                                              \
        type a = (first), b = (second), acc[CHAINS];               \
        UNROLL for (int c = 0; c < CHAINS; c++)                    \
        {                                                          \
            acc[c] = (zero);                                       \
        }                                                          \
        HOLD(reg, a);                                              \
        for (int64_t r = 0; r < rounds; r++) {                     \
            UNROLL for (int c = 0; c < CHAINS; c++)                \
            {                                                      \
                HOLD(reg, b);                                      \
                acc[c] = (step);                                   \
                HOLD(reg, acc[c]);                                 \
            }                                                      \
        }                                                          \
    }

static int
always(void)
{
    return 1;
}

/* Not a kernel's step: what shows whether two CPUs are two cores. */
static void
integer_loop(int64_t rounds)
{
    uint64_t acc[CHAINS] = {0}, a = 3;
    for (int64_t r = 0; r < rounds; r++) {
        UNROLL for (int c = 0; c < CHAINS; c++)
        {
            acc[c] = acc[c] * a + 1;
            HOLD("r", acc[c]);
        }
    }
}

/* ---- x86 -------------------------------------------------------------------------------- */

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

static int
has_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static int
has_avx512(void)
{
    return __builtin_cpu_supports("avx512f");
}

static int
has_avx512vnni(void)
{
    return __builtin_cpu_supports("avx512vnni");
}

/* Leaf 7, subleaf 1: a feature that not every compiler's __builtin_cpu_supports knows. */
static int
has_avxvnni(void)
{
    uint32_t a = 0, b, c, d;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

PEAK_LOOP(fma_256, ISA("avx2,fma"), __m256, "x", _mm256_set1_ps(0.5f), _mm256_set1_ps(0.25f),
          _mm256_setzero_ps(), _mm256_fmadd_ps(a, b, acc[c]))
PEAK_LOOP(a4_256, ISA("avx2"), __m256i, "x", _mm256_set1_epi8(1), _mm256_set1_epi8(1),
          _mm256_setzero_si256(), _mm256_add_epi16(acc[c], _mm256_maddubs_epi16(a, b)))

/* Eight steps of maddubs in 16 bits, then one widening: 8-bit activations. */
static inline __attribute__((always_inline, target("avx2"))) __m256i
a8_step(__m256i acc, __m256i a, __m256i b)
{
    __m256i sum = _mm256_maddubs_epi16(a, b);
    UNROLL for (int i = 1; i < 8; i++)
    {
        HOLD("x", b);
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b));
    }
    return _mm256_add_epi32(acc, _mm256_madd_epi16(sum, a));
}

PEAK_LOOP(a8_256, ISA("avx2"), __m256i, "x", _mm256_set1_epi16(1), _mm256_set1_epi8(1),
          _mm256_setzero_si256(), a8_step(acc[c], a, b))
PEAK_LOOP(int8_256, ISA("avx2"), __m256i, "x", _mm256_set1_epi16(1), _mm256_set1_epi8(1),
          _mm256_setzero_si256(),
          _mm256_add_epi32(acc[c], _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), a)))
PEAK_LOOP(dpbusd_256, ISA("avx2,avxvnni"), __m256i, "x", _mm256_set1_epi8(1), _mm256_set1_epi8(1),
          _mm256_setzero_si256(), _mm256_dpbusd_avx_epi32(acc[c], a, b))
PEAK_LOOP(fma_512, ISA("avx512f"), __m512, "v", _mm512_set1_ps(0.5f), _mm512_set1_ps(0.25f),
          _mm512_setzero_ps(), _mm512_fmadd_ps(a, b, acc[c]))
PEAK_LOOP(dpbusd_512, ISA("avx512f,avx512vnni"), __m512i, "v", _mm512_set1_epi32(0x01010101),
          _mm512_set1_epi32(0x01010101), _mm512_setzero_si512(), _mm512_dpbusd_epi32(acc[c], a, b))

/* CPUID's and XCR0's bits, then the permission that the kernel grants a process. */
static int
has_amx_int8(void)
{
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    uint32_t a, b, c, d, low, high;
    if (!has_avx512() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 24 & 3) != 3) {
        return 0;
    }
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low >> 17 & 3) == 3 &&
           !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}

/* Four accumulators of 16 x 16 from two tiles each way. One block of assembly, as no other
 * instruction may come between the configuration and the release. */
static void
amx_loop(int64_t rounds)
{
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t colsb[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    _Static_assert(sizeof config == 64, "the layout of ldtilecfg");
    for (int i = 0; i < 8; i++) {
        config.colsb[i] = 64;
        config.rows[i] = 16;
    }
    if (rounds < 1) {
        return;
    }
    __asm__ volatile(
        "ldtilecfg %1\n\t"
        "tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3\n\t"
        "tilezero %%tmm4\n\ttilezero %%tmm5\n\ttilezero %%tmm6\n\ttilezero %%tmm7\n"
        "1:\n\t"
        "tdpbsud %%tmm2, %%tmm0, %%tmm4\n\t"
        "tdpbsud %%tmm3, %%tmm0, %%tmm5\n\t"
        "tdpbsud %%tmm2, %%tmm1, %%tmm6\n\t"
        "tdpbsud %%tmm3, %%tmm1, %%tmm7\n\t"
        "dec %0\n\t"
        "jnz 1b\n\t"
        "tilerelease"
        : "+r"(rounds)
        : "m"(config)
        : "memory", "cc");
}
#endif

/* ---- ARM -------------------------------------------------------------------------------- */

#if defined(__aarch64__)
#include <arm_neon.h>

static int
has_dotprod(void)
{
    return (sq_cpu_features() & SQ_CPU_NEON_DOT) != 0;
}

#ifdef __clang__
#define DOTPROD ISA("dotprod")
#else
#define DOTPROD ISA("arch=armv8.2-a+dotprod")
#endif

static inline __attribute__((always_inline)) DOTPROD int32x4_t
sdot(int32x4_t acc, int32x4_t a, int32x4_t b)
{
    __asm__ volatile("sdot %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(a), "w"(b));
    return acc;
}

PEAK_LOOP(fma_neon, , float32x4_t, "w", vdupq_n_f32(0.5f), vdupq_n_f32(0.25f), vdupq_n_f32(0),
          vfmaq_f32(acc[c], a, b))
PEAK_LOOP(sdot_neon, DOTPROD, int32x4_t, "w", vdupq_n_s32(0x01010101), vdupq_n_s32(0x01010101),
          vdupq_n_s32(0), sdot(acc[c], a, b))
#endif

/* ---- the list --------------------------------------------------------------------------- */

static const struct sq_peak peaks[] = {
    {"int64 multiply-add", always, integer_loop, 2 * CHAINS},
#if defined(__x86_64__)
    {"fma 256", has_avx2, fma_256, 2 * 8 * CHAINS},
    {"maddubs + add16 256", has_avx2, a4_256, 2 * 32 * CHAINS},
    {"8 x (maddubs + add16), madd + add32 256", has_avx2, a8_256, 2 * 8 * 32 * CHAINS},
    {"maddubs + madd + add32 256", has_avx2, int8_256, 2 * 32 * CHAINS},
    {"dpbusd 256", has_avxvnni, dpbusd_256, 2 * 32 * CHAINS},
    {"fma 512", has_avx512, fma_512, 2 * 16 * CHAINS},
    {"dpbusd 512", has_avx512vnni, dpbusd_512, 2 * 64 * CHAINS},
    {"tdpbsud", has_amx_int8, amx_loop, 2 * 4 * 16 * 16 * 64},
#endif
#if defined(__aarch64__)
    {"fma neon", always, fma_neon, 2 * 4 * CHAINS},
    {"sdot neon", has_dotprod, sdot_neon, 2 * 16 * CHAINS},
#endif
    {NULL, NULL, NULL, 0},
};

const struct sq_peak *
sq_peaks(void)
{
    return peaks;
}

const struct sq_peak *
sq_peak_find(const char *name)
{
    for (const struct sq_peak *p = peaks; p->name; p++) {
        if (name && !strcmp(p->name, name)) {
            return p;
        }
    }
    return NULL;
}

static double
clock_seconds(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

double
sq_clock(void)
{
    return clock_seconds(CLOCK_MONOTONIC);
}

sq_status
sq_peak_measure(const struct sq_peak *peak, double seconds, double *operations_per_second)
{
    enum { FIRST_ROUNDS = 1000 };
    const double run_seconds = 1e-3; /* of CPU time: long beside the clock's own call */
    if (!peak || !operations_per_second) {
        return SQ_ERR_NULL;
    }
    if (!(seconds > 0 && seconds <= 60) || !peak->runs_here()) {
        return SQ_ERR_RANGE;
    }
    int64_t rounds = FIRST_ROUNDS;
    double best = 0;
    const double begin = sq_clock();
    while ((sq_clock() - begin < seconds || best == 0) && !sq_stopped()) {
        const double start = clock_seconds(CLOCK_THREAD_CPUTIME_ID);
        peak->loop(rounds);
        const double taken = clock_seconds(CLOCK_THREAD_CPUTIME_ID) - start;
        if (taken < run_seconds) {
            rounds *= 2;
        }
        else {
            const double rate = (double)rounds * (double)peak->operations / taken;
            best = rate > best ? rate : best;
        }
    }
    *operations_per_second = best;
    return SQ_OK;
}

/* ---- reading ---------------------------------------------------------------------------- */

typedef uint64_t words_t __attribute__((vector_size(32), aligned(1), may_alias));
enum { LINE_BYTES = 64, READ_CHUNK_BYTES = 1 << 18 };
#define PREFETCH_BYTES_MAX ((int64_t)1 << 20)

struct read_job {
    const char *data;
    size_t bytes; /* a multiple of 8 */
    int64_t prefetch_bytes;
    int streams;
    _Atomic uint64_t sum;
};

/* Exclusive or of `lines` cache lines of each of the streams, `stride` bytes apart. */
static inline __attribute__((always_inline)) uint64_t
read_lines(const char *data, int64_t lines, int64_t stride, int streams, int64_t ahead)
{
    words_t a = {0}, b = {0};
    for (int64_t i = 0; i < lines; i++) {
        for (int s = 0; s < streams; s++) {
            const char *p = data + s * stride + i * LINE_BYTES;
            if (ahead) {
                __builtin_prefetch(p + ahead, 0, 2);
            }
            a ^= *(const words_t *)p;
            b ^= *(const words_t *)(p + sizeof(words_t));
        }
    }
    a ^= b;
    return a[0] ^ a[1] ^ a[2] ^ a[3];
}

/* The cases whose loops the compiler unrolls, and the one for all others. */
static inline __attribute__((always_inline)) uint64_t
read_streams(const char *data, int64_t lines, int64_t stride, int streams, int64_t ahead)
{
    switch (streams) {
        case 1:
            return read_lines(data, lines, stride, 1, ahead);
        case 2:
            return read_lines(data, lines, stride, 2, ahead);
        case 4:
            return read_lines(data, lines, stride, 4, ahead);
        default:
            return read_lines(data, lines, stride, streams, ahead);
    }
}

static uint64_t
read_plain(const char *data, int64_t lines, int64_t stride, int streams, int64_t ahead)
{
    return read_streams(data, lines, stride, streams, ahead);
}

#if defined(__x86_64__)
static __attribute__((target("avx2"))) uint64_t
read_avx2(const char *data, int64_t lines, int64_t stride, int streams, int64_t ahead)
{
    return read_streams(data, lines, stride, streams, ahead);
}
#endif

static void
read_chunks(void *context, int64_t begin, int64_t end, int thread)
{
    struct read_job *job = context;
    const int64_t last = (int64_t)job->bytes;
    const int64_t from = begin * READ_CHUNK_BYTES, to = sq_min_i64(end * READ_CHUNK_BYTES, last);
    const int64_t lines = (to - from) / (LINE_BYTES * job->streams);
    const int64_t stride = lines * LINE_BYTES;
    (void)thread;
    uint64_t (*read)(const char *, int64_t, int64_t, int, int64_t) = read_plain;
#if defined(__x86_64__)
    if (has_avx2()) {
        read = read_avx2;
    }
#endif
    uint64_t sum = read(job->data + from, lines, stride, job->streams, job->prefetch_bytes);
    for (int64_t i = from + stride * job->streams; i < to; i += (int64_t)sizeof sum) {
        uint64_t word;
        memcpy(&word, job->data + i, sizeof word);
        sum ^= word;
    }
    atomic_fetch_xor(&job->sum, sum);
}

sq_status
sq_read_all(const void *data, size_t bytes, int64_t prefetch_bytes, int streams, uint64_t *out)
{
    if (!out || (bytes && !data)) {
        return SQ_ERR_NULL;
    }
    if (streams < 1 || streams > SQ_READ_STREAMS_MAX || prefetch_bytes < 0 ||
        prefetch_bytes > PREFETCH_BYTES_MAX || bytes > (size_t)INT64_MAX - READ_CHUNK_BYTES) {
        return SQ_ERR_RANGE;
    }
    uint64_t tail = 0;
    const size_t whole = bytes / sizeof tail * sizeof tail;
    if (bytes > whole) {
        memcpy(&tail, (const char *)data + whole, bytes - whole);
    }
    struct read_job job = {
        .data = data, .bytes = whole, .prefetch_bytes = prefetch_bytes, .streams = streams};
    atomic_init(&job.sum, tail);
    sq_parallel_for(sq_ceil_div((int64_t)whole, READ_CHUNK_BYTES), 1, read_chunks, &job);
    *out = atomic_load(&job.sum);
    return SQ_OK;
}
