// A depthwise filter over time that keeps every second row, y[k] = sum_{r < K} w_r x[2k + K - 1 - r], of rows x that lie
// in two tensors: a tail (b, p, d) from before, and those that follow it (b, n, d).

#include "elementwise.h"

namespace {

// Row i of the tail and what follows it.
template <class Number>
INLINE Number* row_of(Number* tail, Number* rest, int64_t batch, int64_t p, int64_t n, int64_t i, int64_t d) {
  return i < p ? tail + (batch * p + i) * d : rest + (batch * n + i - p) * d;
}

}  // namespace

extern "C" {

// y (b, m, d), m = (p + n - K) / 2 + 1, by weights (K, d).
void filter_and_halve_forward(const float* tail, const float* x, const float* weight, float* y, int64_t b, int64_t p,
                              int64_t n, int64_t d, int64_t taps, int64_t threads) {
  const int64_t m = (p + n - taps) / 2 + 1;
  parallel(b * m, threads, [=](int64_t begin, int64_t end, int64_t) {
    for (int64_t at = begin; at < end; ++at) {
      float* __restrict out = y + at * d;
      for (int64_t r = 0; r < taps; ++r) {
        const float *row = row_of(tail, x, at / m, p, n, 2 * (at % m) + taps - 1 - r, d), *w = weight + r * d;
        for (int64_t j = 0; j < d; ++j) out[j] = r == 0 ? w[j] * row[j] : out[j] + w[j] * row[j];
      }
    }
  });
}

// dtail, dx and dweight (K, d). The threads share the rows of the batch.
void filter_and_halve_backward(const float* tail, const float* x, const float* weight, const float* dy, float* dtail,
                               float* dx, float* dweight, int64_t b, int64_t p, int64_t n, int64_t d, int64_t taps,
                               int64_t threads) {
  const int64_t m = (p + n - taps) / 2 + 1;
  RowSums sums(std::min(threads, b), taps * d);
  parallel(b, threads, [=, &sums](int64_t begin, int64_t end, int64_t thread) {
    for (int64_t batch = begin; batch < end; ++batch) {
      std::fill(dtail + batch * p * d, dtail + (batch + 1) * p * d, 0.0f);
      std::fill(dx + batch * n * d, dx + (batch + 1) * n * d, 0.0f);
      for (int64_t k = 0; k < m; ++k) {
        const float* __restrict grad = dy + (batch * m + k) * d;
        for (int64_t r = 0; r < taps; ++r) {
          const int64_t i = 2 * k + taps - 1 - r;
          const float *row = row_of(tail, x, batch, p, n, i, d), *w = weight + r * d;
          float *__restrict change = row_of(dtail, dx, batch, p, n, i, d), *__restrict sum = sums.of(thread) + r * d;
          for (int64_t j = 0; j < d; ++j) {
            change[j] += w[j] * grad[j];
            sum[j] += row[j] * grad[j];
          }
        }
      }
    }
  });
  sums.total(dweight);
}

}  // extern "C"
