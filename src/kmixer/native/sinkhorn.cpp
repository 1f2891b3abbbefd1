// Sinkhorn attention, y_i = sum_j W_ij v_j with W = exp(S + f + g) and S = scale q k^T, whose rows and columns are
// brought to 1 in turn, rows last; and its gradients. A block of rows at a time, against all keys: its weights stay in
// the cache. Rows of batch and heads are shared by the threads. ops/attention/sinkhorn_blocked.py computes the same.

#include <limits>

#include "gemm.h"

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Rows of a block: few enough that as many weights as this stay in the second cache level.
constexpr int64_t kMostRows = 96, kFewestRows = 12, kNumbers = 1 << 16;
// A sum over a column below this has lost digits, and is made again from its highest term.
constexpr float kLostDigits = 1e-26f;

// Sizes of all: q, k (n, t, e), v (n, t, width), y (batch, t, heads, width), f, g (n, steps, t).
struct Sizes {
  int64_t heads, t, e, width, steps;
  float scale;
  int64_t rows() const { return std::max(kFewestRows, std::min(kMostRows, kNumbers / t)); }
  // The first number of a row of y: a batch row and head, a position.
  int64_t place_of(int64_t at, int64_t i) const { return ((at / heads * t + i) * heads + at % heads) * width; }
  int64_t step_of(int64_t at, int64_t step) const { return (at * steps + step) * t; }
};

// scale q k^T of the rows start..start + count; keys are transposed, times the scale.
INLINE void make_scores(const float* q, const Padded& keys, int64_t start, int64_t count, const Sizes& s, Padded& to) {
  multiply({q + start * s.e, s.e, 1}, keys.row(0), keys.stride, to.row(0), to.stride, count, s.e, padded(s.t), false);
}

// x = e^(x + g - highest), zero beyond t; returns minus the logarithm of the sum of e^(x + g), 0 where nothing is there.
INLINE float exponentiate(float* x, const float* g, int64_t t, float* total) {
  for (int64_t j = 0; j < t; ++j) x[j] += g[j];
  float highest = highest_of(x, t);
  if (highest == -kInfinity) highest = 0;
  float sum = 0;
  for (int64_t j = 0; j < t; ++j) sum += x[j] = exp_negative(x[j] - highest);
  std::fill(x + t, x + padded(t), 0.0f);
  *total = sum;
  return sum > 0 ? -(std::log(sum) + highest) : 0;
}

// Minus the logarithm of sum_i e^(S_ij + f_i) for one column.
float column_again(const float* q, const float* k, const float* f, int64_t j, const Sizes& s) {
  std::vector<float> x(s.t);
  for (int64_t i = 0; i < s.t; ++i) {
    float product = 0;
    for (int64_t c = 0; c < s.e; ++c) product += q[i * s.e + c] * k[j * s.e + c];
    x[i] = s.scale * product + f[i];
  }
  const float highest = highest_of(x.data(), s.t);
  float sum = 0;
  for (int64_t i = 0; i < s.t; ++i) sum += exp_negative(x[i] - highest);
  return -(std::log(sum) + highest);
}

// What one thread needs for the gradients of one batch row and head. Those of the half-steps one after the other, the
// last first: each is minus P_ij times the gradient of its potential, P the weights after it.
class Backward {
 public:
  explicit Backward(const Sizes& sizes)
      : s(sizes), weights(s.rows(), s.t), changes(s.rows(), s.t), dv(s.width, s.t), dk(s.e, s.t), dq(s.t, s.e),
        of_columns(s.t), earlier(s.t), ratio(s.t) {}

