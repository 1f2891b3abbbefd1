// One decoding step of a whole model, without Python between its layers.
//
// A model is prepared as a list of operations on rows of floats. Rows are sequences, which do not
// depend on each other: each thread runs the whole list for its share of them. Of few rows the outputs of a large matrix
// are shared instead. Tokens that are read together are rows of their own in all operations but those that have a state.

#include "decode_state.h"
#include "norms.h"

// A model and where it is decoded; generation/operations.py builds the same structure. Buffer i has rows of strides[i]
// floats, as many as tokens are read at once.
struct Decoding {
  const Operation* operations;
  int64_t count;
  float** buffers;
  const int64_t* strides;
  int64_t* tokens;  // that were given last
  int64_t rows, logits, vocabulary;
};

namespace {

constexpr int kReadsAhead = 4;                  // of the automata of several rows
constexpr int64_t kWorthSharing = int64_t(1) << 18;  // bytes of a matrix

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

// Keeps the tokens of a call; whether all are of the vocabulary.
INLINE bool take(const Decoding& decoding, const int64_t* tokens, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (tokens[i] < 0 || tokens[i] >= decoding.vocabulary) return false;
  std::memcpy(decoding.tokens, tokens, sizeof(int64_t) * count);
  return true;
}

// Rows of a panel, in place.
INLINE void gelu(Rows<float> x, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) {
    float* u = x.at(row);
    for (int64_t j = 0; j < kPanel; ++j) {
      float distribution, density;
      normal(u[j], &distribution, &density);
      u[j] *= distribution;
    }
  }
}

INLINE void gate(const float* gates, float* x, int64_t rows, int64_t stride) {
  for (int64_t row = 0; row < rows; ++row) {
    const float* __restrict from = gates + row * kPanel;
    float* __restrict to = x + row * stride;
    for (int64_t j = 0; j < kPanel; ++j) to[j] *= from[j] * sigmoid(from[j]);
  }
}

INLINE void squared_relu(Rows<float> x, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) {
    float* u = x.at(row);
    for (int64_t j = 0; j < kPanel; ++j) u[j] = std::max(u[j], 0.0f) * std::max(u[j], 0.0f);
  }
}

template <class Weight>
void linear(const Operation& op, float* const* buffers, const int64_t* strides, int64_t first, int64_t rows,
            int64_t threads) {
  const auto buffer = [&](int64_t index) { return Rows<float>{buffers[index], strides[index]}.from(first, 0); };
  const Rows<float> out = buffer(op.out);
  const int64_t panels = panels_of(op.outputs), bytes = panel_bytes<Weight>(op.inputs);
  parallel(panels, panels * bytes < kWorthSharing ? 1 : threads, [&](int64_t begin, int64_t end, int64_t) {
    thread_local std::vector<float> scratch;
    scratch.resize(rows * kPanel);
    const Rows<float> aside = {scratch.data(), kPanel};
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t column = panel * kPanel, columns = std::min(kPanel, op.outputs - column);
      const bool partly = column + kPanel > out.stride;  // rows of logits end with the vocabulary
      const Rows<float> to = partly || op.activation == kGate ? aside : out.from(0, column);
      Rows<const float> onto = {kNothing, 0};
      if (op.residual >= 0) onto = buffer(op.residual).from(0, column);
      const auto weights = (const Weight*)((const char*)op.weight + panel * bytes);
      multiply_panel(buffer(op.in), weights, op.inputs, onto, to, rows);
      if (op.activation == kGelu) gelu(to, rows);
      if (op.activation == kSquaredRelu) squared_relu(to, rows);
      if (op.activation == kGate) gate(to.data, out.data + column, rows, out.stride);
      for (int64_t row = 0; partly && row < rows; ++row)
        std::memcpy(out.at(row) + column, to.at(row), sizeof(float) * columns);
    }
  });
}

