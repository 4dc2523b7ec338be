/* The selective scan and the causal convolution of Mamba on the CPU.
 *
 * Plain C without headers of Python or PyTorch: scan_c.py loads this library with ctypes
 * and describes tensors by pointer and strides. Every tensor is channel-last. A worker
 * takes pieces of work (one direction, one sample, LANES channels, the whole sequence)
 * from a shared counter until none is left, so any number of threads may run one, and
 * no result depends on which thread computed it.
 *
 * Loops over LANES are what compilers vectorise; the pointers are `restrict` for that.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#define INLINE static __forceinline
#define RESTRICT __restrict
#define EXPORT __declspec(dllexport)
#define TAKE(counter) _InterlockedExchangeAdd64(counter, 1)
#else
#define INLINE static inline __attribute__((always_inline))
#define RESTRICT restrict
#define EXPORT __attribute__((visibility("default")))
#define TAKE(counter) __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED)
#endif

enum {
    LANES = 16, /* channels at a time: one cache line of float32 */
    TILE = 32   /* tokens whose time steps, inputs and outputs are kept in L1 */
};

/* Strides count elements; channels are adjacent. */
typedef struct {
    void *data;
    int64_t direction, sample, token;
} Tensor;

typedef struct {
    int64_t directions, batch, length, channels, states;
    int64_t bf16; /* 1 if the strided tensors are bfloat16, 0 if float32 */
    int64_t next;   /* the first piece that no worker has taken */
    int64_t failed; /* 1 if a worker had no memory */
    Tensor u, dt, b, c, gate, out;
    const float *a, *d, *dt_bias; /* [channels, states], [channels], [channels] */
} Scan;

typedef struct {
    int64_t directions, batch, length, channels, taps;
    int64_t bf16, next, failed;
    Tensor x, out;
    const float *weight, *bias; /* [channels, taps], [channels] or null */
} Conv;

/* ---- numbers ---- */

INLINE float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE uint32_t to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

/* x, or zero if a condition holds: by bits, since compilers turn ?: into branches. */
INLINE float unless(int condition, float x) {
    return from_bits(to_bits(x) & ((uint32_t)condition - 1));
}

/* Adding this rounds a float to an integer, which then stands in its lowest bits. */
#define ROUND 12582912.0f
#define LOG2_E 1.44269504f

/* 2^(n + f) with |f| <= 1/2 and n in the lowest bits of `rounded`; minimax, 1 ulp. */
INLINE float power(float rounded, float f) {
    float p = 0.00015353362f;
    p = p * f + 0.0013398874f;
    p = p * f + 0.009618437f;
    p = p * f + 0.055503324f;
    p = p * f + 0.24022648f;
    p = p * f + 0.6931472f;
    p = p * f + 1.0f;
    return from_bits(to_bits(p) + (to_bits(rounded) << 23));
}

/* 2^x for x <= 0; zero where float32 would be subnormal. */
INLINE float exp2_negative(float x) {
    float rounded = x + ROUND;
    return unless(x < -126.0f, power(rounded, x - (rounded - ROUND)));
}

/* e^x for x <= 88; ln 2 is split so that n * ln 2 is subtracted without rounding. */
INLINE float exponential(float x) {
    float rounded = x * LOG2_E + ROUND;
    float n = rounded - ROUND;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    return unless(x < -87.0f, power(rounded, r * LOG2_E));
}

/* log(1 + x) for x in 0..1; minimax of log(1 + x) / x. */
INLINE float log1p_unit(float x) {
    float p = -0.00324398f;
    p = p * x + 0.01985126f;
    p = p * x - 0.05695916f;
    p = p * x + 0.10603617f;
    p = p * x - 0.1530557f;
    p = p * x + 0.19675931f;
    p = p * x - 0.24954132f;
    p = p * x + 0.33329962f;
    p = p * x - 0.49999902f;
    p = p * x + 1.0f;
    return p * x;
}

