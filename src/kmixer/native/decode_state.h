// An operation of a decoding step, and those of them that have a state: in place, or of tokens that are read first and
// kept or not afterwards.
#pragma once

#include "common.h"
#include "suffix_automaton.h"

namespace {

enum Kind : int64_t { kEmbed, kLinear, kNorm, kMix, kReadOut, kRefine, kRemember, kCopy, kPoint };
enum Activation : int64_t { kNone, kGelu, kGate };

}  // namespace

// One operation; generation/operations.py builds the same structure. Buffers are numbered scratch rows; weights of
// linear maps lie in panels, see few_rows.h.
struct Operation {
  int64_t kind, in, out, inputs, outputs;
  int64_t activation, residual;  // kLinear: kGelu(in W + bias); kGate: out times SiLU(in W); buffer to add, or -1
  const float* weight;           // kEmbed: table; kNorm, kReadOut: scale; kMix: decays (r,); kRemember: table, from
                                 // "nothing" on; kCopy: gates (buckets,); kPoint: direction
  const float* bias;             // kLinear, kReadOut: bias or null; kMix: alpha (r,); kRemember: vectors
                                 // (buckets, width) or null; kPoint: logits (buckets,)
  const float* extra;            // kReadOut: gain; kRefine: eta; kMix: filter (lags,) or null; kRemember: the least
                                 // lengths of matches in the buckets but the first
  float* state;                  // kMix: S (rows, r, width)
  float* history;                // kMix: last inputs of the filter (rows, lags - 1, width)
  float* keys;                   // kMix, reading: of the tokens (rows, n, r)
  float* log;                    // kMix, reading: inputs (rows, n, width)
  int64_t rank, lags, queries;   // kMix: `queries` is the buffer of queries and keys (2 r); kRemember: buckets less one
  int32_t* automata;             // kRemember: (rows, words)
  int64_t* matches;              // kRemember writes, kCopy and kPoint read: copied token or -1, and bucket (rows, 2)
  int64_t words;
  float eps, unused;
};

namespace {

INLINE float inverse_norm(const float* x, int64_t width, float eps) {
  float sum = 0;
  for (int64_t j = 0; j < width; ++j) sum += x[j] * x[j];
  return 1.0f / std::max(std::sqrt(sum), eps);
}

// The last `past` of the inputs that the filter has seen, after `count` more.
INLINE void move_history(float* history, int64_t past, const float* inputs, int64_t count, int64_t width) {
  const int64_t old = std::max<int64_t>(past - count, 0), fresh = past - old;
  std::memmove(history, history + (past - old) * width, sizeof(float) * old * width);
  std::memcpy(history + old * width, inputs + (count - fresh) * width, sizeof(float) * fresh * width);
}

// y = sum_c alpha_c q_c S_c + filter, after S = g S + k x, for one row.
INLINE void mix(const Operation& op, int64_t row, const float* x, const float* queries, float* y) {
  const int64_t width = op.inputs, r = op.rank, past = op.lags - 1;
  const float *q = queries, *k = queries + r;
  const float query_scale = inverse_norm(q, r, op.eps), key_scale = inverse_norm(k, r, op.eps);
  float* S = op.state + row * r * width;
  for (int64_t j = 0; j < width; ++j) y[j] = 0;
  for (int64_t c = 0; c < r; ++c) {
    const float g = op.weight[c], key = k[c] * key_scale, query = op.bias[c] * (q[c] * query_scale);
    float* s = S + c * width;
    for (int64_t j = 0; j < width; ++j) {
      s[j] = g * s[j] + key * x[j];
      y[j] += query * s[j];
    }
  }
  if (op.lags == 0) return;
  for (int64_t j = 0; j < width; ++j) y[j] += op.extra[0] * x[j];
  float* history = op.history + row * past * width;
  for (int64_t l = 1; l <= past; ++l) {
    const float* before = history + (past - l) * width;
    for (int64_t j = 0; j < width; ++j) y[j] += op.extra[l] * before[j];
  }
  if (past > 0) move_history(history, past, x, 1, width);
}

INLINE void take(const float* from, Vector* x) { *x = load(from); }
INLINE void take(const float* from, float* x) { *x = *from; }
INLINE void put(Vector x, float* to) { store(x, to); }
INLINE void put(float x, float* to) { *to = x; }

// f(j, T()) for vectors of columns, and then for single ones.
template <class Function>
INLINE void over_columns(int64_t width, Function f) {
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) f(j, Vector{});
  for (; j < width; ++j) f(j, 0.0f);
}