// to = gain f(alpha from + shift) + bias, plus `residual` where there is one; all may be the same row.
template <class Function>
INLINE void pointwise(const Operation& op, const float* from, const float* residual, float* to) {
  const float alpha = op.extra[0], shift = op.extra[1];
  for (int64_t j = 0; j < op.inputs; ++j) {
    const float value = op.weight[j] * Function::value(alpha * from[j] + shift) + op.bias[j];
    to[j] = residual ? residual[j] + value : value;
  }
}

// Some rows of an operation without a state.
INLINE void apply(const Operation& op, const int64_t* tokens, Rows<const float> in, Rows<float> out, int64_t first,
                  int64_t rows) {
  const int64_t width = op.inputs, wide = in_panels(width);
  const float share = 1.0f / width;
  const auto inverse_rms = [&](const float* x) { return 1.0f / std::sqrt(squares_of(x, wide) * share + op.eps); };
  // f(old value, other value, column) over all rows
  const auto change = [&](auto f) {
    for (int64_t row = first; row < first + rows; ++row) {
      const float* from = in.at(row);
      float* to = out.at(row);
      const auto each = f(row, from);
      for (int64_t j = 0; j < wide; j += kLanes) store(each(load(to + j), load(from + j), j), to + j);
    }
  };
  switch (op.kind) {
    case kEmbed:
      for (int64_t row = first; row < first + rows; ++row)
        std::memcpy(out.at(row), op.weight + tokens[row] * width, sizeof(float) * width);
      break;
    case kNorm:
      change([&](int64_t, const float* x) {
        const float scale = inverse_rms(x);
        return [&op, scale](Vector, Vector x, int64_t j) { return load(op.weight + j) * (x * scale); };
      });
      break;
    case kReadOut:
      change([&](int64_t, const float* x) {
        const float scale = inverse_rms(x);
        return [&op, scale](Vector, Vector x, int64_t j) {
          return x + load(op.extra + j) * (load(op.weight + j) * (x * scale)) + load(op.bias + j);
        };
      });
      break;
    case kRefine:  // in: the refined vector, out: the vector it refines
      change([&](int64_t, const float*) {
        return [eta = op.extra[0]](Vector old, Vector refined, int64_t) { return old + eta * (refined - old); };
      });
      break;
    case kCopy:
      change([&](int64_t row, const float*) {
        return [gate = op.weight[op.matches[2 * row + 1]]](Vector old, Vector x, int64_t) { return old + gate * x; };
      });
      break;
    case kPointwise:
      for (int64_t row = first; row < first + rows; ++row) {
        const float* residual = op.residual < 0 ? nullptr : in.at(row);
        if (op.activation == kErf)
          pointwise<Erf>(op, in.at(row), residual, out.at(row));
        else
          pointwise<Tanh>(op, in.at(row), residual, out.at(row));
      }
      break;
    case kPoint:
      for (int64_t row = first; row < first + rows; ++row) point(op, row, in.at(row), out.at(row));
      break;
    case kWeigh:
      change([&](int64_t, const float*) {
        return [a = op.extra[0], b = op.extra[1]](Vector old, Vector x, int64_t) { return a * old + b * x; };
      });
      break;
    case kCap:
      for (int64_t row = first; row < first + rows; ++row)
        for (int64_t j = 0; j < width; ++j)
          out.at(row)[j] = op.extra[0] * Tanh::value(out.at(row)[j] / op.extra[0]);
      break;
  }
}

