/* A few queries over many keys in float32: what scaled dot-product attention gives, with each key and value read once.

   A task is a piece of one head's keys. It takes BLOCK keys at a time, weighs their values by exp(score - largest so
   far), and shrinks what it has when a larger score comes; the pieces of a head are joined in the same way (Dao et al.,
   2022, arXiv:2205.14135). Lengths and strides count floats. headwise/compiled.py compiles this file and calls it. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCK = 64, ROWS = 8, WIDEST = 256, AHEAD = 16, LINE = 16 };

struct reading {
    const float *q, *k, *v; /* [B, H, R, d] without gaps; [B, H, K, d] and [B, H, K, dv] with the strides below */
    float *z;               /* [B, H, R, dv] */
    long batch, heads, rows, keys, size, size_v, k_batch, k_head, k_key, v_batch, v_head, v_key, pieces, threads;
    float scale;
};

/* As many floats as fit into a line of memory; compilers make of it what the processor has. */
typedef float lane __attribute__((vector_size(4 * LINE), aligned(4)));

/* What a task knows of its rows: the largest score, the sum of exp(score - largest), and the values weighed by it. */
struct rows {
    float q[ROWS * WIDEST], z[ROWS * WIDEST], top[ROWS], sum[ROWS];
};

/* exp(x) for x <= 0, to 2e-7 of itself; 0 below -87. Written out so that compilers make vectors of it. */
static inline float power(float x)
{
    float y = x * 1.44269504f;
    y = y < -126.0f ? -126.0f : y;
    int whole = (int)(y - 0.5f);
    float f = (y - (float)whole) * 0.693147181f;
    float p = 1.0f / 720;
    p = p * f + 1.0f / 120;
    p = p * f + 1.0f / 24;
    p = p * f + 1.0f / 6;
    p = p * f + 0.5f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    union { int bits; float value; } two = { (whole + 127) << 23 };
    return x < -87.0f ? 0.0f : p * two.value;
}

static inline __attribute__((always_inline)) void
block(const int count, const int size, const int size_v, const float *restrict q, float *restrict z, float *top,
      float *sum, const float *restrict k, const float *restrict v, long k_key, long v_key, int keys)
{
    float s[4][BLOCK];
    for (int j = 0; j < keys; j++) {
        const float *key = k + j * k_key;
        for (int i = 0; i < size; i += LINE) __builtin_prefetch(key + AHEAD * k_key + i);
        float x[4] = { 0, 0, 0, 0 };
        for (int i = 0; i < size; i++)
            for (int r = 0; r < count; r++) x[r] += q[r * size + i] * key[i];
        for (int r = 0; r < count; r++) s[r][j] = x[r];
    }
    for (int r = 0; r < count; r++) {
        float most = top[r], x = 0;
        for (int j = 0; j < keys; j++) most = s[r][j] > most ? s[r][j] : most;
        if (most > top[r]) {
            float less = expf(top[r] - most);
            top[r] = most;
            sum[r] *= less;
            for (int i = 0; i < size_v; i++) z[r * size_v + i] *= less;
        }
        for (int j = 0; j < keys; j++) {
            s[r][j] = power(s[r][j] - most);
            x += s[r][j];
        }
        sum[r] += x;
    }
    int from = 0;
    /* Four lanes of up to four rows at a time stay in registers. */
    for (; from + 4 * LINE <= size_v; from += 4 * LINE) {
        lane own[4][4];
        for (int r = 0; r < count; r++)
            for (int i = 0; i < 4; i++) own[r][i] = *(const lane *)(z + r * size_v + from + LINE * i);
        for (int j = 0; j < keys; j++) {
            const float *value = v + j * v_key + from;
            for (int i = 0; i < 4; i++) __builtin_prefetch(value + AHEAD * v_key + LINE * i);
            for (int r = 0; r < count; r++)
                for (int i = 0; i < 4; i++) own[r][i] += s[r][j] * ((const lane *)value)[i];
        }
        for (int r = 0; r < count; r++)
            for (int i = 0; i < 4; i++) *(lane *)(z + r * size_v + from + LINE * i) = own[r][i];
    }
    for (int j = 0; j < keys; j++)
        for (int r = 0; r < count; r++)
            for (int i = from; i < size_v; i++) z[r * size_v + i] += s[r][j] * v[j * v_key + i];
}

