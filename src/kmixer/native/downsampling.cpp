// A depthwise filter over time that keeps every second row, y[k] = sum_{r < K} w_r x[2k + K - 1 - r], of rows x that lie
// in two tensors: a tail (b, p, d) from before, and those that follow it (b, n, d). Where there is a matrix (d, d), each
// row is multiplied by it before it is written, a tile of rows at a time.

#include "elementwise.h"
#include "gemm.h"

namespace {

constexpr int64_t kTile = 48;

struct Rows {
  int64_t b, p, n, d, taps;

  METHOD int64_t kept() const { return (p + n - taps) / 2 + 1; }
  // Row i of the tail and what follows it.
  template <class Number>
  METHOD Number* row(Number* tail, Number* rest, int64_t batch, int64_t i) const {
    return i < p ? tail + (batch * p + i) * d : rest + (batch * n + i - p) * d;
  }
  void filter(const float* tail, const float* x, const float* weight, int64_t batch, int64_t k,
              float* __restrict out) const {
    for (int64_t r = 0; r < taps; ++r) {
      const float *from = row(tail, x, batch, 2 * k + taps - 1 - r), *w = weight + r * d;
      for (int64_t j = 0; j < d; ++j) out[j] = r == 0 ? w[j] * from[j] : out[j] + w[j] * from[j];
    }
  }
};

}  // namespace

extern "C" {

// y (b, m, d), m = (p + n - K) / 2 + 1, by weights (K, d) and a matrix (d, d) or null.
void filter_and_halve_forward(const float* tail, const float* x, const float* weight, const float* matrix, float* y,
                              int64_t b, int64_t p, int64_t n, int64_t d, int64_t taps, int64_t threads) {
  const Rows rows = {b, p, n, d, taps};
  const int64_t m = rows.kept();
  parallel(b * m, threads, [=](int64_t begin, int64_t end, int64_t) {
    const Padded mixing = copy_of(matrix, matrix ? d : 0, d);
    Padded filtered(matrix ? kTile : 0, d);
    Tile out(d, d, padded(d), kTile);
    for (int64_t first = begin; first < end; first += kTile) {
      const int64_t count = std::min(kTile, end - first);
      for (int64_t i = 0; i < count; ++i)
        rows.filter(tail, x, weight, (first + i) / m, (first + i) % m, matrix ? filtered.row(i) : y + (first + i) * d);
      if (!matrix) continue;
      multiply({filtered.row(0), filtered.stride, 1}, mixing.row(0), mixing.stride, out.place(y + first * d),
               out.stride(), count, d, padded(d), false);
      out.give(y + first * d, count);
    }
  });
}

// dtail, dx, dweight (K, d) and, where there is a matrix, dmatrix. The threads share the rows of the batch.
void filter_and_halve_backward(const float* tail, const float* x, const float* weight, const float* matrix,
                               const float* dy, float* dtail, float* dx, float* dweight, float* dmatrix, int64_t b,
                               int64_t p, int64_t n, int64_t d, int64_t taps, int64_t threads) {
  const Rows rows = {b, p, n, d, taps};
  const int64_t m = rows.kept(), wide = stride_of(d);
  threads = std::min(threads, b);
  RowSums sums(threads, taps * d), matrix_sums(threads, matrix ? d * wide : 0);
  parallel(b, threads, [=, &sums, &matrix_sums](int64_t begin, int64_t end, int64_t thread) {
    const Padded mixing = transpose_of(matrix, matrix ? d : 0, d);
    Padded filtered(matrix ? kTile : 0, d), unmixed(matrix ? kTile : 0, d);
    Tile in(d, d, padded(d), kTile);
    for (int64_t batch = begin; batch < end; ++batch) {
      std::fill(dtail + batch * p * d, dtail + (batch + 1) * p * d, 0.0f);
      std::fill(dx + batch * n * d, dx + (batch + 1) * n * d, 0.0f);
      for (int64_t first = 0; first < m; first += kTile) {
        const int64_t count = std::min(kTile, m - first);
        const float* grad = dy + (batch * m + first) * d;
        if (matrix) {
          multiply({grad, d, 1}, mixing.row(0), mixing.stride, unmixed.row(0), unmixed.stride, count, d, padded(d),
                   false);
          for (int64_t i = 0; i < count; ++i) rows.filter(tail, x, weight, batch, first + i, filtered.row(i));
          multiply({filtered.row(0), 1, filtered.stride}, in.take(grad, count), in.stride(), matrix_sums.of(thread),
                   wide, d, count, padded(d), true);
        }
        for (int64_t i = 0; i < count; ++i)
          for (int64_t r = 0; r < taps; ++r) {
            const int64_t place = 2 * (first + i) + taps - 1 - r;
            const float *from = rows.row(tail, x, batch, place), *w = weight + r * d;
            const float* change = matrix ? unmixed.row(i) : grad + i * d;
            float *__restrict to = rows.row(dtail, dx, batch, place), *__restrict sum = sums.of(thread) + r * d;
            for (int64_t j = 0; j < d; ++j) {
              to[j] += w[j] * change[j];
              sum[j] += from[j] * change[j];
            }
          }
      }
    }
  });
  sums.total(dweight);
  if (matrix) matrix_sums.total(dmatrix, d, wide);
}

}  // extern "C"
