// An operation of a decoding step, and those of them that have a state: in place, or of tokens that are read first and
// kept or not afterwards.
#pragma once

#include "common.h"
#include "decode_attention.h"
#include "decode_fast_weights.h"
#include "few_rows.h"
#include "suffix_automaton.h"

namespace {

enum Kind : int64_t {
  kEmbed, kLinear, kNorm, kMix, kReadOut, kRefine, kRemember, kCopy, kPoint, kAdapt, kPointwise, kAttend, kWeigh, kCap
};
enum Activation : int64_t { kNone, kGelu, kGate, kSquaredRelu };

}  // namespace

// One operation; generation/operations.py builds the same structure. Buffers are numbered scratch rows, which but for the
// logits are whole panels wide and zero beyond their width, as what norms multiply with is. Weights and biases of linear
// maps lie in panels, see few_rows.h.
//
// What a layer mixes from are rows of whole panels, one after the other: S (r), the last inputs of the filter (lags - 1),
// and the inputs of the tokens that are read. A chunk is then one product with all of them.
struct Operation {
  int64_t kind, in, out, inputs, outputs;
  int64_t activation, residual;  // kLinear: kGelu(in W + bias), kSquaredRelu of it; kGate: out times SiLU(in W);
                                 // kPointwise: kTanh, kErf; both: buffer to add, or -1
  const float* weight;           // kEmbed: table; kNorm, kReadOut: scale; kMix: decays (r,), zero beyond r; kRemember:
                                 // table, from "nothing" on; kCopy: gates (buckets,); kPoint: direction; kPointwise: gain
  const float* bias;             // kReadOut, kPointwise: bias; kMix: alpha (r,), zero beyond r; kRemember: vectors
                                 // (buckets, width) or null; kPoint: logits (buckets,)
  const float* extra;            // kReadOut: gain; kRefine: eta; kMix: filter (lags,) or null; kRemember: the least
                                 // lengths of matches in the buckets but the first; kPointwise: alpha, shift; kWeigh:
                                 // a, b of a out + b in; kCap: the bound of logits
  float* state;                  // kMix: what it mixes from (rows, r + lags - 1 + n, width), `span` floats a row
  float* keys;                   // kMix, reading: of the tokens (rows, n, r)
  int64_t rank, lags, queries;   // kMix: `queries` is the buffer of queries and keys (2 r); kRemember: buckets less one
  int64_t span;
  int32_t* automata;             // kRemember: (rows, words)
  int64_t* matches;              // kRemember writes, kCopy and kPoint read: copied token or -1, and bucket (rows, 2)
  int64_t words;
  const FastWeights* fast;       // kAdapt: of what it reads and writes
  Attention* attention;          // kAttend: the same
  int64_t precision;             // kLinear: of its weights
  float eps, unused;
};

