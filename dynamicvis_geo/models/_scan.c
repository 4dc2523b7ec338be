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
    int64_t bf16;   /* 1 if the strided tensors are bfloat16, 0 if float32 */
    int64_t next;   /* the first piece that no worker has taken */
    int64_t failed; /* 1 if a worker had no memory */
    Tensor u, dt, b, c, gate, out;
    const float *a, *d, *dt_bias; /* [channels, states], [channels], [channels] */
} Scan;

typedef struct {
    int64_t directions, batch, length, channels, taps;
    int64_t bf16, next, failed;
    Tensor x, out;
    const float *weight, *bias; /* [taps, channels], [channels] */
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

/* NaN comes through the comparison; not every NaN comes through an exponential. */
INLINE float softplus(float x) {
    return (x < 0.0f ? 0.0f : x) + log1p_unit(exponential(-fabsf(x)));
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

/* Load `count` of LANES numbers as float32; the others become zero. Conversions are loops
 * over arrays of their own, since compilers vectorise only those. */
INLINE void load(float *RESTRICT to, const void *data, int64_t at, int64_t count,
                 int64_t bf16) {
    uint32_t bits[LANES] = {0};
    uint16_t narrow[LANES] = {0};
    if (!bf16) {
        memcpy(bits, (const float *)data + at, (size_t)count * sizeof(float));
    } else {
        memcpy(narrow, (const uint16_t *)data + at, (size_t)count * sizeof(uint16_t));
        for (int i = 0; i < LANES; i++) bits[i] = narrow[i];
        for (int i = 0; i < LANES; i++) bits[i] <<= 16;
    }
    memcpy(to, bits, sizeof bits);
}

/* bfloat16 as PyTorch rounds to it: to the nearest, ties to even, and one NaN. Of this,
 * GCC makes code for single numbers unless it is told that these are vectors. */
#ifdef __GNUC__
typedef uint32_t Wide __attribute__((vector_size(4 * LANES)));
typedef uint16_t Narrow __attribute__((vector_size(2 * LANES)));
#endif

INLINE void round_to_bf16(uint16_t *RESTRICT to, const float *RESTRICT from) {
#ifdef __GNUC__
    Wide bits;
    memcpy(&bits, from, sizeof bits);
    Wide is_nan = (Wide)((bits & 0x7fffffff) > 0x7f800000);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    Narrow rounded = __builtin_convertvector((bits & ~is_nan) | (is_nan & 0x7fc0), Narrow);
    memcpy(to, &rounded, sizeof rounded);
#else
    for (int i = 0; i < LANES; i++) {
        uint32_t bits = to_bits(from[i]);
        uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        to[i] = (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
    }
#endif
}

/* Store the first `count` of LANES numbers. */
INLINE void store(const Tensor *tensor, int64_t at, const float *RESTRICT from,
                  int64_t count, int64_t bf16) {
    uint16_t narrow[LANES];
    if (!bf16) {
        memcpy((float *)tensor->data + at, from, (size_t)count * sizeof(float));
        return;
    }
    round_to_bf16(narrow, from);
    memcpy((uint16_t *)tensor->data + at, narrow, (size_t)count * sizeof(uint16_t));
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
        load(buffer + j, tensor->data, at + j, smaller(LANES, states - j), 1);
    return buffer;
}

/* Room for A, the states, and B and C of one token, rounded up to whole loads. */
INLINE int64_t scan_room(int64_t states) {
    return 2 * LANES * states + 2 * (states + LANES);
}

INLINE void scan_piece(const Scan *scan, int64_t direction, int64_t sample,
                       int64_t first, int64_t count, int64_t bf16,
                       float *RESTRICT scratch) {
    int64_t states = scan->states, length = scan->length;

    float *a = scratch, *state = a + states * LANES;
    float *b_buffer = state + states * LANES, *c_buffer = b_buffer + states + LANES;
    float us[LANES], dts[LANES], gates[LANES];
    float step[TILE * LANES], drive[TILE * LANES], y[TILE * LANES];
    float skip[LANES] = {0}, bias[LANES] = {0};
    memset(scratch, 0, (size_t)(2 * states * LANES) * sizeof(float));
    for (int64_t i = 0; i < count; i++) {
        skip[i] = scan->d[first + i];
        bias[i] = scan->dt_bias[first + i];
        for (int64_t j = 0; j < states; j++) {
            float rate = scan->a[(first + i) * states + j];
            a[j * LANES + i] = rate == rate ? rate * LOG2_E : NAN;
        }
    }
    for (int64_t start = 0; start < length; start += TILE) {
        int64_t tokens = smaller(TILE, length - start);
        int64_t token = direction ? length - 1 - start : start;
        int64_t forward = direction ? -1 : 1;
        for (int64_t t = 0; t < tokens; t++) {
            int64_t u = row(&scan->u, direction, sample, token + t * forward);
            int64_t dt = row(&scan->dt, direction, sample, token + t * forward);
            load(us, scan->u.data, u + first, count, bf16);
            load(dts, scan->dt.data, dt + first, count, bf16);
            prepare(step + t * LANES, drive + t * LANES, dts, bias, us);
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
            load(us, scan->u.data, u + first, count, bf16);
            load(gates, scan->gate.data, gate + first, count, bf16);
            finish(y + t * LANES, skip, us, gates);
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
    for (int64_t piece; (piece = TAKE(&scan->next)) < pieces;) {
        int64_t direction = piece / blocks / scan->batch;
        int64_t sample = piece / blocks % scan->batch;
        int64_t first = piece % blocks * LANES, count = scan->channels - first;
        if (count < LANES)
            scan_piece(scan, direction, sample, first, count, scan->bf16, scratch);
        else if (scan->bf16)
            scan_piece(scan, direction, sample, first, LANES, 1, scratch);
        else
            scan_piece(scan, direction, sample, first, LANES, 0, scratch);
    }
    free(scratch);
}

/* ---- the convolution ---- */

/* The last tap is the token's own; those before it are of tokens that come before in
 * direction 0 and after in direction 1. Beyond the ends of the sequence is nothing. */
INLINE void convolve(const Conv *conv, int64_t direction, int64_t sample, int64_t token,
                     int64_t first, int64_t count, int64_t bf16) {
    int64_t own = conv->taps - 1, turn = direction ? 1 : -1;
    int64_t seen = smaller(own, direction ? conv->length - 1 - token : token);
    int64_t x = row(&conv->x, 0, sample, token + turn * seen) + first;
    int64_t out = row(&conv->out, direction, sample, token) + first;
    float sum[LANES], taps[LANES], tokens[LANES];
    load(sum, conv->bias, first, count, 0);
    for (int64_t k = own - seen; k <= own; k++, x -= turn * conv->x.token) {
        load(taps, conv->weight, k * conv->channels + first, count, 0);
        load(tokens, conv->x.data, x, count, bf16);
        for (int i = 0; i < LANES; i++) sum[i] += taps[i] * tokens[i];
    }
    for (int i = 0; i < LANES; i++) sum[i] = silu(sum[i]);
    store(&conv->out, out, sum, count, bf16);
}

INLINE void conv_token(const Conv *conv, int64_t direction, int64_t sample,
                       int64_t token, int64_t bf16) {
    int64_t first = 0, whole = conv->channels - LANES;
    for (; first <= whole; first += LANES)
        convolve(conv, direction, sample, token, first, LANES, bf16);
    if (first < conv->channels)
        convolve(conv, direction, sample, token, first, conv->channels - first, bf16);
}

INLINE void conv_pieces(Conv *conv) {
    int64_t tiles = (conv->length + TILE - 1) / TILE;
    for (int64_t piece; (piece = TAKE(&conv->next)) < tiles * conv->batch;) {
        int64_t sample = piece / tiles, start = piece % tiles * TILE;
        int64_t end = smaller(start + TILE, conv->length);
        for (int64_t direction = 0; direction < conv->directions; direction++)
            for (int64_t token = start; token < end; token++) {
                if (conv->bf16) conv_token(conv, direction, sample, token, 1);
                else conv_token(conv, direction, sample, token, 0);
            }
    }
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
EXPORT int version(void) { return 2; }

#ifdef _MSC_VER
/* setuptools asks the linker for it on Windows; nobody imports this library. */
EXPORT void *PyInit__scan(void) { return 0; }
#endif