// Rows begin to end, n tokens of each; with `reading`, what has a state stays as it is, and otherwise n is 1. `threads`
// share the outputs of large matrices.
template <bool reading>
void run(const Decoding& decoding, const int64_t* tokens, int64_t begin, int64_t end, int64_t n, int64_t threads) {
  if (begin == end || n == 0) return;
  float* const* buffers = decoding.buffers;
  const int64_t* strides = decoding.strides;
  thread_local std::vector<float> scratch;
  for (int64_t index = 0; index < decoding.count; ++index) {
    const Operation& op = decoding.operations[index];
    const auto in = [&](int64_t row) { return buffers[op.in] + row * strides[op.in]; };
    const auto out = [&](int64_t row) { return buffers[op.out] + row * strides[op.out]; };
    const auto queries = [&](int64_t row) { return buffers[op.queries] + row * strides[op.queries]; };
    if (op.kind == kLinear) {
      const auto multiply = op.precision == kInt8       ? linear<int8_t>
                            : op.precision == kBFloat16 ? linear<BFloat16>
                                                        : linear<float>;
      multiply(op, buffers, strides, begin * n, (end - begin) * n, threads);
    } else if (op.kind == kAttend) {
      for (int64_t row = begin; row < end; ++row) {
        const auto buffer = [&](int64_t index) { return Rows<float>{buffers[index], strides[index]}.from(row * n, 0); };
        read_attended(*op.attention, row, n, buffer(op.in), buffer, buffer(op.out), scratch);
        if (!reading) ++op.attention->positions[row];
      }
    } else if (op.kind == kMix) {
      for (int64_t row = begin; row < end; ++row)
        if (reading)
          read_mixed(op, row, n, {in(row * n), strides[op.in]}, {queries(row * n), strides[op.queries]},
                     {out(row * n), strides[op.out]}, scratch);
        else
          mix(op, row, in(row), queries(row), out(row));
    } else if (op.kind == kAdapt) {
      const FastWeights& fast = *op.fast;
      const auto buffer = [&](int64_t index, int64_t row) {
        return Rows<float>{buffers[index], strides[index]}.from(row * n, 0);
      };
      for (int64_t row = begin; row < end; ++row) {
        read_adapted(fast, row, n, buffer(op.in, row), buffer(fast.source, row), buffer(op.residual, row),
                     buffer(op.out, row), scratch);
        if (!reading) keep_adapted(fast, row, 1, scratch);
      }
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
      apply(op, tokens, {in(0), strides[op.in]}, {out(0), strides[op.out]}, begin * n, (end - begin) * n);
    }
  }
}

}  // namespace

extern "C" {

int64_t operation_size() { return sizeof(Operation); }
int64_t decoding_size() { return sizeof(Decoding); }
int64_t fast_weights_size() { return sizeof(FastWeights); }
int64_t decoding_attention_size() { return sizeof(Attention); }

// Runs the operations for one token a row; 0, and nothing where one of the tokens is none. `threads` share the rows, or
// `sharing` threads the outputs.
int64_t decode_step(const Decoding* decoding, const int64_t* tokens, int64_t threads, int64_t sharing) {
  if (!take(*decoding, tokens, decoding->rows)) return 0;
  parallel(decoding->rows, threads, [=](int64_t begin, int64_t end, int64_t) {
    run<false>(*decoding, decoding->tokens, begin, end, 1, sharing);
  });
  return 1;
}

// The same for n tokens a row (rows, n) and logits (rows, n, v), while every state stays as it is.
int64_t decode_read(const Decoding* decoding, const int64_t* tokens, int64_t n, float* logits, int64_t threads,
                    int64_t sharing) {
  if (!take(*decoding, tokens, decoding->rows * n)) return 0;
  std::swap(decoding->buffers[decoding->logits], logits);
  parallel(decoding->rows, threads, [=](int64_t begin, int64_t end, int64_t) {
    run<true>(*decoding, decoding->tokens, begin, end, n, sharing);
  });
  std::swap(decoding->buffers[decoding->logits], logits);
  return 1;
}

// The states after the first lengths[row] of the n tokens that were read last.
void decode_commit(const Decoding* decoding, int64_t n, const int64_t* lengths, int64_t threads) {
  parallel(decoding->rows, threads, [=](int64_t begin, int64_t end, int64_t) {
    std::vector<float> scratch;
    for (int64_t index = 0; index < decoding->count; ++index)
      for (int64_t row = begin; row < end; ++row) {
        const Operation& op = decoding->operations[index];
        if (op.kind == kMix) keep_mixed(op, row, n, lengths[row]);
        if (op.kind == kAttend) op.attention->positions[row] += lengths[row];
        if (op.kind == kAdapt) keep_adapted(*op.fast, row, lengths[row], scratch);
        if (op.kind == kRemember) keep_remembered(op, row, decoding->tokens + row * n, lengths[row]);
      }
  });
}

}  // extern "C"