  void run(const float* q, const float* k, const float* v, const float* y, const float* f, const float* g,
           const float* dy, float* dq_out, float* dk_out, float* dv_out) {
    keys = copy_of(k, s.t, s.e);
    transposed = transpose_of(k, s.t, s.e, s.scale);
    values = transpose_of(v, s.t, s.width);
    for (Padded* sums : {&dv, &dk, &dq}) std::fill(sums->data.begin(), sums->data.end(), 0.0f);
    last_step(q, y, dy, f + (s.steps - 1) * s.t, g + (s.steps - 1) * s.t);
    for (int64_t step = s.steps - 2; step >= 0; --step) two_steps(q, f + step * s.t, g + step * s.t);
    for (int64_t i = 0; i < s.t; ++i) {
      for (int64_t c = 0; c < s.e; ++c) dq_out[i * s.e + c] = s.scale * dq.row(i)[c];
      for (int64_t c = 0; c < s.e; ++c) dk_out[i * s.e + c] = s.scale * dk.row(c)[i];
      for (int64_t c = 0; c < s.width; ++c) dv_out[i * s.width + c] = dv.row(c)[i];
    }
  }

 private:
  Sizes s;
  Padded weights, changes, dv, dk, dq;  // dv and dk transposed, (width, t) and (e, t)
  Padded keys{0, 0}, transposed{0, 0}, values{0, 0};
  std::vector<float> of_columns, earlier, ratio;  // gradients of g, now and a half-step before; see below

  // Softmax attention's backward, with a bias g for every key.
  void last_step(const float* q, const float* y, const float* dy, const float* f, const float* g) {
    const int64_t row = s.heads * s.width;
    std::fill(of_columns.begin(), of_columns.end(), 0.0f);
    for (int64_t start = 0; start < s.t; start += s.rows()) {
      const int64_t count = std::min(s.rows(), s.t - start);
      const float *here = dy + start * row, *out = y + start * row;
      make_scores(q, transposed, start, count, s, weights);
      multiply({here, row, 1}, values.row(0), values.stride, changes.row(0), changes.stride, count, s.width,
               padded(s.t), false);
      for (int64_t i = 0; i < count; ++i) {
        float carry = 0;
        for (int64_t c = 0; c < s.width; ++c) carry += here[i * row + c] * out[i * row + c];
        float *w = weights.row(i), *change = changes.row(i), *sums = of_columns.data();
        const float own = f[start + i];
        for (int64_t j = 0; j < s.t; ++j) {
          w[j] = exp_negative(w[j] + g[j] + own);
          change[j] = w[j] * (change[j] - carry);
          sums[j] += change[j];
        }
        clear_padding(w);
        clear_padding(change);
      }
      multiply({here, 1, row}, weights.row(0), weights.stride, dv.row(0), dv.stride, s.width, count, padded(s.t), true);
      add_products(q, changes, start, count);
    }
  }

  // The half-step over columns from g to g + t, and the one over rows before it.
  void two_steps(const float* q, const float* f, const float* g) {
    const float* after = g + s.t;
    // exp(S + f + g) before the half-step over columns, over the same after it; closed columns have none.
    for (int64_t j = 0; j < s.t; ++j) ratio[j] = after[j] == -kInfinity ? 0 : std::exp(g[j] - after[j]);
    std::fill(earlier.begin(), earlier.end(), 0.0f);
    for (int64_t start = 0; start < s.t; start += s.rows()) {
      const int64_t count = std::min(s.rows(), s.t - start);
      make_scores(q, transposed, start, count, s, weights);
      for (int64_t i = 0; i < count; ++i) {
        float *w = weights.row(i), *sums = earlier.data(), of_row = 0;
        const float *column = of_columns.data(), *factor = ratio.data(), own = f[start + i];
        for (int64_t j = 0; j < s.t; ++j) {
          w[j] = exp_negative(w[j] + after[j] + own);
          of_row -= w[j] * column[j];
        }
        for (int64_t j = 0; j < s.t; ++j) {
          sums[j] -= of_row * w[j];
          w[j] *= -(column[j] + of_row * factor[j]);
        }
        clear_padding(w);
      }
      add_products(q, weights, start, count);
    }
    for (int64_t j = 0; j < s.t; ++j) of_columns[j] = earlier[j] * ratio[j];
  }

