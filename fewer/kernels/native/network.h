// What a decoder is made of, and its small operations on one row: norms, rotation, activation. The network is that of
// fewer/model/transformer.py; fewer/engine/native.py fills these structures in.
#pragma once
#include "attention.h"

enum { SILU, GELU, GELU_TANH };
enum { QK_NORM_NONE, QK_NORM_HEAD, QK_NORM_ALL };

typedef struct {
    const float *attention_norm, *post_attention_norm, *feed_forward_norm, *post_feed_forward_norm;  // [d] or NULL
    const float *q_norm, *k_norm;  // NULL where there are none
    Matrix qkv, o, gate_up, down;
    int32_t turn;  // which of the step's rotations, -1: none
} Layer;

typedef struct {
    int32_t layers, hidden, intermediate, vocab, activation, qk_norm, rotary;  // rotary: channels of a head that turn
    int32_t integers;  // x is rounded to eight bits before it meets four-bit weights
    Heads heads;
    float eps, scale, clip_qkv, residual_scale, embedding_scale;  // clip_qkv 0: none
    Matrix embed;  // of one part
    const Layer *layer;
    const float *norm;
    Matrix head;
} Model;

enum { MOST_KINDS = 4 };

typedef struct {  // keys and values of the heads of one kind
    char *keys;
    int64_t values;  // bytes from a key to its value
    Visible visible;
} Store;

typedef struct {  // where one KV head of a layer has its first key
    int64_t offset;  // bytes from the store's keys
    int64_t kind;    // which store
} Home;

typedef struct {
    const Model *model;
    int32_t rows;            // tokens, at most MOST_ROWS
    int32_t token[MOST_ROWS];
    const float *turns[MOST_KINDS];  // cos and sin in pairs of each token's position, [rows, rotary / 2, 2]
    Store store[MOST_KINDS];
    const Home *homes;       // [layers, kv_heads]
    const int32_t *slots;    // [layers, kv_heads]: where the only token goes, if not to the start of `visible`; or NULL
    float *weights;          // out: attention of the only token, [layers, heads, width], by slot; or NULL
    int64_t width;
    float *shared;           // fewer_shared_size floats
    float *logits;           // [rows, vocab]
    float *hidden;           // [rows, d] after the final norm, or NULL
    int32_t best[MOST_ROWS]; // out: the index of the largest logit of each row
    int32_t finite;          // out: whether all logits are
} Step;

static void rms_norm(const float *x, const float *gain, int size, float eps, float *out) {
    floats squares = splat(0);
    int whole = size & -LANES;
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

static void activate(const Model *m, const float *gate_up, float *out) {
    const float *gate = gate_up, *other = gate_up + m->intermediate;
    if (m->activation == GELU) {
        for (int i = 0; i < m->intermediate; i++) out[i] = 0.5f * gate[i] * (1 + erff(gate[i] * 0.70710678f)) * other[i];
        return;
    }
    int whole = m->intermediate & -LANES;
    for (int at = 0; at < m->intermediate; at += LANES) {
        float rest_of[2 * LANES] = {0};
        const float *g = gate + at, *u = other + at;
        if (at == whole) {
            memcpy(rest_of, g, sizeof(float) * (m->intermediate - whole));
            memcpy(rest_of + LANES, u, sizeof(float) * (m->intermediate - whole));
            g = rest_of, u = rest_of + LANES;
        }
        floats x = load(g), bent = x;
        if (m->activation == GELU_TANH) bent = 1.5957691216f * (x + 0.044715f * x * x * x);  // 2 √(2/π) (x + …)
        // x · sigmoid(bent); e^-bent may overflow only where the product vanishes
        floats out_ = x / (1 + exponential(-maximum(bent, splat(-88)))) * load(u);
        if (at == whole)
            memcpy(out + at, &out_, sizeof(float) * (m->intermediate - whole));
        else
            store(out + at, out_);
    }
}
