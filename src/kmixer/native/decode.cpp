// One decoding step of a whole model, without Python between its layers.
//
// A model is prepared as a list of operations on rows of floats. Rows are sequences, which do not
// depend on each other: each thread runs the whole list for its share of them.

#include "gemm.h"
#include "suffix_automaton.h"

namespace {

enum Kind : int64_t { kEmbed, kLinear, kNorm, kMix, kReadOut, kRefine, kRemember, kCopy, kPoint };
enum Activation : int64_t { kNone, kGelu, kGate };
constexpr int kReadsAhead = 6;  // of the automata of several rows; more are as fast

}  // namespace

// One operation; generation/operations.py builds the same structure. Buffers are numbered scratch rows; weights of
// linear maps are (inputs, outputs) with rows padded by zeros to the stride of gemm.h.
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
  int64_t rank, lags, queries;   // kMix: `queries` is the buffer of queries and keys (2 r); kRemember: buckets less one
  int32_t* automata;             // kRemember: (rows, words)
  int64_t* matches;              // kRemember writes, kCopy and kPoint read: copied token or -1, and bucket (rows, 2)
  int64_t words;
  float eps, unused;
};

namespace {

// out = in W for one row and `parts` vectors of outputs: two chains of sums a vector, as a fused
// multiply-add takes four cycles.
template <int parts>
INLINE void multiply_row(const float* in, const float* weight, int64_t stride, int64_t inputs, float* out) {
  Vector sum[2][parts] = {};
  int64_t i = 0;
  for (; i + 2 <= inputs; i += 2)
    for (int c = 0; c < 2; ++c)
      for (int p = 0; p < parts; ++p) sum[c][p] += load(weight + (i + c) * stride + p * kLanes) * in[i + c];
  if (i < inputs)
    for (int p = 0; p < parts; ++p) sum[0][p] += load(weight + i * stride + p * kLanes) * in[i];
  for (int p = 0; p < parts; ++p) store(sum[0][p] + sum[1][p], out + p * kLanes);
}

// out (rows, columns) = in W; columns is a multiple of 16.
INLINE void multiply_rows(const float* in, int64_t in_stride, const float* weight, int64_t stride, int64_t inputs,
                          int64_t columns, float* out, int64_t rows) {
  if (rows > 1) {
    multiply({in, in_stride, 1}, weight, stride, out, columns, rows, inputs, columns, false);
    return;
  }
  int64_t o = 0;
  for (; o + 4 * kLanes <= columns; o += 4 * kLanes) multiply_row<4>(in, weight + o, stride, inputs, out + o);
  for (; o < columns; o += kLanes) multiply_row<1>(in, weight + o, stride, inputs, out + o);
}

INLINE float inverse_norm(const float* x, int64_t width, float eps) {
  float sum = 0;
  for (int64_t j = 0; j < width; ++j) sum += x[j] * x[j];
  return 1.0f / std::max(std::sqrt(sum), eps);
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
  if (past > 0) {
    std::memmove(history, history + width, sizeof(float) * (past - 1) * width);
    std::memcpy(history + (past - 1) * width, x, sizeof(float) * width);
  }
}

// Remembers a token of one row; the vector of what it copies.
INLINE void remember(const Operation& op, int64_t row, int64_t token, float* vector) {
  int32_t length;
  const int64_t copied = SuffixAutomaton(op.automata + row * op.words).push(int32_t(token), &length);
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

INLINE float softplus(float x) { return std::max(x, 0.0f) + std::log1p(std::exp(-std::fabs(x))); }

// Logits become log p, p = (1 - g) softmax(logits) + g onehot(copied), g = sigmoid(bias[bucket] + w . hidden), for one
// row; nothing copied, g = 0.
INLINE void point(const Operation& op, int64_t row, const float* hidden, float* logits) {
  const int64_t v = op.outputs, copied = op.matches[2 * row];
  const float highest = highest_of(logits, v);
  float sum = 0, share = op.bias[op.matches[2 * row + 1]];
  for (int64_t j = 0; j < v; ++j) sum += exp_negative(logits[j] - highest);
  for (int64_t j = 0; j < op.inputs; ++j) share += op.weight[j] * hidden[j];
  const float rest = highest + std::log(sum) + (copied < 0 ? 0.0f : softplus(share));
  for (int64_t j = 0; j < v; ++j) logits[j] -= rest;
  if (copied < 0) return;
  const float one = logits[copied], other = -softplus(-share);
  logits[copied] = std::max(one, other) + std::log1p(std::exp(-std::fabs(one - other)));
}

INLINE void linear(const Operation& op, float* const* buffers, const int64_t* strides, int64_t first, int64_t rows) {
  const float* in = buffers[op.in] + first * strides[op.in];
  float* out = buffers[op.out] + first * strides[op.out];
  const int64_t in_stride = strides[op.in], out_stride = strides[op.out];
  // The last operation of a layer adds to its own output buffer, so the product waits in scratch.
  thread_local std::vector<float> scratch;
  const int64_t stride = stride_of(op.outputs), wide = stride - kPadding;
  scratch.resize(rows * wide);
  float* product = scratch.data();
  multiply_rows(in, in_stride, op.weight, stride, op.inputs, wide, product, rows);
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = product + row * wide;
    float* to = out + row * out_stride;
    if (op.activation == kGelu) {
      for (int64_t j = 0; j < op.outputs; ++j) {
        const float u = from[j] + op.bias[j];
        float distribution, density;
        normal(u, &distribution, &density);
        to[j] = u * distribution;
      }
    } else if (op.activation == kGate) {
      for (int64_t j = 0; j < op.outputs; ++j) to[j] *= from[j] * sigmoid(from[j]);
    } else if (op.residual >= 0) {
      const float* residual = buffers[op.residual] + (first + row) * strides[op.residual];
      for (int64_t j = 0; j < op.outputs; ++j) to[j] = residual[j] + from[j] + op.bias[j];
    } else if (op.bias) {
      for (int64_t j = 0; j < op.outputs; ++j) to[j] = from[j] + op.bias[j];
    } else {
      std::memcpy(to, from, sizeof(float) * op.outputs);
    }
  }
}

}  // namespace