INLINE float softplus(float x) {
    return (x > 0.0f ? x : 0.0f) + log1p_unit(exponential(-fabsf(x)));
}

INLINE float silu(float x) {
    return x / (1.0f + exponential(x < -87.0f ? 87.0f : -x));
}

/* ---- rows of tensors ---- */

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Where the channels of a token start. */
INLINE int64_t row(const Tensor *tensor, int64_t direction, int64_t sample,
                   int64_t token) {
    return direction * tensor->direction + sample * tensor->sample +
           token * tensor->token;
}

/* Give LANES channels as float32, of which `count` exist and the others are zero: where
 * they are if that is how they lie there, else in `buffer`. */
INLINE const float *load(float *RESTRICT buffer, const Tensor *tensor, int64_t at,
                         int64_t count, int64_t bf16) {
    const float *wide = (const float *)tensor->data + at;
    const uint16_t *RESTRICT narrow = (const uint16_t *)tensor->data + at;
    if (count >= LANES && !bf16) return wide;
    if (count >= LANES) {
        for (int i = 0; i < LANES; i++) buffer[i] = from_bits((uint32_t)narrow[i] << 16);
        return buffer;
    }
    for (int i = 0; i < LANES; i++) {
        if (i >= count) buffer[i] = 0.0f;
        else buffer[i] = bf16 ? from_bits((uint32_t)narrow[i] << 16) : wide[i];
    }
    return buffer;
}

/* bfloat16 as PyTorch rounds to it: to the nearest, ties to even. */
INLINE uint16_t to_bf16(float x) {
    uint32_t bits = to_bits(x);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return x == x ? (uint16_t)rounded : 0x7fc0;
}

INLINE void store(const Tensor *tensor, int64_t at, const float *RESTRICT from,
                  int64_t count, int64_t bf16) {
    float *RESTRICT wide = (float *)tensor->data + at;
    uint16_t *RESTRICT narrow = (uint16_t *)tensor->data + at;
    if (count >= LANES && !bf16) {
        memcpy(wide, from, LANES * sizeof(float));
    } else if (count >= LANES) {
        for (int i = 0; i < LANES; i++) narrow[i] = to_bf16(from[i]);
    } else {
        for (int i = 0; i < count; i++) {
            if (bf16) narrow[i] = to_bf16(from[i]);
            else wide[i] = from[i];
        }
    }
}

/* ---- the scan ---- */

INLINE void prepare(float *RESTRICT step, float *RESTRICT drive,
                    const float *RESTRICT dt, const float *RESTRICT bias,
                    const float *RESTRICT u) {
    for (int i = 0; i < LANES; i++) {
        step[i] = softplus(dt[i] + bias[i]);
        drive[i] = step[i] * u[i];
    }
}

/* One step of the states: y = C . s. `a` holds A log2(e). */
INLINE void advance(float *RESTRICT y, float *RESTRICT state, int64_t states,
                    const float *RESTRICT a, const float *RESTRICT step,
                    const float *RESTRICT drive, const float *RESTRICT b,
                    const float *RESTRICT c) {
    float sum[LANES] = {0};
    for (int64_t j = 0; j < states; j++) {
        for (int i = 0; i < LANES; i++) {
            float decay = exp2_negative(step[i] * a[j * LANES + i]);
            float s = decay * state[j * LANES + i] + drive[i] * b[j];
            state[j * LANES + i] = s;
            sum[i] += s * c[j];
        }
    }
    for (int i = 0; i < LANES; i++) y[i] = sum[i];
}

INLINE void finish(float *RESTRICT y, const float *RESTRICT skip,
                   const float *RESTRICT u, const float *RESTRICT gate) {
    for (int i = 0; i < LANES; i++) y[i] = (y[i] + skip[i] * u[i]) * silu(gate[i]);
}

INLINE const float *load_states(float *RESTRICT buffer, const Tensor *tensor, int64_t at,
                                int64_t states, int64_t bf16) {
    if (!bf16) return (const float *)tensor->data + at;
    for (int64_t j = 0; j < states; j += LANES)
        load(buffer + j, tensor, at + j, states - j, bf16);
    return buffer;
}

