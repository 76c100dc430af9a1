// A few tokens of one sequence through a decoder on the CPU: every thread runs the same function and computes its share of
// each product's rows; what is small (norms, rotation, the activation) every thread computes for itself, which is cheaper
// than a meeting.
#include "network.h"
#include "threads.h"
#include <stdlib.h>

// What all threads see, in floats, and what each has for itself. Buffers begin at whole vectors.
static size_t up(size_t count) { return (count + 31) & ~(size_t)15; }
static size_t larger(size_t a, size_t b) { return a > b ? a : b; }
static size_t widest(const Model *m) {  // of the vectors that a product reads
    return up(larger(larger(m->hidden, m->intermediate), (size_t)m->heads.heads * m->heads.dim));
}
static size_t qkv_width(const Model *m) { return up((size_t)(m->heads.heads + 2 * m->heads.kv_heads) * m->heads.dim); }
static size_t gate_up_width(const Model *m) { return up(2 * (size_t)m->intermediate); }

size_t fewer_shared_size(const Model *m, int rows, int keys) {
    size_t partials = (size_t)(chunks_of(keys) + 1) * m->heads.heads * partial_size(&m->heads);
    return rows * (qkv_width(m) + 2 * up(m->hidden) + gate_up_width(m) + partials) + 4 * MOST_THREADS;
}

// Which chunks of a store some row sees: the first `sinks` ones, and those from `first` to `last`.
typedef struct {
    int sinks, first, last, count;
} Chunks;

static Chunks chunks_of_store(const Visible *visible, int rows) {
    int lowest = visible->first[0];
    for (int row = 1; row < rows; row++) lowest = visible->first[row] < lowest ? visible->first[row] : lowest;
    Chunks chunks = {.first = 0, .last = chunks_of(visible->stop)};
    while (chunk_start(chunks.first + 1) <= lowest) chunks.first++;
    chunks.sinks = chunks_of(visible->sinks);
    if (chunks.sinks > chunks.first) chunks.sinks = chunks.first;
    chunks.count = chunks.sinks + chunks.last - chunks.first;
    return chunks;
}

// Slots of the index-th of these chunks.
static void chunk_range(const Chunks *chunks, const Visible *visible, int index, int *start, int *stop) {
    const int is_sink = index < chunks->sinks, chunk = is_sink ? index : chunks->first + index - chunks->sinks;
    const int end = is_sink ? visible->sinks : visible->stop;
    *start = chunk_start(chunk);
    *stop = chunk_start(chunk + 1) < end ? chunk_start(chunk + 1) : end;
}

// q, k and v of every new token, turned and scaled -> out, row i at out + i · stride.
static void prepare_rows(const Layer *layer, const Step *step, const float *qkv, float *out, size_t stride) {
    const Model *m = step->model;
    const int dim = m->heads.dim, heads = m->heads.heads, kv_heads = m->heads.kv_heads;
    for (int row = 0; row < step->rows; row++, qkv += stride, out += stride) {
        const float *turn = layer->turn < 0 ? NULL : step->turns[layer->turn] + (size_t)row * m->rotary;
        const size_t k = (size_t)heads * dim, v = k + (size_t)kv_heads * dim;
        prepare(m, qkv, heads, layer->q_norm, turn, m->scale, out);
        prepare(m, qkv + k, kv_heads, layer->k_norm, turn, 1, out + k);
        prepare(m, qkv + v, kv_heads, NULL, NULL, 1, out + v);
    }
}

