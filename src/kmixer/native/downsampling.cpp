// A depthwise filter over time that keeps every second row, y[k] = sum_{r < K} w_r x[2k + K - 1 - r].

#include "elementwise.h"

extern "C" {

// y (b, m, d) from x (b, n, d), m = (n - K) / 2 + 1, and weights (K, d).
void filter_and_halve_forward(const float* x, const float* weight, float* y, int64_t b, int64_t n, int64_t d,
                              int64_t taps, int64_t threads) {
  const int64_t m = (n - taps) / 2 + 1;
  parallel(b * m, threads, [=](int64_t begin, int64_t end, int64_t) {
    for (int64_t at = begin; at < end; ++at) {
      const float* newest = x + (at / m * n + 2 * (at % m) + taps - 1) * d;
      float* __restrict out = y + at * d;
      for (int64_t j = 0; j < d; ++j) out[j] = weight[j] * newest[j];
      for (int64_t r = 1; r < taps; ++r)
        for (int64_t j = 0; j < d; ++j) out[j] += weight[r * d + j] * newest[j - r * d];
    }
  });
}

// dx like x and dweight (K, d). The threads share the rows of the batch.
void filter_and_halve_backward(const float* x, const float* weight, const float* dy, float* dx, float* dweight,
                               int64_t b, int64_t n, int64_t d, int64_t taps, int64_t threads) {
  const int64_t m = (n - taps) / 2 + 1;
  RowSums sums(std::min(threads, b), taps * d);
  parallel(b, threads, [=, &sums](int64_t begin, int64_t end, int64_t thread) {
    for (int64_t batch = begin; batch < end; ++batch) {
      std::fill(dx + batch * n * d, dx + (batch + 1) * n * d, 0.0f);
      for (int64_t k = 0; k < m; ++k) {
        const int64_t newest = (batch * n + 2 * k + taps - 1) * d;
        const float* __restrict grad = dy + (batch * m + k) * d;
        for (int64_t r = 0; r < taps; ++r) {
          const float *row = x + newest - r * d, *w = weight + r * d;
          float *__restrict change = dx + newest - r * d, *__restrict sum = sums.of(thread) + r * d;
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