/* Room for A, the states, and B and C of one token, rounded up to whole loads. */
INLINE int64_t scan_room(int64_t states) {
    return 2 * LANES * states + 2 * (states + LANES);
}

INLINE void scan_piece(const Scan *scan, int64_t piece, float *RESTRICT scratch) {
    int64_t states = scan->states, length = scan->length, bf16 = scan->bf16;
    int64_t blocks = (scan->channels + LANES - 1) / LANES;
    int64_t first = piece % blocks * LANES;
    int64_t sample = piece / blocks % scan->batch;
    int64_t direction = piece / blocks / scan->batch;
    int64_t count = smaller(LANES, scan->channels - first);

    float *a = scratch, *state = a + states * LANES;
    float *b_buffer = state + states * LANES, *c_buffer = b_buffer + states + LANES;
    float u_buffer[LANES], buffer[LANES];
    float step[TILE * LANES], drive[TILE * LANES], y[TILE * LANES];
    float skip[LANES] = {0}, bias[LANES] = {0};
    memset(scratch, 0, (size_t)(2 * states * LANES) * sizeof(float));
    for (int64_t i = 0; i < count; i++) {
        skip[i] = scan->d[first + i];
        bias[i] = scan->dt_bias[first + i];
        for (int64_t j = 0; j < states; j++)
            a[j * LANES + i] = scan->a[(first + i) * states + j] * LOG2_E;
    }
    for (int64_t start = 0; start < length; start += TILE) {
        int64_t tokens = smaller(TILE, length - start);
        int64_t token = direction ? length - 1 - start : start;
        int64_t forward = direction ? -1 : 1;
        for (int64_t t = 0; t < tokens; t++) {
            int64_t u = row(&scan->u, direction, sample, token + t * forward);
            int64_t dt = row(&scan->dt, direction, sample, token + t * forward);
            prepare(step + t * LANES, drive + t * LANES,
                    load(buffer, &scan->dt, dt + first, count, bf16), bias,
                    load(u_buffer, &scan->u, u + first, count, bf16));
        }
        for (int64_t t = 0; t < tokens; t++) {
            int64_t b = row(&scan->b, direction, sample, token + t * forward);
            int64_t c = row(&scan->c, direction, sample, token + t * forward);
            advance(y + t * LANES, state, states, a, step + t * LANES, drive + t * LANES,
                    load_states(b_buffer, &scan->b, b, states, bf16),
                    load_states(c_buffer, &scan->c, c, states, bf16));
        }
        for (int64_t t = 0; t < tokens; t++) {
            int64_t u = row(&scan->u, direction, sample, token + t * forward);
            int64_t gate = row(&scan->gate, 0, sample, token + t * forward);
            int64_t out = row(&scan->out, direction, sample, token + t * forward);
            finish(y + t * LANES, skip,
                   load(u_buffer, &scan->u, u + first, count, bf16),
                   load(buffer, &scan->gate, gate + first, count, bf16));
            store(&scan->out, out + first, y + t * LANES, count, bf16);
        }
    }
}

INLINE void scan_pieces(Scan *scan) {
    int64_t blocks = (scan->channels + LANES - 1) / LANES;
    int64_t pieces = blocks * scan->batch * scan->directions;
    float *scratch = malloc((size_t)scan_room(scan->states) * sizeof(float));
    if (!scratch) {
        scan->failed = 1;
        return;
    }
    for (int64_t piece; (piece = TAKE(&scan->next)) < pieces;)
        scan_piece(scan, piece, scratch);
    free(scratch);
}

/* ---- the convolution ---- */