// What `mix` makes of n tokens of a row, one after the other, while S and the history stay as they are. Keys and inputs
// are logged for `keep_mixed`.
INLINE void read_mixed(const Operation& op, int64_t row, int64_t n, const float* x, int64_t x_stride,
                       const float* queries, int64_t q_stride, float* y, int64_t y_stride) {
  const int64_t width = op.inputs, r = op.rank, past = op.lags - 1;
  thread_local std::vector<float> scaled;
  scaled.resize(n * r);
  float *keys = op.keys + row * n * r, *inputs = op.log + row * n * width, *q = scaled.data();
  for (int64_t t = 0; t < n; ++t) {
    const float *from = queries + t * q_stride, *k = from + r;
    const float query_scale = inverse_norm(from, r, op.eps), key_scale = inverse_norm(k, r, op.eps);
    for (int64_t c = 0; c < r; ++c) {
      q[t * r + c] = op.bias[c] * (from[c] * query_scale);
      keys[t * r + c] = k[c] * key_scale;
    }
    std::memcpy(inputs + t * width, x + t * x_stride, sizeof(float) * width);
  }
  const float* S = op.state + row * r * width;
  over_columns(width, [&](int64_t j, auto zero) {
    auto s = zero, input = zero, sum = zero;
    for (int64_t t = 0; t < n; ++t) put(zero, y + t * y_stride + j);
    for (int64_t c = 0; c < r; ++c) {
      take(S + c * width + j, &s);
      for (int64_t t = 0; t < n; ++t) {
        take(inputs + t * width + j, &input);
        take(y + t * y_stride + j, &sum);
        s = op.weight[c] * s + keys[t * r + c] * input;
        put(sum + q[t * r + c] * s, y + t * y_stride + j);
      }
    }
  });
  const float* history = op.history + row * past * width;
  for (int64_t t = 0; t < n; ++t)
    for (int64_t l = 0; l < op.lags; ++l) {
      const float* before = t >= l ? inputs + (t - l) * width : history + (past + t - l) * width;
      float* to = y + t * y_stride;
      for (int64_t j = 0; j < width; ++j) to[j] += op.extra[l] * before[j];
    }
}

// S and the history of a row after the first `count` of the n tokens that were read.
INLINE void keep_mixed(const Operation& op, int64_t row, int64_t n, int64_t count) {
  const int64_t width = op.inputs, r = op.rank, past = op.lags - 1;
  const float *keys = op.keys + row * n * r, *inputs = op.log + row * n * width;
  float* S = op.state + row * r * width;
  over_columns(width, [&](int64_t j, auto zero) {
    auto s = zero, input = zero;
    for (int64_t c = 0; c < r; ++c) {
      take(S + c * width + j, &s);
      for (int64_t t = 0; t < count; ++t) {
        take(inputs + t * width + j, &input);
        s = op.weight[c] * s + keys[t * r + c] * input;
      }
      put(s, S + c * width + j);
    }
  });
  if (past > 0) move_history(op.history + row * past * width, past, inputs, count, width);
}

// The vector of what one row copies, and what kCopy and kPoint have to know of it.
INLINE void copy(const Operation& op, int64_t row, int64_t copied, int64_t length, float* vector) {
  int64_t bucket = 0;
  while (bucket < op.rank && length >= op.extra[bucket]) ++bucket;
  op.matches[2 * row] = copied;
  op.matches[2 * row + 1] = bucket;
  const int64_t width = op.inputs;
  const float* from = op.weight + (copied + 1) * width;
  if (op.bias)
    for (int64_t j = 0; j < width; ++j) vector[j] = from[j] + op.bias[bucket * width + j];
  else
    std::memcpy(vector, from, sizeof(float) * width);
}

// Remembers a token of one row; the vector of what it copies.
INLINE void remember(const Operation& op, int64_t row, int64_t token, float* vector) {
  int32_t length;
  const int64_t copied = SuffixAutomaton(op.automata + row * op.words).push(int32_t(token), &length);
  copy(op, row, copied, length, vector);
}

// The vectors of what n tokens of a row copy, one after the other; the automaton is afterwards as it was.
INLINE void read_remembered(const Operation& op, int64_t row, int64_t n, const int64_t* tokens, float* vectors,
                            int64_t stride) {
  without_trace(op.automata + row * op.words, op.words, tokens, n, [&](int64_t t, int64_t copied, int64_t length) {
    copy(op, row * n + t, copied, length, vectors + t * stride);
  });
}

INLINE void keep_remembered(const Operation& op, int64_t row, const int64_t* tokens, int64_t count) {
  int32_t length;
  for (int64_t t = 0; t < count; ++t)
    SuffixAutomaton(op.automata + row * op.words).push(int32_t(tokens[t]), &length);
}

}  // namespace
