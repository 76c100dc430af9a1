// One token through a decoder on the CPU: every thread runs the same function and computes its share of each product's rows;
// what is small (norms, rotation, the activation) every thread computes for itself, which is cheaper than a meeting.
// The network is that of fewer/model/transformer.py; fewer/engine/native_token.py fills these structures in.
#include "attention.h"
#include "threads.h"
#include <stdlib.h>

enum { SILU, GELU, GELU_TANH };
enum { QK_NORM_NONE, QK_NORM_HEAD, QK_NORM_ALL };

typedef struct {
    const float *attention_norm, *post_attention_norm, *feed_forward_norm, *post_feed_forward_norm;  // [d] or NULL
    const float *q_norm, *k_norm;  // NULL where there are none
    Matrix qkv, o, gate_up, down;
    int32_t turn;  // which of the step's rotations, -1: none
    int32_t kind;  // which of the step's stores
    int32_t index;  // among the layers of that kind
} Layer;

typedef struct {
    int32_t layers, hidden, intermediate, vocab, activation, qk_norm, rotary;  // rotary: channels of a head that turn
    Heads heads;
    float eps, scale, clip_qkv, residual_scale;  // clip_qkv 0: none
    const Layer *layer;
    const float *norm;
    Matrix head;
} Model;

typedef struct {  // where the keys and values of one kind of layer are: [layers, 2, kv_heads, capacity, dim] of one row
    char *pool;
    int64_t layer, value, head;  // bytes from one layer to the next, from keys to values, from a head to the next
    int32_t slot;                // the new token's
    int32_t sinks, first;        // visible: slots 0..sinks-1 and first..slot
} Store;

typedef struct {
    const Model *model;
    const float *embedded;  // [d]
    const float *turns[2];  // this position's cos and sin in pairs, [rotary / 2, 2]
    Store store[2];
    float *shared;   // shared_size floats
    float *logits;   // [vocab]
    int32_t best;    // out: the index of the largest logit
    int32_t finite;  // out
} Step;

// Buffers: what all threads see, and one thread's own.
static size_t up(size_t count) { return (count + 31) & ~(size_t)15; }
static size_t larger(size_t a, size_t b) { return a > b ? a : b; }
static size_t widest(const Model *m) {  // of the vectors that a product reads
    return up(larger(larger(m->hidden, m->intermediate), (size_t)m->heads.heads * m->heads.dim));
}
static size_t qkv_width(const Model *m) { return (size_t)(m->heads.heads + 2 * m->heads.kv_heads) * m->heads.dim; }
size_t fewer_shared_size(const Model *m) {
    return up(qkv_width(m)) + 2 * up(m->hidden) + up(2 * (size_t)m->intermediate) +
           (size_t)MOST_PARTS * m->heads.heads * (sizeof(Partial) / sizeof(float)) + 4 * MOST_THREADS;
}

static void rms_norm(const float *x, const float *gain, int size, float eps, float *out) {
    f32x16 squares = splat(0);
    int whole = size & ~15;
    for (int at = 0; at < whole; at += LANES) squares += load(x + at) * load(x + at);
    float total = sum(squares);
    for (int at = whole; at < size; at++) total += x[at] * x[at];
    float inverse = 1 / sqrtf(total / size + eps);
    for (int at = 0; at < whole; at += LANES) store(out + at, load(x + at) * inverse * load(gain + at));
    for (int at = whole; at < size; at++) out[at] = x[at] * inverse * gain[at];
}

// residual += scale · norm(block), and what the next product reads: norm(residual), or the residual itself.
static void add(const Model *m, float *residual, const float *block, const float *post, const float *next, float *x) {
    if (post) {
        rms_norm(block, post, m->hidden, m->eps, x);
        block = x;
    }
    for (int i = 0; i < m->hidden; i++) residual[i] += m->residual_scale * block[i];
    if (next)
        rms_norm(residual, next, m->hidden, m->eps, x);
    else
        memcpy(x, residual, sizeof(float) * m->hidden);
}

