// A few queries against the keys and values of one row: softmax(q·K) V, float32, chunk by chunk of keys, and the chunks
// merged by their maxima. Where a chunk begins depends on nothing but its number, and chunks are merged in order, so a
// query's numbers do not change with the number of threads or of queries beside it.
#pragma once
#include "products.h"

enum { HEADER = 16, KEYS_AT_ONCE = 64, KEYS_AHEAD = 96, MOST_QUERIES = 256, WIDEST_HEAD = 256, MOST_ROWS = 32 };

typedef struct {
    int32_t bfloat16;  // what keys and values are stored in; otherwise float32
    int32_t heads, kv_heads, dim;
    float softcap;  // 0: none
} Heads;

typedef struct {  // the new tokens among the slots of a store, and what each of them sees
    int32_t start, count;        // their slots: start..start+count-1
    int32_t stop;                // behind the last slot in use
    int32_t sinks;               // slots 0..sinks-1 are visible to all
    int32_t first[MOST_ROWS];    // then slots first[row]..stop-1, the new ones aside
    uint32_t sees[MOST_ROWS];    // and of the new tokens those whose bit is set
} Visible;

// A chunk's result for one query before division by `sum`: top, sum, out [dim].
static inline size_t partial_size(const Heads *heads) { return heads->dim + HEADER; }

static inline int chunk_start(int chunk) {  // 64 keys a chunk up to slot 512, 256 up to 4,096, then 1,024
    if (chunk <= 8) return 64 * chunk;
    return chunk <= 22 ? 512 + 256 * (chunk - 8) : 4096 + 1024 * (chunk - 22);
}

static inline int chunks_of(int keys) {
    int chunks = 0;
    while (chunk_start(chunks) < keys) chunks++;
    return chunks;
}

static inline size_t row_size(const Heads *heads) { return (size_t)heads->dim * (heads->bfloat16 ? 2 : 4); }

static inline floats load_stored(const Heads *heads, const char *row, int at) {
    return heads->bfloat16 ? load_bfloat16((const uint16_t *)row + at) : load((const float *)row + at);
}

static inline floats capped(floats score, float softcap) {  // softcap · tanh(score / softcap)
    floats grown = exponential(-2 * maximum(score / softcap, -score / softcap));
    floats size = softcap * (1 - grown) / (1 + grown);
    ints negative = score < splat(0);
    return (floats)(((ints)-size & negative) | ((ints)size & ~negative));
}

typedef struct {  // the queries that share a KV head: query i is head i % group of row i / group
    const float *q;
    size_t stride;  // from one row to the next
    int group, count;
} Queries;

static inline const float *query(const Queries *queries, int i, int dim) {
    return queries->q + (i / queries->group) * queries->stride + (size_t)(i % queries->group) * dim;
}

// scores[i] of `count` keys (at most KEYS_AT_ONCE); -inf behind them. The values, wanted next, and the keys after these are
// fetched from memory meanwhile.
static void score(const Heads *heads, const Queries *queries, const char *keys, const char *values, int count,
                  float (*scores)[KEYS_AT_ONCE]) {
    const int dim = heads->dim;
    const size_t row = row_size(heads);
    float wide[LANES * WIDEST_HEAD];
    for (int first = 0; first < count; first += LANES) {
        const int present = count - first < LANES ? count - first : LANES;
        for (int i = 0; i < LANES; i++) {  // beyond the last key its neighbour stands in
            const char *key = keys + row * (first + (i < present ? i : present - 1));
            for (size_t at = 0; at < row; at += 64) {
                __builtin_prefetch(key + row * KEYS_AHEAD + at);
                __builtin_prefetch(values + row * (first + i) + at);
            }
            for (int at = 0; at < dim; at += LANES) store(wide + i * dim + at, load_stored(heads, key, at));
        }
        for (int each = 0; each < queries->count; each++) {
            const float *q = query(queries, each, dim);
            floats dot[LANES];
            for (int i = 0; i < LANES; i++) dot[i] = load(wide + i * dim) * load(q);
            for (int at = LANES; at < dim; at += LANES)
                for (int i = 0; i < LANES; i++) dot[i] += load(wide + i * dim + at) * load(q + at);
            floats all = sums_of_lanes(dot);
            store(scores[each] + first, heads->softcap ? capped(all, heads->softcap) : all);
            for (int i = present; i < LANES; i++) scores[each][first + i] = -INFINITY;
        }
    }
}