/* Up to four rows at a time; the commonest sizes by their number, so that loops unroll. */
#define FOUR(count, size, size_v)                                                                                      \
    block(count, size, size_v, at->q + r * size, at->z + r * size_v, at->top + r, at->sum + r, k, v, a->k_key,         \
          a->v_key, keys)
#define ROWS_OF(size, size_v)                                                                                          \
    for (long r = 0; r < a->rows; r += 4) {                                                                            \
        long count = a->rows - r;                                                                                      \
        if (count >= 4) FOUR(4, size, size_v);                                                                         \
        else if (count == 3) FOUR(3, size, size_v);                                                                    \
        else if (count == 2) FOUR(2, size, size_v);                                                                    \
        else FOUR(1, size, size_v);                                                                                    \
    }

static void piece(const struct reading *a, long task, long each, float *parts)
{
    long head = task / a->pieces, from = task % a->pieces * each, to = from + each < a->keys ? from + each : a->keys;
    const float *q = a->q + head * a->rows * a->size;
    struct rows own, *at = &own;
    for (long i = 0; i < a->rows * a->size; i++) at->q[i] = q[i] * a->scale;
    for (long i = 0; i < a->rows * a->size_v; i++) at->z[i] = 0;
    for (long r = 0; r < a->rows; r++) at->top[r] = -INFINITY, at->sum[r] = 0;
    const float *k = a->k + head / a->heads * a->k_batch + head % a->heads * a->k_head + from * a->k_key;
    const float *v = a->v + head / a->heads * a->v_batch + head % a->heads * a->v_head + from * a->v_key;
    for (; from < to; from += BLOCK, k += BLOCK * a->k_key, v += BLOCK * a->v_key) {
        int keys = to - from < BLOCK ? (int)(to - from) : BLOCK;
        if (a->size == 64 && a->size_v == 64) ROWS_OF(64, 64)
        else if (a->size == 128 && a->size_v == 128) ROWS_OF(128, 128)
        else ROWS_OF((int)a->size, (int)a->size_v)
    }
    for (long r = 0; r < a->rows; r++) {
        float *out = parts + (task * a->rows + r) * (a->size_v + 2);
        out[0] = at->top[r];
        out[1] = at->sum[r];
        memcpy(out + 2, at->z + r * a->size_v, (size_t)a->size_v * sizeof(float));
    }
}

static void join(const struct reading *a, long head, long row, const float *parts)
{
    float top = -INFINITY, sum = 0, *z = a->z + (head * a->rows + row) * a->size_v;
    const float *first = parts + (head * a->pieces * a->rows + row) * (a->size_v + 2);
    long step = a->rows * (a->size_v + 2);
    for (long p = 0; p < a->pieces; p++) top = first[p * step] > top ? first[p * step] : top;
    memset(z, 0, (size_t)a->size_v * sizeof(float));
    for (long p = 0; p < a->pieces; p++) {
        const float *part = first + p * step;
        float weight = expf(part[0] - top);
        sum += weight * part[1];
        for (long i = 0; i < a->size_v; i++) z[i] += weight * part[2 + i];
    }
    for (long i = 0; i < a->size_v; i++) z[i] /= sum;
}

/* 0; 1 where there are more rows or channels than there is room for, or no memory. */
int headwise_read(const struct reading *a)
{
    if (a->rows > ROWS || a->size > WIDEST || a->size_v > WIDEST) return 1;
    long each = (a->keys + a->pieces - 1) / a->pieces, tasks = a->batch * a->heads * a->pieces;
    float *parts = malloc((size_t)(tasks * a->rows * (a->size_v + 2)) * sizeof(float));
    if (parts == NULL) return 1;
#pragma omp parallel for num_threads((int)a->threads) schedule(static)
    for (long task = 0; task < tasks; task++) piece(a, task, each, parts);
    for (long head = 0; head < a->batch * a->heads; head++)
        for (long row = 0; row < a->rows; row++) join(a, head, row, parts);
    free(parts);
    return 0;
}