// x of a head (or several): norm, clip and rotation, as fewer/model/attention.py; times `scale`.
static void prepare(const Model *m, const float *projected, int heads, const float *gain, const float *turn, float scale, float *out) {
    const int dim = m->heads.dim;
    if (gain && m->qk_norm == QK_NORM_ALL)
        rms_norm(projected, gain, heads * dim, m->eps, out);
    else
        memcpy(out, projected, sizeof(float) * heads * dim);
    if (m->clip_qkv)
        for (int i = 0; i < heads * dim; i++) out[i] = fminf(fmaxf(out[i], -m->clip_qkv), m->clip_qkv);
    for (int head = 0; head < heads; head++, out += dim) {
        if (gain && m->qk_norm == QK_NORM_HEAD) rms_norm(out, gain, dim, m->eps, out);
        for (int i = 0; turn && i < m->rotary; i += 2) {
            float real = out[i], imaginary = out[i + 1];
            out[i] = real * turn[i] - imaginary * turn[i + 1];
            out[i + 1] = real * turn[i + 1] + imaginary * turn[i];
        }
        for (int i = 0; i < dim; i++) out[i] *= scale;
    }
}

static void keep(const Heads *heads, const float *x, char *row) {
    if (!heads->bfloat16)
        memcpy(row, x, sizeof(float) * heads->dim);
    else
        for (int i = 0; i < heads->dim; i++) ((uint16_t *)row)[i] = to_bfloat16(x[i]);
}

// This thread's parts of the attention of one layer; the last part's owner stores the new key and value first.
static int attend(const Model *m, const Layer *layer, const Step *step, const float *qkv, int thread, int threads, float *own, Partial *partials) {
    const Heads *heads = &m->heads;
    const Store *store_ = step->store + layer->kind;
    const int dim = heads->dim, group = heads->heads / heads->kv_heads;
    const size_t row = (size_t)dim * (heads->bfloat16 ? 2 : 4);
    const float *turn = layer->turn < 0 ? NULL : step->turns[layer->turn];
    char *keys = store_->pool + store_->layer * layer->index, *values = keys + store_->value;
    const int sinks = store_->sinks < store_->first ? store_->sinks : store_->first;
    const int count = store_->slot + 1 - store_->first, parts = parts_of(count);
    int from, to;
    share(parts, thread, threads, &from, &to);
    if (from == to) return parts + (sinks > 0);
    prepare(m, qkv, heads->heads, layer->q_norm, turn, m->scale, own);
    if (to == parts) {
        const float *k = qkv + heads->heads * dim, *v = k + heads->kv_heads * dim;
        float *turned = own + heads->heads * dim, *clipped = turned + heads->kv_heads * dim;
        prepare(m, k, heads->kv_heads, layer->k_norm, turn, 1, turned);
        prepare(m, v, heads->kv_heads, NULL, NULL, 1, clipped);
        for (int head = 0; head < heads->kv_heads; head++) {
            keep(heads, turned + head * dim, keys + store_->head * head + row * store_->slot);
            keep(heads, clipped + head * dim, values + store_->head * head + row * store_->slot);
        }
    }
    for (int head = 0; head < heads->kv_heads; head++) {
        const char *own_keys = keys + store_->head * head, *own_values = values + store_->head * head;
        const float *q = own + head * group * dim;
        for (int part = from; part < to; part++) {
            int start, stop;
            share(count, part, parts, &start, &stop);
            attend_part(heads, q, own_keys, own_values, store_->first + start, store_->first + stop,
                        partials + part * heads->heads + head * group);
        }
        if (sinks > 0 && from == 0)
            attend_part(heads, q, own_keys, own_values, 0, sinks, partials + parts * heads->heads + head * group);
    }
    return parts + (sinks > 0);
}

static void activate(const Model *m, const float *gate_up, float *out) {
    const float *gate = gate_up, *other = gate_up + m->intermediate;
    if (m->activation == GELU) {
        for (int i = 0; i < m->intermediate; i++) out[i] = 0.5f * gate[i] * (1 + erff(gate[i] * 0.70710678f)) * other[i];
        return;
    }
    int whole = m->intermediate & ~15;
    for (int at = 0; at < m->intermediate; at += LANES) {
        float rest_of[2 * LANES] = {0};
        const float *g = gate + at, *u = other + at;
        if (at == whole) {
            memcpy(rest_of, g, sizeof(float) * (m->intermediate - whole));
            memcpy(rest_of + LANES, u, sizeof(float) * (m->intermediate - whole));
            g = rest_of, u = rest_of + LANES;
        }
        f32x16 x = load(g), bent = x;
        if (m->activation == GELU_TANH) bent = 1.5957691216f * (x + 0.044715f * x * x * x);  // 2 √(2/π) (x + …)
        // x · sigmoid(bent); e^-bent may overflow only where the product vanishes
        f32x16 out_ = x / (1 + exponential(-maximum(bent, splat(-88)))) * load(u);
        if (at == whole)
            memcpy(out + at, &out_, sizeof(float) * (m->intermediate - whole));
        else
            store(out + at, out_);
    }
}