// Hides what a query does not see among the slots from `first` on.
static void hide(const Visible *visible, const Queries *queries, int first, int count, float (*scores)[KEYS_AT_ONCE]) {
    for (int each = 0; each < queries->count; each++) {
        const int row = each / queries->group, from = visible->first[row];
        if (first >= from && first + count <= visible->start) continue;
        for (int i = 0; i < count; i++) {
            const int slot = first + i, fresh = slot - visible->start, is_new = fresh >= 0 && fresh < visible->count;
            const int seen = is_new ? (int)(visible->sees[row] >> fresh & 1) : slot >= from || slot < visible->sinks;
            if (!seen) scores[each][i] = -INFINITY;
        }
    }
}

// Turns scores into weights e^(score - top), and what was summed before into the new scale.
static void weigh(float *partial, float *scores, int count, int dim) {
    float *out = partial + HEADER;
    floats top = splat(partial[0]);
    for (int at = 0; at < count; at += LANES) top = maximum(top, load(scores + at));
    const float highest = largest(top);
    const float base = highest == -INFINITY ? 0 : highest;  // nothing is visible yet
    floats total = splat(0);
    for (int at = 0; at < count; at += LANES) {
        floats weight = exponential(load(scores + at) - splat(base));
        store(scores + at, weight);
        total += weight;
    }
    const float shrink = partial[1] ? expf(partial[0] - base) : 0;
    partial[1] = partial[1] * shrink + sum(total);
    partial[0] = highest;
    for (int at = 0; at < dim; at += LANES) store(out + at, load(out + at) * shrink);
}

// out += weights · values, for `count` queries.
FOLDED void gather_for(const Heads *heads, float *partials, size_t size, const char *values, int keys,
                       float (*weights)[KEYS_AT_ONCE], const int count) {
    const size_t row = row_size(heads);
    for (int at = 0; at < heads->dim; at += LANES) {
        floats out[4] = {0};
        for (int i = 0; i < keys; i++) {
            floats value = load_stored(heads, values + row * i, at);
            for (int each = 0; each < count; each++) out[each] += weights[each][i] * value;
        }
        for (int each = 0; each < count; each++) {
            float *into = partials + each * size + HEADER + at;
            store(into, load(into) + out[each]);
        }
    }
}

static void gather(const Heads *heads, float *partials, size_t size, int count, const char *values, int keys,
                   float (*weights)[KEYS_AT_ONCE]) {
    for (int from = 0; from < count; from += 4) {
        float *into = partials + from * size;
        switch (count - from) {
            case 1: gather_for(heads, into, size, values, keys, weights + from, 1); break;
            case 2: gather_for(heads, into, size, values, keys, weights + from, 2); break;
            case 3: gather_for(heads, into, size, values, keys, weights + from, 3); break;
            default: gather_for(heads, into, size, values, keys, weights + from, 4);
        }
    }
}

// One chunk of one KV head, slots start..stop-1 -> partials [queries]; scores too, where `kept` [queries, width] is given.
static void attend_chunk(const Heads *heads, const Visible *visible, const Queries *queries, const char *keys, const char *values,
                         int start, int stop, float *partials, float *kept, size_t width) {
    const size_t row = row_size(heads), size = partial_size(heads);
    float scores[MOST_QUERIES][KEYS_AT_ONCE];
    for (int each = 0; each < queries->count; each++) {
        float *partial = partials + each * size;
        memset(partial, 0, sizeof(float) * size);
        partial[0] = -INFINITY;
    }
    for (int first = start; first < stop; first += KEYS_AT_ONCE) {
        const int count = stop - first < KEYS_AT_ONCE ? stop - first : KEYS_AT_ONCE;
        score(heads, queries, keys + row * first, values + row * first, count, scores);
        hide(visible, queries, first, count, scores);
        for (int each = 0; kept && each < queries->count; each++)
            memcpy(kept + each * width + first, scores[each], sizeof(float) * count);
        for (int each = 0; each < queries->count; each++) weigh(partials + each * size, scores[each], count, heads->dim);
        gather(heads, partials, size, queries->count, values + row * first, count, scores);
    }
}

// partials (of chunk i at partials + i · stride) -> out [dim], all for one query. Returns the log of the sum of e^score.
static float merge(const Heads *heads, const float *partials, size_t stride, int chunks, float *out) {
    float top = -INFINITY, total = 0;
    for (int i = 0; i < chunks; i++) top = partials[i * stride] > top ? partials[i * stride] : top;
    for (int at = 0; at < heads->dim; at += LANES) store(out + at, splat(0));
    for (int i = 0; i < chunks; i++) {
        const float *partial = partials + i * stride;
        if (!partial[1]) continue;
        const float weight = expf(partial[0] - top);
        total += weight * partial[1];
        for (int at = 0; at < heads->dim; at += LANES) store(out + at, load(out + at) + weight * load(partial + HEADER + at));
    }
    for (int at = 0; at < heads->dim; at += LANES) store(out + at, load(out + at) / total);
    return top + logf(total);
}
