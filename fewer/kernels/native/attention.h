// One query against the keys and values of a row: softmax(q·K) V, float32, by parts that are merged by their maxima.
// How the keys are divided depends on how many there are and never on the number of threads, so neither do the sums.
#pragma once
#include "products.h"

enum { KEYS_AT_ONCE = 128, AHEAD = 128, MOST_PARTS = 8, MOST_GROUP = 64, WIDEST_HEAD = 256 };

typedef struct {
    int32_t bfloat16;             // what keys and values are stored in; otherwise float32
    int32_t heads, kv_heads, dim;
    float softcap;                // 0: none
} Heads;

typedef struct {  // one part's result for one query head, before division by `sum`
    float top, sum, out[WIDEST_HEAD];
} Partial;

static inline f32x16 load_stored(const Heads *heads, const char *row, int at) {
    return heads->bfloat16 ? load_bfloat16((const uint16_t *)row + at) : load((const float *)row + at);
}

static inline f32x16 capped(f32x16 score, float softcap) {  // softcap · tanh(score / softcap)
    f32x16 grown = exponential(-2 * maximum(score / softcap, -score / softcap));
    f32x16 size = softcap * (1 - grown) / (1 + grown);
    i32x16 negative = score < splat(0);
    return (f32x16)(((i32x16)-size & negative) | ((i32x16)size & ~negative));
}

// scores[i] of `count` keys (at most KEYS_AT_ONCE) for the queries q [group, dim]; -inf behind them. The values, wanted
// next, and the keys after these are fetched from memory meanwhile.
static void score(const Heads *heads, const float *q, int group, const char *keys, const char *values, int count,
                  float (*scores)[KEYS_AT_ONCE]) {
    const int dim = heads->dim;
    const size_t row = (size_t)dim * (heads->bfloat16 ? 2 : 4);
    float wide[LANES * WIDEST_HEAD];
    for (int first = 0; first < count; first += LANES) {
        int present = count - first < LANES ? count - first : LANES;
        for (int i = 0; i < LANES; i++) {  // beyond the last key its neighbour stands in
            const char *key = keys + row * (first + (i < present ? i : present - 1));
            for (size_t at = 0; at < row; at += 64) {
                __builtin_prefetch(key + row * AHEAD + at);
                __builtin_prefetch(values + row * (first + i) + at);
            }
            for (int at = 0; at < dim; at += LANES) store(wide + i * dim + at, load_stored(heads, key, at));
        }
        for (int g = 0; g < group; g++) {
            f32x16 dot[LANES];
            for (int i = 0; i < LANES; i++) dot[i] = load(wide + i * dim) * load(q + g * dim);
            for (int at = LANES; at < dim; at += LANES)
                for (int i = 0; i < LANES; i++) dot[i] += load(wide + i * dim + at) * load(q + g * dim + at);
            f32x16 all = sums_of_16(dot);
            store(scores[g] + first, heads->softcap ? capped(all, heads->softcap) : all);
        }
        for (int g = 0; g < group; g++)
            for (int i = present; i < LANES; i++) scores[g][first + i] = -INFINITY;
    }
}

// Turns scores into weights e^(score - top), and what was summed before into the new scale.
static void weigh(Partial *partial, float *scores, int count, int dim) {
    f32x16 top = splat(partial->top);
    for (int at = 0; at < count; at += LANES) top = maximum(top, load(scores + at));
    float highest = top[0];
    for (int i = 1; i < LANES; i++) highest = top[i] > highest ? top[i] : highest;
    f32x16 total = splat(0);
    for (int at = 0; at < count; at += LANES) {
        f32x16 weight = exponential(load(scores + at) - splat(highest));
        store(scores + at, weight);
        total += weight;
    }
    float shrink = partial->sum ? expf(partial->top - highest) : 0;
    partial->sum = partial->sum * shrink + sum(total);
    partial->top = highest;
    for (int at = 0; at < dim; at += LANES) store(partial->out + at, load(partial->out + at) * shrink);
}

// out += weights · values, sixteen channels and at most eight queries at a time.
static void gather(const Heads *heads, Partial *partials, int group, const char *values, int count, float (*weights)[KEYS_AT_ONCE]) {
    const size_t row = (size_t)heads->dim * (heads->bfloat16 ? 2 : 4);
    for (int from = 0; from < group; from += 4) {
        int queries = group - from < 4 ? group - from : 4;
        for (int at = 0; at < heads->dim; at += LANES) {
            f32x16 out[4] = {0};
            if (queries == 4)
                for (int i = 0; i < count; i++) {
                    f32x16 value = load_stored(heads, values + row * i, at);
                    for (int g = 0; g < 4; g++) out[g] += weights[from + g][i] * value;
                }
            else if (queries == 3)
                for (int i = 0; i < count; i++) {
                    f32x16 value = load_stored(heads, values + row * i, at);
                    for (int g = 0; g < 3; g++) out[g] += weights[from + g][i] * value;
                }
            else
                for (int i = 0; i < count; i++) {
                    f32x16 value = load_stored(heads, values + row * i, at);
                    for (int g = 0; g < queries; g++) out[g] += weights[from + g][i] * value;
                }
            for (int g = 0; g < queries; g++) {
                float *sum_of = partials[from + g].out + at;
                store(sum_of, load(sum_of) + out[g]);
            }
        }
    }
}

static inline int parts_of(int count) {
    int parts = 1;
    while (parts < MOST_PARTS && count > 64 * parts) parts *= 2;
    return parts;
}

// One part of one KV head: keys and values are those of slots start..stop-1, [.., dim]; q [group, dim] -> partials [group].
static void attend_part(const Heads *heads, const float *q, const char *keys, const char *values, int start, int stop, Partial *partials) {
    const int group = heads->heads / heads->kv_heads;
    const size_t row = (size_t)heads->dim * (heads->bfloat16 ? 2 : 4);
    float scores[MOST_GROUP][KEYS_AT_ONCE];
    for (int g = 0; g < group; g++) {
        partials[g].top = -INFINITY;
        partials[g].sum = 0;
        memset(partials[g].out, 0, sizeof(float) * heads->dim);
    }
    for (int first = start; first < stop; first += KEYS_AT_ONCE) {
        int count = stop - first < KEYS_AT_ONCE ? stop - first : KEYS_AT_ONCE;
        score(heads, q, group, keys + row * first, values + row * first, count, scores);
        for (int g = 0; g < group; g++) weigh(partials + g, scores[g], count, heads->dim);
        gather(heads, partials, group, values + row * first, count, scores);
    }
}

// partials [parts, heads] -> out [heads, dim].
static void merge(const Heads *heads, const Partial *partials, int parts, float *out) {
    for (int head = 0; head < heads->heads; head++, out += heads->dim) {
        float top = -INFINITY, total = 0, share_of[MOST_PARTS];
        for (int i = 0; i < parts; i++) {
            const Partial *part = partials + i * heads->heads + head;
            if (part->top > top) top = part->top;
        }
        for (int i = 0; i < parts; i++) {
            const Partial *part = partials + i * heads->heads + head;
            share_of[i] = part->sum ? expf(part->top - top) : 0;
            total += share_of[i] * part->sum;
        }
        for (int at = 0; at < heads->dim; at += LANES) {
            f32x16 mixed = splat(0);
            for (int i = 0; i < parts; i++)
                if (share_of[i]) mixed += share_of[i] * load(partials[i * heads->heads + head].out + at);
            store(out + at, mixed / total);
        }
    }
}