  void clear_padding(float* row) const { std::fill(row + s.t, row + padded(s.t), 0.0f); }

  // What the gradients of a block of scores add to those of its queries and of all keys.
  void add_products(const float* q, const Padded& from, int64_t start, int64_t count) {
    multiply({from.row(0), from.stride, 1}, keys.row(0), keys.stride, dq.row(start), dq.stride, count, s.t,
             padded(s.e), true);
    multiply({q + start * s.e, 1, s.e}, from.row(0), from.stride, dk.row(0), dk.stride, s.e, count, padded(s.t), true);
  }
};

}  // namespace

extern "C" {

// Writes y, f and g; the first step of g is given: 0, or -infinity for a position that is neither query nor key.
void sinkhorn_forward(const float* q, const float* k, const float* v, float* y, float* f, float* g, int64_t n,
                      int64_t heads, int64_t t, int64_t e, int64_t width, int64_t steps, float scale,
                      int64_t threads) {
  const Sizes s = {heads, t, e, width, steps, scale};
  parallel(n, threads, [=](int64_t begin, int64_t end, int64_t) {
    Padded weights(s.rows(), t), out(s.rows(), width);
    std::vector<float> sums(t);
    for (int64_t at = begin; at < end; ++at) {
      const float *queries = q + at * t * e, *closed = g + s.step_of(at, 0);
      const Padded keys = transpose_of(k + at * t * e, t, e, scale), values = copy_of(v + at * t * width, t, width);
      for (int64_t step = 0; step < steps; ++step) {
        const bool last = step + 1 == steps;
        const float* before = g + s.step_of(at, step);
        float* potentials = f + s.step_of(at, step);
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (int64_t start = 0; start < t; start += s.rows()) {
          const int64_t count = std::min(s.rows(), t - start);
          make_scores(queries, keys, start, count, s, weights);
          float inverse[kMostRows];
          for (int64_t i = 0; i < count; ++i) {
            float *x = weights.row(i), total;
            const float potential = exponentiate(x, before, t, &total);
            const bool open = closed[start + i] != -kInfinity;
            potentials[start + i] = open ? potential : -kInfinity;
            inverse[i] = open && total > 0 ? 1.0f / total : 0.0f;
            for (int64_t j = 0; !last && j < t; ++j) sums[j] += x[j] * inverse[i];
          }
          if (!last) continue;
          multiply({weights.row(0), weights.stride, 1}, values.row(0), values.stride, out.row(0), out.stride, count, t,
                   padded(width), false);
          for (int64_t i = 0; i < count; ++i)
            for (int64_t c = 0; c < width; ++c) y[s.place_of(at, start + i) + c] = out.row(i)[c] * inverse[i];
        }
        if (last) continue;
        float* after = g + s.step_of(at, step + 1);
        for (int64_t j = 0; j < t; ++j) {
          if (closed[j] == -kInfinity)
            after[j] = -kInfinity;
          else if (sums[j] < kLostDigits)
            after[j] = column_again(queries, k + at * t * e, potentials, j, s);
          else
            after[j] = before[j] - std::log(sums[j]);
        }
      }
    }
  });
}

void sinkhorn_backward(const float* q, const float* k, const float* v, const float* y, const float* f, const float* g,
                       const float* dy, float* dq, float* dk, float* dv, int64_t n, int64_t heads, int64_t t,
                       int64_t e, int64_t width, int64_t steps, float scale, int64_t threads) {
  const Sizes s = {heads, t, e, width, steps, scale};
  parallel(n, threads, [=](int64_t begin, int64_t end, int64_t) {
    Backward backward(s);
    for (int64_t at = begin; at < end; ++at) {
      const int64_t rows = at * t, first = s.place_of(at, 0), steps_of = s.step_of(at, 0);
      backward.run(q + rows * e, k + rows * e, v + rows * width, y + first, f + steps_of, g + steps_of, dy + first,
                   dq + rows * e, dk + rows * e, dv + rows * width);
    }
  });
}

}  // extern "C"