// This thread's share of a layer's attention -> partials, head after head and chunk after chunk: [rows · group] of each. A unit
// is a chunk of one KV head. Whoever reads a new token's slot writes it first: two threads may write the same bytes there.
static void attend(int index, const Step *step, const float *qkv, int thread, int threads, float *own, float *partials) {
    const Model *m = step->model;
    const Heads *heads = &m->heads;
    const int dim = heads->dim, group = heads->heads / heads->kv_heads, rows = step->rows;
    const size_t row = row_size(heads), size = partial_size(heads), stride = qkv_width(m);
    const Home *homes = step->homes + (size_t)index * heads->kv_heads;
    Chunks chunks[MOST_KINDS];
    for (int kind = 0; kind < MOST_KINDS; kind++)
        if (step->store[kind].keys) chunks[kind] = chunks_of_store(&step->store[kind].visible, rows);
    int64_t all = 0, before = 0;
    for (int head = 0, start, stop; head < heads->kv_heads; head++)
        for (int i = 0; i < chunks[homes[head].kind].count; i++) {
            chunk_range(&chunks[homes[head].kind], &step->store[homes[head].kind].visible, i, &start, &stop);
            all += stop - start;
        }
    int prepared = 0;
    for (int head = 0; head < heads->kv_heads; head++) {
        const Store *stored = step->store + homes[head].kind;
        const Visible *visible = &stored->visible;
        char *keys = stored->keys + homes[head].offset, *values = keys + stored->values;
        const int slot = step->slots ? step->slots[(size_t)index * heads->kv_heads + head] : visible->start;
        int kept = 0;
        for (int i = 0, start, stop; i < chunks[homes[head].kind].count; i++, before += stop - start, partials += rows * group * size) {
            chunk_range(&chunks[homes[head].kind], visible, i, &start, &stop);
            if ((2 * before + stop - start) * threads / (2 * all) != thread) continue;
            if (!prepared) prepare_rows(m->layer + index, step, qkv, own, stride);
            prepared = 1;
            if (!kept && stop > slot && start < slot + rows) {
                for (int each = 0; each < rows; each++) {
                    const float *k = own + each * stride + (size_t)(heads->heads + head) * dim, *v = k + (size_t)heads->kv_heads * dim;
                    keep(heads, k, keys + row * (slot + each));
                    keep(heads, v, values + row * (slot + each));
                }
                kept = 1;
            }
            const Queries queries = {own + (size_t)head * group * dim, stride, group, rows * group};
            float *scores = step->weights ? step->weights + ((size_t)index * heads->heads + head * group) * step->width : NULL;
            attend_chunk(heads, visible, &queries, keys, values, start, stop, partials, scores, step->width);
        }
    }
}

// The partials of all heads -> out, row i at out + i · stride; and this thread's heads' scores become weights.
static void merge_all(int index, const Step *step, const float *partials, int thread, int threads, float *out, size_t stride) {
    const Heads *heads = &step->model->heads;
    const int group = heads->heads / heads->kv_heads, rows = step->rows;
    const size_t size = partial_size(heads), step_over = size * group * rows;
    int first, last;
    share(heads->heads, thread, threads, &first, &last);
    for (int head = 0; head < heads->kv_heads; head++) {
        const Store *stored = step->store + step->homes[(size_t)index * heads->kv_heads + head].kind;
        const int chunks = chunks_of_store(&stored->visible, rows).count;
        for (int each = 0; each < rows * group; each++) {
            const int query = head * group + each % group;
            const float total = merge(heads, partials + each * size, step_over, chunks,
                                      out + (each / group) * stride + (size_t)query * heads->dim);
            if (!step->weights || query < first || query >= last) continue;
            float *weights = step->weights + ((size_t)index * heads->heads + query) * step->width;
            for (int at = 0; at < stored->visible.stop; at += LANES)
                store(weights + at, exponential(load(weights + at) - splat(total)));
        }
        partials += step_over * chunks;
    }
}

// The largest logit of a row among this thread's, and whether all of these are finite: best = {index, logit, strangeness}.
static void find_best(const float *logits, int vocab, int thread, int threads, float *best) {
    int first, last, at;
    share(vocab, thread, threads, &first, &last);
    floats top = splat(-INFINITY), odd = splat(0);
    for (at = first; at + LANES <= last; at += LANES) {
        floats v = load(logits + at);
        top = maximum(top, v);
        odd += v * 0;  // NaN unless finite
    }
    float highest = largest(top), strange = sum(odd);
    for (; at < last; at++) {
        highest = logits[at] > highest ? logits[at] : highest;
        strange += logits[at] * 0;
    }
    int index = first;
    while (index < last - 1 && logits[index] != highest) index++;
    memcpy(best, &index, sizeof index);
    best[1] = highest;
    best[2] = strange;
}