namespace {

constexpr int64_t kLargestGroup = 4;  // of dot products that are added up together

// Queries and keys are whole vectors on every processor, zero beyond the rank.
INLINE int64_t wide_rank(const Operation& op) { return (op.rank + 15) / 16 * 16; }
INLINE int64_t inputs_before(const Operation& op) { return std::max<int64_t>(op.lags - 1, 0); }

// |x|^2 of whole vectors.
INLINE float squares_of(const float* x, int64_t wide) {
  Vector sum[1] = {}, other = {};
  int64_t j = 0;
  for (; j + 2 * kLanes <= wide; j += 2 * kLanes) {
    sum[0] += load(x + j) * load(x + j);
    other += load(x + j + kLanes) * load(x + j + kLanes);
  }
  if (j < wide) sum[0] += load(x + j) * load(x + j);
  sum[0] += other;
  float squares;
  store_sums(sum, &squares, false);
  return squares;
}

INLINE float inverse_norm(const float* x, int64_t wide, float eps) {
  return 1.0f / std::max(std::sqrt(squares_of(x, wide)), eps);
}

// Queries alpha q / |q| and keys k / |k| of one token.
INLINE void normalise(const Operation& op, const float* from, float* queries, float* keys) {
  const int64_t wide = wide_rank(op);
  const float query = inverse_norm(from, wide, op.eps), key = inverse_norm(from + wide, wide, op.eps);
  for (int64_t c = 0; c < wide; c += kLanes) {
    store(load(op.bias + c) * (load(from + c) * query), queries + c);
    store(load(from + wide + c) * key, keys + c);
  }
}

// y = sum_c alpha_c q_c S_c + filter, after S = g S + k x, for one row; `queries` are normalised on the way. Rows are
// taken in the order of memory, four at a time.
INLINE void mix(const Operation& op, int64_t row, const float* x, float* queries, float* y) {
  const int64_t wide = in_panels(op.inputs), r = op.rank, past = inputs_before(op);
  float *S = op.state + row * op.span, *history = S + r * wide;
  const float* keys = queries + wide_rank(op);
  normalise(op, queries, queries, queries + wide_rank(op));
  in_groups(r, [&](int64_t first, auto count) {
    for (int64_t j = 0; j < wide; j += kLanes) {
      const Vector input = load(x + j);
      Vector sum = {};
      if (first > 0) sum = load(y + j);
      for (int64_t c = first; c < first + count; ++c) {
        __builtin_prefetch(S + (c + count) * wide + j);  // of many rows, S comes from memory: in half the time
        const Vector s = op.weight[c] * load(S + c * wide + j) + keys[c] * input;
        store(s, S + c * wide + j);
        sum += queries[c] * s;
      }
      store(sum, y + j);
    }
  });
  if (op.lags == 0) return;
  for (int64_t j = 0; j < wide; j += kLanes) store(load(y + j) + op.extra[0] * load(x + j), y + j);
  if (past == 0) return;
  in_groups(past, [&](int64_t first, auto count) {
    for (int64_t j = 0; j < wide; j += kLanes) {
      Vector sum = load(y + j);
      for (int64_t i = first; i < first + count; ++i) {
        __builtin_prefetch(S + op.span + i * wide + j);  // of the next row
        sum += op.extra[past - i] * load(history + i * wide + j);
      }
      store(sum, y + j);
    }
  });
  std::memmove(history, history + wide, sizeof(float) * (past - 1) * wide);
  std::memcpy(history + (past - 1) * wide, x, sizeof(float) * wide);
}

// parts[l] = sum_c q_c g_c^l k_c of the key l tokens ago, l = 0 .. t; q becomes q g^(t + 1). In groups: parts has room
// for the last one.
INLINE void attend(const Operation& op, const float* keys, int64_t t, float* q, float* parts) {
  constexpr int64_t group = kLargestGroup;
  const int64_t wide = wide_rank(op);
  for (int64_t c = 0; c < wide; c += kLanes) {
    const Vector decay = load(op.weight + c);
    Vector query = load(q + c), product[group];
    for (int64_t l = 0; l <= t; l += group) {
      for (int64_t i = 0; i < group; ++i) {
        product[i] = query * load(keys + std::max<int64_t>(t - l - i, 0) * wide + c);
        if (l + i <= t) query *= decay;
      }
      store_sums(product, parts + l, c > 0);
    }
    store(query, q + c);
  }
}

// What `mix` makes of n tokens of a row, one after the other, while S and the history stay as they are:
//   y_t = sum_c alpha_c q_c g_c^(t + 1) S_c + sum_{l <= t} (sum_c alpha_c q_c g_c^l k_c(t - l)) x_(t - l) + filter,
// a product with the rows of S, history and inputs. Keys and inputs stay for `keep_mixed`.
INLINE void read_mixed(const Operation& op, int64_t row, int64_t n, Rows<const float> x, Rows<const float> queries,
                       Rows<float> y, std::vector<float>& scratch) {
  const int64_t wide = in_panels(op.inputs), r = op.rank, rank = wide_rank(op), past = inputs_before(op);
  const int64_t stride = rank + past + n;
  scratch.resize(n * stride + n + kLargestGroup);
  const Rows<float> factors = {scratch.data(), stride};
  float *parts = factors.at(n), *keys = op.keys + row * n * rank;
  float *S = op.state + row * op.span, *inputs = S + (r + past) * wide;
  for (int64_t t = 0; t < n; ++t) {
    for (int64_t j = 0; j < wide; j += kLanes) store(load(x.at(t) + j), inputs + t * wide + j);
    float *of_state = factors.at(t), *of_inputs = of_state + r + past;
    normalise(op, queries.at(t), of_state, keys + t * rank);
    attend(op, keys, t, of_state, parts);
    for (int64_t l = 0; l <= t; ++l) of_inputs[t - l] = parts[l] + (l < op.lags ? op.extra[l] : 0);
    for (int64_t l = t + 1; l <= t + past; ++l) of_inputs[t - l] = l < op.lags ? op.extra[l] : 0;
    for (int64_t later = t + 1; later < n; ++later) of_inputs[later] = 0;
  }
  const int64_t groups = (n + kMostRows - 1) / kMostRows;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = n * group / groups, last = n * (group + 1) / groups;
    multiply_rows({factors.at(first), stride}, {S, wide}, r + past + last, y.from(first, 0), last - first, wide);
  }
}

// S and the history of a row after the first `count` of the n tokens that were read.
INLINE void keep_mixed(const Operation& op, int64_t row, int64_t n, int64_t count) {
  const int64_t wide = in_panels(op.inputs), r = op.rank, rank = wide_rank(op), past = inputs_before(op);
  const float* keys = op.keys + row * n * rank;
  float *S = op.state + row * op.span, *history = S + r * wide, *inputs = history + past * wide;
  for (int64_t c = 0; c < r; ++c)
    for (int64_t j = 0; j < wide; j += kLanes) {
      Vector s = load(S + c * wide + j);
      for (int64_t t = 0; t < count; ++t)
        s = op.weight[c] * s + keys[t * rank + c] * load(inputs + t * wide + j);
      store(s, S + c * wide + j);
    }
  std::memmove(history, history + count * wide, sizeof(float) * past * wide);
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