extern "C" {

int64_t operation_size() { return sizeof(Operation); }

// Runs the operations for rows of tokens; buffers[i] has rows of strides[i] floats.
void decode_step(const Operation* operations, int64_t count, const int64_t* tokens, float* const* buffers,
                 const int64_t* strides, int64_t rows, int64_t threads) {
  parallel(rows, threads, [=](int64_t begin, int64_t end, int64_t) {
    for (int64_t index = 0; index < count; ++index) {
      const Operation& op = operations[index];
      if (op.kind == kLinear) {
        linear(op, buffers, strides, begin, end - begin);
        continue;
      }
      if (op.kind == kRemember && end - begin > 1)
        for (int far = 0; far < kReadsAhead; ++far)
          for (int64_t row = begin; row < end; ++row)
            SuffixAutomaton(op.automata + row * op.words).ask(int32_t(tokens[row]), far);
      for (int64_t row = begin; row < end; ++row) {
        float* out = buffers[op.out] + row * strides[op.out];
        const float* in = op.kind == kEmbed || op.kind == kRemember ? nullptr : buffers[op.in] + row * strides[op.in];
        const int64_t width = op.inputs;
        switch (op.kind) {
          case kEmbed:
            std::memcpy(out, op.weight + tokens[row] * width, sizeof(float) * width);
            break;
          case kNorm: {
            const float scale = inverse_rms(in, width, op.eps);
            for (int64_t j = 0; j < width; ++j) out[j] = op.weight[j] * (in[j] * scale);
            break;
          }
          case kMix:
            mix(op, row, in, buffers[op.queries] + row * strides[op.queries], out);
            break;
          case kReadOut: {
            const float scale = inverse_rms(in, width, op.eps);
            for (int64_t j = 0; j < width; ++j)
              out[j] = in[j] + op.extra[j] * (op.weight[j] * (in[j] * scale)) + op.bias[j];
            break;
          }
          case kRefine:  // in: the refined vector, out: the vector it refines
            for (int64_t j = 0; j < width; ++j) out[j] += op.extra[0] * (in[j] - out[j]);
            break;
          case kRemember:
            remember(op, row, tokens[row], out);
            break;
          case kCopy: {
            const float gate = op.weight[op.matches[2 * row + 1]];
            for (int64_t j = 0; j < width; ++j) out[j] += gate * in[j];
            break;
          }
          case kPoint:
            point(op, row, in, out);
            break;
        }
      }
    }
  });
}

}  // extern "C"