/* In direction 0 the last tap is the token's own, in direction 1 the filter is turned. */
INLINE void convolve(float *RESTRICT sum, const float *RESTRICT x,
                     const float *RESTRICT weight, const float *RESTRICT bias,
                     int64_t taps, int64_t direction) {
    for (int i = 0; i < LANES; i++) sum[i] = bias[i];
    for (int64_t k = 0; k < taps; k++) {
        int64_t at = direction ? 2 * (taps - 1) - k : k;
        for (int i = 0; i < LANES; i++)
            sum[i] += weight[k * LANES + i] * x[at * LANES + i];
    }
    for (int i = 0; i < LANES; i++) sum[i] = silu(sum[i]);
}

INLINE void conv_piece(const Conv *conv, int64_t piece, float *RESTRICT scratch) {
    int64_t taps = conv->taps, length = conv->length, bf16 = conv->bf16;
    int64_t tiles = (length + TILE - 1) / TILE;
    int64_t sample = piece / tiles, start = piece % tiles * TILE;
    int64_t tokens = smaller(TILE, length - start);
    int64_t rows = tokens + 2 * (taps - 1);

    /* x holds the tile and what a filter sees before and after it. */
    float *weight = scratch, *x = weight + taps * LANES;
    for (int64_t first = 0; first < conv->channels; first += LANES) {
        int64_t count = smaller(LANES, conv->channels - first);
        float bias[LANES] = {0};
        memset(weight, 0, (size_t)(taps * LANES) * sizeof(float));
        for (int64_t i = 0; i < count; i++) {
            if (conv->bias) bias[i] = conv->bias[first + i];
            for (int64_t k = 0; k < taps; k++)
                weight[k * LANES + i] = conv->weight[(first + i) * taps + k];
        }
        for (int64_t r = 0; r < rows; r++) {
            int64_t token = start + r - (taps - 1);
            int64_t at = row(&conv->x, 0, sample, token) + first;
            float *to = x + r * LANES;
            if (token < 0 || token >= length) {
                memset(to, 0, LANES * sizeof(float));
            } else {
                const float *from = load(to, &conv->x, at, count, bf16);
                if (from != to) memcpy(to, from, LANES * sizeof(float));
            }
        }
        for (int64_t direction = 0; direction < conv->directions; direction++) {
            for (int64_t t = 0; t < tokens; t++) {
                int64_t at = row(&conv->out, direction, sample, start + t) + first;
                float sum[LANES];
                convolve(sum, x + t * LANES, weight, bias, taps, direction);
                store(&conv->out, at, sum, count, bf16);
            }
        }
    }
}

INLINE void conv_pieces(Conv *conv) {
    int64_t pieces = (conv->length + TILE - 1) / TILE * conv->batch;
    int64_t rows = conv->taps + TILE + 2 * (conv->taps - 1);
    float *scratch = malloc((size_t)(rows * LANES) * sizeof(float));
    if (!scratch) {
        conv->failed = 1;
        return;
    }
    for (int64_t piece; (piece = TAKE(&conv->next)) < pieces;)
        conv_piece(conv, piece, scratch);
    free(scratch);
}

/* ---- one copy an instruction set, of which scan_c.py takes the best ---- */

#define COPY(set, target)                                        \
    EXPORT target void scan_##set(Scan *scan) { scan_pieces(scan); } \
    EXPORT target void conv_##set(Conv *conv) { conv_pieces(conv); }

COPY(baseline, )

#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
#define AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
COPY(avx2, __attribute__((target("avx2,fma"))))
#ifdef __clang__
COPY(avx512, __attribute__((target(AVX512))))
#else
COPY(avx512, __attribute__((target(AVX512 ",prefer-vector-width=512"))))
#endif

/* How many of baseline, avx2, avx512 this processor has. */
EXPORT int instruction_sets(void) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 1;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vl")
               ? 3
               : 2;
}
#else
EXPORT int instruction_sets(void) { return 1; }
#endif

/* To be raised with every change of a structure or of an exported function. */
EXPORT int version(void) { return 1; }

#ifdef _MSC_VER
/* setuptools asks the linker for it on Windows; nobody imports this library. */
EXPORT void *PyInit__scan(void) { return 0; }
#endif
