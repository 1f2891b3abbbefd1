// The dense base kernel, y_i = sum_{j <= i} K[i, j] x_j for every channel: half of a matrix product, as strips
// of rows that end at the diagonal. Batch rows are shared by the threads.

#include "elementwise.h"
#include "gemm.h"

namespace {

constexpr int64_t kStrip = 48;

// The lower triangle of K (t rows of `stride`), zeros above it, with the row stride of gemm.h.
std::vector<float> lower_triangle(const float* K, int64_t t, int64_t stride) {
  std::vector<float> lower(t * stride_of(t));
  for (int64_t i = 0; i < t; ++i) std::memcpy(&lower[i * stride_of(t)], K + i * stride, sizeof(float) * (i + 1));
  return lower;
}

// x (t, d) as (d, t), a block of both at a time.
INLINE void transpose(const float* x, float* to, int64_t t, int64_t d, int64_t to_row) {
  constexpr int64_t block = 16;
  for (int64_t first = 0; first < t; first += block)
    for (int64_t c = 0; c < d; c += block)
      for (int64_t j = c; j < std::min(d, c + block); ++j)
        for (int64_t i = first; i < std::min(t, first + block); ++i) to[j * to_row + i] = x[i * d + j];
}

}  // namespace

extern "C" {

// x, y (b, t, d); K: the first t rows of `stride`, t columns used. d is a multiple of 16.
void dense_forward(const float* x, const float* K, float* y, int64_t b, int64_t t, int64_t d, int64_t stride,
                   int64_t threads) {
  parallel(b, threads, [=](int64_t begin, int64_t end, int64_t) {
    const std::vector<float> lower = lower_triangle(K, t, stride);
    const int64_t row = stride_of(t);
    for (int64_t batch = begin; batch < end; ++batch)
      for (int64_t i = 0; i < t; i += kStrip) {
        const int64_t count = std::min(kStrip, t - i), at = batch * t * d;
        multiply({&lower[i * row], row, 1}, x + at, d, y + at + i * d, d, count, i + count, d, false);
      }
  });
}

// dx (b, t, d) and dK, whose first t rows and columns are written, zeros above the diagonal.
void dense_backward(const float* x, const float* K, const float* dy, float* dx, float* dK, int64_t b, int64_t t,
                    int64_t d, int64_t stride, int64_t threads) {
  const int64_t row = stride_of(t);
  RowSums sums(threads, t * row);
  parallel(b, threads, [&](int64_t begin, int64_t end, int64_t thread) {
    const std::vector<float> lower = lower_triangle(K, t, stride);
    std::vector<float> transposed(d * row);
    for (int64_t batch = begin; batch < end; ++batch) {
      const float *in = x + batch * t * d, *gradient = dy + batch * t * d;
      transpose(in, transposed.data(), t, d, row);
      for (int64_t i = 0; i < t; i += kStrip) {
        const int64_t count = std::min(kStrip, t - i);
        multiply({&lower[i * row + i], 1, row}, gradient + i * d, d, dx + (batch * t + i) * d, d, count, t - i, d,
                 false);
        const int64_t columns = std::min(row, padded(i + count));
        multiply({gradient + i * d, d, 1}, transposed.data(), row, sums.of(thread) + i * row, row, count, d, columns,
                 true);
      }
    }
  });
  std::vector<float> total(t * t);
  sums.total(total.data(), t, row);
  for (int64_t i = 0; i < t; ++i)
    for (int64_t j = 0; j < t; ++j) dK[i * stride + j] = j <= i ? total[i * t + j] : 0.0f;
}

}  // extern "C"