static void decode(void *argument, int thread, int threads) {
    Step *step = argument;
    const Model *m = step->model;
    const int rows = step->rows, d = m->hidden;
    const size_t hidden = up(d), wide = widest(m), qkv_stride = qkv_width(m), gate_stride = gate_up_width(m);
    float *qkv = step->shared, *block = qkv + rows * qkv_stride, *second = block + rows * hidden;
    float *gate_up = second + rows * hidden, *found = gate_up + rows * gate_stride, *partials = found + 4 * MOST_THREADS;
    const int groups = wide / SHORTEST_GROUP + 1;
    float *own = malloc(sizeof(float) * rows * (hidden + wide + qkv_stride + 2 * groups + wide / 4));
    float *residual = own, *x = residual + rows * hidden, *queries = x + rows * wide, *sums = queries + rows * qkv_stride;
    float *scale = sums + rows * groups;
    const Rows input = {x, wide, rows, sums, groups, m->integers ? (int8_t *)(scale + rows * groups) : NULL, scale};

    for (int row = 0; row < rows; row++) {
        decode_row(m->embed.part, step->token[row], residual + row * hidden);
        for (int i = 0; i < d; i++) residual[row * hidden + i] *= m->embedding_scale;
        if (m->layer->attention_norm)
            rms_norm(residual + row * hidden, m->layer->attention_norm, d, m->eps, x + row * wide);
        else
            memcpy(x + row * wide, residual + row * hidden, sizeof(float) * d);
    }
    for (int index = 0; index < m->layers; index++) {
        const Layer *layer = m->layer + index;
        product(&layer->qkv, &input, thread, threads, qkv, qkv_stride);
        meet(threads);
        attend(index, step, qkv, thread, threads, queries, partials);
        meet(threads);
        merge_all(index, step, partials, thread, threads, x, wide);
        product(&layer->o, &input, thread, threads, block, hidden);
        meet(threads);
        for (int row = 0; row < rows; row++)
            add(m, residual + row * hidden, block + row * hidden, layer->post_attention_norm, layer->feed_forward_norm, x + row * wide);
        product(&layer->gate_up, &input, thread, threads, gate_up, gate_stride);
        meet(threads);
        for (int row = 0; row < rows; row++) activate(m, gate_up + row * gate_stride, x + row * wide);
        product(&layer->down, &input, thread, threads, second, hidden);
        meet(threads);
        const float *next = index + 1 < m->layers ? layer[1].attention_norm : m->norm;
        for (int row = 0; row < rows; row++)
            add(m, residual + row * hidden, second + row * hidden, layer->post_feed_forward_norm, next, x + row * wide);
    }
    if (thread == 0 && step->hidden)
        for (int row = 0; row < rows; row++) memcpy(step->hidden + (size_t)row * d, x + row * wide, sizeof(float) * d);
    product(&m->head, &input, thread, threads, step->logits, m->vocab);
    free(own);
    float strange = 0;
    for (int row = 0; row < rows; row++) {
        meet(threads);  // logits are there; and what was found of the row before has been read
        find_best(step->logits + (size_t)row * m->vocab, m->vocab, thread, threads, found + 4 * thread);
        meet(threads);
        float highest = -INFINITY;
        for (int i = 0; i < threads; i++) {
            strange += found[4 * i + 2];
            if (found[4 * i + 1] <= highest) continue;
            highest = found[4 * i + 1];
            if (thread == 0) memcpy(step->best + row, found + 4 * i, sizeof step->best[row]);
        }
    }
    if (thread == 0) step->finite = strange == 0;
}

// Sets step->logits, best and finite, and stores the tokens' keys and values. Returns 0; 1 for more rows than it can take; 2
// for a token that the embedding does not have.
int fewer_decode(Step *step, int threads) {
    const Heads *heads = &step->model->heads;
    if (step->rows < 1 || step->rows > MOST_ROWS || step->rows * (heads->heads / heads->kv_heads) > MOST_QUERIES) return 1;
    for (int row = 0; row < step->rows; row++)
        if (step->token[row] < 0 || step->token[row] >= step->model->embed.part->rows) return 2;
    memset(step->best, 0, sizeof step->best);
    run_together(decode, step, threads);
    return 0;
}
