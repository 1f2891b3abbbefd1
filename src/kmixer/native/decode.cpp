// One decoding step of a whole model, without Python between its layers.
//
// A model is prepared as a list of operations on rows of floats. Rows are sequences, which do not
// depend on each other: each thread runs the whole list for its share of them. Tokens that are read together are rows
// of their own in all operations but those that have a state.

#include "decode_state.h"
#include "few_rows.h"

namespace {

constexpr int kReadsAhead = 4;  // of the automata of several rows

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
  const int64_t panels = panels_of(op.outputs), wide = panels * kPanel;
  scratch.resize(rows * wide);
  float* product = scratch.data();
  multiply_few(in, in_stride, op.weight, op.inputs, panels, product, rows);
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

// One row of an operation without a state.
INLINE void apply(const Operation& op, int64_t row, int64_t token, const float* in, float* out) {
  const int64_t width = op.inputs;
  switch (op.kind) {
    case kEmbed:
      std::memcpy(out, op.weight + token * width, sizeof(float) * width);
      break;
    case kNorm: {
      const float scale = inverse_rms(in, width, op.eps);
      for (int64_t j = 0; j < width; ++j) out[j] = op.weight[j] * (in[j] * scale);
      break;
    }
    case kReadOut: {
      const float scale = inverse_rms(in, width, op.eps);
      for (int64_t j = 0; j < width; ++j) out[j] = in[j] + op.extra[j] * (op.weight[j] * (in[j] * scale)) + op.bias[j];
      break;
    }
    case kRefine:  // in: the refined vector, out: the vector it refines
      for (int64_t j = 0; j < width; ++j) out[j] += op.extra[0] * (in[j] - out[j]);
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

// Rows begin to end, n tokens of each; with `reading`, what has a state stays as it is, and otherwise n is 1.
template <bool reading>
void run(const Operation* operations, int64_t count, const int64_t* tokens, float* const* buffers,
         const int64_t* strides, int64_t begin, int64_t end, int64_t n) {
  for (int64_t index = 0; index < count; ++index) {
    const Operation& op = operations[index];
    const auto in = [&](int64_t row) { return buffers[op.in] + row * strides[op.in]; };
    const auto out = [&](int64_t row) { return buffers[op.out] + row * strides[op.out]; };
    const auto queries = [&](int64_t row) { return buffers[op.queries] + row * strides[op.queries]; };
    if (op.kind == kLinear) {
      linear(op, buffers, strides, begin * n, (end - begin) * n);
    } else if (op.kind == kMix) {
      for (int64_t row = begin; row < end; ++row)
        if (reading)
          read_mixed(op, row, n, in(row * n), strides[op.in], queries(row * n), strides[op.queries], out(row * n),
                     strides[op.out]);
        else
          mix(op, row, in(row), queries(row), out(row));
    } else if (op.kind == kRemember) {
      for (int far = 0; far < kReadsAhead && end - begin > 1; ++far)
        for (int64_t row = begin; row < end; ++row)
          SuffixAutomaton(op.automata + row * op.words).ask(int32_t(tokens[row * n]), far);
      for (int64_t row = begin; row < end; ++row)
        if (reading)
          read_remembered(op, row, n, tokens + row * n, out(row * n), strides[op.out]);
        else
          remember(op, row, tokens[row], out(row));
    } else {
      for (int64_t row = begin * n; row < end * n; ++row) apply(op, row, tokens[row], in(row), out(row));
    }
  }
}

}  // namespace

extern "C" {

int64_t operation_size() { return sizeof(Operation); }

// Runs the operations for rows of one token; buffers[i] has rows of strides[i] floats.
void decode_step(const Operation* operations, int64_t count, const int64_t* tokens, float* const* buffers,
                 const int64_t* strides, int64_t rows, int64_t threads) {
  parallel(rows, threads, [=](int64_t begin, int64_t end, int64_t) {
    run<false>(operations, count, tokens, buffers, strides, begin, end, 1);
  });
}

// The same for n tokens a row, tokens (rows, n) and buffers of rows n rows, while every state stays as it is.
void decode_read(const Operation* operations, int64_t count, const int64_t* tokens, float* const* buffers,
                 const int64_t* strides, int64_t rows, int64_t n, int64_t threads) {
  parallel(rows, threads, [=](int64_t begin, int64_t end, int64_t) {
    run<true>(operations, count, tokens, buffers, strides, begin, end, n);
  });
}

// The states after the first lengths[row] of the n tokens that were read last.
void decode_commit(const Operation* operations, int64_t count, const int64_t* tokens, const int64_t* lengths,
                   int64_t rows, int64_t n, int64_t threads) {
  parallel(rows, threads, [=](int64_t begin, int64_t end, int64_t) {
    for (int64_t index = 0; index < count; ++index)
      for (int64_t row = begin; row < end; ++row) {
        const Operation& op = operations[index];
        if (op.kind == kMix) keep_mixed(op, row, n, lengths[row]);
        if (op.kind == kRemember) keep_remembered(op, row, tokens + row * n, lengths[row]);
      }
  });
}

}  // extern "C"