static void find_best(const Step *step, int thread, int threads, float *best) {
    int first, last, at;
    share(step->model->vocab, thread, threads, &first, &last);
    f32x16 top = splat(-INFINITY), odd = splat(0);
    for (at = first; at + LANES <= last; at += LANES) {
        f32x16 v = load(step->logits + at);
        top = maximum(top, v);
        odd += v * 0;  // NaN unless finite
    }
    float highest = -INFINITY, strange = sum(odd);
    for (int i = 0; i < LANES; i++) highest = top[i] > highest ? top[i] : highest;
    for (; at < last; at++) {
        highest = step->logits[at] > highest ? step->logits[at] : highest;
        strange += step->logits[at] * 0;
    }
    int index = first;
    while (index < last - 1 && step->logits[index] != highest) index++;
    memcpy(best, &index, sizeof index);
    best[1] = highest;
    best[2] = strange;
}

static void decode(void *argument, int thread, int threads) {
    Step *step = argument;
    const Model *m = step->model;
    const int hidden = m->hidden;
    float *qkv = step->shared, *block = qkv + up(qkv_width(m)), *second = block + up(hidden);
    float *gate_up = second + up(hidden), *found = gate_up + up(2 * (size_t)m->intermediate);
    Partial *partials = (Partial *)(found + 4 * MOST_THREADS);
    size_t wide = widest(m), own_queries = up(qkv_width(m));
    float *own = malloc(sizeof(float) * (up(hidden) + wide + own_queries + up(wide / SHORTEST_GROUP + 1)));
    float *residual = own, *x = residual + up(hidden), *queries = x + wide, *sums = queries + own_queries;

    memcpy(residual, step->embedded, sizeof(float) * hidden);
    for (int index = 0; index < m->layers; index++) {
        const Layer *layer = m->layer + index;
        if (index == 0) {
            if (layer->attention_norm)
                rms_norm(residual, layer->attention_norm, hidden, m->eps, x);
            else
                memcpy(x, residual, sizeof(float) * hidden);
        }
        product(&layer->qkv, x, sums, thread, threads, qkv);
        meet(threads);
        int parts = attend(m, layer, step, qkv, thread, threads, queries, partials);
        meet(threads);
        merge(&m->heads, partials, parts, x);
        product(&layer->o, x, sums, thread, threads, block);
        meet(threads);
        add(m, residual, block, layer->post_attention_norm, layer->feed_forward_norm, x);
        product(&layer->gate_up, x, sums, thread, threads, gate_up);
        meet(threads);
        activate(m, gate_up, x);
        product(&layer->down, x, sums, thread, threads, second);
        meet(threads);
        const float *next = index + 1 < m->layers ? layer[1].attention_norm : m->norm;
        add(m, residual, second, layer->post_feed_forward_norm, next, x);
    }
    product(&m->head, x, sums, thread, threads, step->logits);
    meet(threads);
    find_best(step, thread, threads, found + 4 * thread);
    free(own);
    meet(threads);
    if (thread) return;
    float highest = -INFINITY, strange = 0;
    for (int i = 0; i < threads; i++) {
        strange += found[4 * i + 2];
        if (found[4 * i + 1] > highest) {
            highest = found[4 * i + 1];
            memcpy(&step->best, found + 4 * i, sizeof step->best);
        }
    }
    step->finite = strange == 0;
}

// Sets step->logits, step->best and step->finite, and stores the token's keys and values. Returns 0.
int fewer_decode(Step *step, int threads) {
    step->best = 0;
    run_together(decode, step, threads);
    return 0;
}
